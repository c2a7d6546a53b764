"""
Trains a variational autoencoder on pictures by the evidence lower bound (Kingma & Welling 2014).

    python examples/train_vae.py --dataset path/to/folder --max_train_minutes 10
"""

import dataclasses

from hf_genmod import AutoencoderPipeline, ElboObjective, Trainer, TrainingConfig, VariationalAutoencoder
from hf_genmod.data.latents import with_statistics
from hf_genmod.drawing.grids import draw_reconstructions
from hf_genmod.recipes.networks import AutoencoderArguments
from hf_genmod.recipes.pictures import DataArguments
from hf_genmod.recipes.run import run


@dataclasses.dataclass
class ElboArguments:
    likelihood: str = dataclasses.field(
        default="gaussian", metadata={"help": "p(x | z): 'gaussian', 'discretised_gaussian' or 'bernoulli'."}
    )
    variance: float | None = dataclasses.field(
        default=None, metadata={"help": "Variance of a Gaussian, for pictures in [-1, 1]; by default it is learned."}
    )
    beta: float = dataclasses.field(default=1.0, metadata={"help": "Weight of the KL divergence."})
    beta_warmup: float = dataclasses.field(
        default=0.0, metadata={"help": "Part of the run in which this weight rises from zero."}
    )
    free_bits: float = dataclasses.field(
        default=0.0, metadata={"help": "Nats of each latent that the KL divergence does not count."}
    )


def main(
    data: DataArguments, autoencoder: AutoencoderArguments, elbo: ElboArguments, config: TrainingConfig
) -> Trainer:
    dataset, held_out = data.load()
    vae = autoencoder.make_autoencoder(
        VariationalAutoencoder, dataset, config.seed, likelihood=elbo.likelihood, variance=elbo.variance
    )
    return Trainer(
        vae,
        ElboObjective(elbo.beta, elbo.beta_warmup, elbo.free_bits),
        dataset,
        config,
        make_pipeline=lambda vae: AutoencoderPipeline(with_statistics(vae, dataset), dataset.value_range),
        load=AutoencoderPipeline.from_pretrained,
        draw_samples=lambda pipeline: draw_reconstructions(pipeline, held_out or dataset, prior="standard"),
        validation_dataset=held_out,
    )


if __name__ == "__main__":
    run(main)
