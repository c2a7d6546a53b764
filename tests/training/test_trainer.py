import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from runs import FOLDERS, assert_same_state, averaged_weights, make_trainer, metrics, raw_weights

from hf_genmod import load_pipeline
from hf_genmod.drawing.grids import class_rows
from hf_genmod.errors import TrainingError


def test_training_lowers_the_loss_and_leaves_a_checkpoint_of_the_averaged_weights(dataset, tmp_path):
    trainer = make_trainer(
        dataset,
        tmp_path,
        max_train_steps=40,
        sampling_steps=40,
        draw_samples=lambda pipeline: class_rows(pipeline, num_columns=2, num_inference_steps=20),
    )
    trainer.train()

    losses = [line["loss"] for line in metrics(tmp_path)]
    assert len(losses) == 40
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    saved = load_pipeline(tmp_path)
    exported = torch.cat([p.detach().flatten() for p in saved.unet.parameters()])
    assert torch.equal(exported, averaged_weights(trainer))
    assert not torch.equal(exported, raw_weights(trainer))
    assert saved.labels["circle"] == dataset.label_names.index("circle")
    assert (tmp_path / "samples" / "step-000040.png").is_file()
    assert json.loads((tmp_path / "training_config.json").read_text())["pictures"]["num_pictures"] == 40


def test_a_run_that_is_over_is_not_trained_again(dataset, tmp_path):
    make_trainer(dataset, tmp_path, max_train_steps=2).train()

    def must_not_be_called(model, batch, rng):
        raise AssertionError("trained again")

    pipeline = make_trainer(dataset, tmp_path, max_train_steps=2, objective=must_not_be_called).train()
    saved = load_pipeline(tmp_path)
    for (name, mine), theirs in zip(pipeline.unet.state_dict().items(), saved.unet.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_accumulated_parts_make_the_same_step_as_the_whole_batch(dataset, tmp_path):
    weights = []
    for parts in (1, 2, 4):
        trainer = make_trainer(
            dataset, tmp_path / str(parts), max_train_steps=3, gradient_accumulation_steps=parts, learning_rate=1e-4
        )
        trainer.train()
        weights.append(raw_weights(trainer))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=2e-5, rtol=0)
    norms = [[line["gradient_norm"] for line in metrics(tmp_path / str(parts))] for parts in (1, 2, 4)]
    np.testing.assert_allclose(norms[1:], [norms[0]] * 2, rtol=1e-3)  # the optimizer would not show a wrong scale


def test_a_budget_of_minutes_ends_with_the_schedules_at_their_end(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_minutes=0.03)
    trainer.train()
    lines = metrics(tmp_path)
    fractions = [line["fraction"] for line in lines]
    assert fractions == sorted(fractions)
    assert fractions[-2] < 1 <= fractions[-1]
    for before, line in zip(lines, lines[1:], strict=False):
        expected = trainer.config.learning_rate_at(before["fraction"])
        assert math.isclose(line["learning_rate"], expected, rel_tol=1e-3, abs_tol=1e-6)


def test_samples_and_validation_wait_for_the_end_if_a_tenth_of_the_minutes_is_used(
    dataset, held_out, tmp_path, capsys
):
    drawn_at = []

    def draw_samples(pipeline):
        drawn_at.append(trainer.clock.fraction)
        return Image.new("RGB", (8, 8))

    due = {"sampling_steps": 1, "validation_steps": 1}
    trainer = make_trainer(
        dataset, tmp_path, draw_samples=draw_samples, held_out=held_out, max_train_minutes=0.02, **due
    )
    trainer.progress.paused = 0.5  # seconds
    trainer.train()
    lines = metrics(tmp_path)
    assert len(drawn_at) == 1 <= drawn_at[0]
    assert [line for line in lines if "validation_loss" in line] == lines[-1:]
    assert "failed" not in capsys.readouterr().err


def test_processes_that_do_not_know_each_other_are_refused(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but Accelerate sees 1 process"):
        make_trainer(dataset, tmp_path, max_train_steps=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(dataset, tmp_path, capsys, value):
    seen = []

    def objective(model, batch, rng):
        seen.append(raw_weights(trainer))
        loss, metrics = inner(model, batch, rng)
        return loss * (value if trainer.progress.step in (3, 4) else 1.0), metrics

    trainer = make_trainer(dataset, tmp_path, max_train_steps=8)
    inner, trainer.objective = trainer.objective, objective
    trainer.train()
    assert torch.equal(seen[3], seen[4]) and torch.equal(seen[4], seen[5])
    assert not torch.equal(seen[2], seen[3]) and not torch.equal(seen[5], seen[6])
    lines = metrics(tmp_path)
    assert [line["bad_steps"] for line in lines] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert [line["loss"] is None for line in lines] == [False, False, False, True, True, False, False, False]
    assert averaged_weights(trainer).isfinite().all()
    assert "step 4 (learning rate" in capsys.readouterr().err


def test_skipped_steps_are_counted_at_the_next_line_and_leave_the_same_weights(dataset, tmp_path, capsys):
    ends = []
    for logging_steps in (1, 4):
        trainer = make_trainer(
            dataset, tmp_path / str(logging_steps), max_train_steps=8, logging_steps=logging_steps, max_bad_steps=3
        )
        inner = trainer.objective

        def objective(model, batch, rng, trainer=trainer, inner=inner):
            loss, metrics = inner(model, batch, rng)
            return loss * (math.nan if trainer.progress.step in (0, 4, 5) else 1.0), metrics

        trainer.objective = objective
        trainer.train()
        ends.append((trainer, metrics(tmp_path / str(logging_steps))))
    (often, of_often), (seldom, of_seldom) = ends
    assert_same_state(seldom, often)
    assert seldom.averaged_model.n_averaged == 5 and vars(seldom.progress) | {"elapsed": 0, "paused": 0} == {
        "step": 8, "elapsed": 0, "paused": 0, "bad_steps": 3, "bad_steps_in_a_row": 0
    }  # fmt: skip
    assert [line["bad_steps"] for line in of_seldom] == [1, 3]
    for line, steps in zip(of_seldom, (of_often[1:4], of_often[6:]), strict=True):
        assert math.isclose(line["loss"], np.mean([of_step["loss"] for of_step in steps]), rel_tol=1e-6)
    assert "step 5, 6 (learning rate" in capsys.readouterr().err


def test_a_row_of_skipped_steps_between_two_lines_ends_the_run(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=10, logging_steps=5, max_bad_steps=2)
    inner = trainer.objective

    def objective(model, batch, rng):
        loss, metrics = inner(model, batch, rng)
        return loss * (math.nan if trainer.progress.step in (0, 2, 3) else 1.0), metrics

    trainer.objective = objective
    with pytest.raises(TrainingError, match=r"not finite in 2 steps in a row, up to step 4 "):
        trainer.train()
    assert [(line["step"], line["bad_steps"]) for line in metrics(tmp_path)] == [(5, 3)]


def test_a_run_that_stays_infinite_ends_with_its_last_state_named(dataset, tmp_path):
    trainer = make_trainer(
        dataset, tmp_path, max_train_steps=20, checkpointing_steps=2, max_bad_steps=3, logging_steps=10
    )
    inner = trainer.objective

    def objective(model, batch, rng):
        loss, metrics = inner(model, batch, rng)
        return loss * (math.nan if trainer.progress.step >= 5 else 1.0), metrics

    trainer.objective = objective
    message = r"in 3 steps in a row, up to step 8 \(learning rate \S+, mixed precision 'no'\); \S+step-6 is the last"
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    state = torch.load(tmp_path / "checkpoints" / "step-6" / "state.pt")
    weights = torch.cat([parameter.flatten() for parameter in state["model"].values()])
    assert weights.isfinite().all()
    assert not trainer.folder.is_complete
    assert [(line["step"], line["bad_steps"]) for line in metrics(tmp_path)] == [(8, 3)]


def test_parts_of_a_pipeline_that_do_not_fit_are_found_before_training(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path / "run", max_train_steps=2)

    def make_pipeline(unet):
        raise ValueError("the classifier does not fit the diffusion model")

    trainer.make_pipeline = make_pipeline
    with pytest.raises(ValueError, match="the classifier does not fit"):
        trainer.open_run()
    assert not (tmp_path / "run").exists()


def test_an_error_in_what_the_provenance_records_comes_before_training(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path / "run", max_train_steps=2)
    inner = trainer.make_pipeline

    def make_pipeline(unet):
        pipeline = inner(unet)
        pipeline.request_for = lambda pictures, indices: {}["labels"]
        return pipeline

    trainer.make_pipeline = make_pipeline
    with pytest.raises(KeyError):
        trainer.train()
    assert trainer.progress.step == 0 and not (tmp_path / "run").exists()


def test_work_after_training_that_fails_is_reported(dataset, tmp_path, capsys):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=1)

    def finish(pipeline):
        raise RuntimeError("no disk")

    trainer.finish = finish
    trainer.train()
    assert "the work after training failed (RuntimeError: no disk)" in capsys.readouterr().err
    assert (tmp_path / "model_index.json").is_file()


def test_a_run_whose_every_step_was_skipped_is_no_success(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=3)
    inner = trainer.objective

    def objective(model, batch, rng):
        loss, metrics = inner(model, batch, rng)
        return loss * math.nan, metrics

    trainer.objective = objective
    message = (
        "not finite in 3 steps in a row, up to step 3 .*; no state is the last that was saved; lower the learning"
    )
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert not trainer.folder.is_complete


def test_a_thread_trains_as_the_main_thread_does(dataset, tmp_path):
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]

    def train(name):
        make_trainer(dataset, tmp_path / name, max_train_steps=3, num_workers=1).train()

    thread = threading.Thread(target=train, args=["thread"])
    thread.start()
    thread.join(timeout=120)
    assert handlers == [signal.getsignal(number) for number in signal.valid_signals()]
    train("main")
    assert (tmp_path / "thread" / "model_index.json").is_file()
    assert metrics(tmp_path / "thread") == metrics(tmp_path / "main")


def test_each_trainer_of_a_process_has_its_own_precision_and_parts(dataset, held_out, tmp_path):
    def make(name, precision, **settings):
        parts = {"no": 2, "bf16": 1}[precision]
        settings = {"mixed_precision": precision, "gradient_accumulation_steps": parts, "max_train_steps": 2}
        return make_trainer(dataset, tmp_path / name, held_out=held_out, validation_steps=1, **settings)

    for precision in ("bf16", "no"):
        make(f"alone-{precision}", precision).train()
    trainers = {precision: make(f"together-{precision}", precision) for precision in ("bf16", "no")}
    for precision in ("bf16", "no"):
        trainers[precision].train()
    lines = {name.name: metrics(name) for name in tmp_path.iterdir()}
    assert lines["together-no"] == lines["alone-no"] and lines["together-bf16"] == lines["alone-bf16"]
    assert lines["alone-no"] != lines["alone-bf16"]


NOTEBOOK = """
import sys
sys.path[:0] = {folders!r}
from accelerate import notebook_launcher
from runs import make_trainer
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.shapes import ShapesDataset

def train(folder):
    make_trainer(load_pictures(ShapesDataset(40, resolution=16)), folder, max_train_steps=3, double=True).train()

notebook_launcher(train, [sys.argv[1]], num_processes=int(sys.argv[2]), use_port=sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_launcher_of_notebooks_trains(dataset, tmp_path, num_processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "cell.py").write_text(NOTEBOOK.format(folders=FOLDERS))
    command = [sys.executable, tmp_path / "cell.py", tmp_path / "run", str(num_processes), str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    make_trainer(dataset, tmp_path / "here", max_train_steps=3, double=True).train()
    there, here = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("run", "here"))
    np.testing.assert_allclose(there, here, rtol=1e-9)
