import math
from types import SimpleNamespace

import pytest
import torch
from tiny import LinearVAE, tiny_autoencoder

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    DenoisingObjective,
    ElboObjective,
    NoisyClassificationObjective,
    ReconstructionObjective,
)
from hf_genmod.data.randomness import BatchRandom, batch_positions
from hf_genmod.models.conditioning import enlarge, shrink
from hf_genmod.models.variational_autoencoder import LIKELIHOODS
from hf_genmod.objectives.likelihoods import (
    discretised_gaussian_log_likelihood,
    gaussian_kl,
    log_likelihood,
    variational_bound_term,
)
from hf_genmod.objectives.upsampling import SmallPictures

SHAPE = (8, 3, 4, 4)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class Model:
    """Answers with what `answer` makes of (x_t, t), and remembers what it was asked."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, x_t, t, **condition):
        self.x_t, self.t, self.condition = x_t, t, condition
        return SimpleNamespace(sample=self.answer(x_t, t))


def pictures(shape=SHAPE):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 127.5 - 1


def batch_random(n=SHAPE[0], step=0):
    return BatchRandom(seed=0, step=step, positions=torch.arange(n), batch_size=n)


def scheduler(**config):
    return AncestralDDPMScheduler(**{"beta_schedule": "linear", "clip_sample": False, **config})


def drawn(process, x_0, rng):
    """t, ε and x_t as Algorithm 1 draws them, from the same stream."""
    t = (1000 * rng.stratified()).long()
    epsilon = rng.normal(x_0.shape[1:])
    alpha_bar = process.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    return t, epsilon, alpha_bar, alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * epsilon


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_simple_loss_is_the_mean_squared_error_of_the_prediction(prediction_type):
    process, x_0 = scheduler(prediction_type=prediction_type), pictures()
    t, epsilon, alpha_bar, x_t = drawn(process, x_0, batch_random())
    v = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x_0
    target = {"epsilon": epsilon, "sample": x_0, "v_prediction": v}[prediction_type]
    model = Model(lambda x_t, t: 0.1 * x_t)

    loss, _ = DenoisingObjective(process)(model, {"images": x_0}, batch_random())

    torch.testing.assert_close(model.x_t, x_t)
    assert torch.equal(model.t, t)
    torch.testing.assert_close(loss, (target - 0.1 * x_t).square().mean())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "weighting, weight_of_x_0",
    [
        ("min_snr", lambda snr: snr.clamp(max=5)),
        # sech z = 2 / (exp(z) + exp(-z)) on the error of v, which is SNR + 1 times that of x_0
        ("balanced", lambda snr: 2 * (snr + 1) / (math.e**0.5 / snr.sqrt() + snr.sqrt() / math.e**0.5)),
    ],
)
def test_weightings_treat_the_same_error_of_x_0_alike_for_every_prediction(prediction_type, weighting, weight_of_x_0):
    process, x_0 = scheduler(prediction_type=prediction_type), pictures()
    t, epsilon, alpha_bar, x_t = drawn(process, x_0, batch_random())
    guess = 0.5 * x_0  # x̂_0, put into the terms of each prediction
    epsilon_hat = (x_t - alpha_bar.sqrt() * guess) / (1 - alpha_bar).sqrt()
    v_hat = alpha_bar.sqrt() * epsilon_hat - (1 - alpha_bar).sqrt() * guess
    answer = {"epsilon": epsilon_hat, "sample": guess, "v_prediction": v_hat}[prediction_type]

    loss, _ = DenoisingObjective(process, weighting=weighting)(
        Model(lambda x_t, t: answer), {"images": x_0}, batch_random()
    )

    snr = alpha_bar / (1 - alpha_bar)
    torch.testing.assert_close(loss, (weight_of_x_0(snr) * (x_0 - guess) ** 2).mean(), rtol=1e-3, atol=1e-6)


def test_the_loss_of_a_batch_is_the_mean_of_the_losses_of_its_parts():
    objective, x_0 = DenoisingObjective(scheduler()), pictures()
    model = Model(lambda x_t, t: 0.1 * x_t)
    whole, _ = objective(model, {"images": x_0}, batch_random())
    parts = []
    for process in range(2):
        positions = batch_positions(8, process_index=process, num_processes=2)
        rng = BatchRandom(0, 0, positions, 8)
        parts.append(objective(model, {"images": x_0[positions]}, rng)[0])
    torch.testing.assert_close(whole, torch.stack(parts).mean())


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


def test_vlb_weighting_is_the_number_of_timesteps_times_the_mean_term():
    process, x_0 = scheduler(), pictures()
    model = Model(lambda x_t, t: 0.1 * x_t)
    loss, _ = DenoisingObjective(process, weighting="vlb")(model, {"images": x_0}, batch_random())
    term = variational_bound_term(process, 0.1 * model.x_t, x_0, model.x_t, model.t)
    torch.testing.assert_close(loss, 1000 * term.mean())


def test_hybrid_loss_moves_the_variance_by_the_bound_and_the_mean_by_simple_alone():
    process, x_0 = scheduler(variance_type="learned_range"), pictures()
    output = torch.zeros(8, 6, 4, 4, requires_grad=True)
    loss, metrics = DenoisingObjective(process)(Model(lambda x_t, t: output), {"images": x_0}, batch_random())
    (gradient,) = torch.autograd.grad(loss, output)

    plain = torch.zeros(SHAPE, requires_grad=True)
    simple, _ = DenoisingObjective(scheduler())(Model(lambda x_t, t: plain), {"images": x_0}, batch_random())
    (gradient_of_simple,) = torch.autograd.grad(simple, plain)
    torch.testing.assert_close(gradient[:, :3], gradient_of_simple)
    assert gradient[:, 3:].abs().max() > 0
    torch.testing.assert_close(loss.detach(), metrics["loss_simple"] + 0.001 * metrics["loss_vlb"])


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


def test_labels_are_dropped_at_the_given_rate():
    process, n = scheduler(), 4096
    batch = {"images": torch.zeros(n, 1, 1, 1), "class_labels": torch.arange(n) % 10}
    for rate in (0.0, 0.1, 1.0):
        model = Model(lambda x_t, t: x_t)
        DenoisingObjective(process, null_label=10, condition_dropout=rate)(model, batch, batch_random(n))
        seen = model.condition["class_labels"]
        dropped = seen == 10
        assert torch.equal(seen[~dropped], batch["class_labels"][~dropped])
        assert abs(dropped.float().mean().item() - rate) <= 4 * (rate * (1 - rate) / n) ** 0.5


class TestCaptions:
    N = 2000

    def seen(self, captions, rate, positions=slice(None)):
        """Which captions the model is given at these positions of a batch."""
        objective = DenoisingObjective(
            scheduler(), condition_dropout=rate, text=lambda texts: {"tokens": torch.tensor([len(t) for t in texts])}
        )
        model = Model(lambda x_t, t: x_t)
        positions = torch.arange(self.N)[positions]
        batch = {"images": torch.zeros(len(positions), 1, 1, 1), "captions": [captions[i] for i in positions]}
        objective(model, batch, BatchRandom(seed=0, step=0, positions=positions, batch_size=self.N))
        return model.condition["tokens"]

    def test_reach_the_model_or_are_left_out_at_the_rate(self):
        lengths = torch.arange(self.N) % 9 + 1
        captions = ["x" * length for length in lengths]
        for rate in (0.0, 0.1, 1.0):
            seen = self.seen(captions, rate)
            dropped = seen == 0
            assert torch.equal(seen[~dropped], lengths[~dropped])
            assert abs(dropped.float().mean().item() - rate) <= 4 * (rate * (1 - rate) / self.N) ** 0.5

    def test_of_several_each_is_drawn_as_often(self):
        seen = self.seen([["x", "xx", "xxx"]] * self.N, rate=0.0)
        assert (torch.bincount(seen, minlength=4)[1:] - self.N / 3).abs().max() <= 4 * (self.N * 2 / 9) ** 0.5

    def test_do_not_depend_on_how_a_batch_is_split(self):
        captions = [["x" * i, "x" * (i + 1)] for i in range(1, self.N + 1)]
        whole = self.seen(captions, rate=0.3)
        assert torch.equal(self.seen(captions, 0.3, slice(1, None, 2)), whole[1::2])


def test_a_model_without_labels_is_not_given_any():
    model = Model(lambda x_t, t: x_t)
    DenoisingObjective(scheduler())(
        model, {"images": pictures(), "class_labels": torch.zeros(8, dtype=torch.long)}, batch_random()
    )
    assert model.condition == {}


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


def test_unknown_weighting_and_impossible_dropout_are_refused():
    with pytest.raises(ValueError, match="weighting: 'snr' is not one of simple, min_snr, balanced, vlb"):
        DenoisingObjective(scheduler(), weighting="snr")
    with pytest.raises(ValueError, match="condition_dropout: 1.5"):
        DenoisingObjective(scheduler(), condition_dropout=1.5)


def test_classification_loss_is_the_cross_entropy_at_x_t_and_goes_with_the_accuracy():
    process, x_0 = scheduler(), pictures()
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    t, _, _, x_t = drawn(process, x_0, batch_random())
    seen = {}

    def classifier(x_t, t):
        seen.update(x_t=x_t, t=t)
        return SimpleNamespace(logits=x_t.mean(dim=(2, 3)))  # of three channels

    loss, metrics = NoisyClassificationObjective(process)(
        classifier, {"images": x_0, "class_labels": y}, batch_random()
    )

    torch.testing.assert_close(seen["x_t"], x_t)
    assert torch.equal(seen["t"], t)
    probabilities = x_t.mean(dim=(2, 3)).softmax(dim=1)
    torch.testing.assert_close(loss, -probabilities[range(8), y].log().mean())
    assert metrics["accuracy"] == sum(int(p.argmax()) == label for p, label in zip(probabilities, y, strict=True)) / 8


class TestReconstruction:
    @pytest.mark.parametrize("loss, distance", [("mse", torch.square), ("l1", torch.abs)])
    def test_loss_is_the_mean_distance_of_the_pixels(self, loss, distance):
        x, autoencoder = pictures((4, 3, 8, 8)), tiny_autoencoder(Autoencoder)
        measured, metrics = ReconstructionObjective(loss)(autoencoder, {"images": x}, batch_random(4))
        torch.testing.assert_close(measured, distance(x - autoencoder(x).sample).mean())
        assert metrics == {}

    @staticmethod
    def network():
        layers = torch.nn.Conv2d(3, 5, 3), torch.nn.Dropout(0.5), torch.nn.Conv2d(5, 2, 3)
        return torch.nn.Sequential(*layers).train()

    @pytest.mark.parametrize("as_list", [False, True])
    def test_perceptual_loss_is_the_mean_squared_difference_of_features(self, as_list):
        x, autoencoder, network = pictures((4, 3, 8, 8)), tiny_autoencoder(Autoencoder), self.network().eval()
        features = (lambda x: [x.mean(dim=1), network(x)]) if as_list else network
        objective = ReconstructionObjective("l1", perceptual=features, perceptual_weight=0.3)
        loss, metrics = objective(autoencoder, {"images": x}, batch_random(4))

        x_hat = autoencoder(x).sample
        errors = [(network(x) - network(x_hat)).square().mean()]
        if as_list:
            errors.append((x - x_hat).mean(dim=1).square().mean())
        torch.testing.assert_close(metrics["loss_pixels"], (x - x_hat).abs().mean().detach())
        torch.testing.assert_close(metrics["loss_perceptual"], (sum(errors) / len(errors)).detach())
        torch.testing.assert_close(loss.detach(), metrics["loss_pixels"] + 0.3 * metrics["loss_perceptual"])

    def test_perceptual_gradient_reaches_the_autoencoder_and_not_the_network(self):
        x, autoencoder, network = pictures((4, 3, 8, 8)), tiny_autoencoder(Autoencoder), self.network()
        weights = [parameter.clone() for parameter in network.parameters()]
        objective = ReconstructionObjective(perceptual=network)
        assert not any(module.training for module in network.modules())
        gradients = []
        for weight in (0.0, 1.0):
            objective.perceptual_weight = weight
            autoencoder.zero_grad()
            objective(autoencoder, {"images": x}, batch_random(4))[0].backward()
            gradients.append([parameter.grad.clone() for parameter in autoencoder.parameters()])
        assert all((a - b).abs().max() > 0 for a, b in zip(*gradients, strict=True))
        assert all(parameter.grad is None for parameter in network.parameters())
        assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))

    def test_a_mask_hides_squares_from_the_encoder_and_not_from_the_loss(self):
        x, seen = 0.9 * pictures((200, 3, 10, 8)), []  # none of them black

        def blind(y):
            seen.append(y)
            return SimpleNamespace(sample=torch.zeros_like(y))

        loss, _ = ReconstructionObjective(mask=0.3)(blind, {"images": x}, batch_random(200))
        torch.testing.assert_close(loss, x.square().mean())
        hidden = seen[0] == -1
        assert torch.equal(seen[0][~hidden], x[~hidden])
        squares = torch.nn.functional.pad(hidden, (0, 0, 0, 2), value=False).unflatten(3, (2, 4)).unflatten(2, (3, 4))
        of_whole = squares[:, :, :2].transpose(3, 4).flatten(4)  # (n, c, 2, 2, 16)
        assert torch.equal(of_whole.all(-1), of_whole.any(-1))
        assert torch.equal(hidden.all(1), hidden.any(1))
        assert abs(of_whole.float().mean() - 0.3) < 0.06  # of 800 squares: 3.7 standard deviations

    def test_wrong_settings_are_refused(self):
        with pytest.raises(ValueError, match="loss: 'l2' is not one of mse, l1"):
            ReconstructionObjective("l2")
        with pytest.raises(ValueError, match=r"mask: 1 is not a probability in \[0, 1\)"):
            ReconstructionObjective(mask=1)


class TestLikelihood:
    def test_of_a_gaussian_is_that_of_torch(self):
        x, mean, log_variance = pictures(), 0.5 * pictures().flip(0), torch.tensor(-1.3)
        output = SimpleNamespace(sample=mean, log_variance=log_variance, logits=None)
        expected = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(x).sum(dim=(1, 2, 3))
        torch.testing.assert_close(log_likelihood("gaussian", x, output), expected)

    def test_of_a_bernoulli_is_that_of_torch_far_out_too(self):
        x = torch.where(pictures() > 0, 1.0, -1.0)
        logits = 100 * pictures().flip(0)
        output = SimpleNamespace(sample=torch.tanh(logits / 2), log_variance=None, logits=logits)
        expected = torch.distributions.Bernoulli(logits=logits).log_prob((x + 1) / 2).sum(dim=(1, 2, 3))
        torch.testing.assert_close(log_likelihood("bernoulli", x, output), expected)

    def test_of_all_binary_pictures_of_four_pixels_sum_to_one(self):
        vae = tiny_autoencoder(likelihood="bernoulli", in_channels=1, sample_size=2).double()
        binary = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).reshape(16, 1, 2, 2).double()
        z = torch.full((1, 2, 1, 1), 0.7).double().expand(16, -1, -1, -1)
        likelihoods = log_likelihood("bernoulli", binary, vae.decode(z)).exp()
        assert likelihoods.max() < 0.9
        torch.testing.assert_close(likelihoods.sum(), torch.ones((), dtype=torch.float64))

    def test_of_all_values_of_two_8_bit_pixels_sum_to_one(self):
        grid = torch.arange(256).double() / 127.5 - 1
        x = torch.cartesian_prod(grid, grid).reshape(-1, 1, 1, 2)
        mean = torch.tensor([0.1, -0.8]).double().expand_as(x)
        output = SimpleNamespace(sample=mean, log_variance=torch.tensor(-3.0).double(), logits=None)
        likelihoods = log_likelihood("discretised_gaussian", x, output).exp()
        torch.testing.assert_close(likelihoods.sum(), torch.ones((), dtype=torch.float64))


class TestElbo:
    @staticmethod
    def batch(n=8, **more):
        return {"images": pictures((n, 3, 8, 8)), **more}

    def test_is_log_p_less_the_divergence_of_the_posteriors(self):
        """log p(x) = ELBO + KL(q(z | x) ‖ p(z | x)), in a linear model where all of them are known."""
        vae, n = LinearVAE(offset=0.3, widening=1.4), 20_000
        x = pictures((1, 4, 1, 1)).double()
        loss, metrics = ElboObjective()(vae, {"images": x.expand(n, -1, -1, -1)}, batch_random(n))
        assert vae.gap(x) > 0.2
        assert metrics["elbo"].item() == pytest.approx((vae.log_p(x) - vae.gap(x)).item(), abs=0.05)
        torch.testing.assert_close(loss, -metrics["elbo"] / 4)

    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    def test_loss_is_made_of_likelihood_and_divergence_of_one_sample(self, likelihood):
        vae, batch = tiny_autoencoder(likelihood=likelihood), self.batch()
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

    def test_gradient_is_the_difference_quotient(self):
        vae, objective = tiny_autoencoder().double(), ElboObjective(free_bits=0.01)
        batch, parameters = {"images": self.batch()["images"].double()}, list(vae.parameters())
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

    def test_beta_rises_to_its_value_during_the_warmup_and_is_full_without_a_fraction(self):
        vae, objective = tiny_autoencoder(), ElboObjective(beta=3.0, beta_warmup=0.4)
        for fraction, beta in ((0.0, 0.0), (0.1, 0.75), (0.4, 3.0), (0.9, 3.0), (None, 3.0)):
            batch = self.batch() if fraction is None else self.batch(fraction=fraction)
            loss, metrics = objective(vae, batch, batch_random())
            kl = -metrics["elbo"] - metrics["reconstruction"]
            torch.testing.assert_close(loss.detach() * 192, metrics["reconstruction"] + beta * kl)
        full, _ = ElboObjective(beta=3.0)(vae, self.batch(fraction=0.1), batch_random())
        assert torch.equal(full, loss)

    def test_free_bits_bound_the_divergence_of_each_dimension_from_below(self):
        vae, batch = tiny_autoencoder(), self.batch()
        q = vae.encode(batch["images"]).latent_dist
        normals = torch.distributions.Normal(q.mean, q.std), torch.distributions.Normal(0.0, 1.0)
        kl = torch.distributions.kl_divergence(*normals).flatten(1).mean(dim=0)
        free = kl.median().item()  # some have less, some more
        plain, expected = ElboObjective()(vae, batch, batch_random())
        loss, metrics = ElboObjective(free_bits=free)(vae, batch, batch_random())
        bounded = torch.where(kl > free, kl, free).sum()
        torch.testing.assert_close(loss, (metrics["reconstruction"] + bounded) / 192)
        assert loss > plain and metrics == expected

    def test_active_units_are_dimensions_whose_mean_varies(self):
        class Encoder(LinearVAE):
            def encode(self, x):
                posterior = super().encode(x).latent_dist
                posterior.mean = (
                    torch.tensor([0.11, 0.09])[:, None, None] * torch.tensor([-1.0, 1.0] * 4)[:, None, None, None]
                )  # variances 0.0121 and 0.0081
                return SimpleNamespace(latent_dist=posterior)

        _, metrics = ElboObjective()(Encoder(), {"images": pictures((8, 4, 1, 1)).double()}, batch_random())
        assert metrics["active_units"] == 1

    def test_a_bernoulli_model_sees_binary_pictures_drawn_by_their_brightness(self):
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
    def test_the_loss_of_a_picture_depends_on_neither_its_neighbours_nor_the_processes(self, likelihood):
        vae, x = tiny_autoencoder(likelihood=likelihood).double(), self.batch()["images"].double()
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

    def test_finds_the_shape_of_the_latents_through_a_wrapper(self):
        vae = tiny_autoencoder()

        class Wrapper(torch.nn.Module):  # as DistributedDataParallel is
            def __init__(self):
                super().__init__()
                self.module = vae

            def forward(self, *args, **kwargs):
                return self.module(*args, **kwargs)

        wrapped, _ = ElboObjective()(Wrapper(), self.batch(), batch_random())
        assert torch.equal(wrapped, ElboObjective()(vae, self.batch(), batch_random())[0])

    def test_another_likelihood_than_that_of_the_model_is_refused(self):
        x = self.batch()["images"]
        with pytest.raises(ValueError, match="likelihood: 'bernoulli', but the model gives a variance and no logits"):
            log_likelihood("bernoulli", x, tiny_autoencoder()(x))
        with pytest.raises(ValueError, match="likelihood: 'gaussian', but the model gives logits and no variance"):
            log_likelihood("gaussian", x, tiny_autoencoder(likelihood="bernoulli")(x))

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"beta_warmup": 1.5}, "beta_warmup: 1.5 is not a fraction of the run between 0 and 1"),
            ({"beta": -1.0}, "beta: -1.0 is negative"),
            ({"free_bits": -0.1}, "free_bits: -0.1 is negative"),
        ],
    )
    def test_impossible_arguments_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ElboObjective(**arguments)


class TestSmallPictures:
    def test_what_is_seen_is_the_picture_made_small_noised_and_enlarged(self):
        process, x_0 = scheduler(), pictures((8, 3, 16, 8))
        same, seen = SmallPictures(process, factor=4, max_noise_level=300)(x_0, batch_random())
        rng = batch_random()
        s = (301 * rng.uniform() ** 2).long()
        epsilon = rng.normal(3, 4, 2)
        alpha_bar = torch.cat([torch.ones(1), process.alphas_cumprod])[s].reshape(-1, 1, 1, 1)
        noised = alpha_bar.sqrt() * shrink(x_0, 4) + (1 - alpha_bar).sqrt() * epsilon
        assert same is x_0
        assert torch.equal(seen["conditioning_timestep"], s) and s.max() > 0
        torch.testing.assert_close(seen["conditioning_image"], enlarge(noised, 4))

    def test_without_noise_the_small_picture_is_kept(self):
        x_0 = pictures((8, 1, 8, 8))
        _, seen = SmallPictures(scheduler(), factor=2, max_noise_level=0)(x_0, batch_random())
        assert torch.equal(seen["conditioning_image"], enlarge(shrink(x_0, 2), 2))
        assert torch.equal(seen["conditioning_timestep"], torch.zeros(8, dtype=torch.long))

    def test_all_noise_levels_occur_and_little_noise_more_often(self):
        x_0 = torch.zeros(4096, 1, 2, 2)
        _, seen = SmallPictures(scheduler(), factor=2, max_noise_level=9)(x_0, batch_random(4096))
        counts = torch.bincount(seen["conditioning_timestep"], minlength=10)
        expected = 4096 * (torch.arange(11) / 10).sqrt().diff()  # P(⌊10 u²⌋ = s)
        assert len(counts) == 10
        assert ((counts - expected).square() / expected).sum() < 27.9  # χ² of nine degrees of freedom, 0.1%

    def test_a_crop_is_seen_as_it_is_in_the_whole_picture(self):
        x_0 = pictures((8, 3, 24, 16))
        whole, seen = SmallPictures(scheduler(), factor=4)(x_0, batch_random())
        crops, seen_of_crops = SmallPictures(scheduler(), factor=4, crop_size=8)(x_0, batch_random())
        assert crops.shape == seen_of_crops["conditioning_image"].shape == (8, 3, 8, 8)
        corners = set()
        for i in range(8):
            (corner,) = [
                (top, left)
                for top in range(0, 17, 4)
                for left in range(0, 9, 4)
                if torch.equal(whole[i, :, top : top + 8, left : left + 8], crops[i])
            ]
            region = (slice(None), slice(corner[0], corner[0] + 8), slice(corner[1], corner[1] + 8))
            assert torch.equal(seen["conditioning_image"][i][region], seen_of_crops["conditioning_image"][i])
            corners.add(corner)
        assert len(corners) > 3

    def test_every_corner_of_a_crop_occurs(self):
        x_0 = torch.arange(16.0).reshape(1, 1, 4, 4).expand(256, 1, 4, 4) / 8 - 1
        crops, _ = SmallPictures(scheduler(), factor=2, crop_size=2)(x_0, batch_random(256))
        assert sorted(set(crops[:, 0, 0, 0].tolist())) == [-1.0, -0.75, 0.0, 0.25]

    def test_a_picture_is_treated_alike_by_any_number_of_processes(self):
        x_0, small = pictures((8, 3, 16, 16)), SmallPictures(scheduler(), factor=2, crop_size=8)
        crops, seen = small(x_0, batch_random())
        for process in range(2):
            positions = batch_positions(8, process_index=process, num_processes=2)
            part, seen_of_part = small(x_0[positions], BatchRandom(0, 0, positions, 8))
            assert torch.equal(part, crops[positions])
            torch.testing.assert_close(seen_of_part["conditioning_image"], seen["conditioning_image"][positions])

    def test_the_model_is_trained_on_the_crop_beside_what_is_seen_of_it(self):
        process, x_0 = scheduler(), pictures((8, 3, 16, 16))
        model = Model(lambda x_t, t: 0.1 * x_t)
        small = SmallPictures(process, factor=2, crop_size=8)
        loss, _ = DenoisingObjective(process, small=small)(model, {"images": x_0}, batch_random())
        rng = batch_random()
        crop, seen = small(x_0, rng)
        _, epsilon, _, x_t = drawn(process, crop, rng)
        torch.testing.assert_close(model.x_t, x_t)
        torch.testing.assert_close(model.condition["conditioning_image"], seen["conditioning_image"])
        torch.testing.assert_close(loss, (epsilon - 0.1 * x_t).square().mean())

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"max_noise_level": -1}, "max_noise_level: -1 is not between 0 and 1000"),
            ({"max_noise_level": 1001}, "max_noise_level: 1001 is not"),
            ({"crop_size": 6, "factor": 4}, "crop_size: 6 is not a multiple of the factor 4"),
        ],
    )
    def test_mistakes_are_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            SmallPictures(scheduler(), **settings)
