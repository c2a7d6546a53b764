"""Signals, memory, and processes that have ended."""

import contextlib
import ctypes
import re
import signal
import sys
import threading
from collections.abc import Callable

import torch

from hf_genmod.errors import TrainingError, first_line
from hf_genmod.training.config import TrainingConfig


@contextlib.contextmanager
def stop_signals(say: Callable[[str], None]):
    """Collects SIGINT and SIGTERM in a list instead of ending the process, and says so. A second signal ends it. In a
    thread beside the main one, which alone receives signals, the list stays empty."""
    received = []

    def handler(number, frame):
        received.append(number)
        signal.signal(number, previous[number])
        say("stopping after this step; again: at once, without saving its state")

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield received
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


def keep_freed_memory():
    """Makes the C library keep freed blocks of up to 32 MiB for the next allocation, for the rest of the process.
    Otherwise each step gets its memory from the kernel again, which first fills every page with zeros."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # of glibc
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest value that it takes


@contextlib.contextmanager
def explained_memory(config: TrainingConfig, resolution: tuple[int, int], num_processes: int):
    """Raises a `TrainingError` that says which settings need less memory, if it does not suffice in the context."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = (torch.OutOfMemoryError, MemoryError)
        if not isinstance(error, known) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        share, parts = config.batch_size // num_processes, config.gradient_accumulation_steps
        finer = [n for n in range(parts + 1, share + 1) if share % n == 0]
        flags = [f"--gradient_accumulation_steps {n} (the same steps in smaller parts)" for n in finer[:1]]
        if not config.gradient_checkpointing:
            flags.append("--gradient_checkpointing")
        if config.mixed_precision == "no":
            flags.append("--mixed_precision bf16 (in a new output_dir)")
        height, width = resolution
        raise TrainingError(
            f"out of memory with a batch of {config.batch_size} images of {height}x{width}; what helps, in this "
            f"order: {', '.join([*flags, 'a smaller --resolution'])}"
        ) from error


@contextlib.contextmanager
def explained_loss_of_processes():
    """Raises a `TrainingError` if this process can no longer reach others of the run."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "/gloo/" not in str(error):
            raise
        raise TrainingError(
            "another process of this run has ended or cannot be reached, for a reason that it may have printed; the "
            f"same commands continue the run from its newest saved state ({first_line(error)})"
        ) from error
