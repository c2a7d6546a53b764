"""The measures that papers report, as torch-fidelity computes them: FID, KID, precision and recall by Inception, and
FD-DINOv2. The networks have their published weights, or none."""

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.errors import counted, first_line, refuse_lfs_pointers
from hf_genmod.processes import processes

KEPT = 10_000  # reference images whose features are kept for KID, precision and recall
SUBSET = 1000  # images in each of the 100 subsets of KID


@dataclass(frozen=True)
class Network:
    """A network whose features papers compare, and how they resize images for it."""

    name: str  # of the feature extractor in torch-fidelity
    layer: str
    distance: str  # the Fréchet distance of its features
    resizing: str
    url: str  # of the weights
    sha256: str

    @property
    def identity(self) -> str:
        """What must be equal for features that can be compared."""
        return f"layer {self.layer} of {self.name} {self.sha256:.8}, images {self.resizing}"

    def load(self) -> nn.Module:
        """The feature extractor, on the accelerator if there is one. The weights, and the code of DINOv2, are
        downloaded once into the folder of `torch.hub`. Raises a `ValueError` if torch-fidelity is not installed, if
        weights or code cannot be downloaded, or if the weights there are not the published ones."""
        try:
            from torch_fidelity.utils import create_feature_extractor
        except (ImportError, RuntimeError) as error:  # a RuntimeError of a torchvision that is for another torch
            remedy = "pip install 'hf_genmod[evaluation]', with the torchvision of your torch"
            raise ValueError(f"measures: torch-fidelity is missing ({first_line(error)}); {remedy}") from error
        hub, timeout = Path(torch.hub.get_dir()), socket.getdefaulttimeout()
        file = hub / "checkpoints" / PurePosixPath(self.url).name
        socket.setdefaulttimeout(20)  # torch.hub has none
        try:
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(self.url, str(file), self.sha256)
            found = hashlib.sha256(file.read_bytes()).hexdigest()
            if found != self.sha256:
                was = f"its SHA-256 is {found:.8}..., and that of {self.url} is {self.sha256:.8}..."
                raise ValueError(f"{file}: not the weights of {self.name} ({was}); delete the file")
            # The extractor of DINOv2 takes no path, and finds its weights in the same folder.
            path = {"feature_extractor_weights_path": str(file)} if self.name.startswith("inception") else {}
            extractor = create_feature_extractor(self.name, [self.layer], cuda=False, verbose=False, **path)
        except (ImportError, OSError, RuntimeError) as error:
            remedy = f"without network, copy {hub} from a machine that has loaded it"
            raise ValueError(f"measures: {self.name} cannot be loaded ({first_line(error)}); {remedy}") from error
        finally:
            socket.setdefaulttimeout(timeout)
        return extractor.to(processes().device)


INCEPTION = Network(
    "inception-v3-compat", "2048", "fid", "enlarged bilinearly to 299x299 as TensorFlow 1 does",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)  # fmt: skip
DINOV2 = Network(
    "dinov2-vit-l-14", "dinov2", "fd_dinov2", "resized bicubically to 224x224 as Pillow does",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
)  # fmt: skip


class StandardMeasures:
    """
    Measures samples against the training images of a data set. Statistics of the features of these images are kept in
    a file, which others can use for the same data set.

    Args:
        measures (`list[str]`): "fid" (also KID, precision and recall), "fd_dinov2", or "standard" for both.
        pictures ([`PictureDataset`]): The training images.
        file (`str` or `os.PathLike`): The statistics. If it is missing, or lacks a network, `prepare` writes it.

    Raises:
        ValueError: If a measure is unknown, images are neither grey nor RGB, the file is of another data set or
            network, or as [`Network.load`] does.
    """

    def __init__(self, measures: list[str], pictures: PictureDataset, file: str | os.PathLike):
        chosen = {"fid": [INCEPTION], "fd_dinov2": [DINOV2], "standard": [INCEPTION, DINOV2]}
        if unknown := set(measures) - set(chosen):
            raise ValueError(f"measures: {unknown.pop()!r} is none of {', '.join(chosen)}")
        if pictures.channels not in (1, 3):
            has = counted(pictures.channels, "channel")
            raise ValueError(
                f"measures: standard networks take grey or RGB images, and these have {has}; leave it out"
            )
        networks = {network.name: network for measure in measures for network in chosen[measure]}
        self.pictures, self.file, self.tensors = pictures, Path(file), {}
        name = Path(pictures.name).name  # others shall not read the path on this machine
        self.written = {"dataset": f"{name}, {len(pictures):,} images", "fingerprint": pictures.fingerprint}
        if self.file.exists():
            self._read(networks.values())
        with processes().main_process_first():
            self.extractors = {network: network.load() for network in networks.values()}

    def _read(self, networks) -> None:
        refuse_lfs_pointers(self.file)
        try:
            with safe_open(self.file, framework="pt") as opened:
                found = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"reference: {self.file} is no file of safetensors ({first_line(error)})") from error
        remedy = "give another file, which is then made of these images"
        if "fingerprint" not in found:
            raise ValueError(f"reference: {self.file} holds no statistics of a data set; {remedy}")
        if found["fingerprint"] != self.pictures.fingerprint:
            theirs, ours = (f"{about['dataset']} ({about['fingerprint']})" for about in (found, self.written))
            raise ValueError(f"reference: {self.file} is of {theirs}, and the images are {ours}; {remedy}")
        for network in networks:
            if found.get(network.name, network.identity) != network.identity:
                theirs, ours = found[network.name], network.identity
                raise ValueError(f"reference: {self.file} is by {theirs}, and here it is {ours}; {remedy}")
        self.written, self.tensors = found, tensors

    def prepare(self, real: Tensor) -> None:
        """Completes the file with the statistics of the training images, `uint8` (N, C, H, W)."""
        from torch_fidelity.metric_fid import fid_features_to_statistics

        for network, extractor in self.extractors.items():
            if network.name in self.written:
                continue
            features = standard_features(real, extractor)
            some = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:KEPT].sort().values
            found = {name: torch.from_numpy(value) for name, value in fid_features_to_statistics(features).items()}
            found |= {"features": features[some].contiguous()} if network.distance == "fid" else {}
            self.tensors |= {f"{network.name}.{name}": tensor for name, tensor in found.items()}
            self.written[network.name] = network.identity
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial = self.file.with_name(f"{self.file.name}.partial")
            save_file(self.tensors, partial, self.written)
            partial.replace(self.file)

    def measure(self, images: Tensor) -> dict[str, float | int | None]:
        """
        The measures of n images, `uint8` (n, C, H, W), after `prepare`: "samples", "reference_images", "networks",
        and by the chosen networks

        - "fid" (Heusel et al. 2017) and "fd_dinov2" (Stein et al. 2023), of all n images and all training images;
        - "kid" and "kid_deviation" (Bińkowski et al. 2018), mean and standard deviation of 100 subsets of 1,000;
          `None` if there are fewer images;
        - "inception_precision" and "inception_recall" (Kynkäänniemi et al. 2019 with k = 3, by Inception as Dhariwal
          and Nichol 2021).

        KID, precision and recall take at most 10,000 training images.
        """
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
        from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

        measures = {"samples": len(images), "reference_images": len(self.pictures)}
        measures["networks"] = [network.identity for network in self.extractors]
        for network, extractor in self.extractors.items():
            features = standard_features(images, extractor)
            reference = {name: self.tensors[f"{network.name}.{name}"].numpy() for name in ("mu", "sigma")}
            distance = fid_statistics_to_metric(fid_features_to_statistics(features), reference, verbose=False)
            measures[network.distance] = distance[KEY_METRIC_FID]
            if network.distance == "fid":
                real, kid = self.tensors[f"{network.name}.features"], {}
                if min(len(features), len(real)) >= SUBSET:
                    options = {"kid_subsets": 100, "kid_subset_size": SUBSET, "verbose": False}
                    kid = kid_features_to_metric(features, real, **options)
                found = prc_features_to_metric(features, real, prc_neighborhood=3, save_cpu_ram=True, verbose=False)
                measures |= {"kid": kid.get(KEY_METRIC_KID_MEAN), "kid_deviation": kid.get(KEY_METRIC_KID_STD)}
                measures["inception_precision"] = found[KEY_METRIC_PRECISION]
                measures["inception_recall"] = found[KEY_METRIC_RECALL]
        return measures


def standard_features(images: Tensor, extractor: nn.Module) -> Tensor:
    """The features (n, d) of grey or RGB images, `uint8` (n, C, H, W), by an extractor of torch-fidelity. For DINOv2
    images are resized as papers do; torch-fidelity itself would do so bilinearly, without smoothing."""
    device, found = next(extractor.parameters()).device, []
    with torch.no_grad():
        for batch in tqdm(images.split(64), f"Features of {extractor.get_name()}", leave=False, disable=None):
            batch = batch.expand(-1, 3, -1, -1)
            if extractor.get_name() == DINOV2.name:
                resized = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
                           for image in batch.cpu()]  # fmt: skip
                batch = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
            found.append(extractor(batch.to(device))[0].cpu())
    return torch.cat(found)


def standard_table(measured: dict[str, dict]) -> list[list[str]]:
    """Rows for settings by their names, below a row of headings such as "FID-1k", the FID of 1,000 samples; no row
    where nothing was measured."""
    headings = {"fid": "FID", "kid": "KID", "inception_precision": "Inception precision"}
    headings |= {"inception_recall": "Inception recall", "fd_dinov2": "FD-DINOv2"}
    rows = {}
    for name, measures in measured.items():
        found, n = measures.get("standard", {}), measures.get("standard", {}).get("samples", 1)
        count = f"{n // 1000}k" if n % 1000 == 0 else str(n)
        known = {key: found[key] for key in headings if key in found}
        texts = ("needs 1,000 images" if value is None else f"{value:.4g}" for value in known.values())
        rows[name] = {f"{headings[key]}-{count}": text for key, text in zip(known, texts, strict=True)}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    named = [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items() if row]
    return [["", *columns], *named] if named else []
