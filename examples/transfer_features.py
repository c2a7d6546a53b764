"""
What the features of an autoencoder are worth where few pictures have labels: its encoder with a linear head, frozen
and fine-tuned, beside the same network from scratch and a linear model on pixels, for n labelled pictures per class.

    python examples/transfer_features.py --vae runs/vae --dataset path/to/class_folders

All have the same steps, augmentation and learning rates to choose from, by pictures that are neither trained on nor
tested.
"""

import copy
import dataclasses

import torch

from hf_genmod import load_vae
from hf_genmod.errors import one_line_errors
from hf_genmod.evaluation.features import shifted, train_by_cross_entropy
from hf_genmod.models.image_autoencoder import ImageAutoencoder
from hf_genmod.processes import processes
from hf_genmod.recipes.arguments import parse_arguments
from hf_genmod.recipes.pictures import DataArguments

ARMS = ("encoder, frozen", "encoder, fine-tuned", "from scratch", "linear on pixels")


@dataclasses.dataclass
class TransferArguments:
    vae: str = dataclasses.field(metadata={"help": "The autoencoder: the folder of its run, or its id."})
    labels_per_class: list[int] = dataclasses.field(
        default_factory=lambda: [1, 5, 10, 50, 100], metadata={"help": "How many labelled pictures of each class."}
    )
    num_seeds: int = dataclasses.field(
        default=5, metadata={"help": "Choices of labelled pictures, and of weights; two or more."}
    )
    learning_rates: list[float] = dataclasses.field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "Learning rates of AdamW to choose from."}
    )
    max_train_steps: int = dataclasses.field(default=200, metadata={"help": "Steps of each training."})
    batch_size: int = dataclasses.field(default=16, metadata={"help": "Pictures per step."})
    max_shift: int = dataclasses.field(default=2, metadata={"help": "Pixels by which they are shifted, at random."})
    num_validation: int = dataclasses.field(default=500, metadata={"help": "Pictures that choose the learning rate."})
    num_test: int = dataclasses.field(default=2000, metadata={"help": "Pictures that the accuracy is measured on."})

    def __post_init__(self):
        least = {
            "num_seeds": 2,
            "max_train_steps": 1,
            "batch_size": 1,
            "max_shift": 0,
            "num_validation": 1,
            "num_test": 1,
        }
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}: {getattr(self, name)} is less than {minimum}")
        for name in ("labels_per_class", "learning_rates"):
            if min(getattr(self, name), default=0) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} are not all positive")


class Classifier(torch.nn.Module):
    """A linear head, which starts at zero, on the last feature maps of an encoder, or on the pixels."""

    def __init__(self, encoder, x, num_classes: int):
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            self.head = torch.nn.Linear(self.features(x).shape[1], num_classes, device=x.device)
        torch.nn.init.zeros_(self.head.weight)  # so that at first it does not disturb the encoder

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


with one_line_errors():
    data, transfer = parse_arguments(DataArguments, TransferArguments)
    device = processes().device
    vae = load_vae(transfer.vae).to(device, memory_format=torch.channels_last)
    if not isinstance(vae, ImageAutoencoder):
        raise ValueError(
            f"vae: {type(vae).__name__} is not an autoencoder of this package, whose features are known; train one by "
            "train_autoencoder.py or train_vae.py"
        )
    data.resolution = data.resolution or vae.config.sample_size
    data.channels = data.channels or vae.config.in_channels
    dataset, test = data.load(num_held_out=transfer.num_test, hold_out=True, require_labels=True)
    if transfer.num_validation >= len(dataset):
        raise ValueError(
            f"num_validation: {transfer.num_validation} pictures to choose by leave none of {len(dataset)} to train "
            "on; give fewer"
        )
    validation = dataset.hold_out(transfer.num_validation)
    (images, labels), of_validation, of_test = [
        (part.x_0(range(len(part))).to(device), part.labels.to(device)) for part in (dataset, validation, test)
    ]
    num_classes = len(dataset.label_names)
    fewest = torch.bincount(labels, minlength=num_classes).min().item()
    if max(transfer.labels_per_class) > fewest:
        raise ValueError(f"labels_per_class: the smallest class has {fewest} pictures to train on; give no more")

    spread = f"mean ± standard deviation of {transfer.num_seeds} seeds"
    print(f"accuracy on {len(test)} pictures, {spread}, for n labelled pictures of each class")
    print(f"{'':20}", *(f"{f'n = {n}':>14}" for n in transfer.labels_per_class), flush=True)
    for arm in ARMS:
        print(f"{arm:20}", end="", flush=True)
        for n in transfer.labels_per_class:
            models = {learning_rate: [] for learning_rate in transfer.learning_rates}
            for seed in range(transfer.num_seeds):
                rng = torch.Generator().manual_seed(seed)
                order = torch.randperm(len(labels), generator=rng).to(device)
                chosen = torch.cat([order[labels[order] == label][:n] for label in range(num_classes)])
                for learning_rate, trained in models.items():
                    torch.manual_seed(seed)
                    trained.append(make_classifier(arm, vae, images[:1], num_classes))
                    train(trained[-1], images[chosen], labels[chosen], learning_rate, transfer, rng.manual_seed(seed))
            best = max(models.values(), key=lambda trained: sum(accuracy(model, *of_validation) for model in trained))
            std, mean = torch.std_mean(100 * torch.tensor([accuracy(model, *of_test) for model in best]))
            print(f" {f'{mean:.1f} ± {std:.1f}%':>14}", end="", flush=True)
        print()
