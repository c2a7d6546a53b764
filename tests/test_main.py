"""The command `hf_genmod`."""

import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from example_scripts import SMALL
from runs import metrics

from hf_genmod import __version__
from hf_genmod.__main__ import EXAMPLES, SCRIPTS, TASKS, main, ready_settings

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
        (["--help"], ["train TASK", "latent-cfg", "sample MODEL", "enlarge", "evaluate", "doctor", "push"]),
        (["help"], ["train TASK", "push"]),
        (["train", "--help"], ["text-to-image", "upsampler"]),
        (["push", "--help"], ["--license", "--create_pr"]),
        (["demo", "--help"], ["--upsamplers", "--port", "--share"]),
        (["--version"], [__version__]),
    ],
)
def test_help_and_version_import_no_library(arguments, words):
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert all(word in done.stdout for word in words)


def answer(*arguments) -> str:
    """What the command answers to arguments that it refuses: one line, with status 2; a script loads PyTorch first."""
    done = subprocess.run([sys.executable, "-m", "hf_genmod", *arguments], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    return answered(done.stderr)


def answered(errors: str) -> str:
    *before, line = errors.splitlines()
    assert before in ([], ["loading PyTorch"])
    return line


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["trian", "cfg"], "error: trian: no such command; did you mean train?"),
        (["--verison"], "error: --verison: no such command; did you mean --version?"),
        (
            ["train", "--dataset", "pets", "cfg"],
            "error: --dataset: the task comes before the flags; it is one of cfg, ",
        ),
        (["push", "runs/mine", "mine", "--licence", "mit"], "error: --licence: no such flag; did you mean --license?"),
        (["push", "runs/mine", "mine", "--publik"], "error: --publik: no such flag; --help lists them"),
        (["push", "runs/mine"], "error: the following arguments are required: repo_id; --help tells"),
        (["push", "runs/mine", "mine", "mit"], "error: mit: belongs to no flag; put its flag in front (--help lists"),
        (["doctor", "pets", "--image-colum=x"], "error: --image-colum: no such flag; did you mean --image_column?"),
        (["doctor", "pets", "--split"], "error: --split: expected one argument; --help tells what flags take"),
        (["doctor"], "error: the following arguments are required: path; --help tells what flags take"),
        (["train", "cfg", "--num_processes", "two"], "error: --num_processes: invalid int value: 'two'; --help tells"),
        (["train", "text_to_imag"], "error: text-to-imag: no such task; did you mean text-to-image?"),
        (
            ["train", "cfg", "--accelerate_config", "fsdp.yaml"],
            "error: accelerate_config: there is no file fsdp.yaml, and no ",
        ),
        (["train", "cfg", "pets"], "error: pets: belongs to no flag; put its flag in front, such as --dataset pets"),
    ],
)
def test_a_mistake_is_answered_with_what_there_is(arguments, expected):
    assert answer(*arguments).startswith(expected)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["train", "cfg", "--num_processes", "9999"], "error: num_processes: 9999 is not within 1 ... "),
        (["doctor", ""], "error: path: it is empty; give the folder of a data set or of a run"),
        (["push", " ", "user/name"], "error: path: it is empty; give"),
        (["demo", ""], "error: path: it is empty; give"),
    ],
)
def test_a_mistake_that_is_found_with_all_libraries_is_answered_too(arguments, expected, capsys, monkeypatch):
    """In this process, as importing them takes seconds."""
    monkeypatch.setenv("HF_GENMOD_COMMAND", "")  # which the command sets, and which is put back
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert answered(capsys.readouterr().err).startswith(expected)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (
            "--accelerate_config two_machines --main_process_ip host",
            "machine_rank: -1 is not within 0 ... 1; give ",
        ),
        ("--machine_rank 1", "machine_rank: it is for several machines; add --accelerate_config two_machines"),
        (
            "--accelerate_config cpu --num_machines 2",
            "main_process_ip: cpu is for 2 machines; give the address ",
        ),
        (
            "--accelerate_config two_machines --main_process_ip host --machine_rank 2",
            "machine_rank: 2 is not within 0 ... 1; give each machine its own",
        ),
        (
            "--accelerate_config two_machines --main_process_ip host --machine_rank 1 --num_processes 3",
            "num_processes: 3 cannot be shared evenly among 2 machines",
        ),
        (
            "--accelerate_config nothing",
            "accelerate_config: there is no file nothing, and no .*; cpu, eight_gpus",
        ),
        ("--accelerate_config {folder}/text.yaml", "accelerate_config: .*text.yaml holds no settings"),
        ("--accelerate_config {folder}/cut.yaml", "accelerate_config: .*cut.yaml holds no settings"),
        (
            "--accelerate_config {folder}/deepspeed.yaml",
            "accelerate_config: .* is for DEEPSPEED, which cannot ",
        ),
    ],
)
def test_settings_that_cannot_start_are_refused(flags, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_GENMOD_COMMAND", "")
    (tmp_path / "text.yaml").write_text("a text")
    (tmp_path / "cut.yaml").write_text("num_processes: [1, ")
    (tmp_path / "deepspeed.yaml").write_text("distributed_type: DEEPSPEED\nnum_processes: 2\n")
    with pytest.raises(SystemExit) as ended:
        main(["train", "cfg", *flags.format(folder=tmp_path).split()])
    assert ended.value.code == 2
    assert re.match(f"error: {expected}", answered(capsys.readouterr().err))


def test_the_settings_that_are_ready_are_what_accelerate_reads():
    ready = {name: load_config_from_file(str(EXAMPLES / "accelerate" / f"{name}.yaml")) for name in ready_settings()}
    processes = {name: (settings.num_machines, settings.num_processes) for name, settings in ready.items()}
    one, two = {"cpu": (1, 2), "one_gpu": (1, 1), "eight_gpus": (1, 8), "fsdp": (1, 8)}, {"two_machines": (2, 16)}
    assert processes == one | two
    assert ready["fsdp"].fsdp_config["fsdp_version"] == 2


def test_every_script_is_a_command():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    trained = {f"train_{task.replace('-', '_')}" for task in TASKS} - {"train_lora"} | {"finetune_lora"}
    assert trained | set(SCRIPTS.values()) == scripts - {"demo"}


ONE_PROCESS = (
    "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\n"
    "num_machines: 1\nmachine_rank: 0\n"
)


STOPPED = """
import atexit, os, sys
import hf_genmod.__main__ as command

class Large:
    def __del__(self, write=os.write):
        write(1, b"cleared")

def main():
    global large
    large = Large()
    atexit.register(print, "the tracker has ended, ", end="")
    sys.exit(int(sys.argv[1]))

command.main = main
command.command()
"""


@pytest.mark.parametrize("status", [0, 2, 130])
def test_a_command_does_all_at_its_end_but_clear_its_memory(status):
    done = subprocess.run([sys.executable, "-c", STOPPED, str(status)], capture_output=True, text=True)
    assert done.returncode == status and done.stderr == ""
    assert done.stdout == "the tracker has ended, "


@pytest.mark.slow
@pytest.mark.parametrize("is_path, precision", [(False, "no"), (True, "bf16")])
def test_settings_of_accelerate_are_found_by_name_and_by_path(is_path, precision, tmp_path):
    file = tmp_path / "accelerate" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(f"{ONE_PROCESS}mixed_precision: '{precision}'\n")
    name = str(file) if is_path else "mine"
    command = ["train", "cfg", "--accelerate_config", name, *SMALL, "--max_train_steps", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "hf_genmod", *command, "--output_dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^training on .*, mixed precision '{precision}'", done.stderr, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["--accelerate_config", "fsdp"]])
def test_two_processes_train_by_one_command_and_the_run_says_how_to_repeat_it(settings, tmp_path):
    run = tmp_path / "run"
    command = ["train", "cfg", "--num_processes", "2", *settings, *SMALL]
    command += ["--max_train_steps", "2", "--output_dir", str(run)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_genmod", *command], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    repeated = json.loads((run / "provenance.json").read_text(encoding="utf-8"))["command"]
    assert repeated == shlex.join(["hf_genmod", *command[:2], "--num_processes", "2", *command[4:]])
    assert re.search(
        r"^training on .* 2 processes of .*, mixed precision '.*8 classes; .*; 2 steps$", done.stderr, re.M
    )
    assert "UserWarning" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("is_named, number", [(False, signal.SIGINT), (True, signal.SIGTERM)])
def test_a_signal_to_the_launcher_alone_saves_the_state_and_ends_all(is_named, number, tmp_path):
    settings = tmp_path / "mine.yaml"
    settings.write_text(f"{ONE_PROCESS}mixed_precision: 'no'\n")
    launch = ["--accelerate_config", str(settings)] if is_named else ["--num_processes", "2"]
    command = ["train", "cfg", *launch, *SMALL, "--max_train_steps", "1000000", "--logging_steps", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_genmod", *command, "--output_dir", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    seen = ""
    while "images/s" not in seen:  # in the bar after the second step
        character = process.stderr.read(1)
        assert character, seen
        seen += character
    process.send_signal(number)
    _, rest = process.communicate(timeout=120)  # which waits for all processes that can write
    assert process.returncode == 128 + number
    assert "with the state saved; the same command continues the run" in rest
    assert not re.search("Traceback|Warning|death signal", rest)
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_mistake_that_the_processes_of_a_launcher_find_is_their_status_without_a_traceback(tmp_path):
    command = ["train", "cfg", "--num_processes", "2", "--dataset", str(tmp_path / "missing")]
    done = subprocess.run([sys.executable, "-m", "hf_genmod", *command], capture_output=True, text=True, timeout=300)
    told = f"error: {tmp_path / 'missing'}: there is no such folder or file; check the path"
    before = ["loading PyTorch"] * 2  # by the launcher, and by the first process
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", [*before, told])


@pytest.mark.slow
def test_two_machines_train_as_one_process_and_go_on_after_one_of_them_has_lost_its_process(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    machines = ["--accelerate_config", "cpu", "--num_machines", "2", "--main_process_ip", "127.0.0.1"]
    machines += ["--main_process_port", str(port)]
    settings = [*SMALL, "--max_train_steps", "80", "--logging_steps", "1", "--checkpointing_steps", "5"]
    settings += ["--mixed_precision", "no", "--num_threads", "1"]

    def start(folder, *launch):
        command = [sys.executable, "-m", "hf_genmod", "train", "cfg", *launch, *settings]
        command += ["--output_dir", str(tmp_path / folder)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def start_both():
        return [start("several", *machines, "--machine_rank", rank) for rank in "01"]

    first, second = start_both()
    seen = ""
    while "images/s" not in seen:  # in the bar after a step
        character = first.stderr.read(1)
        assert character, seen
        seen += character
    (worker,) = psutil.Process(second.pid).children()
    worker.kill()
    errors = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert first.returncode == 1 and second.returncode == 128 + signal.SIGKILL
    assert "error: another process of this run has ended or cannot be reached" in errors[0]
    assert "error: process 1 was ended by SIGKILL" in errors[1]
    assert "Traceback" not in errors[0] + errors[1]
    assert metrics(tmp_path / "several")[-1]["step"] < 80

    for process in [*start_both(), start("alone")]:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    alone, several = (metrics(tmp_path / folder) for folder in ("alone", "several"))
    assert [line["step"] for line in several] == [*range(1, 81)]
    for one, two in zip(alone, several, strict=True):
        assert math.isclose(one["loss"], two["loss"], abs_tol=1e-3)
