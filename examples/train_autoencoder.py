"""
Trains an autoencoder on pictures, by their reconstruction.

    python examples/train_autoencoder.py --dataset path/to/folder --max_train_minutes 10
"""

import dataclasses

from hf_genmod import Autoencoder, AutoencoderPipeline, ReconstructionObjective, Trainer, TrainingConfig
from hf_genmod.data.latents import with_statistics
from hf_genmod.drawing.grids import draw_reconstructions
from hf_genmod.recipes.networks import AutoencoderArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.recipes.run import run


@dataclasses.dataclass
class ReconstructionArguments:
    loss: str = dataclasses.field(default="mse", metadata={"help": "Of the pixels: 'mse' or 'l1'."})
    mask: float = dataclasses.field(
        default=0.0,
        metadata={"help": "Part of each picture that the encoder does not see, for better features."},
    )


def main(
    data: DataArguments,
    autoencoder: AutoencoderArguments,
    reconstruction: ReconstructionArguments,
    config: TrainingConfig,
) -> Trainer:
    dataset, held_out = data.load()
    return Trainer(
        autoencoder.make_autoencoder(Autoencoder, dataset, config.seed),
        ReconstructionObjective(reconstruction.loss, mask=reconstruction.mask),
        dataset,
        config,
        make_pipeline=lambda model: AutoencoderPipeline(with_statistics(model, dataset), dataset.value_range),
        load=AutoencoderPipeline.from_pretrained,
        draw_samples=lambda pipeline: draw_reconstructions(pipeline, held_out or dataset, prior="fitted"),
        validation_dataset=held_out,
    )


if __name__ == "__main__":
    run(main)
