"""The blocks of all networks: residual block, attention, downsampling."""

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from .fast_convolutions import Convolution
from .image_model import pair


def zero_init(layer: nn.Module) -> nn.Module:
    """Sets a layer's parameters to zero, so that a residual branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """
    x + conv(silu(norm(conv(silu(norm(x)))))), which starts as the identity.

    With an embedding, the output of the second norm is multiplied by 1 + scale and shifted by shift; both are linear
    in the embedding. `kernel` holds the arguments `kernel_size` and `padding` of the convolutions.
    """

    def __init__(self, in_channels, out_channels, groups: int, dropout: float, kernel: dict, embedding_dim=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = Convolution(in_channels, out_channels, **kernel)
        if embedding_dim is not None:
            self.scale_shift = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(Convolution(out_channels, out_channels, **kernel))
        self.skip = nn.Identity() if in_channels == out_channels else Convolution(in_channels, out_channels, 1)

    def forward(self, x, embedding=None):
        hidden = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if embedding is not None:
            scale, shift = self.scale_shift(embedding)[:, :, None, None].chunk(2, dim=1)  # (n, c, 1, 1) each
            hidden = torch.addcmul(shift, hidden, 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(hidden)))


class AttentionProcessor:
    """Softmax attention by diffusers' dispatch, so that `set_attention_backend` selects the kernel."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attention, tokens, context, context_mask=None):
        heads = (-1, attention.head_dim)
        # A linear layer rounds tokens that are not contiguous differently if its weight requires a gradient.
        tokens, context = tokens.contiguous(), context.contiguous()
        query = attention.to_q(tokens).unflatten(-1, heads)  # (n, tokens, heads, head_dim)
        key, value = (project(context).unflatten(-1, heads) for project in (attention.to_k, attention.to_v))
        dtype = query.dtype
        if query.device.type == "cpu":  # its kernel is 2 to 10 times faster in fp32 than in bf16
            query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            hidden = dispatch_attention_fn(
                query, key, value, context_mask, backend=self._attention_backend, parallel_config=self._parallel_config
            )
        return attention.to_out(hidden.flatten(-2).to(dtype))


class Attention(nn.Module, AttentionModuleMixin):
    """softmax(Q Kᵀ / √head_dim) V (Vaswani et al. 2017) of tokens (n, l, c) and a context (n, m, context_dim)."""

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


class AttentionBlock(nn.Module):
    """Self-attention among all positions, then attention to the tokens of the text if the model has one."""

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
            tokens = self.cross_norm(tokens)
            update = update + self.cross_attention(tokens, encoder_hidden_states, encoder_attention_mask)
        return x + update.transpose(1, 2).unflatten(2, x.shape[-2:])


class UNetBlock(nn.Module):
    """A residual block, followed by attention on the levels that have it."""

    # Tested instead of `isinstance`: diffusers executes this source once for each component of a checkpoint, so that
    # there may be several classes of one name.
    is_block = True

    def __init__(self, in_channels, out_channels, embedding_dim, config, level: int, has_attention: bool):
        super().__init__()
        groups, kernel = config.norm_num_groups, level_kernel(config, level)
        self.residual = ResidualBlock(in_channels, out_channels, groups, config.dropout, kernel, embedding_dim)
        self.attention = None
        if has_attention:
            text_dim = config.get("cross_attention_dim")
            self.attention = AttentionBlock(out_channels, text_dim, config.attention_head_dim, groups)

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


def level_kernel(config, level: int) -> dict:
    """Size and padding of the kernels on a level: 3×3, but 1 along a side of one pixel, which has no neighbours."""
    smallest = config.patch_size * 2**level
    kernel_size = tuple(1 if side == smallest else 3 for side in pair(config.sample_size))
    return {"kernel_size": kernel_size, "padding": tuple(width // 2 for width in kernel_size)}
