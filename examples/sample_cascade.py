# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Draws images with a cascade: a model draws small images, and one or more upsamplers enlarge them. Or enlarges images of
your own.

    hf_genmod enlarge --base runs/small --upsamplers runs/upsampler --class_labels cat dog --num 8
    hf_genmod enlarge mine.png --upsamplers runs/upsampler
"""

import dataclasses
from pathlib import Path

from PIL import Image
from sample import conditions
from transformers.hf_argparser import HfArg

from hf_genmod import load_pipeline
from hf_genmod.data.decoding import open_image
from hf_genmod.drawing.cascade import draw_cascade
from hf_genmod.drawing.grids import grid
from hf_genmod.errors import a_or_an, counted, one_line_errors, refuse_lfs_pointers
from hf_genmod.recipes.arguments import parse_arguments


@dataclasses.dataclass
class CascadeArguments:
    """Cascade."""

    upsamplers: list[str] = HfArg(
        help="Checkpoints of train_upsampler.py, folders or ids, in the order in which they enlarge."
    )
    base: str | None = HfArg(default=None, help="The model that draws small images: a folder, or an id on the Hub.")
    images: list[str] = HfArg(default_factory=list, help="Images of your own to enlarge, instead of those of a base.")
    class_labels: list[str] = HfArg(
        default_factory=list, help="Names or numbers of classes, --num images each. Default: all."
    )
    prompts: list[str] = HfArg(default_factory=list, help="Prompts, --num images each.")
    num: int = HfArg(default=8, help="Images of each class or prompt, or in all.")
    seed: int = HfArg(default=0, help="Seed of the first image; the next has seed + 1.")
    noise_level: int = HfArg(
        default=0, help="Noise added to the small images, in timesteps, so that upsamplers correct them."
    )
    num_inference_steps: int | None = HfArg(
        default=None, help="Steps of each model. Default: those of the model, or 20."
    )
    tile_size: int = HfArg(default=512, help="Size of the tiles that upsamplers work on.")
    output_dir: str = HfArg(default="runs/cascade", help="Folder of the images.")

    def __post_init__(self):
        if (self.base is None) == (not self.images):
            raise ValueError("base: give either a model that draws, or --images to enlarge")
        if self.num < 1:
            raise ValueError(f"num: {self.num} is not positive")


def opened(file: str) -> Image.Image:
    """The image in a file. Raises a `ValueError` if the file holds none, several or measured values."""
    if Path(file).is_dir():
        raise ValueError(f"images: {file} is a folder; give its files, such as {file}/*.png")
    refuse_lfs_pointers(file)
    try:
        image = open_image({"path": file, "bytes": None})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(image, Image.Image):
        raise ValueError(f"{file}: holds measured values; enlarge them in Python, by `pipe(image=...)`")
    return image


def requests(arguments: CascadeArguments, first) -> list[tuple[list[str], dict]]:
    """(names of images, arguments of the first model) for all images that are drawn together."""
    if arguments.images:
        names = [Path(file).stem for file in arguments.images]
        if len(set(names)) < len(names):
            raise ValueError("images: two of them have one name; enlarge them into separate folders")
        return [([name], {"image": [opened(file)]}) for name, file in zip(names, arguments.images, strict=True)]
    argument, names, values = conditions(first, arguments.class_labels, arguments.prompts)
    if argument is None:
        return [([str(i) for i in range(arguments.num)], {})]
    names = range(len(values)) if argument == "prompt" else names
    names = [f"{name}-{copy}".replace("/", "_") for name in names for copy in range(arguments.num)]
    return [(names, {argument: [value for value in values for _ in range(arguments.num)]})]


def main(arguments: CascadeArguments):
    stages = [load_pipeline(path) for path in ([arguments.base] if arguments.base else []) + arguments.upsamplers]
    for path, stage in zip(arguments.upsamplers, stages[-len(arguments.upsamplers) :], strict=True):
        if "image" not in stage.example_request():
            kind = a_or_an(type(stage).__name__)
            raise ValueError(f"{path}: {kind} does not enlarge; give what `train upsampler` made")
    seed, out = arguments.seed, Path(arguments.output_dir)
    asked = requests(arguments, stages[0])
    for number, (names, request) in enumerate(asked, 1):
        which = f" {names[0]}, {number} of {len(asked)}" if arguments.images else ""
        for stage in stages:
            what = "enlarging" if "image" in stage.example_request() else "drawing"
            stage.set_progress_bar_config(desc=f"{what}{which}")
        drawn = draw_cascade(
            stages,
            range(seed, seed + len(names)),
            arguments.noise_level,
            arguments.num_inference_steps,
            arguments.tile_size,
            all_stages=True,
            **request,
        )
        seed += len(names)
        out.mkdir(parents=True, exist_ok=True)
        for name, image in zip(names, drawn[-1], strict=True):
            image.save(file := out / f"{name}-{image.width}x{image.height}.png")
    if arguments.base:
        sizes = [f"{row[0].height}x{row[0].width}" for row in drawn]
        some = range(0, len(names), -(-len(names) // 8))  # of all classes or prompts
        shown = [[row[i] for i in some] for row in drawn]
        grid(shown, sizes, [str(names[i]) for i in some]).save(out / "stages.png")
        print(f"{counted(seed - arguments.seed, 'image')} in {out}, and stages.png")
    else:
        print(file if len(arguments.images) == 1 else f"{len(arguments.images)} images in {out}")


if __name__ == "__main__":
    with one_line_errors():
        main(*parse_arguments(CascadeArguments))
