"""The examples, run as a person runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_genmod import NoisyImageClassifier, load_pipeline, shapes

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--resolution", "16", "--block_out_channels", "16", "32", "--layers_per_block", "1",
         "--batch_size", "8", "--sampling_steps", "0"]  # fmt: skip


def run(script, *arguments, **kwargs):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **kwargs)


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
    assert done.returncode == 2 and "holds a different run (weights.for_model was" in done.stderr

    done = run("train_classifier.py", "--for_model", tmp_path / "no", "--max_train_steps", 1, cwd=tmp_path)
    assert done.returncode == 2 and "no' is not a folder" in done.stderr and "Traceback" not in done.stderr
    done = run("train_classifier.py", "--max_train_steps", 1, cwd=tmp_path)
    assert done.returncode == 2 and "the following arguments are required: --for_model" in done.stderr
    done = run("train_classifier.py", "--help")
    assert "Trains a classifier of noisy pictures" in done.stdout and "default: None" in done.stdout
    (of_for_model,) = re.findall(r"\n  --for_model .*?\n  --", done.stdout, re.DOTALL)
    assert "default" not in of_for_model


def test_the_demo_checks_the_model_it_samples(tmp_path):
    run("train_cfg.py", "--output_dir", tmp_path, "--max_train_steps", 1, *SMALL)
    done = run("demo.py", "--model", tmp_path, "--samples_per_class", 8)
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
    ],
)
def test_mistakes_get_one_sentence_and_leave_nothing(arguments, message, tmp_path):
    done = run("train_cfg.py", "--output_dir", tmp_path / "run", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in error
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_wrong_flag_gets_one_sentence(tmp_path):
    done = run("train_cfg.py", "--datset", "shapes", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: --datset: no such flag; did you mean --dataset?\n")
