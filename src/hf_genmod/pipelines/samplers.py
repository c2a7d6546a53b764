"""Samplers: any scheduler that draws from the distribution."""

import contextlib
import copy
import functools
import inspect
import json
import math

import numpy as np
import torch
from diffusers import DDPMScheduler, LCMScheduler, SchedulerMixin

from .requests import plain

OTHER_SAMPLER = 'use DPMSolverMultistepScheduler.from_config(pipe.config.process, timestep_spacing="trailing")'
REMEDIES = (OTHER_SAMPLER, "use the scheduler of the checkpoint, in 1, 2 or 4 steps")  # by whether it is consistent


class StepCount(int):
    """The number of steps n, for schedulers of diffusers to divide T by."""

    stride = None  # the timesteps from this step to the next

    def __rtruediv__(self, T):  # "trailing" counts down from T by T/n: to t = −1 if that was rounded down
        return T / int(self) if math.ceil(T / (T / int(self))) <= self else math.nextafter(T / int(self), math.inf)

    def __rfloordiv__(self, T):  # DDIM, PNDM step to t − ⌊T/n⌋: https://github.com/huggingface/diffusers/issues/12633
        return T // int(self) if self.stride is None else self.stride


class Sampler:
    """A scheduler for one call, as steps change it: a copy with its timesteps chosen, and changes of its config."""

    def __init__(self, scheduler: SchedulerMixin, num_inference_steps: int, first: int = 0, **changes):
        self.scheduler, self.n = copy.deepcopy(scheduler), StepCount(num_inference_steps)
        self.scheduler.register_to_config(**changes)
        is_short = isinstance(scheduler, LCMScheduler) and self.n < 4  # 1 to 3 steps are the first of 4
        self.scheduler.set_timesteps(4 if is_short else self.n, device="cpu")  # a step never waits for the accelerator
        if is_short:
            self.scheduler.num_inference_steps, self.scheduler.timesteps = self.n, self.scheduler.timesteps[: self.n]
        if self.scheduler.config.get("sample_max_value") == 1:  # thresholding is clipping then, of images of any size
            self.scheduler._threshold_sample = lambda x_0: x_0.clamp(-1, 1)
        if hasattr(scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)  # else looked up by the timestep, which Karras' sigmas repeat
        steps = [inspect.signature(cls.step).parameters for cls in type(scheduler).__mro__ if "step" in vars(cls)]
        options = ("generator", "check_finite")  # `step` names them, or has **kwargs for a `step` below, which does
        self.options = [x for x in options if next((x in s for s in steps if x in s or "**" not in str(s)), True)]
        log_sigmas = (1 / scheduler.alphas_cumprod.cpu().double() - 1).log() / 2  # t may lie between two timesteps
        self.sigmas = np.exp(np.interp(self.scheduler.timesteps, range(len(log_sigmas)), log_sigmas)).tolist()

    def step(self, i: int, prediction: torch.Tensor, x_t: torch.Tensor, generators: list) -> torch.Tensor:
        timesteps, is_half = self.scheduler.timesteps, i < len(getattr(self.scheduler, "prk_timesteps", ()))  # of PNDM
        t, after = timesteps[i], timesteps[i + 1] if i + 1 < len(timesteps) else -1
        self.n.stride = (1 + is_half) * int(t - after) or int(timesteps[i - 1] - t)
        options = {"generator": generators, "check_finite": False}
        return self.scheduler.step(prediction, t, x_t, **{name: options[name] for name in self.options}).prev_sample


def clips_of(scheduler: SchedulerMixin) -> list[str]:
    """How a scheduler clips x̂_0; its config may also have keys that only other schedulers act on."""
    known = inspect.signature(type(scheduler).__init__).parameters
    return [name for name in ("thresholding", "clip_sample") if name in known and scheduler.config[name]]


def process_of(config: dict) -> dict:
    """The part of a scheduler's config that fixes x_t and what the network predicts."""
    keys = "prediction_type num_train_timesteps beta_schedule trained_betas rescale_betas_zero_snr beta_start beta_end"
    return {key: plain(config[key]) for key in keys.split() if key in config}


def check_process(scheduler: SchedulerMixin, process: dict, consistent: bool = False) -> None:
    """Raises `ValueError` if a scheduler is not for the process that the network was trained with."""
    name, remedy = getattr(scheduler, "__name__", type(scheduler).__name__), REMEDIES[consistent]
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"scheduler: {name} is for another kind of model; {remedy}")
    given, of_training = process_of(scheduler.config), DDPMScheduler.from_config(process_of(process))
    angle, expected = (s.alphas_cumprod.cpu().sqrt().acos() for s in (scheduler, of_training))  # arctan σ
    is_same = len(angle) == len(expected) and (angle - expected).abs().max() < 0.01  # the last σ may be finite
    for key, value in given.items():
        if process.get(key, value) != value and (key == "prediction_type" or not is_same):
            values = f"{value!r:.40}, and {process[key]!r:.40} in the training of this model"
            raise ValueError(f"scheduler: its {key} is {values}; {remedy}")
    if not is_same:
        raise ValueError(f"scheduler: {name} changes the noise levels of the training; {remedy}")


def check_sampler(scheduler: SchedulerMixin, n: int, first: int = 0, consistent: bool = False) -> None:
    """Raises `ValueError` if a scheduler draws no known distribution in n steps, or from one on, by a best network."""
    if n > (T := scheduler.config.get("num_train_timesteps", n)):
        raise ValueError(f"num_inference_steps: {n} must be within 1 ... {T}, the steps of training")
    reason = "fails"
    with contextlib.suppress(Exception):  # those for other models raise anything
        reason = _fault(type(scheduler), json.dumps(scheduler.config, default=plain), n, first, consistent)
    if reason:
        start, remedy = f", from step {first + 1} on," * bool(first), REMEDIES[consistent]
        raise ValueError(f"scheduler: {type(scheduler).__name__} in {n} steps{start} {reason}; {remedy}")


@functools.cache
def _fault(cls: type[SchedulerMixin], config: str, n: int, first: int, consistent: bool) -> str | None:
    """What is wrong with samples of N(m, s²), whose E[x_0 | x_t] is known; few steps may give less than s."""
    config, known = json.loads(config), inspect.signature(cls.__init__).parameters  # it may have keys of others
    process, config = process_of(config), {key: config[key] for key in known if key in config}
    config["_use_default_values"] = []
    for clips, most in (("clip_sample", "clip_sample_range"), ("thresholding", "sample_max_value")):
        config[clips] = bool(config.get(clips)) and config.get(most, 1) < 1  # pixels are in [-1, 1], other x_0 are not
    config |= {"variance_type": "fixed_small"} if str(config.get("variance_type")).startswith("learned") else {}
    sampler = Sampler(cls.from_config(config), n, first)
    scheduler, sigmas = sampler.scheduler, np.minimum(sampler.sigmas, 1e6)
    m, s, generators = 0.5, torch.tensor([0.1, 0.5, 1.0, 4.0]), [torch.Generator().manual_seed(0)]
    x_t = torch.randn(1, 1, 4096, 4, generator=generators[0]) * scheduler.init_noise_sigma
    if first or scheduler.alphas_cumprod[-1] >= 0.01:  # x_t is not noise, but √ᾱ_t x_0 + √(1−ᾱ_t) ε
        scale = scheduler.scale_model_input(math.hypot(1, sigmas[first]), scheduler.timesteps[first])
        x_t = (m + (s**2 + sigmas[first] ** 2).sqrt() * x_t / scheduler.init_noise_sigma) / scale
    for i, sigma in enumerate(sigmas[first:], first):
        x = scheduler.scale_model_input(x_t, scheduler.timesteps[i])
        a, b = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)  # x is a x_0 + b ε
        x_0 = m + (s / (a**2 * s**2 + b**2) ** 0.5 if consistent else a * s**2 / (a**2 * s**2 + b**2)) * (x - a * m)
        predictions = {"epsilon": (x - a * x_0) / b, "v_prediction": (a * x - x_0) / b, "sample": x_0}
        x_t = sampler.step(i, predictions[process["prediction_type"]], x_t, generators)
    mean, deviation = x_t.mean((0, 1, 2)), x_t.std((0, 1, 2))
    # DDIM multiplies x_t / √ᾱ_t − m by (s² + σ_t σ_t') / (s² + σ_t²). Algorithm 2 with β_t gives a little more than s.
    trailing = Sampler(DDPMScheduler.from_config(process, timestep_spacing="trailing"), n)
    at = [sigma for sigma in (*trailing.sigmas, 0.0) if not first or sigma <= 1.01 * sampler.sigmas[first]]
    at = torch.tensor(at).clamp(max=1e6)[:, None]
    of_ddim = (s**2 + at[0] ** 2).sqrt() * ((s**2 + at[:-1] * at[1:]) / (s**2 + at[:-1] ** 2)).prod(0)
    least, most = min(0.85, max(0.3, 1 - 2 / n)) * of_ddim - 0.001, 1.2 * s + min(0.05, 1 / n)
    is_right = ((mean - m).abs() < 0.2 * s) & (least < deviation) & (deviation < most)
    if not is_right[i := int(is_right.int().argmin())]:
        return f"draws N({m}, {s[i]:.1f}²) with mean {mean[i]:.2g} and deviation {deviation[i]:.2g}"
