# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Evaluates a checkpoint on the data set that it was trained on: draws samples, compares them with the training images,
and writes `evaluation.json`, figures, and the card of the model. An interrupted command continues where it was.

    hf_genmod evaluate runs/mine --guidance_scales 1 2 3 --license mit
    hf_genmod evaluate runs/mine --sweep --adopt    # finds the best way to draw, and makes it the default
"""

import dataclasses
from pathlib import Path

from transformers.hf_argparser import HfArg

from hf_genmod import load_pipeline
from hf_genmod.errors import one_line_errors
from hf_genmod.evaluation.config import EvaluationConfig
from hf_genmod.evaluation.evaluate import evaluate
from hf_genmod.recipes.arguments import parse_arguments
from hf_genmod.recipes.pictures import MeasuredDataArguments
from hf_genmod.sharing.adopting import adopt
from hf_genmod.sharing.model_card import check_license, license_of, write_card


@dataclasses.dataclass
class EvaluationArguments:
    """Checkpoint and report."""

    model: str = HfArg(help="The checkpoint: the folder of its run, or its id on the Hub.")
    output_dir: str | None = HfArg(
        default=None, help="Folder of the report. Default: `evaluation` in the folder of the model."
    )
    license: str | None = HfArg(
        default=None, help="Licence of the model, for its card. Default: that of the existing card."
    )
    adopt: bool = HfArg(
        default=False, help="Write what --sweep chose into the checkpoint: its sampler, steps and guidance by default."
    )


def main(data: MeasuredDataArguments, config: EvaluationConfig, arguments: EvaluationArguments):
    folder = Path(arguments.model)
    if arguments.adopt and not config.sweep:
        raise ValueError("adopt: it writes what --sweep chose; give --sweep, too")
    if arguments.adopt and not folder.is_dir():
        raise ValueError(f"adopt: {folder} is no folder here; download it by `hf download`, and give its folder")
    pipeline = load_pipeline(arguments.model)
    if not folder.is_dir() and (arguments.output_dir is None or arguments.license is not None):
        raise ValueError("output_dir: the model is not a local folder; give a folder for its report, and no licence")
    writes_card = folder.is_dir() and arguments.output_dir is None
    if arguments.license is not None:
        check_license(arguments.license)
    elif writes_card and (folder / "README.md").is_file():
        license_of(folder)
    else:
        writes_card = False
    output_dir = arguments.output_dir or folder / "evaluation"
    pictures, held_out = data.of_run(arguments.model).evaluation_pictures(pipeline)
    report = evaluate(pipeline, pictures, held_out, output_dir, config, arguments.model)
    if report:  # on the first process
        closest = "; closest_*.png shows the closest samples" if any(Path(output_dir).glob("closest_*.png")) else ""
        print(f"{report}\n{output_dir}/evaluation.json holds all of it{closest}")
        if arguments.adopt:
            adopt(folder, pipeline, report)
            print(f"{folder} draws by the setting that the sweep chose, by default")
        elif config.sweep and folder.is_dir():
            print("the same command with --adopt makes the setting that the sweep chose the default of the model")
        if writes_card:
            write_card(folder, arguments.license)
            print(f"{folder}/README.md is the card with these measures\n\nNext:\n\n    hf_genmod push {folder} NAME")
        elif folder.is_dir():
            print("\nNext: give --license LICENCE for a card with these measures, which `hf_genmod push` shares")


if __name__ == "__main__":
    with one_line_errors(goes_on=True):
        main(*parse_arguments(MeasuredDataArguments, EvaluationConfig, EvaluationArguments))
