"""What a run says of itself, beside what git, the system and the command line say."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import tiny_autoencoder, tiny_unet

import hf_genmod
from hf_genmod import AncestralDDPMScheduler, ClassifierFreeGuidedPipeline, UnconditionalPipeline
from hf_genmod.data.latents import LatentDataset
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.training.prior_samples import PriorSamples
from hf_genmod.training.provenance import origin, provenance


def test_the_command_can_be_pasted_and_keeps_the_home_folder_to_itself(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = [f"{tmp_path}/examples/train.py", "--dataset", f"{tmp_path}/my pictures", "--caption", "it's", "$HOME",
             f"--output_dir={tmp_path}/a b", "--x=1=2", f"{tmp_path}/"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    command = provenance()["command"]
    assert str(tmp_path) not in command and command.startswith("python examples/train.py ")
    program = "import sys; print(sys.argv[1:])"
    pasted = command.replace("python examples/train.py", f'"{sys.executable}" -c "{program}"')
    done = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(words[1:])


def test_the_origin_of_latents_and_of_an_adapter_is_that_of_their_images():
    red = Image.new("RGB", (8, 8), "red")
    images = PictureDataset([red] * 3, "red", labels=torch.tensor([1, 0, 1]), label_names=["a", "b"])
    pipeline = ClassifierFreeGuidedPipeline(
        tiny_unet(num_classes=2), AncestralDDPMScheduler(), id2label={0: "a", 1: "b"}
    )
    facts = {"num_pictures": 3, "fingerprint": images.fingerprint, "class_balance": {"b": 2, "a": 1}, "captions": [],
             "dataset_id": None,
             "request": {"class_labels": "b"}}  # fmt: skip
    latents, mixed = LatentDataset(images, tiny_autoencoder()), PriorSamples(images, pipeline, 0, {})
    assert [origin(dataset, pipeline) for dataset in (images, latents, mixed)] == [facts] * 3
    bare = origin(PictureDataset([red], "red"), UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler()))
    assert (bare["class_balance"], bare["captions"], bare["request"]) == ({}, [], {})


def test_several_processes_are_started_as_they_were(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["examples/train_cfg.py"])
    facts = provenance(num_processes=2)
    if not torch.accelerator.is_available():
        assert f", 2 processes of {torch.get_num_threads()} thread" in facts["hardware"]
    assert (facts["num_processes"], facts["num_threads"]) == (2, torch.get_num_threads())
    assert facts["command"] == "torchrun --nproc_per_node 2 examples/train_cfg.py"


def test_versions_and_hardware_are_those_in_use():
    facts = provenance()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["hf_genmod"] == hf_genmod.__version__
    assert facts["versions"]["diffusers"] == importlib.metadata.version("diffusers")
    if not torch.accelerator.is_available():
        assert facts["hardware"].startswith(f"{os.cpu_count()} CPU core")
        assert f"), 1 process of {torch.get_num_threads()} thread" in facts["hardware"]


def test_the_commit_is_that_of_the_checkout():
    root = Path(hf_genmod.__file__).parent
    if subprocess.run(
        ["git", "-C", root, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True
    ).returncode:
        pytest.skip("the package is not installed from a git checkout")
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    commit = provenance()["commit"]
    assert head.stdout.startswith(commit.rstrip("+")) and len(commit.rstrip("+")) == 12


def test_below_the_checkout_of_another_project_there_is_no_commit(tmp_path):
    """As with a virtual environment inside somebody's repository, which git is told to ignore."""
    run = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True}
    subprocess.run(["git", "init", "-q"], **run)
    package = tmp_path / "env" / "hf_genmod"
    shutil.copytree(Path(hf_genmod.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    program = "from hf_genmod.training.provenance import provenance; print(provenance()['commit'])"
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, **run)
    assert done.stdout.strip() == "None"


def test_a_data_set_that_no_folder_here_has_is_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "pets").mkdir(parents=True)
    pipeline = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())
    names = {"user/pets": "user/pets", "user/pets (train)": "user/pets", "data/pets": None, "pets": None,
             "shapes": None, "a/b/c": None, str(tmp_path / "pets"): None}  # fmt: skip
    for name, expected in names.items():
        pictures = PictureDataset([Image.new("RGB", (8, 8))], name)
        assert origin(pictures, pipeline)["dataset_id"] == expected
