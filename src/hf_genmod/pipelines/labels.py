"""Class labels and classifier-free guidance."""

import difflib
import math
from numbers import Integral, Real
from typing import NamedTuple

import torch

from .base import GenerationPipeline
from .requests import check_positive, plain


class WeightedLabels(NamedTuple):
    """The labels of n images, as tensors (m,): image `image[j]` is guided to `label[j]` with weight `weight[j]`."""

    num_images: int
    image: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    share: torch.Tensor  # |weight| divided by the sum of those of the image
    are_single: bool  # whether each image has one label, of weight 1


class ClassConditionalPipeline(GenerationPipeline):
    """The base of the pipelines with class labels: the names of the labels, and classifier-free guidance."""

    guidance_argument = "guidance_scale"
    num_classes = property(lambda self: self.unet.config.num_classes, doc="Number of labels; `None` if it has none.")

    def __init__(self, components: dict, value_range, process, id2label: dict | None, defaults, consistent, **config):
        super().__init__(components, value_range, process, defaults, consistent, id2label=id2label, **config)
        self.register_to_config(id2label=id2label and {int(i): id2label[i] for i in sorted(id2label, key=int)})  # JSON

    @property
    def labels(self) -> dict[str, int]:
        """The label of each name, such as `{"airplane": 0, ...}`; empty where the checkpoint has no names."""
        return {name: index for index, name in (self.config.id2label or {}).items()}

    def request_for(self, pictures, indices):
        return {} if self.num_classes is None else {"class_labels": pictures.labels[indices].tolist()}

    def example_request(self):
        return {} if self.num_classes is None else {"class_labels": self.num_classes - 1}

    def unet_inputs(self, pictures, indices):
        has_labels = self.unet.config.num_classes is not None
        return {"class_labels": pictures.labels[indices].to(self._execution_device)} if has_labels else {}

    def _classifier_free_guidance(self, x_t, t, labels: WeightedLabels, gamma, **condition):
        """ε̃ = ε_∅ + γ Σ_k w_k (ε_k − ε_∅) in as few passes as possible; both ε take `condition`, tensors (n, ...)."""
        n, channels = x_t.shape[:2]
        null = torch.full((n,), self.unet.config.num_classes, device=x_t.device)
        if gamma == 0:
            return self._denoise(x_t, t, class_labels=null, **condition)
        if gamma == 1 and labels.are_single:
            return self._denoise(x_t, t, class_labels=labels.label, **condition)
        image, w, share = labels.image, labels.weight[:, None, None, None], labels.share[:, None, None, None]
        condition = {name: torch.cat([value, value[image]]) for name, value in condition.items()}
        condition["class_labels"] = torch.cat([null, labels.label])
        both = self._denoise(torch.cat([x_t, x_t[image]]), t, **condition)
        eps_null, eps_k = both[:n, :channels], both[n:, :channels]
        direction = torch.zeros_like(eps_null).index_add(0, image, w * (eps_k - eps_null[image]))
        # A learned variance is not guided: it is the mean of those of the labels.
        variance = torch.zeros_like(both[:n, channels:]).index_add(0, image, share * both[n:, channels:])
        return torch.cat([eps_null + gamma * direction, variance], dim=1)

    def _weighted_labels(self, class_labels, num_images_per_prompt: int = 1) -> WeightedLabels:
        """The labels that are asked for, with their weights, on the device."""
        check_positive(num_images_per_prompt=num_images_per_prompt)
        class_labels = plain(class_labels)
        class_labels = [plain(label) for label in class_labels] if isinstance(class_labels, list) else [class_labels]
        class_labels = [label[0] if isinstance(label, list) and len(label) == 1 else label for label in class_labels]
        if not class_labels or any(isinstance(label, list) for label in class_labels):
            reason = "their shape is neither (n,) nor (n, 1)" if class_labels else "there are none"
            raise ValueError(f"class_labels: {reason}; give one for each image")
        class_labels = [label for label in class_labels for _ in range(num_images_per_prompt)]
        weights = torch.zeros(len(class_labels), self.num_classes)
        for row, request in zip(weights, class_labels, strict=True):
            for label, weight in request.items() if isinstance(request, dict) else [(request, 1.0)]:
                weight = plain(weight)
                if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
                    raise ValueError(f"class_labels: the weight {weight!r} of {label!r} is not a finite number")
                row[self._label_index(label)] += weight
            if not (row.isfinite().all() and row.any()):
                raise ValueError(f"class_labels: {request!r} gives no label a weight, or one that is too large")
        image, label = weights.nonzero(as_tuple=True)
        weight = weights[image, label]
        share = weight.abs() / weights.abs().sum(dim=1)[image]
        tensors = (x.to(self._execution_device) for x in (image, label, weight, share))
        return WeightedLabels(len(weights), *tensors, len(image) == len(weights) and bool((weight == 1).all()))

    def _label_index(self, label) -> int:
        index = self.labels.get(label) if isinstance(label, str) else label
        if isinstance(index, Integral) and not isinstance(index, bool) and 0 <= index < self.num_classes:
            return index
        close = difflib.get_close_matches(str(label), self.labels, n=1, cutoff=0.5)
        names = [*self.labels][:10] + ["..."] * (len(self.labels) > 10)
        known = f"a whole number from 0 to {self.num_classes - 1}" + f", or one of {', '.join(names)}" * bool(names)
        hint = f"did you mean {close[0]!r}?" if close else f"give {known}"
        raise ValueError(f"class_labels: {label!r} is not a label of this model; {hint}")
