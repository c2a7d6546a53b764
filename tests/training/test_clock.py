import pytest
import torch
from accelerate import Accelerator

from hf_genmod.training.clock import Clock, Progress
from hf_genmod.training.config import TrainingConfig


def clock(elapsed, **budget):
    """Of a run that has lasted some seconds."""
    return Clock(TrainingConfig(**budget), Progress(elapsed=elapsed), Accelerator(cpu=True), [])


def test_pauses_take_a_tenth_of_a_budget_of_minutes():
    of_a_minute = clock(30.0, max_train_minutes=1)
    assert of_a_minute.has_time_for("validating")
    of_a_minute.last_pauses = {"drawing samples": 5.0}
    assert of_a_minute.has_time_for("validating") and not of_a_minute.has_time_for("drawing samples")
    of_a_minute.progress.paused = 5.0
    assert not of_a_minute.has_time_for("validating")
    continued = Clock(of_a_minute.config, of_a_minute.progress, of_a_minute.accelerator, [])
    assert not continued.has_time_for("validating")
    of_steps = clock(30.0, max_train_steps=10)
    of_steps.progress.paused = 25.0
    assert of_steps.has_time_for("validating")


def test_a_pause_that_lasts_longer_is_ended_unless_the_budget_is_used():
    model, x = torch.nn.Linear(1, 1), torch.zeros(1, 1)
    clocks = [clock(30.0, max_train_minutes=1), clock(90.0, max_train_minutes=1), clock(30.0, max_train_steps=10)]
    for each in clocks:
        each.progress.paused = 7.0
    with pytest.raises(TimeoutError, match="a tenth of the budget"), clocks[0].pause("validating", model):
        model(x)
    for each in clocks[1:]:
        with each.pause("validating", model):
            model(x)
    model(x)  # as ever


def test_the_time_of_pauses_is_summed():
    each, model = clock(0.0, max_train_minutes=1), torch.nn.Linear(1, 1)
    for what in ("validating", "drawing samples", "validating"):
        with each.pause(what, model):
            pass
    assert each.last_pauses.keys() == {"validating", "drawing samples"}
    assert each.progress.paused > sum(each.last_pauses.values()) > 0


def test_several_processes_know_the_time_of_a_long_run_to_the_second():
    class MainOfTwo:
        """As if the other process had neither a bad step nor a signal."""

        num_processes, is_main_process, device = 2, True, torch.device("cpu")

        def reduce(self, tensor, how):
            return tensor

    each = Clock(TrainingConfig(max_train_minutes=2**24), Progress(elapsed=2.0**25), MainOfTwo(), [])  # a year
    before = each._elapsed()
    each.tell(torch.zeros(()))
    each.progress.step += 1
    each.tick(look=True)
    assert before <= each.progress.elapsed <= each._elapsed()
