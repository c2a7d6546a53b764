"""Small runs, in this process and in others."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import torch

from hf_genmod import (
    AncestralDDPMScheduler,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    DenoisingObjective,
    DenoisingUNet2DModel,
    ElboObjective,
    TextToImagePipeline,
    Trainer,
    TrainingConfig,
    VariationalAutoencoder,
)
from hf_genmod.data.captions import Tokens, all_captions
from hf_genmod.data.latents import latents_of
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.shapes import ShapesDataset
from hf_genmod.data.stream import stream_pictures
from hf_genmod.training.adapters import attach_adapter
from hf_genmod.training.sharding import local, whole, whole_state
from hf_genmod.training.text_encoder import TextConditionedUNet, make_text_encoder, train_tokenizer


def make_trainer(
    dataset,
    output_dir,
    objective=None,
    draw_samples=None,
    dropout=0.0,
    double=False,
    learn_variance=False,
    prediction_type="v_prediction",
    weighting="simple",
    held_out=None,
    depends_on=None,
    **config,
):
    torch.manual_seed(0)
    unet = DenoisingUNet2DModel(
        sample_size=16,
        out_channels=6 if learn_variance else 3,
        block_out_channels=(16, 32),
        attention_levels=(False, True),
        layers_per_block=1,
        norm_num_groups=8,
        num_classes=8,
        dropout=dropout,
    )
    unet = unet.double() if double else unet
    scheduler = AncestralDDPMScheduler(
        prediction_type=prediction_type,
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range" if learn_variance else "fixed_small",
    )
    return Trainer(
        unet,
        objective or DenoisingObjective(scheduler, unet.null_label, weighting),
        dataset,
        TrainingConfig(
            output_dir=str(output_dir), **{"batch_size": 8, "logging_steps": 1, "mixed_precision": "no", **config}
        ),
        make_pipeline=lambda unet: ClassifierFreeGuidedPipeline(
            unet, scheduler, id2label=dict(enumerate(dataset.label_names))
        ),
        draw_samples=draw_samples,
        validation_dataset=held_out,
        depends_on=depends_on,
    )


def make_other_trainer(dataset, output_dir, kind, held_out=None, **config):
    """Of a variational autoencoder, a U-Net with the text encoder that learns with it, or an adapter; in fp64."""
    torch.manual_seed(0)
    scheduler, save = AncestralDDPMScheduler(), None
    if kind == "autoencoder":
        model, objective = VariationalAutoencoder(16, 3, 2, (16, 32), norm_num_groups=8), ElboObjective()
        make_pipeline = AutoencoderPipeline
    elif kind == "adapter":
        model = DenoisingUNet2DModel(16, 3, 3, (16, 32), 1, (False, True), norm_num_groups=8, num_classes=8)
        attach_adapter(model, rank=2, num_new_classes=1)
        objective = DenoisingObjective(scheduler, model.null_label)
        make_pipeline = lambda unet: ClassifierFreeGuidedPipeline(unet, scheduler)  # noqa: E731
        save = ClassifierFreeGuidedPipeline.save_lora_weights
    else:
        tokenizer = train_tokenizer(all_captions(dataset))
        text_encoder = make_text_encoder(tokenizer, hidden_size=32)
        unet = DenoisingUNet2DModel(16, 3, 3, (16, 32), 1, (False, True), norm_num_groups=8, cross_attention_dim=32)
        model = TextConditionedUNet(unet, text_encoder)
        objective = DenoisingObjective(scheduler, text=Tokens(tokenizer, text_encoder))
        make_pipeline = lambda both: TextToImagePipeline(both.unet, both.text_encoder, tokenizer, scheduler)  # noqa: E731
    settings = {"batch_size": 8, "logging_steps": 1, "mixed_precision": "no", **config}
    return Trainer(
        model.double(), objective, dataset, TrainingConfig(output_dir=str(output_dir), **settings), make_pipeline,
        validation_dataset=held_out, save=save,
    )  # fmt: skip


def raw_weights(trainer):
    return torch.cat([whole(p.detach()).flatten() for p in trainer.state.model.parameters()]).cpu()


def averaged_weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.averaged_model.module.parameters()]).cpu()


def metrics(output_dir):
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "elapsed_seconds")} for line in lines]


class Killed(Exception):
    pass


def assert_same_state(trainer, other):
    """Weights, their average, those kept early and the state of the optimizer, bitwise."""
    assert torch.equal(raw_weights(trainer), raw_weights(other))
    assert torch.equal(averaged_weights(trainer), averaged_weights(other))
    early, of_other = trainer.early_weights.weights, other.early_weights.weights
    assert early.keys() == of_other.keys() and all(torch.equal(early[name], of_other[name]) for name in early)
    states = [trainer.optimizer.state_dict()["state"] for trainer in (trainer, other)]
    for mine, theirs in zip(*(state.values() for state in states), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name].cpu(), theirs[name].cpu()) for name in mine)


FOLDERS = [str(path) for path in Path(__file__).parents[:2]]  # of modules that scripts import


SCRIPT = """
import sys
sys.path[:0] = {folders!r}
from runs import run_script

run_script(*sys.argv[1:])
"""


def run_script(folder, runs, kill):
    """Runs in a process of their own, one after the other."""
    for name, settings in eval(runs).items():
        train(Path(folder, name), eval(kill), **settings)
    os._exit(0)  # before the timer


def train(output_dir, kill=None, **settings):
    """
    A run whose end is saved beside its folder. `kill` is None; or (n, seconds), to kill all processes so long after
    the n-th step; or n, to do so before the n-th time that a file or folder is renamed after the last step. With
    "stream" in the settings, the run streams the data set that this names; with "cached", its latents.
    """
    pictures, held_out = (load_pictures(ShapesDataset(n, resolution=16, seed=seed)) for n, seed in ((40, 0), (4, 1)))
    if "stream" in settings:
        pictures = stream_pictures(settings.pop("stream"))
    if settings.pop("cached", False):
        torch.manual_seed(0)
        vae = VariationalAutoencoder(16, 3, 3, (16, 32), norm_num_groups=8).eval()
        pictures, held_out = (latents_of(each, vae, cached=True) for each in (pictures, held_out))
    make = make_other_trainer if "kind" in settings else make_trainer
    trainer = make(pictures, output_dir, held_out=held_out, **settings)
    inner, counted = trainer.objective, itertools.count(1)
    over = trainer.folder.is_complete

    def objective(model, batch, rng):
        if next(counted) == kill[0]:
            threading.Timer(kill[1], kill_all, [trainer.accelerator.num_processes]).start()
        return inner(model, batch, rng)

    def before_renaming(event, arguments):
        if event == "os.rename" and trainer.progress.step == trainer.config.max_train_steps and next(counted) == kill:
            kill_all(1)

    if isinstance(kill, tuple) and trainer.accelerator.is_main_process:
        trainer.objective = objective
    elif isinstance(kill, int):
        sys.addaudithook(before_renaming)
    rounded = []

    def before_the_step(optimizer, *_):
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        gradients = local([g for g in gradients if g is not None])
        rounded.extend(torch.equal(g, g.bfloat16().to(g)) for g in gradients)

    trainer.optimizer.optimizer.register_step_pre_hook(before_the_step)
    trainer.train()
    end = {
        "raw": raw_weights(trainer),
        "averaged": averaged_weights(trainer),
        "optimizer": whole_state(trainer.optimizer.state_dict()["state"], keep=True),
        "gradients_in_bf16": torch.tensor(rounded).all(),
    }
    if trainer.accelerator.is_main_process and not over:
        torch.save(end, f"{output_dir}.pt")


def kill_all(num_processes):
    launcher = psutil.Process().parent()
    if num_processes > 1:
        siblings = [process for process in launcher.children() if process.pid != os.getpid()]
        for process in (launcher, *siblings):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def command(folder, runs, num_processes=1, kill=None):
    """The command that starts runs, settings by names, in a folder."""
    file = folder / "script.py"
    file.write_text(SCRIPT.format(folders=FOLDERS))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    launcher = launcher if num_processes > 1 else []
    return [sys.executable, *launcher, str(file), str(folder), repr(runs), repr(kill)]


IN_SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as a launcher says it


def run(folder, runs, num_processes=1, kill=None, check=True, in_shards=False):
    arguments, environment = command(folder, runs, num_processes, kill), {**os.environ, "OMP_NUM_THREADS": "1"}
    environment |= IN_SHARDS if in_shards else {}
    return subprocess.run(arguments, check=check, env=environment, timeout=600).returncode


def same(first, second):
    """Whether two trees of tensors are bitwise equal."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
