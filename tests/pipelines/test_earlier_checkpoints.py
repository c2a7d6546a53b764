"""Checkpoints of each kind, written when all pipelines were one file, load and draw what they drew then."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from hf_genmod import load_pipeline
from hf_genmod.checkpoints.safety import check_code

KINDS = {
    "unconditional": "UnconditionalPipeline",
    "classifier_free_guided": "ClassifierFreeGuidedPipeline",
    "latent": "ClassifierFreeGuidedPipeline",
    "classifier_guided": "ClassifierGuidedPipeline",
    "text_to_image": "TextToImagePipeline",
    "super_resolution": "SuperResolutionPipeline",
    "autoencoder": "AutoencoderPipeline",
    "run": "ClassifierFreeGuidedPipeline",
}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(Path(__file__).with_name("earlier_checkpoints.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder / "earlier_checkpoints"


@pytest.fixture(scope="module")
def expected(earlier):
    return load_file(earlier / "expected.safetensors")


def arguments(earlier, kind):
    """What the images in `expected` were asked for by."""
    request = json.loads((earlier / "requests.json").read_text())[kind]
    if kind != "autoencoder":
        request["num_inference_steps"] = 3
    if kind == "super_resolution":
        request["image"] = torch.linspace(0, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    return request


def check(pipeline, earlier, expected, kind):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(**arguments(earlier, kind), generator=generator, output_type="pt").images
    scale = expected[kind].abs().max()  # measured values are in their own units
    torch.testing.assert_close(images / scale, expected[kind] / scale, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_opens_with_the_installed_classes(kind, earlier, expected, tmp_path):
    pipeline = load_pipeline(earlier / kind)
    assert type(pipeline).__name__ == KINDS[kind]
    check(pipeline, earlier, expected, kind)
    pipeline.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"][0] == type(pipeline).__module__.rpartition(".")[2]
    check(load_pipeline(tmp_path / "again"), earlier, expected, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_opens_by_its_own_code(kind, earlier, expected):
    pipeline = DiffusionPipeline.from_pretrained(earlier / kind, trust_remote_code=True)
    assert type(pipeline).__module__.startswith("diffusers_modules.")
    check(pipeline, earlier, expected, kind)


def test_opens_where_nothing_is_installed_and_is_saved_again(earlier, expected, elsewhere, tmp_path):
    for kind in sorted(set(KINDS) - {"text_to_image"}):
        elsewhere.save_again(earlier / kind, tmp_path / kind)
        check(load_pipeline(tmp_path / kind), earlier, expected, kind)


def test_saving_it_again_where_it_lies_brings_it_up_to_date(earlier, expected, tmp_path):
    folder = shutil.copytree(earlier / "latent", tmp_path / "latent")
    with pytest.raises(
        ValueError, match="genmod_pipelines.py is not a file of this package, or is one of an earlier version"
    ):
        check_code(folder)
    load_pipeline(folder).save_pretrained(folder)
    check_code(folder)
    assert {file.name for file in folder.rglob("*.py")} == {
        "classifier_free_guided.py", "denoising_unet.py", "ancestral_ddpm.py", "variational_autoencoder.py",
        "component.py",
    }  # fmt: skip
    check(load_pipeline(folder), earlier, expected, "latent")


def test_an_earlier_adapter_joins_an_earlier_or_a_new_model(earlier, expected, tmp_path):
    load_pipeline(earlier / "classifier_free_guided").save_pretrained(tmp_path)
    for base in (earlier / "classifier_free_guided", tmp_path):
        pipeline = load_pipeline(base)
        pipeline.load_lora_weights(earlier / "adapter")
        assert list(pipeline.labels) == ["cat", "dog", "lizard", "zebra"]
        check(pipeline, earlier, expected, "adapter")
