"""Modes of Pillow: what the channels of an image of 8 bits mean."""

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
