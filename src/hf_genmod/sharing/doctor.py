"""Findings about a data set or a checkpoint. Each is one line: the problem, why it matters, what to do."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_genmod.checkpoints.safety import check_code
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.errors import first_line, shortened
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler
from hf_genmod.sharing.loading import load_pipeline
from hf_genmod.sharing.push import sample_without_package
from hf_genmod.training.run_folder import RunFolder

_THUMBNAIL = 32  # pixels; images are compared at this size


def examine(path: str, split: str = "train") -> Iterator[str]:
    """
    Findings about a checkpoint, a run or a data set, each a line of text.

    Args:
        path (`str`): The `output_dir` of a run, finished or not, or a data set as `load_pictures` takes it.
        split (`str`): The split of the data set.

    Raises:
        ValueError, FileNotFoundError: If the path is neither a checkpoint, a run nor a data set.
    """
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        yield from _examine_checkpoint(folder)
    elif (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        yield from _examine_adapter(folder / LORA_WEIGHT_NAME_SAFE)
    elif (folder / "training_config.json").is_file():
        yield "there is no model_index.json, so the run is not finished; repeat its command, which continues it"
    elif any((folder.parent / name).is_file() for name in ("model_index.json", "training_config.json")):
        raise ValueError(f"{path}: a part of {folder.parent}; examine that folder")
    else:
        yield from _examine_pictures(path, split)


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
    yield from _run(folder)


def _examine_adapter(file: Path) -> Iterator[str]:
    try:
        yield from _not_finite(file.name, load_file(file))
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
    first, last = int(scheduler.timesteps[0]), config.num_train_timesteps - 1
    if first < 0.99 * last and not isinstance(scheduler, FewStepDDPMScheduler):
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


def _run(folder: Path) -> Iterator[str]:
    """Whether the run that made the checkpoint was long enough for it."""
    last = (RunFolder(folder).metrics() or [{}])[-1]
    steps, bad = last.get("step", math.inf), last.get("bad_steps", 0)
    if steps < 200:
        yield f"it was trained for {steps} steps, too few for a model that starts from random weights; train longer"
    if bad > 0.01 * steps:
        yield (
            f"{bad} of its {steps} steps were skipped, as their loss was not finite; train with a lower learning "
            "rate or with --mixed_precision no"
        )


def _examine_pictures(dataset: str, split: str) -> Iterator[str]:
    pictures = load_pictures(dataset, split=split, resolution=_THUMBNAIL, on_bad_image="skip")
    count = len(pictures)
    if pictures.skipped:
        yield (
            f"unusable: {len(pictures.skipped)} of {count + len(pictures.skipped)} images, which would stop a run "
            f"({shortened(pictures.skipped)}); repair or remove them, or train with --on_bad_image skip"
        )
    if count < 500:
        yield (
            f"number of images: {count}, so few that a model memorises them; collect more, and train with "
            "--horizontal_flip if mirrored images are as good"
        )
    sizes = {(properties.height, properties.width) for properties in pictures.properties}
    if len(sizes) > 1:
        heights, widths = zip(*sizes, strict=True)
        yield (
            f"the images have {len(sizes)} sizes, heights from {min(heights)} to {max(heights)} and widths from "
            f"{min(widths)} to {max(widths)}, but a model has one; scale and crop them by --resolution"
        )
    in_color = sum(properties.has_color for properties in pictures.properties)
    if 0 < in_color < count:
        yield (
            f"colour and grey: {in_color} of {count} images are in colour, the others grey, and a model draws both; "
            "make all grey by --channels 1, or remove one kind"
        )
    if transparent := sum(properties.has_alpha for properties in pictures.properties):
        yield (
            f"transparent in places: {transparent} of {count} images, for which a model needs one more channel; put "
            f"them on white by --channels {3 if in_color else 1}, unless transparency is wanted"
        )
    yield from _contents(pictures)
    if pictures.value_range is not None:
        yield from _values(pictures)
    if pictures.labels is not None:
        numbers = torch.bincount(pictures.labels, minlength=len(pictures.label_names))
        least, most = int(numbers.argmin()), int(numbers.argmax())
        if numbers[most] < 20:
            yield f"no class has more than {numbers[most]} images, so a model memorises each; collect more"
        elif numbers[least] < max(20, numbers[most] / 10):
            yield (
                f"images in the class {pictures.label_names[least]!r}: {numbers[least]}, in the largest "
                f"{numbers[most]}, so a model draws the class badly; collect more, or merge or remove the class"
            )


def _contents(pictures: PictureDataset) -> Iterator[str]:
    """Images that are the same at a small size, and images of a single colour."""
    first_of, copies, contradictions, plain = {}, [], [], []
    for start in range(0, len(pictures), 64):
        for index, x in enumerate(pictures.x_0(range(start, min(start + 64, len(pictures)))), start):
            digest = hashlib.blake2b(x.numpy().tobytes(), digest_size=16).digest()
            first = first_of.setdefault(digest, index)
            if first != index:
                copies.append(f"{pictures.where(index)} of {pictures.where(first)}")
                if pictures.labels is not None and pictures.labels[first] != pictures.labels[index]:
                    contradictions.append(f"{pictures.where(index)} and {pictures.where(first)}")
            if (x.amax((1, 2)) - x.amin((1, 2))).max() <= 4 / 127.5:
                plain.append(pictures.where(index))
    if copies:
        yield (
            f"copies of other images: {len(copies)} (such as {copies[0]}), which a model draws more often and which, "
            "in a test split, improve its scores; remove them"
        )
    if contradictions:
        yield (
            f"the same image in two classes: {len(contradictions)} (such as {contradictions[0]}), so the labels "
            "contradict each other; keep the right one"
        )
    if plain:
        yield f"images of one colour only: {len(plain)} (such as {plain[0]}), which a model then draws; remove them"


def _values(pictures: PictureDataset) -> Iterator[str]:
    """Channels whose range is set by a few outliers."""
    some = pictures.x_0(range(0, len(pictures), math.ceil(len(pictures) / 256)))
    ranges = zip(pictures.value_range["low"], pictures.value_range["high"], strict=True)
    for channel, (low, high) in enumerate(ranges):
        inner = np.quantile(some[:, channel].numpy(), [0.005, 0.995])
        if high > low and inner[1] - inner[0] < 0.2:
            yield (
                f"channel {channel}: 99% of its values lie in a tenth of its range, {low:.4g} to {high:.4g}, so a "
                "model sees flat images; take a logarithm or a root of the values, or clip the outliers"
            )
