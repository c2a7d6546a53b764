"""The processes of a run, and the CPU threads and memory that each may take."""

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")


def processes() -> PartialState:
    """This process among those that were started together, on an accelerator or the CPU; where there is no accelerator
    Accelerate must be told so, or each process would take itself for the only one. They wait for each other for a day,
    as one of them may encode a data set for all."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


class Interrupted(KeyboardInterrupt):
    """A signal has come which ends what is going on, and not the process."""


def on_each(compute: Callable[[], T]) -> list[T]:
    """
    What `compute` returns on each process, on all of them. It must not wait for other processes.

    Raises:
        ValueError: On all of several processes, if it raises one on one of them.
        RuntimeError: On all of several processes, if it fails otherwise or is interrupted on one of them.
    """
    if processes().num_processes == 1:
        return [compute()]
    result, error = None, None
    try:
        result = compute()
    except ValueError as caught:  # the other processes wait for this one
        error = ValueError(str(caught))
    except (Exception, Interrupted) as caught:
        error = RuntimeError(f"{type(caught).__name__}: {caught}")
    pairs = gather_object([(result, error)])
    for _, error in pairs:
        if error is not None:
            raise error
    return [result for result, _ in pairs]


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor on a device; the host does not wait for what the device is computing."""
    is_cuda = torch.device(device).type == "cuda"
    tensor = tensor.pin_memory() if is_cuda and tensor.device.type == "cpu" else tensor
    return tensor.to(device, non_blocking=is_cuda)


def check_processes(number: int) -> None:
    """Raises a `ValueError` if this machine has fewer accelerators, or CPU cores without one, than processes."""
    devices, what = torch.accelerator.device_count(), "accelerators"
    if not devices:
        devices, what = _cores(), "CPU cores"
    if not 1 <= number <= devices:
        raise ValueError(
            f"num_processes: {number} is not within 1 ... {devices}, the number of {what} of this machine"
        )


def local_processes() -> int:
    """The number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def threads_of(num_local_processes: int) -> int:
    """The number of CPU threads of each of the processes on this machine: its share of the cores."""
    return max(1, _cores() // num_local_processes)


def available_memory(root: Path = Path("/")) -> int:
    """The bytes that this process may take: its share of what is free on this machine, within the limit of its control
    group, as a container or a job of SLURM has one. `root` is where proc and sys are."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError):  # not Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controller, path = line.split(":", 2)
            if controller in ("", "memory"):  # of the second version of control groups, and of the first
                top, file = (
                    root / "sys/fs/cgroup" / controller,
                    "memory.limit_in_bytes" if controller else "memory.max",
                )
                group = top / path.lstrip("/")
                for folder in (group, *group.parents)[: len(group.parts) - len(top.parts) + 1]:
                    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                        free = min(free, int((folder / file).read_text()))
    return free // local_processes()


def use_cores(num_threads: int | None = None) -> None:
    """
    Sets the number of CPU threads of this process. By default, a process that `torchrun` or `accelerate launch` has
    started takes its share of the cores, as they set OMP_NUM_THREADS to 1 unless a person did; others change nothing.
    """
    # The second is of `accelerate launch` alone; ACCELERATE_MIXED_PRECISION, say, may be a person's.
    is_launched = not {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE"}.isdisjoint(os.environ)
    if num_threads is None and is_launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        num_threads = threads_of(local_processes())
    if num_threads is not None:
        if not 1 <= num_threads <= 1024:
            raise ValueError(f"num_threads: {num_threads} is not within 1 ... 1024")
        torch.set_num_threads(num_threads)
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # or Accelerate takes all cores for a single process


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def multiplies_in_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16 at least twice as fast as in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
