"""The files below a folder: which are images, and what the others are."""

import dataclasses
import functools
import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from hf_genmod.data.formats import CLOSED, ENDINGS, container, is_closed_image
from hf_genmod.errors import LFS_REMEDY, is_lfs_pointer

ARRAYS = (".npy", ".npz")
CAPTIONS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
ARCHIVE = re.compile(r"(.+)\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))", re.IGNORECASE | re.DOTALL)
# Pillow recognises these by little more than a name.
_NOT_BY_CONTENT = {"CUR", "DCX", "FLI", "GBR", "MCIDAS", "MSP", "PCX", "PIXAR", "SUN", "XVTHUMB"}
# Folders that systems and tools make.
OF_TOOLS = set(
    """__MACOSX __pycache__ @eaDir #recycle $RECYCLE.BIN lost+found .AppleDouble .cache .comments .dvc .git .github
 .hg .huggingface .idea .ipynb_checkpoints .picasaoriginals .svn .thumbnails .tmp .Trash .Trashes .venv .vscode
 .Spotlight-V100 .fseventsd .TemporaryItems""".split()
) | {"System Volume Information"}
_BESIDE = re.compile(r"\.(aae|dop|exif|info|json|meta|pp3|thm|txt|xml|xmp|ya?ml)", re.IGNORECASE)
_PLAIN = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|authors|contributing)([^a-z].*)?|icon\r|(eh)?thumbs\.db|"
    r"dataset_(infos?|dict)\.json|state\.json|cache-\w+\.arrow|(md5|sha\d+)sums?(\.txt)?|.*\.(md|rst|ini|log|md5|sha\d+)",
    re.IGNORECASE,
)
_BACKUP = re.compile(r"(.+)(~|\.bak|\.backup|\.orig|\.old|\.swp|\.tmp|_original)", re.IGNORECASE | re.DOTALL)


class File(NamedTuple):
    """A file of a data set."""

    folders: tuple[str, ...]  # those that it is in, from the data set on
    name: str
    path: str  # from where it is read

    @property
    def place(self) -> str:
        """Its path in the data set, which errors show."""
        return "/".join((*self.folders, self.name))


@dataclasses.dataclass
class Listing:
    """What is below a folder, each list in the order of the places."""

    images: list[File] = dataclasses.field(default_factory=list)
    metadata: list[File] = dataclasses.field(default_factory=list)
    captions: dict[tuple, list[File]] = dataclasses.field(default_factory=dict)  # by folders and name of the image
    archives: list[File] = dataclasses.field(default_factory=list)
    tables: list[File] = dataclasses.field(default_factory=list)
    others: list[tuple[File, str]] = dataclasses.field(default_factory=list)  # files that are not used, and why
    folders: set[tuple[str, ...]] = dataclasses.field(default_factory=set)


def composed(text: str) -> str:
    """A name in one form, whichever of those of Unicode the file system stores."""
    return unicodedata.normalize("NFC", text)


def dangling(path: str | os.PathLike) -> str | None:
    """What a link is that leads nowhere, or to itself; `None` for any other path."""
    is_dangling = os.path.islink(path) and not os.path.exists(path)
    return f"a link to {os.readlink(path)}, which is not there" if is_dangling else None


@functools.cache
def image_endings() -> frozenset[str]:
    """The endings of images and arrays, in lower case."""
    opened = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - CLOSED}
    return ENDINGS.union(opened, ARRAYS, (".spi", ".spider", ".imt"))  # Pillow opens the last without their endings


def list_files(root: str | os.PathLike, above: tuple[str, ...] = ()) -> Listing:
    """
    Lists a folder, and what its links lead to.

    Args:
        root: The folder.
        above (`tuple[str, ...]`): The folders of the data set that it is in, for the places of its files.

    Raises:
        ValueError: If a link leads nowhere, or a name is not UTF-8.
    """
    found, top = Listing(), os.path.realpath(root)
    folders = [(str(root), above, (top,), False)]  # path, place, where it and those above it really are, hidden
    while folders:
        path, place, chain, hidden = folders.pop()
        files, inner = {}, []
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                try:
                    name.encode()
                except UnicodeEncodeError:
                    raise ValueError(f"{os.path.join(path, name)!a}: its name is not UTF-8; rename it") from None
                if dangling(entry.path) or entry.is_file():
                    files[name] = entry
                elif not entry.is_dir() and not hidden and not name.startswith("."):
                    found.others.append((File(place, name, entry.path), "neither a file nor a folder"))
                elif entry.is_dir() and name not in OF_TOOLS and not name.startswith(".Trash-"):
                    real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(chain[-1], name)
                    # A folder that holds a folder above it holds itself.
                    if entry.is_symlink() and any(
                        Path(real) in (Path(other), *Path(other).parents) for other in chain
                    ):
                        found.others.append((File(place, name, entry.path), "a link to a folder that it is in"))
                    else:
                        inner.append((entry.path, (*place, name), (*chain, real), hidden or name.startswith(".")))
        if "training_config.json" in files and place != above:
            found.others.append((File(place[:-1], place[-1], path), "the folder of a run"))
            continue
        folders += inner
        found.folders |= set() if hidden else {place}
        _sort(files, place, hidden, found)
    for files in (found.images, found.metadata, found.archives, found.tables):
        files.sort(key=lambda file: file.place)
    found.others.sort(key=lambda other: other[0].place)
    return found


def _sort(entries: dict[str, os.DirEntry], place: tuple[str, ...], hidden: bool, found: Listing) -> None:
    """Sorts the files of one folder into a listing."""
    images = {name for name in entries if os.path.splitext(name)[1].lower() in image_endings()}
    stems = images | {os.path.splitext(name)[0] for name in images}
    backups = {name for name in entries if (of := _BACKUP.fullmatch(name)) and of[1] in stems | entries.keys()}
    for name, entry in entries.items():
        file, is_hidden = File(place, name, entry.path), hidden or name.startswith(".")
        if name in images and not is_hidden:
            found.images.append(file)
        elif is_hidden:
            if name in images and not name.startswith("._"):  # as macOS calls its own files
                found.others.append((file, "hidden, as a name begins with a dot"))
        elif name not in backups:
            kind = _kind(name, entry, images, stems)
            if kind == "captions":
                found.captions.setdefault((*place, composed(os.path.splitext(name)[0])), []).append(file)
            elif kind in ("images", "metadata", "archives", "tables"):
                getattr(found, kind).append(file)
            elif kind:
                found.others.append((file, kind))


def _kind(name: str, entry: os.DirEntry, images: set[str], stems: set[str]) -> str | None:
    """The list of a file that is not called as an image is; `None` if it plainly belongs to an image, a person or a
    system; else why it is not used."""
    stem, ending = os.path.splitext(name)
    is_caption, is_plain = stem in stems and ending.lower() in CAPTIONS, _PLAIN.fullmatch(name)
    if not is_caption and stem in stems and _BESIDE.fullmatch(ending):
        return None
    if link := dangling(entry.path):
        if is_plain:
            return None
        raise ValueError(f"{entry.path}: {link}; correct or remove it")
    if is_caption:
        return "captions"
    if is_plain:
        return "images" if _holds_an_image(entry.path) else None
    if name.lower() in METADATA:
        return "metadata"
    if ARCHIVE.fullmatch(name):
        return "archives"
    if ending.lower() in (".parquet", ".arrow"):
        return "tables"
    if is_lfs_pointer(entry.path):
        return f"a pointer of Git LFS; {LFS_REMEDY}" if ending else "images"
    if what := container(entry.path):
        return what
    if any(name[: dot.start()] in images for dot in re.finditer(r"\.", name)):  # such as 0.jpg.json or 0.jpg.thumb
        return "called after another image" if _holds_an_image(entry.path) else None
    if _holds_an_image(entry.path):
        return "images"
    if ending.lower() in CAPTIONS:
        return "a text without an image of its name"
    if ending.lower() in (".csv", ".json", ".jsonl", ".tsv", ".xls", ".xlsx"):
        return "a table, which is used as a metadata.csv or metadata.jsonl with the names of images as file_name"
    return "no image"


def _holds_an_image(path: str) -> bool:
    """Whether the first bytes of a file are those of an image, whatever its name is."""
    Image.init()
    kinds = [kind for kind, (_, accept) in Image.OPEN.items() if accept and kind not in CLOSED | _NOT_BY_CONTENT]
    try:
        with Image.open(path, formats=kinds):
            return True
    except Image.DecompressionBombError:
        return True
    except PermissionError:
        raise
    except Exception:  # Pillow raises nearly every type of error on broken files
        return is_closed_image(path)
