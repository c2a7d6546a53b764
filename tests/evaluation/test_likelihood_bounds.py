"""Bounds on the likelihood."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import LinearVAE, randn, tiny_autoencoder, tiny_unet, tiny_vae

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    ElboObjective,
    UnconditionalPipeline,
    VariationalAutoencoder,
)
from hf_genmod.data.randomness import BatchRandom
from hf_genmod.data.value_range import to_model_range
from hf_genmod.evaluation.estimates import Estimate
from hf_genmod.evaluation.likelihood_bounds import bits_per_dimension, importance_log_likelihood, variational_bound
from hf_genmod.evaluation.probability_flow import probability_flow_bits
from hf_genmod.objectives.likelihoods import log_likelihood


def value_and_error(estimate):
    return estimate.value, estimate.standard_error


def test_bound_of_the_exact_denoiser_of_unit_variance_is_the_likelihood():
    """For x_0 ~ N(0, 1) the exact reverse process has the variances `fixed_large`, so that the bound of each picture
    is −log p of its values, integrated over their 8-bit bins."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(1, 255, (1000, 1, 16, 16), generator=generator, dtype=torch.uint8)
    scheduler = AncestralDDPMScheduler(num_train_timesteps=1000, variance_type="fixed_large", clip_sample=False)

    def exact(x_t, t):
        return SimpleNamespace(sample=(1 - scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)).sqrt() * x_t)

    x = pictures.double() / 127.5 - 1
    cdf = torch.distributions.Normal(0, 1).cdf
    truth = -torch.log2(cdf(x + 1 / 255) - cdf(x - 1 / 255)).mean().item()
    bound, error = value_and_error(variational_bound(exact, scheduler, pictures, draws=60))
    assert error < 0.01
    assert abs(bound - truth) < 0.02


def test_bound_of_the_exact_denoiser_of_gaussian_data_is_its_entropy():
    """For x_0 ~ N(0, s²) per pixel the optimal ε̂ is known; with small steps the bound is close to the likelihood of
    the pixels rounded to 8 bits, log2(127.5) − h(x_0) bits per dimension."""
    s = 0.2
    x = s * torch.randn(2000, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    scheduler = AncestralDDPMScheduler(variance_type="fixed_large", clip_sample=False)

    def exact(x_t, t):
        alpha_bar = scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return SimpleNamespace(sample=(1 - alpha_bar).sqrt() / (alpha_bar * s**2 + 1 - alpha_bar) * x_t)

    truth = math.log2(127.5) + 0.5 * math.log2(2 * math.pi * math.e * s**2)
    bound, error = value_and_error(variational_bound(exact, scheduler, pictures, draws=10))
    assert error < 0.02
    assert truth - 3 * error < bound < truth + 0.03 + 3 * error


def test_bound_does_not_depend_on_the_order_of_the_pictures():
    """Sorted data, such as class folders, must not tie the timestep to the class."""
    grey, noise = torch.full((500, 1, 4, 4), 128), torch.randint(0, 256, (500, 1, 4, 4))
    kinds = torch.cat([grey, noise]).to(torch.uint8)
    scheduler = AncestralDDPMScheduler(variance_type="fixed_large")

    def half(x_t, t):
        return SimpleNamespace(sample=0.5 * x_t)

    bounds = [
        value_and_error(variational_bound(half, scheduler, pictures, draws=20))
        for pictures in (kinds, kinds.flip(0), kinds[torch.randperm(1000)])
    ]
    for bound, error in bounds[1:]:
        assert abs(bound - bounds[0][0]) < 4 * (error**2 + bounds[0][1] ** 2) ** 0.5


def test_bound_does_not_depend_on_the_batch_size():
    pictures = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8)
    scheduler = AncestralDDPMScheduler()
    bounds = [
        variational_bound(lambda x_t, t: SimpleNamespace(sample=x_t), scheduler, pictures, draws=2, batch_size=size)
        for size in (7, 50)
    ]
    assert math.isclose(bounds[0].value, bounds[1].value, rel_tol=1e-6)


class TestImportanceLogLikelihood:
    @staticmethod
    def estimate(vae, x, k, seed=0, **more):
        return importance_log_likelihood(vae, x, k, torch.Generator().manual_seed(seed), **more)

    def test_of_the_exact_posterior_is_exact_with_any_sample(self):
        vae, x = LinearVAE(), randn(5, 4, 1, 1)
        for k in (1, 3):
            torch.testing.assert_close(self.estimate(vae, x, k), vae.log_p(x))

    def test_rises_from_the_bound_to_the_truth(self):
        vae, n = LinearVAE(offset=0.3, widening=1.4), 4000
        x = randn(1, 4, 1, 1)
        truth, gap = vae.log_p(x), vae.gap(x)
        copies = x.expand(n, -1, -1, -1)
        estimates = {k: self.estimate(vae, copies, k) for k in (1, 4, 16)}
        means = {k: estimate.mean() for k, estimate in estimates.items()}
        errors = {k: estimate.std() / n**0.5 for k, estimate in estimates.items()}
        assert gap > 20 * errors[1]
        assert (means[1] - (truth - gap)).abs() < 4 * errors[1]
        assert means[1] + 4 * errors[1] < means[4] < means[16] - 4 * errors[16]
        assert means[16] < truth + 4 * errors[16]
        (closest,) = self.estimate(vae, x, 20_000, batch_size=4096)
        assert (closest - truth).abs() < 0.02

    @pytest.mark.parametrize("likelihood", ["gaussian", "discretised_gaussian", "bernoulli"])
    def test_of_one_sample_is_the_evidence_lower_bound_on_average(self, likelihood):
        vae, n = tiny_autoencoder(likelihood=likelihood, in_channels=1), 4000
        x = (
            randn(1, 1, 8, 8).sign() if likelihood == "bernoulli" else (20 * randn(1, 1, 8, 8)).round() / 127.5
        ).float()
        copies = x.expand(n, -1, -1, -1)
        with torch.no_grad():
            _, metrics = ElboObjective()(vae, {"images": copies}, BatchRandom(1, 0, range(n), n))
        estimates = self.estimate(vae, copies, 1)
        error = (estimates.std() / n**0.5).item()
        assert estimates.mean().item() == pytest.approx(metrics["elbo"].item(), abs=6 * error)
        better = self.estimate(vae, copies[:500], 8)
        assert better.mean() > metrics["elbo"] + 3 * better.std() / 500**0.5

    def test_belongs_to_picture_and_seed_and_not_to_the_batches(self):
        vae, x = tiny_autoencoder(), randn(5, 3, 8, 8).float()
        expected = self.estimate(vae, x, 7)
        assert expected.shape == (5,)
        for batch_size in (1, 3, 12):
            torch.testing.assert_close(self.estimate(vae, x, 7, batch_size=batch_size), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(self.estimate(vae, x[:2], 7), expected[:2], rtol=1e-5, atol=0)
        assert (self.estimate(vae, x, 7, seed=1) - expected).abs().min() > 0

    def test_without_a_generator_uses_the_global_one(self):
        vae, x = tiny_autoencoder(), randn(2, 3, 8, 8).float()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            assert torch.equal(importance_log_likelihood(vae, x, 2), self.estimate(vae, x, 2))

    def test_refuses_what_has_no_answer(self):
        with pytest.raises(ValueError, match="k: 0 is not positive"):
            self.estimate(LinearVAE(), randn(1, 4, 1, 1), 0)
        with pytest.raises(ValueError, match="x: a bernoulli likelihood is of values -1 and 1"):
            self.estimate(tiny_autoencoder(likelihood="bernoulli"), torch.zeros(1, 3, 8, 8), 1)


class TestBitsPerDimension:
    pictures = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def vae(self, likelihood):
        return tiny_autoencoder(VariationalAutoencoder, in_channels=1, likelihood=likelihood)

    def test_of_a_gaussian_is_that_of_bins_and_falls_with_the_number_of_latents(self):
        vae = self.vae("gaussian")
        bits = bits_per_dimension(AutoencoderPipeline(vae), self.pictures)
        bound, tighter = bits["evidence lower bound"], bits["importance-sampled bound (64 z)"]
        assert tighter.value < bound.value and bound.count == 20 and bound.low < bound.value < bound.high
        assert bits_per_dimension(AutoencoderPipeline(vae), self.pictures) == bits
        # Of a variance far wider than a bin, the integral over it is the density at its middle times its width.
        vae.log_variance.data.fill_(2.0)
        smooth = self.pictures.clamp(1, 254)  # the outermost bins are open
        (wide, _) = bits_per_dimension(AutoencoderPipeline(vae), smooth, num_latents=2).values()
        log_p = importance_log_likelihood(vae, to_model_range(smooth), 1) / 64 + math.log(2 / 255)
        assert math.isclose(wide.value, -log_p.mean().item() / math.log(2), rel_tol=0.02)

    def test_of_a_bernoulli_is_at_most_one_bit_when_it_guesses(self):
        vae = self.vae("bernoulli")
        for parameter in vae.parameters():
            torch.nn.init.zeros_(parameter)
        bits = bits_per_dimension(AutoencoderPipeline(vae), self.pictures)
        assert all(math.isclose(estimate.value, 1, rel_tol=1e-6) for estimate in bits.values())

    def test_of_a_diffusion_model_knows_what_the_model_is_told(self):
        unet = tiny_unet(in_channels=1, out_channels=1, num_classes=2)
        pipe = ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(num_train_timesteps=5))
        labels = torch.arange(20) % 2
        bits = bits_per_dimension(pipe, self.pictures, num_by_flow=3, class_labels=labels)
        assert [*bits] == ["probability-flow ODE", "variational bound"]
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        pictures, labels = self.pictures[order], labels[order]
        assert bits["variational bound"] == variational_bound(unet, pipe.scheduler, pictures, class_labels=labels)
        flow = probability_flow_bits(unet, pipe.scheduler, pictures[:3], class_labels=labels[:3])
        assert bits["probability-flow ODE"] == Estimate.of(flow)
        # Of many images some are measured.
        bits = bits_per_dimension(pipe, self.pictures, num_images=7, num_by_flow=3, class_labels=torch.arange(20) % 2)
        few = variational_bound(unet, pipe.scheduler, pictures[:7], class_labels=labels[:7])
        assert [*bits.values()] == [Estimate.of(flow), few] and few.count == 7
        others = bits_per_dimension(pipe, pictures, num_images=7, num_by_flow=3, class_labels=1 - labels)
        assert all(others[name] != bits[name] for name in bits)

    @pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (0.6, 0.3)])
    def test_of_latents_whose_prior_is_exactly_normal_is_the_evidence_lower_bound(self, scale, shift):
        """The exact denoiser of unit variance makes N(0, I) of what the U-Net sees, N(shift, 1/scale²) of z."""
        vae = self.vae("gaussian")
        vae.register_to_config(scaling_factor=scale, shift_factor=shift)
        c, *size = vae.latent_shape(8, 8)
        scheduler = AncestralDDPMScheduler(variance_type="fixed_large", clip_sample=False)
        pipe = UnconditionalPipeline(tiny_unet(in_channels=c, out_channels=c, sample_size=size), scheduler, vae)

        def exact(x_t, t):
            return SimpleNamespace(sample=(1 - scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)).sqrt() * x_t)

        pipe.unet.forward = exact
        pictures = self.pictures.repeat(20, 1, 1, 1)
        x = to_model_range(pictures)
        order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
        bits = bits_per_dimension(pipe, pictures[order.argsort()], num_images=400, num_by_flow=400)  # in this order
        bound, flow = bits["variational bound"], bits["probability-flow ODE"]
        lower = importance_log_likelihood(vae, x, 1, likelihood="discretised_gaussian")
        expected = -lower.mean().item()
        if scale != 1:  # the other prior in the place of N(0, I)
            z = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(0))
            priors = [torch.distributions.Normal(mean, std) for mean, std in ((0.0, 1.0), (shift, 1 / scale))]
            at_home, other = (prior.log_prob(z).flatten(1).sum(dim=1).mean().item() for prior in priors)
            expected += at_home - other
        expected /= 64 * math.log(2)
        assert abs(bound.value - expected) < 3 * (bound.high - bound.value) + 0.02

        # The ODE gives the density itself, here of the same z.
        with torch.no_grad():
            q = vae.encode(x).latent_dist
            z = q.mean + q.std * BatchRandom(0, 0, range(400), 400).normal(q.mean.shape[1:])
            log_ratio = torch.distributions.Normal(shift, 1 / scale).log_prob(z)
            log_ratio -= torch.distributions.Normal(q.mean, q.std).log_prob(z)
            log_p = log_likelihood("discretised_gaussian", x, vae.decode(z)) + log_ratio.flatten(1).sum(dim=1)
        assert abs(flow.value + log_p.mean().item() / 64 / math.log(2)) < 0.01
        assert flow.count == 400

    def test_models_without_a_likelihood_of_eight_bits_have_none(self):
        plain = AutoencoderPipeline(tiny_autoencoder(Autoencoder, in_channels=1))
        kl = AutoencoderPipeline(tiny_vae(in_channels=1, out_channels=1))
        measured = UnconditionalPipeline(
            tiny_unet(in_channels=1, out_channels=1),
            AncestralDDPMScheduler(),
            value_range={"low": [0.0], "high": [9.0]},
        )
        for pipe in (plain, kl, measured):
            assert bits_per_dimension(pipe, self.pictures) == {}
