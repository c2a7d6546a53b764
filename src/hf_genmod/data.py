"""Pictures from anywhere as a `PictureDataset`: of one size, checked before training starts.

dataset = load_pictures("path/to/folder", resolution=64)
dataset[0]["images"]  # uint8, (C, 64, 64)
"""

import copy
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
import fsspec
import numpy as np
import psutil
import pyarrow as pa
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.utils import tqdm  # silenced together with the other bars of datasets
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .shapes import ShapesDataset

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # channels -> mode of Pillow
_SHAPES = {"train": (8192, 0), "test": (2048, 1)}  # number of pictures, seed
_ARRAYS = (datasets.Array2D, datasets.Array3D)
_CHUNK = 64  # pictures that a thread holds at once


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Maps `uint8` 0..255 to the float range [-1, 1] of the models; floats are in it already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


# ---------------------------------------------------------------------------------------------------- the pictures


class PictureDataset(torch.utils.data.Dataset):
    """Pictures of one size as `uint8` (n, C, H, W), with labels and captions where there are any.

    Every picture is decoded once at the start, so that an unreadable one is found before training and not hours into
    it; the pixels are then kept if memory allows, else decoded again on access. Both give the same bits. What was
    found out about a file is remembered for the next time, until its time or size changes.

    Measured values, of more than 8 bits or of other than the usual channels, are `float32`; what each channel ranges
    over in the whole data set (`value_range`) is mapped to [-1, 1], the range of the models.

    Args:
        source (`datasets.Dataset` or `list` of `PIL.Image.Image`): the pictures; of a data set its column "image", of
            type `datasets.Image(decode=False)`, `datasets.Array2D`, (H, W), or `datasets.Array3D`, with the channels
            first, or last if that axis is the shorter one. Paths of .npy files hold arrays of the same shapes.
        name (`str`): how errors call the source.
        resolution (`tuple[int, int]`, *optional*): (height, width). A picture of another size is scaled, antialiased
            and with its aspect ratio kept, until it covers that size, then cropped to its middle. By default the size
            that all pictures have.
        channels (`int`, *optional*): 1 grey, 2 grey with alpha, 3 RGB, 4 RGBA. By default the fewest that represent
            every picture faithfully. Where alpha is given up, the picture is laid on white. Measured values keep
            their channels, however many.
        labels (`torch.Tensor`, *optional*): `int64` (n,), indices into `label_names`.
        label_names (`list[str]`, *optional*): name of each class.
        captions (`list`, *optional*): a string per picture, or a list of strings where a picture has several captions.
        in_memory (`bool`, *optional*): whether to keep the decoded pixels. By default if they take less than a quarter
            of the available memory.
        on_bad_image (`str`): "error" refuses the whole data set if any picture cannot be used, and names it; "skip"
            leaves those out.

    Attributes:
        images (`torch.Tensor` or `None`): all pixels, `uint8`, or measured values, `float32` in units of their own,
            (n, C, H, W), if they are kept in memory.
        value_range (`dict` or `None`): the lowest and the highest measured value of each channel, as `"low"` and
            `"high"`; `None` for pictures of 8 bits.
        fingerprint (`str`): hash of the pixels, labels, their names and captions that this data set returns; the same
            in every process and run, wherever the pictures come from.
        properties (`list[Properties]`): what each picture is before it is scaled and converted.
        skipped (`list[str]`): which pictures were left out, and why.

    Raises:
        `ValueError`: for pictures that cannot be used, even with "skip" if none is left, and for pictures of several
            sizes without a `resolution`.
    """

    vae = None  # as that of `LatentDataset`

    def __init__(
        self,
        source: datasets.Dataset | list[Image.Image],
        name: str,
        resolution: tuple[int, int] | None = None,
        channels: int | None = None,
        labels: torch.Tensor | None = None,
        label_names: list[str] | None = None,
        captions: list | None = None,
        in_memory: bool | None = None,
        on_bad_image: str = "error",
    ):
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image: {on_bad_image!r} is neither 'error' nor 'skip'")
        self.name, self.labels, self.label_names, self.captions = name, labels, label_names, captions
        if not isinstance(source, list):
            is_array = isinstance(source.features["image"], _ARRAYS)
            source = source.select_columns("image").with_format("numpy" if is_array else "arrow")
        self._source = source

        self._rows = range(len(source))  # those that are used
        self._skip_bad, self.skipped = on_bad_image == "skip", []

        remember = _Memory(name)
        # A picture to be left out must not have a say in the others' size and channels, so that it is decoded at once.
        found = self._inspect_all(remember, decode=self._skip_bad)
        if None in found and not self._skip_bad:
            self._inspect_all(remember, decode=True)  # for the error to name all of them
        if not self._skip_bad:
            self._refuse(self.skipped)
        self.properties = found
        self._keep([index for index, properties in enumerate(found) if properties is not None])
        heights, widths, colors, alphas, measured = zip(*self.properties, strict=True)
        low, high = (min(heights), min(widths)), (max(heights), max(widths))
        if resolution is None and low != high:
            raise ValueError(
                f"the pictures of {name} differ in size, from {low[0]}x{low[1]} to {high[0]}x{high[1]} (height x "
                f"width); choose one to bring them to, for example --resolution 64"
            )
        self._scale = resolution is not None
        self.resolution = resolution or low
        self.channels = self._number_of_channels(channels, any(colors), any(alphas), measured)

        shape = (self.channels, *self.resolution)
        dtype = torch.float32 if any(measured) else torch.uint8
        if in_memory is None:
            in_memory = len(self) * math.prod(shape) * dtype.itemsize < psutil.virtual_memory().available / 4
        images = torch.empty((len(self), *shape) if in_memory else 0, dtype=dtype)

        def decode(entry):
            if in_memory:
                pixels = self._decode(entry)
                return pixels, _summary(pixels)
            return None, remember(f"{shape} {self._scale}", lambda entry: _summary(self._decode(entry)), entry)

        digest = hashlib.blake2b(digest_size=8)
        # Pillow frees the interpreter while it decodes; over small pictures the threads would only get in one
        # another's way.
        threads = os.cpu_count() if np.dot(heights, widths) >= 64 * 64 * len(self) else 1
        usable, ranges = [], []
        for index, result in enumerate(self._for_all(decode, "Decoding pictures", threads)):
            if result is not None:
                pixels, (own_digest, value_range) = result
                digest.update(own_digest.encode())
                ranges.append(value_range)
                if in_memory:
                    images.numpy()[len(usable)] = pixels
                usable.append(index)
        if not self._skip_bad:
            self._refuse(self.skipped)
        self._keep(usable)
        remember.save()
        self.images = images[: len(self)] if in_memory else None
        self.value_range = None
        if any(measured):
            ranges = np.array(ranges)  # (n, C, 2)
            self.value_range = {
                "low": ranges[..., 0].min(axis=0).tolist(),
                "high": ranges[..., 1].max(axis=0).tolist(),
            }
        captions = self.captions
        targets = ((len(self), *shape), label_names, captions, None if self.labels is None else self.labels.tolist())
        digest.update(repr(targets).encode())
        self.fingerprint = digest.hexdigest()

    def _inspect_all(self, remember: "_Memory", decode: bool) -> list["Properties | None"]:
        self.skipped = []
        inspect = functools.partial(_inspect, decode=decode)
        remembered = functools.partial(remember, f"decoded {decode}", inspect)
        results = self._for_all(remembered, "Inspecting pictures", os.cpu_count() if decode else 1)
        return [result and Properties(*result) for result in results]

    def _number_of_channels(self, wanted: int | None, color: bool, alpha: bool, measured: tuple[int, ...]) -> int:
        if any(measured):
            kinds = {number: measured.index(number) for number in sorted(set(measured))}
            if len(kinds) > 1:
                (one, first), (other, second) = list(kinds.items())[:2]
                kind = f"{one} channels" if one else "8 bits"
                raise ValueError(
                    f"the pictures of {self.name} are of several kinds: {self.where(first)} of {kind}, "
                    f"{self.where(second)} of {other} channels of measured values; keep those of one kind"
                )
            if wanted not in (None, measured[0]):
                raise ValueError(
                    f"{self.name}: it holds measured values of {measured[0]} channels, which stay as they are; they "
                    f"cannot be made {wanted}"
                )
            return measured[0]
        if wanted not in (None, *_MODES):
            raise ValueError(f"channels: {wanted} is none of 1 (grey), 2 (grey, alpha), 3 (RGB) and 4 (RGBA)")
        return wanted or (3 if color else 1) + alpha

    def _keep(self, indices: list[int]) -> None:
        """Leaves all others out."""
        if not indices:
            raise ValueError(f"none of the {len(self.skipped)} pictures of {self.name} can be used: {self.skipped[0]}")
        if len(indices) == len(self):
            return
        self._rows = [self._rows[i] for i in indices]
        self.properties = [self.properties[i] for i in indices]
        is_list = isinstance(self._source, list)
        self._source = [self._source[i] for i in indices] if is_list else self._source.select(indices)
        self.labels = None if self.labels is None else self.labels[indices]
        self.captions = None if self.captions is None else [self.captions[i] for i in indices]

    def hold_out(self, count: int, seed: int = 0) -> "PictureDataset":
        """Takes `count` pictures out of this data set and returns them as one of their own: drawn at random, from each
        class its share, but never its last one."""
        num_kept = 1 if self.labels is None else len(self.labels.unique())
        if not 0 < count <= len(self) - num_kept:
            raise ValueError(
                f"{self.name}: {count} of its {len(self)} pictures cannot be held out without emptying a class; "
                "collect more"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        if self.labels is not None:
            labels, by_class = self.labels[order], self.labels[order].argsort(stable=True)
            sizes = torch.bincount(labels)
            first = (sizes.cumsum(0) - sizes)[labels[by_class]]
            rank = torch.empty_like(labels).scatter(0, by_class, torch.arange(len(labels)) - first)  # in its class
            share = ((rank + 0.5) / sizes[labels]).masked_fill(rank == sizes[labels] - 1, math.inf)
            order = order[share.argsort(stable=True)]
        held_out = copy.copy(self)
        for part, indices, role in ((held_out, order[:count], "held"), (self, order[count:], "kept")):
            indices = indices.sort().values
            part._keep(indices.tolist())
            part.images = None if part.images is None else part.images[indices]
            part.fingerprint = f"{part.fingerprint}-{role}-{len(indices)}-{seed}"
        return held_out

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, indices: Sequence[int]) -> dict:
        """A whole batch: "images", `uint8` or `float32` in [-1, 1], (n, C, H, W), and where there are any,
        "class_labels", `int64` (n,), and "captions", a list."""
        if self.images is not None:
            images = self.images[torch.as_tensor(indices)]
        else:
            decoded, unusable = self._apply(self._decode, indices)
            self._refuse(unusable)  # it was usable at the start
            images = torch.from_numpy(np.stack(decoded))
        if self.value_range is not None:
            low, high = (torch.tensor(self.value_range[end])[:, None, None] for end in ("low", "high"))  # (C, 1, 1)
            images = 2 * (images - low) / (high - low).clamp(min=1e-30) - 1
        batch = {"images": images}
        if self.labels is not None:
            batch["class_labels"] = self.labels[torch.as_tensor(indices)]
        if self.captions is not None:
            batch["captions"] = [self.captions[i] for i in indices]
        return batch

    def __getitem__(self, index: int) -> dict:
        """A single picture under the same keys: "images" (C, H, W), "class_labels" (), "captions" its own."""
        return {key: value[0] for key, value in self.__getitems__([range(len(self))[index]]).items()}

    def _decode(self, entry) -> np.ndarray:
        """Pixels of one picture, `uint8` (C, H, W), or measured values, `float32`."""
        height, width = self.resolution
        picture = _open(entry)
        if isinstance(picture, np.ndarray):
            if self._scale and picture.shape[1:] != (height, width):
                planes = [Image.fromarray(plane) for plane in picture]
                return np.stack([ImageOps.fit(plane, (width, height), Image.Resampling.LANCZOS) for plane in planes])
            return picture
        with picture as image:
            if self._scale:
                # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; twice our size leaves the filter its choice.
                image.draft(None, (2 * max(height, width),) * 2)
            ImageOps.exif_transpose(image, in_place=True)
            picture = _convert(image, _MODES[self.channels])
        if self._scale and picture.size != (width, height):
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
        if picture.size != (width, height):
            raise ValueError("its size is not the one in its header; save it again")
        return np.asarray(picture).reshape(height, width, -1).transpose(2, 0, 1).copy()

    def _apply(self, function: Callable, indices: Sequence[int]) -> tuple[list, list[str]]:
        """function(entry) of each picture, None for those that cannot be used, and what is wrong with these."""
        if isinstance(self._source, list):
            entries = [self._source[i] for i in indices]
        else:
            entries = self._source[indices]["image"]
            if not isinstance(self._source.features["image"], _ARRAYS):
                entries = entries.to_pylist()  # {"bytes", "path"}; either may be None
        results, unusable = [], []
        for index, entry in zip(indices, entries, strict=True):
            try:
                results.append(function(entry))
            except Exception as error:  # the formats of Pillow raise nearly everything on broken files
                if isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, errno.ENOENT):
                    raise  # not the fault of the picture
                unknown = isinstance(error, UnidentifiedImageError)
                reason = "no picture that Pillow knows" if unknown else getattr(error, "strerror", None) or str(error)
                results.append(None)
                unusable.append(f"{self._where(index, entry)}: {reason}")
        return results, unusable

    def where(self, index: int) -> str:
        """Where a picture comes from: its file, or its row."""
        is_file = not isinstance(self._source, list) and isinstance(self._source.features["image"], datasets.Image)
        return self._where(index, self._source[index]["image"].to_pylist()[0] if is_file else None)

    def _where(self, index: int, entry) -> str:
        is_file = isinstance(entry, dict) and entry["bytes"] is None and entry["path"]
        return entry["path"] if is_file else f"row {self._rows[index]} of {self.name}"

    def _for_all(self, function: Callable, description: str, num_threads: int = 1) -> Iterator:
        """function(entry) of all pictures in order, None for those that are not usable and added to `skipped`."""
        chunks = [range(i, min(i + _CHUNK, len(self))) for i in range(0, len(self), _CHUNK)]
        with (
            ThreadPoolExecutor(num_threads) as threads,
            tqdm(total=len(self), desc=description, unit=" pictures", disable=None) as progress,
        ):
            for results, new in threads.map(lambda chunk: self._apply(function, chunk), chunks):
                self.skipped += new
                yield from results
                progress.update(len(results))

    def _refuse(self, unusable: list[str]) -> None:
        if unusable:
            more = f"; and {len(unusable) - 5} more" if len(unusable) > 5 else ""
            raise ValueError(
                f"{len(unusable)} of the {len(self)} pictures of {self.name} cannot be used (--on_bad_image skip "
                f"leaves such out), repair or remove {'it' if len(unusable) == 1 else 'them'}: "
                f"{'; '.join(unusable[:5])}{more}"
            )


def _open(entry) -> Image.Image | np.ndarray:
    """The picture of an entry, its pixels not decoded yet; of arrays and more than 8 bits, `float32` (C, H, W)."""
    if isinstance(entry, np.ndarray):
        return _values(entry)
    if isinstance(entry, dict) and (entry["path"] or "").endswith(".npy"):
        if entry["bytes"] is not None:
            return _values(np.load(io.BytesIO(entry["bytes"]), allow_pickle=False))
        return _values(np.load(entry["path"], mmap_mode="r", allow_pickle=False))
    if isinstance(entry, Image.Image):
        image = entry
    elif entry is None or entry["bytes"] is entry["path"] is None:
        raise ValueError("the row holds no picture")
    elif entry["bytes"] is not None:
        image = Image.open(io.BytesIO(entry["bytes"]))
    elif "://" in entry["path"]:  # inside of an archive
        with fsspec.open(entry["path"]) as file:
            image = Image.open(io.BytesIO(file.read()))
    else:
        image = Image.open(entry["path"])
    if getattr(image, "is_animated", False) and image.format != "MPO":  # which is a photo with others beside it
        frames = image.n_frames
        image.close()
        raise ValueError(f"it has {frames} frames; save the one that you want as a picture of its own")
    if image.mode[0] in "IF":
        with image:
            return _values(np.asarray(ImageOps.exif_transpose(image)))
    if image.format == "PNG" and image.tile and ";16" in str(image.tile[0].args):
        image.close()
        raise ValueError("it has colours of 16 bits, of which Pillow reads 8; save it with 8, or as an array in .npy")
    return image


def _values(array: np.ndarray) -> np.ndarray:
    """Measured values as `float32` (C, H, W)."""
    if array.ndim not in (2, 3) or not array.size or array.dtype.kind not in "fiub":
        raise ValueError(f"an array of shape {array.shape} and type {array.dtype}, not (H, W), (C, H, W) or (H, W, C)")
    if array.ndim == 2:
        array = array[None]
    elif array.shape[2] < array.shape[0]:
        array = array.transpose(2, 0, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.ascontiguousarray(array, dtype=np.float32)
    if not (np.abs(values) < 1e37).all():  # whose range has to be finite as well
        raise ValueError("some of its values are not finite, or beyond ±1e37; replace them")
    return values


class Properties(NamedTuple):
    height: int
    width: int
    has_color: bool = False
    has_alpha: bool = False
    measured_channels: int = 0  # 0 for a picture of 8 bits


def _inspect(entry, decode: bool = False) -> Properties:
    """From the header alone, save for palettes and measured values, unless the whole picture is to be decoded."""
    picture = _open(entry)
    if isinstance(picture, np.ndarray):
        return Properties(*picture.shape[1:], measured_channels=len(picture))
    with picture as image:
        # The method of PngImageFile would decode the picture to look for a tag behind the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        if decode:
            image.load()
        width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
        color = image.mode not in ("1", "L", "LA", "La")
        if image.mode in ("P", "PA"):
            red, green, blue = (image.getpalette("RGB")[i::3] for i in range(3))
            color = not red == green == blue
        return Properties(height, width, color, image.has_transparency_data)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")  # applies a transparent color or a palette's transparency
        if not mode.endswith("A"):
            # The color of a transparent pixel is one that nobody has seen.
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _summary(pixels: np.ndarray) -> tuple[str, list | None]:
    """Hash of the pixels, and lowest and highest measured value of each channel."""
    ranges = None
    if pixels.dtype != np.uint8:
        ranges = np.stack([pixels.min(axis=(1, 2)), pixels.max(axis=(1, 2))], axis=1).tolist()
    return hashlib.blake2b(pixels, digest_size=16).hexdigest(), ranges


class _Memory:
    """What functions gave for pictures in earlier runs, by file, time and size, or by content; in the cache folder of
    `datasets`."""

    def __init__(self, name: str):
        place = hashlib.blake2b(os.path.abspath(name).encode(), digest_size=8).hexdigest()
        self._file = Path(datasets.config.HF_DATASETS_CACHE, "hf_genmod", f"{place}.json")
        self._now, self._known = {}, {}
        try:
            self._known = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none, or half a file
            pass

    def __call__(self, what: str, function: Callable, entry):
        """function(entry), or what it gave for the same picture before."""
        if not isinstance(entry, dict) or (entry["bytes"] is None and not os.path.isfile(entry["path"] or "")):
            return function(entry)
        if entry["bytes"] is not None:
            picture = hashlib.blake2b(entry["bytes"], digest_size=16).hexdigest()
        else:
            stat = os.stat(entry["path"])
            picture = f"{entry['path']} {stat.st_mtime_ns} {stat.st_size}"
        key = f"{what} {picture}"
        self._now[key] = self._known.get(key) or function(entry)
        return self._now[key]

    def save(self) -> None:
        if self._now == self._known:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False, encoding="utf-8") as file:
                json.dump(self._now, file)
            os.replace(file.name, self._file)
        except OSError:  # a full disk costs time next time
            pass


# --------------------------------------------------------------------------------------------------- where they are


def load_pictures(
    dataset: str | Path | datasets.Dataset | datasets.DatasetDict | ShapesDataset = "shapes",
    *,
    split: str = "train",
    resolution: int | str | tuple[int, int] | None = None,
    channels: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    config_name: str | None = None,
    in_memory: bool | None = None,
    on_bad_image: str = "error",
    require_labels: bool = False,
    require_captions: bool = False,
    limit: int | None = None,
) -> PictureDataset:
    """Loads one split of a data set of pictures.

    Args:
        dataset: "shapes", the embedded data set; a folder of class folders, of pictures alone, of pictures with
            captions in metadata.jsonl or metadata.csv, of .npy files in class folders or alone, or of parquet files; a
            parquet file; a folder written by `save_to_disk`; an id on the Hub; or a data set that is loaded already.
        split (`str`): "train" exists everywhere, others where the data set has them. For "shapes", "test" holds 2048
            other pictures.
        resolution (`int`, `str` or `tuple[int, int]`, *optional*): side, (height, width) or "HxW"; see
            [`PictureDataset`]. For "shapes" 32 by default.
        channels (`int`, *optional*): see [`PictureDataset`].
        image_column (`str`, *optional*): by default the only one of pictures.
        label_column (`str`, *optional*): class labels, integers or strings, the classes being the sorted values that
            occur in any split. By default the only `ClassLabel` column, or "label", "labels" or "class"; none if that
            holds no usable labels. For "shapes": "shape" or "shape_color".
        caption_column (`str`, *optional*): a string or a list of strings for each picture. By default "text",
            "caption" or "captions".
        config_name (`str`, *optional*): which configuration of a data set on the Hub that has several.
        in_memory (`bool`, *optional*), on_bad_image (`str`): see [`PictureDataset`].
        require_labels (`bool`): whether a data set without labels is an error.
        require_captions (`bool`): whether a data set without captions is an error.
        limit (`int`, *optional*): how many pictures to take, at even distances.

    Raises:
        `ValueError`, `FileNotFoundError`: in one sentence that names the culprit and what to do.
    """
    size = None if resolution is None else _height_width(resolution)
    if isinstance(dataset, str) and dataset == "shapes":
        num_images, seed = _split(_SHAPES, split, dataset)
        dataset = ShapesDataset(num_images, size or 32, seed, label=label_column or "shape")
    if isinstance(dataset, ShapesDataset):
        if require_labels and not dataset.label_names:
            raise ValueError("shapes: these pictures have no labels; draw them with label='shape'")
        rows = [dataset[i] for i in tqdm(_at_even_distances(len(dataset), limit), "Drawing pictures", disable=None)]
        labels = torch.tensor([row["label"] for row in rows]) if dataset.label_names else None
        pictures, captions = [row["image"] for row in rows], [row["caption"] for row in rows]
        return PictureDataset(
            pictures, "shapes", size, channels, labels, dataset.label_names or None, captions, in_memory
        )

    splits, name = _find(dataset, config_name)
    rows = _split(splits, split, name)
    if len(rows) == 0:
        raise ValueError(f"{name}: its split {split!r} is empty")
    if len(splits) > 1:
        name = f"{name} ({split})"
    columns = {"image_column": image_column, "label_column": label_column, "caption_column": caption_column}
    for argument, column in columns.items():
        if column not in (None, *rows.column_names):
            raise ValueError(f"{argument}: {column!r} is no column of {name}; it has {', '.join(rows.column_names)}")
    rows = rows.select(_at_even_distances(len(rows), limit))
    pictures = _pictures(rows, name, image_column)
    labels, label_names = _labels(splits, rows, name, label_column, require_labels or label_column is not None)
    captions = _captions(rows, name, caption_column, require_captions or caption_column is not None)
    return PictureDataset(pictures, name, size, channels, labels, label_names, captions, in_memory, on_bad_image)


def _at_even_distances(count: int, limit: int | None) -> Sequence[int]:
    return range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]


def splits_of(dataset: str | Path) -> list[str]:
    """The names of the splits of a data set that `load_pictures` takes."""
    return list(_SHAPES if dataset == "shapes" else _find(dataset, None)[0])


def _height_width(resolution: int | str | tuple[int, int]) -> tuple[int, int]:
    sides = resolution
    if isinstance(sides, str):
        sides = [int(side) if side.strip().isdecimal() else 0 for side in sides.lower().split("x")]
    sides = (sides,) if isinstance(sides, int) else tuple(sides)
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"resolution: {resolution!r} is neither a number of pixels nor HEIGHTxWIDTH, such as 64x48")
    return (sides[0], sides[-1])


def _split(splits: dict, split: str, name: str):
    if split not in splits:
        raise ValueError(f"split: {name} has no {split!r}; it has {', '.join(map(repr, splits))}")
    return splits[split]


def _find(dataset: str | Path | datasets.Dataset | datasets.DatasetDict, config_name: str | None) -> tuple[dict, str]:
    """All splits of a data set, and how errors call it."""
    if isinstance(dataset, datasets.Dataset):
        dataset = {"train": dataset}
    if isinstance(dataset, dict):
        return dataset, "the data set"

    name, path = str(dataset), Path(dataset).expanduser().resolve()
    if not path.exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{name}: there is no such folder or file here; check the path")
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{name}: a file, but not of parquet; give a folder of pictures or a .parquet file")
    if path.exists() and set("*?[]") & set(str(path)):
        raise ValueError(f"{name}: datasets takes the characters *?[] of a path for a pattern; rename the folder")
    files = [file for file in path.rglob("*") if not _is_hidden(file.relative_to(path))]
    pictures = {str(file) for file in files if file.suffix.lower() in ImageFolder.EXTENSIONS}
    metadata = [file for file in files if file.name in ImageFolder.METADATA_FILENAMES]
    arrays = [file for file in files if file.suffix == ".npy"]
    if arrays and pictures:
        raise ValueError(
            f"{name}: it holds both arrays, {arrays[0].name}, and pictures, {min(pictures)}; keep one kind"
        )
    if arrays:
        return _array_folder(path, arrays), name
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={"train": str(path)}), name
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(path)
            return saved if isinstance(saved, dict) else {"train": saved}, name
        if not pictures or {".parquet"} & {file.suffix for file in files if file not in metadata}:
            return datasets.load_dataset(str(path) if path.exists() else name, config_name), name
        splits = datasets.load_dataset("imagefolder", data_dir=str(path))
    except Exception as error:  # from as many libraries as there are formats
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        if not path.exists():
            message = f"{name}: there is no such folder here, and the Hub gave no data set of that name ({reason})"
            raise FileNotFoundError(f"{message}; check the spelling") from error
        raise ValueError(
            f"{name}: no data set in there that could be read ({reason}); it should hold pictures or .npy files in "
            f"class folders or alone, pictures with a metadata.jsonl, or parquet files"
        ) from error

    # Folders and files that are called train, test, eval, ... are splits to datasets, and it ignores all others.
    used = {
        entry["path"]
        for rows in splits.values()
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.Image)
        for entry in _column(rows, column).to_pylist()
        if entry
    }
    ignored = sorted(pictures - used)
    if ignored and metadata:
        warnings.warn(f"{name}: {len(ignored)} pictures have no line in its metadata and are left out", stacklevel=3)
    elif ignored:
        example, other = (os.path.relpath(file, path) for file in (ignored[0], min(used)))
        raise ValueError(
            f"{name}: {len(ignored)} of its {len(pictures)} pictures ({example}, for one) would be ignored, because "
            f"the names of others ({other}) look like those of the splits {', '.join(splits)}; rename these"
        )
    # Of folders train/ and test/ that hold pictures without classes it makes the classes "train" and "test".
    labelled = not metadata and all("label" in rows.column_names for rows in splits.values())
    if labelled and len(splits) > 1 and all(len(rows.unique("label")) == 1 for rows in splits.values()):
        splits = {split: rows.remove_columns("label") for split, rows in splits.items()}
    return splits, name


def _array_folder(path: Path, files: list[Path]) -> dict[str, datasets.Dataset]:
    """Arrays in class folders or without classes, in folders "train", "validation" and "test" or without splits."""
    tops = {file.relative_to(path).parts[0] for file in files}
    roots = {split: path / split for split in tops} if tops <= {"train", "validation", "test"} else {"train": path}
    of_split = {split: sorted(file for file in files if root in file.parents) for split, root in roots.items()}
    classes = sorted({file.parent.name for file in files})
    labelled = len(classes) > 1 and all(
        file.parent.parent == roots[split] for split, files in of_split.items() for file in files
    )
    splits = {}
    for split, files in of_split.items():
        columns = {"image": [{"bytes": None, "path": str(file)} for file in files]}
        features = {"image": datasets.Image(decode=False)}
        if labelled:
            columns["label"] = [file.parent.name for file in files]
            features["label"] = datasets.ClassLabel(names=classes)
        splits[split] = datasets.Dataset.from_dict(columns, datasets.Features(features))
    return splits


def _is_hidden(path: Path) -> bool:
    """Whether datasets takes no notice of it."""
    return any(part.startswith((".", "__")) for part in path.parts)


def _column(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    return rows.select_columns(column).with_format("arrow")[:][column]


def _pictures(rows: datasets.Dataset, name: str, column: str | None) -> datasets.Dataset:
    """The pictures, not decoded, as the column "image"."""
    if column is None:
        images = [key for key, feature in rows.features.items() if isinstance(feature, (datasets.Image, *_ARRAYS))]
        if len(images) != 1:
            raise ValueError(
                f"{name}: {len(images)} of its columns ({', '.join(rows.column_names)}) are known to hold pictures; "
                f"name the one to use with --image_column"
            )
        column = images[0]
    pictures = rows.select_columns(column)
    try:
        if not isinstance(rows.features[column], _ARRAYS):
            pictures = pictures.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"image_column: {column!r} of {name} holds no pictures; name another column") from error
    return pictures if column == "image" else pictures.rename_column(column, "image")


def _labels(
    splits: dict, rows: datasets.Dataset, name: str, column: str | None, required: bool
) -> tuple[torch.Tensor | None, list[str] | None]:
    """The label of each picture and the names of the classes; both `None` where there are none and none required."""
    if column is None:
        classes = [key for key, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        usual = [key for key in ("label", "labels", "class") if key in rows.column_names]
        column = classes[0] if len(classes) == 1 else next(iter(usual), None)
    if column is None:
        if required:
            raise ValueError(
                f"{name}: none of its columns ({', '.join(rows.column_names)}) is known to hold class labels; name "
                f"one with --label_column, or sort the pictures into two or more class folders, all at one depth"
            )
        return None, None

    feature, values = rows.features[column], _column(rows, column).to_pylist()
    dtype = getattr(feature, "dtype", type(feature).__name__)
    if isinstance(feature, datasets.ClassLabel):
        classes, label_names = range(feature.num_classes), feature.names
    elif re.fullmatch(r"u?int\d+|bool|(large_)?string", dtype):
        # The values of all splits, so that a label means the same in each of them.
        known = {value for other in splits.values() if column in other.features for value in other.unique(column)}
        classes = sorted(value for value in known if value is not None and (isinstance(value, str) or value >= 0))
        label_names = [str(value) for value in classes]
    elif required:
        raise ValueError(f"label_column: {column!r} of {name} holds {dtype}, not classes; name another column")
    else:
        return None, None
    index = {value: i for i, value in enumerate(classes)}
    labels = torch.tensor([index.get(value, -1) for value in values])
    unlabelled = int((labels < 0).sum())
    if unlabelled and required:
        raise ValueError(
            f"label_column: {unlabelled} of the {len(labels)} pictures of {name} have no label in {column!r} (-1 or "
            f"none); use a split with labels or remove them"
        )
    return (None, None) if unlabelled else (labels, label_names)


def _captions(rows: datasets.Dataset, name: str, column: str | None, required: bool) -> list | None:
    column = column or next((key for key in ("text", "caption", "captions") if key in rows.column_names), None)
    feature = rows.features.get(column)
    if getattr(getattr(feature, "feature", feature), "dtype", None) not in ("string", "large_string"):
        if required:
            raise ValueError(
                f"{name}: no captions, which are strings or lists of strings, in {column or 'its columns'!r}; name "
                f"one of {', '.join(rows.column_names)} with --caption_column"
            )
        return None
    captions = _column(rows, column).to_pylist()
    missing = [i for i, caption in enumerate(captions) if caption is None or caption == []]
    if missing and required:
        raise ValueError(
            f"caption_column: {len(missing)} of the {len(captions)} pictures of {name} have no caption in {column!r}, "
            f"row {missing[0]} for one; caption or remove them"
        )
    return None if missing else captions
