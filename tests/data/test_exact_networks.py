"""The exact denoiser and classifier of a mixture, as networks."""

import pytest
import torch
from tiny import randn

from hf_genmod.data.exact_networks import ExactClassifier, ExactDenoiser
from hf_genmod.data.mixtures import GaussianMixture, in_the_plane, of_pictures
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler

PLANE, PICTURES = in_the_plane(), of_pictures()
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


def scheduler(prediction_type="epsilon", **config):
    return AncestralDDPMScheduler(prediction_type=prediction_type, clip_sample=False, **config)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_each_prediction_is_that_of_the_posterior_mean(prediction_type):
    process, t, x_t = scheduler(prediction_type), torch.tensor([0, 300, 999]), randn(3, 64)
    unet = ExactDenoiser(PICTURES, process, conditional=True, tile=(1, 8, 8))
    y, images = torch.tensor([0, 1, 2]), unet.images(x_t)
    prediction = unet(images, t, class_labels=y).sample
    assert prediction.dtype == images.dtype and prediction.shape == (3, 1, 8, 8)
    x_0 = process.predict_original_sample(prediction, t, images)
    expected = PICTURES.posterior_mean(x_t, process.alphas_cumprod[t], y)
    torch.testing.assert_close(unet.points(x_0), expected, rtol=0, atol=1e-4)


def test_a_timestep_for_all_is_that_of_each_and_two_enclose_one_between():
    unet, x_t = ExactDenoiser(PLANE, scheduler()), randn(4, 2, 1, 1)
    together = unet(x_t, 500).sample
    torch.testing.assert_close(unet(x_t, torch.full((4,), 500)).sample, together)
    torch.testing.assert_close(unet(x_t, torch.tensor(500.0)).sample, together)
    sigma = [(1 / unet.alpha_bar(t, x_t) - 1).sqrt() for t in (500, 500.5, 501)]
    torch.testing.assert_close(sigma[1], (sigma[0] * sigma[2]).sqrt())


@pytest.mark.parametrize("tile, size", [((2, 1, 1), (3, 5)), ((1, 2, 1), (4, 5)), ((1, 1, 2), (3, 4))])
def test_tiles_are_independent_points(tile, size):
    unet = ExactDenoiser(PLANE, scheduler("v_prediction"), tile=tile, size=size)
    images, t = randn(2, tile[0], *size), torch.tensor([100, 700])
    points = unet.points(images)
    assert torch.equal(unet.images(points), images)
    if tile == (1, 2, 1):
        assert torch.equal(points[1], images[0, 0, :2, 1])
    single = ExactDenoiser(PLANE, scheduler("v_prediction"))
    m = len(points) // 2
    alone = single(points[:, :, None, None], t.repeat_interleave(m)).sample[:, :, 0, 0]
    torch.testing.assert_close(unet.points(unet(images, t).sample), alone)


def test_zero_terminal_snr_is_finite():
    process = scheduler("v_prediction", rescale_betas_zero_snr=True)
    assert ExactDenoiser(PLANE, process)(randn(3, 2, 1, 1), 999).sample.isfinite().all()


def test_the_classifier_gives_the_logarithms_of_the_probabilities():
    process, t, x_t = scheduler(), torch.tensor([10, 400, 900]), randn(3, 2)
    classifier = ExactClassifier(ExactDenoiser(PLANE, process), process)
    expected = PLANE.log_class_probabilities(x_t, process.alphas_cumprod[t])
    torch.testing.assert_close(classifier(x_t[:, :, None, None], t).logits, expected, rtol=1e-5, atol=1e-5)


def test_many_numbers_of_one_dimension_are_a_picture():
    numbers = GaussianMixture([0.5, 0.5], [[-0.6], [0.4]], 0.2**2)
    unet = ExactDenoiser(numbers, scheduler("sample"), tile=(1, 1, 1), size=(4, 4))
    x_t = randn(1, 1, 4, 4)
    expected = numbers.posterior_mean(x_t.reshape(-1, 1), unet.alpha_bar(200, x_t)).reshape(1, 1, 4, 4)
    torch.testing.assert_close(unet(x_t, 200).sample, expected)
