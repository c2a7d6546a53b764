"""Command-line flags and settings files."""

import argparse
import dataclasses
import difflib
import sys
from pathlib import Path

import yaml
from transformers import HfArgumentParser


def parse_arguments(*dataclass_types, argv: list[str] | None = None):
    """
    Flags, or a YAML file of them (`--config file.yaml`, flags go before it), as instances of dataclasses.

    Args:
        dataclass_types: The dataclasses whose fields are the flags.
        argv (`list[str]`, *optional*): The arguments; those of the command line by default.

    Raises:
        ValueError: If a flag or a setting of the file is unknown, or a value out of its range.
        SystemExit: If a value is not of its type (by argparse, status 2).
    """
    purpose = (sys.modules["__main__"].__doc__ or "").strip().split("\n\n")[0]
    parser = HfArgumentParser(
        dataclass_types, usage="%(prog)s [--FLAG VALUE ...]", description=purpose, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file of settings, by the names of the flags.")
    for action in parser._actions:
        if action.required:
            action.default = argparse.SUPPRESS  # which --help would show as None
    argv = sys.argv[1:] if argv is None else argv
    file = parser.parse_known_args(argv)[0].config
    namespace, unknown = parser.parse_known_args((_flags_of_file(file, parser) if file else []) + argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        raise ValueError(
            f"{unknown[0]}: no such flag; {f'did you mean {close[0]}?' if close else '--help lists them'}"
        )
    namespace = vars(namespace)
    return tuple(
        dataclass_type(**{field.name: namespace[field.name] for field in dataclasses.fields(dataclass_type)})
        for dataclass_type in dataclass_types
    )


def _flags_of_file(file: str, parser: HfArgumentParser) -> list[str]:
    """
    The settings of a YAML file, or of the `training_config.json` of a run, as the flags that say the same; the text as
    it stands, so that `no` stays "no".
    """
    try:
        settings = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a YAML file ({str(error).splitlines()[0]})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: holds no settings, which would be lines such as 'batch_size: 32'")
    for written_down in ("pictures", "weights", "asked"):  # for a run to know its data and its models again
        settings.pop(written_down, None)
    of_that_run = ("push_to_hub", "hub_model_id", "hub_private_repo")
    for part in [settings.pop(name) for name, value in list(settings.items()) if isinstance(value, dict)]:
        settings |= {key: value for key, value in part.items() if key not in of_that_run}
    known = {action.dest for action in parser._actions}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"{file}: {unknown[0]!r} is not a setting; `--help` lists them")
    flags = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{file}: {name!r} is neither a value nor a list of values")
        if value not in ("", "null", "~"):
            flags += [f"--{name}", *values]
    return flags
