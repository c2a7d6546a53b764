import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_classifier, tiny_unet

from hf_genmod import ClassifierFreeGuidedPipeline, ClassifierGuidedPipeline, UnconditionalPipeline
from hf_genmod.data import PictureDataset
from hf_genmod.recipe import (
    DataArguments,
    ModelArguments,
    NetworkArguments,
    draw_images,
    one_line_errors,
    parse_arguments,
    report_accuracy,
)
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.training import TrainingConfig


def pictures(resolution, channels=3):
    return SimpleNamespace(resolution=resolution, channels=channels, vae=None)


def painted(*levels):
    """Pictures of one grey level each."""
    return PictureDataset([Image.new("L", (4, 4), level) for level in levels], "painted")


@pytest.mark.parametrize(
    "resolution, patch_size, widths",
    [((32, 32), 2, (48, 96, 144)), ((28, 28), 2, (96, 144)), ((64, 48), 2, (48, 96, 144)), ((20, 12), 2, (96, 144)),
     ((30, 30), 2, (144,)), ((15, 15), 1, (144,))],
)  # fmt: skip
def test_the_default_unet_fits_the_pictures(resolution, patch_size, widths):
    unet = ModelArguments().make_unet(pictures(resolution, channels=1))
    assert (unet.config.patch_size, unet.config.block_out_channels) == (patch_size, widths)
    assert unet(torch.zeros(2, 1, *resolution), 5).sample.shape == (2, 1, *resolution)


@pytest.mark.parametrize("widths", [[64, 128], [32, 64, 96], [48], [40, 80], [24], [160, 320]])
def test_any_widths_are_normalised_in_large_groups(widths):
    config = ModelArguments(block_out_channels=widths).make_unet(pictures((16, 16))).config
    assert all(width % (16 * config.norm_num_groups) == 0 for width in widths) or config.norm_num_groups == 1


def test_the_same_seed_makes_the_same_unet():
    first, again, other = (ModelArguments().make_unet(pictures((8, 8)), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.conv_in.weight, again.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)


def test_a_learned_variance_doubles_the_outputs_and_is_known_to_the_scheduler():
    model = ModelArguments(learn_variance=True)
    assert model.make_unet(pictures((16, 16))).config.out_channels == 6
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


@pytest.mark.parametrize("levels, in_log_sigma", [((0, 255, 128), True), ((0, 255, 128, 1), False)])
def test_steps_are_even_in_log_sigma_where_most_is_black_or_white(levels, in_log_sigma):
    model = ModelArguments()
    sampler = model.make_sampler(model.make_scheduler(), painted(*levels))
    sampler.set_timesteps(20)
    log_sigma, t = sampler.sigmas[:-1].log(), sampler.timesteps.float()
    assert (log_sigma.diff().std() < 1e-3) == in_log_sigma
    assert (t.diff().std() < 1e-3) == (not in_log_sigma)


def test_alpha_and_pure_colors_are_neither_black_nor_white():
    model = ModelArguments()
    transparent = [Image.new("LA", (4, 4), (grey, 255)) for grey in (100, 150)]
    colored = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "yellow")]
    for images in (transparent, colored):
        sampler = model.make_sampler(model.make_scheduler(), PictureDataset(images, "painted"))
        assert not sampler.config.use_lu_lambdas


def test_a_learned_variance_is_sampled_with_by_algorithm_2():
    model = ModelArguments(learn_variance=True)
    scheduler = model.make_scheduler()
    assert model.make_sampler(scheduler, painted(0)) is scheduler


DRAW = """
import sys
sys.path.insert(0, {tests!r})
import torch
from accelerate import PartialState
from hf_genmod.recipe import draw_images
from test_recipe import tiny_pipeline

state = PartialState(cpu=True)
images = draw_images(tiny_pipeline(), [0, 1, 2, 0, 1], seed=3, num_inference_steps=3)
for i, image in enumerate(images):
    image.save(f"{folder}/{{state.process_index}}-{{i}}.png")

class Broken:
    def __call__(self, class_labels, **kwargs):
        if 1 in class_labels:
            raise ZeroDivisionError("no picture")
        return tiny_pipeline()(class_labels, num_inference_steps=1, **kwargs)

try:
    draw_images(Broken(), [0, 1])
except RuntimeError as error:
    open(f"{folder}/error-{{state.process_index}}", "w").write(str(error))
state.destroy_process_group()
"""


def tiny_pipeline():
    pipeline = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=3), ModelArguments().make_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_two_processes_share_the_drawing_of_the_same_pictures(tmp_path):
    script = tmp_path / "draw.py"
    script.write_text(DRAW.format(tests=os.path.dirname(__file__), folder=tmp_path))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    alone = draw_images(tiny_pipeline(), [0, 1, 2, 0, 1], seed=3, num_inference_steps=3)
    for process in (0, 1):
        assert (tmp_path / f"error-{process}").read_text() == "ZeroDivisionError: no picture"
        for i, image in enumerate(alone):
            other = np.asarray(Image.open(tmp_path / f"{process}-{i}.png"), dtype=int)
            assert abs(other - np.asarray(image)).max() <= 1  # of 255, as rounding differs with the size of a batch
    assert len({image.tobytes() for image in alone}) == 5


def test_sizes_that_cannot_be_halved_and_levels_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="resolution 30x30: .* such as 24x24 or 32x32"):
        ModelArguments(block_out_channels=[32, 64, 64]).make_unet(pictures((30, 30)))
    with pytest.raises(ValueError, match="attention_levels: 3 is not one of the levels 0 to 2"):
        ModelArguments(attention_levels=[3]).make_unet(pictures((32, 32)))


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("dataset: mine\nmax_train_steps: 7\nlearning_rate: 1e-4\nblock_out_channels: [16, 32]\n")
    argv = ["--config", str(file), "--dataset", "other", "--horizontal_flip"]
    data, model, config = parse_arguments(DataArguments, ModelArguments, TrainingConfig, argv=argv)
    assert data == DataArguments(dataset="other")
    assert model == ModelArguments(block_out_channels=[16, 32])
    assert config == TrainingConfig(max_train_steps=7, learning_rate=1e-4, horizontal_flip=True)


def test_what_a_run_writes_down_is_a_settings_file(tmp_path):
    data, model = DataArguments(resolution="16x8"), ModelArguments(block_out_channels=[8, 16], learn_variance=True)
    config = TrainingConfig(max_train_steps=3, ema_length=0.1)
    sections = {"training": config, "data": data, "model": model}
    written = {name: dataclasses.asdict(section) for name, section in sections.items()}
    file = tmp_path / "training_config.json"
    file.write_text(json.dumps({**written, "pictures": {"name": "shapes", "num_pictures": 3}}, indent=2))
    parsed = parse_arguments(DataArguments, ModelArguments, TrainingConfig, argv=["--config", str(file)])
    assert parsed == (data, model, config)


@pytest.mark.parametrize("text, message", [("a: [1", "not a YAML file"), ("- a\n- b", "holds no settings")])
def test_a_file_that_holds_no_settings_is_named(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"settings.yaml: {message}"):
        parse_arguments(TrainingConfig, argv=["--config", str(file)])


def test_an_unknown_setting_in_the_file_is_named(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("max_train_step: 7\n")
    with pytest.raises(ValueError, match="'max_train_step' is not a setting"):
        parse_arguments(TrainingConfig, argv=["--config", str(file)])


def test_a_mistake_ends_a_script_with_one_line(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise ValueError("batch_size: 0 is not positive")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: batch_size: 0 is not positive\n"


def test_an_interrupted_set_up_ends_with_one_sentence(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


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
    training, held_out = DataArguments(dataset=str(tmp_path / "few")).load_in_pixels(False, hold_out=True)
    assert (len(training), len(held_out)) == (40, 5)
    training, held_out = DataArguments(dataset=str(tmp_path / "few")).load_in_pixels(
        False, hold_out=True, num_held_out=3
    )
    assert (len(training), len(held_out)) == (42, 3)
    save_class_folders(tmp_path / "both", train=45, test=10)
    training, held_out = DataArguments(dataset=str(tmp_path / "both")).load_in_pixels(False, hold_out=True)
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
        with pytest.raises(ValueError, match="for_model: it was trained on 3 channels, and these are 5"):
            DataArguments(dataset=str(tmp_path)).load_for(other)

    def test_of_8_bits_do_not_do_for_measured_values(self, folder):
        ranges = {"low": [0.0] * 5, "high": [1.0] * 5}
        unet = tiny_unet(in_channels=5, out_channels=5)
        model = UnconditionalPipeline(unet, AncestralDDPMScheduler(), value_range=ranges)
        with pytest.raises(ValueError, match="for_model: it was trained on measured values, and these are not"):
            DataArguments(dataset=folder).load_for(model)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (
                {"resolution": "16"},
                "for_model: it was trained on 8x8 pictures of 3 channels, and so is its classifier",
            ),
            ({"channels": 1}, "for_model: it was trained on 8x8 pictures of 3 channels, and so is its classifier"),
        ],
    )
    def test_of_another_size_are_refused(self, folder, arguments, message):
        model = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
        with pytest.raises(ValueError, match=message):
            DataArguments(dataset=folder, **arguments).load_for(model)

    def test_of_other_labels_are_refused(self, folder):
        model = ClassifierFreeGuidedPipeline(
            tiny_unet(num_classes=2), AncestralDDPMScheduler(), id2label={0: "a", 1: "c"}
        )
        with pytest.raises(ValueError, match="for_model: its labels are a, c, and those of the pictures a, b; choose"):
            DataArguments(dataset=folder).load_for(model)


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
