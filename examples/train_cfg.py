# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Trains a class-conditional diffusion model with classifier-free guidance on labelled images.

    hf_genmod train cfg --dataset path/to/folder --max_train_minutes 30
"""

from hf_genmod import ClassifierFreeGuidedPipeline, DenoisingObjective, Trainer, TrainingConfig
from hf_genmod.drawing.grids import class_rows
from hf_genmod.recipes.arguments import GuidanceArguments
from hf_genmod.recipes.networks import ModelArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.recipes.run import run


def main(data: DataArguments, model: ModelArguments, guidance: GuidanceArguments, config: TrainingConfig) -> Trainer:
    pictures, held_out = data.load(model.vae, config.horizontal_flip, max_shift=config.max_shift, require_labels=True)
    return make_trainer(pictures, held_out, model, guidance, config)


def make_trainer(
    pictures, held_out, model: ModelArguments, guidance: GuidanceArguments, config: TrainingConfig
) -> Trainer:
    unet = model.make_unet(pictures, len(pictures.label_names), config.seed)
    scheduler = model.make_scheduler()
    sampler = model.make_sampler(scheduler, pictures)
    objective = DenoisingObjective(scheduler, unet.null_label, model.weighting, guidance.condition_dropout)

    def make_pipeline(unet):
        id2label = dict(enumerate(pictures.label_names))
        return ClassifierFreeGuidedPipeline(unet, sampler, pictures.vae, id2label, pictures.value_range)

    def draw_samples(pipeline):
        return class_rows(pipeline, guidance_scale=guidance.guidance_scale)

    return Trainer(unet, objective, pictures, config, make_pipeline, draw_samples, held_out)


if __name__ == "__main__":
    run(main)
