"""Bounds on the likelihood of images, in bits per dimension."""

import math

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_genmod.data.randomness import BatchRandom
from hf_genmod.data.value_range import to_model_range
from hf_genmod.evaluation.estimates import Estimate
from hf_genmod.evaluation.probability_flow import probability_flow_bits
from hf_genmod.objectives.likelihoods import log_likelihood, variational_bound_term
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler


@torch.no_grad()
def variational_bound(
    unet: nn.Module,
    scheduler,
    images: Tensor,
    draws: int = 10,
    batch_size: int = 256,
    likelihood: str = "discretised_gaussian",
    **condition: Tensor,
) -> Estimate:
    """
    The variational bound on −log p(x_0) of a diffusion model, in bits per dimension (Ho et al. 2020, Eq. 5):

        Σ_t L_t + L_T,   L_T = KL( q(x_T | x_0) ‖ N(0, I) )

    L_0, the largest term, is computed for every image. The sum of the other terms is estimated, without bias, from
    `draws` timesteps per image, stratified over the images, so that a thousand images cover all timesteps.
    Timesteps and noise are the same for every model, so that the difference of two models is paired.

    Args:
        unet (`nn.Module`): The model.
        scheduler ([`AncestralDDPMScheduler`]): Its process; x̂_0 is clipped if the config says so.
        images (`torch.Tensor`): (n, C, H, W), uint8, or latents.
        draws (`int`): Timesteps per image, 2 or more.
        likelihood (`str`): The likelihood of x_0, as `variational_bound_term` takes it; `"gaussian"` for latents.
        condition (`torch.Tensor`): What the U-Net is conditioned on, (n, ...), such as `class_labels`.

    Returns:
        [`Estimate`]: The bound for these images, ± 1.96 standard errors over the draws.
    """
    T, n = scheduler.config.num_train_timesteps, len(images)
    bounds = torch.zeros(draws, dtype=torch.float64)
    for draw in tqdm(range(draws), "Likelihood", leave=False, disable=None):
        # The stratum of an image must not depend on the order of the images, which may be sorted by class.
        stratum = torch.randperm(n, generator=torch.Generator().manual_seed(draw))
        for part in torch.arange(n).split(batch_size):
            rng = BatchRandom(0, draw, stratum[part], n, images.device)
            x_0 = to_model_range(images[part]).float()
            conditions = {name: values[part] for name, values in condition.items()}
            later = 1 + ((T - 1) * rng.stratified()).long()
            for t, terms in ((torch.zeros_like(later), 1), (later, T - 1)):
                x_t = scheduler.add_noise(x_0, rng.normal(x_0.shape[1:]), t)
                model_output = unet(x_t, t, **conditions).sample.float()
                L_t = variational_bound_term(scheduler, model_output, x_0, x_t, t, clip=True, likelihood=likelihood)
                bounds[draw] += terms * L_t.cpu().double().sum() / n
    alpha_bar_T = scheduler.alphas_cumprod[-1].cpu().double()
    mean_square = to_model_range(images).cpu().double().square().mean()
    prior = 0.5 * (alpha_bar_T * mean_square - alpha_bar_T - torch.log1p(-alpha_bar_T)) / math.log(2)  # L_T
    return Estimate.with_error((bounds.mean() + prior).item(), n, (bounds.std() / draws**0.5).item())


@torch.no_grad()
def importance_log_likelihood(
    vae: nn.Module,
    x: Tensor,
    k: int,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
    likelihood: str | None = None,
) -> Tensor:
    """
    A lower estimate of log p(x) under a variational autoencoder (Burda et al. 2016, Eq. 8):

        log (1/k) Σ_i p(x | z_i) p(z_i) / q(z_i | x),   z_i ~ q(z | x)

    Its expectation is the evidence lower bound at k = 1 and rises with k to log p(x).

    Args:
        vae ([`VariationalAutoencoder`]): p and q.
        x (`torch.Tensor`): (n, C, H, W), float in [-1, 1]; each value -1 or 1 for a Bernoulli likelihood.
        k (`int`): The number of z_i per image.
        generator (`torch.Generator`, *optional*): The random numbers of the z_i. They do not depend on `batch_size`,
            the number of z that are decoded at once.
        likelihood (`str`, *optional*): p(x | z); by default that of training. `"discretised_gaussian"` gives the
            probability of images of 8 bits under a Gaussian.

    Returns:
        `torch.Tensor`: (n,), in nats, fp64 on the CPU.

    Raises:
        ValueError: If k is not positive, or values are not -1 or 1 for a Bernoulli likelihood.
    """
    likelihood, n = likelihood or vae.config.likelihood, len(x)
    if k < 1:
        raise ValueError(f"k: {k} is not positive; give the number of samples per image")
    if likelihood == "bernoulli" and not (x.abs() == 1).all():
        raise ValueError("x: a bernoulli likelihood is of values -1 and 1; draw or threshold the images first")
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else "cpu").item()
    estimates = []
    for part in torch.arange(n).split(batch_size):
        images = x[part]
        q = vae.encode(images).latent_dist
        log_weights, parts = [], torch.arange(k).split(max(batch_size // len(part), 1))
        for draws in tqdm(parts, "Likelihood", leave=False, disable=None):
            rngs = (BatchRandom(seed, draw, part, n, x.device) for draw in draws.tolist())
            epsilon = torch.stack([rng.normal(q.mean.shape[1:], dtype=x.dtype) for rng in rngs])  # (draws, part, ...)
            z = q.mean + q.std * epsilon
            log_p_x = log_likelihood(likelihood, images.repeat(len(draws), 1, 1, 1), vae.decode(z.flatten(0, 1)))
            log_ratio = 0.5 * (epsilon**2 + q.logvar - z**2).flatten(2).sum(dim=2)  # log p(z) − log q(z | x)
            log_weights.append((log_p_x.unflatten(0, log_ratio.shape) + log_ratio).cpu().double())
        estimates.append(torch.cat(log_weights).logsumexp(dim=0) - math.log(k))
    return torch.cat(estimates)


def bits_per_dimension(
    pipeline, images: Tensor, num_images: int = 200, num_latents: int = 64, num_by_flow: int = 64, **condition: Tensor
) -> dict[str, Estimate]:
    """
    Upper bounds of −log p(x) in bits per dimension, for images of 8 bits that the model was not trained on:
    `num_images` of `images`, chosen at random and the same for every model. A Gaussian p(x | z) is integrated over the
    8-bit bins. For a Bernoulli p(x | z) the images are thresholded, and have one bit.

    - A diffusion model, given `condition` as in [`variational_bound`]: "probability-flow ODE", of `num_by_flow` of
      these images, as [`probability_flow_bits`] computes it; "variational bound", of all of them.
    - A variational autoencoder: "evidence lower bound"; "importance-sampled bound (64 z)", tighter, from `num_latents`
      z per image.
    - Other models have no bounds, nor do those that are tuned to few steps.

    The last bound is the headline of a card.
    """
    if pipeline.config.get("value_range") is not None:  # measured values have no 8 bits
        return {}
    if pipeline.denoises and pipeline.is_consistent:  # whose x̂_0 is no mean, as the bounds take it to be
        return {}
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:num_images]
    images, condition = images[chosen], {name: values[chosen] for name, values in condition.items()}
    unet, vae = pipeline.components.get("unet"), pipeline.vae
    if unet is not None:
        scheduler = AncestralDDPMScheduler.from_config(pipeline.scheduler.config)
    if vae is None:
        few = {name: values[:num_by_flow] for name, values in condition.items()}
        flow = Estimate.of(probability_flow_bits(unet, scheduler, images[:num_by_flow], **few))
        return {
            "probability-flow ODE": flow,
            "variational bound": variational_bound(unet, scheduler, images, **condition),
        }
    likelihood, x = vae.config.get("likelihood"), to_model_range(images)
    if likelihood is None:
        return {}
    if likelihood == "bernoulli":
        x = torch.where(x < 0, -1.0, 1.0)
    else:
        likelihood = "discretised_gaussian"
    if unet is not None:
        return _bounds_through_latents(vae, unet, scheduler, x, likelihood, num_by_flow, **condition)
    bits = {}
    for name, k in (("evidence lower bound", 1), (f"importance-sampled bound ({num_latents} z)", num_latents)):
        log_p = importance_log_likelihood(vae, x, k, torch.Generator().manual_seed(0), likelihood=likelihood)
        bits[name] = Estimate.of(-log_p / (x[0].numel() * math.log(2)))
    return bits


@torch.no_grad()
def _bounds_through_latents(vae, unet, scheduler, x, likelihood, num_by_flow, **condition) -> dict[str, Estimate]:
    """
    The evidence lower bound of an autoencoder whose prior is a diffusion model of its latents (Vahdat et al. 2021,
    https://arxiv.org/abs/2106.05931, Eq. 1), in bits per dimension:

        −log p(x) ≤ E [ log q(z | x) − log p(x | z) − log p(z) ],   log p(z) = log p(z̃) + d log s

    with z ~ q(z | x), s the `scaling_factor`, and z̃ = s (z − shift), which the U-Net sees. −log p(z̃) is that of the
    probability-flow ODE, for the first `num_by_flow` images, and for all images it is bounded by Σ_t L_t + L_T.
    """
    latents, rest, bits = [], [], x[0].numel() * math.log(2)
    for part in torch.arange(len(x)).split(256):
        q = vae.encode(x[part]).latent_dist
        epsilon = BatchRandom(0, 0, part, len(x), x.device).normal(q.mean.shape[1:], dtype=x.dtype)
        z = q.mean + q.std * epsilon
        log_q = -0.5 * (epsilon**2 + q.logvar + math.log(2 * math.pi)).flatten(1).sum(dim=1)
        log_p = log_likelihood(likelihood, x[part], vae.decode(z))
        latents.append((z - vae.config.shift_factor) * vae.config.scaling_factor)
        rest.append((log_q - log_p).cpu().double() / bits)
    latents = torch.cat(latents)
    share = latents[0].numel() / x[0].numel()  # d / D
    rest = torch.cat(rest) - share * math.log2(vae.config.scaling_factor)
    few = {name: values[:num_by_flow] for name, values in condition.items()}
    flow = rest[:num_by_flow] + share * probability_flow_bits(unet, scheduler, latents[:num_by_flow], **few)
    prior, rest = variational_bound(unet, scheduler, latents, likelihood="gaussian", **condition), Estimate.of(rest)
    error = math.hypot(rest.standard_error, share * prior.standard_error)
    bound = Estimate.with_error(rest.value + share * prior.value, len(x), error)
    return {"probability-flow ODE": Estimate.of(flow), "variational bound": bound}
