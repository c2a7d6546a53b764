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
        """The statistics of features (n, d) with n ≥ 2. Raises a `ValueError` as `checked_features` does."""
        (features,) = checked_features(features)
        centered = features - features.mean(dim=0)
        return cls(len(features), features.mean(dim=0), centered.T @ centered / (len(features) - 1))


def frechet_distance(a: Tensor | FeatureStatistics, b: Tensor | FeatureStatistics) -> float:
    """
    The Fréchet distance of two sets of features, (n, d) with n > d, each taken as a Gaussian; in squared units:

        d² = ‖μ_a - μ_b‖² + Tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^{1/2})

    (Dowson and Landau 1982; for generated images Heusel et al. 2017, Eq. 6). It decreases with the number of features,
    so it can only be compared at equal counts.

    Raises:
        ValueError: If n ≤ d (the covariance is singular), d differs, or features are not finite.
    """
    a, b = (x if isinstance(x, FeatureStatistics) else FeatureStatistics.of(x) for x in (a, b))
    _check_same_dimension(len(a.mean), len(b.mean))
    n, d = min(a.count, b.count), len(a.mean)
    if n <= d:
        raise ValueError(f"features: {n} samples of {d} dimensions have a singular covariance; give at least {d + 1}")
    # With Σ = R Rᵀ, Tr (Σ_a Σ_b)^{1/2} is the sum of the singular values of R_aᵀ R_b. A root of the product would have
    # small eigenvalues that rounding makes negative or complex.
    root_a, root_b = (_root(statistics.covariance) for statistics in (a, b))
    trace_of_root = torch.linalg.svdvals(root_a.T @ root_b).sum()
    d2 = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root
    return max(d2.item(), 0.0)


def kernel_distance(a: Tensor, b: Tensor, batch_size: int = 2048) -> float:
    """
    The kernel distance of features (n, d) and (m, d), at least two of each: the squared maximum mean discrepancy,

        MMD² = E k(a, a') + E k(b, b') - 2 E k(a, b),   k(x, y) = (xᵀy / d + 1)³

    (Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401, section 4). The estimate is unbiased: unlike the Fréchet
    distance it does not decrease with the number of features, and may be below 0. `batch_size` rows of the kernel
    matrix are computed at once. Raises a `ValueError` as `checked_features` does.
    """
    a, b = checked_features(a, b)

    def sum_of_kernel(x, y):
        return sum(((part @ y.T / x.shape[1] + 1) ** 3).sum() for part in x.split(batch_size))

    def mean_of_pairs(x):  # of two different features
        of_itself = ((x * x).sum(dim=1) / x.shape[1] + 1).pow(3).sum()
        return (sum_of_kernel(x, x) - of_itself) / (len(x) * (len(x) - 1))

    return (mean_of_pairs(a) + mean_of_pairs(b) - 2 * (sum_of_kernel(a, b) / (len(a) * len(b)))).item()


def checked_features(*sets: Tensor, least: int = 2) -> list[Tensor]:
    """Sets of features in fp64 on the CPU. Raises a `ValueError` if a set has fewer than `least` features or another d
    than the first, or if features are not finite."""
    for x in sets:
        if x.ndim != 2 or len(x) < least:
            raise ValueError(f"features: shape {tuple(x.shape)}; give (n, d) of at least {least} images")
        num_bad = int((~x.isfinite()).any(dim=1).sum())
        if num_bad:
            raise ValueError(f"features: {num_bad} of {len(x)} rows are not finite; look at those images")
        _check_same_dimension(sets[0].shape[1], x.shape[1])
    return [x.detach().cpu().double() for x in sets]


def _check_same_dimension(d: int, other: int) -> None:
    if d != other:
        raise ValueError(f"features: {d} and {other} dimensions; use one feature function for both")


def _root(covariance: Tensor) -> Tensor:
    """R with R Rᵀ = `covariance`. Unlike Cholesky's, it exists for a singular covariance too (a dead feature)."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    return eigenvectors * eigenvalues.clamp(min=0).sqrt()
