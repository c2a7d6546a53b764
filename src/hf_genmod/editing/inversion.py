"""Images as noise: the probability-flow ODE of a diffusion model, run backwards."""

import itertools
import math

import torch
from torch import Tensor

from hf_genmod.data.value_range import to_model_range
from hf_genmod.editing.given import UNIT, latents_of, read_images, repeated
from hf_genmod.editing.noise_levels import factor_of, from_step, sigma_of, whole_steps
from hf_genmod.errors import counted
from hf_genmod.pipelines.base import GenerationPipeline
from hf_genmod.pipelines.pictures import REMEDY
from hf_genmod.pipelines.predictions import clipped, x_0_of
from hf_genmod.pipelines.requests import check_positive
from hf_genmod.pipelines.samplers import OTHER_SAMPLER, Sampler

CLOSE = 1e-4  # mean squared error of values in [-1, 1]: 46 dB


def invert(
    pipeline: GenerationPipeline, image, num_inference_steps: int = 50, num_corrections: int = 8, **request
) -> Tensor:
    """
    The noise x_T, (n, c, h, w), of which a pipeline draws given images: `pipe(latents=x_T, ...)` with the same
    sampler, number of steps and condition, and without guidance, gives them back. The ODE (Song et al. 2021,
    https://arxiv.org/abs/2011.13456)

        dx̄/dλ = x̄ − x̂_0(x̄, σ),    x̄ = x_t / √ᾱ_t,  λ = log σ,  σ = √((1−ᾱ_t)/ᾱ_t)

    is solved from the last noise level of the sampler to the first, G(x_0), by a method of second order. Each
    correction then draws by the sampler, F(x_T), and subtracts what G makes of the difference (a fixed-point
    iteration, as Hong et al. 2023, https://arxiv.org/abs/2311.18387, for any deterministic sampler):

        x_T ← x_T + G(x_0) − G(F(x_T))

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them): n of them, as
            [`UnconditionalPipeline`] takes them.
        num_inference_steps (`int`, defaults to 50): Steps of the sampler.
        num_corrections (`int`, defaults to 8): The most corrections, which cost twice the steps each. An image that
            comes back at 46 dB is not corrected any further. The x_T that draws an image best is kept.
        request (`dict`): The condition, such as `class_labels`, one for all images or one for each;
            `guidance_scale` or `classifier_scale`, which are off by default; and `callback_on_step_end`, which is
            called after the steps that draw. If it sets `pipe._interrupt`, the best x_T so far is returned.

    Raises:
        ValueError: If the sampler adds noise, so that it cannot be run backwards.
    """
    if num_corrections != 0:
        check_positive(num_corrections=num_corrections)
    values = read_images(pipeline, image)
    x = to_model_range(values, pipeline.config.value_range or UNIT).to(pipeline._execution_device)
    inversion = Inversion(latents_of(pipeline, x), num_corrections)
    request = unguided(pipeline) | repeated(pipeline, request, len(values))
    (x_T,) = pipeline(image=inversion, num_inference_steps=num_inference_steps, return_dict=False, **request)
    return x_T


def unguided(pipeline: GenerationPipeline) -> dict[str, float]:
    """The argument that turns guidance off."""
    name = pipeline.guidance_argument
    return {} if name is None else {name: 0.0 if name == "classifier_scale" else 1.0}


class Inversion:
    """What `invert` gives a pipeline for an image: the steps of a call that go from x_0, (n, c, h, w), to x_T."""

    def __init__(self, x_0: Tensor, num_corrections: int):
        self.x_0, self.num_corrections = x_0, num_corrections

    def of_call(self, pipeline: GenerationPipeline, sampler: Sampler, n: int) -> "Inversion":
        self.pipeline, self.sampler = pipeline, sampler
        if pipeline.is_consistent:
            reason = "a model tuned to few steps follows no trajectory that could be run backwards"
            raise ValueError(f"image: {reason}; use the model that it was tuned from")
        check_deterministic(sampler)
        if n != len(self.x_0):
            number = counted(n, "result")
            raise ValueError(f"image: {len(self.x_0)} for {number}; give one condition for all, or one for each")
        self.levels = whole_steps(sampler)
        return self

    def run(self, take_step, predict, epsilon: Tensor) -> Tensor:
        """x_T; the noise ε of the call is not used."""
        sampler, pipeline = self.sampler, self.pipeline
        factor = factor_of(sampler, 0) * sampler.scheduler.init_noise_sigma  # x̄_T / x_T
        steps, k = len(sampler.sigmas), self.num_corrections
        pipeline._num_timesteps = (k + 1) * len(self.levels) + (k + 1 if k else 0) * steps
        with pipeline.progress_bar(total=pipeline._num_timesteps) as bar:

            def draw(x_T):
                x, own = x_T * sampler.scheduler.init_noise_sigma, from_step(sampler, 0)
                for i in range(steps):
                    x = take_step(own, i, x, predict)
                    bar.update()
                    if pipeline.interrupt:
                        break
                return x

            exact = self._backwards(predict, self.x_0, bar) / factor
            x_T = best = exact
            least = torch.full((len(exact),), math.inf, device=exact.device)
            for remaining in range(k, -1, -1) if k else ():
                drawn = draw(x_T)
                if pipeline.interrupt:
                    break
                error = (drawn - self.x_0).square().flatten(1).mean(dim=1)
                better = (error < least) & (least > CLOSE)  # a close one stays, whatever the others of its batch need
                best, least = torch.where(better[:, None, None, None], x_T, best), torch.where(better, error, least)
                if least.max() <= CLOSE:
                    break
                if remaining:
                    x_T = x_T + exact - self._backwards(predict, drawn, bar) / factor
            bar.total = bar.n
        return best

    def _backwards(self, predict, x_0: Tensor, bar) -> Tensor:
        """G(x_0) as x̄_T."""
        levels = [(i, math.log(sigma_of(self.sampler, i))) for i in reversed(self.levels)]
        x, epsilon, change = x_0, self._epsilon(predict, x_0, levels[0][0]), 0.0
        for (_, lambda_), (i, following) in itertools.pairwise(levels):
            h = following - lambda_
            before, epsilon = epsilon, self._epsilon(predict, flow_step(x, lambda_, h, epsilon, change), i)
            change = (epsilon - before) / h
            x = flow_step(x, lambda_, h, before, change)  # again, by ε at both ends
            bar.update()
        bar.update()
        return x

    def _epsilon(self, predict, x_bar: Tensor, i: int) -> Tensor:
        """ε_θ = (x̄ − x̂_0) / σ before step i, with x̂_0 clipped as the sampler clips it."""
        scheduler, sigma = self.sampler.scheduler, sigma_of(self.sampler, i)
        x_t = x_bar / math.hypot(1, sigma)
        prediction = predict(x_t, scheduler.timesteps[i], self.sampler.sigmas[i])[:, : x_t.shape[1]]
        x_0 = x_0_of(scheduler.config.prediction_type, prediction, x_t, sigma)
        return (x_bar - clipped(scheduler, x_0)) / sigma

    def _finished(self, z: Tensor, output_type: str, return_dict: bool) -> tuple[Tensor]:
        if not z.isfinite().all():
            raise ValueError(f"image: the noise that it comes from is not finite; {REMEDY}")
        self.pipeline.maybe_free_model_hooks()
        return (z,)


def flow_step(x_bar: Tensor, lambda_: float, h: float, epsilon: Tensor, change: Tensor | float) -> Tensor:
    """x̄ at λ + h if ε is `epsilon` + τ `change` at λ + τ: x̄ + ∫_0^h e^{λ+τ} (epsilon + τ change) dτ."""
    return x_bar + math.exp(lambda_) * (math.expm1(h) * epsilon + ((h - 1) * math.exp(h) + 1) * change)


def check_deterministic(sampler: Sampler) -> None:
    """Raises `ValueError` if a step depends on the generator."""

    def after(i, seed):
        own, x = from_step(sampler, i), torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
        own.scheduler.scale_model_input(x, own.scheduler.timesteps[i])  # which some must have seen
        return own.step(i, x / 2, x, [torch.Generator().manual_seed(seed)])

    config, some = sampler.scheduler.config, (0, len(sampler.sigmas) // 2)  # some add noise only on the way
    learned = str(config.get("variance_type")).startswith("learned")
    if learned or not all(torch.equal(after(i, 0), after(i, 1)) for i in some):
        name, kind = type(sampler.scheduler).__name__, config.get("algorithm_type")
        name += f" ({kind})" if kind else ""
        raise ValueError(f"scheduler: {name} adds noise and cannot be run backwards; {OTHER_SAMPLER}")
