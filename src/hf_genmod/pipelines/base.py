"""The sampling loop that all diffusion pipelines share."""

import importlib
import inspect
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from ..models.image_model import pair
from .adapters import AdapterMixin
from .checkpoint import ImagePipeline
from .pictures import REMEDY, in_enough_precision
from .requests import (
    check_guidance,
    check_output_type,
    check_positive,
    checked_latents,
    new_call,
    of_call,
    one_generator_each,
    standard_normal,
)
from .samplers import Sampler, check_process, check_sampler, clips_of, process_of


def _edits(name: str):
    """A method that is a function of `hf_genmod.editing`, which checkpoints do not carry."""

    def edit(self, *args, **kwargs):
        if find_spec("hf_genmod") is None:
            raise ImportError("editing images needs the package hf_genmod, besides the checkpoint; install it")
        return getattr(importlib.import_module("hf_genmod.editing"), name)(self, *args, **kwargs)

    edit.__name__, edit.__doc__ = name, f"See `hf_genmod.editing.{name}`."
    return edit


class GenerationPipeline(ImagePipeline, AdapterMixin):
    """The base of the diffusion pipelines: the sampling loop, with one random generator per image. A pipeline with a
    `vae` samples in its latent space and decodes at the end."""

    denoises = True
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "guiding_unet"]
    _callback_tensor_inputs = ["latents", "pred_original_sample"]
    _scales = ()  # the arguments that make predictions infinite if they are too large
    # Of one call; `callback_on_step_end` may change the first two for the next steps.
    _guidance_scale, _interrupt, _num_timesteps = map(of_call, ("guidance_scale", "interrupt", "num_timesteps"))
    _autoguidance_scale = of_call("autoguidance_scale")
    guidance_scale = property(lambda self: self._guidance_scale, doc="γ of the call of this thread.")
    do_classifier_free_guidance = property(lambda self: self._guidance_scale not in (None, 0, 1), doc="γ is not off.")
    interrupt = property(lambda self: self._interrupt, doc="Whether the call of this thread stops after this step.")
    num_timesteps = property(lambda self: self._num_timesteps, doc="Number of steps of the call of this thread.")
    is_consistent = property(lambda self: self.config.consistent, doc="Whether it is tuned to few steps.")
    invert, interpolate, vary = map(_edits, ("invert", "interpolate", "vary"))

    def __init__(self, components: dict, value_range, process: dict | None, defaults=None, consistent=False, **config):
        if isinstance(process, dict) and "consistent" in process:  # where earlier checkpoints say it
            consistent, process = process["consistent"], {key: process[key] for key in process if key != "consistent"}
        config |= {"value_range": value_range, "defaults": defaults, "consistent": consistent}
        super().__init__(components, process=process, **config)
        self._calls, self._brought = {}, {}  # of each thread, see `of_call`; names of the classes of each adapter
        self.register_to_config(process=process or process_of(self.scheduler.config))  # that of the network's training

    def _generate(
        self, predict, n, steps, generator, x_T, output_type, return_dict, callback,
        edit=(), shift=None, clip=True, size=None,
    ):  # fmt: skip
        """
        Algorithm 2 of Ho et al. 2020 (https://arxiv.org/abs/2006.11239) with any scheduler: x_T ~ N(0, I), then
        x_{t-1} from x_t and the model's prediction until x_0. Pipelines differ in `predict(x_t, t, σ)`, at
        x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε with σ = √((1−ᾱ_t)/ᾱ_t), and in `shift(scheduler, x_t, t, σ, prediction)`, which is
        added to x_{t-1}. With `clip=False`, x̂_0 is not clipped. An `edit` (image, ...) takes the steps in its order.
        """
        on_step_end, wanted, scales = callback  # which may change the scales
        wanted = getattr(on_step_end, "tensor_inputs", wanted)  # of a callback of diffusers
        check_positive(batch_size=n, num_inference_steps=steps)
        self._check_autoguidance(scales["autoguidance_scale"])
        check_output_type(output_type)
        if not (on_step_end is None or callable(on_step_end)):
            raise ValueError(f"callback_on_step_end: {on_step_end!r:.40} is no function; give one, or None")
        known = self._callback_tensor_inputs
        if not isinstance(wanted, (list, tuple)) or not {*map(str, wanted)} <= {*known}:
            raise ValueError(f"callback_on_step_end_tensor_inputs: {wanted!r} is no list of names from {known}")
        generators = one_generator_each(generator, n)
        shape = (n, self.unet.config.in_channels, *pair(size or self.unet.config.sample_size))
        x_T = checked_latents(standard_normal(shape[1:], generators) if x_T is None else x_T, shape)
        check_process(self.scheduler, self.config.process, self.is_consistent)
        check_sampler(self.scheduler, steps, consistent=self.is_consistent)
        changes, takes_variance = self._config_changes(clip)
        if takes_variance and self.unet.config.out_channels == shape[1]:
            raise ValueError("scheduler: its variance_type is learned, but not by this unet; use 'fixed_small'")
        sampler = Sampler(self.scheduler, steps, **changes)
        edit = _edits("edit_of")(self, sampler, n, generators, *edit) if any(x is not None for x in edit) else None
        x_T = x_T.to(self._execution_device).float()
        finite = []  # for each step, its timestep and whether the result is finite, on the device

        def take_step(sampler, i, x_t, predict):
            scheduler, t, sigma = sampler.scheduler, sampler.scheduler.timesteps[i], sampler.sigmas[i]
            model_input = scheduler.scale_model_input(x_t, t)
            prediction = predict(model_input, t, sigma)[:, : None if takes_variance else x_t.shape[1]]
            x_t = sampler.step(i, prediction, x_t, generators)
            if shift is not None:
                x_t = x_t + shift(scheduler, model_input, t, sigma, prediction)
            finite.append((t, prediction.isfinite().all() & x_t.isfinite().all()))
            if on_step_end is not None:
                of = {"latents": lambda *_: x_t, "pred_original_sample": _edits("predicted_x_0")}
                changed = on_step_end(self, i, t, {x: of[x](self, prediction, model_input, sigma) for x in wanted})
                if not isinstance(changed, dict | None):
                    raise ValueError(f"callback_on_step_end: it returned {changed!r:.40}, neither a dict nor None")
                x_t = checked_latents((changed or {}).get("latents", x_t), shape).to(x_t)
                check_guidance(None, **{name: getattr(self, f"_{name}") for name in scales})
            return x_t

        with new_call(self, interrupt=False, num_timesteps=len(sampler.sigmas), **scales):
            x_t = x_T * sampler.scheduler.init_noise_sigma if edit is None else edit.run(take_step, predict, x_T)
            for i in self.progress_bar(range(len(sampler.sigmas))) if edit is None else ():
                x_t = take_step(sampler, i, x_t, predict)
                if self._interrupt:
                    break
        are_finite = torch.stack([is_finite for _, is_finite in finite]).tolist() if finite else []
        if not all(are_finite):
            t, lower = finite[are_finite.index(False)][0], f"lower {' or '.join(self._scales)}, or "
            raise ValueError(f"the prediction at timestep {t:.6g} is not finite; {lower * bool(self._scales)}{REMEDY}")
        return (self if edit is None else edit)._finished(x_t, output_type, return_dict)

    def _denoise(self, x_t, t, **condition):
        """D_w + w (D − D_w) in fp32, see `guiding_unet`; D is the U-Net's, and its learned variance is not guided."""
        D = self.unet(x_t.to(self.unet.dtype), t, **condition).sample.float()
        if (w := self._autoguidance_scale) in (None, 1):
            return D
        D_w, channels = self.guiding_unet(x_t.to(self.guiding_unet.dtype), t, **condition).sample.float(), x_t.shape[1]
        return torch.cat([(D_w + w * (D - D_w))[:, :channels], D[:, channels:]], dim=1)

    def _check_autoguidance(self, w):
        check_guidance(None, autoguidance_scale=w)
        if w != 1 and self.guiding_unet is None:
            raise ValueError("autoguidance_scale: this model has no guiding_unet; train it with --guiding_fraction")
        if w != 1 and self.guiding_unet.config.num_classes != self.unet.config.num_classes:
            raise ValueError("autoguidance_scale: the model has classes that its guiding_unet lacks; leave it out")

    def _config_changes(self, clip: bool) -> tuple[dict, bool]:
        """What sampling changes in the scheduler's config, and whether the scheduler takes a learned variance."""
        learned = str(self.scheduler.config.get("variance_type")).startswith("learned")
        known = inspect.signature(type(self.scheduler).__init__).parameters
        takes_variance = learned and "variance_type" in known and "algorithm_type" not in known
        changes = {"variance_type": None} if learned and not takes_variance else {}  # DPM-Solver would keep 3 channels
        return changes | ({} if clip else dict.fromkeys(clips_of(self.scheduler), False)), takes_variance

    def unet_inputs(self, pictures, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """What the U-Net is conditioned on for images of a data set, besides x_t and t."""
        return {}

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that it makes."""
        shape = (1, self.unet.config.in_channels, *pair(self.unet.config.sample_size))
        with torch.no_grad():
            return tuple(self.decode(torch.zeros(shape, device=self._execution_device)).shape[1:])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The images of latents, (n, C, H, W) in [-1, 1]; without an autoencoder they are the latents."""
        if self.vae is None:
            return latents
        z = latents / self.vae.config.scaling_factor + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        return in_enough_precision(self.vae, lambda z: self.vae.decode(z).sample, z)
