import math
from types import SimpleNamespace

import pytest
import torch

from hf_genmod import AncestralDDPMScheduler, DenoisingObjective, NoisyClassificationObjective
from hf_genmod.objectives import discretised_gaussian_log_likelihood, gaussian_kl, variational_bound_term
from hf_genmod.randomness import BatchRandom, batch_positions

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
