"""Images made for the tests of this folder."""

import io
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, features

from hf_genmod.data.loading import load_pictures

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this version of Pillow has no AVIF")


def pixels(n, height=8, width=8, channels=3, seed=0):
    """Random pictures, `uint8` (n, height, width, channels)."""
    return np.random.RandomState(seed).randint(256, size=(n, height, width, channels), dtype=np.uint8)


def picture(array):
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def chw(arrays):
    return torch.from_numpy(np.array(arrays)).movedim(-1, -3)


def coded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def rows(images, **columns):
    """A data set of encoded pictures and further columns."""
    features = datasets.Features({"image": datasets.Image()} | {key: feature for key, (feature, _) in columns.items()})
    return datasets.Dataset.from_dict(
        {"image": images} | {key: values for key, (_, values) in columns.items()}, features=features
    )


def load(images, **kwargs):
    return load_pictures(rows(images), **kwargs)


def values(n, channels=3, height=8, width=6):
    """Measurements, `float32` (n, channels, height, width), each channel in units of its own."""
    units = 10.0 ** np.arange(-2, channels - 2)[:, None, None]
    return (np.random.RandomState(0).randn(n, channels, height, width) * units).astype(np.float32)


def in_own_units(dataset, images):
    low, high = (torch.tensor(dataset.value_range[end]).double()[:, None, None] for end in ("low", "high"))
    return low + (high - low) * (images.double() + 1) / 2


def tiff(
    samples,
    kind=1,
    order="<",
    compressed=False,
    photometric=1,
    extra=(),
    orientation=1,
    planar=False,
    more=(),
):
    """A TIFF of one strip: `samples` (H, W) or (H, W, C), `kind` 1 unsigned, 2 signed, 3 real."""
    height, width, count = (*samples.shape, 1)[:3]
    arranged = samples.transpose(2, 0, 1) if planar else samples
    planes = [
        plane.astype(plane.dtype.newbyteorder(order)).tobytes() for plane in (arranged if planar else [arranged])
    ]
    planes = [zlib.compress(plane) if compressed else plane for plane in planes]
    tags = {
        256: [width], 257: [height], 258: [8 * samples.itemsize] * count, 259: [8 if compressed else 1],
        262: [photometric], 274: [orientation], 277: [count], 278: [height], 284: [1 + planar],
        339: [kind] * count, **({338: list(extra)} if extra else {}), **dict(more),
    }  # fmt: skip
    end = 8 + sum(map(len, planes))
    starts = np.cumsum([8, *map(len, planes)])[:-1].tolist()
    tags |= {273: starts, 279: list(map(len, planes))}
    directory, beyond = b"", b""
    free = end + 2 + 12 * len(tags) + 4
    for tag, numbers in sorted(tags.items()):
        content = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(content) > 4:
            beyond, content = beyond + content, struct.pack(order + "I", free + len(beyond))
        directory += struct.pack(order + "HHI", tag, 4, len(numbers)) + content
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", end)
    return head + b"".join(planes) + struct.pack(order + "H", len(tags)) + directory + bytes(4) + beyond
