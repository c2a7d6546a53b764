import math
from types import SimpleNamespace

import pytest
import torch
from algorithm_1 import batch_random, pictures
from tiny import LinearVAE, tiny_autoencoder

from hf_genmod import ElboObjective
from hf_genmod.data.randomness import BatchRandom, batch_positions
from hf_genmod.models.variational_autoencoder import LIKELIHOODS
from hf_genmod.objectives.likelihoods import log_likelihood


def batch_of(n=8, **more):
    return {"images": pictures((n, 3, 8, 8)), **more}


def test_is_log_p_less_the_divergence_of_the_posteriors():
    """log p(x) = ELBO + KL(q(z | x) ‖ p(z | x)), in a linear model where all of them are known."""
    vae, n = LinearVAE(offset=0.3, widening=1.4), 20_000
    x = pictures((1, 4, 1, 1)).double()
    loss, metrics = ElboObjective()(vae, {"images": x.expand(n, -1, -1, -1)}, batch_random(n))
    assert vae.gap(x) > 0.2
    assert metrics["elbo"].item() == pytest.approx((vae.log_p(x) - vae.gap(x)).item(), abs=0.05)
    torch.testing.assert_close(loss, -metrics["elbo"] / 4)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_loss_is_made_of_likelihood_and_divergence_of_one_sample(likelihood):
    vae, batch = tiny_autoencoder(likelihood=likelihood), batch_of()
    loss, metrics = ElboObjective(beta=0.5)(vae, batch, batch_random())

    rng, x = batch_random(), batch["images"]
    if likelihood == "bernoulli":
        x = 2 * (rng.uniform(3, 8, 8) < (x + 1) / 2).float() - 1
    output = vae(x, rng.normal(2, 4, 4))
    reconstruction = -log_likelihood(likelihood, x, output).mean()
    kl = output.latent_dist.kl().mean()
    torch.testing.assert_close(loss, (reconstruction + 0.5 * kl) / 192)
    torch.testing.assert_close(metrics["reconstruction"], reconstruction.detach())
    torch.testing.assert_close(metrics["elbo"], -(reconstruction + kl).detach())
    torch.testing.assert_close(metrics["kl_per_dimension"], kl.detach() / 32)
    assert ("bits_per_dimension" in metrics) == (likelihood == "discretised_gaussian")
    if "bits_per_dimension" in metrics:
        torch.testing.assert_close(metrics["bits_per_dimension"], -metrics["elbo"] / 192 / math.log(2))
    assert not any(value.requires_grad for value in metrics.values())


def test_gradient_is_the_difference_quotient():
    vae, objective = tiny_autoencoder().double(), ElboObjective(free_bits=0.01)
    batch, parameters = {"images": batch_of()["images"].double()}, list(vae.parameters())
    rng = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=rng, dtype=p.dtype) for p in parameters]

    def loss():
        return objective(vae, batch, batch_random())[0]

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss(), parameters), direction, strict=True))
    losses, h = [], 1e-5
    with torch.no_grad():
        for step in (h, -2 * h):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(step * d)
            losses.append(loss())
    assert abs(slope) > 0.1
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * h), slope.detach(), rtol=1e-6, atol=0)


def test_beta_rises_to_its_value_during_the_warmup_and_is_full_without_a_fraction():
    vae, objective = tiny_autoencoder(), ElboObjective(beta=3.0, beta_warmup=0.4)
    for fraction, beta in ((0.0, 0.0), (0.1, 0.75), (0.4, 3.0), (0.9, 3.0), (None, 3.0)):
        batch = batch_of() if fraction is None else batch_of(fraction=fraction)
        loss, metrics = objective(vae, batch, batch_random())
        kl = -metrics["elbo"] - metrics["reconstruction"]
        torch.testing.assert_close(loss.detach() * 192, metrics["reconstruction"] + beta * kl)
    full, _ = ElboObjective(beta=3.0)(vae, batch_of(fraction=0.1), batch_random())
    assert torch.equal(full, loss)


def test_free_bits_bound_the_divergence_of_each_dimension_from_below():
    vae, batch = tiny_autoencoder(), batch_of()
    q = vae.encode(batch["images"]).latent_dist
    normals = torch.distributions.Normal(q.mean, q.std), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(*normals).flatten(1).mean(dim=0)
    free = kl.median().item()  # some have less, some more
    plain, expected = ElboObjective()(vae, batch, batch_random())
    loss, metrics = ElboObjective(free_bits=free)(vae, batch, batch_random())
    bounded = torch.where(kl > free, kl, free).sum()
    torch.testing.assert_close(loss, (metrics["reconstruction"] + bounded) / 192)
    assert loss > plain and metrics == expected


def test_active_units_are_dimensions_whose_mean_varies():
    class Encoder(LinearVAE):
        def encode(self, x):
            posterior = super().encode(x).latent_dist
            posterior.mean = (
                torch.tensor([0.11, 0.09])[:, None, None] * torch.tensor([-1.0, 1.0] * 4)[:, None, None, None]
            )  # variances 0.0121 and 0.0081
            return SimpleNamespace(latent_dist=posterior)

    _, metrics = ElboObjective()(Encoder(), {"images": pictures((8, 4, 1, 1)).double()}, batch_random())
    assert metrics["active_units"] == 1


def test_a_bernoulli_model_sees_binary_pictures_drawn_by_their_brightness():
    seen = []
    vae = tiny_autoencoder(likelihood="bernoulli", in_channels=1, sample_size=2)
    vae.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    brightness = torch.tensor([0.0, 0.2, 0.7, 1.0]).reshape(1, 1, 2, 2)
    n = 4096
    for step in (0, 0, 1):
        images = (2 * brightness - 1).expand(n, -1, -1, -1)
        ElboObjective()(vae, {"images": images}, batch_random(n, step))
    assert set(seen[0].unique().tolist()) == {-1.0, 1.0}
    rate = (seen[0] == 1).float().mean(dim=0, keepdim=True)
    assert ((rate - brightness).abs() <= 4 * (brightness * (1 - brightness) / n).sqrt()).all()
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_loss_of_a_picture_depends_on_neither_its_neighbours_nor_the_processes(likelihood):
    vae, x = tiny_autoencoder(likelihood=likelihood).double(), batch_of()["images"].double()
    objective = ElboObjective(beta=0.5)

    def loss(images, positions):
        return objective(vae, {"images": images}, BatchRandom(0, 0, positions, 8))[0].detach()

    alone = torch.stack([loss(x[i : i + 1], [i]) for i in range(8)])
    torch.testing.assert_close(loss(x, range(8)), alone.mean())
    for process in range(2):
        positions = batch_positions(8, process_index=process, num_processes=2)
        torch.testing.assert_close(loss(x[positions], positions), alone[positions].mean())
    others = torch.cat([x[:1], x[1:].flip(0)])
    torch.testing.assert_close(
        8 * loss(others, range(8)) - 7 * loss(others[1:], range(1, 8)), alone[0], rtol=1e-9, atol=1e-9
    )
    assert alone.std() > 0


def test_finds_the_shape_of_the_latents_through_a_wrapper():
    vae = tiny_autoencoder()

    class Wrapper(torch.nn.Module):  # as DistributedDataParallel is
        def __init__(self):
            super().__init__()
            self.module = vae

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    wrapped, _ = ElboObjective()(Wrapper(), batch_of(), batch_random())
    assert torch.equal(wrapped, ElboObjective()(vae, batch_of(), batch_random())[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"beta_warmup": 1.5}, "beta_warmup: 1.5 is not a fraction of the run between 0 and 1"),
        ({"beta": -1.0}, "beta: -1.0 is negative"),
        ({"free_bits": -0.1}, "free_bits: -0.1 is negative"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ElboObjective(**arguments)
