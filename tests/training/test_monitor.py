import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from runs import make_trainer, metrics
from safetensors.torch import load_file
from tensorboard.backend.event_processing import event_accumulator

from hf_genmod import load_pipeline
from hf_genmod.training.config import TrainingConfig
from hf_genmod.training.monitor import Monitor
from hf_genmod.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def curves():
    """Draws loss.png."""


def test_samples_that_cannot_be_drawn_cost_nothing(dataset, tmp_path, capsys):
    bars = []

    def draw_samples(pipeline):
        bars.append(pipeline._progress_bar_config)
        raise ZeroDivisionError("no picture")

    make_trainer(dataset, tmp_path, max_train_steps=4, sampling_steps=2, draw_samples=draw_samples).train()
    assert "drawing samples failed (ZeroDivisionError: no picture); the run goes on" in capsys.readouterr().err
    assert [(bar["desc"], bar["disable"]) for bar in bars] == [("drawing samples", True), ("drawing samples", False)]
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
    assert (tmp_path / "loss.png").is_file()


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


def test_the_bar_of_a_run_that_has_used_its_budget_and_more_is_full(tmp_path, capsys):
    monitor = Monitor(TrainingConfig(max_train_minutes=1), RunFolder(tmp_path), Accelerator(cpu=True))
    monitor.progress_bar(1.09).close()
    shown = capsys.readouterr().err
    assert "100%" in shown and "109%" not in shown


@pytest.mark.parametrize(
    "budget, words", [({"max_train_steps": 1}, "1 step"), ({"max_train_minutes": 1e-4}, "0.0001 minutes")]
)
def test_a_run_says_and_records_what_it_uses(dataset, tmp_path, capsys, budget, words):
    make_trainer(dataset, tmp_path, **budget).train()
    facts = json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))
    weights = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    parameters = sum(weight.numel() for weight in weights.values())
    expected = {"num_processes": 1, "num_threads": torch.get_num_threads(), "mixed_precision": "no",
                "num_parameters": parameters, "budget": words, "num_pictures": len(dataset)}  # fmt: skip
    assert facts | expected == facts
    line = f"training on {facts['hardware']}, mixed precision 'no': {len(dataset)} images of 16x16, 8 classes; "
    assert f"{line}{parameters / 1e6:.2f} M parameters; {words}\n" in capsys.readouterr().err
