"""Finds the images of a folder, file or data set on the Hub."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import metadata_load

from hf_genmod.data.archives import is_web_dataset, list_images, refuse_faulty_samples, shown, unpacked
from hf_genmod.data.arrays import separated
from hf_genmod.data.files import ARCHIVE, ARRAYS, File, Listing, dangling
from hf_genmod.data.folder import read_folder, warn_of_others
from hf_genmod.data.formats import container
from hf_genmod.data.metadata import CAPTION_COLUMNS, LABEL_COLUMNS
from hf_genmod.errors import a_or_an, first_line, refuse_lfs_pointers, shortened
from hf_genmod.hub import can_be_id, did_you_mean, why_missing

SHAPES_SPLITS = {"train": (8192, 0), "test": (2048, 1)}  # number of images, seed
ARRAY_TYPES = (datasets.Array2D, datasets.Array3D)  # types of columns

_TABLES = (".csv", ".json", ".jsonl", ".lance", ".tsv")  # which `datasets` may read
_TABLES += (".h5", ".hdf5") if find_spec("h5py") else ()
_LOGGING = ("arrow", "csv", "json", "parquet")  # modules of `datasets`
_ADDRESS = re.compile(
    r"(?:(?:(?:https?://)?(?:huggingface\.co|hf\.co)/|hf://)(?:datasets/)?|datasets/)([\w.-]+/[\w.-]+)"
)
_KINDS = "it should hold images or .npy files, in class folders or not, images with a metadata.jsonl, or parquet files"


class Found(NamedTuple):
    """A data set whose files are known already."""

    splits: dict[str, datasets.Dataset]
    name: str  # what errors call it


def splits_of(
    dataset: str | Path | Found, config_name: str | None = None, array_axes: str | None = None
) -> dict[str, int]:
    """The number of images in each split of a data set, as `load_pictures` takes it."""
    if dataset == "shapes":
        refuse_unused("shapes", config_name, array_axes)
        return {split: count for split, (count, _) in SHAPES_SPLITS.items()}
    return {split: len(rows) for split, rows in find_splits(dataset, config_name, array_axes)[0].items()}


def find_splits(
    dataset: str | Path | datasets.Dataset | datasets.DatasetDict | Found,
    config_name: str | None = None,
    array_axes: str | None = None,
) -> Found:
    """All splits of a data set, and what errors call the data set; arguments as of `load_pictures`."""
    if isinstance(dataset, Found):
        return dataset
    if not isinstance(dataset, (str, os.PathLike)):
        splits = dataset if isinstance(dataset, dict) else {"train": dataset}
        for rows in splits.values():
            if isinstance(rows, datasets.IterableDataset):
                raise ValueError("dataset: a stream (IterableDataset) cannot be sampled; load it without streaming")
            if not isinstance(rows, datasets.Dataset):
                raise ValueError(f"dataset: {a_or_an(type(rows).__name__)}; give a path, an id or a datasets.Dataset")
            if rows.format["type"] == "custom":
                remedy = "apply it by `map`, or take it off by `reset_format`"
                raise ValueError(f"dataset: its transform would not be applied to the stored images; {remedy}")
        refuse_unused("a data set in memory", config_name, array_axes)
        return Found(splits, "the data set")
    name, path = str(dataset), Path(os.path.realpath(os.path.expanduser(dataset)))
    refuse_missing(name)
    if path.exists():
        try:
            return Found(_local_splits(path, name, config_name, array_axes), name)
        except ValueError as error:
            raise ValueError(shown(str(error))) from error
    refuse_unused(name, array_axes=array_axes)
    splits = _splits_by_datasets(name, name, config_name)
    return Found({split: _with_fields(rows) for split, rows in splits.items()}, name)


def refuse_missing(name: str) -> None:
    """Raises if there is neither a folder or file of this name nor a data set on the Hub."""
    if not name.strip():
        raise ValueError("dataset: it is empty; give a folder, a file or an id on the Hub")
    if os.path.exists(os.path.realpath(os.path.expanduser(name))):
        return
    if link := dangling(os.path.expanduser(name)):
        raise FileNotFoundError(f"{name}: {link}; correct the link")
    if address := _ADDRESS.match(name):
        raise FileNotFoundError(f"{name}: there is no such folder; give the id of the data set, {address[1]}")
    if "://" in name:
        raise FileNotFoundError(f"{name}: an address; download what is there, and give its path")
    if not can_be_id(name):
        raise FileNotFoundError(f"{name}: there is no such folder or file; {did_you_mean(name) or 'check the path'}")
    if reason := why_missing(name, "dataset"):
        raise FileNotFoundError(f"{name}: there is no such folder, and {reason}")


def refuse_unused(name: str, config_name: str | None = None, array_axes: str | None = None) -> None:
    """Raises a `ValueError` if an argument is given that says nothing of a data set of this kind."""
    if config_name is not None:
        raise ValueError(f"config_name: {name} has no configurations; leave out --config_name")
    if array_axes is not None:
        raise ValueError(f"array_axes: {name} is not read from .npy files; leave out --array_axes")


def _local_splits(path: Path, name: str, config_name: str | None, array_axes: str | None):
    """The splits of a folder or file."""
    refuse_lfs_pointers(path)
    is_array = path.is_file() and path.suffix.lower() in ARRAYS
    is_archive = path.is_file() and ARCHIVE.fullmatch(path.name) is not None
    is_parquet = path.is_file() and path.suffix.lower() == ".parquet"
    if path.is_file() and not is_parquet and not is_archive and not is_array:
        what = "a file, but neither a parquet file, a .npy file nor an archive"
        what = f"{what}; give a folder of images, an archive of one, or a .parquet or .npy file"
        raise ValueError(f"{name}: {container(path) or what}")
    if is_archive and not (is_web := is_web_dataset(str(path))):
        path = unpacked(str(path))
    is_saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    found = Listing()
    if is_array:
        found.images.append(File((), path.name, str(path)))
    elif is_parquet or (is_archive and is_web):
        found.tables.append(File((), path.name, str(path)))
    elif path.is_dir():
        found = list_images(path)
    arrays = [file for file in found.images if file.path.lower().endswith(ARRAYS)]
    if arrays and len(arrays) < len(found.images):
        image = next(file for file in found.images if file not in arrays)
        kinds = f"both arrays, {arrays[0].place}, and images, {image.place}"
        raise ValueError(f"{name}: it holds {kinds}; keep one kind")
    has_configurations = _has_configurations(path)
    by_datasets = is_saved or found.tables or has_configurations
    is_read_here = bool(found.images) and not by_datasets
    has_none = is_read_here or path.is_file() or is_saved  # configurations
    refuse_unused(name, config_name if has_none else None, None if is_read_here and arrays else array_axes)
    if is_read_here:
        splits = read_folder(found, name)
        return separated(splits, array_axes) if arrays else splits
    tables = found.tables or [file for file, _ in found.others if file.name.lower().endswith(_TABLES)]
    if not by_datasets and not tables:
        others = shortened([f"{file.place} ({why})" for file, why in found.others], 3)
        raise ValueError(f"{name}: it holds no data set that can be read: {others or 'no files'}; {_KINDS}")
    if set("*?[]") & set(str(path)):
        raise ValueError(f"{name}: datasets takes a path with a character of *?[] for a pattern; rename the folder")
    unread = [] if has_configurations else [file for file in found.archives if file not in tables]
    if unread:
        what = f"an archive, which is not read with tables ({tables[0].place})"
        raise ValueError(f"{unread[0].path}: {what}; unpack it, or move it to another folder")
    own_tables = [] if has_configurations or is_saved else tables
    for file in own_tables if path.is_dir() else ():
        if (ending := os.path.splitext(file.name)[1]) != ending.lower():
            raise ValueError(f"{file.path}: datasets does not read {ending}; rename it to {ending.lower()}")
    refuse_lfs_pointers(path, *(file.path for file in tables))
    _refuse_several(own_tables, name)
    try:
        splits = _splits_by_datasets(path, name, config_name, found, is_saved, has_configurations)
    except ValueError as error:
        _refuse_several([*own_tables, *found.metadata], name, by_columns=True)
        for file in tables if any(is_web_dataset(file.path) for file in tables) else ():
            refuse_faulty_samples(file.path)
        if "the same data file format" in str(error):
            others = (file.place for file in (*found.images, *(file for file, _ in found.others), *tables[1:]))
            what = f"its splits hold files of several kinds, such as {tables[0].place} and {next(others)}"
            raise ValueError(f"{name}: {what}; keep one kind") from error
        raise
    return {split: _with_fields(rows) for split, rows in splits.items()}


def _splits_by_datasets(
    source: str | Path,
    name: str,
    config_name: str | None,
    found: Listing | None = None,
    is_saved: bool = False,
    has_configurations: bool = False,
):
    """The splits that `datasets` reads from a parquet file, a WebDataset, a folder of tables or one that
    `save_to_disk` wrote, or an id on the Hub. Files of a folder that it does not read are named."""
    with explained(source, name, config_name):
        if isinstance(source, Path) and source.is_file():
            kind = "parquet" if source.suffix.lower() == ".parquet" else "webdataset"
            return datasets.load_dataset(kind, data_files={"train": str(source)})
        if is_saved:
            loaded = datasets.load_from_disk(source)
            splits = loaded if isinstance(loaded, dict) else {"train": loaded}
            files = [file["filename"] for rows in splits.values() for file in rows.cache_files]
        else:
            if config_name is not None:
                _check_configuration(str(source), name, config_name)
            builder = datasets.load_dataset_builder(str(source), config_name)
            builders = [builder]
            for other in datasets.get_dataset_config_names(str(source)) if has_configurations else ():
                with contextlib.suppress(Exception):  # its files may not be there
                    builders.append(datasets.load_dataset_builder(str(source), other))
            files = [file for each in builders for files in (each.config.data_files or {}).values() for file in files]
    read = {os.path.normpath(file) for file in files}
    unread = [file for file in found.tables if file.path not in read] if found else []
    if unread and not has_configurations:
        other = next((file.place for file in (*found.tables, *found.images) if file.path in read), "other files")
        alone = "give this file alone as the data set, or " * unread[0].name.endswith(".parquet")
        remedy = f"{alone}move it to another folder"
        raise ValueError(
            f"{unread[0].path}: a table that is not read beside {other}, of another kind or split; {remedy}"
        )
    if not is_saved:
        with explained(source, name, config_name):
            builder.download_and_prepare()
            splits = builder.as_dataset()
    if found:
        _warn_of_unused(found, splits, read, name)
    return splits


@contextlib.contextmanager
def explained(source: str | Path, name: str, config_name: str | None) -> Iterator[None]:
    """A context in which errors of `datasets` are one sentence, and not logged, too."""
    loggers = [datasets.logging.get_logger(f"datasets.packaged_modules.{kind}.{kind}") for kind in _LOGGING]
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    except Exception as error:  # each format has a library with errors of its own
        if isinstance(error, ValueError) and "config" in str(error).lower():
            _check_configuration(str(source), name, config_name)
        cause = first_line(error.__cause__ if isinstance(error, DatasetGenerationError) else error)
        if not isinstance(source, Path):
            message = f"there is no such folder, and the Hub has no such data set that can be read ({cause})"
            raise FileNotFoundError(f"{name}: {message}; {did_you_mean(name) or 'check the spelling'}") from error
        raise ValueError(f"{name}: it holds no data set that can be read ({cause}); {_KINDS}") from error
    finally:
        for logger in loggers:
            logger.disabled = False


def _with_fields(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows of a WebDataset with a column for each field of its .json files, of which other files may hold one."""
    if "__key__" not in rows.features or not isinstance(rows.features.get("json"), dict):
        return rows
    taken = set(rows.column_names)
    taken |= {name for names in (CAPTION_COLUMNS, LABEL_COLUMNS) if taken & set(names) for name in names}
    rows = rows.flatten()
    fields = {column: column.removeprefix("json.") for column in rows.column_names if column.startswith("json.")}
    return rows.rename_columns({column: field for column, field in fields.items() if field not in taken})


def _refuse_several(tables: list[File], name: str, by_columns: bool = False) -> None:
    """Raises a `ValueError` if tables are of several data sets: if `save_to_disk` wrote them into folders below, or
    parquet files have other classes in a column or, with `by_columns`, other columns, other types or no rows.
    (`datasets` reads a test split that lacks a column of the training split.)"""
    described, first_of, first_type = {}, {}, {}
    for file in tables:
        folder = os.path.dirname(file.path)
        if file.folders and os.path.isfile(os.path.join(folder, "state.json")):
            remedy = f"give the folder {'/'.join(file.folders)} itself"
            raise ValueError(f"{name}: {file.place} belongs to a data set that `save_to_disk` wrote; {remedy}")
        if file.name.lower().endswith(".parquet"):
            try:
                schema, num_rows = pq.read_schema(file.path), pq.read_metadata(file.path).num_rows
                features = datasets.Features.from_arrow_schema(schema)
            except Exception as error:  # of Arrow, of the system, or of features that this version of `datasets` lacks
                reason = f"no parquet file that can be read ({first_line(error)})"
                raise ValueError(f"{file.path}: {reason}; write it again") from error
            if by_columns and not num_rows:
                raise ValueError(f"{file.path}: it has no rows; add them or remove the file")
            names = {column: getattr(feature, "names", None) for column, feature in features.items()}
            columns = [f"{column} ({shortened(its)})" if its else column for column, its in sorted(names.items())]
            described[file.place] = f"{file.place} has {shortened(columns, 20)}"
            kinds = {"": str(sorted(names))} if by_columns else {c: str(n) for c, n in names.items() if n}
            for column, kind in kinds.items():
                other, its = first_of.setdefault(column, (file.place, kind))
                if its != kind:
                    both = f"{described[other]}, {described[file.place]}"
                    remedy = "give the folder or file of one, or give all of them the same columns and classes"
                    raise ValueError(f"{name}: its parquet files are of several data sets: {both}; {remedy}")
            for field in schema if by_columns else ():
                other, its = first_type.setdefault(field.name, (file.place, field.type))
                if its != field.type:
                    types = f"{its} in {other} and {field.type} in {file.place}"
                    raise ValueError(f"{name}: its column {field.name!r} holds {types}; give all files one type")


def _has_configurations(path: Path) -> bool:
    """Whether the README of a data set says which of its files belong to it, as that of a data set on the Hub."""
    with contextlib.suppress(Exception):  # there is none, or none that can be read
        configurations = metadata_load(path / "README.md")["configs"]
        return any({"data_files", "data_dir"} & set(configuration) for configuration in configurations)
    return False


def _warn_of_unused(found: Listing, splits: dict[str, datasets.Dataset], read: set[str], name: str) -> None:
    """Names the files of a folder that `datasets` did not read, and the images that are in no split."""
    used = set()
    for rows in splits.values():
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                used |= {entry["path"] for entry in column_of(rows, column).to_pylist() if entry}
    unused = [image.place for image in found.images if image.path not in used]
    if unused:
        reason = "as its parquet files or its README define the data set"
        what = f"images that are not used, {reason} ({len(unused)}): {shortened(unused)}; move them to another folder"
        warnings.warn(f"{name}: {what}", stacklevel=3)
    others = [(file, "metadata, which is read with images alone") for file in found.metadata]
    others += [(file, "in no configuration of the README") for file in found.tables]
    warn_of_others([(file, why) for file, why in (*found.others, *others) if file.path not in read], name)


def column_of(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    return rows.select_columns(column).with_format("arrow")[:][column]


def _check_configuration(source: str, name: str, config_name: str | None) -> None:
    """Raises a `ValueError` with the names of the configurations of a data set if none is chosen of several, or one
    that does not exist. `source` is a folder or an id."""
    known = datasets.get_dataset_config_names(source)
    if config_name is None and len(known) > 1 and datasets.get_dataset_default_config_name(source) is None:
        raise ValueError(f"{name}: it has several configurations; choose one of {', '.join(known)} by --config_name")
    if config_name is not None and config_name not in known:
        raise ValueError(f"config_name: {name} has no {config_name!r}; it has {', '.join(known)}")
