"""A folder of images as a data set, with the splits, classes and captions that its folders and metadata give."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable

import datasets
import pyarrow as pa

from hf_genmod.data.files import File, Listing, composed
from hf_genmod.data.metadata import CAPTION_COLUMNS, LABEL_COLUMNS, images_of, read_rows, read_text
from hf_genmod.errors import shortened

_IMAGE = datasets.Image().pa_type  # the bytes or the path of a file
_SPLITS = {word: "train" for word in ("train", "training")}
_SPLITS |= {word: "validation" for word in ("validation", "valid", "val", "dev")}
_SPLITS |= {word: "test" for word in ("test", "testing", "eval", "evaluation")}
_LIKE_A_SPLIT = re.compile(rf"(?:.*[-._ 0-9])?({'|'.join(_SPLITS)})(?:[-._ 0-9].*)?", re.IGNORECASE | re.DOTALL)


def read_folder(found: Listing, name: str) -> dict[str, datasets.Dataset]:
    """
    The splits of a folder of images: the file of each image, and where there are any, labels, captions and the columns
    of the metadata. Whatever is not used is named in a warning.

    Args:
        found (`Listing`): What `list_images` found.
        name (`str`): What errors call the folder.

    Raises:
        ValueError: If the images contradict each other or their metadata.
    """
    samples = _samples(found, name)
    if not samples:
        raise ValueError(f"{name}: its metadata, {found.metadata[0].place}, has no rows; add them or remove the file")
    places = _split_places([image for image, _ in samples], name)
    columns = {key: None for _, row in samples for key in row}
    if set(columns) & set(CAPTION_COLUMNS):
        found.others += [(file, "the metadata has captions") for file in found.captions.values()]
    elif found.captions:
        samples = [(image, row | {"text": _caption(image, found)}) for image, row in samples]
        columns["text"] = None
    arrays = {column: _array([row.get(column) for _, row in samples], column, name) for column in columns}
    features = datasets.Features(datasets.Features.from_arrow_schema(pa.table(arrays).schema))
    features |= {column: datasets.Image(decode=False) for column, array in arrays.items() if array.type == _IMAGE}
    classes = _classes([folders for _, folders in places], name)
    if classes is not None and not set(columns) & set(LABEL_COLUMNS):
        names = in_order(set(classes) - {None})
        if len(names) > 1 or None in classes:
            index = {label: i for i, label in enumerate(names)}
            arrays["label"] = pa.array([index.get(label) for label in classes], pa.int64())
            features["label"] = datasets.ClassLabel(names=names)
    _warn_of_others(found, name)
    rows_of = {split: [] for split in _SPLITS.values()}
    for row, (split, _) in enumerate(places):
        rows_of[split].append(row)
    return {
        split: datasets.Dataset.from_dict({column: array.take(rows) for column, array in arrays.items()}, features)
        for split, rows in rows_of.items()
        if rows
    }


def in_order(names) -> list:
    """Names of classes in alphabetical order, or in the order of the numbers if all are numbers."""
    by_number = all(isinstance(name, str) and name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name) if by_number else name)


def _samples(found: Listing, name: str) -> list[tuple[File, dict]]:
    """The images and their columns: the rows of the metadata, then the images that no metadata is about."""
    known = {(*map(composed, file.folders), composed(file.name)): file for file in found.images}
    samples, described, folders = [], {}, {}
    for metadata in found.metadata:
        other = folders.setdefault(metadata.folders, metadata)
        if other is not metadata:
            raise ValueError(f"{name}: it holds both {other.place} and {metadata.place}; keep one of them")
        for where, row in read_rows(metadata.path):
            images = {}
            for column, place in images_of(row, where, metadata).items():
                path = os.path.join(os.path.dirname(metadata.path), *place[len(metadata.folders) :])
                images[column] = known.get(place, File(place[:-1], place[-1], path))
                if described.setdefault(place, metadata) is not metadata:
                    files = f"{described[place].place} and {metadata.place}"
                    raise ValueError(f"{where}: {'/'.join(place)} is in both {files}; keep one of the rows")
            columns = {key: value for key, value in row.items() if not re.fullmatch(r"(.+_)?file_name", key)}
            samples.append((next(iter(images.values())), images | columns))
    left_out = []
    for place, file in known.items():
        if place in described:
            continue
        if any(file.folders[:depth] in folders for depth in range(len(place))):
            left_out.append(file.place)
        else:
            samples.append((file, {"image": file}))
    if left_out:
        what = f"{len(left_out)} images have no line in its metadata and are left out"
        warnings.warn(f"{name}: {what} ({shortened(left_out)})", stacklevel=2)
    found.others = [(file, why) for file, why in found.others if (*file.folders, file.name) not in described]
    return samples


def _split_places(images: list[File], name: str) -> list[tuple[str, tuple[str, ...]]]:
    """The split of each image, and its folders without the one that is called after the split."""
    folders = {image.folders for image in images}
    exact = {place: _split_place(place, _SPLITS.get) for place in folders}
    # A folder that all images are in may be called my_test_data.
    shared = len(os.path.commonprefix(list(folders)))
    loose = {place: _split_place(place, _loosely, shared) for place in folders}
    of_files = [_loosely(os.path.splitext(image.name)[0]) for image in images]
    places = exact if any(exact.values()) else loose
    several = len({found[0] for found in loose.values() if found}) > 1
    if not any(places.values()):
        are_splits = None not in of_files and len(set(of_files)) > 1
        return [
            (split if are_splits else "train", image.folders) for split, image in zip(of_files, images, strict=True)
        ]
    if places is loose and not several:
        called, split = next((image.folders, loose[image.folders][0]) for image in images if loose[image.folders])
        what = f"{'/'.join(called)!r} is taken for a class, not for the split {split}"
        warnings.warn(f"{name}: {what}; if it is that split, call it {split}", stacklevel=2)
        return [("train", image.folders) for image in images]
    outside = [image for image in images if places[image.folders] is None]
    if outside:
        some = f"{len(outside)} of its {len(images)} images (such as {outside[0].place})"
        other = next(image for image in images if places[image.folders])
        raise ValueError(
            f"{name}: {some} would be ignored: they are in no split, and others ({other.place}) are in one "
            f"called after the split {places[other.folders][0]}; move the former into a split, or rename the latter"
        )
    return [places[image.folders] for image in images]


def _split_place(folders: tuple[str, ...], split_of: Callable, start: int = 0) -> tuple[str, tuple[str, ...]] | None:
    """The split of the outermost folder that is called after one, and the other folders."""
    for i, folder in enumerate(folders[start:], start):
        if split := split_of(folder.lower()):
            return split, (*folders[:i], *folders[i + 1 :])
    return None


def _loosely(name: str) -> str | None:
    """The split that a name such as my-train_2 contains."""
    match = _LIKE_A_SPLIT.fullmatch(name.lower())
    return _SPLITS[match[1]] if match else None


def _classes(places: list[tuple[str, ...]], name: str) -> list[str | None] | None:
    """The class of each image, by the folders that it is in: the innermost that differ, at the depth of most images.
    `None` for images at other depths, or if there are no classes."""
    shared = len(os.path.commonprefix(list(set(places))))
    counts = Counter(len(place) for place in places if len(place) > shared)
    if not counts:
        return None
    depth = max(counts, key=lambda depth: (counts[depth], -depth))
    folders = {place for place in places if len(place) == depth}
    differing = [level for level in range(depth) if len({place[level] for place in folders}) > 1] or [depth - 1]
    if len(differing) > 1:
        example = min(folders)
        what = f"the classes are its innermost folders, such as {example[differing[-1]]!r} of {'/'.join(example)}"
        warnings.warn(f"{name}: {what}; for others, keep the images in folders of one depth", stacklevel=2)
    return [composed(place[differing[-1]]) if len(place) == depth else None for place in places]


def _caption(image: File, found: Listing) -> str | None:
    """The text of the file that is called as the image is, 1.txt or 1.png.txt for 1.png."""
    names = (composed(name) for name in (os.path.splitext(image.name)[0], image.name))
    file = next((found.captions[key] for name in names if (key := (*image.folders, name)) in found.captions), None)
    return file and read_text(file.path).strip()


def _array(values: list, column: str, name: str) -> pa.Array:
    """The values of a column, of files as the type `datasets.Image` stores them."""
    if any(isinstance(value, File) for value in values):
        paths = pa.array([value and value.path for value in values], pa.string())
        return pa.StructArray.from_arrays([pa.nulls(len(values), pa.binary()), paths], fields=list(_IMAGE))
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, UnicodeError) as error:
        raise ValueError(
            f"{name}: values of the column {column!r} of its metadata do not go together ({error})"
        ) from error


def _warn_of_others(found: Listing, name: str) -> None:
    """Names the files that are not used, and the folders without images."""
    full = {image.folders[:depth] for image in found.images for depth in range(len(image.folders) + 1)}
    full |= {file.folders[:depth] for file, _ in found.others for depth in range(len(file.folders) + 1)}
    empty = sorted("/".join(place) for place in found.folders - full if place[:-1] in full)
    if empty:
        warnings.warn(f"{name}: {len(empty)} folders without images: {shortened(empty)}", stacklevel=2)
    if found.others:
        others = [f"{file.place} ({why})" for file, why in found.others]
        warnings.warn(f"{name}: {len(others)} files are not used: {shortened(others)}", stacklevel=2)
