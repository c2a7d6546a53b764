import re

import pytest
import torch
from example_scripts import SMALL, SMALL_LATENT, run

from hf_genmod import NoisyImageClassifier, load_pipeline, load_vae


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
    assert done.returncode == 2 and "holds a different run (the weights of its unet have" in done.stderr

    done = run("train_classifier.py", "--for_model", tmp_path / "no", "--max_train_steps", 1)
    assert done.returncode == 2 and "no' is not a folder" in done.stderr and "Traceback" not in done.stderr
    done = run("train_classifier.py", "--max_train_steps", 1)
    assert done.returncode == 2 and "the following arguments are required: --for_model" in done.stderr
    done = run("train_classifier.py", "--help")
    assert "Trains a classifier of noisy images to guide" in done.stdout
    (of_for_model,) = re.findall(r"\n  --for_model .*?\n  --", done.stdout, re.DOTALL)
    assert "default" not in of_for_model


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
