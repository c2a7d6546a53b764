"""AncestralDDPMScheduler and the samplers of diffusers take each other's place."""

import ast
import importlib.util
import inspect
import json
import math
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from diffusion_cases import (
    SCHEDULES,
    randn,
    seeded,
)

from hf_genmod.checkpoints.bundle import bundle_of
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler

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


@pytest.mark.parametrize("cls", [AncestralDDPMScheduler, FewStepDDPMScheduler])
def test_the_bundle_stands_alone(cls, tmp_path):
    name, source = bundle_of(cls)
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
    installed = cls(beta_schedule="laplace")
    assert torch.equal(getattr(alone, cls.__name__).from_config(installed.config).betas, installed.betas)
