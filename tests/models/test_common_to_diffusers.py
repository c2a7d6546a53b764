"""What the models of diffusers have in common, ours have, too."""

import inspect
import json

import pytest
import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.training_utils import EMAModel
from tiny import (
    AUTOENCODER_KINDS,
    TINY_AUTOENCODER,
    UNET_KINDS,
    assert_rounded_alike,
    autoencoder_inputs,
    tiny_autoencoder,
    tiny_classifier,
    tiny_unet,
    unet_inputs,
)

from hf_genmod import Autoencoder

MODELS = {
    "U-Net": lambda: tiny_unet(**UNET_KINDS["everything"]),
    "classifier": tiny_classifier,
    "autoencoder": lambda: tiny_autoencoder(Autoencoder),
    "variational autoencoder": tiny_autoencoder,
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def inputs_of(model):
    if hasattr(model, "encoder"):
        return {"sample": autoencoder_inputs(model)}
    if hasattr(model, "logits"):
        return {"sample": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), "timestep": 10}
    return unet_inputs(model)


@torch.no_grad()
def output_of(model, **options):
    return model(**inputs_of(model), **options)


def shapes(model):
    return {name: weight.shape for name, weight in model.state_dict().items()}


def own_settings(config):
    """A config as JSON gives it, without what diffusers adds."""
    return json.loads(json.dumps({name: value for name, value in config.items() if not name.startswith("_")}))


def test_takes_a_sample_and_then_a_timestep(model):
    names = list(inspect.signature(model.forward).parameters)
    assert names[0] == "sample" and names[-1] == "return_dict"
    assert ("timestep" in names) == (not hasattr(model, "encoder")) and names[1:2] != ["class_labels"]


def test_comes_again_from_its_config(model, tmp_path):
    again = type(model).from_config(model.config)
    assert shapes(again) == shapes(model)
    assert own_settings(again.config) == own_settings(model.config)
    model.save_config(tmp_path)
    loaded = type(model).from_config(type(model).load_config(tmp_path))
    assert shapes(loaded) == shapes(model)
    assert own_settings(loaded.config) == own_settings(model.config)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "20KB"}], ids=repr)
def test_comes_back_from_disk(model, options, tmp_path):
    model.save_pretrained(tmp_path, **options)
    loaded = type(model).from_pretrained(tmp_path, variant=options.get("variant"))
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert own_settings(loaded.config) == own_settings(model.config)
    assert_rounded_alike(output_of(loaded)[0], output_of(model)[0])


@pytest.mark.parametrize("dtype, low_cpu_mem_usage", [(torch.float16, True), (torch.bfloat16, False)])
def test_comes_back_in_a_dtype(model, dtype, low_cpu_mem_usage, tmp_path):
    model.to(dtype).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.dtype == dtype
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_outputs_as_tuples_hold_the_same(model):
    for part, expected in zip(output_of(model, return_dict=False), output_of(model).to_tuple(), strict=False):
        assert torch.equal(part, expected)


def test_gives_the_same_twice(model):
    assert torch.equal(output_of(model)[0], output_of(model)[0])


def test_gradient_checkpointing_is_switched_on_and_off(model):
    assert model._supports_gradient_checkpointing and not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


def test_is_averaged_by_diffusers(model):
    average = EMAModel(model.parameters(), decay=0.5, use_ema_warmup=False)
    before = [parameter.clone() for parameter in model.parameters()]
    model(**inputs_of(model))[0].square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * (parameter.grad if parameter.grad is not None else 1)
    after = [parameter.clone() for parameter in model.parameters()]
    for _ in range(2):  # the first step copies no more than a tenth
        average.step(model.parameters())
    average.copy_to(model.parameters())
    moved = 0
    for parameter, old, new in zip(model.parameters(), before, after, strict=True):
        low, high = torch.minimum(old, new), torch.maximum(old, new)
        assert ((low - 1e-6 <= parameter) & (parameter <= high + 1e-6)).all()
        moved += (parameter - old).abs().sum().item()
    assert moved > 0


def test_attributes_that_are_not_there_are_missed(model):
    model.dummy_attribute = 5
    assert model.dummy_attribute == 5
    assert model.save_pretrained == model.save_pretrained
    with pytest.raises(AttributeError, match=f"'{type(model).__name__}' object has no attribute 'does_not_exist'"):
        _ = model.does_not_exist


def test_pickles_are_not_written(model, tmp_path):
    for save in (
        lambda: model.save_pretrained(tmp_path / "new", safe_serialization=False),
        lambda: model.save_pretrained(tmp_path / "new", True, None, False),
        lambda: model.push_to_hub("user/pickles", safe_serialization=False),
    ):
        with pytest.raises(ValueError, match="safe_serialization: False would write pickles, which are not loaded"):
            save()
    if isinstance(model, PeftAdapterMixin):
        with pytest.raises(ValueError, match="safe_serialization: False would write pickles"):
            model.save_lora_adapter(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_the_methods_that_save_have_the_signatures_of_diffusers(model):
    for name in ("save_pretrained", "push_to_hub"):
        ours, theirs = getattr(type(model), name), getattr(ModelMixin, name)
        assert inspect.signature(ours) == inspect.signature(theirs)


@pytest.mark.parametrize("kind", AUTOENCODER_KINDS)
def test_slices_of_an_autoencoder_are_single_images(kind):
    cls, config = AUTOENCODER_KINDS[kind]
    model, sizes = tiny_autoencoder(cls, **config), []
    x = autoencoder_inputs(model, n=3)
    with torch.no_grad():
        expected = model(x).sample
        for network in (model.encoder, model.decoder):
            network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        model.enable_slicing()
        assert_rounded_alike(model(x).sample, expected)
        model.disable_slicing()
        assert_rounded_alike(model(x).sample, expected)
    assert sizes == [1] * 6 + [3] * 2
    assert "use_slicing" not in model.config and TINY_AUTOENCODER.keys() <= model.config.keys()
