"""What a sweep chose, as the defaults of a checkpoint."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny import tiny_unet

from hf_genmod import AncestralDDPMScheduler, ClassifierFreeGuidedPipeline, load_pipeline
from hf_genmod.checkpoints.safety import check_code
from hf_genmod.evaluation.config import make_sampler
from hf_genmod.evaluation.estimates import Estimate, Share
from hf_genmod.evaluation.report import Report
from hf_genmod.sharing.adopting import adopt
from hf_genmod.sharing.model_card import write_card

ARGUMENTS = {"num_inference_steps": 3, "guidance_scale": 1.5}
SHARE = Share(0.7, 100, 0.6, 0.8)


def swept(sampler):
    """A report as a sweep of three settings leaves it, two of which were drawn."""
    chosen = {"sampler": sampler, **ARGUMENTS}
    measures = {"forward_passes": 6.0, "kernel_distance": Estimate(0.25, 50, 0.125, 0.375), "told_apart": SHARE}
    settings = [chosen | measures, chosen | measures | {"num_inference_steps": 9}]
    found = {"chosen": chosen, "seed": 10**6, "failed": {"DDIM, 1001 steps": "too many"}}
    found["rounds"] = [{"samples": 50, "settings": settings}]
    dataset = {"name": "/home/somebody/pets", "num_pictures": 9, "num_held_out": 9, "fingerprint": "f0"}
    dataset["held_out_is_unseen"] = True
    shares = dict.fromkeys(("precision", "recall", "density", "coverage", "told_apart"), SHARE)
    measured = chosen | {"seconds": SHARE, "forward_passes": 6.0, "kernel_distance": SHARE, **shares}
    measured["memorisation"] = {}
    return Report(
        "model", dataset, "features", 0, [measured], held_out={"kernel_distance": SHARE} | shares, sweep=found
    )


def draw(pipe, **kwargs):
    return pipe(1, generator=torch.Generator().manual_seed(0), output_type="pt", **kwargs).images


@pytest.fixture
def folder(tmp_path):
    pipe = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler(timestep_spacing="trailing"))
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("sampler", ["FewStepDDPMScheduler", "DPMSolverMultistepScheduler", "AncestralDDPMScheduler"])
def test_an_adopted_checkpoint_draws_what_the_options_draw_by_hand(sampler, folder):
    index, pipe = json.loads((folder / "model_index.json").read_text()), load_pipeline(folder)
    by_hand = load_pipeline(folder)
    by_hand.scheduler = make_sampler(sampler, by_hand.scheduler)
    expected = draw(by_hand, **ARGUMENTS)
    adopt(folder, pipe, swept(sampler))
    check_code(folder)
    for opened in (pipe, load_pipeline(folder), DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)):
        assert type(opened.scheduler).__name__ == sampler
        assert torch.equal(draw(opened), expected)
        assert torch.equal(draw(opened, num_inference_steps=2, guidance_scale=1.0),
                           draw(by_hand, num_inference_steps=2, guidance_scale=1.0))  # fmt: skip
    adopted = json.loads((folder / "model_index.json").read_text())
    chosen_on = {"dataset": "pets", "fingerprint": "f0", "settings": 3, "samples": 50}
    chosen_on |= {"kernel_distance": 0.25, "interval": [0.125, 0.375]}
    assert adopted["defaults"] == {"arguments": ARGUMENTS, "chosen_on": chosen_on}
    assert {name for name in index | adopted if index.get(name) != adopted.get(name)} <= {"defaults", "scheduler"}
    shipped = {"FewStepDDPMScheduler": ["few_step_ddpm.py"], "AncestralDDPMScheduler": ["ancestral_ddpm.py"]}
    assert [file.name for file in (folder / "scheduler").glob("*.py")] == shipped.get(sampler, [])


def test_the_card_and_its_samples_are_of_the_defaults(folder):
    Image.new("RGB", (8, 8)).save(folder / "samples.png")
    found = swept("FewStepDDPMScheduler")
    adopt(folder, load_pipeline(folder), found)
    redrawn = Image.open(folder / "samples.png")
    assert redrawn.width > 100 and len(list((folder / "images").iterdir())) == 2
    found.save(folder / "evaluation")
    Image.new("RGB", (8, 8)).save(folder / "evaluation" / "sweep.png")
    text = write_card(folder, "mit").text
    assert (
        "Where a call leaves them out, `guidance_scale` is 1.5 and `num_inference_steps` is 3. A sweep of 3 "
        "settings chose this, and the sampler; 50 samples have a kernel distance of 0.25 (0.125–0.375) from images "
        "of `pets`.\n"
    ) in text
    assert "; 3 steps each*" in text and "(evaluation/sweep.png)" in text
    assert (
        "\n\n| | 50 samples | told apart | forward passes |\n|---|---|---|---|\n"
        "| FewStepDDPM, 3 steps, γ = 1.5 | 0.25 (0.125–0.375) | 70.0% (60.0–80.0%) | 6 |\n"
    ) in text.replace("|  |", "| |")
    assert "| DDIM, 1001 steps | too many | " in text
    assert Report.read(folder / "evaluation").sweep == found.sweep


def test_defaults_without_a_sweep_are_in_the_card_too(folder):
    pipe = load_pipeline(folder)
    pipe.register_to_config(defaults={"arguments": {"num_inference_steps": 2}, "chosen_on": "by eye"})
    pipe.save_config(folder)
    text = write_card(folder, "mit").text
    assert "Where a call leaves them out, `num_inference_steps` is 2.\n" in text and "by eye" not in text
