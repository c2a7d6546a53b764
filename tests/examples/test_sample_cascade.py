import os

import numpy as np
import pytest
from example_scripts import error_of, run
from PIL import Image
from tiny import tiny_unet

from hf_genmod import AncestralDDPMScheduler, ClassifierFreeGuidedPipeline, load_pipeline


class TestSamplingACascade:
    @pytest.fixture(scope="class")
    def base(self, upsampler_run, tmp_path_factory):
        labels = load_pipeline(upsampler_run).labels
        unet = tiny_unet(in_channels=1, out_channels=1, num_classes=len(labels))
        id2label = {index: name for name, index in labels.items()}
        pipe = ClassifierFreeGuidedPipeline(
            unet, AncestralDDPMScheduler(timestep_spacing="trailing"), id2label=id2label
        )
        folder = tmp_path_factory.mktemp("base")
        pipe.save_pretrained(folder)
        return folder

    def test_draws_small_pictures_and_enlarges_them(self, base, upsampler_run, tmp_path):
        flags = ["--class_labels", "circle", "1", "--num", "2", "--num_inference_steps", "1", "--noise_level", "50"]
        command = ["sample_cascade.py", "--base", base, "--upsamplers", upsampler_run, "--output_dir", tmp_path]
        done = run(*command, *flags)
        assert done.returncode == 0, done.stderr
        (first,) = (name for name, label in load_pipeline(base).labels.items() if label == 1)
        names = sorted(f"{name}-{i}-16x16.png" for name in (first, "circle") for i in range(2))
        assert sorted(file.name for file in tmp_path.iterdir()) == [*names, "stages.png"]
        assert Image.open(tmp_path / "stages.png").size == (4 * 100, 20 + 2 * (100 + 20))
        assert done.stdout.strip() == f"4 images in {tmp_path}, and stages.png"

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
        assert done.stdout == f"2 images in {tmp_path / 'out'}\n"
        done = run(*command, "--images", tmp_path / "b.jpg", "--output_dir", tmp_path / "one")
        assert done.stdout == f"{tmp_path / 'one' / 'b-8x10.png'}\n"

    @pytest.mark.parametrize(
        "flags, error",
        [
            ([], "error: base: give either a model that draws, or --images to enlarge"),
            (["--images", "nowhere.png"], "error: nowhere.png: No such file"),
            (["--images", __file__], "error: cannot identify image file"),
            (["--images", os.path.dirname(__file__)], f"error: images: {os.path.dirname(__file__)} is a folder; give"),
            (
                ["--images", "{picture}", "--upsamplers", "{base}"],
                "error: {base}: a ClassifierFreeGuidedPipeline does not",
            ),
            (["--images", "a/1.png", "b/1.png"], "error: images: two of them have one name"),
            (
                ["--base", "{base}", "--prompts", "a cat"],
                "error: the model, a ClassifierFreeGuidedPipeline, takes --class_labels",
            ),
            (
                ["--base", "{base}", "--class_labels", "sqare"],
                "error: class_labels: 'sqare' is not a label of this model; did you mean 'square'?",
            ),
            (["--base", "{base}", "--noise_level", "999"], "error: noise_level: 999 is not a whole number from 0"),
            (["--base", "{upsampler}"], "error: stages: one makes images of 16x16 pixels"),
            (["--base", "{base}", "--num", "0"], "error: num: 0 is not positive"),
        ],
    )
    def test_mistakes_are_one_sentence(self, base, upsampler_run, flags, error, tmp_path):
        picture = tmp_path / "picture.png"
        Image.new("L", (8, 8)).save(picture)
        flags = [flag.format(base=base, upsampler=upsampler_run, picture=picture) for flag in flags]
        command = ["sample_cascade.py", "--upsamplers", upsampler_run, "--output_dir", tmp_path / "out"]
        assert error_of(*command, *flags).startswith(error.format(base=base))
        assert not list(tmp_path.glob("out/*"))
