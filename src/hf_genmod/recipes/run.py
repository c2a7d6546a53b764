"""What every training script shares: flags, records, one-line errors, the model card and the push."""

import contextlib
import inspect
import shlex
import sys
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub.utils import validate_repo_id

from hf_genmod.errors import TrainingError, one_line_errors
from hf_genmod.processes import processes
from hf_genmod.recipes.arguments import SharingArguments, parse_arguments
from hf_genmod.sharing.doctor import examine_run
from hf_genmod.sharing.facts import Facts
from hf_genmod.sharing.model_card import write_card
from hf_genmod.sharing.push import PushError, push_checkpoint
from hf_genmod.training.config import TrainingConfig
from hf_genmod.training.run_folder import RunFolder


def run(main: Callable, argv: list[str] | None = None):
    """
    Runs a training script: reads the arguments of `main` from the command line, trains, then writes the model card
    (with `--license`) and pushes the checkpoint (with `--push_to_hub`). The `training_config.json` of the run records
    the arguments, each dataclass under the name of its parameter.

    Args:
        main (`Callable`): A function that returns a [`Trainer`]. Its parameters are annotated with dataclasses, whose
            fields are the flags; [`SharingArguments`] are added to them. For a run of several stages, `main` is a
            generator that yields the [`Trainer`] of each, or `(trainer, arguments, ...)` with those of its arguments
            that define the stage. Only the last checkpoint is pushed.
        argv (`list[str]`, *optional*): The flags. By default those of the command line.

    Raises:
        SystemExit: With status 2 and one sentence after a mistake in the arguments or the data, with status 1 if the
            training cannot go on.
    """
    types = {name: kind for name, kind in typing.get_type_hints(main).items() if name != "return"}
    parameters = list(types)
    if SharingArguments not in types.values():
        types["sharing"] = SharingArguments
    with one_line_errors():
        values = parse_arguments(*types.values(), argv=argv, description=main.__globals__.get("__doc__"))
        arguments = dict(zip(types, values, strict=True))
        (sharing,) = (value for value in values if isinstance(value, SharingArguments))
        made = main(**{name: arguments[name] for name in parameters})
        stages = made if inspect.isgenerator(made) else iter([made])
    trainer = None
    while True:
        with one_line_errors(goes_on=trainer is not None):
            stage = next(stages, None)  # a generator sets up its next stage here
            if stage is None:
                break
            trainer, *groups = stage if isinstance(stage, tuple) else (stage, *values)
            recorded = {id(group) for group in (*groups, sharing) if not isinstance(group, TrainingConfig)}
            repo_id = sharing.hub_model_id or Path(trainer.config.output_dir).resolve().name
            if sharing.push_to_hub:
                validate_repo_id(repo_id)
            trainer.open_run({name: value for name, value in arguments.items() if id(value) in recorded})
        with one_line_errors(TrainingError, status=1):
            trainer.train()
        kind = "adapter" if RunFolder(trainer.config.output_dir).index == LORA_WEIGHT_NAME_SAFE else "checkpoint"
        trainer.accelerator.print(f"{trainer.config.output_dir} is the {kind}")
        if sharing.license is not None and trainer.accelerator.is_main_process:
            _write_card(trainer.config.output_dir, sharing.license)
    processes().destroy_process_group()
    if trainer.accelerator.is_main_process:
        data = next((group for group in values if hasattr(group, "dataset")), None)
        dataset = data and f"{shlex.quote(data.dataset)}{' --streaming' * getattr(data, 'streaming', False)}"
        with contextlib.suppress(OSError, ValueError):  # of a run that saves something else than a checkpoint
            print(_next_steps(trainer.config.output_dir, dataset, sharing))
        if sharing.push_to_hub:
            _push(trainer.config.output_dir, repo_id, sharing)


def _next_steps(output_dir: str, dataset: str | None, sharing: SharingArguments) -> str:
    """What to look at and what to do after training; `dataset` as in a command."""
    facts, folder = Facts.read(output_dir), shlex.quote(output_dir)
    commands = [f"hf_genmod push {folder} NAME --license {sharing.license or 'LICENCE'}"] * (not sharing.push_to_hub)
    if not facts.base and dataset is not None:
        commands.insert(0, f"hf_genmod evaluate {folder} --dataset {dataset}")
    if facts.factor:
        commands.insert(0, f"hf_genmod enlarge small.png --upsamplers {folder}")
    elif facts.base:
        flags = {"class_labels": "--class_labels", "prompt": "--prompts"}
        asked = "".join(f"{flags[name]} {shlex.quote(str(value))} " for name, value in facts.learned.items())
        commands.insert(0, f"hf_genmod sample {shlex.quote(facts.base)} --adapter {folder} {asked}--output grid.png")
    else:
        prompts = f"--prompts {shlex.quote(facts.captions[0])} " if facts.captions else ""
        commands.insert(0, f"hf_genmod sample {folder} {prompts}--output grid.png")
    samples = sorted(Path(output_dir, "samples").glob("*.png"), key=lambda file: file.stat().st_mtime)
    parts = [f"{samples[-1]} shows samples"] if samples else []
    parts += [] if facts.base else examine_run(Path(output_dir))
    parts += ["In Python:", textwrap.indent(facts.usage(output_dir), "    ")]
    parts += ["Next:", textwrap.indent("\n".join(commands), "    ")] if commands else []
    return "\n\n".join(parts)


@one_line_errors((), goes_on=True)
def _write_card(output_dir: str, license: str):
    try:
        write_card(output_dir, license)
    except Exception as error:  # the checkpoint is complete without a card
        print(f"writing the card failed ({type(error).__name__}: {error})", file=sys.stderr)


@one_line_errors((), goes_on=True)
def _push(output_dir: str, repo_id: str, sharing: SharingArguments):
    try:
        private = sharing.hub_private_repo or None
        report = push_checkpoint(output_dir, repo_id, private=private, license=sharing.license)
        print(f"{report.url} loads and draws what {output_dir} does ({report.sample})", file=sys.stderr)
    except (PushError, ValueError, OSError) as error:  # the run is complete; the message says how to push again
        print(error, file=sys.stderr)
