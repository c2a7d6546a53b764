import itertools
import math
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import FOLDERS, metrics, run, same, train
from small_shards import write_parquet

from hf_genmod import load_pipeline

pytestmark = pytest.mark.skipif(
    torch.accelerator.is_available() and torch.accelerator.device_count() < 4, reason="each process takes a device"
)


def assert_killed_runs_end_as_the_whole_one(tmp_path, settings, num_processes, num_kills, seed=0):
    run(tmp_path, {"whole": settings}, num_processes)
    rng, steps = np.random.default_rng(seed), []
    for _ in range(num_kills):
        kill = (int(rng.integers(1, 15)), round(rng.uniform(0, 0.05), 4))  # a step and its state take about so long
        status = run(tmp_path, {"cut": settings}, num_processes, kill=kill, check=False)
        assert status == -signal.SIGKILL
        steps += [int(path.name.removeprefix("step-")) for path in (tmp_path / "cut" / "checkpoints").glob("step-*")]
    assert len(set(steps)) > num_kills / 2  # it went on from states, most of the time
    run(tmp_path, {"cut": settings}, num_processes)
    assert same(torch.load(tmp_path / "cut.pt"), torch.load(tmp_path / "whole.pt"))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    load_pipeline(tmp_path / "cut")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bitwise_as_the_whole_one(tmp_path):
    settings = {"max_train_steps": 60, "checkpointing_steps": 1, "dropout": 0.1}
    assert_killed_runs_end_as_the_whole_one(tmp_path, settings, num_processes=1, num_kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_killed_twenty_times_ends_bitwise_as_the_whole_one(tmp_path, num_processes):
    settings = {"max_train_steps": 400, "checkpointing_steps": 1, "gradient_accumulation_steps": 2}
    assert_killed_runs_end_as_the_whole_one(tmp_path, settings, num_processes, num_kills=20)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_on_a_stream_killed_at_random_moments_ends_bitwise_as_the_whole_one(tmp_path, num_processes, cached):
    stream = str(write_parquet(tmp_path / "shards", (60, 25, 40)))
    settings = {"max_train_steps": 60, "checkpointing_steps": 1, "stream": stream, "cached": cached, "num_workers": 1}
    assert_killed_runs_end_as_the_whole_one(tmp_path, settings, num_processes, num_kills=2)


@pytest.mark.slow
def test_a_run_killed_at_any_rename_of_its_end_is_completed_by_the_same_command(tmp_path):
    settings = {"max_train_steps": 3, "checkpointing_steps": 2}
    run(tmp_path, {"whole": settings})
    kills = 0
    for n in itertools.count(1):
        status = run(tmp_path, {f"cut-{n}": settings}, kill=n, check=False)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        run(tmp_path, {f"cut-{n}": settings})
        whole, completed = (load_pipeline(tmp_path / name).unet.state_dict() for name in ("whole", f"cut-{n}"))
        assert same(whole, completed)
    assert kills >= 5  # the state, the components, the index


RUNS = {
    # The hybrid loss has metrics of its own; of four held-out pictures the second process sees none.
    "double": {"max_train_steps": 15, "validation_steps": 5, "double": True, "learn_variance": True},
    "single": {"max_train_steps": 15, "validation_steps": 5},
    "bf16": {"max_train_steps": 10, "mixed_precision": "bf16", "max_grad_norm": 1e9},
}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The folder of runs of two processes, which are started once."""
    folder = tmp_path_factory.mktemp("of_two")
    run(folder, {name: RUNS[name] for name in ("double", "bf16")}, 2)
    return folder


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("of_four")
    run(folder, {name: RUNS[name] for name in ("double", "single")}, 4)
    return folder


@pytest.mark.parametrize(
    "several, kind",
    [
        ("of_two", "double"),
        pytest.param("of_four", "double", marks=pytest.mark.slow),
        pytest.param("of_four", "single", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_trains_as_one_does(several, kind, request, tmp_path):
    several, double = request.getfixturevalue(several), kind == "double"
    tolerance = 1e-8 if double else 1e-4
    train(tmp_path / kind, **RUNS[kind])
    alone, together = (metrics(folder / kind) for folder in (tmp_path, several))
    assert len(alone) == 15
    for one, two in zip(alone, together, strict=True):
        assert math.isclose(one["loss"], two["loss"], abs_tol=tolerance)
        assert math.isclose(one["gradient_norm"], two["gradient_norm"], rel_tol=1e-7 if double else 1e-2)
        assert one["learning_rate"] == two["learning_rate"]
        assert one.keys() == two.keys()
        for name in one.keys():
            if name.startswith("validation_"):
                assert math.isclose(one[name], two[name], rel_tol=tolerance, abs_tol=tolerance), name
    assert sum("validation_loss_0.6_0.8" in line for line in together) == 3
    assert ("validation_loss_vlb_0.6_0.8" in together[-1]) == double
    assert "validation_loss_0.8_1.0" not in together[-1]  # four pictures are of four fifths
    if double:
        for part in ("raw", "averaged"):
            weights = [torch.load(folder / f"{kind}.pt")[part] for folder in (tmp_path, several)]
            torch.testing.assert_close(*weights, atol=1e-8, rtol=0)


def test_two_processes_in_bf16_train_as_one_does_but_for_rounding(of_two, tmp_path):
    train(tmp_path / "bf16", **RUNS["bf16"])
    alone, together = (metrics(folder / "bf16") for folder in (tmp_path, of_two))
    assert len(alone) == 10
    for one, two in zip(alone, together, strict=True):
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-2)
    assert math.isclose(alone[0]["gradient_norm"], together[0]["gradient_norm"], rel_tol=1e-2)
    in_bf16 = [torch.load(folder / "bf16.pt")["gradients_in_bf16"].item() for folder in (tmp_path, of_two)]
    assert in_bf16 == [False, True]  # as they are sent; those of normalisations are computed in fp32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["autoencoder", "text", "adapter"])
def test_other_models_train_on_two_processes_as_on_one(tmp_path, kind):
    settings = {"max_train_steps": 20, "validation_steps": 10, "kind": kind}
    for number in (1, 2):
        run(tmp_path, {str(number): settings}, number)
    alone, together = (metrics(tmp_path / str(number)) for number in (1, 2))
    # Of a few pictures alone, another number of units may be active.
    for one, two in zip(alone, together, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"active_units", "validation_active_units"}:
            assert math.isclose(one[name], two[name], rel_tol=1e-7, abs_tol=1e-8), name
    for part in ("raw", "averaged"):
        weights = [torch.load(tmp_path / f"{number}.pt")[part] for number in (1, 2)]
        torch.testing.assert_close(*weights, atol=1e-8, rtol=0)


@pytest.mark.slow
def test_a_state_of_two_processes_goes_on_with_one_and_with_four(tmp_path):
    settings = {"max_train_steps": 30, "double": True, "checkpointing_steps": 10}
    run(tmp_path, {"whole": settings}, 1)
    run(tmp_path, {"two": settings}, 2)
    for number in (1, 4):
        resumed = tmp_path / f"resumed-{number}"
        shutil.copytree(tmp_path / "two", resumed)
        (resumed / "model_index.json").unlink()
        run(tmp_path, {resumed.name: settings}, number)
        weights = [torch.load(f"{name}.pt")["raw"] for name in (resumed, tmp_path / "whole")]
        torch.testing.assert_close(*weights, atol=1e-8, rtol=0)


@pytest.mark.slow
def test_two_processes_end_a_budget_of_minutes_at_the_same_step(tmp_path):
    run(tmp_path, {"minutes": {"max_train_minutes": 0.05, "logging_steps": 5}}, 2)
    lines = metrics(tmp_path / "minutes")
    fractions = [line["fraction"] for line in lines]
    assert fractions == sorted(fractions) and fractions[-2] < 1 <= fractions[-1]
    load_pipeline(tmp_path / "minutes")


def by_two(program, tmp_path):
    """A program that two processes have run, with the folder of a run as its argument."""
    (tmp_path / "script.py").write_text(program.format(folders=FOLDERS))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(tmp_path / "script.py"), str(tmp_path / "run")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


TWO_FOLDERS = """
import sys
sys.path[:0] = {folders!r}
import torch.distributed as dist
from runs import train
from hf_genmod.processes import processes

folder = sys.argv[1] + "/" * processes().process_index + ("own" if processes().process_index else "")
patience = dist.group.WORLD._get_backend(processes().device).options._timeout
sys.stdout.write(f"patience {{patience}}\\n")  # at once, as two processes write
train(folder, max_train_steps=4, checkpointing_steps=2)
"""


@pytest.mark.slow
def test_processes_with_different_folders_are_refused_and_wait_for_each_other_for_a_day(tmp_path):
    train(tmp_path / "run", max_train_steps=4, checkpointing_steps=2)
    (tmp_path / "run" / "model_index.json").unlink()
    done = by_two(TWO_FOLDERS, tmp_path)
    assert done.returncode != 0
    assert "see different files in" in done.stderr and "the step of the newest state: 4, 0" in done.stderr
    assert done.stdout.count("patience 1 day") == 2


COMPILED = """
import sys
sys.path[:0] = {folders!r}
import torch
from runs import make_trainer
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.shapes import ShapesDataset
from hf_genmod.training.averaging import average_in_bf16

compile, sent = torch.compile, []
torch.compile = lambda model, **settings: compile(model, backend="eager")  # which takes seconds

def counted(state, bucket):
    sent.append(trainer.progress.step)
    return average_in_bf16(state, bucket)

settings = {{"max_train_steps": 4, "checkpointing_steps": 2, "gradient_accumulation_steps": 2, "compile": True}}
trainer = make_trainer(load_pictures(ShapesDataset(40, resolution=16)), sys.argv[1], **settings)
trainer.model._orig_mod.register_comm_hook(None, counted)
trainer.train()
sys.stdout.write(f"sent at {{sent}}\\n")  # at once, as two processes write
"""


@pytest.mark.slow
def test_a_compiled_model_sends_the_gradients_of_accumulated_batches_once_after_a_state_is_saved_too(tmp_path):
    done = by_two(COMPILED, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("sent at")]
    assert lines == ["sent at [0, 1, 2, 3]"] * 2  # in one bucket each


MISSING = """
import sys
sys.path[:0] = {folders!r}
from runs import make_trainer
from hf_genmod.data.stream import stream_pictures

settings = {{"max_train_steps": 47, "logging_steps": 50, "checkpointing_steps": 0}}
trainer = make_trainer(stream_pictures(sys.argv[1] + "-shards"), sys.argv[1], **settings)
of_step = trainer.batches.of_step

def without_the_last(step):
    if step == 40:
        trainer.clock.look_every, trainer.clock.last_look = 100, (40, trainer.progress.elapsed)
    if step == 46 and trainer.accelerator.process_index == 1:
        trainer.batches.failure = "image 46 is gone"
    return of_step(step)

trainer.batches.of_step = without_the_last
trainer.train()
"""


@pytest.mark.slow
def test_an_image_that_is_missing_in_the_last_step_of_one_process_ends_the_run(tmp_path):
    write_parquet(tmp_path / "run-shards", (60, 25, 40))
    done = by_two(MISSING, tmp_path)
    assert done.returncode != 0
    assert "image 46 is gone; stopped at step 46 with the state saved" in done.stderr
    assert not (tmp_path / "run" / "model_index.json").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-46"]
