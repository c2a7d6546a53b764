# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Trains a variational autoencoder on images by the evidence lower bound (Kingma & Welling 2014).

    hf_genmod train vae --dataset path/to/folder --max_train_minutes 10
"""

import dataclasses

from transformers.hf_argparser import HfArg

from hf_genmod import AutoencoderPipeline, ElboObjective, Trainer, TrainingConfig, VariationalAutoencoder
from hf_genmod.data.latents import with_statistics
from hf_genmod.drawing.grids import draw_reconstructions
from hf_genmod.recipes.networks import AutoencoderArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.recipes.run import run


@dataclasses.dataclass
class ElboArguments:
    """Evidence lower bound."""

    likelihood: str = HfArg(default="gaussian", help="p(x | z): 'gaussian', 'discretised_gaussian' or 'bernoulli'.")
    variance: float | None = HfArg(default=None, help="Variance of a Gaussian on [-1, 1]. Default: it is learned.")
    beta: float = HfArg(default=1.0, help="Weight of the KL divergence.")
    beta_warmup: float = HfArg(default=0.0, help="Fraction of the budget in which this weight rises from zero.")
    free_bits: float = HfArg(default=0.0, help="Nats of each latent that the KL divergence does not count.")


def main(
    data: DataArguments, autoencoder: AutoencoderArguments, elbo: ElboArguments, config: TrainingConfig
) -> Trainer:
    pictures, held_out = data.load()
    likelihood = {"likelihood": elbo.likelihood, "variance": elbo.variance}
    vae = autoencoder.make_autoencoder(VariationalAutoencoder, pictures, config.seed, **likelihood)
    objective = ElboObjective(elbo.beta, elbo.beta_warmup, elbo.free_bits)

    def make_pipeline(vae):
        return AutoencoderPipeline(vae, pictures.value_range)

    def draw_samples(pipeline):
        return draw_reconstructions(pipeline, held_out or pictures.sample, prior="standard")

    def save(pipeline, folder):
        pipeline.register_modules(vae=with_statistics(pipeline.vae, pictures.sample))
        pipeline.save_pretrained(folder)

    return Trainer(vae, objective, pictures, config, make_pipeline, draw_samples, held_out, save)


if __name__ == "__main__":
    run(main)
