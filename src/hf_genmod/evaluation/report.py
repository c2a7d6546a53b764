"""The report of a checkpoint."""

import torch
from torch import Tensor

from hf_genmod.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance
from hf_genmod.evaluation.estimates import Estimate, Share, with_interval
from hf_genmod.evaluation.neighbours import neighbourhoods


def evaluate_features(generated: Tensor, real: Tensor, seed: int = 0) -> dict[str, "Estimate | Share"]:
    """All that features of generated pictures tell beside those of real ones.

    Args:
        generated (`torch.Tensor`): (n, d), with n of 2 (d + 1) or more: the intervals take the distance of halves.
        real (`torch.Tensor`): (m, d), of which the Fréchet distance takes all, and the others n at random, as they are
            made for as many of both.
        seed (`int`, defaults to 0): decides these, and the halves.

    Returns:
        `dict`: "frechet_distance" and "kernel_distance" with intervals, "precision", "recall", "density", "coverage".

    Raises:
        `ValueError`: too few of either, another d, or features that are not finite.
    """
    n, d = generated.shape
    for name, count, least in (("samples", n, 2 * (d + 1)), ("real pictures", len(real), d + 1)):
        if count < least:
            raise ValueError(f"{name}: {count} are too few for features of {d} dimensions; take {least} or more.")
    statistics = FeatureStatistics.of(real)
    some = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:n]]
    return {
        "frechet_distance": with_interval(lambda x: frechet_distance(x, statistics), generated, seed=seed),
        "kernel_distance": with_interval(lambda x: kernel_distance(x, some), generated, seed=seed),
        **neighbourhoods(some, generated),
    }
