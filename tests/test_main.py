"""The command `python -m hf_genmod`."""

import subprocess
import sys

import pytest

from hf_genmod import __version__

# Runs the command in a process that then says what it has imported.
COMMAND = """
import runpy, sys
sys.argv = ["hf_genmod", *sys.argv[1:]]
try:
    runpy.run_module("hf_genmod", run_name="__main__", alter_sys=True)
finally:
    print([name for name in ("torch", "diffusers", "transformers") if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--help"], ["doctor", "push"]),
        (["push", "--help"], ["--license", "--create_pr"]),
        (["--version"], [__version__]),
    ],
)
def test_help_and_version_import_no_library(arguments, words):
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert all(word in done.stdout for word in words)
