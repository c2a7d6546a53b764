"""Pipelines of every kind, with adapters that change what they draw."""

import copy

import pytest
import torch
from tiny import tiny_text_pipeline, tiny_unet, tiny_vae
from transformers import T5EncoderModel

from hf_genmod import AncestralDDPMScheduler, ClassifierFreeGuidedPipeline, UnconditionalPipeline
from hf_genmod.training.adapters import attach_adapter

WEIGHTS = "pytorch_lora_weights.safetensors"


def unconditional(**kwargs):
    return UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler(), **kwargs)


def of_classes(**kwargs):
    unet = tiny_unet(num_classes=3)
    return ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(), id2label={0: "a", 1: "b", 2: "c"}, **kwargs)


def of_latents():
    scheduler = AncestralDDPMScheduler(clip_sample=False)
    return UnconditionalPipeline(tiny_unet(in_channels=4, out_channels=4), scheduler, tiny_vae())


def of_text(kind=None):
    return tiny_text_pipeline(kind) if kind else tiny_text_pipeline()


KINDS = {
    "unconditional": unconditional,
    "classes": of_classes,
    "latents": of_latents,
    "clip": of_text,
    "t5": lambda: of_text(T5EncoderModel),
}


def draw(pipeline, asked=None, **kwargs):
    pipeline.set_progress_bar_config(disable=True)
    if asked is None:
        asked = {"ClassifierFreeGuidedPipeline": "b", "TextToImagePipeline": "a red cat"}.get(type(pipeline).__name__)
    arguments = () if asked is None else (asked,)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(*arguments, generator=generator, num_inference_steps=3, output_type="np", **kwargs).images
    return torch.from_numpy(images)


def trained(pipeline, seed=0, rank=2, name=None):
    """The pipeline with an adapter as after training: none of its numbers is zero; with a class of this name."""
    known = pipeline.unet.config.num_classes
    if name is not None:
        pipeline.add_class(name, adapter_name="default")
    attach_adapter(pipeline.unet, rank, seed, num_new_classes=0 if name is None else 1)
    if "text_encoder" in pipeline.components:
        attach_adapter(pipeline.text_encoder, rank, seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for model in (pipeline.unet, pipeline.components.get("text_encoder")):
            for parameter in model.parameters() if model is not None else ():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=rng)
    assert pipeline.unet.config.num_classes == (known if name is None else known + 1)
    return pipeline


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


@pytest.fixture
def zebra(tmp_path):
    """The folder of an adapter for `of_classes` that brings a class."""
    trained(of_classes(), name="zebra").save_lora_weights(tmp_path / "zebra")
    return tmp_path / "zebra"


def with_product(model, weights, prefix, scale=1.0):
    """A copy of a model whose weights are W + scale · B A, of the file of an adapter."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for key in weights:
            if key.startswith(f"{prefix}.") and key.endswith(".lora_A.weight"):
                A, B = weights[key], weights[key.replace("lora_A", "lora_B")]
                W = modules[key.removeprefix(f"{prefix}.").removesuffix(".lora_A.weight")].weight
                W += scale * (B.flatten(1) @ A.flatten(1)).view_as(W)
    return model
