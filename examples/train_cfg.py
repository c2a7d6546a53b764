"""
Trains a class-conditional diffusion model with classifier-free guidance on labelled pictures.

    python examples/train_cfg.py --dataset path/to/folder --max_train_minutes 30
"""

import dataclasses

from hf_genmod import ClassifierFreeGuidedPipeline, DenoisingObjective, Trainer, TrainingConfig
from hf_genmod.drawing.grids import class_rows
from hf_genmod.recipes.networks import ModelArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.recipes.run import run


@dataclasses.dataclass
class GuidanceArguments:
    condition_dropout: float = dataclasses.field(
        default=0.1, metadata={"help": "How often a label is left out, so that the model learns to do without."}
    )
    guidance_scale: float = dataclasses.field(default=2.0, metadata={"help": "γ of the samples drawn while training."})


def main(data: DataArguments, model: ModelArguments, guidance: GuidanceArguments, config: TrainingConfig) -> Trainer:
    dataset, held_out = data.load(require_labels=True, vae=model.vae, mirrored=config.horizontal_flip)
    unet = model.make_unet(dataset, num_classes=len(dataset.label_names), seed=config.seed)
    scheduler = model.make_scheduler()
    sampler = model.make_sampler(scheduler, dataset)
    objective = DenoisingObjective(scheduler, unet.null_label, model.weighting, guidance.condition_dropout)
    return Trainer(
        unet,
        objective,
        dataset,
        config,
        make_pipeline=lambda unet: ClassifierFreeGuidedPipeline(
            unet, sampler, dataset.vae, id2label=dict(enumerate(dataset.label_names)), value_range=dataset.value_range
        ),
        draw_samples=lambda pipeline: class_rows(pipeline, guidance_scale=guidance.guidance_scale),
        validation_dataset=held_out,
    )


if __name__ == "__main__":
    run(main)
