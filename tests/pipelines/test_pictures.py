"""Images are made of finite numbers, in the precision that an autoencoder needs, by a processor of diffusers."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from small_pipelines import (
    PIPELINES,
    images_of,
    of_images,
    of_latents,
    seeded,
    unconditional,
    upsampler,
)
from tiny import assert_rounded_alike, tiny_autoencoder, tiny_unet, tiny_vae

from hf_genmod import Autoencoder, UnconditionalPipeline

KINDS_OF_OUTPUT = ["pil", "np", "pt", "latent"]


def broken(module, value=torch.nan):
    """A module with one weight that is not finite."""
    with torch.no_grad():
        next(module.parameters()).flatten()[0] = value
    return module


def overflowing(vae):
    """An autoencoder whose first feature maps do not fit into float16; its normalisation makes them small again."""
    with torch.no_grad():
        for network in (vae.encoder, vae.decoder):
            network.conv_in.weight.mul_(1e6).clamp_(-60_000, 60_000)
    return vae


class TestImageProcessor:
    @pytest.mark.parametrize("kind", PIPELINES)
    def test_is_one_of_diffusers_that_makes_the_images_of_the_pipeline(self, kind):
        make, request = PIPELINES[kind]
        pipeline = make()
        assert isinstance(pipeline.image_processor, VaeImageProcessor)
        with torch.no_grad():
            decoded = pipeline.decode(images_of(pipeline, request(2), seeded()))
        for output_type in ("pt", "np", "pil"):
            expected = images_of(pipeline, request(2), seeded(), output_type)
            actual = pipeline.image_processor.postprocess(decoded, output_type=output_type)
            assert np.array_equal(*(np.stack([np.asarray(x) for x in images]) for images in (actual, expected)))

    @pytest.mark.parametrize("kind", PIPELINES)
    def test_reads_what_it_makes(self, kind):
        processor = PIPELINES[kind][0]().image_processor
        x = torch.rand(2, 3, 8, 12, generator=seeded()) * 2 - 1
        torch.testing.assert_close(processor.preprocess(processor.postprocess(x, "pt")), x)
        torch.testing.assert_close(processor.preprocess(processor.postprocess(x, "np")), x)
        torch.testing.assert_close(processor.preprocess(processor.postprocess(x, "pil")), x, rtol=0, atol=1 / 255)
        assert processor.postprocess(x, "latent") is x

    @pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
    def test_brings_images_to_the_channels_of_the_model(self, channels, mode):
        processor = unconditional(tiny_unet(in_channels=channels, out_channels=channels)).image_processor
        grey = Image.new("L", (10, 6), 51)
        for image in (grey, grey.convert("RGB")):
            x = processor.preprocess(image)
            assert x.shape == (1, channels, 6, 10)
            torch.testing.assert_close(x, torch.full_like(x, 2 * 51 / 255 - 1), rtol=0, atol=1 / 255)

    @pytest.mark.parametrize("make", [unconditional, of_images])
    def test_measured_values_come_back(self, make):
        ranges = {"low": [-5.0, 0.0, 100.0], "high": [5.0, 1.0, 300.0]}
        processor = make(value_range=ranges).image_processor
        x = torch.rand(2, 3, 4, 4, generator=seeded()) * 4 - 2  # beyond the range too
        for output_type in ("pt", "np"):
            back = processor.preprocess(processor.postprocess(x, output_type))
            torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-5)


class TestWhatIsNotFinite:
    @pytest.mark.parametrize("output_type", ["pil", "latent"])
    @pytest.mark.parametrize("kind", PIPELINES)
    def test_makes_no_image(self, kind, output_type):
        make, request = PIPELINES[kind]
        pipeline = make()
        pipeline.to(torch.float32)
        if kind == "autoencoder":
            if output_type == "latent":
                request = lambda n: {"latents": torch.full((n, 2, 4, 4), torch.inf)}  # noqa: E731
            broken(pipeline.vae.decoder)
        else:
            broken(pipeline.unet)
        with pytest.raises(ValueError, match=r"not finite; .*compute in float32, or look for weights that are not"):
            images_of(pipeline, request(1), seeded(), output_type)

    @pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_comes_out_of_no_decoder(self, output_type, value):
        pipeline = of_latents()
        broken(pipeline.vae.decoder, value)
        assert images_of(pipeline, {}, seeded()).isfinite().all()
        with pytest.raises(ValueError, match="images: some of their values are not finite; compute in float32"):
            images_of(pipeline, {}, seeded(), output_type)

    @pytest.mark.parametrize("output_type", KINDS_OF_OUTPUT)
    def test_is_not_taken_from_a_callback(self, output_type):
        callback = lambda pipe, i, t, tensors: {"latents": tensors["latents"] * (torch.nan if i == 2 else 1)}  # noqa: E731
        for pipeline, request in ((unconditional(), {}), (upsampler(), PIPELINES["upsampler"][1](1))):
            with pytest.raises(ValueError, match="images: some of their values are not finite"):
                images_of(pipeline, request, seeded(), output_type, callback_on_step_end=callback)

    @pytest.mark.parametrize("output_type", KINDS_OF_OUTPUT)
    def test_is_no_reconstruction_interpolation_or_traversal(self, output_type):
        a, b = torch.rand(2, 1, 3, 8, 8, generator=seeded())
        pipeline = of_images()
        broken(pipeline.vae.encoder)
        for request in (
            lambda: pipeline.reconstruct(a, output_type),
            lambda: pipeline.interpolate(a, b, 3, output_type),
            lambda: pipeline.traverse(a, 0, [0.0], output_type),
        ):
            with pytest.raises(ValueError, match="images: some of their values are not finite"):
                request()

    def test_is_no_measured_value(self):
        pipeline = unconditional(value_range={"low": [-3e38] * 3, "high": [3e38] * 3})
        for output_type in ("np", "pt"):
            with pytest.raises(ValueError, match="images: some of their values are not finite"):
                images_of(pipeline, {}, seeded(), output_type)  # whose range does not fit into float32

    @pytest.mark.parametrize("make", [unconditional, of_images])
    def test_is_not_postprocessed(self, make):
        for value in (torch.nan, torch.inf, -torch.inf):
            x = torch.zeros(1, 3, 8, 8)
            x[0, 1, 2, 3] = value
            for output_type in KINDS_OF_OUTPUT:
                with pytest.raises(ValueError, match="images: some of their values are not finite"):
                    make().postprocess(x, output_type)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("force_upcast", [True, False])
    def test_force_upcast_decodes_and_encodes_in_float32(self, dtype, force_upcast):
        vae = tiny_vae(latent_channels=4, force_upcast=force_upcast, sample_size=8)
        rounded = tiny_vae(latent_channels=4, sample_size=8).to(dtype).to(torch.float32)
        weights = {name: weight.clone() for name, weight in vae.to(dtype).state_dict().items()}
        z, x = torch.randn(2, 4, 4, 4, generator=seeded()), torch.rand(2, 3, 8, 8, generator=seeded())
        with torch.no_grad():
            images = rounded.decode(z / vae.config.scaling_factor).sample
            latents = rounded.encode(2 * x - 1).latent_dist.mode()
            of_vae = UnconditionalPipeline(tiny_unet(in_channels=4, out_channels=4), unconditional().scheduler, vae)
            actual = of_vae.decode(z), of_images(vae).reconstruct(x, "latent").images
        assert [part.dtype for part in actual] == [torch.float32] * 2
        for part, expected in zip(actual, (images, latents), strict=True):
            if force_upcast:
                assert_rounded_alike(part, expected)
            else:
                assert 1e-5 < (part - expected).abs().max() < 0.1
        assert vae.dtype == dtype
        assert all(torch.equal(weight, weights[name]) for name, weight in vae.state_dict().items())

    @pytest.mark.parametrize("of_diffusers", [True, False])
    def test_an_autoencoder_that_overflows_in_half_precision_computes_in_float32(self, of_diffusers):
        def make():
            if of_diffusers:
                return overflowing(tiny_vae(latent_channels=2, force_upcast=False, sample_size=8))
            return overflowing(tiny_autoencoder(Autoencoder))

        x, half = torch.rand(2, 3, 8, 8, generator=seeded()), make().to(torch.float16)
        rounded = of_images(make().to(torch.float16).to(torch.float32))
        z = 10 * torch.randn(2, 2, 4, 4, generator=seeded())
        with torch.no_grad():
            assert not half.decode(z.half()).sample.isfinite().all()
            assert not half(x.half()).sample.isfinite().all()
            pipeline = of_images(half)
            assert_rounded_alike(pipeline.decode(z), rounded.decode(z))
            assert_rounded_alike(*(pipe.reconstruct(x, "pt").images for pipe in (pipeline, rounded)))
        assert half.dtype == torch.float16

    def test_double_precision_stays(self):
        vae, z = tiny_vae(latent_channels=4).double(), torch.randn(1, 4, 4, 4, generator=seeded())
        dtypes = []
        vae.decoder.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
        with torch.no_grad():
            assert of_images(vae).decode(z).dtype == torch.float32
        assert dtypes == [torch.float64]

    def test_it_is_in_half_precision_again_after_an_error(self):
        pipeline = of_latents()
        pipeline.vae.to(torch.float16)
        broken(pipeline.vae.decoder)
        with pytest.raises(ValueError, match="not finite"):
            images_of(pipeline, {}, seeded(), "pt")
        with pytest.raises(RuntimeError):
            pipeline.decode(torch.zeros(1, 3, 4, 4))  # of other channels
        assert pipeline.vae.dtype == torch.float16

    def test_works_under_hooks_and_in_inference_mode(self):
        pipeline = of_latents()
        pipeline.vae.to(torch.float16)
        expected = images_of(pipeline, {}, seeded(), "pt")
        with torch.inference_mode():
            assert torch.equal(images_of(pipeline, {}, seeded(), "pt"), expected)
        pipeline.enable_model_cpu_offload(device="cpu")
        assert torch.equal(images_of(pipeline, {}, seeded(), "pt"), expected)
        assert pipeline.vae.dtype == torch.float16


class TestSlicing:
    @pytest.mark.parametrize("of_diffusers", [True, False])
    def test_images_are_decoded_one_by_one(self, of_diffusers):
        vae = tiny_vae(latent_channels=2) if of_diffusers else tiny_autoencoder()
        pipeline = unconditional(tiny_unet(in_channels=2, out_channels=2), vae=vae)
        expected, sizes = images_of(pipeline, {"batch_size": 3}, seeded(), "pt"), []
        pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        pipeline.enable_vae_slicing()
        assert_rounded_alike(images_of(pipeline, {"batch_size": 3}, seeded(), "pt"), expected)
        assert sizes == [1, 1, 1]
        pipeline.disable_vae_slicing()
        assert_rounded_alike(images_of(pipeline, {"batch_size": 3}, seeded(), "pt"), expected)
        assert sizes == [1, 1, 1, 3]

    def test_reconstructions_are_encoded_and_decoded_one_by_one(self):
        pipeline, x = of_images(), torch.rand(3, 3, 8, 8, generator=seeded())
        expected = pipeline.reconstruct(x, "pt").images
        pipeline.enable_vae_slicing()
        assert_rounded_alike(pipeline.reconstruct(x, "pt").images, expected)

    def test_tiles_are_those_of_the_autoencoder(self):
        pipeline = of_latents()
        pipeline.enable_vae_tiling()
        assert pipeline.vae.use_tiling
        pipeline.disable_vae_tiling()
        assert not pipeline.vae.use_tiling

    def test_a_pipeline_without_an_autoencoder_says_so(self):
        for pipeline in (unconditional(), upsampler()):
            with pytest.raises(ValueError, match="vae: this pipeline has no autoencoder with enable_slicing"):
                pipeline.enable_vae_slicing()
