"""What a data set holds, what is wrong with it, and the command that trains on it."""

import hashlib
import math
import os
import re
import shlex
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hf_genmod.data.folder import classes_in_names
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.sources import Found, find_splits, splits_of
from hf_genmod.errors import counted, shortened
from hf_genmod.recipes.pictures import CaptionedDataArguments

_THUMBNAIL = 32  # pixels; images are compared at this size


class DatasetReport(NamedTuple):
    """What a data set holds, what is wrong with it, and the commands that train on it, each a line of text."""

    contents: list[str]
    findings: list[str]
    commands: list[str]
    would_start: bool  # whether a run that leaves no image out would start


def examine_dataset(arguments: CaptionedDataArguments) -> DatasetReport:
    """
    Loads a data set as a training script does, and looks at it.

    Args:
        arguments ([`CaptionedDataArguments`]): The data set, its split, configuration and columns.

    Raises:
        FileNotFoundError: If there is no such data set.
    """
    arguments.resolution, arguments.on_bad_image = str(_THUMBNAIL), "skip"
    contents = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            source, *options = arguments.dataset, arguments.config_name, arguments.array_axes
            if source != "shapes":
                source = find_splits(source, *options)
            counts = splits_of(source, *options)
            contents.append(_images(counts))
            pictures, held_out = arguments.load()
            for target in ("labels", "captions"):  # which a run may miss in the held-out images alone
                if held_out and getattr(held_out, target) is None is not getattr(pictures, target):
                    arguments.load(**{f"require_{target}": True})
        except ValueError as error:
            return DatasetReport(contents, [*_messages(caught), str(error)], [], would_start=False)
    findings = _messages(caught)
    skipped = pictures.skipped + (held_out.skipped if held_out else [])
    if skipped:
        findings.append(
            f"unusable images: {len(skipped)}, which would stop a run ({shortened(skipped)}); repair or remove them, "
            "or train with --on_bad_image skip"
        )
    size = _size_to_give(pictures)
    commands = list(_commands(pictures, arguments, size, bool(skipped)))
    findings += _findings(pictures, size or (8, 8))
    contents = list(_contents(pictures, counts, arguments))
    columns = source.splits[arguments.split].column_names if isinstance(source, Found) else []
    num_used = 1 + (pictures.labels is not None) + (pictures.captions is not None)
    if len(columns) > num_used and set(columns) - {"image", "label", "text"}:
        contents.append(f"columns   {', '.join(columns)}; --label_column and --caption_column choose others")
    return DatasetReport(contents, findings, commands, not skipped)


def _messages(caught: list[warnings.WarningMessage]) -> list[str]:
    return list(dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning))


def _images(counts: dict[str, int], unusable: dict[str, str] | None = None) -> str:
    return "images    " + ", ".join(
        f"{n:,} in {split!r}{(unusable or {}).get(split, '')}" for split, n in counts.items()
    )


def _contents(pictures: PictureDataset, counts: dict[str, int], arguments: CaptionedDataArguments) -> Iterator[str]:
    unusable = {arguments.split: f" (of which {len(pictures.skipped)} cannot be used)"} if pictures.skipped else {}
    yield _images(counts, unusable)
    names, labels = pictures.label_names, pictures.labels
    if names is None:
        folders = {os.path.dirname(pictures.where(index)) for index in (0, -1)}  # the images are in their order
        given = os.path.expanduser(arguments.dataset)
        is_one = len(folders) == 1 and os.path.isdir(folder := folders.pop()) and os.path.isdir(given)
        is_inside = is_one and not os.path.samefile(folder, given)
        yield "classes   none" + (f": all images are in the folder {os.path.basename(folder)!r}" if is_inside else "")
    else:
        numbers = torch.bincount(labels, minlength=len(names)).tolist()
        listed = shortened([f"{name} ({number:,})" for name, number in zip(names, numbers, strict=True)], 20)
        yield f"classes   {len(names)}: {listed}"
        least = min(range(len(names)), key=numbers.__getitem__)
        average = len(labels) / len(names)
        if numbers[least] < average / 2:
            yield f"          the rarest is {names[least]!r} with {numbers[least]:,}, and the average {average:,.0f}"
    heights, widths = pictures.properties.height.tolist(), pictures.properties.width.tolist()
    if (min(heights), min(widths)) == (max(heights), max(widths)):
        yield f"sizes     all {heights[0]}x{widths[0]} (height x width)"
    else:
        middle = f"{statistics.median_low(heights)}x{statistics.median_low(widths)}"
        extremes = f"{min(heights)}x{min(widths)} to {max(heights)}x{max(widths)}"
        yield f"sizes     from {extremes} (height x width), with {middle} in the middle"
    if pictures.value_range is not None:
        yield f"channels  {pictures.channels}, of measured values"
    else:
        kind = {1: "grey", 2: "grey and alpha", 3: "RGB", 4: "RGB and alpha"}[pictures.channels]
        grey = int((~pictures.properties.has_color).sum())
        yield f"channels  {pictures.channels} ({kind})" + (
            f", {grey:,} of the images grey" if 0 < grey < len(pictures) else ""
        )
    if pictures.captions is None:
        yield "captions  none"
    else:
        first = pictures.captions[0]
        yield f"captions  one or more for each image, such as {first if isinstance(first, str) else first[0]!r}"


def _size_to_give(pictures: PictureDataset) -> tuple[int, int] | None:
    """The height and width to give as `--resolution`, if images do not have one size, or a large or an odd one, with
    which a network is several times slower."""
    heights, widths = pictures.properties.height.tolist(), pictures.properties.width.tolist()
    if (
        len({*heights}) == len({*widths}) == 1
        and max(heights[0], widths[0]) <= 128
        and heights[0] % 2 == widths[0] % 2 == 0
    ):
        return None
    middle = statistics.median_low(heights), statistics.median_low(widths)
    longest = min(64, max(middle))
    return tuple(max(8, round(longest * side / max(middle) / 8) * 8) for side in middle)


def _commands(
    pictures: PictureDataset, arguments: CaptionedDataArguments, size: tuple[int, int] | None, skip: bool
) -> Iterator[str]:
    """The commands that train on a data set, with the flags that it needs."""
    flags = {"dataset": arguments.dataset, "split": None if arguments.split == "train" else arguments.split}
    flags |= {name: getattr(arguments, name) for name in ("image_column", "config_name", "array_axes")}
    flags |= {"on_bad_image": "skip" if skip else None}
    if size:
        flags["resolution"] = size[0] if size[0] == size[1] else "{}x{}".format(*size)
    tasks = {}
    if pictures.labels is not None and len(pictures.label_names) > 1:
        tasks["cfg"] = {"label_column": arguments.label_column}
    if pictures.captions is not None:
        tasks["text-to-image"] = {"caption_column": arguments.caption_column}
    output_dir = "runs/" + (re.sub(r"[^\w.-]+", "-", Path(arguments.dataset).resolve().stem) or "model")
    for task, columns in (tasks or {"unconditional": {}}).items():
        given = {**flags, **columns, "max_train_minutes": 30, "output_dir": output_dir}
        text = [f"--{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None]
        yield " ".join([f"hf_genmod train {task}", *text])


def _findings(pictures: PictureDataset, size: tuple[int, int]) -> Iterator[str]:
    count, (height, width) = len(pictures), size
    if count < 500:
        yield (
            f"number of images: {count}, so few that a model memorises them; collect more, and train with "
            "--horizontal_flip if mirrored images are as good"
        )
    heights, widths = pictures.properties.height, pictures.properties.width
    if np.ptp(heights) or np.ptp(widths):
        yield "the images differ in size, but a model has one; scale and crop them by --resolution"
    small = np.flatnonzero((2 * heights <= height) | (2 * widths <= width)).tolist()
    if small:
        yield (
            f"small images: {len(small)} of {count} (such as {pictures.where(small[0])}) are at most half as high or "
            f"wide as {height}x{width}, so a model learns no detail from them; replace or remove them"
        )
    in_color = int(pictures.properties.has_color.sum())
    if 0 < in_color < count:
        yield (
            f"colour and grey: {in_color} of {count} images are in colour, the others grey, and a model draws both; "
            "make all grey by --channels 1, or remove one kind"
        )
    if transparent := int(pictures.properties.has_alpha.sum()):
        yield (
            f"transparent in places: {transparent} of {count} images, for which a model needs one more channel; put "
            f"them on white by --channels {3 if in_color else 1}, unless transparency is wanted"
        )
    yield from _copies(pictures)
    if pictures.value_range is not None:
        yield from _values(pictures)
    if empty := [index for index, caption in enumerate(pictures.captions or ()) if not "".join(caption).strip()]:
        yield (
            f"empty captions: {len(empty)} of {count} (such as that of {pictures.where(empty[0])}), which a model "
            "takes for no caption; write them, or remove the images"
        )
    numbers_alone = re.compile(r"[-+.\deE\s]*\d[-+.\deE\s]*")
    if boxes := [i for i, text in enumerate(pictures.captions or ()) if numbers_alone.fullmatch("".join(text))]:
        yield (
            f"captions of numbers alone: {len(boxes)} of {count} (such as that of {pictures.where(boxes[0])}), as "
            "files of boxes or labels have them; move these files to another folder, if they are no captions"
        )
    if pictures.labels is None:
        if told := classes_in_names(pictures.where, count):
            yield told
    else:
        numbers = torch.bincount(pictures.labels, minlength=len(pictures.label_names))
        least, most = int(numbers.where(numbers > 0, len(pictures)).argmin()), int(numbers.argmax())
        if missing := pictures.classes_without_images:
            yield f"classes without images: {shortened(missing)}, which a model cannot learn; collect or remove them"
        if len(numbers) == 1:
            yield (
                f"all images are of one class, {pictures.label_names[0]!r}, so labels tell a model nothing; train "
                "without labels, or add the folder of another class"
            )
        elif numbers[most] < 20:
            many = counted(int(numbers[most]), "image")
            yield f"no class has more than {many}, so a model memorises each; collect more"
        elif numbers[least] < max(20, numbers[most] / 10):
            yield (
                f"images in the class {pictures.label_names[least]!r}: {numbers[least]}, in the largest "
                f"{numbers[most]}, so a model draws the class badly; collect more, or merge or remove the class"
            )


def _copies(pictures: PictureDataset) -> Iterator[str]:
    """Images that are the same at a small size, and images of a single colour."""
    first_of, copies, contradictions, plain, flat = {}, [], [], [], []
    for start in range(0, len(pictures), 64):
        for index, x in enumerate(pictures.x_0(range(start, min(start + 64, len(pictures)))), start):
            digest = hashlib.blake2b(x.numpy().tobytes(), digest_size=16).digest()
            first = first_of.setdefault(digest, index)
            if first != index:
                copies.append(f"{pictures.where(index)}, the same as {pictures.where(first)}")
                if pictures.labels is not None and pictures.labels[first] != pictures.labels[index]:
                    contradictions.append(f"{pictures.where(index)} and {pictures.where(first)}")
            span = (x.amax((1, 2)) - x.amin((1, 2))).max()
            if span <= 4 / 127.5:  # of measured values, those of other images may be far larger
                (plain if pictures.value_range is None or span < 1e-6 else flat).append(pictures.where(index))
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
    if flat:
        yield (
            f"images whose values span less than a sixtieth of those of all: {len(flat)} (such as {flat[0]}), which "
            "are flat to a model; save all images in one unit, or remove these"
        )


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
