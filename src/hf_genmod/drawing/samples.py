"""Draws samples of a pipeline on all processes; sample i has the seed `seed` + i."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from hf_genmod.data.value_range import to_model_range
from hf_genmod.processes import on_each, processes

CHUNK = 50  # samples in a file


def draw_images(
    pipeline, request: dict[str, list] | None = None, count: int = 64, seed: int = 0, shared: bool = True, **kwargs
) -> list:
    """
    Draws images on all processes, the same on any number of them. Returns all images, as the pipeline returns them, on
    each process.

    Args:
        request (`dict`, *optional*): Arguments with one value per image, such as "class_labels" or "prompt".
        count (`int`): The number of images, where there is no `request`.
        shared (`bool`): `False` if only this process calls this function.
        kwargs (`dict`): Arguments of the pipeline that are the same for all images.

    Raises:
        ValueError, RuntimeError: On all of several processes, if drawing fails on one of them.
    """
    count = len(next(iter(request.values()))) if request else count
    state = processes()
    if not shared or state.num_processes == 1:
        return _draw(pipeline, request, range(count), seed, **kwargs)

    def share() -> list:
        mine = range(state.process_index, count, state.num_processes)
        drawn = _draw(pipeline, request, mine, seed, **kwargs)
        # Tensors without the rest of their batch, and on no accelerator, whose number others do not know.
        return [image.cpu().clone() if isinstance(image, torch.Tensor) else image for image in drawn]

    shares = on_each(share)
    return [shares[i % state.num_processes][i // state.num_processes] for i in range(count)]


def draw_to_folder(
    pipeline, folder: Path, request: dict[str, list], count: int, seed: int = 0, **kwargs
) -> dict[str, torch.Tensor | float]:
    """
    Draws samples on all processes and keeps them in a folder, in files of up to 50: `00000.pt`, `00050.pt`, ..., all
    with the same arguments. Files that are already there are not drawn again. The arguments are those of
    [`draw_images`]; the `request` may be empty.

    Returns:
        `dict`: "images", `uint8` (n, C, H, W), as [`to_bytes`] makes them; "seconds" per sample, one value for each
        file; and "forward_passes" per sample of U-Nets and classifier, or of an autoencoder's decoder.

    Raises:
        ValueError: On all processes, if the pipeline cannot draw with these arguments.
    """
    state = processes()
    files = {folder / f"{start:05}.pt": range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)}
    folder.mkdir(parents=True, exist_ok=True)
    missing = [file for file in files if not file.is_file()]
    state.wait_for_everyone()  # until each process has listed the same files
    mine = missing[state.process_index :: state.num_processes]
    names = [name for name in ("unet", "guiding_unet", "classifier") if pipeline.components.get(name) is not None]
    models = [pipeline.components[name] for name in names] or [pipeline.vae.decoder]
    passes = []
    hooks = [model.register_forward_hook(lambda module, inputs, _: passes.append(len(inputs[0]))) for model in models]

    def share() -> None:
        for file in tqdm(mine, "Drawing samples", leave=False, disable=not state.is_main_process or not missing):
            passes.clear()
            started = time.perf_counter()
            images = _draw(pipeline, request, files[file], seed, CHUNK, output_type="pt", **kwargs)
            images = to_bytes(torch.stack(images), pipeline)  # on the CPU, so that the accelerator has finished
            seconds = time.perf_counter() - started
            partial = file.with_suffix(".partial")
            torch.save({"images": images, "seconds": seconds, "forward_passes": sum(passes)}, partial)
            partial.replace(file)

    try:
        on_each(share)
    finally:
        for hook in hooks:
            hook.remove()
    chunks = [torch.load(file, weights_only=True) for file in files]
    return {
        "images": torch.cat([chunk["images"] for chunk in chunks]),
        "seconds": torch.tensor([chunk["seconds"] / len(chunk["images"]) for chunk in chunks]),
        "forward_passes": sum(chunk["forward_passes"] for chunk in chunks) / count,
    }


def to_bytes(images: torch.Tensor, pipeline) -> torch.Tensor:
    """Images of a pipeline, (n, C, H, W) in [0, 1] or in the units of its value range, as `uint8`."""
    value_range = pipeline.config.get("value_range")
    if value_range is not None:
        images = (to_model_range(images, value_range) + 1) / 2
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _draw(pipeline, request: dict[str, list] | None, indices: Sequence[int], seed, batch_size=16, **kwargs) -> list:
    """The images of these indices, on this process, with one progress bar: over the steps of a single batch, or over
    the images of several."""
    images = []
    with _over_images(pipeline, len(indices)) if len(indices) > batch_size else contextlib.nullcontext() as bar:
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            each = {name: [values[i] for i in part] for name, values in (request or {}).items()}
            generators = [torch.Generator().manual_seed(seed + i) for i in part]
            images += pipeline(**(each or {"batch_size": len(part)}), generator=generators, **kwargs).images
            if bar is not None:
                bar.update(len(part))
    return images


@contextlib.contextmanager
def _over_images(pipeline, count: int) -> Iterator[tqdm]:
    """A progress bar over images, as the pipeline shows it, in the place of those over its steps."""
    shown = getattr(pipeline, "_progress_bar_config", {})
    with pipeline.progress_bar(total=count) as bar:
        pipeline.set_progress_bar_config(disable=True)
        try:
            yield bar
        finally:
            pipeline.set_progress_bar_config(**shown)
