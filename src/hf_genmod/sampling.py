"""Samples of a pipeline, drawn by all processes together."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from hf_genmod.data import PictureDataset, to_model_range
from hf_genmod.models.image_autoencoder import VariationalAutoencoder
from hf_genmod.pipelines.genmod_pipelines import AutoencoderPipeline, SuperResolutionPipeline, enlarge, shrink
from hf_genmod.processes import processes

CHUNK = 50  # pictures that are drawn, and kept, together


def draw_to_folder(pipeline, folder: Path, each: dict[str, list], count: int, seed: int = 0, **request) -> dict:
    """
    Samples whose work all processes share, kept in a folder in parts, so that what is there is not drawn again; sample
    i has the seed `seed` + i, so they are the same on any number of processes.

    Args:
        pipeline ([`~hf_genmod.pipelines.genmod_pipelines.GenerationPipeline`]): What draws them.
        folder (`Path`): Where they are kept, `00000.pt`, `00050.pt`, ...; of these settings and no others.
        each (`dict`): What each sample is asked by, such as "class_labels" or "prompt"; nothing where they differ by
            their seeds alone.
        count (`int`): How many.
        request: What all are asked by.

    Returns:
        `dict`: "images", `uint8` (n, C, H, W), as `to_bytes` makes them; per picture "seconds", of each part, and
        "forward_passes" of U-Net and classifier (of an autoencoder, of its decoder).
    """
    state, starts = processes(), range(0, count, CHUNK)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [start for start in starts if not _file(folder, start).is_file()]
    state.wait_for_everyone()  # for all to have seen the same
    mine = missing[state.process_index :: state.num_processes]
    for start in tqdm(mine, "Drawing samples", disable=not state.is_main_process or not missing):
        part = range(start, min(start + CHUNK, count))
        asked = {name: [values[i] for i in part] for name, values in each.items()} or {"batch_size": len(part)}
        generators = [torch.Generator().manual_seed(seed + i) for i in part]
        passes = 0

        def count_passes(module, inputs, output):
            nonlocal passes
            passes += len(inputs[0])

        hooks = [model.register_forward_hook(count_passes) for model in _models(pipeline)]
        started = time.perf_counter()
        images = pipeline(**asked, **request, generator=generators, output_type="pt").images
        images = to_bytes(images, pipeline)  # an accelerator is done when they are on the CPU
        seconds = time.perf_counter() - started
        for hook in hooks:
            hook.remove()
        chunk = {"images": images, "seconds": seconds, "forward_passes": passes}
        partial = _file(folder, start).with_suffix(".partial")
        torch.save(chunk, partial)
        partial.replace(_file(folder, start))
    state.wait_for_everyone()
    chunks = [torch.load(_file(folder, start), weights_only=True) for start in starts]
    seconds = torch.tensor([chunk["seconds"] / len(chunk["images"]) for chunk in chunks])
    passes = sum(chunk["forward_passes"] for chunk in chunks) / count
    return {"images": torch.cat([chunk["images"] for chunk in chunks]), "seconds": seconds, "forward_passes": passes}


def _models(pipeline) -> list[torch.nn.Module]:
    """What is run once for each step, or for each picture of an autoencoder."""
    models = [pipeline.components.get(name) for name in ("unet", "classifier")]
    return [model for model in models if model is not None] or [pipeline.vae.decoder]


def _file(folder: Path, start: int) -> Path:
    return folder / f"{start:05}.pt"


def to_bytes(images: torch.Tensor, pipeline) -> torch.Tensor:
    """Pictures as a pipeline gives them, (n, C, H, W) in [0, 1] or in the units of the data, as `uint8`: 0 and 255 are
    the lowest and highest of these."""
    value_range = pipeline.config.get("value_range")
    if value_range is not None:
        low, high = (torch.tensor(value_range[end], device=images.device)[:, None, None] for end in ("low", "high"))
        images = (images - low) / (high - low).clamp(min=1e-30)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def side_by_side(rows: list[torch.Tensor]) -> Image.Image:
    """A grid of pictures, a row for each (n, C, H, W) `uint8`, enlarged where they are small; of more than four
    channels it shows three."""
    pixels = torch.cat(rows).permute(0, 2, 3, 1)  # (all, H, W, C)
    pixels = pixels[..., :3] if pixels.shape[-1] > 4 else pixels
    pictures = [Image.fromarray(picture.squeeze(-1).numpy()) for picture in pixels]
    grid = make_image_grid(pictures, len(rows), len(rows[0]))
    scale = max(1, 64 // min(pictures[0].size))
    return grid.resize((scale * grid.width, scale * grid.height), Image.Resampling.NEAREST)


def draw_images(
    pipeline,
    class_labels: list | None = None,
    prompt: list[str] | None = None,
    count: int = 64,
    seed: int = 0,
    shared: bool = True,
    image: list[torch.Tensor] | None = None,
    **kwargs,
) -> list:
    """
    Pictures whose work all processes share; picture i has the seed `seed` + i, so they are the same on any number.

    Args:
        pipeline ([`~hf_genmod.pipelines.genmod_pipelines.GenerationPipeline`]): What draws them.
        class_labels (`list`, *optional*): The label of each picture.
        prompt (`list[str]`, *optional*): The prompt of each picture.
        count (`int`): How many, without either, and without `image`.
        shared (`bool`): `False` where not all processes call this: then this one does all the work.
        image (`list[torch.Tensor]`, *optional*): What an upsampler makes each picture of, (C, h, w).
        kwargs: Further arguments of the pipeline.

    Returns:
        `list` of `PIL.Image.Image`: All of them, on each process.

    Raises:
        RuntimeError: On all processes, if one of them fails.
    """
    state = processes()
    each = {"class_labels": class_labels, "prompt": prompt, "image": image}
    each = {name: values for name, values in each.items() if values is not None}
    count = len(next(iter(each.values()))) if each else count
    mine = range(state.process_index, count, state.num_processes) if shared else range(count)
    images, error = {}, None
    try:
        for start in range(0, len(mine), 16):
            part = mine[start : start + 16]
            request = {name: [values[i] for i in part] for name, values in each.items()} or {"batch_size": len(part)}
            generators = [torch.Generator().manual_seed(seed + i) for i in part]
            images |= zip(part, pipeline(**request, generator=generators, **kwargs).images, strict=True)
    except Exception as caught:  # the others wait for this process, whatever happens to it
        error = f"{type(caught).__name__}: {caught}"
    together = {}
    for others, others_error in gather_object([(images, error)]) if shared else [(images, error)]:
        if others_error:
            raise RuntimeError(others_error)
        together |= others
    return [together[i] for i in range(count)]


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


def draw_cascade(
    stages: Sequence,
    seeds: Sequence[int],
    noise_level: int | Sequence[int] = 0,
    num_inference_steps: int = 50,
    tile_size: int = 512,
    output_type: str = "pil",
    all_stages: bool = False,
    **request,
) -> list:
    """
    Pictures of a cascade (Ho et al. 2022, https://arxiv.org/abs/2106.15282): the first pipeline draws small ones, each
    [`SuperResolutionPipeline`] after it makes them larger. Only the pipeline at work is on the accelerator.

    Args:
        stages (sequence of pipelines): The first may be an upsampler as well, which is asked by `image`.
        seeds (sequence of `int`): One for each picture, for all its stages; it decides what the picture is made of,
            whatever is drawn beside it.
        noise_level (`int`, or one for each upsampler): s, which makes an upsampler mend what the stage before it has
            drawn, rather than keep it.
        num_inference_steps (`int`, defaults to 50): Steps of each stage.
        tile_size (`int`, defaults to 512): What upsamplers work on at once.
        output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`, as the pipelines take it.
        all_stages (`bool`, defaults to `False`): Whether to return what each stage has drawn.
        request: What the first stage is asked by; `class_labels` go to upsamplers with labels, too.

    Returns:
        The pictures, or with `all_stages` a list of them for each stage.

    Raises:
        ValueError: If a stage does not make pictures of the size and channels that the next one enlarges, or knows
            other labels, or there are not as many noise levels as upsamplers.
    """
    for before, upsampler in zip(stages, stages[1:], strict=False):
        _check_stage(before, upsampler)
    upsamplers = [pipeline for pipeline in stages if isinstance(pipeline, SuperResolutionPipeline)]
    levels = [noise_level] * len(upsamplers) if isinstance(noise_level, int) else list(noise_level)
    if len(levels) != len(upsamplers):
        raise ValueError(f"noise_level: {len(levels)} of them, and there are {len(upsamplers)} upsamplers")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    device, drawn = processes().device, []
    asked = request if {"class_labels", "prompt", "image"} & set(request) else request | {"batch_size": len(seeds)}
    for pipeline in stages:
        if drawn:
            asked = {"image": drawn[-1]}
            if "class_labels" in request and pipeline.num_classes is not None:
                asked["class_labels"] = request["class_labels"]
        if pipeline in upsamplers:
            asked = asked | {"noise_level": levels[upsamplers.index(pipeline)], "tile_size": tile_size}
        if "unet" in pipeline.components:
            asked = asked | {"num_inference_steps": num_inference_steps}
        pipeline.to(device)
        try:
            drawn.append(pipeline(**asked, generator=generators, output_type="pt").images)
        finally:
            pipeline.to("cpu")
    if output_type != "pt":
        drawn = [
            pipeline.postprocess(pipeline.preprocess(images, images.shape[1]), output_type)
            for pipeline, images in zip(stages, drawn, strict=True)
        ]
    return drawn if all_stages else drawn[-1]


def stage_rows(drawn: list[list[Image.Image]], num_columns: int = 8) -> Image.Image:
    """A grid of what each stage of a cascade has drawn, a row for each, all as large as the last."""
    size = drawn[-1][0].size
    rows = [[picture.resize(size, Image.Resampling.NEAREST) for picture in row[:num_columns]] for row in drawn]
    return make_image_grid([picture for row in rows for picture in row], len(rows), len(rows[0]))


def _check_stage(before, upsampler):
    """Whether an upsampler is for the pictures of the stage before it."""
    if not isinstance(upsampler, SuperResolutionPipeline):
        raise ValueError(f"stages: a {type(upsampler).__name__} enlarges no pictures; only the first can be one")
    channels, height, width = upsampler.picture_shape
    fitting = (channels, height // upsampler.config.factor, width // upsampler.config.factor)
    if before.picture_shape != fitting:
        made, wanted = ("{1}x{2} pixels in {0} channels".format(*shape) for shape in (before.picture_shape, fitting))
        raise ValueError(
            f"stages: one makes pictures of {made}, and the next is for {wanted}; train one for the other"
        )
    labels = getattr(before, "labels", upsampler.labels)
    if upsampler.num_classes is not None and labels != upsampler.labels:
        raise ValueError(f"stages: one has the labels {[*labels]}, and the next {[*upsampler.labels]}")


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
        pipeline ([`~hf_genmod.pipelines.genmod_pipelines.GenerationPipeline`]): What draws them.
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
        pipeline ([`~hf_genmod.pipelines.genmod_pipelines.GenerationPipeline`]): What draws them.
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
