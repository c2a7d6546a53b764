"""
How good a variational autoencoder is after some minutes: the evidence lower bound on test pictures, and an estimate of
their likelihood by importance sampling. Bernoulli likelihood, in nats, each picture drawn from its grey values once.

    python benchmarks/elbo.py --dataset ../shared/data/mnist --minutes 10 --output_dir runs/elbo
"""

from pathlib import Path

import torch
from judge import parser, train

from hf_genmod import load_vae
from hf_genmod.data.loading import load_pictures
from hf_genmod.evaluation.likelihood_bounds import importance_log_likelihood

parser = parser(__doc__)
parser.add_argument("--minutes", type=float, default=10.0)
parser.add_argument("--draws", type=int, default=64, help="z per picture of the importance-sampled likelihood.")
parser.add_argument("--train_flags", nargs="*", default=["vector_latents", "latent_channels=32"])
arguments = parser.parse_args()
folder = Path(arguments.output_dir) / "vae"
flags = [f"--{flag}" for flag in arguments.train_flags]
train("train_vae.py", folder, arguments, arguments.minutes, "--likelihood=bernoulli", *flags)

vae = load_vae(folder)
test = load_pictures(arguments.dataset, split="test", resolution=arguments.resolution)
x = test.x_0(range(len(test)))
rng = torch.Generator().manual_seed(0)
x = torch.where(torch.rand(x.shape, generator=rng) < (x + 1) / 2, 1.0, -1.0)


def measure(pictures, k):
    values = importance_log_likelihood(vae, pictures, k, generator=torch.Generator().manual_seed(1))
    return f"{values.mean():.2f} ± {values.std() / len(values) ** 0.5:.2f} nats, {len(values)} pictures"


print("ELBO (one z per picture):", measure(x, 1))
some = x[:: max(len(x) // arguments.samples, 1)]
print("ELBO of some of them:", measure(some, 1))
print(f"log p(x), {arguments.draws} z per picture:", measure(some, arguments.draws))
