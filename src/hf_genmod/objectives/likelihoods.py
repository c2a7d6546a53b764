"""Likelihoods, KL divergences and the terms of the variational bound."""

import math

import torch
import torch.nn.functional as F


def variational_bound_term(
    scheduler, model_output, x_0, x_t, t, clip: bool = False, likelihood: str = "discretised_gaussian"
) -> torch.Tensor:
    """
    L_t, one term of the variational bound on −log p(x_0) (Ho et al. 2020, Eq. 5), (n,), in bits per dimension:

        L_{t−1} = KL( q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t) ) for t > 1,   L_0 = −log p_θ(x_0 | x_1)

    The paper's t is the argument `t` plus one. Both distributions are Gaussian.

    Args:
        scheduler ([`AncestralDDPMScheduler`]): The process; its `variance_type` determines Σ_θ.
        model_output (`torch.Tensor` of shape `(n, c, h, w)`, or `(n, 2c, h, w)` with a learned variance).
        x_0, x_t (`torch.Tensor` of shape `(n, c, h, w)`): Images in [-1, 1], and the same images at t.
        t (`torch.Tensor` of shape `(n,)`): Integers in 0 ... T-1.
        clip (`bool`, defaults to `False`): Whether to clip x̂_0, as in sampling; not for training.
        likelihood (`str`): p(x_0 | x_1): `"discretised_gaussian"` for 8-bit images (Eq. 13), or the density
            `"gaussian"` for latents.
    """
    prediction, predicted_variance = scheduler.split_model_output(model_output, x_t)
    predicted_x_0 = scheduler.predict_original_sample(prediction, t, x_t, clip=clip)
    p_mean = scheduler.posterior_mean(predicted_x_0, t, x_t)
    p_log_variance = scheduler.reverse_log_variance(t, x_t, predicted_variance=predicted_variance).expand_as(p_mean)
    q_mean, q_log_variance = scheduler.posterior_mean(x_0, t, x_t), scheduler.posterior_log_variance(t, x_t)
    kl = gaussian_kl(q_mean, q_log_variance, p_mean, p_log_variance)
    nll = -GAUSSIANS[likelihood](x_0, p_mean, p_log_variance)
    first = (t == 0).reshape(-1, *[1] * (x_0.ndim - 1))
    return torch.where(first, nll, kl).flatten(1).mean(dim=1) / math.log(2)


def log_likelihood(likelihood: str, x, output) -> torch.Tensor:
    """
    log p(x | z) in nats, summed over the values of each image, (n,).

    Args:
        likelihood (`str`): `"gaussian"`, `"discretised_gaussian"` or `"bernoulli"`, see [`VariationalAutoencoder`].
        x (`torch.Tensor` of shape `(n, c, h, w)`): Values in [-1, 1]; 8-bit values for the discretised Gaussian, -1
            or 1 for the Bernoulli.
        output: The parameters of p(x | z): `sample` and `log_variance` of a Gaussian, or `logits` of a Bernoulli.

    Raises:
        ValueError: If the output belongs to another likelihood.
    """
    if (likelihood == "bernoulli") != (output.logits is not None):
        given = "a variance and no logits" if output.logits is None else "logits and no variance"
        raise ValueError(f"likelihood: {likelihood!r}, but the model gives {given}; use the likelihood of its config")
    if likelihood == "bernoulli":
        values = F.logsigmoid(x * output.logits.to(x.dtype))  # p(x = −1) = 1 − sigmoid(l) = sigmoid(−l)
    else:
        values = GAUSSIANS[likelihood](x, output.sample.to(x.dtype), output.log_variance.to(x.dtype))
    return values.flatten(1).sum(dim=1)


def gaussian_kl(mean_1, log_variance_1, mean_2, log_variance_2) -> torch.Tensor:
    """KL( N(μ_1, σ_1²) ‖ N(μ_2, σ_2²) ) = ½ (log σ_2²/σ_1² + σ_1²/σ_2² + (μ_1 − μ_2)²/σ_2² − 1), elementwise."""
    difference = log_variance_2 - log_variance_1
    return 0.5 * (difference + torch.exp(-difference) + (mean_1 - mean_2) ** 2 * torch.exp(-log_variance_2) - 1)


def gaussian_log_likelihood(x, mean, log_variance) -> torch.Tensor:
    """log N(x; μ, σ²), elementwise, in nats."""
    return -0.5 * ((x - mean) ** 2 * torch.exp(-log_variance) + log_variance + math.log(2 * math.pi))


def discretised_gaussian_log_likelihood(x_0, mean, log_variance) -> torch.Tensor:
    """log ∫ N(x; μ, σ²) dx over the 8-bit bin of x_0, elementwise, in nats (Ho et al. 2020, Eq. 13). Bins are 2/255
    wide around k/127.5 − 1; the first begins at −∞ and the last ends at +∞."""
    inverse_std = torch.exp(-0.5 * log_variance)
    lower = ((x_0 - 1 / 255 - mean) * inverse_std).masked_fill(x_0 < -0.999, -1e4)
    upper = ((x_0 + 1 / 255 - mean) * inverse_std).masked_fill(x_0 > 0.999, 1e4)
    # Φ(u) − Φ(l) = Φ(−l) − Φ(−u): the tail where both are small gives the more precise difference.
    right = lower + upper > 0
    lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    log_upper, log_lower = _log_ndtr(upper), _log_ndtr(lower)
    return log_upper + torch.log1p(-torch.exp((log_lower - log_upper).clamp(max=-1e-7)))


def _log_ndtr(x):
    """log Φ(x), on the CPU where the device, MPS, has no such operator."""
    return torch.special.log_ndtr(x.cpu() if x.device.type == "mps" else x).to(x.device)


GAUSSIANS = {"discretised_gaussian": discretised_gaussian_log_likelihood, "gaussian": gaussian_log_likelihood}
