"""Encodes the images of a stream once, into parquet files that are read as a stream."""

import functools
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.utils import tqdm
from filelock import FileLock

from hf_genmod.data.encoding import cache_folder
from hf_genmod.data.stream import StreamedPictures
from hf_genmod.errors import counted
from hf_genmod.processes import on_each, processes

_ROWS, _BLOCK = 2**12, 2**20  # rows in a file, bytes in a block of it
_SCHEMA = pa.schema({"encoded": pa.binary(), "label": pa.int64(), "caption": pa.string()})


def encode_stream(
    pictures: StreamedPictures,
    encode: Callable[[torch.Tensor], list[bytes]],
    num_bytes: int,
    key: str,
    batch_size: int,
) -> list[str]:
    """
    Parquet files of the rows of a stream in their order: in the column "encoded" what `encode` makes of the image, the
    "label", and the "caption" as JSON. Each file of 4,096 rows is written by one process, or found in the cache of
    `datasets`. What an interruption leaves is used again.

    Args:
        pictures ([`StreamedPictures`]): The images. With "skip", the next usable image takes the place of one that
            cannot be used; if its shard could not be read, its file is written anew the next time.
        encode (`Callable`): Encodes images, (n, C, H, W) in [-1, 1].
        num_bytes (`int`): What an encoded image takes, about.
        key (`str`): A hash of all that the result depends on.
        batch_size (`int`): How many images to encode together.

    Raises:
        ValueError: If an image cannot be used, or the disk has no room.
    """
    folder, state, skip = cache_folder("latents"), processes(), pictures.on_bad_image == "skip"
    parts = _split(range(len(pictures)), _ROWS)
    rows = {folder / f"{key}-{part.start}-{part.stop}.parquet": part for part in parts}
    usable = {"nothing", "images"} if skip else {"nothing"}
    missing = {file for file in rows if _left_out(file) not in usable}
    mine = list(rows)[state.process_index :: state.num_processes]
    progress = tqdm(
        total=sum(len(rows[file]) for file in mine if file in missing), desc="Encoding latents", unit=" images",
        disable=None if state.is_main_process else True,
    )  # fmt: skip

    def check_room() -> None:
        count = sum(len(rows[file]) for file in missing)
        need, free = count * num_bytes / 2**20, shutil.disk_usage(folder).free / 2**20
        what = f"the latents of {counted(count, 'image')} of {pictures.name} take {need:,.1f} MiB in {folder}"
        if need > free:
            remedy = "set HF_DATASETS_CACHE to a folder of another disk, or leave out --cache_latents"
            raise ValueError(f"cache_latents: {what}, where {free:,.1f} MiB are free; {remedy}")
        if missing and state.is_main_process:
            print(f"{what}, where {free:,.0f} MiB are free", file=sys.stderr)

    def write(files: Sequence[Path], usable: set[str]) -> None:
        for file in (file for file in files if file in missing):
            with FileLock(f"{file}.lock"):  # as another run may write it
                if _left_out(file) not in usable:
                    blocks = _split(rows[file], max(1, _BLOCK // num_bytes))
                    _write(file, blocks, functools.partial(_encode_rows, pictures, encode), batch_size, progress)
            pictures.shards.forget()

    with progress:
        on_each(check_room)
        for i in range(-(-len(rows) // state.num_processes)):  # what fails on one process ends all after one file
            on_each(functools.partial(write, mine[i : i + 1], usable))
        # Those that processes of another machine have written there.
        on_each(functools.partial(write, sorted(missing), {"nothing", "images", "shards"}))
    return [*map(str, rows)]


def _write(file: Path, blocks: list[range], encode_rows: Callable, batch_size: int, progress: tqdm) -> None:
    partial, left_out = file.with_suffix(".partial"), set()
    try:
        with pq.ParquetWriter(
            partial, _SCHEMA, compression="none", use_dictionary=False, write_statistics=False
        ) as writer:
            for block in blocks:
                tables = [encode_rows(batch, left_out) for batch in _split(block, batch_size)]
                writer.write_table(pa.concat_tables(tables))
                progress.update(len(block))
            if left_out:
                writer.add_key_value_metadata({"left_out": "shards" if "shards" in left_out else "images"})
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _encode_rows(pictures: StreamedPictures, encode: Callable, rows: range, left_out: set[str]) -> pa.Table:
    """The table of rows. To `left_out` is added whether "images" could not be used, or "shards" not be read."""
    batch = pictures.__getitems__(rows)
    if "failure" in batch:
        skip = pictures.on_bad_image == "skip"
        remedy = "and the same command goes" if skip else "or leave such out with --on_bad_image skip, which goes"
        raise ValueError(f"{batch['failure']}; repair it, {remedy} on from there")
    for reason in dict.fromkeys(batch.get("unusable", ())):
        left_out.add("shards" if any(map(pictures.shards.is_lost, rows)) else "images")
        tqdm.write(f"{reason}; another image takes its place", file=sys.stderr)
    labels = batch["class_labels"].tolist() if pictures.labels is not None else [None] * len(rows)
    captions = batch.get("captions", [None] * len(rows))
    columns = [encode(pictures.x_0(batch)), labels, [*map(json.dumps, captions)]]
    return pa.table(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA)


def _left_out(file: Path) -> str:
    """What a file lacks: "nothing", unusable "images", images of "shards" that could not be read, or "everything"."""
    try:
        return pq.read_metadata(file).metadata.get(b"left_out", b"nothing").decode()
    except (OSError, pa.ArrowException):
        return "everything"


def _split(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]
