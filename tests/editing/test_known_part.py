"""The mean of images of which a part is known, and seams."""

import torch
from gaussian_pairs import COVARIANCE, MEAN, PROCESS, pairs, pairs_denoiser
from small_pipelines import seeded
from tiny import randn

from hf_genmod.editing.known_part import denoiser_given, seamless
from hf_genmod.pipelines.predictions import x_0_of
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler


def test_the_mean_of_a_gaussian_given_a_part_is_exact():
    """By the formula for joint Gaussians, with x_t of both rows and row 0 observed."""
    denoiser, x_0 = pairs_denoiser(64), pairs(3)
    scheduler = AncestralDDPMScheduler.from_config(PROCESS)
    known = torch.tensor([True, False])[None, None, :, None].expand(1, 1, 2, 64)
    for t in (100, 400, 700):
        alpha_bar = scheduler.alphas_cumprod[t].item()
        sigma = ((1 - alpha_bar) / alpha_bar) ** 0.5
        x_t = scheduler.add_noise(x_0, randn(*x_0.shape), t)
        predict = denoiser_given(x_0, known, lambda x, t, _: denoiser(x, t).sample, "v_prediction")
        found = x_0_of("v_prediction", predict(x_t, t, sigma), x_t, sigma)
        noisy = COVARIANCE.clone()
        noisy[1, 1] += sigma**2  # of what is known: x_0 of row 0 without noise, and x_0 + σ ε of row 1
        seen = torch.stack([x_0[:, 0, 0], x_t[:, 0, 1] / alpha_bar**0.5], dim=1).double() - MEAN
        expected = MEAN + torch.einsum("i,nij->nj", COVARIANCE[1] @ torch.linalg.inv(noisy), seen)
        torch.testing.assert_close(found[:, 0, 1].double(), expected, atol=2e-3, rtol=0)
        torch.testing.assert_close(found[:, 0, 0], x_0[:, 0, 0], atol=1e-5, rtol=0)


def test_a_seam_is_continuous_and_leaves_what_is_far_away():
    """A decoder that is wrong by a constant, and by a ramp, leaves no step at the seam."""
    image = torch.rand(2, 3, 24, 24, generator=seeded())
    redrawn = torch.zeros(2, 1, 24, 24, dtype=torch.bool)
    redrawn[:, :, 4:20, 12:] = True
    ramp = 0.1 + 0.01 * torch.arange(24.0)[:, None]
    joined = seamless(image - ramp, image, redrawn, reach=4)
    change = joined - (image - ramp)
    assert torch.equal(joined[~redrawn.expand_as(joined)], image[~redrawn.expand_as(image)])
    torch.testing.assert_close(change[..., 5:19, 12], ramp[5:19, 0].expand(2, 3, -1), atol=1e-6, rtol=0)
    assert (change[..., 10:14, 20:] == 0).all()  # the seam is further away than it reaches


def test_without_an_error_of_the_decoder_nothing_changes():
    image, other = torch.rand(2, 1, 3, 8, 8, generator=seeded())
    redrawn = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    redrawn[..., 4:] = True
    drawn = torch.where(redrawn, other, image)
    assert torch.equal(seamless(drawn, image, redrawn), drawn)


def test_the_error_of_a_decoder_at_the_seam_goes_on_across_it():
    """So the step across the seam is that of the decoder's own image, in every pixel of a straight seam."""
    image, drawn = torch.rand(2, 2, 3, 12, 12, generator=seeded())
    redrawn = torch.zeros(2, 1, 12, 12, dtype=torch.bool)
    redrawn[..., 6:] = True
    joined = seamless(drawn, image, redrawn)
    step = joined[..., 6] - joined[..., 5]
    torch.testing.assert_close(step, drawn[..., 6] - drawn[..., 5], atol=1e-6, rtol=0)
