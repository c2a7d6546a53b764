"""
Latent diffusion in one command: a variational autoencoder, then a class-conditional model of its latents.

    python examples/train_latent_cfg.py --dataset path/to/class_folders --resolution 64 --max_train_minutes 60
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from hf_genmod import (
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    DenoisingObjective,
    ElboObjective,
    Trainer,
    TrainingConfig,
    VariationalAutoencoder,
)
from hf_genmod.data.latents import with_statistics
from hf_genmod.drawing.grids import class_rows, draw_reconstructions
from hf_genmod.recipes.networks import AutoencoderArguments, ModelArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.recipes.run import run


@dataclasses.dataclass
class LatentArguments:
    autoencoder_share: float = dataclasses.field(
        default=0.4, metadata={"help": "Part of the budget for the autoencoder, unless one is given by --vae."}
    )
    latent_batch_size: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Pictures per step of the second stage, by the square root of whose ratio to batch_size the "
            "learning rate is multiplied; by default four times as many for latents of up to 4x4, else as many."
        },
    )
    condition_dropout: float = dataclasses.field(
        default=0.1, metadata={"help": "How often a label is left out, so that the model learns to do without."}
    )
    guidance_scale: float = dataclasses.field(default=2.0, metadata={"help": "γ of the samples drawn while training."})

    def __post_init__(self):
        if not 0 < self.autoencoder_share < 1:
            raise ValueError(f"autoencoder_share: {self.autoencoder_share} is not between 0 and 1")
        if self.latent_batch_size is not None and self.latent_batch_size < 1:
            raise ValueError(f"latent_batch_size: {self.latent_batch_size} is not positive")


def part_of(config: TrainingConfig, share: float, output_dir: str) -> TrainingConfig:
    """The settings of a run with a share of the budget."""
    steps, minutes = config.max_train_steps, config.max_train_minutes
    budget = {"max_train_steps": max(1, round(share * steps))} if steps else {"max_train_minutes": share * minutes}
    return dataclasses.replace(config, output_dir=output_dir, **budget)


def of_latents(config: TrainingConfig, latents, batch_size: int | None) -> TrainingConfig:
    """The settings of a run on latents."""
    if batch_size is None:
        batch_size = config.batch_size * (4 if max(latents.resolution) <= 4 else 1)
    learning_rate = config.learning_rate * math.sqrt(batch_size / config.batch_size)
    return dataclasses.replace(config, batch_size=batch_size, learning_rate=learning_rate)


def check_second_stage(vae, dataset, model: ModelArguments, latent: LatentArguments):
    """Raises now what would otherwise be raised after the first."""
    channels, *resolution = vae.latent_shape(*dataset.resolution)
    latents = SimpleNamespace(vae=vae, channels=channels, resolution=tuple(resolution))
    unet = model.make_unet(latents, num_classes=len(dataset.label_names))
    DenoisingObjective(model.make_scheduler(), unet.null_label, model.weighting, latent.condition_dropout)


def autoencoder_trainer(data, autoencoder, model, latent, config: TrainingConfig) -> Trainer:
    dataset, held_out = data.load(require_labels=True)
    vae = autoencoder.make_autoencoder(VariationalAutoencoder, dataset, config.seed)
    check_second_stage(vae, dataset, model, latent)
    return Trainer(
        vae,
        ElboObjective(),
        dataset,
        config,
        make_pipeline=lambda vae: AutoencoderPipeline(with_statistics(vae, dataset), dataset.value_range),
        load=AutoencoderPipeline.from_pretrained,
        draw_samples=lambda pipeline: draw_reconstructions(pipeline, held_out or dataset, prior="standard"),
        validation_dataset=held_out,
    )


def main(
    data: DataArguments,
    autoencoder: AutoencoderArguments,
    model: ModelArguments,
    latent: LatentArguments,
    config: TrainingConfig,
) -> Iterator[tuple]:
    if model.vae is None:
        model.vae = f"{Path(config.output_dir)}-vae"
        trainer = autoencoder_trainer(
            data, autoencoder, model, latent, part_of(config, latent.autoencoder_share, model.vae)
        )
        yield trainer, data, autoencoder
        trainer.accelerator.print(f"{model.vae} is the checkpoint of the autoencoder")
        config = part_of(config, 1 - latent.autoencoder_share, config.output_dir)
        config = dataclasses.replace(config, max_shift=0)  # which was for the pictures of the autoencoder

    latents, held_out = data.load(require_labels=True, vae=model.vae, mirrored=config.horizontal_flip)
    config = of_latents(config, latents, latent.latent_batch_size)
    latent.latent_batch_size = config.batch_size  # so that the run's own settings make the same run
    unet = model.make_unet(latents, num_classes=len(latents.label_names), seed=config.seed)
    scheduler = model.make_scheduler()
    sampler = model.make_sampler(scheduler, latents)
    trainer = Trainer(
        unet,
        DenoisingObjective(scheduler, unet.null_label, model.weighting, latent.condition_dropout),
        latents,
        config,
        make_pipeline=lambda unet: ClassifierFreeGuidedPipeline(
            unet, sampler, latents.vae, id2label=dict(enumerate(latents.label_names)), value_range=latents.value_range
        ),
        draw_samples=lambda pipeline: class_rows(pipeline, guidance_scale=latent.guidance_scale),
        validation_dataset=held_out,
    )
    yield trainer, data, model, latent
    trainer.accelerator.print(f"{config.output_dir} is the checkpoint of the whole")


if __name__ == "__main__":
    run(main)
