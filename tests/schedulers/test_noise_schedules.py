"""The noise schedules are those of diffusers."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusion_cases import SCHEDULES

from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler


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


def test_only_unknown_schedules_carry_their_betas():
    for schedule in SCHEDULES:
        carried = AncestralDDPMScheduler(beta_schedule=schedule).config.trained_betas
        assert (carried is not None) == (schedule in ("sigmoid", "laplace"))
        assert carried is None or carried == DDPMScheduler(beta_schedule=schedule).betas.tolist()


def test_trained_betas_as_in_the_tests_of_diffusers(tmp_path):
    scheduler = AncestralDDPMScheduler(num_train_timesteps=1000, trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    assert scheduler.betas.tolist() == AncestralDDPMScheduler.from_pretrained(tmp_path).betas.tolist()
    assert scheduler.betas.tolist() == DDPMScheduler(trained_betas=np.array([0.1, 0.3])).betas.tolist()
