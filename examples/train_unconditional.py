"""
Trains a diffusion model without labels by Algorithm 1 of Ho et al. 2020.

    python examples/train_unconditional.py --dataset path/to/folder --max_train_minutes 30
"""

from diffusers.utils import make_image_grid

from hf_genmod import DenoisingObjective, Trainer, TrainingConfig, UnconditionalPipeline
from hf_genmod.drawing.samples import draw_images
from hf_genmod.recipes.networks import ModelArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.recipes.run import run


def main(data: DataArguments, model: ModelArguments, config: TrainingConfig) -> Trainer:
    pictures, held_out = data.load(model.vae, config.horizontal_flip)
    unet = model.make_unet(pictures, seed=config.seed)
    scheduler = model.make_scheduler()
    sampler = model.make_sampler(scheduler, pictures)
    objective = DenoisingObjective(scheduler, weighting=model.weighting)

    def make_pipeline(unet):
        return UnconditionalPipeline(unet, sampler, pictures.vae, value_range=pictures.value_range)

    def draw_samples(pipeline):
        return make_image_grid(draw_images(pipeline, count=64), rows=8, cols=8)

    return Trainer(unet, objective, pictures, config, make_pipeline, draw_samples, held_out)


if __name__ == "__main__":
    run(main)
