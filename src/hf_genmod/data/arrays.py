"""Images in .npy files: one in each, or many along the first axis.

The path of one image among many is `"folder/file.npy[17]"`. Where `--array_axes` says what the axes are, `" as CHW"`
follows.
"""

import io
import math
import os
import re
import warnings
from pathlib import Path

import datasets
import numpy as np

from hf_genmod.data.archives import shown
from hf_genmod.errors import LFS_POINTER, LFS_REMEDY

AXES = {2: ("HW",), 3: ("HWC", "CHW", "NHW"), 4: ("NHWC", "NCHW")}  # by the number of axes
_NUMBERS = "fiub"  # the kinds of types of real numbers
_MANY = 10  # files, from which on each of two axes is one image
_FLAT = 64  # values of a flat image, at least
_RATIO = 4  # of the sides of an image, at most, where the shape is to say what the axes are
_PATH = re.compile(r"(?P<file>.*\.npy)(\[(?P<index>\d+)\])?( as (?P<axes>\w+))?", re.DOTALL | re.IGNORECASE)


def separated(splits: dict[str, datasets.Dataset], axes: str | None = None) -> dict[str, datasets.Dataset]:
    """
    The splits of a folder of .npy files with a row for each image, where each file had one.

    Args:
        splits (`dict[str, datasets.Dataset]`): They have a column "image" of paths, and any others.
        axes (`str`, *optional*): What the axes of the arrays are: N images, C channels, H height, W width. By default
            this follows from the shape: there are fewer channels than pixels in a row or column, and no side is more
            than four times as long as the other. An array of three axes that can be one image or many is one image,
            unless each folder has one file; one of two axes is one image if there are ten files or more. If there are
            fewer, it must be square, or have less than 64 columns and no side four times as long as the other.

    Raises:
        ValueError: If the axes of an array can be read in several ways, or in none.
    """
    if axes not in (None, *sum(AXES.values(), ())):
        raise ValueError(f"array_axes: {axes!r} is none of {', '.join(sum(AXES.values(), ()))}")
    tables = {split: rows.with_format("arrow")[:] for split, rows in splits.items()}
    files = [[entry["path"] for entry in table["image"].to_pylist()] for table in tables.values()]
    every, types = sum(files, []), {}
    alone, few = len(every) == len({*map(os.path.dirname, every)}), len(every) < _MANY
    shapes = {file: _shape(file, types) for file in every}
    # All arrays are read alike: where one can only be many images, the others are.
    are_many = any(len(shape) == 3 and _likely(shape) == ["NHW"] for shape in shapes.values())
    parts, doubtful = {}, None
    for file, shape in shapes.items():
        its_axes = axes or _axes_of(file, shape, alone, few, are_many)
        parts[file] = _parts(shape, its_axes, is_given=axes is not None)
        if axes is None and its_axes in ("CHW", "HWC") and "NHW" in _likely(shape) and min(shape[0], shape[2]) > 4:
            doubtful = doubtful or (file, its_axes)
    if doubtful:
        file, its_axes = doubtful
        what = f"its shape {shapes[file]} is taken for one image of several channels"
        remedy = f"give --array_axes {its_axes} if it is, or NHW if it holds {shapes[file][0]} images"
        warnings.warn(f"{shown(file)}: {what}; {remedy}", stacklevel=2)
    for (split, table), its_files in zip(tables.items(), files, strict=True):
        images = [[f"{file}{part}" for part in parts[file]] for file in its_files]
        table = table.take([row for row, paths in enumerate(images) for _ in paths])
        columns = {column: table[column].to_pylist() for column in table.column_names}
        columns["image"] = [{"bytes": None, "path": path} for paths in images for path in paths]
        splits = splits | {split: datasets.Dataset.from_dict(columns, splits[split].features)}
    if len(types) > 1:
        some = ", ".join(f"{kind} in {shown(file)}" for kind, file in types.items())
        what = f"arrays of several types ({some}), whose values count alike"
        warnings.warn(f"{what}; save all in one type and range", stacklevel=2)
    return splits


def _shape(file: str, types: dict[str, str]) -> tuple[int, ...]:
    """The shape of the numbers in a file, () if it has none. `types` gets a first file of each type."""
    try:
        array = _load(file)
        types.setdefault("float" if array.dtype.kind == "f" else array.dtype.name, file)
        return array.shape if array.dtype.kind in _NUMBERS and array.size else ()
    except Exception:  # NumPy raises nearly every type of error on broken files; they are named when they are opened
        return ()


def _parts(shape: tuple[int, ...], axes: str | None, is_given: bool) -> list[str]:
    """What follows the path of a file in the path of each of its images. Axes that do not fit the shape stay as they
    are, and are named when the image is opened."""
    is_many = axes is not None and axes[0] == "N" and len(axes) == len(shape)
    suffix = f" as {axes[is_many:]}" if is_given else ""
    return [f"[{index}]{suffix}" for index in range(shape[0])] if is_many else [suffix]


def _axes_of(file: str, shape: tuple[int, ...], alone: bool, few: bool, are_many: bool) -> str | None:
    """What the axes of an array are, `None` if it holds no images."""
    if len(shape) not in AXES:
        return None
    is_long = len(shape) == 2 and max(shape) > _RATIO * min(shape)
    if len(shape) == 2 and few and (is_long or (shape[0] != shape[1] >= _FLAT)):
        remedy = "give --array_axes HW if they are one image, or reshape those of many to (N, height, width)"
        raise ValueError(f"{file}: values of the shape {shape} can be a flat image in each row; {remedy}")
    likely = _likely(shape)
    images = [axes for axes in likely if axes[0] != "N"]
    if are_many and "NHW" in likely:
        return "NHW"
    if len(likely) == 1 or (images and not alone):
        return (images or likely)[0]
    choices = " or ".join(f"--array_axes {axes}" for axes in likely or AXES[len(shape)])
    raise ValueError(
        f"{file}: the axes of its shape {shape} can be read in several ways; give {choices} (N images, C channels, "
        "H height, W width)"
    )


def _likely(shape: tuple[int, ...]) -> list[str]:
    """What the axes of an array can be; images with a very long side only if there are no others."""
    for ratio in (_RATIO, math.inf):
        likely = [axes for axes in AXES[len(shape)] if len(shape) == 2 or _is_likely(axes, shape, ratio)]
        if shape[0] == 1 and "CHW" in likely:  # the same as NHW
            likely = [axes for axes in likely if axes != "NHW"]
        if likely:
            break
    return likely


def _is_likely(axes: str, shape: tuple[int, ...], ratio: float) -> bool:
    lengths = dict(zip(axes, shape, strict=True))
    short, long = sorted((lengths["H"], lengths["W"]))
    channels = lengths.get("C", 4)  # images of at most 4 pixels are rather channels
    return channels < short + (axes == "CHW") and long <= ratio * short


def is_array(path: str) -> bool:
    """Whether a path is that of an image in a .npy file."""
    return _PATH.fullmatch(path) is not None


def open_array(path: str, content: bytes | None = None) -> np.ndarray:
    """
    The measured values at a path, `float32` (C, H, W).

    Args:
        path (`str`): That of a file or of one image in it.
        content (`bytes`, *optional*): That of the file, if it is not on the disk.
    """
    file, index, axes = _PATH.fullmatch(path).group("file", "index", "axes")
    array = _load(file if content is None else io.BytesIO(content))
    return measured_values(array if index is None else array[int(index)], axes)


def _load(file: str | io.BytesIO) -> np.ndarray:
    """The array in a .npy file, read from the disk when it is used."""
    try:
        return np.load(file, mmap_mode=None if isinstance(file, io.BytesIO) else "r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        start = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()[: len(LFS_POINTER)]
        if start.startswith(LFS_POINTER):
            raise ValueError(f"a pointer of Git LFS; {LFS_REMEDY}") from error
        if re.search("^mmap length|^EOF|^No data left", str(error)):
            raise ValueError("the file is cut off; copy or download it again") from error
        if "pickle" in str(error) or "objects" in str(error):
            raise ValueError("no array of numbers, or no .npy file; save an array of numbers by np.save") from error
        raise


def measured_values(array: np.ndarray, axes: str | None = None) -> np.ndarray:
    """Measured values as `float32` (C, H, W). Without `axes`, an image of three axes is HWC if the last axis is
    shorter than the first, else CHW."""
    if array.dtype.kind not in _NUMBERS:
        raise ValueError(f"an array of the type {array.dtype}; save one of real numbers")
    if not array.size:
        raise ValueError(f"an array of shape {array.shape}, which is empty; fill or remove it")
    if array.ndim == 1:
        remedy = "if these are labels, put the .npy files of each class into a folder of its name"
        raise ValueError(f"an array of shape {array.shape} holds no image; {remedy}")
    shapes = [axes] if axes else ["HW", "CHW", "HWC"]
    if array.ndim not in map(len, shapes):
        expected = " or ".join(f"({', '.join(shape)})" for shape in shapes)
        remedy = "; correct or leave out --array_axes" if axes else ""
        raise ValueError(f"an array of shape {array.shape} and type {array.dtype}, not {expected}{remedy}")
    if array.ndim == 2:
        array = array[None]
    elif axes == "HWC" or (axes is None and array.shape[2] < array.shape[0]):
        array = array.transpose(2, 0, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.ascontiguousarray(array, dtype=np.float32)
    if not (np.abs(values) < 1e37).all():  # their range has to be finite, too
        raise ValueError("some of its values are not finite, or beyond ±1e37; replace them")
    for channel, kept in zip(array, values, strict=True) if not np.can_cast(array.dtype, np.float32) else ():
        with np.errstate(invalid="ignore"):  # the largest integers are rounded to one more
            is_exact = (kept.astype(array.dtype) == channel).all()
        low, high = channel.min().item(), channel.max().item()
        is_one_value = array.dtype.kind == "f" and high - low <= 1e-14 * max(abs(low), abs(high))
        step = float(np.spacing(np.abs(kept).max()))
        if not is_exact and not is_one_value and high - low < 4096 * step / 2:  # the least of 12 bits would be lost
            remedy = "subtract the lowest value, or one that fits all images, and save them again"
            raise ValueError(f"its values, {low!r} to {high!r}, are too close together for float32; {remedy}")
    return values
