"""Class labels and classifier-free guidance."""

import difflib
import math
from numbers import Integral, Real

import torch

from .base import GenerationPipeline


class ClassConditionalPipeline(GenerationPipeline):
    """What the pipelines that are asked for classes share: the names of the labels, and classifier-free guidance."""

    @property
    def num_classes(self) -> int | None:
        """The number of labels that can be asked for; `None` of an upsampler without labels."""
        return self.unet.config.num_classes

    @property
    def labels(self) -> dict[str, int]:
        """The label of each name, such as `{"airplane": 0, ...}`; empty where the checkpoint has no names."""
        return {name: index for index, name in (self.config.id2label or {}).items()}

    def _register_names(self, id2label, value_range):
        if id2label is not None:
            # JSON has made the keys strings, and sorted them as such.
            id2label = dict(sorted((int(index), name) for index, name in id2label.items()))
        self.register_to_config(id2label=id2label, value_range=value_range)

    def _classifier_free_guidance(self, x_t, t, weights, gamma, **condition):
        """ε̃ = ε_∅ + γ Σ_k w_k (ε_k − ε_∅) with the weights (n, num_classes), in as few passes as there can be; of what
        else each picture is conditioned on, (n, ...), both ε know."""
        n, channels = x_t.shape[:2]
        picture, label = weights.nonzero(as_tuple=True)
        null = torch.full((n,), self.unet.config.num_classes, device=x_t.device)
        if gamma == 0:
            return self._denoise(x_t, t, class_labels=null, **condition)
        w = weights[picture, label, None, None, None]
        if gamma == 1 and len(picture) == n and (w == 1).all():
            return self._denoise(x_t, t, class_labels=label, **condition)
        condition = {name: torch.cat([value, value[picture]]) for name, value in condition.items()}
        labels = torch.cat([null, label])
        together = self._denoise(torch.cat([x_t, x_t[picture]]), t, class_labels=labels, **condition)
        eps_null, eps_k = together[:n, :channels], together[n:, :channels]
        direction = torch.zeros_like(eps_null).index_add(0, picture, w * (eps_k - eps_null[picture]))
        # A learned variance is not guided: it is the mean of those of the labels.
        share = w.abs() / weights.abs().sum(dim=1)[picture, None, None, None]
        variance = torch.zeros_like(together[:n, channels:]).index_add(0, picture, share * together[n:, channels:])
        return torch.cat([eps_null + gamma * direction, variance], dim=1)

    def _label_weights(self, class_labels) -> torch.Tensor:
        """The weight of each label for each picture, (n, num_classes): a one where a single label is asked for."""
        if hasattr(class_labels, "tolist"):  # of torch or numpy
            class_labels = class_labels.reshape(-1).tolist()
        if not isinstance(class_labels, (list, tuple)):
            class_labels = [class_labels]
        if not class_labels:
            raise ValueError("class_labels: there are none; give one for each picture")
        weights = torch.zeros(len(class_labels), self.num_classes)
        for row, request in zip(weights, class_labels, strict=True):
            for label, weight in request.items() if isinstance(request, dict) else [(request, 1.0)]:
                if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
                    raise ValueError(f"class_labels: the weight {weight!r} of {label!r} is not a finite number")
                row[self._label_index(label)] += weight
            if not row.isfinite().all():
                raise ValueError(f"class_labels: the weights {request!r} are too large")
            if not row.any():
                raise ValueError(f"class_labels: {request!r} gives no label a weight")
        return weights.to(self._execution_device)

    def _label_index(self, label) -> int:
        num_classes = self.num_classes
        if isinstance(label, str) and label in self.labels:
            return self.labels[label]
        if isinstance(label, str):
            close = difflib.get_close_matches(label, self.labels, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else "`pipe.labels` lists them"
            if not self.labels:
                hint = f"it has no names, so give numbers from 0 to {num_classes - 1}"
            raise ValueError(
                f"class_labels: {label!r} is not one of the {len(self.labels)} labels of this model; {hint}"
            )
        if isinstance(label, bool) or not isinstance(label, Integral) or not 0 <= label < num_classes:
            raise ValueError(
                f"class_labels: {label!r} is not a label of this model; give a whole number from 0 to "
                f"{num_classes - 1}{' or a name from `pipe.labels`' if self.labels else ''}"
            )
        return label
