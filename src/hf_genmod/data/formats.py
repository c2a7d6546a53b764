"""What a file is by its first bytes or its ending, where Pillow does not open it, and what opens it."""

import contextlib
import importlib
import io
import os
import re
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from hf_genmod.errors import LFS_POINTER, LFS_REMEDY

# For these, Pillow runs Ghostscript, changes the values, or reads only the size.
CLOSED = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}


class _Kind(NamedTuple):
    name: str
    start: bytes  # pattern of the first bytes
    endings: str  # of the names of files that are of this kind if their content is not known
    remedy: str


_PNG, _NPY, _DAMAGED = "save it as PNG", "save its values as .npy", "it is damaged or of a rare kind; save it again"
_RAW = _Kind(
    "a RAW file of a camera",
    rb"II\*\0.{4}CR|II(RO|RS|U\0)|FUJIFILMCCD-RAW|.{4}ftypcrx|\0MRM|FOVb",
    "3fr arw cr2 cr3 crw dng erf kdc mef mos mrw nef nrw orf pef raf raw rw2 sr2 srf srw x3f",
    "develop it and save it as TIFF, for example by rawpy",
)
_KINDS = [
    _Kind("a pointer of Git LFS", re.escape(LFS_POINTER), "", LFS_REMEDY),
    _Kind(
        "a HEIC image", rb".{4}ftyp(hei|hev|mif1|msf1)", "heic heics heif heifs hif", f"install pillow-heif, or {_PNG}"
    ),
    _Kind("an AVIF image", rb".{4}ftypavi", "avif avifs", f"install a Pillow with AVIF, or {_PNG}"),
    _Kind("a JPEG XL image", rb"\xff\x0a|\0{3}\x0cJXL ", "jxl", f"install pillow-jxl-plugin, or {_PNG}"),
    _RAW,
    _Kind("a DICOM image", rb".{128}DICM", "dcm dicom", f"{_NPY}, by pydicom"),
    _Kind("a FITS image", rb"SIMPLE  =", "fit fits fts", f"{_NPY}, by astropy"),
    _Kind("an OpenEXR image", rb"v/1\x01", "exr", f"{_NPY}, by OpenEXR"),
    _Kind("a Radiance HDR image", rb"#\?R(ADIANC|GB)E", "hdr", f"{_NPY}, for example by imageio"),
    _Kind("a NIfTI volume", rb".{344}(n\+1|ni1)\0", "nii nii.gz", f"{_NPY}, by nibabel"),
    _Kind("an NRRD volume", rb"NRRD0", "nrrd", f"{_NPY}, by pynrrd"),
    _Kind("an HDF5 file", rb"\x89HDF", "", f"{_NPY}, by h5py"),
    _Kind("a PAM image, or a PFM image in colour", rb"P[7F]\s", "pam", f"{_PNG}, or {_NPY[5:]}"),
    _Kind("an SVG drawing", rb"\s*(<\?xml.{,400}?)?(<!.{,400}?)?<svg", "svg svgz", f"{_PNG}, for example by cairosvg"),
    _Kind("a PostScript drawing", rb"%!PS|\xc5\xd0\xd3\xc6", "ai eps ps", _PNG),
    _Kind("a Windows metafile", rb"\xd7\xcd\xc6\x9a|\x01\0{3}.{36} EMF", "emf wmf", _PNG),
    _Kind("a Photoshop file that is not of 8 bits", rb"8BPS", "psb psd", f"{_PNG}, or {_NPY[5:]} by psd-tools"),
    _Kind("a GIMP file", rb"gimp xcf", "xcf", _PNG),
    _Kind("a JPEG XR image", rb"II\xbc\x01", "jxr wdp", f"{_PNG}, for example by imagecodecs"),
    _Kind("a TIFF that Pillow cannot read", rb"II[*+]\0|MM\0[*+]", "", f"{_NPY}, for example by tifffile"),
    _Kind("a PNG that Pillow cannot read", rb"\x89PNG", "", _DAMAGED),
    _Kind("a JPEG that Pillow cannot read", rb"\xff\xd8\xff", "", _DAMAGED),
    _Kind("a zip archive, as .npz is one", rb"PK\x03\x04", "npz", "save the array of the images as .npy by np.save"),
    _Kind("a web page", rb"(?i)\s*(<!doctype html|<html)", "", "download the image again"),
]
_WRITE = "write its images into class folders, or as .npy"
# Files that may hold many images, which are not read.
_CONTAINERS = [
    _Kind("packed", rb"7z\xbc\xaf|Rar!|\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "7z bz2 gz rar xz zst", "unpack it"),
    _Kind("an HDF5 file", rb"\x89HDF", "h5 hdf hdf5", f"install h5py and give the folder that it is in, or {_WRITE}"),
    _Kind("a file of MATLAB", rb"MATLAB [57]", "mat", f"{_WRITE}, by scipy.io or h5py"),
    _Kind("a TFRecord file", rb"(?!)", "tfrec tfrecord tfrecords", f"{_WRITE}, by tensorflow"),
    _Kind("an LMDB database", rb".{16}\xde\xc0\xef\xbe", "lmdb mdb", f"{_WRITE}, by lmdb"),
    _Kind("a RecordIO file", rb"\x0a\x23\xd7\xce", "rec", f"{_WRITE}, by mxnet"),
    _Kind("a database of SQLite", rb"SQLite format 3", "db sqlite sqlite3", f"{_WRITE}, by sqlite3"),
    _Kind("a pickle", rb"\x80[\x02-\x05]", "pickle pkl", f"{_WRITE}, by pickle"),
    _Kind("a file of PyTorch", rb"(?!)", "pt pth", f"{_WRITE}, by torch"),
    _Kind("an IDX file, as of MNIST", rb"\0\0[\x08-\x0e][\x01-\x04]", "idx1-ubyte idx3-ubyte", f"{_WRITE}, by numpy"),
    _Kind("numbers without a shape, as of CIFAR", rb"(?!)", "bin", f"{_WRITE}, by numpy"),
    _Kind("a video", rb"(?!)", "avi m4v mkv mov mp4 mpeg mpg webm wmv", "save its frames as images"),
    _Kind("a PDF", rb"%PDF", "pdf", "save its images as PNG"),
]
_HEAD = 1024  # bytes
ENDINGS = frozenset(f".{ending}" for kind in _KINDS for ending in kind.endings.split())

# Plugins of Pillow that are used if they are installed. The second one registers itself.
for _module, _function in (("pillow_heif", "register_heif_opener"), ("pillow_jxl", None)):
    with contextlib.suppress(ImportError):
        _plugin = importlib.import_module(_module)
        if _function:
            getattr(_plugin, _function)()


def open_by_pillow(file: str | os.PathLike | io.BytesIO, name: str = "") -> Image.Image:
    """
    `PIL.Image.open` of a file, whatever its ending is.

    Raises:
        ValueError: If Pillow does not open files of this kind. The message says what does.
        UnidentifiedImageError: If the kind is unknown.
    """
    Image.init()
    try:
        image = Image.open(file, formats=[format for format in Image.ID if format not in CLOSED])
    except (UnidentifiedImageError, KeyError, NotImplementedError, ValueError) as error:
        if (kind := _kind(file, name)) is None:
            raise
        raise ValueError(f"{kind.name}; {kind.remedy}") from error
    if image.format == "TIFF" and os.path.splitext(name)[1].lower()[1:] in _RAW.endings.split():
        image.close()  # Pillow would read the preview in it
        raise ValueError(f"{_RAW.name}; {_RAW.remedy}")
    return image


def is_closed_image(path: str | os.PathLike) -> bool:
    """Whether a file is by its content an image of one of the kinds that Pillow does not open."""
    kind = _kind(path, "")
    return kind is not None and kind.endings not in ("", "npz")


def container(path: str | os.PathLike) -> str | None:
    """What a file is that may hold many images and is not read, and what to do; `None` for other files."""
    name = re.sub(r"-\d+-of-\d+$", "", os.path.basename(path))  # mnist-train.tfrecord-00000-of-00001
    kind = _kind(path, name, _CONTAINERS)
    return kind and f"{kind.name}; {kind.remedy}"


def _kind(file, name: str, kinds: list[_Kind] = _KINDS) -> _Kind | None:
    if isinstance(file, io.BytesIO):
        head = file.getvalue()[:_HEAD]
    else:
        with open(file, "rb") as opened:
            head = opened.read(_HEAD)
    by_content = (kind for kind in kinds if re.match(kind.start, head, re.DOTALL))
    by_ending = (kind for kind in kinds if name.lower().endswith(tuple(f".{end}" for end in kind.endings.split())))
    return next(by_content, None) or next(by_ending, None)
