"""An autoencoder reconstructs, interpolates, traverses and samples."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from small_pipelines import quiet, seeded
from tiny import tiny_autoencoder, tiny_vae

from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.models.image_autoencoder import Autoencoder, AutoencoderOutput, ImageLatentsOutput
from hf_genmod.models.variational_autoencoder import VariationalAutoencoder
from hf_genmod.pipelines.autoencoder import AutoencoderPipeline
from hf_genmod.sharing.loading import load_pipeline


class TestAutoencoder:
    """What `AutoencoderPipeline` makes of a picture is what its autoencoder, called by hand, makes of it."""

    @pytest.fixture(params=["plain", "variational", "vector", "of diffusers"])
    def pipeline(self, request):
        return autoencoder(request.param)

    @pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
    @pytest.mark.parametrize("kind", ["plain", "variational", "of diffusers"])
    def test_reconstructs_what_the_decoder_makes_of_the_latents(self, kind, channels, mode):
        pipeline = autoencoder(kind, channels)
        pil, array, tensor = same_pictures(mode)
        expected = by_hand(pipeline.vae, 2 * tensor - 1)
        assert expected.shape == tensor.shape
        for images in (pil, array, tensor):
            pictures = pipeline.reconstruct(images, output_type="pt").images
            torch.testing.assert_close(pictures, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
        (first,) = pipeline.reconstruct(pil[0], output_type="np", return_dict=False)
        assert np.allclose(first, pictures[:1].permute(0, 2, 3, 1).numpy(), atol=1e-5)
        shown = pipeline.reconstruct(pil).images
        assert all(image.mode == mode for image in shown)
        pixels = np.stack([np.asarray(image).reshape(8, 8, channels) for image in shown]) / 255
        assert np.allclose(pixels, pictures.permute(0, 2, 3, 1).numpy(), atol=0.6 / 255)

    def test_latents_are_the_means_of_the_posterior(self):
        pipeline = autoencoder("variational")
        tensor = same_pictures("RGB")[2]
        with torch.no_grad():
            posterior = pipeline.vae.encode(2 * tensor - 1).latent_dist
        assert torch.equal(pipeline.reconstruct(tensor, output_type="latent").images, posterior.mean)
        assert (posterior.std > 0.1).all()

    def test_pictures_of_as_many_channels_as_the_latents_are_pictures(self):
        pipeline = autoencoder("of diffusers", channels=4)
        assert pipeline.vae.config.latent_channels == 4
        tensor = same_pictures("RGBA")[2]
        expected = (by_hand(pipeline.vae, 2 * tensor - 1) / 2 + 0.5).clamp(0, 1)
        pictures = pipeline.reconstruct(tensor, output_type="pt").images
        torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-6)

    def test_pictures_of_pillow_are_read_as_those_for_training(self):
        picture = Image.new("RGBA", (8, 8), (200, 10, 10, 255))
        picture.paste((0, 0, 0, 0), (0, 0, 4, 8))  # black, but nobody has seen it
        palette = picture.convert("RGB").quantize(4)
        for image, channels in ((picture, 3), (picture, 1), (picture, 4), (palette, 3), (picture.convert("L"), 4)):
            pixels = PictureDataset([image], "one", channels=channels)[0]["images"][None] / 255
            pipeline = autoencoder("plain", channels)
            expected = pipeline.reconstruct(pixels, output_type="pt").images
            actual = pipeline.reconstruct(image, output_type="pt").images
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)

    def test_measured_values_go_in_and_come_out_in_their_units(self, tmp_path):
        ranges = {"low": [0.0, -1.0, 200.0, 5.0, -1e-3], "high": [1.0, 1.0, 300.0, 5.0, 1e-3]}
        low, high = (torch.tensor(ranges[end])[:, None, None] for end in ("low", "high"))
        made = quiet(AutoencoderPipeline(tiny_autoencoder(in_channels=5), value_range=ranges))
        made.save_pretrained(tmp_path)
        x = 2 * torch.rand(2, 5, 8, 8, generator=seeded()) - 1
        x[:, 3] = -1  # a channel that is the same everywhere
        values = low + (high - low) * (x + 1) / 2
        expected = low + (high - low) * (by_hand(made.vae, x) + 1) / 2
        for pipeline in (made, load_pipeline(tmp_path)):
            pt = pipeline.reconstruct(values, output_type="pt").images
            torch.testing.assert_close(pt, expected, rtol=1e-4, atol=1e-6)
            array = pipeline.reconstruct(values.permute(0, 2, 3, 1).numpy(), output_type="np").images
            assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
        with pytest.raises(ValueError, match="images: this model was trained on measured values; give an array"):
            made.reconstruct(Image.new("L", (8, 8)))

    def test_a_seed_gives_a_picture_however_many_are_drawn(self, pipeline):
        pipeline = with_prior(pipeline) if pipeline.vae.config.get("prior_rank", 0) is None else pipeline
        for prior in priors(pipeline):
            together = pipeline(3, prior, generator=[seeded(i) for i in range(3)], output_type="pt").images
            assert (together[0] - together[1]).abs().max() > 1e-3
            for i in range(3):
                alone = pipeline(1, prior, generator=[seeded(i)], output_type="pt").images
                torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-4)
            two, many = (pipeline(n, prior, generator=seeded(7), output_type="latent").images for n in (2, 5))
            torch.testing.assert_close(many[:2], two)

    def test_decodes_the_latents_of_the_standard_prior_or_those_it_is_given(self, pipeline):
        z = torch.stack([torch.randn(latent_shape(pipeline), generator=seeded(i)) for i in range(2)])
        with torch.no_grad():
            expected = (pipeline.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
        assert torch.equal(pipeline(latents=z, output_type="pt").images, expected)
        if "standard" in priors(pipeline):
            drawn = pipeline(2, generator=[seeded(0), seeded(1)], output_type="pt").images
            assert torch.equal(drawn, expected)

    @pytest.mark.parametrize("kind", ["plain", "variational"])
    def test_samples_of_a_fitted_prior_have_the_mean_and_covariance_of_the_latents(self, kind):
        pipeline = with_prior(autoencoder(kind, latent_channels=1, sample_size=4), count=500)
        z = pipeline(40_000, "fitted", generator=seeded(), output_type="latent").images.flatten(1)
        fitted = prior_latents(pipeline, 500).flatten(1)
        assert z.shape[1] == 4
        scale = fitted.std(dim=0)
        assert ((z.mean(dim=0) - fitted.mean(dim=0)) / scale).abs().max() < 0.03
        difference = (z.T.cov() - fitted.T.cov()) / torch.outer(scale, scale)
        assert difference.abs().max() < 0.04
        assert (fitted.T.corrcoef() - torch.eye(4)).abs().max() > 0.2  # that of independent latents would not do

    def test_only_a_prior_that_the_autoencoder_has_can_be_drawn_from(self):
        plain, variational = autoencoder("plain"), autoencoder("variational")
        for pipeline in (plain, autoencoder("of diffusers")):
            with pytest.raises(
                ValueError, match="prior: .standard., but the latents of this autoencoder do not follow N"
            ):
                pipeline()
        for pipeline in (plain, variational, autoencoder("of diffusers")):
            with pytest.raises(ValueError, match="prior: 'fitted', but this autoencoder has no fitted prior"):
                pipeline(prior="fitted")
        with pytest.raises(ValueError, match="prior: 'normal' is not one of 'standard', 'fitted'"):
            variational(prior="normal")
        with_prior(plain)
        with pytest.raises(ValueError, match="use prior='fitted' if it has one, or train a variational autoencoder"):
            plain(prior="standard")

    def test_ends_of_an_interpolation_are_the_reconstructions(self, pipeline):
        a, b = same_pictures("RGB")[2].split(1)
        pictures = pipeline.interpolate(a, b, steps=5, output_type="pt").images
        ends = torch.cat([pipeline.reconstruct(x, output_type="pt").images for x in (a, b)])
        torch.testing.assert_close(pictures[[0, -1]], ends, rtol=0, atol=1e-5)
        assert len(pictures) == 5 and (pictures[0] - pictures[-1]).abs().max() > 1e-3

    def test_latents_of_an_interpolation_are_those_of_the_great_circle(self, pipeline):
        a, b = same_pictures("RGB")[2].split(1)
        z = pipeline.interpolate(a, b, steps=9, output_type="latent").images.double().flatten(1)
        z_a, z_b = z[0], z[-1]
        omega = math.acos(float(z_a @ z_b / z_a.norm() / z_b.norm()))
        for tau, z_tau in zip(torch.linspace(0, 1, 9).tolist(), z, strict=True):
            weights = math.sin((1 - tau) * omega) / math.sin(omega), math.sin(tau * omega) / math.sin(omega)
            torch.testing.assert_close(z_tau, weights[0] * z_a + weights[1] * z_b, rtol=1e-4, atol=1e-5)

    def test_equal_norms_stay_equal_and_angles_are_even_on_the_way(self):
        pipeline = autoencoder("identity")
        a, b = torch.rand(2, 3, 8, 8, generator=seeded())[:, None].unbind(0)
        b = b.mul(2).sub(1)
        b = (b * (2 * a - 1).norm() / b.norm() + 1) / 2  # on the sphere of a
        a, b = (0.5 + (x - 0.5) * 0.5 for x in (a, b))  # within [0, 1]
        z = pipeline.interpolate(a, b, steps=7, output_type="latent").images.double().flatten(1)
        torch.testing.assert_close(z.norm(dim=1), z[0].norm().expand(7), rtol=1e-5, atol=0)
        angles = torch.cosine_similarity(z[1:], z[:-1]).clamp(max=1).arccos()
        torch.testing.assert_close(angles, angles[0].expand(6), rtol=1e-3, atol=0)
        assert angles[0] > 0.05

    def test_between_identical_and_opposite_pictures_lie_pictures(self):
        pipeline = autoencoder("identity")
        a = torch.rand(1, 3, 8, 8, generator=seeded())
        same = pipeline.interpolate(a, a, steps=5, output_type="latent").images
        torch.testing.assert_close(same, (2 * a - 1).expand(5, -1, -1, -1), rtol=0, atol=1e-3)
        assert pipeline.interpolate(a, 1 - a, steps=5, output_type="latent").images.isfinite().all()
        grey = torch.full_like(a, 0.5)  # latents of length 0
        assert pipeline.interpolate(grey, grey, steps=3, output_type="latent").images.abs().max() == 0

    @pytest.mark.parametrize("dim", [0, 17])
    def test_a_traversal_sets_one_latent_and_leaves_the_others(self, dim):
        pipeline = autoencoder("variational")
        x = same_pictures("RGB")[2][:1]
        z = pipeline.reconstruct(x, output_type="latent").images
        values = [-2.0, 0.5, z.flatten()[dim].item(), 3]
        changed = pipeline.traverse(x, dim, values, output_type="latent").images.flatten(1)
        expected = z.flatten(1).repeat(4, 1)
        expected[:, dim] = torch.tensor(values)
        assert torch.equal(changed, expected)
        pictures = pipeline.traverse(x, (dim,), np.array(values), output_type="pt").images
        with torch.no_grad():
            decoded = pipeline.vae.decode(expected.unflatten(1, z.shape[1:])).sample
        assert torch.equal(pictures, (decoded / 2 + 0.5).clamp(0, 1))
        own = pipeline.reconstruct(x, output_type="pt").images
        torch.testing.assert_close(pictures[2:3], own, rtol=0, atol=1e-5)
        assert (pictures[0] - own).abs().max() > 1e-3

    def test_a_traversal_of_two_is_a_grid_with_the_first_constant_in_a_row(self):
        pipeline = autoencoder("vector", latent_channels=4)
        x = same_pictures("RGB")[2][:1]
        z = pipeline.reconstruct(x, output_type="latent").images.flatten()
        values = [-1.0, 0.0, 1.5]
        grid = pipeline.traverse(x, (3, 1), values, output_type="latent").images
        assert grid.shape == (9, 4, 1, 1)
        for (row, column), latents in zip(itertools.product(values, values), grid.flatten(1), strict=True):
            assert latents.tolist() == [z[0].item(), column, z[2].item(), row]
        assert len(pipeline.traverse(x, [3, 1], values).images) == 9

    @pytest.mark.parametrize(
        "dims, values, message",
        [
            (32, [0.0], "dims: (32,) is not one or two of the 32 latents, 0 to 31"),
            (-1, [0.0], "dims: (-1,) is not one or two of the 32 latents"),
            (1.0, [0.0], "dims: (1.0,) is not one or two of the 32 latents"),
            (True, [0.0], "dims: (True,) is not one or two of the 32 latents"),
            (None, [0.0], "dims: (None,) is not one or two of the 32 latents"),
            ((0, 1, 2), [0.0], "dims: (0, 1, 2) is not one or two of the 32 latents"),
            ((), [0.0], "dims: () is not one or two of the 32 latents"),
            ((3, 3), [0.0], "dims: (3, 3) is not one or two of the 32 latents"),
            (0, [], "values: [] is not a list of one or more finite numbers"),
            (0, [0.0, float("nan")], "values: [0.0, nan] is not a list of one or more finite numbers"),
            (0, "ab", "values: ['a', 'b'] is not a list of one or more finite numbers"),
            (0, None, "values: [None] is not a list of one or more finite numbers"),
        ],
    )
    def test_errors_of_a_traversal(self, dims, values, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            autoencoder("variational").traverse(same_pictures("RGB")[2][:1], dims, values)

    @pytest.mark.parametrize(
        "images, message",
        [
            (torch.full((1, 3, 8, 8), 1.01), "images: values from 1.01 to 1.01 are not in [0, 1]"),
            (np.full((1, 8, 8, 3), -0.5), "images: values from -0.5 to -0.5 are not in [0, 1]"),
            (np.full((1, 8, 8, 3), 255, np.uint8), "images: values from 255 to 255 are not in [0, 1]"),
            (torch.full((1, 3, 8, 8), float("nan")), "images: values from nan to nan are not in [0, 1]"),
            (torch.zeros(8, 8), "images: shape (8, 8) does not have four axes"),
            (torch.zeros(2, 1, 8, 8), "images: 2 of 1 channels; this model takes one or more of 3"),
            (np.zeros((1, 3, 8, 8)), "images: 1 of 8 channels; this model takes one or more of 3"),
            (torch.zeros(0, 3, 8, 8), "images: 0 of 3 channels; this model takes one or more of 3"),
            ([], "images: there are none, or they differ in size"),
            ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))], "images: there are none, or they differ in size"),
            ("picture.png", "images: give images of PIL (Image.open(file)), one array or one tensor"),
            ([np.zeros((8, 8, 3)), torch.zeros(3, 8, 8)], "give images of PIL (Image.open(file)), one array or one"),
            ([np.zeros((8, 8, 3)), np.zeros((8, 9, 3))], "images: they differ in size; give one or more of one size"),
        ],
    )
    def test_errors_of_pictures(self, images, message):
        for kind in ("plain", "of diffusers"):
            with pytest.raises(ValueError, match=re.escape(message)):
                autoencoder(kind).reconstruct(images)

    def test_sizes_that_do_not_fit_are_named(self):
        for kind, message in (
            ("plain", "resolution 8x9: this network (patch_size 1, 2 levels) needs a height and width that 2 divides"),
            ("vector", "resolution 8x16: this network makes vectors (vector_latents) of images of 8x8 alone"),
            ("of diffusers", "images: 8x9 pixels; this model needs both to be divisible by 2"),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                autoencoder(kind).reconstruct(Image.new("RGB", (16 if kind == "vector" else 9, 8)))

    @pytest.mark.parametrize("steps", [0, -1, 2.0, True])
    def test_errors_of_an_interpolation(self, steps):
        a, b = same_pictures("RGB")[0]
        pipeline = autoencoder("plain")
        with pytest.raises(ValueError, match=f"steps: {steps} is not a positive whole number"):
            pipeline.interpolate(a, b, steps)
        message = "b: its latents are of shape (2, 8, 8), those of a (2, 4, 4); give two images of one size"
        with pytest.raises(ValueError, match=re.escape(message)):
            pipeline.interpolate(a, b.resize((16, 16)))
        with pytest.raises(ValueError, match="b: 2 images; give one"):
            pipeline.interpolate(a, [a, b])
        with pytest.raises(ValueError, match="image: 2 images; give one"):
            pipeline.traverse([a, b], 0, [0.0])

    def test_errors_of_a_request(self):
        pipeline, x = autoencoder("variational"), same_pictures("RGB")[2][:1]
        for request in (
            lambda: pipeline(output_type="jpg"),
            lambda: pipeline.reconstruct(x, "jpg"),
            lambda: pipeline.interpolate(x, x, 2, "jpg"),
            lambda: pipeline.traverse(x, 0, [0.0], "jpg"),
        ):
            with pytest.raises(ValueError, match="output_type: 'jpg' is not one of 'pil', 'np', 'pt', 'latent'"):
                request()
        for n in (0, 1.0, True):
            with pytest.raises(ValueError, match=f"batch_size: {n} is not a positive whole number"):
                pipeline(n)
        with pytest.raises(ValueError, match="generator: a list of 3 for 2 images"):
            pipeline(2, generator=[seeded()] * 3)
        with pytest.raises(ValueError, match=re.escape("z: shape (1, 3, 4, 4) is not (n, 2, h, w)")):
            pipeline(latents=torch.zeros(1, 3, 4, 4))
        for latents, given in (
            (np.zeros((1, 2, 4, 4)), "numpy.ndarray"),
            ([0.0], "list"),
            (torch.zeros(3, 2, 4, 4).int(), "torch.IntTensor"),
            (torch.zeros(2, 2, 4, 4), "(2, 2, 4, 4)"),
        ):
            with pytest.raises(ValueError, match=re.escape(f"latents: {given} is no tensor of floats (3, c, h, w)")):
                pipeline(3, latents=latents)
        with pytest.raises(ValueError, match=re.escape("latents: () is no tensor of floats (1, c, h, w)")):
            pipeline(latents=torch.tensor(0.0))

    def test_tells_the_shape_of_its_pictures(self):
        assert autoencoder("plain", channels=4).picture_shape == (4, 8, 8)
        assert autoencoder("plain", sample_size=(8, 12)).picture_shape == (3, 8, 12)

    def test_computes_in_the_dtype_of_the_autoencoder_and_under_hooks(self, pipeline):
        x = same_pictures("RGB")[2]
        expected = pipeline.reconstruct(x, output_type="pt").images
        pipeline.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert torch.equal(pipeline.reconstruct(x, output_type="pt").images, expected)
        pipeline.remove_all_hooks()
        half = pipeline.to(torch.bfloat16).reconstruct(x, output_type="pt").images
        assert half.dtype == torch.float32 and 0 < (half - expected).abs().mean() < 0.02


class IdentityAutoencoder(ModelMixin, ConfigMixin):
    """Latents are the picture."""

    @register_to_config
    def __init__(self, in_channels=3, sample_size=8):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def check_size(self, size):
        pass

    def encode(self, x):
        return ImageLatentsOutput(latents=x)

    def decode(self, z):
        return AutoencoderOutput(sample=z)


def autoencoder(kind, channels=3, **config):
    if kind == "identity":
        return quiet(AutoencoderPipeline(IdentityAutoencoder()))
    if kind == "of diffusers":
        vae = tiny_vae(in_channels=channels, out_channels=channels, sample_size=8, **config)
    elif kind == "vector":
        vae = tiny_autoencoder(in_channels=channels, vector_latents=True, **config)
    else:
        vae = tiny_autoencoder(
            Autoencoder if kind == "plain" else VariationalAutoencoder, in_channels=channels, **config
        )
    return quiet(AutoencoderPipeline(vae))


def same_pictures(mode):
    """Two noisy pictures as those of Pillow, an array and a tensor."""
    channels = len(mode)
    pixels = np.random.default_rng(0).integers(256, size=(2, 8, 8, channels), dtype=np.uint8)
    pil = [Image.fromarray(picture[..., 0] if mode == "L" else picture) for picture in pixels]
    array = pixels.astype(np.float32) / 255
    return pil, array, torch.from_numpy(array).permute(0, 3, 1, 2)


@torch.no_grad()
def by_hand(vae, x):
    output = vae.encode(x)
    return vae.decode(output.latent_dist.mean if "latent_dist" in output else output.latents).sample


def latent_shape(pipeline):
    channels, height, width = pipeline.picture_shape
    with torch.no_grad():
        output = pipeline.vae.encode(torch.zeros(1, channels, height, width))
    return (output.latent_dist.mean if "latent_dist" in output else output.latents).shape[1:]


def prior_latents(pipeline, count):
    x = torch.rand(count, *pipeline.picture_shape, generator=seeded(1)).cumsum(dim=3) / 4  # neighbours are alike
    return pipeline.reconstruct(x.clamp(0, 1), output_type="latent").images


def with_prior(pipeline, count=20):
    pipeline.vae.fit_prior(prior_latents(pipeline, count))
    return pipeline


def priors(pipeline):
    """Those that can be drawn from."""
    standard = ["standard"] if getattr(pipeline.vae, "has_standard_prior", False) else []
    return standard + (["fitted"] if pipeline.vae.config.get("prior_rank") is not None else [])
