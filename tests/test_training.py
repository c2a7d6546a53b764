import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_genmod import (
    AncestralDDPMScheduler,
    ClassifierFreeGuidedPipeline,
    DenoisingObjective,
    DenoisingUNet2DModel,
    Trainer,
    TrainingConfig,
    load_pipeline,
)
from hf_genmod.data import load_pictures
from hf_genmod.recipe import class_rows
from hf_genmod.shapes import ShapesDataset
from hf_genmod.training import power_function_average


@pytest.fixture(scope="module")
def dataset():
    return load_pictures(ShapesDataset(40, resolution=16))


def make_trainer(dataset, output_dir, objective=None, draw_samples=None, dropout=0.0, description=None, **config):
    torch.manual_seed(0)
    unet = DenoisingUNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        attention_levels=(False, True),
        layers_per_block=1,
        norm_num_groups=8,
        num_classes=8,
        dropout=dropout,
    )
    scheduler = AncestralDDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    return Trainer(
        unet,
        objective or DenoisingObjective(scheduler, unet.null_label),
        dataset,
        TrainingConfig(
            output_dir=str(output_dir), **{"batch_size": 8, "logging_steps": 1, "mixed_precision": "no", **config}
        ),
        make_pipeline=lambda unet: ClassifierFreeGuidedPipeline(
            unet, scheduler, id2label=dict(enumerate(dataset.label_names))
        ),
        draw_samples=draw_samples,
        description=description,
    )


def raw_weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()])


def averaged_weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.averaged_model.module.parameters()])


def metrics(output_dir):
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "elapsed_seconds")} for line in lines]


class Killed(Exception):
    pass


def test_training_lowers_the_loss_and_leaves_a_checkpoint_of_the_averaged_weights(dataset, tmp_path):
    trainer = make_trainer(
        dataset,
        tmp_path,
        max_train_steps=40,
        sampling_steps=40,
        draw_samples=lambda pipeline: class_rows(pipeline, num_columns=2, num_inference_steps=2),
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


def test_a_killed_run_continues_to_bitwise_the_same_end(dataset, tmp_path):
    whole = make_trainer(dataset, tmp_path / "whole", max_train_steps=9, dropout=0.1)
    whole.train()

    def killed_at(step):
        inner = whole.objective

        def objective(model, batch, rng):
            if trainer.progress.step == step:
                raise Killed
            return inner(model, batch, rng)

        return objective

    settings = dict(max_train_steps=9, dropout=0.1, checkpointing_steps=2)
    trainer = make_trainer(dataset, tmp_path / "cut", objective=killed_at(5), **settings)
    with pytest.raises(Killed):
        trainer.train()
    resumed = make_trainer(dataset, tmp_path / "cut", objective=whole.objective, **settings)
    resumed.train()

    assert torch.equal(raw_weights(resumed), raw_weights(whole))
    assert torch.equal(averaged_weights(resumed), averaged_weights(whole))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()) == ["step-6", "step-8"]


def test_a_run_that_is_over_is_not_trained_again(dataset, tmp_path):
    make_trainer(dataset, tmp_path, max_train_steps=2).train()

    def must_not_be_called(model, batch, rng):
        raise AssertionError("trained again")

    pipeline = make_trainer(dataset, tmp_path, max_train_steps=2, objective=must_not_be_called).train()
    saved = load_pipeline(tmp_path)
    for (name, mine), theirs in zip(pipeline.unet.state_dict().items(), saved.unet.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_the_checkpoint_is_saved_before_the_last_samples_are_drawn(dataset, tmp_path):
    def out_of_memory(pipeline):
        raise MemoryError

    with pytest.raises(MemoryError):
        make_trainer(dataset, tmp_path, max_train_steps=2, draw_samples=out_of_memory).train()
    assert load_pipeline(tmp_path).unet.null_label == 8


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


def test_power_function_average_weighs_step_tau_by_its_power():
    """θ̂_t = Σ_τ w_τ θ_τ with w_τ = (τ^{γ+1} − (τ−1)^{γ+1}) / t^{γ+1}, and a standard deviation of length · t."""
    length, steps = 0.1, 400
    average = power_function_average(length)
    weights = [torch.zeros(steps, dtype=torch.float64)]
    for step in range(steps):
        current = torch.zeros(steps, dtype=torch.float64)
        current[step] = 1.0
        if step == 0:
            weights[0].copy_(current)
        else:
            average(weights, [current], torch.tensor(step))
    (weights,) = weights
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    tau = torch.arange(1, steps + 1, dtype=torch.float64)
    mean = (weights * tau).sum()
    deviation = (weights * (tau - mean) ** 2).sum().sqrt() / steps
    assert abs(deviation.item() - length) < 0.002


def test_a_run_killed_before_its_first_save_starts_anew(dataset, tmp_path):
    def killed_at_step_3(model, batch, rng):
        if trainer.progress.step == 3:
            raise Killed
        return inner(model, batch, rng)

    trainer = make_trainer(dataset, tmp_path, max_train_steps=5)
    inner, trainer.objective = trainer.objective, killed_at_step_3
    with pytest.raises(Killed):
        trainer.train()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    make_trainer(dataset, tmp_path, max_train_steps=5).train()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_loss_that_is_not_finite_stops_the_run(dataset, tmp_path):
    def objective(model, batch, rng):
        return 0 * next(iter(model.parameters())).sum() + math.nan, {}

    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        make_trainer(dataset, tmp_path, objective=objective, max_train_steps=5).train()
    assert not (tmp_path / "model_index.json").exists()


def test_a_launcher_that_asks_for_another_precision_is_refused(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="give --mixed_precision bf16 to the script itself"):
        make_trainer(dataset, tmp_path, max_train_steps=1)


def test_average_of_no_length_is_the_last_step_and_too_long_ones_are_refused(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=3, ema_length=0.0)
    trainer.train()
    assert torch.equal(averaged_weights(trainer), raw_weights(trainer))
    with pytest.raises(ValueError, match="ema_length: 0.5"):
        power_function_average(0.5)


def test_learning_rate_rises_in_the_warm_up_and_falls_as_a_cosine():
    config = TrainingConfig(max_train_steps=1, learning_rate=1.0, lr_warmup_fraction=0.1)
    assert config.learning_rate_at(0.0) == 0
    assert math.isclose(config.learning_rate_at(0.05), 0.5 * 0.5 * (1 + math.cos(0.05 * math.pi)))
    assert math.isclose(config.learning_rate_at(0.5), 0.5)
    assert math.isclose(config.learning_rate_at(1.0), 0.0, abs_tol=1e-12)
    constant = TrainingConfig(max_train_steps=1, learning_rate=1.0, lr_schedule="constant", lr_warmup_fraction=0.0)
    assert constant.learning_rate_at(0.0) == constant.learning_rate_at(0.9) == 1.0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "max_train_steps: None with max_train_minutes: None"),
        ({"max_train_steps": 5, "max_train_minutes": 1.0}, "max_train_steps: 5 with max_train_minutes: 1.0"),
        ({"max_train_steps": -3}, "max_train_steps: -3 is not positive"),
        ({"max_train_steps": 5, "batch_size": 0}, "batch_size: 0 is not positive"),
        ({"max_train_steps": 5, "checkpointing_steps": -1}, "checkpointing_steps: -1 is negative"),
        ({"max_train_steps": 5, "lr_schedule": "linear"}, "lr_schedule: 'linear' is not one of cosine, constant"),
        ({"max_train_steps": 5, "mixed_precision": "fp8"}, "mixed_precision: 'fp8' is not one of no, bf16, fp16"),
        ({"max_train_steps": 5, "adam_beta2": 1.0}, r"adam_beta2: 1.0 is not in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


def test_the_folder_of_another_run_is_left_alone(dataset, tmp_path):
    make_trainer(dataset, tmp_path, max_train_steps=1).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a different run .training.learning_rate was 0.005, is 0.001"):
        make_trainer(dataset, tmp_path, max_train_steps=1, learning_rate=1e-3)
    with pytest.raises(ValueError, match="holds a different run .data was None, is ..resolution"):
        make_trainer(dataset, tmp_path, max_train_steps=1, description={"data": {"resolution": 8}})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_of_other_things_is_left_alone(dataset, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no training run"):
        make_trainer(dataset, tmp_path, max_train_steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_processes_that_do_not_know_each_other_are_refused(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but Accelerate sees 1 process"):
        make_trainer(dataset, tmp_path, max_train_steps=1)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_cannot_be_shared_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="batch_size: 8 cannot be shared evenly"):
        make_trainer(dataset, tmp_path, max_train_steps=1, gradient_accumulation_steps=3)


# ---- real processes ----

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_training import *

dataset = load_pictures(ShapesDataset(40, resolution=16))
make_trainer(dataset, sys.argv[1], max_train_steps=int(sys.argv[2])).train()
"""


def script(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(tests=os.path.dirname(__file__)))
    return str(file)


def one_thread():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_two_processes_train_as_one_does(dataset, tmp_path):
    alone = make_trainer(dataset, tmp_path / "one", max_train_steps=4)
    alone.train()
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         script(tmp_path), str(tmp_path / "two"), "4"],
        check=True, env=one_thread(), timeout=300,
    )  # fmt: skip
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert math.isclose(one["loss"], two["loss"], abs_tol=1e-4)
        assert math.isclose(one["gradient_norm"], two["gradient_norm"], rel_tol=1e-2)
        assert one["learning_rate"] == two["learning_rate"]
    trained = load_pipeline(tmp_path / "two").unet.state_dict()
    for name, weight in load_pipeline(tmp_path / "one").unet.state_dict().items():
        torch.testing.assert_close(trained[name], weight, atol=1e-3, rtol=0)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_the_same_command_continues(dataset, tmp_path, number, status):
    command = [sys.executable, script(tmp_path), str(tmp_path / "cut"), "100"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # which rounding depends on
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    seen = ""
    while "step 3," not in seen:  # the progress bar
        character = process.stderr.read(1)
        assert character, seen
        seen += character
    process.send_signal(number)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == status
    assert "with the state saved; the same command continues the run" in rest
    (state,) = (tmp_path / "cut" / "checkpoints").iterdir()
    step = int(state.name.removeprefix("step-"))
    assert 3 <= step < 100
    assert not (tmp_path / "cut" / "model_index.json").exists()

    resumed = make_trainer(dataset, tmp_path / "cut", max_train_steps=100)
    resumed.train()
    whole = make_trainer(dataset, tmp_path / "whole", max_train_steps=100)
    whole.train()
    assert torch.equal(raw_weights(resumed), raw_weights(whole))
