"""Schedules, predictions and noise that the tests of the schedulers share."""

import torch

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]


PREDICTIONS = ["epsilon", "sample", "v_prediction"]


VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]


CLIPS = {
    "free": {"clip_sample": False},
    "clip": {"clip_sample": True, "clip_sample_range": 1.5},
    "threshold": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.7},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def assert_same_numbers(ours: torch.Tensor, theirs: torch.Tensor):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())


def model_output_like(sample: torch.Tensor, variance_type: str, seed: int = 1) -> torch.Tensor:
    n, channels, *rest = sample.shape
    prediction = randn(n, channels, *rest, seed=seed, dtype=sample.dtype)
    if variance_type not in ("learned", "learned_range"):
        return prediction
    variance = randn(n, channels, *rest, seed=seed + 1, dtype=sample.dtype).tanh()
    return torch.cat([prediction, variance.abs() if variance_type == "learned" else variance], dim=1)
