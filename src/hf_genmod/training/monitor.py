"""What a run reports: lines of metrics, a tracker, samples and loss curves."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from hf_genmod.drawing.curves import draw_losses
from hf_genmod.errors import TrainingError, counted
from hf_genmod.training.clock import Clock, Progress
from hf_genmod.training.config import TrainingConfig
from hf_genmod.training.run_folder import RunFolder


class Monitor:
    """Writes `metrics.jsonl`, `samples/` and `loss.png` and logs them to the tracker. Failures are reported and do not
    stop training."""

    def __init__(self, config: TrainingConfig, folder: RunFolder, accelerator: Accelerator):
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.accumulated: dict[str, list[torch.Tensor]] = {}  # the metrics of the steps since the last line
        self.bar = tqdm(disable=True)  # before that of the training
        self.last_steps: list[tuple[torch.Tensor, dict]] = []  # those whose metrics the host has not looked at

    def say(self, message: str):
        """Prints a line to stderr, once for all processes."""
        if self.accelerator.is_main_process:
            tqdm.write(message, file=sys.stderr)

    def announce(self, provenance: dict, pictures: torch.utils.data.Dataset):
        """Says in a line what the run trains on what."""
        height, width = pictures.resolution
        classes = f", {counted(len(balance), 'class')}" if (balance := provenance["class_balance"]) else ""
        total, trained = (provenance[f"num_{which}"] / 1e6 for which in ("parameters", "trained"))
        share = f", of which {trained:.2g} M are trained" if trained < total else ""
        self.say(
            f"training on {provenance['hardware']}, mixed precision {provenance['mixed_precision']!r}: "
            f"{counted(len(pictures), 'image')} of {height}x{width}{classes}; "
            f"{total:.2f} M parameters{share}; {provenance['budget']}"
        )

    @contextlib.contextmanager
    def optional(self, what: str):
        """Around what the training does not need: a failure is reported and ignored."""
        try:
            yield
        except Exception as error:
            self.say(f"{what} failed ({type(error).__name__}: {error}); the run goes on")

    def start_tracker(self):
        with self.optional("the tracker"):
            settings = {name: value for name, value in dataclasses.asdict(self.config).items() if value is not None}
            self.accelerator.trackers = []  # should they fail to start
            self.accelerator.init_trackers("hf_genmod", config=settings)

    def end_tracker(self):
        with self.optional("the tracker"):
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def progress_bar(self, fraction: float) -> tqdm:
        bar_format = "{desc}{percentage:3.0f}% |{bar}| {elapsed} < {remaining}{postfix}"
        hidden = not self.accelerator.is_main_process
        self.bar = tqdm(total=1.0, initial=min(fraction, 1.0), bar_format=bar_format, disable=hidden)
        return self.bar

    @property
    def has_ended(self) -> bool:
        """Whether this is the main process and its progress bar has ended."""
        return self.bar.disable and self.accelerator.is_main_process

    @contextlib.contextmanager
    def doing(self, what: str):
        """Names in the progress bar, or in a line after its end, what takes time now."""
        if self.bar.disable:  # at its end, and on the other processes
            self.say(what)
        else:
            self.bar.set_description(what)
        try:
            yield
        finally:
            self.bar.set_description()

    def add(self, bad: torch.Tensor, metrics: dict[str, torch.Tensor]):
        """Keeps the metrics of a step for the next line; `bad`, (), is 1 if the step was skipped, else 0."""
        self.last_steps.append((bad, metrics))

    def look(self) -> list[bool]:
        """Which of the steps since the last call were skipped, whose metrics are forgotten. Waits for the device."""
        steps, self.last_steps = self.last_steps, []
        skipped = torch.stack([bad for bad, _ in steps]).bool().tolist() if steps else []
        for (_, metrics), is_skipped in zip(steps, skipped, strict=True):
            for name, value in metrics.items() if not is_skipped else ():
                self.accumulated.setdefault(name, []).append(value)
        return skipped

    def gathered(self) -> dict[str, torch.Tensor]:
        """The accumulated metrics of all processes, (processes, steps)."""
        return {name: self.accelerator.gather(torch.stack(steps)[None]) for name, steps in self.accumulated.items()}

    def restore(self, gathered: dict[str, torch.Tensor]):
        """Continues from accumulated metrics: each process from its own, or all from their mean."""
        for name, values in gathered.items():
            same_processes = len(values) == self.accelerator.num_processes
            mine = values[self.accelerator.process_index] if same_processes else values.mean(dim=0)
            self.accumulated[name] = list(mine.to(self.accelerator.device, copy=True))

    def log(self, clock: Clock, learning_rate: float, validation: dict[str, float], bar: tqdm):
        """Writes a line of metrics: means over the steps since the last line, or None if all of them were skipped."""
        progress = clock.progress
        values = {"loss": None, "gradient_norm": None}
        if self.accumulated:
            means = torch.stack([torch.stack(steps).mean() for steps in self.accumulated.values()])
            means = self.accelerator.reduce(means, "mean").tolist()
            values = dict(sorted(zip(self.accumulated, means, strict=True)))
        self.accumulated = {}
        images_per_second = clock.steps_per_second() * self.config.batch_size
        line = {
            "step": progress.step,
            "fraction": round(clock.fraction, 6),
            **values,
            **validation,
            "learning_rate": learning_rate,
            "bad_steps": progress.bad_steps,
            "images_per_second": images_per_second,
            "elapsed_seconds": progress.elapsed,
        }
        with self.optional("the tracker"):
            self.accelerator.log(line, step=progress.step)
        if self.accelerator.is_main_process:
            with self.optional("writing metrics.jsonl"):
                self.folder.append_metrics(line)
        bar.set_postfix_str(
            f"step {line['step']}, loss {values['loss'] or math.nan:.4f}, learning rate {learning_rate:.1e}, "
            f"{images_per_second:.0f} images/s"
        )

    def report_bad_steps(self, steps: list[int], progress: Progress, learning_rate: float, too_bad: bool):
        """Says which steps were skipped. Raises a `TrainingError` if these are too many."""
        precision = self.config.mixed_precision
        settings = f"(learning rate {learning_rate:.2g}, mixed precision {precision!r})"
        if not too_bad:
            where = f"step {', '.join(map(str, steps))} {settings}"
            self.say(f"the loss or its gradient is not finite at {where}; skipped")
            return
        where = f"step {steps[-1]} {settings}"
        saved = next(reversed(self.folder.saved_states()), "no state")
        remedy = "" if precision == "no" else " or train with --mixed_precision no"
        raise TrainingError(
            f"the loss or its gradient was not finite in {progress.bad_steps_in_a_row} steps in a row, up to {where}; "
            f"{saved} is the last that was saved; lower the learning rate{remedy}, in a new output_dir"
        )

    def show(self, step: int, draw: Callable[[], Image.Image] | None):
        """Saves what `draw` draws on all processes, if anything, and the loss curves so far."""
        if draw is not None:
            with self.optional("drawing samples"), self.doing("drawing samples"):
                image = draw()
                if self.accelerator.is_main_process:
                    self.folder.save_sample(step, image)
                    with self.optional("the tracker"):
                        self._track_image("samples", image, step)
        if self.accelerator.is_main_process:
            with self.optional("drawing loss.png"):
                draw_losses(self.folder.metrics(), self.folder.path / "loss.png")
        self.accelerator.wait_for_everyone()

    def _track_image(self, name: str, image: Image.Image, step: int):
        for tracker in self.accelerator.trackers:
            if tracker.name == "trackio":  # for which Accelerate has no `log_images`
                import trackio

                tracker.log({name: trackio.Image(image)}, step=step)
            elif tracker.name == "tensorboard":
                pixels = np.asarray(image.convert("RGB"))[None]  # (1, H, W, 3)
                tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [image]}, step=step)
