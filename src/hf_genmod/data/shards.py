"""The rows of parquet files and WebDatasets, read block by block from a disk, an address or the Hub."""

import collections
import copy
import functools
import hashlib
import itertools
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hf_genmod.data.files import image_endings
from hf_genmod.data.metadata import LABEL_COLUMNS
from hf_genmod.data.remote import ending_of, opened, version
from hf_genmod.data.web_dataset import BLOCK, BLOCK_BYTES, index_of_samples, read_samples
from hf_genmod.errors import counted, first_line, shortened

BUFFER = 2**29  # bytes of the blocks that a process keeps

_LOCK = threading.Lock()


class Shards:
    """
    The rows of shards, without those of shards that cannot be read. Blocks of rows, the row groups of parquet files or
    up to 256 samples and 4 MiB of a WebDataset, are read as a whole; up to 512 MiB of blocks, or two and
    a half blocks if that is more, are kept.

    Args:
        paths (`list[str]`): The shards.
        on_bad_image (`str`): With "skip", shards that cannot be read are left out, with a warning.
        label_column (`str`, *optional*): The column of labels, if it has an unusual name.

    Attributes:
        head (`datasets.Dataset`): The first rows, which tell the columns.
        columns (`list[str]` or `None`): The columns to read, by default all.
        sizes (`np.ndarray`): The number of rows in each block, `int64` (blocks,).
        num_bytes (`np.ndarray`): The bytes of each block, `int64` (blocks,).
        skipped (`list[str]`): Which shards were left out, and why.
        fingerprint (`str`): Hash of the names of the shards and the places and bytes of their blocks.

    Raises:
        ValueError: If a shard cannot be read (with "skip", if none can), or a block is too large to be kept.
    """

    def __init__(self, paths: list[str], on_bad_image: str = "error", label_column: str | None = None):
        _footer.cache_clear()  # of files that have been written again
        index = functools.partial(_tried, functools.partial(_index, label_column=label_column))
        with ThreadPoolExecutor(8) as threads:
            found = dict(zip(paths, threads.map(index, paths), strict=True))
        self.skipped = [f"{path}: {why}" for path, why in found.items() if isinstance(why, str)]
        remedy = "repair or remove it, or go on without such shards by --on_bad_image skip"
        if self.skipped and (on_bad_image != "skip" or len(self.skipped) == len(paths)):
            raise ValueError(f"{self.skipped[0]} ({len(self.skipped)} of {counted(len(paths), 'shard')}); {remedy}")
        for shard in self.skipped:
            warnings.warn(f"{shard}; it is left out", stacklevel=4)
        indices = {path: index for path, index in found.items() if not isinstance(index, str) and index.blocks}
        if not indices:
            raise ValueError(f"{paths[0]}: it has no rows; add them or remove the file")
        self._paths, self._indices = list(indices), list(indices.values())
        blocks = np.concatenate([index.blocks for index in self._indices])
        self._shard = np.repeat(np.arange(len(indices)), [len(index.blocks) for index in self._indices])
        self._place, self.num_bytes, self.sizes = blocks.T
        self._first = np.zeros_like(self.sizes)  # the first row of each block that counts
        self._ends = self.sizes.cumsum()
        if (most := self.num_bytes.max()) > BUFFER:
            path = self._paths[self._shard[block := self.num_bytes.argmax()]]
            what, remedy = "sample", "store smaller images"
            if ending_of(path) == ".parquet":
                size = max(1, int(self.sizes[block]) * BUFFER // (256 * int(most)))
                what, remedy = "row group", f"write it again with smaller ones (row_group_size={size} of pyarrow)"
            large = f"it has a {what} of {most / 2**20:,.0f} MiB, and at most {BUFFER // 2**20} can be kept"
            raise ValueError(f"{path}: {large}; {remedy}")
        names = repr([os.path.basename(path) for path in self._paths]).encode()
        self.fingerprint = hashlib.blake2b(names + blocks.tobytes(), digest_size=8).hexdigest()
        self._kept, self._num_kept_bytes, self._lost, self.columns = collections.OrderedDict(), 0, {}, None
        heads = (_tried(self._head, shard) for shard in range(len(indices)))
        if isinstance(head := next(heads), str) and on_bad_image != "skip":
            raise ValueError(f"{self._paths[0]}: {head}; {remedy}")
        self.head = next((other for other in itertools.chain([head], heads) if not isinstance(other, str)), None)
        if self.head is None:
            raise ValueError(f"{self._paths[0]}: {head}, and none of the others can be read")
        for path, index in indices.items():
            if index.columns and (missing := set(self.head.column_names) ^ set(index.columns)):
                both = f"{path} and {self._paths[0]} differ in their columns {shortened(sorted(missing))}"
                raise ValueError(f"{both}; give the shards of one data set")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self):
        return {**vars(self), "_kept": collections.OrderedDict(), "_num_kept_bytes": 0}

    def __getitem__(self, number: int) -> dict | ValueError:
        """The `columns` of a row; if it or its block cannot be read, the reason."""
        block, row = self._locate(number)
        with _LOCK:
            if block not in self._kept and block not in self._lost:
                self._read(block)
            if block in self._lost:
                return self._lost[block]
            self._kept.move_to_end(block)
            return self._kept[block][row]

    def _locate(self, number: int) -> tuple[int, int]:
        """The block of a row, and its place there."""
        block = int(self._ends.searchsorted(number, side="right"))
        return block, int(self._first[block] + number - self._ends[block] + self.sizes[block])

    def _read(self, block: int):
        path, place, num_bytes = self._paths[self._shard[block]], int(self._place[block]), int(self.num_bytes[block])
        read = _read_parquet if ending_of(path) == ".parquet" else read_samples
        if isinstance(rows := _tried(read, path, place, num_bytes, self.columns), str):
            self._lost[block] = ValueError(rows)
            return
        self._kept[block] = rows
        self._num_kept_bytes += num_bytes
        worker = torch.utils.data.get_worker_info()
        most = max(BUFFER // (worker.num_workers if worker else 1), 5 * int(self.num_bytes.max()) // 2)
        while self._num_kept_bytes > most:
            self._num_kept_bytes -= self.num_bytes[self._kept.popitem(last=False)[0]]

    def _head(self, shard: int) -> datasets.Dataset:
        path, block = self._paths[shard], self._shard.searchsorted(shard)
        if ending_of(path) == ".parquet":
            with opened(path) as file:
                batches = pq.ParquetFile(file).iter_batches(100)
                return datasets.Dataset(pa.Table.from_batches([next(batches)]))
        samples = read_samples(path, int(self._place[block]), int(self.num_bytes[block]))
        rows = [sample for sample in samples if isinstance(sample, dict)]
        if not rows:
            raise samples[0]
        names = dict.fromkeys(name for row in rows for name in row)
        head = datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
        for name in names:
            if f".{name.rpartition('.')[2]}" in image_endings():
                head = head.cast_column(name, datasets.Image(decode=False))
        return head

    def labels(self, column: str) -> datasets.Dataset:
        """The column of labels of all rows, or of the first rows if its type cannot hold labels."""
        if column not in self._indices[0].labels.column_names:
            return self.head.select_columns(column)
        try:
            tables = [index.labels.select([column]) for index in self._indices]
            table = pa.concat_tables(tables, promote_options="permissive").replace_schema_metadata(None)
        except (KeyError, pa.ArrowException) as error:
            kinds = f"the shards have labels of several types in the column {column!r}"
            raise ValueError(f"{self._paths[0]}: {kinds} ({first_line(error)}); give all of them one type") from error
        features = datasets.Features({column: self.head.features[column]})
        return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))

    def where(self, number: int) -> str:
        block, row = self._locate(number)
        before = (self._shard == self._shard[block]) & (np.arange(len(self.sizes)) < block)
        return f"row {row + (self._first + self.sizes)[before].sum()} of {self._paths[self._shard[block]]}"

    def shard_of(self, number: int) -> str:
        return self._paths[self._shard[self._locate(number)[0]]]

    def after(self, number: int) -> Iterator[int]:
        """The rows after a row, in a circle, without those of blocks that are known to be unreadable. They end when
        four more blocks cannot be read, as a server may be down."""
        most = len(self._lost) + 4
        for other in itertools.chain(range(number + 1, len(self)), range(number)):
            if len(self._lost) >= most:
                return
            if self._locate(other)[0] not in self._lost:
                yield other

    def is_lost(self, number: int) -> bool:
        """Whether the block of a row could not be read."""
        return self._locate(number)[0] in self._lost

    def spread(self, count: int) -> np.ndarray:
        """How many rows to take from the start of each block for a sample of `count`, from 16 blocks or more."""
        share, taken = max(1, -(-count // 16)), np.zeros_like(self.sizes)
        blocks = np.random.default_rng(0).permutation(len(taken)).tolist()
        left = min(count, len(self))
        while left:
            for block in blocks:
                more = min(share, left, int(self.sizes[block] - taken[block]))
                taken[block] += more
                left -= more
        return taken

    def rows_of(self, taken: np.ndarray) -> np.ndarray:
        """The numbers of the rows that `spread` took."""
        starts = self._ends - self.sizes
        return np.concatenate([np.arange(start, start + n) for start, n in zip(starts, taken, strict=True) if n])

    def of_columns(self, columns: list[str]) -> "Shards":
        """The shards with other columns."""
        part = copy.copy(self)  # which has read nothing
        part.columns = columns
        return part

    def forget(self) -> None:
        """Drops the blocks that are kept."""
        self._kept, self._num_kept_bytes = collections.OrderedDict(), 0

    def without(self, taken: np.ndarray) -> "Shards":
        """The shards without the rows that `spread` took."""
        rest = copy.copy(self)  # which has read nothing
        rest._first, rest.sizes = self._first + taken, self.sizes - taken
        rest._ends = rest.sizes.cumsum()
        return rest


class _Index(NamedTuple):
    """What is known of a shard before it is read."""

    blocks: list[tuple[int, int, int]]  # the place of each block (row group, or first byte), its bytes, its rows
    labels: pa.Table  # the columns that may hold labels
    columns: list[str]  # of a parquet file


def _tried(function: Callable, *arguments):
    """The result of a function, or why it failed."""
    try:
        return function(*arguments)
    except Exception as error:  # of Arrow, tarfile, fsspec, or what each file system raises
        if isinstance(error, MemoryError):
            raise
        return f"the shard cannot be read ({first_line(error)})"


@functools.lru_cache(maxsize=64)
def _footer(path: str) -> pq.FileMetaData:
    with opened(path) as file:
        return pq.read_metadata(file)


def _read_parquet(path: str, place: int, _: int, columns: list[str] | None) -> list[dict]:
    with opened(path) as file:
        return pq.ParquetFile(file, metadata=_footer(path)).read_row_group(place, columns).to_pylist()


def _index(path: str, label_column: str | None) -> _Index:
    names = {*LABEL_COLUMNS, label_column} - {None}
    if ending_of(path) == ".parquet":
        footer = _footer(path)
        groups = map(footer.row_group, range(footer.num_row_groups))
        blocks = [(i, group.total_byte_size, group.num_rows) for i, group in enumerate(groups) if group.num_rows]
        with opened(path) as file:
            schema = pq.ParquetFile(file, metadata=footer).schema_arrow
            features = datasets.Features.from_arrow_schema(schema)
            names = [n for n, feature in features.items() if n in names or isinstance(feature, datasets.ClassLabel)]
            names = [n for n in names if not pa.types.is_nested(schema.field(n).type)]
            return _Index(blocks, pq.ParquetFile(file, metadata=footer).read(names), schema.names)
    cache = Path(datasets.config.HF_DATASETS_CACHE, "hf_genmod", "shards")
    key = f"{path} {version(path)} {sorted(names)} {BLOCK} {BLOCK_BYTES}"
    file = cache / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
    else:
        known = index_of_samples(path, names)
        cache.mkdir(parents=True, exist_ok=True)
        written = file.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(known), encoding="utf-8")
        written.replace(file)
    return _Index([*map(tuple, known["blocks"])], pa.table(known["labels"]), [])
