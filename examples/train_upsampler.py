"""
Trains a diffusion model that makes small pictures larger, from large pictures alone.

    python examples/train_upsampler.py --dataset path/to/folder --resolution 64 --factor 4 --max_train_minutes 30
"""

import dataclasses
import math

from hf_genmod import DenoisingObjective, SuperResolutionPipeline, Trainer, TrainingConfig
from hf_genmod.drawing.grids import draw_enlarged
from hf_genmod.objectives.upsampling import ConditioningAugmentation
from hf_genmod.recipes.networks import DiffusionArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.recipes.run import run


@dataclasses.dataclass
class ConvolutionalArguments(DiffusionArguments):
    attention_levels: list[int] = dataclasses.field(
        default_factory=list,
        metadata={"help": "Levels with self-attention, from 0; by default none, for pictures of any size."},
    )


@dataclasses.dataclass
class UpsamplerArguments:
    factor: int = dataclasses.field(
        default=2, metadata={"help": "How many times higher and wider pictures become: 2, 4 or 8."}
    )
    crop_size: int | None = dataclasses.field(
        default=None, metadata={"help": "Size of the part of a picture that a step sees; by default 64, or the whole."}
    )
    max_noise_level: int = dataclasses.field(
        default=250, metadata={"help": "Most noise, in timesteps, that is put into the small pictures; 0 puts none."}
    )
    with_labels: bool = dataclasses.field(default=False, metadata={"help": "Tell the model the class of a picture."})
    condition_dropout: float = dataclasses.field(
        default=0.1, metadata={"help": "How often a label is left out, so that the model learns to do without."}
    )

    def small_pictures(self, scheduler, dataset, unet) -> ConditioningAugmentation:
        (height, width), least = dataset.resolution, math.lcm(self.factor, unet.size_factor)
        if self.factor not in (2, 4, 8):
            raise ValueError(f"factor: {self.factor} is not one of 2, 4, 8")
        if height % self.factor or width % self.factor:
            fitting = "x".join(str(-(-length // least) * least) for length in dataset.resolution)
            raise ValueError(f"factor: {self.factor} does not divide {height}x{width}; give --resolution {fitting}")
        crop_size = self.crop_size or (-(-64 // least) * least if min(height, width) > 64 else None)
        if crop_size and (crop_size % least or crop_size > min(height, width)):
            raise ValueError(f"crop_size: {crop_size} is not a multiple of {least} up to {min(height, width)}")
        return ConditioningAugmentation(scheduler, self.factor, self.max_noise_level, crop_size)


def main(
    data: DataArguments, model: ConvolutionalArguments, upsampler: UpsamplerArguments, config: TrainingConfig
) -> Trainer:
    dataset, held_out = data.load_in_pixels(require_labels=upsampler.with_labels)
    label_names = dataset.label_names if upsampler.with_labels else None
    unet = model.make_unet(
        dataset, label_names and len(label_names), config.seed, conditioning_channels=dataset.channels
    )
    scheduler = model.make_scheduler()
    sampler = model.make_sampler(scheduler, dataset)
    small = upsampler.small_pictures(scheduler, dataset, unet)
    return Trainer(
        unet,
        DenoisingObjective(scheduler, unet.null_label, model.weighting, upsampler.condition_dropout, small=small),
        dataset,
        config,
        make_pipeline=lambda unet: SuperResolutionPipeline(
            unet,
            sampler,
            id2label=label_names and dict(enumerate(label_names)),
            factor=small.factor,
            max_noise_level=small.max_noise_level,
            value_range=dataset.value_range,
        ),
        draw_samples=lambda pipeline: draw_enlarged(pipeline, held_out or dataset),
        validation_dataset=held_out,
    )


if __name__ == "__main__":
    run(main)
