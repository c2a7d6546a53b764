"""The likelihood by the probability-flow ODE."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import randn, tiny_unet

from hf_genmod import AncestralDDPMScheduler
from hf_genmod.data.exact_networks import ExactDenoiser
from hf_genmod.data.mixtures import GaussianMixture
from hf_genmod.data.value_range import to_model_range
from hf_genmod.evaluation.estimates import Estimate
from hf_genmod.evaluation.likelihood_bounds import variational_bound
from hf_genmod.evaluation.probability_flow import _flow, probability_flow_bits


def scheduler_of(prediction_type="epsilon", beta_schedule="linear", **more):
    more = {"variance_type": "fixed_large", "clip_sample": False} | more
    return AncestralDDPMScheduler(prediction_type=prediction_type, beta_schedule=beta_schedule, **more)


def numbers(means, s):
    """The mixture of numbers of which each is from one of the N(m, s²), equally often, of `means`."""
    return GaussianMixture([1.0] * len(means), [[m] for m in means], s**2)


def network_of(mixture, scheduler, size):
    """The exact denoiser of images of such numbers."""
    return ExactDenoiser(mixture, scheduler, tile=(1, 1, 1), size=size)


@pytest.mark.parametrize("means, s", [([0.3], 0.05), ([0.0], 1.0), ([-0.6, 0.4], 0.2)])
@pytest.mark.parametrize(
    "process",
    [
        {},
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ],
    ids=lambda process: process.get("prediction_type", "epsilon"),
)
def test_density_of_the_exact_denoiser_is_that_of_the_data(means, s, process):
    scheduler = scheduler_of(**process)
    x = numbers(means, s).sample(20 * 16, torch.Generator().manual_seed(0))[0].float().reshape(20, 1, 4, 4)
    mixture = numbers(means, s)
    truth = -mixture.log_density(x.reshape(-1, 1)).reshape(20, -1).mean(dim=1) / math.log(2)
    bits = probability_flow_bits(network_of(mixture, scheduler, (4, 4)), scheduler, x)
    assert (bits.mean() - truth.mean()).abs() < 0.01
    assert (bits - truth).abs().max() < 0.03


def test_bits_of_images_are_those_of_their_bins_and_not_above_the_variational_bound():
    m, s = 0.1, 0.2
    scheduler = scheduler_of()
    x = m + s * randn(100, 1, 8, 8)
    images = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    middle = to_model_range(images).double()
    cdf = torch.distributions.Normal(m, s).cdf
    truth = -torch.log2(cdf(middle + 1 / 255) - cdf(middle - 1 / 255)).mean()
    unet = network_of(numbers([m], s), scheduler, (8, 8))
    bits = Estimate.of(probability_flow_bits(unet, scheduler, images))
    assert abs(bits.value - truth) < 0.004
    bound = variational_bound(unet, scheduler, images, draws=10)
    assert bits.value < bound.value + 3 * bound.standard_error


def test_interval_covers_the_probes_where_values_depend_on_each_other():
    """For x_0 ~ N(0, C) the ODE mixes the values, so that single probes miss ∇·x̂_0, but not on average."""
    scheduler, n = scheduler_of(), 2000
    root = 0.3 * randn(4, 4).float()
    C = root @ root.T + 0.01 * torch.eye(4)
    values, vectors = torch.linalg.eigh(C)

    def unet(x_t, t):
        alpha_bar = scheduler.alphas_cumprod[t][:, None]
        along = x_t.flatten(1) @ vectors
        return SimpleNamespace(
            sample=((1 - alpha_bar).sqrt() * along / (alpha_bar * values + 1 - alpha_bar) @ vectors.T).view_as(x_t)
        )

    x = (vectors @ (values.sqrt() * randn(4).float())).reshape(1, 1, 2, 2)
    truth = -torch.distributions.MultivariateNormal(torch.zeros(4), C).log_prob(x.flatten()).item() / 4 / math.log(2)
    bits = probability_flow_bits(unet, scheduler, x.expand(n, -1, -1, -1), batch_size=n)
    error = (bits.std() / n**0.5).item()
    assert 0.001 < error < 0.01
    assert abs(bits.mean().item() - truth) < 4 * error + 0.005


def test_divergence_of_a_network_is_right_on_average():
    """Against the whole Jacobian of x̂_0, and the variance of random signs, 2 Σ_{i≠j} of its symmetric part squared."""
    unet, t, n = tiny_unet(in_channels=1, out_channels=1), 300, 500
    scheduler = scheduler_of("v_prediction")
    alpha_bar = scheduler.alphas_cumprod[t].item()
    lambda_ = 0.5 * math.log((1 - alpha_bar) / alpha_bar)
    x_bar = randn(1, 1, 8, 8).float()

    def x_0(x_bar):
        x_t = alpha_bar**0.5 * x_bar
        return scheduler.predict_original_sample(unet(x_t, torch.tensor([t])).sample, t, x_t)

    jacobian = torch.autograd.functional.jacobian(x_0, x_bar).reshape(64, 64)
    signs = randn(n, 1, 8, 8).sign().float()
    epsilon, found = _flow(unet, scheduler, x_bar.expand(n, -1, -1, -1), t, lambda_, signs, {})
    torch.testing.assert_close(epsilon[:1], (x_bar - x_0(x_bar)).detach() / math.exp(lambda_), rtol=1e-4, atol=1e-5)
    symmetric = 0.5 * (jacobian + jacobian.T)
    off_diagonal = symmetric - symmetric.diag().diag()
    error = (2 * off_diagonal.square().sum() / n).sqrt().item()
    assert abs(found.mean().item() - (64 - jacobian.trace().item())) < 4 * error
    assert found.std().item() / n**0.5 == pytest.approx(error, rel=0.2)


def test_bits_belong_to_the_image_and_not_to_the_batches():
    unet = tiny_unet(in_channels=1, out_channels=2, num_classes=2)
    scheduler = scheduler_of(variance_type="learned_range")
    images = torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1, 1])

    def bits(labels, size):
        return probability_flow_bits(unet, scheduler, images, steps=4, batch_size=size, class_labels=labels)

    expected = bits(labels, 5)
    assert expected.shape == (5,) and not expected.requires_grad
    torch.testing.assert_close(bits(labels, 2), expected, rtol=1e-4, atol=1e-4)
    assert ((bits(1 - labels, 5) - expected).abs() > 1e-3).all()
