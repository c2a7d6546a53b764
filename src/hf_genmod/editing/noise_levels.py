"""The noise levels of a sampler: x̄ = x_0 + σ ε is its x, at every step, times a factor."""

import copy
import math

from torch import Tensor

from hf_genmod.pipelines.predictions import x_0_of
from hf_genmod.pipelines.samplers import Sampler


def from_step(sampler: Sampler, i: int) -> Sampler:
    """A copy that starts at step i, of a sampler that has taken none."""
    sampler = copy.deepcopy(sampler)
    if hasattr(sampler.scheduler, "set_begin_index"):
        sampler.scheduler.set_begin_index(i)
    return sampler


def sigma_of(sampler: Sampler, i: int) -> float:
    """σ before step i, 0 after the last."""
    return min(sampler.sigmas[i], 1e6) if i < len(sampler.sigmas) else 0.0


def whole_steps(sampler: Sampler) -> list[int]:
    """The steps that begin at a noise level of their own; of some samplers others are the second halves of steps."""
    return [i for i in range(len(sampler.sigmas)) if sigma_of(sampler, i) > sigma_of(sampler, i + 1)]


def factor_of(sampler: Sampler, i: int) -> float:
    """x̄ / x before step i, for a sampler that has taken none: √(1+σ²), or about 1 where x̄ itself is what it steps."""
    if i == len(sampler.sigmas):
        return 1.0
    scheduler = from_step(sampler, i).scheduler
    return float(scheduler.scale_model_input(math.hypot(1, sigma_of(sampler, i)), scheduler.timesteps[i]))


def noised(sampler: Sampler, i: int, x_0: Tensor, epsilon: Tensor) -> Tensor:
    """x before step i, of x_0 and the noise ε."""
    return (x_0 + sigma_of(sampler, i) * epsilon) / factor_of(sampler, i)


def noised_back(sampler: Sampler, i: int, x: Tensor, epsilon: Tensor) -> Tensor:
    """x before step i, of x after it and the noise ε."""
    added = math.sqrt(sigma_of(sampler, i) ** 2 - sigma_of(sampler, i + 1) ** 2)
    return (factor_of(sampler, i + 1) * x + added * epsilon) / factor_of(sampler, i)


def predicted_x_0(pipeline, prediction: Tensor, x_t: Tensor, sigma: float) -> Tensor:
    """x̂_0 of a prediction of the network of a pipeline, not clipped, at its input x_t."""
    return x_0_of(pipeline.config.process["prediction_type"], prediction[:, : x_t.shape[1]], x_t, sigma)
