"""Conversion of images that a pipeline is given to tensors in [-1, 1]."""

import numpy as np
import torch
from PIL import Image

from ..data.value_range import MODES, to_mode, to_model_range
from .pictures import PictureProcessor


class PictureReader(PictureProcessor):
    """A [`PictureProcessor`] that reads images as the training does, and refuses those that do not fit the model."""

    def preprocess(self, image) -> torch.Tensor:
        """Images as `read` takes them, as a tensor in [-1, 1], (n, channels, height, width)."""
        return to_model_range(self.read(image), self.value_range or {"low": [0.0], "high": [1.0]})

    def read(self, image) -> torch.Tensor:
        """
        Images as a tensor, (n, channels, height, width), in [0, 1] or, with a `value_range`, in the units of the data.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of them): Arrays are (n, height, width,
                channels) and tensors (n, channels, height, width), in [0, 1] or the units of the data; those of one
                image, and of a list, lack the first axis.

        Raises:
            ValueError: If the images cannot be converted, differ in size, or have other channels or values.
        """
        images = list(image) if isinstance(image, (list, tuple)) else image
        for kind, stack in ((torch.Tensor, torch.stack), (np.ndarray, np.stack)):
            if isinstance(images, list) and images and all(isinstance(one, kind) for one in images):
                if len({tuple(one.shape) for one in images}) != 1:
                    raise ValueError("images: they differ in size; give one or more of one size")
                images = stack(images)
        if not isinstance(images, (np.ndarray, torch.Tensor)):
            images = self._stacked(images if isinstance(images, list) else [images])
        values = torch.as_tensor(images).float().cpu()
        values = values[None] if values.ndim == 3 else values
        if values.ndim != 4:
            raise ValueError(f"images: shape {tuple(values.shape)} does not have four axes, the first for the images")
        values = values.permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else values
        n, channels = values.shape[:2]
        if channels != self.channels or n == 0:
            axes = "(n, height, width, channels)" if isinstance(images, np.ndarray) else "(n, channels, height, width)"
            takes = f"this model takes one or more of {self.channels}, as {axes}"
            raise ValueError(f"images: {n} of {channels} channels; {takes}")
        if self.value_range is None and not (0 <= values.min() and values.max() <= 1):
            low, high = (x.item() for x in values.aminmax())
            remedy = "; divide them by 255" if low >= 0 and 2 <= high <= 255 else ""
            remedy = "; (x + 1) / 2 are, of x in [-1, 1]" if -1 <= low < 0 and high <= 1 else remedy
            raise ValueError(f"images: values from {low:.3g} to {high:.3g} are not in [0, 1]{remedy}")
        return values

    def _stacked(self, images: list) -> np.ndarray:
        """Images of PIL as one array, (n, height, width, channels), in [0, 1]."""
        mode = MODES.get(self.channels)
        if self.value_range is not None or mode is None:
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
