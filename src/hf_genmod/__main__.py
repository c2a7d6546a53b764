"""`python -m hf_genmod doctor PATH` and `python -m hf_genmod push PATH REPO_ID`"""

import argparse
import sys

from hf_genmod import __version__
from hf_genmod.errors import counted, one_line_errors

DATA_FLAGS = ("image_column", "label_column", "caption_column", "config_name", "array_axes")


def doctor(arguments) -> int:
    from hf_genmod.sharing.doctor import examine, is_checkpoint  # with torch and diffusers, which --help does without

    path = arguments.path
    if is_checkpoint(path):
        contents, findings, commands = [], list(examine(path)), []
        status = 1 if findings else 0
    else:
        from hf_genmod.recipes.dataset_doctor import examine_dataset
        from hf_genmod.recipes.pictures import CaptionedDataArguments

        flags = {name: getattr(arguments, name) for name in ("split", *DATA_FLAGS)}
        contents, findings, commands, would_start = examine_dataset(CaptionedDataArguments(dataset=path, **flags))
        status = 0 if would_start else 1
    for line in [*contents, *(f"- {finding}" for finding in findings)]:
        print(line.replace("\n", "\\n"))  # of the name of a file
    for command in commands:
        print(f"to train on it: {command}")
    print(f"{path}: {counted(len(findings), 'finding') if findings else 'no findings'}")
    return status


def push(arguments) -> int:
    from hf_genmod.sharing.push import PushError, push_checkpoint

    with one_line_errors(PushError, status=1):
        report = push_checkpoint(
            arguments.path,
            arguments.repo_id,
            private=arguments.private or None,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            license=arguments.license,
        )
    print(f"{report.url} loads and draws what {arguments.path} does ({report.sample})")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hf_genmod", description="Checks and shares what the training scripts of hf_genmod write."
    )
    parser.add_argument("--version", action="version", version=f"hf_genmod {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("doctor", help="Find problems of a data set, a run or a checkpoint, and what to do.")
    command.set_defaults(function=doctor)
    command.add_argument("path", help="Folder of images or parquet files, or the output_dir of a run.")
    command.add_argument("--split", default="train", help="Split of the data set.")
    for name in DATA_FLAGS:
        command.add_argument(f"--{name}", help="As the training scripts take it.")
    command = commands.add_parser("push", help="Upload a checkpoint with its card to the Hub, and test that it loads.")
    command.set_defaults(function=push)
    command.add_argument("path", help="The output_dir of a complete run.")
    command.add_argument("repo_id", help="The repository. Without a slash it is one of your own.")
    command.add_argument("--license", help="Licence of the model, such as mit. By default that of its card.")
    command.add_argument("--private", action="store_true", help="Create the repository as a private one.")
    command.add_argument("--revision", help="The branch, which is created if it does not exist.")
    command.add_argument("--create_pr", action="store_true", help="Open a pull request instead.")
    with one_line_errors():
        arguments = parser.parse_args(argv)
        return arguments.function(arguments)


if __name__ == "__main__":
    sys.exit(main())
