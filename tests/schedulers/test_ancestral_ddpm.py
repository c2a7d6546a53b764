"""AncestralDDPMScheduler against closed-form Gaussians, in low precision, and its errors."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from diffusion_cases import (
    CLIPS,
    PREDICTIONS,
    SCHEDULES,
    assert_same_numbers,
    model_output_like,
    randn,
    seeded,
)

from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler, AncestralDDPMSchedulerOutput

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def in_fp64(scheduler: AncestralDDPMScheduler) -> AncestralDDPMScheduler:
    """The same formulas from an fp64 ᾱ, to see the mathematics without the rounding."""
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    return scheduler


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_marginal_is_the_composition_of_single_steps(schedule):
    scheduler = in_fp64(AncestralDDPMScheduler(beta_schedule=schedule))
    one, zero = torch.ones(1000, 1, dtype=torch.float64), torch.zeros(1000, 1, dtype=torch.float64)
    mean = scheduler.add_noise(one, zero, torch.arange(1000)).flatten()
    variance = scheduler.add_noise(zero, one, torch.arange(1000)).flatten() ** 2
    # q(x_t | x_{t−1}) = N(√(1 − β_t) x_{t−1}, β_t I)  (DDPM, Eq. 2)
    m, v = 1.0, 0.0
    for t, beta_t in enumerate(scheduler.betas.double().tolist()):
        m, v = math.sqrt(1 - beta_t) * m, (1 - beta_t) * v + beta_t
        assert mean[t].item() == pytest.approx(m, rel=1e-10)
        assert variance[t].item() == pytest.approx(v, rel=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_is_the_conditional_gaussian(schedule):
    scheduler = in_fp64(AncestralDDPMScheduler(beta_schedule=schedule))
    rng = np.random.default_rng(0)
    prev = torch.from_numpy(rng.integers(0, 998, 200))
    t = prev + torch.from_numpy(rng.integers(1, 50, 200))
    prev, t = prev[t < 1000], t[t < 1000]
    x_0, x_t = randn(len(t), 1, dtype=torch.float64), randn(len(t), 1, seed=1, dtype=torch.float64)

    # Joint Gaussian of (x_{t'}, x_t) given x_0, then condition on x_t: μ + Σ₁₂ Σ₂₂⁻¹ (x_t − μ₂), Σ₁₁ − Σ₁₂² / Σ₂₂.
    a, a_prev = scheduler.alphas_cumprod[t][:, None], scheduler.alphas_cumprod[prev][:, None]
    covariance = (a / a_prev).sqrt() * (1 - a_prev)
    mean = a_prev.sqrt() * x_0 + covariance / (1 - a) * (x_t - a.sqrt() * x_0)
    variance = (1 - a_prev) - covariance**2 / (1 - a)
    torch.testing.assert_close(scheduler.posterior_mean(x_0, t, x_t, prev), mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scheduler.posterior_log_variance(t, x_t, prev), variance.log(), rtol=1e-9, atol=1e-9)


def test_full_chain_is_the_default_and_batches_are_single_timesteps():
    scheduler = AncestralDDPMScheduler(variance_type="learned_range")
    t = torch.tensor([1, 2, 500, 999])
    x_0, x_t, v = randn(4, 2, 3, 3), randn(4, 2, 3, 3, seed=1), randn(4, 2, 3, 3, seed=2)
    mean, log_variance = scheduler.posterior_mean(x_0, t, x_t), scheduler.reverse_log_variance(t, x_t, None, v)
    assert torch.equal(mean, scheduler.posterior_mean(x_0, t, x_t, t - 1))
    assert torch.equal(log_variance, scheduler.reverse_log_variance(t, x_t, t - 1, v))
    x_hat = scheduler.predict_original_sample(v, t, x_t)
    for i, s in enumerate(t.tolist()):
        one = slice(i, i + 1)
        assert torch.equal(mean[one], scheduler.posterior_mean(x_0[one], s, x_t[one]))
        single = scheduler.reverse_log_variance(s, x_t[one], predicted_variance=v[one])
        torch.testing.assert_close(log_variance[one], single)  # a vectorised logarithm may round in another way
        assert torch.equal(x_hat[one], scheduler.predict_original_sample(v[one], s, x_t[one]))


def test_posterior_at_the_end_of_the_chain():
    scheduler, x_0, x_t = AncestralDDPMScheduler(), randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    assert torch.equal(scheduler.posterior_mean(x_0, 0, x_t), x_0)
    first, second = scheduler.posterior_log_variance(torch.tensor([0, 1]), x_t)
    assert first == second and first.shape == (1, 1, 1)
    assert scheduler.posterior_log_variance(0, x_t, -1).item() == pytest.approx(math.log(1e-20))


@pytest.mark.parametrize("prev", [None, 299])
def test_learned_range_runs_from_the_small_to_the_large_variance(prev):
    x_t = torch.zeros(1, 1, 1, 1)

    def log_variance(variance_type, v=None):
        scheduler = in_fp64(AncestralDDPMScheduler(variance_type=variance_type))
        return scheduler.reverse_log_variance(400, x_t, prev, None if v is None else torch.full_like(x_t, v)).item()

    small, large = log_variance("fixed_small"), log_variance("fixed_large")
    assert small < large and log_variance("fixed_small_log") == small
    assert log_variance("learned_range", -1.0) == pytest.approx(small)
    assert log_variance("learned_range", 1.0) == pytest.approx(large)
    assert log_variance("learned_range", 0.0) == pytest.approx((small + large) / 2)
    assert log_variance("learned", 0.25) == pytest.approx(math.log(0.25))
    assert log_variance(None) == small


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_three_predictions_say_the_same(schedule):
    x_0, noise = randn(20, 3, 4, 4, dtype=torch.float64), randn(20, 3, 4, 4, seed=1, dtype=torch.float64)
    t = torch.linspace(0, 999, 20).long()
    schedulers = {p: in_fp64(AncestralDDPMScheduler(beta_schedule=schedule, prediction_type=p)) for p in PREDICTIONS}
    x_t = schedulers["epsilon"].add_noise(x_0, noise, t)
    targets = {"epsilon": noise, "sample": x_0, "v_prediction": schedulers["epsilon"].get_velocity(x_0, noise, t)}
    for prediction_type, scheduler in schedulers.items():
        x_hat = scheduler.predict_original_sample(targets[prediction_type], t, x_t)
        torch.testing.assert_close(x_hat, x_0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [10, 200])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variance_type, data_variance", [("fixed_small", 0.0), ("fixed_large", 1.0)])
def test_sampling_has_the_variance_of_the_data(variance_type, data_variance, schedule, steps):
    """With the exact denoiser each fixed variance is exact for its kind of data (DDPM, section 3.2).

    For x_0 ~ N(0, d I), d = 0 or 1: E[x_0 | x_t] = √ᾱ_t d / (ᾱ_t d + 1 − ᾱ_t) · x_t, so a step is x_{t'} = A x_t + σ z
    and the variance follows V ← A² V + σ². It stays that of q(x_t) = N(0, (ᾱ_t d + 1 − ᾱ_t) I) all the way down.
    """
    config = dict(
        prediction_type="sample", variance_type=variance_type, clip_sample=False, timestep_spacing="linspace"
    )
    scheduler = in_fp64(AncestralDDPMScheduler(beta_schedule=schedule, **config))
    scheduler.set_timesteps(steps)
    alpha_bar = scheduler.alphas_cumprod.tolist()
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)  # (2, 1)
    z = torch.randn(2, 1, generator=seeded(), dtype=torch.float64)
    variance = alpha_bar[999] * data_variance + 1 - alpha_bar[999]
    for t in scheduler.timesteps.tolist():
        denoised = alpha_bar[t] ** 0.5 * data_variance / (alpha_bar[t] * data_variance + 1 - alpha_bar[t]) * x
        at_0, at_1 = scheduler.step(denoised, t, x, seeded()).prev_sample.flatten().tolist()
        sigma = at_0 / z[0].item()
        slope = at_1 - sigma * z[1].item()
        variance = slope**2 * variance + sigma**2
        prev = alpha_bar[int(scheduler.previous_timestep(t))] if t > 0 else 1.0
        expected = prev * data_variance + 1 - prev if t > 0 else data_variance * alpha_bar[0]
        assert variance == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_dynamic_thresholding():
    scheduler = AncestralDDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.5, sample_max_value=10.0, prediction_type="sample"
    )
    x_0 = torch.tensor([[-4.0, 1.0, 2.0], [0.1, -0.2, 3.0]]).reshape(2, 3, 1)
    # The medians of |x_0| are 2 and 0.2, and the latter is raised to 1.
    expected = torch.tensor([[-1.0, 0.5, 1.0], [0.1, -0.2, 1.0]]).reshape(2, 3, 1)
    torch.testing.assert_close(scheduler.predict_original_sample(x_0, 5, torch.zeros_like(x_0), clip=True), expected)
    assert torch.equal(scheduler.predict_original_sample(x_0, 5, torch.zeros_like(x_0)), x_0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_low_precision_is_the_fp32_result_rounded(method, dtype):
    scheduler = AncestralDDPMScheduler()
    x_0, noise = randn(1000, 4).to(dtype), randn(1000, 4, seed=1).to(dtype)
    result = getattr(scheduler, method)(x_0, noise, torch.arange(1000))
    wide = getattr(scheduler, method)(x_0.float(), noise.float(), torch.arange(1000))
    assert result.dtype == dtype and torch.equal(result, wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned", "learned_range"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_low_precision_step_is_the_fp32_step_rounded(prediction_type, clip, variance_type, dtype):
    config = dict(prediction_type=prediction_type, variance_type=variance_type, **CLIPS[clip])
    scheduler = AncestralDDPMScheduler(**config)
    sample = randn(2, 3, 4, 4).to(dtype)
    model_output = model_output_like(sample.float(), variance_type).to(dtype)
    result = scheduler.step(model_output, 500, sample, seeded())
    assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
    # The noise has the dtype of the model output, so only the last step of the chain can be redone in fp32.
    prediction, v = scheduler.split_model_output(model_output.float(), sample.float())
    x_0 = scheduler.predict_original_sample(prediction, 500, sample.float(), clip=True)
    z = torch.randn(sample.shape, generator=seeded(), dtype=dtype).float()
    x_prev = scheduler.posterior_mean(x_0, 500, sample.float(), 499)
    x_prev = x_prev + torch.exp(0.5 * scheduler.reverse_log_variance(500, sample, 499, v)) * z
    assert torch.equal(result.prev_sample, x_prev.to(dtype))
    assert torch.equal(result.pred_original_sample, x_0.to(dtype))


def test_copies_are_independent():
    scheduler = AncestralDDPMScheduler(beta_schedule="sigmoid")
    scheduler.set_timesteps(50)
    twins = [copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    scheduler.set_timesteps(10)
    for twin in twins:
        assert len(twin.timesteps) == 50 and torch.equal(twin.betas, scheduler.betas)
        assert dict(twin.config) == dict(scheduler.config)


def test_step_returns_an_output_or_a_tuple_of_the_same_shape():
    scheduler, sample = AncestralDDPMScheduler(), randn(2, 3, 4, 4)
    for t in (0, 1):
        output = scheduler.step(0.1 * sample, t, sample, seeded())
        assert isinstance(output, AncestralDDPMSchedulerOutput)
        pair = scheduler.step(0.1 * sample, t, sample, seeded(), return_dict=False)
        assert torch.equal(output.prev_sample, pair[0]) and torch.equal(output.pred_original_sample, pair[1])
        assert output.prev_sample.shape == sample.shape and len(pair) == 2
    assert scheduler.scale_model_input(sample, 3) is sample


@pytest.mark.parametrize("device", DEVICES)
def test_devices(device):
    scheduler, x, noise = AncestralDDPMScheduler(), randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    t = torch.tensor([3, 900])
    on_cpu = scheduler.add_noise(x, noise, t), scheduler.step(noise, 7, x, seeded()).prev_sample
    scheduler.set_timesteps(1000, device=device)
    assert scheduler.timesteps.device.type == device
    x, noise = x.to(device), noise.to(device)
    there = scheduler.add_noise(x, noise, t), scheduler.step(noise, scheduler.timesteps[992], x, seeded()).prev_sample
    for a, b in zip(on_cpu, there, strict=True):
        assert b.device.type == device
        assert_same_numbers(b.cpu(), a)
    assert scheduler.add_noise(x.cpu(), noise.cpu(), t.to(device)).device.type == "cpu"


@pytest.mark.parametrize(
    "config, message",
    [
        ({"beta_schedule": "cosine"}, "beta_schedule: 'cosine' is not one of linear, .*squaredcos_cap_v2"),
        ({"prediction_type": "eps"}, "prediction_type: 'eps' is not one of epsilon"),
        ({"variance_type": "other"}, "variance_type: 'other' is not one of fixed_small"),
        ({"timestep_spacing": "even"}, "timestep_spacing: 'even' is not one of linspace"),
        ({"num_train_timesteps": 0}, "num_train_timesteps: 0"),
        ({"beta_end": 1.5}, "1.5.*beta_end"),
        ({"beta_start": 0.0}, "betas: they span 0 to 0.02"),
        ({"trained_betas": [0.1, -0.1]}, "betas: they span -0.1 to 0.1"),
        ({"trained_betas": [0.1, math.nan]}, "betas"),
        ({"trained_betas": [0.5] * 999, "rescale_betas_zero_snr": True}, "ᾱ goes from 0.5 to 0 in 999 steps"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "in 1 steps; it must fall"),
    ],
)
def test_config_errors(config, message):
    with pytest.raises(ValueError, match=message):
        AncestralDDPMScheduler(**config)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one"),
        ({"num_inference_steps": 10, "timesteps": [3, 2]}, "exactly one"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0 must be within 1 ... 1000"),
        ({"num_inference_steps": -5}, "num_inference_steps: -5"),
        ({"num_inference_steps": 1001}, "num_inference_steps: 1001"),
        ({"timesteps": []}, r"timesteps: \[\]"),
        ({"timesteps": [1, 2]}, r"timesteps: \[1, 2\] must be integers descending"),
        ({"timesteps": [5, 5]}, "descending"),
        ({"timesteps": [1000, 5]}, "within 999 ... 0"),
        ({"timesteps": [5, -1]}, "within 999 ... 0"),
        ({"timesteps": [5.5, 1]}, "integers"),
    ],
)
def test_set_timesteps_errors(arguments, message):
    scheduler = AncestralDDPMScheduler()
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    assert len(scheduler.timesteps) == 1000 and scheduler.num_inference_steps is None


@pytest.mark.parametrize("t", [-1, 1000, torch.tensor([3, 1000]), torch.tensor([-2, 5])])
def test_timesteps_out_of_range(t):
    scheduler, x = AncestralDDPMScheduler(), randn(2, 3, 4, 4)
    for method in (scheduler.add_noise, scheduler.get_velocity):
        with pytest.raises(ValueError, match=r"timesteps: \[-?\d+\] must be within 0 ... 999"):
            method(x, x, t)
    if isinstance(t, int):
        with pytest.raises(ValueError, match="must be within"):
            scheduler.step(x, t, x)


def test_arguments_that_do_not_fit():
    scheduler, x = AncestralDDPMScheduler(), randn(4, 3, 4, 4)
    with pytest.raises(ValueError, match="timesteps: 3 torch.int64 for 4 samples"):
        scheduler.add_noise(x, x, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="timesteps: 1 torch.float32"):
        scheduler.add_noise(x, x, torch.tensor([1.5]))
    with pytest.raises(ValueError, match="sample: its dtype is torch.uint8"):
        scheduler.add_noise(x.to(torch.uint8), x, 5)
    with pytest.raises(ValueError, match="generator: a list of 3 for 4 samples"):
        scheduler.step(x, 5, x, [seeded()] * 3)
    with pytest.raises(
        ValueError, match=r"model_output: its shape is \(4, 6, 4, 4\), but variance_type 'fixed_small'"
    ):
        scheduler.step(torch.cat([x, x], dim=1), 5, x)
    with pytest.raises(ValueError, match=r"'learned_range' asks for \(4, 6, 4, 4\)"):
        AncestralDDPMScheduler(variance_type="learned_range").step(x, 5, x)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep: 5 is not one of the 10"):
        scheduler.step(x, 5, x)
