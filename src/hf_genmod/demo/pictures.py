"""Pictures that a visitor sends, and pictures as HTML."""

import base64
import binascii
import html
import io
from collections.abc import Sequence

from PIL import Image, ImageOps

from hf_genmod.data.formats import CLOSED
from hf_genmod.data.value_range import MODES, to_mode

MOST_BYTES = 12 * 2**20  # of a picture that somebody sends
MOST_PIXELS = 2**25
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
assert not CLOSED.intersection(FORMATS)


def read_picture(sent, what: str = "picture") -> Image.Image:
    """
    The picture that a page has sent.

    Args:
        sent (`str`): The file as a data URL, `"data:...;base64,..."`.
        what (`str`): What a message calls it.

    Raises:
        ValueError: If it is missing, no picture, too large, or has several frames or more than 8 bits.
    """
    if sent in (None, ""):
        raise ValueError(f"{what}: there is none; choose a file, or drop one")
    head, comma, body = sent.partition(",") if isinstance(sent, str) else ("", "", "")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise ValueError(f"{what}: what was sent is no picture; send the file as a data URL in base64")
    if len(body) > MOST_BYTES * 4 / 3:
        raise ValueError(f"{what}: more than {MOST_BYTES >> 20} MB; save it smaller, for example as JPEG")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(body, validate=True)), formats=FORMATS)
    except (OSError, ValueError, binascii.Error, Image.DecompressionBombError, SyntaxError) as error:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"{what}: the file is no picture that can be read; it is one of {kinds}") from error
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{what}: {image.width}x{image.height} pixels are too many; make it smaller")
    if getattr(image, "is_animated", False):
        raise ValueError(f"{what}: it has {image.n_frames} frames; save the one that you want")
    if image.mode[0] in "IF":
        raise ValueError(f"{what}: it has more than 8 bits; convert it, or edit it in Python")
    try:
        image.load()
    except Exception as error:  # decoders raise anything
        raise ValueError(f"{what}: the file is damaged; save it again") from error
    return image


def fitted(image: Image.Image, channels: int, size: tuple[int, int]) -> Image.Image:
    """A picture as the training of a model reads it: upright, in its channels, scaled until it covers `size`, (height,
    width), and cropped to its middle."""
    image = to_mode(image, MODES[channels])
    height, width = size
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def made_smaller(image: Image.Image, channels: int, longest: int, multiple: int = 1) -> Image.Image:
    """A picture upright, in the channels of a model, with a longer side of up to `longest` pixels, and cropped to
    sides that are multiples of `multiple`. Raises `ValueError` if nothing is left."""
    image = to_mode(image, MODES[channels])
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    width, height = (length - length % multiple for length in image.size)
    if not (width and height):
        raise ValueError(f"picture: {image.width}x{image.height} pixels; both sides need {multiple} or more")
    return image.crop((0, 0, width, height))


def read_mask(sent, size: tuple[int, int]) -> Image.Image | None:
    """The mask that was painted, white where something was, or `None` if nothing was; `size` is (height, width)."""
    if sent in (None, ""):
        return None
    painted = read_picture(sent, "mask").convert("RGBA").getchannel("A")
    if painted.size != size[::-1]:
        given, own = (f"{width}x{height}" for width, height in (painted.size, size[::-1]))
        raise ValueError(f"mask: {given} pixels, and the picture has {own}; paint it on the page")
    mask = painted.point(lambda level: 255 * (level > 127))
    low, high = mask.getextrema()
    if high == 0:
        return None
    if low == 255:
        raise ValueError("mask: everything is painted over; leave something, or clear the paint and use the strength")
    return mask


def data_url(image: Image.Image) -> str:
    """A picture as a PNG in a URL, without loss."""
    file = io.BytesIO()
    image = image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def zoom_of(image: Image.Image, least: int = 128) -> int:
    """The whole factor that shows a picture with shorter sides of `least` pixels or more."""
    return -(-least // min(image.size))


def figures(
    images: Sequence[Image.Image], names: Sequence[str], files: Sequence[str] | None = None, zoom: int | None = None
) -> str:
    """Pictures with their names below, as HTML, each shown `zoom` times as large, by default as `zoom_of` says; a
    click saves one under its name in `files`, in its own size."""
    parts = []
    for image, name, file in zip(images, names, files or [f"{name}.png" for name in names], strict=True):
        url, name, file = data_url(image), html.escape(name), html.escape(file)
        width = (zoom or zoom_of(image)) * image.width
        parts.append(
            f'<figure><a href="{url}" download="{file}" title="save {file}"><img src="{url}" alt="{name}" '
            f'style="width:{width}px"></a><figcaption>{name}</figcaption></figure>'
        )
    return f'<div class="genmod-pictures">{"".join(parts)}</div>'


def said(text: str, kind: str = "note") -> str:
    """A sentence as HTML: a "note", or a "problem"."""
    role = "alert" if kind == "problem" else "status"
    return f'<p class="genmod-{kind}" role="{role}">{html.escape(text)}</p>'
