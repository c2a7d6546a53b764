"""`stream_pictures("user/name", resolution=64)`: images that are read from shards while a model trains on them."""

import copy
import hashlib
from collections.abc import Callable, Sequence

import datasets
import numpy as np
import torch

from hf_genmod.data.block_order import BlockOrder, lanes_and_window
from hf_genmod.data.decoding import inspect, open_image
from hf_genmod.data.entries import Entries
from hf_genmod.data.loading import (
    captions_of,
    height_width,
    image_column_of,
    label_column_of,
    labels_of,
    refuse_unknown_columns,
    split_of,
    warn_of_names,
)
from hf_genmod.data.metadata import CAPTION_COLUMNS
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.shard_files import find_shards
from hf_genmod.data.shards import BUFFER, Shards
from hf_genmod.data.sources import ARRAY_TYPES, Found, refuse_unused
from hf_genmod.data.value_range import to_model_range
from hf_genmod.errors import counted
from hf_genmod.processes import processes

NUM_SAMPLE_IMAGES, NUM_SAMPLE_CAPTIONS = 1024, 8192


def stream_pictures(
    dataset: str | Found,
    *,
    split: str = "train",
    resolution: int | str | tuple[int, int] | None = None,
    channels: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    config_name: str | None = None,
    array_axes: str | None = None,
    on_bad_image: str = "error",
    require_labels: bool = False,
    require_captions: bool = False,
    limit: int | None = None,
) -> PictureDataset:
    """
    One split of a data set of parquet files or WebDatasets as [`StreamedPictures`].

    Args:
        dataset (`str` or [`Found`]): See [`~hf_genmod.data.shard_files.find_shards`], or what that has found.
        limit (`int`, *optional*): How many images to take, which are kept in memory: the first ones of 16 blocks, or
            of more if these do not have as many.

    The other arguments, and the errors, are those of [`~hf_genmod.data.loading.load_pictures`].
    """
    refuse_unused("a stream", array_axes=array_axes)
    splits, name = find_shards(dataset, config_name)

    def read(paths):
        with processes().local_main_process_first():  # which writes down what is in WebDatasets
            return Shards(paths, on_bad_image, label_column)

    shards = read(split_of(splits, split, name))
    source, name = name, f"{name} ({split})" if len(splits) > 1 else name
    refuse_unknown_columns(shards.head, name, image_column, label_column, caption_column)
    image_column = image_column_of(shards.head, name, image_column)
    if isinstance(shards.head.features[image_column], ARRAY_TYPES):
        raise ValueError(f"streaming: {name} holds arrays, which are not read as a stream; leave out --streaming")
    require_labels, require_captions = require_labels or bool(label_column), require_captions or bool(caption_column)
    label_column = label_column_of(shards.head, name, label_column, require_labels, shards.where)
    labels = label_names = None
    if label_column is not None:
        # The classes are those of all splits, so that a label means the same in each of them.
        columns = {split: shards.labels(label_column)}
        if not isinstance(shards.head.features[label_column], datasets.ClassLabel):
            columns |= {other: read(splits[other]).labels(label_column) for other in splits if other != split}
        labels, label_names = labels_of(columns, columns[split], name, label_column, require_labels, shards.where)
    warn_of_names(label_names or [], source)
    if captions_of(shards.head, name, caption_column, require_captions, shards.where) is None:
        caption_column = None
    else:
        caption_column = caption_column or next(key for key in CAPTION_COLUMNS if key in shards.head.column_names)
    size = None if resolution is None else height_width(resolution)
    entries = ShardEntries(shards, name, image_column, caption_column)
    pictures = StreamedPictures(entries, name, size, channels, labels, label_names, on_bad_image)
    return pictures if limit is None else pictures.in_memory(limit)


class ShardEntries(Entries):
    """The images and captions in shards before they are decoded."""

    def __init__(self, shards: Shards, name: str, image_column: str, caption_column: str | None):
        self._source, self._name, self._rows, self._is_array = shards, name, range(len(shards)), False
        self._image, self._caption = image_column, caption_column
        shards.columns = [image_column] if caption_column is None else [image_column, caption_column]

    @property
    def shards(self) -> Shards:
        return self._source

    @property
    def has_captions(self) -> bool:
        return self._caption is not None

    def without(self, taken: np.ndarray) -> "ShardEntries":
        """The entries without those that `spread` took."""
        return ShardEntries(self._source.without(taken), self._name, self._image, self._caption)

    def _read(self, indices: Sequence[int]) -> list:
        rows = [self._source[self._rows[i]] for i in indices]
        return [row if isinstance(row, Exception) else _entry(row[self._image]) for row in rows]

    def captions(self, indices: Sequence[int]) -> list:
        """The captions of images, `None` for those that have none, "" for those that cannot be read."""
        rows = [self._source[self._rows[i]] for i in indices]
        captions = ["" if isinstance(row, Exception) else row[self._caption] for row in rows]
        return [None if caption == [] else caption for caption in captions]

    def captions_alone(self, indices: Sequence[int]) -> list:
        """As `captions`, without reading the images."""
        others = copy.copy(self)
        others._source = self._source.of_columns([self._caption])
        return others.captions(indices)

    def batch(
        self, indices: Sequence[int], decode: Callable, blank: np.ndarray, labels: torch.Tensor | None, skip: bool
    ) -> tuple[torch.Tensor, dict]:
        """
        What `decode(index, entry)` makes of rows, (n, ...), and the rest of their batch: "class_labels" and
        "captions", where there are any. If a row cannot be used, `blank` takes its place, and "failure" is the reason;
        with `skip`, the next usable row does, if there is one, and "unusable" has the reasons.
        """
        indices, batch = torch.as_tensor(indices).tolist(), {}
        decoded, unusable = self.apply(decode, indices)
        bad = [i for i, row in enumerate(decoded) if row is None]
        for i, reason in zip(bad, tuple(unusable), strict=True):
            for other in self.shards.after(indices[i]) if skip else ():
                (decoded[i],), reasons = self.apply(decode, [other])
                if not reasons:
                    indices[i] = other
                    break
                unusable += reasons
                (reason,) = reasons
            if decoded[i] is None:
                batch.setdefault("failure", reason)
                decoded[i] = blank
        if unusable:
            batch["unusable"] = unusable
        if labels is not None:
            batch["class_labels"] = labels[indices]
        if self.has_captions:
            batch["captions"] = [caption or "" for caption in self.captions(indices)]
        return torch.from_numpy(np.stack(decoded)), batch

    def order(self, philox, epoch: int, batch_size: int) -> BlockOrder:
        """The order of an epoch, for [`GlobalBatchSampler`]."""
        lanes = lanes_and_window(self.shards.sizes, self.shards.num_bytes, BUFFER)
        return BlockOrder(self.shards.sizes, batch_size, *lanes, philox, epoch)

    def where(self, index: int, entry=None) -> str:
        row = self._rows[index]
        return self._source.shard_of(row) if isinstance(entry, Exception) else self._source.where(row)


def _entry(value: dict | bytes | str | None) -> dict | None:
    """An image as `{"bytes", "path"}`, from what its column holds."""
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    return {"bytes": value, "path": None} if isinstance(value, bytes) else value and {"path": None, **value}


class StreamedPictures(PictureDataset):
    """
    Images of one size that are read from shards when they are asked for. What would need a pass over all of them is
    taken from a sample, the images at the start of 16 blocks: size, channels and value range. A later image of another
    size, or with colour, transparency or measured values that the sample has not, counts as unusable, unless
    `resolution` and `channels` say what to make of it. The labels of all images are known.

    In a batch with an unusable image, "failure" is the reason, and the image is blank. If `on_bad_image` is "skip",
    the next usable image takes its place, and "unusable" has the reasons.

    Args:
        entries ([`ShardEntries`]): The images.
        name, resolution, channels, labels, label_names, on_bad_image: As of [`PictureDataset`].

    Attributes:
        sample ([`PictureDataset`]): 1,024 images, in memory.
        captions (`list` or `None`): Those of 8,192 images.
    """

    _wrong_size = "its size is not that of the first images; choose one for all, such as --resolution 64"

    def __init__(
        self,
        entries: ShardEntries,
        name: str,
        resolution: tuple[int, int] | None = None,
        channels: int | None = None,
        labels: torch.Tensor | None = None,
        label_names: list[str] | None = None,
        on_bad_image: str = "error",
    ):
        self.name, self.labels, self.label_names, self.on_bad_image = name, labels, label_names, on_bad_image
        self.skipped, self.images, self._entries = entries.shards.skipped, None, entries
        self.resolution, self.channels, self._scale = resolution, channels, resolution is not None
        self._sample = sample = self.in_memory(NUM_SAMPLE_IMAGES)
        self._as_sample = channels is None
        self.resolution, self.channels, self.value_range = sample.resolution, sample.channels, sample.value_range
        self.properties, self.captions = sample.properties, None
        if entries.has_captions:
            rows = entries.shards.rows_of(entries.shards.spread(NUM_SAMPLE_CAPTIONS))
            self.captions = [caption for caption in entries.captions_alone(rows) if caption]
        kind = self.channels, self.resolution, self.value_range, label_names, entries.has_captions
        content = [entries.shards.fingerprint.encode(), repr(kind).encode()]
        content += [] if labels is None else [labels.numpy().tobytes()]
        self.fingerprint = hashlib.blake2b(b"".join(content), digest_size=8).hexdigest()

    def in_memory(self, count: int) -> PictureDataset:
        """A data set of up to `count` of the images: the first ones of 16 blocks, or of more if these hold less."""
        return self._in_memory(self._entries.shards.spread(count))

    def _in_memory(self, taken: np.ndarray) -> PictureDataset:
        rows, captions = self._entries.shards.rows_of(taken), None
        if self._entries.has_captions:
            captions = self._entries.captions_alone(rows)
            missing = [row for row, caption in zip(rows, captions, strict=True) if caption is None]
            if missing and self.on_bad_image != "skip":
                remedy = "caption it, or leave such out with --on_bad_image skip"
                raise ValueError(f"{self._entries.where(missing[0])}: the image has no caption; {remedy}")
            rows, captions = rows[~np.isin(rows, missing)], [text for text in captions if text is not None]
        labels = None if self.labels is None else self.labels[rows]
        kind = self.resolution if self._scale else None, self.channels, labels, self.label_names, captions
        entries = self._entries.select(rows.tolist())
        pictures = PictureDataset(entries, self.name, *kind, on_bad_image=self.on_bad_image)
        self._entries.shards.forget()
        return pictures

    @property
    def shards(self) -> Shards:
        return self._entries.shards

    @property
    def sample(self) -> PictureDataset:
        return self._sample

    def with_value_range(self, value_range: dict[str, list[float]] | None) -> "StreamedPictures":
        other = super().with_value_range(value_range)
        other._sample = self._sample.with_value_range(value_range)
        return other

    def hold_out(self, count: int, seed: int = 0) -> PictureDataset:
        """Takes the images of `in_memory(count)` out of this data set, whatever the seed, but neither out of `sample`
        nor their captions out of `captions`."""
        if not 0 < count < len(self):
            what = f"to hold out {counted(count, 'image')} of its {len(self)} would leave none"
            raise ValueError(f"{self.name}: {what}; collect more")
        shards = self._entries.shards
        taken = shards.spread(count)
        held_out = self._in_memory(taken)
        is_kept = torch.ones(len(self), dtype=torch.bool)
        is_kept[shards.rows_of(taken)] = False
        self.labels = None if self.labels is None else self.labels[is_kept]
        self._entries = self._entries.without(taken)
        self.fingerprint += f"-kept-{len(self)}"
        held_out.may_have_been_trained_on = True
        return held_out.with_value_range(self.value_range)

    def __getitems__(self, indices: Sequence[int]) -> dict:
        """A batch, see [`PictureDataset`], with "failure" or "unusable" if there is an unusable image."""
        blank = np.zeros((self.channels, *self.resolution), "uint8" if self.value_range is None else "float32")
        skip = self.on_bad_image == "skip"
        pixels, batch = self._entries.batch(indices, self._decode_row, blank, self.labels, skip)
        batch["images"] = pixels if self.value_range is None else to_model_range(pixels, self.value_range)
        return batch

    def order(self, philox, epoch: int, batch_size: int) -> BlockOrder:
        """See [`ShardEntries`]."""
        return self._entries.order(philox, epoch, batch_size)

    def _decode_row(self, index: int, entry) -> np.ndarray:
        pixels = self._decode(entry)
        if self._entries.has_captions and self._entries.captions([index])[0] is None:
            raise ValueError("it has no caption")
        return pixels

    def _decode(self, entry) -> np.ndarray:
        image, is_measured = open_image(entry), self.value_range is not None
        kind = "it differs in colour, transparency or measured values from the first images"
        if isinstance(image, np.ndarray) != is_measured:
            raise ValueError(f"{kind}; remove it")
        if self._as_sample and not is_measured:
            may_have_color = self.channels < 3 and image.mode not in ("1", "L", "LA")
            if may_have_color or (self.channels % 2 and image.has_transparency_data):
                properties = inspect(entry)
                if (properties.has_color and self.channels < 3) or (properties.has_alpha and self.channels % 2):
                    raise ValueError(f"{kind}; give --channels, or remove it")
        pixels = self._pixels(image)
        if pixels.shape != (self.channels, *self.resolution):
            raise ValueError(self._wrong_size)
        return pixels
