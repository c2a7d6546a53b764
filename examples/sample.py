# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Draws images with a trained model, into one picture or a folder.

    hf_genmod sample runs/mine --class_labels cat dog --num 16 --output grid.png
"""

import dataclasses
import math
import re
import sys
from pathlib import Path

from PIL import Image
from transformers.hf_argparser import HfArg

from hf_genmod import load_pipeline
from hf_genmod.drawing.grids import grid, in_rows
from hf_genmod.drawing.samples import draw_images
from hf_genmod.errors import a_or_an, counted, one_line_errors
from hf_genmod.processes import processes
from hf_genmod.recipes.arguments import parse_arguments
from hf_genmod.training.text_encoder import VOCAB_SIZE


@dataclasses.dataclass
class SampleArguments:
    """Samples."""

    model: str = HfArg(help="The checkpoint: the folder of its run, or its id on the Hub.")
    adapter: str | None = HfArg(default=None, help="An adapter for the model: the folder of its run, or its id.")
    class_labels: list[str] = HfArg(
        default_factory=list, help="Names or numbers of classes, --num images each. Default: all."
    )
    prompts: list[str] = HfArg(default_factory=list, help="Prompts, --num images each.")
    num: int = HfArg(default=8, help="Images of each class or prompt, or in all.")
    seed: int = HfArg(default=0, help="Seed of the first image; the next has seed + 1.")
    num_inference_steps: int | None = HfArg(
        default=None, help="Steps of the sampler. Default: those of the model, or 20."
    )
    guidance_scale: float | None = HfArg(
        default=None, help="Strength of the guidance, γ or the s of a classifier. Default: that of the model."
    )
    autoguidance_scale: float | None = HfArg(
        default=None, help="Strength w of the guidance by an early version of the model. Default: that of the model."
    )
    output: str = HfArg(default="samples.png", help="A picture of all images, or a folder for a file of each.")

    def __post_init__(self):
        if self.num < 1:
            raise ValueError(f"num: {self.num} is not positive")
        output = Path(self.output)
        if output.suffix and Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
            raise ValueError(f"output: {output} is neither a folder nor of a format that Pillow writes, such as .png")
        if not output.suffix and output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"output: {output} exists; give a new folder, or a picture such as {output}.png")


def conditions(pipeline, class_labels: list[str], prompts: list[str]) -> tuple[str | None, list[str], list]:
    """The argument of the pipeline that says what to draw, if it has one, the names of its values, and the values."""
    request = pipeline.example_request()
    takes = next((name for name in ("prompt", "class_labels") if name in request), None)
    given = [name for name, values in (("class_labels", class_labels), ("prompt", prompts)) if values]
    if given not in ([], [takes]) or (takes == "prompt" and not given):
        wanted = {
            "prompt": "--prompts",
            "class_labels": "--class_labels",
            None: "neither --class_labels nor --prompts",
        }
        raise ValueError(f"the model, {a_or_an(type(pipeline).__name__)}, takes {wanted[takes]}")
    if takes == "prompt":
        if unknown := unknown_words(pipeline.tokenizer, prompts):
            print(f"no caption of the training had {', '.join(unknown)}; the model does not know it", file=sys.stderr)
        return takes, prompts, prompts
    if takes is None:
        return takes, [""], []
    given = class_labels or list(pipeline.labels) or [*map(str, range(pipeline.num_classes))]
    alike = [[name for name in pipeline.labels if name.casefold() == text.casefold()] for text in given]
    given = [names[0] if len(names) == 1 else text for text, names in zip(given, alike, strict=True)]
    are_numbers = bool(pipeline.labels) and all(name.isdecimal() for name in pipeline.labels)  # the names of classes
    values = [x if x in pipeline.labels or are_numbers or not x.isdecimal() else int(x) for x in given]
    name_of = {label: name for name, label in pipeline.labels.items()}
    return takes, [str(name_of.get(value, value)) for value in values], values


def unknown_words(tokenizer, prompts: list[str]) -> list[str]:
    """Words that no caption of the training had, if the tokenizer is of `train_tokenizer` and has a token for each
    word."""
    if len(tokenizer) >= VOCAB_SIZE:
        return []
    unknown = {}
    for prompt in prompts:
        tokens = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        for word in re.finditer(r"[^\W_]+", prompt):
            if not any(start <= word.start() and word.end() <= end for start, end in tokens):
                unknown[word.group()] = True
    return list(unknown)


def main(arguments: SampleArguments):
    pipeline = load_pipeline(arguments.model).to(processes().device)
    pipeline.set_progress_bar_config(desc="drawing", disable=not processes().is_main_process)
    if arguments.adapter is not None:
        pipeline.load_lora_weights(arguments.adapter)
    if "image" in pipeline.example_request():
        raise ValueError(f"{arguments.model}: this model enlarges images; give it some by `hf_genmod enlarge`")
    argument, names, values = conditions(pipeline, arguments.class_labels, arguments.prompts)
    options = {}
    if arguments.num_inference_steps is not None and pipeline.denoises:
        options["num_inference_steps"] = arguments.num_inference_steps
    if arguments.guidance_scale is not None:
        if not pipeline.guidance_argument:
            kind = a_or_an(type(pipeline).__name__)
            raise ValueError(f"guidance_scale: the model, {kind}, has no guidance; leave it out")
        options[pipeline.guidance_argument] = arguments.guidance_scale
    if arguments.autoguidance_scale is not None and pipeline.denoises:
        options["autoguidance_scale"] = arguments.autoguidance_scale
    request = {argument: [value for value in values for _ in range(arguments.num)]} if argument else {}
    images = draw_images(pipeline, request, arguments.num, arguments.seed, **options)
    if not processes().is_main_process:
        return
    rows, output = in_rows(images, arguments.num), Path(arguments.output)
    if output.suffix:
        output.parent.mkdir(parents=True, exist_ok=True)
        width = 16 if argument or arguments.num <= 8 else min(16, math.ceil(arguments.num**0.5))
        columns = [in_rows(row, width) for row in rows]
        texts = [text for name, parts in zip(names, columns, strict=True) for text in [name] + [""] * (len(parts) - 1)]
        grid([part for parts in columns for part in parts], texts).save(output)
    else:
        output.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            name = re.sub(r"[^\w.-]+", "-", names[i // arguments.num])[:60]
            image.save(output / f"{name}-{arguments.seed + i}.png".removeprefix("-"))
    print(f"{counted(len(images), 'image')} in {output}")


if __name__ == "__main__":
    with one_line_errors((ValueError, OSError, RuntimeError)):  # the last one from another process
        main(*parse_arguments(SampleArguments))
