"""The checks of the exercises: each calls a function and raises an `AssertionError` that says what is wrong."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from hf_genmod import AncestralDDPMScheduler
from hf_genmod.objectives.likelihoods import gaussian_kl


def tell(check: Callable, answer: Callable) -> None:
    """Prints whether a function passes a check, or what is not right yet."""
    try:
        check(answer)
    except AssertionError as error:
        print(f"not yet: {error}")
    except Exception as error:  # of the student's function
        print(f"not yet: the function raises {type(error).__name__}: {error}")
    else:
        print("right")


def show(figure, name: str) -> None:
    """Shows a figure of matplotlib, and saves it as `name` in the folder COURSE_FIGURES, if that is set."""
    from IPython.display import display
    from matplotlib import pyplot
    from PIL import Image

    if folder := os.environ.get("COURSE_FIGURES"):
        file = Path(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=72)
        Image.open(file).convert("RGB").quantize(256, kmeans=3).save(file, optimize=True)  # half of the bytes
    display(figure)
    pyplot.close(figure)


def agree(found, expected: torch.Tensor, sentence: str) -> None:
    """Asserts that an answer is a tensor with the expected values."""
    assert found is not ..., "replace the dots by a formula"
    assert isinstance(found, torch.Tensor), f"the answer is {found!r:.60}, which is no tensor"
    assert found.shape == expected.shape, f"the shape is {tuple(found.shape)}; it must be {tuple(expected.shape)}"
    assert torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-5), sentence


# Notebook 1


def kl_to_prior(answer: Callable) -> None:
    """KL(q(z | x) ‖ N(0, I)) of each picture from μ and log σ²."""
    some, others = torch.randn(2, 5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros_like(some)
    for mean, log_variance, sentence in (
        (zero, zero, "where q is the prior, it is not 0"),
        (some, zero, "for σ = 1 it is not half the sum of μ²; see the formula above with μ_2 = 0 and σ_2 = 1"),
        (zero, others, "for μ = 0 it is not ½ (σ² − log σ² − 1), added over the dimensions; mind the logarithm"),
        (some, others, "where both μ and σ differ from the prior, the terms do not add"),
    ):
        expected = gaussian_kl(mean, log_variance, zero, zero).flatten(1).sum(dim=1)
        agree(answer(mean, log_variance), expected, sentence)


# Notebook 2


def posterior_mean(answer: Callable) -> None:
    """μ̃_t(x_t, x_0) from x_0, x_t, ᾱ_t and ᾱ_{t−1}."""
    scheduler = AncestralDDPMScheduler()
    x_0, x_t = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in (1, 20, 999):
        alpha_bar_t, alpha_bar_prev = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 1]
        found, expected = answer(x_0, x_t, alpha_bar_t, alpha_bar_prev), scheduler.posterior_mean(x_0, t, x_t)
        agree(found, expected, f"at t = {t} the mean differs by up to {difference(found, expected)}; see μ̃ above")


def difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    known = isinstance(found, torch.Tensor) and found.shape == expected.shape
    return f"{(found - expected).abs().max().item():.3g}" if known else "all"


# Notebook 3


def latent_variance(answer: Callable) -> None:
    """Var(z) of z = μ + σ ε from μ and σ."""
    means = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    stds = 0.2 + torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    zero, levels = torch.zeros_like(means), torch.tensor([0.0, 3.0, 6.0])[:, None, None]
    for mean, std, sentence in (
        (means, zero, "for σ = 0, z is μ: its variance is the mean of μ², less the square of the mean of μ"),
        (zero + 2, stds, "where μ is the same everywhere, it is the mean of σ²"),
        (means + levels, stds, "it is E[z²] − E[z]² over all channels together; E[z²] of a single z is μ² + σ²"),
    ):
        expected = (mean.double().square() + std.double().square()).mean() - mean.double().mean().square()
        found = answer(mean, std)
        assert found is not ..., "replace the dots by a formula"
        assert isinstance(found, torch.Tensor), f"the answer is {found!r:.60}, which is no tensor"
        assert found.shape == (), f"the shape is {tuple(found.shape)}; one number is asked for"
        # Divided by N or by N − 1, which differ by less than a thousandth here.
        assert torch.isclose(found.double(), expected, rtol=2e-3), f"{sentence}; found {found:.4f}, not {expected:.4f}"


# Notebook 4


def guided_velocity(answer: Callable) -> None:
    """v̂ of v_θ, ∇ log f, s and ᾱ_t."""
    epsilon, x_t, g = torch.randn(3, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for alpha_bar_t in torch.tensor([0.9, 0.5, 0.1]):
        a, b = alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()

        def velocity(epsilon, a=a, b=b):
            return a * epsilon - b * (x_t - b * epsilon) / a

        expected = velocity(epsilon - 3.0 * b * g)
        sentence = f"at ᾱ = {alpha_bar_t:.1f} it is not the v of the guided ε, of which x̂_0 = (x_t − √(1−ᾱ) ε̂) / √ᾱ"
        agree(answer(velocity(epsilon), g, 3.0, alpha_bar_t), expected, sentence)


# Notebook 5


def composed(answer: Callable) -> None:
    """ε̃ from ε_∅, all ε_k, their weights and γ."""
    eps_null, *eps_classes = torch.randn(4, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    eps_classes = torch.stack(eps_classes)
    for weights, sentence in (
        ([1.0, 0.0, 0.0], "with the weights 1, 0, 0 it is not ε_∅ + γ (ε_1 − ε_∅)"),
        ([1.0, -0.5, 0.0], "a class of weight −0.5 does not take away half of its difference from ε_∅"),
        ([0.0, 0.0, 0.0], "where all weights are 0, ε_∅ must be left"),
    ):
        expected = eps_null + 2.5 * sum(w * (eps - eps_null) for w, eps in zip(weights, eps_classes, strict=True))
        agree(answer(eps_null, eps_classes, torch.tensor(weights), 2.5), expected, sentence)


# Notebook 6


def masked_attention(answer: Callable) -> None:
    """softmax(Q Kᵀ / √d) V over the tokens that count."""
    query, key, value = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, True, True, True, True], [True, False, True, False, False, True]])
    for scale, counts, sentence in (
        (1.0, torch.ones_like(mask), "where all tokens count, it is not softmax(Q Kᵀ / √d) V"),
        (1.0, mask, "give tokens that do not count a score of −∞ before the softmax, so that the others add up to 1"),
        (100.0, mask, "where scores are large, exponentials overflow or all become 0; give torch's softmax −∞"),
    ):
        expected = torch.nn.functional.scaled_dot_product_attention(scale * query, key, value, counts[:, None, None])
        agree(answer(scale * query, key, value, counts), expected, sentence)
