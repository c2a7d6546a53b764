"""Names of what takes seconds, at a terminal and elsewhere."""

import os
import re
import struct
import subprocess
import sys

import pytest

pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))  # not on Windows

# Waits inside a bar that does not move, until it is told to end.
WAITS = """
import sys
from hf_genmod.progress import count_seconds, waiting
count_seconds()
with waiting("reading all of it"):
    sys.stdin.readline()
print("ended", file=sys.stderr)
"""


def test_at_a_terminal_the_seconds_are_counted_while_nothing_else_happens():
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE, stderr=its, text=True)
    os.close(its)
    seen = b""
    while not re.search(rb"reading all of it \(00:0[2-9]\)", seen):
        seen += os.read(ours, 1000)
    process.communicate("end\n", timeout=60)
    while not seen.endswith(b"ended\r\n"):
        seen += os.read(ours, 1000)
    os.close(ours)
    assert process.returncode == 0 and seen.startswith(b"\rreading all of it (00:00)")


def test_elsewhere_it_is_said_once():
    done = subprocess.run([sys.executable, "-c", WAITS], input="end\n", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "reading all of it\nended\n")
