"""The loss of a denoising diffusion model: Algorithm 1 of Ho et al. 2020 and its weightings."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin

from hf_genmod.objectives.likelihoods import variational_bound_term
from hf_genmod.processes import upload

WEIGHTINGS = ("simple", "min_snr", "balanced", "vlb")


@dataclass(eq=False)
class DenoisingObjective:
    r"""
    The loss of a denoising diffusion model, Algorithm 1 of Ho et al. 2020 (https://arxiv.org/abs/2006.11239):

        t ~ Uniform{0, ..., T-1},  ε ~ N(0, I),  x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε
        L = w_t ‖target − model(x_t, t, y)‖²,  target = ε, x_0 or v, as the scheduler's `prediction_type` says

    The condition y is a label or one of an image's captions, drawn at random. It is replaced by the null label or ""
    with probability `condition_dropout` (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, Algorithm 1).

    A model with twice the output channels also learns the variance Σ_θ, by L_simple + 0.001 L_vlb, where L_vlb has no
    gradient with respect to the mean (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, Eq. 16).

    Args:
        scheduler ([`AncestralDDPMScheduler`]): The forward process and the `prediction_type`.
        null_label (`int`, *optional*): `unet.null_label`; `None` for a model without labels.
        weighting (`str`, defaults to `"simple"`): `"simple"`, w_t = 1 (L_simple, Eq. 14 of Ho et al.); `"min_snr"`,
            min(SNR_t, 5) on the error of x̂_0 (Hang et al. 2023, https://arxiv.org/abs/2303.09556); `"balanced"`,
            sech(log σ_t + ½) with σ_t² = 1 / SNR_t on the error of v: about the inverse of the error of a trained
            model at each noise level, so that all levels weigh the same, like the learned weights of Karras et al.
            2024 (https://arxiv.org/abs/2312.02696); `"vlb"`, the variational bound, T · L_t, in bits per dimension.
        text (`Callable`, *optional*): Turns n captions into keyword arguments of the model, tensors (n, ...):
            [`~hf_genmod.data.captions.Tokens`] or [`~hf_genmod.data.captions.FrozenText`].
        small (`Callable`, *optional*): For an upsampler, turns x_0 and `rng` into the x_0 to train on and keyword
            arguments of the model: [`~hf_genmod.objectives.upsampling.ConditioningAugmentation`].
    """

    scheduler: SchedulerMixin
    null_label: int | None = None
    weighting: str = "simple"
    condition_dropout: float = 0.1
    text: Callable | None = None
    small: Callable | None = None
    by_noise_level = True

    def __post_init__(self):
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting: {self.weighting!r} is not one of {', '.join(WEIGHTINGS)}")
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"condition_dropout: {self.condition_dropout} is not a probability between 0 and 1")

    def __call__(self, model, batch, rng) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scheduler = self.scheduler
        x_0, small = self.x_0_of(batch, rng)
        t, x_t, epsilon = draw_x_t(x_0, scheduler, rng)
        condition = small | self.condition_of(batch, rng)
        model_output = model(x_t, t, **condition).sample.to(x_0.dtype)
        if self.weighting == "vlb":
            return self._variational_bound(model_output, x_0, x_t, t), {}

        prediction, predicted_variance = scheduler.split_model_output(model_output, x_t)
        squared_error = (self._target(x_0, epsilon, t) - prediction).square().flatten(1).mean(dim=1)  # (n,)
        loss = (self._weight(t) * squared_error).mean()
        if predicted_variance is None:
            return loss, {}
        frozen_mean = torch.cat([prediction.detach(), predicted_variance], dim=1)
        vlb = self._variational_bound(frozen_mean, x_0, x_t, t)
        return loss + 0.001 * vlb, {"loss_simple": loss.detach(), "loss_vlb": vlb.detach()}

    def x_0_of(self, batch, rng) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x_0 of a batch, (n, C, H, W), and for an upsampler the small images as keyword arguments of the model."""
        return (batch["images"], {}) if self.small is None else self.small(batch["images"], rng)

    def condition_of(self, batch, rng) -> dict[str, torch.Tensor]:
        """The labels or captions of a batch as keyword arguments of the model, dropped at random."""
        condition = {}
        if self.null_label is not None:
            dropped = rng.uniform() < self.condition_dropout
            condition["class_labels"] = batch["class_labels"].masked_fill(dropped, self.null_label)
        if self.text is not None:
            condition |= self._encoded(self._draw_captions(batch["captions"], rng), batch["images"].device)
        return condition

    def without_condition(self, condition: dict) -> dict:
        """A condition with the null label or "" in the place of all labels or captions."""
        if self.null_label is not None:
            condition = {**condition, "class_labels": torch.full_like(condition["class_labels"], self.null_label)}
        if self.text is not None:
            mask = next(iter(condition.values()))
            condition = {**condition, **self._encoded([""] * len(mask), mask.device)}
        return condition

    def _encoded(self, captions: list[str], device) -> dict[str, torch.Tensor]:
        return {name: upload(value, device) for name, value in self.text(captions).items()}

    def _draw_captions(self, captions, rng) -> list[str]:
        """One caption of each image, or "" where it is dropped."""
        dropped, which = rng.on_host(), rng.on_host()
        captions = [[of_image] if isinstance(of_image, str) else of_image for of_image in captions]
        return [
            "" if drop < self.condition_dropout else of_image[int(u * len(of_image))]
            for of_image, drop, u in zip(captions, dropped, which, strict=True)
        ]

    def _variational_bound(self, model_output, x_0, x_t, t):
        T = self.scheduler.config.num_train_timesteps
        return T * variational_bound_term(self.scheduler, model_output, x_0, x_t, t).mean()

    def _target(self, x_0, epsilon, t):
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            return epsilon
        if prediction_type == "sample":
            return x_0
        return self.scheduler.get_velocity(x_0, epsilon, t)

    def _weight(self, t):
        """w_t for the squared error of the prediction."""
        if self.weighting == "simple":
            return torch.ones_like(t, dtype=torch.float32)
        alpha_bar_t = self.scheduler.alphas_cumprod.to(t.device)[t]
        snr = (alpha_bar_t / (1 - alpha_bar_t)).clamp(min=1e-12)
        weight = snr.clamp(max=5) if self.weighting == "min_snr" else (snr + 1) / torch.cosh(0.5 - 0.5 * snr.log())
        if self.scheduler.config.prediction_type == "epsilon":
            return weight / snr  # ‖ε − ε̂‖² = SNR ‖x_0 − x̂_0‖²
        if self.scheduler.config.prediction_type == "sample":
            return weight
        return weight / (snr + 1)  # ‖v − v̂‖² = (SNR + 1) ‖x_0 − x̂_0‖²


def draw_x_t(x_0, scheduler, rng) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """t ~ Uniform{0, ..., T-1}, (n,), stratified over the batch, x_t ~ q(x_t | x_0) and its noise ε, of images x_0,
    (n, C, H, W)."""
    T = scheduler.config.num_train_timesteps
    t = (T * rng.stratified()).long().clamp(max=T - 1)
    epsilon = rng.normal(x_0.shape[1:], dtype=x_0.dtype)
    return t, scheduler.add_noise(x_0, epsilon, t), epsilon
