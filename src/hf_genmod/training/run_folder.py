"""The folder of a training run: its settings, states, metrics, samples and checkpoint."""

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import filelock
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from PIL import Image
from safetensors import SafetensorError

from hf_genmod.checkpoints.safety import read_json
from hf_genmod.errors import TrainingError, first_line
from hf_genmod.training.config import TrainingConfig

PROVENANCE = "provenance.json"  # where the checkpoint comes from

_INDICES = ("model_index.json", LORA_WEIGHT_NAME_SAFE)  # of a pipeline, of an adapter
_RESULTS = ("pictures", "built_on", "depends_on", "weights", "asked")  # in training_config.json, but no arguments


def run_settings(
    training: TrainingConfig, arguments: dict[str, object], dataset, validation_dataset, depends_on: dict[str, str]
) -> dict:
    """
    The settings of a run as `training_config.json` holds them.

    The `arguments` are the dataclasses besides `training` that define the run, by the names of their sections. A field
    with the metadata "built_on" names a checkpoint that the run builds on, and the value of the metadata its kind.
    """
    fields = [(section, field) for section in arguments.values() for field in dataclasses.fields(section)]
    paths = {field.metadata["built_on"]: getattr(section, field.name)
             for section, field in fields if "built_on" in field.metadata}  # fmt: skip
    settings = {
        "training": dataclasses.asdict(training),
        "arguments": {name: dataclasses.asdict(section) for name, section in arguments.items()},
        "pictures": {
            "name": dataset.name,
            "num_pictures": len(dataset),
            "num_held_out": 0 if validation_dataset is None else len(validation_dataset),
            "fingerprint": dataset.fingerprint,
            "skipped": dataset.skipped,
        },
        "built_on": {kind: path for kind, path in paths.items() if path is not None},
        "depends_on": depends_on,
    }
    return json.loads(json.dumps(settings, default=str))


def changeable_settings(training: TrainingConfig, arguments: dict[str, object]) -> set[str]:
    """The settings with the metadata "may_change", as "training.num_workers"."""
    sections = {"training": training, **{f"arguments.{name}": section for name, section in arguments.items()}}
    fields = [(name, field) for name, section in sections.items() for field in dataclasses.fields(section)]
    return {f"{name}.{field.name}" for name, field in fields if field.metadata.get("may_change")}


def arguments_in(settings: dict) -> dict:
    """The arguments in all sections, by name, of the `training_config.json` of this or an earlier version."""
    arguments = {}
    for name, value in settings.items():
        if name not in _RESULTS:
            arguments |= arguments_in(value) if isinstance(value, dict) else {name: value}
    return arguments


class RunFolder:
    """
    The files of a run, which its main process writes. Settings, states and the checkpoint are complete or absent,
    whenever the process is killed.

        training_config.json     the run's settings
        metrics.jsonl            a line every few steps
        checkpoints/step-N/      training states
        samples/                 images drawn during training
        loss.png                 the losses in metrics.jsonl
        provenance.json          the command, versions, hardware and data
        model_index.json, ...    at the end: the checkpoint, or an adapter
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self._settings = self.path / "training_config.json"
        self._metrics = self.path / "metrics.jsonl"
        self._states = self.path / "checkpoints"
        self._lock = self.path / ".lock"

    @property
    def index(self) -> str | None:
        """The file that a checkpoint needs, if it is there."""
        return next((name for name in _INDICES if (self.path / name).is_file()), None)

    @property
    def is_complete(self) -> bool:
        return self.index is not None

    def check(self, settings: dict, may_change: set[str]):
        """Raises a `ValueError` if the folder holds anything but this run; settings that `may_change` may differ."""
        # Of a run that was stopped before its first step.
        unfinished = {self._settings, _partial(self._settings), self._lock}
        if not self.path.exists() or (self.path.is_dir() and not set(self.path.iterdir()) - unfinished):
            return
        if not self._settings.is_file():
            raise ValueError(f"output_dir: {self.path} is not empty and holds no training run; choose another folder")
        old = read_json(self._settings)
        if not all(isinstance(old.get(name), dict) for name in ("training", "pictures")):
            raise ValueError(f"output_dir: {self._settings} records no training run; choose another folder")
        if "arguments" not in old:
            if not self.is_complete:
                raise ValueError(
                    f"output_dir: {self.path} holds an unfinished run that an earlier version of this package wrote; "
                    "choose another folder, or delete this one, to start the run again"
                )
            old, settings = ({**arguments_in(run), "pictures": run["pictures"]} for run in (old, settings))
            may_change = {path.split(".")[-1] for path in may_change}
            may_change |= {"pictures.fingerprint"} | (old.keys() ^ settings.keys())
        differing = list(_differences(old, settings, may_change))
        if differing:
            # A flag may be why the images differ.
            told = [phrase for phrase in differing if phrase.startswith("--")] or differing
            raise ValueError(
                f"output_dir: {self.path} holds a different run ({'; '.join(told[:5])}); choose another folder, or "
                "repeat that run's arguments to continue it"
            )

    @contextlib.contextmanager
    def locked(self):
        """Locks the folder against other processes. Raises a `TrainingError` if one is training in it."""
        try:
            lock = filelock.FileLock(self._lock).acquire(timeout=0)
        except filelock.Timeout as error:
            raise TrainingError(
                f"output_dir: another process is training in {self.path}; wait for it, or end it: `pgrep -fa "
                f"{self.path.name}` lists those whose command names the folder"
            ) from error
        with lock:
            yield

    def claim(self, settings: dict):
        """Writes the settings. A complete run keeps its own."""
        if not self.is_complete:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                _write_atomically(self._settings, json.dumps(settings, indent=2) + "\n")
            except OSError as error:
                reason = f"cannot be written ({error.strerror}); choose another folder"
                raise ValueError(f"output_dir: {self.path} {reason}") from error

    def saved_states(self) -> list[Path]:
        """The folders of complete states, oldest first."""
        return sorted(self._states.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))

    def newest_state(self, say: Callable[[str], None]) -> dict | None:
        """The newest state that can be read; `say` reports newer ones. Raises a `TrainingError` if none can."""
        states = self.saved_states()
        for folder in reversed(states):
            try:
                # Mapped, so that the processes of a machine share the memory, and read what they need of it.
                return torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True)
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                say(f"the state {folder} cannot be read ({first_line(error)}); trying the one before")
        if states:
            raise TrainingError(f"no state in {self._states} can be read; delete that folder to train from the start")
        return None

    def save_state(self, step: int, state: dict, limit: int):
        """Saves a state, under another name until it is complete, then deletes all but the newest `limit` states.
        Raises an `OSError` if it cannot be written; older states are kept."""
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
            # The message of torch is obscure.
            reason = error.strerror if isinstance(error, OSError) else "the disk is full or broken"
            states = self.saved_states()
            raise OSError(f"{reason}; {states[-1].name if states else 'none'} stays the newest") from error
        target = self._states / f"step-{step}"
        if target.exists():  # which could not be read
            _remove_state(target)
        os.replace(partial, target)
        for old in self.saved_states()[:-limit]:
            _remove_state(old)

    def save_checkpoint(self, save: Callable[[Path], None]):
        """Writes the checkpoint by `save`, its index last, as a run with an index is complete. Raises an `OSError` if
        it cannot be written."""
        partial = self.path / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            save(partial)
            for name in _INDICES:
                (self.path / name).unlink(missing_ok=True)
            for entry in sorted(partial.iterdir(), key=lambda entry: entry.name in _INDICES):
                target = self.path / entry.name
                if target.is_dir():  # from an attempt that was interrupted
                    shutil.rmtree(target)
                os.replace(entry, target)
            partial.rmdir()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(first_line(error)) from error

    def save_provenance(self, facts: dict):
        _write_atomically(self.path / PROVENANCE, json.dumps(facts, indent=2) + "\n")

    def append_metrics(self, line: dict):
        with open(self._metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _sample(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:06d}.png"

    def has_sample(self, step: int) -> bool:
        return self._sample(step).is_file()

    def save_sample(self, step: int, picture: Image.Image):
        file = self._sample(step)
        file.parent.mkdir(exist_ok=True)
        picture.save(file)

    def metrics(self) -> list[dict]:
        """The complete lines: a kill or a full disk may have cut one."""
        lines = []
        for line in self._metrics.read_text(encoding="utf-8").splitlines() if self._metrics.is_file() else ():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return lines

    @property
    def last_step(self) -> int:
        """The step of the last line of metrics, 0 before the first."""
        return max((line["step"] for line in self.metrics()), default=0)

    def forget_metrics_after(self, step: int):
        """Deletes the lines of later steps, which will be repeated."""
        if self._metrics.is_file():
            lines = [line for line in self.metrics() if line["step"] <= step]
            _write_atomically(self._metrics, "".join(json.dumps(line) + "\n" for line in lines))


def _differences(old: dict, new: dict, may_change: set[str], prefix: str = ""):
    """Phrases for the settings that differ but may not: of flags "--name was a, is b"."""
    known_otherwise = {"pictures.skipped", "pictures.num_held_out", "built_on"}  # by the fingerprints
    for name in sorted({*old, *new}):
        path, values = f"{prefix}{name}", (old.get(name), new.get(name))
        if path in may_change | known_otherwise or values[0] == values[1]:
            continue
        if any(isinstance(value, dict) for value in values):
            yield from _differences(*(value or {} for value in values), may_change, f"{path}.")
        elif prefix == "depends_on.":
            yield f"the weights of its {name.replace('_', ' ')} have changed"
        elif path == "pictures.fingerprint":
            yield "the images have changed"
        else:
            what = {"pictures.name": "the data set", "pictures.num_pictures": "the number of images"}
            was, now = ("not given" if value is None else repr(value) for value in values)
            yield f"{what.get(path, f'--{name}')} was {was}, is {now}"


def _remove_state(folder: Path):
    shutil.rmtree(folder.rename(folder.with_name(f"partial-{folder.name}")))  # a folder `step-N` is never incomplete


def _write_atomically(file: Path, text: str):
    _partial(file).write_text(text, encoding="utf-8")
    os.replace(_partial(file), file)


def _partial(file: Path) -> Path:
    return file.with_name(f"{file.name}.partial")
