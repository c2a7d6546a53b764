"""Grids of images: what they show, and where."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from tiny import tiny_autoencoder, tiny_text_pipeline, tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    SuperResolutionPipeline,
    UnconditionalPipeline,
)
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.shapes import ShapesDataset
from hf_genmod.drawing.grids import (
    class_rows,
    denoising,
    draw_checkpoint,
    draw_enlarged,
    draw_reconstructions,
    draw_steps,
    draw_trajectory,
    grid,
    save_frames,
    side_by_side,
)
from hf_genmod.drawing.samples import draw_images
from hf_genmod.models.conditioning import enlarge, shrink


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
def test_rows_of_pictures_are_laid_out_and_enlarged(channels):
    rows = [torch.full((3, channels, 8, 16), 10 * (row + 1), dtype=torch.uint8) for row in range(2)]
    figure = side_by_side({"a": rows[0], "b": rows[1]})
    assert (figure.mode, figure.size) == ("RGB", (3 * (16 * 12 + 4), 2 * (20 + 8 * 12 + 4)))
    for row in range(2):
        for column in range(3):
            shown = np.asarray(figure.crop((196 * column, 20 + 120 * row, 196 * column + 192, 116 + 120 * row)))
            assert (shown == 10 * (row + 1)).all()


def cell(figure, column, row, side=96, top=0, gap=4):
    """An image of a grid, whose rows have texts above them where `top` is 20."""
    x, y = column * (side + gap), row * (side + gap + top) + top
    return figure.crop((x, y, x + side, y + side))


def enlarged(picture, side=96):
    return picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)


def ink(figure):
    """Around what is not white."""
    return ImageChops.difference(figure, Image.new("RGB", figure.size, "white")).getbbox()


def test_texts_are_shown_whole_and_images_beneath_them():
    blank, name = Image.new("L", (32, 32), 255), "a red cat, a green dog and two lizards on the hill behind the house"
    figure = grid([[blank] * 2, [blank] * 2], [name, "b"])
    assert figure.size == (200, 2 * 100 + (4 + 3 * 16) + (4 + 16))  # in three lines, and in one
    left, top, right, bottom = ink(figure.crop((0, 0, 200, 52)))
    assert 0 < left and 0 < top and right < 200 and bottom <= 52
    assert ink(figure.crop((0, 52, 200, 152))) is None and ink(figure.crop((0, 152, 200, 172)))
    assert ink(figure.crop((0, 172, 200, 272))) is None
    figure = grid([[blank] * 2], column_names=["after t = 999", "b"])
    assert figure.size == (200, 20 + 100)
    assert ink(figure)[2] > 100 and ink(figure)[3] <= 20


def test_images_of_several_sizes_are_shown_at_that_of_the_largest():
    small, large = Image.new("RGB", (2, 1), "red"), Image.new("RGB", (20, 30), "blue")
    figure = grid([[small], [large]])
    assert figure.size == (104, 2 * 154)  # five times 20, at least 96
    assert figure.getpixel((99, 149)) == (255, 0, 0) and figure.getpixel((0, 154)) == (0, 0, 255)
    assert figure.getpixel((100, 0)) == figure.getpixel((0, 150)) == (255, 255, 255)
    assert grid([[Image.new("RGB", (200, 100))]]).size == (204, 104)


def test_a_row_of_samples_has_the_name_of_its_class():
    names = {0: "x", 1: "y", 2: "z"}
    pipe = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=3), AncestralDDPMScheduler(), id2label=names)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_columns": 2, "num_inference_steps": 2}
    figure = class_rows(pipe, [2, 1], **options)
    pictures = draw_images(pipe, {"class_labels": [2, 2, 1, 1]}, num_inference_steps=2)
    assert figure.size == (200, 2 * 120)
    for i, picture in enumerate(pictures):
        assert cell(figure, i % 2, i // 2, top=20).tobytes() == enlarged(picture).tobytes()
    named = grid([pictures[:2], pictures[2:]], ["z", "y"])
    assert named.tobytes() == figure.tobytes()
    pipe.register_to_config(id2label=None)
    numbered = grid([pictures[:2], pictures[2:]], ["class 2", "class 1"])
    assert class_rows(pipe, [2, 1], **options).tobytes() == numbered.tobytes()
    assert class_rows(pipe, max_rows=1, **options).size == (200, 120)


def test_a_trajectory_ends_at_the_picture_itself():
    pipe = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    figure = draw_trajectory(pipe, {}, 2, num_columns=3, num_inference_steps=5)
    pictures = draw_images(pipe, count=2, num_inference_steps=5)
    for row, picture in enumerate(pictures):
        last, first = (figure.crop((x, 40 + 120 * row, x + 96, 136 + 120 * row)) for x in (200, 0))
        assert last.tobytes() == enlarged(picture).tobytes() != first.tobytes()


@pytest.mark.parametrize("kind", ["classes", "numbers", "captions"])
def test_figures_name_what_their_images_are_of(kind):
    names = {"classes": ["dog", "cat"], "numbers": ["class 1", "class 0"], "captions": ["a dog", "a cat"]}[kind]
    if kind == "captions":
        pipe, request = tiny_text_pipeline(), {"prompt": names}
    else:
        labels = {"id2label": {0: "cat", 1: "dog"}} if kind == "classes" else {}
        pipe = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler(), **labels)
        request = {"class_labels": [1, 0]}
    pipe.set_progress_bar_config(disable=True)

    def title(text, width):
        return grid([[Image.new("RGB", (width, 96))]], [text]).crop((0, 0, width, 20)).tobytes()

    figure = draw_trajectory(pipe, request, 2, num_columns=3, num_inference_steps=3)
    for row, name in enumerate(names):
        assert figure.crop((0, 20 + 120 * row, 196, 40 + 120 * row)).tobytes() == title(name, 196)
    four = {name: values * 2 for name, values in request.items()}
    figure = draw_steps(pipe, four, {"guidance_scale": [1.0]}, steps=(2, 3))
    told = f"guidance scale 1: {', '.join(names)}; below {', '.join(names)}"
    assert figure.crop((0, 20, 404, 40)).tobytes() == title(told, 404)


def test_a_grid_of_steps_shows_what_each_setting_draws():
    names = {0: "cat", 1: "dog"}
    pipe = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler(), id2label=names)
    pipe.set_progress_bar_config(disable=True)
    request = {"class_labels": [1, 0, 1, 1]}
    figure = draw_steps(pipe, request, {"guidance_scale": [1.0, 4.0]}, steps=(2, 3))
    assert figure.size == (2 * 204, 20 + 2 * (20 + 204))
    for row, scale in enumerate((1.0, 4.0)):
        for column, steps in enumerate((2, 3)):
            pictures = draw_images(pipe, request, guidance_scale=scale, num_inference_steps=steps)
            shown = figure.crop((204 * column, 224 * row + 40, 204 * column + 200, 224 * row + 240))
            for i, picture in enumerate(pictures):
                assert cell(shown, i % 2, i // 2).tobytes() == enlarged(picture).tobytes()


def test_a_grid_of_steps_without_guidance_names_its_images():
    pipe = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    figure = draw_steps(pipe, {}, {}, steps=(2, 3))
    assert figure.size == (2 * 204, 20 + 20 + 204)
    assert ink(figure.crop((0, 20, 200, 40)))


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
    shown = cell(figure, 0, 0, top=20 if kind in ("classes", "text") else 0)
    difference = np.abs(np.asarray(shown, float) - np.asarray(enlarged(picture), float))
    assert difference.max() <= 1  # the shapes of a batch alter rounding


def test_reconstructions_are_shown_below_the_images():
    for count in (3, 60):
        data = PictureDataset([Image.new("RGB", (8, 8), (4 * i, 100, 255 - 4 * i)) for i in range(count)], "colors")
        pipeline = AutoencoderPipeline(tiny_autoencoder())
        figure = draw_reconstructions(pipeline, data, prior="standard")
        assert figure.size == (12 * 100, 5 * 120 + 100)
        shown = [i * count // 24 for i in range(24)]
        images = data.x_0(shown) / 2 + 0.5
        expected, reconstructed = pipeline.postprocess(data.x_0(shown)), pipeline.reconstruct(images).images
        samples = pipeline(24, generator=[torch.Generator().manual_seed(i) for i in range(24)]).images
        for i in range(24):
            row, column = divmod(i, 12)
            assert cell(figure, column, 2 * row, top=20).tobytes() == enlarged(expected[i]).tobytes()
            tile = np.asarray(cell(figure, column, 2 * row + 1, top=20), int)
            assert abs(tile - np.asarray(enlarged(reconstructed[i]))).max() <= 1
            y = 4 * 120 + 20 + 100 * row
            assert (
                figure.crop((100 * column, y, 100 * column + 96, y + 96)).tobytes() == enlarged(samples[i]).tobytes()
            )


def test_enlarged_pictures_are_shown_between_interpolation_and_the_truth():
    drawn = ShapesDataset(8, resolution=16)
    pictures = PictureDataset([drawn[i]["image"] for i in range(8)], "shapes")
    unet = tiny_unet(conditioning_channels=3, sample_size=16)
    pipe = SuperResolutionPipeline(unet, AncestralDDPMScheduler(), factor=2, max_noise_level=200)
    pipe.set_progress_bar_config(disable=True)
    figure = draw_enlarged(pipe, pictures, num_columns=3, num_inference_steps=2)
    assert figure.size == (3 * 100, 8 * 120)
    cells = [[np.asarray(cell(figure, x, y, top=20), int)[::6, ::6] for x in range(3)] for y in range(8)]
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
            seed = [torch.Generator().manual_seed(i)]
            (image,) = pipe(small[i : i + 1] / 2 + 0.5, generator=seed, num_inference_steps=2).images
            assert np.abs(cells[4 * half + 2][column] - np.asarray(image, int)).max() <= 1


@pytest.mark.parametrize("ending", ["gif", "webp", "apng"])
def test_frames_follow_one_another(tmp_path, ending):
    colors, file = ["red", "lime", "blue"], tmp_path / "new" / f"frames.{ending}"
    save_frames([Image.new("RGB", (8, 16), color) for color in colors], file, least=32, seconds=0.2)
    with Image.open(file) as animation:
        assert (animation.n_frames, animation.size) == (3, (32, 64))
        for i, color in enumerate(colors):
            animation.seek(i)
            animation.load()
            assert animation.info["duration"] == (200 if i < 2 else 1000)
            expected = np.asarray(Image.new("RGB", (32, 64), color), int)
            assert abs(np.asarray(animation.convert("RGB"), int) - expected).max() <= 16  # WebP is lossy


def test_frames_of_a_picture_lie_side_by_side(tmp_path):
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    save_frames(images, tmp_path / "row.png", least=32)
    assert Image.open(tmp_path / "row.png").tobytes() == grid([images], least=32).tobytes()
    with pytest.raises(ValueError, match="images: there are none to save; give one or more"):
        save_frames([], tmp_path / "row.png")


def test_the_last_image_of_denoising_is_the_sample():
    pipeline = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler(timestep_spacing="trailing"))
    shown = denoising(pipeline, {}, 2, num_inference_steps=4)
    assert [t for t, _ in shown] == [999, 749, 499, 249]
    for drawn, sample in zip(shown[-1][1], draw_images(pipeline, {}, 2, num_inference_steps=4), strict=True):
        assert ImageChops.difference(drawn, sample).getextrema() == ((0, 0),) * 3
