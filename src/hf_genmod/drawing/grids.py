"""Images in a grid: samples, reconstructions, enlarged images, and a comparison of settings."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.drawing.samples import draw_images
from hf_genmod.models.conditioning import enlarge, shrink
from hf_genmod.pipelines.autoencoder import AutoencoderPipeline


def grid(
    rows: Sequence[Sequence[Image.Image]],
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    least: int = 96,
) -> Image.Image:
    """A grid of images, with texts above each row and each column. All images are shown at the size of the largest;
    small ones are enlarged by a whole factor, without interpolation, to at least `least` pixels."""
    width, height = map(max, zip(*(image.size for row in rows for image in row), strict=True))
    scale = math.ceil(least / min(width, height))
    width, height = scale * width, scale * height
    gap, line, top, font = 4, 16, (20 if column_names else 0), ImageFont.load_default(13)
    total = max(map(len, rows)) * (width + gap)
    # A character of the font is about 6 pixels wide, and 9 if all are wide.
    texts = [textwrap.wrap(name, max(1, total // 9)) for name in row_names] or [[]] * len(rows)
    heights = [line * len(text) + 4 * bool(text) + height + gap for text in texts]
    figure = Image.new("RGB", (total, top + sum(heights)), "white")
    pen = ImageDraw.Draw(figure)
    for column, name in enumerate(column_names):
        pen.text((column * (width + gap) + 2, 2), name, fill="black", font=font)
    for row, text, below in zip(rows, texts, heights, strict=True):
        for i, words in enumerate(text):
            pen.text((2, top + 2 + i * line), words, fill="black", font=font)
        top += below
        for column, image in enumerate(row):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            figure.paste(enlarged, (column * (width + gap), top - gap - height))
    return figure


def save_frames(images: Sequence[Image.Image], file: str | Path, least: int = 96, seconds: float = 0.15) -> None:
    """Writes images one after another: as an animation, with `seconds` for each and a second for the last, if the file
    is a .gif, .webp or .png of several frames (.apng), else side by side in a row."""
    if len(images) == 0:
        raise ValueError("images: there are none to save; give one or more")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    if Path(file).suffix.lower() not in (".gif", ".webp", ".apng"):
        grid([images], least=least).save(file)
        return
    scale = math.ceil(least / min(images[0].size))
    frames = [image.resize([scale * length for length in image.size], Image.Resampling.NEAREST) for image in images]
    durations = [int(1000 * seconds)] * (len(frames) - 1) + [1000]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def in_rows(images: Sequence, num_columns: int) -> list[Sequence]:
    """Images, row by row."""
    return [images[start : start + num_columns] for start in range(0, len(images), num_columns)]


def side_by_side(rows: dict[str, torch.Tensor]) -> Image.Image:
    """A grid with a row for each (n, C, H, W) `uint8` tensor, by its name; of more than four channels three are
    shown."""
    images = [row[:, :3] if row.shape[1] > 4 else row for row in rows.values()]
    return grid([[Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy()) for x in row] for row in images], [*rows])


def sample_rows(
    pipeline, request: dict | None = None, names: Sequence[str] = (), num_columns: int = 8, num_rows: int = 8, **kwargs
) -> Image.Image:
    """
    A grid of samples; further arguments are those of [`~hf_genmod.drawing.samples.draw_images`]. A `request` has
    arguments with one value per row, such as "class_labels" or "prompt"; `names` are the texts above the rows, and
    `num_rows` is for a grid without a request.
    """
    each = {name: [value for value in values for _ in range(num_columns)] for name, values in (request or {}).items()}
    return grid(in_rows(draw_images(pipeline, each, num_rows * num_columns, **kwargs), num_columns), names)


def class_rows(pipeline, labels: Sequence[int] | None = None, max_rows: int = 10, **kwargs) -> Image.Image:
    """A grid of samples with one row for each of the first `max_rows` labels, by default all; further arguments are
    those of `sample_rows`."""
    labels = list(range(pipeline.num_classes) if labels is None else labels)[:max_rows]
    request = {"class_labels": labels}
    return sample_rows(pipeline, request, _names(pipeline, request, len(labels)), **kwargs)


def caption_rows(pipeline, captions: list[str], **kwargs) -> Image.Image:
    """A grid of samples with one row for each caption; further arguments are those of `sample_rows`."""
    return sample_rows(pipeline, {"prompt": captions}, captions, **kwargs)


def draw_checkpoint(pipeline, captions: Sequence[str] = (), shared: bool = False) -> Image.Image:
    """Samples of a checkpoint, not chosen, drawn on this process or `shared` by all: a row for each class or caption,
    else 8 rows of 8; sample i has the seed i."""
    request = pipeline.example_request()
    if "class_labels" in request:
        return class_rows(pipeline, shared=shared)
    if "prompt" in request:
        return caption_rows(pipeline, list(captions) or [""], shared=shared)
    return sample_rows(pipeline, **request, shared=shared)  # the prior of an autoencoder


def draw_reconstructions(
    pipeline: AutoencoderPipeline, dataset: PictureDataset, prior: str = "fitted", num_columns: int = 12
) -> Image.Image:
    """A grid of images and, below them, their reconstructions, twice; then two rows of samples from a prior."""
    x = dataset.x_0(_spread(dataset, 2 * num_columns)).to(pipeline.vae.device)
    with torch.no_grad():
        reconstructions = pipeline.vae(x).sample.to(x.dtype)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(2 * num_columns)]
    samples = pipeline(len(seeds), prior, generator=seeds).images
    first, second = zip(x.chunk(2), reconstructions.chunk(2), strict=True)
    names = ["images", "reconstructions"] * 2 + ["samples", ""]
    return grid([*map(pipeline.postprocess, (*first, *second)), *in_rows(samples, num_columns)], names)


def draw_enlarged(pipeline, dataset: PictureDataset, num_columns: int = 12, **kwargs) -> Image.Image:
    """A grid of images made small, enlarged by bicubic interpolation, enlarged by a [`SuperResolutionPipeline`], and
    in their original size; twice."""
    indices, factor = _spread(dataset, 2 * num_columns), pipeline.config.factor
    x = dataset.x_0(indices)
    small = shrink(x, factor)
    drawn = draw_images(pipeline, pipeline.request_for(dataset, indices), **kwargs)
    bicubic = enlarge(small, factor).clamp(-1, 1)
    shown = [pipeline.postprocess(small), pipeline.postprocess(bicubic), drawn, pipeline.postprocess(x)]
    names = ["made small", "enlarged by bicubic interpolation", "enlarged by the model", "original"] * 2
    return grid([images[start : start + num_columns] for start in (0, num_columns) for images in shown], names)


def draw_steps(pipeline, request: dict, choices: dict[str, list[float]], steps: Sequence[int] = (5, 10, 20, 50)):
    """A grid of the same noise, with the values of one argument (rows) and numbers of steps (columns). A cell has four
    images; the `request` has one value for each, or is empty."""
    rows = [{name: value} for name, values in choices.items() for value in values] or [{}]

    def cell(**options):
        return grid(in_rows(draw_images(pipeline, request, 4, shared=False, **options), 2))

    cells = [[cell(num_inference_steps=count, **row) for count in steps] for row in rows]
    names = _names(pipeline, request, 4)
    shown = f"{', '.join(names[:2])}; below {', '.join(names[2:])}"
    values = [f"{name.replace('_', ' ')} {value:g}: " for row in rows for name, value in row.items()]
    return grid(cells, [value + shown for value in values or [""]], [f"{count} steps" for count in steps])


def draw_trajectory(
    pipeline, request: dict, count: int = 4, num_columns: int = 8, num_inference_steps: int = 20, **kwargs
):
    """A grid of x_t after `num_columns` of the steps, from the first to the last, decoded if they are latents; a row
    for each of up to 16 images. The `request` has one value for each, or is empty; further arguments are those of the
    pipeline."""
    shown = torch.linspace(0, num_inference_steps - 1, num_columns).round().int().tolist()
    after = denoising(pipeline, request, count, shown, num_inference_steps=num_inference_steps, **kwargs)
    rows = [*zip(*(images for _, images in after), strict=True)]
    return grid(rows, _names(pipeline, request, len(rows)), [f"after t = {t}" for t, _ in after])


def denoising(
    pipeline, request: dict, count: int = 4, shown: Sequence[int] | None = None, **kwargs
) -> list[tuple[int, list[Image.Image]]]:
    """(t, images x_t) after all steps of a pipeline, or some of them, `shown`; the rest as of `draw_trajectory`."""
    found = []

    def keep(pipe, i, t, tensors):
        if shown is None or i in shown:
            found.append((int(t), pipe.postprocess(pipe.decode(tensors["latents"]))))
        return {}

    draw_images(pipeline, request, count, shared=False, callback_on_step_end=keep, **kwargs)
    return found


def _names(pipeline, request: dict[str, list], count: int) -> list[str]:
    """What images are of, in words: their classes or captions, or else their seeds."""
    by_label = {label: name for name, label in pipeline.labels.items()} if "class_labels" in request else {}
    values = request.get("class_labels", request.get("prompt", [f"seed {i}" for i in range(count)]))
    return [value if isinstance(value, str) else by_label.get(int(value), f"class {value}") for value in values]


def _spread(dataset, count: int) -> list[int]:
    """Indices at even distances."""
    return [i * len(dataset) // count for i in range(count)]
