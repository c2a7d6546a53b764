"""The exact networks of mixtures of Gaussians, which take the place of trained ones.

mixture = in_the_plane()
unet = ExactDenoiser(mixture, scheduler, conditional=True)
pipe = ClassifierFreeGuidedPipeline(unet, scheduler)
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from hf_genmod.data.mixtures import GaussianMixture
from hf_genmod.models.denoising_unet import DenoisingUNet2DOutput
from hf_genmod.models.noisy_classifier import NoisyImageClassifierOutput


class ExactDenoiser:
    """
    The best prediction of ε, v or x_0 for a mixture, called as a U-Net is. Objectives, pipelines and likelihoods take
    it in the place of a U-Net; it has no parameters and cannot be saved.

    Args:
        mixture ([`GaussianMixture`]): The distribution of x_0.
        scheduler ([`AncestralDDPMScheduler`]): Its ᾱ_t and its `prediction_type`.
        conditional (`bool`, defaults to `False`): Whether it takes `class_labels`.
        tile (`tuple[int, int, int]`, *optional*): The shape (c, h, w) of a point, c h w = D; by default (D, 1, 1).
        size (`tuple[int, int]`, *optional*): (height, width) of images of several tiles, side by side, which are
            independent of each other; by default that of one.
    """

    dtype = torch.float32

    def __init__(self, mixture: GaussianMixture, scheduler, conditional: bool = False, tile=None, size=None):
        self.mixture, self.tile = mixture, tile or (mixture.dimensions, 1, 1)
        self.prediction_type = scheduler.config.prediction_type
        alpha_bar = scheduler.alphas_cumprod.cpu().double().clamp(min=1e-12)  # 0 at zero terminal SNR
        self._log_sigmas = ((1 - alpha_bar) / alpha_bar).log() / 2
        self.null_label = mixture.num_classes if conditional else None
        shape = {"in_channels": self.tile[0], "out_channels": self.tile[0], "sample_size": size or self.tile[1:]}
        self.config = FrozenDict(shape, num_classes=self.null_label)

    def __call__(self, sample: Tensor, timestep, class_labels: Tensor | None = None) -> DenoisingUNet2DOutput:
        """The prediction for x_t, (n, c, H, W), in its dtype. Timesteps, one or (n,), may lie between two, where log σ
        is linear."""
        points, alpha_bar = self.points(sample), self.alpha_bar(timestep, sample)
        y = class_labels if class_labels is None else class_labels.repeat_interleave(len(points) // len(sample))
        x_0, a, b = self.mixture.posterior_mean(points, alpha_bar, y), alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.prediction_type == "sample":
            prediction = x_0
        else:
            epsilon = -b[:, None] * self.mixture.score(points, alpha_bar, y)
            is_v = self.prediction_type == "v_prediction"
            prediction = a[:, None] * epsilon - b[:, None] * x_0 if is_v else epsilon
        return DenoisingUNet2DOutput(sample=self.images(prediction, sample.shape[2:]).to(sample.dtype))

    def alpha_bar(self, timestep, sample: Tensor) -> Tensor:
        """ᾱ_t for each of the points of x_t, (m,), or for all, (1,)."""
        t = torch.as_tensor(timestep).double().reshape(-1)
        below = t.long()
        above = (below + 1).clamp(max=len(self._log_sigmas) - 1)
        alpha_bar = (-2 * torch.lerp(self._log_sigmas[below], self._log_sigmas[above], t.frac())).sigmoid()
        return alpha_bar if len(t) == 1 else alpha_bar.repeat_interleave(sample[0].numel() // self.mixture.dimensions)

    def points(self, images: Tensor) -> Tensor:
        """The tiles of images, (n, c, H, W), as points, (m, D)."""
        c, h, w = self.tile
        tiles = images.unflatten(3, (-1, w)).unflatten(2, (-1, h))  # (n, c, rows, h, columns, w)
        return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.mixture.dimensions)

    def images(self, points: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """The inverse of `points`."""
        (c, h, w), (height, width) = self.tile, size or self.config.sample_size
        tiles = points.reshape(-1, height // h, width // w, c, h, w)
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(-1, c, height, width)


class ExactClassifier:
    """log p(y | x_t) for the mixture of a denoiser of single tiles, called as a [`NoisyImageClassifier`] is."""

    dtype = torch.float32

    def __init__(self, denoiser: ExactDenoiser, scheduler):
        self.denoiser, shape = denoiser, {key: denoiser.config[key] for key in ("in_channels", "sample_size")}
        schedule = {"noise_schedule": dict(scheduler.config)}
        self.config = FrozenDict(shape | schedule, num_classes=denoiser.mixture.num_classes)

    def __call__(self, sample: Tensor, timestep) -> NoisyImageClassifierOutput:
        """The logits for x_t, (n, c, h, w), at timesteps as of [`ExactDenoiser`]."""
        points, alpha_bar = self.denoiser.points(sample), self.denoiser.alpha_bar(timestep, sample)
        logits = self.denoiser.mixture.log_class_probabilities(points, alpha_bar)
        return NoisyImageClassifierOutput(logits=logits.to(sample.dtype))

    def requires_grad_(self, requires_grad: bool) -> None:
        """For pipelines, which freeze a classifier: this one has no parameters."""
