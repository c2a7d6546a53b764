"""
Trains a diffusion model without labels by Algorithm 1 of Ho et al. 2020.

    accelerate launch examples/train_unconditional.py --dataset path/to/folder --max_train_minutes 30
"""

import dataclasses

import torch
from diffusers.utils import make_image_grid

from hf_genmod import DenoisingObjective, Trainer, TrainingConfig, UnconditionalPipeline
from hf_genmod.recipe import DataArguments, ModelArguments, one_line_errors, parse_arguments


def draw_samples(pipeline):
    return make_image_grid(pipeline(64, generator=torch.Generator().manual_seed(0)).images, rows=8, cols=8)


with one_line_errors():
    data, model, config = parse_arguments(DataArguments, ModelArguments, TrainingConfig)
    dataset = data.load()
    unet = model.make_unet(dataset, seed=config.seed)
    scheduler = model.make_scheduler()
    sampler = model.make_sampler(scheduler, dataset)
    trainer = Trainer(
        unet,
        DenoisingObjective(scheduler, weighting=model.weighting),
        dataset,
        config,
        make_pipeline=lambda unet: UnconditionalPipeline(unet, sampler),
        draw_samples=draw_samples,
        description={"data": dataclasses.asdict(data), "model": dataclasses.asdict(model)},
    )

trainer.train()
