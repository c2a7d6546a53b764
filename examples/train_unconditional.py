# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Trains a diffusion model without labels by Algorithm 1 of Ho et al. 2020.

    hf_genmod train unconditional --dataset path/to/folder --max_train_minutes 30
"""

from hf_genmod import DenoisingObjective, Trainer, TrainingConfig, UnconditionalPipeline
from hf_genmod.drawing.grids import sample_rows
from hf_genmod.recipes.networks import ModelArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.recipes.run import run


def main(data: DataArguments, model: ModelArguments, config: TrainingConfig) -> Trainer:
    pictures, held_out = data.load(model.vae, config.horizontal_flip, max_shift=config.max_shift)
    unet = model.make_unet(pictures, seed=config.seed)
    scheduler = model.make_scheduler()
    sampler = model.make_sampler(scheduler, pictures)
    objective = DenoisingObjective(scheduler, weighting=model.weighting)

    def make_pipeline(unet):
        return UnconditionalPipeline(unet, sampler, pictures.vae, value_range=pictures.value_range)

    def draw_samples(pipeline):
        return sample_rows(pipeline)

    return Trainer(unet, objective, pictures, config, make_pipeline, draw_samples, held_out)


if __name__ == "__main__":
    run(main)
