"""`python -m hf_genmod doctor PATH`"""

import argparse
import sys

from hf_genmod.doctor import examine
from hf_genmod.recipe import one_line_errors

parser = argparse.ArgumentParser(prog="python -m hf_genmod")
commands = parser.add_subparsers(dest="command", required=True)
doctor = commands.add_parser("doctor", help="what is wrong with a data set, a run or a checkpoint, and what to do")
doctor.add_argument("path", help="a folder of pictures or parquet files, or the output_dir of a run")
doctor.add_argument("--split", default="train", help="split of the data set")
arguments = parser.parse_args()

with one_line_errors():
    findings = 0
    for finding in examine(arguments.path, arguments.split):
        findings += 1
        print(f"- {finding}", flush=True)
    print(f"{arguments.path}: {findings or 'no'} finding{'s' * (findings != 1)}")
sys.exit(1 if findings else 0)
