"""A pipeline is made, saved and loaded with parts that fit its arguments, or there is a sentence about the part."""

import functools
import json
import re

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from small_pipelines import NAMES, PIPELINES, guided, of_images, of_latents, of_text, unconditional, upsampler
from tiny import tiny_unet
from transformers import CLIPConfig, CLIPModel

from hf_genmod import load_pipeline

pipeline_of = functools.cache(lambda kind: PIPELINES[kind][0]())
PARTS = [(kind, name) for kind in PIPELINES for name, part in pipeline_of(kind).components.items() if part is not None]


def remade(pipeline, **changes):
    return type(pipeline).from_pipe(pipeline, **changes)


def refuses(message, call, *args, **kwargs):
    with pytest.raises(ValueError, match=message) as refusal:
        call(*args, **kwargs)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind, name", PARTS)
def test_a_component_of_another_kind_is_named(kind, name):
    pipeline = pipeline_of(kind)
    others = [other for key, other in pipeline.components.items() if key != name and other is not None]
    is_optional = name in pipeline._optional_components
    for wrong in ["a/path", 3, torch.nn.Linear(2, 2), DDIMScheduler, {}, *others, *[None] * (not is_optional)]:
        refuses(rf"^{name}: .* has no .*; give a ", remade, pipeline, **{name: wrong})
    remade(pipeline)


def test_what_each_names_is_what_it_lacks():
    refuses("^unet: None has no config.num_classes; give a DenoisingUNet2DModel$", remade, guided(), unet=None)
    with torch.device("meta"):
        unet, clip = UNet2DModel(), CLIPModel(CLIPConfig())
    refuses("^unet: a UNet2DModel has no config.num_classes; give", remade, unconditional(), unet=unet)
    refuses("^vae: a Linear has no encode; give a Var", remade, of_latents(), vae=torch.nn.Linear(2, 2))
    refuses("^text_encoder: a CLIPModel has no config.hidden_size", remade, of_text(), text_encoder=clip)


FAULTS_OF_NAMES = [
    (dict.fromkeys(range(3), "a"), "'a' is the name of several labels"),
    ({0: "a"}, "label 1 has no name"),
    ({0: "a", 2: "c"}, "label 1 has no name"),
    (dict(enumerate("abcd")), "3 is no label"),
    ({0.0: "a", 1: "b", 2: "c"}, "0.0 is no label"),
    ({True: "a", 0: "b", 2: "c"}, "True is no label"),
    ({"0": "a", 0: "b", 1: "c", 2: "d"}, "label 0 has several names"),
    ({**NAMES, 0: None}, "None is no name"),
    ({**NAMES, 0: ""}, "'' is no name"),
    ({0: 2, 1: 1, 2: 0}, "2 is no name"),
    ({name: label for label, name in NAMES.items()}, "'cat' is no label"),
    (list(NAMES.values()), "['cat', 'dog', 'lizard'] is no dict"),
    ("cat", "'cat' is no dict"),
    (0, "0 is no dict"),
]


@pytest.mark.parametrize("id2label, fault", FAULTS_OF_NAMES)
@pytest.mark.parametrize("kind", ["guided", "classifier guided", "upsampler"])
def test_names_that_are_not_one_for_each_label_are_refused(kind, id2label, fault):
    message = rf"^id2label: {re.escape(fault)}; give a name for each label, 0 \.\.\. 2$"
    refuses(message, remade, pipeline_of(kind), id2label=id2label)


def test_an_upsampler_without_labels_has_no_names():
    unet = tiny_unet(conditioning_channels=3)
    refuses(
        "^id2label: given, but its model was made without num_classes; leave it out$", upsampler, unet, id2label=NAMES
    )
    assert upsampler(unet, id2label={}).labels == upsampler(unet, id2label=None).labels == {}


RIGHT = {"low": [0.0, -1.0, 5.0], "high": [1.0, 2.0, 5.0]}
WRONG_RANGES = [
    [1, 0], [[1.0, 0.0]], [[0.0, float("nan")]], "x", 3, {}, {"low": [0.0] * 3}, {"low": 0.0, "high": 1.0},
    {**RIGHT, "low": [0.0, 0.0]}, {**RIGHT, "low": [0.0]}, {**RIGHT, "low": [0.0, 3.0, 5.0]},
    {**RIGHT, "high": [1.0, 2.0, float("inf")]},
    {**RIGHT, "low": ["0", "0", "0"]}, {**RIGHT, "low": [True] * 3}, {"low": [0.0] * 4, "high": [1.0] * 4},
]  # fmt: skip


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_range_that_is_not_one_of_each_channel_is_refused(kind):
    for value_range in WRONG_RANGES:
        message = rf"^value_range: {re.escape(f'{value_range!r:.60}')} is no .* of 3 channels; give the lowest"
        refuses(message, remade, pipeline_of(kind), value_range=value_range)
    remade(pipeline_of(kind), value_range=RIGHT)


@pytest.mark.parametrize(
    "make, changes, message",
    [
        (of_latents, {"vae": torch.nn.Linear(2, 2)}, "^vae: a Linear"),
        (of_images, {"vae": None}, "^vae: None"),
        (unconditional, {"scheduler": torch.nn.Linear(2, 2)}, "^scheduler: a Linear"),
        (unconditional, {"value_range": [1, 0]}, "^value_range: "),
        (guided, {"id2label": {0: "a"}}, "^id2label: label 1 has no name"),
        (guided, {"process": {"beta_end": 1}}, "^process: "),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(make, changes, message, tmp_path):
    pipeline = make()
    for name, value in changes.items():
        if name in pipeline.components:
            setattr(pipeline, name, value)
        else:
            pipeline.register_to_config(**{name: value})
    refuses(message, pipeline.save_pretrained, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_malformed_index_is_refused(tmp_path):
    guided(value_range=RIGHT).save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    assert load_pipeline(tmp_path).labels == {name: label for label, name in NAMES.items()}
    for name, value in [
        ("id2label", {"0": "a"}), ("id2label", "cat"), ("id2label", {"0": "a", "1": "b", "c": "d"}),
        ("value_range", "x"), ("value_range", {"low": [0.0], "high": [None]}),
    ]:  # fmt: skip
        file.write_text(json.dumps(index | {name: value}))
        refuses(f"^{name}: ", load_pipeline, tmp_path)
