"""Draws samples of a pipeline on all processes."""

import time
from pathlib import Path

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from hf_genmod.processes import processes

CHUNK = 50  # pictures that are drawn, and kept, together


def draw_to_folder(pipeline, folder: Path, each: dict[str, list], count: int, seed: int = 0, **request) -> dict:
    """
    Samples whose work all processes share, kept in a folder in parts, so that what is there is not drawn again; sample
    i has the seed `seed` + i, so they are the same on any number of processes.

    Args:
        pipeline ([`~hf_genmod.pipelines.base.GenerationPipeline`]): What draws them.
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
        pipeline ([`~hf_genmod.pipelines.base.GenerationPipeline`]): What draws them.
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
