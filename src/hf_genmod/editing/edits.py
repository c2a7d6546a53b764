"""Images drawn anew from given ones: from a noise level in between (SDEdit), or where a mask is white (inpainting)."""

from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from torch import Tensor

from hf_genmod.data.value_range import to_model_range
from hf_genmod.editing.given import UNIT, latents_of, read_images, read_mask
from hf_genmod.editing.inversion import Inversion
from hf_genmod.editing.known_part import denoiser_given, seamless
from hf_genmod.editing.noise_levels import from_step, noised, noised_back, whole_steps
from hf_genmod.errors import counted
from hf_genmod.pipelines.base import GenerationPipeline
from hf_genmod.pipelines.requests import check_positive, standard_normal
from hf_genmod.pipelines.samplers import REMEDIES, Sampler, check_sampler

STRENGTH = 0.6  # without a mask
NUM_RESAMPLE = 5  # with a mask alone, where the sampler can take a step again


def edit_of(pipeline: GenerationPipeline, sampler: Sampler, n: int, generators: list, image=None, *how):
    """The steps of a call that is given an image, or by `invert` something else in its place."""
    if isinstance(image, Inversion):
        return image.of_call(pipeline, sampler, n)
    return Edit(pipeline, sampler, n, generators, image, *how)


class Edit:
    """
    The steps of a call that is given images x_0. It starts at the first timestep t up to strength · T of the sampler,

        x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε        (SDEdit, Meng et al. 2022, https://arxiv.org/abs/2108.01073)

    and, with a mask, steps by the mean of x_0 given x_t and the part that is kept, see [`denoiser_given`]. Then each
    step is taken `num_resample` times: x_{t'} is noised to x_t again before each but the first (RePaint, Lugmayr et
    al. 2022, https://arxiv.org/abs/2201.09865, Algorithm 1), which corrects errors of x̂_0. The default is 5, and 1
    where there is a class or a prompt, which says what to draw from the start.

    Args:
        sampler ([`Sampler`]): All steps of the call.
        n (`int`): The number of results.
        generators (`list[torch.Generator]`): One for each of them.
        image, mask_image, strength, num_resample: As the pipelines take them.

    Raises:
        ValueError: If an argument is missing or out of its range, an image does not fit the model, or the sampler
            cannot start there or take a step again.
    """

    def __init__(
        self,
        pipeline: GenerationPipeline,
        sampler: Sampler,
        n: int,
        generators: list[torch.Generator],
        image=None,
        mask_image=None,
        strength: float | None = None,
        num_resample: int | None = None,
    ):
        for name, value in (("mask_image", mask_image), ("strength", strength), ("num_resample", num_resample)):
            if value is not None and (image is None or (name == "num_resample" and mask_image is None)):
                missing = "image" if image is None else "mask_image"
                raise ValueError(f"{name}: it is for a given {missing}; give one, or leave it out")
        strength = (1.0 if mask_image is not None else STRENGTH) if strength is None else strength
        if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 < strength <= 1:
            raise ValueError(f"strength: {strength!r} is not within (0, 1]; at 1 nothing of the image is left")
        check_positive(num_resample=1 if num_resample is None else num_resample)
        if mask_image is not None and torch.is_inference_mode_enabled():
            raise ValueError("mask_image: it needs derivatives; use torch.no_grad() instead of inference_mode()")
        if mask_image is not None and pipeline.is_consistent:
            reason = "a model tuned to few steps predicts one image, not the mean of those that fit"
            raise ValueError(f"mask_image: {reason}; use the model that it was tuned from")
        self.pipeline, self.sampler, self.generators = pipeline, sampler, generators
        device, self.values = pipeline._execution_device, read_images(pipeline, image, n)
        self.x = to_model_range(self.values, pipeline.config.value_range or UNIT).to(device)
        self.x_0 = latents_of(pipeline, self.x)
        self.redrawn = None if mask_image is None else read_mask(mask_image, self.x.shape).to(device)
        timesteps = sampler.scheduler.timesteps
        self.first = first_step(sampler, strength)
        check_start(pipeline, int(sampler.n), strength)
        can_repeat = len(timesteps) == sampler.n  # not of Heun, PNDM and others that take a step in parts
        if num_resample not in (None, 1) and not can_repeat:
            name = type(pipeline.scheduler).__name__
            raise ValueError(f"num_resample: {name} cannot take a step again; use 1, or DPMSolverMultistepScheduler")
        is_open = mask_image is not None and not {"class_labels", "prompt"} & pipeline.example_request().keys()
        self.num_resample = num_resample or (NUM_RESAMPLE if can_repeat and is_open else 1)

    def run(self, take_step, predict, epsilon: Tensor) -> Tensor:
        """The result of all steps, (n, c, h, w), for noise ε of the same shape."""
        pipeline, sampler = self.pipeline, from_step(self.sampler, self.first)
        steps, times = range(self.first, len(sampler.sigmas)), range(self.num_resample)
        pipeline._num_timesteps = len(steps) * len(times)
        x_t = noised(self.sampler, self.first, self.x_0, epsilon)
        if self.redrawn is not None:
            redrawn = F.adaptive_max_pool2d(self.redrawn.float(), x_t.shape[2:]) > 0
            predict = denoiser_given(self.x_0, ~redrawn, predict, pipeline.scheduler.config.prediction_type)
        for i, k in pipeline.progress_bar([(i, k) for i in steps for k in times]):
            if k < times[-1]:  # a step that is taken again, without what earlier ones left in the sampler
                x_t = take_step(from_step(self.sampler, i), i, x_t, predict)
                epsilon = standard_normal(x_t.shape[1:], self.generators).to(x_t.device)
                x_t = noised_back(self.sampler, i, x_t, epsilon)
            else:
                x_t = take_step(sampler, i, x_t, predict)
            if pipeline.interrupt:
                break
        return x_t

    def _finished(self, z: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """The output of the call, as of the pipeline, with the pixels that are kept as they were given."""
        if self.redrawn is None or output_type == "latent":
            return self.pipeline._finished(z, output_type, return_dict)
        images = self.pipeline.postprocess(seamless(self.pipeline.decode(z), self.x, self.redrawn), output_type)
        kept, values = ~self.redrawn, self.values.to(self.x.device)
        if output_type == "pt":  # converting what is kept to [-1, 1] and back would round it
            images = torch.where(kept, values, images)
        elif output_type == "np":
            images = np.where(*(x.permute(0, 2, 3, 1).cpu().numpy() for x in (kept, values)), images)
        self.pipeline.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def first_step(sampler: Sampler, strength: float) -> int:
    """The first step of a sampler at a timestep up to strength · T, or its last one."""
    steps, most = whole_steps(sampler), strength * sampler.scheduler.config.num_train_timesteps - 0.5
    return next((i for i in steps if sampler.scheduler.timesteps[i] <= most), steps[-1])


def check_start(pipeline: GenerationPipeline, n: int, strength: float) -> None:
    """Raises `ValueError` if the scheduler of a pipeline in n steps does not draw from its first step up to
    strength · T on, with the next larger n up to 20 more in which it does; or if a model tuned to few steps, which
    starts at few timesteps, starts above strength · T, though it does not in more steps."""
    scheduler, consistent = pipeline.scheduler, pipeline.is_consistent
    T = scheduler.config.num_train_timesteps

    def starts(n: int) -> float:
        """The timestep at which an edit of n steps starts, as a share of T."""
        sampler = Sampler(scheduler, n)
        return (float(sampler.scheduler.timesteps[first_step(sampler, strength)]) + 1) / T

    if consistent and starts(n) > max(strength, 0.01 + starts(4)):
        enough = 2 if n == 1 and starts(2) <= strength else 4
        reason = f"{strength:g} is less than {starts(n):.2g}, where {counted(n, 'step')} start{'s' * (n == 1)}"
        raise ValueError(f"strength: {reason}; take {enough} steps")

    def fault(n: int) -> str | None:
        try:
            check_sampler(scheduler, n, first_step(Sampler(scheduler, n), strength), consistent)
        except ValueError as error:
            return str(error)

    if reason := fault(n):
        most = min(n + 20, T)
        enough = next((more for more in range(n + 1, most + 1) if fault(more) is None), None)
        other = REMEDIES[consistent]
        remedy = f"take {enough} steps, or {other}" if enough else other
        raise ValueError(f"{reason.removesuffix(other)}{remedy}")
