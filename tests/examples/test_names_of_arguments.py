"""Nothing but a script knows what it calls its arguments."""

import json
import shutil

import pytest
from example_scripts import SMALL_AUTOENCODER, SMALL_LATENT, run
from tiny import tiny_unet

from hf_genmod import AncestralDDPMScheduler, ClassifierFreeGuidedPipeline, load_pipeline
from hf_genmod.sharing.doctor import examine


@pytest.mark.slow
def test_cards_doctor_pushes_and_resuming_know_no_names_of_arguments(class_folders, tmp_path, hub, monkeypatch):
    """Three runs, each built on the one before, whose arguments all have other names."""
    for module in ("push", "doctor"):  # drawing where the package is not installed takes seconds
        monkeypatch.setattr(f"hf_genmod.sharing.{module}.sample_without_package", lambda where, **options: "sha256:0")
    vae, model, guided = (tmp_path / name for name in ("vae", "model", "guided"))
    common = ["--dataset", class_folders, "--max_train_steps", 2, "--license", "mit"]
    runs = [
        ("train_vae.py", *common, "--output_dir", vae, "--latent_channels", 3, *SMALL_AUTOENCODER),
        ("train_unconditional.py", *common, "--output_dir", model, "--vae", vae, *SMALL_LATENT),
        ("train_classifier.py", *common, "--output_dir", guided, "--for_model", model, *SMALL_LATENT),
    ]
    for command in runs:
        done = run(*command, renamed=True)
        assert done.returncode == 0 and "failed" not in done.stderr, done.stderr
    settings = json.loads((guided / "training_config.json").read_text())
    assert set(settings["arguments"]) == {"section_0", "section_1", "section_2", "sharing"}
    card = (guided / "README.md").read_text()
    assert "The autoencoder:" in card and "The diffusion model:" in card and "--for_model" in card

    *_, last = runs
    again = run(*last, renamed=True)
    assert f"{guided} is complete; there is nothing left to train" in again.stdout
    other = run(*last, "--dropout", 0.5, renamed=True)
    assert other.returncode == 2 and "--dropout was 0.0, is 0.5" in other.stderr
    (guided / "model_index.json").unlink()
    resumed = run(*last, "--license", "apache-2.0", "--validation_steps", 1, renamed=True)
    assert resumed.returncode == 0 and f"continuing {guided} from step 2" in resumed.stdout, resumed.stderr
    assert load_pipeline(guided)("circle", num_inference_steps=1).images[0].size == (16, 16)
    assert not [finding for finding in examine(str(guided)) if "training_config" in finding or "card" in finding]

    repo_id = hub.new_repo_id("guided")
    pushed = run(*last, "--push_to_hub", "--hub_model_id", repo_id, renamed=True)
    assert pushed.returncode == 0 and "loads and draws what" in pushed.stderr, pushed.stderr
    assert {"README.md", "model_index.json"} <= set(hub.files(repo_id))
    assert "--for_model" in hub.files(repo_id)["README.md"].decode()


def test_an_adapter_whose_base_model_has_moved_is_resumed(class_folders, tmp_path):
    names, scheduler = {0: "a", 1: "b"}, AncestralDDPMScheduler()
    ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), scheduler, id2label=names).save_pretrained(
        tmp_path / "base"
    )
    command = ["finetune_lora.py", "--dataset", class_folders, "--output_dir", tmp_path / "run", "--batch_size", 4,
               "--max_train_steps", 2, "--prior_samples", 0, "--sampling_steps", 0]  # fmt: skip
    done = run(*command, "--base", tmp_path / "base", renamed=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "run" / "pytorch_lora_weights.safetensors").unlink()
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    done = run(*command, "--base", tmp_path / "elsewhere", "--license", "mit", renamed=True)
    assert done.returncode == 0 and f"continuing {tmp_path / 'run'} from step 2" in done.stdout, done.stderr
    assert f'from_pretrained("{tmp_path / "elsewhere"}"' in (tmp_path / "run" / "README.md").read_text()
