"""The sampling loop draws what its equations say, each image from its own seed, with any sampler."""

import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from PIL import Image
from small_pipelines import (
    SAMPLERS,
    STOCHASTIC,
    ExactDenoiser,
    classifier_guided,
    draw,
    guided,
    needs_accelerator,
    quiet,
    seeded,
    unconditional,
)
from tiny import TINY_UNET, tiny_unet, tiny_vae

from hf_genmod.models.denoising_unet import DenoisingUNet2DModel, DenoisingUNet2DOutput
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.sharing.loading import load_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # samplers of diffusers, thousands


class TestSamplers:
    @pytest.mark.parametrize(
        "prediction_type, variance, channels",
        [
            ("epsilon", "fixed", 1),
            ("epsilon", "learned", 3),
            ("epsilon", "learned", 4),
            ("v_prediction", "learned", 4),
        ],
    )
    def test_each_ends_at_the_only_picture_there_is(self, sampler, prediction_type, variance, channels):
        name, from_config = sampler
        point = [0.7, -0.2, 0.4, -0.6][:channels]
        learned = {"variance_type": "learned_range"} if variance == "learned" else {}
        unet = ExactDenoiser([point], prediction_type, out_channels=2 * channels if learned else None)
        training = AncestralDDPMScheduler(clip_sample=False, prediction_type=prediction_type, **learned)
        pictures = draw(unconditional(unet, from_config(training.config)), 2, num_inference_steps=20)
        # These two stop at timestep 0, where the noise that is left has a σ of 0.01.
        tolerance = 0.05 if name in ("PNDM", "DEIS") else 1e-5
        expected = unet.x_0.detach().expand_as(pictures)
        torch.testing.assert_close(pictures, expected, rtol=0, atol=tolerance)

    def test_the_network_first_sees_noise_of_deviation_one(self, sampler):
        _, from_config = sampler
        pipeline, seen = unconditional(ExactDenoiser([[0.5]], sample_size=64)), []
        pipeline.scheduler = from_config(pipeline.scheduler.config)
        pipeline.unet.register_forward_pre_hook(lambda unet, args: seen.append(args[0]))
        draw(pipeline, 1, num_inference_steps=20)
        assert seen[0].std().item() == pytest.approx(1, rel=0.05)

    def test_sampling_leaves_the_config_of_the_scheduler_alone(self, sampler):
        _, from_config = sampler
        config = AncestralDDPMScheduler(variance_type="learned_range").config
        pipeline = unconditional(tiny_unet(out_channels=6), from_config(config))
        before = dict(pipeline.scheduler.config)
        draw(pipeline, 1, num_inference_steps=20)
        assert dict(pipeline.scheduler.config) == before
        assert AncestralDDPMScheduler.from_config(pipeline.scheduler.config).config.variance_type == "learned_range"

    def test_noise_of_a_picture_is_bitwise_its_own(self, sampler):
        name, from_config = sampler
        unet = DenoisingUNet2DModel(**TINY_UNET)  # untrained, it predicts 0: only the noise is left
        pipeline = unconditional(unet, from_config(AncestralDDPMScheduler(clip_sample=False).config))
        together = draw(pipeline, 3, generator=[seeded(0), seeded(1), seeded(2)], num_inference_steps=20)
        for i in range(3):
            assert torch.equal(draw(pipeline, 1, generator=[seeded(i)], num_inference_steps=20), together[i : i + 1])
        assert not torch.equal(together[0], together[1])

    def test_pictures_of_a_seed_agree_and_of_another_seed_do_not(self, sampler):
        _, from_config = sampler
        pipeline = unconditional(scheduler=from_config(AncestralDDPMScheduler().config))
        first, same, other = (draw(pipeline, 2, generator=seeded(i), num_inference_steps=20) for i in (0, 0, 1))
        assert torch.equal(first, same) and not torch.allclose(first, other)
        assert first.isfinite().all()

    def test_noise_within_the_chain_comes_from_the_generator(self, sampler):
        name, from_config = sampler
        pipeline = unconditional(scheduler=from_config(AncestralDDPMScheduler().config))
        x_T = torch.randn(1, 3, 8, 8, generator=seeded())
        arguments = {"latents": x_T, "num_inference_steps": 20}
        first, second = (draw(pipeline, 1, generator=seeded(i), **arguments) for i in range(2))
        assert torch.equal(first, second) == (name not in STOCHASTIC)

    @pytest.mark.parametrize(
        "name, steps", [("Ancestral", 1000), ("DDIM", 1000), ("DPM-Solver", 100), ("SDE-DPM-Solver", 100)]
    )
    def test_normal_data_come_out_with_their_mean_and_deviation(self, name, steps):
        mean, deviation = 0.3, 0.2

        class NormalDenoiser(ExactDenoiser):
            """x̂_0 = E[x_0 | x_t] for x_0 ~ N(mean, deviation²) in each pixel."""

            def forward(self, sample, timestep):
                alpha_bar = self.log_snr[int(timestep)].sigmoid().float()
                gain = alpha_bar.sqrt() * deviation**2 / (alpha_bar * deviation**2 + 1 - alpha_bar)
                return DenoisingUNet2DOutput(sample=mean + gain * (sample - alpha_bar.sqrt() * mean))

        cls, options = SAMPLERS[name]
        training = AncestralDDPMScheduler(
            clip_sample=False, prediction_type="sample", variance_type="fixed_large", timestep_spacing="trailing"
        )
        pipeline = unconditional(NormalDenoiser([[0.0]], sample_size=128), cls.from_config(training.config, **options))
        pictures = draw(pipeline, 2, num_inference_steps=steps)
        assert pictures.mean().item() == pytest.approx(mean, rel=0.02)
        assert pictures.std().item() == pytest.approx(deviation, rel=0.025)


class TestSeeds:
    def test_a_seed_gives_the_first_pictures_however_many_more_are_drawn(self):
        pipeline = unconditional()
        two = draw(pipeline, 2, generator=seeded(7))
        for n in (4, 20):
            many = draw(pipeline, n, generator=seeded(7))
            torch.testing.assert_close(many[:2], two, rtol=1e-4, atol=1e-4)

    def test_pixels_of_a_picture_do_not_depend_on_the_batch(self):
        pipeline = guided()
        generators = lambda: [seeded(i) for i in range(4)]  # noqa: E731
        together = draw(pipeline, [0, 1, 2, 1], generator=generators(), output_type="pt")
        for i, label in enumerate([0, 1, 2, 1]):
            alone = draw(pipeline, label, generator=generators()[i : i + 1], output_type="pt")
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)

    def test_one_generator_goes_on_from_call_to_call(self):
        pipeline, generator = unconditional(), seeded()
        assert not torch.allclose(draw(pipeline, 1, generator=generator), draw(pipeline, 1, generator=generator))

    def test_without_a_generator_the_seed_of_torch_counts(self):
        pipeline = unconditional()

        def picture(seed):
            torch.manual_seed(seed)
            return pipeline(num_inference_steps=2, output_type="latent").images

        assert torch.equal(picture(0), picture(0))
        assert not torch.allclose(picture(0), picture(1))

    @pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
    def test_latents_take_the_place_of_the_noise(self, scheduler):
        pipeline = unconditional(scheduler=scheduler.from_config(AncestralDDPMScheduler().config))
        noise = torch.stack([torch.randn(3, 8, 8, generator=seeded(i)) for i in range(2)])
        expected = draw(pipeline, 2, generator=[seeded(0), seeded(1)])
        assert torch.equal(draw(pipeline, 2, latents=noise), expected)

    def test_images_have_the_size_that_the_network_is_told(self):
        pipeline = unconditional()
        with pytest.raises(ValueError, match=re.escape("latents: (2, 3, 16, 12) is no tensor of floats (2, 3, 8, 8)")):
            draw(pipeline, 2, latents=torch.zeros(2, 3, 16, 12))
        pipeline.unet.register_to_config(sample_size=(16, 12))
        assert draw(pipeline, 2).shape == draw(pipeline, 2, latents=torch.zeros(2, 3, 16, 12)).shape == (2, 3, 16, 12)


class TestOutput:
    @pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
    def test_every_type_holds_the_same_picture(self, channels, mode):
        pipeline = unconditional(tiny_unet(in_channels=channels, out_channels=channels, sample_size=(8, 16)))
        latent, pt, array, pil = (draw(pipeline, 2, output_type=kind) for kind in ("latent", "pt", "np", "pil"))
        assert latent.shape == (2, channels, 8, 16)
        assert torch.equal(pt, (latent / 2 + 0.5).clamp(0, 1))
        assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
        assert all(isinstance(image, Image.Image) and image.mode == mode and image.size == (16, 8) for image in pil)
        pixels = np.stack([np.asarray(image).reshape(8, 16, channels) for image in pil])
        assert np.array_equal(pixels, (array * 255).round())

    @pytest.mark.parametrize("make", [unconditional, guided])
    def test_measured_values_come_in_their_own_units_from_a_checkpoint_too(self, make, tmp_path):
        unet = tiny_unet(in_channels=5, out_channels=5, num_classes=3 if make is guided else None)
        ranges = {"low": [0.0, -1.0, 200.0, 5.0, -1e-3], "high": [1.0, 1.0, 300.0, 5.0, 1e-3]}
        made = make(unet, value_range=ranges)
        made.save_pretrained(tmp_path)
        kinds = ("latent", "pt", "np", "pil")
        for pipeline in (made, quiet(load_pipeline(tmp_path))):
            latent, pt, array, pil = (draw(pipeline, 1, output_type=kind) for kind in kinds)
            low, high = (torch.tensor(ranges[end])[:, None, None] for end in ("low", "high"))
            torch.testing.assert_close(pt, low + (high - low) * (latent + 1) / 2)
            assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy()) and (array[..., 3] == 5).all()
            shown = (latent[0, :3] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
            assert np.array_equal(np.asarray(pil[0]), (shown * 255).round())  # the first three channels

    @pytest.mark.parametrize("kind", ["latent", "pt"])
    def test_a_tuple_holds_what_the_output_holds(self, kind):
        pipeline = unconditional()
        (pictures,) = pipeline(2, 4, generator=seeded(), output_type=kind, return_dict=False)
        assert torch.equal(pictures, draw(pipeline, 2, output_type=kind))

    def test_is_detached(self):
        assert not draw(unconditional()).requires_grad

    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
    def test_in_half_precision_the_picture_is_nearly_the_same(self, dtype, tolerance):
        pipeline = guided()
        expected = draw(pipeline, [0, 2])
        pictures = draw(pipeline.to(dtype), [0, 2])
        assert pipeline.unet.dtype == dtype
        assert pictures.dtype == torch.float32
        assert 0 < (pictures - expected).abs().mean() < tolerance


class TestCallback:
    def test_sees_each_state_on_the_way(self):
        pipeline, seen = unconditional(), []

        def callback(pipe, step, timestep, tensors):
            assert pipe is pipeline
            seen.append((step, int(timestep), tensors["latents"].clone()))
            return {}

        last = draw(pipeline, 2, callback_on_step_end=callback)
        steps, timesteps, states = zip(*seen, strict=True)
        assert steps == (0, 1, 2, 3)
        assert timesteps == (750, 500, 250, 0)
        assert torch.equal(states[-1], last)
        assert not torch.equal(states[0], states[1])

    def test_may_ask_for_no_tensors_and_return_nothing(self):
        pipeline, seen = unconditional(), []
        callback = lambda pipe, step, t, tensors: seen.append(tensors)  # noqa: E731
        pictures = draw(pipeline, 2, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
        assert seen == [{}] * 4
        assert torch.equal(pictures, draw(pipeline, 2))

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    def test_sees_the_prediction_of_x_0(self, kind):
        """x̂_0 = (x_t − √(1−ᾱ_t) ε̂) / √ᾱ_t = √ᾱ_t x_t − √(1−ᾱ_t) v̂."""
        pipeline = unconditional(scheduler=AncestralDDPMScheduler(prediction_type=kind, clip_sample=False))
        x_t, found = torch.randn(2, 3, 8, 8, generator=seeded(1)), []
        names = ["pred_original_sample", "latents"]

        def callback(pipe, step, t, tensors):
            found.append((t, *(tensors[name].clone() for name in names)))

        options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
        draw(pipeline, 2, latents=x_t, num_inference_steps=3, **options)
        for t, x_0, after in found:
            alpha_bar = pipeline.scheduler.alphas_cumprod[int(t)].double()
            a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
            with torch.no_grad():
                output = pipeline.unet(x_t, t).sample.double()
            expected = {"epsilon": (x_t - b * output) / a, "v_prediction": a * x_t - b * output, "sample": output}[
                kind
            ]
            assert (x_0 - expected).norm() < 1e-4 * expected.norm()
            x_t = after

    def test_sees_the_prediction_of_x_0_where_x_t_is_noise_alone(self):
        config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        scheduler = AncestralDDPMScheduler(**config)
        pipeline, x_T, found = unconditional(scheduler=scheduler), torch.randn(1, 3, 8, 8, generator=seeded(1)), []
        options = {"callback_on_step_end_tensor_inputs": ["pred_original_sample"]}
        callback = lambda pipe, step, t, tensors: found.append((t, tensors["pred_original_sample"]))  # noqa: E731
        draw(pipeline, 1, latents=x_T, num_inference_steps=20, callback_on_step_end=callback, **options)
        with torch.no_grad():
            torch.testing.assert_close(found[0][1], -pipeline.unet(x_T, found[0][0]).sample)

    def test_may_replace_the_latents(self):
        other = torch.full((2, 3, 8, 8), 0.25)
        replaced = draw(unconditional(), 2, callback_on_step_end=lambda *_: {"latents": other})
        assert torch.equal(replaced, other)

    def test_may_interrupt_this_call_and_not_the_next(self):
        pipeline, steps = unconditional(), []

        def callback(pipe, step, timestep, tensors):
            steps.append(step)
            pipe._interrupt = step == 1

        draw(pipeline, 1, num_inference_steps=5, callback_on_step_end=callback)
        assert steps == [0, 1]
        passes = []
        pipeline.unet.register_forward_pre_hook(lambda *_: passes.append(1))
        draw(pipeline, 1, num_inference_steps=5)
        assert len(passes) == 5


class TestProgressBar:
    @pytest.mark.parametrize("disable, expected", [(False, True), (True, False)])
    def test_counts_the_steps_unless_it_is_disabled(self, capsys, disable, expected):
        pipeline = unconditional()
        pipeline.set_progress_bar_config(disable=disable)
        draw(pipeline, 1, num_inference_steps=7)
        assert ("7/7" in capsys.readouterr().err) == expected


class TestLatentSpace:
    @pytest.mark.parametrize("shift", [None, 0.3])
    def test_decodes_what_the_loop_leaves(self, shift):
        vae = tiny_vae(latent_channels=4, scaling_factor=0.5, shift_factor=shift)
        unet = tiny_unet(in_channels=4, out_channels=4)
        pipeline = unconditional(unet, vae=vae)
        latents = draw(pipeline, 2)
        assert torch.equal(latents, draw(unconditional(unet), 2))
        with torch.no_grad():
            decoded = vae.decode(latents / 0.5 + (shift or 0.0)).sample
        assert decoded.shape == (2, 3, 16, 16)
        assert torch.equal(draw(pipeline, 2, output_type="pt"), (decoded / 2 + 0.5).clamp(0, 1))

    def test_decodes_in_the_dtype_of_the_autoencoder(self):
        pipeline = unconditional(tiny_unet(in_channels=4, out_channels=4), vae=tiny_vae(latent_channels=4))
        expected = draw(pipeline, 2, output_type="pt")
        pipeline.vae.to(torch.bfloat16)
        pictures = draw(pipeline, 2, output_type="pt")
        assert 0 < (pictures - expected).abs().mean() < 0.02


class TestOffloading:
    """Accelerate's hooks move each model to the device before its turn; here the device is the CPU as well."""

    def test_models_under_hooks_draw_the_same(self):
        pipeline = unconditional(tiny_unet(in_channels=4, out_channels=4), vae=tiny_vae(latent_channels=4))
        expected = draw(pipeline, 2, output_type="pt")
        pipeline.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert torch.equal(draw(pipeline, 2, output_type="pt"), expected)

    @needs_accelerator
    @pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
    @pytest.mark.parametrize("request_", [2, [0, 2]])
    def test_models_come_back_to_the_cpu(self, how, request_):
        pipeline = unconditional(tiny_unet(in_channels=4, out_channels=4), vae=tiny_vae(latent_channels=4))
        if request_ != 2:
            pipeline = classifier_guided()
        expected = draw(pipeline, request_, output_type="pt")
        getattr(pipeline, how)()
        for _ in range(2):
            torch.testing.assert_close(draw(pipeline, request_, output_type="pt").cpu(), expected, rtol=0, atol=1e-2)
            assert pipeline.unet.device.type in ("cpu", "meta")

    @needs_accelerator
    def test_noise_is_the_same_on_an_accelerator(self):
        pipeline = unconditional(DenoisingUNet2DModel(**TINY_UNET))
        expected = draw(pipeline, 2)
        actual = draw(pipeline.to(torch.accelerator.current_accelerator()), 2)
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)


class TestErrors:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"batch_size": 0}, "batch_size: 0 is not a positive whole number"),
            ({"batch_size": 2.0}, "batch_size: 2.0 is not a positive whole number"),
            ({"batch_size": True}, "batch_size: True is not a positive whole number"),
            ({"num_inference_steps": 0}, "num_inference_steps: 0 is not a positive whole number"),
            ({"num_inference_steps": -1}, "num_inference_steps: -1 is not a positive whole number"),
            ({"num_inference_steps": 1.5}, "num_inference_steps: 1.5 is not a positive whole number"),
            ({"num_inference_steps": 1001}, "num_inference_steps: 1001 must be within 1 ... 1000"),
            ({"output_type": "jpg"}, "output_type: 'jpg' is not one of 'pil', 'np', 'pt', 'latent'"),
            (
                {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
                "callback_on_step_end_tensor_inputs: ['latents', 'noise'] is no list of names from "
                "['latents', 'pred_original_sample']",
            ),
            (
                {"batch_size": 2, "generator": [seeded()] * 3},
                "generator: a list of 3 for 2 images; give one for each, or only one",
            ),
            (
                {"batch_size": 2, "latents": torch.zeros(3, 3, 8, 8)},
                "latents: (3, 3, 8, 8) is no tensor of floats (2, 3, 8, 8), the number and size of the images",
            ),
            ({"latents": torch.zeros(1, 4, 8, 8)}, "latents: (1, 4, 8, 8) is no tensor of floats (1, 3, 8, 8)"),
            (
                {"latents": torch.zeros(1, 3, 8, 8).numpy()},
                "latents: numpy.ndarray is no tensor of floats (1, 3, 8, 8)",
            ),
            ({"latents": torch.zeros(3, 8, 8)}, "latents: (3, 8, 8) is no tensor of floats (1, 3, 8, 8)"),
            ({"latents": torch.zeros(1, 3, 8, 7)}, "latents: (1, 3, 8, 7) is no tensor of floats (1, 3, 8, 8)"),
            ({"latents": torch.zeros(1, 3, 8, 8).int()}, "latents: torch.IntTensor is no tensor of floats"),
            ({"callback_on_step_end": 5}, "callback_on_step_end: 5 is no function; give one, or None"),
            ({"callback_on_step_end": lambda *_: []}, "callback_on_step_end: it returned [], neither a dict nor None"),
            (
                {"callback_on_step_end": lambda *_: {"latents": [0]}},
                "latents: list is no tensor of floats (1, 3, 8, 8)",
            ),
            (
                {"callback_on_step_end_tensor_inputs": None},
                "callback_on_step_end_tensor_inputs: None is no list of names",
            ),
        ],
    )
    def test_of_a_request(self, arguments, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            unconditional()(**arguments)

    @pytest.mark.parametrize(
        "process, message",
        [
            ("cosine", "process: 'cosine' is no dict; give process_of(scheduler.config) of"),
            ({}, "process: {} has no prediction_type; give"),
            (
                {"prediction_type": "epsilon"},
                "process: {'prediction_type': 'epsilon'} has no num_train_timesteps; give",
            ),
            ({"beta_schedule": "cosine"}, "makes no scheduler (cosine is not implemented for"),
            ({"beta_end": None}, "makes no scheduler (linspace()"),
        ],
    )
    def test_of_the_process_of_the_training(self, process, message):
        of_training = unconditional().config.process
        if "makes no" in message:
            process = of_training | process
        with pytest.raises(ValueError, match=re.escape(message)):
            unconditional(process=process)
        unconditional(process=dict(of_training))

    @pytest.mark.parametrize("scheduler", [AncestralDDPMScheduler, DDPMScheduler])
    def test_of_a_variance_that_the_network_has_not_learned(self, scheduler):
        pipeline = unconditional(scheduler=scheduler(variance_type="learned_range"))
        message = "scheduler: its variance_type is learned, but not by this unet; use 'fixed_small'"
        with pytest.raises(ValueError, match=message):
            pipeline(num_inference_steps=2)

    @pytest.mark.parametrize("interval", [(2.0, 1.0), (-1.0, 1.0), (1.0,), (1.0, 2.0, 3.0), 1.0])
    def test_of_a_guidance_interval(self, interval):
        message = f"guidance_interval: {interval} is not (low, high) with 0 <= low <= high"
        with pytest.raises(ValueError, match=re.escape(message)):
            guided()(0, guidance_interval=interval)

    def test_of_a_model_for_the_other_pipeline(self):
        with pytest.raises(ValueError, match="unet: it has 3 classes; use ClassifierFreeGuidedPipeline"):
            unconditional(tiny_unet(num_classes=3))
        with pytest.raises(ValueError, match="unet: it was made without num_classes; use UnconditionalPipeline"):
            guided(tiny_unet(), id2label=None)
