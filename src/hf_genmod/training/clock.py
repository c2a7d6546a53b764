"""Progress of a run and the fraction of its budget used."""

import dataclasses
import time

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from hf_genmod.training.config import TrainingConfig


@dataclasses.dataclass
class Progress:
    """How far a run has come; saved with its state."""

    step: int = 0
    elapsed: float = 0.0  # seconds
    bad_steps: int = 0  # skipped, as their loss or gradient was not finite
    bad_steps_in_a_row: int = 0

    def count(self, is_bad: bool):
        """Counts a step."""
        self.step += 1
        self.bad_steps += is_bad
        self.bad_steps_in_a_row = self.bad_steps_in_a_row + 1 if is_bad else 0


class Clock:
    """Measures `fraction`, the used part of the budget, which every schedule reads. It is equal on all processes."""

    def __init__(self, config: TrainingConfig, progress: Progress, accelerator: Accelerator):
        self.config, self.progress, self.accelerator = config, progress, accelerator
        self.started = time.perf_counter() - progress.elapsed
        self.last_log = (progress.step, progress.elapsed)
        self.fraction = self._fraction()

    def tick(self) -> float:
        elapsed = time.perf_counter() - self.started
        if self.config.max_train_minutes is not None and self.accelerator.num_processes > 1:
            elapsed = broadcast(torch.tensor(elapsed, device=self.accelerator.device)).item()  # rank 0's
        self.progress.elapsed = elapsed
        self.fraction = self._fraction()
        return self.fraction

    def _fraction(self) -> float:
        if self.config.max_train_steps is not None:
            return self.progress.step / self.config.max_train_steps
        return self.progress.elapsed / (60 * self.config.max_train_minutes)

    def steps_per_second(self) -> float:
        """The speed since the last call."""
        (step, elapsed), self.last_log = self.last_log, (self.progress.step, self.progress.elapsed)
        return (self.progress.step - step) / max(self.progress.elapsed - elapsed, 1e-9)
