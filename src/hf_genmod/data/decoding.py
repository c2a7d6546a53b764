"""Decodes one image from a file or a row."""

import contextlib
import hashlib
import io
import json
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import fsspec
import numpy as np
from PIL import ExifTags, Image

from hf_genmod.data.arrays import is_array, measured_values, open_array
from hf_genmod.data.depth import deep_values
from hf_genmod.data.formats import open_by_pillow
from hf_genmod.data.value_range import to_mode

LINK = re.compile(r"(https?|ftp|s3|gs|hf)://")


def open_image(entry) -> Image.Image | np.ndarray:
    """The image of an entry, its pixels not decoded yet. Arrays and images of more than 8 bits are measured values,
    `float32` (C, H, W). An error in place of an entry is raised."""
    if isinstance(entry, Exception):
        raise entry
    if isinstance(entry, np.ndarray):
        return measured_values(entry)
    if isinstance(entry, Image.Image):
        image = entry
    elif entry is None or entry["bytes"] is entry["path"] is None:
        raise ValueError("the row holds no image")
    else:
        path, content = entry["path"] or "", entry["bytes"]
        if is_array(path):
            return open_array(path, content)
        if content is None and LINK.match(path):
            raise ValueError("a link, which is not downloaded; download the images, and give their bytes or paths")
        if content is None and "://" in path:  # in an archive
            with fsspec.open(path) as archived:
                content = archived.read()
        image = open_by_pillow(path if content is None else io.BytesIO(content), path)
    # The first image of a MPO is a photo, and that of a Photoshop file is all layers together.
    if getattr(image, "is_animated", False) and image.format not in ("MPO", "PSD"):
        frames = image.n_frames
        image.close()
        raise ValueError(f"it has {frames} frames; save the one that you want as an image of its own")
    try:
        values = deep_values(image)
    except Exception:  # of a broken header, too
        image.close()
        raise
    if values is not None:
        return measured_values(values)
    return image.convert("LA") if image.mode == "La" else image  # of which Pillow makes only LA


class Properties(NamedTuple):
    """What an image is before it is decoded."""

    height: int
    width: int
    has_color: bool = False
    has_alpha: bool = False
    measured_channels: int = 0  # 0 for an image of 8 bits

    @classmethod
    def table(cls, rows: Sequence[Sequence]) -> np.recarray:
        """Those of many images as columns, which take 14 bytes an image."""
        types = [(name, bool if kind is bool else np.int32) for name, kind in cls.__annotations__.items()]
        return np.array([tuple(row) for row in rows], dtype=types).view(np.recarray)


def inspect(entry, decode: bool = False) -> Properties:
    """The properties of an image, from its header alone unless `decode`; measured values and images with an alpha
    channel are always decoded."""
    image = open_image(entry)
    if isinstance(image, np.ndarray):
        return Properties(*image.shape[1:], measured_channels=len(image))
    with image:
        # The method of PngImageFile would decode the image to look for a tag behind the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        if decode:
            image.load()
        is_turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # of a TIFF, Pillow gives the size upright
        width, height = image.size[::-1] if is_turned else image.size
        color = image.mode not in ("1", "L", "LA", "La")
        if image.mode in ("P", "PA"):
            red, green, blue = (image.getpalette("RGB")[i::3] for i in range(3))
            color = not red == green == blue
        # An alpha channel that is opaque everywhere is none.
        has_alpha = image.has_transparency_data and to_mode(image, "RGBA").getextrema()[3][0] < 255
        return Properties(height, width, color, has_alpha)


def summary(pixels: np.ndarray) -> tuple[str, list | None]:
    """The hash of the pixels, and the lowest and highest value of each channel of measured values."""
    is_measured = pixels.dtype != np.uint8
    ranges = np.stack([pixels.min(axis=(1, 2)), pixels.max(axis=(1, 2))], axis=1).tolist() if is_measured else None
    return hashlib.blake2b(pixels, digest_size=16).hexdigest(), ranges


class InspectionCache:
    """Results of functions of the images of a data set, kept from run to run in the cache folder of `datasets`. An
    image is recognised by its file, time and size, or by its content."""

    def __init__(self, name: str):
        place = hashlib.blake2b(os.path.abspath(name).encode(), digest_size=8).hexdigest()
        self._file = Path(datasets.config.HF_DATASETS_CACHE, "hf_genmod", f"{place}.sqlite")
        self._new, self._lock = [], threading.Lock()
        self._kept = self._open() if self._file.is_file() else None

    def _open(self) -> sqlite3.Connection | None:
        with contextlib.suppress(OSError, sqlite3.OperationalError):  # then the next run decodes again
            self._file.parent.mkdir(parents=True, exist_ok=True)
            kept = sqlite3.connect(self._file, timeout=60, check_same_thread=False)
            try:
                kept.execute("CREATE TABLE IF NOT EXISTS results (image PRIMARY KEY, version, result) WITHOUT ROWID")
                return kept
            except sqlite3.DatabaseError as error:
                kept.close()
                if type(error) is sqlite3.DatabaseError:  # damaged
                    self._file.unlink()
        return None

    def __call__(self, what: str, function: Callable, entry):
        """`function(entry)`, or its result for the same image in an earlier run."""
        if not isinstance(entry, dict) or (entry["bytes"] is None and not os.path.isfile(entry["path"] or "")):
            return function(entry)
        if entry["bytes"] is not None:
            image, version = hashlib.blake2b(entry["bytes"], digest_size=16).hexdigest(), ""
        else:
            stat = os.stat(entry["path"])
            image, version = entry["path"], f"{stat.st_mtime_ns} {stat.st_size}"
        image = f"{what} {image}"
        if known := self._find(image, version):
            return json.loads(known)
        result = function(entry)
        with self._lock:
            self._new.append((image, version, json.dumps(result)))
        if len(self._new) >= 10_000:
            self._write()
        return result

    def _find(self, image: str, version: str) -> str | None:
        query = "SELECT result FROM results WHERE image = ? AND version = ?"
        with self._lock, contextlib.suppress(sqlite3.Error):
            found = self._kept and self._kept.execute(query, (image, version)).fetchone()
            return found and found[0]
        return None

    def _write(self) -> None:
        # In one short transaction, as other processes may write, too. A full disk is no error.
        with self._lock, contextlib.suppress(sqlite3.Error):
            new, self._new = self._new, []
            if new and self._kept is None:
                self._kept = self._open()
            if new and self._kept is not None:
                with self._kept:
                    self._kept.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", new)

    def close(self) -> None:
        """Keeps the results for later runs."""
        self._write()
        if self._kept is not None:
            self._kept.close()
