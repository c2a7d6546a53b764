"""AncestralDDPMScheduler computes what `diffusers.DDPMScheduler` does, and raises where that gives NaN or infinity."""

import inspect
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusion_cases import (
    CLIPS,
    PREDICTIONS,
    SCHEDULES,
    VARIANCES,
    assert_same_numbers,
    model_output_like,
    randn,
    seeded,
)

from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler

SPACINGS = ["linspace", "leading", "trailing"]


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
        ours, theirs = parameters(getattr(AncestralDDPMScheduler, name)), parameters(getattr(DDPMScheduler, name))
        assert ours == theirs + [("check_finite", True)] * (name == "step")
    assert AncestralDDPMScheduler._compatibles == DDPMScheduler._compatibles


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
