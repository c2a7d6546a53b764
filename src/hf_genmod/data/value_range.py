"""What the channels of an image mean, and what their values are in the range [-1, 1] of the models.

A value range is a dict of two lists, `{"low": [...], "high": [...]}`: for each channel, the measured values that -1
and 1 stand for. It is `None` for images of 8 bits.
"""

import torch
from PIL import Image, ImageOps

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # number of channels -> mode of Pillow


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image upright and in a mode of Pillow; a transparent one is laid on white where the mode has no alpha."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")  # applies a transparent color and the transparency of a palette
        if not mode.endswith("A"):
            # The color of a transparent pixel has never been visible.
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def to_model_range(values: torch.Tensor, value_range: dict[str, list[float]] | None = None) -> torch.Tensor:
    """Values (n, C, H, W) mapped to [-1, 1]: 0..255 of `uint8` without a range, else low..high of each channel."""
    if value_range is None:
        return values.float() / 127.5 - 1 if values.dtype == torch.uint8 else values
    low, high = _ends(value_range, values)
    return 2 * (values - low) / (high - low).clamp(min=1e-30) - 1


def from_model_range(x: torch.Tensor, value_range: dict[str, list[float]]) -> torch.Tensor:
    """Images x (n, C, H, W) in [-1, 1] in the units of the data."""
    low, high = _ends(value_range, x)
    return low + (high - low) * (x + 1) / 2


def _ends(value_range, like) -> list[torch.Tensor]:
    """Low and high, (C, 1, 1)."""
    return [torch.tensor(value_range[end], device=like.device)[:, None, None] for end in ("low", "high")]
