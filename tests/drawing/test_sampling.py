"""Samples drawn by several processes together, kept, and laid out."""

import os
import subprocess
import sys
from pathlib import Path

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
    SuperResolutionPipeline,
    UnconditionalPipeline,
    shapes,
)
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.drawing.cascade import draw_cascade
from hf_genmod.drawing.grids import (
    draw_checkpoint,
    draw_enlarged,
    draw_steps,
    draw_trajectory,
    side_by_side,
    stage_rows,
)
from hf_genmod.drawing.samples import CHUNK, draw_images, draw_to_folder, to_bytes
from hf_genmod.models.conditioning import enlarge, shrink
from hf_genmod.processes import processes
from hf_genmod.recipes.networks import ModelArguments

DRAW = """
import sys
sys.path.insert(0, {tests!r})
import torch
from hf_genmod.processes import processes
from hf_genmod.drawing.samples import draw_images
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
    script.write_text(DRAW.format(tests=Path(__file__).parents[1], folder=tmp_path))
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


NAMES = {0: "cat", 1: "dog", 2: "lizard"}


def tiny_upsampler(factor=2, sample_size=16, num_classes=None, id2label=None):
    unet = tiny_unet(conditioning_channels=3, sample_size=sample_size, num_classes=num_classes)
    pipe = SuperResolutionPipeline(unet, AncestralDDPMScheduler(), id2label, factor=factor, max_noise_level=200)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestCascade:
    @pytest.fixture
    def stages(self):
        base = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=3), AncestralDDPMScheduler(), id2label=NAMES)
        base.set_progress_bar_config(disable=True)
        return [base, tiny_upsampler(num_classes=3, id2label=NAMES), tiny_upsampler(4, sample_size=64)]

    def test_each_stage_enlarges_what_the_one_before_has_drawn_by_one_seed(self, stages):
        drawn = draw_cascade(
            stages, [5], [0, 100], num_inference_steps=2, output_type="pt", all_stages=True, class_labels=["dog"]
        )
        seed, options = [torch.Generator().manual_seed(5)], {"num_inference_steps": 2, "output_type": "pt"}
        small = stages[0](["dog"], generator=seed, **options).images
        larger = stages[1](small, class_labels=["dog"], generator=seed, **options).images
        largest = stages[2](larger, noise_level=100, generator=seed, **options).images
        assert all(torch.equal(ours, expected) for ours, expected in zip(drawn, (small, larger, largest), strict=True))

    def test_a_picture_is_that_of_its_seed_whatever_is_drawn_beside_it(self, stages):
        request = {"noise_level": 50, "num_inference_steps": 2, "output_type": "pt"}
        together = draw_cascade(stages, [7, 8, 9], class_labels=[0, 1, 2], **request)
        alone = draw_cascade(stages, [8], class_labels=[1], **request)
        torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-3)
        assert not torch.allclose(together[0], together[1], atol=0.1)

    def test_only_the_stage_at_work_is_on_the_accelerator(self, stages, monkeypatch):
        log = []
        for i, pipe in enumerate(stages):
            monkeypatch.setattr(pipe, "to", lambda device, i=i: log.append((i, str(device))))
            pipe.unet.register_forward_hook(lambda *_, i=i: log.append((i, "works")))
        draw_cascade(stages, [0], num_inference_steps=1, class_labels=["cat"])
        device = str(processes().device)
        assert log == [(i, what) for i in range(3) for what in (device, "works", "cpu")]

    def test_without_labels_it_draws_as_many_as_there_are_seeds(self):
        base = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
        base.set_progress_bar_config(disable=True)
        drawn = draw_cascade([base, tiny_upsampler()], range(3), num_inference_steps=1, all_stages=True)
        assert [[picture.size for picture in of_stage] for of_stage in drawn] == [[(8, 8)] * 3, [(16, 16)] * 3]
        grid = stage_rows(drawn)
        assert grid.size == (3 * 16, 2 * 16)
        assert grid.crop((16, 16, 32, 32)).tobytes() == drawn[1][1].tobytes()

    def test_an_upsampler_may_be_the_first(self):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8))
        (picture,) = draw_cascade([tiny_upsampler()], [0], num_inference_steps=1, image=[image])
        assert picture.size == (18, 10)

    @pytest.mark.parametrize(
        "second, options, message",
        [
            (
                lambda: tiny_upsampler(sample_size=32),
                {},
                "makes pictures of 8x8 pixels in 3 channels, and the next is",
            ),
            (lambda: UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler()), {}, "only the first can be one"),
            (lambda: tiny_upsampler(num_classes=3, id2label={0: "a", 1: "b", 2: "c"}), {}, "has the labels"),
            (tiny_upsampler, {"noise_level": [0, 0]}, "noise_level: 2 of them, and there are 1 upsamplers"),
            (tiny_upsampler, {"noise_level": 500}, "noise_level: 500 is not a whole number from 0 to 200"),
            (tiny_upsampler, {"class_labels": ["cat", "dog"]}, "generator: a list of 1 for 2 pictures"),
        ],
    )
    def test_mistakes_are_named(self, stages, second, options, message):
        with pytest.raises(ValueError, match=message):
            draw_cascade([stages[0], second()], [0], num_inference_steps=1, **({"class_labels": ["cat"]} | options))


def test_enlarged_pictures_are_shown_between_interpolation_and_the_truth():
    drawn = shapes.ShapesDataset(8, resolution=16)
    pictures = PictureDataset([drawn[i]["image"] for i in range(8)], "shapes")
    pipe = tiny_upsampler()
    grid = draw_enlarged(pipe, pictures, num_columns=3, num_inference_steps=2)
    assert grid.size == (3 * 16, 8 * 16)
    cells = [
        [np.asarray(grid.crop((16 * x, 16 * y, 16 * x + 16, 16 * y + 16)), int) for x in range(3)] for y in range(8)
    ]
    x = torch.stack([torch.from_numpy(np.array(drawn[i * 8 // 6]["image"])) for i in range(6)]).permute(0, 3, 1, 2)
    small = shrink(x / 127.5 - 1, 2)
    expected = {0: small.repeat_interleave(2, 2).repeat_interleave(2, 3), 1: enlarge(small, 2).clamp(-1, 1)}
    for half in range(2):
        for row, images in expected.items():
            for column in range(3):
                image = (images[3 * half + column].permute(1, 2, 0) + 1) * 127.5
                assert np.abs(cells[4 * half + row][column] - image.numpy()).max() <= 0.51
        for column in range(3):
            i = 3 * half + column
            assert (cells[4 * half + 3][column] == x[i].permute(1, 2, 0).numpy()).all()
            image = pipe(
                small[i : i + 1] / 2 + 0.5, generator=[torch.Generator().manual_seed(i)], num_inference_steps=2
            )
            assert np.abs(cells[4 * half + 2][column] - np.asarray(image.images[0], int)).max() <= 1
