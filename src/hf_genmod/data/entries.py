"""The images of a data set before they are decoded."""

import copy
import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import datasets
from datasets.utils import tqdm
from PIL import Image, UnidentifiedImageError

from hf_genmod.data.archives import shown
from hf_genmod.data.files import dangling
from hf_genmod.data.sources import ARRAY_TYPES
from hf_genmod.errors import counted
from hf_genmod.processes import processes

_CHUNK = 64  # images that a thread holds at once


class Entries:
    """Images of Pillow, arrays, or `{"bytes", "path"}`, either of which may be `None`; arguments as of
    [`PictureDataset`]."""

    def __init__(self, source: datasets.Dataset | list[Image.Image], name: str):
        self._is_array = False
        if not isinstance(source, list):
            self._is_array = isinstance(feature := source.features["image"], ARRAY_TYPES)
            # Without its type, an array of 64 bits would be read with 32.
            of_array = {"type": "numpy", "dtype": feature.dtype} if self._is_array else {"type": "arrow"}
            source = source.select_columns("image").with_format(**of_array)
        self._source, self._name, self._rows = source, name, range(len(source))

    def __len__(self) -> int:
        return len(self._rows)

    def select(self, indices: list[int]) -> "Entries":
        """Some of the entries, which errors still call by their row of the source."""
        part = copy.copy(self)
        part._rows = [self._rows[i] for i in indices]
        return part

    def _read(self, indices: Sequence[int]) -> list:
        rows = [self._rows[i] for i in indices]
        if isinstance(self._source, list):
            return [self._source[row] for row in rows]
        entries = self._source[rows]["image"]
        return entries if self._is_array else entries.to_pylist()

    def apply(self, function: Callable, indices: Sequence[int]) -> tuple[list, list[str]]:
        """`function(index, entry)` of each index, `None` for images that cannot be used, and their errors."""
        results, unusable = [], []
        for index, entry in zip(indices, self._read(indices), strict=True):
            try:
                results.append(function(index, entry))
            except Exception as error:  # Pillow raises nearly every type of error on broken files
                # EINVAL: a position far beyond the end of the file
                of_image = (None, errno.ENOENT, errno.ELOOP, errno.EINVAL)
                if isinstance(error, MemoryError) or getattr(error, "errno", None) not in of_image:
                    raise
                unknown = isinstance(error, UnidentifiedImageError)
                reason = "no image that Pillow knows" if unknown else getattr(error, "strerror", None) or str(error)
                if unknown and entry["path"] and os.path.isfile(entry["path"]) and not os.path.getsize(entry["path"]):
                    reason = "the file is empty"
                if isinstance(error, OSError) and isinstance(entry, dict) and entry["path"]:
                    reason = dangling(entry["path"]) or reason
                results.append(None)
                unusable.append(f"{self.where(index, entry)}: {reason}")
        return results, unusable

    def apply_to_all(self, function: Callable, description: str, num_threads: int) -> tuple[list, list[str]]:
        """`apply` to all indices, by threads and with a progress bar."""
        results, unusable = [], []
        chunks = [range(len(self))[i : i + _CHUNK] for i in range(0, len(self), _CHUNK)]
        progress = tqdm(
            total=len(self), desc=description, unit=" images", disable=None if processes().is_main_process else True
        )
        with ThreadPoolExecutor(num_threads) as threads, progress:
            for some, their_errors in threads.map(lambda chunk: self.apply(function, chunk), chunks):
                results += some
                unusable += their_errors
                progress.update(len(some))
        return results, unusable

    def where(self, index: int, entry=None) -> str:
        """Where an image comes from, its file or its row; an entry that is given is not read again."""
        entry = self._read([index])[0] if entry is None else entry
        is_file = isinstance(entry, dict) and entry["bytes"] is None and entry["path"]
        return shown(entry["path"]) if is_file else f"row {self._rows[index]} of {self._name}"

    def refuse(self, unusable: list[str]) -> None:
        """Raises a `ValueError` if there are images that cannot be used."""
        if unusable:
            reasons = [*dict.fromkeys(unusable)]  # of the images in a shard there is one
            reasons = "; ".join(reasons[:5]) + (f"; and {len(reasons) - 5} more" if len(reasons) > 5 else "")
            raise ValueError(
                f"{self._name}: {len(unusable)} of {counted(len(self), 'image')} cannot be used; repair or remove "
                f"{'it' if len(unusable) == 1 else 'them'}, or leave such out with --on_bad_image skip: {reasons}"
            )
