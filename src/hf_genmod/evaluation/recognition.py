"""How well a classifier recognises images."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_genmod.data.latents import draw_latents
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.randomness import BatchRandom
from hf_genmod.data.value_range import to_model_range
from hf_genmod.drawing.curves import draw_accuracy
from hf_genmod.evaluation.estimates import Share
from hf_genmod.models.noisy_classifier import NoisyImageClassifier
from hf_genmod.recipes.pictures import _shortened, _unseen


def recognised_share(predictions: Tensor, labels: Tensor | Sequence[int]) -> Share:
    """Share of pictures that a classifier takes for the class they were generated for.

    Args:
        predictions (`torch.Tensor`): (n, num_classes) logits or (n,) class indices.
        labels (`torch.Tensor` or sequence of `int`): (n,) class indices.

    Raises:
        `ValueError`: no pictures, or another number of labels than of predictions.
    """
    labels = torch.as_tensor(labels, device=predictions.device)
    if len(labels) != len(predictions) or len(labels) == 0:
        raise ValueError(f"labels: {len(labels)} for {len(predictions)} predictions; give one per picture.")
    if predictions.ndim == 2:
        predictions = predictions.argmax(dim=1)
    return Share.of(predictions == labels)


def accuracy_by_noise_level(classifier, scheduler, dataset, num_levels: int = 11, batch_size: int = 256) -> list[dict]:
    """How often a classifier of noisy pictures is right, at timesteps at even distances from the first to the last.

    Args:
        classifier ([`NoisyImageClassifier`]): f_φ(y | x_t).
        scheduler ([`AncestralDDPMScheduler`]): the process whose x_t it sees.
        dataset ([`PictureDataset`] or [`LatentDataset`]): labelled pictures that it
            has not been trained on. Each gets the same noise at every timestep.
        num_levels (`int`): number of timesteps.
        batch_size (`int`): pictures per forward pass.

    Returns:
        `list[dict]`: `"t"`, the noise level `"sigma"` = √((1−ᾱ_t)/ᾱ_t), and `"accuracy"`, a [`Share`], of each.
    """
    device, T = next(classifier.parameters()).device, len(scheduler)
    positions = torch.arange(len(dataset))
    levels = []
    for t in torch.linspace(0, T - 1, num_levels).round().long():
        logits, labels = [], []
        for part in positions.split(batch_size):
            batch = dataset.__getitems__(part.tolist())
            rng = BatchRandom(0, 0, part, len(positions), device)
            if "posteriors" in batch:
                x_0 = draw_latents(batch["posteriors"].to(device), rng)
            else:
                x_0 = to_model_range(batch["images"]).to(device)
            epsilon = rng.normal(x_0.shape[1:], dtype=x_0.dtype)
            with torch.no_grad():
                logits.append(classifier(scheduler.add_noise(x_0, epsilon, t), t).logits.cpu())
            labels.append(batch["class_labels"])
        alpha_bar = scheduler.alphas_cumprod[t].item()
        sigma = math.inf if alpha_bar == 0 else math.sqrt((1 - alpha_bar) / alpha_bar)
        levels.append(
            {"t": t.item(), "sigma": sigma, "accuracy": recognised_share(torch.cat(logits), torch.cat(labels))}
        )
    return levels


def report_accuracy(classifier: NoisyImageClassifier, scheduler, held_out: PictureDataset, file: Path):
    """Prints how often a classifier is right about held-out pictures at each noise level, and draws the curve."""
    levels = accuracy_by_noise_level(classifier, scheduler, held_out)
    absent = _unseen(held_out)
    if absent:
        print(f"no picture of {_shortened(absent)} is held out: how well it is recognised is not known")
    print("   t   noise level σ   accuracy")
    for level in levels:
        print(f"{level['t']:4}{level['sigma']:16.3g}   {level['accuracy']}")
    try:
        draw_accuracy(levels, chance=1 / classifier.config.num_classes, file=file)
        print(f"{file} shows the curve")
    except (ImportError, OSError) as error:
        print(f"the curve could not be drawn: {error}")
