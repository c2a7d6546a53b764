"""The denoising diffusion process (DDPM) as a scheduler of diffusers, written from the equations.

Papers: Ho et al. 2020, arXiv:2006.11239 (DDPM); Nichol & Dhariwal 2021, arXiv:2102.09672 (Improved DDPM); Salimans &
Ho 2022, arXiv:2202.00512 (v-prediction); Saharia et al. 2022, arXiv:2205.11487 (Imagen: dynamic thresholding); Lin et
al. 2023, arXiv:2305.08891 (timestep spacing, zero terminal SNR); Hang et al. 2024, arXiv:2407.03297 (Laplace).

Conventions of this file:

- α_t = 1 − β_t and ᾱ_t = ∏_{s≤t} α_s. Timesteps count from 0, as in diffusers: t = 0 … T−1 here is t = 1 … T in the
  papers. The clean image, x_0 in the papers and below, is at timestep −1, and ᾱ_{−1} = 1.
- t' is the timestep that follows t in sampling: t − 1 in the full chain, a smaller one if steps are skipped. A step
  from t to t' has α_t = ᾱ_t / ᾱ_{t'} and β_t = 1 − α_t, which leaves ᾱ as it is in the full chain.
- Methods take samples x_t, x_0 and ε of shape (n, ...), `timesteps` t in 0 … T−1 and `prev_timesteps` t' in −1 … T−1,
  t − 1 by default; timesteps are one `int` or a tensor (n,). On the CPU, other timesteps raise `ValueError`.
- Coefficients, which depend on t alone, are fp32 with as many dimensions as the sample, (n, 1, 1, 1) or (1, 1, 1, 1).
  Torch therefore computes products with a bf16 or fp16 sample in fp32, and with an fp64 sample in fp64.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .noise_schedules import betas_of_schedule, rescale_to_zero_terminal_snr

CHOICES = {
    "beta_schedule": "linear scaled_linear squaredcos_cap_v2 sigmoid laplace".split(),
    "prediction_type": "epsilon sample v_prediction".split(),
    "variance_type": "fixed_small fixed_small_log fixed_large fixed_large_log learned learned_range".split(),
    "timestep_spacing": "linspace leading trailing".split(),
}

# The keys that describe the process of training; the others describe sampling. `from_config` drops keys that were left
# at their default, because another class has other defaults. These keys must be kept: Heun's `beta_start` is 0.00085.
TRAINING_KEYS = set("num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type".split())
TRAINING_KEYS.add("rescale_betas_zero_snr")


@dataclass
class AncestralDDPMSchedulerOutput(BaseOutput):
    """`prev_sample`, x_{t'}, and `pred_original_sample`, x̂_0 (clipped if the config says so), with the shape and dtype
    of the sample."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class AncestralDDPMScheduler(SchedulerMixin, ConfigMixin):
    """DDPM: the forward process q(x_t | x_0), its posterior q(x_{t'} | x_t, x_0), and the sampler of Algorithm 2.

    Config keys, methods and numbers are those of [`~diffusers.DDPMScheduler`]; where it returns NaN or infinity, this
    class raises `ValueError`. `from_config` converts to any sampler of diffusers and back. Most samplers do not know
    the schedules "sigmoid" and "laplace". Their betas are also stored in `trained_betas`, which every sampler prefers
    to `beta_schedule`: to change the schedule of such a config, pass `trained_betas=None` too. Samplers that have no
    `rescale_betas_zero_snr` (Heun, LMS, PNDM, DEIS, KDPM2, ...) do not support ᾱ = 0 and use the original betas.

    Args:
        num_train_timesteps (`int`): T ≥ 1.
        beta_start, beta_end (`float`): First and last β, in (0, 1]. Unused by "squaredcos_cap_v2" and "laplace".
        beta_schedule (`str`): See [`betas_of_schedule`].
        trained_betas (`np.ndarray` or `list[float]`, *optional*): The betas themselves, T values in (0, 1].
        variance_type (`str`): Σ_θ, see [`~AncestralDDPMScheduler.reverse_log_variance`].
        clip_sample (`bool`), clip_sample_range (`float`): Clip x̂_0 to ±`clip_sample_range`. Not for latents.
        prediction_type (`str`): What the network predicts: ε ("epsilon"), x_0 ("sample") or v ("v_prediction").
        thresholding (`bool`), dynamic_thresholding_ratio (`float`), sample_max_value (`float`): Dynamic thresholding
            of x̂_0 instead of clipping. Not for latents.
        timestep_spacing (`str`), steps_offset (`int`): See [`~AncestralDDPMScheduler.set_timesteps`].
        rescale_betas_zero_snr (`bool`): Make ᾱ_{T−1} = 0; for "sample" and "v_prediction".
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        # Configs of the DPM-Solver family have no variance type (None), which means "fixed_small" here.
        unused = {"beta_schedule": trained_betas is not None, "variance_type": variance_type is None}
        for key, choices in CHOICES.items():
            if self.config[key] not in choices and not unused.get(key):
                raise ValueError(f"{key}: {self.config[key]!r} is not one of {', '.join(choices)}")
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps: {num_train_timesteps} must be at least 1")
        if trained_betas is None:
            betas = betas_of_schedule(beta_schedule, num_train_timesteps, beta_start, beta_end)
        else:
            betas = torch.tensor(np.asarray(trained_betas), dtype=torch.float32)
        if not ((0 < betas) & (betas <= 1)).all():
            raise ValueError(
                f"betas: they span {betas.min():.3g} to {betas.max():.3g}, but a variance β_t lies in (0, 1]; change "
                "beta_start and beta_end, or trained_betas"
            )
        if trained_betas is not None or beta_schedule in ("sigmoid", "laplace"):
            self.register_to_config(trained_betas=betas.tolist())  # exact: fp32 -> float -> JSON -> fp32
        if "_use_default_values" in self.config:
            left_at_default = set(self.config["_use_default_values"])
            self.register_to_config(_use_default_values=sorted(left_at_default - TRAINING_KEYS))
        self.betas = rescale_to_zero_terminal_snr(betas) if rescale_betas_zero_snr else betas
        self.alphas = 1 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self._ends_in_noise = bool(self.alphas_cumprod[-1] == 0)
        self.init_noise_sigma = 1.0  # x_{T−1} ~ N(0, I)
        self.custom_timesteps = False
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps).flip(0)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Splits a config for `from_config`; keys in `TRAINING_KEYS` are kept even where they have default values."""
        left_at_default = set(config_dict.get("_use_default_values", ()))
        config_dict = {**config_dict, "_use_default_values": left_at_default - TRAINING_KEYS}
        return super().extract_init_dict(config_dict, **kwargs)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _alpha_bar(self, timesteps: int | Tensor, sample: Tensor, first: int = 0) -> Tensor:
        """ᾱ_t for t in `first` … T−1, on the sample's device, with the sample's number of dimensions."""
        t, T = torch.as_tensor(timesteps).flatten(), len(self.alphas_cumprod)
        if not sample.is_floating_point():
            raise ValueError(f"sample: its dtype is {sample.dtype}; pass floating point, images scaled to [-1, 1]")
        if t.is_floating_point() or (len(t) != len(sample) and 1 not in (len(t), len(sample))):
            raise ValueError(f"timesteps: {len(t)} {t.dtype} for {len(sample)} samples; pass an integer for each")
        # Checked on the CPU only: on an accelerator, the training loop would wait for the result.
        if t.device.type == "cpu" and not ((first <= t) & (t < T)).all():
            raise ValueError(f"timesteps: {t[(t < first) | (t >= T)].tolist()} must be within {first} ... {T - 1}")
        self.alphas_cumprod = self.alphas_cumprod.to(sample.device)
        t = t.to(sample.device, non_blocking=sample.is_cuda)
        alpha_bar = self.alphas_cumprod[t.clamp(min=0)].where(t >= 0, 1.0)
        return alpha_bar.reshape(-1, *[1] * (sample.ndim - 1))

    def _chain(self, timesteps, sample: Tensor, prev_timesteps=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ᾱ_t, ᾱ_{t'}, α_t = ᾱ_t / ᾱ_{t'} and β_t = 1 − α_t."""
        prev_timesteps = timesteps - 1 if prev_timesteps is None else prev_timesteps
        alpha_bar_t, alpha_bar_prev = self._alpha_bar(timesteps, sample), self._alpha_bar(prev_timesteps, sample, -1)
        alpha_t = alpha_bar_t / alpha_bar_prev
        return alpha_bar_t, alpha_bar_prev, alpha_t, 1 - alpha_t

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """A sample of the forward process q(x_t | x_0) (DDPM, Eq. 4), in the dtype of x_0; `noise` is ε ~ N(0, I).

        x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε
        """
        alpha_bar_t = self._alpha_bar(timesteps, original_samples)
        return (alpha_bar_t.sqrt() * original_samples + (1 - alpha_bar_t).sqrt() * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """The target of v-prediction (Salimans & Ho 2022, section 4), in the dtype of x_0, which is `sample` here.

        v_t = √ᾱ_t ε − √(1 − ᾱ_t) x_0
        """
        alpha_bar_t = self._alpha_bar(timesteps, sample)
        return (alpha_bar_t.sqrt() * noise - (1 - alpha_bar_t).sqrt() * sample).to(sample.dtype)

    def predict_original_sample(self, model_output: Tensor, timesteps, sample: Tensor, clip: bool = False) -> Tensor:
        """x̂_0, the network's estimate of the clean image, in fp32 or wider.

        x̂_0 = (x_t − √(1 − ᾱ_t) ε_θ) / √ᾱ_t        "epsilon" (DDPM, Eq. 15)
        x̂_0 = √ᾱ_t x_t − √(1 − ᾱ_t) v_θ            "v_prediction" (Salimans & Ho 2022, section 4)

        Args:
            model_output (`torch.Tensor` of shape `(n, ...)`): ε_θ, v_θ or x̂_0, without a learned variance.
            clip (`bool`): Clip or threshold x̂_0 as the config says, for sampling. A clipped loss has no gradient.

        Raises:
            ValueError: "epsilon" at ᾱ_t = 0 without clipping: x_t = ε then contains nothing of x_0.
        """
        clip = clip and (self.config.thresholding or self.config.clip_sample)
        alpha_bar_t = self._alpha_bar(timesteps, sample)
        if self.config.prediction_type == "epsilon":
            if not clip and self._ends_in_noise and (alpha_bar_t == 0).any():
                raise ValueError(
                    f"prediction_type: 'epsilon' leaves x_0 undefined at timestep {timesteps}, where ᾱ_t = 0; use "
                    "'v_prediction' or 'sample', or betas with ᾱ_t > 0"
                )
            x_0 = (sample - (1 - alpha_bar_t).sqrt() * model_output) / alpha_bar_t.sqrt()
        elif self.config.prediction_type == "v_prediction":
            x_0 = alpha_bar_t.sqrt() * sample - (1 - alpha_bar_t).sqrt() * model_output
        else:
            x_0 = _at_least_fp32(model_output)
        if clip and self.config.thresholding:
            return self._threshold_sample(x_0)
        return x_0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range) if clip else x_0

    def _threshold_sample(self, x_0: Tensor) -> Tensor:
        """x_0 ← clip(x_0, −s, s) / s, where s is the p-quantile of |x_0| in each image, held between 1 and
        `sample_max_value` (dynamic thresholding, Saharia et al. 2022, section 2.3)."""
        s = x_0.abs().flatten(1).quantile(self.config.dynamic_thresholding_ratio, dim=1)
        s = s.clamp(1, self.config.sample_max_value).reshape(-1, *[1] * (x_0.ndim - 1))
        return x_0.clamp(-s, s) / s

    def posterior_mean(self, original_samples: Tensor, timesteps, sample: Tensor, prev_timesteps=None) -> Tensor:
        """The mean of q(x_{t'} | x_t, x_0), or of p_θ(x_{t'} | x_t) if x̂_0 is given for x_0 (DDPM, Eq. 7), in fp32.

        μ̃_t(x_t, x_0) = √ᾱ_{t'} β_t / (1 − ᾱ_t) · x_0 + √α_t (1 − ᾱ_{t'}) / (1 − ᾱ_t) · x_t
        """
        alpha_bar_t, alpha_bar_prev, alpha_t, beta_t = self._chain(timesteps, sample, prev_timesteps)
        x_0_coefficient = alpha_bar_prev.sqrt() * beta_t / (1 - alpha_bar_t)
        x_t_coefficient = alpha_t.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
        return x_0_coefficient * original_samples + x_t_coefficient * sample

    def posterior_log_variance(self, timesteps, sample: Tensor, prev_timesteps=None) -> Tensor:
        """log β̃_t, the log-variance of q(x_{t'} | x_t, x_0), of shape (n, 1, ..., 1) (DDPM, Eq. 7).

        β̃_t = (1 − ᾱ_{t'}) / (1 − ᾱ_t) · β_t

        β̃ is 0 for t' = −1. There the result is log β̃_1 in the full chain, as in Improved DDPM, and log 1e-20 if
        `prev_timesteps` are given, as in diffusers.
        """
        if prev_timesteps is None:
            timesteps = torch.as_tensor(timesteps).clamp(min=1)
        alpha_bar_t, alpha_bar_prev, _, beta_t = self._chain(timesteps, sample, prev_timesteps)
        return ((1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta_t).clamp(min=1e-20).log()

    def reverse_log_variance(self, timesteps, sample: Tensor, prev_timesteps=None, predicted_variance=None) -> Tensor:
        """log Σ_θ(x_t, t), the log-variance of p_θ(x_{t'} | x_t), (n, 1, ..., 1) or (n, ...), by `variance_type`:

        - "fixed_small", "fixed_small_log": β̃_t, exact if x_0 is a single point (DDPM, section 3.2).
        - "fixed_large": β_t, exact if x_0 ~ N(0, I).
        - "learned_range": exp(f log β_t + (1 − f) log β̃_t), f = (v + 1) / 2 (Improved DDPM, Eq. 15).
        - "learned": `predicted_variance`, v, (n, ...), itself; `ValueError` if it is negative.
        - "fixed_large_log": log β_t used as the variance, as in diffusers; `ValueError` for every β_t < 1.
        """
        variance_type = self.config.variance_type or "fixed_small"
        if variance_type in ("fixed_small", "fixed_small_log"):
            return self.posterior_log_variance(timesteps, sample, prev_timesteps)
        log_beta_t = self._chain(timesteps, sample, prev_timesteps)[-1].log()
        if variance_type == "fixed_large":
            return log_beta_t
        if variance_type == "learned_range":
            f = (_at_least_fp32(predicted_variance) + 1) / 2
            return f * log_beta_t + (1 - f) * self.posterior_log_variance(timesteps, sample, prev_timesteps)
        variance = _at_least_fp32(predicted_variance) if variance_type == "learned" else log_beta_t
        if (variance < 0).any():
            raise ValueError(
                f"variance_type: {variance_type!r} gives the variance {variance.min():.3g} at timestep {timesteps}; "
                f"use {'learned_range' if variance_type == 'learned' else 'fixed_large'!r}"
            )
        return variance.log()

    def split_model_output(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's prediction and its variance: the halves of 2C channels, or C channels and `None`, as
        `variance_type` asks for; another shape raises `ValueError`."""
        learned = self.config.variance_type in ("learned", "learned_range")
        expected = (len(sample), sample.shape[1] * 2, *sample.shape[2:]) if learned else tuple(sample.shape)
        if model_output.shape != expected:
            raise ValueError(
                f"model_output: its shape is {tuple(model_output.shape)}, but variance_type "
                f"{self.config.variance_type!r} asks for {expected}; a learned variance has as many channels again"
            )
        return model_output.chunk(2, dim=1) if learned else (model_output, None)

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, timesteps: list[int] | None = None):
        """Chooses n of the T timesteps by `timestep_spacing` (Lin et al. 2023, Table 2), or takes `timesteps`.

        - "linspace" takes both ends: round(linspace(0, T−1, n)).
        - "leading" takes multiples from 0, never pure noise: i ⌊T/n⌋ + `steps_offset`.
        - "trailing" starts from pure noise: round(T − i T/n) − 1.

        Raises:
            ValueError: Both or neither of n and `timesteps`; n out of range; `timesteps` not descending in T−1 … 0.
        """
        n, T, spacing = num_inference_steps, len(self), self.config.timestep_spacing
        if (n is None) == (timesteps is None):
            raise ValueError(f"num_inference_steps: {n} with timesteps: {timesteps}; pass exactly one of the two")
        if timesteps is not None:
            chosen = np.asarray(timesteps)
            descending = chosen.size > 0 and (chosen[:-1] > chosen[1:]).all() and T > chosen[0] and chosen[-1] >= 0
            if not descending or (chosen != chosen.round()).any():
                raise ValueError(f"timesteps: {list(timesteps)} must be integers descending within {T - 1} ... 0")
        elif not 1 <= n <= T:
            raise ValueError(f"num_inference_steps: {n} must be within 1 ... {T}, the steps of training")
        elif spacing == "linspace":
            chosen = np.linspace(0, T - 1, n).round()[::-1]
        elif spacing == "leading":
            chosen = np.arange(n)[::-1] * (T // n) + self.config.steps_offset
        else:
            # Rounding makes this arange one longer for some n (61 of 1000); diffusers then samples at timestep −1.
            chosen = np.arange(T, 0, -T / n)[:n].round() - 1
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(chosen)
        self.timesteps = torch.from_numpy(chosen.astype(np.int64)).to(device)

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """t': the timestep after t in `timesteps`, or −1 after the last; t − 1 if no timesteps have been chosen."""
        if self.num_inference_steps is None:
            return timestep - 1
        index = (self.timesteps == timestep).nonzero().flatten().tolist()
        if not index:
            raise ValueError(f"timestep: {timestep} is not one of the {len(self.timesteps)} that set_timesteps chose")
        return torch.tensor(-1) if index[0] == len(self.timesteps) - 1 else self.timesteps[index[0] + 1]

    def scale_model_input(self, sample: Tensor, timestep: int | None = None) -> Tensor:
        """x_t unchanged: the network of DDPM takes x_t itself. Other samplers of diffusers scale it."""
        return sample

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, check_finite=True):
        """One step of the reverse process (DDPM, Algorithm 2, with the mean of Eq. 7).

        x_{t'} = μ̃_t(x_t, x̂_0) + √Σ_θ z,  z ~ N(0, I) for t > 0, z = 0 at t = 0

        Args:
            model_output (`torch.Tensor`): Of shape `(n, C, ...)`, or `(n, 2C, ...)` if the variance is learned.
            timestep (`int` or `torch.Tensor` with one element): t, one of `timesteps`.
            generator (`torch.Generator` or a list of n, *optional*): Draws z, in the dtype of `model_output`.
            check_finite (`bool`): Raise if the result is not finite; the host waits for the device to know.

        Raises:
            ValueError: A shape, the timestep or the number of generators is wrong, or the result is not finite.
        """
        t = int(timestep)
        prev_t = int(self.previous_timestep(t))
        model_output, predicted_variance = self.split_model_output(model_output, sample)
        if isinstance(generator, list) and len(generator) not in (1, len(sample)):
            raise ValueError(f"generator: a list of {len(generator)} for {len(sample)} samples; pass one for each")
        x_0 = self.predict_original_sample(model_output, t, sample, clip=True)
        x_prev = self.posterior_mean(x_0, t, sample, prev_t)
        if t > 0:
            z = randn_tensor(model_output.shape, generator, device=model_output.device, dtype=model_output.dtype)
            log_variance = self.reverse_log_variance(t, sample, prev_t, predicted_variance)
            x_prev = x_prev + torch.exp(0.5 * log_variance) * z
        x_prev, x_0 = x_prev.to(sample.dtype), x_0.to(sample.dtype)
        if check_finite and not x_prev.isfinite().all():
            raise ValueError(
                f"step: the result at timestep {t} is not finite, with ᾱ_t = {self.alphas_cumprod[t]:.3g}, "
                f"max |model_output| = {model_output.abs().max():.3g}, max |sample| = {sample.abs().max():.3g}; check "
                "that the network's output is finite, and use 'v_prediction' or 'sample' where ᾱ_t = 0"
            )
        return AncestralDDPMSchedulerOutput(x_prev, x_0) if return_dict else (x_prev, x_0)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
