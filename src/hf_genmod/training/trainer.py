"""The training loop, on Accelerate, for every objective."""

import collections
import contextlib
import dataclasses
import hashlib
import math
import os
import re
import signal
import sys
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    TorchDynamoPlugin,
    gather_object,
)
from huggingface_hub.utils import validate_repo_id
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from hf_genmod.data.latents import draw_latents
from hf_genmod.data.randomness import BatchRandom, GlobalBatchSampler, batch_positions, flip, shift
from hf_genmod.data.value_range import to_model_range
from hf_genmod.drawing.curves import draw_losses
from hf_genmod.errors import TrainingError
from hf_genmod.sharing.model_card import write_card
from hf_genmod.sharing.push import PushError, push_checkpoint
from hf_genmod.training.averaging import average_in_bf16, power_function_average
from hf_genmod.training.clock import Clock, Progress
from hf_genmod.training.config import TrainingConfig
from hf_genmod.training.interruptions import keep_freed_memory, stop_signals
from hf_genmod.training.muon import Muon
from hf_genmod.training.provenance import provenance
from hf_genmod.training.run_folder import RunFolder

NUM_BANDS = 5  # of noise levels, in validation


class Trainer:
    """
    Trains a model by an objective and leaves a checkpoint: Muon, gradient accumulation and clipping, mixed precision,
    a moving average of the weights, on any number of processes.

    A run is defined by its settings: the same command in the same `output_dir` continues an interrupted run from its
    newest saved state, on a CPU bitwise as if it had not been interrupted. Each step's randomness derives from (seed,
    step, position in the batch), see [`BatchRandom`], so nothing is replayed, and any number of
    processes sees the same batches.

    What the weights do not depend on, such as samples, a tracker or a saved state, may fail: the run says so and goes
    on.

    Args:
        model (`nn.Module`): What is trained.
        objective (`Callable`): `(model, batch, rng) -> loss, metrics`, see `objectives.py`.
        dataset ([`PictureDataset`]): The pictures.
        config ([`TrainingConfig`]): The settings.
        make_pipeline (`Callable`): `model -> DiffusionPipeline`, whose `save_pretrained` writes the checkpoint.
        draw_samples (`Callable`, *optional*): `pipeline -> PIL.Image.Image`, called every `sampling_steps`, by all
            processes.
        description (`dict`, *optional*): Whatever else defines the run, written to `training_config.json`.
        validation_dataset ([`PictureDataset`], *optional*): Held-out pictures, whose loss under the
            averaged weights is measured every `validation_steps`, always with the same noise. Of a loss by noise
            level, for each fifth of the timesteps too.
        save (`Callable`, *optional*): `pipeline, folder -> None`, which writes another checkpoint than that of the
            whole pipeline: an adapter.
        load (`Callable`, *optional*): `pipeline, folder -> DiffusionPipeline`, which reads it.
        finish (`Callable`, *optional*): `pipeline -> None`, called by the main process when the checkpoint is there,
            before its card is written.

    Raises:
        ValueError: If `output_dir` holds something else, or processes run side by side without knowing each other.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        objective: Callable,
        dataset: torch.utils.data.Dataset,
        config: TrainingConfig,
        make_pipeline: Callable,
        draw_samples: Callable | None = None,
        description: dict | None = None,
        validation_dataset: torch.utils.data.Dataset | None = None,
        save: Callable | None = None,
        load: Callable | None = None,
        finish: Callable | None = None,
    ):
        self.config = config
        self.objective = objective
        self.dataset = dataset
        self.validation_dataset = validation_dataset
        self.make_pipeline = make_pipeline
        self.draw_samples = draw_samples
        self.save = save or (lambda pipeline, folder: pipeline.save_pretrained(folder))
        self.load = load or (lambda pipeline, folder: pipeline.from_pretrained(folder))
        self.finish = finish or (lambda pipeline: None)
        self.folder = RunFolder(config.output_dir)
        self.repo_id = config.hub_model_id or self.folder.path.resolve().name
        if config.push_to_hub:
            validate_repo_id(self.repo_id)

        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(config.gradient_accumulation_steps),
            log_with=config.report_to,
            project_config=ProjectConfiguration(config.output_dir, logging_dir=f"{config.output_dir}/logs"),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            dynamo_plugin=TorchDynamoPlugin(backend="inductor") if config.compile else None,
            cpu=not torch.accelerator.is_available(),
        )
        _check_launch(config, self.accelerator)
        batch_positions(  # raises if the batch cannot be shared
            config.batch_size, 0, config.gradient_accumulation_steps, 0, self.accelerator.num_processes
        )
        if config.horizontal_flip and not getattr(dataset, "mirrored", True):
            raise ValueError(
                "horizontal_flip: the latents are not those of mirrored pictures too; encode these as well"
            )
        if config.max_shift and getattr(dataset, "vae", None) is not None:
            raise ValueError("max_shift: latents cannot be moved by pixels; shift the pictures of their autoencoder")
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        model.to(self.accelerator.device, memory_format=torch.channels_last)
        model.train()
        self.averaged_model = AveragedModel(model, multi_avg_fn=power_function_average(config.ema_length))
        optimizer = Muon(
            model,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            shared=self.accelerator.num_processes > 1,
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        parallel = getattr(self.model, "_orig_mod", self.model)  # of a compiled one
        if config.mixed_precision == "bf16" and isinstance(parallel, DistributedDataParallel):
            parallel.register_comm_hook(None, average_in_bf16)
        self._pipeline()  # raises if its parts do not fit
        self.provenance = provenance(self.accelerator.num_processes)  # now, as files may change while it trains
        self.progress = Progress()
        self.accumulated = {}  # name -> values of the steps since the last line of metrics
        self._open_run(description or {})

    def train(self):
        """
        Runs until the budget is used and saves the checkpoint to `output_dir`.

        Returns:
            The pipeline with the averaged weights.

        Raises:
            SystemExit: After SIGINT (status 130) or SIGTERM (status 143), with the training state saved.
            TrainingError: If memory does not suffice, the loss does not come back from infinity, the checkpoint cannot
                be written, or another process is at work in `output_dir`.
        """
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        with self.folder.locked() if self.accelerator.is_main_process else contextlib.nullcontext():
            try:
                pipeline = self._train()
            finally:
                self.batches = None  # ends the processes that load pictures
            if self.accelerator.is_main_process:
                with self._optional("what belongs to the end"):
                    self.finish(pipeline)
                if self.config.license is not None:
                    self._share()
        return pipeline

    def _train(self):
        config, accelerator, progress = self.config, self.accelerator, self.progress
        pipeline = self._finished_pipeline()
        accelerator.wait_for_everyone()  # for all to have read it
        if pipeline is not None:
            accelerator.print(f"{config.output_dir} is complete; there is nothing left to train")
            return pipeline
        self._resume()
        with self._optional("the tracker"):
            settings = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
            accelerator.trackers = []  # should they fail to start
            accelerator.init_trackers("hf_genmod", config=settings)
        self.clock = Clock(config, progress, accelerator)
        bar = tqdm(
            total=1.0,
            initial=self.clock.fraction,
            bar_format="{percentage:3.0f}% |{bar}| {elapsed} < {remaining}{postfix}",
            disable=not accelerator.is_main_process,
        )
        with stop_signals() as stopped_by, bar:
            self._open_loader()  # in here, so that its processes do not die of a Ctrl-C
            while self.clock.fraction < 1:
                learning_rate = config.learning_rate_at(self.clock.fraction)
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate
                with self._explained_memory():
                    metrics = self._step()
                progress.step += 1
                if metrics is None:
                    progress.bad_steps += 1
                    progress.bad_steps_in_a_row += 1
                else:
                    progress.bad_steps_in_a_row = 0
                    self.averaged_model.update_parameters(self.model)
                    for name, value in metrics.items():
                        self.accumulated.setdefault(name, []).append(value)
                bar.update(min(self.clock.tick(), 1.0) - bar.n)

                done = self.clock.fraction >= 1
                too_bad = progress.bad_steps_in_a_row >= config.max_bad_steps
                validation = {}
                if config.validation_steps and (done or progress.step % config.validation_steps == 0):
                    validation = self._validate()
                if done or too_bad or validation or progress.step % config.logging_steps == 0:
                    self._log(learning_rate, validation, bar)
                if metrics is None:
                    self._report_bad_step(learning_rate, too_bad)
                if config.sampling_steps and not done and progress.step % config.sampling_steps == 0:
                    self._sample()
                stopping = self._any_process(bool(stopped_by))
                if stopping or (
                    config.checkpointing_steps and (done or progress.step % config.checkpointing_steps == 0)
                ):
                    self._save_state()
                if stopping and not done:
                    self._leave(stopped_by)
        return self._finish()

    def _step(self) -> dict[str, torch.Tensor] | None:
        """One optimizer step on one global batch: the metrics of this process, or None if it had to be skipped."""
        config, accelerator = self.config, self.accelerator
        step = self.progress.step
        batches = self._next_batches()
        torch.manual_seed(_mix(config.seed, step, accelerator.process_index))  # for dropout layers
        parts = []
        for part, batch in enumerate(batches):
            positions = batch_positions(
                config.batch_size, part, config.gradient_accumulation_steps,
                accelerator.process_index, accelerator.num_processes,
            )  # fmt: skip
            rng = BatchRandom(config.seed, step, positions, config.batch_size, accelerator.device)
            with accelerator.accumulate(self.model):
                batch = {**self._prepare(batch, rng), "fraction": self.clock.fraction}
                loss, metrics = self.objective(self.model, batch, rng)
                accelerator.backward(loss)
            parts.append({"loss": loss.detach(), **metrics})
        gradient_norm = accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        means = {name: torch.stack([metrics[name] for metrics in parts]).mean() for name in parts[0]}
        finite = (means["loss"] + gradient_norm).isfinite().item()
        bad = self._any_process(not finite)
        if not bad:
            # Its matrix products stand bf16, but not fp16, which has no room for the squares of gradients.
            with accelerator.autocast() if config.mixed_precision == "bf16" else contextlib.nullcontext():
                self.optimizer.step()
        elif accelerator.scaler is not None:
            accelerator.scaler.update()  # to a lower scale
        self.optimizer.zero_grad()
        return None if bad else {**means, "gradient_norm": gradient_norm.detach()}

    def _validate(self) -> dict[str, float]:
        """Mean loss of held-out pictures, each at one noise level, and its metrics: all in all, and by fifths of T."""
        if self.validation_dataset is None:
            return {}
        accelerator, count = self.accelerator, len(self.validation_dataset)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))  # rows may be sorted by class
        num_bands = NUM_BANDS if getattr(self.objective, "by_noise_level", False) else 1
        # Stratified by position, so that neighbours have neighbouring noise levels.
        bands = torch.arange(count).tensor_split(num_bands)
        sums = collections.defaultdict(lambda: [0.0] * num_bands)
        model = self.averaged_model.module.eval()
        for band, positions in enumerate(bands):
            mine = positions[accelerator.process_index :: accelerator.num_processes]
            for part in mine.split(self.config.batch_size) if len(mine) else ():
                rng = BatchRandom(self.config.seed, 0, part, count, accelerator.device)
                batch = self.validation_dataset.__getitems__(order[part].tolist())
                with torch.no_grad(), accelerator.autocast():
                    loss, metrics = self.objective(model, self._prepare(batch, rng), rng)
                for name, value in {"loss": loss, **metrics}.items():
                    sums[name][band] += value.item() * len(part)
        total = collections.defaultdict(lambda: [0.0] * num_bands)
        for of_process in gather_object([dict(sums)]):
            for name, values in of_process.items():
                total[name] = [a + b for a, b in zip(total[name], values, strict=True)]
        means = {}
        for name, values in sorted(total.items()):
            means[f"validation_{name}"] = sum(values) / count
            for band, positions in enumerate(bands if num_bands > 1 else []):
                low, high = band / num_bands, (band + 1) / num_bands
                if len(positions):
                    means[f"validation_{name}_{low:.1f}_{high:.1f}"] = values[band] / len(positions)
        return means

    def _report_bad_step(self, learning_rate, too_bad: bool):
        config, progress = self.config, self.progress
        where = f"step {progress.step} (learning rate {learning_rate:.2g}, mixed precision {config.mixed_precision!r})"
        if too_bad:
            states = self.folder.saved_states()
            remedy = "lower the learning rate"
            if config.mixed_precision != "no":
                remedy += " or train with --mixed_precision no"
            raise TrainingError(
                f"the loss or its gradient was not finite in {progress.bad_steps_in_a_row} steps in a row, up to "
                f"{where}; {states[-1] if states else 'no state'} is the last that was saved; {remedy}, in a new "
                "output_dir"
            )
        self._say(f"the loss or its gradient is not finite at {where}; the step is skipped")

    @contextlib.contextmanager
    def _explained_memory(self):
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            known = (torch.OutOfMemoryError, MemoryError)
            if not isinstance(error, known) and not re.search("out of memory|can't allocate memory", str(error)):
                raise
            config = self.config
            share, parts = config.batch_size // self.accelerator.num_processes, config.gradient_accumulation_steps
            finer = [n for n in range(parts + 1, share + 1) if share % n == 0]
            flags = [f"--gradient_accumulation_steps {n} (the same steps in smaller parts)" for n in finer[:1]]
            if not config.gradient_checkpointing:
                flags.append("--gradient_checkpointing")
            if config.mixed_precision == "no":
                flags.append("--mixed_precision bf16 (in a new output_dir)")
            height, width = self.dataset.resolution
            raise TrainingError(
                f"out of memory with a batch of {config.batch_size} pictures of {height}x{width}; what helps, in this "
                f"order: {', '.join([*flags, 'a smaller --resolution'])}"
            ) from error

    def _prepare(self, batch, rng):
        device = self.accelerator.device
        batch = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        mirror = self.config.horizontal_flip
        if "posteriors" in batch:
            images = draw_latents(batch.pop("posteriors"), rng, mirror)
        else:
            images = to_model_range(batch["images"])
            images = flip(images, rng) if mirror else images
            images = shift(images, rng, self.config.max_shift) if self.config.max_shift else images
        images = images.to(torch.promote_types(images.dtype, next(self.model.parameters()).dtype))  # fp64 in, fp64 on
        return {**batch, "images": images.contiguous(memory_format=torch.channels_last)}

    def _open_loader(self):
        config, accelerator = self.config, self.accelerator
        sampler = GlobalBatchSampler(
            len(self.dataset),
            config.batch_size,
            config.seed,
            start_step=self.progress.step,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )
        self.batches = iter(
            torch.utils.data.DataLoader(
                self.dataset,
                batch_sampler=sampler,
                collate_fn=_identity,
                num_workers=config.num_workers,
                pin_memory=accelerator.device.type == "cuda",
            )
        )
        if config.num_workers:
            # The handler that torch installs raises wherever we are, even between two weights; the next batch tells.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _next_batches(self) -> list[dict]:
        """The parts of this step's batch; by new workers if one of them has died."""
        count = self.config.gradient_accumulation_steps
        try:
            return [next(self.batches) for _ in range(count)]
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            print(f"a process that loads pictures has died ({error}); starting others", file=sys.stderr)
            self._open_loader()
            return [next(self.batches) for _ in range(count)]

    # ---- what a run leaves in its folder ----

    def _open_run(self, description):
        """Claims `output_dir` for this run, or recognises in it the same run, started before."""
        this_run = {
            "training": dataclasses.asdict(self.config),
            "pictures": {
                "name": self.dataset.name,
                "num_pictures": len(self.dataset),
                "num_held_out": 0 if self.validation_dataset is None else len(self.validation_dataset),
                "fingerprint": self.dataset.fingerprint,
                "skipped": self.dataset.skipped,
            },
            **description,
        }
        if len(set(gather_object([self.dataset.fingerprint]))) > 1:
            raise ValueError(
                f"dataset: the processes have read different pictures from {self.dataset.name}; a disk may have "
                "failed, so try again"
            )
        self.folder.check(this_run)
        self.accelerator.wait_for_everyone()  # for all to have checked
        if self.accelerator.is_main_process:
            self.folder.claim(this_run)
        if self.dataset.skipped:
            total = len(self.dataset) + len(self.dataset.skipped)
            self._say(
                f"{len(self.dataset.skipped)} of {total} pictures cannot be used and are left out; "
                f"{self.config.output_dir}/training_config.json lists them"
            )
        self.accelerator.wait_for_everyone()

    def _finished_pipeline(self):
        """The checkpoint, if the run is over and it can be read."""
        if not self.folder.is_complete:
            return None
        try:
            return self.load(self._pipeline(), self.config.output_dir)
        except Exception as error:  # whatever the loaders of three libraries raise
            damage = f"the checkpoint in {self.config.output_dir} cannot be read ({error})"
            if not self.folder.saved_states():
                raise TrainingError(
                    f"{damage}, and there is no saved state to write it from; delete its {self.folder.index} to train "
                    "it again"
                ) from error
            self._say(f"{damage}; writing it again")
            return None

    def _resume(self):
        state = self.folder.newest_state(self._say)
        if state is not None:
            self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
            self.averaged_model.load_state_dict(state["averaged_model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            vars(self.progress).update(state["progress"])
            for name, values in state["accumulated"].items():  # (processes, steps)
                same_processes = len(values) == self.accelerator.num_processes
                mine = values[self.accelerator.process_index] if same_processes else values.mean(dim=0)
                self.accumulated[name] = list(mine.to(self.accelerator.device))
            self.accelerator.print(f"continuing {self.config.output_dir} from step {self.progress.step}")
        if self.accelerator.is_main_process:
            self.folder.forget_metrics_after(self.progress.step)

    def _save_state(self):
        """All that the rest of the run depends on, for any number of processes to go on from."""
        accumulated = {
            name: self.accelerator.gather(torch.stack(values)[None]) for name, values in self.accumulated.items()
        }
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "model": self.accelerator.unwrap_model(self.model).state_dict(),
                "averaged_model": self.averaged_model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "progress": vars(self.progress),
                "accumulated": accumulated,
            }
            with self._optional("saving the training state"):
                self.folder.save_state(self.progress.step, state, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _optional(self, what: str):
        """Around what the run can do without."""
        try:
            yield
        except Exception as error:
            self._say(f"{what} failed ({type(error).__name__}: {error}); the run goes on")

    def _say(self, message: str):
        if self.accelerator.is_main_process:
            tqdm.write(message, file=sys.stderr)

    def _log(self, learning_rate, validation, bar):
        """A line of metrics: means over the steps since the last one, None where all of them were bad."""
        accelerator = self.accelerator
        values = {"loss": None, "gradient_norm": None}
        if self.accumulated:
            means = torch.stack([torch.stack(steps).mean() for steps in self.accumulated.values()])
            means = accelerator.reduce(means, "mean").tolist()
            values = dict(sorted(zip(self.accumulated, means, strict=True)))
        self.accumulated = {}
        images_per_second = self.clock.steps_per_second() * self.config.batch_size
        line = {
            "step": self.progress.step,
            "fraction": round(self.clock.fraction, 6),
            **values,
            **validation,
            "learning_rate": learning_rate,
            "bad_steps": self.progress.bad_steps,
            "images_per_second": images_per_second,
            "elapsed_seconds": self.progress.elapsed,
        }
        with self._optional("the tracker"):
            accelerator.log(line, step=self.progress.step)
        if accelerator.is_main_process:
            with self._optional("writing metrics.jsonl"):
                self.folder.append_metrics(line)
        bar.set_postfix_str(
            f"step {line['step']}, loss {values['loss'] or math.nan:.4f}, learning rate {learning_rate:.1e}, "
            f"{images_per_second:.0f} images/s"
        )

    def _sample(self):
        if self.draw_samples is not None and self.config.sampling_steps:
            with self._optional("drawing samples"):
                pipeline = self._pipeline()
                pipeline.set_progress_bar_config(disable=True)
                picture = self.draw_samples(pipeline)
                if self.accelerator.is_main_process:
                    self.folder.save_sample(self.progress.step, picture)
                    with self._optional("the tracker"):
                        self._track_picture("samples", picture)
        if self.accelerator.is_main_process:
            with self._optional("drawing loss.png"):
                draw_losses(self.folder.metrics(), self.folder.path / "loss.png")
        self.accelerator.wait_for_everyone()

    def _track_picture(self, name: str, picture):
        for tracker in self.accelerator.trackers:
            if tracker.name == "trackio":  # for which Accelerate has no `log_images`
                import trackio

                tracker.log({name: trackio.Image(picture)}, step=self.progress.step)
            elif tracker.name == "tensorboard":
                pixels = np.asarray(picture.convert("RGB"))[None]  # (1, H, W, 3)
                tracker.log_images({name: pixels}, step=self.progress.step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [picture]}, step=self.progress.step)

    def _pipeline(self):
        return self.make_pipeline(self.averaged_model.module.eval())

    def _finish(self):
        accelerator = self.accelerator
        pipeline = self._pipeline()
        if accelerator.is_main_process:
            try:
                self.folder.save_provenance(self._origin())
                self.folder.save_checkpoint(lambda folder: self.save(pipeline, folder))
            except OSError as error:
                states = self.folder.saved_states()
                raise TrainingError(
                    f"the checkpoint could not be written ({error}); make room, and repeat the command, which goes on "
                    f"from {f'the state {states[-1].name}' if states else 'the start, as no state was saved'}"
                ) from error
        accelerator.wait_for_everyone()
        self._sample()
        with self._optional("the tracker"):
            accelerator.end_training()
        return pipeline

    def _origin(self) -> dict:
        """Where the checkpoint comes from, for its card."""
        pictures = getattr(self.dataset, "pictures", self.dataset)  # of latents, of an adapter
        labels, names = getattr(pictures, "labels", None), getattr(pictures, "label_names", None)
        balance = collections.Counter(torch.as_tensor(labels).tolist() if labels is not None and names else ())
        return {
            **self.provenance,
            "minutes": self.progress.elapsed / 60,
            "steps": self.progress.step,
            "num_pictures": len(pictures),
            "fingerprint": pictures.fingerprint,
            "class_balance": {name: balance[label] for label, name in enumerate(names or ()) if balance[label]},
            "captions": (getattr(pictures, "captions", None) or [])[:3],
        }

    def _share(self):
        """Writes the card, and pushes the checkpoint with it; the run is over, whether or not that succeeds."""
        config = self.config
        with self._optional("writing the card"):
            write_card(config.output_dir, config.license)
        if config.push_to_hub:
            private = config.hub_private_repo or None
            try:
                report = push_checkpoint(config.output_dir, self.repo_id, private=private, license=config.license)
                self._say(f"{report.url} loads and draws what {config.output_dir} does ({report.sample})")
            except (PushError, ValueError, OSError) as error:
                self._say(str(error))

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return self.accelerator.reduce(flags, "sum").item() > 0

    def _leave(self, stopped_by):
        step = self.progress.step
        saved = any(state.name == f"step-{step}" for state in self.folder.saved_states())
        self._say(
            f"\nstopped at step {step} with the state {'saved' if saved else 'NOT saved'}; "
            "the same command continues the run"
        )
        with self._optional("the tracker"):
            self.accelerator.end_training()
        sys.exit(128 + (stopped_by[0] if stopped_by else signal.SIGTERM))


def _identity(batch):
    return batch


def _check_launch(config, accelerator):
    """Refuses a launcher whose settings are not those of the run."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.mixed_precision):
        raise ValueError(
            f"mixed_precision: the launcher says {precision!r} and the run {config.mixed_precision!r}; give "
            f"--mixed_precision {precision} to the script itself"
        )
    if config.report_to and not accelerator.log_with:
        raise ValueError(f"report_to: {config.report_to!r} is not installed; pip install it")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE is {world_size} but Accelerate sees {accelerator.num_processes} process(es), so each would "
            "train alone; start the script with `torchrun --nproc_per_node N` or `accelerate launch --num_processes N`"
        )


def _mix(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
