"""Averages of weights over steps, and of gradients over processes."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch.optim.sgd import sgd


def average_in_bf16(state, bucket):
    """
    A communication hook of DistributedDataParallel that averages the gradients of a bucket in bf16, which halves the
    data to send. Under autocast most gradients are computed in bf16 anyway. (PyTorch's own hook refuses CPUs.)
    """
    gradients = bucket.buffer()
    sending = dist.all_reduce(gradients.bfloat16(), async_op=True).get_future()
    return sending.then(lambda sent: torch.div(sent.value()[0], dist.get_world_size(), out=gradients))


def fused_lerp_(tensors, ends, weight, unchanged_if=None):
    """tensor ← tensor + weight (end − tensor) for each, in one kernel.

    Args:
        tensors, ends (`list[torch.Tensor]`): Pairs of one shape, dtype and order in memory.
        weight (`float` or `torch.Tensor`): A number, or a tensor () in fp32.
        unchanged_if (`torch.Tensor`, *optional*): fp32 (). If it is 1 and not 0, all tensors stay as they are, even if
            an end is not finite; the device decides so, and the host does not wait.
    """
    # A step of SGD with the gradient tensor − end: this kernel is the one that has a `found_inf`.
    sgd(
        tensors, ends, [None] * len(tensors), lr=weight, weight_decay=1.0, maximize=True, fused=True,
        found_inf=unchanged_if, momentum=0.0, dampening=0.0, nesterov=False,
    )  # fmt: skip


def power_function_average(length: float) -> Callable:
    """
    A `multi_avg_fn` of `torch.optim.swa_utils.AveragedModel`, the power-function average of Karras et al. 2024
    (https://arxiv.org/abs/2312.02696, Eq. 127 and section C.2): with θ_t the weights after step t,

        θ̂_t = β_t θ̂_{t−1} + (1 − β_t) θ_t,   β_t = (1 − 1/t)^{γ+1}

    Its profile, (τ/t)^γ, has a standard deviation of `length` · t at every t, so it needs neither a warm-up nor the
    length of the run. γ follows from length = √(γ + 1) / ((γ + 2) √(γ + 3)).

    Args:
        length (`float`): σ_rel in [0, 0.28); 0.05 averages over about the last tenth of the steps, 0 does not average.

    Raises:
        ValueError: If the length is too large for any γ ≥ 0.
    """
    if not 0 <= length < 12**-0.5:
        raise ValueError(f"ema_length: {length} is not in [0, 0.28), the widths that a power function has")
    if length:
        gamma = np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max()

    @torch.no_grad()
    def update(averaged, current, num_averaged):
        beta = (1 - 1 / (int(num_averaged) + 1)) ** (gamma + 1) if length else 0.0
        torch._foreach_lerp_(averaged, current, 1 - beta)

    return update
