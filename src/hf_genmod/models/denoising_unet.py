"""The denoiser ε_θ(x_t, t, y)."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn.utils import parametrize

from .blocks import UNetBlock, level_kernel, zero_init
from .fast_convolutions import Upsample
from .image_model import in_safetensors_only
from .noisy_image_model import NoisyImageModel


@dataclass
class DenoisingUNet2DOutput(BaseOutput):
    """
    `sample`, (n, out_channels, height, width): The prediction of ε, x_0 or v, as the scheduler's `prediction_type`
    says. With a learned variance, the second half of the channels is its interpolation coefficient.
    """

    sample: torch.Tensor


class DenoisingUNet2DModel(NoisyImageModel, PeftAdapterMixin):
    r"""
    The denoiser ε_θ(x_t, t, y) of Ho et al. 2020 (https://arxiv.org/abs/2006.11239): a U-Net of residual blocks whose
    normalisations are scaled and shifted by an embedding of time and condition (Dhariwal & Nichol 2021,
    https://arxiv.org/abs/2105.05233).

    Args:
        sample_size (`int` or `(int, int)`, defaults to 32): Size or (height, width) of the images of training.
            On a level where a side has only one pixel, kernels are 1 wide along that side instead of 3. Larger images
            then have neighbouring pixels there that no kernel combines.
        in_channels (`int`, defaults to 3): Channels of x_t.
        out_channels (`int`, defaults to 3): Channels of the prediction; `2 * in_channels` to learn the variance too.
        block_out_channels (`tuple[int]`, defaults to `(64, 128, 256)`): Width of each level; each level below the
            first has half the height and width of the one above.
        layers_per_block (`int`, defaults to 2): Blocks per level on the way down; one more on the way up.
        attention_levels (`tuple[bool]`, defaults to `(False, True, True)`): Whether a level has self-attention (and,
            with `cross_attention_dim`, attention to the text).
        attention_head_dim (`int`, defaults to 32): Width of an attention head.
        norm_num_groups (`int`, defaults to 32): Groups of the normalisations; divides every width.
        dropout (`float`, defaults to 0.0): Dropout probability in the residual blocks.
        num_classes (`int`, *optional*): Number of labels y ∈ {0, ..., num_classes - 1}. One more embedding row, the
            last, stands for "no label": see `null_label`.
        cross_attention_dim (`int`, *optional*): Width of `encoder_hidden_states`.
        conditioning_channels (`int`, defaults to 0): Channels of a `conditioning_image` that is concatenated to x_t.
        patch_size (`int`, defaults to 1): Squares of `patch_size` pixels are folded into channels before the first
            convolution and unfolded after the last. This divides the cost of every level by `patch_size²`.
        fourier_frequencies (`tuple[float]`, defaults to `()`): Frequencies f. sin(π f x_t) and cos(π f x_t) are
            further input channels, which make small differences of x_t large. These matter at low noise levels
            (Kingma et al. 2021, https://arxiv.org/abs/2107.00630).

    Raises:
        ValueError: If the widths, the levels and the size of the images do not fit together.
    """

    save_lora_adapter = in_safetensors_only(PeftAdapterMixin.save_lora_adapter)

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256),
        layers_per_block: int = 2,
        attention_levels: tuple[bool, ...] = (False, True, True),
        attention_head_dim: int = 32,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
        num_classes: int | None = None,
        cross_attention_dim: int | None = None,
        conditioning_channels: int = 0,
        patch_size: int = 1,
        fourier_frequencies: tuple[float, ...] = (),
    ):
        super().__init__()
        skips = self._build_encoder(conditioning_channels)
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + 1, self._embedding_dim)
        if conditioning_channels:
            self.conditioning_time_embedding = TimestepEmbedding(block_out_channels[0], self._embedding_dim)

        channels, lowest = block_out_channels[-1], len(block_out_channels) - 1
        self.mid_blocks = nn.ModuleList(
            UNetBlock(channels, channels, self._embedding_dim, self.config, lowest, has_attention)
            for has_attention in (attention_levels[-1], False)
        )

        # Each output of the downward half is concatenated to an input of the same size in the upward half.
        self.up_layers = nn.ModuleList()
        for level, width in reversed(list(enumerate(block_out_channels))):
            for _ in range(layers_per_block + 1):
                self.up_layers.append(self._make_block(channels + skips.pop(), level))
                channels = width
            if level > 0:
                self.up_layers.append(Upsample(channels))

        self.norm_out = nn.GroupNorm(norm_num_groups, channels)
        kernel = level_kernel(self.config, level=0)
        self.conv_out = zero_init(nn.Conv2d(channels, out_channels * patch_size**2, **kernel))

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no label", `num_classes`; `None` for a model without labels."""
        return self.config.num_classes

    @torch.no_grad()
    def add_label(self, embedding: torch.Tensor | None = None) -> int:
        """Adds a label with the given embedding (d,), or the mean of the others, before the null label; returns it."""
        of_labels, of_null = self.class_embedding.weight.split([self.null_label, 1])
        row = of_labels.mean(dim=0) if embedding is None else embedding.to(of_labels)
        if row.shape != of_null[0].shape:
            raise ValueError(f"embedding: shape {tuple(row.shape)} is not ({of_null.shape[1]},), that of the others")
        self.set_label_embeddings(torch.cat([of_labels, row[None], of_null]))
        return self.null_label - 1

    @torch.no_grad()
    def remove_label(self, label: int):
        """Removes a label; the labels above it move down by one."""
        weight = self.class_embedding.weight
        self.set_label_embeddings(torch.cat([weight[:label], weight[label + 1 :]]))

    def set_label_embeddings(self, weight: torch.Tensor):
        """Replaces the class-embedding table, (num_classes + 1, d); the last row is the null label."""
        weight = nn.Parameter(weight.detach())
        if parametrize.is_parametrized(self.class_embedding):  # as while only some rows are trained
            parametrize.remove_parametrizations(self.class_embedding, "weight")
        self.class_embedding.weight = weight
        self.class_embedding.num_embeddings = len(weight)
        self.register_to_config(num_classes=len(weight) - 1)

    @functools.wraps(ModelMixin.save_pretrained)  # keeps its signature, which pipelines inspect
    def save_pretrained(self, *args, **kwargs):
        if self._hf_peft_config_loaded:  # the weights would get names that do not load
            raise ValueError(
                f"save_pretrained: adapters {list(self.peft_config)} are attached; save them by the pipeline's "
                "save_lora_weights, then detach them by unload_lora_weights, after fuse_lora to keep their effect"
            )
        return super().save_pretrained(*args, **kwargs)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        conditioning_image: torch.Tensor | None = None,
        conditioning_timestep: torch.Tensor | float | int | None = None,
        return_dict: bool = True,
    ) -> DenoisingUNet2DOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(n, in_channels, height, width)`): x_t.
            timestep (`torch.Tensor` of shape `()` or `(n,)`, or a number): t, one for all images or one for each.
            class_labels (`torch.Tensor` of shape `(n,)`): y from 0 to `null_label`, for a model with `num_classes`.
            encoder_hidden_states (`torch.Tensor` of shape `(n, tokens, cross_attention_dim)`): The encoded text, for
                a model with `cross_attention_dim`.
            encoder_attention_mask (`torch.Tensor` of shape `(n, tokens)`, *optional*): True (or 1) for the tokens to
                use, at least one for each image.
            conditioning_image (`torch.Tensor` of shape `(n, conditioning_channels, height, width)`): For a model with
                `conditioning_channels`.
            conditioning_timestep (like `timestep`, *optional*, defaults to 0): The noise level of the conditioning
                image (Ho et al. 2022, https://arxiv.org/abs/2106.15282).

        Returns:
            [`DenoisingUNet2DOutput`], or a tuple of its sample if `return_dict` is false.

        Raises:
            ValueError: If a condition of the model is missing, another condition is given, or a shape is wrong.
        """
        self._check_inputs(sample, timestep=timestep, conditioning_timestep=conditioning_timestep)
        text = (encoder_hidden_states, encoder_attention_mask)
        self._check_conditions(sample, class_labels, *text, conditioning_image, conditioning_timestep)
        embedding = self._embed(sample, timestep, class_labels, conditioning_timestep)  # (n, d)
        if encoder_attention_mask is not None:
            encoder_attention_mask = encoder_attention_mask.bool()[:, None, None, :]  # (n, heads, queries, tokens)

        def apply(block, x):
            return self._apply_block(block, x, embedding, encoder_hidden_states, encoder_attention_mask)

        x = self.conv_in(self._patchify(sample, conditioning_image))
        skips = [x]
        for layer in self.down_layers:
            x = apply(layer, x) if layer.is_block else layer(x)
            skips.append(x)
        for block in self.mid_blocks:
            x = apply(block, x)
        for layer in self.up_layers:
            x = apply(layer, torch.cat([x, skips.pop()], dim=1)) if layer.is_block else layer(x)
        prediction = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.config.patch_size)
        return DenoisingUNet2DOutput(sample=prediction) if return_dict else (prediction,)

    def _embed(self, sample, timestep, class_labels, conditioning_timestep):
        embedding = self.time_embedding(self._frequencies(sample, timestep))
        if class_labels is not None:
            embedding = embedding + self.class_embedding(class_labels)
        if self.config.conditioning_channels:
            level = 0 if conditioning_timestep is None else conditioning_timestep
            embedding = embedding + self.conditioning_time_embedding(self._frequencies(sample, level))
        return F.silu(embedding)

    def _check_conditions(self, sample, labels, text, mask, image, conditioning_timestep):
        config, n = self.config, len(sample)
        has_text, has_image = config.cross_attention_dim is not None, config.conditioning_channels > 0
        tokens = text.shape[1] if text is not None and text.ndim == 3 else "tokens"
        for name, value, wanted, required, shape in (
            ("class_labels", labels, config.num_classes is not None, True, (n,)),
            ("encoder_hidden_states", text, has_text, True, (n, tokens, config.cross_attention_dim)),
            ("encoder_attention_mask", mask, has_text, False, (n, tokens)),
            ("conditioning_image", image, has_image, True, (n, config.conditioning_channels, *sample.shape[2:])),
            ("conditioning_timestep", conditioning_timestep, has_image, False, None),
        ):
            if wanted and required and value is None:
                hint = f"; `null_label` ({self.null_label}) stands for no label" if name == "class_labels" else ""
                raise ValueError(f"{name}: missing, but this U-Net is conditioned on it{hint}")
            if value is not None and not wanted:
                raise ValueError(f"{name}: given, but this U-Net is not conditioned on it; leave it out")
            if value is not None and shape is not None and value.shape != shape:
                raise ValueError(f"{name}: shape {tuple(value.shape)} is not ({', '.join(map(str, shape))})")
