import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from tiny import tiny_autoencoder, tiny_tokenizer, tiny_unet

from hf_genmod import (
    Autoencoder,
    ClassifierGuidedPipeline,
    FewStepDDPMScheduler,
    VariationalAutoencoder,
)
from hf_genmod.data.latents import LatentDataset, encode
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.evaluation.features import train_feature_classifier
from hf_genmod.recipes.networks import AutoencoderArguments, ModelArguments, NetworkArguments, sampler_with_classifier
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.training.adapters import attach_adapter
from hf_genmod.training.text_encoder import make_text_encoder


def blank(resolution, channels=3):
    """A data set of one image."""
    height, width = resolution
    return PictureDataset([Image.new({1: "L", 3: "RGB"}[channels], (width, height))], "blank")


def painted(*levels):
    """Pictures of one grey level each."""
    return PictureDataset([Image.new("L", (4, 4), level) for level in levels], "painted")


@pytest.mark.parametrize(
    "resolution, patch_size, widths",
    [((32, 32), 2, (48, 96, 144)), ((28, 28), 2, (96, 144)), ((64, 48), 2, (48, 96, 144)), ((20, 12), 2, (96, 144)),
     ((30, 30), 2, (144,)), ((15, 15), 1, (144,))],
)  # fmt: skip
def test_the_default_unet_fits_the_pictures(resolution, patch_size, widths):
    unet = ModelArguments().make_unet(blank(resolution, channels=1))
    assert (unet.config.patch_size, unet.config.block_out_channels) == (patch_size, widths)
    assert unet(torch.zeros(2, 1, *resolution), 5).sample.shape == (2, 1, *resolution)


@pytest.mark.parametrize("widths", [[64, 128], [32, 64, 96], [48], [40, 80], [24], [160, 320]])
def test_any_widths_are_normalised_in_large_groups(widths):
    config = ModelArguments(block_out_channels=widths).make_unet(blank((16, 16))).config
    assert all(width % (16 * config.norm_num_groups) == 0 for width in widths) or config.norm_num_groups == 1


def test_the_same_seed_makes_the_same_unet():
    first, again, other = (ModelArguments().make_unet(blank((8, 8)), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.conv_in.weight, again.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)


UNET = tiny_unet()


def adapted():
    unet = copy.deepcopy(UNET)
    attach_adapter(unet, rank=2)
    return unet


SMALL = ModelArguments(block_out_channels=[16])
LABELLED = PictureDataset([Image.new("L", (8, 8))] * 2, "two", labels=torch.arange(2), label_names=["a", "b"])
MAKES = {
    "unet": lambda: SMALL.make_unet(LABELLED),
    "classifier": lambda: SMALL.make_classifier(LABELLED, AncestralDDPMScheduler()),
    "autoencoder": lambda: AutoencoderArguments(autoencoder_channels=[16, 16]).make_autoencoder(Autoencoder, LABELLED),
    "text encoder": lambda: make_text_encoder(tiny_tokenizer(), hidden_size=16, num_layers=1),
    "adapter": adapted,
    "network of features": lambda: train_feature_classifier(LABELLED.images, LABELLED.labels, 2, max_train_steps=1),
}


@pytest.mark.parametrize("kind", MAKES)
def test_the_same_weights_in_several_threads(kind):
    expected = MAKES[kind]().state_dict()
    torch.manual_seed(9)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: MAKES[kind]().state_dict(), range(4)))
    assert all(torch.equal(of_thread[name], expected[name]) for of_thread in made for name in expected)
    assert torch.equal(torch.get_rng_state(), state)  # which other threads may use meanwhile


def test_a_learned_variance_doubles_the_outputs_and_is_known_to_the_scheduler():
    model = ModelArguments(learn_variance=True)
    assert model.make_unet(blank((16, 16))).config.out_channels == 6
    assert model.make_scheduler().config.variance_type == "learned_range"


def test_the_default_process_starts_at_pure_noise():
    scheduler = ModelArguments().make_scheduler()
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[0] == 999
    assert scheduler.alphas_cumprod[-1] < 1e-6


def test_the_recommended_sampler_runs_the_same_process_and_clips():
    model = ModelArguments()
    scheduler = model.make_scheduler()
    sampler = model.make_sampler(scheduler, painted(0, 128, 200, 255))
    assert torch.equal(sampler.alphas_cumprod, scheduler.alphas_cumprod)
    back = AncestralDDPMScheduler.from_config(sampler.config)
    sampler.set_timesteps(20)
    back.set_timesteps(20)
    assert sampler.timesteps.tolist() == back.timesteps.tolist()

    rng = torch.Generator().manual_seed(0)
    x_t, v = (3 * torch.randn(2, 1, 4, 4, generator=rng) for _ in range(2))
    t = sampler.timesteps[10]
    sampler.step(v, t, x_t, generator=rng)
    (x_0,) = (x for x in sampler.model_outputs if x is not None)
    torch.testing.assert_close(x_0, back.predict_original_sample(v, t, x_t, clip=True))
    assert x_0.abs().max() == 1


@pytest.mark.parametrize("levels, black_or_white", [((0, 255, 128), True), ((0, 255, 128, 1), False)])
def test_the_sampler_is_another_where_most_is_black_or_white(levels, black_or_white):
    model = ModelArguments()
    scheduler = model.make_scheduler()
    sampler = model.make_sampler(scheduler, painted(*levels))
    assert isinstance(sampler, FewStepDDPMScheduler if black_or_white else DPMSolverMultistepScheduler)
    assert torch.equal(sampler.alphas_cumprod, scheduler.alphas_cumprod)
    assert sampler.config.thresholding and sampler.config.sample_max_value == 1


def test_alpha_and_pure_colors_are_neither_black_nor_white():
    model = ModelArguments()
    transparent = [Image.new("LA", (4, 4), (grey, 255)) for grey in (100, 150)]
    colored = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "yellow")]
    for images in (transparent, colored):
        sampler = model.make_sampler(model.make_scheduler(), PictureDataset(images, "painted"))
        assert isinstance(sampler, DPMSolverMultistepScheduler)


def test_a_learned_variance_is_sampled_with_by_algorithm_2():
    model = ModelArguments(learn_variance=True)
    scheduler = model.make_scheduler()
    assert model.make_sampler(scheduler, painted(0)) is scheduler


@pytest.mark.parametrize("levels", [(0, 255, 128), (0, 255, 128, 1)])
def test_the_sampler_with_a_classifier_takes_steps_of_first_order(levels):
    model = ModelArguments()
    sampler = model.make_sampler(model.make_scheduler(), painted(*levels))
    guided = sampler_with_classifier(sampler)
    assert isinstance(guided, DPMSolverMultistepScheduler)
    assert guided.config.solver_order == 1 and guided.config.algorithm_type == "sde-dpmsolver++"
    assert guided.config.use_lu_lambdas == isinstance(sampler, FewStepDDPMScheduler)
    assert torch.equal(guided.alphas_cumprod, sampler.alphas_cumprod)
    ancestral = AncestralDDPMScheduler()
    assert type(sampler_with_classifier(ancestral)) is AncestralDDPMScheduler


def test_sizes_that_cannot_be_halved_and_levels_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="resolution 30x30: .* such as 24x24 or 32x32"):
        ModelArguments(block_out_channels=[32, 64, 64]).make_unet(blank((30, 30)))
    with pytest.raises(ValueError, match="attention_levels: 3 is not one of the levels 0 to 2"):
        ModelArguments(attention_levels=[3]).make_unet(blank((32, 32)))
    for patch_size in (0, -2):
        with pytest.raises(ValueError, match=f"patch_size: {patch_size} is not positive"):
            ModelArguments(patch_size=patch_size).make_unet(blank((32, 32)))


@pytest.mark.parametrize(
    "resolution, patch_size, levels, levels_with_text",
    [((16, 16), 1, [2], [2]), ((32, 32), 2, [2], [2]), ((12, 12), 1, [2], [2]), ((8, 12), 1, [2], [2]),
     ((8, 8), 1, [], [2]), ((4, 4), 1, [], [1]), ((8, 8), 2, [], [1]), ((1, 1), 1, [], [0])],
)  # fmt: skip
def test_attention_is_where_kernels_do_not_see_the_picture_and_where_a_text_comes_in(
    resolution, patch_size, levels, levels_with_text
):
    model = ModelArguments(patch_size=patch_size)
    for has_text, expected in ((False, levels), (True, levels_with_text)):
        attention_levels = model.architecture(3, resolution, False, has_text)["attention_levels"]
        assert [level for level, has_attention in enumerate(attention_levels) if has_attention] == expected
    text = model.make_unet(blank(resolution), cross_attention_dim=8)
    assert any("cross_attention" in name for name, _ in text.named_modules())


@pytest.mark.parametrize(
    "process", [{}, {"beta_schedule": "sigmoid"}, {"beta_schedule": "laplace", "num_train_timesteps": 100},
                {"beta_end": 0.03, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}],
)  # fmt: skip
def test_a_classifier_guides_the_model_of_its_noise_after_a_journey_over_disk(process, tmp_path):
    scheduler = AncestralDDPMScheduler(**process)
    images = [Image.new("RGB", (8, 8))] * 2
    dataset = PictureDataset(images, "blank", labels=torch.arange(2), label_names=["a", "b"])
    network = NetworkArguments(block_out_channels=[16, 32])
    first, again, other = (network.make_classifier(dataset, scheduler, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.conv_in.weight, again.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)
    ClassifierGuidedPipeline(tiny_unet(), first, scheduler).save_pretrained(tmp_path)
    assert ClassifierGuidedPipeline.from_pretrained(tmp_path).num_classes == 2
    with pytest.raises(ValueError, match="classifier: it was trained on the noise of another schedule"):
        ClassifierGuidedPipeline(tiny_unet(), first, AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2"))


class TestAutoencoders:
    @pytest.mark.parametrize("kind", [Autoencoder, VariationalAutoencoder])
    @pytest.mark.parametrize(
        "resolution, options, factor",
        [
            ((28, 28), {}, 4), ((32, 32), {}, 4), ((24, 16), {}, 4), ((30, 22), {"downsampling_factor": 2}, 2),
            ((64, 64), {}, 8), ((64, 72), {}, 8), ((64, 68), {}, 4), ((128, 56), {}, 4),
            ((15, 21), {"downsampling_factor": 1}, 1),
            ((28, 28), {"vector_latents": True}, 4), ((24, 16), {"vector_latents": True}, 8),
            ((15, 9), {"vector_latents": True}, 1), ((32, 32), {"downsampling_factor": 16}, 16),
            ((32, 32), {"downsampling_factor": 2}, 2), ((32, 32), {"downsampling_factor": 1}, 1),
            ((16, 16), {"downsampling_factor": 8, "autoencoder_channels": [16, 32, 32]}, 8),
        ],
    )  # fmt: skip
    def test_fit_the_pictures(self, kind, resolution, options, factor):
        arguments = AutoencoderArguments(latent_channels=3, **options)
        vae = arguments.make_autoencoder(kind, blank(resolution, channels=1))
        height, width = resolution
        size = (1, 1) if arguments.vector_latents else (height // factor, width // factor)
        assert vae.downsampling_factor == factor and vae.latent_shape(*resolution) == (3, *size)
        x = torch.zeros(2, 1, *resolution)
        assert encode(vae, x).shape == (2, 2, 3, *size) and vae(x).sample.shape == x.shape
        assert all(width % (16 * vae.config.norm_num_groups) == 0 for width in vae.config.block_out_channels)

    def test_of_one_seed_are_the_same_and_take_further_options(self):
        make = AutoencoderArguments().make_autoencoder
        options = {"likelihood": "bernoulli"}
        first, again, other = (
            make(VariationalAutoencoder, blank((8, 8), channels=1), seed=seed, **options) for seed in (0, 0, 1)
        )
        assert first.config.likelihood == "bernoulli"
        assert torch.equal(first.encoder.conv_in.weight, again.encoder.conv_in.weight)
        assert not torch.equal(first.encoder.conv_in.weight, other.encoder.conv_in.weight)

    @pytest.mark.parametrize(
        "resolution, options, message",
        [
            ((32, 32), {"downsampling_factor": 3}, "downsampling_factor: 3 is not one of 1, 2, 4, 8, ..."),
            ((32, 32), {"downsampling_factor": 0}, "downsampling_factor: 0 is not one of 1, 2, 4, 8, ..."),
            ((32, 32), {"downsampling_factor": -4}, "downsampling_factor: -4 is not one of 1, 2, 4, 8, ..."),
            ((30, 15), {}, "downsampling_factor: images of 30x15 cannot be halved twice; give --resolution 32x16"),
            ((28, 28), {"downsampling_factor": 8}, "resolution 28x28: .* such as 24x24 or 32x32"),
            ((15, 15), {"downsampling_factor": 2}, "resolution 15x15: .* such as 14x14 or 16x16"),
            (
                (32, 32),
                {"autoencoder_channels": [16]},
                "autoencoder_channels: 1 widths for a downsampling_factor of 4, which takes 2",
            ),
            (
                (15, 15),
                {"downsampling_factor": 1, "autoencoder_channels": [16, 32]},
                "autoencoder_channels: 2 widths for a downsampling_factor of 1, which takes 1",
            ),
        ],
    )
    def test_that_do_not_fit_are_refused(self, resolution, options, message):
        with pytest.raises(ValueError, match=message):
            AutoencoderArguments(**options).make_autoencoder(Autoencoder, blank(resolution))

    @pytest.mark.parametrize("likelihood", ["discretised_gaussian", "bernoulli"])
    def test_of_measured_values_have_no_likelihood_of_8_bits(self, likelihood):
        measured = blank((8, 8)).with_value_range({"low": [0.0] * 3, "high": [1.0] * 3})
        with pytest.raises(ValueError, match=f"likelihood: '{likelihood}' is for images of 8 bits"):
            AutoencoderArguments().make_autoencoder(VariationalAutoencoder, measured, likelihood=likelihood)

    def test_of_colour_images_have_no_bernoulli_likelihood(self):
        with pytest.raises(ValueError, match="likelihood: 'bernoulli' is for black and white or grey images"):
            AutoencoderArguments().make_autoencoder(VariationalAutoencoder, blank((8, 8)), likelihood="bernoulli")


class TestOfLatents:
    @pytest.fixture
    def vae(self):
        return tiny_autoencoder(sample_size=(8, 12), in_channels=1)

    @pytest.mark.parametrize("learn_variance", [False, True])
    def test_are_clipped_by_no_sampler(self, vae, learn_variance):
        latents = LatentDataset(PictureDataset([Image.new("L", (12, 8), i) for i in range(4)], "greys"), vae)
        model = ModelArguments(learn_variance=learn_variance, block_out_channels=[16])
        scheduler = model.make_scheduler()
        sampler = model.make_sampler(scheduler, latents)
        assert torch.equal(sampler.alphas_cumprod, scheduler.alphas_cumprod)
        sampler.set_timesteps(20)
        t, rng = sampler.timesteps[10], torch.Generator().manual_seed(0)
        x_t, v = (5 * torch.randn(2, 2, 4, 6, generator=rng) for _ in range(2))
        alpha_bar = scheduler.alphas_cumprod[t]
        x_0 = alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v
        assert x_0.abs().max() > 5
        if learn_variance:
            prediction = torch.cat([v, torch.zeros_like(v)], dim=1)
            predicted = sampler.step(prediction, t, x_t, generator=rng).pred_original_sample
        else:
            sampler.step(v, t, x_t, generator=rng)
            (predicted,) = (x for x in sampler.model_outputs if x is not None)
        torch.testing.assert_close(predicted, x_0, rtol=1e-4, atol=1e-4)

    def test_get_a_network_of_their_size_without_patches_or_frequencies(self, vae):
        latents = LatentDataset(PictureDataset([Image.new("L", (12, 8), i) for i in range(4)], "greys"), vae)
        unet = ModelArguments().make_unet(latents)
        assert (unet.config.in_channels, unet.config.out_channels, unet.config.patch_size) == (2, 2, 1)
        for bound in ({"learn_variance": True}, {"weighting": "vlb"}):
            with pytest.raises(
                ValueError,
                match="vae: --learn_variance and --weighting vlb minimise the variational bound",
            ):
                ModelArguments(**bound).make_unet(latents)
        assert tuple(unet.config.sample_size) == (4, 6) and not unet.config.fourier_frequencies
