"""Images between two others, and variations of one."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from gaussian_pairs import pairs, pairs_pipeline
from PIL import Image
from small_pipelines import guided, of_latents, of_text, seeded, unconditional
from tiny import CAPTIONS, randn

from hf_genmod.editing.interpolation import slerp

DRAWN = {"num_inference_steps": 3, "output_type": "pt"}


def deterministic(pipeline):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.config.process, timestep_spacing="trailing")
    return pipeline


class TestSlerp:
    def test_goes_along_the_arc(self):
        a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        found = slerp(a, b, torch.linspace(0, 1, 3))
        half = math.sqrt(0.5)
        torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [half, 2 * half], [0.0, 2.0]]), atol=1e-6, rtol=0)

    def test_keeps_the_norm_of_noise(self):
        a, b = randn(1, 4, 16, 16, seed=0), randn(1, 4, 16, 16, seed=1)
        norms = slerp(a, b, torch.linspace(0, 1, 9)).flatten(1).norm(dim=1)
        assert (norms / norms[0] - 1).abs().max() < 0.05

    def test_of_equal_ends_is_constant(self):
        a = randn(1, 3, 4, 4)
        torch.testing.assert_close(slerp(a, a, torch.linspace(0, 1, 3)), a.expand(3, -1, -1, -1), atol=1e-5, rtol=1e-4)


class TestInterpolate:
    @pytest.mark.parametrize("make", [unconditional, of_latents])
    def test_ends_at_the_samples_of_two_seeds(self, make):
        pipeline = deterministic(make())
        images = pipeline.interpolate(3, 5, num=4, **DRAWN).images
        ends = pipeline(batch_size=2, generator=[seeded(3), seeded(5)], **DRAWN).images
        torch.testing.assert_close(images[[0, -1]], ends, atol=1e-4, rtol=0)
        assert len(images) == 4

    def test_takes_noise_and_seeds(self):
        pipeline = deterministic(unconditional())
        x_T = randn(1, *pipeline.picture_shape, seed=7)
        images = pipeline.interpolate(x_T, 5, num=3, **DRAWN).images
        torch.testing.assert_close(images[:1], pipeline(latents=x_T, **DRAWN).images, atol=1e-4, rtol=0)
        assert torch.equal(pipeline.interpolate(x_T[0], 5, num=3, **DRAWN).images, images)

    def test_ends_at_two_images(self):
        pipeline = pairs_pipeline(DPMSolverMultistepScheduler)
        a, b = (x.permute(1, 2, 0).numpy() for x in pairs(2))
        images = pipeline.interpolate(a, b, num=5, output_type="np").images
        for end, drawn in ((a, images[0]), (b, images[-1])):
            assert ((drawn - end) ** 2).mean() < 1e-3 * 4  # 30 dB of values in [-1, 1]
        assert ((images[2] - a) ** 2).mean() > 0.05

    def test_goes_from_class_to_class(self):
        pipeline = deterministic(guided())
        options = {"guidance_scale": 3.0} | DRAWN
        images = pipeline.interpolate(0, 0, num=3, class_labels=["cat", "dog"], **options).images
        labels = ["cat", {"cat": 0.5, "dog": 0.5}, "dog"]
        direct = pipeline(labels, generator=[seeded() for _ in labels], **options).images
        torch.testing.assert_close(images, direct, atol=1e-4, rtol=0)
        constant = pipeline.interpolate(0, 0, num=2, class_labels="dog", **options).images
        torch.testing.assert_close(constant[:1], direct[2:], atol=1e-4, rtol=0)

    def test_of_two_images_is_guided_in_between(self):
        pipeline = deterministic(guided())
        a, b = (torch.rand(8, 8, 3, generator=seeded(seed)).numpy() for seed in (0, 1))
        images = pipeline.interpolate(a, b, num=3, class_labels=["cat", "dog"], **DRAWN).images
        noise = [pipeline.invert(x, 3, class_labels=label) for x, label in ((a, "cat"), (b, "dog"))]
        x_T = slerp(*noise, torch.tensor([0.0, 0.5, 1.0]))
        labels = ["cat", {"cat": 1.0, "dog": 1.0}, "dog"]
        direct = pipeline(labels, latents=x_T, guidance_scale=1.0, **DRAWN).images
        torch.testing.assert_close(images, direct, atol=1e-3, rtol=0)
        images = pipeline.interpolate(a, b, num=3, class_labels=["cat", "dog"], guidance_scale=1.0, **DRAWN).images
        labels[1] = {"cat": 0.5, "dog": 0.5}
        direct = pipeline(labels, latents=x_T, guidance_scale=1.0, **DRAWN).images
        torch.testing.assert_close(images, direct, atol=1e-3, rtol=0)

    def test_goes_from_prompt_to_prompt(self):
        pipeline = deterministic(of_text())
        first, second = CAPTIONS[0], " ".join(CAPTIONS[1:3])
        images = pipeline.interpolate(0, 0, num=3, prompt=[first, second], **DRAWN).images
        ends = pipeline([first, second], generator=[seeded(), seeded()], **DRAWN).images
        assert (images[0] - images[2]).abs().max() > 1e-3
        torch.testing.assert_close(images[[0, 2]], ends, atol=1e-3, rtol=0)
        same = pipeline.interpolate(0, 0, num=2, prompt=first, **DRAWN).images
        torch.testing.assert_close(same[0], ends[0], atol=1e-4, rtol=0)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"num": 1}, "num: 1 is less than the two ends; give 2 or more"),
            ({"num": "2"}, "num: '2' is not a positive"),
            ({"latents": torch.zeros(8, 3, 8, 8)}, "latents: the noise is that between a and b, and num says of how"),
            ({"batch_size": 2}, "batch_size: the noise is that between a and b, and num says of how"),
            ({"num_inference_steps": 0}, "num_inference_steps: 0 is not a positive"),
            ({"a": torch.zeros(2, 3, 8, 8)}, "latents: "),
            ({"a": torch.zeros(3, 8, 8, dtype=torch.int64)}, "latents: "),
            (
                {"a": torch.rand(3, 8, 8)},
                "a, b: a tensor is the noise x_T, and this one is none; give an image by PIL",
            ),
            ({"a": [Image.new("RGB", (8, 8))] * 2}, "image: 2 of them for one end; give one"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            deterministic(unconditional()).interpolate(**({"a": 0, "b": 1, "num_inference_steps": 3} | arguments))

    def test_a_sampler_that_adds_noise_is_refused_for_seeds_too(self):
        with pytest.raises(ValueError, match="AncestralDDPMScheduler adds noise and cannot be run backwards; use DPM"):
            unconditional().interpolate(0, 1, num_inference_steps=4)

    def test_goes_between_weights_of_labels(self):
        pipeline, options = deterministic(guided()), {"guidance_scale": 3.0} | DRAWN
        of_first = {"cat": 1.0, "lizard": -0.5}
        images = pipeline.interpolate(0, 0, num=3, class_labels=[of_first, "dog"], **options).images
        half = {"cat": 0.5, "lizard": -0.25, "dog": 0.5}
        direct = pipeline([of_first, half, "dog"], generator=[seeded() for _ in range(3)], **options).images
        torch.testing.assert_close(images, direct, atol=1e-4, rtol=0)

    def test_one_condition_in_a_list_is_that_of_both_ends(self):
        for pipeline, name, value in ((guided(), "class_labels", "dog"), (of_text(), "prompt", CAPTIONS[0])):
            one, both = (
                deterministic(pipeline).interpolate(0, 1, num=2, **{name: given}, **DRAWN).images
                for given in ([value], value)
            )
            assert torch.equal(one, both)

    def test_errors_of_conditions(self):
        with pytest.raises(ValueError, match="class_labels: 3 of them; give one, or one for each end"):
            deterministic(guided()).interpolate(0, 1, class_labels=[0, 1, 2])


class TestVary:
    @pytest.mark.parametrize("make, request_", [(unconditional, {}), (guided, {"class_labels": "dog"})])
    def test_draws_so_many_from_each_of_several(self, make, request_):
        pipeline, count = make(), 2
        images = torch.rand(2, *pipeline.picture_shape, generator=seeded())
        generators = [seeded(i) for i in range(4)]
        drawn = pipeline.vary(images, 0.4, num=count, generator=generators, **request_, **DRAWN).images
        last = pipeline.vary(images[1], 0.4, num=1, generator=seeded(3), **request_, **DRAWN).images
        assert len(drawn) == 4
        torch.testing.assert_close(drawn[3:], last, atol=1e-4, rtol=0)

    def test_draws_so_many_from_one_image(self):
        pipeline = guided()
        image = torch.rand(pipeline.picture_shape, generator=seeded())
        images = pipeline.vary(image, 0.4, num=3, class_labels="dog", generator=[seeded(i) for i in range(3)], **DRAWN)
        direct = pipeline("dog", image=image, strength=0.4, generator=seeded(1), **DRAWN).images
        torch.testing.assert_close(images.images[1:2], direct, atol=1e-4, rtol=0)
        assert len(images.images) == 3
