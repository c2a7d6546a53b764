"""Draws with a cascade of a base model and upsamplers."""

from collections.abc import Sequence

import torch

from hf_genmod.pipelines.super_resolution import SuperResolutionPipeline
from hf_genmod.processes import processes


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
