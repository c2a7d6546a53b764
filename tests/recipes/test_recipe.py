from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from tiny import tiny_autoencoder, tiny_classifier, tiny_unet, tiny_vae

from hf_genmod import (
    Autoencoder,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    FewStepDDPMScheduler,
    UnconditionalPipeline,
    VariationalAutoencoder,
)
from hf_genmod.data.latents import LatentDataset, encode
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.value_range import to_model_range
from hf_genmod.evaluation.recognition import report_accuracy
from hf_genmod.recipes.networks import AutoencoderArguments, ModelArguments, NetworkArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler


def pictures(resolution, channels=3):
    return SimpleNamespace(resolution=resolution, channels=channels, vae=None, value_range=None)


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


def test_sizes_that_cannot_be_halved_and_levels_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="resolution 30x30: .* such as 24x24 or 32x32"):
        ModelArguments(block_out_channels=[32, 64, 64]).make_unet(blank((30, 30)))
    with pytest.raises(ValueError, match="attention_levels: 3 is not one of the levels 0 to 2"):
        ModelArguments(attention_levels=[3]).make_unet(blank((32, 32)))


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
        attention_levels = model.architecture(pictures(resolution), has_text)["attention_levels"]
        assert [level for level, has_attention in enumerate(attention_levels) if has_attention] == expected
    text = model.make_unet(blank(resolution), cross_attention_dim=8)
    assert any("cross_attention" in name for name, _ in text.named_modules())


def save_class_folders(folder, **counts):
    for split, count in counts.items():
        for index in range(count):
            file = folder / split / "ab"[index % 2] / f"{index:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), index % 256).save(file)


def test_held_out_pictures_are_those_of_the_test_split(tmp_path):
    save_class_folders(tmp_path, train=6, test=300)
    training, held_out = DataArguments(dataset=str(tmp_path)).load(require_labels=True)
    assert len(training) == 6 and len(held_out) == 256  # at even distances
    assert held_out.images[:8, 0, 0, 0].tolist() == [0, 2, 4, 6, 8, 10, 14, 16]  # of class a, which has the even ones
    training, held_out = DataArguments(dataset=str(tmp_path), split="test", validation_split="train").load()
    assert (len(training), len(held_out)) == (300, 6)
    assert DataArguments(dataset=str(tmp_path / "train")).load()[1] is None


def test_held_out_pictures_are_mapped_as_the_others_are(tmp_path):
    for split, value in (("train", 1.0), ("test", 3.0)):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "0.npy", np.array([[0.0, value]]))
    training, held_out = DataArguments(dataset=str(tmp_path)).load()
    assert training[0]["images"].tolist() == [[[-1.0, 1.0]]] and held_out[0]["images"].tolist() == [[[-1.0, 5.0]]]


def test_held_out_pictures_of_other_classes_are_refused(tmp_path):
    save_class_folders(tmp_path, train=4)
    rows = [{"image": Image.new("L", (4, 4)), "label": 0}] * 2
    for split, names in (("train", ["a", "b"]), ("test", ["a", "c"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        saved = datasets.Dataset.from_list(rows, features=features)
        saved.save_to_disk(tmp_path / "saved" / split)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="the classes of 'test' are not those of 'train'"):
        DataArguments(dataset=str(tmp_path / "saved")).load(require_labels=True)


def test_where_there_is_no_held_out_split_a_tenth_is_held_out_on_demand(tmp_path):
    save_class_folders(tmp_path / "few", train=45)
    training, held_out = DataArguments(dataset=str(tmp_path / "few")).load_in_pixels(hold_out=True)
    assert (len(training), len(held_out)) == (40, 5)
    training, held_out = DataArguments(dataset=str(tmp_path / "few")).load_in_pixels(num_held_out=3, hold_out=True)
    assert (len(training), len(held_out)) == (42, 3)
    save_class_folders(tmp_path / "both", train=45, test=10)
    training, held_out = DataArguments(dataset=str(tmp_path / "both")).load_in_pixels(hold_out=True)
    assert (len(training), len(held_out)) == (45, 10)


def test_a_class_without_pictures_to_train_on_is_named(tmp_path):
    save_class_folders(tmp_path, train=4, test=6)
    (tmp_path / "test" / "c").mkdir()
    (tmp_path / "test" / "b" / "001.png").rename(tmp_path / "test" / "c" / "001.png")
    with pytest.warns(UserWarning, match="no picture is of c, which a model thus cannot learn"):
        training, _ = DataArguments(dataset=str(tmp_path)).load(require_labels=True)
    assert training.label_names == ["a", "b", "c"]


class TestPicturesForAModel:
    @pytest.fixture
    def folder(self, tmp_path):
        save_class_folders(tmp_path / "pictures", train=20)
        return str(tmp_path / "pictures")

    def test_come_as_its_network_sees_them(self, folder):
        model = UnconditionalPipeline(tiny_unet(sample_size=(16, 8)), AncestralDDPMScheduler())
        training, held_out = DataArguments(dataset=folder).load_for(model)
        for pictures, count in ((training, 18), (held_out, 2)):
            assert (len(pictures), pictures.resolution, pictures.channels) == (count, (16, 8), 3)
            assert pictures.label_names == ["a", "b"]

    def test_of_measured_values_are_mapped_as_its_own_were(self, tmp_path):
        for i in range(20):
            (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
            np.save(tmp_path / "ab"[i % 2] / f"{i}.npy", np.full((5, 8, 8), float(i)))
        ranges = {"low": [0.0] * 5, "high": [100.0] * 5}
        model = UnconditionalPipeline(
            tiny_unet(in_channels=5, out_channels=5), AncestralDDPMScheduler(), value_range=ranges
        )
        training, held_out = DataArguments(dataset=str(tmp_path)).load_for(model)
        values = {round(row, 4) for pictures in (training, held_out) for row in
                  pictures.__getitems__(range(len(pictures)))["images"][:, 0, 0, 0].tolist()}  # fmt: skip
        assert values == {round(2 * i / 100 - 1, 4) for i in range(20)}
        plain = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
        with pytest.raises(ValueError, match="it holds measured values of 5 channels, which stay as they are"):
            DataArguments(dataset=str(tmp_path)).load_for(plain)
        other = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler(), value_range=ranges)
        with pytest.raises(ValueError, match="dataset: the model was trained on 3 channels, and these are 5"):
            DataArguments(dataset=str(tmp_path)).load_for(other)

    def test_of_8_bits_do_not_do_for_measured_values(self, folder):
        ranges = {"low": [0.0] * 5, "high": [1.0] * 5}
        unet = tiny_unet(in_channels=5, out_channels=5)
        model = UnconditionalPipeline(unet, AncestralDDPMScheduler(), value_range=ranges)
        with pytest.raises(ValueError, match="dataset: the model was trained on measured values, and these are not"):
            DataArguments(dataset=folder).load_for(model)

    @pytest.mark.parametrize(
        "arguments",
        [{"resolution": "16"}, {"channels": 1}],
    )
    def test_of_another_size_are_refused(self, folder, arguments):
        model = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
        data = DataArguments(dataset=folder, **arguments)
        for load in (data.load_for, data.load_more_for):
            with pytest.raises(ValueError, match="resolution: the model was trained on 8x8 pictures of 3 channels"):
                load(model)

    def test_of_other_labels_are_refused(self, folder):
        model = ClassifierFreeGuidedPipeline(
            tiny_unet(num_classes=2), AncestralDDPMScheduler(), id2label={0: "a", 1: "c"}
        )
        with pytest.raises(ValueError, match="for_model: its labels are a, c, and those of the pictures a, b; choose"):
            DataArguments(dataset=folder).load_for(model)

    def test_of_an_autoencoder_there_are_none(self, folder):
        with pytest.raises(ValueError, match="the model is an autoencoder and no diffusion model"):
            DataArguments(dataset=folder).load_for(AutoencoderPipeline(tiny_autoencoder()))

    def test_more_of_them_may_be_of_other_classes_or_none(self, folder, tmp_path):
        model = ClassifierFreeGuidedPipeline(
            tiny_unet(num_classes=2), AncestralDDPMScheduler(), id2label={0: "x", 1: "y"}
        )
        more = DataArguments(dataset=folder).load_more_for(model)
        assert more.label_names == ["a", "b"] and (more.channels, *more.resolution) == (3, 8, 8)
        (tmp_path / "alone").mkdir()
        Image.new("RGB", (20, 10), "red").save(tmp_path / "alone" / "red.png")
        alone = DataArguments(dataset=str(tmp_path / "alone")).load_more_for(model)
        assert alone.labels is None and len(alone) == 1


@pytest.mark.parametrize(
    "process", [{}, {"beta_schedule": "sigmoid"}, {"beta_schedule": "laplace", "num_train_timesteps": 100},
                {"beta_end": 0.03, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}],
)  # fmt: skip
def test_a_classifier_guides_the_model_of_its_noise_after_a_journey_over_disk(process, tmp_path):
    scheduler = AncestralDDPMScheduler(**process)
    dataset = SimpleNamespace(resolution=(8, 8), channels=3, label_names=["a", "b"], vae=None)
    network = NetworkArguments(block_out_channels=[16, 32])
    first, again, other = (network.make_classifier(dataset, scheduler, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.conv_in.weight, again.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)
    ClassifierGuidedPipeline(tiny_unet(), first, scheduler).save_pretrained(tmp_path)
    assert ClassifierGuidedPipeline.from_pretrained(tmp_path).num_classes == 2
    with pytest.raises(ValueError, match="classifier: it was trained on the noise of another schedule"):
        ClassifierGuidedPipeline(tiny_unet(), first, AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2"))


def test_the_report_of_a_classifier_is_a_table_and_a_picture_of_the_curve(tmp_path, capsys):
    held_out = PictureDataset(
        [Image.new("RGB", (8, 8), (i, i, i)) for i in range(30)], "greys", labels=torch.arange(30) % 3,
        label_names=["a", "b", "c"],
    )  # fmt: skip
    report_accuracy(tiny_classifier(), AncestralDDPMScheduler(), held_out, tmp_path / "new" / "accuracy.png")
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["t", "noise", "level", "σ", "accuracy"]
    assert len(rows) == 11 and all("n = 30)" in row for row in rows)
    assert [int(row.split()[0]) for row in rows] == torch.linspace(0, 999, 11).round().int().tolist()
    assert last == f"{tmp_path / 'new' / 'accuracy.png'} shows the curve"
    with Image.open(tmp_path / "new" / "accuracy.png") as picture:
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 10  # not blank


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
        vae = arguments.make_autoencoder(kind, pictures(resolution, channels=1))
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
            make(VariationalAutoencoder, pictures((8, 8)), seed=seed, **options) for seed in (0, 0, 1)
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
            ((30, 15), {}, "downsampling_factor: pictures of 30x15 cannot be halved twice; give --resolution 32x16"),
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
            AutoencoderArguments(**options).make_autoencoder(Autoencoder, pictures(resolution))

    @pytest.mark.parametrize("likelihood", ["discretised_gaussian", "bernoulli"])
    def test_of_measured_values_have_no_likelihood_of_8_bits(self, likelihood):
        measured = SimpleNamespace(**{**vars(pictures((8, 8))), "value_range": {"low": [0.0] * 3, "high": [1.0] * 3}})
        with pytest.raises(ValueError, match=f"likelihood: '{likelihood}' is of pictures of 8 bits"):
            AutoencoderArguments().make_autoencoder(VariationalAutoencoder, measured, likelihood=likelihood)


def colored_folder(folder, size=(8, 12), **counts):
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for index in range(count):
            file = folder / split / "ab"[index % 2] / f"{index:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)).save(file)
    return str(folder)


class TestLatents:
    @pytest.fixture
    def vae(self):
        return tiny_autoencoder(sample_size=(8, 12), in_channels=1)

    def test_have_the_size_and_channels_of_the_autoencoder_and_factors_of_the_training_pictures(self, vae, tmp_path):
        AutoencoderPipeline(vae).save_pretrained(tmp_path / "vae")
        folder = colored_folder(tmp_path / "pictures", (20, 10), train=40, test=7)
        arguments = DataArguments(dataset=folder, channels=1)
        training, held_out = arguments.load(require_labels=True, vae=str(tmp_path / "vae"))
        for latents, count in ((training, 40), (held_out, 7)):
            assert (latents.pictures.resolution, latents.pictures.channels) == ((8, 12), 1)
            assert (len(latents), latents.resolution, latents.channels) == (count, (4, 6), 2)
            assert latents.label_names == ["a", "b"] and not latents.mirrored
        assert held_out.vae is training.vae
        mean, std = training.__getitems__(range(40))["posteriors"].double().unbind(2)
        assert abs(mean.mean().item()) < 1e-4
        assert (mean**2 + std**2).mean().item() == pytest.approx(1, abs=1e-3)
        both = arguments.load(vae=str(tmp_path / "vae"), mirrored=True)
        assert all(latents.mirrored for latents in both)
        only = DataArguments(dataset=f"{folder}/train", channels=1)
        assert only.load(vae=str(tmp_path / "vae"))[1] is None

    def test_may_be_of_another_size_than_the_autoencoder_was_made_for(self, vae, tmp_path):
        vae.save_pretrained(tmp_path / "vae")
        folder = colored_folder(tmp_path / "pictures", train=4)
        training, _ = DataArguments(dataset=folder, resolution="16x20", channels=1).load(vae=str(tmp_path / "vae"))
        assert training.resolution == (8, 10)
        for arguments, message in (
            ({"resolution": "9", "channels": 1}, "resolution 9x9: .* such as 8x8 or 10x10"),
            ({"channels": 3}, "vae: it takes images of 1 channels, and these have 3"),
            ({}, "vae: it is for grey pictures, and some of .* are stored in colour; .* give --channels 1"),
        ):
            with pytest.raises(ValueError, match=message):
                DataArguments(dataset=folder, **arguments).load(vae=str(tmp_path / "vae"))

    def test_of_an_autoencoder_of_diffusers_have_the_size_of_the_data(self, tmp_path):
        tiny_vae().save_pretrained(tmp_path / "vae")  # its sample_size is 32, whatever it was trained on
        folder = colored_folder(tmp_path / "pictures", train=4)
        training, _ = DataArguments(dataset=folder).load(vae=str(tmp_path / "vae"))
        assert (training.pictures.resolution, training.resolution) == ((8, 12), (4, 6))

    def test_of_grey_pictures_may_be_those_of_an_autoencoder_of_coloured_ones(self, tmp_path):
        tiny_vae().save_pretrained(tmp_path / "vae")
        (tmp_path / "greys").mkdir()
        for i in range(4):
            Image.new("L", (12, 8), 60 * i).save(tmp_path / "greys" / f"{i}.png")
        training, _ = DataArguments(dataset=str(tmp_path / "greys")).load(vae=str(tmp_path / "vae"))
        assert training.pictures.channels == 3

    def test_of_measured_values_are_in_the_units_of_the_autoencoder(self, vae, tmp_path):
        (tmp_path / "values").mkdir()
        for i in range(4):
            np.save(tmp_path / "values" / f"{i}.npy", np.linspace(0, 30, 96).reshape(8, 12))
        ranges = {"low": [0.0], "high": [60.0]}
        AutoencoderPipeline(vae, ranges).save_pretrained(tmp_path / "vae")
        vae.save_pretrained(tmp_path / "alone")
        data = DataArguments(dataset=str(tmp_path / "values"))
        latents, _ = data.load(vae=str(tmp_path / "vae"))
        assert latents.value_range == ranges
        seen = latents.pictures.__getitems__([0])["images"]
        torch.testing.assert_close(seen.flatten(), torch.linspace(-1, 0, 96))
        with pytest.raises(ValueError, match="vae: it was trained on pictures of 8 bits, and these are not"):
            data.load(vae=str(tmp_path / "alone"))

    def test_for_a_classifier_are_those_that_the_model_was_trained_on(self, vae, tmp_path):
        vae.register_to_config(scaling_factor=0.5, shift_factor=-0.25)
        unet = tiny_unet(in_channels=2, out_channels=2, sample_size=(4, 6))
        pipeline = UnconditionalPipeline(unet, AncestralDDPMScheduler(clip_sample=False), vae)
        folder = colored_folder(tmp_path, (20, 10), train=20)
        for latents, count in zip(DataArguments(dataset=folder).load_for(pipeline), (18, 2), strict=True):
            assert isinstance(latents, LatentDataset) and latents.vae is vae and len(latents) == count
            x = to_model_range(latents.pictures.__getitems__([1])["images"])
            assert x.shape == (1, 1, 8, 12)
            mean, std = encode(vae, x).unbind(1)
            expected = torch.stack([(mean + 0.25) * 0.5, std * 0.5], dim=1)[:, None]
            torch.testing.assert_close(latents.__getitems__([1])["posteriors"], expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="resolution: the model was trained on 8x12 pictures of 1 channels"):
            DataArguments(dataset=folder, resolution="8").load_for(pipeline)

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
            with pytest.raises(ValueError, match="vae: the variational bound.* is that of pictures of 8 bits"):
                ModelArguments(**bound).make_unet(latents)
        assert tuple(unet.config.sample_size) == (4, 6) and not unet.config.fourier_frequencies
