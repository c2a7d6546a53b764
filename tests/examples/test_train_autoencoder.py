import pytest
import torch
from example_scripts import SMALL_AUTOENCODER, error_of, picture_of, run
from PIL import Image

from hf_genmod import Autoencoder, VariationalAutoencoder, load_pipeline


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
    assert Image.open(next((vae_run / "samples").glob("*.png"))).size == (12 * 100, 6 * 100 + 5 * 20)


def test_training_an_autoencoder_leaves_one_that_samples_from_its_fitted_prior(class_folders, tmp_path, monkeypatch):
    flags = ["--vector_latents", "--latent_channels", 5, "--loss", "l1", "--downsampling_factor", 4,
             "--sampling_steps", 1, "--mask", 0.5, "--max_shift", 1, *SMALL_AUTOENCODER]  # fmt: skip
    command = ["train_autoencoder.py", "--dataset", class_folders, "--output_dir", tmp_path, "--max_train_steps", 2]
    done = run(*command, *flags)
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr
    pipe = load_pipeline(tmp_path)
    assert type(pipe.vae) is Autoencoder and pipe.vae.latent_shape(16, 16) == (5, 1, 1)
    images = pipe.reconstruct(picture_of(class_folders)).images + pipe(2, prior="fitted").images
    assert [(image.mode, image.size) for image in images] == [("L", (16, 16))] * 3
    assert Image.open(next((tmp_path / "samples").glob("*.png"))).size == (12 * 100, 6 * 100 + 5 * 20)

    def encode(vae, x):
        raise AssertionError("a finished run needs no statistics")

    monkeypatch.setattr("hf_genmod.data.latents.encode", encode)
    again = run(*command, *flags)
    assert again.returncode == 0 and f"{tmp_path} is complete" in again.stdout, again.stderr


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
        ("train_cfg.py", ["--vae", "{vae}", "--channels", "3"], "vae: it takes images of 1 channel, and these"),
        ("train_unconditional.py", ["--vae", "{missing}"], "vae: '{missing}' is neither an autoencoder nor"),
        (
            "train_classifier.py",
            ["--for_model", "{latent}", "--resolution", "4"],
            "resolution: the model is for 16x16",
        ),
        ("transfer_features.py", ["--vae", "{missing}"], "vae: '{missing}' is neither an autoencoder nor"),
        (
            "transfer_features.py",
            ["--vae", "{vae}", "--labels_per_class", "100"],
            "labels_per_class: the smallest class",
        ),
        (
            "transfer_features.py",
            ["--vae", "{vae}", "--resolution", "18", "--num_validation", "5", "--labels_per_class", "1"],
            "resolution 18x18: this network (patch_size 2, 2",
        ),
        (
            "transfer_features.py",
            ["--vae", "{vae}", "--num_validation", "21"],
            "num_validation: 21 of 21 images leave too few to train on; give fewer by --num_validation",
        ),
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
