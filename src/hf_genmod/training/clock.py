"""Progress of a run and the fraction of its budget used."""

import contextlib
import dataclasses
import math
import time

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hf_genmod.processes import Interrupted, upload
from hf_genmod.training.config import TrainingConfig


@dataclasses.dataclass
class Progress:
    """How far a run has come; saved with its state."""

    step: int = 0
    elapsed: float = 0.0  # seconds
    paused: float = 0.0  # seconds of these, for samples and validation
    bad_steps: int = 0  # skipped, as their loss or gradient was not finite
    bad_steps_in_a_row: int = 0

    def count(self, is_bad: list[bool], limit: float) -> list[int]:
        """Counts the last steps, up to a row of `limit` bad ones. Returns the numbers of the bad ones."""
        bad_steps = []
        for step, bad in enumerate(is_bad, self.step - len(is_bad) + 1):
            self.bad_steps_in_a_row = self.bad_steps_in_a_row + 1 if bad else 0
            bad_steps += [step] if bad else []
            if self.bad_steps_in_a_row >= limit:
                break
        self.bad_steps += len(bad_steps)
        return bad_steps

    def take_back(self) -> int:
        """Counts the last steps no longer if they were skipped, and returns how many these are."""
        skipped, self.bad_steps_in_a_row = self.bad_steps_in_a_row, 0
        self.step -= skipped
        self.bad_steps -= skipped
        return skipped


PAUSES = 0.1  # the most that samples and validation take of a budget of minutes


class Clock:
    """
    Measures `fraction`, the used part of the budget, which every schedule reads, and knows of the signals to stop. All
    processes know the same.

    What several processes tell each other is one tensor a step on the device. The host waits for the device when it
    reads it, so it does that about twice in a second.
    """

    def __init__(self, config: TrainingConfig, progress: Progress, accelerator: Accelerator, signals: list[int]):
        self.config, self.progress, self.accelerator = config, progress, accelerator
        self.started = time.perf_counter() - progress.elapsed
        self.last_log = self.last_look = (progress.step, progress.elapsed)
        self.signals = signals  # that this process has received, from `stop_signals`
        self.is_stopping = False
        self.told, self.look_every = None, 1
        self.last_pauses = {}  # seconds, by what they were for
        self.fraction = self._fraction()

    def tell(self, bad: torch.Tensor) -> torch.Tensor:
        """Whether a step is bad on any process, 1 or 0, fp32 (), of the same on this process."""
        if self.accelerator.num_processes == 1:
            return bad
        elapsed = self._elapsed() if self.accelerator.is_main_process else 0.0
        mine = torch.tensor([0.0, bool(self.signals), elapsed], dtype=torch.float64)
        mine = upload(mine, self.accelerator.device)
        mine[0] = bad
        self.told = self.accelerator.reduce(mine, "sum")
        return (self.told[0] > 0).float()

    def tick(self, look: bool) -> float:
        """The fraction after a step. With `look`, the host waits for the device anyway."""
        progress = self.progress
        if self.accelerator.num_processes == 1:
            progress.elapsed, self.is_stopping = self._elapsed(), bool(self.signals)
        elif look or progress.step - self.last_look[0] >= self.look_every:
            _, stopping, progress.elapsed = self.told.tolist()
            self.is_stopping = stopping > 0
            seconds = (progress.elapsed - self.last_look[1]) / (progress.step - self.last_look[0])  # of a step
            self.look_every = max(1, min(2 * self.look_every, int(0.5 / max(seconds, 1e-6))))
            self.last_look = (progress.step, progress.elapsed)
        self.fraction = self._fraction()
        return self.fraction

    def has_time_for(self, what: str) -> bool:
        """Whether to pause the training for something: in a budget of minutes, all pauses take a tenth of the time."""
        if self.config.max_train_minutes is None:
            return True
        has_time = self.progress.paused + self.last_pauses.get(what, 0.0) <= PAUSES * self._elapsed()
        return broadcast_object_list([has_time])[0]

    @contextlib.contextmanager
    def pause(self, what: str, model: torch.nn.Module):
        """Around what pauses the training and computes with a `model`, which a signal ends, and so does a tenth of a
        budget of minutes (with a `TimeoutError`)."""
        started, minutes = self._elapsed(), self.config.max_train_minutes
        is_free = minutes is None or self.fraction >= 1  # at the end of the budget nothing waits
        most = math.inf if is_free else PAUSES * 60 * minutes - self.progress.paused

        def check(*_):
            if self.signals:
                raise Interrupted
            if self._elapsed() - started > most:
                raise TimeoutError("a tenth of the budget is used up by samples and validation")

        hook = model.register_forward_pre_hook(check)
        try:
            yield
        except Interrupted:
            pass  # the next step ends the run
        finally:
            hook.remove()
            self.last_pauses[what] = self._elapsed() - started
            self.progress.paused += self.last_pauses[what]

    def _elapsed(self) -> float:
        return time.perf_counter() - self.started

    def _fraction(self) -> float:
        if self.config.max_train_steps is not None:
            return self.progress.step / self.config.max_train_steps
        return self.progress.elapsed / (60 * self.config.max_train_minutes)

    def steps_per_second(self) -> float:
        """The speed since the last call."""
        (step, elapsed), self.last_log = self.last_log, (self.progress.step, self.progress.elapsed)
        return (self.progress.step - step) / max(self.progress.elapsed - elapsed, 1e-9)
