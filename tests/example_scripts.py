"""The example scripts, run as a person runs them."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import unittest.mock
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

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


def run(script, *arguments):
    """The same in this process, as starting one takes seconds."""
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with (
        unittest.mock.patch.object(sys, "argv", [script, *map(str, arguments)]),
        unittest.mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
    return SimpleNamespace(returncode=status, stdout=output.getvalue(), stderr=errors.getvalue())


def error_of(script, *arguments):
    """The one sentence with which a script refuses its arguments."""
    done = run(script, *arguments)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return error


def picture_of(class_folders):
    return Image.open(next(class_folders.rglob("*.png")))
