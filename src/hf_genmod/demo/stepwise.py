"""A call of a pipeline that shows its images after each step."""

import queue
import threading
from collections.abc import Callable, Iterator

MOST_UPDATES = 12  # of one call, as each is decoded and sent


def stepwise(draw: Callable[[Callable], object], steps: int) -> Iterator[tuple[str, object]]:
    """
    Calls `draw(on_step_end)` in a thread of its own. Yields ("step", (i, images x_t)) for up to 12 of the steps, then
    ("done", what `draw` returned). When the iterator is closed before its end, the call stops after its step.

    Args:
        draw (`Callable`): Calls a pipeline with the `callback_on_step_end` that it is given.
        steps (`int`): The number of steps of the call.

    Raises:
        Exception: What `draw` raises.
    """
    updates, closed = queue.SimpleQueue(), threading.Event()
    every = max(1, -(-steps // MOST_UPDATES))

    def on_step_end(pipe, i, t, tensors):
        pipe._interrupt = closed.is_set()
        if (i + 1) % every == 0 and i + 1 < steps and updates.empty():  # a page that is behind leaves some out
            updates.put(("step", (i, pipe.postprocess(pipe.decode(tensors["latents"])))))

    def call():
        try:
            updates.put(("done", draw(on_step_end)))
        except BaseException as error:
            updates.put(("error", error))

    threading.Thread(target=call, name="stepwise", daemon=True).start()
    try:
        kind = None
        while kind != "done":
            kind, value = updates.get()
            if kind == "error":
                raise value
            yield kind, value
    finally:
        closed.set()
