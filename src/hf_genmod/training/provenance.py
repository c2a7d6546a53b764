"""Where a checkpoint comes from: the facts of a run that nobody could find out afterwards."""

import collections
import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from hf_genmod import __version__
from hf_genmod.errors import counted
from hf_genmod.hub import can_be_id
from hf_genmod.training.config import TrainingConfig

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "huggingface_hub", "peft")


def provenance(num_processes: int = 1) -> dict:
    """The "command" of this process, to paste into a shell, with the home folder as `~`; the "versions" of packages;
    the "commit" of this package, `None` outside a git checkout; the "hardware", in words, with "num_processes" and the
    "num_threads" of each; and the "trackio_space" that the environment names for Trackio."""
    versions = {"hf_genmod": __version__, "python": platform.python_version()}
    return {
        "command": _command(num_processes),
        "versions": versions | {package: importlib.metadata.version(package) for package in _PACKAGES},
        "commit": _commit(),
        "hardware": _hardware(num_processes),
        "num_processes": num_processes,
        "num_threads": torch.get_num_threads(),
        "trackio_space": os.environ.get("TRACKIO_SPACE_ID"),
    }


def plan(config: TrainingConfig, model: torch.nn.Module) -> dict:
    """How a run computes, for how long, the size of its model, and how much of it is trained."""
    numbers = {"num_parameters": 0, "num_trained": 0}
    for parameter in model.parameters():
        numbers["num_parameters"] += parameter.numel()
        numbers["num_trained"] += parameter.numel() * parameter.requires_grad
    return {"mixed_precision": config.mixed_precision, "budget": config.budget, **numbers}


def origin(dataset: torch.utils.data.Dataset, pipeline) -> dict:
    """What a pipeline was trained on, with the "dataset_id" of a data set on the Hub and three captions, and the
    "request": what the pipeline is asked by to draw the first image, but for an "image" to enlarge."""
    pictures, names = dataset.pictures, dataset.pictures.label_names or []
    name = pictures.name.partition(" (")[0]  # without the split
    balance = collections.Counter(pictures.labels.tolist() if names else ())
    request = {name: values[0] for name, values in pipeline.request_for(pictures, [0]).items() if name != "image"}
    if names and "class_labels" in request:
        request["class_labels"] = names[request["class_labels"]]
    return {
        "num_pictures": len(pictures),
        "fingerprint": pictures.fingerprint,
        "dataset_id": name if "/" in name and can_be_id(name) and not Path(name).exists() else None,
        "class_balance": {name: balance[label] for label, name in enumerate(names) if balance[label]},
        "captions": (pictures.captions or [])[:3],
        "request": request,
    }


def _command(num_processes):
    if "HF_GENMOD_COMMAND" in os.environ:
        several = [] if num_processes == 1 else ["--num_processes", str(num_processes)]
        if "HF_GENMOD_SETTINGS" in os.environ:
            several += ["--accelerate_config", _quoted(os.environ["HF_GENMOD_SETTINGS"])]
        return " ".join([os.environ["HF_GENMOD_COMMAND"], *several, *map(_quoted, sys.argv[1:])])
    launcher = "python" if num_processes == 1 else f"torchrun --nproc_per_node {num_processes}"
    script = Path(sys.argv[0])
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return " ".join([launcher, *(_quoted(word) for word in (str(script), *sys.argv[1:]))])


def _quoted(word):
    """A word for a shell, with the home folder as `~` or $HOME, as its name does not belong into a card."""
    home = str(Path.home())
    name, equals, value = word.rpartition("=")
    if len(home) > 1 and (value == home or value.startswith(f"{home}{os.sep}")):
        rest = value[len(home) + 1 :]
        home = '"$HOME"' if equals else "~"  # a shell expands ~ only at the start of a word
        return f"{shlex.quote(name) + equals if equals else ''}{home}/{shlex.quote(rest) if rest else ''}"
    return shlex.quote(word)


@functools.cache
def _commit() -> str | None:
    """The commit of this package, with "+" if files were changed since."""
    folder = Path(__file__).parents[1]

    def git(*arguments):
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not installed below somebody else's checkout
        changed = git("status", "--porcelain", "--untracked-files=no", ".").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware(num_processes):
    return f"{_device()}, {counted(num_processes, 'process')} of {counted(torch.get_num_threads(), 'thread')}"


def _device():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type
    cpuinfo, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else ()
    name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), name)
    return f"{counted(os.cpu_count(), 'CPU core')} ({name})"
