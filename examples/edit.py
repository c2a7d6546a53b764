# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Edits an image of yours with a trained model: variations of it, also as another class; a part of it drawn anew; or the
way from it to another one.

    hf_genmod edit runs/mine --image cat.png --class_labels dog --strength 0.6
    hf_genmod edit runs/mine --image cat.png --mask_image mask.png    # white is drawn anew
    hf_genmod edit runs/mine --image cat.png dog.png --class_labels cat dog --num 12 --output between.gif
"""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from sample import conditions
from transformers.hf_argparser import HfArg

from hf_genmod import load_pipeline
from hf_genmod.data.decoding import inspect, open_image
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.value_range import to_model_range
from hf_genmod.drawing.grids import grid, save_frames
from hf_genmod.drawing.samples import draw_images
from hf_genmod.editing.given import UNIT, read_mask
from hf_genmod.errors import counted, one_line_errors, refuse_lfs_pointers
from hf_genmod.processes import processes
from hf_genmod.recipes.arguments import parse_arguments


@dataclasses.dataclass
class EditArguments:
    """Editing."""

    model: str = HfArg(help="The checkpoint: the folder of its run, or its id on the Hub.")
    image: list[str] = HfArg(help="The file of an image, or of two: then what lies between them is drawn.")
    mask_image: str | None = HfArg(default=None, help="The file of a mask of the same size: white is drawn anew.")
    class_labels: list[str] = HfArg(
        default_factory=list, help="Names or numbers of classes; of two images, that of each."
    )
    prompts: list[str] = HfArg(default_factory=list, help="Prompts; of two images, that of each.")
    strength: float | None = HfArg(default=None, help="How much changes, in (0, 1]. Default: 0.6, and 1 with a mask.")
    num: int = HfArg(default=8, help="Images of each class or prompt, or in all.")
    num_inference_steps: int | None = HfArg(
        default=None, help="Steps of the sampler. Default: those of the model, or 50 between two images."
    )
    guidance_scale: float | None = HfArg(
        default=None, help="Strength of the guidance, γ or the s of a classifier. Default: that of the model."
    )
    autoguidance_scale: float | None = HfArg(
        default=None, help="Strength w of the guidance by an early version of the model. Default: that of the model."
    )
    fit: bool = HfArg(
        default=True, help="Scale and crop images of another size as the training did; false refuses them."
    )
    seed: int = HfArg(default=0, help="Seed of the first image; the next has seed + 1.")
    output: str = HfArg(default="edited.png", help="A picture of all images, or a .gif of two images.")

    def __post_init__(self):
        if self.num < 1:
            raise ValueError(f"num: {self.num} is not positive")
        if len(self.image) not in (1, 2):
            raise ValueError(f"image: {len(self.image)} of them; give one, or two")
        if len(self.image) == 2 and self.num < 2:
            raise ValueError(f"num: {self.num} is less than the two images; give 2 or more")
        if len(self.image) == 2 and (self.mask_image is not None or self.strength is not None):
            raise ValueError("image: two of them, and mask_image and strength are for one")
        if Image.registered_extensions().get(Path(self.output).suffix.lower()) not in Image.SAVE:
            raise ValueError(f"output: {self.output} is of no format that Pillow writes, such as .png")


def fitted(file: str, pipeline, fit: bool, channels: int | None = None) -> torch.Tensor:
    """The image in a file as the training reads it, (C, H, W), in [0, 1] or the units of the data."""
    refuse_lfs_pointers(file)
    resolution = pipeline.picture_shape[1:] if fit else None
    if channels is None and not pipeline.config.value_range:
        channels = pipeline.picture_shape[0]
    entries = [{"path": file, "bytes": None}]
    try:
        images = PictureDataset(entries, file, resolution, channels, in_memory=True).images
    except ValueError as error:  # without the remedies for a data set
        raise ValueError(str(error).rpartition("--on_bad_image skip: ")[2]) from error
    if images.dtype != torch.uint8:
        return images[0]
    if channels is None:
        raise ValueError(f"{file}: it has 8 bits, and this model was trained on measured values; give a file of them")
    return images[0] / 255


def fitted_mask(file: str, of_image: str, pipeline, fit: bool) -> torch.Tensor:
    """A mask of the size of the image in a file, cropped as that is."""
    redrawn = fitted(file, pipeline, fit, channels=1) > 0.5
    mask, upright = open_image({"path": file, "bytes": None}), inspect({"path": of_image, "bytes": None})
    read_mask(mask, (1, 1, upright.height, upright.width))  # refuses what is no mask for the image
    if redrawn.all() or not redrawn.any():
        level = "white" if redrawn.all() else "black"
        raise ValueError(f"mask_image: cropped with the image, {file} is {level} all over; crop both yourself")
    return redrawn


def psnr(image: Image.Image, expected: Image.Image) -> float:
    """The peak signal-to-noise ratio of an image, in dB."""
    error = np.subtract(*(np.asarray(x, np.float64) / 255 for x in (image, expected)))
    return -10 * math.log10(max(np.square(error).mean(), 1e-10))


def main(arguments: EditArguments):
    pipeline = load_pipeline(arguments.model).to(processes().device)
    pipeline.set_progress_bar_config(desc="drawing", disable=not processes().is_main_process)
    if not pipeline.denoises or "image" in pipeline.example_request():
        raise ValueError(f"{arguments.model}: {type(pipeline).__name__} does not edit; give a diffusion model")
    images = [fitted(file, pipeline, arguments.fit) for file in arguments.image]
    options = {}
    if arguments.num_inference_steps is not None:
        options["num_inference_steps"] = arguments.num_inference_steps
    if arguments.guidance_scale is not None:
        if not pipeline.guidance_argument:
            raise ValueError(f"guidance_scale: {type(pipeline).__name__} has no guidance; leave it out")
        options[pipeline.guidance_argument] = arguments.guidance_scale
    if arguments.autoguidance_scale is not None:
        options["autoguidance_scale"] = arguments.autoguidance_scale
    argument, names, values = conditions(pipeline, arguments.class_labels, arguments.prompts)
    if len(images) == 2 and not processes().is_main_process:
        return
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    if len(images) == 2:
        if argument == "class_labels" and not arguments.class_labels:
            raise ValueError("class_labels: say of which class the two images are; give one, or one for each")
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
            pipeline.config.process, timestep_spacing="trailing"
        )
        ends = [image.permute(1, 2, 0).numpy() for image in images]
        between = {argument: values} if argument else {}
        drawn = pipeline.interpolate(*ends, arguments.num, **between, **options).images
        save_frames(drawn, arguments.output)
        given = pipeline.postprocess(to_model_range(torch.stack(images), pipeline.config.value_range or UNIT))
        for file, expected, end in zip(arguments.image, given, (drawn[0], drawn[-1]), strict=True):
            if (likeness := psnr(end, expected)) < 25:
                remedy = "more --num_inference_steps, and no --guidance_scale, bring it closer"
                print(f"{file} does not come back ({likeness:.0f} dB, and 30 are close); {remedy}", file=sys.stderr)
        print(f"{counted(len(drawn), 'image')} in {arguments.output}")
        return
    if arguments.mask_image is not None:
        options["mask_image"] = fitted_mask(arguments.mask_image, arguments.image[0], pipeline, arguments.fit)
    if arguments.strength is not None:
        options["strength"] = arguments.strength
    given, rows = images[0][None], []
    for value in values or [None]:
        request = {argument: [value] * arguments.num} if argument else {}
        drawn = draw_images(pipeline, request, arguments.num, arguments.seed, image=given, **options)
        rows.append([*pipeline.postprocess(to_model_range(given, pipeline.config.value_range or UNIT)), *drawn])
    if not processes().is_main_process:
        return
    grid(rows, names, ["given"]).save(arguments.output)
    print(f"{counted(arguments.num * len(rows), 'image')} in {arguments.output}, beside the one that was given")


if __name__ == "__main__":
    with one_line_errors((ValueError, OSError, RuntimeError)):
        main(*parse_arguments(EditArguments))
