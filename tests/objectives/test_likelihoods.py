import math
from types import SimpleNamespace

import pytest
import torch
from algorithm_1 import SHAPE, pictures, scheduler
from tiny import tiny_autoencoder

from hf_genmod.objectives.likelihoods import (
    discretised_gaussian_log_likelihood,
    gaussian_kl,
    log_likelihood,
    variational_bound_term,
)


@pytest.mark.parametrize("variance_type", ("fixed_small", "fixed_large"))
def test_bound_is_the_weighted_noise_error_of_ho_et_al(variance_type):
    """L_t = β_t² / (2 σ_t² α_t (1−ᾱ_t)) ‖ε − ε_θ‖², plus what the two variances differ by (Eqs. 8 and 12)."""
    process, x_0 = scheduler(variance_type=variance_type), pictures().double()
    t = torch.tensor([1, 2, 10, 100, 300, 500, 900, 999])
    epsilon = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    column = lambda values: values.double()[t].reshape(-1, 1, 1, 1)  # noqa: E731
    beta, alpha, alpha_bar = map(column, (process.betas, process.alphas, process.alphas_cumprod))
    alpha_bar_prev = process.alphas_cumprod.double()[t - 1].reshape(-1, 1, 1, 1)
    posterior = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
    sigma_squared = posterior if variance_type == "fixed_small" else beta
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * epsilon

    measured = variational_bound_term(process, epsilon + error, x_0, x_t, t)

    weighted = beta**2 / (2 * sigma_squared * alpha * (1 - alpha_bar)) * error**2
    ratio = posterior / sigma_squared
    expected = (weighted + 0.5 * (ratio - 1 - ratio.log())).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(measured, expected, rtol=2e-3, atol=1e-6)


def test_learned_variance_at_its_ends_gives_the_bounds_of_the_fixed_ones():
    x_0, t = pictures(), torch.arange(100, 900, 100)
    x_t, epsilon = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    learned = scheduler(variance_type="learned_range")
    for v, fixed in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        output = torch.cat([epsilon, torch.full(SHAPE, v)], dim=1)
        torch.testing.assert_close(
            variational_bound_term(learned, output, x_0, x_t, t),
            variational_bound_term(scheduler(variance_type=fixed), epsilon, x_0, x_t, t),
        )


def test_kl_equals_that_of_torch():
    mean_1, log_variance_1, mean_2, log_variance_2 = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    first, second = (
        torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        for mean, log_variance in ((mean_1, log_variance_1), (mean_2, log_variance_2))
    )
    torch.testing.assert_close(
        gaussian_kl(mean_1, log_variance_1, mean_2, log_variance_2),
        torch.distributions.kl_divergence(first, second),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("mean, log_variance", [(0.0, 0.0), (0.3, -8.0), (-1.0, -10.0), (1.4, -4.0), (5.0, 2.0)])
def test_likelihoods_of_all_256_values_sum_to_one(mean, log_variance):
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_likelihood = discretised_gaussian_log_likelihood(
        values, torch.tensor(mean).double(), torch.tensor(log_variance).double()
    )
    torch.testing.assert_close(log_likelihood.exp().sum(), torch.tensor(1.0).double())


def test_likelihood_and_its_gradient_stay_finite_far_out():
    values = torch.tensor([-1.0, 0.0, 1.0])
    mean = torch.tensor([3.0, -3.0, -3.0], requires_grad=True)
    log_variance = torch.tensor([-9.0, -9.0, -9.0], requires_grad=True)
    log_likelihood = discretised_gaussian_log_likelihood(values, mean, log_variance)
    log_likelihood.sum().backward()
    for tensor in (log_likelihood, mean.grad, log_variance.grad):
        assert torch.isfinite(tensor).all()
    assert (mean.grad * (values - mean) > 0).all()  # towards the value


def test_log_likelihood_of_a_gaussian_is_that_of_torch():
    x, mean, log_variance = pictures(), 0.5 * pictures().flip(0), torch.tensor(-1.3)
    output = SimpleNamespace(sample=mean, log_variance=log_variance, logits=None)
    expected = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(x).sum(dim=(1, 2, 3))
    torch.testing.assert_close(log_likelihood("gaussian", x, output), expected)


def test_log_likelihood_of_a_bernoulli_is_that_of_torch_far_out_too():
    x = torch.where(pictures() > 0, 1.0, -1.0)
    logits = 100 * pictures().flip(0)
    output = SimpleNamespace(sample=torch.tanh(logits / 2), log_variance=None, logits=logits)
    expected = torch.distributions.Bernoulli(logits=logits).log_prob((x + 1) / 2).sum(dim=(1, 2, 3))
    torch.testing.assert_close(log_likelihood("bernoulli", x, output), expected)


def test_likelihoods_of_all_binary_pictures_of_four_pixels_sum_to_one():
    vae = tiny_autoencoder(likelihood="bernoulli", in_channels=1, sample_size=2).double()
    binary = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).reshape(16, 1, 2, 2).double()
    z = torch.full((1, 2, 1, 1), 0.7).double().expand(16, -1, -1, -1)
    likelihoods = log_likelihood("bernoulli", binary, vae.decode(z)).exp()
    assert likelihoods.max() < 0.9
    torch.testing.assert_close(likelihoods.sum(), torch.ones((), dtype=torch.float64))


def test_likelihoods_of_all_values_of_two_8_bit_pixels_sum_to_one():
    grid = torch.arange(256).double() / 127.5 - 1
    x = torch.cartesian_prod(grid, grid).reshape(-1, 1, 1, 2)
    mean = torch.tensor([0.1, -0.8]).double().expand_as(x)
    output = SimpleNamespace(sample=mean, log_variance=torch.tensor(-3.0).double(), logits=None)
    likelihoods = log_likelihood("discretised_gaussian", x, output).exp()
    torch.testing.assert_close(likelihoods.sum(), torch.ones((), dtype=torch.float64))


def test_another_likelihood_than_that_of_the_model_is_refused():
    x = pictures((8, 3, 8, 8))
    with pytest.raises(ValueError, match="likelihood: 'bernoulli', but the model gives a variance and no logits"):
        log_likelihood("bernoulli", x, tiny_autoencoder()(x))
    with pytest.raises(ValueError, match="likelihood: 'gaussian', but the model gives logits and no variance"):
        log_likelihood("gaussian", x, tiny_autoencoder(likelihood="bernoulli")(x))
