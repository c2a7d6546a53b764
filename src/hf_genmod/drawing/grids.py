"""Image grids."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw

from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.value_range import to_model_range
from hf_genmod.drawing.samples import draw_images
from hf_genmod.models.conditioning import enlarge, shrink
from hf_genmod.models.variational_autoencoder import VariationalAutoencoder
from hf_genmod.pipelines.autoencoder import AutoencoderPipeline


def side_by_side(rows: list[torch.Tensor]) -> Image.Image:
    """A grid of pictures, a row for each (n, C, H, W) `uint8`, enlarged where they are small; of more than four
    channels it shows three."""
    pixels = torch.cat(rows).permute(0, 2, 3, 1)  # (all, H, W, C)
    pixels = pixels[..., :3] if pixels.shape[-1] > 4 else pixels
    pictures = [Image.fromarray(picture.squeeze(-1).numpy()) for picture in pixels]
    grid = make_image_grid(pictures, len(rows), len(rows[0]))
    scale = max(1, 64 // min(pictures[0].size))
    return grid.resize((scale * grid.width, scale * grid.height), Image.Resampling.NEAREST)


def class_rows(pipeline, labels: Sequence[int] | None = None, num_columns: int = 8, max_rows: int = 10, **kwargs):
    """
    A grid with one row for each class (of the first `max_rows`), as a `PIL.Image.Image`.

    Args:
        pipeline ([`ClassifierFreeGuidedPipeline`] or [`ClassifierGuidedPipeline`]): What draws them.
        labels (sequence of `int`, *optional*): Of which classes; by default of all.
        num_columns, max_rows (`int`): Size of the grid.
        kwargs: Further arguments of `draw_images`.
    """
    rows = (range(pipeline.num_classes) if labels is None else labels)[:max_rows]
    each = [label for label in rows for _ in range(num_columns)]
    return make_image_grid(draw_images(pipeline, each, **kwargs), len(rows), num_columns)


def caption_rows(pipeline, captions: list[str], num_columns: int = 8, **kwargs) -> Image.Image:
    """A grid with one row for each caption, which stands above it."""
    prompts = [caption for caption in captions for _ in range(num_columns)]
    pictures = draw_images(pipeline, prompt=prompts, **kwargs)
    width, height = pictures[0].size
    scale = max(1, 512 // (num_columns * width))  # for the captions to be read
    size, line = (scale * width, scale * height), 16
    grid = Image.new("RGB", (num_columns * size[0], len(captions) * (size[1] + line)), "white")
    for i, picture in enumerate(pictures):
        row, column = divmod(i, num_columns)
        grid.paste(picture.resize(size, Image.Resampling.NEAREST), (column * size[0], row * (size[1] + line) + line))
    for row, caption in enumerate(captions):
        ImageDraw.Draw(grid).text((2, row * (size[1] + line) + 2), caption, fill="black")
    return grid


def draw_reconstructions(
    pipeline: AutoencoderPipeline, dataset: PictureDataset, prior: str = "fitted", num_columns: int = 12
) -> Image.Image:
    """A grid of pictures and, below them, their reconstructions, twice; then two rows of samples of a prior."""
    indices = [i * len(dataset) // (2 * num_columns) for i in range(2 * num_columns)]
    x = to_model_range(dataset.__getitems__(indices)["images"]).to(pipeline.vae.device)
    with torch.no_grad():
        pairs = torch.stack([x, pipeline.vae(x).sample.to(x.dtype)]).unflatten(1, (2, num_columns))
    seeds = [torch.Generator().manual_seed(seed) for seed in range(2 * num_columns)]
    samples = pipeline(len(seeds), prior, generator=seeds).images
    rows = pipeline.postprocess(pairs.transpose(0, 1).flatten(0, 2))
    return make_image_grid([*rows, *samples], 6, num_columns)


def stage_rows(drawn: list[list[Image.Image]], num_columns: int = 8) -> Image.Image:
    """A grid of what each stage of a cascade has drawn, a row for each, all as large as the last."""
    size = drawn[-1][0].size
    rows = [[picture.resize(size, Image.Resampling.NEAREST) for picture in row[:num_columns]] for row in drawn]
    return make_image_grid([picture for row in rows for picture in row], len(rows), len(rows[0]))


def draw_enlarged(pipeline, dataset: PictureDataset, num_columns: int = 12, **kwargs) -> Image.Image:
    """A grid of pictures made small, of these enlarged by bicubic interpolation and by a [`SuperResolutionPipeline`],
    and of the pictures as they are; twice."""
    indices = [i * len(dataset) // (2 * num_columns) for i in range(2 * num_columns)]
    batch, factor = dataset.__getitems__(indices), pipeline.config.factor
    x = to_model_range(batch["images"])
    small = shrink(x, factor)
    each = {"image": list(pipeline.postprocess(small, "pt"))}
    if pipeline.unet.config.num_classes is not None:
        each["class_labels"] = batch["class_labels"].tolist()
    drawn = draw_images(pipeline, **each, **kwargs)
    seen = [F.interpolate(small, scale_factor=factor), enlarge(small, factor).clamp(-1, 1)]
    rows = [*map(pipeline.postprocess, seen), drawn, pipeline.postprocess(x)]
    halves = [row[start : start + num_columns] for start in (0, num_columns) for row in rows]
    return make_image_grid([picture for row in halves for picture in row], 8, num_columns)


def draw_checkpoint(pipeline, captions: Sequence[str] = ()) -> Image.Image:
    """What a checkpoint makes, not chosen: a row for each class or caption, else 8 rows; sample i has the seed i. This
    process draws it alone."""
    if "unet" not in pipeline.components:
        prior = "standard" if isinstance(pipeline.vae, VariationalAutoencoder) else "fitted"
        return make_image_grid(draw_images(pipeline, shared=False, prior=prior), 8, 8)
    options = {"shared": False, "num_inference_steps": 20}
    if hasattr(pipeline, "labels"):
        return class_rows(pipeline, **options)
    if "tokenizer" in pipeline.components:
        return caption_rows(pipeline, list(captions) or [""], **options)
    return make_image_grid(draw_images(pipeline, **options), 8, 8)


def draw_steps(pipeline, request: dict, scales: dict[str, list[float]], steps: Sequence[int] = (5, 10, 20, 50)):
    """
    The same noise by several strengths of guidance (rows) and numbers of steps (columns), as a `PIL.Image.Image`.

    Args:
        pipeline ([`~hf_genmod.pipelines.base.GenerationPipeline`]): What draws them.
        request (`dict`): What each picture of a cell is asked by, as `draw_images` takes it; picture i has the seed i.
        scales (`dict`): The argument of the pipeline that is the strength, and its values; empty for one row.
        steps (sequence of `int`): Numbers of steps.
    """
    rows = [(f"{name} {value:g}", {name: value}) for name, values in scales.items() for value in values] or [("", {})]
    columns = [(f"{count} steps", {"num_inference_steps": count}) for count in steps]
    cells = [
        [draw_images(pipeline, **request, **row, **column, shared=False) for _, column in columns] for _, row in rows
    ]
    return _labelled(cells, [name for name, _ in rows], [name for name, _ in columns])


def draw_trajectory(pipeline, request: dict, num_columns: int = 8, num_inference_steps: int = 50) -> Image.Image:
    """
    How pictures come out of noise: x_t after some of the steps, decoded where they are latents.

    Args:
        pipeline ([`~hf_genmod.pipelines.base.GenerationPipeline`]): What draws them.
        request (`dict`): What each picture is asked by, up to 16 of them, as `draw_images` takes it.
        num_columns (`int`): How many steps are shown, the first and the last among them.
        num_inference_steps (`int`): Of how many.
    """
    shown = torch.linspace(0, num_inference_steps - 1, num_columns).round().int().tolist()
    columns, names = [], []

    def keep(pipe, i, t, tensors):
        if i in shown:
            columns.append(pipe.postprocess(pipe._decode(tensors["latents"])))
            names.append(f"after t = {int(t)}")
        return {}

    draw_images(pipeline, **request, shared=False, num_inference_steps=num_inference_steps, callback_on_step_end=keep)
    cells = [[[picture] for picture in row] for row in zip(*columns, strict=True)]
    return _labelled(cells, [""] * len(cells), names)


def _labelled(cells: list[list[list[Image.Image]]], row_names: list[str], column_names: list[str]) -> Image.Image:
    """Cells of one or more pictures, with the names of rows and columns beside them."""
    side = math.ceil(len(cells[0][0]) ** 0.5)
    width, height = cells[0][0][0].size
    scale = max(1, 128 // (side * width))
    width, height = scale * width, scale * height
    left, top, gap = (110 if any(row_names) else 0), 16, 6
    size = (left + len(column_names) * (side * width + gap), top + len(row_names) * (side * height + gap))
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for column, name in enumerate(column_names):
        pen.text((left + column * (side * width + gap) + 2, 2), name, fill="black")
    for row, name in enumerate(row_names):
        pen.text((2, top + row * (side * height + gap) + 2), name, fill="black")
        for column, pictures in enumerate(cells[row]):
            for i, picture in enumerate(pictures):
                x, y = left + column * (side * width + gap) + i % side * width, top + row * (side * height + gap)
                resized = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
                grid.paste(resized, (x, y + i // side * height))
    return grid
