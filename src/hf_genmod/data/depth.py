"""The values of images with more than 8 bits in a channel, as their files hold them.

Pillow reduces colours of more than 8 bits to 8, and scales, shifts or misreads the bytes of some grey values.
"""

import io
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, TiffTags

_HEAD = 4096  # bytes
_REMEDY = "save it with 8 bits, or its values as .npy"
_TAG = {tag.name: number for number, tag in TiffTags.TAGS_V2.items()}


def deep_values(image: Image.Image) -> np.ndarray | None:
    """
    The values of a grey image of more than 8 bits as its file holds them, upright, (H, W); `None` for other images.

    Raises:
        ValueError: If Pillow would lose a part of what the file holds.
    """
    # An image that the caller has decoded has no tiles left; the plugins of some formats have none at all.
    is_undecoded = image.format in _BY_FORMAT and (image.tile or image.format in ("HEIF", "ICNS", "ICO", "JXL"))
    restore = _BY_FORMAT[image.format](image) if is_undecoded else None
    if restore is None and image.mode[0] not in "IF":
        return None
    with image:
        values = np.asarray(ImageOps.exif_transpose(image))
    return values if restore is None else restore(values)


def _refuse_deep_color(image: Image.Image, bits: int) -> None:
    if bits > 8 and image.mode[0] not in "IF":
        raise ValueError(f"its channels have {bits} bits, of which Pillow reads 8; {_REMEDY}")


def _read(image: Image.Image, start: int, size: int) -> bytes:
    """A part of the file of an image that is not decoded yet."""
    position = image.fp.tell()
    image.fp.seek(start)
    part = image.fp.read(size)
    image.fp.seek(position)
    return part


def _png(image: Image.Image) -> None:
    _refuse_deep_color(image, 16 if ";16" in str(image.tile[0].args) else 8)
    if image.mode[0] == "I" and "transparency" in image.info:
        raise ValueError(f"one of its values of 16 bits stands for transparency; {_REMEDY}")


def _tiff(image: Image.Image) -> Callable | None:
    def tag(name, default):
        return image.tag_v2.get(_TAG[name], default)

    bits, kind = max(tag("BitsPerSample", (1,))), {2: "i", 3: "f"}.get(tag("SampleFormat", (1,))[0], "u")
    # DNGVersion, and the mark of CR2
    if tag("NewSubfileType", 0) & 1 or 50706 in image.tag_v2 or _read(image, 8, 2) == b"CR":
        raise ValueError("Pillow reads only the preview of this RAW file; develop it and save it as TIFF")
    if 0 in tag("ExtraSamples", ()):
        raise ValueError("it has channels that Pillow leaves out; save its values as .npy")
    if tag("PhotometricInterpretation", 1) == 6 and image.tile[0].codec_name == "raw":
        raise ValueError("its colours are YCbCr without compression, which Pillow may misread; save it as PNG")
    _refuse_deep_color(image, bits)
    if tag("PhotometricInterpretation", 1) == 0 and bits > 8:
        raise ValueError("its lowest value is white; save its values as .npy, or with black as the lowest")
    # libtiff returns values in the byte order of this machine, which Pillow takes for that of the file.
    raw_mode, *others = image.tile[0].args
    if image.tile[0].codec_name == "libtiff":
        native = re.sub(r"^([IF];\d+)B(S|F)$", r"\1N\2", raw_mode)
        image.tile = [image.tile[0]._replace(args=(native, *others))]
    # Pillow has no type for these.
    return {("i", 8): lambda values: values.view(np.int8), ("u", 32): lambda values: values.view(np.uint32)}.get(
        (kind, bits)
    )


def _ppm(image: Image.Image) -> Callable | None:
    """Pillow scales the values 0..maxval to 0..65535."""
    args = image.tile[0].args
    most = args[-1] if isinstance(args, tuple) and image.mode != "F" else 255
    _refuse_deep_color(image, 16 if most > 255 else 8)
    return (lambda values: np.rint(values * (most / 65535))) if image.mode == "I" and most > 255 else None


def _jpeg_2000(image: Image.Image) -> Callable | None:
    """Pillow shifts values up to 16 bits, and adds an offset to those with a sign."""
    head = _read(image, 0, _HEAD)
    start = head.find(b"ihdr")  # else it is a bare codestream
    depth = head[start + 14] if start >= 0 else head[42]
    bits, is_signed = (depth & 127) + 1, depth >> 7
    if depth == 255:
        raise ValueError(f"its channels have different numbers of bits; {_REMEDY}")
    if bits > 16:
        raise ValueError(f"its channels have {bits} bits, of which Pillow reads 16; {_REMEDY}")
    _refuse_deep_color(image, bits)
    if image.mode[0] != "I":
        return None
    return lambda values: values / 2.0 ** (16 - bits) - is_signed * 2 ** (bits - 1)


def _sgi(image: Image.Image) -> None:
    _refuse_deep_color(image, 8 * _read(image, 3, 1)[0])


def _dds(image: Image.Image) -> None:
    codec, args = image.tile[0].codec_name, image.tile[0].args
    masks = args[1] if codec == "dds_rgb" else ()
    _refuse_deep_color(image, 16 if "BC6H" in str(args) else max(map(int.bit_count, masks), default=8))


def _avif(image: Image.Image) -> None:
    """The bits of a channel are 8, 10 or 12, by two bits of the box av1C."""
    content = _read(image, 0, -1)
    flags = [content[match.end() + 2] for match in re.finditer(b"av1C", content[: content.find(b"mdat")])]
    _refuse_deep_color(image, max((8 + 2 * (byte >> 6 & 1) + 2 * (byte >> 5 & 1) for byte in flags), default=8))


def _heif(image: Image.Image) -> None:
    _refuse_deep_color(image, image.info.get("bit_depth", 8))


def _icon(image: Image.Image) -> None:
    """An icon may hold PNGs, one of macOS JPEG 2000 too. Pillow takes one of them, and has decoded it if it is of
    Windows."""
    if getattr(image.fp, "closed", True):
        return
    if image.format == "ICO":
        inner = [image.ico.getimage(image.size)]
    else:
        parts = [image.icns.dct[kind] for kind, _ in image.icns.SIZES[image.best_size] if kind in image.icns.dct]
        inner = [Image.open(io.BytesIO(part)) for part in (_read(image, *place) for place in parts) if _is_coded(part)]
    for one in inner:
        if one.format in ("PNG", "JPEG2000"):
            _BY_FORMAT[one.format](one)
            _refuse_deep_color(image, 16 if one.mode[0] == "I" else 8)


def _is_coded(content: bytes) -> bool:
    """Whether a part of an icon is a PNG or JPEG 2000, not pixels."""
    return content.startswith((b"\x89PNG", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"))


def _jpeg_xl(image: Image.Image) -> Callable | None:
    """Its plugin scales grey values to 16 bits, and reads the first frame alone."""
    bits, is_animated = jpeg_xl_header(image.fc)
    if is_animated:
        raise ValueError("it has several frames; save the one that you want as an image of its own")
    _refuse_deep_color(image, bits)
    return (lambda values: np.rint(values * ((2**bits - 1) / 65535))) if image.mode[0] == "I" else None


def jpeg_xl_header(content: bytes) -> tuple[int, bool]:
    """The bits of a channel of a JPEG XL image, and whether it is animated (ISO/IEC 18181-1, headers of the image)."""
    box = re.search(rb"jxlc|jxlp....", content, re.DOTALL)
    start = (box.end() if box else 0) + 2
    bits, lengths = int.from_bytes(content[start : start + 64], "little"), (9, 13, 18, 30)

    def read(count: int) -> int:
        nonlocal bits
        value, bits = bits & (2**count - 1), bits >> count
        return value

    def skip_size():
        is_small = read(1)
        read(5 if is_small else lengths[read(2)])
        if read(3) == 0:  # no known ratio of the sides
            read(5 if is_small else lengths[read(2)])

    skip_size()
    if read(1):  # all else is as usual
        return 8, False
    if read(1):
        read(3)  # orientation
        if read(1):
            skip_size()
        if read(1):
            raise ValueError("it has a preview; save it without")
        if read(1):
            return 8, True
    sizes = (32, 16, 24) if read(1) else (8, 10, 12)
    choice = read(2)
    return (1 + read(6) if choice == 3 else sizes[choice]), False


_BY_FORMAT = {
    "AVIF": _avif,
    "DDS": _dds,
    "HEIF": _heif,
    "ICNS": _icon,
    "ICO": _icon,
    "JPEG2000": _jpeg_2000,
    "JXL": _jpeg_xl,
    "PNG": _png,
    "PPM": _ppm,
    "SGI": _sgi,
    "TIFF": _tiff,
}
