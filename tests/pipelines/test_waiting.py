"""What the host waits for while a pipeline draws: nothing in a step, as each look would idle an accelerator."""

import contextlib

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tiny import tiny_classifier, tiny_text_pipeline, tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    FewStepDDPMScheduler,
    SuperResolutionPipeline,
    UnconditionalPipeline,
)

PROCESS = AncestralDDPMScheduler().config
SAMPLERS = {
    "ancestral": AncestralDDPMScheduler.from_config(PROCESS),
    "few steps": FewStepDDPMScheduler.from_config(PROCESS),
    "DPM-Solver": DPMSolverMultistepScheduler.from_config(PROCESS, algorithm_type="sde-dpmsolver++"),
}
ENCODED = {
    f"{sign}prompt_{name}": torch.ones(2, 5, *size)
    for sign in ("", "negative_")
    for name, size in (("embeds", (16,)), ("attention_mask", ()))
}
PIPELINES = {
    "unconditional": (lambda s: UnconditionalPipeline(tiny_unet(), s), {"batch_size": 2}),
    "classifier-free": (
        lambda s: ClassifierFreeGuidedPipeline(tiny_unet(num_classes=3), s),
        {"class_labels": [0, 1], "guidance_scale": 2.0, "guidance_interval": (0.1, 5.0)},
    ),
    "classifier": (
        lambda s: ClassifierGuidedPipeline(tiny_unet(), tiny_classifier(), s),
        {"class_labels": [0, 1], "classifier_scale": 2.0},
    ),
    "text": (lambda s: tiny_text_pipeline(scheduler=s), {**ENCODED, "guidance_scale": 2.0}),
    "upsampler": (
        lambda s: SuperResolutionPipeline(tiny_unet(conditioning_channels=3), s), {"image": torch.zeros(2, 3, 4, 4)}
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, sampler",
    [
        *(pytest.param(name, "few steps", marks=pytest.mark.slow) for name in PIPELINES if name != "classifier"),
        ("classifier", "few steps"),
        ("unconditional", "ancestral"),
        ("text", "DPM-Solver"),
    ],
)
def test_no_step_looks_at_what_the_device_computes(name, sampler, monkeypatch):
    """Tensors on the device "meta" have no values, so to look at one is an error, as at the end of the loop."""
    make, request = PIPELINES[name]
    pipeline, passes = make(SAMPLERS[sampler]).to("meta"), []
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which does not know the device
    pipeline.unet.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta") as error:
        pipeline(**request, num_inference_steps=20, generator=torch.Generator().manual_seed(0))
    assert len(passes) == 20, error.value
