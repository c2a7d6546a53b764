"""What samples are compared with, and the measures of the comparison."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.drawing.grids import side_by_side
from hf_genmod.evaluation.config import EvaluationConfig
from hf_genmod.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance
from hf_genmod.evaluation.estimates import Estimate, with_interval
from hf_genmod.evaluation.features import (
    FEATURE_DIM,
    FeatureClassifier,
    PretrainedFeatures,
    all_bytes,
    as_bytes,
    extract_features,
    train_feature_classifier,
)
from hf_genmod.evaluation.neighbours import audit_memorisation, nearest_of, neighbourhoods
from hf_genmod.evaluation.recognition import recognised
from hf_genmod.evaluation.standard import StandardMeasures
from hf_genmod.evaluation.two_samples import told_apart
from hf_genmod.processes import processes

_NEIGHBOURS = 5  # k of the measures by neighbours


class Comparison:
    """
    Training images, held-out images, and the networks by which samples are compared with them.

    Args:
        pictures, held_out ([`PictureDataset`]): Training and held-out images.
        has_labels (`bool`): Whether samples have labels, which a classifier is to recognise.
        folder (`Path`): Where the networks that are trained here are kept, and the figures of the closest samples.
        say (`Callable`): Is told what takes time.

    Attributes:
        real, unseen (`torch.Tensor`): Training and held-out images, `uint8` (n, C, H, W), read by the processes that
            look at them.
        network: The network of the features.
        left_out (`dict[str, str]`): The measures for which there are too few images, and how many they need.

    Raises:
        ValueError: If a network is not there or of other classes, or there are fewer than six samples or held-out
            images.
    """

    def __init__(
        self,
        pictures: PictureDataset,
        held_out: PictureDataset,
        has_labels: bool,
        folder: Path,
        config: EvaluationConfig,
        say: Callable[[str], None],
    ):
        self.pictures, self.held_out, self.folder, self.seed, self._say = pictures, held_out, folder, config.seed, say
        network = None
        if config.features is not None:
            load = FeatureClassifier.load if config.features.endswith(".safetensors") else PretrainedFeatures
            network = load(config.features)
        if config.reference is not None and not config.measures:
            raise ValueError("reference: it is for --measures; give both, such as --measures standard")
        reference = config.reference or folder / f"reference-{pictures.fingerprint}.safetensors"
        self._standard = StandardMeasures(config.measures, pictures, reference) if config.measures else None
        d = FEATURE_DIM if network is None else extract_features(as_bytes(pictures.x_0([0])), network).shape[1]
        self.left_out = _left_out({"samples": config.samples, "held-out images": len(held_out)}, d)
        needs_classifier = network is None or has_labels
        self._classifier = self._find_classifier(network) if needs_classifier else None
        self._has_labels, self.network = has_labels, network or self._classifier

    @functools.cached_property
    def real(self) -> Tensor:
        self._say(f"reading {len(self.pictures):,} images")
        return all_bytes(self.pictures)

    @functools.cached_property
    def unseen(self) -> Tensor:
        self._say(f"reading {len(self.held_out):,} held-out images")
        return all_bytes(self.held_out)

    @functools.cached_property
    def of_real(self) -> Tensor:
        """The features of the training images, (n, d)."""
        return extract_features(self.real, self.network)

    @functools.cached_property
    def _of_unseen(self) -> Tensor:
        return extract_features(self.unseen, self.network)

    @functools.cached_property
    def _apart(self) -> dict[str, Tensor]:
        """The distances of held-out images to the nearest training image."""
        return {
            "pixels": nearest_of(self.unseen, self.real)[0],
            "features": nearest_of(self._of_unseen, self.of_real)[0],
        }

    def of_samples(self, images: Tensor, labels: Tensor | None, name: str) -> dict:
        """The measures of samples, `uint8` (n, C, H, W), with labels (n,) if they have any, as a [`Report`] holds
        them. The figures of the closest ones are named closest_NAME."""
        features = extract_features(images, self.network)
        measures = {"told_apart": told_apart(images, self.real, self.seed)} | evaluate_features(features, self.of_real)
        if labels is not None:
            measures |= recognised(self._classifier, images, labels, self.pictures.label_names)
        spaces = {"pixels": (images, self.real), "features": (features, self.of_real)}
        file, can_audit = self.folder / f"closest_{name}.png", "search for copies" not in self.left_out
        measures["memorisation"] = audit(spaces, self._apart, images, self.real, file) if can_audit else {}
        return measures | self._by_standard(images)

    def of_held_out(self) -> dict:
        """The measures of held-out images, which no model can better; copies are not searched for."""
        measures = {"told_apart": told_apart(self.unseen, self.real, self.seed)}
        measures |= evaluate_features(self._of_unseen, self.of_real)
        if self._has_labels:
            measures |= recognised(self._classifier, self.unseen, self.held_out.labels, self.pictures.label_names)
        return measures | self._by_standard(self.unseen)

    def _find_classifier(self, network) -> FeatureClassifier:
        """The given network if it is a classifier, else one that is trained on the data set and kept in the folder."""
        labels, names = self.pictures.labels, self.pictures.label_names or []
        if isinstance(network, FeatureClassifier):
            num_classes = network.config["num_classes"]
            if num_classes != len(names):
                raise ValueError(f"features: the network is of {num_classes} other classes; give one of this data set")
            return network
        device, file = processes().device, self.folder / f"features-{self.pictures.fingerprint}.safetensors"
        with processes().main_process_first():
            if not file.is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                labels, images = labels if labels is None else labels.to(device), self.real.to(device)
                self._say("training the network of the features")
                train_feature_classifier(images, labels, len(names)).save(file)
        return FeatureClassifier.load(file)

    def _by_standard(self, images: Tensor) -> dict:
        if self._standard is None:
            return {}
        self._say("measuring by the networks of papers")
        self._standard.prepare(self.real)
        return {"standard": self._standard.measure(images)}


def _left_out(counts: dict[str, int], d: int) -> dict[str, str]:
    """The measures that so many samples and held-out images do not allow with d features."""
    left_out = {}
    for kind, count in counts.items():
        if count < _NEIGHBOURS + 1:
            raise ValueError(f"{kind}: {count} are too few to measure anything; take {_NEIGHBOURS + 1} or more")
        if count < 2 * (d + 1):
            left_out[f"Fréchet distance of {kind}"] = f"needs {2 * (d + 1):,} of them, and there are {count}"
    if counts["held-out images"] < 100:
        left_out["search for copies"] = f"needs 100 held-out images, and there are {counts['held-out images']}"
    return left_out


def evaluate_features(generated: Tensor, real: Tensor, seed: int = 0) -> dict[str, Estimate]:
    """
    Compares features of generated images, (n, d), with those of real images, (m, d). The Fréchet distance uses all
    real images, the other measures a random n of them. Intervals are made from distances of halves; `seed` is that of
    the n images and of the halves.

    Returns:
        `dict`: "kernel_distance", "precision", "recall", "density" and "coverage"; if n ≥ 2 (d + 1), as halves need
        it, and m > d also "frechet_distance".

    Raises:
        ValueError: If n or m is below six, d differs, or features are not finite.
    """
    n, d = generated.shape
    some = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:n]]
    measures = {}
    if n >= 2 * (d + 1) and len(real) > d:
        statistics = FeatureStatistics.of(real)
        measures["frechet_distance"] = with_interval(lambda x: frechet_distance(x, statistics), generated, seed=seed)
    measures["kernel_distance"] = with_interval(lambda x: kernel_distance(x, some), generated, seed=seed)
    return measures | neighbourhoods(some, generated, _NEIGHBOURS)


def audit(spaces: dict[str, tuple[Tensor, Tensor]], apart: dict[str, Tensor], images, real, file: Path) -> dict:
    """
    Tests whether samples `images` copy training images `real`, both `uint8`. For each of `spaces`, "pixels" and
    "features", with the values of samples and of training images and the distances `apart` of held-out images to the
    nearest training image, the result has "threshold", "share" and "flagged". A figure, NAME_SPACE.png for a `file`
    NAME.png, shows the ten samples that are closest to a training image, and below them these images.
    """
    result = {}
    for space, (samples, training) in spaces.items():
        found = audit_memorisation(samples, training, apart[space])
        closest = found.distances.argsort()[:10]
        rows = {"samples": images[closest], "their closest training images": real[found.nearest[closest]]}
        side_by_side(rows).save(file.with_name(f"{file.stem}_{space}.png"))
        result[space] = {"threshold": found.threshold, "share": found.share, "flagged": found.flagged}
    return result
