"""The evidence lower bound of a variational autoencoder."""

import math

import torch

from hf_genmod.objectives.likelihoods import gaussian_kl, log_likelihood


class ElboObjective:
    r"""
    The evidence lower bound of a variational autoencoder (Kingma & Welling 2014, https://arxiv.org/abs/1312.6114,
    Eq. 3), which is maximised:

        E_q[log p(x | z)] − β KL(q(z | x) ‖ N(0, I)),   z = μ(x) + σ(x) ε,   ε ~ N(0, I)

    p(x | z) is the `likelihood` in the config of the [`VariationalAutoencoder`]. For a Bernoulli, the values of each
    image are drawn from Bernoulli((x + 1) / 2) in each step, as −1 or 1. β ≠ 1 is a β-VAE (Higgins et al. 2017,
    https://openreview.net/forum?id=Sy2fzU9gl). With `free_bits` λ the KL is Σ_j max(λ, E_x[KL_j]) over the dimensions
    j of z, where E_x is the mean over the batch (Kingma et al. 2016, https://arxiv.org/abs/1606.04934, appendix C.8).

    The loss is in nats per value of an image. The metrics do not depend on β and λ: `elbo` and `reconstruction`,
    −E_q[log p(x | z)], in nats per image; `kl_per_dimension` in nats; `active_units`, the number of dimensions of z
    whose μ has a variance above 0.01 over the batch (Burda et al. 2016, https://arxiv.org/abs/1509.00519, section
    5.2); for the discretised Gaussian `bits_per_dimension`, the negative ELBO in bits per value.

    Args:
        beta (`float`, defaults to 1.0): β ≥ 0.
        beta_warmup (`float`, defaults to 0.0): Fraction of the run, in [0, 1], over which β rises linearly from 0.
            Without `batch["fraction"]`, as in validation, β has its full value.
        free_bits (`float`, defaults to 0.0): λ ≥ 0 in nats.
    """

    def __init__(self, beta: float = 1.0, beta_warmup: float = 0.0, free_bits: float = 0.0):
        if not 0 <= beta_warmup <= 1:
            raise ValueError(f"beta_warmup: {beta_warmup} is not a fraction of the run between 0 and 1")
        for name, value in (("beta", beta), ("free_bits", free_bits)):
            if value < 0:
                raise ValueError(f"{name}: {value} is negative")
        self.beta = beta
        self.beta_warmup = beta_warmup
        self.free_bits = free_bits

    def __call__(self, model, batch, rng) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x, vae = batch["images"], getattr(model, "module", model)  # out of DistributedDataParallel
        likelihood = vae.config.likelihood
        if likelihood == "bernoulli":
            x = torch.where(rng.uniform(x.shape[1:]) < (x + 1) / 2, 1.0, -1.0).to(x.dtype)
        output = model(x, epsilon=rng.normal(vae.latent_shape(*x.shape[2:]), dtype=x.dtype))
        posterior, zero = output.latent_dist, x.new_zeros(())
        reconstruction = -log_likelihood(likelihood, x, output).mean()
        kl = gaussian_kl(posterior.mean, posterior.logvar, zero, zero).flatten(1).mean(dim=0)  # (d,)
        beta = self.beta * min(1.0, batch.get("fraction", 1.0) / self.beta_warmup) if self.beta_warmup else self.beta
        loss = (reconstruction + beta * kl.clamp(min=self.free_bits).sum()) / x[0].numel()
        elbo = -(reconstruction + kl.sum()).detach()
        variance_of_mean = posterior.mean.detach().flatten(1).var(dim=0, correction=0)  # (d,)
        metrics = {
            "elbo": elbo,
            "reconstruction": reconstruction.detach(),
            "kl_per_dimension": kl.detach().mean(),
            "active_units": (variance_of_mean > 0.01).sum().to(x.dtype),
        }
        if likelihood == "discretised_gaussian":
            metrics["bits_per_dimension"] = -elbo / (x[0].numel() * math.log(2))
        return loss, metrics
