"""`python -m hf_genmod doctor PATH` and `python -m hf_genmod push PATH REPO_ID`"""

import argparse
import sys

from hf_genmod.errors import one_line_errors


def examine(arguments) -> int:
    from hf_genmod.sharing.doctor import examine

    findings = 0
    for finding in examine(arguments.path, arguments.split):
        findings += 1
        print(f"- {finding}", flush=True)
    print(f"{arguments.path}: {findings or 'no'} finding{'s' * (findings != 1)}")
    return 1 if findings else 0


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


parser = argparse.ArgumentParser(prog="python -m hf_genmod")
commands = parser.add_subparsers(required=True)
doctor = commands.add_parser("doctor", help="what is wrong with a data set, a run or a checkpoint, and what to do")
doctor.set_defaults(function=examine)
doctor.add_argument("path", help="a folder of pictures or parquet files, or the output_dir of a run")
doctor.add_argument("--split", default="train", help="split of the data set")
pushing = commands.add_parser("push", help="upload a checkpoint and its card to the Hub, and see that it loads there")
pushing.set_defaults(function=push)
pushing.add_argument("path", help="the output_dir of a run that is over")
pushing.add_argument("repo_id", help="the repository; without a slash it is your own")
pushing.add_argument("--license", help="licence of the model, such as mit; by default that of its card")
pushing.add_argument("--private", action="store_true", help="make the repository private, if there is none yet")
pushing.add_argument("--revision", help="the branch, which is made if there is none")
pushing.add_argument("--create_pr", action="store_true", help="open a pull request instead")
arguments = parser.parse_args()

with one_line_errors():
    status = arguments.function(arguments)
sys.exit(status)
