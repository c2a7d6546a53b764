"""Data sets and runs that several tests of scripts share."""

import pytest
from example_scripts import SMALL_AUTOENCODER, SMALL_LATENT, run

from hf_genmod.data import shapes


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    drawn = shapes.ShapesDataset(24, resolution=16)
    for i, row in enumerate(drawn[i] for i in range(24)):
        (folder / drawn.label_names[row["label"]]).mkdir(exist_ok=True)
        row["image"].convert("L").save(folder / drawn.label_names[row["label"]] / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def upsampler_run(class_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("upsampler") / "run"
    flags = ["--factor", "2", "--block_out_channels", "16", "32", "--batch_size", "4", "--with_labels"]
    command = ["train_upsampler.py", "--dataset", class_folders, "--output_dir", folder, "--license", "mit"]
    done = run(*command, "--max_train_steps", 2, "--sampling_steps", 1, *flags)
    assert done.returncode == 0, done.stderr
    assert f"{max((folder / 'samples').iterdir())} shows samples\n" in done.stdout
    assert f"    hf_genmod enlarge small.png --upsamplers {folder}\n" in done.stdout
    return folder


@pytest.fixture(scope="session")
def vae_run(class_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vae"
    flags = ["--latent_channels", 3, "--beta_warmup", 0.5, "--sampling_steps", 1, *SMALL_AUTOENCODER]
    done = run("train_vae.py", "--dataset", class_folders, "--output_dir", folder, "--max_train_steps", 2, *flags)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def latent_run(class_folders, vae_run):
    folder = vae_run.parent / "latent"
    flags = ["--vae", vae_run, "--max_train_steps", 2, *SMALL_LATENT]
    done = run("train_cfg.py", "--dataset", class_folders, "--output_dir", folder, *flags)
    assert done.returncode == 0, done.stderr
    return folder
