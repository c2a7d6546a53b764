"""`load_pictures("path/to/folder", resolution=64)`: any source of images as a `PictureDataset`."""

import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow as pa
import torch
from datasets.utils import tqdm

from hf_genmod.data.decoding import LINK
from hf_genmod.data.entries import Entries
from hf_genmod.data.files import image_endings
from hf_genmod.data.folder import NUMBER, classes_in_names, in_order
from hf_genmod.data.labelled_dataset import Captions
from hf_genmod.data.metadata import CAPTION_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.shapes import ShapesDataset
from hf_genmod.data.sources import ARRAY_TYPES, SHAPES_SPLITS, Found, column_of, find_splits, refuse_unused
from hf_genmod.errors import counted, shortened
from hf_genmod.processes import processes


def load_pictures(
    dataset: str | Path | datasets.Dataset | datasets.DatasetDict | Found | ShapesDataset = "shapes",
    *,
    split: str = "train",
    resolution: int | str | tuple[int, int] | None = None,
    channels: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    config_name: str | None = None,
    array_axes: str | None = None,
    in_memory: bool | None = None,
    on_bad_image: str = "error",
    require_labels: bool = False,
    require_captions: bool = False,
    limit: int | None = None,
) -> PictureDataset:
    """
    Loads one split of a data set of images.

    Args:
        dataset: "shapes", the embedded data set; a folder of images or .npy files, in class folders or not, with
            captions in .txt files, metadata.jsonl or metadata.csv or none; a .zip or .tar of such a folder; a folder
            of parquet files; a parquet file; a folder written by `save_to_disk`; an id on the Hub; or a data set that
            is loaded already, or found by [`~hf_genmod.data.sources.find_splits`].
        split (`str`): Every data set has "train", some have others. For "shapes", "test" holds 2048 other images.
        resolution (`int`, `str` or `tuple[int, int]`, *optional*): Side, (height, width) or "HxW"; for "shapes" 32.
        channels, in_memory, on_bad_image: See [`PictureDataset`], and for `resolution` too.
        image_column (`str`, *optional*): By default the only column of images.
        label_column (`str`, *optional*): Column of class labels, integers or strings; the classes are the sorted
            values that occur in any split. By default the only `ClassLabel` column, or "label", "labels", "class"
            or "cls"; none if that column holds no usable labels. For "shapes": "shape" or "shape_color".
        caption_column (`str`, *optional*): Column with a string or a list of strings for each image. By default
            "text", "caption", "captions" or "txt".
        config_name (`str`, *optional*): The configuration of a data set that has several.
        array_axes (`str`, *optional*): The axes of the arrays in .npy files: "HW", "HWC" or "CHW" for one image in a
            file, "NHW", "NHWC" or "NCHW" for many. By default as [`~hf_genmod.data.arrays.separated`] says.
        require_labels, require_captions (`bool`): Whether a data set without them is an error.
        limit (`int`, *optional*): How many images to take, at even distances.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If the data set cannot be read, or has no column of the kind that is asked for.
    """
    size = None if resolution is None else height_width(resolution)
    if isinstance(dataset, str) and dataset == "shapes":
        num_images, seed = split_of(SHAPES_SPLITS, split, dataset)
        dataset = ShapesDataset(num_images, size or 32, seed, label=label_column or "shape")
    if isinstance(dataset, ShapesDataset):
        refuse_unused("shapes", config_name, array_axes)
        if require_labels and not dataset.label_names:
            raise ValueError("shapes: these images have no labels; draw them with label='shape'")
        hidden = None if processes().is_main_process else True
        rows = [dataset[i] for i in tqdm(_at_even_distances(len(dataset), limit), "Drawing images", disable=hidden)]
        labels = torch.tensor([row["label"] for row in rows]) if dataset.label_names else None
        pictures, captions = [row["image"] for row in rows], [row["caption"] for row in rows]
        label_names = dataset.label_names or None
        return PictureDataset(pictures, "shapes", size, channels, labels, label_names, captions, in_memory)

    splits, source = find_splits(dataset, config_name, array_axes)
    name = source
    rows = split_of(splits, split, name)
    if len(rows) == 0:
        raise ValueError(f"{name}: its split {split!r} is empty")
    if len(splits) > 1:
        name = f"{name} ({split})"
    refuse_unknown_columns(rows, name, image_column, label_column, caption_column)
    for column in set(rows.column_names) & set(SPLIT_COLUMNS):
        if len(words := set(map(str, rows.unique(column)))) > 1:
            what = f"its column {column!r} ({shortened(sorted(words))}) is not used, so all its rows are in {split!r}"
            warnings.warn(f"{name}: {what}; write a parquet file for each split, if they are splits", stacklevel=2)
    rows = rows.select(_at_even_distances(len(rows), limit))
    pictures = _pictures(rows, name, image_column_of(rows, name, image_column))
    where = Entries(pictures, name).where
    require_labels, require_captions = require_labels or bool(label_column), require_captions or bool(caption_column)
    label_column = label_column_of(rows, name, label_column, require_labels, where)
    labels, label_names = labels_of(splits, rows, name, label_column, require_labels, where)
    warn_of_names(label_names or [], source)
    captions = captions_of(rows, name, caption_column, require_captions, where)
    return PictureDataset(pictures, name, size, channels, labels, label_names, captions, in_memory, on_bad_image)


def refuse_unknown_columns(rows: datasets.Dataset, name: str, image: str | None, label: str | None, text: str | None):
    """Raises a `ValueError` if one of the columns is none of the rows."""
    for argument, column in {"image_column": image, "label_column": label, "caption_column": text}.items():
        if column not in (None, *rows.column_names):
            raise ValueError(f"{argument}: {column!r} is no column of {name}; it has {', '.join(rows.column_names)}")


def _at_even_distances(count: int, limit: int | None) -> Sequence[int]:
    return range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]


def warn_of_names(names: list[str], source: str) -> None:
    """Tells of names that may be of one class, and of numbers that are not the labels."""
    forms = [unicodedata.normalize("NFKC", name).strip().casefold() for name in names]
    counts = Counter(forms)
    if alike := [repr(name) for name, form in zip(names, forms, strict=True) if counts[form] > 1]:
        what = f"classes whose names differ by case, blanks or how Unicode writes them alone: {shortened(alike)}"
        warnings.warn(f"{source}: {what}; rename one if they are one class", stacklevel=3)
    numbers = [Decimal(name) for name in names if NUMBER.fullmatch(name)]
    if len(numbers) == len(names) and (others := [i for i, number in enumerate(numbers) if number != i]):
        what = f"labels count from 0: label {others[0]} is the class {names[others[0]]!r}"
        warnings.warn(f"{source}: {what}", stacklevel=1)  # once for all splits


def height_width(resolution: int | str | tuple[int, int]) -> tuple[int, int]:
    """A size from a number, a pair or "HxW". Raises a `ValueError` if it is none."""
    sides = [resolution] if isinstance(resolution, int) else resolution
    if isinstance(sides, str):
        sides = [int(side) if side.strip().isdecimal() else 0 for side in sides.lower().split("x")]
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"resolution: {resolution!r} is neither a number of pixels nor HEIGHTxWIDTH, such as 64x48")
    return sides[0], sides[-1]


def split_of(splits: dict, split: str, name: str):
    """A split. Raises a `ValueError` if there is none of this name."""
    if split not in splits:
        has = f"it has {', '.join(map(repr, splits))}; choose one, such as --split {next(iter(splits))}"
        raise ValueError(f"split: {name} has no {split!r}; {has}")
    return splits[split]


def image_column_of(rows: datasets.Dataset, name: str, column: str | None) -> str:
    """The column of images; `column` if it is given."""
    if column is None:
        images = [key for key, feature in rows.features.items() if _may_be_images(feature)]
        if len(images) != 1:
            several = f"several of its columns hold images ({', '.join(images)})"
            if images:
                raise ValueError(f"{name}: {several}; choose one by --image_column")
            none = f"none of its columns ({shortened(rows.column_names, 20)}) is known to hold images"
            raise ValueError(f"{name}: {none}; {_remedy_without_images(rows)}")
        column = images[0]
    return column


def _pictures(rows: datasets.Dataset, name: str, column: str) -> datasets.Dataset:
    """The images, not decoded, as the column "image"."""
    pictures = rows.select_columns(column)
    if mode := getattr(rows.features[column], "mode", None):
        what = f"its column {column!r} asks for the mode {mode!r}, which is not applied"
        warnings.warn(f"{name}: {what}; give --channels, if the images have others", stacklevel=3)
    try:
        if not isinstance(rows.features[column], ARRAY_TYPES):
            pictures = pictures.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"image_column: {column!r} of {name} holds no images; name another column") from error
    return pictures if column == "image" else pictures.rename_column(column, "image")


def _remedy_without_images(rows: datasets.Dataset) -> str:
    """What to do about a table without a column of images: which columns can be images, or that there are none."""
    links, others = [], []
    for column, feature in rows.features.items():
        if getattr(feature, "dtype", None) in ("string", "large_string"):
            first = str(next(filter(None, column_of(rows, column).to_pylist()), ""))
            if LINK.match(first):
                links.append(column)
            elif os.path.splitext(first)[1].lower() in image_endings():
                others.append(column)
        elif isinstance(feature, datasets.List):
            others.append(column)
    if others:
        return f"choose {' or '.join(others)} by --image_column, if these are images or their paths"
    told = f"the links in {links[0]!r} are not downloaded; " if links else ""
    return f"{told}write a column image with the bytes or the paths of the images"


def _may_be_images(feature) -> bool:
    """Whether a column holds images, arrays, or the bytes of files, as a parquet file without features has them."""
    of_files = isinstance(feature, dict) and "bytes" in feature and feature.keys() <= {"bytes", "path"}
    of_files = of_files or getattr(feature, "dtype", None) in ("binary", "large_binary")
    return of_files or isinstance(feature, (datasets.Image, *ARRAY_TYPES))


def label_column_of(
    rows: datasets.Dataset, name: str, column: str | None, required: bool, where: Callable
) -> str | None:
    """The column of labels, `column` if it is given; `None` where there is none and none required."""
    if column is None:
        classes = [key for key, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        usual = [key for key in LABEL_COLUMNS if key in rows.column_names]
        column = classes[0] if len(classes) == 1 else next(iter(usual), None)
    if column is None and len(classes) > 1:
        several = f"{name}: several of its columns hold class labels ({shortened(classes)})"
        if required:
            raise ValueError(f"{several}; choose one by --label_column")
        warnings.warn(f"{several}, so labels are not used; choose one by --label_column", stacklevel=3)
    elif column is None and required:
        none = f"none of its columns ({shortened(rows.column_names, 20)}) is known to hold class labels"
        remedy = classes_in_names(where, len(rows)) or (
            "sort the images into two or more class folders, all at one depth, write a metadata.csv with the columns "
            "file_name and label, or name a column by --label_column"
        )
        raise ValueError(f"{name}: {none}; {remedy}")
    return column


def labels_of(
    splits: dict, rows: datasets.Dataset, name: str, column: str | None, required: bool, where: Callable
) -> tuple[torch.Tensor | None, list[str] | None]:
    """The label of each image and the names of the classes; both `None` where there are none and none required."""
    if column is None:
        return None, None
    feature, values = rows.features[column], column_of(rows, column).to_pylist()
    dtype = getattr(feature, "dtype", type(feature).__name__)
    if isinstance(feature, datasets.ClassLabel):
        classes, label_names = range(feature.num_classes), feature.names
    elif re.fullmatch(r"u?int\d+|bool|(large_)?string", dtype):
        # The values of all splits, so that a label means the same in each of them.
        kinds = {split: str(getattr(other.features.get(column), "dtype", dtype)) for split, other in splits.items()}
        if len({"string" in kind for kind in kinds.values()}) > 1:
            some = ", ".join(f"{kind} in {split!r}" for split, kind in kinds.items())
            raise ValueError(f"{name}: its column {column!r} holds {some}; give the labels of all splits one type")
        known = {value for other in splits.values() if column in other.features for value in other.unique(column)}
        classes = in_order({value for value in known - {None, ""} if isinstance(value, str) or value >= 0})
        label_names = [str(value) for value in classes]
    else:
        what = f"{name}: its column {column!r} holds {dtype}, not classes"
        remedy = "write one integer or name for each image, or name another column by --label_column"
        if required:
            raise ValueError(f"{what}; {remedy}")
        warnings.warn(f"{what}, so labels are not used; {remedy}", stacklevel=3)
        return None, None
    index = {value: i for i, value in enumerate(classes)}
    labels = torch.tensor([index.get(value, -1) for value in values])
    unlabelled = (labels < 0).nonzero()[:, 0].tolist()
    if not unlabelled:
        return labels, label_names
    place = where(unlabelled[0])
    some = f"{len(unlabelled)} of {counted(len(labels), 'image')}, such as {place}"
    if isinstance(feature, datasets.ClassLabel) and not place.startswith("row "):  # read from class folders
        what = f"{name}: images outside its class folders ({shortened(label_names)}), or at another depth in them"
        remedy = "put all images into class folders of one depth, or remove the others"
    else:
        what = f"{name}: images without a label (-1, none or empty) in the column {column!r}"
        remedy = "label or remove them" + ", or use another split" * (len(splits) > 1)
    if required:
        raise ValueError(f"{what}: {some}; {remedy}")
    if len(unlabelled) < len(labels):
        warnings.warn(f"{what}: {some}, so labels are not used; {remedy}", stacklevel=3)
    return None, None


def captions_of(
    rows: datasets.Dataset, name: str, column: str | None, required: bool, where: Callable
) -> Captions | None:
    """The captions of the images; `None` where there are none and none required."""
    column = column or next((key for key in CAPTION_COLUMNS if key in rows.column_names), None)
    kinds = {key: getattr(value, "feature", value) for key, value in rows.features.items()}
    texts = [key for key, kind in kinds.items() if getattr(kind, "dtype", None) in ("string", "large_string")]
    if column not in texts:
        if required:
            reason = f"no captions (strings or lists of strings) in {repr(column) if column else 'its columns'}"
            remedy = (
                f"choose {' or '.join(texts)} with --caption_column"
                if texts
                else "write that of 1.png into 1.txt, or all into a metadata.csv with the columns file_name and text"
            )
            raise ValueError(f"{name}: {reason}; {remedy}")
        if column:
            what = f"{name}: its column {column!r} holds no captions (strings or lists of strings)"
            warnings.warn(f"{what}, so captions are not used", stacklevel=3)
        return None
    captions = Captions(column_of(rows, column))
    missing = [i for i, caption in enumerate(captions) if caption is None or caption == []]
    if not missing:
        return captions
    some = f"{len(missing)} of {counted(len(captions), 'image')}, such as {where(missing[0])}"
    some = f"{name}: images without a caption ({column!r}): {some}"
    if required:
        raise ValueError(f"{some}; caption or remove them")
    if len(missing) < len(captions):
        warnings.warn(f"{some}, so captions are not used; caption or remove them", stacklevel=3)
    return None
