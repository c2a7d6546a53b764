"""`hf_genmod edit`."""

import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES, error_of, run
from PIL import ExifTags, Image
from tiny import TINY_UNET, randomized

from hf_genmod import (
    AncestralDDPMScheduler,
    ClassifierFreeGuidedPipeline,
    DenoisingUNet2DModel,
    UnconditionalPipeline,
    load_pipeline,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    unet = randomized(DenoisingUNet2DModel(**TINY_UNET, num_classes=2))
    scheduler = AncestralDDPMScheduler(timestep_spacing="trailing")
    ClassifierFreeGuidedPipeline(unet, scheduler, id2label={0: "cat", 1: "dog"}).save_pretrained(folder / "model")
    edge = Image.new("L", (30, 20))
    edge.paste(255, (0, 0, 2, 20))
    edge.save(folder / "edge-mask.png")
    (folder / "no-image.png").write_text("no image")
    rng = np.random.default_rng(0)
    for name, size in (("small", (8, 8, 3)), ("large", (20, 30, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{name}.png")
        mask = Image.new("L", size[1::-1])
        mask.paste(255, (0, 0, size[1] // 2, size[0]))
        mask.save(folder / f"{name}-mask.png")
    return folder


def edited(files, *flags, steps=3):
    command = ["--model", files / "model", "--num_inference_steps", steps, "--output", files / "out.png"]
    return run("edit.py", *command, *flags)


def test_a_part_drawn_anew_for_each_class(files):
    flags = ["--image", files / "small.png", "--mask_image", files / "small-mask.png", "--num", 2]
    done = edited(files, *flags)
    assert done.stdout == f"4 images in {files / 'out.png'}, beside the one that was given\n"
    shown = np.asarray(Image.open(files / "out.png"))
    direct = load_pipeline(files / "model")(
        "dog", image=Image.open(files / "small.png"), mask_image=Image.open(files / "small-mask.png"),
        generator=torch.Generator().manual_seed(1), num_inference_steps=3,
    ).images[0]  # fmt: skip
    enlarged = np.asarray(direct.resize((96, 96), Image.Resampling.NEAREST), int)
    bottom = shown[-100:-4, 200:296]  # the last row, after the image that was given and the first one
    assert abs(bottom.astype(int) - enlarged).max() <= 1


def test_many_are_drawn_in_batches(files, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # for what the script imports
    script, sizes = runpy.run_path(str(EXAMPLES / "edit.py")), set()
    given = [str(files / "small.png")], str(files / "small-mask.png")
    flags = {"class_labels": ["dog"], "num": 18, "num_inference_steps": 2, "output": str(files / "many.png")}

    def note(module, inputs):
        if isinstance(module, DenoisingUNet2DModel):
            sizes.add(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    script["main"](script["EditArguments"](str(files / "model"), *given, **flags))
    hook.remove()
    assert sizes == {2 * 16, 2 * 2}  # with and without the label


def test_an_image_of_8_bits_is_no_measured_values(files):
    unet = DenoisingUNet2DModel(**TINY_UNET)
    value_range = {"low": [0.0] * 3, "high": [9.0] * 3}
    UnconditionalPipeline(unet, AncestralDDPMScheduler(), value_range=value_range).save_pretrained(files / "measured")
    error = error_of("edit.py", "--model", files / "measured", "--image", files / "small.png")
    assert "small.png: it has 8 bits, and this model was trained on measured values; give a file of them" in error


def test_an_image_of_another_size_is_cropped_with_its_mask(files):
    done = edited(
        files, "--image", files / "large.png", "--mask_image", files / "large-mask.png", "--class_labels", "cat"
    )
    assert "8 images" in done.stdout


def test_a_mask_is_of_an_image_as_it_is_shown(files, tmp_path):
    """Cameras save how to turn an image, and not the image turned."""
    image, mask = (Image.open(files / f"{name}.png") for name in ("large", "large-mask"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    mask.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned-mask.png", exif=exif)
    turned, turned_mask, results = tmp_path / "turned.png", tmp_path / "turned-mask.png", []
    upright, upright_mask = files / "large.png", files / "large-mask.png"
    for of, by in ((upright, upright_mask), (turned, upright_mask), (turned, turned_mask)):
        edited(files, "--class_labels", "cat", "--num", 1, "--image", of, "--mask_image", by)
        results.append(Image.open(files / "out.png").tobytes())
    assert results[0] == results[1] == results[2]


def test_between_two_images_as_a_gif(files):
    images = [files / "small.png", files / "large.png"]
    out = files / "new folder" / "between.gif"
    done = run("edit.py", "--model", files / "model", "--image", *images, "--class_labels", "cat", "dog", "--num", 3,
               "--num_inference_steps", 3, "--output", out)  # fmt: skip
    assert Image.open(out).n_frames == 3
    assert re.search(r"large.png does not come back \(\d+ dB, and 30 are close\); more --num_inference", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("names, count", [(["small"], 6), (["small", "large"], 3)])
def test_two_processes_write_one_picture(files, tmp_path, names, count):
    flags = ["--model", files / "model", "--image", *[files / f"{name}.png" for name in names], "--class_labels",
             "cat", "dog", "--num", 3, "--num_inference_steps", 3]  # fmt: skip
    assert run("edit.py", *flags, "--output", tmp_path / "one.png").returncode == 0
    command = [sys.executable, "-m", "hf_genmod", "edit", *flags, "--output", tmp_path / "two.png"]
    done = subprocess.run([*map(str, command), "--num_processes", "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{count} images in") == 1
    one, two = (np.asarray(Image.open(tmp_path / name), int) for name in ("one.png", "two.png"))
    assert one.shape == two.shape and abs(one - two).max() <= 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--imge", "{}/small.png"], "--imge: no such flag; did you mean --image?"),
        (["{}/small.png"], "small.png: belongs to no flag; put its flag in front, such as --image"),
        ([], "the following arguments are required: --image; --help tells what flags take"),
        (["--image", "{}/missing.png"], "error: {}/missing.png: No such file or directory"),
        (["--image", "{}/no-image.png"], "error: {}/no-image.png: no image that Pillow knows"),
        (["--image", "{}/small.png", "{}/large.png"], "class_labels: say of which class the two images are; give one"),
        (["--image", "{}/small.png", "{}/large.png", "--num", "1"], "num: 1 is less than the two images; give 2 or"),
        (
            ["--image", "{}/large.png", "--fit", "false"],
            "image: 20x30 pixels (height, width), and this model draws 8x8",
        ),
        (["--image", "{}/small.png", "--mask_image", "{}/large-mask.png"], "mask_image: 20x30 pixels"),
        (["--image", "{}/small.png", "--mask_image", "{}/no-image.png"], "{}/no-image.png: no image that Pillow"),
        (["--image", "{}/small.png", "--mask_image", "{}/small.png"], "mask_image: it has grey levels"),
        (["--image", "{}/small.png", "--class_labels", "bird"], "class_labels: 'bird' is not a label"),
        (["--image", "{}/small.png", "--strength", "2"], "strength: 2.0 is not within (0, 1]"),
        (["--image", "{0}/small.png", "{0}/small.png", "--strength", "0.5"], "image: two of them, and mask_image and"),
        (["--image", "{}/small.png", "--output", "{}/out.txt"], "out.txt is of no format that Pillow writes"),
        (["--image", "{}/small.png", "--output", "{}/out.psd"], "out.psd is of no format that Pillow writes"),
        (
            ["--image", "{}/large.png", "--mask_image", "{}/edge-mask.png"],
            "edge-mask.png is black all over; crop both yourself",
        ),
    ],
)
def test_errors(files, flags, message):
    flags = [flag.format(files) for flag in flags]
    assert message.format(files) in error_of("edit.py", "--model", files / "model", "--num_inference_steps", 2, *flags)
