"""Encodes rows by a frozen model once."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import datasets
import torch

from hf_genmod.processes import processes


def encode_once(
    rows: dict[str, list], encode: Callable[[dict], dict], feature: datasets.List, kind: str, key: str, batch_size: int
) -> datasets.Dataset:
    """The column "encoded", which `encode` returns for batches of rows: computed by the main process, or read from
    the folder `kind` of the cache of `datasets`. The `key` is a hash of all that the result depends on."""
    folder = Path(datasets.config.HF_DATASETS_CACHE, "hf_genmod", kind)
    folder.mkdir(parents=True, exist_ok=True)
    with processes().main_process_first():
        encoded = datasets.Dataset.from_dict(rows).map(
            encode,
            batched=True,
            batch_size=batch_size,
            remove_columns=list(rows),
            features=datasets.Features({"encoded": feature}),
            cache_file_name=str(folder / f"{key}-encoded.arrow"),  # earlier versions: {key}.arrow
            load_from_cache_file=True,
            new_fingerprint=key,
            desc=f"Encoding {kind}",
        )
    return encoded.with_format("torch")


def weights_fingerprint(model: torch.nn.Module) -> str:
    """A hash of the weights of a model."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
