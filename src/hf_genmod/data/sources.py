"""Finds the images of a folder, file or data set on the Hub."""

import os
import re
import warnings
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from hf_genmod.errors import first_line

SHAPES_SPLITS = {"train": (8192, 0), "test": (2048, 1)}  # number of images, seed
ARRAYS = (datasets.Array2D, datasets.Array3D)  # types of columns


def splits_of(dataset: str | Path) -> list[str]:
    """The names of the splits of a data set, as `load_pictures` takes it."""
    return list(SHAPES_SPLITS if dataset == "shapes" else find_splits(dataset, None)[0])


def find_splits(dataset: str | Path | datasets.Dataset | datasets.DatasetDict, config_name: str | None):
    """All splits of a data set, a `dict`, and what errors call the data set; arguments as of `load_pictures`."""
    if isinstance(dataset, datasets.Dataset):
        dataset = {"train": dataset}
    if isinstance(dataset, dict):
        return dataset, "the data set"
    name, path = str(dataset), Path(dataset).expanduser().resolve()
    if not path.exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{name}: there is no such folder or file; check the path")
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{name}: a file, but not a parquet file; give a folder of images or a .parquet file")
    if path.exists() and set("*?[]") & set(str(path)):
        raise ValueError(f"{name}: datasets takes a path with a character of *?[] for a pattern; rename the folder")
    # `datasets` ignores hidden files.
    files = [file for file in path.rglob("*") if not re.search(r"(^|/)(\.|__)", file.relative_to(path).as_posix())]
    images = {str(file) for file in files if file.suffix.lower() in ImageFolder.EXTENSIONS}
    metadata = [file for file in files if file.name in ImageFolder.METADATA_FILENAMES]
    arrays = [file for file in files if file.suffix == ".npy"]
    if arrays and images:
        raise ValueError(f"{name}: it holds both arrays, {arrays[0].name}, and images, {min(images)}; keep one kind")
    if arrays:
        return _array_folder(path, arrays), name
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={"train": str(path)}), name
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(path)
            return saved if isinstance(saved, dict) else {"train": saved}, name
        if not images or ".parquet" in {file.suffix for file in files if file not in metadata}:
            return datasets.load_dataset(str(path) if path.exists() else name, config_name), name
        splits = datasets.load_dataset("imagefolder", data_dir=str(path))
    except Exception as error:  # each format has a library with errors of its own
        cause = first_line(error.__cause__ if isinstance(error, DatasetGenerationError) else error)
        if not path.exists():
            message = f"there is no such folder, and the Hub has no such data set ({cause}); check the spelling"
            raise FileNotFoundError(f"{name}: {message}") from error
        kinds = "images or .npy files, in class folders or not, images with a metadata.jsonl, or parquet files"
        raise ValueError(f"{name}: it holds no data set that can be read ({cause}); it should hold {kinds}") from error
    # For `datasets`, folders and files named train, test, eval, ... are splits; it ignores all others.
    used = set()
    for rows in splits.values():
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                used |= {entry["path"] for entry in column_of(rows, column).to_pylist() if entry}
    ignored = sorted(images - used)
    if ignored and metadata:
        warnings.warn(f"{name}: {len(ignored)} images have no line in its metadata and are left out", stacklevel=3)
    elif ignored:
        example, other = (os.path.relpath(file, path) for file in (ignored[0], min(used)))
        raise ValueError(
            f"{name}: {len(ignored)} of its {len(images)} images (such as {example}) would be ignored, because "
            f"the names of others ({other}) look like those of the splits {', '.join(splits)}; rename the latter"
        )
    # It takes folders train/ and test/ of images without classes for the classes "train" and "test".
    labelled = not metadata and all("label" in rows.column_names for rows in splits.values())
    if labelled and len(splits) > 1 and all(len(rows.unique("label")) == 1 for rows in splits.values()):
        splits = {split: rows.remove_columns("label") for split, rows in splits.items()}
    return splits, name


def _array_folder(path: Path, files: list[Path]) -> dict[str, datasets.Dataset]:
    """The splits of a folder of arrays: its folders "train", "validation" and "test", or else the whole folder; with
    labels if the arrays are in class folders."""
    tops = {file.relative_to(path).parts[0] for file in files}
    roots = {split: path / split for split in tops} if tops <= {"train", "validation", "test"} else {"train": path}
    of_split = {split: sorted(file for file in files if root in file.parents) for split, root in roots.items()}
    classes = sorted({file.parent.name for file in files})
    at_one_depth = all(file.parent.parent == roots[split] for split, files in of_split.items() for file in files)
    splits = {}
    for split, files in of_split.items():
        columns = {"image": [{"bytes": None, "path": str(file)} for file in files]}
        features = {"image": datasets.Image(decode=False)}
        if at_one_depth and len(classes) > 1:
            columns["label"] = [file.parent.name for file in files]
            features["label"] = datasets.ClassLabel(names=classes)
        splits[split] = datasets.Dataset.from_dict(columns, datasets.Features(features))
    return splits


def column_of(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    return rows.select_columns(column).with_format("arrow")[:][column]
