"""A folder of images as a data set, with the splits, classes and captions that its folders and metadata give."""

import contextlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow as pa

from hf_genmod.data.files import File, Listing, composed
from hf_genmod.data.metadata import CAPTION_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS, images_of, read_rows, read_text
from hf_genmod.errors import shortened

_IMAGE = datasets.Image().pa_type  # the bytes or the path of a file
_SPLITS = {word: "train" for word in ("train", "training")}
_SPLITS |= {word: "validation" for word in ("validation", "valid", "val", "dev")}
_SPLITS |= {word: "test" for word in ("test", "testing", "eval", "evaluation")}
_LIKE_A_SPLIT = re.compile(rf"(?:.*[-._ 0-9])?({'|'.join(_SPLITS)})(?:[-._ 0-9].*)?", re.IGNORECASE | re.DOTALL)

_OF_IMAGES = re.compile(r"([a-z]+[-_ ]?)?(images?|imgs?|photos?|pictures?)", re.IGNORECASE)  # names of folders

NUMBER = re.compile(r"-?\d+(\.\d+)?")  # of any size, without 1e3 and nan, which are names


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
    main, samples = _samples(found, name)
    if not samples:
        raise ValueError(f"{name}: its metadata, {found.metadata[0].place}, has no rows; add them or remove the file")
    images, rows = zip(*samples, strict=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    arrays = {main: _array(images, main, name)}
    arrays |= {column: _array([row.get(column) for row in rows], column, name) for column in columns if column != main}
    if set(columns) & set(CAPTION_COLUMNS):
        found.others += [(file, "the metadata has captions") for files in found.captions.values() for file in files]
    elif found.captions:
        arrays["text"] = pa.array([_caption(image, found) for image in images], pa.string())
    splits, folders = zip(*_split_places(images, name), strict=True)
    if column := next((column for column in columns if column in SPLIT_COLUMNS), None):
        splits = _splits_of(arrays.pop(column).to_pylist(), splits, images, f"{name}: the column {column!r}")
    features = datasets.Features(datasets.Features.from_arrow_schema(pa.table(arrays).schema))
    features |= {column: datasets.Image(decode=False) for column, array in arrays.items() if array.type == _IMAGE}
    classes = _classes(folders, splits, name)
    names = in_order(set(classes) - {None})
    column = next((column for column in LABEL_COLUMNS if column in columns), None)
    if column and len(names) > 1 and arrays[column].to_pylist() != classes:
        what = f"labels are those of the column {column!r}, not the names of the folders; remove the column for these"
        warnings.warn(f"{name}: {what}", stacklevel=2)
    elif names and not column:
        index = {label: i for i, label in enumerate(names)}
        arrays["label"] = pa.array([index.get(label) for label in classes], pa.int64())
        features["label"] = datasets.ClassLabel(names=names)
    _warn_of_empty_folders(found, name)
    warn_of_others(found.others, name)
    if not columns:
        _warn_of_fields(images[0], LABEL_COLUMNS + (() if found.captions else CAPTION_COLUMNS), name)
    rows_of = {split: [] for split in _SPLITS.values()}
    for row, split in enumerate(splits):
        rows_of[split].append(row)
    return {
        split: datasets.Dataset.from_dict({column: array.take(rows) for column, array in arrays.items()}, features)
        for split, rows in rows_of.items()
        if rows
    }


def in_order(names) -> list:
    """Names of classes in alphabetical order, or in the order of the numbers if all are numbers."""
    by_number = all(isinstance(name, str) and NUMBER.fullmatch(name) for name in names)
    return sorted(names, key=lambda name: (Decimal(name), name) if by_number else name)


def _samples(found: Listing, name: str) -> tuple[str, list[tuple[File, dict]]]:
    """The name of the column of images, and the images with their other columns: those that the rows of the metadata
    describe, then those that no metadata is about."""
    known = {_key(file): file for file in found.images} if found.metadata else {}
    main, samples, described, lines, folders, absent = "image", [], {}, {}, {}, []
    for metadata in found.metadata:
        other = folders.setdefault(metadata.folders, metadata)
        if other is not metadata:
            raise ValueError(f"{name}: it holds both {other.place} and {metadata.place}; keep one of them")
        for where, row in read_rows(metadata.path):
            images = {}
            for column, place in images_of(row, where, metadata).items():
                path = os.path.join(os.path.dirname(metadata.path), *place[len(metadata.folders) :])
                images[column] = known.get(place, File(place[:-1], place[-1], path))
                if place not in known and not os.path.lexists(path):
                    absent.append((place, where.removeprefix(metadata.path[: -len(metadata.name)])))
                if described.setdefault(place, metadata) is not metadata:
                    files = f"{described[place].place} and {metadata.place}"
                    raise ValueError(f"{where}: {'/'.join(place)} is in both {files}; keep one of the rows")
            main = "image" if "image" in images else next(iter(images))
            if first := lines.get(key := _key(images[main])):
                what = f"{first.rpartition(', ')[2]} is about {images[main].place}, too"
                remedy = "keep one of the lines (several captions are a list, in a metadata.jsonl)"
                raise ValueError(f"{where}: {what}; {remedy}")
            lines[key] = where
            others = {key: value for key, value in row.items() if not re.fullmatch(r"(.+_)?file_name", key)}
            samples.append((images[main], others | images))
    if absent:
        near = {_stem(key[start:]): f"; there is {file.place}" for start in (-1, 0) for key, file in known.items()}
        hints = {place: near.get(_stem(place), near.get(_stem(place[-1:]), "")) for place, _ in absent}
        some = shortened([f"{'/'.join(place)} ({line}{hints[place]})" for place, line in absent])
        what = f"files that its metadata names and that are not there ({len(absent)}): {some}"
        warnings.warn(f"{name}: {what}; correct the names, or add the files", stacklevel=3)
    left_out = []
    for file in found.images:
        if not folders:
            samples.append((file, {}))
        elif _key(file) not in described:
            if any(file.folders[:depth] in folders for depth in range(len(file.folders) + 1)):
                left_out.append(file.place)
            else:
                samples.append((file, {}))
    if left_out:
        what = f"images left out, as its metadata has no line of them ({len(left_out)}): {shortened(left_out)}"
        warnings.warn(f"{name}: {what}; add lines, or remove the images", stacklevel=2)
    found.others = [(file, why) for file, why in found.others if _key(file) not in described]
    return main, samples


def _key(file: File) -> tuple[str, ...]:
    """The place of a file as metadata may write it."""
    return tuple(map(composed, (*file.folders, file.name)))


def _stem(place: tuple[str, ...]) -> str:
    """A place without case and ending."""
    return os.path.splitext("/".join(place).lower())[0]


def _split_places(images: Sequence[File], name: str) -> list[tuple[str, tuple[str, ...]]]:
    """The split of each image, and its folders without the one that is called after the split."""
    folders = {image.folders for image in images}
    exact = {place: _split_place(place, _SPLITS.get) for place in folders}
    # A folder that all images are in may be called my_test_data.
    shared = len(os.path.commonprefix(list(folders)))
    loose = {place: _split_place(place, _loosely, shared) for place in folders}
    several = len({found[0] for found in loose.values() if found}) > 1
    for places in (exact, loose):
        if all(places.values()) and (places is exact or several):
            for split in _SPLITS.values():
                called = sorted({folder for found, _, folder in places.values() if found == split})
                if len(called) > 1:
                    what = f"would be made of folders of several names ({shortened(called)})"
                    raise ValueError(
                        f"{name}: the split {split} {what}; if they are one split, "
                        f"call them all {split}, and if they are classes, {split}/CLASS"
                    )
            if not any(inner for _, inner, _ in places.values()):  # as class folders would be
                _warn_of_splits({folder: split for split, _, folder in places.values()}, name)
            return [places[image.folders][:2] for image in images]
    if not any(loose.values()):
        splits = [_loosely(os.path.splitext(image.name)[0]) for image in images]
        if None in splits or len(set(splits)) == 1:
            splits = ["train"] * len(images)
        return list(zip(splits, (image.folders for image in images), strict=True))
    inside = next(image for image in images if loose[image.folders])
    if not several and not any(exact.values()):
        split = loose[inside.folders][0]
        folder = "/".join(inside.folders)
        what = f"{folder!r} is taken for a class, not for the split {split}; if it is that split, call it {split}"
        warnings.warn(f"{name}: {what}", stacklevel=2)
        return [("train", image.folders) for image in images]
    outside = [image for image in images if loose[image.folders] is None]
    some = f"{len(outside)} of its {len(images)} images (such as {outside[0].place})"
    raise ValueError(
        f"{name}: {some} would be ignored: they are in no split, and others ({inside.place}) are in one called after "
        f"the split {loose[inside.folders][0]}; move the former into a split, or rename the latter"
    )


def _splits_of(words: list, places: Sequence[str], images: Sequence[File], column: str) -> list[str]:
    """The split of each image by a column of the metadata, which its folders may say, too."""
    splits = [_SPLITS.get(str(word).strip().lower()) for word in words]
    for word, split, place, image in zip(words, splits, places, images, strict=True):
        if split is None:
            remedy = "give train, validation or test for each image, or rename the column"
            raise ValueError(f"{column} of its metadata is {word!r} for {image.place}; {remedy}")
        if split != place and set(places) != {"train"}:
            raise ValueError(f"{column} says {split} for {image.place}, and its place {place}; correct or remove one")
    return splits


def _split_place(folders: tuple[str, ...], split_of: Callable, start: int = 0) -> tuple[str, tuple, str] | None:
    """The split of the outermost folder that is called after one, the other folders, and its name in lower case."""
    for i, folder in enumerate(folders[start:], start):
        if split := split_of(folder.lower()):
            return split, (*folders[:i], *folders[i + 1 :]), folder.lower()
    return None


def _loosely(name: str) -> str | None:
    """The split that a name such as my-train_2 contains."""
    match = _LIKE_A_SPLIT.fullmatch(name.lower())
    return _SPLITS[match[1]] if match else None


def _warn_of_splits(split_of: dict[str, str], name: str) -> None:
    """Names folders that are taken for splits, and whose names have other words, too, as classes have."""
    others = {}
    for folder in sorted(split_of):
        word = _LIKE_A_SPLIT.fullmatch(folder)
        if rest := re.sub(r"[\W\d_]", "", folder[: word.start(1)] + folder[word.end(1) :]):
            others[rest] = folder
    if len(others) > 1:
        first, second, *_ = others.values()
        what = f"{first!r} and {second!r} are taken for the splits {split_of[first]} and {split_of[second]}"
        warnings.warn(f"{name}: {what}; if they are classes, put both into a folder train", stacklevel=4)


def _classes(places: Sequence[tuple[str, ...]], splits: Sequence[str], name: str) -> list[str | None]:
    """The class of each image, by the folders that it is in: the innermost that differ, at the depth of most images.
    `None` for images at other depths, and if each split has one class, as in train/train and test/test."""
    shared = len(os.path.commonprefix(list(set(places))))
    counts = Counter(len(place) for place in places if len(place) > shared)
    if not counts:
        return [None] * len(places)
    depth = max(counts, key=lambda depth: (counts[depth], -depth))
    folders = {place for place in places if len(place) == depth}
    differing = [level for level in range(depth) if len({place[level] for place in folders}) > 1] or [depth - 1]
    if len(differing) > 1:
        example = min(folders)
        what = f"the classes are its innermost folders, such as {example[differing[-1]]!r} of {'/'.join(example)}"
        warnings.warn(f"{name}: {what}; for others, keep the images in folders of one depth", stacklevel=2)
    classes = [composed(place[differing[-1]]) if len(place) == depth else None for place in places]
    if len(set(zip(splits, classes, strict=True))) <= len(set(splits)):
        return [None] * len(places)
    _warn_of_classes({place[differing[-1]] for place in folders}, name)
    return classes


def _warn_of_classes(folders: set[str], name: str) -> None:
    """Names class folders that look like one class, like splits, or like all images beside something else."""
    forms = Counter(composed(folder) for folder in folders)
    if alike := sorted(form for form, count in forms.items() if count > 1):
        what = f"folders whose names differ only in how Unicode writes them are one class: {shortened(alike)}"
        warnings.warn(f"{name}: {what}; rename one if they are two", stacklevel=4)
    starts = {label: re.match("(?i:train|test|val)(?![a-z])", label) for label in sorted(forms, reverse=True)}
    begun = {start[0].lower(): label for label, start in starts.items() if start}
    if len(begun) > 1:
        what = f"{' and '.join(map(repr, begun.values()))} are taken for classes; if they are splits"
        warnings.warn(f"{name}: {what}, put each into a folder called after its split", stacklevel=4)
    of_images = [label for label in forms if _OF_IMAGES.fullmatch(label)]
    if len(of_images) == 1 < len(forms):
        others = shortened(sorted(set(forms) - set(of_images)), 3)
        what = f"{of_images[0]!r} is taken for a class beside {others}; if it holds all images"
        warnings.warn(f"{name}: {what}, give this folder as the data set", stacklevel=4)


def classes_in_names(where: Callable[[int], str], count: int) -> str | None:
    """What to do about images whose names begin with classes, as cat.0.png and dog.0.png; `None` if they do not.
    `where(i)` is the path of image i; a thousand of them are looked at."""
    files = [where(i) for i in range(0, count, -(-count // 1000))]
    starts = [re.split("[-._](?=[0-9])", os.path.basename(file), maxsplit=1) for file in files]
    names = sorted({name for name, *_ in starts if re.search(r"[^\W\d_]", name)})
    are_named = all(len(start) == 2 and start[0] in names for start in starts)
    if not are_named or not 1 < len(names) <= len(files) / 2 or len({*map(os.path.dirname, files)}) > 1:
        return None
    command = 'for f in *[-._][0-9]*; do d=${f%%[-._][0-9]*}; mkdir -p "$d" && mv "$f" "$d"; done'
    what = f"the names of its images begin with what may be classes ({shortened(names)})"
    return f"{what}; if so, sort them into class folders by running in their folder: {command}"


def _caption(image: File, found: Listing) -> str | None:
    """The text of the file that is called as the image is, 1.txt or 1.png.txt for 1.png."""
    names = {composed(name) for name in (os.path.splitext(image.name)[0], image.name)}
    files = [file for name in names for file in found.captions.get((*image.folders, name), ())]
    if len(files) > 1:
        first, second, *_ = sorted(file.name for file in files)
        raise ValueError(f"{image.path}: two captions of one image: {first} and {second}; keep one")
    return read_text(files[0].path).strip() if files else None


def _array(values: Sequence, column: str, name: str) -> pa.Array:
    """The values of a column, of files as the type `datasets.Image` stores them."""
    if any(isinstance(value, File) for value in values):
        paths = pa.array([value and value.path for value in values], pa.string())
        return pa.StructArray.from_arrays([pa.nulls(len(values), pa.binary()), paths], fields=list(_IMAGE))
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, UnicodeError) as error:
        raise ValueError(
            f"{name}: values of the column {column!r} of its metadata do not go together ({error}); give all one type"
        ) from error


def _warn_of_empty_folders(found: Listing, name: str) -> None:
    """Names the folders without images."""
    full = {image.folders[:depth] for image in found.images for depth in range(len(image.folders) + 1)}
    full |= {file.folders[:depth] for file, _ in found.others for depth in range(len(file.folders) + 1)}
    empty = sorted("/".join(place) for place in found.folders - full if place[:-1] in full)
    if empty:
        what = f"folders without images ({len(empty)}): {shortened(empty)}; fill or remove them"
        warnings.warn(f"{name}: {what}", stacklevel=2)


def warn_of_others(others: list[tuple[File, str]], name: str) -> None:
    """Names the files that are not used, and why."""
    if others:
        some = shortened([f"{file.place} ({why})" for file, why in others])
        what = f"files that are not used ({len(others)}): {some}; leave them if none of them is needed"
        warnings.warn(f"{name}: {what}", stacklevel=2)


def _warn_of_fields(image: File, fields: Sequence[str], name: str) -> None:
    """Names labels and captions in a .json file called after an image, which are read in a WebDataset alone."""
    with contextlib.suppress(OSError, ValueError):  # there is none, or none that can be read
        content = json.loads(Path(image.path).with_suffix(".json").read_text("utf-8"))
        if unused := [field for field in fields if isinstance(content, dict) and field in content]:
            what = f"{' and '.join(map(repr, unused))} in the .json files of its images are not used"
            warnings.warn(f"{name}: {what}; write them, with file_name, into a metadata.jsonl", stacklevel=3)
