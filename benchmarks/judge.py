"""
What the benchmarks measure pictures with: one classifier per data set, trained once and kept beside the results.

As a command, it compares ways of training that classifier, by the share of test images that it recognises and the
seconds of CPU time, on one thread:

    OMP_NUM_THREADS=1 python benchmarks/judge.py --dataset data/cats_dogs32 --resolution 32
    OMP_NUM_THREADS=1 python benchmarks/judge.py --dataset data/cats_dogs32 --resolution 32 --samples 3000
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from hf_genmod.data.loading import load_pictures
from hf_genmod.evaluation.distances import FeatureStatistics, frechet_distance
from hf_genmod.evaluation.features import FeatureClassifier, extract_features, train_feature_classifier
from hf_genmod.evaluation.recognition import recognised_share


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

    def __call__(self, pictures: torch.Tensor, labels=None) -> dict:
        """`frechet_distance` and `recognised_share` of pictures, (n, C, H, W) uint8, of `labels`: by default those
        that samples are asked for."""
        features = extract_features(pictures, self.classifier)
        with torch.no_grad():
            share = recognised_share(self.classifier.head(features), self.labels if labels is None else labels)
        return {"frechet_distance": frechet_distance(features, self.real), "recognised_share": share}

    def grid(self, pictures: torch.Tensor, num_columns: int = 10) -> Image.Image:
        """Ten rows of them, shared evenly among the first ten classes."""
        num_classes = len(self.train.label_names)
        rows_per_class = max(1, 10 // num_classes)
        images = []
        for label in range(min(num_classes, 10)):
            of_class = [i for i, other in enumerate(self.labels) if other == label][: rows_per_class * num_columns]
            images += [Image.fromarray(pictures[i].permute(1, 2, 0).squeeze(-1).numpy()) for i in of_class]
        num_rows = len(images) // num_columns  # all of one class each, but where samples are very few
        return make_image_grid(images[: num_rows * num_columns], num_rows, num_columns)


def train(example: str, folder: Path, arguments: argparse.Namespace, minutes: float, *flags) -> float:
    """Trains by an example and its defaults; returns the pictures seen per second."""
    command = [sys.executable, f"examples/{example}", "--dataset", arguments.dataset, "--max_train_minutes",
               str(minutes), "--sampling_steps", "0", "--output_dir", str(folder), *flags]  # fmt: skip
    if arguments.resolution:
        command += ["--resolution", arguments.resolution]
    subprocess.run(command, check=True)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    batch_size = json.loads((folder / "training_config.json").read_text())["training"]["batch_size"]
    return last["step"] * batch_size / last["elapsed_seconds"]


def once(file: Path, compute, *arguments):
    """What `compute(*arguments)` gives, kept in `file`."""
    if not file.is_file():
        torch.save(compute(*arguments), file)
    return torch.load(file)


def draw(pipeline, labels, batch_size: int = 100, first_seed: int = 0, **kwargs) -> torch.Tensor:
    """Pictures of the classes `labels`, (n, C, H, W) uint8, of one of our pipelines, each by the next seed."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]
        seeds = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        pictures.append(pipeline(part, generator=seeds, output_type="pt", **kwargs).images)
    return to_uint8(torch.cat(pictures))


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """From [0, 1] to 0 ... 255."""
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def compare(dataset: str, resolution: str | None, count: int | None) -> None:
    """Prints a table of ways of training the classifier on `count` images, or on all."""
    pictures = load_pictures(dataset, resolution=resolution, in_memory=True, require_labels=True)
    test = load_pictures(dataset, resolution=resolution, split="test", in_memory=True)
    some = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:count]
    before = {"num_blocks": None, "max_train_steps": 1000, "batch_size": 128}
    print(f"{len(some)} images of {dataset}\n\n| | recognised | seconds |\n|---|---|---|")
    for name, changes in {
        "before: no residual convolutions, not shifted": before | {"max_shift": 0},
        "no residual convolutions": before,
        "default": {},
        "not shifted": {"max_shift": 0},
        "mirrored": {"flip": True},
        "two thirds of the steps": {"max_train_steps": 1000},
        "twice the steps": {"max_train_steps": 3000},
    }.items():
        start = time.process_time()
        images, labels = pictures.images[some], pictures.labels[some]
        classifier = train_feature_classifier(images, labels, len(pictures.label_names), **changes)
        seconds = time.process_time() - start
        with torch.no_grad():
            share = recognised_share(classifier.head(extract_features(test.images, classifier)), test.labels)
        print(f"| {name} | {share.interval} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.set_defaults(samples=None)
    arguments = arguments.parse_args()
    compare(arguments.dataset, arguments.resolution, arguments.samples)
