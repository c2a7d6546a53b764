"""Estimates with 95% confidence intervals."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number measured on `count` images, with its 95% interval; printed as "1.23 (1.1–1.36, n = 1000)"."""

    value: float
    count: int
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (f"{x:.3g}".replace("-", "−") for x in (self.value, self.low, self.high))
        return f"{value} ({low}–{high}, n = {self.count})"

    @property
    def interval(self) -> str:
        """As it is printed, without the number of images."""
        return str(self).replace(f", n = {self.count}", "")

    @property
    def standard_error(self) -> float:
        return (self.high - self.low) / 2 / 1.96

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """The mean of one value per image, (n,), ± 1.96 standard errors; a single value has none."""
        values, n = values.double(), len(values)
        return cls.with_error(values.mean().item(), n, values.std(correction=min(1, n - 1)).item() / n**0.5)

    @classmethod
    def with_error(cls, value: float, count: int, standard_error: float) -> "Estimate":
        """A value ± 1.96 standard errors."""
        return cls(value, count, value - 1.96 * standard_error, value + 1.96 * standard_error)


def with_interval(distance: Callable[[Tensor], float], features: Tensor, draws: int = 20, seed: int = 0) -> Estimate:
    """A distance of features (n, d), ± 1.96 standard errors by subsampling without replacement (Politis, Romano and
    Wolf 1999): the distances of random halves vary around that of the whole as that of the whole varies around the
    truth, by (σ²/(n/2)) (1 − 1/2) = σ²/n."""
    rng, half = torch.Generator().manual_seed(seed), len(features) // 2
    halves = [distance(features[torch.randperm(len(features), generator=rng)[:half]]) for _ in range(draws)]
    error = torch.tensor(halves, dtype=torch.float64).std().item()
    return Estimate.with_error(distance(features), len(features), error)


class Share(Estimate):
    """A share of `count` images, with its 95% Wilson interval; printed as "96.4% (95.1–97.4%, n = 1000)"."""

    def __str__(self) -> str:
        return f"{self.value:.1%} ({100 * self.low:.1f}–{self.high:.1%}, n = {self.count})"

    @classmethod
    def of(cls, hits: Tensor) -> "Share":
        """The share of `True` in a `bool` tensor (n,), or the mean of a share for each image, (n,). With p = k/n and
        z = 1.96 the interval is (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) (Wilson 1927), which also holds for
        shares near 0 and 1."""
        n, p = len(hits), hits.double().mean().item()
        z = NormalDist().inv_cdf(0.975)
        centre = p + z**2 / (2 * n)
        half_width = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        # The ends 0 and 1 are exact; rounding would miss them by 1e-17.
        low = 0.0 if p == 0 else (centre - half_width) / (1 + z**2 / n)
        high = 1.0 if p == 1 else (centre + half_width) / (1 + z**2 / n)
        return cls(p, n, low, high)

    def widened(self, standard_error: float) -> "Share":
        """The share with an interval that covers another error, independent of that of its images, too."""
        down, up = (
            math.hypot(width, 1.96 * standard_error) for width in (self.value - self.low, self.high - self.value)
        )
        return replace(self, low=max(self.value - down, 0.0), high=min(self.value + up, 1.0))
