"""A data set of images of one size."""

import copy
import errno
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import psutil
import torch
from datasets.utils import tqdm
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_genmod.data.decoding import _MODES, Properties, _convert, _inspect, _Memory, _open, _summary
from hf_genmod.data.randomness import Augmentation, BatchRandom, flip, shift
from hf_genmod.data.sources import _ARRAYS
from hf_genmod.data.value_range import to_model_range

_CHUNK = 64  # pictures that a thread holds at once


class PictureDataset(torch.utils.data.Dataset):
    """Pictures of one size as `uint8` (n, C, H, W), with labels and captions where there are any.

    Every picture is decoded once at the start, so that an unreadable one is found before training and not hours into
    it; the pixels are then kept if memory allows, else decoded again on access. Both give the same bits. What was
    found out about a file is remembered for the next time, until its time or size changes.

    Measured values, of more than 8 bits or of other than the usual channels, are `float32`; what each channel ranges
    over in the whole data set (`value_range`) is mapped to [-1, 1], the range of the models.

    Args:
        source (`datasets.Dataset` or `list` of `PIL.Image.Image`): the pictures; of a data set its column "image", of
            type `datasets.Image(decode=False)`, `datasets.Array2D`, (H, W), or `datasets.Array3D`, with the channels
            first, or last if that axis is the shorter one. Paths of .npy files hold arrays of the same shapes.
        name (`str`): how errors call the source.
        resolution (`tuple[int, int]`, *optional*): (height, width). A picture of another size is scaled, antialiased
            and with its aspect ratio kept, until it covers that size, then cropped to its middle. By default the size
            that all pictures have.
        channels (`int`, *optional*): 1 grey, 2 grey with alpha, 3 RGB, 4 RGBA. By default the fewest that represent
            every picture faithfully. Where alpha is given up, the picture is laid on white. Measured values keep
            their channels, however many.
        labels (`torch.Tensor`, *optional*): `int64` (n,), indices into `label_names`.
        label_names (`list[str]`, *optional*): name of each class.
        captions (`list`, *optional*): a string per picture, or a list of strings where a picture has several captions.
        in_memory (`bool`, *optional*): whether to keep the decoded pixels. By default if they take less than a quarter
            of the available memory.
        on_bad_image (`str`): "error" refuses the whole data set if any picture cannot be used, and names it; "skip"
            leaves those out.

    Attributes:
        images (`torch.Tensor` or `None`): all pixels, `uint8`, or measured values, `float32` in units of their own,
            (n, C, H, W), if they are kept in memory.
        value_range (`dict` or `None`): the lowest and the highest measured value of each channel, as `"low"` and
            `"high"`; `None` for pictures of 8 bits.
        fingerprint (`str`): hash of the pixels, labels, their names and captions that this data set returns; the same
            in every process and run, wherever the pictures come from.
        properties (`list[Properties]`): what each picture is before it is scaled and converted.
        skipped (`list[str]`): which pictures were left out, and why.
        may_have_been_trained_on (`bool`): Whether these images were held out of a split that a model may have been
            trained on as a whole.

    Raises:
        `ValueError`: for pictures that cannot be used, even with "skip" if none is left, and for pictures of several
            sizes without a `resolution`.
    """

    vae = None  # as that of `LatentDataset`
    may_have_been_trained_on = False

    def __init__(
        self,
        source: datasets.Dataset | list[Image.Image],
        name: str,
        resolution: tuple[int, int] | None = None,
        channels: int | None = None,
        labels: torch.Tensor | None = None,
        label_names: list[str] | None = None,
        captions: list | None = None,
        in_memory: bool | None = None,
        on_bad_image: str = "error",
    ):
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image: {on_bad_image!r} is neither 'error' nor 'skip'")
        self.name, self.labels, self.label_names, self.captions = name, labels, label_names, captions
        if not isinstance(source, list):
            is_array = isinstance(source.features["image"], _ARRAYS)
            source = source.select_columns("image").with_format("numpy" if is_array else "arrow")
        self._source = source

        self._rows = range(len(source))  # those that are used
        self._skip_bad, self.skipped = on_bad_image == "skip", []

        remember = _Memory(name)
        # A picture to be left out must not have a say in the others' size and channels, so that it is decoded at once.
        found = self._inspect_all(remember, decode=self._skip_bad)
        if None in found and not self._skip_bad:
            self._inspect_all(remember, decode=True)  # for the error to name all of them
        if not self._skip_bad:
            self._refuse(self.skipped)
        self.properties = found
        self._keep([index for index, properties in enumerate(found) if properties is not None])
        heights, widths, colors, alphas, measured = zip(*self.properties, strict=True)
        low, high = (min(heights), min(widths)), (max(heights), max(widths))
        if resolution is None and low != high:
            raise ValueError(
                f"the pictures of {name} differ in size, from {low[0]}x{low[1]} to {high[0]}x{high[1]} (height x "
                f"width); choose one to bring them to, for example --resolution 64"
            )
        self._scale = resolution is not None
        self.resolution = resolution or low
        self.channels = self._number_of_channels(channels, any(colors), any(alphas), measured)

        shape = (self.channels, *self.resolution)
        dtype = torch.float32 if any(measured) else torch.uint8
        if in_memory is None:
            in_memory = len(self) * math.prod(shape) * dtype.itemsize < psutil.virtual_memory().available / 4
        images = torch.empty((len(self), *shape) if in_memory else 0, dtype=dtype)

        def decode(entry):
            if in_memory:
                pixels = self._decode(entry)
                return pixels, _summary(pixels)
            return None, remember(f"{shape} {self._scale}", lambda entry: _summary(self._decode(entry)), entry)

        digest = hashlib.blake2b(digest_size=8)
        # Pillow frees the interpreter while it decodes; over small pictures the threads would only get in one
        # another's way.
        threads = os.cpu_count() if np.dot(heights, widths) >= 64 * 64 * len(self) else 1
        usable, ranges = [], []
        for index, result in enumerate(self._for_all(decode, "Decoding pictures", threads)):
            if result is not None:
                pixels, (own_digest, value_range) = result
                digest.update(own_digest.encode())
                ranges.append(value_range)
                if in_memory:
                    images.numpy()[len(usable)] = pixels
                usable.append(index)
        if not self._skip_bad:
            self._refuse(self.skipped)
        self._keep(usable)
        remember.save()
        self.images = images[: len(self)] if in_memory else None
        self.value_range = None
        if any(measured):
            ranges = np.array(ranges)  # (n, C, 2)
            self.value_range = {
                "low": ranges[..., 0].min(axis=0).tolist(),
                "high": ranges[..., 1].max(axis=0).tolist(),
            }
        captions = self.captions
        targets = ((len(self), *shape), label_names, captions, None if self.labels is None else self.labels.tolist())
        digest.update(repr(targets).encode())
        self.fingerprint = digest.hexdigest()

    def _inspect_all(self, remember: "_Memory", decode: bool) -> list["Properties | None"]:
        self.skipped = []
        inspect = functools.partial(_inspect, decode=decode)
        remembered = functools.partial(remember, f"decoded {decode}", inspect)
        results = self._for_all(remembered, "Inspecting pictures", os.cpu_count() if decode else 1)
        return [result and Properties(*result) for result in results]

    def _number_of_channels(self, wanted: int | None, color: bool, alpha: bool, measured: tuple[int, ...]) -> int:
        if any(measured):
            kinds = {number: measured.index(number) for number in sorted(set(measured))}
            if len(kinds) > 1:
                (one, first), (other, second) = list(kinds.items())[:2]
                kind = f"{one} channels" if one else "8 bits"
                raise ValueError(
                    f"the pictures of {self.name} are of several kinds: {self.where(first)} of {kind}, "
                    f"{self.where(second)} of {other} channels of measured values; keep those of one kind"
                )
            if wanted not in (None, measured[0]):
                raise ValueError(
                    f"{self.name}: it holds measured values of {measured[0]} channels, which stay as they are; they "
                    f"cannot be made {wanted}"
                )
            return measured[0]
        if wanted not in (None, *_MODES):
            raise ValueError(f"channels: {wanted} is none of 1 (grey), 2 (grey, alpha), 3 (RGB) and 4 (RGBA)")
        return wanted or (3 if color else 1) + alpha

    def _keep(self, indices: list[int]) -> None:
        """Leaves all others out."""
        if not indices:
            raise ValueError(f"none of the {len(self.skipped)} pictures of {self.name} can be used: {self.skipped[0]}")
        if len(indices) == len(self):
            return
        self._rows = [self._rows[i] for i in indices]
        self.properties = [self.properties[i] for i in indices]
        is_list = isinstance(self._source, list)
        self._source = [self._source[i] for i in indices] if is_list else self._source.select(indices)
        self.labels = None if self.labels is None else self.labels[indices]
        self.captions = None if self.captions is None else [self.captions[i] for i in indices]

    def hold_out(self, count: int, seed: int = 0) -> "PictureDataset":
        """Takes `count` pictures out of this data set and returns them as one of their own: drawn at random, from each
        class its share, but never its last one."""
        num_kept = 1 if self.labels is None else len(self.labels.unique())
        if not 0 < count <= len(self) - num_kept:
            raise ValueError(
                f"{self.name}: {count} of its {len(self)} pictures cannot be held out without emptying a class; "
                "collect more"
            )
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
            indices = indices.sort().values
            part._keep(indices.tolist())
            part.images = None if part.images is None else part.images[indices]
            part.fingerprint = f"{part.fingerprint}-{role}-{len(indices)}-{seed}"
        held_out.may_have_been_trained_on = True
        return held_out

    def with_value_range(self, value_range: dict[str, list[float]] | None) -> "PictureDataset":
        """A copy whose measured values are mapped by another range, that of a model for example."""
        other = copy.copy(self)
        if value_range != self.value_range:
            digest = hashlib.blake2b(repr(value_range).encode(), digest_size=4).hexdigest()
            other.value_range, other.fingerprint = value_range, f"{self.fingerprint}-range-{digest}"
        return other

    def x_0(
        self,
        batch: dict | Sequence[int],
        rng: BatchRandom | None = None,
        augment: Augmentation = Augmentation(),
    ) -> torch.Tensor:
        """
        The images of a batch as the models see them.

        Args:
            batch (`dict` or `Sequence[int]`): What `__getitems__` returned, on any device, or indices.
            rng ([`BatchRandom`], *optional*): The random numbers of the augmentation; without them there is none.
            augment ([`Augmentation`]): How the images are varied.

        Returns:
            `torch.Tensor`: `float32` in [-1, 1], (n, C, H, W).
        """
        x_0 = to_model_range((batch if isinstance(batch, dict) else self.__getitems__(batch))["images"])
        if rng is not None and augment.mirror:
            x_0 = flip(x_0, rng)
        if rng is not None and augment.max_shift:
            x_0 = shift(x_0, rng, augment.max_shift)
        return x_0

    def check_augmentation(self, augment: Augmentation) -> None:
        """Images of pixels can be varied in every way."""

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, indices: Sequence[int]) -> dict:
        """A whole batch: "images", `uint8` or `float32` in [-1, 1], (n, C, H, W), and where there are any,
        "class_labels", `int64` (n,), and "captions", a list."""
        if self.images is not None:
            images = self.images[torch.as_tensor(indices)]
        else:
            decoded, unusable = self._apply(self._decode, indices)
            self._refuse(unusable)  # it was usable at the start
            images = torch.from_numpy(np.stack(decoded))
        batch = {"images": images if self.value_range is None else to_model_range(images, self.value_range)}
        if self.labels is not None:
            batch["class_labels"] = self.labels[torch.as_tensor(indices)]
        if self.captions is not None:
            batch["captions"] = [self.captions[i] for i in indices]
        return batch

    def __getitem__(self, index: int) -> dict:
        """A single picture under the same keys: "images" (C, H, W), "class_labels" (), "captions" its own."""
        return {key: value[0] for key, value in self.__getitems__([range(len(self))[index]]).items()}

    def _decode(self, entry) -> np.ndarray:
        """Pixels of one picture, `uint8` (C, H, W), or measured values, `float32`."""
        height, width = self.resolution
        picture = _open(entry)
        if isinstance(picture, np.ndarray):
            if self._scale and picture.shape[1:] != (height, width):
                planes = [Image.fromarray(plane) for plane in picture]
                return np.stack([ImageOps.fit(plane, (width, height), Image.Resampling.LANCZOS) for plane in planes])
            return picture
        with picture as image:
            if self._scale:
                # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; twice our size leaves the filter its choice.
                image.draft(None, (2 * max(height, width),) * 2)
            ImageOps.exif_transpose(image, in_place=True)
            picture = _convert(image, _MODES[self.channels])
        if self._scale and picture.size != (width, height):
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
        if picture.size != (width, height):
            raise ValueError("its size is not the one in its header; save it again")
        return np.asarray(picture).reshape(height, width, -1).transpose(2, 0, 1).copy()

    def _apply(self, function: Callable, indices: Sequence[int]) -> tuple[list, list[str]]:
        """function(entry) of each picture, None for those that cannot be used, and what is wrong with these."""
        if isinstance(self._source, list):
            entries = [self._source[i] for i in indices]
        else:
            entries = self._source[indices]["image"]
            if not isinstance(self._source.features["image"], _ARRAYS):
                entries = entries.to_pylist()  # {"bytes", "path"}; either may be None
        results, unusable = [], []
        for index, entry in zip(indices, entries, strict=True):
            try:
                results.append(function(entry))
            except Exception as error:  # the formats of Pillow raise nearly everything on broken files
                if isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, errno.ENOENT):
                    raise  # not the fault of the picture
                unknown = isinstance(error, UnidentifiedImageError)
                reason = "no picture that Pillow knows" if unknown else getattr(error, "strerror", None) or str(error)
                results.append(None)
                unusable.append(f"{self._where(index, entry)}: {reason}")
        return results, unusable

    def where(self, index: int) -> str:
        """Where a picture comes from: its file, or its row."""
        is_file = not isinstance(self._source, list) and isinstance(self._source.features["image"], datasets.Image)
        return self._where(index, self._source[index]["image"].to_pylist()[0] if is_file else None)

    def _where(self, index: int, entry) -> str:
        is_file = isinstance(entry, dict) and entry["bytes"] is None and entry["path"]
        return entry["path"] if is_file else f"row {self._rows[index]} of {self.name}"

    def _for_all(self, function: Callable, description: str, num_threads: int = 1) -> Iterator:
        """function(entry) of all pictures in order, None for those that are not usable and added to `skipped`."""
        chunks = [range(i, min(i + _CHUNK, len(self))) for i in range(0, len(self), _CHUNK)]
        with (
            ThreadPoolExecutor(num_threads) as threads,
            tqdm(total=len(self), desc=description, unit=" pictures", disable=None) as progress,
        ):
            for results, new in threads.map(lambda chunk: self._apply(function, chunk), chunks):
                self.skipped += new
                yield from results
                progress.update(len(results))

    def _refuse(self, unusable: list[str]) -> None:
        if unusable:
            more = f"; and {len(unusable) - 5} more" if len(unusable) > 5 else ""
            raise ValueError(
                f"{len(unusable)} of the {len(self)} pictures of {self.name} cannot be used (--on_bad_image skip "
                f"leaves such out), repair or remove {'it' if len(unusable) == 1 else 'them'}: "
                f"{'; '.join(unusable[:5])}{more}"
            )
