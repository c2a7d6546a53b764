"""Signals and memory."""

import contextlib
import ctypes
import signal
import sys


@contextlib.contextmanager
def stop_signals():
    """Collects SIGINT and SIGTERM in a list instead of dying at once; a second signal dies at once."""
    received = []

    def handler(number, frame):
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


def keep_freed_memory():
    """Tells the C library, for the rest of the process, to keep what is freed for what comes next, in blocks of up to
    32 MiB; else each step gets its memory anew from the kernel, page by page and each filled with zeros first."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # of glibc
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest that it takes
