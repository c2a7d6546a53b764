"""Guidance by an early version of the model, D_w + w (D − D_w)."""

import copy

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from small_pipelines import PIPELINES, guided, quiet, seeded, unconditional
from tiny import randomized, tiny_unet

from hf_genmod import AncestralDDPMScheduler, UnconditionalPipeline, load_pipeline

W = 1.7


def with_guiding(pipe):
    pipe.register_modules(guiding_unet=randomized(copy.deepcopy(pipe.unet), seed=5))
    return pipe


def draw(pipe, request, **options):
    options = {"output_type": "latent", "num_inference_steps": 3, "generator": seeded(), **options}
    return pipe(**request, **options).images


class Extrapolated(torch.nn.Module):
    """A network that predicts D_w + w (D − D_w) itself, and the variance that D does."""

    def __init__(self, unet, guiding):
        super().__init__()
        self.unet, self.guiding, self.config = unet, guiding, unet.config
        self.size_factor, self.dtype, self.device = unet.size_factor, unet.dtype, unet.device

    def forward(self, x_t, t, **condition):
        D, D_w = (model(x_t, t, **condition) for model in (self.unet, self.guiding))
        guided = (1 - W) * D_w.sample + W * D.sample
        guided[:, x_t.shape[1] :] = D.sample[:, x_t.shape[1] :]
        return type(D)(sample=guided)


def with_learned_variance():
    return unconditional(tiny_unet(out_channels=6), AncestralDDPMScheduler(variance_type="learned_range"))


@pytest.mark.parametrize("kind", [*(name for name in PIPELINES if name != "autoencoder"), "learned variance"])
def test_it_draws_as_a_network_with_that_prediction(kind):
    make, request = PIPELINES.get(kind) or (with_learned_variance, lambda n: {"batch_size": n})
    pipe, request = with_guiding(make()), request(2)
    drawn, plain = draw(pipe, request, autoguidance_scale=W), draw(pipe, request)
    assert (drawn - plain).abs().max() > 0.01
    pipe.unet = Extrapolated(pipe.unet, pipe.guiding_unet)
    torch.testing.assert_close(drawn, draw(pipe, request), rtol=1e-4, atol=1e-4)


def test_at_0_the_guiding_network_draws_alone():
    pipe, request = with_guiding(unconditional()), {"batch_size": 2}
    of_it = unconditional(pipe.guiding_unet)
    torch.testing.assert_close(draw(pipe, request, autoguidance_scale=0), draw(of_it, request), rtol=1e-4, atol=1e-4)


def test_it_is_saved_and_loaded_and_without_it_the_model_draws_as_before(tmp_path):
    pipe, request = with_guiding(guided()), {"class_labels": [0, 2]}
    pipe.save_pretrained(tmp_path)
    loaded = quiet(load_pipeline(tmp_path))
    for w in (1.0, W):
        assert torch.equal(*(draw(which, request, autoguidance_scale=w) for which in (pipe, loaded)))
    assert torch.equal(draw(pipe, request), draw(guided(), request))


def test_a_default_of_the_model_is_taken():
    pipe, request = with_guiding(unconditional()), {"batch_size": 2}
    drawn = draw(pipe, request, autoguidance_scale=W)
    pipe.register_to_config(defaults={"arguments": {"autoguidance_scale": W}})
    assert torch.equal(draw(pipe, request), drawn)


def test_editing_takes_it():
    solver = DPMSolverMultistepScheduler.from_config(guided().config.process)
    pipe, image = with_guiding(guided(scheduler=solver)), torch.rand(1, 3, 8, 8, generator=seeded(1))
    request = {"class_labels": [1], "num_inference_steps": 3}
    plain, drawn = (
        [
            pipe(image=image, strength=0.5, generator=seeded(), output_type="pt", **request, **option).images,
            pipe.vary(image, num=2, generator=[seeded(), seeded(3)], output_type="pt", **request, **option).images,
            pipe.interpolate(0, 1, num=2, output_type="pt", **request, **option).images,
        ]
        for option in ({}, {"autoguidance_scale": W})
    )
    assert all((x - y).abs().max() > 1e-3 for x, y in zip(plain, drawn, strict=True))


@pytest.mark.parametrize("w", ["a", None, True, float("nan"), float("inf")])
def test_what_is_no_number_is_refused(w):
    with pytest.raises(ValueError, match="^autoguidance_scale: .* is not a finite number$"):
        draw(with_guiding(unconditional()), {}, autoguidance_scale=w)


def test_a_model_without_one_or_with_more_classes_is_told():
    pipe, request = with_guiding(guided()), {"class_labels": [0, 2]}
    with pytest.raises(ValueError, match="^autoguidance_scale: this model has no guiding_unet; train it with"):
        draw(guided(), request, autoguidance_scale=W)
    pipe.add_class("new")
    draw(pipe, request)
    with pytest.raises(ValueError, match="^autoguidance_scale: the model has classes that its guiding_unet lacks"):
        draw(pipe, request, autoguidance_scale=W)


@pytest.mark.parametrize(
    "other, fault",
    [
        ({"in_channels": 1, "out_channels": 1}, "its in_channels is 1 and that of the U-Net 3"),
        ({"conditioning_channels": 3}, "its conditioning_channels is 3 and that of the U-Net 0"),
        ({"cross_attention_dim": 8}, "its cross_attention_dim is 8 and that of the U-Net None"),
        ({"num_classes": 3}, "it has 3 classes and the U-Net None"),
    ],
)
def test_a_guiding_network_of_another_model_is_refused(other, fault):
    with pytest.raises(ValueError, match=f"^guiding_unet: {fault}"):
        UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler(), guiding_unet=tiny_unet(**other))


def test_what_is_no_network_is_refused():
    with pytest.raises(ValueError, match="^guiding_unet: a str has no config"):
        UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler(), guiding_unet="early")
