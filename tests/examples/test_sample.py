import runpy

import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES, error_of, run
from PIL import Image
from tiny import TINY_UNET, randomized

from hf_genmod import (
    AncestralDDPMScheduler,
    ClassifierFreeGuidedPipeline,
    DenoisingUNet2DModel,
    UnconditionalPipeline,
    load_pipeline,
)
from hf_genmod.training.text_encoder import train_tokenizer

STEPS = ["--num_inference_steps", "3"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "labelled"
    unet = randomized(DenoisingUNet2DModel(**TINY_UNET, num_classes=3))
    names = {0: "cat", 1: "dog", 2: "7"}
    ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(), id2label=names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "plain"
    unet = randomized(DenoisingUNet2DModel(**TINY_UNET))
    UnconditionalPipeline(unet, AncestralDDPMScheduler()).save_pretrained(folder)
    return folder


def drawn(folder, seed, **request):
    pipeline = load_pipeline(folder)
    (image,) = pipeline(generator=[torch.Generator().manual_seed(seed)], num_inference_steps=3, **request).images
    return np.asarray(image, dtype=int)


def test_the_images_of_a_folder_are_those_that_the_pipeline_draws(labelled, tmp_path):
    """The label "7" is the name of a class and not a number."""
    command = ["--model", labelled, "--class_labels", "dog", "7", "0", "--num", 2, "--seed", 5, "--guidance_scale", 3]
    done = run("sample.py", *command, *STEPS, "--output", tmp_path / "out")
    assert done.stdout == f"6 images in {tmp_path / 'out'}\n" and "drawing: 100%" in done.stderr
    files = {
        f"{name}-{seed}.png" for name, seed in zip(["dog"] * 2 + ["7"] * 2 + ["cat"] * 2, range(5, 11), strict=True)
    }
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    for name, label, seed in (("dog", 1, 6), ("7", 2, 7), ("cat", 0, 10)):
        image = np.asarray(Image.open(tmp_path / "out" / f"{name}-{seed}.png"), dtype=int)
        assert abs(image - drawn(labelled, seed, class_labels=[label], guidance_scale=3.0)).max() <= 1  # rounding


def test_numbers_are_names_where_all_classes_have_numbers_for_names(labelled, tmp_path):
    pipeline = load_pipeline(labelled)
    pipeline.register_to_config(id2label={0: "1", 1: "2", 2: "10"})
    pipeline.save_pretrained(tmp_path / "numbers")
    command = ["--model", tmp_path / "numbers", "--num", 1, *STEPS, "--output", tmp_path / "out", "--class_labels"]
    assert "class_labels: '0' is not a label of this model" in error_of("sample.py", *command, "0")
    run("sample.py", *command, "2")
    image = np.asarray(Image.open(tmp_path / "out" / "2-0.png"), dtype=int)
    assert abs(image - drawn(labelled, 0, class_labels=[1])).max() <= 1


def test_a_picture_has_a_named_row_for_each_class(labelled, tmp_path):
    picture = tmp_path / "new" / "grid.png"
    run("sample.py", "--model", labelled, "--num", 17, *STEPS, "--output", picture)
    width, height = Image.open(picture).size
    assert (width, height) == (16 * 100, 6 * 100 + 3 * 20)  # two rows of at most 16 for each of the three classes


def test_images_without_conditions_are_in_a_square(plain, tmp_path):
    run("sample.py", "--model", plain, "--num", 9, *STEPS, "--output", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (3 * 100, 3 * 100)


def test_a_model_without_conditions_draws_so_many_images(plain, tmp_path):
    assert run("sample.py", "--model", plain, "--num", 3, *STEPS, "--output", tmp_path / "out").returncode == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "2.png"]
    image = np.asarray(Image.open(tmp_path / "out" / "2.png"), dtype=int)
    assert abs(image - drawn(plain, 2, batch_size=1)).max() <= 1


def test_a_class_is_found_whatever_its_case_if_only_one_is_alike():
    conditions = runpy.run_path(str(EXAMPLES / "sample.py"))["conditions"]
    unet = DenoisingUNet2DModel(**TINY_UNET, num_classes=3)
    names = {0: "Cat", 1: "dog", 2: "Dog"}
    pipeline = ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(), id2label=names)
    assert conditions(pipeline, ["cat", "Dog", "DOG", "1"], [])[2] == ["Cat", "Dog", "DOG", 1]


def test_a_class_asked_for_twice_is_drawn_twice(labelled, tmp_path):
    command = ["--model", labelled, "--class_labels", "cat", "cat", "--num", 1, *STEPS, "--output", tmp_path / "out"]
    assert run("sample.py", *command).returncode == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"cat-0.png", "cat-1.png"}


@pytest.mark.parametrize(
    "flags, error",
    [
        (
            ["--class_labels", "dgo"],
            "error: class_labels: 'dgo' is not a label of this model; did you mean 'dog'?",
        ),
        (["--prompts", "a dog"], "error: the model, a ClassifierFreeGuidedPipeline, takes --class_labels"),
        (["--num", "0"], "error: num: 0 is not positive"),
        (["--num_inference_steps", "0"], "error: num_inference_steps: 0 "),
        (
            ["--output", "u.xyz"],
            "error: output: u.xyz is neither a folder nor of a format that Pillow writes, such as",
        ),
        (
            ["--output", "u.psd"],
            "error: output: u.psd is neither a folder nor of a format that Pillow writes, such as",
        ),
        (["--output", "tests"], "error: output: tests exists; give a new folder, or a picture such as tests.png"),
        (["--model", "nowhere/at/all"], "error: 'nowhere/at/all' is not a folder"),
    ],
)
def test_mistakes_are_one_sentence(labelled, flags, error, tmp_path):
    command = ["sample.py", "--model", labelled, "--output", tmp_path / "grid.png", *flags]
    assert error_of(*command).startswith(error)
    assert not list(tmp_path.iterdir())


def test_guidance_is_refused_for_a_model_without_conditions(plain, tmp_path):
    error = error_of("sample.py", "--model", plain, "--guidance_scale", 2, "--output", tmp_path / "grid.png")
    assert error == "error: guidance_scale: the model, an UnconditionalPipeline, has no guidance; leave it out"


def test_words_that_no_caption_had_are_named():
    unknown_words = runpy.run_path(str(EXAMPLES / "sample.py"))["unknown_words"]
    tokenizer = train_tokenizer(["a large red circle", "A dog's dinner", "rot-grün"])
    assert unknown_words(tokenizer, ["a Red zebra", "large, dog's rot; grün circles"]) == ["zebra", "circles"]
    large = train_tokenizer([f"word{i}" for i in range(9000)])
    assert unknown_words(large, ["zebra"]) == []  # not every word of the training is one token
