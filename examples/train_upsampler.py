# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Trains a diffusion model that enlarges small images, from large images alone.

    hf_genmod train upsampler --dataset path/to/folder --resolution 64 --factor 4 --max_train_minutes 30
"""

import dataclasses
import functools

from transformers.hf_argparser import HfArg

from hf_genmod import DenoisingObjective, SuperResolutionPipeline, Trainer, TrainingConfig
from hf_genmod.drawing.grids import draw_enlarged
from hf_genmod.objectives.upsampling import ConditioningAugmentation
from hf_genmod.recipes.networks import DiffusionArguments
from hf_genmod.recipes.pictures import DataArguments, crop_size_for
from hf_genmod.recipes.run import run


@dataclasses.dataclass
class ConvolutionalArguments(DiffusionArguments):
    """U-Net and diffusion process."""

    attention_levels: list[int] = HfArg(
        default_factory=list, help="Levels with self-attention, from 0. Default: none, for images of any size."
    )


@dataclasses.dataclass
class UpsamplerArguments:
    """Upsampling."""

    factor: int = HfArg(default=2, help="Height of the images divided by that of the small images: 2, 4 or 8.")
    crop_size: int | None = HfArg(default=None, help="Side of a random crop in each step. Default: 64, or no crop.")
    max_noise_level: int = HfArg(default=250, help="Largest noise level of the small images, in timesteps.")
    with_labels: bool = HfArg(default=False, help="Condition the model on the class label, too.")
    condition_dropout: float = HfArg(default=0.1, help="Probability that a training step drops the label of an image.")


def main(data: DataArguments, model: ConvolutionalArguments, upsampler: UpsamplerArguments,
         config: TrainingConfig) -> Trainer:  # fmt: skip
    pictures, held_out = data.load(require_labels=upsampler.with_labels)
    names = pictures.label_names if upsampler.with_labels else []
    unet = model.make_unet(pictures, len(names) or None, config.seed, conditioning_channels=pictures.channels)
    process = model.make_scheduler()
    sampler = model.make_sampler(process, pictures)
    crop_size = crop_size_for(pictures.resolution, upsampler.factor, unet.size_factor, upsampler.crop_size)
    small = ConditioningAugmentation(process, upsampler.factor, upsampler.max_noise_level, crop_size)
    objective = DenoisingObjective(process, unet.null_label, model.weighting, upsampler.condition_dropout, small=small)

    def make_pipeline(unet):
        factors = upsampler.factor, upsampler.max_noise_level
        return SuperResolutionPipeline(unet, sampler, dict(enumerate(names)) or None, *factors, pictures.value_range)

    draw_samples = functools.partial(draw_enlarged, dataset=held_out or pictures.sample)
    return Trainer(unet, objective, pictures, config, make_pipeline, draw_samples, held_out)


if __name__ == "__main__":
    run(main)
