"""The scheduler against `diffusers.DDPMScheduler`, against closed-form Gaussians, and as a citizen of diffusers."""

import ast
import copy
import importlib.util
import inspect
import json
import math
import pickle
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import logging as diffusers_logging

from hf_genmod.schedulers import ancestral_ddpm
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler, AncestralDDPMSchedulerOutput
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
SPACINGS = ["linspace", "leading", "trailing"]
CLIPS = {
    "free": {"clip_sample": False},
    "clip": {"clip_sample": True, "clip_sample_range": 1.5},
    "threshold": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.7},
}
# Samplers with a forward process of their own: all that can follow a DDPM.
SAMPLERS = [
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("DEISMultistepScheduler", "UniPCMultistepScheduler"),
]
# No sampler but DDPM's own knows the last two.
TRAVELLING_SCHEDULES = ["squaredcos_cap_v2", "sigmoid", "laplace"]
# numpy 2 deprecates what some samplers of diffusers do.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::DeprecationWarning:numpy")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def assert_same_numbers(ours: torch.Tensor, theirs: torch.Tensor):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())


def assert_same_step(ours, theirs, model_output, t, sample) -> torch.Tensor | None:
    """One step of both with the same noise; where theirs is not finite, ours must raise."""
    expected = theirs.step(model_output, t, sample, generator=seeded(int(t)))
    if not (expected.prev_sample.isfinite().all() and expected.pred_original_sample.isfinite().all()):
        with pytest.raises(ValueError):
            ours.step(model_output, t, sample, generator=seeded(int(t)))
        return None
    result = ours.step(model_output, t, sample, generator=seeded(int(t)))
    assert_same_numbers(result.prev_sample, expected.prev_sample)
    assert_same_numbers(result.pred_original_sample, expected.pred_original_sample)
    return expected.prev_sample


def model_output_like(sample: torch.Tensor, variance_type: str, seed: int = 1) -> torch.Tensor:
    n, channels, *rest = sample.shape
    prediction = randn(n, channels, *rest, seed=seed, dtype=sample.dtype)
    if variance_type not in ("learned", "learned_range"):
        return prediction
    variance = randn(n, channels, *rest, seed=seed + 1, dtype=sample.dtype).tanh()
    return torch.cat([prediction, variance.abs() if variance_type == "learned" else variance], dim=1)


# The same numbers as diffusers


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("T", [2, 10, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_betas_are_bitwise_those_of_diffusers(schedule, T, zero_snr):
    config = dict(num_train_timesteps=T, beta_schedule=schedule, rescale_betas_zero_snr=zero_snr)
    ours, theirs = AncestralDDPMScheduler(**config), DDPMScheduler(**config)
    for name in ("betas", "alphas", "alphas_cumprod", "timesteps"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert len(ours) == len(theirs) and ours.order == theirs.order
    assert ours.init_noise_sigma == theirs.init_noise_sigma


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_single_steps_equal_diffusers(schedule, prediction_type, variance_type, zero_snr):
    sample = randn(2, 3, 4, 4)
    model_output = model_output_like(sample, variance_type)
    for clip in CLIPS.values():
        config = dict(beta_schedule=schedule, prediction_type=prediction_type, variance_type=variance_type, **clip)
        config["rescale_betas_zero_snr"] = zero_snr
        ours, theirs = AncestralDDPMScheduler(**config), DDPMScheduler(**config)
        for t in (0, 1, 2, 17, 500, 998, 999):
            assert_same_step(ours, theirs, model_output, t, sample)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_single_steps_equal_diffusers_at_every_timestep(schedule):
    sample = randn(2, 2, 3, 3)
    model_output = model_output_like(sample, "learned_range")
    schedulers = []
    for prediction_type in PREDICTIONS:
        config = dict(beta_schedule=schedule, prediction_type=prediction_type, variance_type="learned_range")
        config.update(rescale_betas_zero_snr=prediction_type != "epsilon", clip_sample=False)
        schedulers.append((AncestralDDPMScheduler(**config), DDPMScheduler(**config)))
    for t in range(1000):
        assert assert_same_step(*schedulers[t % 3], model_output, t, sample) is not None
        if t < 10 or t > 990:
            assert all(assert_same_step(*pair, model_output, t, sample) is not None for pair in schedulers)


def assert_same_trajectory(steps, spacing, **config):
    """Whole trajectories with one generator each and a network that follows the sample."""
    ours, theirs = (cls(timestep_spacing=spacing, **config) for cls in (AncestralDDPMScheduler, DDPMScheduler))
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)

    mine = his = randn(2, 2, 4, 4)
    my_generator, his_generator = seeded(), seeded()
    network = model_output_like(his, config["variance_type"])
    for t in theirs.timesteps:
        network = network.roll(1, 0)
        my_output, his_output = network.clone(), network.clone()
        my_output[:, :2] += 0.1 * mine
        his_output[:, :2] += 0.1 * his
        expected = theirs.step(his_output, t, his, his_generator)
        if not expected.prev_sample.isfinite().all():
            with pytest.raises(ValueError, match="ᾱ_t = 0"):
                ours.step(my_output, t, mine, my_generator)
            return
        his, mine = expected.prev_sample, ours.step(my_output, t, mine, my_generator).prev_sample
        assert_same_numbers(mine, his)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_trajectories_equal_diffusers(schedule, prediction_type, zero_snr, spacing, clip):
    config = dict(beta_schedule=schedule, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    # Every type of variance meets every value of the other keys, though not all combinations of them.
    i = (
        SCHEDULES.index(schedule)
        + PREDICTIONS.index(prediction_type)
        + SPACINGS.index(spacing)
        + list(CLIPS).index(clip)
    )
    variance_types = [v for v in VARIANCES if v != "fixed_large_log"]
    assert_same_trajectory(10, spacing, variance_type=variance_types[i % 5], **config, **CLIPS[clip])


@pytest.mark.parametrize("steps, spacing", [(50, "leading"), (50, "trailing"), (50, "linspace"), (1000, "leading")])
@pytest.mark.parametrize(
    "schedule, variance_type, prediction_type, zero_snr",
    [("linear", "fixed_small", "epsilon", False), ("scaled_linear", "learned_range", "v_prediction", True)],
)
def test_long_trajectories_equal_diffusers(schedule, variance_type, prediction_type, zero_snr, steps, spacing):
    config = dict(beta_schedule=schedule, prediction_type=prediction_type, variance_type=variance_type)
    assert_same_trajectory(steps, spacing, rescale_betas_zero_snr=zero_snr, clip_sample=steps == 1000, **config)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("T, offset", [(1000, 0), (1000, 1), (50, 0), (7, 0)])
def test_timesteps_equal_diffusers_for_every_step_count(T, offset, spacing):
    config = dict(num_train_timesteps=T, timestep_spacing=spacing, steps_offset=offset)
    ours, theirs = AncestralDDPMScheduler(**config), DDPMScheduler(**config)
    for n in range(1, T + 1):
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        # With "trailing" theirs has one more for some n, such as 61 of 1000: timestep −1.
        assert torch.equal(ours.timesteps, theirs.timesteps[:n])
        assert ours.timesteps.dtype == torch.int64 and len(ours.timesteps) == ours.num_inference_steps == n
    assert spacing != "trailing" or ours.timesteps.min() == 0


@pytest.mark.parametrize("timesteps", [[999, 700, 3], [87], list(range(999, -1, -1)), np.array([10, 5, 0])])
def test_custom_timesteps_equal_diffusers(timesteps):
    ours, theirs = AncestralDDPMScheduler(clip_sample=False), DDPMScheduler(clip_sample=False)
    ours.set_timesteps(timesteps=timesteps)
    theirs.set_timesteps(timesteps=timesteps)
    assert torch.equal(ours.timesteps, theirs.timesteps) and ours.custom_timesteps
    sample = randn(2, 3, 4, 4)
    for t in ours.timesteps[:20]:
        assert ours.previous_timestep(t).item() == theirs.previous_timestep(t).item()
        assert_same_step(ours, theirs, randn(2, 3, 4, 4, seed=1), t, sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_forward_process_equals_diffusers(schedule, zero_snr, dtype):
    config = dict(beta_schedule=schedule, rescale_betas_zero_snr=zero_snr)
    ours, theirs = AncestralDDPMScheduler(**config), DDPMScheduler(**config)
    x_0, noise, t = randn(1000, 1, 2, 2, dtype=dtype), randn(1000, 1, 2, 2, seed=1, dtype=dtype), torch.arange(1000)
    assert_same_numbers(ours.add_noise(x_0, noise, t), theirs.add_noise(x_0, noise, t))
    assert_same_numbers(ours.get_velocity(x_0, noise, t), theirs.get_velocity(x_0, noise, t))
    single = (x_0[:4], noise[:4], torch.tensor(7))
    assert_same_numbers(ours.add_noise(*single), theirs.add_noise(*single))
    assert torch.equal(ours.add_noise(*single), ours.add_noise(x_0[:4], noise[:4], 7))


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 6), (3, 2, 2, 4, 4)])
def test_samples_of_any_rank(shape):
    ours, theirs = AncestralDDPMScheduler(), DDPMScheduler()
    x, noise, t = randn(*shape), randn(*shape, seed=1), torch.tensor([0, 500, 999])
    assert_same_numbers(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t))
    assert_same_step(ours, theirs, noise, 500, x)


def test_fp64_step_equals_diffusers():
    ours, theirs = AncestralDDPMScheduler(clip_sample=False), DDPMScheduler(clip_sample=False)
    for t in range(0, 1000, 37):
        sample = randn(2, 3, 4, 4, dtype=torch.float64)
        assert_same_step(ours, theirs, randn(2, 3, 4, 4, seed=1, dtype=torch.float64), t, sample)


def test_a_list_of_generators_gives_each_sample_its_own_noise():
    ours, theirs = AncestralDDPMScheduler(), DDPMScheduler()
    sample, model_output = randn(3, 3, 4, 4), randn(3, 3, 4, 4, seed=1)
    together = ours.step(model_output, 500, sample, [seeded(i) for i in range(3)]).prev_sample
    assert_same_numbers(together, theirs.step(model_output, 500, sample, [seeded(i) for i in range(3)]).prev_sample)
    alone = [ours.step(model_output[i, None], 500, sample[i, None], seeded(i)).prev_sample for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_signatures_are_those_of_diffusers():
    def parameters(method):
        return [(p.name, p.default) for p in inspect.signature(method).parameters.values()]

    names = "__init__ step set_timesteps add_noise get_velocity scale_model_input previous_timestep __len__".split()
    for name in names:
        assert parameters(getattr(AncestralDDPMScheduler, name)) == parameters(getattr(DDPMScheduler, name))
    assert AncestralDDPMScheduler._compatibles == DDPMScheduler._compatibles


# Where diffusers gives NaN or infinity


@pytest.mark.parametrize("clip", ["free", "threshold"])
def test_epsilon_at_pure_noise_raises(clip):
    config = dict(rescale_betas_zero_snr=True, **CLIPS[clip])
    ours, theirs = AncestralDDPMScheduler(**config), DDPMScheduler(**config)
    sample, model_output = randn(1, 3, 4, 4), randn(1, 3, 4, 4, seed=1)
    assert not theirs.step(model_output, 999, sample).prev_sample.isfinite().all()
    with pytest.raises(ValueError, match="v_prediction"):
        ours.step(model_output, 999, sample)
    with pytest.raises(ValueError, match="ᾱ_t = 0"):
        ours.predict_original_sample(model_output, torch.tensor([999]), sample)
    assert_same_step(ours, theirs, model_output, 998, sample)


def test_large_log_variance_raises():
    config = dict(variance_type="fixed_large_log")
    sample, model_output = randn(1, 3, 4, 4), randn(1, 3, 4, 4, seed=1)
    assert DDPMScheduler(**config).step(model_output, 10, sample).prev_sample.isnan().all()
    with pytest.raises(ValueError, match="fixed_large'"):
        AncestralDDPMScheduler(**config).step(model_output, 10, sample)


def test_negative_learned_variance_raises():
    model_output, sample = -torch.ones(1, 6, 4, 4), torch.zeros(1, 3, 4, 4)
    assert DDPMScheduler(variance_type="learned").step(model_output, 10, sample).prev_sample.isnan().all()
    with pytest.raises(ValueError, match="-1 .*learned_range"):
        AncestralDDPMScheduler(variance_type="learned").step(model_output, 10, sample)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_network_that_is_not_finite_raises(bad):
    sample = randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match=f"timestep 10 .*model_output. = {bad}"):
        AncestralDDPMScheduler(clip_sample=False).step(torch.full_like(sample, bad), 10, sample)


def test_alpha_bar_that_underflows_raises():
    config = dict(trained_betas=[0.9] * 100, num_train_timesteps=100, prediction_type="sample")
    ours, theirs = AncestralDDPMScheduler(**config), DDPMScheduler(**config)
    sample, model_output = randn(1, 3, 4, 4), randn(1, 3, 4, 4, seed=1)
    assert assert_same_step(ours, theirs, model_output, 99, sample) is None
    assert assert_same_step(ours, theirs, model_output, 20, sample) is not None


# Truths in closed form


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
        assert torch.equal(log_variance[one], scheduler.reverse_log_variance(s, x_t[one], predicted_variance=v[one]))
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


# Precision


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


# A citizen of diffusers


@pytest.fixture
def warnings_of_diffusers(monkeypatch):
    messages = []
    logger = diffusers_logging.get_logger("diffusers.configuration_utils")
    monkeypatch.setattr(logger, "warning", lambda message, *args: messages.append(message))
    return messages


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("schedule", TRAVELLING_SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_the_betas_and_gives_them_back(sampler, schedule, saved, warnings_of_diffusers):
    ours = AncestralDDPMScheduler(beta_schedule=schedule, beta_end=0.015, prediction_type="v_prediction")
    config = json.loads(ours.to_json_string()) if saved else ours.config
    other = getattr(diffusers, sampler).from_config(config)
    assert torch.equal(other.betas, ours.betas)
    assert other.config.prediction_type == "v_prediction" and other.config.num_train_timesteps == 1000

    back = AncestralDDPMScheduler.from_config(json.loads(other.to_json_string()) if saved else other.config)
    assert torch.equal(back.alphas_cumprod, ours.alphas_cumprod)
    keys = inspect.signature(AncestralDDPMScheduler.__init__).parameters.keys() - {"self"}
    assert {k: back.config[k] for k in keys if k != "timestep_spacing"} == {
        k: ours.config[k] for k in keys if k != "timestep_spacing"
    }
    assert warnings_of_diffusers == []


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_defaults_keep_their_betas_in_every_sampler(sampler):
    assert torch.equal(
        getattr(diffusers, sampler).from_config(AncestralDDPMScheduler().config).betas, AncestralDDPMScheduler().betas
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_configs_of_every_sampler_are_understood(sampler, tmp_path, warnings_of_diffusers):
    theirs = getattr(diffusers, sampler)(beta_schedule="scaled_linear", beta_end=0.012, prediction_type="v_prediction")
    theirs.save_pretrained(tmp_path)
    for ours in (AncestralDDPMScheduler.from_config(theirs.config), AncestralDDPMScheduler.from_pretrained(tmp_path)):
        assert torch.equal(ours.betas, theirs.betas)
        assert ours.config.prediction_type == "v_prediction"
    assert warnings_of_diffusers == []


@pytest.mark.parametrize(
    "sampler", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_travels(sampler, schedule):
    ours = AncestralDDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    other = getattr(diffusers, sampler).from_config(ours.config)
    assert torch.equal(other.betas, ours.betas)
    assert torch.equal(AncestralDDPMScheduler.from_config(other.config).betas, ours.betas)


@pytest.mark.parametrize("schedule", TRAVELLING_SCHEDULES)
@pytest.mark.parametrize("sampler", [*SAMPLERS, "AncestralDDPMScheduler"])
def test_every_sampler_finds_the_only_picture(sampler, schedule):
    """If x_0 can only be c, ε = (x_t − √ᾱ_t c) / √(1 − ᾱ_t) is exact, and any sampler must end at c."""
    ours = AncestralDDPMScheduler(beta_schedule=schedule, clip_sample=False, timestep_spacing="leading")
    cls = AncestralDDPMScheduler if sampler == "AncestralDDPMScheduler" else getattr(diffusers, sampler)
    scheduler = cls.from_config(ours.config)
    scheduler.set_timesteps(25)
    log_sigma = (((1 - ours.alphas_cumprod) / ours.alphas_cumprod) ** 0.5).log().numpy()
    c = 0.8 * randn(2, 3, 4, 4, seed=1).tanh()
    x, generator = randn(2, 3, 4, 4) * scheduler.init_noise_sigma, {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        generator = {"generator": seeded()}
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, t)
        sigma = math.exp(np.interp(float(t), np.arange(1000), log_sigma))  # second-order samplers go between timesteps
        alpha_bar_t = 1 / (1 + sigma**2)
        x = scheduler.step((x_t - alpha_bar_t**0.5 * c) / (1 - alpha_bar_t) ** 0.5, t, x, **generator).prev_sample
    # These two stop at ᾱ_0, where some of the noise is left.
    left = (1 - ours.alphas_cumprod[0]).sqrt() if sampler in ("PNDMScheduler", "DEISMultistepScheduler") else 0
    assert (x - c).abs().max() < 0.05 + 6 * left


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", [*SCHEDULES, "trained"])
def test_save_and_load_is_bitwise(schedule, zero_snr, tmp_path):
    config = (
        {"trained_betas": np.linspace(0.001, 0.03, 1000)} if schedule == "trained" else {"beta_schedule": schedule}
    )
    saved = AncestralDDPMScheduler(**config, rescale_betas_zero_snr=zero_snr, prediction_type="sample")
    saved.save_pretrained(tmp_path)
    loaded = AncestralDDPMScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.betas, saved.betas) and torch.equal(loaded.alphas_cumprod, saved.alphas_cumprod)
    loaded.save_pretrained(tmp_path / "again")
    again, once = (p / "scheduler_config.json" for p in (tmp_path / "again", tmp_path))
    assert again.read_text() == once.read_text()
    sample, model_output = randn(1, 3, 4, 4), randn(1, 3, 4, 4, seed=1)
    assert torch.equal(*(s.step(model_output, 500, sample, seeded()).prev_sample for s in (saved, loaded)))


def test_only_unknown_schedules_carry_their_betas():
    for schedule in SCHEDULES:
        carried = AncestralDDPMScheduler(beta_schedule=schedule).config.trained_betas
        assert (carried is not None) == (schedule in ("sigmoid", "laplace"))
        assert carried is None or carried == DDPMScheduler(beta_schedule=schedule).betas.tolist()


def test_compatibles_and_back():
    # The loop of the scheduler tests of diffusers (test_compatibles).
    scheduler = AncestralDDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True)
    assert {c.__name__ for c in scheduler.compatibles} == {c.__name__ for c in DDPMScheduler().compatibles}
    for cls in scheduler.compatibles:
        if "EDM" in cls.__name__ or cls.__module__.startswith("diffusers.utils.dummy"):
            continue  # EDM has no betas; a dummy stands for a sampler whose library is not installed
        other = cls.from_config(scheduler.config)
        back = AncestralDDPMScheduler.from_config(other.config)
        assert {k: v for k, v in back.config.items() if k in scheduler.config} == dict(scheduler.config)


def test_trained_betas_as_in_the_tests_of_diffusers(tmp_path):
    scheduler = AncestralDDPMScheduler(num_train_timesteps=1000, trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    assert scheduler.betas.tolist() == AncestralDDPMScheduler.from_pretrained(tmp_path).betas.tolist()
    assert scheduler.betas.tolist() == DDPMScheduler(trained_betas=np.array([0.1, 0.3])).betas.tolist()


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


def test_copies_are_independent():
    scheduler = AncestralDDPMScheduler(beta_schedule="sigmoid")
    scheduler.set_timesteps(50)
    twins = [copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    scheduler.set_timesteps(10)
    for twin in twins:
        assert len(twin.timesteps) == 50 and torch.equal(twin.betas, scheduler.betas)
        assert dict(twin.config) == dict(scheduler.config)


def test_a_pipeline_of_diffusers_samples_the_same_with_it():
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,))
    unet = UNet2DModel(sample_size=8, norm_num_groups=4, **blocks)
    images = []
    for cls in (AncestralDDPMScheduler, DDPMScheduler):
        pipe = DDPMPipeline(unet, cls())
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(2, generator=seeded(), num_inference_steps=4, output_type="np").images)
    np.testing.assert_allclose(images[0], images[1], atol=1e-4)


def test_the_file_stands_alone(tmp_path):
    source = inspect.getsource(ancestral_ddpm)
    for node in ast.walk(ast.parse(source)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module]
        for module in modules:
            assert module.split(".")[0] in {*sys.stdlib_module_names, "torch", "numpy", "diffusers"}

    (tmp_path / "alone.py").write_text(source)
    spec = importlib.util.spec_from_file_location("alone", tmp_path / "alone.py")
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    installed = AncestralDDPMScheduler(beta_schedule="laplace")
    assert torch.equal(alone.AncestralDDPMScheduler.from_config(installed.config).betas, installed.betas)


# Errors: one sentence with the wrong value and the remedy


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


# Few steps


COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "clip_sample": False}


def sigmas_of(scheduler) -> torch.Tensor:
    alpha_bar = scheduler.alphas_cumprod.double()
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def variance_of_samples(scheduler, s: float, timesteps) -> float:
    """Of 100,000 samples of N(0, s²), whose denoiser is known: E[x_0 | x_t] = s² / (s² + σ²) · x_t / √ᾱ_t."""
    scheduler.set_timesteps(timesteps=timesteps)
    sigma, x_t, rng = sigmas_of(scheduler), randn(100_000, 1), seeded(1)
    for t in scheduler.timesteps.tolist():
        x_0 = s**2 / (s**2 + sigma[t].item() ** 2) * x_t / scheduler.alphas_cumprod[t].sqrt()
        x_t = scheduler.step(x_0, t, x_t, generator=rng).prev_sample
    return x_t.var().item()


@pytest.mark.parametrize("n, s, kept", [(20, 0.2, 0.96), (20, 0.5, 0.98), (20, 1, 0.98), (20, 5, 0.96), (10, 1, 0.93)])
def test_few_steps_keep_the_variance_of_gaussian_data(n, s, kept):
    few = FewStepDDPMScheduler(**COSINE)
    few.set_timesteps(n)
    timesteps = few.timesteps.tolist()
    assert kept < variance_of_samples(few, s, timesteps) / s**2 < 1.02  # sampling error: 0.5%
    assert variance_of_samples(AncestralDDPMScheduler(**COSINE), s, timesteps) / s**2 < 0.72


@pytest.mark.parametrize("clip", CLIPS)
def test_few_steps_are_the_formula_in_sigma(clip):
    scheduler = FewStepDDPMScheduler(**(COSINE | CLIPS[clip]))
    scheduler.set_timesteps(5)
    timesteps, sigma = scheduler.timesteps.tolist(), sigmas_of(scheduler)
    outputs = [2 * randn(2, 3, 4, 4, seed=i) for i in range(5)]
    x_t, noises, denoised = randn(2, 3, 4, 4, seed=9), seeded(7), []
    # In x_t / √ᾱ_t = x_0 + σ ε, with δ = 1 − σ'² / σ², a step is x + δ (D − x) + σ' √δ z.
    x = x_t.double() / scheduler.alphas_cumprod[timesteps[0]].sqrt()
    rng = seeded(7)
    for i, (t, output) in enumerate(zip(timesteps, outputs, strict=True)):
        x_t, x_0 = scheduler.step(output, t, x_t, generator=noises, return_dict=False)
        denoised.append(x_0.double())
        if i == 4:
            torch.testing.assert_close(x_t, x_0)
            break
        ahead = sigma[timesteps[i + 1]]
        delta = 1 - (ahead / sigma[t]) ** 2
        D = denoised[i]
        if i > 0:
            delta_before = 1 - (sigma[t] / sigma[timesteps[i - 1]]) ** 2
            D = D + ((1 + delta**2 / delta_before).sqrt() - 1) / delta * (denoised[i] - denoised[i - 1])
        z = torch.randn(2, 3, 4, 4, generator=rng).double()
        x = x + delta * (D - x) + ahead * delta.sqrt() * z
        expected = x * scheduler.alphas_cumprod[timesteps[i + 1]].sqrt()
        torch.testing.assert_close(x_t.double(), expected, rtol=1e-4, atol=1e-4)


def test_each_run_of_few_steps_starts_anew():
    scheduler, runs = FewStepDDPMScheduler(**COSINE), []

    def run(n, timesteps):
        x_t, rng = randn(n, 3, 4, 4), seeded(1)
        for t in timesteps:
            x_t = scheduler.step(randn(n, 3, 4, 4, seed=t), t, x_t, generator=rng).prev_sample
            runs.append(x_t)

    scheduler.set_timesteps(timesteps=[900, 500, 100])
    run(2, [900, 500, 100])
    run(2, [900, 500])  # after a run that came to its end, and stopped before its own
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    run(2, [900, 500])
    assert torch.equal(runs[0], runs[3]) and torch.equal(runs[1], runs[4])
    assert torch.equal(runs[0], runs[5]) and torch.equal(runs[1], runs[6])


def test_few_steps_stand_betas_that_are_lost_in_rounding():
    betas = [1e-2] + [1e-9] * 9 + [0.1] * 90
    scheduler = FewStepDDPMScheduler(num_train_timesteps=100, trained_betas=betas, prediction_type="sample")
    scheduler.set_timesteps(timesteps=[50, 9, 8, 7])
    x_t = randn(2, 3, 4, 4)
    for t in scheduler.timesteps.tolist():
        x_t = scheduler.step(randn(2, 3, 4, 4, seed=t), t, x_t, generator=seeded(t)).prev_sample
        assert x_t.isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_few_steps_are_as_many_as_asked_for(schedule, zero_snr):
    scheduler = FewStepDDPMScheduler(**(COSINE | {"beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr}))
    for n in (1, 2, 3, 20, 61, 250, 999, 1000):
        scheduler.set_timesteps(n)
        timesteps = scheduler.timesteps
        assert len(timesteps) == n and 0 <= timesteps[-1] and timesteps[0] < 1000 and (timesteps.diff() < 0).all()
    with pytest.raises(ValueError, match="num_inference_steps: 0 must be within 1 ... 1000"):
        scheduler.set_timesteps(0)


def test_few_steps_are_even_in_the_angle_from_80_to_0_02():
    scheduler = FewStepDDPMScheduler(**COSINE)
    scheduler.set_timesteps(20)
    sigma = sigmas_of(scheduler)[scheduler.timesteps]
    assert sigma[0].item() == pytest.approx(80, rel=0.1) and sigma[-1].item() == pytest.approx(0.02, rel=0.1)
    angles = torch.arctan(sigma.sqrt().sqrt())
    even = torch.linspace(angles[0], angles[-1], 20, dtype=torch.float64)
    assert (angles - even).abs().max() < 0.1 * (even[0] - even[1])
