"""Features of images, (n, d), from a small classifier of the data set or from a pretrained model. Images are
(n, C, H, W), `uint8` or float in [-1, 1]."""

import json
import math
import os
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.randomness import cut
from hf_genmod.data.value_range import to_model_range
from hf_genmod.errors import first_line, refuse_lfs_pointers
from hf_genmod.hub import why_missing
from hf_genmod.models.initial_weights import SeededWeights
from hf_genmod.processes import multiplies_in_bf16, processes

FEATURE_DIM = 64  # of the small classifier


class FeatureClassifier(nn.Module):
    """
    A small convolutional network for images of C channels, of any size from 2x2. Its last hidden layer gives d
    features, few enough for the Fréchet distance of a thousand images; its output is the logits of classes. Distances
    are comparable only if they are measured with the same classifier, so it can be saved.

    `num_blocks` are the numbers of residual convolutions at each size: a half, a quarter, an eighth of the image.
    `None` is the network without them of files that older versions saved.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        feature_dim: int = FEATURE_DIM,
        num_blocks: Sequence[int] | None = (1, 2, 2),
    ):
        super().__init__()
        self.config = {"in_channels": in_channels, "num_classes": num_classes, "feature_dim": feature_dim}
        self.config |= {"num_blocks": num_blocks and list(num_blocks)}
        layers, c = _convolution(in_channels, 32, 4, 2), 32
        if num_blocks is None:
            layers, c = [*layers, *_convolution(32, 64), *_convolution(64, 128, 3, 2), *_convolution(128, 128)], 128
        for level, count in enumerate(num_blocks or ()):
            if level:
                layers += [nn.MaxPool2d(2, ceil_mode=True), *_convolution(c, 2 * c)]  # of a single pixel, too
                c *= 2
            layers += [_Residual(*_convolution(c, c)) for _ in range(count)]
        self.body = nn.Sequential(*layers)
        self.projection = nn.Linear(c, feature_dim)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(feature_dim, num_classes))

    def features(self, images: Tensor) -> Tensor:
        """The features (n, d) of float images. Raises a `ValueError` for another C."""
        if images.shape[1] != self.config["in_channels"]:
            made_for = self.config["in_channels"]
            raise ValueError(f"images: {images.shape[1]} channels, but this classifier was made for {made_for}")
        images = images.to(self.projection.weight.device)
        return self.projection(self.body(images).mean(dim=(2, 3)))  # (n, 128, H/4, W/4) -> (n, 128) -> (n, d)

    def forward(self, images: Tensor) -> Tensor:
        """The logits (n, num_classes) of float images."""
        return self.head(self.features(images))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the weights and the config into one safetensors file."""
        save_file(self.state_dict(), path, metadata={"config": json.dumps(self.config)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FeatureClassifier":
        """Reads the file that `save` wrote, in evaluation mode. Raises a `ValueError` for any other file."""
        refuse_lfs_pointers(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "config" not in metadata:
                raise ValueError(f"path: {str(path)!r} was not written by FeatureClassifier.save; give one that was")
            model = cls(**({"num_blocks": None} | json.loads(metadata["config"])))
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        return model.eval().to(processes().device)


def _convolution(c_in: int, c_out: int, kernel_size: int = 3, stride: int = 1) -> list[nn.Module]:
    # BatchNorm rather than GroupNorm: 76% against 67% on cats and dogs after the same 400 steps.
    convolution = nn.Conv2d(c_in, c_out, kernel_size, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(c_out), nn.ReLU()]


class _Residual(nn.Sequential):
    """x + f(x) with f the layers in their order."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def train_feature_classifier(
    images: Tensor,
    labels: Tensor | None,
    num_classes: int,
    *,
    seed: int = 0,
    max_train_steps: int = 1500,
    batch_size: int = 64,
    flip: bool = False,
    max_shift: int = 2,
    num_blocks: Sequence[int] | None = (1, 2, 2),
) -> FeatureClassifier:
    """
    Trains a [`FeatureClassifier`] by cross-entropy, with AdamW and a one-cycle learning rate, on the device of the
    images, in bf16 where that is fast, and returns it in evaluation mode.

    Without labels the classes are four ways of flipping an image: not, left to right, upside down, both (in the manner
    of Gidaris et al. 2018, https://arxiv.org/abs/1803.07728). The same arguments give the same weights, bitwise on a
    CPU with the same number of threads. The global random state is neither used nor changed.

    Args:
        images (`torch.Tensor`): (n, C, H, W), uint8.
        labels (`torch.Tensor` or `None`): (n,), integers in 0..num_classes-1.
        seed (`int`): The seed of initial weights, order, flips and shifts.
        max_train_steps, batch_size (`int`): The number of batches, of which no image is in more than 100 (flipped
            images count as others), and of images in each.
        flip (`bool`): Whether to mirror half of the images left to right; not for digits or letters.
        max_shift (`int`): The most pixels by which an image is shifted.
        num_blocks: As [`FeatureClassifier`] takes it.

    Raises:
        ValueError: If images are not uint8 (n, C, H, W), there are not n labels, or a label is out of range.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images: {images.dtype} of shape {tuple(images.shape)}; give uint8 of shape (n, C, H, W)")
    if labels is None:
        images = torch.cat([images.flip(axes) for axes in ((), (3,), (2,), (2, 3))])
        labels, num_classes = torch.arange(4, device=images.device).repeat_interleave(len(images) // 4), 4
    if len(labels) != len(images):
        raise ValueError(f"labels: {len(labels)} for {len(images)} images; give one label per image")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels: {labels.min()}..{labels.max()} are not in 0..{num_classes - 1}; see num_classes")
    with SeededWeights(seed):
        model = FeatureClassifier(images.shape[1], num_classes, num_blocks=num_blocks)
    model = model.to(images.device, memory_format=torch.channels_last)
    rng = torch.Generator().manual_seed(seed)
    max_train_steps = min(max_train_steps, math.ceil(100 * len(images) / batch_size))
    num_epochs = math.ceil(max_train_steps * batch_size / len(images))
    order = torch.cat([torch.randperm(len(images), generator=rng) for _ in range(num_epochs)])

    def batches():
        for index in order[: max_train_steps * batch_size].split(batch_size):
            batch = to_model_range(images[index])
            if flip:
                mirrored = torch.rand(len(batch), 1, 1, 1, generator=rng).to(batch.device) < 0.5
                batch = torch.where(mirrored, batch.flip(-1), batch)
            yield shifted(batch, max_shift, rng), labels[index]

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=max_train_steps)
    bar = tqdm(batches(), "Training the network of the features", max_train_steps, leave=False, disable=None)
    is_fast = multiplies_in_bf16(images.device)
    # Its cache would keep the weights of the first step.
    with torch.autocast(images.device.type, torch.bfloat16, enabled=is_fast, cache_enabled=False):
        train_by_cross_entropy(model, bar, optimizer, schedule)
    return model.to(memory_format=torch.contiguous_format).eval()


def train_by_cross_entropy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizer, schedule) -> None:
    """Takes one step of the optimizer and of the learning rate schedule for each batch of images and labels."""
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def shifted(images: Tensor, max_shift: int, rng: torch.Generator) -> Tensor:
    """Images shifted at random, each by up to `max_shift` pixels in each direction; pixels of the border are
    repeated."""
    corners = torch.randint(2 * max_shift + 1, (len(images), 2), generator=rng).to(images.device)
    return cut(F.pad(images, [max_shift] * 4, mode="replicate"), corners, images.shape[-2:])


class PretrainedFeatures:
    """
    Features of a vision model of transformers (DINOv2, CLIP, ViT, ...): its pooled output, or the mean of its last
    hidden states if it has none. The processor of the model resizes the images; grey images are made RGB. `path` is a
    folder, or an id on the Hub; the weights are read from safetensors. Raises a `FileNotFoundError` for other paths.
    """

    def __init__(self, path: str):
        from transformers import AutoConfig, AutoImageProcessor, AutoModel  # slow to import

        refuse_lfs_pointers(path)
        if not os.path.isdir(path) and (reason := why_missing(path)):
            raise FileNotFoundError(f"features: {path!r} is no folder here, and {reason}")
        try:
            config = AutoConfig.from_pretrained(path)
            config = getattr(config, "vision_config", config)  # CLIP's vision tower
            self.processor = AutoImageProcessor.from_pretrained(path, backend="pil")
            self.model = AutoModel.from_pretrained(path, config=config, use_safetensors=True).eval()
            self.model.to(processes().device)
        except (OSError, ValueError) as error:
            message = f"features: {path!r} is no vision model of transformers ({first_line(error)})"
            raise FileNotFoundError(message) from error

    def features(self, images: Tensor) -> Tensor:
        """The features (n, d) of float images with 1 or 3 channels (of 4, the first 3)."""
        arrays = as_bytes(images[:, :3].expand(-1, 3, -1, -1)).permute(0, 2, 3, 1).cpu().numpy()
        output = self.model(**self.processor(images=list(arrays), return_tensors="pt").to(self.model.device))
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state.mean(dim=1) if pooled is None else pooled).flatten(1).float()


def extract_features(images: Tensor, network: FeatureClassifier | PretrainedFeatures, batch_size: int = 256) -> Tensor:
    """The features (n, d) of images. Raises a `ValueError` if float images are outside [-1, 1] or all in [0, 1], or
    the network is in training mode."""
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images: shape {tuple(images.shape)}; give (n, C, H, W) with at least one image")
    if images.dtype != torch.uint8:
        low, high = (x.item() for x in images.aminmax())
        # Pipelines return images in [0, 1] as output_type="pt"; taken for [-1, 1] they would only seem worse.
        if not (-1 <= low < 0 and high <= 1):
            raise ValueError(f"images: values in [{low:.3g}, {high:.3g}]; give uint8, or float that fills [-1, 1]")
    if getattr(network, "training", False):
        raise ValueError("network: in training mode, where images of a batch may interact; call .eval() first")
    with torch.no_grad():
        batches = tqdm(images.split(batch_size), "Features", leave=False, disable=None)
        return torch.cat([network.features(to_model_range(batch).float()).cpu() for batch in batches])


def as_bytes(x: Tensor) -> Tensor:
    """Images in [-1, 1] as `uint8`; values beyond are clipped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def all_bytes(pictures: PictureDataset) -> Tensor:
    """All images of a data set as `uint8`, (n, C, H, W); 0 and 255 are the ends of the range of measured values."""
    return torch.cat([as_bytes(pictures.x_0(part.tolist())) for part in torch.arange(len(pictures)).split(1024)])
