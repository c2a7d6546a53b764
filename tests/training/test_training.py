import dataclasses
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator
from tiny import tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    DenoisingObjective,
    DenoisingUNet2DModel,
    ElboObjective,
    NoisyClassificationObjective,
    TextToImagePipeline,
    Trainer,
    TrainingConfig,
    VariationalAutoencoder,
    load_pipeline,
)
from hf_genmod.data.captions import Tokens, all_captions
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.randomness import BatchRandom
from hf_genmod.data.shapes import ShapesDataset
from hf_genmod.data.value_range import to_model_range
from hf_genmod.drawing.grids import class_rows
from hf_genmod.errors import TrainingError
from hf_genmod.recipes.networks import NetworkArguments
from hf_genmod.training.adapters import attach_adapter
from hf_genmod.training.averaging import power_function_average
from hf_genmod.training.text_encoder import TextConditionedUNet, make_text_encoder, train_tokenizer


@pytest.fixture(scope="module")
def dataset():
    return load_pictures(ShapesDataset(40, resolution=16))


@pytest.fixture(scope="module")
def held_out():
    return load_pictures(ShapesDataset(23, resolution=16, seed=1))


def make_trainer(
    dataset,
    output_dir,
    objective=None,
    draw_samples=None,
    dropout=0.0,
    double=False,
    learn_variance=False,
    prediction_type="v_prediction",
    weighting="simple",
    held_out=None,
    depends_on=None,
    **config,
):
    torch.manual_seed(0)
    unet = DenoisingUNet2DModel(
        sample_size=16,
        out_channels=6 if learn_variance else 3,
        block_out_channels=(16, 32),
        attention_levels=(False, True),
        layers_per_block=1,
        norm_num_groups=8,
        num_classes=8,
        dropout=dropout,
    )
    unet = unet.double() if double else unet
    scheduler = AncestralDDPMScheduler(
        prediction_type=prediction_type,
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range" if learn_variance else "fixed_small",
    )
    return Trainer(
        unet,
        objective or DenoisingObjective(scheduler, unet.null_label, weighting),
        dataset,
        TrainingConfig(
            output_dir=str(output_dir), **{"batch_size": 8, "logging_steps": 1, "mixed_precision": "no", **config}
        ),
        make_pipeline=lambda unet: ClassifierFreeGuidedPipeline(
            unet, scheduler, id2label=dict(enumerate(dataset.label_names))
        ),
        draw_samples=draw_samples,
        validation_dataset=held_out,
        depends_on=depends_on,
    )


def make_other_trainer(dataset, output_dir, kind, held_out=None, **config):
    """Of a variational autoencoder, a U-Net with the text encoder that learns with it, or an adapter; in fp64."""
    torch.manual_seed(0)
    scheduler, save = AncestralDDPMScheduler(), None
    if kind == "autoencoder":
        model, objective = VariationalAutoencoder(16, 3, 2, (16, 32), norm_num_groups=8), ElboObjective()
        make_pipeline = AutoencoderPipeline
    elif kind == "adapter":
        model = DenoisingUNet2DModel(16, 3, 3, (16, 32), 1, (False, True), norm_num_groups=8, num_classes=8)
        attach_adapter(model, rank=2, num_new_classes=1)
        objective = DenoisingObjective(scheduler, model.null_label)
        make_pipeline = lambda unet: ClassifierFreeGuidedPipeline(unet, scheduler)  # noqa: E731
        save = ClassifierFreeGuidedPipeline.save_lora_weights
    else:
        tokenizer = train_tokenizer(all_captions(dataset))
        text_encoder = make_text_encoder(tokenizer, hidden_size=32)
        unet = DenoisingUNet2DModel(16, 3, 3, (16, 32), 1, (False, True), norm_num_groups=8, cross_attention_dim=32)
        model = TextConditionedUNet(unet, text_encoder)
        objective = DenoisingObjective(scheduler, text=Tokens(tokenizer, text_encoder))
        make_pipeline = lambda both: TextToImagePipeline(both.unet, both.text_encoder, tokenizer, scheduler)  # noqa: E731
    settings = {"batch_size": 8, "logging_steps": 1, "mixed_precision": "no", **config}
    return Trainer(
        model.double(), objective, dataset, TrainingConfig(output_dir=str(output_dir), **settings), make_pipeline,
        validation_dataset=held_out, save=save,
    )  # fmt: skip


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


def assert_same_state(trainer, other):
    """Weights, their average and the state of the optimizer, bitwise."""
    assert torch.equal(raw_weights(trainer), raw_weights(other))
    assert torch.equal(averaged_weights(trainer), averaged_weights(other))
    states = [trainer.optimizer.state_dict()["state"] for trainer in (trainer, other)]
    for mine, theirs in zip(*(state.values() for state in states), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.1, "logging_steps": 4},  # a window of the metrics is open when the state is saved
        {"gradient_accumulation_steps": 2, "horizontal_flip": True, "max_shift": 1},
        {"weighting": "min_snr", "prediction_type": "epsilon"},
        {"weighting": "balanced", "prediction_type": "sample", "num_workers": 1},
        {"learn_variance": True, "ema_length": 0.0},
        {"weighting": "vlb", "validation_steps": 4},
    ],
)
def test_a_killed_run_continues_to_bitwise_the_same_end(dataset, held_out, tmp_path, settings):
    whole = make_trainer(dataset, tmp_path / "whole", max_train_steps=9, held_out=held_out, **settings)
    whole.train()

    def killed_at(step):
        inner = whole.objective

        def objective(model, batch, rng):
            if trainer.progress.step == step:
                raise Killed
            return inner(model, batch, rng)

        objective.by_noise_level = inner.by_noise_level
        return objective

    settings = dict(max_train_steps=9, checkpointing_steps=2, held_out=held_out, **settings)
    trainer = make_trainer(dataset, tmp_path / "cut", objective=killed_at(5), **settings)
    with pytest.raises(Killed):
        trainer.train()
    resumed = make_trainer(dataset, tmp_path / "cut", objective=whole.objective, **settings)
    resumed.train()

    assert_same_state(resumed, whole)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()) == ["step-8", "step-9"]


def test_a_classifier_learns_what_it_can_at_each_noise_level_and_takes_up_its_run_bitwise(tmp_path):
    levels = torch.arange(64) % 2 * 200
    images = [Image.new("RGB", (8, 8), (int(level), 0, 0)) for level in levels]
    pictures = PictureDataset(images, "levels", labels=(levels > 0).long(), label_names=["dark", "bright"])
    held_out = pictures.hold_out(20)
    process = AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2")

    def trainer(folder, objective, **settings):
        config = TrainingConfig(str(tmp_path / folder), max_train_steps=30, batch_size=16, mixed_precision="no",
                                validation_steps=15, checkpointing_steps=10, **settings)  # fmt: skip
        classifier = NetworkArguments(block_out_channels=[16, 32]).make_classifier(pictures, process)
        return Trainer(
            classifier,
            objective,
            pictures,
            config,
            make_pipeline=lambda classifier: ClassifierGuidedPipeline(tiny_unet(), classifier, process),
            validation_dataset=held_out,
        )

    class KilledAt20(NoisyClassificationObjective):
        def __call__(self, model, batch, rng):
            if cut.progress.step == 20 and model.training:
                raise Killed
            return super().__call__(model, batch, rng)

    whole = trainer("whole", NoisyClassificationObjective(process))
    whole.train()
    last = metrics(tmp_path / "whole")[-1]
    assert last["validation_accuracy_0.0_0.2"] == 1
    assert last["validation_loss_0.0_0.2"] < 0.9 * last["validation_loss_0.8_1.0"]  # of nearly pure noise

    cut = trainer("cut", KilledAt20(process))
    with pytest.raises(Killed):
        cut.train()
    resumed = trainer("cut", NoisyClassificationObjective(process))
    resumed.train()
    assert_same_state(resumed, whole)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


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
        ({"max_train_steps": 5, "max_shift": -1}, "max_shift: -1 is negative"),
        ({"max_train_steps": 5, "lr_schedule": "linear"}, "lr_schedule: 'linear' is not one of cosine, constant"),
        ({"max_train_steps": 5, "mixed_precision": "fp8"}, "mixed_precision: 'fp8' is not one of no, bf16, fp16"),
        ({"max_train_steps": 5, "adam_beta2": 1.0}, r"adam_beta2: 1.0 is not in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


@dataclasses.dataclass
class Size:
    resolution: int
    threads: int = dataclasses.field(default=1, metadata={"may_change": True})
    base: str | None = dataclasses.field(default=None, metadata={"built_on": "base model", "may_change": True})


def test_a_run_records_its_arguments_and_is_continued_with_those_that_may_change(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=1, depends_on={"unet": "abc"})
    trainer.open_run({"data": Size(8, base="runs/base")})
    trainer.train()
    written = json.loads((tmp_path / "training_config.json").read_text())
    assert written["training"] == dataclasses.asdict(trainer.config)
    assert written["arguments"] == {"data": {"resolution": 8, "threads": 1, "base": "runs/base"}}
    assert written["built_on"] == {"base model": "runs/base"} and written["depends_on"] == {"unet": "abc"}
    (tmp_path / "model_index.json").unlink()

    def again(size, weights="abc", **settings):
        trainer = make_trainer(dataset, tmp_path, max_train_steps=1, depends_on={"unet": weights}, **settings)
        trainer.open_run({"data": size})

    again(Size(8, threads=2), logging_steps=7)
    written = json.loads((tmp_path / "training_config.json").read_text())
    assert (written["arguments"]["data"]["threads"], written["training"]["logging_steps"]) == (2, 7)
    with pytest.raises(
        ValueError, match=r"run \(arguments.data.resolution was 8, is 9\).*only base, .*threads, \S+ may"
    ):
        again(Size(9))
    with pytest.raises(ValueError, match="depends_on.unet was 'abc', is 'abd'"):
        again(Size(8), weights="abd")


def test_a_run_of_an_earlier_version_is_complete_or_starts_again_elsewhere(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=1)
    trainer.train()
    file = tmp_path / "training_config.json"
    settings = json.loads(file.read_text())
    old = {name: settings[name] for name in ("training", "pictures")} | {"data": {"resolution": 16}}
    old["training"]["license"] = "mit"
    file.write_text(json.dumps(old))

    def must_not_be_called(model, batch, rng):
        raise AssertionError("trained again")

    make_trainer(dataset, tmp_path, max_train_steps=1, objective=must_not_be_called).train()
    assert json.loads(file.read_text()) == old
    with pytest.raises(ValueError, match="training.seed was 0, is 1"):
        make_trainer(dataset, tmp_path, max_train_steps=1, seed=1).open_run()
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(
        ValueError, match="holds an unfinished run that an earlier version of this package wrote; choose"
    ):
        make_trainer(dataset, tmp_path, max_train_steps=1).open_run()


def test_the_folder_of_another_run_is_left_alone(dataset, tmp_path):
    make_trainer(dataset, tmp_path, max_train_steps=1).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a different run .training.learning_rate was 0.005, is 0.001"):
        make_trainer(dataset, tmp_path, max_train_steps=1, learning_rate=1e-3).train()
    with pytest.raises(ValueError, match="holds a different run .arguments.data was None, is ..resolution"):
        make_trainer(dataset, tmp_path, max_train_steps=1).open_run({"data": Size(8)})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_of_other_things_is_left_alone(dataset, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no training run"):
        make_trainer(dataset, tmp_path, max_train_steps=1).train()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_processes_that_do_not_know_each_other_are_refused(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but Accelerate sees 1 process"):
        make_trainer(dataset, tmp_path, max_train_steps=1)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_cannot_be_shared_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="batch_size: 8 cannot be shared evenly"):
        make_trainer(dataset, tmp_path, max_train_steps=1, gradient_accumulation_steps=3)


# ---- faults ----


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


def test_samples_that_cannot_be_drawn_cost_nothing(dataset, tmp_path, capsys):
    def draw_samples(pipeline):
        raise ZeroDivisionError("no picture")

    make_trainer(dataset, tmp_path, max_train_steps=4, sampling_steps=2, draw_samples=draw_samples).train()
    assert "drawing samples failed (ZeroDivisionError: no picture); the run goes on" in capsys.readouterr().err
    assert load_pipeline(tmp_path).unet.null_label == 8


class BrokenTracker(GeneralTracker):
    name, requires_logging_directory, tracker = "broken", False, None

    def __init__(self):
        super().__init__()

    def store_init_configuration(self, values):
        pass

    def log(self, values, step):
        raise ConnectionError("no network")


def test_a_tracker_that_is_down_costs_nothing(dataset, tmp_path, capsys):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=3)
    trainer.accelerator.log_with = [BrokenTracker()]
    trainer.train()
    assert "the tracker failed (ConnectionError: no network); the run goes on" in capsys.readouterr().err
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_a_loading_process_that_dies_is_replaced(dataset, tmp_path, capsys):
    next(iter(torch.utils.data.DataLoader(range(2), num_workers=1)))  # which installs the signal handler of torch
    whole = make_trainer(dataset, tmp_path / "whole", max_train_steps=6, dropout=0.1)
    whole.train()

    def objective(model, batch, rng):
        if trainer.progress.step == 2 and psutil.Process().children():
            for worker in trainer.batches._loaded._workers:
                worker.kill()
        return whole.objective(model, batch, rng)

    trainer = make_trainer(
        dataset, tmp_path / "cut", max_train_steps=6, num_workers=2, objective=objective, dropout=0.1
    )
    trainer.train()
    assert "a process that loads pictures has died" in capsys.readouterr().err
    assert_same_state(trainer, whole)


def test_a_torn_line_of_metrics_is_left_out(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=4, checkpointing_steps=2)
    inner = trainer.objective

    def killed_at_step_3(model, batch, rng):
        if trainer.progress.step == 3:
            raise Killed
        return inner(model, batch, rng)

    trainer.objective = killed_at_step_3
    with pytest.raises(Killed):
        trainer.train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0][:20] + lines[0], *lines[1:], lines[2][:10]]))
    make_trainer(dataset, tmp_path, max_train_steps=4, checkpointing_steps=2).train()
    assert [line["step"] for line in metrics(tmp_path)] == [2, 3, 4]


def test_a_folder_is_trained_in_by_one_run_at_a_time(dataset, tmp_path):
    settings = dict(max_train_steps=3, checkpointing_steps=1)
    second = []

    def objective(model, batch, rng):
        if trainer.progress.step == 2:
            second.append(make_trainer(dataset, tmp_path, **settings))
            with pytest.raises(TrainingError, match="another process is training in"):
                second[0].train()
        return inner(model, batch, rng)

    trainer = make_trainer(dataset, tmp_path, **settings)
    inner, trainer.objective = trainer.objective, objective
    trainer.train()
    assert second and trainer.folder.is_complete
    make_trainer(dataset, tmp_path, **settings).train()


def test_a_checkpoint_that_cannot_be_written_is_written_by_the_same_command_later(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=3, checkpointing_steps=5)
    trainer.open_run()
    blocked = tmp_path / "unet"
    blocked.write_text("a file where a folder should be")
    message = "the checkpoint could not be written .*; make room, and repeat the command, .* from the state step-3"
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert not (tmp_path / "partial").exists()
    blocked.unlink()

    def must_not_be_called(model, batch, rng):
        raise AssertionError("trained again")

    again = make_trainer(dataset, tmp_path, max_train_steps=3, checkpointing_steps=5, objective=must_not_be_called)
    again.train()
    assert_same_state(again, trainer)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    load_pipeline(tmp_path)


# ---- real processes ----

SCRIPT = """
import sys
sys.path[:0] = {folders!r}
from test_training import *

run_script(*sys.argv[1:])
"""


def run_script(output_dir, settings, kill="None"):
    """
    A run in a process of its own. `kill` is None; or (n, seconds), to kill all its processes so long after its n-th
    step; or n, to do so before the n-th time that a file or folder is renamed after the last step.
    """
    pictures, held_out = (load_pictures(ShapesDataset(n, resolution=16, seed=seed)) for n, seed in ((40, 0), (4, 1)))
    settings = eval(settings)
    make = make_other_trainer if "kind" in settings else make_trainer
    trainer = make(pictures, output_dir, held_out=held_out, **settings)
    kill, inner, counted = eval(kill), trainer.objective, itertools.count(1)
    over = trainer.folder.is_complete

    def objective(model, batch, rng):
        if next(counted) == kill[0]:
            threading.Timer(kill[1], kill_all, [trainer.accelerator.num_processes]).start()
        return inner(model, batch, rng)

    def before_renaming(event, arguments):
        if event == "os.rename" and trainer.progress.step == trainer.config.max_train_steps and next(counted) == kill:
            kill_all(1)

    if isinstance(kill, tuple) and trainer.accelerator.is_main_process:
        trainer.objective = objective
    elif isinstance(kill, int):
        sys.addaudithook(before_renaming)
    rounded = []

    def before_the_step(optimizer, *_):
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        rounded.extend(torch.equal(g, g.bfloat16().to(g)) for g in gradients if g is not None)

    trainer.optimizer.optimizer.register_step_pre_hook(before_the_step)
    trainer.train()
    if trainer.accelerator.is_main_process and not over:
        torch.save(
            {
                "raw": raw_weights(trainer),
                "averaged": averaged_weights(trainer),
                "optimizer": trainer.optimizer.state_dict()["state"],
                "gradients_in_bf16": torch.tensor(rounded).all(),
            },
            f"{output_dir}.pt",
        )
    os._exit(0)  # before the timer


def kill_all(num_processes):
    launcher = psutil.Process().parent()
    if num_processes > 1:
        siblings = [process for process in launcher.children() if process.pid != os.getpid()]
        for process in (launcher, *siblings):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def command(tmp_path, output_dir, settings, num_processes=1, kill=None):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(folders=[str(folder) for folder in Path(__file__).parents[:2]]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    launcher = launcher if num_processes > 1 else []
    return [sys.executable, *launcher, str(file), str(output_dir), settings, str(kill)]


def run(*arguments, check=True, **keywords):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*arguments, **keywords), check=check, env=environment, timeout=600).returncode


def same(first, second):
    """Whether two trees of tensors are bitwise equal."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)


def assert_killed_runs_end_as_the_whole_one(tmp_path, settings, num_processes, num_kills, seed=0):
    run(tmp_path, tmp_path / "whole", settings, num_processes)
    rng, steps = np.random.default_rng(seed), []
    for _ in range(num_kills):
        kill = (int(rng.integers(1, 15)), round(rng.uniform(0, 0.05), 4))  # a step and its state take about so long
        status = run(tmp_path, tmp_path / "cut", settings, num_processes, kill=kill, check=False)
        assert status == -signal.SIGKILL
        steps += [int(path.name.removeprefix("step-")) for path in (tmp_path / "cut" / "checkpoints").glob("step-*")]
    assert len(set(steps)) > num_kills / 2  # it went on from states, most of the time
    run(tmp_path, tmp_path / "cut", settings, num_processes)
    assert same(torch.load(tmp_path / "cut.pt"), torch.load(tmp_path / "whole.pt"))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    load_pipeline(tmp_path / "cut")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bitwise_as_the_whole_one(tmp_path):
    settings = "{'max_train_steps': 60, 'checkpointing_steps': 1, 'dropout': 0.1}"
    assert_killed_runs_end_as_the_whole_one(tmp_path, settings, num_processes=1, num_kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_killed_twenty_times_ends_bitwise_as_the_whole_one(tmp_path, num_processes):
    settings = "{'max_train_steps': 400, 'checkpointing_steps': 1, 'gradient_accumulation_steps': 2}"
    assert_killed_runs_end_as_the_whole_one(tmp_path, settings, num_processes, num_kills=20)


@pytest.mark.slow
def test_a_run_killed_at_any_rename_of_its_end_is_completed_by_the_same_command(tmp_path):
    settings = "{'max_train_steps': 3, 'checkpointing_steps': 2}"
    run(tmp_path, tmp_path / "whole", settings)
    kills = 0
    for n in itertools.count(1):
        cut = tmp_path / f"cut-{n}"
        status = run(tmp_path, cut, settings, kill=n, check=False)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        run(tmp_path, cut, settings)
        whole, completed = (load_pipeline(folder).unet.state_dict() for folder in (tmp_path / "whole", cut))
        assert same(whole, completed)
    assert kills >= 5  # the state, the components, the index


@pytest.mark.parametrize(
    "num_processes, double",
    [(2, True), pytest.param(4, True, marks=pytest.mark.slow), pytest.param(4, False, marks=pytest.mark.slow)],
)
def test_any_number_of_processes_trains_as_one_does(tmp_path, num_processes, double):
    # The hybrid loss has metrics of its own; of four held-out pictures the second process sees none.
    settings = f"{{'max_train_steps': 30, 'validation_steps': 10, 'double': {double}, 'learn_variance': {double}}}"
    tolerance = 1e-8 if double else 1e-4
    for number in (1, num_processes):
        run(tmp_path, tmp_path / str(number), settings, number)
    alone, together = (metrics(tmp_path / str(number)) for number in (1, num_processes))
    assert len(alone) == 30
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
            weights = [torch.load(tmp_path / f"{number}.pt")[part] for number in (1, num_processes)]
            torch.testing.assert_close(*weights, atol=1e-8, rtol=0)


def test_two_processes_in_bf16_train_as_one_does_but_for_rounding(tmp_path):
    settings = "{'max_train_steps': 10, 'mixed_precision': 'bf16', 'max_grad_norm': 1e9}"
    for number in (1, 2):
        run(tmp_path, tmp_path / str(number), settings, number)
    alone, together = (metrics(tmp_path / str(number)) for number in (1, 2))
    assert len(alone) == 10
    for one, two in zip(alone, together, strict=True):
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-2)
    assert math.isclose(alone[0]["gradient_norm"], together[0]["gradient_norm"], rel_tol=1e-2)
    in_bf16 = [torch.load(tmp_path / f"{number}.pt")["gradients_in_bf16"].item() for number in (1, 2)]
    assert in_bf16 == [False, True]  # as they are sent; those of normalisations are computed in fp32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["autoencoder", "text", "adapter"])
def test_other_models_train_on_two_processes_as_on_one(tmp_path, kind):
    settings = f"{{'max_train_steps': 20, 'validation_steps': 10, 'kind': {kind!r}}}"
    for number in (1, 2):
        run(tmp_path, tmp_path / str(number), settings, number)
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
    settings = "{'max_train_steps': 30, 'double': True, 'checkpointing_steps': 10}"
    run(tmp_path, tmp_path / "whole", settings, 1)
    run(tmp_path, tmp_path / "two", settings, 2)
    for number in (1, 4):
        resumed = tmp_path / f"resumed-{number}"
        shutil.copytree(tmp_path / "two", resumed)
        (resumed / "model_index.json").unlink()
        run(tmp_path, resumed, settings, number)
        weights = [torch.load(f"{name}.pt")["raw"] for name in (resumed, tmp_path / "whole")]
        torch.testing.assert_close(*weights, atol=1e-8, rtol=0)


def test_validation_is_the_loss_of_the_averaged_weights_by_noise_level(dataset, held_out, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=4, validation_steps=2, batch_size=4, held_out=held_out)
    trainer.train()
    lines = metrics(tmp_path)
    assert ["validation_loss" in line for line in lines] == [False, True, False, True]
    unet, losses = load_pipeline(tmp_path).unet.eval(), {}
    scheduler = trainer.objective.scheduler
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    for position, index in enumerate(order.tolist()):  # one at a time, in batches of one
        rng = BatchRandom(0, 0, [position], 23)
        t = int(rng.stratified() * 1000)
        noise = rng.normal(3, 16, 16)
        y = held_out.labels[index : index + 1].masked_fill(rng.uniform() < 0.1, unet.null_label)
        x_0 = to_model_range(held_out.images[index : index + 1])
        x_t, v = (f(x_0, noise, torch.tensor([t])) for f in (scheduler.add_noise, scheduler.get_velocity))
        with torch.no_grad():
            losses[t] = (unet(x_t, t, class_labels=y).sample - v).square().mean().item()
    assert math.isclose(lines[-1]["validation_loss"], np.mean(list(losses.values())), rel_tol=1e-4)
    bands = [[loss for t, loss in losses.items() if t // 200 == band] for band in range(5)]
    for band, name in enumerate(["0.0_0.2", "0.2_0.4", "0.4_0.6", "0.6_0.8", "0.8_1.0"]):
        # 23 do not divide by 5, so that a picture at the edge may be counted by its neighbour
        measured, expected = lines[-1][f"validation_loss_{name}"], np.mean(bands[band])
        assert math.isclose(measured, expected, rel_tol=0.5 if name != "0.8_1.0" else 1e-4), name


def test_losses_and_samples_are_left_as_pictures_and_reach_the_tracker(dataset, held_out, tmp_path):
    settings = dict(max_train_steps=4, validation_steps=2, sampling_steps=2, report_to="tensorboard")
    samples = Image.new("L", (30, 20), 128)
    trainer = make_trainer(
        dataset, tmp_path, held_out=held_out, draw_samples=lambda pipeline: samples, learn_variance=True, **settings
    )
    trainer.train()
    curve = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    assert curve.shape[0] > 300 and len(np.unique(curve.reshape(-1, 3), axis=0)) > 100
    events = event_accumulator.EventAccumulator(str(tmp_path / "logs" / "hf_genmod")).Reload()
    assert [event.step for event in events.Images("samples")] == [2, 4]
    assert (events.Images("samples")[0].width, events.Images("samples")[0].height) == (30, 20)
    logged = [event.value for event in events.Scalars("validation_loss_0.4_0.6")]
    written = [line["validation_loss_0.4_0.6"] for line in metrics(tmp_path) if "validation_loss" in line]
    np.testing.assert_allclose(logged, written, rtol=1e-6)


def test_a_state_that_cannot_be_read_is_passed_over(dataset, tmp_path, capsys):
    settings = dict(max_train_steps=8, checkpointing_steps=2, checkpoints_total_limit=3)
    whole = make_trainer(dataset, tmp_path / "whole", **settings)
    whole.train()
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    (cut / "model_index.json").unlink()
    for step, damage in ((8, b""), (6, (cut / "checkpoints" / "step-6" / "state.pt").read_bytes()[:-5000])):
        (cut / "checkpoints" / f"step-{step}" / "state.pt").write_bytes(damage)
    again = make_trainer(dataset, cut, **settings)
    again.train()
    printed = capsys.readouterr()
    assert "step-8 cannot be read" in printed.err and "step-6 cannot be read" in printed.err
    assert "from step 4" in printed.out
    assert_same_state(again, whole)
    assert metrics(cut) == metrics(tmp_path / "whole")
    for state in (cut / "checkpoints").iterdir():
        torch.load(state / "state.pt")
        (state / "state.pt").write_bytes(b"damaged")
    (cut / "model_index.json").unlink()
    with pytest.raises(TrainingError, match="none of the states in .*checkpoints can be read; delete that folder"):
        make_trainer(dataset, cut, **settings).train()


def test_a_damaged_checkpoint_is_written_again(dataset, tmp_path, capsys):
    settings = dict(max_train_steps=3, checkpointing_steps=5)
    make_trainer(dataset, tmp_path, **settings).train()
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-100])
    make_trainer(dataset, tmp_path, **settings).train()
    assert "cannot be read" in capsys.readouterr().err
    assert weights.read_bytes() == right
    weights.write_bytes(right[:-100])
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(TrainingError, match="no saved state to write it from; delete its model_index.json"):
        make_trainer(dataset, tmp_path, **settings).train()


def test_a_full_disk_leaves_the_states_before_as_they_are(dataset, tmp_path, capsys):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=6, checkpointing_steps=2)
    inner = trainer.objective
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def objective(model, batch, rng):
        limit = 10_000 if trainer.progress.step == 3 else soft  # in bytes a file: at the save after this step
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return inner(model, batch, rng)

    trainer.objective = objective
    try:
        trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "saving the training state failed (OSError: the disk is full or broken; step-2 stays the newest)" in (
        capsys.readouterr().err
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-6"]
    assert torch.load(tmp_path / "checkpoints" / "step-2" / "state.pt")["progress"]["step"] == 2


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_the_state_and_the_same_command_continues(dataset, tmp_path, number, status):
    arguments = command(tmp_path, tmp_path / "cut", "{'max_train_steps': 100}")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # which rounding depends on
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
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


@pytest.mark.skipif(sys.platform != "linux", reason="how a C library gives memory back is known of glibc alone")
def test_freed_memory_is_kept_for_what_comes_next():
    of_allocators = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_allocators)}
    environment["MALLOC_MMAP_THRESHOLD_"] = "131072"  # where it starts; how it adapts hangs on the order of blocks
    output = subprocess.check_output([sys.executable, "-c", PAGE_FAULTS], env=environment, text=True)
    ordinarily, kept = map(int, output.split())
    assert kept < 100 < ordinarily  # 160,000 pages of 4 KiB are written to
