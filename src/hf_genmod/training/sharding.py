"""Weights in shards on several processes (FSDP2), for models that one device cannot train."""

import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

_REFUSED = ("FSDP_OFFLOAD_PARAMS", "FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_ACTIVATION_CHECKPOINTING")


def is_asked_for(mixed_precision: str, compile: bool) -> bool:
    """Whether the launcher asks for shards. Raises a `ValueError` if it asks for what the training does not know."""

    def is_set(name):
        return os.environ.get(name, "false").lower() in ("true", "1")

    fsdp = "version 2 of FSDP, as in --accelerate_config fsdp, is for models that do not fit on a device"
    for name, what in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if is_set(f"ACCELERATE_USE_{name}"):
            raise ValueError(f"accelerate_config: {what} cannot train here; {fsdp}")
    if not is_set("ACCELERATE_USE_FSDP") or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"accelerate_config: fsdp_version {version} cannot train here; {fsdp}")
    for name in filter(is_set, _REFUSED):
        raise ValueError(f"accelerate_config: {name.lower()} is true, which cannot train here; set it to false")
    if mixed_precision == "fp16":
        raise ValueError("mixed_precision: 'fp16' cannot train in shards; take bf16 or no")
    if compile:
        raise ValueError("compile: a model in shards cannot be compiled; leave out --compile")
    return True


def shard(model: nn.Module, device: torch.device, mixed_precision: str):
    """
    Gives each process its rows of each parameter, in place. A block, which is an element of an `nn.ModuleList`, has
    whole parameters while it computes, and so have all other layers together.

    Args:
        model (`nn.Module`): The model, of which only `forward` is called from then on.
        device (`torch.device`): That of the process.
        mixed_precision (`str`): With "bf16", processes send each other weights and gradients in bf16.
    """
    model.to(memory_format=torch.contiguous_format)  # so that rows are in one piece
    in_bf16 = torch.bfloat16 if mixed_precision == "bf16" else None
    settings = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=in_bf16, cast_forward_inputs=False),
        "reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false",
        "ignored_params": {parameter for parameter in model.parameters() if parameter.ndim == 0},  # have no rows
    }
    for parameter in settings["ignored_params"]:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average_gradient)
    for block in _blocks(model):
        fully_shard(block, **settings)
    fully_shard(model, **settings)


def _average_gradient(parameter):
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def _blocks(module):
    for child in module.children():
        if not isinstance(module, nn.ModuleList) or isinstance(child, nn.ModuleList):
            yield from _blocks(child)
        elif any(True for _ in child.parameters()):
            yield child


def local(tensors):
    """The rows of each tensor that this process has: all, of a tensor that is not in shards."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process has a shard. All processes call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_as(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor that all processes have, on the device of a parameter and, if it has the shape of the
    parameter, in the same shards or the same order in memory."""
    if tensor.shape != parameter.shape:
        return tensor.to(parameter.device, copy=True)
    if not isinstance(parameter, DTensor):
        return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.contiguous(), mesh, placements, src_data_rank=None).clone()


def of_whole_matrices(compute, shards: list[torch.Tensor], parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """The shards of what a function gives for a list of whole matrices, from their shards, which are those of these
    parameters."""
    if not isinstance(parameters[0], DTensor):
        return compute(shards)
    layouts = [(W.device_mesh, W.placements, W.shape, W.stride()) for W in parameters]
    sharded = [
        DTensor.from_local(M, mesh, placements, run_check=False, shape=shape, stride=stride)
        for M, (mesh, placements, shape, stride) in zip(shards, layouts, strict=True)
    ]
    results = compute([M.full_tensor() for M in sharded])
    return local([shard_as(X, W) for X, W in zip(results, parameters, strict=True)])


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@contextlib.contextmanager
def in_shards(module: nn.Module, model: nn.Module):
    """A context in which a copy of a model is in shards as the model is, if it is; after an error it stays so."""
    if not is_sharded(model):
        yield
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _change(module, lambda name, parameter: shard_as(parameter, parameters[name]))
    yield
    _change(module, lambda name, parameter: whole(parameter))


@contextlib.contextmanager
def gathered(module: nn.Module):
    """A context in which a module is whole on each process, if it is in shards. All processes enter it."""
    if not is_sharded(module):
        yield
        return
    shards = dict(module.named_parameters(remove_duplicate=False))
    _change(module, lambda name, parameter: whole(parameter))
    try:
        yield
    finally:
        for name, parameter in shards.items():
            _set(module, name, parameter)


def _change(module, change):
    """Puts `change(name, parameter)` in the place of each parameter; one that has two places has two after it."""
    changed = {}
    for name, parameter in dict(module.named_parameters(remove_duplicate=False)).items():
        if parameter not in changed:
            changed[parameter] = nn.Parameter(change(name, parameter.detach()), parameter.requires_grad)
        _set(module, name, changed[parameter])


def _set(module, name, parameter):
    owner, _, name = name.rpartition(".")
    setattr(module.get_submodule(owner), name, parameter)


def whole_state(state: dict, keep: bool) -> dict:
    """A tree of tensors with whole tensors on the CPU in the place of those in shards. All processes call this; one
    that does not `keep` them has None there."""

    def gather(tensor):
        tensor = tensor.full_tensor()
        return tensor.cpu() if keep else None

    return tree_map_only(DTensor, gather, state)


def state_in_shards(part: nn.Module | torch.optim.Optimizer, state: dict) -> dict:
    """A whole state, as `whole_state` gives it, in the shards and on the device of a model or an optimizer."""
    if isinstance(part, nn.Module):
        own = part.state_dict()
        return {name: shard_as(value, own[name]) if name in own else value for name, value in state.items()}
    parameters = [parameter for group in part.param_groups for parameter in group["params"]]
    return state | {
        "state": {
            index: {name: shard_as(value, parameters[index]) for name, value in values.items()}
            for index, values in state["state"].items()
        }
    }
