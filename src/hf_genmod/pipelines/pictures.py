"""Conversion between images of PIL, arrays and tensors in [-1, 1]."""

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..data.value_range import MODES, from_model_range, to_mode, to_model_range


def from_tensor(images: torch.Tensor, output_type: str, value_range: dict | None):
    """Images in [-1, 1], (n, channels, height, width), as `"pil"`, `"np"` or `"pt"`; the latter two in [0, 1] or, with
    a `value_range`, in the units of the data."""
    if value_range is not None and output_type != "pil":
        values = from_model_range(images, value_range)
        return values.permute(0, 2, 3, 1).cpu().numpy() if output_type == "np" else values
    if output_type == "pil" and images.shape[1] > 4:
        images = images[:, :3]
    return VaeImageProcessor().postprocess(images, output_type=output_type)


def to_tensor(images, channels: int, value_range: dict | None) -> torch.Tensor:
    """
    Images as a tensor in [-1, 1], (n, channels, height, width).

    Args:
        images (`PIL.Image.Image`, a list of them, `np.ndarray` or `torch.Tensor`): Arrays are (n, height, width,
            channels) and tensors (n, channels, height, width), in [0, 1] or, with a `value_range`, in the units of the
            data.
        channels (`int`): The number of channels of the result.
        value_range (`dict`, *optional*): The values that -1 and 1 stand for in each channel.

    Raises:
        ValueError: If the images cannot be converted, differ in size, or have other channels or values.
    """
    if isinstance(images, (list, tuple)) and images and all(isinstance(image, torch.Tensor) for image in images):
        images = torch.stack(images)
    if not isinstance(images, (np.ndarray, torch.Tensor)):
        images = _stacked(images if isinstance(images, (list, tuple)) else [images], channels, value_range)
    values = torch.as_tensor(images).float().cpu()
    if values.ndim != 4:
        raise ValueError(f"images: shape {tuple(values.shape)} does not have four axes, the first for the images")
    values = values.permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else values
    if values.shape[1] != channels or not len(values):
        raise ValueError(
            f"images: {len(values)} of {values.shape[1]} channels; this model takes one or more of {channels}"
        )
    if value_range is None and not (0 <= values.min() and values.max() <= 1):
        raise ValueError(f"images: values from {values.min():.3g} to {values.max():.3g} are not in [0, 1]")
    return to_model_range(values, value_range or {"low": [0.0], "high": [1.0]})


def _stacked(images: list, channels: int, value_range: dict | None) -> np.ndarray:
    """Images of PIL as one array, (n, height, width, channels), in [0, 1]."""
    mode = MODES.get(channels)
    if value_range is not None or mode is None:
        raise ValueError("images: this model was trained on measured values; give an array or a tensor of them")
    if not all(isinstance(image, Image.Image) for image in images):
        raise ValueError("images: give images of PIL (Image.open(file)), one array or one tensor")
    if any(image.mode[0] in "IF" for image in images):
        raise ValueError("images: some have more than 8 bits, and this model was trained on 8 bits; convert them")
    images = [to_mode(image, mode) for image in images]
    if len({image.size for image in images}) != 1:
        raise ValueError("images: there are none, or they differ in size; give one or more of one size")
    pixels = [np.asarray(image, np.float32).reshape(image.height, image.width, -1) for image in images]
    return np.stack(pixels) / 255
