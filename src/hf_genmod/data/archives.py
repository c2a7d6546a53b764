"""Images in archives, which count as folders."""

import functools
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from filelock import FileLock

from hf_genmod.data.files import ARCHIVE, OF_TOOLS, File, Listing, image_endings, list_files
from hf_genmod.errors import counted, first_line, refuse_lfs_pointers, shortened

# What `datasets` reads in the files of a WebDataset.
_FORMS = {".cls": (int, "a number from 0 on"), ".json": (json.loads, "JSON"), ".txt": (bytes.decode, "UTF-8")}


def list_images(root: str | os.PathLike, above: tuple[str, ...] = ()) -> Listing:
    """Lists a folder as `list_files` does; if all images are in archives, with what is in them."""
    found = list_files(root, above)
    for archive in found.archives if found.images else ():
        _check_unpacked(archive, found)
    if found.images or found.tables:
        return found
    if any(is_web_dataset(archive.path) for archive in found.archives):
        found.tables = found.archives
        return found
    for archive in found.archives:
        inner = list_images(unpacked(archive.path), (*archive.folders, ARCHIVE.fullmatch(archive.name)[1]))
        for attribute in ("images", "metadata", "tables", "others"):
            getattr(found, attribute).extend(getattr(inner, attribute))
        for key, captions in inner.captions.items():
            found.captions.setdefault(key, []).extend(captions)
        found.folders |= inner.folders
    twice = [place for place, count in Counter(file.place for file in found.images).items() if count > 1]
    if twice:
        names = shortened([archive.place for archive in found.archives])
        raise ValueError(f"{root}: {twice[0]} is in several of its archives ({names}); keep one of them")
    found.images.sort(key=lambda file: file.place)
    return found


def _check_unpacked(archive: File, found: Listing) -> None:
    """Lists an archive beside images among the unused files if its images are these, or refuses it."""
    members = _members(archive.path, with_sums=True)
    inside = Counter((parts[-1], size, crc) for parts, size, crc in members if _ending(parts) in image_endings())
    alike, names, beside = {member[:2] for member in inside}, {member[0] for member in inside}, Counter()
    for file in found.images:
        if file.name in names and os.path.isfile(file.path):
            if (file.name, size := os.path.getsize(file.path)) in alike:
                beside[file.name, size, zlib.crc32(Path(file.path).read_bytes())] += 1
    missing = inside - beside
    if missing:
        there = {
            place[i:] for file in found.images for place in [(*file.folders, file.name)] for i in range(len(place))
        }
        lost = [parts for parts, size, crc in members if (parts[-1], size, crc) in missing]
        first = "/".join(min(lost, key=lambda parts: (parts in there, parts)))
        what = f"it holds {counted(missing.total(), 'image')}, such as {first}, not unpacked beside it"
        raise ValueError(f"{archive.path}: {what}; unpack it, or move it to another folder")
    found.others.append((archive, "its images lie unpacked beside it" if inside else "no images are in it"))


def is_web_dataset(archive: str) -> bool:
    """Whether a .tar has labels in files that are called as its images are, which `datasets` reads."""
    files = [parts for parts, *_ in _members(archive)] if archive.lower().endswith(".tar") else []
    images = {os.path.splitext("/".join(parts))[0] for parts in files if _ending(parts) in image_endings()}
    labels = {_ending(parts) for parts in files if os.path.splitext("/".join(parts))[0] in images}
    # Images with a .json in folders of several names may be classes, which `datasets` would not see.
    return ".cls" in labels or (".json" in labels and len({os.path.dirname(image) for image in images}) == 1)


def refuse_faulty_samples(archive: str) -> None:
    """Raises a `ValueError` with the first file or sample of a WebDataset that `datasets` cannot read."""
    contents, samples, last = [], {}, None
    with _opened(archive) as opened:
        for name, info in _checked(opened):
            if info.isfile() and not name.rpartition("/")[2].startswith((".", "__")):
                is_read = _ending((name,)) in _FORMS
                contents.append((name, opened.extractfile(info).read() if is_read else None))
    for name, content in contents:
        if content is not None:
            read, form = _FORMS[_ending((name,))]
            try:
                read(content)
            except ValueError as error:
                raise ValueError(f"{archive}: {name} holds {content[:20]!r}, not {form}; write it again") from error
        folder, slash, file = name.rpartition("/")
        stem, _, ending = file.partition(".")
        sample = folder + slash + stem
        if sample in samples and sample != last:
            order = "pack the files in the order of their names (tar --sort=name)"
            raise ValueError(f"{archive}: the files of the sample {sample} do not follow each other; {order}")
        samples.setdefault(sample, set()).add(ending)
        last = sample
    usual = Counter(map(frozenset, samples.values())).most_common(1)[0][0]
    for sample, endings in samples.items():
        if endings != usual:
            what = f"the sample {sample} has {', '.join(sorted(endings))}, and others have {', '.join(sorted(usual))}"
            raise ValueError(f"{archive}: {what}; give all samples files of the same endings")


def _ending(parts: tuple[str, ...]) -> str:
    return os.path.splitext(parts[-1])[1].lower()


@contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    """An archive; errors of reading it are one sentence."""
    refuse_lfs_pointers(path)
    try:
        with zipfile.ZipFile(path) if path.lower().endswith(".zip") else tarfile.open(path) as archive:
            yield archive
    except Exception as error:  # each way of packing has errors of its own
        reason = "it needs a password" if "password" in str(error) else first_line(error)
        remedy = "unpack it yourself, or remove it"
        raise ValueError(f"{path}: the archive cannot be read ({reason}); {remedy}") from error


def _members(path: str, with_sums: bool = False) -> list[tuple[tuple[str, ...], int, int]]:
    """The paths and the sizes in bytes of the files in an archive, without hidden ones and those of systems, and the
    CRC-32 of images if these are wanted."""
    contents = _read(path, os.stat(path).st_mtime_ns, with_sums)
    members = [(tuple(re.split(r"[/\\]+", member.removeprefix("./"))), *numbers) for member, *numbers in contents]
    return [member for member in members if not any(part.startswith(".") or part in OF_TOOLS for part in member[0])]


@functools.lru_cache(maxsize=64)
def _read(path: str, _time: int, with_sums: bool) -> list[tuple[str, int, int]]:
    contents = []
    with _opened(path) as archive:
        for name, info in _checked(archive):
            if isinstance(archive, zipfile.ZipFile):
                contents += [] if info.is_dir() else [(name, info.file_size, info.CRC)]
            elif not with_sums or _ending((name,)) not in image_endings():
                contents += [] if info.isdir() else [(name, info.size, 0)]
            elif file := archive.extractfile(info):  # of a link, what it leads to
                content = file.read()
                contents.append((name, len(content), zlib.crc32(content)))
    return contents


def _checked(archive: zipfile.ZipFile | tarfile.TarFile) -> Iterator[tuple[str, zipfile.ZipInfo | tarfile.TarInfo]]:
    """What is in an archive, with the path of each. Raises a `ValueError` for what unpacking would lose or move."""
    is_zip, names = isinstance(archive, zipfile.ZipFile), set()
    for info in archive.infolist() if is_zip else archive:
        if is_zip:
            info.filename = info.filename.replace("\\", "/")  # as some programs on Windows write
        name = info.filename if is_zip else info.name
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} would be outside the folder of the archive")
        if not (info.is_dir() if is_zip else info.isdir()):
            if (place := os.path.normpath(name)) in names:
                raise ValueError(f"it holds {place!r} twice")
            names.add(place)
        yield name, info


def shown(text: str) -> str:
    """A message that calls what was unpacked by its place in the archive: "birds.zip: robin/1.png"."""
    return re.sub(rf"{re.escape(str(_cache()))}[/\\]\w+[/\\]([^/\\]+)[/\\]", r"\1: ", text)


def _cache() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE, "hf_genmod", "unpacked")


def unpacked(path: str) -> Path:
    """
    The folder of what is in an archive, in the cache folder of `datasets`, where it is unpacked once. A single folder
    in the archive that is called as the archive is stands for the archive.

    Raises:
        ValueError: If the archive is damaged or needs a password, does not fit on the disk, or holds a file twice or
            outside its folder.
    """
    path, stat = os.path.realpath(path), os.stat(path)
    key = hashlib.blake2b(f"{path} {stat.st_mtime_ns} {stat.st_size}".encode(), digest_size=8).hexdigest()
    folder = _cache() / key / os.path.basename(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            part = tempfile.mkdtemp(dir=folder.parent)
            try:
                with _opened(path) as archive:
                    for _, info in _checked(archive):
                        archive.extract(
                            info, part, **({} if isinstance(info, zipfile.ZipInfo) else {"filter": "data"})
                        )
                os.replace(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    stem = ARCHIVE.fullmatch(folder.name)[1]
    return folder / stem if set(os.listdir(folder)) - {"__MACOSX", ".DS_Store"} == {stem} else folder
