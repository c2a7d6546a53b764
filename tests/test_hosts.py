"""Systems and consoles of other kinds."""

import io
import os
import runpy
import signal
import subprocess
import sys

import pytest
from example_scripts import EXAMPLES, SMALL

# Takes from this package and from filelock what Windows does not have, then imports every module, trains and samples.
# (Other libraries ask for the system by its name.)
WITHOUT_POSIX = """
import builtins, importlib, os, pkgutil, signal, sys
with_posix = builtins.__import__

def import_as_on_windows(name, globals=None, *args, **kwargs):
    importer = (globals or {}).get("__name__", "").split(".")[0]
    if importer in ("hf_genmod", "filelock") and name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"):
        raise ModuleNotFoundError(name)
    return with_posix(name, globals, *args, **kwargs)

builtins.__import__ = import_as_on_windows
import torch, datasets, diffusers, transformers, peft
missing = {os: ("sched_getaffinity", "uname", "getuid", "fork", "killpg"), signal: ("SIGHUP", "SIGCHLD", "SIGUSR1")}
for module, names in missing.items():
    for name in names:
        delattr(module, name) if hasattr(module, name) else None

import hf_genmod
for module in pkgutil.walk_packages(hf_genmod.__path__, "hf_genmod."):
    if module.name != "hf_genmod.__main__":
        importlib.import_module(module.name)
sys.path[:0] = sys.argv[2:]
from runs import make_trainer
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.shapes import ShapesDataset
from hf_genmod.errors import TrainingError

trainer = make_trainer(load_pictures(ShapesDataset(16, resolution=16)), sys.argv[1], max_train_steps=1)
trainer.train()
with trainer.folder.locked():
    try:
        trainer.train()
    except TrainingError as error:
        print(error)
pipe = hf_genmod.load_pipeline(sys.argv[1])
print(pipe("circle", num_inference_steps=20).images[0].size)
"""


@pytest.mark.slow
def test_everything_imports_trains_and_samples_without_what_windows_lacks(tmp_path):
    folders = [str(EXAMPLES.parent / "tests"), str(EXAMPLES.parent / "tests" / "training")]
    command = [sys.executable, "-c", WITHOUT_POSIX, tmp_path / "run", *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "another process is training in" in done.stdout and done.stdout.endswith("(16, 16)\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("script", sorted(file.name for file in EXAMPLES.glob("*.py")))
def test_the_help_of_every_script_is_printed_on_a_console_that_is_not_utf_8(script, encoding, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    console.flush()
    assert ended.value.code == 0 and b"--" in console.buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("console", [{"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_a_run_on_a_console_that_is_not_utf_8_ends_with_a_checkpoint(tmp_path, console):
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1", **console}

    def start(*words):
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
        assert b"Traceback" not in done.stderr and b"UnicodeEncodeError" not in done.stderr, done.stderr
        return done

    run, flags = tmp_path / "γ", ["--max_train_steps", 2, *SMALL]
    trained = start(EXAMPLES / "train_cfg.py", "--output_dir", run, "--license", "mit", *flags)
    assert trained.returncode == 0 and (run / "README.md").is_file(), trained.stderr
    classifier = ["--for_model", run, "--output_dir", tmp_path / "guided", "--max_train_steps", 1, "--batch_size", 8]
    assert start(EXAMPLES / "train_classifier.py", *classifier).returncode == 0  # prints a table
    assert start("-m", "hf_genmod", "doctor", run).returncode == 1
    assert start(EXAMPLES / "train_cfg.py", "--dataset", "猫", "--max_train_steps", 1).returncode == 2


@pytest.mark.slow
def test_an_interrupt_while_a_script_imports_its_libraries_is_quiet():
    command = [sys.executable, "-X", "importtime", EXAMPLES / "train_cfg.py", "--max_train_steps", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "torch._C" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in rest
