# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Trains an autoencoder on images by their reconstruction.

    hf_genmod train autoencoder --dataset path/to/folder --max_train_minutes 10
"""

import dataclasses

from transformers.hf_argparser import HfArg

from hf_genmod import Autoencoder, AutoencoderPipeline, ReconstructionObjective, Trainer, TrainingConfig
from hf_genmod.data.latents import with_statistics
from hf_genmod.drawing.grids import draw_reconstructions
from hf_genmod.recipes.networks import AutoencoderArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.recipes.run import run


@dataclasses.dataclass
class ReconstructionArguments:
    """Reconstruction."""

    loss: str = HfArg(default="mse", help="Loss of the pixels: 'mse' or 'l1'.")
    mask: float = HfArg(default=0.0, help="Share of each image that is masked for the encoder, for better features.")


def main(
    data: DataArguments,
    autoencoder: AutoencoderArguments,
    reconstruction: ReconstructionArguments,
    config: TrainingConfig,
) -> Trainer:
    pictures, held_out = data.load()
    model = autoencoder.make_autoencoder(Autoencoder, pictures, config.seed)
    objective = ReconstructionObjective(reconstruction.loss, mask=reconstruction.mask)

    def make_pipeline(model):
        return AutoencoderPipeline(model, pictures.value_range)

    def draw_samples(pipeline):
        pipeline.register_modules(vae=with_statistics(pipeline.vae, pictures.sample))
        return draw_reconstructions(pipeline, held_out or pictures.sample, prior="fitted")

    def save(pipeline, folder):
        pipeline.register_modules(vae=with_statistics(pipeline.vae, pictures.sample))
        pipeline.save_pretrained(folder)

    return Trainer(model, objective, pictures, config, make_pipeline, draw_samples, held_out, save)


if __name__ == "__main__":
    run(main)
