"""The defaults in the config of a checkpoint serve for the arguments that a call leaves out."""

import subprocess
import sys

import pytest
import torch
from tiny import tiny_unet

from hf_genmod import AncestralDDPMScheduler, ClassifierFreeGuidedPipeline, load_pipeline

ARGUMENTS = {"num_inference_steps": 3, "guidance_scale": 1.5}

WITHOUT_PACKAGE = """
import sys
sys.modules["hf_genmod"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
image = pipe(1, generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save(image, sys.argv[2])
"""


def pipeline(**config):
    return ClassifierFreeGuidedPipeline(tiny_unet(num_classes=3), AncestralDDPMScheduler(), **config)


def draw(pipe, *args, **kwargs):
    return pipe(*args, generator=torch.Generator().manual_seed(0), output_type="pt", **kwargs).images


def test_a_checkpoint_draws_by_its_defaults_with_this_package_and_without(tmp_path):
    expected = draw(pipeline(), 1, **ARGUMENTS)
    defaults = {"arguments": ARGUMENTS, "chosen_on": {"dataset": "shapes"}}
    pipeline(defaults=defaults).save_pretrained(tmp_path / "model")
    pipe = load_pipeline(tmp_path / "model")
    assert pipe.config.defaults == defaults
    assert torch.equal(draw(pipe, 1), expected)
    command = [sys.executable, "-c", WITHOUT_PACKAGE, tmp_path / "model", tmp_path / "image.pt"]
    subprocess.run(command, check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "image.pt"), expected, atol=1e-4, rtol=0)


def test_given_arguments_have_precedence_by_name_and_by_position():
    pipe, plain = pipeline(defaults={"arguments": ARGUMENTS}), pipeline()
    assert torch.equal(draw(pipe, 1, 3.0), draw(plain, 1, 3.0, num_inference_steps=3))
    assert torch.equal(draw(pipe, 1, num_inference_steps=2), draw(plain, 1, 1.5, num_inference_steps=2))
    assert not draw(pipe, 1).requires_grad
    with pytest.raises(TypeError, match="class_labels"):
        pipe()


@pytest.mark.parametrize(
    "defaults, message",
    [
        ([], "defaults: .* is no {'arguments'"),
        ({"num_inference_steps": 3}, "defaults: .* is no {'arguments'"),
        ({"arguments": {"steps": 3}}, "defaults: 'steps' is no argument that takes a number"),
        ({"arguments": {"output_type": "np"}}, "defaults: 'output_type' is no argument that takes a number"),
        ({"arguments": {"guidance_scale": "2"}}, "defaults: guidance_scale is '2', which is not a number"),
        ({"arguments": {"guidance_scale": float("nan")}}, "defaults: guidance_scale is nan, which is not a number"),
    ],
)
def test_defaults_that_are_none_get_one_sentence(defaults, message):
    with pytest.raises(ValueError, match=message):
        pipeline(defaults=defaults)
