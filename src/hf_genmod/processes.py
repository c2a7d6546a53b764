"""Accelerate's process state, on a CPU, too."""

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """This process among those that were started together, on an accelerator or the CPU; where there is no accelerator
    Accelerate must be told so, or each process would take itself for the only one."""
    return PartialState(cpu=not torch.accelerator.is_available())
