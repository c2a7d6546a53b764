"""Samples drawn by several processes together, kept, and laid out."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_autoencoder, tiny_text_pipeline, tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    UnconditionalPipeline,
)
from hf_genmod.recipe import ModelArguments
from hf_genmod.sampling import (
    CHUNK,
    draw_checkpoint,
    draw_images,
    draw_steps,
    draw_to_folder,
    draw_trajectory,
    side_by_side,
    to_bytes,
)

DRAW = """
import sys
sys.path.insert(0, {tests!r})
import torch
from hf_genmod.processes import processes
from hf_genmod.sampling import draw_images
from test_sampling import tiny_pipeline

state = processes()
images = draw_images(tiny_pipeline(), [0, 1, 2, 0, 1], seed=3, num_inference_steps=3)
for i, image in enumerate(images):
    image.save(f"{folder}/{{state.process_index}}-{{i}}.png")

class Broken:
    def __call__(self, class_labels, **kwargs):
        if 1 in class_labels:
            raise ZeroDivisionError("no picture")
        return tiny_pipeline()(class_labels, num_inference_steps=1, **kwargs)

try:
    draw_images(Broken(), [0, 1])
except RuntimeError as error:
    open(f"{folder}/error-{{state.process_index}}", "w").write(str(error))
state.destroy_process_group()
"""


def tiny_pipeline():
    pipeline = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=3), ModelArguments().make_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_two_processes_share_the_drawing_of_the_same_pictures(tmp_path):
    script = tmp_path / "draw.py"
    script.write_text(DRAW.format(tests=os.path.dirname(__file__), folder=tmp_path))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    alone = draw_images(tiny_pipeline(), [0, 1, 2, 0, 1], seed=3, num_inference_steps=3)
    for process in (0, 1):
        assert (tmp_path / f"error-{process}").read_text() == "ZeroDivisionError: no picture"
        for i, image in enumerate(alone):
            other = np.asarray(Image.open(tmp_path / f"{process}-{i}.png"), dtype=int)
            assert abs(other - np.asarray(image)).max() <= 1  # of 255, as rounding differs with the size of a batch
    assert len({image.tobytes() for image in alone}) == 5


class TestDrawingToAFolder:
    def test_gives_what_each_seed_gives_alone_and_counts_what_it_costs(self, tmp_path):
        pipeline, labels = tiny_pipeline(), [i % 3 for i in range(CHUNK + 7)]
        request = {"num_inference_steps": 2, "guidance_scale": 3.0}
        drawn = draw_to_folder(pipeline, tmp_path, {"class_labels": labels}, len(labels), seed=5, **request)
        assert drawn["images"].shape == (CHUNK + 7, 3, 8, 8) and drawn["images"].dtype == torch.uint8
        assert drawn["forward_passes"] == 4  # two steps, with and without the label
        for i in (0, 3, CHUNK, CHUNK + 6):
            generator = [torch.Generator().manual_seed(5 + i)]
            alone = pipeline([labels[i]], generator=generator, output_type="pt", **request).images
            difference = to_bytes(alone, pipeline)[0].int() - drawn["images"][i].int()
            assert difference.abs().max() <= 1  # as rounding differs

    def test_draws_only_what_is_missing(self, tmp_path):
        pipeline = UnconditionalPipeline(tiny_unet(), ModelArguments().make_scheduler())
        pipeline.set_progress_bar_config(disable=True)
        first = draw_to_folder(pipeline, tmp_path, {}, 2 * CHUNK, num_inference_steps=1)
        (tmp_path / f"{CHUNK:05}.pt").unlink()
        pipeline.unet.conv_in.bias.data += 1  # another model, to be seen where it draws
        second = draw_to_folder(pipeline, tmp_path, {}, 2 * CHUNK, num_inference_steps=1)
        same = (first["images"] == second["images"]).flatten(1).all(dim=1)
        assert same[:CHUNK].all() and not same[CHUNK:].any()


def test_measured_values_are_kept_by_their_range():
    ranges = {"low": [-2.0, 0.0, 0.0], "high": [2.0, 1.0, 10.0]}
    pipeline = UnconditionalPipeline(tiny_unet(), ModelArguments().make_scheduler(), value_range=ranges)
    values = torch.tensor([0.0, 1.0, 20.0])[None, :, None, None]
    assert to_bytes(values, pipeline).flatten().tolist() == [128, 255, 255]


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
def test_rows_of_pictures_are_laid_out_and_enlarged(channels):
    rows = [torch.full((3, channels, 8, 16), 10 * (row + 1), dtype=torch.uint8) for row in range(2)]
    grid = side_by_side(rows)
    assert (grid.mode, grid.size) == ("RGB", (3 * 16 * 8, 2 * 8 * 8))
    pixels = np.asarray(grid).reshape(2 * 64, -1)
    assert (pixels[:64] == 10).all() and (pixels[64:] == 20).all()


def cell(figure, column, row, width, left=0, height=None):
    """A cell of a labelled figure, without the gap after it."""
    height = height or width
    x, y = left + column * (width + 6), 16 + row * (height + 6)
    return figure.crop((x, y, x + width, y + height))


def enlarged(picture, width):
    return picture.convert("RGB").resize((width, width), Image.Resampling.NEAREST)


def test_a_trajectory_ends_at_the_picture_itself():
    pipe = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    figure = draw_trajectory(pipe, {"count": 2}, num_columns=3, num_inference_steps=5)
    pictures = draw_images(pipe, count=2, num_inference_steps=5)
    for row, picture in enumerate(pictures):
        assert cell(figure, 2, row, 128).tobytes() == enlarged(picture, 128).tobytes()
        assert cell(figure, 0, row, 128).tobytes() != enlarged(picture, 128).tobytes()


def test_a_grid_of_steps_shows_what_each_setting_draws():
    pipe = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    figure = draw_steps(pipe, {"class_labels": [1]}, {"guidance_scale": [1.0, 4.0]}, steps=(2, 3))
    for row, scale in enumerate((1.0, 4.0)):
        for column, steps in enumerate((2, 3)):
            (picture,) = draw_images(pipe, [1], guidance_scale=scale, num_inference_steps=steps)
            assert cell(figure, column, row, 128, left=110).tobytes() == enlarged(picture, 128).tobytes()


@pytest.mark.parametrize("kind", ["classes", "text", "none", "variational", "plain"])
def test_what_a_checkpoint_makes_is_drawn_by_the_seeds_from_0(kind):
    vae = tiny_autoencoder(Autoencoder)
    vae.fit_prior(torch.randn(50, *vae.latent_shape(8, 8), generator=torch.Generator().manual_seed(0)))
    pipe, first = {
        "classes": lambda: (
            ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler()), {"class_labels": [0]}
        ),
        "text": lambda: (tiny_text_pipeline(), {"prompt": ["two lizards"]}),
        "none": lambda: (UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler()), {}),
        "variational": lambda: (AutoencoderPipeline(tiny_autoencoder()), {"prior": "standard"}),
        "plain": lambda: (AutoencoderPipeline(vae), {"prior": "fitted"}),
    }[kind]()  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 20} if "unet" in pipe.components else {}
    figure = draw_checkpoint(pipe, ["two lizards", "a cat"])
    picture = pipe(**first, **steps, generator=[torch.Generator().manual_seed(0)]).images[0]
    scale = 8 if kind == "text" else 1  # below its caption, and enlarged
    shown = figure.crop((0, 16, 64, 80)) if kind == "text" else figure.crop((0, 0, 8, 8))
    expected = picture.resize((8 * scale, 8 * scale), Image.Resampling.NEAREST)
    difference = np.abs(np.asarray(shown.convert("RGB"), float) - np.asarray(expected.convert("RGB"), float))
    assert difference.max() <= 1  # the shapes of a batch alter rounding
