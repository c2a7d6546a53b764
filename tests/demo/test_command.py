"""`hf_genmod demo` as a process."""

import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

pytest.importorskip("gradio", reason="needs the extra [demo]")

from pages import free_port

from hf_genmod.__main__ import main

DEMO = [sys.executable, "-m", "hf_genmod", "demo"]


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


def refused(capsys, *arguments) -> str:
    """What the command answers in this process, as importing the libraries takes seconds."""
    with pytest.raises(SystemExit) as ended:
        main(["demo", *map(str, arguments)])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_is_no_checkpoint_is_one_sentence(tmp_path, capsys):
    assert refused(capsys, tmp_path, "--port", free_port()).startswith(f"error: {tmp_path}: ")


def test_a_port_in_use_is_one_sentence_before_the_model_is_loaded(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = refused(capsys, tmp_path, "--port", port)
    assert re.match(f"error: port: {port} is not free .*; give another by --port", answer)


def test_what_does_not_enlarge_is_no_upsampler(checkpoint):
    with pytest.raises(ValueError, match="does not enlarge; give what `train upsampler` made"):
        from hf_genmod.demo.model import DemoModel

        DemoModel(checkpoint("guided"), [checkpoint("unconditional")])


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.startswith("hf_genmod.demo.")]:
        monkeypatch.delitem(sys.modules, name)
    remedy = 'install it by `pip install "hf_genmod[demo]"`'
    assert refused(capsys, "runs/mine") == f"error: demo: the page needs Gradio; {remedy}"
