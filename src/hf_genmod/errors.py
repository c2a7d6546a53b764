"""Errors that are one sentence."""

import argparse
import contextlib
import difflib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
LAUNCHED = "HF_GENMOD_LAUNCHED"  # set in the environment of processes that `hf_genmod` has started
LFS_REMEDY = "run `git lfs pull` in the repository of the file"


class TrainingError(RuntimeError):
    """Raised when a run cannot go on. The message is one sentence with the reason."""


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises a `ValueError` of one sentence about flags that it cannot read, instead of ending."""

    def error(self, message: str):
        once = re.sub(r"/--[\w-]+", "", message.removeprefix("argument "))  # --one_flag/--one-flag
        raise ValueError(f"{once}; --help tells what flags take")


def nearest(flag: str, names: list[str], elsewhere: Mapping[str, str] | None = None) -> str | None:
    """The name that somebody may have meant, as it is written alike or, in `elsewhere`, other programs call it so."""
    written, elsewhere = flag.strip("-").replace("-", "_").lower(), elsewhere or {}
    close = difflib.get_close_matches(written, [*names, *elsewhere], n=1, cutoff=0.7)
    return next((name for name in map(elsewhere.get, close, close) if name in names), None)


def refuse_unknown(words: list[str], names: list[str], elsewhere: Mapping[str, str] | None = None, first: str = ""):
    """Raises a `ValueError` about the first of the words that a parser did not know; its flags have these names, and
    `first` is that of a word without one."""
    if words:
        flag = words[0].split("=")[0]
        if not flag.startswith("-"):
            where = f", such as --{first} {flag}" if first else " (--help lists them)"
            raise ValueError(f"{flag}: belongs to no flag; put its flag in front{where}")
        name = nearest(flag, names, elsewhere)
        raise ValueError(f"{flag}: no such flag; {f'did you mean --{name}?' if name else '--help lists them'}")


def first_line(error: Exception) -> str:
    """The first line of an error message that is not httpx's, or the type of an error without a message."""
    lines = [line for line in str(error).strip().splitlines() if line and "Client Error." not in line]
    return lines[0] if lines else type(error).__name__


def shortened(names: list, most: int = 5) -> str:
    """The first names of a list, for a message."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 image", "2,000 images", "2 classes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def a_or_an(name: str) -> str:
    """A name with its article: "an UnconditionalPipeline", "a UNet2DModel"."""
    return f"{'an' if re.match('[AEIOaeiou]|U(?!Net|ni)', name) else 'a'} {name}"


def is_lfs_pointer(file: str | os.PathLike) -> bool:
    """Whether a file is what a repository holds where Git LFS has not downloaded the file itself."""
    with open(file, "rb") as opened:
        return opened.read(len(LFS_POINTER)) == LFS_POINTER


def refuse_lfs_pointers(*places: str | os.PathLike) -> None:
    """Raises a `ValueError` if a file, or in a folder a file of weights or of a tokenizer, is a pointer of Git LFS."""
    for place in map(Path, places):
        inside = (file for kind in ("*.safetensors", "tokenizer.json", "*.model") for file in place.glob(kind))
        for file in filter(Path.is_file, [place, *inside]):
            if is_lfs_pointer(file):
                raise ValueError(f"{file}: a pointer of Git LFS, not the file itself; {LFS_REMEDY}")


@contextlib.contextmanager
def one_line_errors(errors=(ValueError, OSError), status: int = 2, goes_on: bool = False):
    """
    A context in which errors end the script with one line on stderr instead of a traceback. Characters that the
    console does not have are printed as escapes.

    Args:
        errors (`tuple`): The types of errors; by default those of wrong arguments and data.
        status (`int`): The exit status. After a Ctrl-C it is 130.
        goes_on (`bool`): Whether the same command goes on after a Ctrl-C, which is said then.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # which stderr has always
    try:
        yield
    except KeyboardInterrupt:
        then = "; what is done is kept, and the same command goes on from there" if goes_on else ""
        print(f"stopped{then}", file=sys.stderr)
        sys.exit(130)
    except errors as error:
        of_file = isinstance(error, OSError) and error.filename is not None  # without its number
        _say(f"{error.filename}: {error.strerror}" if of_file else str(error))
        sys.exit(status)


def _say(error: str) -> None:
    """Prints an error or, in one of several processes, leaves it for their launcher, which prints the first."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE") if LAUNCHED in os.environ else None
    if file is None:
        print(f"error: {error}", file=sys.stderr)
    else:
        Path(file).write_text(json.dumps({"message": error, "timestamp": int(time.time())}), encoding="utf-8")
