"""Findings about a checkpoint. Each is one line: the problem, why it matters, what to do."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_genmod.checkpoints.safety import check_code
from hf_genmod.errors import first_line, refuse_lfs_pointers
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler
from hf_genmod.sharing.facts import Facts
from hf_genmod.sharing.loading import load_pipeline
from hf_genmod.sharing.push import sample_without_package
from hf_genmod.training.run_folder import RunFolder

FEWEST_STEPS = 200  # of training from random weights
FEWEST_OF_TUNING = 100  # to draw in few steps, see benchmarks/README.md


def is_checkpoint(path: str) -> bool:
    """Whether a path is a checkpoint, an adapter or the `output_dir` of a run, and not a data set.

    Raises:
        ValueError: If it is a part of one.
    """
    names = ("model_index.json", LORA_WEIGHT_NAME_SAFE, "training_config.json")
    if any((Path(path) / name).is_file() for name in names):
        return True
    folder = Path(path).resolve().parent
    if any((folder / name).is_file() for name in ("model_index.json", "training_config.json")):
        raise ValueError(f"{path}: a part of {folder}; examine that folder")
    return False


def examine(path: str) -> Iterator[str]:
    """Findings about a checkpoint, an adapter or a run, finished or not, each a line of text; `path` is its folder."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        yield from _examine_checkpoint(folder)
    elif (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        yield from _examine_adapter(folder / LORA_WEIGHT_NAME_SAFE)
    else:
        yield "there is no model_index.json, so the run is not finished; repeat its command, which continues it"


def _examine_checkpoint(folder: Path) -> Iterator[str]:
    try:
        pipeline = load_pipeline(folder)
    except Exception as error:  # three libraries load it, and raise errors of many kinds
        reason = first_line(error).replace(f"{folder}/", "")
        has_states = bool(RunFolder(folder).saved_states())
        remedy = "repeat the command of the run, which writes it again" if has_states else "download or train it again"
        yield f"it does not load ({reason}); {remedy}"
        return
    models = {name: model for name, model in pipeline.components.items() if isinstance(model, torch.nn.Module)}
    not_finite = [finding for name, model in models.items() for finding in _not_finite(name, model.state_dict())]
    yield from not_finite
    yield from _shipped_code(folder, sample=not not_finite)
    yield from _process(pipeline)
    yield from examine_run(folder)


def _examine_adapter(file: Path) -> Iterator[str]:
    try:
        refuse_lfs_pointers(file)
        yield from _not_finite(file.name, load_file(file))
    except ValueError as error:
        yield str(error)
    except (OSError, SafetensorError) as error:
        yield f"{file.name}: the file cannot be read ({first_line(error)}); repeat the command of the run"


def _not_finite(name: str, weights: dict[str, torch.Tensor]) -> Iterator[str]:
    if bad := [key for key, weight in weights.items() if not weight.isfinite().all()]:
        yield (
            f"{name}: {len(bad)} of its weights, such as {bad[0]}, are not finite, so every image is black or noise; "
            "train again with a lower learning rate or with --mixed_precision no"
        )


def _shipped_code(folder: Path, sample: bool) -> Iterator[str]:
    """Whether the code in the checkpoint is that of the installed package, and only then whether it draws an image."""
    if not list(folder.rglob("*.py")):
        yield "it carries no code, so it loads only where this package is installed; save it by `save_pretrained`"
        return
    try:
        check_code(folder)
        if sample:
            sample_without_package(folder.resolve())
    except ValueError as error:
        yield str(error)
    except RuntimeError as error:
        yield f"it does not sample where this package is not installed ({error}); save it again by `save_pretrained`"


def _process(pipeline) -> Iterator[str]:
    """Whether sampling starts where the forward process ends."""
    scheduler = pipeline.components.get("scheduler")
    if not hasattr(scheduler, "alphas_cumprod"):
        return
    config, signal = scheduler.config, float(scheduler.alphas_cumprod[-1]) ** 0.5
    if signal > 0.05:
        yield (
            f"scheduler: the last timestep keeps a share √ᾱ_T = {signal:.2f} of the image, but sampling starts at "
            "pure noise, so brightness and contrast come out wrong; train with --beta_schedule squaredcos_cap_v2"
        )
    steps = min(50, config.num_train_timesteps)
    scheduler.set_timesteps(steps)
    is_tuned = getattr(pipeline, "is_consistent", False)
    first, last = int(scheduler.timesteps[0]), config.num_train_timesteps - 1
    if first < 0.99 * last and not isinstance(scheduler, FewStepDDPMScheduler) and not is_tuned:
        yield (
            f"scheduler: its timestep_spacing {config.timestep_spacing!r} starts {steps} steps at t = {first} of "
            f"{last} from pure noise, though some of the image is left there; set timestep_spacing to 'trailing'"
        )
    clipping = [name for name in ("clip_sample", "thresholding") if config.get(name)]
    if clipping and pipeline.components.get("vae") is not None:
        yield (
            f"scheduler: {' and '.join(clipping)} clips latents at ±{config.get('clip_sample_range', 1.0)}, but "
            "latents have no such bounds; turn it off for latent diffusion"
        )


def examine_run(folder: Path) -> Iterator[str]:
    """What was wrong with a run: too few steps, or many that were skipped."""
    last = (RunFolder(folder).metrics() or [{}])[-1]
    steps, bad = last.get("step", math.inf), last.get("bad_steps", 0)
    facts = Facts.read(folder) if Path(folder, "model_index.json").is_file() else None
    if facts is not None and facts.is_consistent:
        if steps < FEWEST_OF_TUNING:
            yield f"it was tuned for {steps} steps, too few to draw in few steps; tune longer, in another output_dir"
        bases = [stage for kind, stage in facts.stages if kind == "diffusion model"]
        if bases and (steps_of_base := bases[-1].provenance.get("steps", math.inf)) < FEWEST_STEPS:
            reason = f"the model that it was tuned from was trained for {steps_of_base} steps, too few"
            yield f"{reason} for a model that starts from random weights; train that for longer, then tune it"
    elif steps < FEWEST_STEPS:
        reason = f"it was trained for {steps} steps, too few for a model that starts from random weights"
        yield f"{reason}; train longer, in another output_dir"
    if bad > 0.01 * steps:
        yield (
            f"{bad} of its {steps} steps were skipped, as their loss was not finite; train with a lower learning "
            "rate or with --mixed_precision no"
        )
