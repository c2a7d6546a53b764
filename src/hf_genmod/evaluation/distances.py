"""Fréchet and kernel distance between sets of features."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Count, mean and covariance of features, in fp64; parts can be merged, in whatever batches they came.

    Args:
        count (`int`): n.
        mean (`torch.Tensor`): μ, (d,).
        scatter (`torch.Tensor`): Σ_i (f_i - μ)(f_i - μ)ᵀ, (d, d).
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """Σ = scatter / (n - 1), (d, d)."""
        return self.scatter / (self.count - 1)

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Statistics of `features`, (n, d) with n ≥ 1. Raises `ValueError` where they are not that or not finite."""
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"features: shape {tuple(features.shape)}; give (n, d) with at least one row.")
        features = features.detach().cpu().double()
        num_bad = int((~features.isfinite()).any(dim=1).sum())
        if num_bad:
            raise ValueError(f"features: {num_bad} of {len(features)} rows are not finite; look at those pictures.")
        mean = features.mean(dim=0)
        return cls(len(features), mean, (features - mean).T @ (features - mean))

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Statistics of both sets: S = S_a + S_b + (n_a n_b / n) δδᵀ with δ = μ_b - μ_a (Chan et al. 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        return FeatureStatistics(
            count,
            self.mean + delta * (other.count / count),
            self.scatter + other.scatter + torch.outer(delta, delta) * (self.count * other.count / count),
        )


def frechet_distance(a: Tensor | FeatureStatistics, b: Tensor | FeatureStatistics) -> float:
    """Fréchet distance of two sets of features, each taken as a Gaussian.

    d² = ‖μ_a - μ_b‖² + Tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^{1/2})

    (Dowson and Landau 1982; for generated pictures Heusel et al. 2017, Eq. 6). It falls as the sets grow, so compare
    it only at equal counts.

    Args:
        a, b (`torch.Tensor` or `FeatureStatistics`): features (n, d) with n > d, or their statistics.

    Returns:
        `float`: d², at least 0, in squared units of the features.

    Raises:
        `ValueError`: no more features than dimensions (a singular covariance); another d; features that are not
            finite.
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
    # With Σ = R Rᵀ, Tr (Σ_a Σ_b)^{1/2} is the sum of the singular values of R_aᵀ R_b: no root of a product of
    # matrices, whose small eigenvalues rounding makes negative or complex.
    root_a, root_b = (_root(statistics.covariance) for statistics in (a, b))
    trace_of_root = torch.linalg.svdvals(root_a.T @ root_b).sum()
    d2 = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root
    return max(d2.item(), 0.0)


def kernel_distance(a: Tensor, b: Tensor, biased: bool = False, batch_size: int = 2048) -> float:
    """Kernel distance of two sets of features: the squared maximum mean discrepancy

    MMD² = E k(a, a') + E k(b, b') - 2 E k(a, b),   k(x, y) = (xᵀy / d + 1)³

    (Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401, section 4). Its estimate without bias, unlike the Fréchet
    distance, does not fall as the sets grow, and may be below 0.

    Args:
        a, b (`torch.Tensor`): features (n, d) and (m, d), two or more of each.
        biased (`bool`, defaults to `False`): count the pairs of a picture with itself, too: 0 for equal sets.
        batch_size (`int`, defaults to 2048): rows of the matrix of kernels that are computed at once.

    Raises:
        `ValueError`: too few features, another d, or features that are not finite.
    """
    a, b = _as_features(a, b)

    def mean_kernel(x, y, without_pairs):
        total = sum(((part @ y.T / x.shape[1] + 1) ** 3).sum() for part in x.split(batch_size))
        if without_pairs:
            return (total - ((x * x).sum(dim=1) / x.shape[1] + 1).pow(3).sum()) / (len(x) * (len(x) - 1))
        return total / (len(x) * len(y))

    return (mean_kernel(a, a, not biased) + mean_kernel(b, b, not biased) - 2 * mean_kernel(a, b, False)).item()


def _as_features(a: Tensor, b: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    for x in (a, b):
        if x.ndim != 2 or len(x) < least:
            raise ValueError(f"features: shape {tuple(x.shape)}; give (n, d) of at least {least} pictures.")
        if not x.isfinite().all():
            raise ValueError("features: some are not finite; look at those pictures.")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features: {a.shape[1]} and {b.shape[1]} dimensions; use one feature function for both.")
    return a.detach().cpu().double(), b.detach().cpu().double()


def _root(covariance: Tensor) -> Tensor:
    """R with R Rᵀ = `covariance`; unlike Cholesky's, it exists for a singular one too (a dead feature)."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    return eigenvectors * eigenvalues.clamp(min=0).sqrt()
