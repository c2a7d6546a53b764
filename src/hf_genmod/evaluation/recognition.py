"""The accuracy of classifiers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.randomness import BatchRandom
from hf_genmod.drawing.curves import draw_accuracy
from hf_genmod.errors import shortened
from hf_genmod.evaluation.estimates import Share
from hf_genmod.evaluation.features import FeatureClassifier, extract_features
from hf_genmod.models.noisy_classifier import NoisyImageClassifier


def recognised_share(predictions: Tensor, labels: Tensor | Sequence[int]) -> Share:
    """The share of images that a classifier assigns to their class; `predictions` are logits, (n, num_classes), or
    class indices, (n,). Raises a `ValueError` if there are no images, or the number of labels is not n."""
    labels = torch.as_tensor(labels, device=predictions.device)
    if len(labels) != len(predictions) or len(labels) == 0:
        raise ValueError(f"labels: {len(labels)} for {len(predictions)} predictions; give one per image")
    if predictions.ndim == 2:
        predictions = predictions.argmax(dim=1)
    return Share.of(predictions == labels)


def recognised(classifier: FeatureClassifier, images: Tensor, labels: Tensor, names: list[str]) -> dict:
    """The "recognised_share" of images, and "recognised_share_by_class"."""
    with torch.no_grad():
        features = extract_features(images, classifier).to(classifier.projection.weight.device)
        right = classifier.head(features).argmax(dim=1).cpu() == labels
    by_class = {name: Share.of(right[labels == i]) for i, name in enumerate(names) if (labels == i).any()}
    return {"recognised_share": Share.of(right), "recognised_share_by_class": by_class}


@torch.no_grad()
def accuracy_by_noise_level(classifier, scheduler, dataset, num_levels: int = 11, batch_size: int = 256) -> list[dict]:
    """
    The accuracy of a [`NoisyImageClassifier`], f_φ(y | x_t), at `num_levels` timesteps spread evenly from the first to
    the last, on a data set of labelled images or latents that it was not trained on. The noise of an image is the same
    at every timestep.

    Returns:
        `list[dict]`: For each timestep `"t"`, the noise level `"sigma"` = √((1−ᾱ_t)/ᾱ_t), and `"accuracy"`, a
        [`Share`].
    """
    device, levels = next(classifier.parameters()).device, []
    for t in torch.linspace(0, len(scheduler) - 1, num_levels).round().long():
        logits = []
        for part in torch.arange(len(dataset)).split(batch_size):
            rng = BatchRandom(0, 0, part, len(dataset))
            x_0 = dataset.x_0(part.tolist(), rng)
            epsilon = rng.normal(x_0.shape[1:], dtype=x_0.dtype)
            logits.append(classifier(scheduler.add_noise(x_0, epsilon, t).to(device), t).logits.cpu())
        alpha_bar = scheduler.alphas_cumprod[t].double()
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt().item()  # ∞ at ᾱ_t = 0
        levels.append({"t": t.item(), "sigma": sigma, "accuracy": recognised_share(torch.cat(logits), dataset.labels)})
    return levels


def report_accuracy(classifier: NoisyImageClassifier, scheduler, held_out: PictureDataset, file: Path):
    """Prints the accuracy of a classifier on held-out images at each noise level, and draws the curve."""
    levels = accuracy_by_noise_level(classifier, scheduler, held_out)
    absent = held_out.classes_without_images
    if absent:
        print(f"no image of {shortened(absent)} is held out, so its accuracy is not known")
    print("   t   noise level σ   accuracy")
    for level in levels:
        print(f"{level['t']:4}{level['sigma']:16.3g}   {level['accuracy']}")
    try:
        draw_accuracy(levels, chance=1 / classifier.config.num_classes, file=file)
        print(f"{file} shows the curve")
    except OSError as error:
        print(f"the curve could not be drawn: {error}")
