"""What the tests of objectives share: a model, images and the draws of Algorithm 1."""

from types import SimpleNamespace

import torch

from hf_genmod import AncestralDDPMScheduler
from hf_genmod.data.randomness import BatchRandom

SHAPE = (8, 3, 4, 4)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class Model:
    """Answers with what `answer` makes of (x_t, t), and remembers what it was asked."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, x_t, t, **condition):
        self.x_t, self.t, self.condition = x_t, t, condition
        return SimpleNamespace(sample=self.answer(x_t, t))


def pictures(shape=SHAPE):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 127.5 - 1


def batch_random(n=SHAPE[0], step=0):
    return BatchRandom(seed=0, step=step, positions=torch.arange(n), batch_size=n)


def scheduler(**config):
    return AncestralDDPMScheduler(**{"beta_schedule": "linear", "clip_sample": False, **config})


def drawn(process, x_0, rng):
    """t, ε and x_t as Algorithm 1 draws them, from the same stream."""
    t = (1000 * rng.stratified()).long()
    epsilon = rng.normal(x_0.shape[1:])
    alpha_bar = process.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    return t, epsilon, alpha_bar, alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * epsilon
