# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Latent diffusion in one command: a variational autoencoder, then a class-conditional model of its latents.

    hf_genmod train latent-cfg --dataset path/to/class_folders --resolution 64 --max_train_minutes 60
"""

import dataclasses
import math
from pathlib import Path

import train_cfg
import train_vae
from transformers.hf_argparser import HfArg

from hf_genmod import DenoisingObjective, TrainingConfig
from hf_genmod.recipes.arguments import GuidanceArguments
from hf_genmod.recipes.networks import AutoencoderArguments, ModelArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.recipes.run import run


@dataclasses.dataclass
class LatentArguments(GuidanceArguments):
    """Stages, conditioning and guidance."""

    autoencoder_share: float = HfArg(default=0.4, help="Share of the budget for the autoencoder, without --vae.")
    latent_batch_size: int | None = HfArg(default=None, help="Default: batch_size, times 4 for latents up to 4x4.")

    def __post_init__(self):
        if not 0 < self.autoencoder_share < 1:
            raise ValueError(f"autoencoder_share: {self.autoencoder_share} is not between 0 and 1")
        if self.latent_batch_size is not None and self.latent_batch_size < 1:
            raise ValueError(f"latent_batch_size: {self.latent_batch_size} is not positive")


def main(data: DataArguments, autoencoder: AutoencoderArguments, model: ModelArguments, latent: LatentArguments,
         config: TrainingConfig):  # fmt: skip
    if model.vae is None:
        model.vae = f"{Path(config.output_dir)}-vae"
        first = config.part(latent.autoencoder_share, output_dir=model.vae, guiding_fraction=0.0)
        images = dataclasses.replace(data, cache_latents=False)
        trainer = train_vae.main(images, autoencoder, train_vae.ElboArguments(), first)
        pictures = trainer.dataset
        if pictures.labels is None:
            images.load(require_labels=True)  # raises, with the reason
        # These raise now instead of after the first stage.
        channels, *resolution = trainer.averaged_model.module.latent_shape(*pictures.resolution)
        unet = model.make_unet_of_size(channels, resolution, True, len(pictures.label_names))
        DenoisingObjective(model.make_scheduler(), unet.null_label, model.weighting, latent.condition_dropout)
        trainer.monitor.say("stage 1 of 2: the autoencoder")
        yield trainer, data, autoencoder
        config = config.part(1 - latent.autoencoder_share, max_shift=0)  # of the images, which the autoencoder sees
        trainer.monitor.say("stage 2 of 2: the model of its latents")
    latents, held_out = data.load(model.vae, config.horizontal_flip, max_shift=config.max_shift, require_labels=True)
    batch_size = latent.latent_batch_size or config.batch_size * (4 if max(latents.resolution) <= 4 else 1)
    learning_rate = config.learning_rate * math.sqrt(batch_size / config.batch_size)
    latent.latent_batch_size = batch_size  # recorded, to repeat this run
    config = dataclasses.replace(config, batch_size=batch_size, learning_rate=learning_rate)
    yield train_cfg.make_trainer(latents, held_out, model, latent, config), data, model, latent


if __name__ == "__main__":
    run(main)
