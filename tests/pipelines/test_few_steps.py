"""A consistency model draws from the distribution in any number of steps."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from small_pipelines import seeded
from tiny import tiny_classifier, tiny_unet

from hf_genmod import AncestralDDPMScheduler, ClassifierGuidedPipeline, UnconditionalPipeline, load_pipeline
from hf_genmod.evaluation.likelihood_bounds import bits_per_dimension
from hf_genmod.models.denoising_unet import DenoisingUNet2DOutput
from hf_genmod.pipelines.samplers import process_of
from hf_genmod.sharing.facts import Facts

MEAN, DEVIATION = 0.3, 0.5
SCHEDULER = AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
SAMPLER = LCMScheduler.from_config(process_of(SCHEDULER.config), original_inference_steps=850)


class Consistent(ModelMixin, ConfigMixin):
    """v of x_0 ~ N(m, s²) by which x̂_0 is the end of the trajectory of x_t."""

    @register_to_config
    def __init__(self, sample_size=64, in_channels=1, out_channels=1, num_classes=None):
        super().__init__()
        self.dummy = torch.nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep):
        a = SCHEDULER.alphas_cumprod[int(timestep)].sqrt()
        variance = a**2 * DEVIATION**2 + 1 - a**2
        x_0 = MEAN + DEVIATION / variance.sqrt() * (sample - a * MEAN)
        return DenoisingUNet2DOutput(sample=(a * sample - x_0) / (1 - a**2).sqrt())


PROCESS = process_of(SCHEDULER.config)


def tuned(consistent=True):
    return UnconditionalPipeline(Consistent(), SAMPLER, process=PROCESS, consistent=consistent)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16, 50])
def test_a_tuned_model_draws_in_any_number_of_steps(n):
    pipe = tuned()
    pipe.set_progress_bar_config(disable=True)
    x = pipe(4, num_inference_steps=n, generator=seeded(1), output_type="latent").images
    # At the first timestep noise takes the place of x_t, whose mean is √ᾱ_t m.
    assert x.mean().item() == pytest.approx(MEAN, abs=0.15 if n == 1 else 0.05)
    assert x.std().item() == pytest.approx(DEVIATION, rel=0.1)


def test_what_is_not_said_to_be_tuned_is_tried_as_a_denoiser():
    with pytest.raises(ValueError, match="LCMScheduler in 16 steps draws N"):
        tuned(consistent=False)(num_inference_steps=16)


def test_other_samplers_are_for_the_process_of_a_tuned_model_too(tmp_path):
    pipe = tuned()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.config.process, timestep_spacing="trailing")
    assert pipe(2, num_inference_steps=1, generator=seeded(0), output_type="latent").images.shape == (2, 1, 64, 64)
    assert pipe.is_consistent


@pytest.fixture
def diffusers_warns(caplog):
    """The warnings of diffusers so far, in a list."""
    from diffusers.utils import logging

    logging.enable_propagation()
    logging.set_verbosity_warning()
    yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("diffusers")]
    logging.disable_propagation()


@pytest.fixture(params=["a key of its own", "in the process, as earlier versions wrote it"])
def checkpoint(request, tmp_path):
    """The folder of a small tuned model."""
    pipe = UnconditionalPipeline(tiny_unet(), SAMPLER, process=PROCESS, consistent=True)
    pipe.save_pretrained(tmp_path / "tuned")
    if "process" in request.param:
        index = json.loads((tmp_path / "tuned" / "model_index.json").read_text())
        index["process"]["consistent"] = index.pop("consistent")
        (tmp_path / "tuned" / "model_index.json").write_text(json.dumps(index))
    return tmp_path / "tuned"


def test_a_tuned_checkpoint_says_so_under_a_key_of_its_own(checkpoint, diffusers_warns, tmp_path):
    assert Facts.read(checkpoint).is_consistent
    pipe = load_pipeline(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.is_consistent and pipe.config.process == PROCESS
    with pytest.raises(ValueError, match="use the scheduler of the checkpoint, in 1, 2 or 4 steps$"):
        pipe(num_inference_steps=900)
    image = pipe(num_inference_steps=4, generator=seeded(0), output_type="pt").images
    for config in (pipe.config.process, pipe.scheduler.config):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, timestep_spacing="trailing")
        pipe(num_inference_steps=1, generator=seeded(0), output_type="pt")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=850)
    again = pipe(num_inference_steps=4, generator=seeded(0), output_type="pt").images
    torch.testing.assert_close(again, image, rtol=0, atol=1e-5)
    pipe.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["consistent"] is True and "consistent" not in index["process"]
    assert UnconditionalPipeline.from_pipe(load_pipeline(tmp_path / "again")).is_consistent
    assert diffusers_warns() == []


def test_diffusers_says_nothing_of_a_tuned_checkpoint_that_it_loads(checkpoint):
    code = f"""
import sys
sys.modules["hf_genmod"] = None
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
pipe = DiffusionPipeline.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(0))
assert pipe.is_consistent
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.config.process, timestep_spacing="trailing")
pipe(num_inference_steps=1)
"""
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "DIFFUSERS_VERBOSITY": "warning"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "Loading" not in line and line.strip()]
    assert said == []


@pytest.mark.parametrize("consistent", ["yes", 1, None])
def test_only_true_and_false_say_whether_a_model_is_tuned(consistent):
    with pytest.raises(ValueError, match="^consistent: .* is neither True nor False; give one of them$"):
        tuned(consistent)


def test_a_classifier_guides_no_tuned_model():
    with pytest.raises(ValueError, match="^unet: it is tuned to few steps.*; use the model that it was tuned from$"):
        ClassifierGuidedPipeline(tiny_unet(), tiny_classifier(), SCHEDULER, consistent=True)


def test_what_does_not_draw_from_a_tuned_model_is_sent_to_its_own_sampler():
    pipe, remedy = tuned(), "; use the scheduler of the checkpoint, in 1, 2 or 4 steps$"
    with pytest.raises(ValueError, match="^scheduler: LCMScheduler in 900 steps fails" + remedy):
        pipe(num_inference_steps=900)
    pipe.scheduler = DDPMScheduler.from_config(pipe.config.process, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="^scheduler: DDPMScheduler in 20 steps draws N.*" + remedy):
        pipe(num_inference_steps=20)
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="^scheduler: its beta_schedule is 'linear'.*" + remedy):
        pipe(num_inference_steps=4)


def test_a_tuned_model_varies_images_and_goes_from_seed_to_seed():
    pipe, image = tuned(), torch.rand(1, 1, 64, 64)
    pipe.set_progress_bar_config(disable=True)
    (varied,) = pipe(image=image, strength=0.5, num_inference_steps=4, generator=seeded(2), output_type="pt").images
    assert varied.shape == image.shape[1:] and not torch.equal(varied, image[0])
    ends = pipe.interpolate(3, 4, num=2, num_inference_steps=1, output_type="pt").images
    x_T = torch.randn(1, 1, 64, 64, generator=seeded(3))
    drawn = pipe(latents=x_T, num_inference_steps=1, output_type="pt").images
    torch.testing.assert_close(ends[:1], drawn, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="^num_inference_steps: a model tuned .* noise after its first step; give 1$"):
        pipe.interpolate(3, 4, num=2, num_inference_steps=4)


@pytest.mark.parametrize("strength, steps, timesteps", [(0.3, 4, [212]), (0.5, 4, [424, 212]), (0.7, 2, [637])])
def test_an_edited_image_is_as_near_as_the_noise_levels_allow(strength, steps, timesteps):
    x_0 = MEAN + 0.3 * torch.randn(1, 1, 64, 64, generator=seeded(0))
    pipe = tuned()
    pipe.set_progress_bar_config(disable=True)
    request = {"image": (x_0 + 1).clamp(0, 2) / 2, "num_inference_steps": steps, "generator": seeded(1)}
    edited = pipe(**request, strength=strength, output_type="latent").images
    kept, variance = 1.0, 0.3**2  # f is m + s / √(ᾱ s² + 1 − ᾱ) (x_t − √ᾱ m)
    for alpha_bar in SCHEDULER.alphas_cumprod[timesteps].tolist():
        slope = DEVIATION / (alpha_bar * DEVIATION**2 + 1 - alpha_bar) ** 0.5
        kept *= slope * alpha_bar**0.5
        variance = slope**2 * (alpha_bar * variance + 1 - alpha_bar)
    correlation = torch.corrcoef(torch.stack([x_0.flatten(), edited.flatten()]))[0, 1]
    assert correlation.item() == pytest.approx(kept * 0.3 / variance**0.5, abs=0.03)


@pytest.mark.parametrize("strength, steps, enough", [(0.7, 1, 2), (0.5, 1, 4), (0.5, 2, 4)])
def test_an_edit_does_not_start_in_more_noise_than_it_may(strength, steps, enough):
    pipe, image = tuned(), torch.rand(1, 1, 64, 64)
    with pytest.raises(ValueError, match=f"^strength: {strength} is less than .*; take {enough} steps$"):
        pipe(image=image, strength=strength, num_inference_steps=steps)


def test_a_tuned_model_has_no_bounds_of_its_likelihood():
    assert bits_per_dimension(tuned(), torch.zeros(2, 1, 64, 64)) == {}


def test_what_needs_a_denoiser_is_refused():
    pipe, image = tuned(), torch.rand(1, 1, 64, 64)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    remedy = "use the model that it was tuned from"
    with pytest.raises(ValueError, match=f"^mask_image: a model tuned to few steps predicts one image, .*; {remedy}$"):
        pipe(image=image, mask_image=mask, num_inference_steps=4)
    with pytest.raises(ValueError, match=f"^image: a model tuned to few steps follows no trajectory .*; {remedy}$"):
        pipe.invert(image, num_inference_steps=4)
