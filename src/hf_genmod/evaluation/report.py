"""The report of a checkpoint, `evaluation.json`."""

import dataclasses
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from hf_genmod.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance
from hf_genmod.evaluation.estimates import Estimate, Share, with_interval
from hf_genmod.evaluation.neighbours import neighbourhoods

# The measures that are shares, and those that hold shares by the name of a class.
_SHARES = {"precision", "recall", "coverage", "recognised_share", "recognised_share_by_class", "share"}


@dataclasses.dataclass
class Report:
    """
    What was measured of a checkpoint. Measures are of type [`Estimate`] or [`Share`].

    Attributes:
        model (`str`): The checkpoint: a folder, or an id on the Hub.
        dataset (`dict`): "name", "num_pictures", "num_held_out", "held_out_is_unseen" and "fingerprint".
        features (`str`): The network whose features are compared.
        seed (`int`): The seed of the first sample.
        settings (`list[dict]`): For each setting the arguments by which samples were drawn ("sampler",
            "num_inference_steps", "guidance_scale", "classifier_scale", "noise_level" or "prior") and the measures:
            "seconds" and "forward_passes" per sample, those of [`evaluate_features`], "recognised_share" and
            "recognised_share_by_class" if samples have labels, and "memorisation" by "pixels" and by "features", each
            with "threshold", "share" and "flagged".
        held_out (`dict`): The same measures of held-out images.
        bits_per_dimension (`dict`): Upper bounds by their names.
        interpolated (`dict`, *optional*): The same measures of bicubic interpolation, if the model is an upsampler.
    """

    model: str
    dataset: dict
    features: str
    seed: int
    settings: list[dict]
    held_out: dict = dataclasses.field(default_factory=dict)
    bits_per_dimension: dict = dataclasses.field(default_factory=dict)
    interpolated: dict | None = None

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `evaluation.json` into a folder."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        file = Path(folder, "evaluation.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Report | None":
        """The report that `save` wrote into a folder; `None` if there is none."""
        file = Path(folder, "evaluation.json")
        return cls(**_measures(json.loads(file.read_text(encoding="utf-8")))) if file.is_file() else None


def _measures(found, is_share: bool = False):
    """What was read from JSON, with measures as `Estimate` or `Share`."""
    if isinstance(found, list):
        return [_measures(value) for value in found]
    if not isinstance(found, dict):
        return found
    if found.keys() == {field.name for field in dataclasses.fields(Estimate)}:
        return (Share if is_share else Estimate)(**found)
    return {name: _measures(value, is_share or name in _SHARES) for name, value in found.items()}


def evaluate_features(generated: Tensor, real: Tensor, seed: int = 0) -> dict[str, Estimate | Share]:
    """
    Compares features of generated images with those of real images.

    Args:
        generated (`torch.Tensor`): (n, d), with n of at least 2 (d + 1), as the intervals are made from distances of
            halves.
        real (`torch.Tensor`): (m, d). The Fréchet distance uses all, the other measures n of them, as they need as
            many of both.
        seed (`int`, defaults to 0): The seed by which these n and the halves are drawn.

    Returns:
        `dict`: "frechet_distance" and "kernel_distance" with intervals, "precision", "recall", "density", "coverage".

    Raises:
        `ValueError`: If there are too few features, d differs, or features are not finite.
    """
    n, d = generated.shape
    for name, count, least in (("samples", n, 2 * (d + 1)), ("real images", len(real), d + 1)):
        if count < least:
            raise ValueError(f"{name}: {count} are too few for features of {d} dimensions; take {least} or more.")
    statistics = FeatureStatistics.of(real)
    some = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:n]]
    return {
        "frechet_distance": with_interval(lambda x: frechet_distance(x, statistics), generated, seed=seed),
        "kernel_distance": with_interval(lambda x: kernel_distance(x, some), generated, seed=seed),
        **neighbourhoods(some, generated),
    }
