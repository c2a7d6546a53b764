"""What is wrong with a data set or a checkpoint, one line for each: what, why it matters, what to do about it."""

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
from hf_genmod.data.value_range import to_model_range
from hf_genmod.errors import first_line
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler
from hf_genmod.sharing.loading import load_pipeline
from hf_genmod.sharing.push import sample_without_package
from hf_genmod.training.run_folder import RunFolder

_THUMBNAIL = 32  # pixels; at this size pictures are compared


def examine(path: str, split: str = "train") -> Iterator[str]:
    """
    Findings about a checkpoint, a run or a data set, each a line of text.

    Args:
        path (`str`): The `output_dir` of a run, finished or not, or whatever `load_pictures` takes.
        split (`str`): Which split of a data set.

    Raises:
        ValueError, FileNotFoundError: If there is nothing at the path that could be examined.
    """
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        yield from examine_checkpoint(folder)
    elif (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        yield from examine_adapter(folder / LORA_WEIGHT_NAME_SAFE)
    elif (folder / "training_config.json").is_file():
        yield (
            "there is no model_index.json, so the run is not over and nothing can be loaded from it; repeat its "
            "command, which continues it"
        )
    elif any((folder.parent / name).is_file() for name in ("model_index.json", "training_config.json")):
        raise ValueError(f"{path}: a part of {folder.parent}; examine that")
    else:
        yield from examine_pictures(path, split)


def examine_checkpoint(folder: Path) -> Iterator[str]:
    try:
        pipeline = load_pipeline(folder)
    except Exception as error:  # whatever the loaders of three libraries raise
        reason = first_line(error).replace(f"{folder}/", "")
        remedy = "download or train it again"
        if RunFolder(folder).saved_states():
            remedy = "repeat the command of the run, which writes it again"
        yield f"it does not load ({reason}); {remedy}"
        return
    infinite = list(_infinite_weights(pipeline))
    yield from infinite
    yield from _shipped_code(folder, sample=not infinite)
    yield from _process(pipeline)
    yield from _run(folder)


def examine_adapter(file: Path) -> Iterator[str]:
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        yield f"{file.name}: it cannot be read ({str(error).splitlines()[0]}); repeat the command of the run"
        return
    bad = [key for key, weight in weights.items() if not weight.isfinite().all()]
    if bad:
        yield f"{file.name}: {bad[0]} is not finite, nor will the pictures be; train again with a lower learning rate"


def _infinite_weights(pipeline) -> Iterator[str]:
    for name, model in pipeline.components.items():
        if isinstance(model, torch.nn.Module):
            bad = [key for key, weight in model.state_dict().items() if not weight.isfinite().all()]
            if bad:
                yield (
                    f"{name}: {len(bad)} of its weights, {bad[0]} for one, are not finite, so that every picture is "
                    "black or noise; train again with a lower learning rate or with --mixed_precision no"
                )


def _shipped_code(folder: Path, sample: bool) -> Iterator[str]:
    """The code in a checkpoint is executed here only where it is that of the installed package."""
    if not list(folder.rglob("*.py")):
        yield "it carries no code, so it loads only where this package is installed; save it by `save_pretrained`"
        return
    try:
        check_code(folder)
    except ValueError as error:
        yield str(error)
        return
    try:
        if sample:
            sample_without_package(folder.resolve())
    except RuntimeError as error:
        yield f"it does not sample where this package is not installed ({error}); save it again by `save_pretrained`"


def _process(pipeline) -> Iterator[str]:
    """Whether sampling runs the process backwards from where it ends."""
    scheduler = getattr(pipeline, "scheduler", None)
    if not hasattr(scheduler, "alphas_cumprod"):
        return
    config, signal = scheduler.config, float(scheduler.alphas_cumprod[-1]) ** 0.5
    if signal > 0.05:
        yield (
            f"scheduler: at the last timestep a share √ᾱ_T = {signal:.2f} of the picture is left, but sampling starts "
            "at pure noise, so that brightness and contrast come out wrong; train with --beta_schedule "
            "squaredcos_cap_v2"
        )
    steps = min(50, config.num_train_timesteps)
    scheduler.set_timesteps(steps)
    first, last = int(scheduler.timesteps[0]), config.num_train_timesteps - 1
    if first < 0.99 * last and not isinstance(scheduler, FewStepDDPMScheduler):
        yield (
            f"scheduler: its timestep_spacing {config.timestep_spacing!r} starts {steps} steps at t = {first} of "
            f"{last}, where the picture should still show through, but at pure noise; set timestep_spacing to "
            "'trailing'"
        )
    clipping = [name for name in ("clip_sample", "thresholding") if config.get(name)]
    if clipping and getattr(pipeline, "vae", None) is not None:
        yield (
            f"scheduler: {' and '.join(clipping)} cuts latents off at ±{config.get('clip_sample_range', 1.0)}, which "
            "are not limited to that; turn it off for latent diffusion"
        )


def _run(folder: Path) -> Iterator[str]:
    """Whether the run that made the checkpoint was long enough for it."""
    lines = RunFolder(folder).metrics()
    if not lines:
        return
    steps = lines[-1]["step"]
    if steps < 200:
        yield (
            f"it was trained for {steps} steps, too few for any model, and its moving average still holds the first "
            "of them; train longer"
        )
    bad = lines[-1].get("bad_steps", 0)
    if bad > 0.01 * steps:
        yield (
            f"{bad} of its {steps} steps were skipped, as their loss was not finite; train with a lower learning rate "
            "or with --mixed_precision no"
        )


def examine_pictures(dataset: str, split: str = "train") -> Iterator[str]:
    pictures = load_pictures(dataset, split=split, resolution=_THUMBNAIL, on_bad_image="skip")
    count = len(pictures)
    if pictures.skipped:
        more = ", ..." if len(pictures.skipped) > 5 else ""
        yield (
            f"unusable: {len(pictures.skipped)} of {count + len(pictures.skipped)} pictures, which would stop a run "
            f"({'; '.join(pictures.skipped[:5])}{more}); repair or remove them, or train with --on_bad_image skip"
        )
    if count < 500:
        yield (
            f"number of pictures: {count}, so few that a model learns them by heart rather than what they have in "
            "common; collect more, and train with --horizontal_flip if a mirrored picture is as good"
        )
    sizes = {(properties.height, properties.width) for properties in pictures.properties}
    if len(sizes) > 1:
        heights, widths = zip(*sizes, strict=True)
        yield (
            f"they have {len(sizes)} sizes, heights from {min(heights)} to {max(heights)} and widths from "
            f"{min(widths)} to {max(widths)}, and a model has one; give --resolution, to which they are scaled and "
            "cropped"
        )
    in_color = sum(properties.has_color for properties in pictures.properties)
    if 0 < in_color < count:
        yield (
            f"both kinds: {in_color} of {count} pictures in colour, the others grey, and a model draws both; make all "
            "grey by --channels 1, or leave one kind out"
        )
    transparent = sum(properties.has_alpha for properties in pictures.properties)
    if transparent:
        yield (
            f"transparent in places: {transparent} of {count} pictures, for which a model gets one more channel; "
            f"lay them on white by --channels {3 if in_color else 1}, unless that is what you want"
        )
    yield from _contents(pictures)
    if pictures.value_range is not None:
        yield from _values(pictures)
    if pictures.labels is not None:
        numbers = torch.bincount(pictures.labels, minlength=len(pictures.label_names))
        least, most = int(numbers.argmin()), int(numbers.argmax())
        if numbers[most] < 20:
            yield f"no class has more than {numbers[most]} pictures: each is drawn from memory; collect more"
        elif numbers[least] < max(20, numbers[most] / 10):
            yield (
                f"pictures in the class {pictures.label_names[least]!r}: {numbers[least]}, and in the largest "
                f"{numbers[most]}, so that it is drawn badly, or from memory; collect more, or merge or remove it"
            )


def _contents(pictures: PictureDataset) -> Iterator[str]:
    """Copies, by the pixels that are left at a small size, and pictures of a single colour."""
    first_of, copies, contradictions, plain = {}, [], [], []
    for start in range(0, len(pictures), 64):
        batch = pictures.__getitems__(range(start, min(start + 64, len(pictures))))["images"]
        for index, image in enumerate(batch, start):
            digest = hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
            first = first_of.setdefault(digest, index)
            if first != index:
                copies.append((first, index))
                if pictures.labels is not None and pictures.labels[first] != pictures.labels[index]:
                    contradictions.append((first, index))
            values = to_model_range(image)
            if (values.amax((1, 2)) - values.amin((1, 2))).max() <= 4 / 127.5:
                plain.append(index)
    if copies:
        first, copy = copies[0]
        yield (
            f"copies of other pictures: {len(copies)} ({pictures.where(copy)} of {pictures.where(first)}, for one), "
            "which a model draws more often and, in a test split, scores without skill; remove them"
        )
    if contradictions:
        first, copy = contradictions[0]
        yield (
            f"the same picture in two classes: {len(contradictions)} ({pictures.where(copy)} and "
            f"{pictures.where(first)}, for one), so that the labels contradict each other; keep the right one"
        )
    if plain:
        yield (
            f"pictures of one colour only: {len(plain)} ({pictures.where(plain[0])}, for one), as a model then draws; "
            "remove them"
        )


def _values(pictures: PictureDataset) -> Iterator[str]:
    """Channels whose range a few outliers set."""
    some = pictures.__getitems__(range(0, len(pictures), math.ceil(len(pictures) / 256)))["images"]
    ranges = zip(pictures.value_range["low"], pictures.value_range["high"], strict=True)
    for channel, (low, high) in enumerate(ranges):
        inner = np.quantile(some[:, channel].numpy(), [0.005, 0.995])
        if high > low and inner[1] - inner[0] < 0.2:
            yield (
                f"channel {channel}: 99% of its values lie in a tenth of its range, {low:.4g} to {high:.4g}, so that "
                "a model sees flat pictures; take a logarithm or a root of them, or cut the outliers off"
            )
