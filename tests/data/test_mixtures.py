"""What mixtures of Gaussians say of their diffusion, against sums over a grid, derivatives and samples."""

import math

import pytest
import torch
from tiny import randn

from hf_genmod.data.mixtures import GaussianMixture, in_the_plane, of_pictures

ALPHA_BARS = [1.0, 0.9, 0.3, 0.01]
PLANE, PICTURES = in_the_plane(), of_pictures()
SOME_CLASSES = [None, 0, 2, torch.tensor([0, 1, 2, 3, 0, 1, 2])]  # 3 is any class


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def grid(low=-3.0, high=3.0, n=241):
    """Points in the plane, (n², 2), and the area of each."""
    axis = torch.linspace(low, high, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), ((high - low) / (n - 1)) ** 2


@pytest.mark.parametrize("y", [None, 0, 1])
@pytest.mark.parametrize("alpha_bar", [0.9, 0.3, 0.01])
def test_density_and_posterior_are_integrals_over_x_0(alpha_bar, y):
    x_0, area = grid()
    x_t = randn(7, 2)
    squares = (x_t[:, None] - math.sqrt(alpha_bar) * x_0).square().sum(dim=2)
    likelihood = torch.exp(-squares / (2 * (1 - alpha_bar))) / (2 * math.pi * (1 - alpha_bar))  # q(x_t | x_0)
    joint = likelihood * PLANE.log_density(x_0, y=y).exp() * area
    torch.testing.assert_close(PLANE.log_density(x_t, alpha_bar, y), joint.sum(dim=1).log(), rtol=0, atol=1e-6)
    posterior = joint / joint.sum(dim=1, keepdim=True)
    mean = posterior @ x_0
    torch.testing.assert_close(PLANE.posterior_mean(x_t, alpha_bar, y), mean, rtol=0, atol=1e-6)
    trace = posterior @ x_0.square().sum(dim=1) - mean.square().sum(dim=1)
    torch.testing.assert_close(PLANE.posterior_variance(x_t, alpha_bar, y), trace, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha_bar", ALPHA_BARS)
def test_density_has_the_integral_one(alpha_bar):
    x, area = grid(-6, 6)
    assert (PLANE.log_density(x, alpha_bar).exp() * area).sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("y", SOME_CLASSES, ids=str)
@pytest.mark.parametrize("alpha_bar", [*ALPHA_BARS, torch.linspace(0.05, 0.95, 7)], ids=str)
@pytest.mark.parametrize("mixture", [PLANE, PICTURES], ids=["plane", "pictures"])
def test_score_is_the_gradient_and_gives_the_posterior(mixture, alpha_bar, y):
    if mixture is PICTURES and y is not None:
        y = torch.as_tensor(y) % 3
    x_t = (0.5 * randn(7, mixture.dimensions)).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x_t, alpha_bar, y).sum(), x_t)
    score, x = mixture.score(x_t, alpha_bar, y).detach(), x_t.detach()
    torch.testing.assert_close(score, gradient)
    a = torch.as_tensor(alpha_bar, dtype=torch.float64).reshape(-1, 1)
    tweedie = (x + (1 - a) * score) / a.sqrt()  # E[x_0 | x_t] by the formula of Tweedie
    torch.testing.assert_close(mixture.posterior_mean(x, alpha_bar, y), tweedie)


@pytest.mark.parametrize("alpha_bar", [0.9, 0.3])
def test_posterior_variance_is_the_divergence_of_the_best_prediction(alpha_bar):
    x_t = 0.5 * randn(1, 64)
    jacobian = torch.autograd.functional.jacobian(lambda x: PICTURES.posterior_mean(x, alpha_bar, 1), x_t)
    trace = jacobian.reshape(64, 64).trace() * (1 - alpha_bar) / math.sqrt(alpha_bar)  # Cov = (1−ᾱ)/√ᾱ ∂x̂_0/∂x_t
    torch.testing.assert_close(PICTURES.posterior_variance(x_t, alpha_bar, 1)[0], trace)


@pytest.mark.parametrize("alpha_bar", ALPHA_BARS)
def test_classes_are_those_of_bayes(alpha_bar):
    x_t = randn(7, 2).requires_grad_()
    log_p = PLANE.log_class_probabilities(x_t, alpha_bar)
    assert log_p.shape == (7, 3)
    for y, prior in enumerate((0.4, 0.3, 0.3)):
        expected = math.log(prior) + PLANE.log_density(x_t, alpha_bar, y) - PLANE.log_density(x_t, alpha_bar)
        torch.testing.assert_close(log_p[:, y], expected)
        (gradient,) = torch.autograd.grad(log_p[:, y].sum(), x_t, retain_graph=True)
        torch.testing.assert_close(gradient, PLANE.score(x_t, alpha_bar, y) - PLANE.score(x_t, alpha_bar))


@pytest.mark.parametrize("y", [None, 0])
def test_samples_have_the_moments_of_the_mixture(y):
    n = 40_000
    x, labels = PLANE.sample(n, seeded(), y)
    weights = torch.tensor([0.2, 0.2, 0.3, 0.3] if y is None else [0.5, 0.5, 0, 0], dtype=torch.float64)
    mean = weights @ PLANE.means
    within = (weights[:, None, None] * PLANE.covariances).sum(dim=0)
    between = (PLANE.means - mean).T @ (weights[:, None] * (PLANE.means - mean))
    torch.testing.assert_close(x.mean(dim=0), mean, rtol=0, atol=4 * 0.6 / n**0.5)
    torch.testing.assert_close(x.T.cov(), within + between, rtol=0, atol=4 * 0.4 / n**0.5)
    shares = torch.bincount(labels, minlength=3) / n
    expected = torch.tensor([0.4, 0.3, 0.3] if y is None else [1.0, 0, 0])
    assert (shares - expected).abs().max() < 4 * 0.5 / n**0.5


def test_samples_of_classes_are_of_each_its_own():
    y = torch.tensor([0, 1, 2, 1])
    assert torch.equal(PLANE.sample(4, seeded(), y)[1], y)


@pytest.mark.parametrize("mixture, known", [(PLANE, [True, False]), (PICTURES, [True] * 40 + [False] * 24)])
def test_the_rest_given_a_part_is_the_joint_density_over_that_of_the_part(mixture, known):
    known, (x, _) = torch.tensor(known), mixture.sample(5, seeded())
    of_known = mixture.covariances[:, known][:, :, known]
    marginal = GaussianMixture(mixture.weights, mixture.means[:, known], of_known)
    for point in x:
        rest = mixture.given(known, point[known])
        expected = mixture.log_density(point[None]) - marginal.log_density(point[None, known])
        torch.testing.assert_close(rest.log_density(point[None, ~known]), expected)
        assert torch.equal(rest.classes, mixture.classes)


class TestFlow:
    @pytest.mark.parametrize("mixture", [PLANE, PICTURES], ids=["plane", "pictures"])
    @pytest.mark.parametrize("gamma, y", [(1.0, 1), (0.0, 1), (1.0, None)])
    def test_without_guidance_its_density_is_that_of_the_data(self, mixture, gamma, y):
        x, _ = mixture.sample(50, seeded(), y)
        expected = mixture.log_density(x, y=None if gamma == 0 else y)
        atol = 1e-3 if mixture is PLANE else 0.03
        torch.testing.assert_close(mixture.guided_log_density(x, y, gamma), expected, rtol=0, atol=atol)

    def test_there_and_back_is_where_it_began(self):
        noise = 50 * randn(20, 2)
        there, log_determinant = PLANE.flow(noise, 50, 0.01, 0, 3.0)
        back, other = PLANE.flow(there, 0.01, 50, 0, 3.0)
        torch.testing.assert_close(back, noise, rtol=1e-3, atol=0)
        torch.testing.assert_close(other, -log_determinant, rtol=0, atol=1e-3)

    def test_its_determinant_is_that_of_its_derivative(self):
        x = randn(1, 2)
        jacobian = torch.autograd.functional.jacobian(lambda x: PLANE.flow(x, 20, 0.05, 1, 2.5, 60)[0], x)
        expected = jacobian.reshape(2, 2).logdet()
        torch.testing.assert_close(PLANE.flow(x, 20, 0.05, 1, 2.5, 60)[1][0], expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("gamma", [0.5, 2.0, 4.0])
    def test_guided_density_has_the_integral_one(self, gamma):
        x, area = grid(-1.8, 1.8, 61)
        density = PLANE.guided_log_density(x, 1, gamma, steps=60).exp()
        assert (density * area).sum().item() == pytest.approx(1, abs=5e-3)

    @pytest.mark.parametrize("gamma", [2.0, 4.0])
    def test_guided_density_is_not_the_power_of_the_classifier(self, gamma):
        x, area = grid(-1.8, 1.8, 61)
        log_p = PLANE.guided_log_density(x, 1, gamma, steps=60)
        tilted = PLANE.log_density(x) + gamma * PLANE.log_class_probabilities(x)[:, 1]
        tilted = tilted - (tilted.exp() * area).sum().log()
        divergence = (log_p.exp() * (log_p - tilted) * area).sum()
        assert divergence > 0.02


@pytest.mark.parametrize("arguments, sentence", [
    (([1, 1], [[0.0]], 1.0), "weights: there are 2 weights, 1 means, 1 covariances and 1 classes; give one of each"),
    (([1, -1], [[0.0], [1.0]], 1.0), "weights: -1 is negative"),
    (([1], [[0.0]], -1.0), "covariances: an eigenvalue is -1; all must be positive"),
])  # fmt: skip
def test_what_is_no_mixture_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        GaussianMixture(*arguments)
