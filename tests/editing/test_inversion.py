"""Images as noise, and back."""

import logging
import math
import re

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SASolverScheduler,
)
from gaussian_pairs import pairs, pairs_pipeline
from small_pipelines import PIPELINES, guided, seeded, unconditional, upsampler
from tiny import randn

from hf_genmod.editing.inversion import CLOSE, flow_step
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DETERMINISTIC = [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]


def psnr(drawn, image):
    """In dB, of images in [0, 1]."""
    return -10 * math.log10((drawn - image).square().mean())


@pytest.mark.parametrize("cls", DETERMINISTIC)
def test_of_a_gaussian_gives_noise_that_gives_the_image_back(cls):
    pipeline, x_0 = pairs_pipeline(cls, 256), pairs(4, 256)
    x_T = pipeline.invert(x_0, num_inference_steps=50)
    assert abs(x_T.mean()) < 0.1 and abs(x_T.std() - 1) < 0.1
    drawn = pipeline(batch_size=4, latents=x_T, num_inference_steps=50, output_type="pt").images
    assert psnr(drawn / 2, x_0 / 2) > 35


def test_a_correction_brings_it_closer():
    pipeline, x_0 = pairs_pipeline(DPMSolverMultistepScheduler, 256), pairs(4, 256)
    errors = []
    for count in (0, 1, 3):
        x_T = pipeline.invert(x_0, num_inference_steps=10, num_corrections=count)
        drawn = pipeline(batch_size=4, latents=x_T, num_inference_steps=10, output_type="pt").images
        errors.append((drawn - x_0).square().mean().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("steps", [8, 50])
def test_an_image_is_corrected_until_it_comes_back_whatever_its_batch(steps):
    pipeline, x_0, calls = pairs_pipeline(DPMSolverMultistepScheduler, 256), pairs(4, 256), []
    x_0[1:] *= torch.tensor([0.1, 1.5, 3.0])[:, None, None, None]  # which come back with different ease
    together = pipeline.invert(
        x_0, num_inference_steps=steps, callback_on_step_end=lambda pipe, i, t, tensors: calls.append(i)
    )
    alone = torch.cat([pipeline.invert(x[None], num_inference_steps=steps) for x in x_0])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    drawn = pipeline(batch_size=4, latents=together, num_inference_steps=steps, output_type="latent").images
    errors = (drawn - x_0).square().flatten(1).mean(dim=1)
    assert (len(calls) < 9 * steps) == bool(errors.max() <= CLOSE)


def test_is_the_flow_of_the_gaussian():
    """dx̄/dλ = x̄ − E[x_0 | x̄] moves each principal component of x_0 from deviation s to √(s² + σ²)."""
    pipeline, x_0 = pairs_pipeline(DDIMScheduler, 256), pairs(2, 256)
    x_T = pipeline.invert(x_0, num_inference_steps=200, num_corrections=0)
    alpha_bar = pipeline.scheduler.alphas_cumprod[-1].double()
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    for sign, correlation in ((1, 0.8), (-1, -0.8)):
        s = 0.5 * math.sqrt(1 + correlation)
        before, after = ((x[:, 0, 0] + sign * x[:, 0, 1]) / math.sqrt(2) for x in (x_0 - 0.3, x_T))
        expected = before.double() / s * (s**2 + sigma**2).sqrt() * alpha_bar.sqrt()
        torch.testing.assert_close(after.double(), expected, atol=0.02, rtol=0.02)


def test_a_step_is_exact_where_the_noise_changes_linearly():
    x, epsilon, change, lambda_, h = (randn(3, seed=i).double() for i in range(5))
    lambda_, h = lambda_[0].item(), h[0].item()
    tau = torch.linspace(0, h, 20001, dtype=torch.float64)[:, None]
    integrand = torch.exp(lambda_ + tau) * (epsilon + tau * change)
    expected = x + torch.trapezoid(integrand, tau, dim=0)
    torch.testing.assert_close(flow_step(x, lambda_, h, epsilon, change), expected)


@pytest.mark.parametrize("kind", ["unconditional", "latents", "guided", "classifier guided", "text"])
def test_works_in_every_pipeline(kind):
    """A random network draws no image well; the corrections must not make it worse, and conditions pass."""
    make, request = PIPELINES[kind]
    pipeline = make()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.config.process, timestep_spacing="trailing")
    image, asked = torch.rand(2, *pipeline.picture_shape, generator=seeded()), request(2)
    asked.pop("batch_size", None)
    drawn = {}
    for count in (0, 1):
        x_T = pipeline.invert(image, num_inference_steps=4, num_corrections=count, **asked)
        assert x_T.shape == (2, pipeline.unet.config.in_channels, *[pipeline.unet.config.sample_size] * 2)
        off = {"guided": {"guidance_scale": 1.0}, "text": {"guidance_scale": 1.0}}
        off["classifier guided"] = {"classifier_scale": 0.0}
        options = {"latents": x_T, "num_inference_steps": 4, "output_type": "pt"}
        drawn[count] = pipeline(**request(2), **off.get(kind, {}), **options).images
    assert (drawn[1] - image).square().mean() < 1.5 * (drawn[0] - image).square().mean()


def test_takes_one_condition_for_all_images():
    pipeline = guided(scheduler=DDIMScheduler(timestep_spacing="trailing"))
    image = torch.rand(2, *pipeline.picture_shape, generator=seeded())
    one, each = (pipeline.invert(image, num_inference_steps=3, class_labels=of) for of in ("dog", ["dog", "dog"]))
    assert torch.equal(one, each)


def test_does_not_depend_on_the_batch():
    pipeline = unconditional(scheduler=DDIMScheduler(timestep_spacing="trailing"))
    image = torch.rand(3, *pipeline.picture_shape, generator=seeded())
    options = {"num_inference_steps": 4, "num_corrections": 0}
    together = pipeline.invert(image, **options)
    alone = torch.cat([pipeline.invert(one, **options) for one in image])
    assert (together - alone).abs().max() < 1e-3 * together.std()  # the flow spreads what is rounded


def test_halves_of_steps_are_passed_over():
    """Heun's method takes each noise level twice."""
    pipeline, x_0 = pairs_pipeline(DDIMScheduler, 64), pairs(2)
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.config.process, timestep_spacing="trailing")
    x_T = pipeline.invert(x_0, num_inference_steps=300, num_corrections=0)
    assert abs(x_T.std() - 1) < 0.1


@pytest.mark.parametrize("cls", [AncestralDDPMScheduler, FewStepDDPMScheduler])
def test_a_sampler_that_adds_noise_is_refused(cls):
    pipeline = unconditional(scheduler=cls(timestep_spacing="trailing"))
    with pytest.raises(ValueError, match=f"{cls.__name__} adds noise and cannot be run backwards; use DPMSolver"):
        pipeline.invert(torch.rand(pipeline.picture_shape), num_inference_steps=4)


@pytest.mark.parametrize(
    "cls, options, name",
    [
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, "DPMSolverMultistepScheduler (sde-dp"),
        (SASolverScheduler, {}, "SASolverScheduler"),  # whose first steps add no noise
    ],
)
def test_a_sampler_that_adds_noise_is_refused_by_its_kind(cls, options, name):
    pipeline = unconditional(scheduler=cls(timestep_spacing="trailing", **options))
    with pytest.raises(ValueError, match=rf"scheduler: {re.escape(name)}.* adds noise and cannot be run backwards"):
        pipeline.invert(torch.rand(pipeline.picture_shape), num_inference_steps=20)


def test_a_sampler_that_scales_its_input_gives_no_warning(caplog):
    pipeline = unconditional(scheduler=EulerDiscreteScheduler(timestep_spacing="trailing"))
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    pipeline.invert(torch.rand(pipeline.picture_shape), num_inference_steps=4)
    logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("drawn", [0, 1, 2])
def test_stops_where_a_callback_says_so(drawn):
    """In a later correction the x_T of those before is kept."""
    pipeline, calls = unconditional(scheduler=DDIMScheduler(timestep_spacing="trailing")), []
    image, options = torch.rand(3, 8, 8, generator=seeded()), {"num_inference_steps": 4}

    def stop(pipe, i, t, tensors):
        calls.append(i)
        pipe._interrupt = len(calls) == 4 * drawn + 2

    x_T = pipeline.invert(image, num_corrections=3, callback_on_step_end=stop, **options)
    assert len(calls) == 4 * drawn + 2
    assert torch.equal(x_T, pipeline.invert(image, num_corrections=max(0, drawn - 1), **options))


def test_errors():
    pipeline = unconditional(scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="image: 9x8 pixels"):
        pipeline.invert(torch.rand(3, 9, 8))
    with pytest.raises(ValueError, match="num_corrections: -0.5"):
        pipeline.invert(torch.rand(3, 8, 8), num_corrections=-0.5)
    with pytest.raises(ValueError, match="image: 1 for 2 results; give one condition for all, or one for each"):
        guided(scheduler=DDIMScheduler()).invert(torch.rand(3, 8, 8), num_inference_steps=2, class_labels=[0, 1])


def test_an_upsampler_is_refused():
    pipeline, image = upsampler(), torch.rand(3, 8, 8)
    for edit in (lambda: pipeline.invert(image), lambda: pipeline.vary(image), pipeline.interpolate):
        with pytest.raises(ValueError, match="^SuperResolutionPipeline only enlarges images, and neither inverts nor"):
            edit()
