"""Command-line flags and settings files, and the arguments that several scripts share."""

import argparse
import dataclasses
import math
import os
import re
import sys
import typing
from pathlib import Path

import diffusers
import transformers
import yaml
from huggingface_hub import get_token
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from hf_genmod.data.sources import refuse_missing
from hf_genmod.errors import OneLineParser, first_line, nearest, refuse_unknown, shortened
from hf_genmod.processes import use_cores
from hf_genmod.progress import count_seconds
from hf_genmod.sharing.model_card import check_license
from hf_genmod.training.config import changeable
from hf_genmod.training.run_folder import arguments_in

# What other training scripts call some of the flags.
_ELSEWHERE = {
    other: name
    for name, others in {
        "batch_size": "bs train_batch_size per_device_train_batch_size",
        "caption_column": "captions prompt_column text_column",
        "channels": "image_channels in_channels",
        "config_name": "dataset_config_name",
        "dataset": "data_dir data_path data_root dataset_name dataset_path instance_data_dir train_data_dir",
        "horizontal_flip": "flip mirror random_flip xflip",
        "image_column": "images",
        "label_column": "classes labels",
        "learning_rate": "lr",
        "max_train_minutes": "minutes",
        "max_train_steps": "epochs iterations iters max_steps num_epochs num_steps num_train_epochs steps",
        "num": "count num_images num_samples",
        "num_workers": "dataloader_num_workers workers",
        "output_dir": "out out_dir outdir output_path results_dir save_dir",
        "resolution": "image_size img_size imsize size",
        "vae": "autoencoder pretrained_vae_model_name_or_path",
    }.items()
    for other in others.split()
}


@dataclasses.dataclass
class GuidanceArguments:
    """Conditioning and guidance."""

    condition_dropout: float = HfArg(default=0.1, help="Probability that a step drops an image's label or caption.")
    guidance_scale: float = HfArg(default=2.0, help="Guidance scale γ of the samples drawn during training.")


@dataclasses.dataclass
class SharingArguments:
    """Model card and Hub."""

    license: str | None = changeable(None, help="Licence, such as 'mit'. With one, the run ends with a model card.")
    push_to_hub: bool = changeable(False, help="Push the checkpoint and its card to the Hub. Needs --license.")
    hub_model_id: str | None = changeable(None, help="Repository to push to. Default: the name of output_dir.")
    hub_private_repo: bool = changeable(False, help="Create the repository as a private one.")

    def __post_init__(self):
        if self.license is not None:
            check_license(self.license)
        if self.push_to_hub and self.license is None:
            raise ValueError("push_to_hub: a shared model needs a licence; give one, such as --license mit")
        if self.push_to_hub and get_token() is None:
            raise ValueError("push_to_hub: nobody is logged in to the Hub; run `hf auth login`, or set HF_TOKEN")
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private_repo):
            raise ValueError("hub_model_id: it is the repository for --push_to_hub; give that flag too")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        # Without a default value, the help text itself says what happens by default.
        return action.help if action.required or action.default in (None, []) else super()._get_help_string(action)

    def _format_action_invocation(self, action):
        flags = ", ".join(flag for flag in action.option_strings if "-" not in flag[2:])  # once, not with hyphens, too
        return f"{flags} {self._format_args(action, action.dest.upper())}".strip()


class _Parser(OneLineParser, HfArgumentParser):
    """The parser of dataclasses, with errors of one sentence."""


def parse_arguments(*dataclass_types: type, argv: list[str] | None = None, description: str | None = None) -> tuple:
    """
    Reads an instance of each dataclass from command-line flags, or from a YAML file, which the flags override. A path
    may begin with the home folder as `~`, which a shell replaces neither in a file nor after "=".

    Args:
        dataclass_types: The dataclasses. `--help` lists each as a group, under its docstring.
        argv (`list[str]`, *optional*): The flags. By default those of the command line.
        description (`str`, *optional*): The text on top of `--help`. By default the docstring of the script.

    Raises:
        FileNotFoundError: If a flag `dataset` names neither a folder, a file nor a data set on the Hub.
        ValueError: If a flag or a setting of the file is unknown or missing, or a value is out of its range or of
            another type.
    """
    parser = _Parser(
        [_flags_of(dataclass_type) for dataclass_type in dataclass_types],
        prog=os.environ.get("HF_GENMOD_COMMAND"),
        description=(description or sys.modules["__main__"].__doc__ or "").strip(),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    required = [action for action in parser._actions if action.required]
    needed = "".join(f"--{action.dest} {action.dest.upper()} " for action in required)
    parser.usage = f"%(prog)s {needed}[--FLAG VALUE ...]"
    for action in required:
        action.required = False  # for the parser, which would not say that a flag is misspelled
    parser.add_argument("--config", help="YAML file of settings, or the training_config.json of a run to repeat.")
    names = [field.name for dataclass_type in dataclass_types for field in dataclasses.fields(dataclass_type)]
    argv = sys.argv[1:] if argv is None else argv
    config_parser = OneLineParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    file = config_parser.parse_known_args(argv)[0].config
    settings = _flags_in_file(file, names, parser.prog) if file else []
    values, unknown = parser.parse_known_args(settings + argv)
    missing = [action.dest for action in required if getattr(values, action.dest) is None]
    is_given = any(word.split("=")[0] == f"--{names[0]}" for word in argv)
    refuse_unknown(unknown, names, _ELSEWHERE, first=next(iter(missing), "" if is_given else names[0]))
    if missing:
        parser.error(f"the following arguments are required: {', '.join(f'--{name}' for name in missing)}")
    for name, value in vars(values).items():
        numbers = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, float)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{name}: {value} is not finite; give finite numbers")
    values = {name: _at_home(value) for name, value in vars(values).items()}
    if values.get("dataset") not in (None, "shapes") and not values.get("streaming"):
        refuse_missing(values["dataset"])  # which is told before what a dataclass refuses
    use_cores(values.get("num_threads"))
    count_seconds()
    diffusers.utils.logging.disable_progress_bar()  # of the parts of a checkpoint, which load within a second
    if not are_progress_bars_disabled():
        transformers.utils.logging.disable_progress_bar()  # with those of the Hub, whose downloads take longer
        enable_progress_bars()
    return tuple(
        dataclass_type(**{field.name: values[field.name] for field in dataclasses.fields(dataclass_type)})
        for dataclass_type in dataclass_types
    )


def _at_home(value):
    """A value, or a list of values, with the folder for which `~` stands."""
    if isinstance(value, list):
        return [_at_home(part) for part in value]
    is_path = isinstance(value, str) and re.match(r"~[\w.-]*([/\\]|$)", value)
    return os.path.expanduser(value) if is_path else value


def _flags_of(dataclass_type: type) -> type:
    """The dataclass as HfArgumentParser takes it: with a group name, and no metadata that argparse does not know."""
    types = typing.get_type_hints(dataclass_type)
    fields = []
    for field in dataclasses.fields(dataclass_type):
        default = {"default": field.default, "default_factory": field.default_factory}
        flag = dataclasses.field(**default, metadata={"help": field.metadata["help"]})
        fields.append((field.name, types[field.name], flag))
    title = dataclass_type.__doc__.strip().splitlines()[0].rstrip(".")
    return dataclasses.make_dataclass(dataclass_type.__name__, fields, namespace={"_argument_group_name": title})


def _flags_in_file(file: str, names: list[str], script: str) -> list[str]:
    """The settings of a YAML file, or of the `training_config.json` of a run, as flags. Values stay the text that they
    are in the file: `no` stays "no"."""
    expected = "give lines such as 'batch_size: 32', or the training_config.json of a run"
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
        settings = yaml.load(text, Loader=yaml.BaseLoader) or {}
    except OSError as error:
        raise ValueError(f"config: {file} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a YAML file ({first_line(error)}); {expected}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: it holds no settings; {expected}")
    if "_class_name" in settings:
        raise ValueError(f"{file}: it describes a model, not a run; {expected}")
    # What a training_config.json says of sharing is for that run alone; a file of flags has no sections.
    not_repeated = {"push_to_hub", "hub_model_id", "hub_private_repo"} - set(settings)
    settings = {name: value for name, value in arguments_in(settings).items() if name not in not_repeated}
    if unknown := [name for name in settings if name not in names]:
        name = nearest(unknown[0], names, _ELSEWHERE)
        hint = f"did you mean {name}?" if name else "is the file for another script? `--help` lists those that it has"
        raise ValueError(f"{file}: settings that {script} does not have: {shortened(unknown)}; {hint}")
    flags = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{file}: {name!r} is neither a value nor a list of values")
        if value not in ("", "null", "~", []):
            flags += [f"--{name}", *values]
    return flags
