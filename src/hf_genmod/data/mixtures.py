"""Mixtures of Gaussians, whose diffusion is known exactly: what trained models only approximate is here a formula.

Points are fp64, (n, D). Methods that take `alpha_bar`, a number or (n,), take points x_t = √ᾱ x_0 + √(1−ᾱ) ε; at 1,
the default, they are x_0. The class y is a label or (n,) of them; `None`, or the number of classes, means any class.
[`~hf_genmod.data.exact_networks.ExactDenoiser`] puts a mixture in the place of a trained U-Net.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class GaussianMixture:
    """
    p(x_0) = Σ_k w_k N(x_0; μ_k, Σ_k). Then x_t has a mixture, too, and all of its diffusion is a formula:

        p(x_t) = Σ_k w_k N(x_t; √ᾱ μ_k, C_k),   C_k = ᾱ Σ_k + (1−ᾱ) I,   r_k = p(k | x_t) ∝ w_k N(x_t; √ᾱ μ_k, C_k)
        ∇ log p(x_t) = −Σ_k r_k C_k⁻¹ (x_t − √ᾱ μ_k)
        E[x_0 | x_t] = Σ_k r_k m_k,   m_k = μ_k + √ᾱ Σ_k C_k⁻¹ (x_t − √ᾱ μ_k)
        Cov(x_0 | x_t) = Σ_k r_k ((1−ᾱ) Σ_k C_k⁻¹ + m_k m_kᵀ) − E[x_0 | x_t] E[x_0 | x_t]ᵀ

    Args:
        weights (`Sequence[float]`): w_k ≥ 0, (K,); they are divided by their sum.
        means (`Sequence`): μ_k, (K, D).
        covariances (`Sequence` or `float`): Σ_k, (K, D, D), or s², which stands for s² I in all components.
        classes (`Sequence[int]`, *optional*): The class of each component, (K,); by default each is one.

    Raises:
        ValueError: If a weight is negative, an eigenvalue of a Σ_k not positive, or the numbers of components differ.
    """

    def __init__(self, weights, means, covariances, classes: Sequence[int] | None = None):
        weights, means, covariances = (torch.as_tensor(x, dtype=torch.float64) for x in (weights, means, covariances))
        K, D = means.shape
        if covariances.ndim == 0:
            covariances = (covariances * torch.eye(D, dtype=torch.float64)).expand(K, D, D)
        classes = torch.as_tensor(range(K) if classes is None else classes)
        if not len(weights) == len(covariances) == len(classes) == K:
            lengths = f"{len(weights)} weights, {K} means, {len(covariances)} covariances and {len(classes)} classes"
            raise ValueError(f"weights: there are {lengths}; give one of each for each component")
        self.variances, self.axes = torch.linalg.eigh(covariances)  # (K, D); (K, D, D), in its columns
        if not (self.variances > 0).all():
            raise ValueError(f"covariances: an eigenvalue is {self.variances.min():.3g}; all must be positive")
        if not (weights >= 0).all():
            raise ValueError(f"weights: {weights.min():.3g} is negative")
        self.weights, self.means, self.covariances, self.classes = weights / weights.sum(), means, covariances, classes
        self._means = torch.einsum("kd,kde->ke", means, self.axes)  # μ_k along the axes of Σ_k
        self.dimensions, self.num_classes = D, int(classes.max()) + 1

    def sample(self, n: int, generator: torch.Generator | None = None, y=None) -> tuple[Tensor, Tensor]:
        """n draws of x_0, (n, D), and their classes, (n,)."""
        k = torch.multinomial(self._log_weights(y).exp().expand(n, -1), 1, generator=generator)[:, 0]
        z = torch.randn(n, self.dimensions, generator=generator, dtype=torch.float64)
        return self.means[k] + torch.einsum("nde,ne->nd", self.axes[k], self.variances[k].sqrt() * z), self.classes[k]

    def log_density(self, x_t: Tensor, alpha_bar=1.0, y=None) -> Tensor:
        """log p(x_t | y), (n,), in nats."""
        return (self._components(x_t, alpha_bar)[0] + self._log_weights(y)).logsumexp(dim=1)

    def score(self, x_t: Tensor, alpha_bar=1.0, y=None) -> Tensor:
        """∇ log p(x_t | y), (n, D)."""
        log_p, gaps, variances = self._components(x_t, alpha_bar)
        return -self._sum((log_p + self._log_weights(y)).softmax(dim=1), gaps / variances)

    def log_class_probabilities(self, x_t: Tensor, alpha_bar=1.0) -> Tensor:
        """log p(y | x_t), (n, num_classes). The gradient of one is ∇ log p(x_t | y) − ∇ log p(x_t)."""
        log_joint = self._components(x_t, alpha_bar)[0] + self._log_weights(None)
        of_class = [log_joint[:, self.classes == y].logsumexp(dim=1) for y in range(self.num_classes)]
        return torch.stack(of_class, dim=1).log_softmax(dim=1)

    def posterior_mean(self, x_t: Tensor, alpha_bar, y=None) -> Tensor:
        """E[x_0 | x_t, y], (n, D): the best x̂_0."""
        return self._posteriors(x_t, alpha_bar, [y])[0][0]

    def posterior_variance(self, x_t: Tensor, alpha_bar, y=None) -> Tensor:
        """tr Cov(x_0 | x_t, y), (n,): the mean squared error of the best x̂_0, and σ² ∇·x̂_0 in x̄ = x_t / √ᾱ."""
        return self._posteriors(x_t, alpha_bar, [y])[0][1]

    def given(self, known: Tensor, values: Tensor) -> "GaussianMixture":
        """The mixture of the rest of x_0 where its values at `known`, bool (D,), are `values`."""
        at_known, of_rest = self.covariances[:, known], self.covariances[:, ~known]
        gaps = values - self.means[:, known]
        gains = torch.linalg.solve(at_known[:, :, known], at_known[:, :, ~known]).mT  # (K, rest, known)
        means = self.means[:, ~known] + torch.einsum("krd,kd->kr", gains, gaps.double())
        covariances = of_rest[:, :, ~known] - gains @ at_known[:, :, ~known]
        of_known = torch.distributions.MultivariateNormal(self.means[:, known], at_known[:, :, known])
        weights = (self.weights.log() + of_known.log_prob(values.double())).softmax(dim=0)
        return GaussianMixture(weights, means, (covariances + covariances.mT) / 2, self.classes)

    def flow(
        self, x_bar: Tensor, start: float, end: float, y=None, guidance_scale: float = 1.0, steps: int = 100
    ) -> tuple[Tensor, Tensor]:
        """
        The probability-flow ODE of x̄ = x_t / √ᾱ = x_0 + σ ε, guided towards the class y, by the method of Runge and
        Kutta in λ = log σ:

            dx̄/dλ = x̄ − x̂_0,   x̂_0 = E[x_0 | x_t] + γ (E[x_0 | x_t, y] − E[x_0 | x_t])
            ∇·E[x_0 | x_t, y] = tr Cov(x_0 | x_t, y) / σ²

        Args:
            x_bar (`torch.Tensor` of shape `(n, D)`): x̄ where σ is `start`.
            start, end (`float`): Positive, in either order.
            guidance_scale (`float`, defaults to 1.0): γ.
            steps (`int`, defaults to 100): Of order 4.

        Returns:
            x̄ where σ is `end`, (n, D), and the logarithm of the determinant of its derivative, ∫ ∇·(dx̄/dλ) dλ, (n,).
        """
        shares, classes = [guidance_scale, 1 - guidance_scale], [y, None]

        def slope(lambda_, state):
            sigma = math.exp(lambda_)
            alpha_bar = 1 / (1 + sigma**2)
            x_bar = state[:, :-1]
            x_t = math.sqrt(alpha_bar) * x_bar
            posteriors = self._posteriors(x_t, alpha_bar, classes)
            x_0, variance = (sum(share * of[i] for share, of in zip(shares, posteriors, strict=True)) for i in (0, 1))
            return torch.cat([x_bar - x_0, self.dimensions - variance[:, None] / sigma**2], dim=1)

        state = torch.cat([x_bar.double(), torch.zeros(len(x_bar), 1)], dim=1)  # x̄ and the integral
        lambdas, h = np.linspace(math.log(start), math.log(end), steps + 1), math.log(end / start) / steps
        for lambda_ in lambdas[:-1].tolist():
            a = slope(lambda_, state)
            b = slope(lambda_ + h / 2, state + h / 2 * a)
            c = slope(lambda_ + h / 2, state + h / 2 * b)
            d = slope(lambda_ + h, state + h * c)
            state = state + h / 6 * (a + 2 * b + 2 * c + d)
        return state[:, :-1], state[:, -1]

    def guided_log_density(
        self, x_0: Tensor, y, guidance_scale: float, low: float = 1e-3, high: float = 1e4, steps: int = 200
    ) -> Tensor:
        """
        log p of what the guided probability-flow ODE makes of noise, (n,), by the change of variables along it, from
        σ = `low` to `high`. At γ = 1 this is log p(x_0 | y), and at γ = 0 log p(x_0). At other γ it is not p(x_0)
        p(y | x_0)^γ / Z: the score of that density, once it is noised, is not the guided score (Bradley & Nakkiran
        2024, https://arxiv.org/abs/2408.09000).
        """
        x_T, log_determinant = self.flow(x_0, low, high, y, guidance_scale, steps)
        variance = 1 + high**2  # of x̄_T = x_T / √ᾱ_T
        log_prior = -0.5 * (x_T.square().sum(dim=1) / variance + self.dimensions * math.log(2 * math.pi * variance))
        return log_prior + log_determinant

    def _log_weights(self, y) -> Tensor:
        """log p(k | y), (1, K) or (n, K)."""
        y = torch.as_tensor(self.num_classes if y is None else y).reshape(-1, 1)
        weights = self.weights * ((y == self.classes) | (y == self.num_classes))
        return (weights / weights.sum(dim=1, keepdim=True)).log()

    def _components(self, x_t: Tensor, alpha_bar) -> tuple[Tensor, Tensor, Tensor]:
        """log p(x_t | k), (n, K); along the axes of Σ_k, x_t − √ᾱ μ_k and the eigenvalues of C_k, (n, K, D)."""
        alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64).reshape(-1, 1, 1)
        along = (x_t.double() @ self.axes.permute(1, 0, 2).flatten(1)).unflatten(1, self.means.shape)
        gaps = along - alpha_bar.sqrt() * self._means
        variances = alpha_bar * self.variances + 1 - alpha_bar
        log_p = -0.5 * (gaps.square() / variances + (2 * math.pi * variances).log()).sum(dim=2)
        return log_p, gaps, variances

    def _posteriors(self, x_t: Tensor, alpha_bar, classes) -> list[tuple[Tensor, Tensor]]:
        """E[x_0 | x_t, y], (n, D), and tr Cov(x_0 | x_t, y), (n,), for each y of some."""
        log_p, gaps, variances = self._components(x_t, alpha_bar)
        alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64).reshape(-1, 1, 1)
        gains = self.variances / variances
        means = self._means + alpha_bar.sqrt() * gains * gaps  # m_k along the axes of Σ_k
        squares = ((1 - alpha_bar) * gains + means.square()).sum(dim=2)  # E[‖x_0‖² | x_t, k]
        posteriors = []
        for y in classes:
            shares = (log_p + self._log_weights(y)).softmax(dim=1)
            mean = self._sum(shares, means)
            posteriors.append((mean, (shares * squares).sum(dim=1) - mean.square().sum(dim=1)))
        return posteriors

    def _sum(self, shares: Tensor, along: Tensor) -> Tensor:
        """Σ_k r_k v_k, (n, D), of v_k along the axes of Σ_k, (n, K, D)."""
        return (shares[:, :, None] * along).flatten(1) @ self.axes.mT.flatten(0, 1)


def in_the_plane() -> GaussianMixture:
    """Three classes in two dimensions, which overlap; the first has two components."""
    angles = torch.tensor([0.6, -0.3, 1.2, 0.1])
    deviations = torch.tensor([[0.3, 0.16], [0.22, 0.15], [0.3, 0.18], [0.4, 0.18]])
    turns = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=1).reshape(-1, 2, 2)
    covariances = turns @ deviations.square().diag_embed() @ turns.mT
    means = [[-0.7, 0.2], [-0.1, 0.6], [0.5, 0.3], [0.1, -0.5]]
    return GaussianMixture([0.2, 0.2, 0.3, 0.3], means, covariances, classes=[0, 0, 1, 2])


def of_pictures() -> GaussianMixture:
    """Images of 8×8 with a bright bar, upright (class 0) or level (class 1), in either half, and uneven light."""
    place = torch.arange(8.0)
    profiles = torch.stack([torch.exp(-((place - middle) ** 2) / 2) for middle in (1.5, 5.5)]) - 0.5  # (2, 8)
    upright = profiles[:, None, :].expand(2, 8, 8)
    means = torch.cat([upright, upright.mT]).reshape(4, 64)
    at = torch.cartesian_prod(place, place)  # of each pixel
    light = 0.2**2 * torch.exp(-torch.cdist(at, at).square() / 18) + 0.05**2 * torch.eye(64)
    return GaussianMixture([0.25] * 4, means, light.expand(4, 64, 64), classes=[0, 0, 1, 1])
