"""The measures of papers. Random weights of the same networks take the place of the published ones."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_autoencoder

from hf_genmod import AutoencoderPipeline
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.evaluation import standard
from hf_genmod.evaluation.config import EvaluationConfig
from hf_genmod.evaluation.evaluate import evaluate
from hf_genmod.evaluation.features import FeatureClassifier, all_bytes
from hf_genmod.evaluation.report import Report
from hf_genmod.evaluation.standard import DINOV2, INCEPTION, StandardMeasures, standard_table

# What torch-fidelity calls of torchvision here, for machines where there is no torchvision that fits torch. It stands
# neither for networks nor for resizing.
TORCHVISION = {
    "__init__": "from torchvision import datasets, transforms",
    "datasets": "CIFAR10 = CIFAR100 = STL10 = object",
    "transforms/__init__": "from torchvision.transforms import functional\n"
    "def Compose(steps):\n"
    "    (step,) = steps\n"
    "    return step",
    "transforms/functional": "import numpy, torch\n"
    "def pil_to_tensor(image):\n"
    "    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()\n"
    "def normalize(x, mean, std, inplace):\n"
    "    return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)",
}
# What stands for the code of DINOv2, which `torch.hub` finds in its folder: the code is not on this machine.
HUBCONF = """
import torch

def dinov2_vitl14():
    torch.manual_seed(1)
    patches = torch.nn.Conv2d(3, 64, 14, stride=14)
    return torch.nn.Sequential(patches, torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
"""


def pictures_of(count, channels, seed):
    """Smooth pictures with some noise, darker ones for other seeds, (n, C, 20, 28)."""
    rng = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(count, channels, 4, 5, generator=rng), (20, 28), mode="bilinear")
    noisy = 0.8 * smooth + 0.2 * torch.rand(smooth.shape, generator=rng)
    return (255 * noisy * (1 - 0.3 * seed)).round().byte()


def to_pil(images):
    return [Image.fromarray(image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
            for image in images]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Folders for `sys.path` that hold torch-fidelity and what stands for torchvision; none if both are installed."""
    if subprocess.run([sys.executable, "-c", "import torch_fidelity"], capture_output=True).returncode == 0:
        return []
    folders = [tmp_path_factory.mktemp(name) for name in ("library", "torchvision")]
    constraints = Path(__file__).parents[2] / "constraints.txt"
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--constraint", constraints, "--target", folders[0]]
    subprocess.run([sys.executable, *command, "torch-fidelity"], check=True)
    for name, code in TORCHVISION.items():
        file = folders[1] / "torchvision" / f"{name}.py"
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(code)
    return [str(folder) for folder in folders]


@pytest.fixture
def networks(library, tmp_path, monkeypatch):
    """Random weights, under the names and in the folders of the published ones; afterwards the library is forgotten,
    so that other tests do not take the stand-in for torchvision."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*library, *sys.path])
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class RandomInception(FeatureExtractorInceptionV3):
        def load_state_dict(self, weights):
            pass

    hub = tmp_path / "hub"
    for folder in ("checkpoints", "facebookresearch_dinov2_main"):
        (hub / folder).mkdir(parents=True)
    (hub / "facebookresearch_dinov2_main" / "hubconf.py").write_text(HUBCONF)
    for network in ("INCEPTION", "DINOV2"):
        published = getattr(standard, network)
        file = hub / "checkpoints" / published.url.split("/")[-1]
        torch.save({}, file)
        if network == "INCEPTION":
            with torch.random.fork_rng():
                torch.manual_seed(0)
                inception = RandomInception(published.name, ["2048"], file)
                for weight in inception.parameters():
                    if weight.ndim == 4:  # so that the features differ from image to image after so many layers
                        torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
            torch.save(inception.state_dict(), file)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        monkeypatch.setattr(standard, network, replace(published, sha256=sha256))
    yield hub
    for name in [name for name in sys.modules if name.split(".")[0] in ("torch_fidelity", "torchvision", "hubconf")]:
        del sys.modules[name]


def fidelity(folder, *arguments):
    """What the command line of torch-fidelity prints for pictures in the folders "samples" and "real"."""
    command = ["-m", "torch_fidelity.fidelity", "--input1", folder / "samples", "--input2", folder / "real", "--cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command += ["--json", "--silent", "--no-cache", *arguments]
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("measures, channels", [(["standard"], 3), (["fd_dinov2"], 1)])
def test_equal_what_the_command_line_of_torch_fidelity_prints(measures, channels, networks, tmp_path, monkeypatch):
    monkeypatch.setattr(standard, "SUBSET", 20)
    sets = {"real": pictures_of(40, channels, 0), "samples": pictures_of(30, channels, 1)}
    for size in ("as they are", "224"):
        for name, images in sets.items():
            (tmp_path / size / name).mkdir(parents=True)
            for i, picture in enumerate(to_pil(images)):
                picture = picture.resize((224, 224), Image.Resampling.BICUBIC) if size == "224" else picture
                picture.save(tmp_path / size / name / f"{i:05}.png")
    found = fidelity(tmp_path / "224", "--fid", "--feature-extractor", "dinov2-vit-l-14")
    expected = {"fd_dinov2": found["frechet_inception_distance"]}
    if "standard" in measures:
        weights = networks / "checkpoints" / INCEPTION.url.split("/")[-1]
        flags = ["--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", weights]
        found = fidelity(tmp_path / "as they are", "--fid", "--kid", "--prc", "--kid-subset-size", 20, *flags)
        expected |= {"fid": found["frechet_inception_distance"], "kid": found["kernel_inception_distance_mean"]}
        expected["kid_deviation"] = found["kernel_inception_distance_std"]
        expected |= {f"inception_{name}": found[name] for name in ("precision", "recall")}
    pictures, file = (
        PictureDataset(to_pil(sets["real"]), "made", channels=channels),
        tmp_path / "reference.safetensors",
    )
    made = StandardMeasures(measures, pictures, file)
    made.prepare(sets["real"])
    measured = made.measure(sets["samples"])
    assert measured["samples"] == 30 and measured["reference_images"] == 40
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert expected["fd_dinov2"] > 0.1 and expected.get("fid", 1) > 0.1


@pytest.mark.slow
def test_an_evaluation_measures_samples_and_held_out_pictures(networks, tmp_path, monkeypatch):
    images = torch.randint(0, 256, (400, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures, held_out = (
        PictureDataset(to_pil(part), name) for part, name in ((images[:260], "a"), (images[260:], "b"))
    )
    FeatureClassifier(3, 2).save(tmp_path / "features.safetensors")
    features = str(tmp_path / "features.safetensors")
    config = EvaluationConfig(samples=130, features=features, measures=["fd_dinov2"])
    pipeline = AutoencoderPipeline(tiny_autoencoder(sample_size=8, in_channels=3))
    report = evaluate(pipeline, pictures, held_out, tmp_path / "report", config, "model")
    (setting,) = report.settings
    distance = setting["standard"]["fd_dinov2"]
    assert setting["standard"]["samples"] == 130 and setting["standard"]["reference_images"] == 260
    assert 0 < report.held_out["standard"]["fd_dinov2"] < distance
    assert Report.read(tmp_path / "report") == report
    heading, drawn, real = str(report).splitlines()[-3:]
    assert heading.split() == ["FD-DINOv2-130", "FD-DINOv2-140"] and drawn.endswith(f"{distance:.4g}")
    assert real.split() == ["held-out", "images", f"{report.held_out['standard']['fd_dinov2']:.4g}"]
    (file,) = (tmp_path / "report").glob("reference-*.safetensors")
    written = file.stat().st_mtime_ns
    again = StandardMeasures(["fd_dinov2"], pictures, file)  # which reads the file
    again.prepare(None)
    assert again.measure(all_bytes(held_out)) == report.held_out["standard"]
    assert file.stat().st_mtime_ns == written and not list(file.parent.glob("*.partial"))


class TestWithoutTheLibrary:
    """What is found before torch-fidelity is called; here a function that must not be called has its place."""

    @pytest.fixture(autouse=True)
    def uncalled(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "torch_fidelity.utils", SimpleNamespace(create_feature_extractor=pytest.fail))

    @pytest.fixture
    def pictures(self):
        return PictureDataset(to_pil(pictures_of(3, 3, 0)), "away/pets")

    def test_other_weights_are_refused(self, tmp_path):
        for network in (INCEPTION, DINOV2):
            file = tmp_path / "hub" / "checkpoints" / network.url.split("/")[-1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"other")
            with pytest.raises(ValueError, match=re.escape(f"{file}: not the weights of {network.name} (its SHA-256")):
                network.load()

    def test_weights_that_cannot_be_downloaded(self, tmp_path):
        away = replace(INCEPTION, url="http://127.0.0.1:9/weights.pth")
        with pytest.raises(ValueError, match="inception-v3-compat cannot be loaded .*; without network, copy"):
            away.load()
        assert not list((tmp_path / "hub" / "checkpoints").iterdir())

    def test_downloaded_weights_are_checked(self, tmp_path):
        (tmp_path / "served.pth").write_bytes(b"other")
        away = replace(INCEPTION, url=(tmp_path / "served.pth").as_uri())
        with pytest.raises(ValueError, match="invalid hash value"):
            away.load()
        assert not list((tmp_path / "hub" / "checkpoints").iterdir())

    def test_no_library(self, monkeypatch, pictures, tmp_path):
        monkeypatch.setitem(sys.modules, "torch_fidelity.utils", None)
        with pytest.raises(ValueError, match=r"^measures: torch-fidelity is missing .*hf_genmod\[evaluation\]"):
            StandardMeasures(["standard"], pictures, tmp_path / "reference.safetensors")

    def test_what_cannot_be_measured(self, pictures, tmp_path):
        file = tmp_path / "reference.safetensors"
        with pytest.raises(ValueError, match="measures: 'fids' is none of fid, fd_dinov2, standard"):
            StandardMeasures(["fids"], pictures, file)
        with pytest.raises(ValueError, match="take grey or RGB images, and these have 4 channels"):
            StandardMeasures(["fid"], PictureDataset(to_pil(pictures_of(3, 4, 0)), "four", channels=4), file)

    @pytest.mark.parametrize(
        "metadata, message",
        [
            (None, "holds no statistics of a data set"),
            (
                {"dataset": "cats, 9 images", "fingerprint": "abc"},
                "is of cats, 9 images (abc), and the images are pets, 3",
            ),
            (
                {"inception-v3-compat": "another"},
                "is by another, and here it is layer 2048 of inception-v3-compat 6726825d",
            ),
        ],
    )
    def test_a_file_that_does_not_fit_is_refused_by_both_names(self, metadata, message, pictures, tmp_path):
        file = tmp_path / "reference.safetensors"
        own = {"dataset": "pets", "fingerprint": pictures.fingerprint}
        save_file({"x": torch.zeros(1)}, file, metadata and own | metadata)
        with pytest.raises(ValueError, match=re.escape(f"reference: {file} {message}")):
            StandardMeasures(["fid"], pictures, file)
        file.write_bytes(b"no safetensors")
        with pytest.raises(ValueError, match=re.escape(f"reference: {file} is no file of safetensors")):
            StandardMeasures(["fid"], pictures, file)


def test_a_table_has_the_number_of_samples_in_its_names():
    measures = {
        "samples": 1000,
        "reference_images": 9,
        "networks": [],
        "fid": 12.3456,
        "kid": None,
        "kid_deviation": None,
    }
    few = {"samples": 150, "fid": 100.0, "fd_dinov2": 7.0}
    assert standard_table({"a": {"standard": measures}, "b": {}, "c": {"standard": few}}) == [
        ["", "FID-1k", "KID-1k", "FID-150", "FD-DINOv2-150"],
        ["a", "12.35", "needs 1,000 images", "", ""],
        ["c", "", "", "100", "7"],
    ]
    assert standard_table({"a": {}}) == []
