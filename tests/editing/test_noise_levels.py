"""The noise levels of samplers against the process itself."""

import pytest
import torch
from small_pipelines import SAMPLERS
from tiny import randn

from hf_genmod.editing.noise_levels import from_step, noised, noised_back, sigma_of
from hf_genmod.pipelines.samplers import Sampler
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PROCESS = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}


@pytest.mark.parametrize("name", SAMPLERS)
def test_noised_is_what_the_network_sees_of_add_noise(name):
    cls, config = SAMPLERS[name]
    sampler, reference = Sampler(cls.from_config(PROCESS | config), 20), AncestralDDPMScheduler.from_config(PROCESS)
    x_0, epsilon = randn(2, 1, 4, 4, seed=0), randn(2, 1, 4, 4, seed=1)
    for i in (0, 4, 11, 19):
        t = sampler.scheduler.timesteps[i]
        if t == int(t):
            seen = from_step(sampler, i).scheduler.scale_model_input(noised(sampler, i, x_0, epsilon), t)
            torch.testing.assert_close(seen, reference.add_noise(x_0, epsilon, int(t)), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["Ancestral", "Euler", "DPM-Solver"])
def test_noised_back_has_the_noise_of_the_step_before(name):
    cls, config = SAMPLERS[name]
    sampler = Sampler(cls.from_config(PROCESS | config), 20)
    x_0 = torch.zeros(1, 1, 64, 64)
    for i in (5, 19):
        x = noised(sampler, i + 1, x_0, randn(*x_0.shape, seed=1)) if i < 19 else x_0
        again = noised_back(sampler, i, x, randn(*x_0.shape, seed=2))
        assert abs(again.std() / noised(sampler, i, x_0, randn(*x_0.shape, seed=3)).std() - 1) < 0.05
    assert sigma_of(sampler, 20) == 0
