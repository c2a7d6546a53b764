"""What diffusers asks of each of its schedulers, of both of this package."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from diffusion_cases import assert_same_numbers, randn, seeded

from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler

DEVICES = ["cpu", *([torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else [])]


@pytest.fixture(params=[AncestralDDPMScheduler, FewStepDDPMScheduler], ids=lambda cls: cls.__name__)
def cls(request):
    return request.param


def sampled(scheduler, as_timestep=int, return_dict=True):
    """x after five steps, with a network that follows the sample."""
    scheduler.set_timesteps(5)
    x, generator = randn(2, 3, 4, 4), seeded(1)
    for t in scheduler.timesteps.tolist():
        output = scheduler.step(0.1 * x, as_timestep(t), scheduler.scale_model_input(x, t), generator, return_dict)
        x = output.prev_sample if return_dict else output[0]
    return x


def test_a_saved_scheduler_has_the_config_and_the_samples(cls, tmp_path):
    scheduler = cls(beta_schedule="laplace", prediction_type="v_prediction", variance_type="fixed_large")
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    assert dict(loaded.config) == config
    assert torch.equal(sampled(loaded), sampled(scheduler))


def test_a_config_gains_no_key(cls, tmp_path):
    config = cls().config
    for _ in range(3):
        scheduler = cls.from_config(config)
        scheduler.save_config(tmp_path)
        config = cls.load_config(tmp_path)
        known = inspect.signature(cls.__init__).parameters.keys() - {"self"}
        assert {key for key in config if not key.startswith("_")} == known


def test_a_timestep_is_a_number_or_a_tensor(cls):
    expected = sampled(cls())
    for as_timestep in (torch.tensor, lambda t: torch.tensor([t]), np.int64):
        assert torch.equal(sampled(cls(), as_timestep), expected)


def test_a_tuple_is_the_output(cls):
    assert torch.equal(sampled(cls(), return_dict=False), sampled(cls()))


def test_one_scheduler_samples_again_as_it_did(cls):
    scheduler = cls()
    assert torch.equal(sampled(scheduler), sampled(scheduler))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_goes_on_from_where_it_is(cls, copied):
    scheduler, x = cls(), randn(2, 3, 4, 4)
    scheduler.set_timesteps(5)
    x = scheduler.step(0.1 * x, scheduler.timesteps[0], x, seeded()).prev_sample
    results = [one.step(0.1 * x, one.timesteps[1], x, seeded()).prev_sample for one in (copied(scheduler), scheduler)]
    assert torch.equal(*results)


def test_samples_begin_as_noise_of_deviation_one_and_are_the_input_of_the_network(cls):
    scheduler, x = cls(), randn(2, 3, 4, 4)
    assert scheduler.init_noise_sigma == 1
    assert scheduler.scale_model_input(x, 3) is x and scheduler.scale_model_input(x) is x


@pytest.mark.parametrize("of", [np.array, list, torch.tensor])
def test_betas_may_be_given(cls, of):
    scheduler = cls(num_train_timesteps=2, trained_betas=of([0.1, 0.3]))
    torch.testing.assert_close(scheduler.betas, torch.tensor([0.1, 0.3]))
    torch.testing.assert_close(scheduler.alphas_cumprod, torch.tensor([0.9, 0.63]))


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_added_where_the_images_are(cls, device):
    scheduler, x, noise, t = cls(), randn(3, 1, 4, 4), randn(3, 1, 4, 4, seed=1), torch.tensor([0, 500, 999])
    scheduler.set_timesteps(5)
    noisy = scheduler.add_noise(x.to(device), noise.to(device), t.to(device))
    assert noisy.device.type == device
    a = scheduler.alphas_cumprod.cpu()[t][:, None, None, None]
    assert_same_numbers(noisy.cpu(), a.sqrt() * x + (1 - a).sqrt() * noise)


def test_keys_of_the_config_are_attributes_with_a_warning_and_others_are_not(cls):
    scheduler = cls()
    with pytest.warns(FutureWarning, match="config"):
        assert scheduler.beta_schedule == "linear"
    with pytest.raises(AttributeError, match=f"'{cls.__name__}' object has no attribute 'no_such'"):
        scheduler.no_such  # noqa: B018
