"""The samples of a WebDataset, an archive (.tar) with a 1.cls, 1.json or 1.txt for each image 1.png."""

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator

from hf_genmod.data.files import image_endings
from hf_genmod.data.metadata import CAPTION_COLUMNS, LABEL_COLUMNS
from hf_genmod.data.remote import opened

BLOCK, BLOCK_BYTES = 256, 2**22  # the most samples of a block, and bytes of one with several


def read_samples(path: str, place: int, num_bytes: int, columns: list[str] | None = None) -> list[dict | ValueError]:
    """The columns of the samples in a block of an archive, by default all, images as `{"bytes", "path"}`. Without a
    column of images, the images are not read. A sample that cannot be read is the reason why."""
    with opened(path) as file:
        file.seek(place)
        has_images = columns is None or any(map(_is_image, columns))
        if has_images:
            content = file.read(num_bytes)
            if len(content) < num_bytes:
                raise OSError("it is shorter than it was")
            file = io.BytesIO(content)
        end = file.tell() + num_bytes
        with tarfile.open(fileobj=file, mode="r:") as archive:
            samples = _samples(archive, lambda ending: has_images or not _is_image(ending))
            rows = [_fields(*sample) for _, *sample in itertools.takewhile(lambda sample: sample[0] < end, samples)]
    if columns is None:
        return rows
    return [row if isinstance(row, Exception) else {column: row.get(column) for column in columns} for row in rows]


def index_of_samples(path: str, names: set[str]) -> dict:
    """The "blocks" of an archive, (first byte, bytes, samples) each, and its columns of these names, for which only
    the headers and the small files are read."""
    starts, labels = [], []
    with opened(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for start, *sample in _samples(archive, lambda ending: ending == "json" or ending in names):
            starts.append(start)
            fields = _fields(*sample)
            known = {} if isinstance(fields, Exception) else fields
            labels.append({name: known.get(name) for name in names})
        end = archive.offset
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile does not say so
            raise OSError("it is cut off")
    blocks = []
    for start, stop in itertools.pairwise([*starts, end]):
        first, num_bytes, size = blocks[-1] if blocks else (start, 0, BLOCK)
        if size == BLOCK or stop - first > BLOCK_BYTES:
            blocks.append((start, stop - start, 1))
        else:
            blocks[-1] = first, stop - first, size + 1
    return {"blocks": blocks, "labels": {name: [its[name] for its in labels] for name in sorted(names)}}


def _samples(archive: tarfile.TarFile, is_read: Callable[[str], bool]) -> Iterator[tuple[int, str, dict]]:
    """The samples of a WebDataset: where each begins, its name, and the contents of its files by their endings, `None`
    where they are not read."""
    sample, start, fields = None, 0, {}
    for info in archive:
        folder, slash, name = info.name.removeprefix("./").rpartition("/")
        stem, _, ending = name.partition(".")
        if not info.isfile() or not stem or stem.startswith("__"):
            continue
        if folder + slash + stem != sample:
            if fields:
                yield start, sample, fields
            sample, start, fields = folder + slash + stem, info.offset, {}
        ending = ending.lower()
        fields[ending] = archive.extractfile(info).read() if is_read(ending) else None
    if fields:
        yield start, sample, fields


def _is_image(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in image_endings()


def _fields(sample: str, contents: dict[str, bytes | None]) -> dict | ValueError:
    """The columns of a sample: images, the number in its .cls, the text in its .txt, the fields of its .json. If one
    of these cannot be read, the reason."""
    fields, of_json = {}, {}
    for ending, content in contents.items():
        try:
            if content is not None and _is_image(ending):
                fields[ending] = {"bytes": content, "path": f"{sample}.{ending}"}
            elif ending == "cls" and content is not None:
                fields[ending] = int(content)
            elif ending == "txt" and content is not None:
                fields[ending] = content.decode()
            elif ending == "json" and content is not None:
                of_json = dict(json.loads(content))
        except (ValueError, TypeError):
            return ValueError(f"{sample}.{ending} holds {content[:20]!r}; write it again")
    taken = set(fields)
    taken |= {name for names in (CAPTION_COLUMNS, LABEL_COLUMNS) if taken & set(names) for name in names}
    scalars = {name: v for name, v in of_json.items() if isinstance(v, (str, int, float, list)) and name not in taken}
    return fields | scalars
