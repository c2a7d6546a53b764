"""Images made for the tests of this folder."""

import io

import datasets
import numpy as np
import torch
from PIL import Image

from hf_genmod.data.loading import load_pictures


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
