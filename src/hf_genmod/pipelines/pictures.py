"""Conversion of latents, and of tensors in [-1, 1], to images."""

import threading
from collections.abc import Callable

import torch
from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor

from ..data.value_range import from_model_range, to_model_range

REMEDY = "compute in float32, or look for weights that are not finite by `hf_genmod doctor`"
_UPCASTING = threading.Lock()  # an autoencoder has one dtype at a time, whichever threads use it


def in_enough_precision(vae: ModelMixin, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor):
    """`compute(x)` of an autoencoder, in fp32. An autoencoder in half precision computes in fp32, too, if its config
    has `force_upcast` or the result is not finite."""
    with _UPCASTING:
        dtype = vae.dtype
        if dtype.itemsize > 2 or not vae.config.get("force_upcast"):
            result = compute(x.to(dtype)).float()
            if dtype.itemsize > 2 or result.isfinite().all():
                return result
        try:
            torch.nn.Module.to(vae, torch.float32)  # that of diffusers would warn
            return compute(x.float())
        finally:
            torch.nn.Module.to(vae, dtype)


class PictureProcessor(VaeImageProcessor):
    """
    The `image_processor` of diffusers for images of any number of channels and, with a `value_range`, of measured
    values: converts images in [0, 1], or in the units of the data, to tensors in [-1, 1] and back.

    Args:
        channels (`int`): The number of channels of the images.
        value_range (`dict`, *optional*): The values that -1 and 1 stand for in each channel.
    """

    def __init__(self, channels: int, value_range: dict | None = None):
        convert = {"do_convert_rgb": channels == 3, "do_convert_grayscale": channels == 1}
        super().__init__(do_resize=False, vae_latent_channels=0, **convert)
        self.channels, self.value_range = channels, value_range

    def preprocess(self, image, *args, **kwargs) -> torch.Tensor:
        """Images as diffusers takes them, or an array or a tensor of measured values, in [-1, 1]."""
        if self.value_range is None:
            return super().preprocess(image, *args, **kwargs)
        images = image if isinstance(image, torch.Tensor) else self.numpy_to_pt(image)
        return to_model_range(images.float(), self.value_range)

    def postprocess(self, image: torch.Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None):
        """Images (n, channels, height, width) in [-1, 1] as `"pil"`, the first three of more than four channels, as
        `"np"`, (n, height, width, channels), or as `"pt"`. Values that are not finite are a `ValueError`."""
        is_measured = self.value_range is not None and output_type in ("np", "pt")
        values = from_model_range(image, self.value_range) if is_measured else image
        if not values.isfinite().all():
            raise ValueError(f"images: some of their values are not finite; {REMEDY}")
        if is_measured:
            return self.pt_to_numpy(values) if output_type == "np" else values
        values = values[:, :3] if output_type == "pil" and values.shape[1] > 4 else values
        return super().postprocess(values, output_type, do_denormalize)
