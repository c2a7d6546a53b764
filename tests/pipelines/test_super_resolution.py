"""Small pictures made larger: the filters, what the U-Net is shown, any size, tiles."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from tiny import tiny_unet

from hf_genmod import AncestralDDPMScheduler, DenoisingUNet2DModel, SuperResolutionPipeline
from hf_genmod.models.conditioning import enlarge, noised_by, shrink
from hf_genmod.models.denoising_unet import DenoisingUNet2DOutput
from hf_genmod.pipelines.tiles import blend_tiles

NAMES = {0: "cat", 1: "dog", 2: "lizard"}


def pictures(n=2, height=4, width=4, channels=3, seed=0):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(seed))


def upsampler(unet=None, scheduler=None, max_noise_level=300, **options):
    unet = unet or tiny_unet(conditioning_channels=3)
    scheduler = scheduler or AncestralDDPMScheduler()
    pipe = SuperResolutionPipeline(unet, scheduler, max_noise_level=max_noise_level, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, image, seed=0, num_inference_steps=4, output_type="latent", **request):
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    request |= {"num_inference_steps": num_inference_steps, "output_type": output_type}
    return pipe(image, generator=generator, **request).images


class Local(ModelMixin, ConfigMixin):
    """A network each of whose pixels sees itself alone; it remembers what it was shown."""

    size_factor = 4

    @register_to_config
    def __init__(self, sample_size=8, in_channels=3, out_channels=3, conditioning_channels=3, num_classes=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.3, -0.7]))
        self.shown = []

    def forward(self, sample, timestep, conditioning_image, conditioning_timestep):
        self.shown.append((sample, timestep, conditioning_image, conditioning_timestep))
        a, b = self.weight
        return DenoisingUNet2DOutput(torch.sin(a * sample + b * conditioning_image + timestep / 1000))


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3)])
@pytest.mark.parametrize("height, width, factor", [(32, 32, 2), (32, 48, 4), (64, 16, 8), (8, 8, 8)])
def test_pictures_are_made_small_by_the_filter_of_pillow(mode, channels, height, width, factor):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    small = Image.fromarray(pixels.squeeze()).resize((width // factor, height // factor), Image.Resampling.LANCZOS)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    ours = (shrink(x, factor)[0].permute(1, 2, 0) + 1) * 127.5
    theirs = np.asarray(small, float).reshape(ours.shape)
    assert np.abs(ours.numpy() - theirs).max() <= 1  # Pillow rounds in between, and at the end


def test_the_filter_is_as_exact_in_low_precision():
    x = 2 * pictures(2, 16, 16) - 1
    with torch.autocast("cpu", torch.bfloat16):
        in_low_precision = shrink(x, 4)
    assert torch.equal(in_low_precision, shrink(x, 4))


def test_a_plain_picture_stays_plain_and_an_odd_size_is_refused():
    plain = torch.full((1, 3, 8, 12), 0.37)
    torch.testing.assert_close(shrink(plain, 4), torch.full((1, 3, 2, 3), 0.37))
    torch.testing.assert_close(enlarge(plain, 4), torch.full((1, 3, 32, 48), 0.37))
    with pytest.raises(ValueError, match="factor: 4 does not divide 10x8"):
        shrink(torch.zeros(1, 3, 10, 8), 4)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("noise_level", [0, 1, 200])
def test_draws_by_algorithm_2_beside_the_noised_and_enlarged_picture(factor, noise_level):
    scheduler, unet = AncestralDDPMScheduler(), tiny_unet(conditioning_channels=3)
    small, generator = pictures(1, 4, 6), torch.Generator().manual_seed(0)
    ours = draw(upsampler(unet, factor=factor), small, [generator], noise_level=noise_level)

    rng = torch.Generator().manual_seed(0)
    x_t, epsilon = (torch.randn(1, 3, k * 4, k * 6, generator=rng) for k in (factor, 1))
    y = 2 * small - 1
    if noise_level:
        y = scheduler.add_noise(y, epsilon, torch.tensor([noise_level - 1]))  # after so many steps, counted from 0
    c = F.interpolate(y, scale_factor=factor, mode="bicubic")
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            told = {"conditioning_image": c, "conditioning_timestep": noise_level}
            x_t = scheduler.step(unet(x_t, t, **told).sample, t, x_t, generator=rng).prev_sample
    torch.testing.assert_close(ours, x_t)


def test_noise_after_all_steps_is_that_of_the_process_and_none_after_none():
    scheduler, y = AncestralDDPMScheduler(rescale_betas_zero_snr=True), pictures(3)
    epsilon = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    noised = noised_by(scheduler, y, epsilon, torch.tensor([0, 500, 1000]))
    alpha_bar = scheduler.alphas_cumprod[499]
    assert torch.equal(noised[0], y[0])
    torch.testing.assert_close(noised[1], alpha_bar.sqrt() * y[1] + (1 - alpha_bar).sqrt() * epsilon[1])
    torch.testing.assert_close(noised[2], epsilon[2])


@pytest.mark.parametrize("sampler", [AncestralDDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_a_picture_depends_on_its_own_seed_alone(sampler):
    pipe, small = upsampler(scheduler=sampler.from_config(AncestralDDPMScheduler().config)), pictures(5)
    together = draw(pipe, small, [torch.Generator().manual_seed(i) for i in range(5)], noise_level=100)
    for i in range(5):
        alone = draw(pipe, small[i : i + 1], [torch.Generator().manual_seed(i)], noise_level=100)
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-4 * max(1, alone.abs().max().item()))
    assert not torch.allclose(together[0], draw(pipe, small[:1], [torch.Generator().manual_seed(9)])[0], atol=1e-2)


def test_the_noise_level_changes_what_is_shown_and_not_the_noise_it_starts_from():
    starts = []
    for noise_level in (0, 200):
        pipe = upsampler(Local(), max_noise_level=200)
        draw(pipe, pictures(), noise_level=noise_level)
        starts.append(pipe.unet.shown[0])
    assert torch.equal(starts[0][0], starts[1][0])
    assert not torch.allclose(starts[0][2], starts[1][2], atol=0.1)
    assert starts[0][3].tolist() == [0, 0] and starts[1][3].tolist() == [200, 200]


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (4, 7), (9, 2)])
def test_pictures_of_any_size_are_enlarged(height, width):
    small = pictures(1, height, width)
    pipe = upsampler(Local(), DDIMScheduler(), factor=4)
    ours = draw(pipe, small)
    assert ours.shape == (1, 3, 4 * height, 4 * width)
    shown = [x.shape[2:] for x, *_ in pipe.unet.shown]
    assert all(length % 4 == 0 for size in shown for length in size)

    unet = tiny_unet(conditioning_channels=3)  # which needs multiples of 2
    assert draw(upsampler(unet, factor=2), small).shape == (1, 3, 2 * height, 2 * width)


def test_a_size_that_does_not_fit_is_continued_by_its_mirror_image():
    pipe = upsampler(Local(), DDIMScheduler(), factor=2)
    draw(pipe, pictures(1, 3, 1))  # 6x2, and multiples of 4 are needed
    for x, _, c, _ in pipe.unet.shown:
        for image in (x, c):
            assert image.shape == (1, 3, 8, 4)
            assert torch.equal(image[:, :, 6:], image[:, :, 4:6].flip(2))
            assert torch.equal(image[..., 2:], image[..., :2].flip(3))


@pytest.mark.parametrize("height, width, tile_size", [(8, 8, 16), (20, 7, 16), (13, 40, 22), (33, 33, 32)])
@pytest.mark.parametrize("factor", [2, 4])
def test_tiles_are_blended_to_the_whole(height, width, tile_size, factor):
    small = pictures(2, height, width)
    whole = draw(upsampler(Local(), DDIMScheduler(), factor=factor), small, tile_size=4096)
    pipe = upsampler(Local(), DDIMScheduler(), factor=factor)
    tiled = draw(pipe, small, tile_size=tile_size)
    torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)
    sizes = [x.shape[2:] for x, *_ in pipe.unet.shown]
    assert all(size[0] <= tile_size and size[1] <= tile_size for size in sizes)
    steps = [t for _, t, *_ in pipe.unet.shown]
    assert len(steps) > len(set(map(int, steps))) or max(height, width) * factor <= tile_size


def test_where_tiles_disagree_one_fades_into_the_other():
    def mean_of_tile(x):
        means.append(x.mean().item())
        return torch.full_like(x, means[-1])

    means, x = [], torch.linspace(0, 1, 80).expand(1, 1, 32, 80)  # from left to right
    blended = blend_tiles(mean_of_tile, [x], tile_size=32, multiple=4)[0, 0]
    assert len(means) == 3
    assert blended[0, 0].item() == pytest.approx(means[0])
    assert blended[0, -1].item() == pytest.approx(means[-1])
    overlap = 32 // 4
    assert 0 < blended.diff(dim=1).max() <= 1.01 * torch.tensor(means).diff().max() / overlap


class TestLabels:
    @pytest.fixture
    def pipe(self):
        return upsampler(
            tiny_unet(conditioning_channels=3, num_classes=3),
            DDIMScheduler(timestep_spacing="trailing"),
            id2label=NAMES,
        )

    X_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))

    def prediction(self, pipe, t, labels):
        with torch.no_grad():
            c = enlarge(2 * pictures() - 1, 2)
            return pipe.unet(self.X_T, t, torch.tensor(labels), conditioning_image=c).sample

    @pytest.mark.parametrize("gamma", [None, 0.0, 1.0, 2.5])
    def test_guidance_is_that_of_the_labels_and_without_one_there_is_none(self, pipe, gamma):
        pipe.scheduler.set_timesteps(1)
        t = pipe.scheduler.timesteps[0]
        null, y = (self.prediction(pipe, t, labels) for labels in ([3, 3], [1, 2]))
        prediction = null if gamma is None else null + gamma * (y - null)
        expected = pipe.scheduler.step(prediction, t, self.X_T).prev_sample
        request = {} if gamma is None else {"class_labels": ["dog", 2], "guidance_scale": gamma}
        drawn = draw(pipe, pictures(), num_inference_steps=1, latents=self.X_T, **request)
        torch.testing.assert_close(drawn, expected)

    def test_mistakes_are_named(self, pipe):
        with pytest.raises(ValueError, match="class_labels: 1 for 2 images; give one for each, or none"):
            pipe(pictures(), class_labels="dog")
        with pytest.raises(ValueError, match="did you mean 'lizard'"):
            pipe(pictures(1), class_labels="lizzard")
        with pytest.raises(ValueError, match="guidance_scale: 2.0 is towards class_labels, and none are given"):
            pipe(pictures(), guidance_scale=2.0)
        with pytest.raises(ValueError, match="class_labels: given, but this model has no labels"):
            upsampler()(pictures(1), class_labels=0)


def test_files_arrays_tensors_and_lists_of_tensors_are_taken_alike():
    pixels = (255 * pictures(1)[0].permute(1, 2, 0)).round().byte().numpy()
    tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    forms = [Image.fromarray(pixels), [Image.fromarray(pixels)], pixels[None] / 255, tensor[None], [tensor]]
    first, *others = (draw(upsampler(), image) for image in forms)
    for other in others:
        torch.testing.assert_close(other, first)
    (picture,) = draw(upsampler(factor=4), Image.fromarray(pixels), output_type="pil")
    assert (picture.mode, picture.size) == ("RGB", (16, 16))


def test_measured_values_are_taken_and_given_in_their_units():
    ranges = {"low": [-2.0, 0.0, 5.0], "high": [2.0, 1.0, 10.0]}
    low, high = (torch.tensor(ranges[end])[:, None, None] for end in ("low", "high"))
    values, unit = low + (high - low) * pictures(), pictures()
    in_units = draw(upsampler(value_range=ranges), values, output_type="pt")
    torch.testing.assert_close((in_units - low) / (high - low), draw(upsampler(), unit) / 2 + 0.5)


def test_a_learned_variance_is_used():
    unet = tiny_unet(conditioning_channels=3, out_channels=6)
    pipe = upsampler(unet, AncestralDDPMScheduler(variance_type="learned_range"))
    assert draw(pipe, pictures(1, 12, 12), tile_size=16).isfinite().all()


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"noise_level": 301}, "noise_level: 301 is not a whole number from 0 to 300"),
        ({"noise_level": -1}, "noise_level: -1 is not"),
        ({"noise_level": 1.5}, "noise_level: 1.5 is not"),
        ({"noise_level": True}, "noise_level: True is not"),
        ({"tile_size": 4}, "tile_size: 4 is less than 8"),
        ({"tile_size": "all"}, "tile_size: 'all' is not a positive whole number"),
        ({"latents": torch.zeros(2, 3, 4, 4)}, r"latents: \(2, 3, 4, 4\) is no tensor of floats \(2, 3, 8, 8\)"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0 is not a positive"),
        ({"guidance_scale": math.nan}, "guidance_scale: nan is not a finite number"),
        ({"generator": [torch.Generator()]}, "generator: a list of 1 for 2 images"),
        ({"output_type": "jpg"}, "output_type: 'jpg' is not one of"),
        ({"image": pictures(channels=1)}, "images: 2 of 1 channels; this model takes one or more of 3"),
        ({"image": 2 * pictures()}, r"are not in \[0, 1\]"),
        ({"image": Image.new("I;16", (4, 4))}, "images: some have more than 8 bits"),
        ({"image": []}, "images: there are none, or they differ in size"),
    ],
)
def test_mistakes_are_named(request_, message):
    with pytest.raises(ValueError, match=message):
        upsampler()(**({"image": pictures()} | request_))


def test_what_it_is_made_of_has_to_fit():
    with pytest.raises(ValueError, match="unet: its conditioning_channels are 0, and not the 3 of its images"):
        upsampler(tiny_unet())
    with pytest.raises(ValueError, match="factor: 2.0 is not one of 2, 4, 8"):
        upsampler(factor=2.0)
    with pytest.raises(ValueError, match="factor: 3 is not one of 2, 4, 8"):
        upsampler(factor=3)
    with pytest.raises(ValueError, match="max_noise_level: 1001 is not a whole number from 0 to 1000"):
        upsampler(max_noise_level=1001)


def test_the_default_unet_of_the_package_serves():
    pipe = upsampler(DenoisingUNet2DModel(sample_size=16, conditioning_channels=3, patch_size=2))
    assert draw(pipe, pictures(1, 8, 8), num_inference_steps=2).shape == (1, 3, 16, 16)
