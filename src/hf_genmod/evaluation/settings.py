"""What a report of a checkpoint is made of: which samples, what is measured of them, which figures."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import SchedulerMixin

import hf_genmod
from hf_genmod.data.value_range import to_model_range
from hf_genmod.drawing.curves import draw_guidance
from hf_genmod.drawing.grids import draw_steps, draw_trajectory, side_by_side
from hf_genmod.evaluation.estimates import Share
from hf_genmod.evaluation.features import extract_features
from hf_genmod.evaluation.neighbours import audit_memorisation
from hf_genmod.models.conditioning import enlarge, shrink
from hf_genmod.models.variational_autoencoder import VariationalAutoencoder
from hf_genmod.pipelines.super_resolution import SuperResolutionPipeline


def settings_of(
    pipeline,
    samplers: Sequence[str],
    num_inference_steps: Sequence[int],
    scales: Sequence[float],
    noise_levels: Sequence[int] = (),
) -> list[dict]:
    """
    All combinations of what samples are drawn by; of an autoencoder its priors.

    Args:
        pipeline ([`~hf_genmod.pipelines.base.GenerationPipeline`]): What draws them.
        samplers (sequence of `str`): Schedulers by name; by default its own.
        num_inference_steps (sequence of `int`): Numbers of steps.
        scales (sequence of `float`): Strengths of guidance; by default its own.
        noise_levels (sequence of `int`): Of an upsampler; by default its own.

    Raises:
        ValueError: If there are scales, and the model is not guided, or noise levels, and it is no upsampler.
    """
    if scales and not (has_labels(pipeline) or "tokenizer" in pipeline.components):
        raise ValueError(f"guidance_scales: a {type(pipeline).__name__} is not guided; leave them out")
    if noise_levels and not is_upsampler(pipeline):
        raise ValueError(f"noise_levels: a {type(pipeline).__name__} is no upsampler; leave them out")
    if "unet" not in pipeline.components:
        priors = ["standard"] if isinstance(pipeline.vae, VariationalAutoencoder) else []
        return [{"prior": prior} for prior in priors + ["fitted"] * bool(pipeline.vae.config.get("prior_rank"))]
    samplers = samplers or [type(pipeline.scheduler).__name__]
    strengths = [{scale_of(pipeline): scale} for scale in scales] or [{}]
    noise = [{"noise_level": level} for level in noise_levels] or [{}]
    return [
        {"sampler": sampler, "num_inference_steps": steps} | strength | level
        for sampler, steps, strength, level in itertools.product(samplers, num_inference_steps, strengths, noise)
    ]


def has_labels(pipeline) -> bool:
    """Whether it can be asked for classes."""
    return getattr(pipeline, "num_classes", None) is not None


def is_upsampler(pipeline) -> bool:
    """Whether it makes pictures of smaller ones."""
    return isinstance(pipeline, SuperResolutionPipeline)


def scale_of(pipeline) -> str:
    """The argument that is the strength of guidance."""
    return "classifier_scale" if "classifier" in pipeline.components else "guidance_scale"


def make_sampler(name: str, own: SchedulerMixin) -> SchedulerMixin:
    """A scheduler of this package or of diffusers by its name, with the process of a pipeline's own.

    Raises:
        ValueError: If there is none of that name.
    """
    if name == type(own).__name__:
        return own
    cls = getattr(hf_genmod, name, getattr(diffusers, name, None))
    if not hasattr(cls, "add_noise"):
        raise ValueError(f"samplers: {name!r} is no scheduler of diffusers, such as DDIMScheduler")
    return cls.from_config(own.config)


def what_to_ask(pipeline, pictures, indices: Sequence[int]) -> dict[str, list]:
    """The labels or captions of pictures, so that samples have these in the data's own proportions; for an upsampler
    the pictures made small."""
    asked = {}
    if is_upsampler(pipeline):
        asked["image"] = list(pipeline.postprocess(_made_small(pipeline, pictures, indices), "pt"))
    if has_labels(pipeline):
        asked["class_labels"] = pictures.labels[indices].tolist()
    if "tokenizer" in pipeline.components:
        captions = [pictures.captions[i] for i in indices]
        asked["prompt"] = [caption if isinstance(caption, str) else caption[0] for caption in captions]
    return asked


def _made_small(pipeline, pictures, indices) -> torch.Tensor:
    """(n, C, h, w) in [-1, 1]."""
    parts = torch.as_tensor(indices).split(256)
    return torch.cat(
        [
            shrink(to_model_range(pictures.__getitems__(part.tolist())["images"]), pipeline.config.factor)
            for part in parts
        ]
    )


def enlarged_by_interpolation(pipeline, pictures, indices) -> torch.Tensor:
    """Pictures made small and enlarged again by bicubic interpolation, for an upsampler to be compared with; `uint8`
    (n, C, H, W)."""
    images = enlarge(_made_small(pipeline, pictures, indices), pipeline.config.factor).clamp(-1, 1)
    return ((images + 1) * 127.5).round().to(torch.uint8)


def what_the_unet_is_told(pipeline, pictures) -> dict[str, torch.Tensor]:
    """Of each picture: its label, or its caption encoded."""
    if "tokenizer" in pipeline.components:
        tokens, mask = pipeline.encode_prompt(what_to_ask(pipeline, pictures, range(len(pictures)))["prompt"])
        return {"encoder_hidden_states": tokens, "encoder_attention_mask": mask}
    told = {"class_labels": pictures.labels.to(pipeline.device)} if pipeline.unet.config.num_classes else {}
    if is_upsampler(pipeline):
        small = _made_small(pipeline, pictures, range(len(pictures)))
        told["conditioning_image"] = enlarge(small, pipeline.config.factor).to(pipeline.device)
    return told


def recognised(classifier, images, labels, names: list[str]) -> dict:
    """How often a classifier finds the class that was asked for, in all and for each class."""
    with torch.no_grad():
        right = classifier.head(extract_features(images, classifier)).argmax(dim=1) == labels
    by_class = {name: Share.of(right[labels == i]) for i, name in enumerate(names) if (labels == i).any()}
    return {"recognised_share": Share.of(right), "recognised_share_by_class": by_class}


def audit(spaces: dict, images, real, file: Path) -> dict:
    """In pixels and in features; the file shows the ten samples that are closest to a picture, above these."""
    result = {}
    for space, (look, training, distances_of_held_out) in spaces.items():
        found = audit_memorisation(look(images), training, distances_of_held_out)
        closest = found.distances.argsort()[:10]
        side_by_side([images[closest], real[found.nearest[closest]]]).save(file.with_name(f"{file.stem}_{space}.png"))
        result[space] = {"threshold": found.threshold, "share": found.share, "flagged": found.flagged}
    return result


def draw_figures(pipeline, settings: list[dict], each: dict[str, list], folder: Path):
    """What people look at: guidance against quality, guidance by steps, and how pictures come out of noise; of the
    settings as they were measured. Of an autoencoder there are none."""
    if "unet" not in pipeline.components:
        return
    scale, choices = scale_of(pipeline), [1.0, 2.0, 4.0]
    some = {name: values[:4] for name, values in each.items()}
    if len(settings) > 1 and all(scale in setting for setting in settings):
        draw_guidance(settings, scale, folder / "guidance.png")
    if is_upsampler(pipeline):
        scale, choices = "noise_level", [share * pipeline.config.max_noise_level // 4 for share in (0, 1, 2, 4)]
    scales = sorted({setting[scale] for setting in settings if scale in setting} or set(choices))
    draw_steps(pipeline, some, {scale: scales} if each else {}).save(folder / "steps.png")
    draw_trajectory(pipeline, some).save(folder / "trajectory.png")
