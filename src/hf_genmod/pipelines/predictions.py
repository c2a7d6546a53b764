"""The predictions of a U-Net as x̂_0, and back, at x_t = √ᾱ x_0 + √(1−ᾱ) ε with σ = √((1−ᾱ)/ᾱ): √ᾱ = 1/√(1+σ²)."""

import math

import torch

from .samplers import clips_of


def x_0_of(prediction_type: str, prediction: torch.Tensor, x_t: torch.Tensor, sigma: float) -> torch.Tensor:
    """x̂_0 of a prediction of ε, v or x_0; where x_t is noise alone, σ = ∞, a prediction of ε gives none: NaN."""
    if sigma == math.inf and prediction_type == "v_prediction":
        return -prediction
    root = math.hypot(1, sigma)
    if prediction_type == "epsilon":
        return root * x_t - sigma * prediction
    return (x_t - sigma * prediction) / root if prediction_type == "v_prediction" else prediction


def prediction_of(prediction_type: str, x_0: torch.Tensor, x_t: torch.Tensor, sigma: float) -> torch.Tensor:
    """The prediction that gives x̂_0: the inverse of `x_0_of`."""
    root = math.hypot(1, sigma)
    if prediction_type == "epsilon":
        return (root * x_t - x_0) / sigma
    return (x_t - root * x_0) / sigma if prediction_type == "v_prediction" else x_0


def clipped(scheduler, x_0: torch.Tensor) -> torch.Tensor:
    """x̂_0 as a scheduler clips it."""
    clips, config = clips_of(scheduler), scheduler.config
    if "thresholding" in clips:
        return scheduler._threshold_sample(x_0)
    return x_0.clamp(-config.clip_sample_range, config.clip_sample_range) if clips else x_0
