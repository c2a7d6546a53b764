"""A denoiser of images whose two rows are jointly Gaussian, of which everything is known exactly."""

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from small_pipelines import unconditional

from hf_genmod.models.denoising_unet import DenoisingUNet2DOutput
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler

MEAN, DEVIATION, CORRELATION = 0.3, 0.5, 0.8
COVARIANCE = DEVIATION**2 * torch.tensor([[1, CORRELATION], [CORRELATION, 1]], dtype=torch.float64)
PROCESS = {
    "beta_schedule": "squaredcos_cap_v2",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "prediction_type": "v_prediction",
}
VALUES = {"low": [-1.0], "high": [1.0]}  # measured values that are those of the model


class PairsDenoiser(ModelMixin, ConfigMixin):
    """What predicts v of pairs x_0 ~ N(m, C), the columns of (n, 1, 2, width), best."""

    @register_to_config
    def __init__(self, width=64):
        super().__init__()
        self.dummy = torch.nn.Parameter(torch.zeros(()))
        self.register_to_config(in_channels=1, out_channels=1, num_classes=None, sample_size=(2, width))
        alpha_bar = AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double().numpy()
        self.log_sigmas, self.timesteps = np.log((1 - alpha_bar) / alpha_bar) / 2, np.arange(1000)

    def forward(self, sample, timestep):
        sigma = float(np.exp(np.interp(float(timestep), self.timesteps, self.log_sigmas)))
        x = sample.double() * (1 + sigma**2) ** 0.5  # x_0 + σ ε
        gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64))
        x_0 = MEAN + torch.einsum("ij,ncjw->nciw", gain, x - MEAN)
        velocity = ((x - x_0) / sigma - sigma * x_0) / (1 + sigma**2) ** 0.5
        return DenoisingUNet2DOutput(sample=velocity.float())


def pairs_pipeline(scheduler, width=64):
    return unconditional(PairsDenoiser(width), scheduler.from_config(PROCESS), value_range=VALUES)


def pairs(n, width=64, seed=0):
    """x_0, (n, 1, 2, width)."""
    z = torch.randn(n, 1, 2, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (MEAN + torch.einsum("ij,ncjw->nciw", torch.linalg.cholesky(COVARIANCE), z)).float()
