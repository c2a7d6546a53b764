"""FewStepDDPMScheduler is its formula, and keeps the variance of the data in few steps."""

import pytest
import torch
from diffusion_cases import CLIPS, SCHEDULES, randn, seeded

from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler

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
