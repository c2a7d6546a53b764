"""The folder of a training run: whose it is, its saved states, its metrics."""

import contextlib
import fcntl
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from PIL import Image
from safetensors import SafetensorError

from hf_genmod.errors import TrainingError, first_line

# What may change when a run is taken up again: nothing that the trained weights depend on, but for rounding.
MAY_CHANGE = (
    "output_dir", "num_workers", "logging_steps", "sampling_steps", "validation_steps", "validation_split",
    "checkpointing_steps", "checkpoints_total_limit",
    "report_to", "base", "license", "push_to_hub", "hub_model_id", "hub_private_repo",
    "max_bad_steps", "gradient_accumulation_steps", "gradient_checkpointing",
)  # fmt: skip


PROVENANCE = "provenance.json"  # where the checkpoint comes from


_INDICES = ("model_index.json", LORA_WEIGHT_NAME_SAFE)  # of a pipeline, of an adapter


class RunFolder:
    """
    What a run keeps on disk, written by its main process. Settings, states and the checkpoint are complete or absent
    whenever it is killed.

    Args:
        path (`str`): The folder, with

            training_config.json     the run's settings
            metrics.jsonl            a line every few steps
            checkpoints/step-N/      training states
            samples/                 pictures drawn while it trains
            loss.png                 the losses in metrics.jsonl
            provenance.json          by which command, versions and hardware
            model_index.json, ...    at the end: the checkpoint, or an adapter
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self._settings = self.path / "training_config.json"
        self._metrics = self.path / "metrics.jsonl"
        self._states = self.path / "checkpoints"

    @property
    def index(self) -> str | None:
        """The name of the file without which there is no checkpoint."""
        return next((name for name in _INDICES if (self.path / name).is_file()), None)

    @property
    def is_complete(self) -> bool:
        return self.index is not None

    def check(self, settings: dict):
        """
        Raises:
            ValueError: If the folder holds anything but a run of these settings.
        """
        unfinished = {self._settings, _partial(self._settings)}  # of a run that never came to a step
        if self._settings.is_file() and set(self.path.iterdir()) - unfinished:
            old = json.loads(self._settings.read_text(encoding="utf-8"))
            differing = list(_differences(old, json.loads(json.dumps(settings, default=str))))
            if differing:
                raise ValueError(
                    f"output_dir: {self.path} holds a different run ({'; '.join(differing[:5])}); choose another "
                    f"folder, or repeat that run's arguments to continue it (only {', '.join(MAY_CHANGE)} may change)"
                )
        elif self.path.is_file() or (self.path.is_dir() and set(self.path.iterdir()) - unfinished):
            raise ValueError(f"output_dir: {self.path} is not empty and holds no training run; choose another folder")

    @contextlib.contextmanager
    def locked(self):
        """
        Keeps other runs out of the folder.

        Raises:
            TrainingError: If one is at work in it.
        """
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = (
                    f"output_dir: another process is training in {self.path}; wait for it, or end it: "
                    f"`pgrep -fa {self.path.name}` lists those whose command names the folder"
                )
                raise TrainingError(message) from error
            yield
        finally:
            os.close(folder)

    def claim(self, settings: dict):
        self.path.mkdir(parents=True, exist_ok=True)
        _write_atomically(self._settings, json.dumps(settings, indent=2, default=str) + "\n")

    # ---- training states ----

    def saved_states(self) -> list[Path]:
        """The folders of complete states, oldest first."""
        return sorted(self._states.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))

    def newest_state(self, say: Callable[[str], None]) -> dict | None:
        """
        The newest of the states that can be read; `say` is told of those that cannot.

        Raises:
            TrainingError: If there are states, but none can be read.
        """
        states = self.saved_states()
        for folder in reversed(states):
            try:
                return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                say(f"the state {folder} cannot be read ({first_line(error)}); trying the one before")
        if states:
            raise TrainingError(
                f"none of the states in {self._states} can be read; delete that folder to train from the start"
            )
        return None

    def save_state(self, step: int, state: dict, limit: int):
        """
        Saves a state under another name first, so that a folder `step-N` is complete or absent, then deletes all but
        the newest `limit` states.

        Raises:
            OSError: If it could not be written; those saved before are left as they are.
        """
        partial = self._states / f"partial-{step}"
        try:
            for left_by_a_kill in self._states.glob("partial-*"):
                shutil.rmtree(left_by_a_kill)
            partial.mkdir(parents=True)
            with open(partial / "state.pt", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = error.strerror if isinstance(error, OSError) else "the disk is full or broken"  # says torch oddly
            states = self.saved_states()
            raise OSError(f"{reason}; {states[-1].name if states else 'none'} stays the newest") from error
        target = self._states / f"step-{step}"
        if target.exists():  # which could not be read
            _remove_state(target)
        os.replace(partial, target)
        for old in self.saved_states()[:-limit]:
            _remove_state(old)

    def save_checkpoint(self, save: Callable[[Path], None]):
        """
        Writes the checkpoint by `save`, its index last: without one the run is not complete.

        Raises:
            OSError: If it could not be written.
        """
        partial = self.path / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            save(partial)
            for name in _INDICES:
                (self.path / name).unlink(missing_ok=True)
            for entry in sorted(partial.iterdir(), key=lambda entry: entry.name in _INDICES):
                target = self.path / entry.name
                if target.is_dir():  # of a time when this was cut short
                    shutil.rmtree(target)
                os.replace(entry, target)
            partial.rmdir()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(first_line(error)) from error

    def save_provenance(self, facts: dict):
        _write_atomically(self.path / PROVENANCE, json.dumps(facts, indent=2) + "\n")

    # ---- metrics and samples ----

    def append_metrics(self, line: dict):
        with open(self._metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save_sample(self, step: int, picture: Image.Image):
        file = self.path / "samples" / f"step-{step:06d}.png"
        file.parent.mkdir(exist_ok=True)
        picture.save(file)

    def metrics(self) -> list[dict]:
        """The lines that are whole: a kill or a full disk may have cut one."""
        lines = []
        if self._metrics.is_file():
            for line in self._metrics.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    lines.append(json.loads(line))
        return lines

    def forget_metrics_after(self, step: int):
        """Drops the lines of steps that will be taken again."""
        if self._metrics.is_file():
            lines = [line for line in self.metrics() if line["step"] <= step]
            _write_atomically(self._metrics, "".join(json.dumps(line) + "\n" for line in lines))


def _differences(old: dict, new: dict, prefix: str = ""):
    """Sentences "name was a, is b" for what differs, except for what may."""
    for name in sorted(set(old) | set(new)):
        known_otherwise = ("skipped", "num_held_out")  # by the fingerprint of the pictures that are left
        if name in (*MAY_CHANGE, *known_otherwise) or old.get(name) == new.get(name):
            continue
        if isinstance(old.get(name), dict) and isinstance(new.get(name), dict):
            yield from _differences(old[name], new[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} was {old.get(name)!r}, is {new.get(name)!r}"


def _remove_state(folder: Path):
    shutil.rmtree(folder.rename(folder.with_name(f"partial-{folder.name}")))  # never half a folder `step-N`


def _write_atomically(file: Path, text: str):
    _partial(file).write_text(text, encoding="utf-8")
    os.replace(_partial(file), file)


def _partial(file: Path) -> Path:
    return file.with_name(f"{file.name}.partial")
