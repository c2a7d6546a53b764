import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from example_scripts import EXAMPLES, error_of, run
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_autoencoder, tiny_classifier, tiny_text_pipeline, tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    UnconditionalPipeline,
    load_pipeline,
)
from hf_genmod.data import shapes


@pytest.fixture(scope="module")
def few_pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    drawn = shapes.ShapesDataset(5, resolution=16)
    for i in range(5):
        drawn[i]["image"].save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of models that know nothing yet, of each kind that takes an adapter."""
    folder = tmp_path_factory.mktemp("bases")
    latent = {"in_channels": 2, "out_channels": 2, "num_classes": 2}
    names, scheduler = {0: "cat", 1: "dog"}, AncestralDDPMScheduler()
    unlimited = AncestralDDPMScheduler(clip_sample=False)
    for name, pipeline in {
        "classes": ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), scheduler, id2label=names),
        "latents": ClassifierFreeGuidedPipeline(tiny_unet(**latent), unlimited, tiny_autoencoder(), id2label=names),
        "none": UnconditionalPipeline(tiny_unet(), scheduler),
        "text": tiny_text_pipeline(),
        "guided": ClassifierGuidedPipeline(tiny_unet(), tiny_classifier(), scheduler),
        "autoencoder": AutoencoderPipeline(tiny_autoencoder()),
    }.items():
        pipeline.save_pretrained(folder / name)
    return folder


FEW_STEPS = ["--max_train_steps", "2", "--batch_size", "4", "--prior_samples", "4", "--sampling_steps", "2"]


@pytest.mark.parametrize(
    "base, arguments, asked",
    [
        ("classes", ["--class_name", "zebra"], {"class_labels": "zebra"}),
        pytest.param("latents", ["--class_name", "zebra"], {"class_labels": "zebra"}, marks=pytest.mark.slow),
        ("none", [], {}),
        ("text", ["--caption", "a zorb", "--train_text_encoder"], {"prompt": "a zorb"}),
    ],
)
def test_an_adapter_learns_from_a_few_pictures(base, arguments, asked, bases, few_pictures, tmp_path):
    flags = ["--base", bases / base, "--dataset", few_pictures, "--output_dir", tmp_path / "run", *FEW_STEPS,
             "--license", "mit"]  # fmt: skip
    done = run("finetune_lora.py", *flags, *arguments)
    assert done.returncode == 0 and f"{tmp_path / 'run'} is the adapter\n" in done.stdout
    classes = ", 1 class" if base == "classes" else ""
    assert re.search(rf": 5 images of 8x8{classes}; 0.\d\d M parameters, of which 0.0\d+ M are trained", done.stderr)
    (advised,) = [line for line in done.stdout.splitlines() if "hf_genmod sample" in line]
    words = ["--model", *shlex.split(advised)[2:], "--num", 1, "--num_inference_steps", 2]
    assert run("sample.py", *words, "--output", tmp_path / "grid.png").returncode == 0
    assert (tmp_path / "grid.png").is_file()
    pipe = load_pipeline(bases / base)
    pipe.load_lora_weights(tmp_path / "run")
    parts = {"unet", "text_encoder"} if base == "text" else {"unet"}
    assert set(pipe.get_list_adapters()) == parts
    assert pipe(**asked, num_inference_steps=2).images[0].size == pipe.picture_shape[:0:-1]
    assert Image.open(tmp_path / "run" / "samples" / "step-000002.png").width >= 64
    card = (tmp_path / "run" / "README.md").read_text()
    assert f'from_pretrained("{bases / base}"' in card and f'pipe.load_lora_weights("{tmp_path / "run"}")' in card
    assert all(f'pipe({name}="{value}")' in card for name, value in asked.items())
    assert not (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("base", ["latents", "text"])
def test_an_adapter_is_trained_by_two_processes_as_by_one(base, bases, few_pictures, tmp_path):
    adapters = []
    for number in (1, 2):
        flags = ["--base", bases / base, "--dataset", few_pictures, "--output_dir", tmp_path / str(number), *FEW_STEPS,
                 *{"latents": ["--class_name", "zebra"], "text": ["--caption", "a zorb"]}[base],
                 "--mixed_precision", "no"]  # fmt: skip
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", number]
        command = [sys.executable, *(launcher if number > 1 else []), EXAMPLES / "finetune_lora.py", *flags]
        subprocess.run([*map(str, command)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
        adapters.append(load_file(tmp_path / str(number) / "pytorch_lora_weights.safetensors"))
    for name, weight in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], weight, atol=1e-4, rtol=0)


def test_an_adapter_for_another_text_encoder_is_another_run(bases, few_pictures, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases / "text", base)
    flags = ["--base", base, "--dataset", few_pictures, "--output_dir", tmp_path / "run", *FEW_STEPS,
             "--sampling_steps", 0]  # fmt: skip
    assert run("finetune_lora.py", *flags, "--caption", "a zorb").returncode == 0
    weights = load_file(base / "text_encoder" / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, base / "text_encoder" / "model.safetensors")
    assert "holds a different run (the weights of its model have" in error_of(
        "finetune_lora.py", *flags, "--caption", "a zorb"
    )


def test_a_push_that_failed_leaves_the_run_complete_and_is_made_up_for_by_the_same_command(
    bases, few_pictures, tmp_path, hub, monkeypatch
):
    """And whatever its script calls its arguments."""
    # The proof takes seconds.
    monkeypatch.setattr("hf_genmod.sharing.push.sample_without_package", lambda where, **options: "sha256:0")
    base, repo_id = hub.new_repo_id("base"), hub.new_repo_id("adapter")
    load_pipeline(bases / "classes").push_to_hub(base)
    flags = ["--base", base, "--dataset", few_pictures, "--output_dir", tmp_path / "run", *FEW_STEPS,
             "--sampling_steps", 0, "--class_name", "zebra", "--license", "mit", "--push_to_hub"]  # fmt: skip
    failed = run("finetune_lora.py", *flags, "--hub_model_id", "org-of-others/adapter", renamed=True)
    assert failed.returncode == 0 and "the push to org-of-others/adapter failed (" in failed.stderr
    done = run("finetune_lora.py", *flags, "--hub_model_id", repo_id, renamed=True)
    assert done.returncode == 0 and "loads and draws what" in done.stderr
    pipe = load_pipeline(bases / "classes")
    pipe.load_lora_weights(repo_id)
    assert pipe.labels == {"cat": 0, "dog": 1, "zebra": 2}


@pytest.mark.parametrize(
    "base, arguments, message",
    [
        ("classes", [], "class_name: name the class of the images"),
        ("classes", ["--caption", "a zebra"], "caption: a ClassifierFreeGuidedPipeline is not asked by it"),
        ("classes", ["--class_name", "zebra", "--train_text_encoder"], "train_text_encoder: the model has none"),
        ("classes", ["--class_name", "zebra", "--rank", "0"], "rank: 0 is not positive"),
        ("classes", ["--class_name", "zebra", "--license", "mit", "--push_to_hub"], "base: it is a folder here"),
        ("classes", ["--class_name", "zebra", "--prior_samples", "-1"], "prior_samples: -1 is negative"),
        ("classes", ["--class_name", "zebra", "--resolution", "8"], "resolution: the model is for 8x8"),
        ("text", [], "caption: say what they show, or caption each"),
        ("guided", [], "base: an adapter of a ClassifierGuidedPipeline"),
        ("autoencoder", [], "the model is an autoencoder and no diffusion model"),
        ("missing", [], "is not a folder, nor can it be the id of a repository"),
        ("missing", ["--rank", "0"], "rank: 0 is not positive"),
        ("classes", ["--clas_name", "zebra"], "--clas_name: no such flag; did you mean --class_name?"),
    ],
)
def test_mistakes_about_adapters_get_one_sentence(base, arguments, message, bases, few_pictures, tmp_path):
    flags = ["--base", bases / base, "--dataset", few_pictures, "--output_dir", tmp_path / "run", *FEW_STEPS]
    assert message in error_of("finetune_lora.py", *flags, *arguments)
    assert not list(tmp_path.iterdir())
