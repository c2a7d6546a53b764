"""Conditioning augmentation for super-resolution."""

import torch

from hf_genmod.data.randomness import cut
from hf_genmod.models.conditioning import enlarge, noised_by, shrink


class ConditioningAugmentation:
    r"""
    The conditioning image c of an upsampler, made from the image x_0 (Ho et al. 2022,
    https://arxiv.org/abs/2106.15282, section 4.2), as [`SuperResolutionPipeline`] makes it from a small image:

        y = D(x_0),   c = U(√ᾱ_s y + √(1−ᾱ_s) ε′),   s = ⌊(m + 1) u²⌋,   u ~ Uniform[0, 1),  ε′ ~ N(0, I)

    where D shrinks and U enlarges. u² makes low noise levels, which sampling uses, more frequent.

    Args:
        scheduler ([`AncestralDDPMScheduler`]): The process of ᾱ.
        factor (`int`, defaults to 2): How many times y is smaller than x_0.
        max_noise_level (`int`, defaults to 250): m, at most the number of timesteps; 0 trains without noise.
        crop_size (`int`, *optional*): Height and width of a random crop of each image to train on, if not all of it;
            a multiple of the factor.
    """

    def __init__(self, scheduler, factor: int = 2, max_noise_level: int = 250, crop_size: int | None = None):
        T = scheduler.config.num_train_timesteps
        if not 0 <= max_noise_level <= T:
            raise ValueError(f"max_noise_level: {max_noise_level} is not between 0 and {T}, the timesteps there are")
        if crop_size is not None and (crop_size < 1 or crop_size % factor):
            raise ValueError(f"crop_size: {crop_size} is not a multiple of the factor {factor}")
        self.scheduler = scheduler
        self.factor = factor
        self.max_noise_level = max_noise_level
        self.crop_size = crop_size

    def __call__(self, x_0, rng) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        y = shrink(x_0, self.factor)  # (n, C, h, w)
        s = ((self.max_noise_level + 1) * rng.uniform().square()).long()
        y = noised_by(self.scheduler, y, rng.normal(y.shape[1:], dtype=y.dtype), s)
        c = enlarge(y, self.factor)
        if self.crop_size is not None:  # last, as U looks beyond the border of the crop
            room = [(length - self.crop_size) // self.factor for length in x_0.shape[2:]]
            places = rng.uniform(2).to(x_0.device).unbind(1)
            corners = [self.factor * (u * (length + 1)).long() for u, length in zip(places, room, strict=True)]
            size = (self.crop_size, self.crop_size)
            x_0, c = cut(torch.cat([x_0, c], dim=1), torch.stack(corners, dim=1), size).chunk(2, dim=1)
        return x_0, {"conditioning_image": c, "conditioning_timestep": s}
