"""What the benchmarks measure pictures with: one classifier per data set, trained once and kept beside the results."""

import argparse
from pathlib import Path

import torch

from hf_genmod.data import load_pictures
from hf_genmod.evaluation import (
    FeatureClassifier,
    FeatureStatistics,
    evaluate_pictures,
    extract_features,
    recognised_share,
    train_feature_classifier,
)


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that the benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--resolution", default=None)
    parser.add_argument("--samples", type=int, default=1000, help="Pictures per measurement.")
    parser.add_argument("--flip", action="store_true", help="Mirror pictures when the judging classifier is trained.")
    parser.add_argument("--output_dir", default="runs/benchmark", help="What is found there is not computed again.")
    return parser


class Judge:
    """
    Fréchet distance and recognised share in the features of a classifier of the data set's own classes.

    `count` training pictures, drawn at random, are set aside; their distance from all others is the floor, the least
    that `count` samples can be expected to reach.
    """

    def __init__(self, dataset: str, resolution: str | None, count: int, flip: bool, output_dir: str):
        train = load_pictures(dataset, resolution=resolution, in_memory=True, require_labels=True)
        test = load_pictures(dataset, resolution=resolution, split="test", in_memory=True)
        self.train = train
        file = Path(output_dir) / "classifier.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            classifier = train_feature_classifier(
                train.images, train.labels, len(train.label_names), flip=flip, max_shift=2
            )
            classifier.save(file)
        self.classifier = FeatureClassifier.load(file)

        features = extract_features(train.images, self.classifier)
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        self.real = FeatureStatistics.of(features[order[count:]])
        self.labels = train.labels[order[:count]].tolist()  # samples are asked for in the data's own proportions
        self.floor = self(train.images[order[:count]])
        with torch.no_grad():
            logits = self.classifier.head(extract_features(test.images, self.classifier))
        self.accuracy = recognised_share(logits, test.labels)  # on test pictures

    def __call__(self, pictures: torch.Tensor) -> dict:
        """`frechet_distance` and `recognised_share` of pictures, (count, C, H, W) uint8, of the classes `labels`."""
        return evaluate_pictures(pictures, self.classifier, self.real, self.labels)


def draw(pipeline, labels, batch_size: int = 100, **kwargs) -> torch.Tensor:
    """Pictures of the classes `labels`, (n, C, H, W) uint8, by one of our pipelines; picture i has seed i."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        pictures.append(pipeline(part, generator=seeds, output_type="pt", **kwargs).images)
    return to_uint8(torch.cat(pictures))


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """From [0, 1] to 0 ... 255."""
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
