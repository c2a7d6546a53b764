"""What a checkpoint can do on a page, and the settings that this takes."""

import inspect
import os
import threading
from collections.abc import Sequence
from functools import cached_property

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from hf_genmod.data.value_range import MODES
from hf_genmod.demo.settings import MOST_CHARACTERS, Setting
from hf_genmod.errors import a_or_an
from hf_genmod.pipelines.checkpoint import ImagePipeline
from hf_genmod.pipelines.requests import one_generator_each, standard_normal
from hf_genmod.pipelines.samplers import check_sampler
from hf_genmod.processes import processes
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.sharing.loading import load_pipeline

NO_CLASS = "–"
MOST_PICTURES, MOST_STEPS, MOST_FRAMES, LARGEST_SEED = 16, 250, 12, 2**31 - 1
AS_SAVED = "as saved"
TRAILING = {"timestep_spacing": "trailing"}
SAMPLERS = {  # name -> (class, options of `from_config`, whether it adds noise)
    "SDE-DPM-Solver++": (DPMSolverMultistepScheduler, TRAILING | {"algorithm_type": "sde-dpmsolver++"}, True),
    "DPM-Solver++": (DPMSolverMultistepScheduler, TRAILING, False),
    "DDIM": (DDIMScheduler, TRAILING, False),
    "Algorithm 2 (DDPM)": (AncestralDDPMScheduler, {}, True),
}
WITHOUT_NOISE = "DPM-Solver++"
NUM_SLIDERS, NUM_SAMPLES = 8, 64  # of the latents of an autoencoder


def _around(default: float) -> tuple[float, float, float]:
    """The default of a strength of guidance, and a range around it."""
    return default, min(-5.0, default), max(15.0, default)


class DemoModel:
    """
    A checkpoint, or a cascade of several, as a page draws with it.

    Args:
        model (`str` or `os.PathLike`): A folder, or an id on the Hub.
        upsamplers (`list[str]`): Those that enlarge its images, in this order.
        revision (`str`, *optional*): The branch or commit of the model on the Hub.
        adapter (`str` or `os.PathLike`, *optional*): An adapter (LoRA) for the model, a folder or an id on the Hub.

    Attributes:
        tabs (`list[str]`): What the page offers: "draw", "between", "edit", "steps", "enlarge", "reconstruct",
            "latents".

    Raises:
        FileNotFoundError, ValueError: If one is no checkpoint, or they do not fit together.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        upsamplers: Sequence[str | os.PathLike] = (),
        revision: str | None = None,
        adapter: str | os.PathLike | None = None,
    ):
        self.places = [os.fspath(place) for place in (model, *upsamplers)]
        self.device = processes().device
        self.options = {} if revision is None else {"revision": revision}
        of_each = [self.options, *[{}] * len(upsamplers)]
        pairs = zip(self.places, of_each, strict=True)
        self.stages = [load_pipeline(place, **options).to(self.device) for place, options in pairs]
        for stage in self.stages:
            stage.set_progress_bar_config(disable=True)
        self.pipe, self.lock = self.stages[0], threading.Lock()
        self.adapter = None if adapter is None else os.fspath(adapter)
        if adapter is not None:
            if not self.pipe.denoises:
                raise ValueError(f"adapter: {a_or_an(type(self.pipe).__name__)} takes none; leave it out")
            self.pipe.load_lora_weights(self.adapter)
        for place, stage in zip(self.places[1:], self.stages[1:], strict=True):
            if "image" not in stage.example_request():
                kind = a_or_an(type(stage).__name__)
                raise ValueError(f"{place}: {kind} does not enlarge; give what `train upsampler` made")
        if self.is_cascade and not self.pipe.denoises:
            raise ValueError(f"{model}: {a_or_an(type(self.pipe).__name__)} is no first stage of a cascade")

    @property
    def is_cascade(self) -> bool:
        return len(self.stages) > 1

    @property
    def enlarges(self) -> bool:
        return "image" in self.pipe.example_request()

    @property
    def name(self) -> str:
        return " + ".join(os.path.basename(os.path.abspath(p)) if os.path.isdir(p) else p for p in self.places)

    @cached_property
    def reads_pictures(self) -> bool:
        """Whether a picture of 8 bits can be given to the model."""
        return self.pipe.config.get("value_range") is None and self.shape[0] in MODES

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the pictures."""
        return self.pipe.picture_shape

    @cached_property
    def tabs(self) -> list[str]:
        if self.is_cascade:
            return ["draw"]
        if self.enlarges:
            if not self.reads_pictures:
                raise ValueError(f"{self.places[0]}: it enlarges measured values, which a page cannot show")
            return ["enlarge"]
        if not self.pipe.denoises:
            tabs = ["latents"] * bool(self.factors) + ["draw"] * bool(self.pipe.priors)
            return tabs + ["reconstruct"] * self.reads_pictures
        return ["draw", "between"] + ["edit"] * self.reads_pictures + ["steps"]

    @cached_property
    def class_names(self) -> list[str]:
        """The names of the classes, or their numbers."""
        count = getattr(self.pipe, "num_classes", None) or 0
        return list(self.pipe.labels) or [*map(str, range(count))]

    @cached_property
    def schedulers(self) -> dict:
        """The samplers that draw with this model, by their names."""
        found = {AS_SAVED: self.pipe.scheduler}
        learned = str(self.pipe.scheduler.config.get("variance_type")).startswith("learned")
        for name, (cls, options, _) in SAMPLERS.items():
            if learned and cls is AncestralDDPMScheduler:
                continue  # which needs the variance that only its own config describes
            scheduler = cls.from_config(self.pipe.config.process, **options, **self._clips(cls))
            try:
                check_sampler(scheduler, 20, consistent=self.pipe.is_consistent)
            except ValueError:
                continue
            found[name] = scheduler
        return found

    def with_sampler(self, name: str) -> ImagePipeline:
        """The pipeline with another sampler, for one call."""
        if name == AS_SAVED:
            return self.pipe
        pipe = type(self.pipe).from_pipe(self.pipe, scheduler=self.schedulers[name])
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sampler_code(self, name: str) -> tuple[list[str], list[str]]:
        """Python that gives `pipe` a sampler: imports, and lines."""
        if name == AS_SAVED:
            return [], []
        cls, options, _ = SAMPLERS[name]
        words = [f"{key}={value!r}" for key, value in (options | self._clips(cls)).items()]
        package = "hf_genmod" if cls is AncestralDDPMScheduler else "diffusers"
        lines = [
            f"pipe.scheduler = {cls.__name__}.from_config(",
            f"    {', '.join(['pipe.config.process', *words])}",
            ")",
        ]
        return [f"from {package} import {cls.__name__}"], lines

    def _clips(self, cls) -> dict:
        return {} if "clip_sample" not in inspect.signature(cls).parameters else {"clip_sample": self.pipe.vae is None}

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """All settings of the page, by their names; "do" is the tab."""
        task = Setting("do", "what to draw", self.tabs[0], choices=tuple(self.tabs))
        return {setting.name: setting for setting in [task, *(s for tab in self.tabs for s in self.settings_of(tab))]}

    def settings_of(self, tab: str) -> list[Setting]:
        """The settings of a tab."""
        return [*([] if tab == "latents" else self._of_request), *self._of_tab(tab)]

    def default_of(self, name: str, otherwise):
        """The default of an argument of the pipeline, of the checkpoint or else of the signature."""
        own = (self.pipe.config.get("defaults") or {}).get("arguments", {})
        parameter = inspect.signature(type(self.pipe).__call__).parameters.get(name)
        return own.get(name, otherwise if parameter is None else parameter.default)

    @cached_property
    def _of_request(self) -> list[Setting]:
        """What is asked for, guidance, steps and sampler."""
        pipe, found = self.pipe, []
        if names := tuple(self.class_names):
            optional = (NO_CLASS, *names)
            first = (NO_CLASS if self.enlarges else names[0], optional if self.enlarges else names)
            found.append(Setting("class_1", "class", first[0], choices=first[1]))
            found.append(Setting("weight_1", "weight", 1.0, -3, 3, 0.1))
            for k in (2, 3) if len(names) > 1 and not self.enlarges else ():
                found.append(Setting(f"class_{k}", "and" if k == 2 else "and also", NO_CLASS, choices=optional))
                found.append(Setting(f"weight_{k}", "weight", 1.0, -3, 3, 0.1))
        if self.takes_prompts:
            found.append(Setting("prompt", "prompt", self.first_prompt))
            found.append(Setting("negative_prompt", "negative prompt", "", info="what to guide away from"))
        if not pipe.denoises:
            return found
        scale = "guidance_scale"
        if pipe.guidance_argument == "classifier_scale":
            default = float(self.default_of("classifier_scale", 2.0))
            info = "of the classifier's gradient; off at 0"
            found.append(Setting("classifier_scale", "s, classifier scale", *_around(default), 0.1, info=info))
        if pipe.guidance_argument == scale or (pipe.guidance_argument and pipe.unet.config.num_classes):
            default, info = float(self.default_of(scale, 1.0)), "ε̃ = ε(∅) + γ (ε(y) − ε(∅)); off at 1"
            found.append(Setting(scale, "γ, guidance scale", *_around(default), 0.1, info=info))
        most = min(MOST_STEPS, pipe.scheduler.config.num_train_timesteps)
        steps = min(self.default_of("num_inference_steps", 20), most)
        found.append(Setting("steps", "steps", steps, 1, most))
        if not self.is_cascade:
            found.append(Setting("sampler", "sampler", AS_SAVED, choices=tuple(self.schedulers)))
        return found

    def _of_tab(self, tab: str) -> list[Setting]:
        seed = Setting("seed", "seed", 0, 0, LARGEST_SEED, info="of the first image; the next has seed + 1")
        number = Setting("number", "images", 4, 1, MOST_PICTURES)
        if tab == "between":
            other = Setting("seed_b", "other seed", 1, 0, LARGEST_SEED, info="from the seed to this one")
            return [seed, other, Setting("frames", "images in the strip", 8, 2, MOST_FRAMES)]
        if tab == "edit":
            info = "how much of the noise comes back; at 1 nothing of the image is left, except outside of a mask"
            return [seed, number, Setting("strength", "strength", 0.6, 0.05, 1, 0.05, info=info)]
        if tab == "enlarge":
            longest = max(self.shape[1:]) // self.pipe.config.factor
            info = "larger images are made smaller before they are enlarged"
            found = [
                seed,
                Setting("longest", "longer side, in pixels", longest, min(8, longest), max(256, longest), info=info),
            ]
            most = self.pipe.config.max_noise_level
            info = "added to the image, so that the model corrects it"
            return found + [Setting("noise_level", "noise level", 0, 0, most, info=info)] * (most > 0)
        if tab == "latents":
            sliders = [Setting(f"z{i}", f"z{i} · {kl:.2f} nats", 0.0, -4, 4, 0.05) for i, kl in self.factors]
            return [seed, *sliders]
        return {"draw": [seed, number], "steps": [seed], "reconstruct": []}[tab]

    @property
    def takes_prompts(self) -> bool:
        return "prompt" in self.pipe.example_request()

    @cached_property
    def first_prompt(self) -> str:
        """A caption of the training, if one is known."""
        from hf_genmod.sharing.facts import Facts

        try:
            return Facts.read(self.places[0]).captions[0][:MOST_CHARACTERS]
        except (OSError, ValueError, IndexError):
            return "an image"

    @cached_property
    def factors(self) -> list[tuple[int, float]]:
        """(index in the flattened z, nats) of the latents with the largest mean KL(q(z_i | x) ‖ N(0, 1)) over samples
        x of the model itself; none of an autoencoder without a posterior and a standard prior."""
        if self.pipe.denoises or "standard" not in self.pipe.priors:
            return []
        seeds = [torch.Generator().manual_seed(seed) for seed in range(NUM_SAMPLES)]
        shape = self.pipe.vae.latent_shape(*self.shape[1:])
        kl = []
        with torch.no_grad():
            for part in standard_normal(shape, one_generator_each(seeds, NUM_SAMPLES)).split(16):
                q = self.pipe.vae.encode(self.pipe.decode(part.to(self.device)).clamp(-1, 1)).latent_dist
                kl.append(0.5 * (q.mean**2 + q.var - 1 - q.logvar).flatten(1))
        mean = torch.cat(kl).mean(0)
        return [(int(i), float(mean[i])) for i in mean.argsort(descending=True, stable=True)[:NUM_SLIDERS]]
