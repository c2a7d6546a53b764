"""Samples of a cascade: a base model and upsamplers."""

from collections.abc import Sequence

import torch

from hf_genmod.errors import a_or_an
from hf_genmod.processes import processes


def draw_cascade(
    stages: Sequence,
    seeds: Sequence[int],
    noise_level: int | Sequence[int] = 0,
    num_inference_steps: int | None = None,
    tile_size: int = 512,
    output_type: str = "pil",
    all_stages: bool = False,
    **request,
) -> list:
    """
    Draws images with a cascade (Ho et al. 2022, https://arxiv.org/abs/2106.15282): the first pipeline draws small
    images, and each [`SuperResolutionPipeline`] after it enlarges them. Only the pipeline that works is on the
    accelerator. Returns the images of the last stage, or with `all_stages` a list with those of each stage.

    Args:
        stages (sequence of pipelines): The pipelines. The first may be an upsampler too, if `image` is given.
        seeds (sequence of `int`): One seed for each image, used by all stages.
        noise_level (`int`, or one for each upsampler): s, the noise that is added to the small images, so that an
            upsampler corrects what the stage before it has drawn.
        num_inference_steps (`int`, *optional*): The same for each stage; by default what each pipeline has as its own.
        tile_size (`int`), output_type (`str`): As for the pipelines, the same for each stage.
        request (`dict`): Arguments of the first stage. Upsamplers with labels get its `class_labels`, too.

    Raises:
        ValueError: If the images of a stage do not have the size, channels or labels of the next stage, or the number
            of noise levels is not that of upsamplers.
    """
    for before, upsampler in zip(stages, stages[1:], strict=False):
        _check_stage(before, upsampler)
    upsamplers = [pipeline for pipeline in stages if "image" in pipeline.example_request()]
    levels = [noise_level] * len(upsamplers) if isinstance(noise_level, int) else list(noise_level)
    if len(levels) != len(upsamplers):
        raise ValueError(f"noise_level: {len(levels)} values for {len(upsamplers)} upsamplers; give one for each")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    device, drawn = processes().device, []
    for pipeline in stages:
        arguments = {"image": drawn[-1]} if drawn else dict(request)
        if drawn and "class_labels" in request and pipeline.num_classes is not None:
            arguments["class_labels"] = request["class_labels"]
        elif not arguments.keys() & {"class_labels", "prompt", "image"}:
            arguments["batch_size"] = len(seeds)
        if pipeline in upsamplers:
            arguments |= {"noise_level": levels[upsamplers.index(pipeline)], "tile_size": tile_size}
        if pipeline.denoises and num_inference_steps is not None:
            arguments["num_inference_steps"] = num_inference_steps
        pipeline.to(device)
        try:
            drawn.append(pipeline(**arguments, generator=generators, output_type="pt").images)
        finally:
            pipeline.to("cpu")
    if output_type != "pt":
        drawn = [
            pipeline.postprocess(pipeline.preprocess(images, images.shape[1]), output_type)
            for pipeline, images in zip(stages, drawn, strict=True)
        ]
    return drawn if all_stages else drawn[-1]


def _check_stage(before, upsampler) -> None:
    """Raises if an upsampler does not take the images of the stage before it."""
    if "image" not in upsampler.example_request():
        kind = a_or_an(type(upsampler).__name__)
        raise ValueError(f"stages: {kind} enlarges no images; only the first stage can be one")
    channels, height, width = upsampler.picture_shape
    expected = (channels, height // upsampler.config.factor, width // upsampler.config.factor)
    if before.picture_shape != expected:
        made, wanted = ("{1}x{2} pixels in {0} channels".format(*shape) for shape in (before.picture_shape, expected))
        raise ValueError(f"stages: one makes images of {made}, and the next takes {wanted}; train one for the other")
    labels = before.labels if "class_labels" in before.example_request() else upsampler.labels
    if upsampler.num_classes is not None and labels != upsampler.labels:
        raise ValueError(f"stages: one has the labels {[*labels]}, and the next {[*upsampler.labels]}")
