"""Finds the parquet files and WebDatasets of a data set that is read as a stream."""

import os
import re
from pathlib import Path

import datasets

from hf_genmod.data.remote import ending_of, is_address
from hf_genmod.data.sources import Found, explained, refuse_missing

_KINDS = {".parquet": "parquet", ".tar": "webdataset"}


def find_shards(dataset: str | Found, config_name: str | None = None) -> Found:
    """
    The shards of each split of a data set, paths or addresses of parquet files or of WebDatasets (.tar).

    Args:
        dataset (`str`): A folder, an id on the Hub, or the path or address of files, in which `{000..127}` stands for
            these numbers, and `*` for anything where files can be listed.
        config_name (`str`, *optional*): The configuration of a data set that has several.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If it has no such shards.
    """
    if isinstance(dataset, Found):
        return dataset
    if dataset == "shapes":
        raise ValueError("streaming: the embedded shapes are drawn here, not read from shards; leave out --streaming")
    splits = {"train": _numbered(dataset)} if is_address(dataset) else _splits_by_datasets(dataset, config_name)
    if not all(splits.values()) or not splits:
        raise FileNotFoundError(f"{dataset}: there are no such files; correct the pattern")
    if others := [path for paths in splits.values() for path in paths if ending_of(path) not in _KINDS]:
        what = "neither a parquet file nor a WebDataset (.tar, not compressed), which alone are read as a stream"
        raise ValueError(f"streaming: {others[0]} is {what}; leave out --streaming, or write parquet files")
    return Found(splits, dataset)


def _splits_by_datasets(dataset: str, config_name: str | None) -> dict[str, list[str]]:
    path = os.path.realpath(os.path.expanduser(dataset))
    if not set("*{") & set(dataset) and "://" not in dataset:
        refuse_missing(dataset)
    with explained(Path(path) if os.path.isdir(path) else dataset, dataset, config_name):
        if os.path.isdir(path) or (kind := _KINDS.get(ending_of(dataset))) is None:
            builder = datasets.load_dataset_builder(path if os.path.exists(path) else dataset, config_name)
        else:
            builder = datasets.load_dataset_builder(kind, data_files={"train": _numbered(os.path.expanduser(dataset))})
    return {str(split): [*map(str, files)] for split, files in (builder.config.data_files or {}).items()}


def _numbered(pattern: str) -> list[str]:
    """The names for which a pattern such as `a-{000..127}.tar` stands."""
    if (match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)) is None:
        return [pattern]
    numbers = range(int(match[1]), int(match[2]) + 1)
    names = (f"{pattern[: match.start()]}{n:0{len(match[1])}}{pattern[match.end() :]}" for n in numbers)
    return [name for each in names for name in _numbered(each)]
