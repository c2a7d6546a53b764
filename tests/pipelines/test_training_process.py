"""A pipeline knows the process that its network was trained with, and refuses the scheduler of another."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from small_pipelines import DIFFUSION, PIPELINES, classifier_guided, guided, images_of, unconditional
from tiny import tiny_classifier, tiny_unet

from hf_genmod import load_pipeline
from hf_genmod.pipelines.unconditional import UnconditionalPipeline
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


def cosine(cls=AncestralDDPMScheduler, **changes):
    return cls.from_config(AncestralDDPMScheduler(**COSINE).config, **changes)


def refuses(pipeline, message, request=None):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        images_of(pipeline, request or {}, num_inference_steps=2)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("kind", DIFFUSION)
def test_each_pipeline_refuses_another_process_and_the_remedy_works(kind):
    make, request = PIPELINES[kind]
    pipe, request = make(), request(1)  # a linear process, and ε
    pipe.scheduler = UniPCMultistepScheduler(beta_end=0.03, timestep_spacing="trailing")
    remedy = 'DPMSolverMultistepScheduler.from_config(pipe.config.process, timestep_spacing="trailing")'
    message = f"scheduler: its beta_end is 0.03, and 0.02 in the training of this model; use {remedy}"
    refuses(pipe, message, request)
    pipe.scheduler = eval(remedy)
    assert images_of(pipe, request, num_inference_steps=2).isfinite().all()
    pipe.scheduler = AncestralDDPMScheduler(prediction_type="sample")
    refuses(pipe, "scheduler: its prediction_type is 'sample', and 'epsilon' in the training", request)
    for other, name in (
        (EDMEulerScheduler(), "EDMEulerScheduler"),
        (DDIMScheduler, "DDIMScheduler"),
        (None, "NoneType"),
    ):
        pipe.scheduler = other
        refuses(pipe, f"scheduler: {name} is for another kind of model; use DPMSolverMultistepS", request)
    pipe.scheduler = AncestralDDPMScheduler(num_train_timesteps=50)  # fewer than the noise levels of an upsampler
    refuses(pipe, "scheduler: its num_train_timesteps is 50, and 1000 in the training", request)


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (DDIMScheduler(), "its prediction_type is 'epsilon', and 'v_prediction' in"),
        (DDIMScheduler(prediction_type="v_prediction"), "its beta_schedule is 'linear', and 'squaredcos_cap_v2' in"),
        (HeunDiscreteScheduler(prediction_type="v_prediction"), "its beta_schedule is 'linear', and 'squaredcos"),
        (DDPMScheduler(num_train_timesteps=500, **COSINE), "its num_train_timesteps is 500, and 1000 in"),
        (DDPMScheduler(**COSINE, trained_betas=np.full(1000, 0.01)), "its trained_betas is [0.01, 0.01, 0.01, 0.01,"),
    ],
)
def test_the_key_that_differs_is_named(scheduler, message):
    pipe = unconditional(scheduler=cosine())
    pipe.scheduler = scheduler
    refuses(pipe, f"scheduler: {message}")


def test_noise_levels_that_differ_a_little_are_refused():
    pipe = unconditional(scheduler=AncestralDDPMScheduler())
    pipe.scheduler = DDIMScheduler(beta_end=0.0215)
    angles = [s.alphas_cumprod.sqrt().acos() for s in (pipe.scheduler, AncestralDDPMScheduler())]
    assert 0.02 < (angles[0] - angles[1]).abs().max() < 0.05
    refuses(pipe, "scheduler: its beta_end is 0.0215, and 0.02 in the training")


def test_a_sampler_that_cannot_follow_is_refused():
    scheduler = AncestralDDPMScheduler(
        rescale_betas_zero_snr=True, beta_schedule="scaled_linear", beta_end=0.012, prediction_type="v_prediction"
    )
    pipe = unconditional(scheduler=scheduler)
    pipe.scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    assert images_of(pipe, {}, num_inference_steps=2).isfinite().all()
    pipe.scheduler = HeunDiscreteScheduler.from_config(scheduler.config)  # does not know rescale_betas_zero_snr
    refuses(pipe, "scheduler: HeunDiscreteScheduler changes the noise levels of the training; use DPMSolverMul")


class OfSomebodyElse(DDIMScheduler):
    """A scheduler of no library."""


@pytest.mark.parametrize(
    "scheduler",
    [
        cosine(DDIMScheduler, timestep_spacing="leading", steps_offset=1),
        cosine(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++", solver_order=1),
        cosine(EulerDiscreteScheduler),
        cosine(FewStepDDPMScheduler, variance_type="fixed_small_log"),
        cosine(OfSomebodyElse),
        # The same noise by other keys.
        DDPMScheduler(trained_betas=cosine().betas.tolist(), prediction_type="v_prediction"),
        DDIMScheduler(**COSINE, beta_start=0.001, beta_end=0.5),
        DDIMScheduler(**COSINE, rescale_betas_zero_snr=True),  # the last σ is infinite instead of 20,000
    ],
)
def test_what_belongs_to_sampling_may_change(scheduler):
    pipe = unconditional(scheduler=cosine())
    pipe.scheduler = scheduler
    assert images_of(pipe, {}, num_inference_steps=4).isfinite().all()


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "laplace"])
@pytest.mark.parametrize("by_its_own_code", [False, True])
def test_a_checkpoint_knows_it_whatever_scheduler_is_saved_with_it(schedule, by_its_own_code, tmp_path):
    pipe = guided(scheduler=AncestralDDPMScheduler(beta_schedule=schedule, timestep_spacing="trailing"))
    pipe.scheduler = DDIMScheduler(timestep_spacing="trailing")
    pipe.save_pretrained(tmp_path / "once")
    load = DiffusionPipeline.from_pretrained if by_its_own_code else load_pipeline
    options = {"trust_remote_code": True} if by_its_own_code else {}
    load(tmp_path / "once", **options).save_pretrained(tmp_path / "twice")
    once, twice = (json.loads((tmp_path / place / "model_index.json").read_text()) for place in ("once", "twice"))
    assert once == twice and once["process"]["beta_schedule"] == schedule
    pipe = load(tmp_path / "twice", **options)
    refuses(pipe, f"scheduler: its beta_schedule is 'linear', and '{schedule}' in the", {"class_labels": 0})
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **pipe.config.process)
    assert images_of(pipe, {"class_labels": 0}).isfinite().all()


def test_a_scheduler_given_while_loading_is_compared_too(tmp_path):
    unconditional(scheduler=cosine()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    message = "scheduler: its beta_schedule is 'linear', and 'squaredcos_cap_v2' in the training"
    wrong = DDIMScheduler(prediction_type="v_prediction")
    refuses(load_pipeline(tmp_path, scheduler=wrong), message)
    # A checkpoint of an earlier version does not say it, but its own scheduler does.
    del index["process"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refuses(load_pipeline(tmp_path, scheduler=wrong), message)
    assert load_pipeline(tmp_path).config.process["beta_schedule"] == "squaredcos_cap_v2"
    assert images_of(load_pipeline(tmp_path, scheduler=cosine(DDIMScheduler)), {}).isfinite().all()


def test_a_pipeline_of_another_knows_it_and_one_of_new_parts_starts_anew():
    first = unconditional(scheduler=cosine())
    first.scheduler = DDIMScheduler()
    of_it = UnconditionalPipeline.from_pipe(first, unet=first.unet)
    refuses(of_it, "scheduler: its prediction_type is 'epsilon', and 'v_prediction' in the training")
    # After training with another process, the network belongs to that.
    again = UnconditionalPipeline(**first.components)
    assert images_of(again, {}).isfinite().all() and again.config.process["beta_schedule"] == "linear"


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_learned_variance_is_no_obstacle(variance_type):
    process = AncestralDDPMScheduler(**COSINE, variance_type=variance_type)
    pipe = unconditional(tiny_unet(out_channels=6), process)
    # An untrained U-Net does not predict variances themselves, which are positive.
    of_ddpm = (DDPMScheduler, AncestralDDPMScheduler) if variance_type == "learned_range" else ()
    for cls in (DDIMScheduler, DPMSolverMultistepScheduler, *of_ddpm):
        pipe.scheduler = cls.from_config(process.config)
        assert images_of(pipe, {}).isfinite().all()


def test_values_of_numpy_and_tensors_are_saved(tmp_path):
    betas = torch.linspace(1e-4, 0.02, 1000)
    for scheduler in (DDPMScheduler(trained_betas=betas.numpy()), DDPMScheduler(beta_start=np.float32(1e-4))):
        pipe = unconditional(scheduler=scheduler)
        assert json.loads(pipe.to_json_string())["process"] == pipe.config.process
        assert images_of(pipe, {}).isfinite().all()


def test_a_classifier_may_be_of_the_same_process_only():
    process = cosine()
    pipe = classifier_guided(scheduler=process, classifier=tiny_classifier(noise_schedule=dict(process.config)))
    pipe.scheduler = cosine(DDIMScheduler)
    assert images_of(pipe, {"class_labels": 0}).isfinite().all()
