import math
from functools import reduce
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import LinearVAE, bars, tiny_autoencoder, tiny_unet, tiny_vae

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    ElboObjective,
    UnconditionalPipeline,
    VariationalAutoencoder,
)
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.randomness import BatchRandom
from hf_genmod.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance
from hf_genmod.evaluation.estimates import Share, with_interval
from hf_genmod.evaluation.features import as_floats, extract_features, train_feature_classifier
from hf_genmod.evaluation.likelihood_bounds import bits_per_dimension, importance_log_likelihood, variational_bound
from hf_genmod.evaluation.neighbours import audit_memorisation, nearest_of, neighbourhoods
from hf_genmod.evaluation.recognition import accuracy_by_noise_level, recognised_share
from hf_genmod.evaluation.report import evaluate_features

DATA = Path(__file__).parents[3] / "shared/data"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_features(n, d, mean, covariance_root, seed=0):
    """n features whose mean and covariance are exactly `mean` and `covariance_root @ covariance_root.T`."""
    x = randn(n, d, seed=seed)
    x = x - x.mean(dim=0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1)))
    return x @ whitening.T @ covariance_root.T + mean


@pytest.fixture(scope="module")
def classifier():
    return train_feature_classifier(*bars(256), num_classes=2, max_train_steps=40, batch_size=32)


# Fréchet distance


@pytest.mark.parametrize("d, n", [(2, 50), (16, 100), (64, 1000)])
def test_frechet_distance_equals_the_matrix_square_root(d, n):
    linalg = pytest.importorskip("scipy.linalg", reason="the reference is scipy's matrix square root")
    a = randn(n, d) @ randn(d, d, seed=1)
    b = randn(2 * n, d, seed=2) @ randn(d, d, seed=3) + 0.5
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.from_numpy(linalg.sqrtm((cov_a @ cov_b).numpy()).real)
    expected = (a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), abs=1e-4)


def test_frechet_distance_of_commuting_covariances_in_closed_form():
    # Σ_a and Σ_b share the eigenvectors Q, so that Tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^{1/2}) = Σ_i (s_i - t_i)².
    d = 12
    q = torch.linalg.qr(randn(d, d)).Q
    s, t = randn(d, seed=1).abs(), randn(d, seed=2).abs()
    shift = randn(d, seed=3)
    a = gaussian_features(100, d, torch.zeros(d), q * s, seed=4)
    b = gaussian_features(80, d, shift, q * t, seed=5)
    expected = shift.square().sum() + (s - t).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_of_a_shift_is_its_squared_length():
    a = randn(200, 8) @ randn(8, 8, seed=1)
    shift = torch.arange(8.0)
    assert frechet_distance(a, a + shift) == pytest.approx(140.0, rel=1e-10)


def test_frechet_distance_of_a_scaling_of_one_feature():
    # One dimension: (σ - cσ)² + (μ - cμ)².
    a = torch.tensor([[1.0], [2.0], [3.0]])  # μ = 2, σ = 1
    assert frechet_distance(a, 3 * a) == pytest.approx(4.0 + 16.0, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_frechet_distance_of_equal_sets_is_zero(scale):
    features = scale * randn(300, 64) @ randn(64, 64, seed=1) / 8 + 3
    features[:, 5] = 0  # a dead feature: a singular covariance
    features[:, 6] = features[:, 7]
    assert 0 <= frechet_distance(features, features) < 1e-6
    assert frechet_distance(features, features.flip(0)) < 1e-6


def test_frechet_distance_is_symmetric_and_blind_to_rotation_and_order():
    a, b = randn(90, 10), 1.5 * randn(120, 10, seed=1) + 0.3
    q = torch.linalg.qr(randn(10, 10, seed=2)).Q
    expected = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a @ q, b @ q) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a[torch.randperm(90)], b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(2 * a, 2 * b) == pytest.approx(4 * expected, rel=1e-10)


def test_frechet_distance_falls_to_zero_as_samples_of_one_distribution_grow():
    distances = [frechet_distance(randn(n, 16), randn(n, 16, seed=1)) for n in (50, 500, 5000)]
    assert distances[0] > 5 * distances[1] > 25 * distances[2] > 0


def test_frechet_distance_says_how_many_samples_it_needs():
    enough = randn(65, 64)
    assert frechet_distance(enough, randn(65, 64, seed=1)) > 0
    for a, b in ((enough[:64], enough), (enough, enough[:64])):
        with pytest.raises(ValueError, match="64 samples of 64 dimensions .* at least 65 samples"):
            frechet_distance(a, b)


def test_frechet_distance_refuses_what_it_cannot_measure():
    good = randn(20, 3)
    for value in (math.nan, math.inf):
        bad = good.clone()
        bad[4, 1] = bad[7, 2] = value
        with pytest.raises(ValueError, match="2 of 20 rows are not finite"):
            frechet_distance(good, bad)
    with pytest.raises(ValueError, match="3 and 2 dimensions"):
        frechet_distance(good, good[:, :2])
    with pytest.raises(ValueError, match=r"shape \(20,\)"):
        frechet_distance(good, good[:, 0])


@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
def test_statistics_do_not_depend_on_the_batches(batch_size):
    features = (1000 + randn(500, 12) @ randn(12, 12, seed=1)).float()  # a mean that swamps naive sums of squares
    whole = FeatureStatistics.of(features)
    merged = reduce(FeatureStatistics.merge, map(FeatureStatistics.of, features.split(batch_size)))
    assert merged.count == 500
    torch.testing.assert_close(merged.mean, features.double().mean(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(merged.covariance, torch.cov(features.double().T), rtol=0, atol=1e-9)
    reference = randn(100, 12, seed=2)
    expected = frechet_distance(whole, reference)
    assert frechet_distance(merged, reference) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(features, reference) == expected


@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_statistics_do_not_depend_on_how_many_processes_share_the_pictures(num_processes):
    features = (1000 + randn(500, 12) @ randn(12, 12, seed=1)).float()
    shares = [features[rank::num_processes].split(64) for rank in range(num_processes)]
    of_each = [reduce(FeatureStatistics.merge, map(FeatureStatistics.of, parts)) for parts in shares]
    reference = randn(100, 12, seed=2)
    merged = frechet_distance(reduce(FeatureStatistics.merge, of_each), reference)
    assert merged == pytest.approx(frechet_distance(features, reference), rel=1e-9)


# Share


@pytest.mark.parametrize(
    "k, n, low, high",  # Newcombe 1998, Table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_share_equals_published_wilson_intervals(k, n, low, high):
    predictions = torch.arange(n) < k
    share = recognised_share(predictions.long(), [1] * n)
    assert (share.value, share.count) == (k / n, n)
    assert (share.low, share.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirror = recognised_share(predictions.long(), [0] * n)
    assert (mirror.low, mirror.high) == (pytest.approx(1 - share.high), pytest.approx(1 - share.low))
    assert 0 <= share.low <= share.value <= share.high <= 1


def test_share_covers_the_truth_nineteen_times_in_twenty():
    n = 60
    shares = [recognised_share((torch.arange(n) < k).long(), [1] * n) for k in range(n + 1)]
    truths = [(i + 0.5) / 400 for i in range(400)]
    coverage = [
        sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k)
            for k, share in enumerate(shares)
            if share.low <= p <= share.high
        )
        for p in truths
    ]
    assert sum(coverage) / len(coverage) == pytest.approx(0.95, abs=0.01)


def test_share_from_logits_and_in_print():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 4.0, 4.5], [0.0, 0.0, 0.1]])
    assert recognised_share(logits, torch.tensor([0, 1, 2, 2])).value == 0.75
    assert str(recognised_share((torch.arange(1000) < 964).long(), [1] * 1000)) == "96.4% (95.1–97.4%, n = 1000)"
    assert str(Share(1.0, 3, 0.4385, 1.0)) == "100.0% (43.9–100.0%, n = 3)"


def test_share_needs_one_label_per_prediction():
    with pytest.raises(ValueError, match="2 for 3 predictions"):
        recognised_share(torch.zeros(3, 2), [0, 1])
    with pytest.raises(ValueError, match="0 for 0 predictions"):
        recognised_share(torch.zeros(0, 2), [])


def test_features_are_evaluated_as_their_parts_are():
    generated, real = randn(40, 5), randn(100, 5, seed=1) + 0.2
    metrics = evaluate_features(generated, real)
    assert metrics["frechet_distance"].value == frechet_distance(generated, real)
    assert metrics["frechet_distance"].low < metrics["frechet_distance"].value < metrics["frechet_distance"].high
    some = real[torch.randperm(100, generator=torch.Generator().manual_seed(0))[:40]]
    assert metrics["kernel_distance"].value == kernel_distance(generated, some)
    for name, value in neighbourhoods(some, generated).items():
        assert metrics[name] == value


def test_features_need_samples_enough_for_their_halves():
    evaluate_features(randn(12, 5), randn(12, 5, seed=1))
    with pytest.raises(ValueError, match="samples: 11 are too few for features of 5 dimensions; take 12 or more"):
        evaluate_features(randn(11, 5), randn(12, 5, seed=1))
    with pytest.raises(ValueError, match="real images: 5 are too few for features of 5 dimensions; take 6 or more"):
        evaluate_features(randn(12, 5), randn(5, 5, seed=1))


def test_worse_pictures_are_told_from_better(classifier):
    images = bars(150, seed=4)[0]
    blurred = F.avg_pool2d(images.float(), 5, stride=1, padding=2).byte()
    good, bad, real = (extract_features(x, classifier) for x in (images, blurred, bars(300, seed=3)[0]))
    good, bad = (evaluate_features(features, real) for features in (good, bad))
    for name in ("frechet_distance", "kernel_distance"):
        assert good[name].high < bad[name].low
    for name in ("precision", "density", "coverage"):
        assert float(getattr(good[name], "value", good[name])) > float(getattr(bad[name], "value", bad[name]))


# Real pictures: minutes


def real_pictures(name, split):
    from datasets import load_dataset

    if not (DATA / name).is_dir():
        pytest.skip(f"no {name} pictures beside the repository")
    data = load_dataset(str(DATA / name), split=split).with_format("torch")
    images = torch.stack(list(data["image"]))
    if images.shape[-1] != 32:
        images = F.interpolate(images.float(), size=(32, 32), mode="bilinear").round().byte()
    return images, torch.as_tensor(data["label"][:])


@pytest.mark.slow
# Measured 99.3% and 81.0%; 2,000 test pictures leave ± 2% to chance, and another thread count trains other weights.
@pytest.mark.parametrize(
    "name, augmentation, accuracy",
    [("mnist", {}, 0.99), ("cats_dogs32", {"flip": True, "max_shift": 2}, 0.77)],
)
def test_classifier_recognises_real_pictures(name, augmentation, accuracy):
    images, labels = real_pictures(name, "train")
    model = train_feature_classifier(images, labels, int(labels.max()) + 1, **augmentation)
    real = FeatureStatistics.of(extract_features(images, model))
    test_images, test_labels = real_pictures(name, "test")
    features = extract_features(test_images, model)
    share = recognised_share(model.head(features).detach(), test_labels)
    assert share.value >= accuracy
    # 1,000 real pictures against all of them: the floor that no generator can be expected to beat.
    choice = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1000]
    random = torch.randint(0, 256, images[choice].shape, dtype=torch.uint8)
    floor, noise = (frechet_distance(extract_features(x, model), real) for x in (images[choice], random))
    assert floor < noise / 50
    print(f"{name}: {share}, test set {frechet_distance(features, real):.4f}, floor {floor:.4f}")


def mean_and_error(estimate):
    return estimate.value, (estimate.high - estimate.low) / 2 / 1.96


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
    bound, error = mean_and_error(variational_bound(exact, scheduler, pictures, draws=60))
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
    bound, error = mean_and_error(variational_bound(exact, scheduler, pictures, draws=10))
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
        mean_and_error(variational_bound(half, scheduler, pictures, draws=20))
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
        # Of a variance far wider than a bin, the integral over it is the density at its middle times its width.
        vae.log_variance.data.fill_(2.0)
        smooth = self.pictures.clamp(1, 254)  # the outermost bins are open
        (wide, _) = bits_per_dimension(AutoencoderPipeline(vae), smooth, num_latents=2).values()
        log_p = importance_log_likelihood(vae, as_floats(smooth), 1) / 64 + math.log(2 / 255)
        assert math.isclose(wide.value, -log_p.mean().item() / math.log(2), rel_tol=0.02)

    def test_of_a_bernoulli_is_at_most_one_bit_when_it_guesses(self):
        vae = self.vae("bernoulli")
        for parameter in vae.parameters():
            torch.nn.init.zeros_(parameter)
        bits = bits_per_dimension(AutoencoderPipeline(vae), self.pictures)
        assert all(math.isclose(estimate.value, 1, rel_tol=1e-6) for estimate in bits.values())

    def test_of_a_diffusion_model_knows_what_the_model_is_told(self):
        unet = tiny_unet(in_channels=1, out_channels=1, num_classes=2)
        pipe = ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler())
        labels = torch.arange(20) % 2
        (bits,) = bits_per_dimension(pipe, self.pictures, class_labels=labels).values()
        assert bits == variational_bound(unet, pipe.scheduler, self.pictures, class_labels=labels)
        (others,) = bits_per_dimension(pipe, self.pictures, class_labels=1 - labels).values()
        assert others != bits

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
        (bound,) = bits_per_dimension(pipe, pictures).values()
        lower = importance_log_likelihood(vae, as_floats(pictures), 1, likelihood="discretised_gaussian")
        expected = -lower.mean().item()
        if scale != 1:  # the other prior in the place of N(0, I)
            z = vae.encode(as_floats(pictures)).latent_dist.sample(torch.Generator().manual_seed(0))
            priors = [torch.distributions.Normal(mean, std) for mean, std in ((0.0, 1.0), (shift, 1 / scale))]
            at_home, other = (prior.log_prob(z).flatten(1).sum(dim=1).mean().item() for prior in priors)
            expected += at_home - other
        expected /= 64 * math.log(2)
        assert abs(bound.value - expected) < 3 * (bound.high - bound.value) + 0.02

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


class TestAccuracyByNoiseLevel:
    """Pictures of two grey levels ±a of N pixels: a threshold at zero is the best classifier of them."""

    A, N = 0.1, 16

    @pytest.fixture
    def dataset(self):
        level = round(127.5 * self.A)
        images = [Image.new("L", (4, 4), 127 - level if i % 2 else 128 + level) for i in range(1000)]
        return PictureDataset(images, "levels", labels=torch.arange(1000) % 2, label_names=["bright", "dark"])

    def classifier(self, seen):
        class Threshold(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.zero = torch.nn.Parameter(torch.zeros(()))

            def forward(self, x_t, t):
                seen.append((int(t), len(x_t)))
                mean = x_t.mean(dim=(1, 2, 3)) + self.zero
                return SimpleNamespace(logits=torch.stack([mean, -mean], dim=1))

        return Threshold()

    def test_is_that_of_the_closed_form(self, dataset):
        scheduler, seen = AncestralDDPMScheduler(), []
        levels = accuracy_by_noise_level(self.classifier(seen), scheduler, dataset, num_levels=5, batch_size=300)
        assert [level["t"] for level in levels] == [0, 250, 500, 749, 999]
        assert seen == [(level["t"], size) for level in levels for size in (300, 300, 300, 100)]
        a = (2 * (128 + round(127.5 * self.A)) / 255) - 1
        for level in levels:
            alpha_bar = scheduler.alphas_cumprod[level["t"]].item()
            assert level["sigma"] == pytest.approx(math.sqrt((1 - alpha_bar) / alpha_bar))
            expected = NormalDist().cdf(a * math.sqrt(self.N) / level["sigma"])
            share = level["accuracy"]
            assert share.count == 1000
            assert abs(share.value - expected) < 4 * math.sqrt(expected * (1 - expected) / 1000) + 1e-9
        assert levels[0]["accuracy"].value == 1 and levels[-1]["accuracy"].value < 0.6

    def test_does_not_depend_on_the_batch_size(self, dataset):
        by_batch_size = [
            accuracy_by_noise_level(self.classifier([]), AncestralDDPMScheduler(), dataset, 4, batch_size)
            for batch_size in (1000, 7)
        ]
        assert by_batch_size[0] == by_batch_size[1]


class TestKernelDistance:
    def test_equals_the_sums_over_all_pairs(self):
        a, b = randn(7, 3), randn(5, 3, seed=1) + 0.5

        def k(x, y):
            return (sum(p * q for p, q in zip(x.tolist(), y.tolist(), strict=True)) / 3 + 1) ** 3

        def mean(pairs):
            values = [k(x, y) for x, y in pairs]
            return sum(values) / len(values)

        for biased in (False, True):
            of_a = mean((x, y) for i, x in enumerate(a) for j, y in enumerate(a) if biased or i != j)
            of_b = mean((x, y) for i, x in enumerate(b) for j, y in enumerate(b) if biased or i != j)
            expected = of_a + of_b - 2 * mean((x, y) for x in a for y in b)
            assert kernel_distance(a, b, biased) == pytest.approx(expected, rel=1e-10)

    def test_equals_that_of_torchmetrics(self):
        kid = pytest.importorskip("torchmetrics.image.kid", reason="the reference is torchmetrics")
        a, b = randn(300, 64), 1.2 * randn(300, 64, seed=1) + 0.1
        assert kernel_distance(a, b) == pytest.approx(kid.poly_mmd(a, b).item(), abs=1e-4)

    def test_of_equal_sets_is_zero_when_biased(self):
        a = randn(100, 16)
        assert kernel_distance(a, a, biased=True) == pytest.approx(0, abs=1e-12)
        assert kernel_distance(a, a.flip(0), biased=True) == pytest.approx(0, abs=1e-12)

    def test_without_bias_is_zero_on_average_for_equal_distributions(self):
        values = torch.tensor(
            [kernel_distance(randn(50, 4, seed=2 * i), randn(50, 4, seed=2 * i + 1)) for i in range(200)]
        )
        assert values.mean().abs() < 3 * values.std() / len(values) ** 0.5

    def test_does_not_depend_on_the_batches(self):
        a, b = randn(100, 16), randn(90, 16, seed=1)
        assert kernel_distance(a, b, batch_size=7) == pytest.approx(kernel_distance(a, b), rel=1e-9)

    def test_refuses_what_it_cannot_measure(self):
        for a, b, message in (
            (randn(1, 3), randn(5, 3), "at least 2"),
            (randn(5, 3), randn(5, 4), "3 and 4 dimensions"),
            (randn(5, 3) / 0, randn(5, 3), "not finite"),
        ):
            with pytest.raises(ValueError, match=message):
                kernel_distance(a, b)


class TestNeighbourhoods:
    @staticmethod
    def by_brute_force(real, generated, k):
        def distance(x, y):
            return math.dist(x.tolist(), y.tolist())

        def radius(x, i):
            return sorted(distance(x[i], x[j]) for j in range(len(x)) if j != i)[k - 1]

        of_real = [radius(real, i) for i in range(len(real))]
        of_generated = [radius(generated, i) for i in range(len(generated))]
        hits = [[distance(g, r) <= of_real[i] for i, r in enumerate(real)] for g in generated]
        back = [[distance(g, r) <= of_generated[j] for j, g in enumerate(generated)] for r in real]
        return {
            "precision": sum(map(any, hits)) / len(generated),
            "recall": sum(map(any, back)) / len(real),
            "density": sum(map(sum, hits)) / (k * len(generated)),
            "coverage": sum(any(hit[i] for hit in hits) for i in range(len(real))) / len(real),
        }

    @pytest.mark.parametrize("k", [1, 3, 5])
    def test_equal_brute_force(self, k):
        real, generated = randn(40, 3), 0.7 * randn(30, 3, seed=1) + 0.4
        expected = self.by_brute_force(real, generated, k)
        for batch_size in (7, 2048):
            measured = neighbourhoods(real, generated, k, batch_size)
            for name in ("precision", "recall", "coverage"):
                assert measured[name].value == pytest.approx(expected[name])
            assert measured["density"].value == pytest.approx(expected["density"])
            counts = [measured[name].count for name in ("precision", "recall", "density", "coverage")]
            assert counts == [30, 40, 30, 40]

    def test_tell_what_is_missing_from_what_is_wrong(self):
        real = torch.cat([randn(200, 2), randn(200, 2, seed=1) + 20])  # two modes
        one_mode, elsewhere = randn(400, 2, seed=2), randn(400, 2, seed=3) + 100
        of_one = neighbourhoods(real, one_mode)
        assert of_one["precision"].value > 0.9 and 0.3 < of_one["recall"].value < 0.6
        assert 0.3 < of_one["coverage"].value < 0.6
        of_none = neighbourhoods(real, elsewhere)
        assert [of_none[name].value for name in ("precision", "recall", "coverage")] == [0, 0, 0]
        assert of_none["density"].value == 0

    def test_need_more_pictures_than_neighbours(self):
        with pytest.raises(ValueError, match="at least 6 pictures"):
            neighbourhoods(randn(5, 3), randn(50, 3))


def test_intervals_cover_the_truth_nineteen_times_in_twenty():
    # Of a mean, whose standard error is known and whose coverage thus can be counted.
    covered, widths = 0, []
    for i in range(300):
        estimate = with_interval(lambda x: x.mean().item(), randn(100, 1, seed=i) + 3, seed=i)
        covered += estimate.low <= 3 <= estimate.high
        widths.append(estimate.high - estimate.low)
    assert 0.90 <= covered / 300 <= 0.98
    assert sum(widths) / 300 == pytest.approx(2 * 1.96 / 10, rel=0.05)


class TestMemorisation:
    @staticmethod
    def pictures(n, seed):
        return torch.randint(0, 256, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)

    def held_out(self, training, seed):
        return nearest_of(self.pictures(200, seed), training)[0]

    def test_fresh_pictures_are_not_flagged(self):
        training = self.pictures(500, 0)
        for i in range(100):
            audit = audit_memorisation(self.pictures(200, 2 * i + 1), training, self.held_out(training, 2 * i + 2))
            assert not audit.flagged

    def test_training_pictures_are(self):
        training = self.pictures(500, 0)
        audit = audit_memorisation(training[:200], training, self.held_out(training, 1))
        assert audit.flagged and audit.share.value == 1 and audit.distances.max() == 0
        assert torch.equal(audit.nearest, torch.arange(200))

    def test_a_tenth_of_copies_is_enough_and_they_are_named(self):
        training = self.pictures(500, 0)
        samples = torch.cat([training[7:27] ^ 1, self.pictures(180, 1)])  # with one bit changed in each pixel
        audit = audit_memorisation(samples, training, self.held_out(training, 2))
        assert audit.flagged
        assert torch.equal(audit.distances.argsort()[:20].sort().values, torch.arange(20))
        assert torch.equal(audit.nearest[:20], torch.arange(7, 27))

    def test_needs_as_many_held_out_pictures_as_the_quantile_says(self):
        with pytest.raises(ValueError, match="held_out_distances: 99 pictures have no 1% quantile; hold out 100"):
            audit_memorisation(self.pictures(5, 0), self.pictures(5, 1), torch.ones(99))
