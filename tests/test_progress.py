"""Names of what takes seconds, at a terminal and elsewhere."""

import os
import struct
import subprocess
import sys
import threading

import pytest

pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))  # not on Windows

# Waits inside a bar that does not move, until it is told to end.
WAITS = """
import sys
from hf_genmod.progress import count_seconds, waiting
count_seconds(every=0.02)
with waiting("reading all of it"):
    sys.stdin.readline()
print("ended", file=sys.stderr)
"""


def test_at_a_terminal_a_bar_is_drawn_again_while_nothing_else_happens():
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE, stderr=its, text=True)
    os.close(its)
    limit, seen = threading.Timer(60, process.kill), b""  # which ends the reading by an error
    limit.start()
    while seen.count(b"\rreading all of it (00:0") < 5:
        seen += os.read(ours, 1000)
    process.communicate("end\n", timeout=60)
    while not seen.endswith(b"ended\r\n"):
        seen += os.read(ours, 1000)
    limit.cancel()
    os.close(ours)
    assert process.returncode == 0


def test_elsewhere_it_is_said_once():
    done = subprocess.run([sys.executable, "-c", WAITS], input="end\n", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "reading all of it\nended\n")
