"""Images drawn from given ones by every pipeline: where to start, what to keep, and what is refused."""

import re

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from gaussian_pairs import CORRELATION, DEVIATION, MEAN, pairs, pairs_pipeline
from PIL import Image
from small_pipelines import PIPELINES, SAMPLERS, classifier_guided, guided, of_latents, seeded, unconditional
from tiny import randn, tiny_autoencoder, tiny_unet

from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KINDS = ["unconditional", "latents", "guided", "classifier guided", "text"]
PIXELS = [kind for kind in KINDS if kind != "latents"]


def given(pipeline, n=1, seed=3):
    """Images of 8 bits, in [0, 1]."""
    return torch.randint(0, 256, (n, *pipeline.picture_shape), generator=seeded(seed)).float() / 255


def left_half(pipeline):
    mask = torch.zeros(pipeline.picture_shape[1:])
    mask[:, : mask.shape[1] // 2] = 1
    return mask


def edit(pipeline, request, image, output_type="pt", num_inference_steps=3, seeds=None, **kwargs):
    seeds = seeds or range(len(next(iter(request.values()))) if "batch_size" not in request else request["batch_size"])
    steps = {"num_inference_steps": num_inference_steps, "output_type": output_type}
    return pipeline(**request, image=image, generator=[seeded(seed) for seed in seeds], **steps, **kwargs).images


class TestStrength:
    @pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("Heun", "LMS", "PNDM")])
    def test_starts_from_the_image_with_the_noise_of_that_timestep(self, name):
        """x_0 ~ N(m, s²) goes into the noise and comes back with the same mean and deviation; with little noise it
        stays close to the image, with much it forgets it."""
        cls, config = SAMPLERS[name]
        pipeline = pairs_pipeline(cls, width=512)
        pipeline.scheduler = cls.from_config({**pipeline.scheduler.config, **config})
        x_0 = pairs(4, 512)
        correlations = []
        for strength in (0.1, 0.4, 0.9):
            drawn = edit(pipeline, {"batch_size": 4}, x_0, strength=strength, num_inference_steps=20)
            assert abs(drawn.mean() - MEAN) < 0.06 and 0.8 < drawn.std() / DEVIATION < 1.15
            correlations.append(torch.corrcoef(torch.stack([x_0.flatten(), drawn.flatten()]))[0, 1].item())
        assert correlations[0] > 0.8 > correlations[1] > correlations[2] and correlations[2] < 0.4

    @pytest.mark.parametrize("cls", [AncestralDDPMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
    def test_is_the_share_of_timesteps_that_are_taken(self, cls):
        pipeline = unconditional(scheduler=cls(timestep_spacing="trailing"))
        for strength, expected in ((1.0, 10), (np.float32(0.6), 6), (0.6, 6), (0.25, 2), (0.01, 1)):
            seen = []

            def note(pipe, i, t, tensors, seen=seen, expected=expected):
                seen.append(int(t))
                assert pipe.num_timesteps == expected
                return {}

            image = given(pipeline)
            edit(
                pipeline,
                {"batch_size": 1},
                image,
                num_inference_steps=10,
                strength=strength,
                callback_on_step_end=note,
            )
            assert len(seen) == expected and seen[0] < max(1000 * strength, 100)

    @pytest.mark.parametrize("strength", [0.15, 0.5, 0.95])
    def test_starts_with_a_whole_step(self, strength):
        """Heun's method has two passes in each step but the last."""
        pipeline, seen = unconditional(scheduler=HeunDiscreteScheduler(timestep_spacing="trailing")), []

        def note(pipe, i, t, tensors):
            seen.append(float(t))

        options = {"strength": strength, "num_inference_steps": 20, "callback_on_step_end": note}
        edit(pipeline, {"batch_size": 1}, given(pipeline), **options)
        assert seen[0] > seen[1] and len(seen) == 2 * int(20 * strength) - 1

    def test_starts_at_what_add_noise_makes(self):
        pipeline = unconditional(scheduler=AncestralDDPMScheduler(timestep_spacing="trailing"))
        image, epsilon, seen = given(pipeline), randn(1, *pipeline.picture_shape), []
        hook = pipeline.unet.register_forward_hook(lambda module, inputs, _: seen.append((inputs[0], int(inputs[1]))))
        edit(pipeline, {"batch_size": 1}, image, strength=0.5, num_inference_steps=10, latents=epsilon)
        hook.remove()
        x_t, t = seen[0]
        assert t == 499
        torch.testing.assert_close(x_t, pipeline.scheduler.add_noise(2 * image - 1, epsilon, t))

    def test_of_latents_starts_from_the_mean_of_the_encoder(self):
        pipeline = of_latents()
        image = given(pipeline)
        (z,) = edit(pipeline, {"batch_size": 1}, image, "latent", strength=0.001, num_inference_steps=1000)
        vae = pipeline.vae
        with torch.no_grad():
            mean = vae.encode(2 * image - 1).latent_dist.mean * vae.config.scaling_factor
        assert (z - mean[0]).abs().mean() < 0.1 * mean.std()


class TestAMask:
    @pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_keeps_what_is_black_bitwise(self, kind, output_type):
        make, request = PIPELINES[kind]
        pipeline = make()
        image, mask = given(pipeline, 2), left_half(pipeline)
        drawn = edit(pipeline, request(2), image, output_type, mask_image=mask)
        expected = image.permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            drawn, expected = np.stack([np.asarray(one) for one in drawn]), np.round(255 * expected).astype(np.uint8)
        if output_type == "pt":
            drawn = drawn.permute(0, 2, 3, 1).numpy()
        half = mask.shape[1] // 2
        assert np.array_equal(drawn[:, :, half:], expected[:, :, half:])
        assert (drawn[:, :, :half] != expected[:, :, :half]).mean() > 0.9

    def test_keeps_measured_values_bitwise_of_any_number_of_channels(self):
        ranges = {"low": [200.0, -3.0, 0.0, 0.0, 1.0], "high": [330.0, 8.0, 1e5, 1e-3, 2.0]}
        pipeline = unconditional(tiny_unet(in_channels=5, out_channels=5), value_range=ranges)
        low, high = (torch.tensor(ranges[end])[:, None, None] for end in ("low", "high"))
        field = low + (high - low) * torch.rand(5, *pipeline.picture_shape[1:], generator=seeded())
        drawn = edit(pipeline, {"batch_size": 1}, field, mask_image=left_half(pipeline))[0]
        half = field.shape[2] // 2
        assert torch.equal(drawn[:, :, half:], field[:, :, half:]) and (drawn[:, :, :half] != field[:, :, :half]).all()

    @pytest.mark.parametrize(
        "name, steps, times",
        [("Few-step DDPM", 33, 3), ("DPM-Solver", 50, 2), ("DPM-Solver", 50, 1), ("UniPC", 50, 1), ("DDIM", 100, 1)],
    )
    def test_draws_the_conditional_distribution_of_a_gaussian(self, name, steps, times):
        """Row 1 given row 0 is N(m + ρ (x − m), (1 − ρ²) s²): within 5% by at most 100 passes."""
        pipeline, x_0 = pairs_pipeline(SAMPLERS[name][0], 512), pairs(16, 512)
        mask = torch.tensor([[0.0], [1.0]]).expand(2, 512)
        options = {"mask_image": mask, "num_inference_steps": steps, "num_resample": times}
        drawn = edit(pipeline, {"batch_size": 16}, x_0, **options)
        known, rest = x_0[:, 0, 0].flatten().double(), drawn[:, 0, 1].flatten().double()
        slope = torch.cov(torch.stack([known, rest]))[0, 1] / known.var()
        at_mean = rest.mean() - slope * (known.mean() - MEAN)
        left = rest - slope * known
        assert abs(slope / CORRELATION - 1) < 0.05 and abs(at_mean / MEAN - 1) < 0.05
        assert abs(left.var() / (DEVIATION**2 * (1 - CORRELATION**2)) - 1) < 0.05

    def test_of_each_image_is_its_own(self):
        pipeline = unconditional()
        image, one = given(pipeline, 2), left_half(pipeline)
        masks = torch.stack([one, 1 - one])
        drawn = edit(pipeline, {"batch_size": 2}, image, mask_image=masks)
        kept = masks[:, None].expand(image.shape) == 0
        assert torch.equal(drawn[kept], image[kept])

    def test_is_one_whatever_its_form(self):
        pipeline = unconditional()
        image, mask = given(pipeline), left_half(pipeline)
        levels = (255 * mask).byte().numpy()
        forms = [mask, mask.bool(), mask[None], mask[None, None], levels, levels > 0, levels[..., None], levels[None]]
        forms += [
            Image.fromarray(levels),
            Image.fromarray(levels).convert("RGB"),
            Image.fromarray(levels).convert("1"),
        ]
        forms += [
            [Image.fromarray(levels)],
            levels.astype(np.float32) / 255,
            levels.astype(float),
            (levels > 0).astype(np.int64),
        ]
        drawn = [edit(pipeline, {"batch_size": 1}, image, mask_image=form) for form in forms]
        for other in drawn[1:]:
            assert torch.equal(other, drawn[0])

    def test_resampling_takes_each_step_again(self):
        pipeline, seen = unconditional(scheduler=DPMSolverMultistepScheduler()), []

        def note(pipe, i, t, tensors):
            seen.append(i)
            assert pipe.num_timesteps == 12
            return {}

        mask = left_half(pipeline)
        options = {"mask_image": mask, "num_resample": 3, "callback_on_step_end": note}
        edit(pipeline, {"batch_size": 1}, given(pipeline), num_inference_steps=4, **options)
        assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]

    @pytest.mark.parametrize("kind", KINDS)
    def test_steps_are_taken_again_by_default_where_no_class_or_prompt_says_what_to_draw(self, kind):
        make, request = PIPELINES[kind]
        pipeline = make()
        edit(pipeline, request(2), given(pipeline, 2), mask_image=left_half(pipeline))
        assert pipeline.num_timesteps == (3 if {"class_labels", "prompt"} & request(2).keys() else 15)


class TestAnImage:
    @pytest.mark.parametrize("kind", KINDS)
    def test_gives_the_same_whatever_the_batch(self, kind):
        make, request = PIPELINES[kind]
        pipeline = make()
        image, mask = given(pipeline, 3), left_half(pipeline)
        for how, atol in (({"strength": 0.7}, 1e-4), ({"mask_image": mask}, 1e-3)):  # derivatives are rounded more
            together = edit(pipeline, request(3), image, **how)
            for i in range(3):
                of_one = {
                    name: value[i : i + 1] if isinstance(value, list) else 1 for name, value in request(3).items()
                }
                alone = edit(pipeline, of_one, image[i : i + 1], seeds=[i], **how)
                torch.testing.assert_close(alone[0], together[i], atol=atol, rtol=0)

    def test_is_one_whatever_its_form(self):
        pipeline = unconditional()
        image = given(pipeline)
        array = image.permute(0, 2, 3, 1).numpy()
        picture = Image.fromarray(np.round(255 * array[0]).astype(np.uint8))
        forms = [image, image[0], array, array[0], picture, [picture], [image[0]], [array[0]]]
        drawn = [edit(pipeline, {"batch_size": 1}, form, strength=0.5) for form in forms]
        for other in drawn[1:]:
            torch.testing.assert_close(other, drawn[0], atol=1e-5, rtol=0)

    def test_serves_all_results_or_those_of_its_own_label(self):
        pipeline = guided()
        image = given(pipeline, 2)
        twice = edit(pipeline, {"class_labels": [0, 1]}, image, seeds=range(4), num_images_per_prompt=2, strength=0.3)
        each = edit(pipeline, {"class_labels": [0, 0, 1, 1]}, image.repeat_interleave(2, 0), strength=0.3)
        assert torch.equal(twice, each)
        all_ = edit(pipeline, {"class_labels": [0, 1]}, image[0], strength=0.3)
        assert torch.equal(all_, edit(pipeline, {"class_labels": [0, 1]}, image[[0, 0]], strength=0.3))

    def test_of_an_unlabelled_model_says_how_many(self):
        pipeline = unconditional()
        assert len(pipeline(image=given(pipeline, 3), num_inference_steps=2).images) == 3

    def test_left_out_changes_nothing(self):
        pipeline = unconditional()
        plain = pipeline(generator=seeded(), num_inference_steps=3, output_type="pt").images
        edit(pipeline, {"batch_size": 1}, given(pipeline), mask_image=left_half(pipeline))
        assert torch.equal(pipeline(generator=seeded(), num_inference_steps=3, output_type="pt").images, plain)

    @pytest.mark.parametrize("form", ["noise", "mean"])
    def test_is_guided_by_a_classifier_too(self, form):
        pipeline = classifier_guided()
        image, options = given(pipeline), {"mask_image": left_half(pipeline), "guidance_form": form}
        weak, strong = (
            edit(pipeline, {"class_labels": [1]}, image, classifier_scale=s, **options) for s in (0.0, 4.0)
        )
        assert not torch.equal(weak, strong)

    def test_stops_where_a_callback_says_so(self):
        pipeline, seen = unconditional(), []

        def stop(pipe, i, t, tensors):
            seen.append(i)
            pipe._interrupt = True
            return {}

        edit(pipeline, {"batch_size": 1}, given(pipeline), strength=1.0, callback_on_step_end=stop)
        assert seen == [0]


LARGE = torch.zeros(3, 10, 8)


class TestErrors:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"image": LARGE}, "image: 10x8 pixels (height, width), and this model draws 8x8; resize it, or"),
            ({"image": torch.zeros(1, 8, 8)}, "images: 1 of 1 channels; this model takes one or more of 3"),
            ({"image": torch.full((3, 8, 8), 2.0)}, "images: values from 2 to 2 are not in [0, 1]; divide them by"),
            ({"image": -torch.ones(3, 8, 8)}, "-1 to -1 are not in [0, 1]; (x + 1) / 2 are, of x in [-1, 1]"),
            ({"image": np.zeros((3, 8, 8))}, "1 of 8 channels; this model takes one or more of 3, as (n, height"),
            ({"image": torch.zeros(8, 8, 3)}, "1 of 8 channels; this model takes one or more of 3, as (n, channels"),
            ({"image": []}, "images: there are none, or they differ in size; give one or more of one size"),
            ({"image": "cat.png"}, "images: give images of PIL (Image.open(file)), one array or one tensor"),
            ({"image": torch.zeros(3, 3, 8, 8), "batch_size": 2}, "image: 3 for 2 results; give one, or one for each"),
            ({"mask_image": LARGE[0], "image": None}, "mask_image: it is for a given image; give one, or leave it"),
            ({"strength": 0.5, "image": None}, "strength: it is for a given image; give one, or leave it out"),
            ({"num_resample": 2}, "num_resample: it is for a given mask_image; give one, or leave it out"),
            ({"strength": 0}, "strength: 0 is not within (0, 1]"),
            ({"strength": 1.5}, "strength: 1.5 is not within (0, 1]"),
            ({"strength": float("nan")}, "strength: nan is not within (0, 1]"),
            ({"strength": True}, "strength: True is not within (0, 1]"),
            ({"strength": "0.5"}, "strength: '0.5' is not within (0, 1]"),
            ({"mask_image": LARGE[0]}, "mask_image: 10x8 pixels (height, width), and the image has 8x8; resize it"),
            ({"mask_image": torch.full((8, 8), 0.5)}, "mask_image: it has grey levels, and white is drawn"),
            ({"mask_image": torch.zeros(8, 8)}, "mask_image: it is black all over, and white is drawn anew"),
            ({"mask_image": Image.new("L", (8, 8), 255)}, "mask_image: it is white all over, and white is drawn anew"),
            ({"mask_image": torch.eye(8).repeat(3, 1, 1)}, "mask_image: 3 for 1 result; give one, or one for each"),
            ({"mask_image": torch.zeros(8)}, "mask_image: shape (8,) is not (m, height, width), with one channel"),
            ({"mask_image": torch.rand(3, 8, 8, 2)}, "mask_image: shape (3, 8, 8, 2) is not (m, height, width)"),
            ({"mask_image": []}, "mask_image: 0 for 1 result; give one, or one for each"),
            ({"mask_image": np.zeros((0, 8, 8), np.uint8)}, "mask_image: 0 for 1 result; give one, or one for each"),
            ({"mask_image": Image.new("L", (8, 10))}, "mask_image: 10x8 pixels (height, width), and the image"),
            ({"mask_image": [torch.eye(8), LARGE[0]]}, "mask_image: 10x8 pixels (height, width), and the image has"),
            ({"mask_image": torch.eye(8).log() * 0}, "mask_image: it has grey levels, and white is drawn"),
            ({"mask_image": "mask.png"}, "mask_image: str is no image of PIL (Image.open(file)), array or tensor"),
            ({"mask_image": torch.eye(8), "num_resample": 0}, "num_resample: 0 is not a positive whole number"),
        ],
    )  # fmt: skip
    def test_of_an_argument(self, arguments, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            unconditional()(**({"image": torch.zeros(3, 8, 8), "num_inference_steps": 2} | arguments))

    def test_of_measured_values_that_are_missing(self):
        value_range = {"low": [0.0] * 3, "high": [9.0] * 3}
        field, mask = torch.rand(3, 8, 8), torch.eye(8)
        field[:, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="image: some of its values are not finite; give numbers, even where the"):
            unconditional(value_range=value_range)(image=field, mask_image=mask, num_inference_steps=2)

    def test_of_a_sampler_that_cannot_start_on_the_way_or_step_again(self):
        pipeline = unconditional(scheduler=PNDMScheduler(timestep_spacing="trailing"))
        with pytest.raises(ValueError, match=r"PNDMScheduler in 40 steps, from step 42 on, draws N\("):
            pipeline(image=given(pipeline), strength=0.2, num_inference_steps=40)
        options = {"mask_image": left_half(pipeline), "num_inference_steps": 20}
        with pytest.raises(ValueError, match="num_resample: PNDMScheduler cannot take a step again; use 1"):
            pipeline(image=given(pipeline), num_resample=2, **options)

    @pytest.mark.parametrize("strength", [0.3, 0.5])
    def test_of_too_few_steps_from_the_middle_on(self, strength):
        """It names a number of steps that is enough."""
        pipeline = unconditional(scheduler=FewStepDDPMScheduler())
        how = {"image": given(pipeline), "strength": strength}
        with pytest.raises(
            ValueError, match=r"in 4 steps, from step \d on, draws .*; take \d steps, or use"
        ) as refused:
            pipeline(**how, num_inference_steps=4)
        enough = int(re.search(r"take (\d+) steps", str(refused.value))[1])
        assert len(pipeline(**how, num_inference_steps=enough).images) == 1

    def test_of_inference_mode(self):
        pipeline = unconditional()
        with torch.inference_mode(), pytest.raises(ValueError, match="mask_image: it needs derivatives; use torch.no"):
            pipeline(image=given(pipeline), mask_image=left_half(pipeline), num_inference_steps=2)

    def test_of_an_autoencoder_without_an_encoder_is_none(self):
        """Every autoencoder of ours encodes, too."""
        pipeline = unconditional(tiny_unet(in_channels=2, out_channels=2), vae=tiny_autoencoder(latent_channels=2))
        assert len(pipeline(image=given(pipeline), num_inference_steps=2, strength=0.5).images) == 1
