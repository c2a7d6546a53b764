"""Encodes rows by a frozen model once, in shares of all processes."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import datasets
import torch

from hf_genmod.processes import on_each, processes

_PART = 2**14  # rows in a file


def encode_once(
    rows: dict[str, list], encode: Callable[[dict], dict], feature: datasets.List, kind: str, key: str, batch_size: int
) -> datasets.Dataset:
    """The column "encoded", which `encode` returns for batches of rows: computed in files of 16,384 rows, each by one
    process, or read from the folder `kind` of the cache of `datasets`. What an interruption leaves is used again. The
    `key` is a hash of all that the result depends on."""
    folder = cache_folder(kind)
    table, state = datasets.Dataset.from_dict(rows), processes()
    if not state.is_main_process:
        datasets.disable_progress_bars()

    def part(start: int) -> datasets.Dataset:
        return table.select(range(start, min(start + _PART, len(table)))).map(
            encode,
            batched=True,
            batch_size=batch_size,
            remove_columns=list(rows),
            features=datasets.Features({"encoded": feature}),
            cache_file_name=str(folder / f"{key}-{start}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=f"{key}-{start}",
            desc=f"Encoding {kind}",
        )

    def share() -> None:
        for start in starts[state.process_index :: state.num_processes]:
            part(start)

    starts = range(0, len(table), _PART)
    on_each(share)
    return datasets.concatenate_datasets([part(start) for start in starts]).with_format("torch")


def cache_folder(kind: str) -> Path:
    """A folder of this package in the cache of `datasets`."""
    folder = Path(datasets.config.HF_DATASETS_CACHE, "hf_genmod", kind)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def weights_fingerprint(model: torch.nn.Module) -> str:
    """A hash of the weights of a model."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
