"""Every sampler draws the mixture, whose denoiser is a formula."""

import pytest
from exact import PLANE, kolmogorov, of_class, plane_pipeline
from small_pipelines import SAMPLERS, guided, seeded, unconditional

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


FAST = ("Ancestral", "DDIM", "DPM-Solver", "Few-step DDPM")
ALL = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS]
LINEAR = {"beta_schedule": "linear", "prediction_type": "epsilon"}  # of which every sampler draws


def drawn(name, steps, make=unconditional, size=(64, 64), **request):
    """The points of one image."""
    cls, options = SAMPLERS[name]
    pipeline = plane_pipeline(make, size=size, **LINEAR)
    pipeline.scheduler = cls.from_config({**pipeline.scheduler.config, **options})
    image = pipeline(num_inference_steps=steps, generator=seeded(), output_type="latent", **request).images
    return pipeline.unet.points(image)


# The distance of as many exact samples is 0.03 once in a thousand times.
@pytest.mark.parametrize("name", ALL)
def test_draws_the_mixture(name):
    assert kolmogorov(drawn(name, 100), PLANE) < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_a_class(name):
    points = drawn(name, 100, guided, class_labels=0, guidance_scale=1.0)
    assert kolmogorov(points, of_class(PLANE, 0)) < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_comes_closer_with_more_steps(name):
    few, more, many = (kolmogorov(drawn(name, steps, size=(96, 96)), PLANE) for steps in (4, 12, 100))
    assert few > more > many
