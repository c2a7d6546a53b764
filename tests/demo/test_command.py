"""`hf_genmod demo` as a process."""

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

pytest.importorskip("gradio", reason="needs the extra [demo]")

from pages import free_port

DEMO = [sys.executable, "-m", "hf_genmod", "demo"]
WITHOUT_GRADIO = """
import sys
sys.modules["gradio"] = None
from hf_genmod.__main__ import main
main(["demo", "runs/mine"])
"""


def test_the_command_serves_a_page_until_ctrl_c(checkpoint):
    port = free_port()
    command = [*DEMO, checkpoint("guided"), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f"http://127.0.0.1:{port}/ shows guided; Ctrl-C ends it\n"
        assert "hf_genmod" in httpx.get(f"http://127.0.0.1:{port}/").text
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (0, 130) and "Traceback" not in errors


def refused(*arguments, **environment) -> str:
    done = subprocess.run(
        [*DEMO, *map(str, arguments)], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_folder_that_is_no_checkpoint_is_one_sentence(tmp_path):
    assert refused(tmp_path, "--port", free_port()).startswith(f"error: {tmp_path}: ")


def test_a_port_in_use_is_one_sentence_before_the_model_is_loaded(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert re.match(
            f"error: port: {port} is not free .*; give another by --port", refused(tmp_path, "--port", port)
        )


def test_what_does_not_enlarge_is_no_upsampler(checkpoint):
    with pytest.raises(ValueError, match="does not enlarge; give what `train upsampler` made"):
        from hf_genmod.demo.model import DemoModel

        DemoModel(checkpoint("guided"), [checkpoint("unconditional")])


def test_without_gradio_the_command_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", WITHOUT_GRADIO], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1]
        == 'error: demo: the page needs Gradio; install it by `pip install "hf_genmod[demo]"`'
    )
