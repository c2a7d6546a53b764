import math

import pytest
import torch
from algorithm_1 import PREDICTION_TYPES, SHAPE, Model, batch_random, drawn, pictures, scheduler

from hf_genmod import DenoisingObjective
from hf_genmod.data.randomness import BatchRandom, batch_positions
from hf_genmod.objectives.likelihoods import variational_bound_term


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


def test_unknown_weighting_and_impossible_dropout_are_refused():
    with pytest.raises(ValueError, match="weighting: 'snr' is not one of simple, min_snr, balanced, vlb"):
        DenoisingObjective(scheduler(), weighting="snr")
    with pytest.raises(ValueError, match="condition_dropout: 1.5"):
        DenoisingObjective(scheduler(), condition_dropout=1.5)
