"""What pictures are measured by: features, (n, d), of a small classifier of the data set or of a pretrained model.

Pictures are (n, C, H, W), uint8 in 0..255 or float in [-1, 1].
"""

import json
import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.value_range import to_model_range

FEATURE_DIM = 64  # of the small classifier


class FeatureClassifier(nn.Module):
    """A small convolutional network whose last hidden layer gives features and whose output recognises classes.

    Its features are few, so that a thousand pictures suffice for a Fréchet distance. Distances are comparable only
    between runs that share one classifier, which is why it can be saved.

    Args:
        in_channels (`int`): C of the pictures; their height and width are free, from 2 up.
        num_classes (`int`): number of classes.
        feature_dim (`int`, defaults to 64): d of the features.
    """

    def __init__(self, in_channels: int, num_classes: int, feature_dim: int = FEATURE_DIM):
        super().__init__()
        self.config = {"in_channels": in_channels, "num_classes": num_classes, "feature_dim": feature_dim}
        self.body = nn.Sequential(
            *_block(in_channels, 32, kernel_size=4, stride=2),
            *_block(32, 64, kernel_size=3, stride=1),
            *_block(64, 128, kernel_size=3, stride=2),
            *_block(128, 128, kernel_size=3, stride=1),
        )
        self.projection = nn.Linear(128, feature_dim)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(feature_dim, num_classes))

    def features(self, pictures: Tensor) -> Tensor:
        """Features (n, d) of `pictures`, (n, C, H, W) float in [-1, 1]. Raises `ValueError` where C is another."""
        if pictures.shape[1] != self.config["in_channels"]:
            raise ValueError(
                f"pictures: {pictures.shape[1]} channels, but this classifier was made for "
                f"{self.config['in_channels']}; convert the pictures first."
            )
        return self.projection(self.body(pictures).mean(dim=(2, 3)))  # (n, 128, H/4, W/4) -> (n, 128) -> (n, d)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (n, num_classes) of `pictures`, (n, C, H, W) float in [-1, 1]."""
        return self.head(self.features(pictures))

    def save(self, path: str | os.PathLike) -> None:
        """Writes weights and config to one safetensors file at `path`."""
        save_file(self.state_dict(), path, metadata={"config": json.dumps(self.config)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FeatureClassifier":
        """The classifier that `save` wrote to `path`, in evaluation mode. Raises `ValueError` for any other file."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "config" not in metadata:
                raise ValueError(f"path: {str(path)!r} was not written by FeatureClassifier.save; give one that was.")
            model = cls(**json.loads(metadata["config"]))
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        return model.eval()


def train_feature_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    seed: int = 0,
    max_train_steps: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    flip: bool = False,
    max_shift: int = 0,
    feature_dim: int = FEATURE_DIM,
) -> FeatureClassifier:
    """Trains a `FeatureClassifier` by cross-entropy, with AdamW and a one-cycle learning rate.

    The same arguments give the same weights, bitwise on a CPU with the same number of threads; the global random state
    is neither used nor changed. Trains where `images` are.

    Args:
        images (`torch.Tensor`): (n, C, H, W), uint8.
        labels (`torch.Tensor`): (n,), integers in 0..num_classes-1.
        num_classes (`int`): number of classes.
        seed (`int`, defaults to 0): decides initial weights, order, flips and shifts.
        max_train_steps (`int`, defaults to 1000): number of batches.
        batch_size (`int`, defaults to 128): pictures per batch.
        learning_rate (`float`, defaults to 3e-3): peak of the cycle.
        flip (`bool`, defaults to `False`): mirror half of the pictures left to right; not for digits or letters.
        max_shift (`int`, defaults to 0): shift each batch by up to so many pixels, its border repeated.
        feature_dim (`int`, defaults to 64): d of the features.

    Returns:
        `FeatureClassifier`: in evaluation mode.

    Raises:
        `ValueError`: images that are not uint8 (n, C, H, W); a number of labels other than n; a label out of range.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images: {images.dtype} of shape {tuple(images.shape)}; give uint8 of shape (n, C, H, W).")
    if len(labels) != len(images):
        raise ValueError(f"labels: {len(labels)} for {len(images)} images; give one label per image.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels: range {labels.min()}..{labels.max()}, but with num_classes={num_classes} they must lie in "
            f"0..{num_classes - 1}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = FeatureClassifier(images.shape[1], num_classes, feature_dim).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max_train_steps)
    rng = torch.Generator().manual_seed(seed)
    num_epochs = math.ceil(max_train_steps * batch_size / len(images))
    order = torch.cat([torch.randperm(len(images), generator=rng) for _ in range(num_epochs)])
    for index in order[: max_train_steps * batch_size].split(batch_size):
        batch = as_floats(images[index])
        if flip:
            mirrored = torch.rand(batch_size, 1, 1, 1, generator=rng).to(batch.device) < 0.5
            batch = torch.where(mirrored, batch.flip(-1), batch)
        top, left = torch.randint(2 * max_shift + 1, (2,), generator=rng).tolist()
        padded = F.pad(batch, [max_shift] * 4, mode="replicate")
        batch = padded[..., top : top + images.shape[-2], left : left + images.shape[-1]]
        loss = F.cross_entropy(model(batch), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def extract_features(pictures: Tensor, feature_fn: Callable[[Tensor], Tensor], batch_size: int = 256) -> Tensor:
    """Features (n, d) of pictures, `batch_size` of them at a time.

    Args:
        pictures (`torch.Tensor`): (n, C, H, W), uint8 in 0..255 or float in [-1, 1].
        feature_fn (`FeatureClassifier` or callable): from float pictures in [-1, 1] to features (n, d).
        batch_size (`int`, defaults to 256): pictures per call of `feature_fn`.

    Raises:
        `ValueError`: float pictures outside [-1, 1] or all in [0, 1]; a module in training mode.
    """
    if pictures.ndim != 4 or len(pictures) == 0:
        raise ValueError(f"pictures: shape {tuple(pictures.shape)}; give (n, C, H, W) with at least one picture.")
    if pictures.dtype != torch.uint8:
        low, high = (x.item() for x in pictures.aminmax())
        # All in [0, 1] is what pipelines give as output_type="pt": measured as [-1, 1], it would just look worse.
        if not (-1 <= low < 0 and high <= 1):
            raise ValueError(f"pictures: values in [{low:.3g}, {high:.3g}]; give uint8, or float that fills [-1, 1].")
    if getattr(feature_fn, "training", False):
        raise ValueError("feature_fn: in training mode, where pictures of a batch may interact; call .eval() first.")
    feature_fn = feature_fn.features if isinstance(feature_fn, FeatureClassifier) else feature_fn
    with torch.no_grad():
        return torch.cat([feature_fn(as_floats(batch)) for batch in pictures.split(batch_size)])


def _block(c_in: int, c_out: int, kernel_size: int, stride: int) -> tuple[nn.Module, ...]:
    # BatchNorm rather than GroupNorm: 76% against 67% on cats and dogs after the same 400 steps.
    convolution = nn.Conv2d(c_in, c_out, kernel_size, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(c_out), nn.ReLU()


def as_floats(pictures: Tensor) -> Tensor:
    """Pictures as floats in [-1, 1]."""
    return to_model_range(pictures) if pictures.dtype == torch.uint8 else pictures.float()


def all_bytes(pictures: PictureDataset) -> Tensor:
    """All pictures of a data set, (n, C, H, W) `uint8`; of measured values 0 and 255 are the ends of their range."""
    parts = [pictures.__getitems__(part.tolist())["images"] for part in torch.arange(len(pictures)).split(1024)]
    images = torch.cat(parts)
    return images if images.dtype == torch.uint8 else ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def train_features(images: Tensor, labels: Tensor | None, num_classes: int, **options) -> FeatureClassifier:
    """A `FeatureClassifier` of pictures, or, of those without labels, one that tells which of four ways a picture was
    flipped: not, left to right, upside down, both (in the manner of Gidaris et al. 2018,
    https://arxiv.org/abs/1803.07728).

    Args:
        images (`torch.Tensor`): (n, C, H, W), uint8.
        labels (`torch.Tensor`, *optional*): (n,), in 0..num_classes-1.
        num_classes (`int`): number of classes.
        options: as `train_feature_classifier` takes them.
    """
    if labels is None:
        ways = ((), (3,), (2,), (2, 3))
        images = torch.cat([images.flip(way) for way in ways])
        labels, num_classes = torch.arange(4).repeat_interleave(len(images) // 4), 4
    return train_feature_classifier(images, labels, num_classes, **options)


def find_features(name: str) -> "FeatureClassifier | PretrainedFeatures":
    """The features of a file that `FeatureClassifier.save` wrote, else of a model of transformers, a folder or an id.

    Raises:
        ValueError, FileNotFoundError: If it is neither.
    """
    return FeatureClassifier.load(name) if name.endswith(".safetensors") else PretrainedFeatures(name)


class PretrainedFeatures:
    """Features of a vision model of transformers (DINOv2, CLIP, ViT, ...): its pooled output, or the mean of its last
    hidden states where it has none. Pictures are brought to its size by its own processor; grey ones are made RGB.

    Args:
        pretrained_model_name_or_path (`str`): A folder, or an id on the Hub; read from safetensors.

    Raises:
        FileNotFoundError: If there is no such model.
    """

    def __init__(self, pretrained_model_name_or_path: str):
        from transformers import AutoConfig, AutoImageProcessor, AutoModel  # slow to import

        try:
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path)
            config = getattr(config, "vision_config", config)  # of the whole of CLIP the half that sees
            self.processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, backend="pil")
            self.model = AutoModel.from_pretrained(pretrained_model_name_or_path, config=config, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"features: {pretrained_model_name_or_path!r} is no vision model of transformers ({reason})"
            ) from error
        self.model.eval()

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features (n, d) of `pictures`, (n, C, H, W) float in [-1, 1] with 1 or 3 channels (of 4, the first 3)."""
        colors = pictures[:, :3].expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures[:, :3]
        arrays = ((colors + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        inputs = self.processor(images=list(arrays), return_tensors="pt").to(self.model.device)
        output = self.model(**inputs)
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state.mean(dim=1) if pooled is None else pooled).flatten(1).float()
