"""Tables and texts beside images: metadata.jsonl, metadata.csv, metadata.parquet, and captions in .txt files."""

import csv
import difflib
import io
import json
import os
import re
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from hf_genmod.data.files import File, composed
from hf_genmod.errors import LFS_POINTER, counted, first_line, refuse_lfs_pointers

# The last of each are what a WebDataset calls them.
CAPTION_COLUMNS, LABEL_COLUMNS = ("text", "caption", "captions", "txt"), ("label", "labels", "class", "cls")
SPLIT_COLUMNS = ("split", "subset", "partition")


def read_text(path: str) -> str:
    """The text of a file, without a byte order mark. Raises a `ValueError` with the line if it is not UTF-8."""
    with open(path, "rb") as file:
        content = file.read()
    if content.startswith(LFS_POINTER):
        refuse_lfs_pointers(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: the text is not UTF-8; save the file as UTF-8") from error


def read_rows(path: str) -> list[tuple[str, dict]]:
    """The rows of a metadata file, each with its file and line for errors."""
    read = {"jsonl": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows}[path.lower().rpartition(".")[2]]
    return [(f"{path}, line {line}", row) for line, row in read(path)]


def _json_rows(path: str) -> list[tuple[int, dict]]:
    rows = []
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if text.strip():
            try:
                row = json.loads(text, object_pairs_hook=_row)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {line}: no JSON that can be read ({error}); correct the line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f'{path}, line {line}: it is not of the form {{"file_name": "1.png", ...}}')
            rows.append((line, row))
    return rows


def _row(cells: list[tuple]) -> dict:
    """Keys with their values. Raises a `ValueError` if a key is there twice, as one value would be lost."""
    if twice := [key for key, count in Counter(key for key, _ in cells).items() if count > 1]:
        raise ValueError(f"{twice[0]!r} is in it twice")
    return dict(cells)


def _csv_rows(path: str) -> list[tuple[int, dict]]:
    """The rows of a table, its cells strings, or `None` if they are empty. Labels are integers if all of them are."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True, skipinitialspace=True)
    lines = []
    try:
        for cells in reader:
            if cells:
                lines.append((reader.line_num, cells))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; correct the line") from error
    if not lines:
        return []
    (line, names), *lines = lines
    names = [name.strip() for name in names]
    if len(names) == 1 and (other := re.search("[;|\t]", names[0])):
        raise ValueError(f"{path}, line {line}: its columns are separated by {other[0]!r}; separate them by commas")
    try:
        _row([(name, None) for name in names])
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: the column {error}; rename or remove one") from error
    for line, cells in lines:
        if len(cells) != len(names):
            reason = f"{counted(len(cells), 'cell')}, not the {len(names)} of the first line"
            raise ValueError(f'{path}, line {line}: {reason}; put texts with a comma or line break in "quotes"')
    columns = [[cell or None for cell in cells] for cells in zip(*(cells for _, cells in lines), strict=True)]
    for name, column in zip(names, columns, strict=False):
        if name in LABEL_COLUMNS and all(
            re.fullmatch(r"0|-?[1-9]\d{0,17}", cell) for cell in column if cell is not None
        ):
            column[:] = [None if cell is None else int(cell) for cell in column]
    rows = zip(*columns, strict=True)
    return [(line, dict(zip(names, row, strict=True))) for (line, _), row in zip(lines, rows, strict=True)]


def _parquet_rows(path: str) -> list[tuple[int, dict]]:
    refuse_lfs_pointers(path)
    try:
        return list(enumerate(pq.read_table(path).to_pylist(), 1))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: no parquet file that can be read ({first_line(error)}); write it again") from error


def images_of(row: dict, where: str, metadata: File) -> dict[str, tuple[str, ...]]:
    """
    The images that a row names: for each column of images, the folders and the name of the file in the data set.
    "file_name" is the column "image", "mask_file_name" the column "mask".

    Raises:
        ValueError: If the row names no image, or one outside the folder of the metadata file.
    """
    named = {key[: -len("_file_name")] or "image": key for key in row if re.fullmatch(r"(.+_)?file_name", key)}
    if not named:
        columns = ", ".join(map(repr, row))
        close = difflib.get_close_matches("file_name", map(str, row), n=1, cutoff=0.5)
        remedy = f"rename {close[0]!r}, if it is this" if close else "call the column of the names of the images so"
        place = where if metadata.name.lower().endswith(".jsonl") else metadata.path  # which has one header
        raise ValueError(f"{place}: no column file_name says what it describes, of {columns}; {remedy}")
    places = {}
    for column, key in named.items():
        if column in row:
            raise ValueError(f"{where}: the images of {key} would replace the column {column!r}; rename the latter")
        name = row[key]
        if name is None and len(named) > 1:
            continue
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where}: {key} is {name!r}, not the name of a file")
        place = os.path.normpath(name.replace("\\", "/")).replace("\\", "/")
        if place.startswith(("/", "../")) or place in (".", "..") or re.match(r"\w+:", place):
            raise ValueError(f"{where}: {key} is {name!r}; give a path below the folder of the metadata file")
        places[column] = (*map(composed, (*metadata.folders, *place.split("/"))),)
    return places
