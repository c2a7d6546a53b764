"""The networks that see noisy pictures: the U-Net ε_θ(x_t, t, y) and, of its downward half, a classifier f_φ(y | x_t).

Pictures and feature maps are (n, channels, height, width), called (n, c, h, w) in the comments; an embedding of
time and condition is (n, d). The file is complete in itself: it travels inside every checkpoint.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn.utils import parametrize

# Captured at import: a later load may overwrite the file that this module was read from.
_SHIPPED_FILE = (Path(__file__).stem, Path(__file__).read_text(encoding="utf-8"))


@dataclass
class DenoisingUNet2DOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor` of shape `(n, out_channels, height, width)`):
            The prediction: of ε, x_0 or v, as the scheduler's `prediction_type` says; where the variance is learned,
            its interpolation coefficient follows in the second half of the channels.
    """

    sample: torch.Tensor


@dataclass
class NoisyImageClassifierOutput(BaseOutput):
    """
    Args:
        logits (`torch.Tensor` of shape `(n, num_classes)`): log f_φ(y | x_t) but for a constant of each picture.
    """

    logits: torch.Tensor


def zero_init(layer: nn.Module) -> nn.Module:
    """Sets a layer's parameters to zero, so that a residual branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class AttentionProcessor:
    """Softmax attention by diffusers' dispatch, which `set_attention_backend` steers."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attention, tokens, context, context_mask=None):
        heads = (-1, attention.head_dim)
        query = attention.to_q(tokens).unflatten(-1, heads)  # (n, tokens, heads, head_dim)
        key, value = (project(context).unflatten(-1, heads) for project in (attention.to_k, attention.to_v))
        dtype = query.dtype
        if query.device.type == "cpu":  # whose kernel is two to ten times faster in fp32 than in bf16
            query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            hidden = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=context_mask,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        return attention.to_out(hidden.flatten(-2).to(dtype))


class Attention(nn.Module, AttentionModuleMixin):
    """softmax(Q Kᵀ / √head_dim) V (Vaswani et al. 2017): tokens (n, l, c) look at context (n, m, context_dim)."""

    _default_processor_cls = AttentionProcessor
    _available_processors = [AttentionProcessor]
    _supports_qkv_fusion = False

    def __init__(self, channels: int, context_dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(context_dim, channels)
        self.to_v = nn.Linear(context_dim, channels)
        self.to_out = zero_init(nn.Linear(channels, channels))
        self.set_processor(AttentionProcessor())

    def forward(self, tokens, context, context_mask=None):
        return self.processor(self, tokens, context, context_mask)


class Convolution(nn.Conv2d):
    """A convolution; for few positions computed as the matrix product that it is, which is faster there."""

    def forward(self, x):
        if self.kernel_size == (1, 1) and x.shape[-2:].numel() <= 16:
            return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)
        if self.kernel_size == (3, 3) and x.shape[-2:] == (2, 2) and x.device.type == "cpu":
            # y[i, j] = Σ_pq W[1 + p − i, 1 + q − j] x[p, q] + b, where p and q are 0 and 1
            kernel, rows = self.weight.movedim(1, -1), range(0, 2, self.stride[0])  # (out, 3, 3, in)
            matrix = torch.stack([kernel[:, 1 - i : 3 - i, 1 - j : 3 - j] for i in rows for j in rows])
            bias = None if self.bias is None else self.bias.repeat(len(matrix))
            y = F.linear(x.movedim(1, -1).flatten(1), matrix.flatten(2).flatten(0, 1), bias)  # (n, i · j · out)
            return y.unflatten(1, (len(rows), len(rows), -1)).movedim(-1, 1)
        return super().forward(x)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))) · (1 + scale) + shift)), scale and shift linear in the embedding."""

    def __init__(self, in_channels, out_channels, embedding_dim: int, groups: int, dropout: float, kernel: dict):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = Convolution(in_channels, out_channels, **kernel)
        self.scale_shift = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(Convolution(out_channels, out_channels, **kernel))
        self.skip = nn.Identity() if in_channels == out_channels else Convolution(in_channels, out_channels, 1)

    def forward(self, x, embedding):
        hidden = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(embedding)[:, :, None, None].chunk(2, dim=1)  # (n, c, 1, 1) each
        hidden = F.silu(torch.addcmul(shift, self.norm2(hidden), 1 + scale))
        return self.skip(x) + self.conv2(self.dropout(hidden))


class AttentionBlock(nn.Module):
    """Every position looks at every other, then, where the model has a text, at its tokens."""

    def __init__(self, channels: int, cross_attention_dim: int | None, head_dim: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.self_attention = Attention(channels, channels, head_dim)
        if cross_attention_dim is not None:
            self.cross_norm = nn.LayerNorm(channels)
            self.cross_attention = Attention(channels, cross_attention_dim, head_dim)

    def forward(self, x, encoder_hidden_states=None, encoder_attention_mask=None):
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (n, h·w, c)
        update = self.self_attention(tokens, tokens)
        if encoder_hidden_states is not None:
            tokens = x.flatten(2).transpose(1, 2) + update
            update = update + self.cross_attention(
                self.cross_norm(tokens), encoder_hidden_states, encoder_attention_mask
            )
        return x + update.transpose(1, 2).unflatten(2, x.shape[-2:])


class UNetBlock(nn.Module):
    """A residual block, with attention after it on the levels that have it."""

    # Asked instead of `isinstance`: a loader that executes this file again, for another component of the same
    # checkpoint, makes other classes of the same names.
    is_block = True

    def __init__(self, in_channels, out_channels, embedding_dim, config, level: int, has_attention: bool):
        super().__init__()
        groups, kernel = config.norm_num_groups, _kernel(config, level)
        self.residual = ResidualBlock(in_channels, out_channels, embedding_dim, groups, config.dropout, kernel)
        self.attention = None
        if has_attention:
            self.attention = AttentionBlock(
                out_channels, config.get("cross_attention_dim"), config.attention_head_dim, groups
            )

    def forward(self, x, embedding, encoder_hidden_states=None, encoder_attention_mask=None):
        x = self.residual(x, embedding)
        if self.attention is not None:
            x = self.attention(x, encoder_hidden_states, encoder_attention_mask)
        return x


class Downsample(nn.Module):
    """A convolution to half the height and width."""

    is_block = False

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Convolution(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(Convolution):
    """
    Nearest neighbour to twice the height and width, then a convolution; but for the smallest pictures computed as one
    transposed convolution, where each pixel meets at once the sum of the weights that its copies would have met: 4/9
    of the products.
    """

    is_block = False

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x):
        if x.shape[-2:].numel() <= 4:  # where to sum the weights takes longer than the products
            return super().forward(F.interpolate(x, scale_factor=2.0))
        kernel = F.pad(self.weight, (1, 1, 1, 1))
        kernel = kernel[:, :, 1:] + kernel[:, :, :-1]
        kernel = kernel[:, :, :, 1:] + kernel[:, :, :, :-1]  # (c, c, 4, 4)
        return F.conv_transpose2d(x, kernel.flip(2, 3).transpose(0, 1), self.bias, stride=2, padding=1)


class NoisyImageModel(ModelMixin, ConfigMixin):
    """What the networks share: the way down, from x_t and t to the feature maps of every level."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UNetBlock"]
    _skip_layerwise_casting_patterns = ["norm"]
    _shipped_file = _SHIPPED_FILE

    def _build_encoder(self, conditioning_channels: int = 0) -> list[int]:
        """Creates the layers; returns the widths of the outputs of `conv_in` and of `down_layers`."""
        config = self.config
        size = config.sample_size
        self.gradient_checkpointing = False
        _check_widths(config)
        self.check_size((size, size) if isinstance(size, int) else size)
        widths = config.block_out_channels
        self.time_frequencies = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(widths[0], self._embedding_dim)
        input_channels = config.in_channels * (1 + 2 * len(config.fourier_frequencies)) + conditioning_channels
        self.conv_in = nn.Conv2d(input_channels * config.patch_size**2, widths[0], **_kernel(config, level=0))

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

    def _make_block(self, in_channels: int, level: int) -> "UNetBlock":
        width, has_attention = self.config.block_out_channels[level], self.config.attention_levels[level]
        return UNetBlock(in_channels, width, self._embedding_dim, self.config, level, has_attention)

    def _patchify(self, sample, conditioning_image=None):
        """x_t with its sines and cosines and the conditioning image, squares of pixels folded into channels."""
        x = [sample]
        for frequency in self.config.fourier_frequencies:
            x += [torch.sin(math.pi * frequency * sample), torch.cos(math.pi * frequency * sample)]
        if conditioning_image is not None:
            x.append(conditioning_image)
        return F.pixel_unshuffle(torch.cat(x, dim=1), self.config.patch_size)

    def _frequencies(self, sample, t):
        t = torch.as_tensor(t, device=sample.device).expand(len(sample))
        return self.time_frequencies(t).to(sample.dtype)

    def _apply_block(self, block, *inputs):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    @property
    def size_factor(self) -> int:
        """What divides the height and the width of its pictures."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    def check_size(self, size: tuple[int, int]) -> None:
        """
        Raises:
            ValueError: If a picture of `size` = (height, width) cannot be folded and halved as this network needs.
        """
        factor = self.size_factor
        if any(length % factor for length in size):
            below = tuple(max(length // factor, 1) * factor for length in size)
            above = tuple(-(-length // factor) * factor for length in size)
            raise ValueError(
                f"resolution {size[0]}x{size[1]}: this network (patch_size {self.config.patch_size}, "
                f"{len(self.config.block_out_channels)} levels) needs a height and width that {factor} divides, such "
                f"as {below[0]}x{below[1]} or {above[0]}x{above[1]}"
            )

    def _check_sample(self, sample, **timesteps) -> None:
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"sample: shape {tuple(sample.shape)} is not (n, {self.config.in_channels}, height, width), "
                "the shape this network takes"
            )
        self.check_size(tuple(sample.shape[2:]))
        for name, t in timesteps.items():
            if isinstance(t, torch.Tensor) and t.shape not in ((), (1,), (len(sample),)):
                raise ValueError(
                    f"{name}: shape {tuple(t.shape)} is neither () nor ({len(sample)},), one for each picture"
                )


class DenoisingUNet2DModel(NoisyImageModel, PeftAdapterMixin):
    r"""
    The denoiser ε_θ(x_t, t, y) of Ho et al. 2020 (https://arxiv.org/abs/2006.11239): a U-Net of residual blocks whose
    normalisations are scaled and shifted by an embedding of time and condition (Dhariwal & Nichol 2021,
    https://arxiv.org/abs/2105.05233).

    Args:
        sample_size (`int` or `(int, int)`, defaults to 32): Size or (height, width) of the pictures it is made for.
            Along a side that has come down to one pixel, all kernels of that level are 1 wide, not 3; of larger
            pictures than these it then does not mix what is there.
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
            convolution and unfolded after the last, which divides the cost of every level by `patch_size²`.
        fourier_frequencies (`tuple[float]`, defaults to `()`): Frequencies f whose sin(π f x_t) and cos(π f x_t) join
            x_t in the first convolution, so that small differences of x_t, which matter where little noise is left,
            are not small to the network (Kingma et al. 2021, https://arxiv.org/abs/2107.00630).

    Raises:
        ValueError: If the widths, the levels and the picture's size do not fit together.
    """

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

        # Every output of the way down is concatenated at the same size on the way up.
        self.up_layers = nn.ModuleList()
        for level, width in reversed(list(enumerate(block_out_channels))):
            for _ in range(layers_per_block + 1):
                self.up_layers.append(self._make_block(channels + skips.pop(), level))
                channels = width
            if level > 0:
                self.up_layers.append(Upsample(channels))

        self.norm_out = nn.GroupNorm(norm_num_groups, channels)
        self.conv_out = zero_init(nn.Conv2d(channels, out_channels * patch_size**2, **_kernel(self.config, level=0)))

    @property
    def null_label(self) -> int | None:
        """The label of "no label", `num_classes`; `None` for a model without labels."""
        return self.config.num_classes

    @torch.no_grad()
    def add_label(self, embedding: torch.Tensor | None = None) -> int:
        """Adds a label after the others, with this embedding (d,) or the mean of theirs, and moves the null label up;
        returns it."""
        of_labels, of_null = self.class_embedding.weight.split([self.null_label, 1])
        row = of_labels.mean(dim=0) if embedding is None else embedding.to(of_labels)
        if row.shape != of_null[0].shape:
            raise ValueError(f"embedding: shape {tuple(row.shape)} is not ({of_null.shape[1]},), that of the others")
        self.set_label_embeddings(torch.cat([of_labels, row[None], of_null]))
        return self.null_label - 1

    @torch.no_grad()
    def remove_label(self, label: int):
        """Takes a label out; those above move down."""
        weight = self.class_embedding.weight
        self.set_label_embeddings(torch.cat([weight[:label], weight[label + 1 :]]))

    def set_label_embeddings(self, weight: torch.Tensor):
        """Sets the embeddings of all labels, (labels + 1, d), and of none, the last; that many labels there are."""
        weight = nn.Parameter(weight.detach())
        if parametrize.is_parametrized(self.class_embedding):  # while some of its rows are trained
            parametrize.remove_parametrizations(self.class_embedding, "weight")
        self.class_embedding.weight = weight
        self.class_embedding.num_embeddings = len(weight)
        self.register_to_config(num_classes=len(weight) - 1)

    @functools.wraps(ModelMixin.save_pretrained)  # with its signature, which pipelines ask for
    def save_pretrained(self, *args, **kwargs):
        if self._hf_peft_config_loaded:  # the weights would be written under names that do not load again
            raise ValueError(
                f"save_pretrained: adapters {list(self.peft_config)} are attached; save them by the pipeline's "
                "save_lora_weights, then detach them by its unload_lora_weights, after fuse_lora to keep what they do"
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
            timestep (`torch.Tensor` of shape `()` or `(n,)`, or a number): t, one for all pictures or one each.
            class_labels (`torch.Tensor` of shape `(n,)`): y, integers up to and including `null_label`; for a model
                with `num_classes`.
            encoder_hidden_states (`torch.Tensor` of shape `(n, tokens, cross_attention_dim)`): The encoded text; for
                a model with `cross_attention_dim`.
            encoder_attention_mask (`torch.Tensor` of shape `(n, tokens)`, *optional*): True (or 1) where a token
                counts, at least one per picture.
            conditioning_image (`torch.Tensor` of shape `(n, conditioning_channels, height, width)`): For a model
                with `conditioning_channels`.
            conditioning_timestep (like `timestep`, *optional*, defaults to 0): The noise level of
                `conditioning_image` (Ho et al. 2022, https://arxiv.org/abs/2106.15282).
            return_dict (`bool`, defaults to `True`): `False` returns a plain tuple.

        Returns:
            [`DenoisingUNet2DOutput`], or a tuple of its sample.

        Raises:
            ValueError: If a condition is missing that the model has, or given that it lacks, or a shape is wrong.
        """
        self._check_inputs(
            sample,
            timestep,
            class_labels,
            encoder_hidden_states,
            encoder_attention_mask,
            conditioning_image,
            conditioning_timestep,
        )
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
        x = self.conv_out(F.silu(self.norm_out(x)))
        prediction = F.pixel_shuffle(x, self.config.patch_size)

        return DenoisingUNet2DOutput(sample=prediction) if return_dict else (prediction,)

    def _embed(self, sample, timestep, class_labels, conditioning_timestep):
        embedding = self.time_embedding(self._frequencies(sample, timestep))
        if class_labels is not None:
            embedding = embedding + self.class_embedding(class_labels)
        if self.config.conditioning_channels:
            level = 0 if conditioning_timestep is None else conditioning_timestep
            embedding = embedding + self.conditioning_time_embedding(self._frequencies(sample, level))
        return F.silu(embedding)

    def _check_inputs(
        self,
        sample,
        timestep,
        class_labels,
        encoder_hidden_states,
        encoder_attention_mask,
        conditioning_image,
        conditioning_timestep,
    ):
        self._check_sample(sample, timestep=timestep, conditioning_timestep=conditioning_timestep)
        config, n = self.config, len(sample)
        has_text, has_image = config.cross_attention_dim is not None, config.conditioning_channels > 0
        for name, value, wanted, required in (
            ("class_labels", class_labels, config.num_classes is not None, True),
            ("encoder_hidden_states", encoder_hidden_states, has_text, True),
            ("encoder_attention_mask", encoder_attention_mask, has_text, False),
            ("conditioning_image", conditioning_image, has_image, True),
            ("conditioning_timestep", conditioning_timestep, has_image, False),
        ):
            if wanted and required and value is None:
                hint = f"; `null_label` ({self.null_label}) stands for no label" if name == "class_labels" else ""
                raise ValueError(f"{name}: missing, and this U-Net was made to be conditioned on it{hint}")
            if value is not None and not wanted:
                raise ValueError(f"{name}: given, but this U-Net was made without it; leave it out")

        if class_labels is not None and class_labels.shape != (n,):
            raise ValueError(
                f"class_labels: shape {tuple(class_labels.shape)} is not ({n},), one label for each picture"
            )
        if has_text:
            text = encoder_hidden_states.shape
            if len(text) != 3 or (text[0], text[2]) != (n, config.cross_attention_dim):
                raise ValueError(
                    f"encoder_hidden_states: shape {tuple(text)} is not ({n}, tokens, {config.cross_attention_dim})"
                )
            if encoder_attention_mask is not None and encoder_attention_mask.shape != text[:2]:
                raise ValueError(
                    f"encoder_attention_mask: shape {tuple(encoder_attention_mask.shape)} is not {tuple(text[:2])}, "
                    "that of the tokens"
                )
        if has_image:
            expected = (n, config.conditioning_channels, *sample.shape[2:])
            if conditioning_image.shape != expected:
                raise ValueError(f"conditioning_image: shape {tuple(conditioning_image.shape)} is not {expected}")


class NoisyImageClassifier(NoisyImageModel):
    r"""
    A classifier of noisy pictures, log f_φ(y | x_t), whose gradient in x_t guides a diffusion model towards y
    (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, section 4): the downward half of the U-Net, whose last
    feature map is pooled by attention, with the mean of its positions as the query. Its normalisations see one picture
    at a time, so that the gradient of a sum over pictures is that of each.

    Args:
        sample_size, in_channels, block_out_channels, layers_per_block, attention_levels, attention_head_dim,
            norm_num_groups, dropout, patch_size, fourier_frequencies: As [`DenoisingUNet2DModel`] takes them.
        num_classes (`int`, defaults to 2): Number of labels y ∈ {0, ..., num_classes - 1}.
        noise_schedule (`dict`, *optional*): The config of the scheduler whose x_t it is trained on; a pipeline refuses
            a classifier that has seen other noise than its U-Net.

    Raises:
        ValueError: If the widths, the levels and the picture's size do not fit together.
    """

    _supports_group_offloading = False  # the weights are needed after the forward pass, for the gradient in x_t

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
                f"block_out_channels: {channels} is not a multiple of attention_head_dim ({attention_head_dim}), as "
                "the pooling needs; change one of them"
            )
        self.norm_out = nn.GroupNorm(norm_num_groups, channels)
        self.pooling = Attention(channels, channels, attention_head_dim)
        self.logits = zero_init(nn.Linear(channels, num_classes))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> NoisyImageClassifierOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(n, in_channels, height, width)`): x_t.
            timestep (`torch.Tensor` of shape `()` or `(n,)`, or a number): t, one for all pictures or one each.
            return_dict (`bool`, defaults to `True`): `False` returns a plain tuple.

        Returns:
            [`NoisyImageClassifierOutput`], or a tuple of its logits.

        Raises:
            ValueError: If a shape is wrong.
        """
        self._check_sample(sample, timestep=timestep)
        embedding = F.silu(self.time_embedding(self._frequencies(sample, timestep)))  # (n, d)
        x = self.conv_in(self._patchify(sample))
        for layer in self.down_layers:
            x = self._apply_block(layer, x, embedding) if layer.is_block else layer(x)
        tokens = F.silu(self.norm_out(x)).flatten(2).transpose(1, 2)  # (n, h·w, c)
        mean = tokens.mean(dim=1, keepdim=True)
        pooled = (mean + self.pooling(mean, tokens)).squeeze(1)  # (n, c)
        logits = self.logits(pooled)
        return NoisyImageClassifierOutput(logits=logits) if return_dict else (logits,)


def _kernel(config, level: int) -> dict:
    """Size and padding of the kernels on a level: 3×3, but 1 along a side of one pixel, past which is nothing."""
    size, scale = config.sample_size, config.patch_size * 2**level
    sides = (size, size) if isinstance(size, int) else size
    kernel_size = tuple(1 if side == scale else 3 for side in sides)
    return {"kernel_size": kernel_size, "padding": tuple(width // 2 for width in kernel_size)}


def _check_widths(config) -> None:
    widths = config.block_out_channels
    if len(config.attention_levels) != len(widths):
        raise ValueError(
            f"attention_levels: {tuple(config.attention_levels)} has {len(config.attention_levels)} entries for the "
            f"{len(widths)} levels of block_out_channels {tuple(widths)}; give one for each level"
        )
    for width, has_attention in zip(widths, config.attention_levels, strict=True):
        if width % config.norm_num_groups:
            raise ValueError(
                f"block_out_channels: {width} is not a multiple of norm_num_groups ({config.norm_num_groups}); "
                "change one of them"
            )
        if has_attention and width % config.attention_head_dim:
            raise ValueError(
                f"block_out_channels: {width} is not a multiple of attention_head_dim ({config.attention_head_dim}); "
                "change one of them, or turn attention off at this level"
            )
    if config.get("cross_attention_dim") is not None and not any(config.attention_levels):
        raise ValueError(
            f"attention_levels: {tuple(config.attention_levels)} leaves no level to look at the text of width "
            f"{config.cross_attention_dim}; set one to True"
        )
    out_channels = config.get("out_channels", config.in_channels)
    if out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"out_channels: {out_channels} is neither in_channels ({config.in_channels}) nor twice that, "
            "for a learned variance"
        )
