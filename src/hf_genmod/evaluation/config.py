"""What is measured of a checkpoint: by which settings samples are drawn, and how many."""

import dataclasses
import inspect
import itertools

import diffusers
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from transformers.hf_argparser import HfArg

import hf_genmod
from hf_genmod.errors import a_or_an

# What a sweep tries beside what the checkpoint has: the samplers that `docs/samplers.md` finds best, and strengths of
# guidance from the one that is off, or nearly off, to one that costs variety.
_SWEPT_SAMPLERS = ("DPMSolverMultistepScheduler", "FewStepDDPMScheduler")
_SWEPT_STEPS = (10, 20, 50)
_SWEPT_SCALES = {"guidance_scale": (1.0, 1.5, 2.0, 3.0), "classifier_scale": (0.0, 1.0, 2.0, 4.0)}
_SWEPT_AUTOGUIDANCE = (1.0, 1.5, 2.0)
_OFF = {"guidance_scale": 1.0, "classifier_scale": 0.0}


@dataclasses.dataclass
class EvaluationConfig:
    """Samples and features."""

    samples: int = HfArg(default=1000, help="Samples of each setting.")
    guidance_scales: list[float] = HfArg(
        default_factory=list, help="γ, or s of a classifier; one setting each. Default: that of the pipeline."
    )
    autoguidance_scales: list[float] = HfArg(
        default_factory=list, help="w of models with a guiding_unet; one setting each. Default: that of the pipeline."
    )
    num_inference_steps: list[int] = HfArg(
        default_factory=list, help="Sampler steps; one setting each. Default: those of the checkpoint, or 20."
    )
    samplers: list[str] = HfArg(
        default_factory=list, help="Names of diffusers schedulers; one setting each. Default: that of the checkpoint."
    )
    sweep: bool = HfArg(
        default=False,
        help="Find the best of several samplers, numbers of steps and guidance scales by successive halving, and "
        "measure that setting alone. The other flags limit what is tried.",
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
        """All combinations of arguments by which samples of a pipeline are drawn, or which a sweep tries; for an
        autoencoder its priors. Raises a `ValueError` for scales of a guidance that the model lacks, noise levels of no
        upsampler, the sweep of an autoencoder, and unknown samplers."""
        name, scale = type(pipeline).__name__, pipeline.guidance_argument
        if self.guidance_scales and scale is None:
            raise ValueError(f"guidance_scales: {a_or_an(name)} is not guided; leave them out")
        has_guide = getattr(pipeline, "guiding_unet", None) is not None
        if self.autoguidance_scales and not has_guide:
            raise ValueError("autoguidance_scales: this model has no guiding_unet; leave them out")
        if self.noise_levels and "image" not in pipeline.example_request():
            raise ValueError(f"noise_levels: {a_or_an(name)} is no upsampler; leave them out")
        if self.sweep and not pipeline.denoises:
            raise ValueError(f"sweep: an {name} draws in one step without guidance; leave --sweep out")
        if not pipeline.denoises:
            return [{"prior": prior} for prior in pipeline.priors]
        own, steps = type(pipeline.scheduler).__name__, default_of(pipeline, "num_inference_steps")
        samplers, all_steps, scales, autoguidance_scales = [own], [steps], [], []
        if self.sweep:
            samplers = list(dict.fromkeys([own, *_SWEPT_SAMPLERS]))
            all_steps = sorted({steps, *_SWEPT_STEPS})
            scales = sorted({default_of(pipeline, scale), *_SWEPT_SCALES[scale]}) if scale else []
            own_w = default_of(pipeline, "autoguidance_scale")
            autoguidance_scales = sorted({own_w, *_SWEPT_AUTOGUIDANCE}) if has_guide else []
        choices = {
            "sampler": self.samplers or samplers,
            "num_inference_steps": self.num_inference_steps or all_steps,
            scale: self.guidance_scales or scales,
            "autoguidance_scale": self.autoguidance_scales or autoguidance_scales,
            "noise_level": self.noise_levels,
        }
        for sampler in choices["sampler"]:
            make_sampler(sampler, pipeline.scheduler)
        choices = {name: values for name, values in choices.items() if values}
        settings = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
        if self.autoguidance_scales or not autoguidance_scales:
            return settings
        # A sweep tries either guidance with the other one off.
        return [x for x in settings if x["autoguidance_scale"] == own_w or x.get(scale) == _OFF.get(scale)]


def default_of(pipeline, argument: str) -> int | float:
    """What a call of a pipeline takes for an argument that is left out."""
    chosen = (pipeline.config.get("defaults") or {}).get("arguments", {})
    return chosen.get(argument, inspect.signature(pipeline.__call__).parameters[argument].default)


def make_sampler(name: str, own: SchedulerMixin) -> SchedulerMixin:
    """The scheduler of a name, of this package or of diffusers, with the noise schedule of a pipeline's own scheduler.
    DPM-Solver++ is the stochastic one, unless the config says another. Raises a `ValueError` for other names."""
    if name == type(own).__name__:
        return own
    cls = getattr(hf_genmod, name, getattr(diffusers, name, None))
    if not hasattr(cls, "add_noise"):
        raise ValueError(f"samplers: {name!r} is no scheduler of diffusers, such as DDIMScheduler")
    is_other = cls is DPMSolverMultistepScheduler and "algorithm_type" not in own.config
    return cls.from_config(own.config, **({"algorithm_type": "sde-dpmsolver++"} if is_other else {}))
