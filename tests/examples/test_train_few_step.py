import json
import math

import pytest
import torch
from diffusers import LCMScheduler
from example_scripts import error_of, run
from PIL import Image
from tiny import tiny_autoencoder, tiny_classifier, tiny_text_pipeline, tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    SuperResolutionPipeline,
    UnconditionalPipeline,
    load_pipeline,
)
from hf_genmod.sharing.doctor import examine
from hf_genmod.training.run_folder import RunFolder

SHORT = ["--max_train_steps", "2", "--batch_size", "16", "--sampling_steps", "0"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of models that know nothing yet, of each kind."""
    folder = tmp_path_factory.mktemp("bases")
    names, scheduler = {0: "cat", 1: "dog"}, AncestralDDPMScheduler(prediction_type="v_prediction")
    latent = tiny_unet(in_channels=2, out_channels=2, num_classes=2)
    for name, pipeline in {
        "classes": ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), scheduler, id2label=names),
        "latents": ClassifierFreeGuidedPipeline(latent, scheduler, tiny_autoencoder(), id2label=names),
        "none": UnconditionalPipeline(tiny_unet(), scheduler),
        "text": tiny_text_pipeline(),
        "upsampler": SuperResolutionPipeline(tiny_unet(conditioning_channels=3), scheduler),
        "guided": ClassifierGuidedPipeline(tiny_unet(), tiny_classifier(), scheduler),
        "autoencoder": AutoencoderPipeline(tiny_autoencoder()),
    }.items():
        pipeline.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Captioned pictures of two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i in range(16):
        name = f"{('cat', 'dog')[i % 2]}/{i}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (16 * i, 90, 200 - 10 * i)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def few_step(*flags):
    return run("train_few_step.py", *flags)


@pytest.mark.parametrize("kind", ["classes", "latents", "none", "text", "upsampler"])
def test_every_kind_of_model_is_tuned_to_draw_in_few_steps(kind, bases, pictures, tmp_path):
    data = pictures
    if kind in ("classes", "latents"):
        (tmp_path / "classes").mkdir()
        data = tmp_path / "classes"
        for name in ("cat", "dog"):
            (data / name).symlink_to(pictures / name)
    done = few_step("--model", bases / kind, "--dataset", data, *SHORT, "--output_dir", tmp_path / "tuned")
    assert done.returncode == 0, done.stderr
    before, after = load_pipeline(bases / kind), load_pipeline(tmp_path / "tuned")
    assert type(after) is type(before) and type(after.scheduler) is LCMScheduler and after.is_consistent
    assert after.config.defaults["arguments"]["num_inference_steps"] == 4
    changed = [not torch.equal(a, b) for a, b in zip(before.unet.parameters(), after.unet.parameters(), strict=True)]
    assert any(changed)
    if kind == "text":
        states = before.text_encoder.state_dict(), after.text_encoder.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    request = {"classes": {"class_labels": "dog"}, "latents": {"class_labels": "dog"}, "text": {"prompt": "a dog"}}
    request = request.get(kind, {"image": Image.new("RGB", (4, 4))} if kind == "upsampler" else {})
    passes = []
    after.unet.register_forward_hook(lambda *_: passes.append(1))
    (image,) = after(**request).images
    assert image.size == after.picture_shape[:0:-1]
    assert len(passes) == 4  # one for each step, without a second for guidance
    if kind == "none":  # what trains further by the loss of a denoiser would undo it
        for script, flag in (("train_few_step.py", "--model"), ("finetune_lora.py", "--base")):
            command = [script, flag, tmp_path / "tuned", "--dataset", data, *SHORT, "--output_dir", tmp_path / "again"]
            reason = "the model is tuned to few steps already; give the one that it was tuned from"
            assert error_of(*command) == f"error: {reason}"
    if kind in ("classes", "latents", "text"):
        assert after.config.defaults["arguments"]["guidance_scale"] == 1


def test_a_run_is_tuned_for_a_quarter_of_its_minutes_on_its_own_images(bases, tmp_path, recwarn):
    model = tmp_path / "model"
    flags = ["--resolution", "16", "--block_out_channels", "16", "32", "--batch_size", "16", "--sampling_steps", "0"]
    done = run("train_unconditional.py", *flags, "--max_train_steps", "2", "--output_dir", model)
    assert done.returncode == 0, done.stderr
    provenance = json.loads((model / "provenance.json").read_text())
    (model / "provenance.json").write_text(json.dumps(provenance | {"minutes": 0.05}))
    tuned = tmp_path / "tuned"
    command = ["--model", model, "--batch_size", "16", "--sampling_steps", "0", "--license", "mit"]
    done = few_step(*command, "--output_dir", tuned)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tuned / "training_config.json").read_text())
    assert settings["training"]["max_train_minutes"] == pytest.approx(0.0125)
    assert settings["arguments"]["data"]["dataset"] == "shapes"
    assert settings["built_on"] == {"diffusion model": str(model)}
    assert f"hf_genmod evaluate {tuned} --dataset shapes" in done.stdout
    # A step of tuning takes 4.25 passes of each image where one of training takes 3.
    warned = [str(warning.message) for warning in recwarn]
    reason = f"{model} was trained for 2 steps, too few for a model to be tuned"
    assert f"model: {reason}; train it for at least 200" in warned
    what = "max_train_minutes: 0.0125 minutes of tuning are about 0 steps, too few to draw in few steps"
    assert f"{what}; give --max_train_minutes 3.5, for 100 steps" in warned
    findings = [*examine(tuned)]
    assert len(findings) == 2 and "steps, too few to draw in few steps" in findings[0]
    assert findings[1].startswith("the model that it was tuned from was trained for 2 steps, too few for a model")
    assert all(finding in done.stdout for finding in findings)
    card = (tuned / "README.md").read_text()
    assert "It draws in 1, 2 or 4 steps" in card and "4 steps each" in card
    again = few_step(*command, "--output_dir", tuned)
    assert "is complete" in again.stdout + again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ten_seeds_of_training_and_tuning_stay_finite_and_learn(seed, tmp_path):
    flags = ["--batch_size", "32", "--sampling_steps", "0", "--logging_steps", "1", "--seed", str(seed)]
    network = ["--resolution", "16", "--block_out_channels", "16", "32"]
    done = run("train_cfg.py", *network, *flags, "--max_train_steps", "100", "--output_dir", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    made = ["--model", tmp_path / "model", *flags, "--guidance_scale", "2", "--max_train_steps", "40"]
    done = few_step(*made, "--output_dir", tmp_path / "tuned")
    assert done.returncode == 0, done.stderr
    for folder in ("model", "tuned"):
        lines = RunFolder(tmp_path / folder).metrics()
        assert all(math.isfinite(line["loss"]) and line["bad_steps"] == 0 for line in lines)
        losses = [line["loss"] for line in lines]
        assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    pipe = load_pipeline(tmp_path / "tuned")
    pipe.set_progress_bar_config(disable=True)
    assert all(weight.isfinite().all() for weight in pipe.unet.state_dict().values())
    for steps in (1, 2, 4):
        request = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
        drawn = pipe(list(pipe.labels), **request, output_type="pt").images
        assert drawn.isfinite().all() and drawn.std() > 0.02


@pytest.mark.parametrize(
    "kind, flags, reason",
    [
        ("guided", [], "model: a classifier guides it in each step; tune the model that it guides"),
        ("autoencoder", [], "the model is an autoencoder and no diffusion model; give another"),
        ("classes", ["--guidance_scale", "nan"], "guidance_scale: nan is not finite; give finite numbers"),
        ("classes", ["--guidance_scale", "inf"], "guidance_scale: inf is not finite; give finite numbers"),
        ("none", ["--guidance_scale", "2"], "guidance_scale: 2.0 is for a model of labels or captions; leave it out"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_a_sentence(kind, flags, reason, bases, pictures, tmp_path):
    command = ["--model", bases / kind, "--dataset", pictures, *flags, *SHORT, "--output_dir", tmp_path / "run"]
    assert error_of("train_few_step.py", *command) == f"error: {reason}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gamma", ["-3", "0"])
def test_every_guidance_scale_that_draws_can_be_learned(gamma, bases, pictures, tmp_path, recwarn):
    for name in ("cat", "dog"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(pictures / name)
    flags = ["--model", bases / "classes", "--dataset", tmp_path / "data", *SHORT, "--guidance_scale", gamma]
    done = few_step(*flags, "--output_dir", tmp_path / "tuned")
    assert done.returncode == 0, done.stderr
    assert load_pipeline(tmp_path / "tuned").config.defaults["arguments"]["guidance_scale"] == 1
    warned = [str(warning.message) for warning in recwarn]
    assert "max_train_steps: 2 are too few to draw in few steps; give at least 100" in warned


def test_a_budget_and_images_are_asked_for_where_the_model_does_not_say_them(bases, pictures, tmp_path):
    command = ["train_few_step.py", "--model", bases / "none", "--output_dir", tmp_path / "run"]
    assert "does not say how long it was trained; give a budget" in error_of(*command, "--dataset", pictures)
    assert "is not a folder" in error_of(*command, "--model", bases / "nothing")
    assert "does not say on what it was trained; give --dataset" in error_of(*command, *SHORT)
