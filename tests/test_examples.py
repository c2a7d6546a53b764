"""The examples, run as a person runs them."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import unittest.mock
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_autoencoder, tiny_classifier, tiny_text_pipeline, tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    NoisyImageClassifier,
    SuperResolutionPipeline,
    UnconditionalPipeline,
    VariationalAutoencoder,
    load_pipeline,
    load_vae,
)
from hf_genmod.data import shapes
from hf_genmod.evaluation.features import FeatureClassifier

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--resolution", "16", "--block_out_channels", "16", "32", "--layers_per_block", "1",
         "--batch_size", "8", "--sampling_steps", "0"]  # fmt: skip


def start(script, *arguments, **kwargs):
    """A script in a process of its own, as a person starts it."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **kwargs)


def run(script, *arguments):
    """The same in this process, as starting one takes seconds."""
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with (
        unittest.mock.patch.object(sys, "argv", [script, *map(str, arguments)]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
    return SimpleNamespace(returncode=status, stdout=output.getvalue(), stderr=errors.getvalue())


def error_of(script, *arguments):
    """The one sentence with which a script refuses its arguments."""
    done = run(script, *arguments)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return error


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    drawn = shapes.ShapesDataset(24, resolution=16)
    for i, row in enumerate(drawn[i] for i in range(24)):
        (folder / drawn.label_names[row["label"]]).mkdir(exist_ok=True)
        row["image"].convert("L").save(folder / drawn.label_names[row["label"]] / f"{i}.png")
    return folder


def test_training_on_a_folder_of_grey_class_folders_leaves_a_model_of_them(class_folders, tmp_path):
    done = run("train_cfg.py", "--dataset", class_folders, "--output_dir", tmp_path, "--max_train_steps", 3, *SMALL)
    assert done.returncode == 0, done.stderr
    pipe = load_pipeline(tmp_path)
    assert sorted(pipe.labels) == sorted(folder.name for folder in class_folders.iterdir())
    images = pipe(list(pipe.labels)[:2], num_inference_steps=2).images
    assert [(image.mode, image.size) for image in images] == [("L", (16, 16))] * 2

    again = run("train_cfg.py", "--dataset", class_folders, "--output_dir", tmp_path, "--max_train_steps", 4, *SMALL)
    assert again.returncode == 2
    assert "holds a different run (training.max_train_steps was 3, is 4)" in again.stderr


def test_training_without_labels_and_with_a_learned_variance_in_bf16(tmp_path):
    flags = ["--learn_variance", "--mixed_precision", "bf16", "--gradient_checkpointing", "--report_to", "tensorboard"]
    done = run("train_unconditional.py", "--output_dir", tmp_path / "run", "--max_train_steps", 2, *flags, *SMALL)
    assert done.returncode == 0, done.stderr
    (image,) = load_pipeline(tmp_path / "run")(num_inference_steps=2).images
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert list((tmp_path / "run" / "logs").rglob("events*"))


@pytest.fixture(scope="module")
def upsampler_run(class_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("upsampler") / "run"
    flags = ["--factor", "2", "--block_out_channels", "16", "32", "--batch_size", "4", "--with_labels"]
    command = ["train_upsampler.py", "--dataset", class_folders, "--output_dir", folder, "--license", "mit"]
    done = run(*command, "--max_train_steps", 2, "--sampling_steps", 1, *flags)
    assert done.returncode == 0, done.stderr
    return folder


def test_training_an_upsampler_on_full_size_pictures_leaves_one_of_them(class_folders, upsampler_run):
    pipe = load_pipeline(upsampler_run)
    assert type(pipe) is SuperResolutionPipeline
    assert (pipe.picture_shape, pipe.config.factor, pipe.config.max_noise_level) == ((1, 16, 16), 2, 250)
    assert sorted(pipe.labels) == sorted(folder.name for folder in class_folders.iterdir())
    (image,) = pipe(picture_of(class_folders), num_inference_steps=1).images
    assert (image.mode, image.size) == ("L", (32, 32))
    assert Image.open(upsampler_run / "samples" / "step-000001.png").size == (12 * 64, 8 * 64)
    card = (upsampler_run / "README.md").read_text()
    assert "enlarges images to 2 times their height and width" in card
    assert not (upsampler_run / "samples.png").exists()  # whose pictures would it show?


def test_an_upsampler_is_trained_on_crops_of_what_is_larger(tmp_path):
    flags = ["--resolution", "32x48", "--crop_size", "16", "--factor", "4", "--max_noise_level", "0"]
    small = ["--block_out_channels", "16", "32", "--batch_size", "4", "--sampling_steps", "0"]
    done = run("train_upsampler.py", *flags, *small, "--max_train_steps", 1, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    pipe = load_pipeline(tmp_path / "run")
    assert (pipe.picture_shape, pipe.config.max_noise_level) == ((3, 32, 48), 0)


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--factor", "3"], "error: factor: 3 is not one of 2, 4, 8"),
        (["--factor", "8", "--resolution", "20"], "error: factor: 8 does not divide 20x20; give --resolution 24x24"),
        (["--crop_size", "20"], "error: crop_size: 20 is not a multiple of 8 up to 32"),
        (["--crop_size", "64"], "error: crop_size: 64 is not a multiple of 8 up to 32"),
        (["--max_noise_level", "2000"], "error: max_noise_level: 2000 is not between 0 and 1000"),
        (["--dataset", "nowhere/at/all"], "error: nowhere/at/all"),
        (["--vae", "runs/vae"], "error: --vae: no such flag"),
    ],
)
def test_an_upsampler_that_cannot_be_trained_is_refused_in_one_sentence(flags, error, tmp_path):
    command = ["train_upsampler.py", "--output_dir", tmp_path / "run", "--max_train_steps", 1, "--resolution", "32"]
    assert error_of(*command, *flags).startswith(error)
    assert not (tmp_path / "run").exists()


class TestSamplingACascade:
    @pytest.fixture(scope="class")
    def base(self, upsampler_run, tmp_path_factory):
        labels = load_pipeline(upsampler_run).labels
        unet = tiny_unet(in_channels=1, out_channels=1, num_classes=len(labels))
        id2label = {index: name for name, index in labels.items()}
        pipe = ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(), id2label=id2label)
        folder = tmp_path_factory.mktemp("base")
        pipe.save_pretrained(folder)
        return folder

    def test_draws_small_pictures_and_enlarges_them(self, base, upsampler_run, tmp_path):
        flags = ["--class_labels", "circle", "1", "--count", "2", "--num_inference_steps", "1", "--noise_level", "50"]
        command = ["sample_cascade.py", "--base", base, "--upsamplers", upsampler_run, "--output_dir", tmp_path]
        done = run(*command, *flags)
        assert done.returncode == 0, done.stderr
        names = [f"{name}-{i}-16x16.png" for name in ("1", "circle") for i in range(2)]
        assert sorted(file.name for file in tmp_path.iterdir()) == [*names, "stages.png"]
        assert Image.open(tmp_path / "stages.png").size == (4 * 64, 2 * 64)
        assert done.stdout.strip() == f"4 drawn into {tmp_path}, beside stages.png"

    def test_enlarges_pictures_of_ones_own_in_tiles(self, upsampler_run, tmp_path):
        rng = np.random.default_rng(0)
        for name, size in (("a", (19, 30, 3)), ("b", (5, 4, 3))):
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / f"{name}.jpg")
        command = ["sample_cascade.py", "--upsamplers", upsampler_run, "--num_inference_steps", 1]
        files = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
        done = run(*command, "--images", *files, "--tile_size", 32, "--output_dir", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a-60x38.png", "b-8x10.png"]
        assert Image.open(tmp_path / "out" / "a-60x38.png").size == (60, 38)

    @pytest.mark.parametrize(
        "flags, error",
        [
            ([], "error: base: give either it, a model that draws, or --images to enlarge"),
            (["--images", "nowhere.png"], "error: [Errno 2] No such file"),
            (["--images", __file__], "error: cannot identify image file"),
            (["--images", "a/1.png", "b/1.png"], "error: images: two of them have one name"),
            (["--base", "{base}", "--prompts", "a cat"], "error: base: a ClassifierFreeGuidedPipeline is asked by"),
            (["--base", "{base}", "--class_labels", "sqare"], "error: class_labels: 'sqare' is not one of"),
            (["--base", "{base}", "--noise_level", "999"], "error: noise_level: 999 is not a whole number from 0"),
            (["--base", "{upsampler}"], "error: stages: one makes pictures of 16x16 pixels"),
            (["--base", "{base}", "--count", "0"], "error: count: 0 is not positive"),
        ],
    )
    def test_mistakes_are_one_sentence(self, base, upsampler_run, flags, error, tmp_path):
        flags = [flag.format(base=base, upsampler=upsampler_run) for flag in flags]
        command = ["sample_cascade.py", "--upsamplers", upsampler_run, "--output_dir", tmp_path / "out"]
        assert error_of(*command, *flags).startswith(error)
        assert not list(tmp_path.glob("out/*"))


def test_a_classifier_trained_for_a_model_guides_it(class_folders, tmp_path):
    model, both = tmp_path / "model", tmp_path / "both"
    pictures = ["--dataset", class_folders]
    done = run("train_unconditional.py", *pictures, "--output_dir", model, "--max_train_steps", 2, *SMALL)
    assert done.returncode == 0, done.stderr
    flags = ["--block_out_channels", "16", "32", "--batch_size", "8", "--sampling_steps", "0"]
    command = ["train_classifier.py", *pictures, "--for_model", model, "--output_dir", both, "--max_train_steps", 3]
    done = run(*command, *flags)
    assert done.returncode == 0, done.stderr
    assert "noise level σ   accuracy" in done.stdout and "n = 3)" in done.stdout
    assert (both / "accuracy.png").is_file()

    pipe, plain = load_pipeline(both), load_pipeline(model)
    assert pipe.scheduler.config.solver_order == 1
    assert sorted(pipe.labels) == sorted(folder.name for folder in class_folders.iterdir())
    (image,) = pipe("circle", num_inference_steps=2).images
    assert (image.mode, image.size) == ("L", (16, 16))
    component = NoisyImageClassifier.from_pretrained(both, subfolder="classifier")
    assert component.config.noise_schedule["beta_schedule"] == plain.scheduler.config.beta_schedule
    for name, weight in plain.unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], weight)

    plain.unet.conv_in.bias.data += 1
    plain.unet.save_pretrained(model / "unet")
    done = run(*command, *flags)
    assert done.returncode == 2 and "holds a different run (depends_on.unet was" in done.stderr

    done = run("train_classifier.py", "--for_model", tmp_path / "no", "--max_train_steps", 1)
    assert done.returncode == 2 and "no' is not a folder" in done.stderr and "Traceback" not in done.stderr
    done = run("train_classifier.py", "--max_train_steps", 1)
    assert done.returncode == 2 and "the following arguments are required: --for_model" in done.stderr
    done = run("train_classifier.py", "--help")
    assert "Trains a classifier of noisy pictures" in done.stdout
    (of_for_model,) = re.findall(r"\n  --for_model .*?\n  --", done.stdout, re.DOTALL)
    assert "default" not in of_for_model


def test_the_demo_checks_the_model_it_samples(tmp_path):
    assert run("train_cfg.py", "--output_dir", tmp_path, "--max_train_steps", 1, *SMALL).returncode == 0
    done = start("demo.py", "--model", tmp_path, "--samples_per_class", 8)
    assert done.returncode == 0, done.stderr
    assert " of 64 samples (" in done.stdout
    assert f'DiffusionPipeline.from_pretrained("{tmp_path}", trust_remote_code=True)' in done.stdout
    assert Image.open(tmp_path / "samples" / "classes.png").size == (8 * 64, 8 * 64)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max_train_steps", 1, "--dataset", "no/such/folder"], "no/such/folder: there is no such folder"),
        (["--max_train_steps", -1], "max_train_steps: -1 is not positive"),
        (["--max_train_steps", 1, "--max_train_minutes", 1], "a run has one budget"),
        (["--max_train_steps", 1, "--resolution", 30, "--block_out_channels", 48, 96, 128], "such as 24x24 or 32x32"),
        (["--max_train_steps", 1, "--weighting", "snr"], "weighting: 'snr' is not one of"),
        (["--max_train_steps", 1, "--license", "MIT License"], "license: 'MIT License' is not as the Hub calls one"),
        (["--max_train_steps", 1, "--push_to_hub"], "push_to_hub: a shared model needs a licence"),
        (
            ["--max_train_steps", 1, "--hub_model_id", "user/name"],
            "hub_model_id: it is the repository for --push_to_hub",
        ),
        (["--max_train_steps", 1, "--license", "mit", "--push_to_hub", "--hub_model_id", "a b"], "'a b'"),
    ],
)
def test_mistakes_get_one_sentence_and_leave_nothing(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error_of("train_cfg.py", "--output_dir", tmp_path / "run", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_wrong_flag_gets_one_sentence(tmp_path):
    done = start("train_cfg.py", "--datset", "shapes", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: --datset: no such flag; did you mean --dataset?\n")


SMALL_AUTOENCODER = ["--autoencoder_channels", "16", "32", "--batch_size", "8"]
SMALL_LATENT = ["--block_out_channels", "16", "32", "--batch_size", "8", "--sampling_steps", "0"]


@pytest.fixture(scope="module")
def vae_run(class_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vae"
    flags = ["--latent_channels", 3, "--beta_warmup", 0.5, "--sampling_steps", 1, *SMALL_AUTOENCODER]
    done = run("train_vae.py", "--dataset", class_folders, "--output_dir", folder, "--max_train_steps", 2, *flags)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def latent_run(class_folders, vae_run):
    folder = vae_run.parent / "latent"
    flags = ["--vae", vae_run, "--max_train_steps", 2, *SMALL_LATENT]
    done = run("train_cfg.py", "--dataset", class_folders, "--output_dir", folder, *flags)
    assert done.returncode == 0, done.stderr
    return folder


def picture_of(class_folders):
    return Image.open(next(class_folders.rglob("*.png")))


def test_training_a_variational_autoencoder_leaves_one_that_samples_from_its_prior(class_folders, vae_run):
    pipe = load_pipeline(vae_run)
    assert type(pipe.vae) is VariationalAutoencoder and pipe.vae.latent_shape(16, 16) == (3, 4, 4)
    images = pipe.reconstruct(picture_of(class_folders)).images + pipe(2).images
    assert [(image.mode, image.size) for image in images] == [("L", (16, 16))] * 3
    with torch.no_grad():
        x = torch.stack([pipe.preprocess(Image.open(file), 1)[0] for file in class_folders.rglob("*.png")])
        posterior = pipe.vae.encode(x).latent_dist
    spread = (posterior.mean.var(correction=0) + posterior.var.mean()).sqrt().item()
    assert pipe.vae.config.scaling_factor == pytest.approx(1 / spread, rel=1e-3)
    assert Image.open(next((vae_run / "samples").glob("*.png"))).size == (12 * 64, 6 * 64)


def test_training_an_autoencoder_leaves_one_that_samples_from_its_fitted_prior(class_folders, tmp_path):
    flags = ["--vector_latents", "--latent_channels", 5, "--loss", "l1", "--downsampling_factor", 4,
             "--sampling_steps", 1, "--mask", 0.5, "--max_shift", 1, *SMALL_AUTOENCODER]  # fmt: skip
    done = run(
        "train_autoencoder.py", "--dataset", class_folders, "--output_dir", tmp_path, "--max_train_steps", 2, *flags
    )
    assert done.returncode == 0, done.stderr
    pipe = load_pipeline(tmp_path)
    assert type(pipe.vae) is Autoencoder and pipe.vae.latent_shape(16, 16) == (5, 1, 1)
    images = pipe.reconstruct(picture_of(class_folders)).images + pipe(2, prior="fitted").images
    assert [(image.mode, image.size) for image in images] == [("L", (16, 16))] * 3
    assert Image.open(next((tmp_path / "samples").glob("*.png"))).size == (12 * 64, 6 * 64)


def test_latent_diffusion_in_one_command_leaves_both_checkpoints_and_names_them(class_folders, tmp_path):
    command = ["train_latent_cfg.py", "--dataset", class_folders, "--output_dir", f"{tmp_path}/run/",
               "--max_train_steps", 5, "--horizontal_flip", "--latent_channels", 3, *SMALL_AUTOENCODER,
               *SMALL_LATENT, "--license", "mit"]  # fmt: skip
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "The autoencoder:" in (tmp_path / "run" / "README.md").read_text()
    names = [
        f"{tmp_path}/run-vae is the checkpoint of the autoencoder",
        f"{tmp_path}/run/ is the checkpoint of the whole",
    ]
    assert done.stdout.splitlines() == names
    of_vae, of_model = (
        (tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("run-vae", "run")
    )
    assert '"step": 2' in of_vae and '"step": 3' in of_model  # 0.4 and 0.6 of 5
    of_vae, of_model = (
        json.loads((tmp_path / name / "training_config.json").read_text()) for name in ("run-vae", "run")
    )
    first, second = of_vae["training"], of_model["training"]
    assert second["batch_size"] == 4 * first["batch_size"] == of_model["arguments"]["latent"]["latent_batch_size"]
    assert second["learning_rate"] == 2 * first["learning_rate"]

    first, whole = load_pipeline(tmp_path / "run-vae"), load_pipeline(tmp_path / "run")
    for name, weight in first.vae.state_dict().items():
        assert torch.equal(whole.vae.state_dict()[name], weight)
    assert sorted(whole.labels) == sorted(folder.name for folder in class_folders.iterdir())
    images = whole(["circle", "star"], num_inference_steps=2).images + first(1).images
    assert [(image.mode, image.size) for image in images] == [("L", (16, 16))] * 3

    cache = Path(datasets.config.HF_DATASETS_CACHE, "hf_genmod", "latents")
    encoded = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    again = run(*command)
    assert encoded and {file: file.stat().st_mtime_ns for file in cache.iterdir()} == encoded
    complete = [f"{tmp_path}/{name} is complete; there is nothing left to train" for name in ("run-vae", "run/")]
    assert again.stdout.splitlines() == [complete[0], names[0], complete[1], names[1]]


def test_a_model_of_latents_is_guided_by_a_classifier_of_them(class_folders, vae_run, latent_run, tmp_path):
    plain, vae = load_pipeline(latent_run), load_vae(vae_run)
    assert plain.unet.config.in_channels == 3 and tuple(plain.unet.config.sample_size) == (4, 4)
    for name, weight in vae.state_dict().items():
        assert torch.equal(plain.vae.state_dict()[name], weight)
    assert plain.vae.config.scaling_factor == pytest.approx(vae.config.scaling_factor, rel=1e-3)

    done = run("train_classifier.py", "--dataset", class_folders, "--for_model", latent_run, "--output_dir", tmp_path,
               "--max_train_steps", 2, *SMALL_LATENT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "noise level σ   accuracy" in done.stdout and "n = 3)" in done.stdout
    pipe = load_pipeline(tmp_path)
    assert pipe.classifier.config.in_channels == 3
    assert dict(pipe.vae.config) | {"_name_or_path": None} == dict(plain.vae.config) | {"_name_or_path": None}
    (image,) = pipe("circle", num_inference_steps=2).images
    assert (image.mode, image.size) == ("L", (16, 16))


@pytest.fixture(scope="module")
def captioned_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    for split, count in (("train", 20), ("test", 4)):
        drawn = shapes.ShapesDataset(count, resolution=16)
        lines = []
        (folder / split).mkdir()
        for i, row in enumerate(drawn[i] for i in range(count)):
            row["image"].save(folder / split / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": [row["caption"], f"picture {i}"]}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_training_on_captions_leaves_a_model_with_a_text_encoder_of_its_own(captioned_folder, tmp_path):
    flags = ["--dataset", captioned_folder, *SMALL, "--sampling_steps", 2]
    done = run("train_text_to_image.py", *flags, "--output_dir", tmp_path / "own", "--max_train_steps", 3)
    assert done.returncode == 0, done.stderr
    pipe = load_pipeline(tmp_path / "own")
    (image,) = pipe("a small red circle", num_inference_steps=2).images
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert len(pipe.tokenizer("picture")["input_ids"]) == 3  # a word of these captions
    assert Image.open(next((tmp_path / "own" / "samples").glob("*.png"))).size == (512, 8 * (64 + 16))
    lines = [json.loads(line) for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    assert any("validation_loss" in line for line in lines)

    # Another model with the text encoder of this one, which stays as it is.
    command = [*flags, "--text_encoder", tmp_path / "own", "--output_dir", tmp_path / "frozen", "--max_train_steps", 2]
    done = run("train_text_to_image.py", *command)
    assert done.returncode == 0, done.stderr
    frozen = load_pipeline(tmp_path / "frozen")
    for name, weight in pipe.text_encoder.state_dict().items():
        assert torch.equal(frozen.text_encoder.state_dict()[name], weight)
    assert not torch.equal(frozen.unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert frozen(["a star", "a ring"], num_inference_steps=2).images[1].size == (16, 16)


def test_a_text_to_image_model_of_latents(captioned_folder, tmp_path):
    vae = [*SMALL_AUTOENCODER, "--dataset", captioned_folder, "--max_train_steps", 1, "--latent_channels", 3]
    assert run("train_vae.py", *vae, "--output_dir", tmp_path / "vae", "--sampling_steps", 0).returncode == 0
    flags = ["--dataset", captioned_folder, "--vae", tmp_path / "vae", "--output_dir", tmp_path / "run",
             "--max_train_steps", 1, *SMALL_LATENT]  # fmt: skip
    assert run("train_text_to_image.py", *flags).returncode == 0
    pipe = load_pipeline(tmp_path / "run")
    assert pipe.unet.config.in_channels == 3
    assert pipe("a large ring", num_inference_steps=2).images[0].size == (16, 16)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--text_encoder", "{missing}"], "text_encoder: '{missing}' is neither a text encoder nor a pipeline"),
        (["--caption_column", "words"], "caption_column: 'words' is no column of"),
        (["--dataset", "{classes}"], "captions"),
        (["--guidance", "2"], "--guidance: no such flag"),
    ],
)
def test_mistakes_about_text_get_one_sentence(arguments, message, captioned_folder, class_folders, tmp_path):
    paths = {"missing": tmp_path / "missing", "classes": class_folders}
    arguments = [argument.format(**paths) for argument in arguments]
    flags = ["--dataset", str(captioned_folder), "--output_dir", str(tmp_path / "run"), "--max_train_steps", "1"]
    assert message.format(**paths) in error_of("train_text_to_image.py", *flags, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def few_pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    drawn = shapes.ShapesDataset(5, resolution=16)
    for i in range(5):
        drawn[i]["image"].save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of models that know nothing yet, of each kind that takes an adapter."""
    folder = tmp_path_factory.mktemp("bases")
    latent = {"in_channels": 2, "out_channels": 2, "num_classes": 2}
    names, scheduler = {0: "cat", 1: "dog"}, AncestralDDPMScheduler()
    unlimited = AncestralDDPMScheduler(clip_sample=False)
    for name, pipeline in {
        "classes": ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), scheduler, id2label=names),
        "latents": ClassifierFreeGuidedPipeline(tiny_unet(**latent), unlimited, tiny_autoencoder(), id2label=names),
        "none": UnconditionalPipeline(tiny_unet(), scheduler),
        "text": tiny_text_pipeline(),
        "guided": ClassifierGuidedPipeline(tiny_unet(), tiny_classifier(), scheduler),
        "autoencoder": AutoencoderPipeline(tiny_autoencoder()),
    }.items():
        pipeline.save_pretrained(folder / name)
    return folder


FEW_STEPS = ["--max_train_steps", "2", "--batch_size", "4", "--prior_samples", "4", "--sampling_steps", "2"]


@pytest.mark.parametrize(
    "base, arguments, asked",
    [
        ("classes", ["--class_name", "zebra"], {"class_labels": "zebra"}),
        ("latents", ["--class_name", "zebra"], {"class_labels": "zebra"}),
        ("none", [], {}),
        ("text", ["--caption", "a zorb", "--train_text_encoder"], {"prompt": "a zorb"}),
    ],
)
def test_an_adapter_learns_from_a_few_pictures(base, arguments, asked, bases, few_pictures, tmp_path):
    flags = ["--base", bases / base, "--dataset", few_pictures, "--output_dir", tmp_path / "run", *FEW_STEPS,
             "--license", "mit"]  # fmt: skip
    assert run("finetune_lora.py", *flags, *arguments).returncode == 0
    pipe = load_pipeline(bases / base)
    pipe.load_lora_weights(tmp_path / "run")
    parts = {"unet", "text_encoder"} if base == "text" else {"unet"}
    assert set(pipe.get_list_adapters()) == parts
    assert pipe(**asked, num_inference_steps=2).images[0].size == pipe.picture_shape[:0:-1]
    assert Image.open(tmp_path / "run" / "samples" / "step-000002.png").width >= 64
    card = (tmp_path / "run" / "README.md").read_text()
    assert f'from_pretrained("{bases / base}"' in card and f'pipe.load_lora_weights("{tmp_path / "run"}")' in card
    assert all(f'pipe({name}="{value}")' in card for name, value in asked.items())
    assert not (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("base", ["latents", "text"])
def test_an_adapter_is_trained_by_two_processes_as_by_one(base, bases, few_pictures, tmp_path):
    adapters = []
    for number in (1, 2):
        flags = ["--base", bases / base, "--dataset", few_pictures, "--output_dir", tmp_path / str(number), *FEW_STEPS,
                 *{"latents": ["--class_name", "zebra"], "text": ["--caption", "a zorb"]}[base],
                 "--mixed_precision", "no"]  # fmt: skip
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", number]
        command = [sys.executable, *(launcher if number > 1 else []), EXAMPLES / "finetune_lora.py", *flags]
        subprocess.run([*map(str, command)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
        adapters.append(load_file(tmp_path / str(number) / "pytorch_lora_weights.safetensors"))
    for name, weight in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], weight, atol=1e-4, rtol=0)


def test_an_adapter_for_another_text_encoder_is_another_run(bases, few_pictures, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases / "text", base)
    flags = ["--base", base, "--dataset", few_pictures, "--output_dir", tmp_path / "run", *FEW_STEPS]
    assert run("finetune_lora.py", *flags, "--caption", "a zorb").returncode == 0
    weights = load_file(base / "text_encoder" / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, base / "text_encoder" / "model.safetensors")
    assert "holds a different run (depends_on.base was" in error_of("finetune_lora.py", *flags, "--caption", "a zorb")


def test_a_push_that_failed_leaves_the_run_complete_and_is_made_up_for_by_the_same_command(
    bases, few_pictures, tmp_path, hub
):
    base, repo_id = hub.new_repo_id("base"), hub.new_repo_id("adapter")
    load_pipeline(bases / "classes").push_to_hub(base)
    flags = ["--base", base, "--dataset", few_pictures, "--output_dir", tmp_path / "run", *FEW_STEPS,
             "--class_name", "zebra", "--license", "mit", "--push_to_hub"]  # fmt: skip
    failed = run("finetune_lora.py", *flags, "--hub_model_id", "org-of-others/adapter")
    assert failed.returncode == 0 and "the push to org-of-others/adapter did not finish (" in failed.stderr
    done = run("finetune_lora.py", *flags, "--hub_model_id", repo_id)
    assert done.returncode == 0 and "loads and draws what" in done.stderr
    pipe = load_pipeline(bases / "classes")
    pipe.load_lora_weights(repo_id)
    assert pipe.labels == {"cat": 0, "dog": 1, "zebra": 2}


@pytest.mark.parametrize(
    "base, arguments, message",
    [
        ("classes", [], "class_name: name the class of the images"),
        ("classes", ["--caption", "a zebra"], "caption: a ClassifierFreeGuidedPipeline is not asked by it"),
        ("classes", ["--class_name", "zebra", "--train_text_encoder"], "train_text_encoder: the model has none"),
        ("classes", ["--class_name", "zebra", "--rank", "0"], "rank: 0 is not positive"),
        ("classes", ["--class_name", "zebra", "--license", "mit", "--push_to_hub"], "base: it is a folder here"),
        ("classes", ["--class_name", "zebra", "--prior_samples", "-1"], "prior_samples: -1 is negative"),
        ("classes", ["--class_name", "zebra", "--resolution", "8"], "resolution: the model was trained on 8x8"),
        ("text", [], "caption: say what they show, or caption each"),
        ("guided", [], "base: an adapter of a ClassifierGuidedPipeline"),
        ("autoencoder", [], "the model is an autoencoder and no diffusion model"),
        ("missing", [], "is not a folder, nor can it be the id of a repository"),
        ("classes", ["--clas_name", "zebra"], "--clas_name: no such flag; did you mean --class_name?"),
    ],
)
def test_mistakes_about_adapters_get_one_sentence(base, arguments, message, bases, few_pictures, tmp_path):
    flags = ["--base", bases / base, "--dataset", few_pictures, "--output_dir", tmp_path / "run", *FEW_STEPS]
    assert message in error_of("finetune_lora.py", *flags, *arguments)
    assert not list(tmp_path.iterdir())


def test_what_features_are_worth_is_a_table_of_four_rows(class_folders, vae_run):
    flags = ["--labels_per_class", 1, "--num_seeds", 2, "--learning_rates", 1e-3, 3e-3, "--max_train_steps", 2,
             "--batch_size", 4, "--num_validation", 5]  # fmt: skip
    done = run("transfer_features.py", "--dataset", class_folders, "--vae", vae_run, *flags)
    title, header, *rows = done.stdout.splitlines()
    assert title.startswith("accuracy on 3 pictures, mean ± standard deviation of 2 seeds")
    assert header.split() == ["n", "=", "1"]
    names = ["encoder, frozen", "encoder, fine-tuned", "from scratch", "linear on pixels"]
    assert [row[:20].strip() for row in rows] == names
    for row in rows:
        mean, std = re.fullmatch(r" +([\d.]+) ± ([\d.]+)%", row[20:]).groups()
        seeds = {100 * i / 3 for i in range(4)}  # of 3 pictures
        assert any(abs((a + b) / 2 - float(mean)) < 0.06 for a in seeds for b in seeds) and float(std) <= 70.8


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("train_vae.py", ["--likelihood", "poisson"], "likelihood: 'poisson' is not one of gaussian, "),
        ("train_vae.py", ["--variance", "-1"], "variance: -1.0 is not positive"),
        ("train_vae.py", ["--downsampling_factor", "3"], "downsampling_factor: 3 is not one of 1, 2, 4, 8, ..."),
        ("train_vae.py", ["--bta", "2"], "--bta: no such flag; did you mean --beta?"),
        ("train_autoencoder.py", ["--loss", "huber"], "loss: 'huber' is not one of"),
        ("train_autoencoder.py", ["--mask", "1.5"], "mask: 1.5 is not a probability"),
        ("train_autoencoder.py", ["--downsampling_factor", "32"], "resolution 16x16: this network (patch_size 2, 5"),
        ("train_autoencoder.py", ["--autoencoder_channels", "16"], "autoencoder_channels: 1 widths for a"),
        ("train_latent_cfg.py", ["--autoencoder_share", "1"], "autoencoder_share: 1.0 is not between 0 and 1"),
        ("train_latent_cfg.py", ["--latent_batch_size", "0"], "latent_batch_size: 0 is not positive"),
        ("train_latent_cfg.py", ["--weighting", "snr"], "weighting: 'snr' is not one of simple"),
        ("train_latent_cfg.py", ["--attention_levels", "7"], "attention_levels: 7 is not one of the levels 0 to 2"),
        ("train_latent_cfg.py", ["--vae", "{missing}"], "vae: '{missing}' is neither an autoencoder nor a checkpoint"),
        ("train_cfg.py", ["--vae", "{missing}"], "vae: '{missing}' is neither an autoencoder nor a checkpoint"),
        ("train_cfg.py", ["--vae", "{vae}", "--resolution", "18"], "resolution 18x18: this network (patch_size 2, 2"),
        ("train_cfg.py", ["--vae", "{vae}", "--channels", "3"], "vae: it takes images of 1 channels, and these"),
        ("train_unconditional.py", ["--vae", "{missing}"], "vae: '{missing}' is neither an autoencoder nor"),
        (
            "train_classifier.py",
            ["--for_model", "{latent}", "--resolution", "4"],
            "resolution: the model was trained on 16x16",
        ),
        ("transfer_features.py", ["--vae", "{missing}"], "vae: '{missing}' is neither an autoencoder nor"),
        ("transfer_features.py", ["--vae", "{vae}", "--num_validation", "5"], "labels_per_class: the smallest class"),
        (
            "transfer_features.py",
            ["--vae", "{vae}", "--resolution", "18", "--num_validation", "5", "--labels_per_class", "1"],
            "resolution 18x18: this network (patch_size 2, 2",
        ),
        ("transfer_features.py", ["--vae", "{vae}"], "num_validation: 500 pictures to choose by leave none of 21"),
    ],
)
def test_mistakes_about_autoencoders_get_one_sentence(
    script, arguments, message, class_folders, vae_run, latent_run, tmp_path, monkeypatch
):
    paths = {"missing": tmp_path / "missing", "vae": vae_run, "latent": latent_run}
    arguments = [argument.format(**paths) for argument in arguments] + ["--dataset", str(class_folders)]
    if script != "transfer_features.py":
        arguments += ["--output_dir", str(tmp_path / "run"), "--max_train_steps", "1"]
    monkeypatch.chdir(tmp_path)
    assert message.format(**paths) in error_of(script, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def measured_model(tmp_path_factory):
    """A model that knows nothing, and a data set of two classes, 1,400 to train on and 200 held out."""
    folder = tmp_path_factory.mktemp("measured")
    rng = np.random.default_rng(0)
    for split, count in (("train", 1400), ("test", 200)):
        labels = [i % 2 for i in range(count)]
        pictures = [rng.integers(0, 128, (8, 8, 3), dtype=np.uint8) + np.uint8(100 * label) for label in labels]
        rows = {"image": [Image.fromarray(picture) for picture in pictures], "label": labels}
        rows["text"] = [f"a {'bright' if label else 'dark'} picture" for label in labels]
        columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])}
        columns["text"] = datasets.Value("string")
        split_of = datasets.Dataset.from_dict(rows, datasets.Features(columns))
        (folder / "data").mkdir(exist_ok=True)
        split_of.to_parquet(folder / "data" / f"{split}-00000.parquet")
    names = {0: "dark", 1: "bright"}
    scheduler = AncestralDDPMScheduler(timestep_spacing="trailing")
    ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), scheduler, id2label=names).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def features(measured_model):
    """A network that was not trained, for pictures of two classes."""
    file = measured_model / "features.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FeatureClassifier(3, 2).eval().save(file)
    return file


@pytest.mark.parametrize("own_features", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_report_has_every_measure_of_every_setting_and_is_taken_up_where_it_was(
    own_features, measured_model, features, tmp_path
):
    flags = ["--model", measured_model / "model", "--dataset", measured_model / "data", "--output_dir", tmp_path,
             "--samples", 150, "--num_inference_steps", 2, "--guidance_scales", 1, 3,
             "--samplers", "DDIMScheduler", *([] if own_features else ["--features", features])]  # fmt: skip
    assert run("evaluate.py", *flags).returncode == 0
    assert bool(list(tmp_path.glob("features-*.safetensors"))) == own_features
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["dataset"]["num_pictures"] == 1400 and report["dataset"]["num_held_out"] == 200
    assert [setting["guidance_scale"] for setting in report["settings"]] == [1.0, 3.0]
    for setting, passes in zip(report["settings"], (2, 4), strict=True):
        assert setting["forward_passes"] == passes
        for name in ("frechet_distance", "kernel_distance", "precision", "recall", "coverage", "recognised_share"):
            measure = setting[name]
            assert measure["low"] <= measure["value"] <= measure["high"] and measure["count"] == 150, name
        assert 0 < setting["seconds"]["value"] < setting["seconds"]["high"] and setting["seconds"]["count"] == 3
        shares = setting["recognised_share_by_class"]
        assert sum(share["count"] for share in shares.values()) == 150 and set(shares) == {"dark", "bright"}
        assert not setting["memorisation"]["pixels"]["flagged"]
    assert report["held_out"]["frechet_distance"]["value"] < report["settings"][0]["frechet_distance"]["value"]
    assert report["bits_per_dimension"]["variational bound"]["count"] == 200
    closest = Image.open(tmp_path / "closest_DDIMScheduler-2-1.0_pixels.png")
    assert closest.size == (10 * 64, 2 * 64)

    kept = sorted(next((tmp_path / "samples").glob("DDIMScheduler-2-1.0-*")).iterdir())
    times = [file.stat().st_mtime_ns for file in kept]
    kept[1].unlink()
    assert run("evaluate.py", *flags).returncode == 0
    assert [file.stat().st_mtime_ns == time for file, time in zip(kept, times, strict=True)] == [True, False, True]
    again = json.loads((tmp_path / "evaluation.json").read_text())
    for setting in (*report["settings"], *again["settings"]):
        del setting["seconds"]
    assert again == report


REPORTED = {
    "unconditional": lambda: UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler()),
    "guided": lambda: ClassifierGuidedPipeline(
        tiny_unet(), tiny_classifier(num_classes=2), AncestralDDPMScheduler(), id2label={0: "dark", 1: "bright"}
    ),
    "text": tiny_text_pipeline,
    "autoencoder": lambda: AutoencoderPipeline(tiny_autoencoder(sample_size=8, in_channels=3)),
    "upsampler": lambda: SuperResolutionPipeline(
        tiny_unet(conditioning_channels=3), AncestralDDPMScheduler(), max_noise_level=100
    ),
}


@pytest.mark.parametrize("kind", REPORTED)
def test_a_report_of_each_kind_of_model_and_its_card(kind, measured_model, features, tmp_path):
    REPORTED[kind]().save_pretrained(tmp_path)
    scales = {"guided": [0, 2], "text": [1, 2]}.get(kind, [])
    flags = ["--model", tmp_path, "--dataset", measured_model / "data", "--samples", 130, "--features", features,
             "--num_inference_steps", 2, *(["--guidance_scales", *scales] if scales else []),
             *(["--noise_levels", 0, 50] if kind == "upsampler" else []), "--license", "mit"]  # fmt: skip
    done = run("evaluate.py", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert report["features"] == str(features)
    scale = "classifier_scale" if kind == "guided" else "guidance_scale"
    levels = [0, 50] if kind == "upsampler" else [None]
    assert [setting.get(scale) for setting in report["settings"]] == (scales or [None] * len(levels))
    assert [setting.get("noise_level") for setting in report["settings"]][: len(levels)] == levels
    assert ("interpolated" in report) == (kind == "upsampler")
    for setting in report["settings"]:
        assert setting["density"]["count"] == 130 and setting["coverage"]["count"] == 130
        assert ("recognised_share" in setting) == (kind == "guided")
    bits = report["bits_per_dimension"]
    assert len(bits) == (2 if kind == "autoencoder" else 1)
    assert all(bound["low"] < bound["value"] < bound["high"] and bound["count"] == 200 for bound in bits.values())
    figures = {file.name for file in (tmp_path / "evaluation").glob("*.png")}
    expected = set() if kind == "autoencoder" else {"steps.png", "trajectory.png"}
    expected |= {"guidance.png"} if scales else {"enlarged.png"} if kind == "upsampler" else set()
    assert expected <= figures and len(figures - expected) == 2 * len(report["settings"])  # the closest
    card = (tmp_path / "README.md").read_text()
    assert all(f"evaluation/{name}" in card for name in figures)
    assert f"{report['settings'][0]['frechet_distance']['value']:.3g} (" in card


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_ends_with_a_card_and_a_push(number, class_folders, tmp_path, hub):
    repo_id = hub.new_repo_id("pushed")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", number]
    flags = ["--dataset", class_folders, "--output_dir", tmp_path / repo_id.split("/")[1], "--max_train_steps", 2,
             "--license", "mit", "--push_to_hub", "--hub_private_repo", *SMALL]  # fmt: skip
    if number == 1:
        done = run("train_unconditional.py", *flags)
    else:
        command = [sys.executable, *launcher, EXAMPLES / "train_unconditional.py", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "loads and draws what" in done.stderr and hub.token not in done.stdout + done.stderr
    assert hub.repos["models", repo_id].private
    files = hub.files(repo_id)
    assert {"README.md", "samples.png", "model_index.json"} <= set(files)
    assert not [name for name in files if name.startswith(("checkpoints/", "samples/")) or "training" in name]
    card = files["README.md"].decode()
    assert f'from_pretrained("{repo_id}"' in card and "--push_to_hub" in card and "2 steps in" in card
    assert ("torchrun --nproc_per_node 2" in card) == (number == 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "100"], "samples: 100 are too few for features of 64 dimensions; 130 or more"),
        (["--samplers", "NoScheduler"], "samplers: 'NoScheduler' is no scheduler of diffusers, such as DDIMScheduler"),
        (["--features", "{missing}"], "features: '{missing}' is no vision model of transformers"),
        (["--dataset", "{classes}"], "dataset: the labels of the model are dark, bright, and those of the pictures"),
        (["--resolution", "16"], "resolution: the model was trained on 8x8 pictures of 3 channels"),
        (["--model", "{plain}", "--guidance_scales", "2"], "guidance_scales: a UnconditionalPipeline is not guided"),
        (["--model", "{missing}"], "missing' is not a folder"),
        (["--license", "MIT"], "license: 'MIT' is not as the Hub calls one"),
        (["--features", "{few}"], "is of 3 other classes"),
    ],
)
def test_mistakes_about_reports_get_one_sentence(arguments, message, measured_model, class_folders, tmp_path):
    paths = {"missing": tmp_path / "missing", "classes": class_folders, "plain": tmp_path / "plain"}
    paths["few"] = tmp_path / "few.safetensors"
    REPORTED["unconditional"]().save_pretrained(paths["plain"])
    FeatureClassifier(3, 3).save(paths["few"])
    flags = ["--model", measured_model / "model", "--dataset", measured_model / "data", "--output_dir", tmp_path]
    error = error_of("evaluate.py", *flags, *(argument.format(**paths) for argument in arguments))
    assert message.format(**paths) in error
