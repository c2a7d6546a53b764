"""The card of each kind of checkpoint, beside what its folder knows."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_autoencoder, tiny_classifier, tiny_text_pipeline, tiny_unet, tiny_vae

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    SuperResolutionPipeline,
    UnconditionalPipeline,
)
from hf_genmod.sharing.facts import Facts
from hf_genmod.sharing.model_card import is_as_written, license_of, write_card
from hf_genmod.sharing.push import _files_to_push

NAMES = {0: "cat", 1: "dog"}
PROVENANCE = {
    "num_pictures": 1500,
    "fingerprint": "fedcba98",
    "command": "python examples/train_cfg.py --dataset pets --license mit",
    "versions": {"hf_genmod": "0.1.0.dev0", "torch": "2.13.0", "diffusers": "0.42.1"},
    "commit": "0123456789ab+",
    "hardware": "2 CPU cores (some kind), 1 process of 2 threads",
    "minutes": 12.345,
    "steps": 6789,
    "class_balance": {"cat": 1200, "dog": 300},
    "captions": [["a red cat", "a cat"], "two lizards"],
}
CONFIG = {
    "training": {"mixed_precision": "bf16", "ema_length": 0.05},
    "pictures": {"name": "/home/somebody/pets", "num_pictures": 1500, "num_held_out": 99,
                 "fingerprint": "fedcba98", "skipped": ["a.png", "b.png"]},
}  # fmt: skip


def with_prior():
    vae = tiny_autoencoder(Autoencoder)
    vae.fit_prior(torch.randn(50, *vae.latent_shape(8, 8), generator=torch.Generator().manual_seed(0)))
    return AutoencoderPipeline(vae)


def of_twelve():
    """More classes than digits."""
    names = {index: f"class {index}" for index in range(12)}
    return ClassifierFreeGuidedPipeline(tiny_unet(num_classes=12), AncestralDDPMScheduler(), id2label=names)


def in_latent_space():
    unet = tiny_unet(in_channels=4, out_channels=4, num_classes=2)
    return ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(clip_sample=False), tiny_vae(), id2label=NAMES)


KINDS = {
    "unconditional": (lambda: UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler()), "A diffusion model"),
    "classes": (
        lambda: ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler(), id2label=NAMES),
        "A class-conditional diffusion model",
    ),
    "unnamed": (
        lambda: ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler()),
        "A class-conditional diffusion model",
    ),
    "twelve": (of_twelve, "class 9, class 10, class 11."),
    "guided": (
        lambda: ClassifierGuidedPipeline(
            tiny_unet(), tiny_classifier(num_classes=2), AncestralDDPMScheduler(), id2label=NAMES
        ),
        "with a classifier of noisy images that guides it",
    ),
    "latent": (in_latent_space, "in the latent space of an autoencoder"),
    "text": (tiny_text_pipeline, "A text-to-image diffusion model"),
    "variational": (
        lambda: AutoencoderPipeline(tiny_autoencoder()),
        "A variational autoencoder",
    ),
    "plain": (with_prior, "An autoencoder"),
    "upsampler": (
        lambda: SuperResolutionPipeline(tiny_unet(conditioning_channels=3), AncestralDDPMScheduler(), factor=4),
        "that enlarges images to 4 times their height and width. It makes images of 8×8 pixels, RGB.",
    ),
}
TASKS = {"text": "text-to-image", "upsampler": "image-to-image"}


@pytest.fixture
def run(tmp_path):
    """The folder of a run that is over, with samples unless these are to be drawn."""

    def make(kind="classes", has_samples=True):
        folder = tmp_path / kind
        KINDS[kind][0]().save_pretrained(folder)
        (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
        (folder / "training_config.json").write_text(json.dumps(CONFIG))
        for name in ["loss.png", "samples.png"][: 1 + (has_samples and kind != "upsampler")]:
            Image.new("RGB", (8, 8)).save(folder / name)
        return folder

    return make


def share(hits, count):
    p = hits / count
    return {"value": p, "count": count, "low": max(0, p - 0.031), "high": min(1, p + 0.029)}


def around(value):
    return {"value": value, "count": 500, "low": value - 0.25, "high": value + 0.25}


def measured(scale, copies=4):
    return {
        "sampler": "DPMSolverMultistepScheduler", "num_inference_steps": 20, "guidance_scale": scale,
        "seconds": around(0.271), "forward_passes": 40.0, "told_apart": share(970, 1000),
        "told_apart_by_longer_training": share(985, 1000),
        "frechet_distance": around(3.21), "kernel_distance": around(0.654),
        "precision": share(400, 500), "recall": share(300, 500), "density": around(0.87), "coverage": share(350, 500),
        "recognised_share": share(440, 500),
        "recognised_share_by_class": {"cat": share(238, 250), "dog": share(202, 250)},
        "memorisation": {"pixels": {"threshold": 1.5, "share": share(copies, 500), "flagged": copies > 20},
                         "features": {"threshold": 0.5, "share": share(3, 500), "flagged": False}},
    }  # fmt: skip


def report(folder, *settings):
    """An `evaluation/` as the example leaves it."""
    held_out = measured(1) | {"frechet_distance": around(0.4), "coverage": share(480, 500)}
    held_out["told_apart"] = share(505, 1000)
    text = json.dumps({
        "model": str(folder), "features": "a network trained on the data set", "seed": 7,
        "dataset": {"name": "/home/somebody/pets", "num_pictures": 1500, "num_held_out": 500, "fingerprint": "f0",
                    "held_out_is_unseen": True},
        "settings": settings, "held_out": held_out,
        "bits_per_dimension": {"variational bound": around(3.987)},
    })  # fmt: skip
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text(text)
    for name in ("guidance", "steps", "trajectory", "closest_DPMSolverMultistepScheduler-20-1_pixels"):
        Image.new("RGB", (8, 8)).save(folder / "evaluation" / f"{name}.png")


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_says_what_it_is_where_it_comes_from_and_how_to_use_it(kind, run, monkeypatch, tmp_path, hub):
    folder = run(kind, has_samples=False)
    card = write_card(folder, "mit")
    assert (folder / "README.md").read_text() == str(card)
    card.validate()
    assert card.data.license == "mit" and {"diffusers", "hf_genmod"} <= set(card.data.tags)
    assert card.data.pipeline_tag == TASKS.get(kind, "unconditional-image-generation")
    assert KINDS[kind][1] in card.text
    if kind == "upsampler":
        assert not (folder / "samples.png").exists()  # whose pictures would it show?
        Image.new("RGB", (4, 6)).save(tmp_path / "small.png")
    else:
        assert Image.open(folder / "samples.png").width >= 64
    weights = [load_file(file) for file in folder.glob("*/*.safetensors")]
    count = sum(weight.numel() for file in weights for weight in file.values())
    assert f"It has {count:,} parameters" in card.text
    for fact in ("12.3 minutes", "6,789 steps", "1 process of 2 threads, in bf16.", "torch 2.13.0", "0123456789ab",
                 "with changes", "1,500 images of `pets`", "2 images that could not be used", "`fedcba98`",
                 "| training images | 1200 | 300 |",
                 "a moving average", "The loss on 99 held-out images", PROVENANCE["command"]):  # fmt: skip
        assert fact in card.text, fact
    assert not re.search(r"\{\{|\}\}|\bNone\b|\bnan\b|TODO|somebody", str(card))
    for name in re.findall(r"\]\(([^)]*)\)", card.text):
        assert (folder / name).is_file(), name

    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len([line for line in snippet.splitlines() if line]) <= 5
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    width, height = Image.open("sample.png").size
    assert (width, height) == (16, 24) if kind == "upsampler" else width >= 8


def test_every_measure_is_in_the_card_and_in_what_the_hub_shows(run, hub):
    folder = run()
    report(folder, measured(1), measured(3))
    card = write_card(folder, "mit")
    card.validate()
    for shown in ("DPMSolver, 20 steps, γ = 3", "3.21 (2.96–3.46)", "0.654 (0.404–0.904)", "80.0% (76.9–82.9%)",
                  "88.0% (84.9–90.9%)", "0.87 (0.62–1.12)", "| 40 | 0.271 (0.021–0.521) |",
                  "| DPMSolver, 20 steps, γ = 3 | 95.2% (92.1–98.1%) | 80.8% (77.7–83.7%) |",
                  "3.99 (3.74–4.24) bits per dimension", "Each setting has 500 samples, with the seeds 7 to 506",
                  "| 0.4 (0.15–0.65)", "evaluation/guidance.png"):  # fmt: skip
        assert shown in card.text, shown
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert {result.dataset_name for result in results} == {"pets"}
    assert {result.metric_type: result.metric_value for result in results} == {
        "classifier-two-sample-accuracy": 0.97, "frechet-distance": 3.21, "share-of-copies": 0.008,
    }  # fmt: skip
    assert results[1].metric_name == "Fréchet distance (DPMSolver, 20 steps, γ = 1, 500 images, 95%: 2.96–3.46)"


def test_a_card_begins_with_three_measures_of_the_best_setting(run):
    folder = run()
    report(folder, measured(1), measured(3) | {"frechet_distance": around(2.5), "recognised_share": share(450, 500)})
    text = write_card(folder, "mit").text
    assert (
        "| | told apart ↓ | Fréchet distance ↓ | close to a training image ↓ |\n|---|---|---|---|\n"
        "| DPMSolver, 20 steps, γ = 3 | **97.0%** | **2.5** | **0.8%** |\n"
        "| held-out images | 50.5% | 0.4 | 1.0% |\n\n![Samples"
    ) in text


@pytest.mark.parametrize("kind", ["classes", "guided", "twelve"])
def test_a_card_of_two_settings_has_less_than_120_lines_and_shows_the_closest_images_once(kind, run, hub):
    folder, names = run(kind), [f"class {i}" for i in range(12)] if kind == "twelve" else list(NAMES.values())
    by_class = {"recognised_share_by_class": dict.fromkeys(names, share(80, 100))}
    report(folder, measured(1) | by_class, measured(3, copies=100) | by_class)
    of_classes = PROVENANCE | {"class_balance": dict.fromkeys(names, 100), "dataset_id": "somebody/pets"}
    (folder / "provenance.json").write_text(json.dumps(of_classes))
    if kind == "guided":
        built_on = {"built_on": {"diffusion model": str(run("unconditional"))}}
        (folder / "training_config.json").write_text(json.dumps(CONFIG | built_on))
    for setting in (1, 3):
        for space in ("pixels", "features"):
            name = f"evaluation/closest_DPMSolverMultistepScheduler-20-{setting}_{space}.png"
            Image.new("RGB", (8, 8)).save(folder / name)
    card = write_card(folder, "mit")
    assert len(str(card).splitlines()) < 120
    assert re.findall(r"closest_[^)]*", card.text) == ["closest_DPMSolverMultistepScheduler-20-3_pixels.png"]
    assert "these images: DPMSolver, 20 steps, γ = 3, by pixels]" in card.text
    assert card.text.count("<details>") == card.text.count("</details>") == 1
    assert not re.search(r"\n\|[^\n]*\n[^|\n]", card.text)  # a table ends with an empty line
    assert not re.search(r"\n[^|\n][^\n]*\n\|", card.text)  # and begins after one


def test_the_hub_is_told_the_data_set_and_shown_samples_and_results(run):
    folder = run(has_samples=False)
    report(folder, measured(1))
    (folder / "provenance.json").write_text(json.dumps(PROVENANCE | {"dataset_id": "somebody/pets"}))
    card = write_card(folder, "mit", repo_id="user/pets")
    card.validate()
    assert card.data.datasets == ["somebody/pets"] and card.data.eval_results[0].dataset_type == "somebody/pets"
    assert [example["text"] for example in card.data.widget] == ["cat", "dog"]
    for example in card.data.widget:
        assert min(Image.open(folder / example["output"]["url"]).size) >= 256
    entries = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / "pets.yaml").read_text()))
    assert {(entry.dataset_id, entry.task_id): entry.value for entry in entries} == {
        ("somebody/pets", "classifier-two-sample-accuracy"): 0.97,
        ("somebody/pets", "frechet-distance"): 3.21,
        ("somebody/pets", "share-of-copies"): 0.008,
    }
    assert entries[0].source_url == "https://huggingface.co/user/pets"
    assert ".eval_results/pets.yaml" in _files_to_push(Facts.read(folder))
    others = {"pictures": CONFIG["pictures"] | {"name": "others"}}  # not those of the measures
    (folder / "training_config.json").write_text(json.dumps(CONFIG | others))
    assert ".eval_results/pets.yaml" not in _files_to_push(Facts.read(folder))


def test_a_data_set_that_is_not_on_the_hub_or_not_the_one_measured_on_has_no_results_there(run):
    for kind, dataset_id, name in (("classes", None, "/home/somebody/pets"), ("guided", "somebody/pets", "others")):
        folder = run(kind)
        report(folder, measured(1))
        (folder / "provenance.json").write_text(json.dumps(PROVENANCE | {"dataset_id": dataset_id}))
        pictures = {"pictures": CONFIG["pictures"] | {"name": name}}
        (folder / "training_config.json").write_text(json.dumps(CONFIG | pictures))
        card = write_card(folder, "mit")
        assert card.data.datasets == ([dataset_id] if dataset_id else None)
        assert card.data.eval_results[0].dataset_type == "f0"
        assert not (folder / ".eval_results").exists()


@pytest.mark.parametrize("name", ["/home/somebody/pets", "shapes"])
def test_the_card_of_an_autoencoder_begins_with_reconstructions(name, run):
    folder = run("plain")
    (folder / "training_config.json").write_text(
        json.dumps(CONFIG | {"pictures": CONFIG["pictures"] | {"name": name}})
    )
    (folder / "samples").mkdir()
    for step in (5, 10):
        Image.new("RGB", (step, step)).save(folder / "samples" / f"step-{step:06d}.png")
    text = write_card(folder, "mit").text
    assert Image.open(folder / "reconstructions.png").size == (10, 10)
    assert re.findall(r"\]\((\S*\.png)\)", text)[:2] == ["reconstructions.png", "samples.png"]
    shared = write_card(folder, repo_id="user/pets").text  # images of the data set are not shared
    assert ("reconstructions.png" in shared) == (name == "shapes")


@pytest.mark.parametrize(
    "tracker, space, link",
    [("trackio", "user/runs", "spaces/user/runs)"), ("trackio", None, "docs/trackio)"), ("tensorboard", None, None)],
)
def test_a_run_that_trackio_has_tracked_has_its_badge(tracker, space, link, run):
    folder = run("unconditional")
    config = CONFIG | {"training": CONFIG["training"] | {"report_to": tracker, "mixed_precision": "no"}}
    (folder / "training_config.json").write_text(json.dumps(config))
    (folder / "provenance.json").write_text(json.dumps(PROVENANCE | {"trackio_space": space}))
    card = write_card(folder, "mit")
    assert "2 threads, in fp32." in card.text
    assert ("badge.png" in card.text) == ("trackio" in card.data.tags) == (link is not None)
    assert link is None or f"](https://huggingface.co/{link}" in card.text


def test_the_models_on_the_hub_that_it_is_built_on_are_named(run, hub):
    folder = run("latent")
    HfApi().create_repo(known := hub.new_repo_id())
    for base, repo_id, named in (
        (known, "user/model", known), ("runs/vae", "user/model", None), (str(run("plain")), None, None),
    ):  # fmt: skip
        (folder / "training_config.json").write_text(json.dumps(CONFIG | {"built_on": {"autoencoder": base}}))
        assert write_card(folder, "mit", repo_id).data.base_model == named


def test_limits_follow_from_what_was_measured(run):
    folder = run()
    report(folder, measured(1) | {"frechet_distance": around(3.2)}, measured(3, copies=100))
    text = write_card(folder, "mit").text
    assert "less than half as many training images as the average class: dog." in text
    assert "their Fréchet distance is at best 8.0 times that of held-out images (DPMSolver, 20 steps, γ = 1)" in text
    assert "coverage is 70.0% (66.9–72.9%), that of held-out images 96.0% (92.9–98.9%)" in text
    assert "recognised less often than the average: dog" in text
    assert "**Some samples are copies" in text and "| 20.0% (16.9–22.9%), **flagged** |" in text
    assert "not known" not in text

    good = run("guided")
    best = measured(1) | {"frechet_distance": around(0.41), "coverage": share(479, 500)}
    best["recognised_share_by_class"] = {"cat": share(221, 250), "dog": share(219, 250)}
    report(good, best)
    text = write_card(good, "mit").text
    for absent in ("Fréchet distance is", "coverage is", "recognised less often", "copies of training images, or"):
        assert absent not in text


def test_what_cannot_judge_is_marked_explained_and_not_in_the_headline(run):
    folder = run()
    better = {"precision": share(450, 500), "coverage": share(499, 500), "memorisation": {}}
    report(folder, measured(1) | better)
    card = write_card(folder, "mit")
    assert "| precision \\* | recall | density | coverage | recognised |" in card.text
    assert "by the precision, samples (DPMSolver, 20 steps, γ = 1: 90.0% (86.9–92.9%)) are better than" in card.text
    assert [result.metric_type for result in card.data.eval_results] == [
        "classifier-two-sample-accuracy", "frechet-distance", "coverage"]  # fmt: skip
    file = folder / "evaluation" / "evaluation.json"
    found = json.loads(file.read_text())
    found["held_out"] |= {"recognised_share": share(325, 500), "coverage": share(400, 500)}
    file.write_text(json.dumps(found))
    card = write_card(folder, "mit")
    assert "- A measure with a star cannot judge its samples: the classifier recognises only 65.0% (" in card.text
    assert "| recognised \\* | forward" in card.text
    assert [result.metric_type for result in card.data.eval_results] == [
        "classifier-two-sample-accuracy", "frechet-distance", "bits-per-dimension"]  # fmt: skip


def test_what_was_not_measured_is_said_to_be_unknown(run):
    text = write_card(run(), "mit").text
    assert "The quality of the model has not been measured" in text
    assert "Whether the model copies training images has not been measured" in text
    assert "Its quality, and whether it copies training images, are not known" in text


def test_the_card_of_an_upsampler_compares_it_with_interpolation_and_shows_pictures_only_at_home(run):
    folder = run("upsampler")
    setting = measured(1) | {"noise_level": 50}
    del setting["guidance_scale"], setting["recognised_share"], setting["recognised_share_by_class"]
    report(folder, setting)
    file = folder / "evaluation" / "evaluation.json"
    interpolated = {"frechet_distance": around(77.7), "coverage": share(99, 500)}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"interpolated": interpolated}))
    Image.new("RGB", (8, 8)).save(folder / "evaluation" / "enlarged.png")
    card = write_card(folder, "mit").text
    assert re.search(r"\| DPMSolver, 20 steps, noise level 50 \| 97.0% \S+ \| 3.21 .*\n\| bicubic \|  \| 77.7 ", card)
    assert "(evaluation/enlarged.png)" in card and "made small and enlarged again" in card
    assert "(evaluation/" not in write_card(folder, "mit", repo_id="user/model").text
    assert Facts.read(folder).figures(shared=True) == ["loss.png"]


def test_the_measures_of_papers_are_named_by_the_number_of_samples(run):
    folder = run()
    report(folder, measured(1) | {"standard": {"samples": 1000, "reference_images": 9, "fid": 12.5, "kid": 0.01}})
    card = write_card(folder, "mit").text
    assert re.search(
        r"\n\n\| \| FID-1k \| KID-1k \|\n\|---\|---\|---\|\n\| DPMSolver.* \| 12.5 \| 0.01 \|\n\n",
        card.replace("|  |", "| |"),
    )


@pytest.mark.parametrize(
    "kind, rows", [("unconditional", ""), ("upsampler", "noise level and "), ("classes", "strength of guidance and ")]
)
def test_the_figure_of_steps_is_described_by_what_its_rows_are(kind, rows, run):
    folder = run(kind)
    (folder / "evaluation").mkdir()
    for name in ("samples.png", "evaluation/steps.png"):
        Image.new("RGB", (64, 64)).save(folder / name)
    assert f"*The same noise by {rows}number of steps*" in write_card(folder, "mit").text


def test_a_card_for_the_hub_shows_no_training_pictures(run):
    folder = run()
    report(folder, measured(1))
    assert "closest_DPMSolverMultistepScheduler-20-1_pixels.png" in write_card(folder, "mit").text
    shared = write_card(folder, repo_id="user/pets")
    assert "closest_" not in shared.text and 'from_pretrained("user/pets"' in shared.text
    assert "The closest pairs are not shown here" in shared.text


def test_the_runs_before_it_are_told_too(run):
    folder, base = run("guided"), run("unconditional")
    (base / "provenance.json").write_text(json.dumps(PROVENANCE | {"command": "python train_unconditional.py"}))
    config = CONFIG | {"built_on": {"diffusion model": str(base)}}
    (folder / "training_config.json").write_text(json.dumps(config))
    text = write_card(folder, "mit").text
    assert re.search(r"The diffusion model: 1,500 images .*\n\n```\npython train_unconditional.py\n```", text)
    assert text.index("train_unconditional.py") < text.index(PROVENANCE["command"])


def test_a_run_that_has_written_down_nothing_has_a_card_all_the_same(tmp_path, hub):
    KINDS["classes"][0]().save_pretrained(tmp_path)
    card = write_card(tmp_path, "mit")
    card.validate()
    assert "does not say what it was trained on" in card.text and "does not say how it was trained" in card.text


def test_a_changed_card_is_left_alone_and_an_unchanged_one_brought_up_to_date(run):
    folder = run()
    with pytest.raises(ValueError, match="license: a model that is shared needs one; give it, such as --license mit"):
        write_card(folder)
    write_card(folder, "cc-by-4.0")
    assert license_of(folder) == "cc-by-4.0"
    report(folder, measured(1))
    assert "3.21 (2.96" in write_card(folder).text
    mine = (folder / "README.md").read_text().replace("# classes", "# Our pets")
    (folder / "README.md").write_text(mine)
    assert write_card(folder, "mit", "user/pets").data.license == "cc-by-4.0"
    assert (folder / "README.md").read_text() == mine


@pytest.mark.parametrize("vae", [lambda: tiny_autoencoder(Autoencoder), tiny_vae], ids=["plain", "of diffusers"])
def test_an_autoencoder_without_a_prior_has_a_card_without_samples(vae, tmp_path):
    AutoencoderPipeline(vae()).save_pretrained(tmp_path)
    assert "# How to use it" in write_card(tmp_path, "mit").text
    assert not (tmp_path / "samples.png").exists()


def test_runs_of_earlier_versions_have_a_card_without_the_runs_before_them(run):
    folder, base = run("guided"), run("unconditional")
    earlier = CONFIG | {"guidance": {"for_model": str(base)}, "weights": {"for_model": "0123"}}
    (folder / "training_config.json").write_text(json.dumps(earlier))
    text = write_card(folder, "mit").text
    assert PROVENANCE["command"] in text and "The diffusion model:" not in text


def test_the_changed_card_of_an_adapter_of_an_earlier_version_is_left_alone(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "training_config.json").write_text(json.dumps({"lora": {"base": "user/base"}}))
    mine = "---\nlicense: mit\n---\n\n# Mine\n"
    (tmp_path / "README.md").write_text(mine)
    assert write_card(tmp_path).text.strip() == "# Mine"
    assert (tmp_path / "README.md").read_text() == mine
    (tmp_path / "README.md").unlink()
    with pytest.raises(ValueError, match="an earlier version of this package wrote the run"):
        write_card(tmp_path, "mit")


def test_half_of_what_an_adapter_is_trained_on_are_samples(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    Image.new("RGB", (8, 8)).save(tmp_path / "samples.png")
    config = CONFIG | {"pictures": CONFIG["pictures"] | {"num_pictures": 512}, "built_on": {"base model": "user/base"}}
    for name, content in {"training_config": config, "provenance": PROVENANCE | {"num_pictures": 20}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    text = write_card(tmp_path, "mit").text
    assert "20 images of" in text and "Half of the training images were samples of the model without" in text


def test_there_is_no_card_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model_index.json in it"):
        write_card(tmp_path, "mit")


CARDS = sorted((Path(__file__).parents[2] / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("file", CARDS, ids=lambda file: file.parent.name)
def test_the_reference_cards_are_as_the_runs_wrote_them(file, hub):
    text = file.read_text(encoding="utf-8")
    assert is_as_written(text)
    card = ModelCard(text)
    card.validate()
    pictures = re.findall(r"\]\(([^)]*\.png)\)", text)
    assert len(pictures) >= 4
    for name in pictures:
        assert Image.open(file.parent / name).width >= 64
    assert card.data.eval_results and "not been measured" not in text


def test_there_are_four_reference_cards():
    names = {file.parent.name for file in CARDS}
    assert names == {"shapes-cfg", "mnist-classifier-guided", "mnist-vae", "cats-dogs-latent"}


def test_a_command_in_a_card_names_no_folder_of_this_machine(run, tmp_path):
    words = "python examples/train_cfg.py --dataset '/mnt/somebody/my pets' --vae=~/somebody/vae --caption \"it's\""
    command = f'{words} --output_dir="$HOME"/somebody/pets --split train --x=1=2 ../pets'
    (run() / "provenance.json").write_text(json.dumps(PROVENANCE | {"command": command}))
    text = write_card(tmp_path / "classes", "mit").text
    (shown,) = re.findall(r"```\n(python .*)\n```", text)
    assert shlex.split(shown) == shlex.split(
        "python examples/train_cfg.py --dataset 'my pets' --vae=vae --caption \"it's\" --output_dir=pets "
        "--split train --x=1=2 ../pets"
    )


def test_the_card_of_a_guided_model_says_which_images_are_whose(run):
    folder, base = run("guided"), run("unconditional")
    pictures = CONFIG["pictures"] | {"name": "somebody/all", "num_pictures": 9000}
    (base / "training_config.json").write_text(json.dumps(CONFIG | {"pictures": pictures}))
    (folder / "training_config.json").write_text(json.dumps(CONFIG | {"built_on": {"diffusion model": str(base)}}))
    text = write_card(folder, "mit").text
    assert "The diffusion model: 9,000 images of `somebody/all`." in text
    assert "The classifier: 1,500 images of `pets`." in text
