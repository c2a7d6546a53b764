"""What the folder of a run says about its checkpoint."""

import copy
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_autoencoder, tiny_text_pipeline, tiny_unet, tiny_vae

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    SuperResolutionPipeline,
    UnconditionalPipeline,
)
from hf_genmod.sharing.facts import Facts
from hf_genmod.sharing.model_card import write_card

MEASURED = ["evaluation/guidance.png", "evaluation/steps.png", "evaluation/trajectory.png"]


def save(pipeline, folder, **files):
    """A checkpoint with files of JSON beside it; returns what its folder says."""
    pipeline.save_pretrained(folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Facts.read(folder)


def classes(**config):
    unet = tiny_unet(num_classes=2, **config)
    return ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(), id2label={0: "cat", 1: "dog"})


def upsampler():
    return SuperResolutionPipeline(tiny_unet(conditioning_channels=3), AncestralDDPMScheduler(), factor=4)


def adapter(folder, **files):
    folder.mkdir()
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5)}, folder / "pytorch_lora_weights.safetensors")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_checkpoint_alone_says_what_it_is(tmp_path):
    pipeline = classes()
    facts = save(pipeline, tmp_path / "mine")
    assert facts.name == "mine" and facts.base is None and facts.stages == [(None, facts)]
    assert facts.class_names == ["cat", "dog"] and facts.request == 'class_labels="cat"'
    assert facts.num_parameters == sum(parameter.numel() for parameter in pipeline.unet.parameters())
    assert facts.image_shape == (3, 8, 8) and facts.factor is None and facts.trained_by_others == []


def test_a_guiding_network_is_no_part_of_the_size_and_the_card_tells_of_it(tmp_path):
    pipeline = classes()
    pipeline.register_modules(guiding_unet=copy.deepcopy(pipeline.unet))
    facts = save(pipeline, tmp_path)
    assert facts.num_parameters == sum(parameter.numel() for parameter in pipeline.unet.parameters())
    write_card(tmp_path, "mit")
    assert "An earlier version of its U-Net guides it" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_images_are_as_large_as_the_autoencoder_makes_them(tmp_path):
    unet = tiny_unet(in_channels=4, out_channels=4, sample_size=(8, 12))
    latents = UnconditionalPipeline(unet, AncestralDDPMScheduler(clip_sample=False), tiny_vae())
    facts = save(latents, tmp_path / "latents")
    assert facts.image_shape == latents.picture_shape == (3, 16, 24)
    assert facts.trained_by_others == ["autoencoder"]
    plain = AutoencoderPipeline(tiny_autoencoder(Autoencoder, sample_size=(8, 16), in_channels=5))
    facts = save(plain, tmp_path / "plain")
    assert facts.image_shape == (5, 8, 16) and facts.request == 'prior="fitted"' and facts.trained_by_others == []


@pytest.mark.parametrize("name", ["depends_on", "weights"])
def test_a_text_encoder_that_was_not_trained_is_of_others(tmp_path, name):
    pipeline = tiny_text_pipeline()
    assert save(pipeline, tmp_path / "scratch", training_config={}).trained_by_others == []
    frozen = save(pipeline, tmp_path / "frozen", training_config={name: {"text_encoder": "0123"}})
    assert frozen.trained_by_others == ["text encoder"]


def test_a_text_to_image_model_is_asked_for_a_caption_of_its_data(tmp_path):
    pipeline, captions = tiny_text_pipeline(), [['a "red" cat', "a cat"], "two lizards", []]
    facts = save(pipeline, tmp_path, provenance={"captions": captions})
    assert facts.captions == ['a "red" cat', "two lizards"] and eval(facts.request[len("prompt=") :]) == 'a "red" cat'
    (tmp_path / "provenance.json").unlink()
    assert Facts.read(tmp_path).request == 'prompt=""'


@pytest.mark.parametrize(
    "request_, in_python",
    [
        ({"class_labels": "zebra"}, 'class_labels="zebra"'), ({"class_labels": 3}, "class_labels=3"),
        ({"prompt": "ein Löwe"}, 'prompt="ein Löwe"'), ({}, ""),
    ],
)  # fmt: skip
def test_an_adapter_is_asked_for_what_it_has_learned(tmp_path, request_, in_python):
    settings = {"built_on": {"base model": "user/base"}}
    facts = Facts.read(adapter(tmp_path / "lora", training_config=settings, provenance={"request": request_}))
    assert facts.base == "user/base" and facts.learned == request_ and facts.request == in_python
    assert facts.num_parameters == 11


def test_an_adapter_without_its_base_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model_index.json in it, so it holds no checkpoint"):
        Facts.read(tmp_path)
    message = "there is no training_config.json that says which model the adapter is for"
    for name, files in {"a": {}, "b": {"training_config": {"lora": {"rank": 3}}}}.items():
        with pytest.raises(ValueError, match=message):
            Facts.read(adapter(tmp_path / name, **files))


def test_an_adapter_of_an_earlier_version_is_read_after_the_changes_that_the_error_names(tmp_path):
    settings, request = {"lora": {"base": "user/base"}, "asked": {"class_labels": "Löwe"}}, {"class_labels": "Löwe"}
    folder = adapter(tmp_path / "lora", training_config=settings)
    with pytest.raises(ValueError, match="an earlier version of this package wrote the run; add ") as error:
        Facts.read(folder)
    assert '"built_on": {"base model": "user/base"} to its training_config.json' in str(error.value)
    assert '"request": {"class_labels": "Löwe"} to its provenance.json' in str(error.value)
    (folder / "training_config.json").write_text(json.dumps({**settings, "built_on": {"base model": "user/base"}}))
    (folder / "provenance.json").write_text(json.dumps({"request": request}))
    facts = Facts.read(folder)
    assert facts.base == "user/base" and facts.learned == request


def test_damaged_json_is_named(tmp_path):
    save(classes(), tmp_path)
    (tmp_path / "provenance.json").write_text("{")
    with pytest.raises(ValueError, match="provenance.json: not a JSON file"):
        Facts.read(tmp_path)


def test_the_runs_before_come_first_as_far_as_they_are_here(tmp_path):
    vae = save(AutoencoderPipeline(tiny_autoencoder()), tmp_path / "vae")
    built_on = {"autoencoder": str(vae.folder)}
    model = save(classes(), tmp_path / "model", training_config={"built_on": built_on})
    (tmp_path / "no-run").mkdir()
    built_on = {"diffusion model": str(model.folder), "text encoder": "user/elsewhere", "x": str(tmp_path / "no-run")}
    guided = save(classes(), tmp_path / "guided", training_config={"built_on": built_on})
    assert [(kind, stage.name) for kind, stage in guided.stages] == [
        ("autoencoder", "vae"), ("diffusion model", "model"), (None, "guided"),
    ]  # fmt: skip


def test_figures_that_show_images_of_the_data_set_are_not_shared(tmp_path):
    own = ["samples.png", "loss.png", "accuracy.png"]
    given = ["evaluation/enlarged.png", "reconstructions.png"]
    for pipeline, shared in ((classes(), [*own, *MEASURED]), (upsampler(), own)):
        folder = tmp_path / type(pipeline).__name__
        facts = save(pipeline, folder)
        assert facts.figures(shared=True) == []
        (folder / "evaluation").mkdir()
        for name in [*own, *MEASURED, *given]:
            Image.new("RGB", (8, 8)).save(folder / name)
        assert facts.figures(shared=True) == shared
        of_upsampler = given[:1] if facts.factor else []
        assert facts.figures(shared=False) == [*given[1:], *own, *MEASURED, *of_upsampler]
