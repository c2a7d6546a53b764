"""The likelihood of images under the probability-flow ODE of a diffusion model."""

import math

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_genmod.data.randomness import BatchRandom
from hf_genmod.data.value_range import to_model_range
from hf_genmod.editing.inversion import flow_step


def probability_flow_bits(
    unet: nn.Module, scheduler, images: Tensor, steps: int = 50, batch_size: int = 32, **condition: Tensor
) -> Tensor:
    """
    −log p(x) in bits per dimension, (n,), where p is the density of what the probability-flow ODE makes of noise
    x_T ~ N(0, I) (Song et al. 2021, https://arxiv.org/abs/2011.13456, appendix D.2). Its variables are
    x̄ = x_t / √ᾱ_t and λ = log σ_t with σ_t = √((1 − ᾱ_t) / ᾱ_t):

        dx̄/dλ = σ ε_θ = x̄ − x̂_0,   log p(x) = log N(x_T; 0, I) + D log √ᾱ_T + ∫ (D − ∇·x̂_0) dλ

    from x̄ = x at the first timestep to the last one with ᾱ_T > 0. ∇·x̂_0 is estimated, without bias, by
    vᵀ (∂x̂_0/∂x̄) v with random signs v (Hutchinson 1989), drawn anew at each timestep. Nothing is clipped.

    For images of 8 bits p is the density at x + u, with u uniform over the bin of x, 2/255 wide (Theis et al. 2016,
    https://arxiv.org/abs/1511.01844, section 3.1). The mean over u is an upper bound of −log P(x), where P(x) is the
    probability of the bin: the unit, and the bins, of [`variational_bound`].

    Args:
        unet (`nn.Module`): The model, in evaluation mode. Its output is differentiated by its input.
        scheduler ([`AncestralDDPMScheduler`]): Its process.
        images (`torch.Tensor`): (n, C, H, W), uint8, or latents.
        steps (`int`): The number of steps, about equal in λ. Each costs a forward and a backward pass; the method is
            of second order.
        batch_size (`int`): How many images are differentiated at once. The random numbers do not depend on it.
        condition (`torch.Tensor`): What the U-Net is conditioned on, (n, ...), such as `class_labels`.
    """
    of_8_bits = images.dtype == torch.uint8
    alpha_bar = scheduler.alphas_cumprod.cpu().double()
    alpha_bar = alpha_bar[alpha_bar > 0]
    lambdas = 0.5 * torch.log((1 - alpha_bar) / alpha_bar)  # rises with t
    even = torch.linspace(lambdas[0].item(), lambdas[-1].item(), steps + 1, dtype=torch.float64)
    timesteps = (lambdas - even[:, None]).abs().argmin(dim=1).unique()
    timesteps, lambdas = timesteps.tolist(), lambdas[timesteps].tolist()
    bits = []
    for part in tqdm(torch.arange(len(images)).split(batch_size), "Likelihood", leave=False, disable=None):
        rng = BatchRandom(0, 0, part, len(images), images.device)
        x = to_model_range(images[part]).float()
        if of_8_bits:
            x = x + (2 * rng.uniform(x.shape[1:]) - 1) / 255
        conditions = {name: values[part] for name, values in condition.items()}

        def flow(x_bar, i, rng=rng, conditions=conditions):
            signs = 1 - 2 * (rng.uniform(x_bar.shape[1:]) < 0.5).float()
            return _flow(unet, scheduler, x_bar, timesteps[i], lambdas[i], signs, conditions)

        (epsilon, divergence), change, integral = flow(x, 0), 0, torch.zeros(len(x), dtype=torch.float64)
        for i in range(1, len(timesteps)):
            h = lambdas[i] - lambdas[i - 1]
            predicted = flow_step(x, lambdas[i - 1], h, epsilon, change)
            next_epsilon, next_divergence = flow(predicted, i)
            change = (next_epsilon - epsilon) / h
            x = flow_step(x, lambdas[i - 1], h, epsilon, change)  # again, by ε at both ends
            integral += h * (divergence + next_divergence) / 2
            epsilon, divergence = next_epsilon, next_divergence
        square = alpha_bar[-1] * x.cpu().double().square().flatten(1).mean(dim=1)  # of x_T
        log_prior = -0.5 * (square + math.log(2 * math.pi) - torch.log(alpha_bar[-1]))  # per dimension
        bits.append(-(log_prior + integral / x[0].numel()) / math.log(2))
    return torch.cat(bits) + (math.log2(255 / 2) if of_8_bits else 0)


@torch.enable_grad()
def _flow(unet, scheduler, x_bar: Tensor, t: int, lambda_: float, signs: Tensor, conditions) -> tuple[Tensor, Tensor]:
    """ε_θ at x̄ and the timestep t, and the estimate of D − ∇·x̂_0, (n,)."""
    sigma = math.exp(lambda_)
    x_bar = x_bar.detach().requires_grad_()
    x_t = x_bar / math.sqrt(1 + sigma**2)
    t = torch.full((len(x_t),), t, device=x_t.device)
    prediction, _ = scheduler.split_model_output(unet(x_t, t, **conditions).sample.float(), x_t)
    x_0 = scheduler.predict_original_sample(prediction, t, x_t)
    (product,) = torch.autograd.grad(x_0, x_bar, signs)  # vᵀ ∂x̂_0/∂x̄
    divergence = x_bar[0].numel() - (product * signs).flatten(1).sum(dim=1)
    return (x_bar - x_0).detach() / sigma, divergence.cpu().double()
