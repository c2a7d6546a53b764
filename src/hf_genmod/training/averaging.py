"""Averages of weights over steps, and of gradients over processes."""

import copy
import functools

import numpy as np
import torch
import torch.distributed as dist
from torch.optim.sgd import sgd
from torch.optim.swa_utils import AveragedModel

from hf_genmod.training.sharding import local, whole


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


class PowerFunctionAverage(AveragedModel):
    """
    A copy of a model whose weights are the power-function average of Karras et al. 2024
    (https://arxiv.org/abs/2312.02696, Eq. 127 and section C.2): with θ_t the weights after step t,

        θ̂_t = β_t θ̂_{t−1} + (1 − β_t) θ_t,   β_t = (1 − 1/t)^{γ+1}

    Its profile, (τ/t)^γ, has a standard deviation of `length` · t at every t, so it needs neither a warm-up nor the
    length of the run. γ follows from length = √(γ + 1) / ((γ + 2) √(γ + 3)).

    Args:
        model (`nn.Module`): The model, on its device. Both have the same memory for parameters without a gradient.
        length (`float`): σ_rel in [0, 0.28); 0.05 averages over about the last tenth of the steps, 0 does not average.
    """

    def __init__(self, model: torch.nn.Module, length: float):
        check_length(length)
        device = next(model.parameters()).device
        super().__init__(model, device=device)
        self.exponent = 1 + np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max() if length else None
        for averaged, current in zip(self.module.parameters(), model.parameters(), strict=True):
            if not current.requires_grad:
                averaged.data = current.data
        self._models = (self.module, model)  # in a tuple, as the model is no part of its average

    @functools.cached_property
    def _pairs(self):
        """Those of the first update: before it, parameters may be put in shards."""
        pairs = zip(*(model.parameters() for model in self._models), strict=True)
        return [pair for pair in pairs if pair[1].requires_grad]

    @torch.no_grad()
    def update(self, unchanged_if: torch.Tensor):
        """Takes a step of the model into the average, unless the tensor, fp32 () on the device, is 1 and not 0."""
        self.n_averaged.add_((1 - unchanged_if).to(self.n_averaged.dtype))  # t
        averaged, current = map(local, zip(*self._pairs, strict=True))
        if self.exponent is None:
            torch._foreach_copy_(averaged, current)
        else:
            t = self.n_averaged.clamp(min=1).float()
            weight = -torch.expm1(self.exponent * torch.log1p(-1 / t))  # 1 − β_t
            fused_lerp_(averaged, current, weight, unchanged_if)
        averaged, current = (list(model.buffers()) for model in self._models)
        if averaged:
            torch._foreach_copy_(averaged, current)


class EarlyWeights:
    """
    The averaged weights as they were after a part of the budget, for the `guiding_unet` of a pipeline.

    Args:
        average ([`PowerFunctionAverage`]): The average.
        fraction (`float`): That part, in [0, 1). 0 keeps none.
    """

    def __init__(self, average: PowerFunctionAverage, fraction: float):
        self.average, self.fraction, self.weights = average, fraction, {}

    def check(self, pipeline):
        """Raises a `ValueError` if it is not one U-Net that is trained, and all of it."""
        model = self.average.module
        is_whole = all(parameter.requires_grad for parameter in model.parameters())
        if self.fraction and not (
            getattr(pipeline, "unet", None) is model and is_whole and not pipeline.is_consistent
        ):
            raise ValueError("guiding_fraction: it is for a run that trains a U-Net from scratch, and it alone; use 0")

    def keep(self, used: float):
        """Keeps the weights once the `used` part of the budget is large enough. All processes call this."""
        if self.fraction and not self.weights and used >= self.fraction:
            state = self.average.module.state_dict()
            self.weights = {name: whole(value.detach()).to("cpu", copy=True) for name, value in state.items()}

    def into(self, pipeline):
        """The pipeline, with a U-Net of the weights that are kept, if there are any, as its `guiding_unet`."""
        if self.weights:
            unet = copy.deepcopy(pipeline.unet)
            unet.load_state_dict(self.weights)
            pipeline.register_modules(guiding_unet=unet)
        return pipeline

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.weights

    def load_state_dict(self, weights: dict[str, torch.Tensor]):
        self.weights = weights


def check_length(length: float):
    """Raises a `ValueError` if the average of this length has no γ ≥ 0."""
    if not 0 <= length < 12**-0.5:
        raise ValueError(f"ema_length: {length} is not in [0, 0.28), the widths that a power function has")
