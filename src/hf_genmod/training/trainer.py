"""The training loop, on Accelerate, for every objective."""

import contextlib
import hashlib
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    gather_object,
    patch_environment,
)
from torch.nn.parallel import DistributedDataParallel

from hf_genmod.errors import TrainingError
from hf_genmod.processes import processes
from hf_genmod.training import sharding
from hf_genmod.training.averaging import EarlyWeights, PowerFunctionAverage, average_in_bf16
from hf_genmod.training.batches import Batches, for_model
from hf_genmod.training.clock import Clock, Progress
from hf_genmod.training.config import TrainingConfig, fast_matrix_products
from hf_genmod.training.interruptions import (
    explained_loss_of_processes,
    explained_memory,
    keep_freed_memory,
    stop_signals,
)
from hf_genmod.training.monitor import Monitor
from hf_genmod.training.muon import Muon
from hf_genmod.training.provenance import origin, plan, provenance
from hf_genmod.training.run_folder import RunFolder, changeable_settings, run_settings
from hf_genmod.training.sharding import gathered
from hf_genmod.training.state import TrainingState, check_all_alike
from hf_genmod.training.validation import validation_metrics

# Two strides say the same of the weights of a 1×1 convolution; their gradients are copied, which costs nothing.
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")


class Trainer:
    """
    Trains a model by an objective and saves a checkpoint: Muon, gradient accumulation and clipping, mixed precision
    and a moving average of the weights, on any number of processes, which see the same batches.

    The same settings with the same `output_dir` continue an interrupted run from its newest saved state, on a CPU
    bitwise as if it had not been interrupted. Failures in sampling, tracking or saving a state are reported and do not
    stop training.

    Args:
        model (`nn.Module`): The model to train.
        objective (`Callable`): `(model, batch, rng) -> loss, metrics`; the batch has x_0 as its "images", and
            "fraction", the used part of the budget.
        dataset ([`PictureDataset`] or [`LatentDataset`]): The images.
        config ([`TrainingConfig`]): The settings.
        make_pipeline (`Callable`): `model -> ImagePipeline`, called with the averaged weights before training, to draw
            samples and to save the checkpoint.
        draw_samples (`Callable`, *optional*): `pipeline -> PIL.Image`, called on all processes every `sampling_steps`.
        validation_dataset (*optional*): Held-out images, whose loss is measured every `validation_steps`, see
            [`~hf_genmod.training.validation.validation_metrics`].
        save (`Callable`, *optional*): `pipeline, folder -> None`, which writes the checkpoint. Default:
            `pipeline.save_pretrained(folder)`.
        load (`Callable`, *optional*): `folder -> ImagePipeline`, which reads it. Default: `from_pretrained` of the
            class that `make_pipeline` makes.
        finish (`Callable`, *optional*): `pipeline -> None`, called on the main process after the checkpoint is saved.
        depends_on (`dict[str, str]`, *optional*): Fingerprints of frozen weights that the run uses as well, by name.

    Raises:
        ValueError: If the settings do not fit the data set or the processes, or the processes do not know each other.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        objective: Callable,
        dataset: torch.utils.data.Dataset,
        config: TrainingConfig,
        make_pipeline: Callable,
        draw_samples: Callable | None = None,
        validation_dataset: torch.utils.data.Dataset | None = None,
        save: Callable | None = None,
        load: Callable | None = None,
        finish: Callable | None = None,
        depends_on: dict[str, str] | None = None,
    ):
        self.config, self.objective = config, objective
        self.dataset, self.validation_dataset, self.depends_on = dataset, validation_dataset, depends_on or {}
        self.make_pipeline, self.draw_samples, self.finish = make_pipeline, draw_samples, finish
        self._draws = draw_samples is not None and config.sampling_steps > 0
        self.save = save or (lambda pipeline, folder: pipeline.save_pretrained(folder))
        self.load = load or (lambda folder: self._pipeline().from_pretrained(folder))
        self.folder = RunFolder(config.output_dir)
        in_shards = sharding.is_asked_for(config.mixed_precision, config.compile)
        self.accelerator = accelerator = _accelerator(config)
        self.batches = Batches(dataset, config, accelerator)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        model.to(accelerator.device, memory_format=torch.channels_last)
        model.train()
        self._dtype = next(model.parameters()).dtype
        self.averaged_model = PowerFunctionAverage(model, config.ema_length)
        if in_shards:
            sharding.shard(model, accelerator.device, config.mixed_precision)
        betas, shared = (config.adam_beta1, config.adam_beta2), accelerator.num_processes > 1
        optimizer = Muon(model, config.learning_rate, betas=betas, weight_decay=config.weight_decay, shared=shared)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # An evaluation needs no DistributedDataParallel around the model, and shards do not either.
        self.model = accelerator.prepare_model(model, evaluation_mode=in_shards)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        parallel = getattr(self.model, "_orig_mod", self.model)  # of a compiled one
        if config.mixed_precision == "bf16" and isinstance(parallel, DistributedDataParallel):
            parallel.register_comm_hook(None, average_in_bf16)
        self.progress, self.monitor = Progress(), Monitor(config, self.folder, accelerator)
        self.early_weights = EarlyWeights(self.averaged_model, config.guiding_fraction)
        models = model, self.averaged_model, self.early_weights
        self.state = TrainingState(*models, self.optimizer, self.progress, self.monitor, accelerator)
        self.provenance = None

    def open_run(self, arguments: dict[str, object] | None = None):
        """
        Claims `output_dir` for this run, or recognises in it the same run, started before.

        Args:
            arguments (`dict`, *optional*): The dataclasses that define the run besides the `config`, by the names
                under which `training_config.json` records them.

        Raises:
            ValueError: If `output_dir` holds something else, processes have read different images, or the pipeline's
                parts do not fit.
        """
        accelerator, dataset, arguments = self.accelerator, self.dataset, arguments or {}
        # Now, as files may change while it trains, and an error at the end would cost the run.
        facts = {**provenance(accelerator.num_processes), **plan(self.config, self.averaged_model)}
        self.early_weights.check(pipeline := self._pipeline())
        self.provenance = {**facts, **origin(dataset, pipeline)}
        if len(set(gather_object([dataset.fingerprint]))) > 1:
            reason = "a disk may have failed, so try again"
            raise ValueError(f"dataset: the processes have read different images from {dataset.name}; {reason}")
        settings = run_settings(self.config, arguments, dataset, self.validation_dataset, self.depends_on)
        self.folder.check(settings, changeable_settings(self.config, arguments))
        accelerator.wait_for_everyone()  # for all to have checked
        if accelerator.is_main_process:
            self.folder.claim(settings)
        if dataset.skipped:
            self.monitor.say(
                f"{len(dataset.skipped)} images, or shards of them, cannot be used and are left out; "
                f"{self.config.output_dir}/training_config.json lists them"
            )
        accelerator.wait_for_everyone()

    def train(self):
        """
        Trains until the budget is used and saves the checkpoint to `output_dir`.

        Returns:
            `ImagePipeline`: The pipeline with the averaged weights.

        Raises:
            SystemExit: After SIGINT (status 130) or SIGTERM (status 143), with the training state saved.
            TrainingError: If memory does not suffice, too many losses in a row are not finite, the checkpoint cannot
                be written, or another process is training in `output_dir`.
            ValueError: As `open_run` does, which is called if it has not been.
        """
        accelerator = self.accelerator
        if self.provenance is None:
            self.open_run()
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        lock = self.folder.locked() if accelerator.is_main_process else contextlib.nullcontext()
        with lock, fast_matrix_products(accelerator.device), explained_loss_of_processes():
            pipeline = self._finished_pipeline()
            accelerator.wait_for_everyone()  # for all to have read it
            if pipeline is not None:
                accelerator.print(f"{self.config.output_dir} is complete; there is nothing left to train")
            else:
                in_shards = sharding.in_shards(self.averaged_model.module, self.state.model)
                with stop_signals(self.monitor.say) as signals, contextlib.closing(self.batches), in_shards:
                    self._train(signals)
            try:
                pipeline = self._save_checkpoint() if pipeline is None else self._shown(pipeline)
                if self.finish is not None and accelerator.is_main_process:
                    with self.monitor.optional("the work after training"):
                        self.finish(pipeline)
            except KeyboardInterrupt:
                self._leave([signal.SIGINT])
        return pipeline

    def _finished_pipeline(self):
        """The checkpoint, if the run is over and it can be read."""
        check_all_alike(self.folder.is_complete, "whether the run is complete", self.folder)
        if not self.folder.is_complete:
            return None
        try:
            return self.load(self.config.output_dir)
        except Exception as error:  # whatever the loaders of three libraries raise
            damage = f"the checkpoint in {self.config.output_dir} cannot be read ({error})"
            if not self.folder.saved_states():
                remedy = f"delete its {self.folder.index} to train it again"
                raise TrainingError(f"{damage}, and there is no saved state to write it from; {remedy}") from error
            self.monitor.say(f"{damage}; writing it again")
            return None

    def _train(self, signals: list[int]):
        config, progress, monitor = self.config, self.progress, self.monitor
        monitor.announce(self.provenance, self.dataset.pictures)
        self.state.resume(self.folder)
        monitor.start_tracker()
        self.clock = clock = Clock(config, progress, self.accelerator, signals)
        with monitor.progress_bar(clock.fraction) as bar:
            self.batches.open(progress.step)  # in here, so that its processes do not die of a Ctrl-C
            while clock.fraction < 1:
                learning_rate = config.learning_rate_at(clock.fraction)
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate
                with explained_memory(config, self.dataset.resolution, self.accelerator.num_processes):
                    self._step()
                every = (config.logging_steps, config.sampling_steps, config.checkpointing_steps)
                due = any(map(self._is_due, every)) or progress.step == config.max_train_steps
                due = due or (self.validation_dataset is not None and self._is_due(config.validation_steps))
                bar.update(min(clock.tick(due), 1.0) - bar.n)
                self.early_weights.keep(clock.fraction)
                done = clock.fraction >= 1
                if not (due or done or clock.is_stopping):
                    continue  # without waiting for the device

                bad_steps = progress.count(monitor.look(), math.inf if clock.is_stopping else config.max_bad_steps)
                if clock.is_stopping and progress.take_back():  # for the run that continues to repeat them
                    self.state.save(self.folder, config.checkpoints_total_limit)
                    self.batches.failure = next(filter(None, gather_object([self.batches.failure])), None)
                    self._leave(signals)
                all_bad = done and progress.bad_steps == progress.step
                too_bad = progress.bad_steps_in_a_row >= config.max_bad_steps or all_bad
                validation = self._validation(done)
                if done or too_bad or validation or self._is_due(config.logging_steps):
                    monitor.log(clock, learning_rate, validation, bar)
                if bad_steps:
                    monitor.report_bad_steps(bad_steps, progress, learning_rate, too_bad)
                if self._is_due(config.sampling_steps) and not done and clock.has_time_for("drawing samples"):
                    with clock.pause("drawing samples", self.averaged_model.module):
                        self._show()
                if clock.is_stopping or self._is_due(config.checkpointing_steps, done):
                    self.state.save(self.folder, config.checkpoints_total_limit)
                if clock.is_stopping and not done:
                    self._leave(signals)

    def _step(self):
        """One optimizer step on one global batch. The device skips it if the loss or its gradient is not finite, or
        there is no batch; the host waits for it in fp16 alone."""
        config, accelerator, step = self.config, self.accelerator, self.progress.step
        batches = self.batches.of_step(step)
        if is_missing := self.batches.failure is not None:
            self.clock.signals.append(signal.SIGTERM)  # which all processes learn of
        torch.manual_seed(_mix(config.seed, step, accelerator.process_index))  # for dropout layers
        parts = []
        for batch, rng in batches:
            with accelerator.accumulate(self.model):
                batch = for_model(batch, self.dataset, rng, config.augmentation, self._dtype)
                loss, metrics = self.objective(self.model, {**batch, "fraction": self.clock.fraction}, rng)
                accelerator.backward(loss)
            parts.append({"loss": loss.detach(), **metrics})
        gradient_norm = sharding.whole(accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm))
        means = {name: torch.stack([metrics[name] for metrics in parts]).mean() for name in parts[0]}
        bad = (means["loss"] + gradient_norm).isfinite().logical_not().float()
        bad = self.clock.tell(torch.ones_like(bad) if is_missing else bad)
        if accelerator.scaler is not None and bad.item():
            accelerator.scaler.update()  # to a lower scale
        else:
            # Muon's matrix products can be in bf16, but not in fp16, whose range is too small for squared gradients.
            in_bf16 = config.mixed_precision == "bf16"
            self.optimizer.optimizer.found_inf = bad
            with config.autocast(accelerator.device) if in_bf16 else contextlib.nullcontext():
                self.optimizer.step()
        self.optimizer.zero_grad()
        self.averaged_model.update(unchanged_if=bad)
        self.monitor.add(bad, {**means, "gradient_norm": gradient_norm.detach()})
        self.progress.step += 1

    def _validation(self, done: bool) -> dict[str, float]:
        """The loss on held-out images, if it is time to measure it."""
        is_due = self.validation_dataset is not None and self._is_due(self.config.validation_steps, done)
        if not is_due or not (done or self.clock.has_time_for("validating")):
            return {}
        model, what = self.averaged_model.module.eval(), "validating"
        with self.monitor.optional(what), self.clock.pause(what, model), self.monitor.doing(what), gathered(model):
            return validation_metrics(model, self.objective, self.validation_dataset, self.config, self.accelerator)
        return {}

    def _is_due(self, every: int, done: bool = False) -> bool:
        """Whether it is the step for what happens `every` so many steps, 0 for never, and perhaps at the end."""
        return every > 0 and (done or self.progress.step % every == 0)

    def _pipeline(self):
        return self.make_pipeline(self.averaged_model.module.eval())

    def _show(self, pipeline=None):
        def draw():
            with gathered(self.averaged_model.module):
                drawing = pipeline or self._pipeline()
                drawing.set_progress_bar_config(desc="drawing samples", disable=not self.monitor.has_ended)
                return self.draw_samples(drawing)

        self.monitor.show(self.progress.step, draw if self._draws else None)

    def _shown(self, pipeline):
        """The pipeline of a complete run, whose last samples are drawn if a Ctrl-C has prevented that."""
        self.progress.step = self.folder.last_step
        if self._draws and not self.folder.has_sample(self.progress.step):
            self._show(pipeline)
        return pipeline

    def _save_checkpoint(self):
        pipeline = self.early_weights.into(self._pipeline())
        if self.accelerator.is_main_process:
            try:
                length = {"minutes": self.progress.elapsed / 60, "steps": self.progress.step}
                self.folder.save_provenance({**self.provenance, **length})
                with self.monitor.doing("saving the checkpoint"):
                    self.folder.save_checkpoint(lambda folder: self.save(pipeline, folder))
            except OSError as error:
                states = self.folder.saved_states()
                start = f"the state {states[-1].name}" if states else "the start, as no state was saved"
                remedy = f"make room, and repeat the command, which goes on from {start}"
                raise TrainingError(f"the checkpoint could not be written ({error}); {remedy}") from error
        self.accelerator.wait_for_everyone()
        self._show()
        self.monitor.end_tracker()
        return pipeline

    def _leave(self, stopped_by: list[int]):
        step, states = self.progress.step, [state.name for state in self.folder.saved_states()]
        saved = "the state saved" if f"step-{step}" in states else "the state NOT saved"
        saved = "the checkpoint complete" if self.folder.is_complete else saved
        self.monitor.end_tracker()
        processes().destroy_process_group()
        if failure := self.batches.failure:
            raise TrainingError(f"{failure}; stopped at step {step} with {saved}; {self.batches.remedy()}")
        self.monitor.say(f"\nstopped at step {step} with {saved}; the same command continues the run")
        sys.exit(128 + (stopped_by[0] if stopped_by else signal.SIGTERM))


def _accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a run. Refuses a launcher whose processes do not know each other, and a tracker that is not
    installed."""
    processes()  # which the accelerator would make with less patience
    AcceleratorState._shared_state, GradientState._shared_state = {}, {}  # each trainer has its own settings
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # it would shard on GPUs alone, and by layers of transformers
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(config.gradient_accumulation_steps),
            log_with=config.report_to,
            project_dir=f"{config.output_dir}/logs",
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            dynamo_backend="inductor" if config.compile else None,
            cpu=not torch.accelerator.is_available(),
        )
    if config.report_to and not accelerator.log_with:
        raise ValueError(f"report_to: {config.report_to!r} is not installed; pip install it")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE is {world_size} but Accelerate sees {accelerator.num_processes} process(es), so each would "
            "train alone; start the script with `torchrun --nproc_per_node N` or `accelerate launch --num_processes N`"
        )
    return accelerator


def _mix(*numbers: int) -> int:
    """A seed that differs for every tuple of numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
