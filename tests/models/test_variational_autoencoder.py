"""VariationalAutoencoder is its equations; what it and Autoencoder refuse."""

import math
import re

import pytest
import torch
from tiny import (
    TINY_AUTOENCODER,
    autoencoder_inputs,
    encoded,
    tiny_autoencoder,
)

from hf_genmod import Autoencoder, VariationalAutoencoder

CLASSES = (Autoencoder, VariationalAutoencoder)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class TestVariational:
    def test_a_sample_is_the_mean_plus_the_standard_deviation_times_epsilon(self):
        vae = tiny_autoencoder()
        x, epsilon = autoencoder_inputs(vae), randn(2, 2, 4, 4)
        mean, log_variance = encoded(vae, x).chunk(2, dim=1)
        output = vae(x, epsilon)
        torch.testing.assert_close(output.sample, vae.decode(mean + (0.5 * log_variance).exp() * epsilon).sample)
        assert torch.equal(output.latent_dist.mean, mean)
        assert torch.equal(vae(x).sample, vae.decode(mean).sample)

    def test_gradient_through_the_sample_is_the_difference_quotient(self):
        vae = tiny_autoencoder().double()
        x, epsilon = autoencoder_inputs(vae).double(), randn(2, 2, 4, 4, dtype=torch.float64)
        parameters = list(vae.encoder.parameters())
        direction = [randn(*p.shape, seed=i, dtype=torch.float64) for i, p in enumerate(parameters)]

        def value():
            return vae(x, epsilon).sample.sin().sum()

        slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(value(), parameters), direction, strict=True))
        values, h = [], 1e-5
        with torch.no_grad():
            for step in (h, -2 * h):
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(step * d)
                values.append(value())
        assert abs(slope) > 0.1
        torch.testing.assert_close((values[0] - values[1]) / (2 * h), slope.detach(), rtol=1e-6, atol=0)

    def test_kl_is_that_of_a_monte_carlo_estimate(self):
        vae, n = tiny_autoencoder(), 4000
        with torch.no_grad():
            q = vae.encode(3 * autoencoder_inputs(vae)).latent_dist
            z = q.mean + q.std * randn(n, *q.mean.shape)
            normal = torch.distributions.Normal
            log_ratio = normal(q.mean, q.std).log_prob(z) - normal(0.0, 1.0).log_prob(z)
        log_ratio = log_ratio.flatten(2).sum(dim=2)  # (samples, pictures)
        error = log_ratio.std(dim=0) / n**0.5
        assert (error < 0.02 * q.kl()).all()
        assert ((log_ratio.mean(dim=0) - q.kl()).abs() < 4 * error).all()

    def test_gaussian_variance_is_learned_or_given(self):
        x = autoencoder_inputs(tiny_autoencoder())
        learned = tiny_autoencoder()
        assert learned(x).log_variance is learned.log_variance and learned.log_variance.requires_grad
        assert learned.decode(randn(1, 2, 4, 4)).log_variance is learned.log_variance
        given = tiny_autoencoder(variance=0.25)
        assert not hasattr(given, "log_variance")
        assert given(x).log_variance.item() == pytest.approx(math.log(0.25))
        assert given(x).logits is None

    def test_bernoulli_gives_logits_and_their_mean(self):
        vae = tiny_autoencoder(likelihood="bernoulli")
        output = vae(autoencoder_inputs(vae))
        torch.testing.assert_close((output.sample + 1) / 2, output.logits.sigmoid())
        assert output.log_variance is None and not hasattr(vae, "log_variance")


class TestErrors:
    @pytest.mark.parametrize(
        "config, message",
        [
            (
                {"block_out_channels": (8, 18)},
                "block_out_channels: 18 is not a positive multiple of norm_num_groups (4); change one of them",
            ),
            (
                {"block_out_channels": (0, 8)},
                "block_out_channels: 0 is not a positive multiple of norm_num_groups (4)",
            ),
            ({"latent_channels": 0}, "latent_channels: 0 is not positive"),
            (
                {"sample_size": 9},
                "resolution 9x9: this network (patch_size 1, 2 levels) needs a height and width that 2 divides, such "
                "as 8x8 or 10x10",
            ),
            ({"sample_size": (8, 6), "patch_size": 2}, "resolution 8x6: this network (patch_size 2, 2 levels) needs"),
            (
                {"likelihood": "normal"},
                "likelihood: 'normal' is not one of gaussian, discretised_gaussian, bernoulli",
            ),
            ({"likelihood": "bernoulli", "variance": 0.1}, "variance: 0.1, but a bernoulli likelihood has none"),
            ({"variance": 0.0}, "variance: 0.0 is not positive"),
        ],
    )
    def test_of_construction(self, config, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            VariationalAutoencoder(**(TINY_AUTOENCODER | config))

    @pytest.mark.parametrize("kind", CLASSES)
    @pytest.mark.parametrize(
        "config, request_, message",
        [
            ({}, lambda m: m(randn(2, 4, 8, 8)), "sample: shape (2, 4, 8, 8) is not (n, 3, height, width)"),
            ({}, lambda m: m.encode(randn(3, 8, 8)), "sample: shape (3, 8, 8) is not (n, 3, height, width)"),
            ({}, lambda m: m.encode(randn(2, 3, 8, 7)), "needs a height and width that 2 divides, such as 8x6 or 8x8"),
            ({}, lambda m: m.latent_shape(8, 7), "needs a height and width that 2 divides, such as 8x6 or 8x8"),
            ({}, lambda m: m.decode(randn(2, 3, 4, 4)), "z: shape (2, 3, 4, 4) is not (n, 2, h, w), the latents of"),
            (
                {"vector_latents": True},
                lambda m: m(randn(2, 3, 8, 10)),
                "resolution 8x10: this network makes vectors (vector_latents) of images of 8x8 alone; resize them",
            ),
            (
                {"vector_latents": True},
                lambda m: m.decode(randn(2, 2, 4, 4)),
                "z: shape (2, 2, 4, 4) is not (n, 2, 1, 1), the latents of this network",
            ),
        ],
    )
    def test_of_a_request(self, kind, config, request_, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            request_(tiny_autoencoder(kind, **config))

    def test_of_epsilon(self):
        with pytest.raises(ValueError, match=re.escape("epsilon: shape (1, 2, 4, 4) is not (2, 2, 4, 4), that of z")):
            tiny_autoencoder()(randn(2, 3, 8, 8), randn(1, 2, 4, 4))
