"""Data sets and runs that several tests of scripts share."""

import datasets
import numpy as np
import pytest
from example_scripts import SMALL_AUTOENCODER, SMALL_LATENT, run
from PIL import Image

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


@pytest.fixture(scope="module")
def measured_data(tmp_path_factory):
    """A data set of two classes with captions, 1,400 images to train on and 200 held out."""
    folder = tmp_path_factory.mktemp("measured") / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 1400), ("test", 200)):
        labels = [i % 2 for i in range(count)]
        pictures = [rng.integers(0, 128, (8, 8, 3), dtype=np.uint8) + np.uint8(100 * label) for label in labels]
        rows = {"image": [Image.fromarray(picture) for picture in pictures], "label": labels}
        rows["text"] = [f"a {'bright' if label else 'dark'} picture" for label in labels]
        columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])}
        columns["text"] = datasets.Value("string")
        rows = datasets.Dataset.from_dict(rows, datasets.Features(columns))
        rows.to_parquet(folder / f"{split}-00000.parquet")
    return folder
