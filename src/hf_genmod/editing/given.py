"""Images and masks that a pipeline is given to edit."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_genmod.data.latents import moments
from hf_genmod.data.value_range import to_mode
from hf_genmod.errors import counted
from hf_genmod.pipelines.base import GenerationPipeline
from hf_genmod.pipelines.given_pictures import PictureReader
from hf_genmod.pipelines.pictures import in_enough_precision
from hf_genmod.pipelines.requests import plain

UNIT = {"low": [0.0], "high": [1.0]}  # what -1 and 1 stand for in images without a value range
WHERE = "white is drawn anew, black is kept"


def check_draws(pipeline: GenerationPipeline) -> None:
    """Raises `ValueError` for an upsampler, whose images are all made of others."""
    if "image" in pipeline.example_request():
        name = type(pipeline).__name__
        raise ValueError(f"{name} only enlarges images, and neither inverts nor varies them; use a model that draws")


def read_images(pipeline: GenerationPipeline, image, n: int | None = None) -> Tensor:
    """
    Images of the size of a pipeline as [`PictureReader.read`] reads them, (n, C, H, W) on the CPU, in [0, 1] or the
    units of the data.

    Args:
        image: m images, of which m divides n: each is repeated n/m times, one after another.
        n (`int`, *optional*): By default m.

    Raises:
        ValueError: If the images are of another size, number or kind.
    """
    check_draws(pipeline)
    channels, *size = pipeline.picture_shape
    values = PictureReader(channels, pipeline.config.value_range).read(image)
    if list(values.shape[2:]) != size:
        given, own = ("x".join(map(str, lengths)) for lengths in (values.shape[2:], size))
        raise ValueError(
            f"image: {given} pixels (height, width), and this model draws {own}; resize it, or use `hf_genmod edit`, "
            "which crops and scales it as the training did, unless --fit is false"
        )
    if not values.isfinite().all():
        raise ValueError("image: some of its values are not finite; give numbers, even where the mask is white")
    n = len(values) if n is None else n
    if n % len(values):
        raise ValueError(f"image: {len(values)} for {counted(n, 'result')}; give one, or one for each")
    return values.repeat_interleave(n // len(values), dim=0)


def read_mask(mask_image, shape: tuple[int, ...]) -> Tensor:
    """
    Where images of `shape` (n, C, H, W) are drawn anew, as a bool tensor (n, 1, H, W).

    Args:
        mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of them): One, or m as of `read_images`:
            arrays (m, H, W) or (m, H, W, 1), tensors (m, H, W) or (m, 1, H, W), of bools, of 0 and 1 or of
            0 and 255; those of one mask may lack the first axis.

    Raises:
        ValueError: If a mask is of another size, has grey levels, or is black or white all over.
    """
    masks = list(mask_image) if isinstance(mask_image, (list, tuple)) else [mask_image]
    levels = torch.cat([torch.zeros(0, *shape[2:]), *(_levels(mask, shape[2:]) for mask in masks)])  # (m, H, W)
    if len(levels) == 0 or shape[0] % len(levels):
        raise ValueError(f"mask_image: {len(levels)} for {counted(shape[0], 'result')}; give one, or one for each")
    redrawn = levels > 0.5
    if not ((levels - redrawn.float()).abs() <= 0.1).all():  # NaN, too
        raise ValueError(
            f"mask_image: it has grey levels, and {WHERE}; make it black and white, for example by "
            "mask.point(lambda level: 255 * (level > 127))"
        )
    share = redrawn.float().mean(dim=(1, 2))
    if share.max() == 1:
        raise ValueError(f"mask_image: it is white all over, and {WHERE}; leave it out, and give strength")
    if share.min() == 0:
        raise ValueError(f"mask_image: it is black all over, and {WHERE}; give one with some white")
    return redrawn.repeat_interleave(shape[0] // len(levels), dim=0)[:, None]


def latents_of(pipeline: GenerationPipeline, x: Tensor) -> Tensor:
    """x_0 of images in [-1, 1], (n, C, H, W): the images, or the means of their standardised latents, (n, c, h, w)."""
    vae = pipeline.vae
    if vae is None:
        return x
    mean = in_enough_precision(vae, lambda x: moments(vae, x)[:, 0], x)
    return (mean - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def repeated(pipeline: GenerationPipeline, request: dict, n: int) -> dict:
    """The arguments of a call for n images, by those for one or for each."""
    if not pipeline.example_request():
        return {"batch_size": n} | request
    names = [name for name in ("class_labels", "prompt", "negative_prompt") if name in request]
    return request | {name: [x] * n for name in names if isinstance(x := plain(request[name]), str | int | dict)}


def _levels(mask, size: tuple[int, int]) -> Tensor:
    """The levels of one or more masks in [0, 1], (m, H, W)."""
    if isinstance(mask, Image.Image):
        mask = np.asarray(to_mode(mask, "L"), np.float32) / 255
    if not isinstance(mask, (np.ndarray, Tensor)):
        raise ValueError(f"mask_image: {type(mask).__name__} is no image of PIL (Image.open(file)), array or tensor")
    levels = torch.as_tensor(mask).cpu().float()
    levels = levels / (255 if (levels > 1.1).any() else 1)
    channel = 3 if isinstance(mask, np.ndarray) else 1
    if levels.ndim == 4 and levels.shape[channel] == 1:
        levels = levels.squeeze(channel)
    elif levels.ndim == 3 and levels.shape[channel - 1] == 1 and levels.shape[1:] != size:
        levels = levels.squeeze(channel - 1)[None]
    elif levels.ndim == 2:
        levels = levels[None]
    if levels.ndim != 3:
        raise ValueError(f"mask_image: shape {tuple(mask.shape)} is not (m, height, width), with one channel")
    if levels.shape[1:] != size:
        given, own = ("x".join(map(str, lengths)) for lengths in (levels.shape[1:], size))
        raise ValueError(f"mask_image: {given} pixels (height, width), and the image has {own}; resize it")
    return levels
