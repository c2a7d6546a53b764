# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Trains a classifier of noisy images to guide a diffusion model. The checkpoint holds both.

    hf_genmod train classifier --for_model runs/model --dataset path/to/folder --max_train_minutes 4
"""

import dataclasses
from pathlib import Path

from transformers.hf_argparser import HfArg

from hf_genmod import ClassifierGuidedPipeline, NoisyClassificationObjective, Trainer, TrainingConfig, load_pipeline
from hf_genmod.data.encoding import weights_fingerprint
from hf_genmod.drawing.grids import class_rows
from hf_genmod.evaluation.recognition import report_accuracy
from hf_genmod.recipes.networks import NetworkArguments, sampler_with_classifier
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.recipes.run import run
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler


@dataclasses.dataclass
class ClassifierArguments:
    """Diffusion model and guidance."""

    for_model: str = HfArg(
        help="Diffusion model to guide: the folder of its run, or its id.", metadata={"built_on": "diffusion model"}
    )
    classifier_scale: float = HfArg(default=2.0, help="Guidance scale s of the samples drawn during training.")


def main(
    data: DataArguments, guidance: ClassifierArguments, network: NetworkArguments, config: TrainingConfig
) -> Trainer:
    model = load_pipeline(guidance.for_model)
    pictures, held_out = data.training_pictures_for(
        model, config.horizontal_flip, hold_out=True, max_shift=config.max_shift, require_labels=True
    )
    scheduler = AncestralDDPMScheduler.from_config(model.scheduler.config)
    sampler = sampler_with_classifier(model.scheduler)
    classifier = network.make_classifier(pictures, scheduler, config.seed)
    objective = NoisyClassificationObjective(scheduler)

    def make_pipeline(classifier):
        parts = model.unet, classifier, sampler, pictures.vae, dict(enumerate(pictures.label_names))
        return ClassifierGuidedPipeline(*parts, pictures.value_range).to(classifier.device)

    def draw_samples(pipeline):
        return class_rows(pipeline, classifier_scale=guidance.classifier_scale)

    def finish(pipeline):
        report_accuracy(pipeline.classifier, scheduler, held_out, Path(config.output_dir, "accuracy.png"))

    at_end = {"finish": finish, "depends_on": {"unet": weights_fingerprint(model.unet)}}
    return Trainer(classifier, objective, pictures, config, make_pipeline, draw_samples, held_out, **at_end)


if __name__ == "__main__":
    run(main)
