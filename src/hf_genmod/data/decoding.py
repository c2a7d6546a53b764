"""Decodes one image from a file or a row."""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import fsspec
import numpy as np
from PIL import ExifTags, Image, ImageOps

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # channels -> mode of Pillow


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
