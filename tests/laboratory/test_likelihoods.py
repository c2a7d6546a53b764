"""The bound and the ODE's likelihood of exact denoisers are the likelihood."""

import math

import pytest
import torch
from exact import PICTURES, PLANE, process_of

from hf_genmod.data.exact_networks import ExactDenoiser
from hf_genmod.evaluation.estimates import Estimate
from hf_genmod.evaluation.likelihood_bounds import variational_bound
from hf_genmod.evaluation.probability_flow import probability_flow_bits

TILES = {PLANE: (2, 1, 1), PICTURES: (1, 8, 8)}


def images_and_log_p(mixture, n, y=None):
    x_0, labels = mixture.sample(n, torch.Generator().manual_seed(0), y)
    return x_0.float().reshape(n, *TILES[mixture]), mixture.log_density(x_0, y=y), labels


def nats(bits, mixture):
    return bits * mixture.dimensions * math.log(2)


@pytest.mark.parametrize("mixture, least", [(PLANE, 0.05), pytest.param(PICTURES, 0.6, marks=pytest.mark.slow)])
def test_the_bound_is_below_the_likelihood_and_close_to_it(mixture, least):
    """By `least` nats at most for each image."""
    process = process_of("epsilon", variance_type="fixed_large")
    x_0, log_p, _ = images_and_log_p(mixture, 2000)
    unet = ExactDenoiser(mixture, process, tile=TILES[mixture])
    bound = variational_bound(unet, process, x_0, draws=20, likelihood="gaussian")
    elbo, error = (-nats(value, mixture) for value in (bound.value, -bound.standard_error))
    assert log_p.mean() - least - 3 * error < elbo < log_p.mean() + 3 * error


@pytest.mark.parametrize("mixture", [PLANE, PICTURES], ids=["plane", "pictures"])
@pytest.mark.parametrize("y", [None, 1])
def test_the_probability_flow_gives_the_likelihood(mixture, y):
    process = process_of()
    x_0, log_p, labels = images_and_log_p(mixture, 64, y)
    unet = ExactDenoiser(mixture, process, conditional=y is not None, tile=TILES[mixture])
    condition = {} if y is None else {"class_labels": labels}
    bits = probability_flow_bits(unet, process, x_0, steps=100, **condition)
    gap = Estimate.of(nats(bits, mixture) + log_p)
    assert abs(gap.value) < 0.02 * mixture.dimensions**0.5 + 3 * gap.standard_error


@pytest.mark.slow
def test_of_pictures_of_eight_bits_it_is_the_density_times_the_width_of_a_bin():
    process = process_of()
    x_0, log_p, _ = images_and_log_p(PICTURES, 64)
    images = ((x_0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    log_p = PICTURES.log_density(images.double().flatten(1) / 127.5 - 1) + 64 * math.log(2 / 255)
    bits = probability_flow_bits(ExactDenoiser(PICTURES, process, tile=(1, 8, 8)), process, images, steps=100)
    assert nats(bits, PICTURES).mean().item() == pytest.approx(-log_p.mean().item(), abs=0.5)
