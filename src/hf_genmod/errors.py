"""Errors that are one sentence."""

import contextlib
import sys


class TrainingError(RuntimeError):
    """A run that cannot go on, for a reason that its message gives in one sentence."""


def first_line(error: Exception) -> str:
    """What an error says first, or what it is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shortened(names: list[str]) -> str:
    """The first five names of a list, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextlib.contextmanager
def one_line_errors(errors=(ValueError, OSError), status: int = 2):
    """
    Around a part of a script: one of `errors` ends it with one sentence and this status, and a Ctrl-C with status 130.
    By default they are those of mistaken arguments and data.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except errors as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(status)
