"""The downward half that the U-Net and the classifier of noisy images share."""

import math

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from .blocks import Downsample, UNetBlock, level_kernel
from .image_model import ImageModel


class NoisyImageModel(ImageModel):
    """The layers that map x_t and t to the feature maps of every level."""

    _no_split_modules = ["UNetBlock"]

    def _build_encoder(self, conditioning_channels: int = 0) -> list[int]:
        """Creates the layers; returns the widths of the outputs of `conv_in` and of `down_layers`."""
        config = self.config
        self.gradient_checkpointing = False
        self._check_config()
        _check_levels(config)
        widths = config.block_out_channels
        self.time_frequencies = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(widths[0], self._embedding_dim)
        input_channels = config.in_channels * (1 + 2 * len(config.fourier_frequencies)) + conditioning_channels
        self.conv_in = nn.Conv2d(input_channels * config.patch_size**2, widths[0], **level_kernel(config, level=0))

        # Lists of layers, not of levels: diffusers offloads a model by the members of its lists.
        self.down_layers = nn.ModuleList()
        outputs = [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(config.layers_per_block):
                self.down_layers.append(self._make_block(outputs[-1], level))
                outputs.append(width)
            if level < len(widths) - 1:
                self.down_layers.append(Downsample(width))
                outputs.append(width)
        return outputs

    @property
    def _embedding_dim(self) -> int:
        return 4 * self.config.block_out_channels[0]

    def _make_block(self, in_channels: int, level: int) -> UNetBlock:
        width, has_attention = self.config.block_out_channels[level], self.config.attention_levels[level]
        return UNetBlock(in_channels, width, self._embedding_dim, self.config, level, has_attention)

    def _patchify(self, sample, conditioning_image=None):
        """x_t, its Fourier features and the conditioning image as channels, with patches folded into channels."""
        x = [sample]
        for frequency in self.config.fourier_frequencies:
            x += [torch.sin(math.pi * frequency * sample), torch.cos(math.pi * frequency * sample)]
        if conditioning_image is not None:
            x.append(conditioning_image)
        # On a CPU, convolutions are a quarter faster with the channels of a pixel beside each other.
        patches = F.pixel_unshuffle(torch.cat(x, dim=1), self.config.patch_size)
        return patches.contiguous(memory_format=torch.channels_last) if sample.device.type == "cpu" else patches

    def _frequencies(self, sample, t):
        t = torch.as_tensor(t).to(sample.device, non_blocking=sample.is_cuda).expand(len(sample))
        return self.time_frequencies(t).to(sample.dtype)

    def _apply_block(self, block, *inputs):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _check_inputs(self, sample, **timesteps) -> None:
        self._check_images(sample)
        for name, t in timesteps.items():
            if isinstance(t, torch.Tensor) and t.shape not in ((), (1,), (len(sample),)):
                raise ValueError(f"{name}: shape {tuple(t.shape)} is neither () nor ({len(sample)},)")


def _check_levels(config) -> None:
    widths, levels, head_dim = config.block_out_channels, tuple(config.attention_levels), config.attention_head_dim
    if len(levels) != len(widths):
        raise ValueError(
            f"attention_levels: {levels} has {len(levels)} entries for the {len(widths)} levels of block_out_channels "
            f"{tuple(widths)}; give one for each level"
        )
    for width, has_attention in zip(widths, levels, strict=True):
        if has_attention and width % head_dim:
            raise ValueError(
                f"block_out_channels: {width} is not a multiple of attention_head_dim ({head_dim}); change one of "
                "them, or turn attention off at this level"
            )
    text_dim, channels = config.get("cross_attention_dim"), config.in_channels
    if text_dim is not None and not any(levels):
        raise ValueError(
            f"attention_levels: {levels} leaves no level to look at the text of width {text_dim}; set one to True"
        )
    out = config.get("out_channels", channels)
    if out not in (channels, 2 * channels):
        raise ValueError(f"out_channels: {out} is neither in_channels ({channels}) nor twice that (learned variance)")
