"""Initial weights that depend on their seed alone."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class SeededWeights(TorchDispatchMode):
    """
    A context in which layers draw their initial weights on the CPU from a generator with a seed. The global random
    state is neither used nor changed, so that models may be made in several threads at once.

    Args:
        seed (`int`): The seed of the generator, which draws what the global one draws after `torch.manual_seed`.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        draws = any(argument.name == "generator" for argument in func._schema.arguments)
        if draws and kwargs.get("generator") is None and args[0].device == self.generator.device:
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)
