"""The variational autoencoder."""

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .image_autoencoder import ImageAutoencoder

LIKELIHOODS = ("gaussian", "discretised_gaussian", "bernoulli")


@dataclass
class VariationalAutoencoderOutput(BaseOutput):
    """
    `sample`, (n, in_channels, height, width): The mean of p(x | z).
    `latent_dist`: q(z | x), if images were given.
    `log_variance`, (): log σ² of a Gaussian p(x | z).
    `logits`, of the shape of `sample`: log p(x = 1 | z) / p(x = −1 | z) of a Bernoulli.
    """

    sample: torch.Tensor
    latent_dist: DiagonalGaussianDistribution | None = None
    log_variance: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class VariationalAutoencoder(ImageAutoencoder):
    r"""
    The variational autoencoder of Kingma & Welling 2014 (https://arxiv.org/abs/1312.6114):

        q(z | x) = N(μ(x), diag σ²(x)),   z = μ + σ ε,   p(z) = N(0, I),   p(x | z) by the decoder

    Args:
        sample_size, in_channels, latent_channels, block_out_channels, layers_per_block, norm_num_groups, patch_size,
            vector_latents, dropout, scaling_factor, shift_factor, prior_rank: As [`Autoencoder`] takes them.
        likelihood (`str`, defaults to `"gaussian"`): p(x | z) of each value: `"gaussian"`, N(x̂, σ²);
            `"discretised_gaussian"`, its integral over the bin of an 8-bit value; `"bernoulli"`, for x ∈ {−1, 1},
            with p(x = 1 | z) = (x̂ + 1) / 2.
        variance (`float`, *optional*): σ² of a Gaussian, in units of images in [-1, 1]. `None` learns one for all
            values as the parameter `log_variance` (Rybkin et al. 2021, https://arxiv.org/abs/2006.13202).

    Raises:
        ValueError: If the widths, the levels and the size of the images do not fit together, the likelihood is unknown
            or the variance does not fit the likelihood.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (64, 128, 128),
        layers_per_block: int = 1,
        norm_num_groups: int = 32,
        patch_size: int = 1,
        vector_latents: bool = False,
        dropout: float = 0.0,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        prior_rank: int | None = None,
        likelihood: str = "gaussian",
        variance: float | None = None,
    ):
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood: {likelihood!r} is not one of {', '.join(LIKELIHOODS)}")
        if variance is not None and likelihood == "bernoulli":
            raise ValueError(f"variance: {variance}, but a bernoulli likelihood has none to choose; leave it out")
        if variance is not None and variance <= 0:
            raise ValueError(f"variance: {variance} is not positive")
        self._build(encoder_channels=2 * latent_channels)
        if variance is None and likelihood != "bernoulli":
            # About the variance of a poor reconstruction; a step moves the parameter by at most the learning rate.
            self.log_variance = nn.Parameter(torch.tensor(math.log(0.1)))

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """q(z | x) of images x, (n, in_channels, height, width), as `.latent_dist`."""
        posterior = DiagonalGaussianDistribution(self._encode(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: torch.Tensor, return_dict: bool = True) -> VariationalAutoencoderOutput | tuple[torch.Tensor]:
        """p(x | z) of latents z, (n, latent_channels, h, w): its mean, (n, in_channels, height, width), as `.sample`,
        and `.log_variance` or `.logits`."""
        output = self._likelihood(z)
        return output if return_dict else (output.sample,)

    def forward(
        self, sample: torch.Tensor, epsilon: torch.Tensor | None = None, return_dict: bool = True
    ) -> VariationalAutoencoderOutput | tuple[torch.Tensor]:
        """
        q(z | x) and p(x | z) of images x, `sample`, (n, in_channels, height, width), in [-1, 1].

        Args:
            epsilon (`torch.Tensor` of the shape of z, *optional*): ε ~ N(0, I) of z = μ + σ ε; without it z = μ.

        Raises:
            ValueError: If a shape is wrong.
        """
        posterior = DiagonalGaussianDistribution(self._encode(sample))
        z = posterior.mean
        if epsilon is not None:
            if epsilon.shape != z.shape:
                raise ValueError(f"epsilon: shape {tuple(epsilon.shape)} is not {tuple(z.shape)}, that of z")
            z = z + posterior.std * epsilon
        output = self._likelihood(z, posterior)
        return output if return_dict else (output.sample,)

    def _likelihood(self, z, posterior=None):
        """p(x | z) as an output that also holds q(z | x)."""
        config, prediction = self.config, self._decode(z)
        if config.likelihood == "bernoulli":
            mean = torch.tanh(0.5 * prediction)  # 2 p − 1, as p = 1 / (1 + exp(−logits))
            return VariationalAutoencoderOutput(sample=mean, latent_dist=posterior, logits=prediction)
        log_variance = self.log_variance if config.variance is None else z.new_full((), math.log(config.variance))
        return VariationalAutoencoderOutput(sample=prediction, latent_dist=posterior, log_variance=log_variance)
