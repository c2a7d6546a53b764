# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
What the features of an autoencoder are worth if few images have labels: the accuracy of a linear head on its encoder,
frozen and fine-tuned, of the same network trained from scratch, and of a linear model of pixels, for n labelled images
per class.

    hf_genmod transfer runs/vae --dataset path/to/class_folders

All have the same number of steps and augmentation. The learning rate of each is chosen on images that are neither
trained on nor tested.
"""

import copy
import dataclasses

import torch
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from hf_genmod import load_vae
from hf_genmod.errors import a_or_an, one_line_errors
from hf_genmod.evaluation.features import shifted, train_by_cross_entropy
from hf_genmod.models.image_autoencoder import ImageAutoencoder
from hf_genmod.processes import processes
from hf_genmod.recipes.arguments import parse_arguments
from hf_genmod.recipes.pictures import MeasuredDataArguments

ARMS = ("encoder, frozen", "encoder, fine-tuned", "from scratch", "linear on pixels")


@dataclasses.dataclass
class TransferArguments:
    """Features."""

    vae: str = HfArg(help="The autoencoder: the folder of its run, or its id on the Hub.")
    labels_per_class: list[int] = HfArg(
        default_factory=list, help="Labelled images per class. Default: those of 1, 5, 10, 50 and 100 that there are."
    )
    num_seeds: int = HfArg(default=5, help="Choices of labelled images, and of initial weights; two or more.")
    learning_rates: list[float] = HfArg(default_factory=lambda: [3e-4, 1e-3, 3e-3], help="Learning rates of AdamW.")
    max_train_steps: int = HfArg(default=200, help="Training steps.")
    batch_size: int = HfArg(default=16, help="Images per step.")
    max_shift: int = HfArg(default=2, help="Most pixels by which images are shifted at random.")
    num_validation: int | None = HfArg(
        default=None, help="Images on which the learning rate is chosen. Default: 500, or a fifth of the images."
    )
    num_test: int = HfArg(default=2000, help="Images on which the accuracy is measured.")

    def __post_init__(self):
        for name in ("num_seeds", "max_shift", "max_train_steps", "batch_size", "num_validation", "num_test"):
            least = {"num_seeds": 2, "max_shift": 0}.get(name, 1)
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is less than {least}")
        for name in ("labels_per_class", "learning_rates"):
            if min(getattr(self, name), default=1) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} are not all positive")


class Classifier(torch.nn.Module):
    """A linear head on the last feature maps of an encoder, or on pixels."""

    def __init__(self, encoder, x, num_classes: int):
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            self.head = torch.nn.Linear(self.features(x).shape[1], num_classes, device=x.device)
        torch.nn.init.zeros_(self.head.weight)  # so that its first gradients do not disturb the encoder

    def features(self, x):
        return (x if self.encoder is None else self.encoder.features(x)).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


def make_classifier(arm: str, vae, x, num_classes: int) -> Classifier:
    if arm == "linear on pixels":
        return Classifier(None, x, num_classes)
    encoder = type(vae).from_config(vae.config).to(x) if arm == "from scratch" else copy.deepcopy(vae)
    return Classifier(encoder.requires_grad_(arm != "encoder, frozen"), x, num_classes)


def train(model: Classifier, images, labels, learning_rate: float, transfer: TransferArguments, rng):
    def batches():
        for _ in range(transfer.max_train_steps):
            batch = torch.randint(len(images), (transfer.batch_size,), generator=rng)
            x = images[batch].contiguous(memory_format=torch.channels_last)
            yield shifted(x, transfer.max_shift, rng), labels[batch]

    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, transfer.max_train_steps)
    train_by_cross_entropy(model, batches(), optimizer, schedule)


@torch.no_grad()
def accuracy(model: Classifier, images, labels) -> float:
    predictions = torch.cat([model(part).argmax(dim=1) for part in images.split(256)])
    return (predictions == labels).float().mean().item()


def load_images(data: MeasuredDataArguments, transfer: TransferArguments, vae):
    """(images, labels) to train on, to choose the learning rate on and to test on, and the number of classes."""
    data.resolution = data.resolution or vae.config.sample_size
    data.channels = data.channels or vae.config.in_channels
    training, test = data.load(num_held_out=transfer.num_test, hold_out=True, require_labels=True)
    count = min(500, len(training) // 5) if transfer.num_validation is None else transfer.num_validation
    if not 0 < count < len(training):
        remedy = "give fewer by --num_validation" if count else "collect more"
        raise ValueError(f"num_validation: {count} of {len(training)} images leave too few to train on; {remedy}")
    validation = training.hold_out(count)
    fewest = torch.bincount(training.labels, minlength=len(training.label_names)).min().item()
    transfer.labels_per_class = transfer.labels_per_class or [n for n in (1, 5, 10, 50, 100) if n <= fewest]
    if max(transfer.labels_per_class, default=1) > fewest:
        raise ValueError(f"labels_per_class: the smallest class has {fewest} images to train on; give no more")
    parts = [(part.x_0(range(len(part))), part.labels) for part in (training, validation, test)]
    return [(images.to(vae.device), labels.to(vae.device)) for images, labels in parts], len(training.label_names)


def main(data: MeasuredDataArguments, transfer: TransferArguments):
    vae = load_vae(transfer.vae).to(processes().device, memory_format=torch.channels_last)
    if not isinstance(vae, ImageAutoencoder):
        raise ValueError(
            f"vae: {a_or_an(type(vae).__name__)} is not an autoencoder of this package, whose features are known; "
            "train one by train_autoencoder.py or train_vae.py"
        )
    ((images, labels), validation, test), num_classes = load_images(data.of_run(transfer.vae), transfer, vae)
    spread = f"mean ± standard deviation of {transfer.num_seeds} seeds"
    print(f"accuracy on {len(test[1])} images, {spread}, for n labelled images of each class")
    print(f"{'':20}", *(f"{f'n = {n}':>14}" for n in transfer.labels_per_class), flush=True)
    trainings = len(ARMS) * len(transfer.labels_per_class) * transfer.num_seeds * len(transfer.learning_rates)
    bar = tqdm(total=trainings, unit="training", leave=False, disable=None)
    for arm in ARMS:
        row = f"{arm:20}"
        for n in transfer.labels_per_class:
            bar.set_description(f"{arm}, n = {n}")
            models = {learning_rate: [] for learning_rate in transfer.learning_rates}
            for seed in range(transfer.num_seeds):
                rng = torch.Generator().manual_seed(seed)
                order = torch.randperm(len(labels), generator=rng).to(vae.device)
                chosen = torch.cat([order[labels[order] == label][:n] for label in range(num_classes)])
                for learning_rate, trained in models.items():
                    torch.manual_seed(seed)
                    trained.append(make_classifier(arm, vae, images[:1], num_classes))
                    train(trained[-1], images[chosen], labels[chosen], learning_rate, transfer, rng.manual_seed(seed))
                    bar.update()
            best = max(models.values(), key=lambda trained: sum(accuracy(model, *validation) for model in trained))
            std, mean = torch.std_mean(100 * torch.tensor([accuracy(model, *test) for model in best]))
            row += f" {f'{mean:.1f} ± {std:.1f}%':>14}"
        tqdm.write(row)
    bar.close()


if __name__ == "__main__":
    with one_line_errors():
        main(*parse_arguments(MeasuredDataArguments, TransferArguments))
