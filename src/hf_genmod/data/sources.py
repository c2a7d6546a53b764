"""Finds the images of a folder, file or data set on the Hub."""

import contextlib
import re
import warnings
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import metadata_load

from hf_genmod.data.archives import list_images, unpacked
from hf_genmod.data.files import ARCHIVE, ARRAYS, Listing
from hf_genmod.data.folder import read_folder
from hf_genmod.errors import first_line, shortened

SHAPES_SPLITS = {"train": (8192, 0), "test": (2048, 1)}  # number of images, seed
ARRAY_TYPES = (datasets.Array2D, datasets.Array3D)  # types of columns

_TABLES = (".csv", ".h5", ".hdf5", ".json", ".jsonl", ".lance", ".tsv")  # which `datasets` may read
_KINDS = "it should hold images or .npy files, in class folders or not, images with a metadata.jsonl, or parquet files"


def splits_of(dataset: str | Path) -> dict[str, int]:
    """The number of images in each split of a data set, as `load_pictures` takes it."""
    if dataset == "shapes":
        return {split: count for split, (count, _) in SHAPES_SPLITS.items()}
    return {split: len(rows) for split, rows in find_splits(dataset, None)[0].items()}


def find_splits(dataset: str | Path | datasets.Dataset | datasets.DatasetDict, config_name: str | None):
    """All splits of a data set, a `dict`, and what errors call the data set; arguments as of `load_pictures`."""
    if isinstance(dataset, datasets.Dataset):
        dataset = {"train": dataset}
    if isinstance(dataset, dict):
        return dataset, "the data set"
    name, path = str(dataset), Path(dataset).expanduser().resolve()
    if not path.exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{name}: there is no such folder or file; check the path")
    is_archive = path.is_file() and ARCHIVE.fullmatch(path.name) is not None
    if path.is_file() and path.suffix != ".parquet" and not is_archive:
        what = "a file, but neither a parquet file nor an archive"
        raise ValueError(f"{name}: {what}; give a folder of images, an archive of one, or a .parquet file")
    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    found = Listing()
    if is_archive or (path.is_dir() and not saved):
        found = list_images(unpacked(str(path)) if is_archive else path)
        arrays = [file for file in found.images if file.path.lower().endswith(ARRAYS)]
        if arrays and len(arrays) < len(found.images):
            image = next(file for file in found.images if file not in arrays)
            kinds = f"both arrays, {arrays[0].place}, and images, {image.place}"
            raise ValueError(f"{name}: it holds {kinds}; keep one kind")
        if not found.tables and not _has_configurations(path):
            if found.images:
                return read_folder(found, name), name
            if not any(file.name.lower().endswith(_TABLES) for file, _ in found.others):
                others = shortened([f"{file.place}, {why}" for file, why in found.others], 3)
                raise ValueError(f"{name}: it holds no data set that can be read ({others or 'no files'}); {_KINDS}")
    if path.exists() and set("*?[]") & set(str(path)):
        raise ValueError(f"{name}: datasets takes a path with a character of *?[] for a pattern; rename the folder")
    try:
        if path.is_file() and not is_archive:
            return datasets.load_dataset("parquet", data_files={"train": str(path)}), name
        if saved:
            loaded = datasets.load_from_disk(path)
            return loaded if isinstance(loaded, dict) else {"train": loaded}, name
        splits = datasets.load_dataset(str(path) if path.exists() else name, config_name)
    except Exception as error:  # each format has a library with errors of its own
        cause = first_line(error.__cause__ if isinstance(error, DatasetGenerationError) else error)
        if not path.exists():
            message = f"there is no such folder, and the Hub has no such data set ({cause}); check the spelling"
            raise FileNotFoundError(f"{name}: {message}") from error
        raise ValueError(f"{name}: it holds no data set that can be read ({cause}); {_KINDS}") from error
    if found.images:
        _warn_of_unused(found, splits, name)
    return splits, name


def _has_configurations(path: Path) -> bool:
    """Whether the README of a data set says which of its files belong to it, as that of a data set on the Hub."""
    with contextlib.suppress(Exception):  # there is none, or none that can be read
        configurations = metadata_load(path / "README.md")["configs"]
        return any({"data_files", "data_dir"} & set(configuration) for configuration in configurations)
    return False


def _warn_of_unused(found: Listing, splits: dict[str, datasets.Dataset], name: str) -> None:
    """Names the images of a folder that are in no split of what `datasets` read."""
    used = set()
    for rows in splits.values():
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                used |= {entry["path"] for entry in column_of(rows, column).to_pylist() if entry}
    unused = [image.place for image in found.images if image.path not in used]
    if unused:
        reason = "as its parquet files or its README define the data set"
        warnings.warn(f"{name}: {len(unused)} images are not used, {reason} ({shortened(unused)})", stacklevel=3)


def column_of(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    return rows.select_columns(column).with_format("arrow")[:][column]
