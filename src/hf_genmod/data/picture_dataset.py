"""A data set of images of one size."""

import copy
import functools
import hashlib
import math
from collections.abc import Sequence

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps

from hf_genmod.data.decoding import InspectionCache, Properties, inspect, open_image, summary
from hf_genmod.data.entries import Entries
from hf_genmod.data.labelled_dataset import Captions, LabelledDataset
from hf_genmod.data.randomness import Augmentation, BatchRandom, flip, shift
from hf_genmod.data.value_range import MODES, to_mode, to_model_range
from hf_genmod.errors import counted
from hf_genmod.processes import available_memory, local_processes, threads_of


class PictureDataset(LabelledDataset):
    """
    Images of one size as `uint8` (n, C, H, W), with labels and captions where there are any.

    Every image is decoded once at the start, to find unreadable images before training. The pixels are then kept if
    memory allows, else decoded again on access; both give the same bits. What was found out about a file is remembered
    until its time or size changes.

    Measured values, of more than 8 bits or of other than the usual channels, are `float32`. The range of each channel
    in the whole data set (`value_range`) is mapped to [-1, 1].

    Args:
        source (`datasets.Dataset`, `list[PIL.Image.Image]` or [`Entries`]): The images. Of a data set the column
            "image", of type `datasets.Image(decode=False)`, `datasets.Array2D`, (H, W), or `datasets.Array3D`, with
            the channels first, or last if that axis is the shorter one. Paths of .npy files hold arrays of the same
            shapes.
        name (`str`): What errors call the source.
        resolution (`tuple[int, int]`, *optional*): (height, width). An image of another size is scaled, antialiased
            and with its aspect ratio kept, until it covers that size, then cropped to its middle. By default the size
            that all images have.
        channels (`int`, *optional*): 1 grey, 2 grey with alpha, 3 RGB, 4 RGBA. By default the fewest that represent
            every image faithfully. Where alpha is given up, the image is laid on white. Measured values keep their
            channels, however many.
        labels, label_names, captions (*optional*): See [`LabelledDataset`].
        in_memory (`bool`, *optional*): Whether to keep the decoded pixels. By default if they take less than a quarter
            of the memory that this process may take.
        on_bad_image (`str`): "error" refuses the whole data set if any image cannot be used, and names the image;
            "skip" leaves such images out.

    Attributes:
        images (`torch.Tensor` or `None`): All pixels or measured values, (n, C, H, W), if they are kept in memory.
        value_range (`dict` or `None`): `"low"` and `"high"`, the lowest and highest measured value of each channel.
        properties (`numpy.recarray`): What each image is before it is scaled and converted: the columns of
            [`Properties`].
        skipped (`list[str]`): Which images were left out, and why.
        may_have_been_trained_on (`bool`): Whether the images were taken out of a training split.

    Raises:
        ValueError: If there are images that cannot be used (with "skip", if none can be used), or images of several
            sizes and no `resolution`.
    """

    vae = None  # as that of `LatentDataset`
    value_range = None
    may_have_been_trained_on = False
    _wrong_size = "its size is not the one in its header; save it again"

    def __init__(
        self,
        source: datasets.Dataset | list[Image.Image] | Entries,
        name: str,
        resolution: tuple[int, int] | None = None,
        channels: int | None = None,
        labels: torch.Tensor | None = None,
        label_names: list[str] | None = None,
        captions: Sequence | None = None,
        in_memory: bool | None = None,
        on_bad_image: str = "error",
    ):
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image: {on_bad_image!r} is neither 'error' nor 'skip'")
        self.name, self.labels, self.label_names, self.captions = name, labels, label_names, captions
        self._entries = source if isinstance(source, Entries) else Entries(source, name)
        self._scale, self.images = resolution is not None, None
        cache, skip_bad = InspectionCache(name), on_bad_image == "skip"
        self._inspect_all(cache, skip_bad)
        self.resolution = resolution or self._common_size()
        self.channels = self._number_of_channels(channels)
        hashes = self._decode_all(cache, in_memory, skip_bad)
        cache.close()
        shape = (len(self), self.channels, *self.resolution)
        captions, labels = self.captions and [*self.captions], None if self.labels is None else self.labels.tolist()
        targets = (shape, label_names, captions, labels)
        self.fingerprint = hashlib.blake2b(f"{''.join(hashes)}{targets}".encode(), digest_size=8).hexdigest()

    def _inspect_all(self, cache: InspectionCache, skip_bad: bool) -> None:
        """Finds the properties of the images; those that cannot be read are refused or left out."""

        def inspect_all(decode: bool):
            def inspect_one(_, entry):
                return cache(f"properties {decode}", functools.partial(inspect, decode=decode), entry)

            return self._entries.apply_to_all(
                inspect_one, "Inspecting images", threads_of(local_processes()) if decode else 1
            )

        # An image that is left out must not influence the size and channels of the others: decode at once.
        found, self.skipped = inspect_all(decode=skip_bad)
        if self.skipped and not skip_bad:
            found, self.skipped = inspect_all(decode=True)  # so that the error names all of them
            self._entries.refuse(self.skipped)
        self.properties = Properties.table([properties or Properties(0, 0) for properties in found])
        self._keep([index for index, properties in enumerate(found) if properties is not None])

    def _common_size(self) -> tuple[int, int]:
        heights, widths = self.properties.height, self.properties.width
        low, high = (heights.min().item(), widths.min().item()), (heights.max().item(), widths.max().item())
        if low != high:
            sizes = f"from {low[0]}x{low[1]} to {high[0]}x{high[1]} (height x width)"
            raise ValueError(f"the images of {self.name} differ in size, {sizes}; choose one, such as --resolution 64")
        return low

    def _number_of_channels(self, wanted: int | None) -> int:
        numbers, first = np.unique(self.properties.measured_channels, return_index=True)
        first_of = dict(zip(numbers.tolist(), first.tolist(), strict=True))
        if len(first_of) > 1:
            (one, first), (other, second) = list(first_of.items())[:2]
            kind = counted(one, "channel") if one else "8 bits"
            raise ValueError(
                f"the images of {self.name} are of several kinds: {self.where(first)} of {kind}, "
                f"{self.where(second)} of {counted(other, 'channel')} of measured values; keep one kind"
            )
        (measured,) = first_of
        if measured and wanted not in (None, measured):
            kind = f"measured values of {counted(measured, 'channel')}"
            raise ValueError(f"{self.name}: it holds {kind}, which stay as they are and cannot become {wanted}")
        if not measured and wanted not in (None, *MODES):
            raise ValueError(f"channels: {wanted} is none of 1 (grey), 2 (grey, alpha), 3 (RGB) and 4 (RGBA)")
        has_color, has_alpha = self.properties.has_color.any(), self.properties.has_alpha.any()
        return measured or wanted or (3 if has_color else 1) + int(has_alpha)

    def _decode_all(self, cache: InspectionCache, in_memory: bool | None, skip_bad: bool) -> list[str]:
        """Decodes each image once, sets `images` and `value_range`, and returns the hash of each image."""
        shape, is_measured = (self.channels, *self.resolution), bool(self.properties.measured_channels[0])
        dtype = torch.float32 if is_measured else torch.uint8
        if in_memory is None:
            in_memory = len(self) * math.prod(shape) * dtype.itemsize < available_memory() / 4
        self.images = torch.empty((len(self), *shape), dtype=dtype) if in_memory else None

        def decode(index, entry):
            if not in_memory:
                return cache(f"{shape} {self._scale}", lambda entry: summary(self._decode(entry)), entry)
            pixels = self._decode(entry)
            self.images.numpy()[index] = pixels
            return summary(pixels)

        # Pillow releases the lock of the interpreter while it decodes; with small images threads only wait for it.
        num_pixels = np.dot(self.properties.height.astype(float), self.properties.width)
        num_threads = threads_of(local_processes()) if num_pixels >= 64 * 64 * len(self) else 1
        summaries, unusable = self._entries.apply_to_all(decode, "Decoding images", num_threads)
        if not skip_bad:
            self._entries.refuse(unusable)
        self.skipped += unusable
        self._keep([index for index, result in enumerate(summaries) if result is not None])
        hashes, ranges = zip(*filter(None, summaries), strict=True)
        if is_measured:
            low, high = np.array(ranges).transpose(2, 0, 1)  # (n, C) each
            self.value_range = {"low": low.min(axis=0).tolist(), "high": high.max(axis=0).tolist()}
        return hashes

    def _keep(self, indices: list[int]) -> None:
        """Leaves all other images out."""
        if not indices:
            raise ValueError(f"{self.name}: no image can be used, of {len(self.skipped)}: {self.skipped[0]}")
        if len(indices) == len(self):
            return
        self._entries = self._entries.select(indices)
        self.properties = self.properties[indices]
        self.images = None if self.images is None else self.images[indices]
        self.labels = None if self.labels is None else self.labels[indices]
        if isinstance(self.captions, Captions):
            self.captions = self.captions.select(indices)
        elif self.captions is not None:
            self.captions = [self.captions[i] for i in indices]

    def hold_out(self, count: int, seed: int = 0) -> "PictureDataset":
        """Takes `count` images out of this data set and returns them as another. They are drawn at random, from each
        class its share, but never the last of a class."""
        num_kept = 1 if self.labels is None else len(self.labels.unique())
        if not 0 < count <= len(self) - num_kept:
            what = f"to hold out {counted(count, 'image')} of its {len(self)} would empty a class"
            raise ValueError(f"{self.name}: {what}; collect more")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        if self.labels is not None:
            labels, by_class = self.labels[order], self.labels[order].argsort(stable=True)
            sizes = torch.bincount(labels)
            first = (sizes.cumsum(0) - sizes)[labels[by_class]]
            rank = torch.empty_like(labels).scatter(0, by_class, torch.arange(len(labels)) - first)  # in its class
            share = ((rank + 0.5) / sizes[labels]).masked_fill(rank == sizes[labels] - 1, math.inf)
            order = order[share.argsort(stable=True)]
        held_out = copy.copy(self)
        for part, indices, role in ((held_out, order[:count], "held"), (self, order[count:], "kept")):
            part._keep(indices.sort().values.tolist())
            part.fingerprint = f"{part.fingerprint}-{role}-{len(indices)}-{seed}"
        held_out.may_have_been_trained_on = True
        return held_out

    def with_value_range(self, value_range: dict[str, list[float]] | None) -> "PictureDataset":
        """A copy whose measured values are mapped by another range, that of a model for example."""
        return copy.copy(self) if value_range == self.value_range else self._with(value_range=value_range)

    @property
    def pictures(self) -> "PictureDataset":
        """The images themselves, as of a data set of their latents."""
        return self

    @property
    def sample(self) -> "PictureDataset":
        """Images that stand for all: these, or some of a stream."""
        return self

    def __len__(self) -> int:
        return len(self._entries)

    def __getitems__(self, indices: Sequence[int]) -> dict:
        """A batch: "images", `uint8` or `float32` in [-1, 1], (n, C, H, W), and where there are any, "class_labels",
        `int64` (n,), and "captions", a list."""
        indices = torch.as_tensor(indices).tolist()
        if self.images is not None:
            images = self.images[indices]
        else:
            decoded, unusable = self._entries.apply(lambda _, entry: self._decode(entry), indices)
            self._entries.refuse(unusable)  # it was usable at the start
            images = torch.from_numpy(np.stack(decoded))
        if self.value_range is not None:
            images = to_model_range(images, self.value_range)
        return {"images": images, **self._targets(indices)}

    def __getitem__(self, index: int) -> dict:
        """A single image under the same keys: "images" (C, H, W), "class_labels" (), "captions" its own."""
        return {key: value[0] for key, value in self.__getitems__([range(len(self))[index]]).items()}

    def x_0(
        self, batch: dict | Sequence[int], rng: BatchRandom | None = None, augment: Augmentation = Augmentation()
    ) -> torch.Tensor:
        """The images of a batch as the models see them, `float32` in [-1, 1], (n, C, H, W). The batch is what
        `__getitems__` returned, on any device, or indices; without the random numbers there is no augmentation."""
        x_0 = to_model_range((batch if isinstance(batch, dict) else self.__getitems__(batch))["images"])
        if rng is not None and augment.mirror:
            x_0 = flip(x_0, rng)
        if rng is not None and augment.max_shift:
            x_0 = shift(x_0, rng, augment.max_shift)
        return x_0

    def joined(self, batch: dict, x_0: torch.Tensor) -> dict:
        """A batch of the images of another, followed by images given as x_0."""
        return {"images": torch.cat([self.x_0(batch), x_0])}

    def check_augmentation(self, augment: Augmentation) -> None:
        """Images can be varied in every way, unlike latents."""

    def where(self, index: int) -> str:
        """Where an image comes from: its file, or its row."""
        return self._entries.where(index)

    def _decode(self, entry) -> np.ndarray:
        """Pixels of one image, `uint8` (C, H, W), or measured values, `float32`."""
        return self._pixels(open_image(entry))

    def _pixels(self, image: Image.Image | np.ndarray) -> np.ndarray:
        size = width, height = self.resolution[::-1]
        fit = functools.partial(ImageOps.fit, size=size, method=Image.Resampling.LANCZOS)
        if isinstance(image, np.ndarray):
            if self._scale and image.shape[1:] != (height, width):
                return np.stack([fit(Image.fromarray(plane)) for plane in image])
            return image
        with image:
            if self._scale:
                # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; twice our size leaves the filter its choice.
                image.draft(None, (2 * max(size),) * 2)
            converted = to_mode(image, MODES[self.channels])
        if self._scale and converted.size != size:
            converted = fit(converted)
        if converted.size != size:
            raise ValueError(self._wrong_size)
        return np.asarray(converted).reshape(height, width, -1).transpose(2, 0, 1).copy()
