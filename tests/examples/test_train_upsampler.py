import pytest
from example_scripts import error_of, picture_of, run
from PIL import Image

from hf_genmod import SuperResolutionPipeline, load_pipeline


def test_training_an_upsampler_on_full_size_pictures_leaves_one_of_them(class_folders, upsampler_run):
    pipe = load_pipeline(upsampler_run)
    assert type(pipe) is SuperResolutionPipeline
    assert (pipe.picture_shape, pipe.config.factor, pipe.config.max_noise_level) == ((1, 16, 16), 2, 250)
    assert sorted(pipe.labels) == sorted(folder.name for folder in class_folders.iterdir())
    (image,) = pipe(picture_of(class_folders), num_inference_steps=1).images
    assert (image.mode, image.size) == ("L", (32, 32))
    assert Image.open(upsampler_run / "samples" / "step-000001.png").size == (12 * 100, 8 * (100 + 20))
    card = (upsampler_run / "README.md").read_text()
    assert "enlarges images to 2 times their height and width" in card
    assert not (upsampler_run / "samples.png").exists()  # whose pictures would it show?


def test_an_upsampler_is_trained_on_crops_of_what_is_larger(class_folders, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        picture_of(class_folders).convert("RGB").resize((48, 32)).save(tmp_path / "pictures" / f"{i}.png")
    flags = ["--resolution", "32x48", "--crop_size", "16", "--factor", "4", "--max_noise_level", "0"]
    small = ["--block_out_channels", "16", "32", "--batch_size", "4", "--sampling_steps", "0"]
    command = ["train_upsampler.py", "--dataset", tmp_path / "pictures", "--output_dir", tmp_path / "run"]
    done = run(*command, *flags, *small, "--max_train_steps", 1)
    assert done.returncode == 0, done.stderr
    pipe = load_pipeline(tmp_path / "run")
    assert (pipe.picture_shape, pipe.config.max_noise_level) == ((3, 32, 48), 0)


def test_the_default_of_an_upsampler_is_no_attention(upsampler_run):
    help_text = " ".join(run("train_upsampler.py", "--help").stdout.split())
    assert "Levels with self-attention, from 0. Default: none, for images of any size. --" in help_text
    assert "the lowest level" not in help_text
    assert not any(load_pipeline(upsampler_run).unet.config.attention_levels)


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
def test_an_upsampler_that_cannot_be_trained_is_refused_in_one_sentence(flags, error, class_folders, tmp_path):
    command = ["train_upsampler.py", "--dataset", class_folders, "--output_dir", tmp_path / "run"]
    assert error_of(*command, "--max_train_steps", 1, "--resolution", "32", *flags).startswith(error)
    assert not (tmp_path / "run").exists()
