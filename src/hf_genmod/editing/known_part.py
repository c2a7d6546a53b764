"""Drawing the rest of images of which a part is known."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_genmod.pipelines.predictions import prediction_of, x_0_of

MOST_NOISE = 20.0  # the σ up to which ∂x̂_0/∂x_t is known well enough
NOISE = 0.01  # standard deviation of the known part, which keeps the system well-conditioned


def denoiser_given(y: Tensor, known: Tensor, predict, prediction_type: str):
    """
    A denoiser's `predict(x_t, t, σ)` for images whose part y = A x_0 is known. With x̄ = x_t / √ᾱ_t = x_0 + σ ε,

        E[x_0 | x_t, y] = x̂_0 + V Aᵀ (A V Aᵀ)⁻¹ (y − A x̂_0),   V = Cov(x_0 | x_t) = σ² ∂x̂_0/∂x̄

    which is exact where x_0 given x_t is Gaussian (moment matching: Rozet et al. 2024,
    https://arxiv.org/abs/2405.13712). The system is solved approximately, by one step of conjugate gradients, which
    costs a backward pass; further steps add errors of ∂x̂_0/∂x̄. The result is y where y is known.

    Args:
        y (`torch.Tensor`): (n, c, h, w); only values at `known` count.
        known (`torch.Tensor`): bool, broadcast to y.
    """

    def dot(a, b):
        return (a * b).flatten(1).sum(dim=1)[:, None, None, None]

    def predict_given(x_t, t, sigma):
        sigma = min(sigma, 1e6)
        if sigma > MOST_NOISE:
            prediction, variance = predict(x_t, t, sigma).tensor_split([y.shape[1]], dim=1)
            x_0 = torch.where(known, y, x_0_of(prediction_type, prediction, x_t, sigma))
            return torch.cat([prediction_of(prediction_type, x_0, x_t, sigma), variance], dim=1)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            prediction, variance = predict(x, t, sigma).tensor_split([y.shape[1]], dim=1)
            x_0 = x_0_of(prediction_type, prediction, x, sigma)
        residual = known * (y - x_0.detach())
        (product,) = torch.autograd.grad(x_0, x, residual)
        product = sigma**2 / math.hypot(1, sigma) * product  # V Aᵀ r
        applied = known * product + NOISE**2 * residual  # (A V Aᵀ + NOISE²) r
        shift = dot(residual, residual) / dot(residual, applied).clamp(min=1e-12) * product
        x_0 = torch.where(known, y, x_0.detach() + shift)
        return torch.cat([prediction_of(prediction_type, x_0, x_t, sigma), variance.detach()], dim=1)

    return predict_given


def seamless(drawn: Tensor, image: Tensor, redrawn: Tensor, reach: int = 32) -> Tensor:
    """
    An image (n, C, H, W) with its part `redrawn` (bool, (n, 1, H, W)) drawn by a decoder. What the decoder gets wrong
    next to that part, image − drawn, is added to the pixels across the seam and fades away from there: each of up to
    `reach` relaxations of ∇²c = 0 takes it one pixel further. Where both agree, as without an autoencoder, nothing
    changes.
    """
    cross = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]], device=drawn.device)[None, None]

    def neighbours(x):  # their sum
        return F.conv2d(x.flatten(0, 1)[:, None], cross, padding=1).unflatten(0, x.shape[:2])[:, :, 0]

    kept, inside = (~redrawn).to(drawn.dtype), redrawn.to(drawn.dtype)
    at_seam = redrawn & (neighbours(kept) > 0)
    change = torch.where(at_seam, neighbours(kept * (image - drawn)) / neighbours(kept).clamp(min=1), 0.0)
    for _ in range(reach):
        mean = neighbours(inside * change) / neighbours(inside).clamp(min=1)
        change = torch.where(redrawn & ~at_seam, mean, change)
    return torch.where(redrawn, drawn + change, image)
