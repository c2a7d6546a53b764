"""Fréchet and kernel distance between sets of features."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Count, mean and covariance of features, in fp64."""

    count: int  # n
    mean: Tensor  # μ, (d,)
    covariance: Tensor  # Σ = Σ_i (f_i - μ)(f_i - μ)ᵀ / (n - 1), (d, d)

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """The statistics of features (n, d) with n ≥ 1. Raises a `ValueError` for another shape or features that are
        not finite."""
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"features: shape {tuple(features.shape)}; give (n, d) with at least one row.")
        features = features.detach().cpu().double()
        num_bad = int((~features.isfinite()).any(dim=1).sum())
        if num_bad:
            raise ValueError(f"features: {num_bad} of {len(features)} rows are not finite; look at those images.")
        centered = features - features.mean(dim=0)
        return cls(len(features), features.mean(dim=0), centered.T @ centered / (len(features) - 1))


def frechet_distance(a: Tensor | FeatureStatistics, b: Tensor | FeatureStatistics) -> float:
    """
    The Fréchet distance of two sets of features, each taken as a Gaussian:

        d² = ‖μ_a - μ_b‖² + Tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^{1/2})

    (Dowson and Landau 1982; for generated images Heusel et al. 2017, Eq. 6). It decreases with the number of features,
    so it can only be compared at equal counts.

    Args:
        a, b (`torch.Tensor` or `FeatureStatistics`): Features (n, d) with n > d, or their statistics.

    Returns:
        `float`: d², at least 0, in squared units of the features.

    Raises:
        `ValueError`: If there are not more features than dimensions (the covariance is singular), d differs, or
            features are not finite.
    """
    a, b = (x if isinstance(x, FeatureStatistics) else FeatureStatistics.of(x) for x in (a, b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features: {len(a.mean)} and {len(b.mean)} dimensions; use one feature function for both.")
    for statistics in (a, b):
        if statistics.count <= len(statistics.mean):
            raise ValueError(
                f"features: {statistics.count} samples of {len(statistics.mean)} dimensions have a singular "
                f"covariance; give at least {len(statistics.mean) + 1} samples."
            )
    # With Σ = R Rᵀ, Tr (Σ_a Σ_b)^{1/2} is the sum of the singular values of R_aᵀ R_b. A root of the product would have
    # small eigenvalues that rounding makes negative or complex.
    root_a, root_b = (_root(statistics.covariance) for statistics in (a, b))
    trace_of_root = torch.linalg.svdvals(root_a.T @ root_b).sum()
    d2 = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root
    return max(d2.item(), 0.0)


def kernel_distance(a: Tensor, b: Tensor, batch_size: int = 2048) -> float:
    """
    The kernel distance of two sets of features, the squared maximum mean discrepancy:

        MMD² = E k(a, a') + E k(b, b') - 2 E k(a, b),   k(x, y) = (xᵀy / d + 1)³

    (Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401, section 4). The estimate is unbiased: unlike the Fréchet
    distance it does not decrease with the number of features, and may be below 0.

    Args:
        a, b (`torch.Tensor`): Features (n, d) and (m, d), at least two of each.
        batch_size (`int`, defaults to 2048): The number of rows of the kernel matrix that are computed at once.

    Raises:
        `ValueError`: If there are too few features, d differs, or features are not finite.
    """
    a, b = checked_features(a, b)

    def sum_of_kernel(x, y):
        return sum(((part @ y.T / x.shape[1] + 1) ** 3).sum() for part in x.split(batch_size))

    def mean_of_pairs(x):  # of two different features
        of_itself = ((x * x).sum(dim=1) / x.shape[1] + 1).pow(3).sum()
        return (sum_of_kernel(x, x) - of_itself) / (len(x) * (len(x) - 1))

    return (mean_of_pairs(a) + mean_of_pairs(b) - 2 * (sum_of_kernel(a, b) / (len(a) * len(b)))).item()


def checked_features(a: Tensor, b: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Features in fp64 on the CPU. Raises a `ValueError` for fewer than `least` of either, another d, or features that
    are not finite."""
    for x in (a, b):
        if x.ndim != 2 or len(x) < least:
            raise ValueError(f"features: shape {tuple(x.shape)}; give (n, d) of at least {least} images.")
        if not x.isfinite().all():
            raise ValueError("features: some are not finite; look at those images.")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features: {a.shape[1]} and {b.shape[1]} dimensions; use one feature function for both.")
    return a.detach().cpu().double(), b.detach().cpu().double()


def _root(covariance: Tensor) -> Tensor:
    """R with R Rᵀ = `covariance`. Unlike Cholesky's, it exists for a singular covariance too (a dead feature)."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    return eigenvectors * eigenvalues.clamp(min=0).sqrt()
