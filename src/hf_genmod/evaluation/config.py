"""What is measured of a checkpoint: by which settings samples are drawn, and how many."""

import dataclasses
import itertools

import diffusers
from diffusers import SchedulerMixin
from transformers.hf_argparser import HfArg

import hf_genmod


@dataclasses.dataclass
class EvaluationConfig:
    """Samples and features."""

    samples: int = HfArg(default=1000, help="Samples of each setting.")
    guidance_scales: list[float] = HfArg(
        default_factory=list, help="γ, or s of a classifier; one setting each. Default: that of the pipeline."
    )
    num_inference_steps: list[int] = HfArg(default_factory=lambda: [20], help="Sampler steps; one setting each.")
    samplers: list[str] = HfArg(
        default_factory=list, help="Names of diffusers schedulers; one setting each. Default: that of the checkpoint."
    )
    noise_levels: list[int] = HfArg(
        default_factory=list, help="Noise in the small images of an upsampler; one setting each. Default: no noise."
    )
    features: str | None = HfArg(
        default=None,
        help="Network whose features are compared: a vision model of transformers, a folder or an id, or "
        "features-*.safetensors of another report. Default: a small network that is trained on the data set.",
    )
    measures: list[str] = HfArg(
        default_factory=list,
        help="What to measure besides, by the networks of papers: standard, or only fid (also KID, precision, recall) "
        "or fd_dinov2.",
    )
    reference: str | None = HfArg(
        default=None,
        help="File of the statistics of the training images for these measures, which others can use for the same "
        "data; it is made if it is missing. Default: reference-*.safetensors in the folder of the report.",
    )
    seed: int = HfArg(default=0, help="Seed of the first sample; the next has seed + 1.")

    def settings_for(self, pipeline) -> list[dict]:
        """All combinations of arguments by which samples of a pipeline are drawn; for an autoencoder its priors.
        Raises a `ValueError` for guidance scales of a model that is not guided, or noise levels of no upsampler."""
        name = type(pipeline).__name__
        if self.guidance_scales and pipeline.guidance_argument is None:
            raise ValueError(f"guidance_scales: a {name} is not guided; leave them out")
        if self.noise_levels and "image" not in pipeline.example_request():
            raise ValueError(f"noise_levels: a {name} is no upsampler; leave them out")
        if not pipeline.denoises:
            return [{"prior": prior} for prior in pipeline.priors]
        choices = {
            "sampler": self.samplers or [type(pipeline.scheduler).__name__],
            "num_inference_steps": self.num_inference_steps,
            pipeline.guidance_argument: self.guidance_scales,
            "noise_level": self.noise_levels,
        }
        choices = {name: values for name, values in choices.items() if values}
        return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def make_sampler(name: str, own: SchedulerMixin) -> SchedulerMixin:
    """The scheduler of a name, of this package or of diffusers, with the noise schedule of a pipeline's own scheduler.
    Raises a `ValueError` for other names."""
    if name == type(own).__name__:
        return own
    cls = getattr(hf_genmod, name, getattr(diffusers, name, None))
    if not hasattr(cls, "add_noise"):
        raise ValueError(f"samplers: {name!r} is no scheduler of diffusers, such as DDIMScheduler")
    return cls.from_config(own.config)
