"""Checks of a pipeline's arguments, and one random generator per image."""

import math
from numbers import Integral, Real

import torch


def check_positive(**numbers) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise ValueError(f"{name}: {number!r} is not a positive whole number")


def check_output_type(output_type) -> None:
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type: {output_type!r} is not one of 'pil', 'np', 'pt', 'latent'")


def standard_normal(shape, generators) -> torch.Tensor:
    """ε ~ N(0, I), (n, *shape), from one generator per image, in fp32 on the CPU."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device).cpu() for g in generators])


def check_guidance(interval, **scales) -> None:
    for name, scale in scales.items():
        if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
            raise ValueError(f"{name}: {scale!r} is not a finite number")
    if interval is not None:
        is_pair = isinstance(interval, (list, tuple)) and [isinstance(x, Real) for x in interval] == [True, True]
        if not is_pair or not 0 <= interval[0] <= interval[1]:
            raise ValueError(f"guidance_interval: {interval} is not (low, high) with 0 <= low <= high")


def check_noise_levels(scheduler) -> None:
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"scheduler: {type(scheduler).__name__} has no alphas_cumprod, its noise levels; use another")


def is_within(sigma: float, interval: tuple[float, float] | None) -> bool:
    return interval is None or interval[0] <= sigma <= interval[1]


def one_generator_each(generator, n: int) -> list[torch.Generator]:
    """One generator per image, so that an image does not depend on the others of its batch."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != n:
            raise ValueError(f"generator: a list of {len(generator)} for {n} images; give one for each, or only one")
        return list(generator)
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (n,), generator=generator, device=device)
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]
