"""The loss of a classifier of noisy images."""

import torch
import torch.nn.functional as F

from hf_genmod.objectives.denoising import draw_x_t


class NoisyClassificationObjective:
    r"""
    The cross-entropy of a classifier of noisy images (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233,
    section 4):

        t ~ Uniform{0, ..., T-1},  x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε,  L = −log f_φ(y | x_t)

    `scheduler` ([`AncestralDDPMScheduler`]) is the forward process of the diffusion model to be guided.
    """

    by_noise_level = True

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def __call__(self, model, batch, rng) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x_0, y = batch["images"], batch["class_labels"]
        t, x_t, _ = draw_x_t(x_0, self.scheduler, rng)
        logits = model(x_t, t).logits.to(x_0.dtype)
        accuracy = (logits.argmax(dim=1) == y).to(x_0.dtype).mean()
        return F.cross_entropy(logits, y), {"accuracy": accuracy}
