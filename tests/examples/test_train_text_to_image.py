import json

import pytest
import torch
from example_scripts import SMALL, SMALL_AUTOENCODER, SMALL_LATENT, error_of, run
from PIL import Image

from hf_genmod import load_pipeline
from hf_genmod.data import shapes


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
    flags = ["--dataset", captioned_folder, *SMALL]
    own = ["--output_dir", tmp_path / "own", "--max_train_steps", 3, "--sampling_steps", 3]
    done = run("train_text_to_image.py", *flags, *own)
    assert done.returncode == 0, done.stderr
    pipe = load_pipeline(tmp_path / "own")
    (image,) = pipe("a small red circle", num_inference_steps=2).images
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert len(pipe.tokenizer("picture")["input_ids"]) == 3  # a word of these captions
    assert Image.open(next((tmp_path / "own" / "samples").glob("*.png"))).size == (800, 8 * (100 + 20))
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
        (["--text_encoder", "{missing}"], "text_encoder: '{missing}' is no folder here, and"),
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
