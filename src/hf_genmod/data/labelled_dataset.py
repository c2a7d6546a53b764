"""What data sets of images and of their latents have in common: labels, captions and a fingerprint."""

import hashlib

import torch


class LabelledDataset(torch.utils.data.Dataset):
    """
    A data set with labels and captions, where there are any.

    Attributes:
        labels (`torch.Tensor` or `None`): `int64` (n,), indices into `label_names`.
        label_names (`list[str]` or `None`): The name of each class.
        captions (`list` or `None`): A string for each image, or a list of strings if it has several captions.
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
