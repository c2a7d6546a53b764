"""Noise schedules β_1 ... β_T."""

import math

import torch
from torch import Tensor


def betas_of_schedule(beta_schedule: str, T: int, beta_start: float, beta_end: float) -> Tensor:
    """β_0 … β_{T−1} of a schedule as fp32, (T,), bitwise those of diffusers.

    - "linear": β from `beta_start` to `beta_end` (DDPM, section 4).
    - "scaled_linear": √β from √`beta_start` to √`beta_end` (latent diffusion).
    - "sigmoid": β = `beta_start` + (`beta_end` − `beta_start`) · sigmoid(s), s from −6 to 6 (GeoDiff).
    - "squaredcos_cap_v2": ᾱ = cos²((u + 0.008) / 1.008 · π/2), u = t / T (Improved DDPM, Eq. 17).
    - "laplace": ᾱ = √sigmoid(λ), log-SNR λ = −½ sgn(½ − u) log(1 − 2 |½ − u|) (Hang et al. 2024).
    """
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, T)
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, T) ** 2
    if beta_schedule == "sigmoid":
        return torch.linspace(-6, 6, T).sigmoid() * (beta_end - beta_start) + beta_start

    def alpha_bar(u: float) -> float:
        if beta_schedule == "squaredcos_cap_v2":
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        # 1e-6 keeps λ finite at both ends; the square root is not in the paper but in diffusers, hence in its models.
        snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * math.fabs(0.5 - u) + 1e-6))
        return math.sqrt(snr / (1 + snr))

    # β_t = 1 − ᾱ_t / ᾱ_{t−1}, held below 1 because the last ones are singular (Improved DDPM, section 3.2)
    return torch.tensor([min(1 - alpha_bar((t + 1) / T) / alpha_bar(t / T), 0.999) for t in range(T)])


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas with √ᾱ shifted and scaled so that ᾱ_{T−1} = 0 and ᾱ_0 is unchanged (Lin et al. 2023, Algorithm 1).

    √ᾱ_t ← (√ᾱ_t − √ᾱ_{T−1}) · √ᾱ_0 / (√ᾱ_0 − √ᾱ_{T−1})

    Raises `ValueError` if ᾱ does not fall, or falls to 0 by itself.
    """
    sqrt_alpha_bar = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = sqrt_alpha_bar[0], sqrt_alpha_bar[-1]
    alpha_bar = ((sqrt_alpha_bar - last) * (first / (first - last))) ** 2
    rescaled = 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    if not rescaled.isfinite().all():
        raise ValueError(
            f"rescale_betas_zero_snr: True, but ᾱ goes from {1 - betas[0]:.3g} to {torch.prod(1 - betas):.3g} in "
            f"{len(betas)} steps; it must fall, and not to 0, so change the betas or pass False"
        )
    return rescaled
