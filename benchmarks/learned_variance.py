"""
Whether a learned variance tightens the variational bound: the same U-Net trained for the same minutes by L_simple with
a fixed variance and by the hybrid loss of Nichol & Dhariwal 2021, then measured on pictures that neither has seen.

    python benchmarks/learned_variance.py --dataset ../shared/data/mnist --resolution 32 --minutes 4
"""

import argparse
import tempfile

import torch

from hf_genmod import DenoisingObjective, Trainer, TrainingConfig, UnconditionalPipeline
from hf_genmod.data.loading import load_pictures
from hf_genmod.evaluation.likelihood_bounds import variational_bound
from hf_genmod.recipes.networks import ModelArguments

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dataset", default="shapes")
parser.add_argument("--resolution", default=None)
parser.add_argument("--minutes", type=float, default=4.0)
parser.add_argument("--pictures", type=int, default=1000, help="Held-out pictures that are measured.")
arguments = parser.parse_args()

train = load_pictures(arguments.dataset, resolution=arguments.resolution)
held_out = load_pictures(arguments.dataset, split="test", resolution=arguments.resolution, in_memory=True)
pictures = held_out.images[: arguments.pictures]


def trained(learn_variance):
    model = ModelArguments(learn_variance=learn_variance)
    scheduler = model.make_scheduler()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(folder, max_train_minutes=arguments.minutes, sampling_steps=0, checkpointing_steps=0)
        trainer = Trainer(
            model.make_unet(train),
            DenoisingObjective(scheduler),
            train,
            config,
            make_pipeline=lambda unet: UnconditionalPipeline(unet, scheduler),
        )
        return trainer.train(), trainer.progress.step


print(f"{arguments.dataset}, {arguments.minutes:g} minutes each, {len(pictures)} held-out pictures, "
      f"{torch.get_num_threads()} threads\n")  # fmt: skip
print("| variance | steps | bits per dimension |")
print("|---|---|---|")
for learn_variance, variance_types in ((False, ("fixed_small", "fixed_large")), (True, ("learned_range",))):
    pipeline, steps = trained(learn_variance)
    for variance_type in variance_types:
        scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, variance_type=variance_type)
        bound = variational_bound(pipeline.unet, scheduler, pictures.to(pipeline.device))
        print(f"| {variance_type} | {steps} | {bound} |")
