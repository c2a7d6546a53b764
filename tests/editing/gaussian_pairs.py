"""Images whose two rows are jointly Gaussian, of which everything is known exactly."""

import torch
from small_pipelines import seeded, unconditional

from hf_genmod.data.exact_networks import ExactDenoiser
from hf_genmod.data.mixtures import GaussianMixture
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler

MEAN, DEVIATION, CORRELATION = 0.3, 0.5, 0.8
COVARIANCE = DEVIATION**2 * torch.tensor([[1, CORRELATION], [CORRELATION, 1]], dtype=torch.float64)
PAIRS = GaussianMixture([1.0], [[MEAN, MEAN]], COVARIANCE[None])
PROCESS = {
    "beta_schedule": "squaredcos_cap_v2",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "prediction_type": "v_prediction",
}
VALUES = {"low": [-1.0], "high": [1.0]}  # measured values that are those of the model


def pairs_denoiser(width=64):
    """What predicts v of pairs x_0 ~ N(m, C), the columns of (n, 1, 2, width), best."""
    return ExactDenoiser(PAIRS, AncestralDDPMScheduler(**PROCESS), tile=(1, 2, 1), size=(2, width))


def pairs_pipeline(scheduler, width=64):
    return unconditional(pairs_denoiser(width), scheduler.from_config(PROCESS), value_range=VALUES)


def pairs(n, width=64, seed=0):
    """x_0, (n, 1, 2, width)."""
    return pairs_denoiser(width).images(PAIRS.sample(n * width, seeded(seed))[0]).float()
