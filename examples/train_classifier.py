"""
Trains a classifier of noisy pictures for a diffusion model, which it then guides; the result is a checkpoint of both.

    python examples/train_classifier.py --for_model runs/model --dataset path/to/folder --max_train_minutes 4
"""

import dataclasses
from pathlib import Path

from diffusers import DPMSolverMultistepScheduler

from hf_genmod import ClassifierGuidedPipeline, NoisyClassificationObjective, Trainer, TrainingConfig, load_pipeline
from hf_genmod.data.encoding import weights_fingerprint
from hf_genmod.drawing.grids import class_rows
from hf_genmod.evaluation.recognition import report_accuracy
from hf_genmod.recipes.networks import NetworkArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.recipes.run import run
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler


@dataclasses.dataclass
class GuidanceArguments:
    for_model: str = dataclasses.field(
        metadata={"help": "The diffusion model: the folder of its run, or its id.", "built_on": "diffusion model"}
    )
    classifier_scale: float = dataclasses.field(
        default=2.0, metadata={"help": "Strength s of the guidance of the samples drawn while training."}
    )


def main(
    data: DataArguments, guidance: GuidanceArguments, network: NetworkArguments, config: TrainingConfig
) -> Trainer:
    model = load_pipeline(guidance.for_model)
    dataset, held_out = data.load_for(model, mirrored=config.horizontal_flip)
    scheduler = AncestralDDPMScheduler.from_config(model.scheduler.config)
    # Guided steps of second order overshoot.
    few_steps = isinstance(model.scheduler, FewStepDDPMScheduler)
    sampler = (DPMSolverMultistepScheduler if few_steps else type(model.scheduler)).from_config(
        model.scheduler.config, algorithm_type="sde-dpmsolver++", solver_order=1, use_lu_lambdas=few_steps
    )
    classifier = network.make_classifier(dataset, scheduler, seed=config.seed)
    return Trainer(
        classifier,
        NoisyClassificationObjective(scheduler),
        dataset,
        config,
        make_pipeline=lambda classifier: ClassifierGuidedPipeline(
            model.unet,
            classifier,
            sampler,
            dataset.vae,
            id2label=dict(enumerate(dataset.label_names)),
            value_range=dataset.value_range,
        ).to(classifier.device),
        draw_samples=lambda pipeline: class_rows(pipeline, classifier_scale=guidance.classifier_scale),
        validation_dataset=held_out,
        finish=lambda pipeline: report_accuracy(
            pipeline.classifier, scheduler, held_out, Path(config.output_dir) / "accuracy.png"
        ),
        depends_on={"unet": weights_fingerprint(model.unet)},
    )


if __name__ == "__main__":
    run(main)
