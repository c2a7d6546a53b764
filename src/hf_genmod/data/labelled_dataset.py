"""What data sets of images and of their latents have in common: labels, captions and a fingerprint."""

import hashlib
from collections.abc import Iterator, Sequence

import pyarrow as pa
import torch


class Captions(Sequence):
    """The captions of images as a column of Arrow, on the disk or in memory. Python would make an object of each, and
    every process that loads images a copy of it."""

    def __init__(self, column: pa.ChunkedArray):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int | slice) -> str | list:
        return self._column[index].to_pylist() if isinstance(index, slice) else self._column[index].as_py()

    def __iter__(self) -> Iterator[str | list[str]]:
        for chunk in self._column.chunks:
            for part in range(0, len(chunk), 1000):
                yield from chunk[part : part + 1000].to_pylist()

    def __eq__(self, other) -> bool:
        return [*self] == [*other]

    def select(self, indices: list[int]) -> "Captions":
        """Those of some of the images."""
        return Captions(self._column.take(pa.array(indices, pa.int64())))


class LabelledDataset(torch.utils.data.Dataset):
    """
    A data set with labels and captions, where there are any.

    Attributes:
        labels (`torch.Tensor` or `None`): `int64` (n,), indices into `label_names`.
        label_names (`list[str]` or `None`): The name of each class.
        captions (sequence or `None`): A string for each image, or a list of strings if it has several captions.
        fingerprint (`str`): Hash of all that the data set returns, the same in every process and run.
    """

    @property
    def classes_without_images(self) -> list[str]:
        """The names of the classes of which there is no image."""
        seen = set(self.labels.tolist())
        return [name for label, name in enumerate(self.label_names) if label not in seen]

    def with_labels(self, labels: torch.Tensor, label_names: list[str]):
        """A copy with other labels."""
        return self._with(labels=labels, label_names=label_names)

    def with_captions(self, captions: list):
        """A copy with other captions."""
        return self._with(captions=captions)

    def _with(self, **changes):
        """A copy with other attributes, which its fingerprint covers."""
        other = object.__new__(type(self))
        vars(other).update(vars(self) | changes)
        values = {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in changes.items()}
        other.fingerprint += "-" + hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()
        return other

    def _targets(self, indices: list[int]) -> dict:
        """The labels and captions of a batch."""
        targets = {}
        if self.labels is not None:
            targets["class_labels"] = self.labels[indices]
        if self.captions is not None:
            targets["captions"] = [self.captions[i] for i in indices]
        return targets
