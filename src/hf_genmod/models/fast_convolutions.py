"""Convolutions equal to PyTorch's, computed faster for small feature maps."""

import torch
import torch.nn.functional as F
from torch import nn


class Convolution(nn.Conv2d):
    """A convolution, computed as a matrix product for few positions, where that is faster."""

    def forward(self, x):
        if self.kernel_size == (1, 1) and x.shape[-2:].numel() <= 16:
            positions = x.movedim(1, -1)  # (n, h, w, c)
            # Two axes: with more, matmul chooses by strides and by `weight.requires_grad`, and rounds differently.
            y = F.linear(positions.flatten(0, 2), self.weight.flatten(1), self.bias)
            return y.unflatten(0, positions.shape[:3]).movedim(-1, 1)
        if self.kernel_size == (3, 3) and x.shape[-2:] == (2, 2) and x.device.type == "cpu":
            # y[i, j] = Σ_pq W[1 + p − i, 1 + q − j] x[p, q] + b, where p and q are 0 and 1
            kernel, rows = self.weight.movedim(1, -1), range(0, 2, self.stride[0])  # (out, 3, 3, in)
            matrix = torch.stack([kernel[:, 1 - i : 3 - i, 1 - j : 3 - j] for i in rows for j in rows])
            bias = None if self.bias is None else self.bias.repeat(len(matrix))
            y = F.linear(x.movedim(1, -1).flatten(1), matrix.flatten(2).flatten(0, 1), bias)  # (n, i · j · out)
            return y.unflatten(1, (len(rows), len(rows), -1)).movedim(-1, 1)
        return super().forward(x)


class Upsample(Convolution):
    """
    Nearest-neighbour upsampling to twice the height and width, then a 3×3 convolution.

    Computed as one transposed convolution, except for the smallest images: each pixel is multiplied by the sum of the
    weights that its copies would be multiplied by, which takes 4/9 of the products.
    """

    is_block = False

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x):
        if x.shape[-2:].numel() <= 4:  # summing the weights would take longer than the products
            return super().forward(F.interpolate(x, scale_factor=2.0))
        kernel = F.pad(self.weight, (1, 1, 1, 1))
        kernel = kernel[:, :, 1:] + kernel[:, :, :-1]
        kernel = kernel[:, :, :, 1:] + kernel[:, :, :, :-1]  # (c, c, 4, 4)
        return F.conv_transpose2d(x, kernel.flip(2, 3).transpose(0, 1), self.bias, stride=2, padding=1)
