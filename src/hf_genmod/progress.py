"""What takes seconds is named, and at a terminal the seconds are counted."""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator

from tqdm.auto import tqdm


@functools.cache
def count_seconds() -> None:
    """From now on the progress bars of this process are drawn again each second, so that a bar whose step takes long
    shows that it goes on. Does nothing where stderr is no terminal."""

    def draw():
        while not ended.wait(1):
            with tqdm.get_lock():
                for bar in list(tqdm._instances):
                    if not bar.disable and hasattr(bar, "start_t"):
                        bar.refresh(nolock=True)

    ended = threading.Event()
    if sys.stderr.isatty():
        threading.Thread(target=draw, daemon=True).start()


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A context that takes seconds. It says what takes them and, after [`count_seconds`], how many have gone by."""
    if not sys.stderr.isatty():
        print(what, file=sys.stderr, flush=True)
        yield
        return
    with tqdm(bar_format="{desc} ({elapsed})", desc=what):
        yield
