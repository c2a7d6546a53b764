"""Tuning a trained model to draw in one to four steps: its settings, its network and its sampler."""

import copy
import dataclasses
import warnings
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler
from transformers.hf_argparser import HfArg

from hf_genmod.checkpoints.safety import read_json
from hf_genmod.data.captions import Tokens
from hf_genmod.evaluation.config import default_of
from hf_genmod.objectives.consistency import ConsistencyObjective
from hf_genmod.objectives.denoising import DenoisingObjective
from hf_genmod.objectives.upsampling import ConditioningAugmentation
from hf_genmod.pipelines.base import GenerationPipeline
from hf_genmod.pipelines.samplers import check_process, check_sampler, process_of
from hf_genmod.recipes.pictures import crop_size_for
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.sharing.doctor import FEWEST_OF_TUNING, FEWEST_STEPS
from hf_genmod.training.config import TrainingConfig
from hf_genmod.training.run_folder import PROVENANCE
from hf_genmod.training.text_encoder import TextConditionedUNet

NUM_STEPS = 4  # most steps to tune for, and by default; those of 1 and 2 steps start some of them
AUTOGUIDANCE = 2.0  # w of a model with a guiding_unet
SIGNAL = 0.231  # √ᾱ_t where drawing starts, t = 0.85 T of the cosine schedule: nearer to T, the model ignores x_t


@dataclasses.dataclass
class FewStepArguments:
    """Model and guidance."""

    model: str = HfArg(
        help="The trained model: the folder of its run, or its id.", metadata={"built_on": "diffusion model"}
    )
    guidance_scale: float | None = HfArg(
        default=None, help="Guidance scale γ to draw with, in one forward pass a step. Default: that of the model."
    )
    autoguidance_scale: float | None = HfArg(
        default=None,
        help="Autoguidance scale w to draw with, too. Default: 2 and γ = 1 for a model with a guiding_unet, else 1.",
    )
    condition_dropout: float = HfArg(default=0.1, help="Probability that a step drops an image's label or caption.")


@dataclasses.dataclass
class TuningConfig(TrainingConfig):
    """Training."""

    max_train_minutes: float | None = HfArg(
        default=None, help="Budget in minutes. Default: a quarter of those that the training of the model took."
    )
    learning_rate: float = HfArg(default=1.5e-3, help="Peak learning rate of Muon.")
    ema_length: float = HfArg(
        default=0.1, help="Width of the moving average of the weights, as a fraction of the steps so far. 0: none."
    )
    has_default_budget = True

    def for_model(self, model: str) -> "TuningConfig":
        """These settings, with the default budget if none is given.

        Raises:
            ValueError: If it is not known how long the model was trained.
        """
        if self.max_train_steps is not None or self.max_train_minutes is not None:
            return self
        if not (minutes := _read(model, PROVENANCE).get("minutes")):
            raise ValueError(f"max_train_minutes: {model} does not say how long it was trained; give a budget")
        return dataclasses.replace(self, max_train_minutes=minutes / 4)


@dataclasses.dataclass
class Autoguided:
    """A network guided by an early version of it: the prediction is D_w + w (D − D_w)."""

    network: torch.nn.Module
    guiding: torch.nn.Module
    w: float

    def __call__(self, x_t, t, **condition):
        D, D_w = (network(x_t, t, **condition) for network in (self.network, self.guiding))
        return type(D)(sample=torch.lerp(D_w.sample, D.sample, self.w))


class FewStepModel:
    """
    What is tuned of a model, and how.

    Args:
        pipeline ([`GenerationPipeline`]): The trained model. It becomes the tuned one: its sampler, the process and
            the defaults are those of a consistency model.
        settings ([`FewStepArguments`]): The settings.

    Raises:
        ValueError: If a classifier guides the model, a scale is given for a guidance that the model lacks, or the
            sampler does not draw from the process in few steps.
    """

    def __init__(self, pipeline: GenerationPipeline, settings: FewStepArguments):
        components, request = pipeline.components, pipeline.example_request()
        if "classifier" in components:
            raise ValueError("model: a classifier guides it in each step; tune the model that it guides")
        gamma, is_guided = settings.guidance_scale, bool({"class_labels", "prompt"} & {*request})
        if not is_guided and gamma not in (None, 1):
            raise ValueError(f"guidance_scale: {gamma} is for a model of labels or captions; leave it out")
        unet, guiding_unet, encoder = pipeline.unet, pipeline.guiding_unet, components.get("text_encoder")
        w = settings.autoguidance_scale
        if w is None:
            w = AUTOGUIDANCE if guiding_unet is not None and gamma is None else 1.0
        pipeline._check_autoguidance(w)
        if gamma is None:
            gamma = default_of(pipeline, "guidance_scale") if is_guided and w == 1 else 1.0
        process = pipeline.config.process
        is_pixels = pipeline.vae is None
        clipping = {"thresholding": is_pixels, "sample_max_value": 1.0}  # which is clipping, held at 1
        solver = DPMSolverMultistepScheduler.from_config(process, **clipping)
        scheduler = AncestralDDPMScheduler.from_config(process)
        if unet.config.out_channels > unet.config.in_channels:
            scheduler.register_to_config(variance_type="learned_range")
        check_process(pipeline.scheduler, process)
        self.sampler = _sampler(scheduler, clip_sample=is_pixels)
        self.network = TextConditionedUNet(unet, encoder.requires_grad_(False)) if encoder else unet
        self._is_autoguided = w != 1
        text, small = Tokens(pipeline.tokenizer, encoder) if encoder else None, None
        if "image" in request:
            config, resolution = pipeline.config, pipeline.picture_shape[1:]
            crop_size = crop_size_for(resolution, config.factor, unet.size_factor, None)
            small = ConditioningAugmentation(scheduler, config.factor, config.max_noise_level, crop_size)
        denoising = DenoisingObjective(
            scheduler, unet.null_label, condition_dropout=settings.condition_dropout, text=text, small=small
        )
        teacher = _frozen(copy.deepcopy(self.network))
        if self._is_autoguided:
            guiding = TextConditionedUNet(guiding_unet, encoder) if encoder else guiding_unet
            teacher = Autoguided(teacher, _frozen(guiding), w)
        self.objective = ConsistencyObjective(denoising, teacher, self.sampler.timesteps.tolist(), solver, gamma)
        self._pipeline, self._model = pipeline, settings.model
        pipeline.register_modules(scheduler=self.sampler, guiding_unet=None)
        arguments = {"num_inference_steps": NUM_STEPS} | ({"guidance_scale": 1.0} if is_guided else {})
        pipeline.register_to_config(consistent=True, defaults={"arguments": arguments})

    def warn_of_short_runs(self, config: TuningConfig):
        """Warns if the model was trained, or a run with these settings tunes it, for too few steps to be of use. How
        many steps a budget of minutes allows is reckoned from the minutes that the training of the model took."""
        steps, base = config.max_train_steps, _read(self._model, PROVENANCE)
        if base.get("steps", FEWEST_STEPS) < FEWEST_STEPS:
            reason = f"{self._model} was trained for {base['steps']} steps, too few for a model to be tuned"
            warnings.warn(f"model: {reason}; train it for at least {FEWEST_STEPS}", stacklevel=2)
        if steps is not None and steps < FEWEST_OF_TUNING:
            reason = f"{steps} are too few to draw in few steps"
            warnings.warn(f"max_train_steps: {reason}; give at least {FEWEST_OF_TUNING}", stacklevel=2)
        of_base = _read(self._model, "training_config.json").get("training", {})
        if steps is None and {"minutes", "steps"} <= base.keys() and "batch_size" in of_base:
            minutes_of_image = base["minutes"] / (base["steps"] * of_base["batch_size"])
            # In forward passes of an image: a backward pass takes two; the teacher draws one image for all levels.
            levels, guided = len(self.objective.timesteps), self.objective.guidance_scale != 1
            passes = 3 + (1 + guided) * (1 + self._is_autoguided) * (levels + 1) / levels
            needed = FEWEST_OF_TUNING * config.batch_size * minutes_of_image * passes / 3
            if config.max_train_minutes < needed:
                enough_for = FEWEST_OF_TUNING * config.max_train_minutes / needed
                reason = f"{config.budget} of tuning are about {enough_for:.0f} steps, too few to draw in few steps"
                remedy = f"give --max_train_minutes {needed:.2g}, for {FEWEST_OF_TUNING} steps"
                warnings.warn(f"max_train_minutes: {reason}; {remedy}", stacklevel=2)

    def make_pipeline(self, network: torch.nn.Module) -> GenerationPipeline:
        """The pipeline with the tuned network."""
        self._pipeline.register_modules(unet=getattr(network, "unet", network))
        return self._pipeline


def _frozen(network: torch.nn.Module) -> torch.nn.Module:
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _sampler(scheduler: AncestralDDPMScheduler, **clipping) -> LCMScheduler:
    """The sampler of a tuned model, for a process."""
    T, process = len(scheduler), process_of(scheduler.config)
    start = int((scheduler.alphas_cumprod.sqrt() > SIGNAL).sum())
    start = max(start, T // 2 + 1)  # of fewer, the sampler takes each second
    sampler = LCMScheduler.from_config(process, **clipping, original_inference_steps=start)
    try:
        for n in (1, 2, NUM_STEPS):
            sampler.set_timesteps(n)
            check_sampler(sampler, n, consistent=True)
    except ValueError as error:
        reason = f"few steps do not draw from its process, {T} timesteps of beta_schedule {process['beta_schedule']!r}"
        raise ValueError(f"model: {reason}; train it with 1000 timesteps of 'squaredcos_cap_v2'") from error
    return sampler


def _read(model: str, name: str) -> dict:
    """A file of JSON in the folder of a run; empty if there is none."""
    return read_json(file) if (file := Path(model, name)).is_file() else {}
