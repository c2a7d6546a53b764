"""Guidance of both kinds, with exact networks."""

import functools
import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from exact import PLANE, divergence_of_drawn, draw, kolmogorov, of_class, plane_pipeline, process_of
from small_pipelines import classifier_guided, guided

from hf_genmod.data.exact_networks import ExactClassifier, ExactDenoiser
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
EVERYWHERE = (0.0, float("inf"))


@pytest.mark.parametrize("cls", [AncestralDDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
def test_by_the_exact_classifier_it_is_classifier_free_guidance(cls, gamma):
    """ε_∅ − s √(1−ᾱ) ∇ log p(y | x_t) is ε_∅ + γ (ε_y − ε_∅) at s = γ, and ε_y + ... at s = γ − 1."""
    y = [i % 3 for i in range(60)]
    free = draw(plane_pipeline(guided, cls), 60, class_labels=y, guidance_scale=gamma)
    request = {"class_labels": y, "guidance_interval": EVERYWHERE}
    by_classifier = draw(plane_pipeline(classifier_guided, cls), 60, classifier_scale=gamma, **request)
    torch.testing.assert_close(by_classifier, free, rtol=0, atol=2e-3)
    process = process_of()
    unet = ExactDenoiser(PLANE, process, conditional=True)
    of_both = classifier_guided(unet, cls.from_config(process.config), ExactClassifier(unet, process), id2label=None)
    with_labels = draw(of_both, 60, classifier_scale=gamma - 1, **request)
    torch.testing.assert_close(with_labels, free, rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["noise", "mean"])
@pytest.mark.parametrize("y", [0, 1])
def test_by_the_exact_classifier_at_one_it_draws_the_class(form, y):
    pipeline = plane_pipeline(classifier_guided)
    points = draw(pipeline, 1500, 200, class_labels=[y] * 1500, classifier_scale=1.0, guidance_form=form)
    assert kolmogorov(points, of_class(PLANE, y)) < 0.05  # of as many exact samples once in a thousand times


DETERMINISTIC = (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler)


@pytest.mark.parametrize("cls, gamma", [
    pytest.param(*case, marks=[] if case == (DPMSolverMultistepScheduler, 2.0) else pytest.mark.slow)
    for case in itertools.product(DETERMINISTIC, (0.0, 1.0, 2.0, 4.0))
])  # fmt: skip
def test_guided_samples_have_the_density_of_the_guided_flow(cls, gamma):
    pipeline, y = plane_pipeline(guided, cls), 1

    def sample(x_T):
        request = {"class_labels": [y] * len(x_T), "guidance_scale": gamma}
        return draw(pipeline, len(x_T), 250, latents=x_T[:, :, None, None], **request)

    log_density = functools.partial(PLANE.guided_log_density, y=y, guidance_scale=gamma)
    divergence, error = divergence_of_drawn(sample, log_density)
    assert abs(divergence) < 0.02 + 2 * error
