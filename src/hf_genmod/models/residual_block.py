"""The residual block of every network here."""

import torch
import torch.nn.functional as F
from torch import nn

from .fast_convolutions import Convolution


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
