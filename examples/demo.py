# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Samples a model of `train_cfg.py` on the embedded shapes, and checks every image.

    python examples/demo.py --model runs/shapes
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from hf_genmod.data.shapes import check_name
from hf_genmod.data.shapes_checker import matches
from hf_genmod.drawing.grids import grid, in_rows
from hf_genmod.errors import a_or_an, one_line_errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/shapes", help="Folder of the checkpoint.")
    parser.add_argument("--samples_per_class", type=int, default=25, help="Images of each class.")
    parser.add_argument(
        "--guidance_scale", type=float, default=2.0, help="Guidance scale γ of classifier-free guidance."
    )
    arguments = parser.parse_args()
    if arguments.samples_per_class < 1:
        raise ValueError(f"samples_per_class: {arguments.samples_per_class} is not positive")
    if not Path(arguments.model, "model_index.json").is_file():
        raise ValueError(f"model: {arguments.model} holds no checkpoint; `make demo` trains one")

    pipe = DiffusionPipeline.from_pretrained(arguments.model, trust_remote_code=True)
    if torch.accelerator.is_available():
        pipe.to(torch.accelerator.current_accelerator())
    num_columns = min(8, arguments.samples_per_class)
    names = list(getattr(pipe, "labels", ()))
    if not names or pipe.guidance_argument != "guidance_scale":
        kind = a_or_an(type(pipe).__name__)
        raise ValueError(f"model: {kind} of {len(names)} classes; give one that train_cfg.py trained")
    for name in names:
        check_name("model", name)
    right, rows = 0, []
    for name in names:
        generator = torch.Generator().manual_seed(pipe.labels[name])
        images = pipe(
            [name] * arguments.samples_per_class, guidance_scale=arguments.guidance_scale, generator=generator
        ).images
        right += sum(matches(image, name) for image in images)
        rows += images[:num_columns]

    file = Path(arguments.model) / "samples" / "classes.png"
    file.parent.mkdir(exist_ok=True)
    grid(in_rows(rows, num_columns), names).save(file)
    total = len(names) * arguments.samples_per_class
    print(
        f"{right} of {total} samples ({right / total:.1%}) show the shape asked for, by the data set's exact checker"
    )
    print(f"one row for each class: {file}")
    print("to load the model, with this package installed or not:")
    print(f'    DiffusionPipeline.from_pretrained("{arguments.model}", trust_remote_code=True)')


if __name__ == "__main__":
    with one_line_errors():
        main()
