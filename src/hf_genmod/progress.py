"""What takes seconds is named, and at a terminal the seconds are counted."""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Iterator

from tqdm.auto import tqdm


@functools.cache
def count_seconds(every: float = 1.0) -> None:
    """From now on the progress bars of this process are drawn again `every` so many seconds, so that a bar whose step
    takes long shows that it goes on. Does nothing where stderr is no terminal."""

    def draw():
        while True:
            time.sleep(every)
            with tqdm.get_lock():
                for bar in list(tqdm._instances):
                    if not bar.disable and hasattr(bar, "start_t"):
                        bar.refresh(nolock=True)

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
