"""The classifier f_φ(y | x_t) of noisy images."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from .blocks import Attention, zero_init
from .noisy_image_model import NoisyImageModel


@dataclass
class NoisyImageClassifierOutput(BaseOutput):
    """`logits`, (n, num_classes): log f_φ(y | x_t) up to a constant for each image."""

    logits: torch.Tensor


class NoisyImageClassifier(NoisyImageModel):
    r"""
    A classifier of noisy images, log f_φ(y | x_t), whose gradient in x_t guides a diffusion model towards y
    (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, section 4): the downward half of the U-Net, whose last
    feature map is pooled by attention, with the mean of its positions as the query. Images do not interact, so that
    the gradient of a sum over images contains the gradient of each.

    Args:
        sample_size, in_channels, block_out_channels, layers_per_block, attention_levels, attention_head_dim,
            norm_num_groups, dropout, patch_size, fourier_frequencies: As [`DenoisingUNet2DModel`] takes them.
        num_classes (`int`, defaults to 2): Number of labels y ∈ {0, ..., num_classes - 1}.
        noise_schedule (`dict`, *optional*): The config of the scheduler whose x_t it is trained on. A pipeline refuses
            a classifier of another noise schedule than that of its U-Net.

    Raises:
        ValueError: If the widths, the levels and the size of the images do not fit together.
    """

    _supports_group_offloading = False  # the gradient in x_t needs the weights after the forward pass

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        num_classes: int = 2,
        block_out_channels: tuple[int, ...] = (64, 128, 256),
        layers_per_block: int = 2,
        attention_levels: tuple[bool, ...] = (False, True, True),
        attention_head_dim: int = 32,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
        patch_size: int = 1,
        fourier_frequencies: tuple[float, ...] = (),
        noise_schedule: dict | None = None,
    ):
        super().__init__()
        channels = self._build_encoder()[-1]
        if channels % attention_head_dim:
            raise ValueError(
                f"block_out_channels: {channels} is not a multiple of attention_head_dim ({attention_head_dim}), "
                "as the pooling needs; change one of them"
            )
        self.norm_out = nn.GroupNorm(norm_num_groups, channels)
        self.pooling = Attention(channels, channels, attention_head_dim)
        self.logits = zero_init(nn.Linear(channels, num_classes))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> NoisyImageClassifierOutput | tuple[torch.Tensor]:
        """
        log f_φ(y | x_t) for every y, of x_t, `sample`, (n, in_channels, height, width), at one t for all, or (n,).

        Raises:
            ValueError: If a shape is wrong.
        """
        self._check_inputs(sample, timestep=timestep)
        embedding = F.silu(self.time_embedding(self._frequencies(sample, timestep)))  # (n, d)
        x = self.conv_in(self._patchify(sample))
        for layer in self.down_layers:
            x = self._apply_block(layer, x, embedding) if layer.is_block else layer(x)
        tokens = F.silu(self.norm_out(x)).flatten(2).transpose(1, 2)  # (n, h·w, c)
        mean = tokens.mean(dim=1, keepdim=True)
        logits = self.logits((mean + self.pooling(mean, tokens)).squeeze(1))
        return NoisyImageClassifierOutput(logits=logits) if return_dict else (logits,)
