"""Images between two others, and variations of one."""

import math
from numbers import Integral

import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from hf_genmod.editing.given import check_draws, read_images, repeated
from hf_genmod.editing.inversion import check_deterministic, invert, unguided
from hf_genmod.models.image_model import pair
from hf_genmod.pipelines.base import GenerationPipeline
from hf_genmod.pipelines.requests import check_positive, checked_latents, plain, standard_normal
from hf_genmod.pipelines.samplers import Sampler, check_process, check_sampler


def interpolate(
    pipeline: GenerationPipeline, a=0, b=1, num: int = 8, num_inference_steps: int = 50, **request
) -> ImagePipelineOutput | tuple:
    """
    `num` images from a to b, both included, by spherical interpolation of their noise (Shoemake 1985)

        x_T(τ) = (sin((1−τ) Ω) x_a + sin(τ Ω) x_b) / sin Ω,    Ω the angle between x_a and x_b

    drawn by a deterministic sampler, and by a condition in between where there are two.

    Args:
        a, b (`int`, `torch.Tensor`, `PIL.Image.Image` or `np.ndarray`): A seed; x_T, of shape (c, h, w) or
            (1, c, h, w); or an image, whose x_T is found by [`invert`]. A tensor is never an image.
        num (`int`, defaults to 8): The number of images, at least 2.
        num_inference_steps (`int`, defaults to 50): Steps of the sampler.
        request (`dict`): Further arguments of the pipeline. `class_labels` or `prompt` may be a pair: the labels are
            weighted 1−τ and τ, and so are the embeddings of prompts. If a or b is an image, guidance is off at the
            ends, so that they are what was given, and the weights of two labels are up to doubled in between, unless
            the strength of guidance is given.

    Raises:
        ValueError: If the sampler adds noise, or an argument does not fit the pipeline.
    """
    check_draws(pipeline)
    check_positive(num=num, num_inference_steps=num_inference_steps)
    if num < 2:
        raise ValueError(f"num: {num} is less than the two ends; give 2 or more")
    for name in {"latents", "batch_size", "num_images_per_prompt"} & request.keys():
        raise ValueError(f"{name}: the noise is that between a and b, and num says of how many images; leave it out")
    check_process(pipeline.scheduler, pipeline.config.process, pipeline.is_consistent)
    if pipeline.is_consistent and num_inference_steps != 1:
        reason = "a model tuned to few steps adds noise after its first step"
        raise ValueError(f"num_inference_steps: {reason}; give 1")
    check_sampler(pipeline.scheduler, num_inference_steps, consistent=pipeline.is_consistent)
    check_deterministic(Sampler(pipeline.scheduler, num_inference_steps, **pipeline._config_changes(True)[0]))
    kinds = {"class_labels": request.pop("class_labels", None), "prompt": request.pop("prompt", None)}
    pairs = {name: _pair(name, value) for name, value in kinds.items() if value is not None}
    is_guided = all(isinstance(end, Integral | Tensor) for end in (a, b)) or pipeline.guidance_argument in request
    request = request if is_guided else unguided(pipeline) | request
    of_ends = [{name: pair[k] for name, pair in pairs.items()} for k in (0, 1)]
    options = {name: request[name] for name in request if name not in ("output_type", "return_dict", "generator")}
    options["num_inference_steps"] = num_inference_steps
    x_a, x_b = (_noise(pipeline, end, options | of) for end, of in zip((a, b), of_ends, strict=True))
    tau = torch.linspace(0, 1, num, device=x_a.device)
    for name, (first, second) in pairs.items():
        if name == "class_labels":
            request[name] = [_between(first, second, share, is_guided) for share in tau.tolist()]
        elif first == second:
            request[name] = [first] * num
        else:
            request |= _prompts_between(pipeline, first, second, tau)
    latents = slerp(x_a, x_b, tau)
    return pipeline(**repeated(pipeline, request, num), latents=latents, num_inference_steps=num_inference_steps)


def vary(
    pipeline: GenerationPipeline, image, strength: float = 0.6, num: int = 4, **request
) -> ImagePipelineOutput | tuple:
    """
    `num` variations of each image: it is noised to strength · T and drawn from there, by other seeds, see
    [`UnconditionalPipeline`]. Further arguments are those of the pipeline: with another class or prompt than that of
    the image, it becomes one of that class.
    """
    check_draws(pipeline)
    check_positive(num=num)
    images = read_images(pipeline, image)
    request = repeated(pipeline, request, len(images))
    if "batch_size" in request:
        return pipeline(**request | {"batch_size": num * len(images)}, image=images, strength=strength)
    return pipeline(**request, image=images, strength=strength, num_images_per_prompt=num)


def slerp(a: Tensor, b: Tensor, tau: Tensor) -> Tensor:
    """Spherical interpolation of a and b, (1, ...), at each of τ, (n,): (n, ...)."""
    omega = torch.arccos(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1 + 1e-6, 1 - 1e-6))
    tau = tau.reshape(-1, *[1] * (a.ndim - 1))
    return (torch.sin((1 - tau) * omega) * a + torch.sin(tau * omega) * b) / torch.sin(omega)


def _pair(name: str, value) -> list:
    """The conditions of both ends."""
    value = plain(value)
    both = value if isinstance(value, list) else [value]
    if len(both) not in (1, 2):
        raise ValueError(f"{name}: {len(both)} of them; give one, or one for each end")
    return [both[0], both[-1]]


def _between(first, second, share: float, is_guided: bool):
    """The weights of two labels, or of those that both ends have. Where guidance is off, so that the ends are the
    images that are given, their sum rises from 1 to 2 on half the way, as if γ did: there is no image to be given
    back."""
    if first == second or share in (0, 1):
        return second if share else first
    first, second = (end if isinstance(end, dict) else {end: 1.0} for end in (first, second))
    total = 1 if is_guided else 1 + math.sin(math.pi * share)
    return {x: total * ((1 - share) * first.get(x, 0) + share * second.get(x, 0)) for x in first | second}


def _prompts_between(pipeline, first: str, second: str, tau: Tensor) -> dict[str, Tensor]:
    """The embeddings of two prompts, (2, tokens, d), weighted 1−τ and τ."""
    tokens, mask = pipeline.encode_prompt([first, second])
    tokens, tau = tokens * mask[..., None], tau.to(tokens)[:, None]
    return {
        "prompt_embeds": torch.lerp(tokens[:1], tokens[1:], tau[..., None]),
        "prompt_attention_mask": torch.lerp(mask[:1].to(tau), mask[1:].to(tau), tau) > 0,  # at an end its own tokens
    }


def _noise(pipeline: GenerationPipeline, end, request: dict) -> Tensor:
    """x_T of one end, (1, c, h, w)."""
    shape = (pipeline.unet.config.in_channels, *pair(pipeline.unet.config.sample_size))
    device = pipeline._execution_device
    if isinstance(end, Integral):
        return standard_normal(shape, [torch.Generator().manual_seed(int(end))]).to(device)
    if not isinstance(end, Tensor):
        x_T = invert(pipeline, end, **request)
        if len(x_T) != 1:
            raise ValueError(f"image: {len(x_T)} of them for one end; give one")
        return x_T
    x_T = checked_latents(end[None] if end.ndim == 3 else end, (1, *shape))
    if x_T.min() >= 0:
        raise ValueError("a, b: a tensor is the noise x_T, and this one is none; give an image by PIL, or as an array")
    return x_T.to(device)
