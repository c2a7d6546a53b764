"""Edits with exact denoisers draw conditional distributions, and an inversion is undone by drawing."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from exact import PLANE, kolmogorov, process_of
from small_pipelines import SAMPLERS, seeded, unconditional

from hf_genmod.data.exact_networks import ExactDenoiser

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
VALUES = {"low": [-1.0], "high": [1.0]}  # measured values that are those of the model


def rows_pipeline(scheduler, width):
    """Images whose columns, of two values, are points of the plane."""
    process = process_of()
    unet = ExactDenoiser(PLANE, process, tile=(1, 2, 1), size=(2, width))
    return unconditional(unet, scheduler.from_config(process.config), value_range=VALUES)


@pytest.mark.parametrize("first", [0.0, *(pytest.param(x, marks=pytest.mark.slow) for x in (-0.8, 0.6))])
def test_a_mask_draws_the_rest_given_the_part_that_is_kept(first):
    width = 2048
    pipeline = rows_pipeline(DPMSolverMultistepScheduler, width)
    image = torch.full((1, 1, 2, width), first)
    mask = torch.tensor([[0.0], [1.0]]).expand(2, width)
    options = {"num_inference_steps": 50, "num_resample": 3, "output_type": "pt", "generator": seeded()}
    drawn = pipeline(image=image, mask_image=mask, **options).images[0, 0, 1].double()
    exact = PLANE.given(torch.tensor([True, False]), torch.tensor([first]))
    z, deviations = drawn.sort().values[:, None], exact.covariances[:, 0, 0].sqrt()
    cdf = torch.special.ndtr((z - exact.means[:, 0]) / deviations) @ exact.weights
    assert (cdf - (torch.arange(width) + 0.5) / width).abs().max() < 0.1  # exact where x_0 given x_t is Gaussian


@pytest.mark.parametrize("strength", [0.5, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.2, 0.8))])
def test_an_image_that_is_noised_and_denoised_has_the_distribution_of_the_images(strength):
    width = 2048
    pipeline = rows_pipeline(SAMPLERS["Ancestral"][0], width)
    x_0 = pipeline.unet.images(PLANE.sample(width, seeded())[0]).float()
    options = {"num_inference_steps": 100, "output_type": "pt", "generator": seeded(1)}
    drawn = pipeline(image=x_0, strength=strength, **options).images
    assert kolmogorov(pipeline.unet.points(drawn), PLANE) < 0.05


@pytest.mark.parametrize("cls", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_an_inversion_is_the_flow_and_drawing_undoes_it(cls):
    width = 256
    pipeline = rows_pipeline(cls, width)
    points = PLANE.sample(width, seeded())[0]
    x_0 = pipeline.unet.images(points).float()
    x_T = pipeline.invert(x_0, num_inference_steps=50)
    drawn = pipeline(latents=x_T, num_inference_steps=50, output_type="pt").images
    assert (drawn - x_0).square().mean().sqrt() < 0.01
    x_T = pipeline.invert(x_0, num_inference_steps=100, num_corrections=0)
    alpha_bar = pipeline.scheduler.alphas_cumprod[-1].double()
    exact, _ = PLANE.flow(points, 1e-3, ((1 - alpha_bar) / alpha_bar).sqrt().item(), steps=100)
    assert (pipeline.unet.points(x_T) - alpha_bar.sqrt() * exact).square().mean().sqrt() < 0.03
