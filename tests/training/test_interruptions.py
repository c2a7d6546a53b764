import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from runs import command, make_trainer, raw_weights

from hf_genmod.drawing.grids import class_rows
from hf_genmod.errors import TrainingError


def read_until(stream, expected):
    """Reads a process's output up to some words of it."""
    seen = ""
    while expected not in seen:
        character = stream.read(1)
        assert character, seen
        seen += character


def test_memory_that_does_not_suffice_is_explained(dataset, tmp_path):
    def objective(model, batch, rng):
        return torch.empty(2**60), {}

    trainer = make_trainer(dataset, tmp_path, objective=objective, max_train_steps=2)
    message = "a batch of 8 images of 16x16; .* --gradient_accumulation_steps 2 .*, --gradient_checkpointing, --mixed"
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    advised = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    make_trainer(dataset, tmp_path, max_train_steps=2, **advised).train()
    assert trainer.folder.is_complete


def test_an_error_of_the_objective_is_not_taken_for_lack_of_memory(dataset, tmp_path):
    def objective(model, batch, rng):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        make_trainer(dataset, tmp_path, objective=objective, max_train_steps=2).train()


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_the_same_command_continues(dataset, tmp_path, number, status):
    arguments = command(tmp_path, {"cut": {"max_train_steps": 30}})
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # which rounding depends on
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    read_until(process.stderr, "step 3,")  # the progress bar
    process.send_signal(number)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == status
    assert "with the state saved; the same command continues the run" in rest
    (state,) = (tmp_path / "cut" / "checkpoints").iterdir()
    step = int(state.name.removeprefix("step-"))
    assert 3 <= step < 30
    assert not (tmp_path / "cut" / "model_index.json").exists()

    resumed = make_trainer(dataset, tmp_path / "cut", max_train_steps=30)
    resumed.train()
    whole = make_trainer(dataset, tmp_path / "whole", max_train_steps=30)
    whole.train()
    assert torch.equal(raw_weights(resumed), raw_weights(whole))


@pytest.mark.slow
def test_a_signal_before_the_first_step_saves_the_state_after_it(dataset, tmp_path):
    arguments, environment = (
        command(tmp_path, {"cut": {"max_train_steps": 30}}),
        {**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    stopped = []
    for stream, expected in (("stderr", "step 3,"), ("stdout", "continuing")):
        process = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        read_until(getattr(process, stream), expected)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 130
        stopped.append(int(re.search("stopped at step ([0-9]+) with the state saved", errors)[1]))
    assert stopped[1] == stopped[0] + 1


@pytest.mark.parametrize("during", ["drawing samples", "validating"])
def test_a_signal_ends_samples_and_validation_at_their_next_forward_pass(dataset, held_out, tmp_path, during, capsys):
    passes = []

    def observe(module, inputs):
        passes.append(module)
        if len(passes) == 2:
            signal.raise_signal(signal.SIGINT)

    def draw_samples(pipeline):
        return class_rows(pipeline, num_inference_steps=50)

    due = {"sampling_steps": 3} if during == "drawing samples" else {"validation_steps": 3}
    settings = {"sampling_steps": 0, "validation_steps": 0, "max_train_steps": 9, **due}
    trainer = make_trainer(dataset, tmp_path, draw_samples=draw_samples, held_out=held_out, **settings)
    trainer.averaged_model.module.register_forward_pre_hook(observe)
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == 130
    assert len(passes) == 2
    assert "stopping after this step" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-4"]


@pytest.mark.parametrize("during", ["saving the checkpoint", "drawing samples", "the work after training"])
def test_after_the_last_step_a_signal_ends_the_run_at_once_and_the_same_command_continues(
    dataset, tmp_path, during, capsys
):
    def stop(*_):
        raise KeyboardInterrupt  # as Python does after a Ctrl-C

    def trainer():
        settings = {"max_train_minutes": 1e-4, "sampling_steps": 100}
        return make_trainer(dataset, tmp_path, draw_samples=lambda pipeline: Image.new("L", (8, 8)), **settings)

    stopped = trainer()
    setattr(stopped, {"saving the checkpoint": "save", "drawing samples": "draw_samples"}.get(during, "finish"), stop)
    with pytest.raises(SystemExit) as ended:
        stopped.train()
    assert ended.value.code == 130
    kept = "the state saved" if during == "saving the checkpoint" else "the checkpoint complete"
    assert f"with {kept}; the same command continues the run" in capsys.readouterr().err
    again = trainer()
    again.train()
    assert again.folder.has_sample(again.progress.step)
    continued = "from step" if during == "saving the checkpoint" else "nothing left to train"
    assert continued in capsys.readouterr().out


PAGE_FAULTS = """
import resource
import torch
from hf_genmod.training.interruptions import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        buffers = [torch.empty(2**23, dtype=torch.uint8).fill_(1) for _ in range(8)]
        del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

page_faults()
ordinarily = page_faults()
keep_freed_memory()
page_faults()
print(ordinarily, page_faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="how a C library gives memory back is known of glibc alone")
def test_freed_memory_is_kept_for_what_comes_next():
    of_allocators = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_allocators)}
    environment["MALLOC_MMAP_THRESHOLD_"] = "131072"  # where it starts; how it adapts hangs on the order of blocks
    output = subprocess.check_output([sys.executable, "-c", PAGE_FAULTS], env=environment, text=True)
    ordinarily, kept = map(int, output.split())
    assert kept < 100 < ordinarily  # 160,000 pages of 4 KiB are written to
