"""Finds the images of a folder, file or data set on the Hub."""

import os
import re
import warnings
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

SHAPES_SPLITS = {"train": (8192, 0), "test": (2048, 1)}  # number of images, seed
ARRAYS = (datasets.Array2D, datasets.Array3D)  # types of columns


def splits_of(dataset: str | Path) -> list[str]:
    """The names of the splits of a data set that `load_pictures` takes."""
    return list(SHAPES_SPLITS if dataset == "shapes" else find_splits(dataset, None)[0])


def find_splits(
    dataset: str | Path | datasets.Dataset | datasets.DatasetDict, config_name: str | None
) -> tuple[dict, str]:
    """All splits of a data set, and how errors call it."""
    if isinstance(dataset, datasets.Dataset):
        dataset = {"train": dataset}
    if isinstance(dataset, dict):
        return dataset, "the data set"

    name, path = str(dataset), Path(dataset).expanduser().resolve()
    if not path.exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{name}: there is no such folder or file here; check the path")
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{name}: a file, but not of parquet; give a folder of pictures or a .parquet file")
    if path.exists() and set("*?[]") & set(str(path)):
        raise ValueError(f"{name}: datasets takes the characters *?[] of a path for a pattern; rename the folder")
    files = [file for file in path.rglob("*") if not _is_hidden(file.relative_to(path))]
    pictures = {str(file) for file in files if file.suffix.lower() in ImageFolder.EXTENSIONS}
    metadata = [file for file in files if file.name in ImageFolder.METADATA_FILENAMES]
    arrays = [file for file in files if file.suffix == ".npy"]
    if arrays and pictures:
        raise ValueError(
            f"{name}: it holds both arrays, {arrays[0].name}, and pictures, {min(pictures)}; keep one kind"
        )
    if arrays:
        return _array_folder(path, arrays), name
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={"train": str(path)}), name
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(path)
            return saved if isinstance(saved, dict) else {"train": saved}, name
        if not pictures or {".parquet"} & {file.suffix for file in files if file not in metadata}:
            return datasets.load_dataset(str(path) if path.exists() else name, config_name), name
        splits = datasets.load_dataset("imagefolder", data_dir=str(path))
    except Exception as error:  # from as many libraries as there are formats
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        if not path.exists():
            message = f"{name}: there is no such folder here, and the Hub gave no data set of that name ({reason})"
            raise FileNotFoundError(f"{message}; check the spelling") from error
        raise ValueError(
            f"{name}: no data set in there that could be read ({reason}); it should hold pictures or .npy files in "
            f"class folders or alone, pictures with a metadata.jsonl, or parquet files"
        ) from error

    # Folders and files that are called train, test, eval, ... are splits to datasets, and it ignores all others.
    used = {
        entry["path"]
        for rows in splits.values()
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.Image)
        for entry in column_of(rows, column).to_pylist()
        if entry
    }
    ignored = sorted(pictures - used)
    if ignored and metadata:
        warnings.warn(f"{name}: {len(ignored)} pictures have no line in its metadata and are left out", stacklevel=3)
    elif ignored:
        example, other = (os.path.relpath(file, path) for file in (ignored[0], min(used)))
        raise ValueError(
            f"{name}: {len(ignored)} of its {len(pictures)} pictures ({example}, for one) would be ignored, because "
            f"the names of others ({other}) look like those of the splits {', '.join(splits)}; rename these"
        )
    # Of folders train/ and test/ that hold pictures without classes it makes the classes "train" and "test".
    labelled = not metadata and all("label" in rows.column_names for rows in splits.values())
    if labelled and len(splits) > 1 and all(len(rows.unique("label")) == 1 for rows in splits.values()):
        splits = {split: rows.remove_columns("label") for split, rows in splits.items()}
    return splits, name


def _array_folder(path: Path, files: list[Path]) -> dict[str, datasets.Dataset]:
    """Arrays in class folders or without classes, in folders "train", "validation" and "test" or without splits."""
    tops = {file.relative_to(path).parts[0] for file in files}
    roots = {split: path / split for split in tops} if tops <= {"train", "validation", "test"} else {"train": path}
    of_split = {split: sorted(file for file in files if root in file.parents) for split, root in roots.items()}
    classes = sorted({file.parent.name for file in files})
    labelled = len(classes) > 1 and all(
        file.parent.parent == roots[split] for split, files in of_split.items() for file in files
    )
    splits = {}
    for split, files in of_split.items():
        columns = {"image": [{"bytes": None, "path": str(file)} for file in files]}
        features = {"image": datasets.Image(decode=False)}
        if labelled:
            columns["label"] = [file.parent.name for file in files]
            features["label"] = datasets.ClassLabel(names=classes)
        splits[split] = datasets.Dataset.from_dict(columns, datasets.Features(features))
    return splits


def _is_hidden(path: Path) -> bool:
    """Whether datasets takes no notice of it."""
    return any(part.startswith((".", "__")) for part in path.parts)


def column_of(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    return rows.select_columns(column).with_format("arrow")[:][column]
