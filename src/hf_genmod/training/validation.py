"""The loss on held-out images."""

import collections
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from hf_genmod.data.randomness import batch_random
from hf_genmod.processes import on_each
from hf_genmod.training.batches import for_model
from hf_genmod.training.config import TrainingConfig

NUM_BANDS = 5  # of noise levels


@torch.no_grad()
def validation_metrics(
    model: torch.nn.Module, objective: Callable, dataset: Dataset, config: TrainingConfig, accelerator: Accelerator
) -> dict[str, float]:
    """The mean loss ("validation_loss") and metrics of a model on held-out images, always with the same noise. An
    objective that is `by_noise_level` is measured in each fifth of the timesteps, too ("validation_loss_0.0_0.2")."""
    count = len(dataset)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))  # rows may be sorted by class
    num_bands = NUM_BANDS if getattr(objective, "by_noise_level", False) else 1
    bands = torch.arange(count).tensor_split(num_bands)  # noise levels are stratified by position
    dtype = next(model.parameters()).dtype

    def sums() -> collections.Counter:
        """Those of this process, by name and band."""
        sums = collections.Counter()
        for band, positions in enumerate(bands):
            mine = positions[accelerator.process_index :: accelerator.num_processes]
            for part in mine.split(config.batch_size) if len(mine) else ():
                rng = batch_random(config.seed, 0, part, count, accelerator.device)
                batch = for_model(dataset.__getitems__(order[part].tolist()), dataset, rng, config.augmentation, dtype)
                with config.autocast(accelerator.device):
                    loss, metrics = objective(model, batch, rng)
                for name, value in {"loss": loss, **metrics}.items():
                    sums[name, band] += value.item() * len(part)
        return sums

    total = collections.Counter()
    for of_process in on_each(sums):
        total.update(of_process)  # adds
    means = {}
    for name in sorted({name for name, _ in total}):
        means[f"validation_{name}"] = sum(total[name, band] for band in range(num_bands)) / count
        for band, positions in enumerate(bands if num_bands > 1 else []):
            low, high = band / num_bands, (band + 1) / num_bands
            if len(positions):
                means[f"validation_{name}_{low:.1f}_{high:.1f}"] = total[name, band] / len(positions)
    return means
