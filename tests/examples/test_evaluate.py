import json
import re
import subprocess
import sys

import pytest
import torch
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
from hf_genmod.evaluation.features import FeatureClassifier


@pytest.fixture(scope="module")
def measured_model(measured_data):
    """A model that knows nothing, and a data set of two classes."""
    folder = measured_data.parent
    names = {0: "dark", 1: "bright"}
    scheduler = AncestralDDPMScheduler(timestep_spacing="trailing")
    ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), scheduler, id2label=names).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def features(measured_model):
    """A network that was not trained, for pictures of two classes."""
    file = measured_model / "features.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FeatureClassifier(3, 2).eval().save(file)
    return file


REPORTED = {
    "unconditional": lambda: UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler()),
    "guided": lambda: ClassifierGuidedPipeline(
        tiny_unet(), tiny_classifier(num_classes=2), AncestralDDPMScheduler(), id2label={0: "dark", 1: "bright"}
    ),
    "text": tiny_text_pipeline,
    "autoencoder": lambda: AutoencoderPipeline(tiny_autoencoder(sample_size=8, in_channels=3)),
    "upsampler": lambda: SuperResolutionPipeline(
        tiny_unet(conditioning_channels=3), AncestralDDPMScheduler(), max_noise_level=100
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("own_features", [False, True])
def test_a_report_has_every_measure_of_every_setting_and_is_taken_up_where_it_was(
    own_features, measured_model, features, tmp_path
):
    flags = ["--model", measured_model / "model", "--dataset", measured_model / "data", "--output_dir", tmp_path,
             "--samples", 150, "--num_inference_steps", 2, "--guidance_scales", 1, 3,
             "--samplers", "DDIMScheduler", *([] if own_features else ["--features", features])]  # fmt: skip
    assert run("evaluate.py", *flags).returncode == 0
    assert bool(list(tmp_path.glob("features-*.safetensors"))) == own_features
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["dataset"]["num_pictures"] == 1400 and report["dataset"]["num_held_out"] == 200
    assert [setting["guidance_scale"] for setting in report["settings"]] == [1.0, 3.0]
    for setting, passes in zip(report["settings"], (2, 4), strict=True):
        assert setting["forward_passes"] == passes
        for name in ("frechet_distance", "kernel_distance", "precision", "recall", "coverage", "recognised_share"):
            measure = setting[name]
            assert measure["low"] <= measure["value"] <= measure["high"] and measure["count"] == 150, name
        assert 0 < setting["seconds"]["value"] < setting["seconds"]["high"] and setting["seconds"]["count"] == 3
        shares = setting["recognised_share_by_class"]
        assert sum(share["count"] for share in shares.values()) == 150 and set(shares) == {"dark", "bright"}
        assert not setting["memorisation"]["pixels"]["flagged"]
    assert report["held_out"]["frechet_distance"]["value"] < report["settings"][0]["frechet_distance"]["value"]
    assert report["bits_per_dimension"]["variational bound"]["count"] == 200
    closest = Image.open(tmp_path / "closest_DDIMScheduler-2-1.0_pixels.png")
    assert closest.size == (10 * 100, 2 * (100 + 20))

    kept = sorted(next((tmp_path / "samples").glob("DDIMScheduler-2-1.0-*")).iterdir())
    times = [file.stat().st_mtime_ns for file in kept]
    kept[1].unlink()
    assert run("evaluate.py", *flags).returncode == 0
    assert [file.stat().st_mtime_ns == time for file, time in zip(kept, times, strict=True)] == [True, False, True]
    again = json.loads((tmp_path / "evaluation.json").read_text())
    for setting in (*report["settings"], *again["settings"]):
        del setting["seconds"]
    assert again == report


@pytest.mark.slow
@pytest.mark.parametrize("kind", REPORTED)
def test_a_report_of_each_kind_of_model_and_its_card(kind, measured_model, features, tmp_path):
    REPORTED[kind]().save_pretrained(tmp_path)
    run_of = {"arguments": {"data": {"dataset": str(measured_model / "data"), "resolution": "8"}}}
    (tmp_path / "training_config.json").write_text(json.dumps(run_of))
    scales = {"guided": [0, 2], "text": [1, 2]}.get(kind, [])
    flags = ["--model", tmp_path, "--samples", 130, "--features", features,
             "--num_inference_steps", 2, *(["--guidance_scales", *scales] if scales else []),
             *(["--noise_levels", 0, 50] if kind == "upsampler" else []), "--license", "mit"]  # fmt: skip
    done = run("evaluate.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"Next:\n\n    hf_genmod push {tmp_path} NAME\n") and "Loading" not in done.stderr
    assert ("drawing a figure" in done.stderr) == (kind != "autoencoder")
    said = re.findall(r"(\d+):(\d\d) (reading|preparing|drawing|computing|measuring|done)", done.stderr)
    assert said[0][2] == "preparing" and said[-1][2] == "done" and said == sorted(said, key=lambda line: line[:2])
    report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert report["features"] == str(features)
    scale = "classifier_scale" if kind == "guided" else "guidance_scale"
    levels = [0, 50] if kind == "upsampler" else [None]
    assert [setting.get(scale) for setting in report["settings"]] == (scales or [None] * len(levels))
    assert [setting.get("noise_level") for setting in report["settings"]][: len(levels)] == levels
    assert ("interpolated" in report) == (kind == "upsampler")
    for setting in report["settings"]:
        assert setting["density"]["count"] == 130 and setting["coverage"]["count"] == 130
        assert ("recognised_share" in setting) == (kind == "guided")
    bits = report["bits_per_dimension"]
    assert [bound["count"] for bound in bits.values()] == ([200, 200] if kind == "autoencoder" else [64, 200])
    assert all(bound["low"] < bound["value"] < bound["high"] for bound in bits.values())
    figures = {file.name for file in (tmp_path / "evaluation").glob("*.png")}
    expected = set() if kind == "autoencoder" else {"steps.png", "trajectory.png"}
    expected |= {"guidance.png"} if scales else {"enlarged.png"} if kind == "upsampler" else set()
    assert expected <= figures and len(figures - expected) == 2 * len(report["settings"])  # the closest
    card = (tmp_path / "README.md").read_text()
    assert all(f"evaluation/{name}" in card for name in expected)
    assert len([name for name in figures - expected if f"evaluation/{name}" in card]) == 1
    assert f"{report['settings'][0]['frechet_distance']['value']:.3g} (" in card


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "5"], "samples: 5 are too few to measure anything; take 6 or more"),
        (["--samplers", "NoScheduler"], "samplers: 'NoScheduler' is no scheduler of diffusers, such as DDIMScheduler"),
        (["--features", "{missing}"], "features: '{missing}' is no folder here, and"),
        (["--dataset", "{classes}"], "dataset: the labels of the model are dark, bright, and those of the images"),
        (["--resolution", "16"], "resolution: the model is for 8x8 images of 3 channels"),
        (["--model", "{plain}", "--guidance_scales", "2"], "guidance_scales: an UnconditionalPipeline is not guided"),
        (["--model", "{missing}"], "missing' is not a folder"),
        (["--license", "MIT"], "license: 'MIT' is not the name of a licence"),
        (["--features", "{few}"], "is of 3 other classes"),
        (["--adopt"], "adopt: it writes what --sweep chose; give --sweep, too"),
        (["--adopt", "--sweep", "--model", "user/name"], "adopt: user/name is no folder here; download it by `hf"),
        (["--reference", "{missing}"], "reference: it is for --measures; give both, such as --measures standard"),
    ],
)
def test_mistakes_about_reports_get_one_sentence(arguments, message, measured_model, class_folders, tmp_path):
    paths = {"missing": tmp_path / "missing", "classes": class_folders, "plain": tmp_path / "plain"}
    paths["few"] = tmp_path / "few.safetensors"
    REPORTED["unconditional"]().save_pretrained(paths["plain"])
    FeatureClassifier(3, 3).save(paths["few"])
    flags = ["--model", measured_model / "model", "--dataset", measured_model / "data", "--output_dir", tmp_path]
    error = error_of("evaluate.py", *flags, *(argument.format(**paths) for argument in arguments))
    assert message.format(**paths) in error


def test_standard_measures_that_cannot_be_had_are_told_before_samples_are_drawn(measured_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", None)  # as where it is not installed
    flags = ["--model", measured_model / "model", "--dataset", measured_model / "data", "--output_dir", tmp_path]
    assert "measures: torch-fidelity is missing" in error_of("evaluate.py", *flags, "--measures", "standard")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_of_few_images_what_can_be_measured_is(features, tmp_path):
    rng = torch.Generator().manual_seed(0)
    for i in range(80):
        image = torch.randint(0, 256, (8, 8, 3), generator=rng, dtype=torch.uint8).numpy()
        file = tmp_path / "data" / ("bright" if i % 2 else "dark") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    REPORTED["unconditional"]().save_pretrained(tmp_path / "model")
    done = run("evaluate.py", "--model", tmp_path / "model", "--dataset", tmp_path / "data", "--samples", 40,
               "--num_inference_steps", 2, "--features", features, "--license", "mit")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "model" / "evaluation" / "evaluation.json").read_text())
    assert report["left_out"] == {
        "Fréchet distance of samples": "needs 130 of them, and there are 40",
        "Fréchet distance of held-out images": "needs 130 of them, and there are 8",
        "search for copies": "needs 100 held-out images, and there are 8",
    }
    (setting,) = report["settings"]
    assert setting["memorisation"] == {} and "frechet_distance" not in setting
    assert setting["kernel_distance"]["count"] == setting["precision"]["count"] == 40
    assert report["held_out"]["coverage"]["count"] == 8
    assert "left out: the search for copies, which needs 100 held-out images, and there are 8" in done.stdout
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Whether the model copies training images has not been measured." in card
    assert "The search for copies needs 100 held-out images" in card


@pytest.mark.slow
def test_a_sweep_is_reported_and_adopted(measured_model, features, tmp_path):
    folder = tmp_path / "model"
    pipe = load_pipeline(measured_model / "model")
    pipe.save_pretrained(folder)
    flags = ["--model", folder, "--dataset", measured_model / "data", "--features", features, "--samples", 130,
             "--num_inference_steps", 2, 3, "--guidance_scales", 1, 2, "--sweep", "--adopt"]  # fmt: skip
    done = run("evaluate.py", *flags, "--license", "mit")
    assert done.returncode == 0, done.stderr
    said = re.findall(r"\d+:\d\d (sweep: .*|the sweep chose .*|drawing .*)", done.stderr)
    assert said[:2] == [
        "sweep: round 1 of 2, 12 settings, 50 samples each",
        "sweep: round 2 of 2, 3 settings, 100 samples each",
    ]
    report = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    chosen = report["sweep"]["chosen"]
    assert report["settings"][0].items() >= chosen.items() and len(report["settings"]) == 1
    assert report["sweep"]["seed"] == 10**6 and report["seed"] == 0
    assert report["settings"][0]["frechet_distance"]["count"] == 130
    assert "chosen by a sweep of 12 settings" in done.stdout
    assert Image.open(folder / "evaluation" / "sweep.png").width > 600
    pipe, sampler = load_pipeline(folder), chosen.pop("sampler")
    assert type(pipe.scheduler).__name__ == sampler and pipe.config.defaults["arguments"] == chosen
    card = (folder / "README.md").read_text()
    assert (
        "(evaluation/sweep.png)" in card and "A sweep of 12 settings chose this, and the sampler; 100 samples" in card
    )
    assert not re.search(r"\n\|[^\n]*\n[^|\n]", card) and not re.search(r"\n[^|\n][^\n]*\n\|", card)
    done = run("evaluate.py", "--model", folder, "--dataset", measured_model / "data", "--features", features,
               "--samples", 130, "--output_dir", tmp_path / "again")  # fmt: skip
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    (setting,) = again["settings"]
    assert setting["num_inference_steps"] == chosen["num_inference_steps"] and setting["sampler"] == sampler
    same = setting["frechet_distance"]["value"], report["settings"][0]["frechet_distance"]["value"]
    assert same[0] == pytest.approx(same[1], rel=1e-3)  # by the defaults, the same samples


@pytest.mark.slow
def test_two_processes_share_a_sweep(measured_model, features, tmp_path):
    flags = ["--dataset", measured_model / "data", "--features", features, "--samples", 100, "--sweep",
             "--samplers", "DDIMScheduler", "UniPCMultistepScheduler", "--num_inference_steps", 2, 1001,
             "--guidance_scales", 1]  # fmt: skip
    command = [sys.executable, "-m", "hf_genmod", "evaluate", measured_model / "model", *flags, "--num_processes", 2]
    command = [*map(str, command), "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert run("evaluate.py", "--model", measured_model / "model", *flags, "--output_dir", tmp_path).returncode == 0
    two, one = (
        json.loads((folder / "evaluation.json").read_text())["sweep"] for folder in (tmp_path / "two", tmp_path)
    )
    assert two["failed"] == one["failed"] and {*one["failed"]} == {
        "DDIM, 1001 steps, γ = 1",
        "UniPC, 1001 steps, γ = 1",
    }
    assert [of_round["samples"] for of_round in two["rounds"]] == [50, 100]
    for of_two, of_one in zip(two["rounds"], one["rounds"], strict=True):
        distances = [[x["kernel_distance"]["value"] for x in found["settings"]] for found in (of_two, of_one)]
        assert distances[0] == pytest.approx(distances[1], rel=0.01)
    assert two["chosen"] == one["chosen"]
