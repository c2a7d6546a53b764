"""The example scripts, run as a person runs them."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import typing
import unittest.mock
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from hf_genmod.recipes import run as recipes_run

EXAMPLES = Path(__file__).parents[1] / "examples"


SMALL = ["--resolution", "16", "--block_out_channels", "16", "32", "--layers_per_block", "1",
         "--batch_size", "8", "--sampling_steps", "0"]  # fmt: skip


SMALL_AUTOENCODER = ["--autoencoder_channels", "16", "32", "--batch_size", "8"]


SMALL_LATENT = ["--block_out_channels", "16", "32", "--batch_size", "8", "--sampling_steps", "0"]


def start(script, *arguments, **kwargs):
    """A script in a process of its own, as a person starts it."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **kwargs)


def run(script, *arguments, renamed=False):
    """The same in this process, as starting one takes seconds; on demand with other names for all its arguments."""
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with (
        unittest.mock.patch.object(sys, "argv", [script, *map(str, arguments)]),
        unittest.mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            if renamed:
                recipes_run.run(with_other_names(runpy.run_path(str(EXAMPLES / script))["main"]))
            else:
                runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
    return SimpleNamespace(returncode=status, stdout=output.getvalue(), stderr=errors.getvalue())


def with_other_names(main):
    """A main function whose parameters, and so the sections that record its arguments, have other names."""
    types = [kind for name, kind in typing.get_type_hints(main).items() if name != "return"]

    def renamed_main(**arguments):
        return main(*arguments.values())

    renamed_main.__annotations__ = {f"section_{i}": kind for i, kind in enumerate(types)}
    return renamed_main


def error_of(script, *arguments):
    """The one sentence with which a script refuses its arguments."""
    done = run(script, *arguments)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return error


def picture_of(class_folders):
    return Image.open(next(class_folders.rglob("*.png")))
