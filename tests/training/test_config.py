import math

import pytest

from hf_genmod import TrainingConfig


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
        ({}, "a run needs a budget; give one, such as --max_train_minutes 30"),
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


def test_a_part_has_a_share_of_the_budget_and_other_changes():
    steps, minutes = TrainingConfig(max_train_steps=5, seed=3), TrainingConfig(max_train_minutes=10, seed=3)
    assert steps.part(0.4, max_shift=1) == TrainingConfig(max_train_steps=2, seed=3, max_shift=1)
    assert steps.part(0.01).max_train_steps == 1
    assert minutes.part(0.4) == TrainingConfig(max_train_minutes=4, seed=3)
    with pytest.raises(ValueError, match="batch_size: 0 is not positive"):
        steps.part(0.5, batch_size=0)


def test_the_precision_is_that_of_the_flag_then_of_the_launcher(monkeypatch):
    for of_launcher in ("no", "bf16", "fp16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", of_launcher)
        assert TrainingConfig(max_train_steps=1).mixed_precision == of_launcher
        assert TrainingConfig(max_train_steps=1, mixed_precision="bf16").mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="mixed_precision: 'fp8' is not one of no, bf16, fp16"):
        TrainingConfig(max_train_steps=1)
