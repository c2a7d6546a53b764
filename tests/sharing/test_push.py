"""Pushes checkpoints to a local Hub."""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_autoencoder, tiny_classifier, tiny_text_pipeline, tiny_unet, tiny_vae

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    DenoisingUNet2DModel,
    SuperResolutionPipeline,
    UnconditionalPipeline,
    VariationalAutoencoder,
    load_pipeline,
    push_checkpoint,
)
from hf_genmod.__main__ import main
from hf_genmod.sharing.model_card import write_card
from hf_genmod.sharing.push import PushError, sample_without_package
from hf_genmod.training.adapters import attach_adapter

WEIGHTS = "diffusion_pytorch_model.safetensors"


def pipeline(num_classes=None):
    torch.manual_seed(0)
    unet = DenoisingUNet2DModel(
        sample_size=8, block_out_channels=(8, 16), attention_levels=(False, True), attention_head_dim=8,
        layers_per_block=1, norm_num_groups=4, num_classes=num_classes,
    )  # fmt: skip
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    scheduler = AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    if num_classes is None:
        return UnconditionalPipeline(unet, scheduler)
    return ClassifierFreeGuidedPipeline(unet, scheduler, id2label={0: "cat", 1: "dog"})


def with_prior():
    vae = tiny_autoencoder(Autoencoder)
    vae.fit_prior(torch.randn(50, *vae.latent_shape(8, 8), generator=torch.Generator().manual_seed(0)))
    return AutoencoderPipeline(vae)


CHECKPOINTS = {
    "unconditional": pipeline,
    "classes": lambda: pipeline(2),
    "text": tiny_text_pipeline,
    "latent": lambda: UnconditionalPipeline(
        tiny_unet(in_channels=4, out_channels=4), AncestralDDPMScheduler(clip_sample=False), tiny_vae()
    ),
    "guided": lambda: ClassifierGuidedPipeline(tiny_unet(), tiny_classifier(), AncestralDDPMScheduler()),
    "autoencoder": lambda: AutoencoderPipeline(tiny_autoencoder(VariationalAutoencoder)),
    "plain": with_prior,
    "upsampler": lambda: SuperResolutionPipeline(tiny_unet(conditioning_channels=3), AncestralDDPMScheduler()),
}
NOT_FOR_THE_HUB = ("checkpoints/step-9/state.pt", "samples/step-9.png", "evaluation/closest_20_pixels.png",
                   "evaluation/samples/20/00000.pt", "logs/events.1", "unet/notes.md", "secret.txt")  # fmt: skip


def without_proof(monkeypatch):
    """For tests of the upload: the proof takes seconds."""
    monkeypatch.setattr("hf_genmod.sharing.push.sample_without_package", lambda where, **options: "sha256:0")


class TestPushCheckpoint:
    @pytest.fixture
    def run(self, tmp_path):
        """The folder of a run that is over, with all that such a folder may hold."""

        def make(kind="classes"):
            folder = tmp_path / f"run-{kind}"
            CHECKPOINTS[kind]().save_pretrained(folder)
            for name in (*NOT_FOR_THE_HUB, "loss.png", "training_config.json", "metrics.jsonl"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text("{}")
            return folder

        return make

    @pytest.mark.parametrize(
        "kind", ["classes", *(pytest.param(kind, marks=pytest.mark.slow) for kind in CHECKPOINTS if kind != "classes")]
    )
    def test_uploads_the_checkpoint_its_card_and_figures_alone_and_proves_that_it_loads(
        self, kind, run, hub, monkeypatch
    ):
        folder, repo_id = run(kind), hub.new_repo_id()
        report = push_checkpoint(folder, repo_id, license="mit")
        files = hub.files(repo_id)
        assert set(files) == {*report.files, ".gitattributes"}
        code = f"{type(CHECKPOINTS[kind]()).__module__.rsplit('.', 1)[1]}.py"
        assert {"README.md", "loss.png", "model_index.json", code} <= set(files)
        assert ("samples.png" in files) == (kind != "upsampler")  # of whose pictures?
        examples = [example["output"]["url"] for example in ModelCard.load(repo_id).data.get("widget", [])]
        assert len(examples) == (0 if kind == "upsampler" else 2 if kind == "classes" else 3)
        assert set(examples) <= set(files)
        assert not set(files) & {*NOT_FOR_THE_HUB, "training_config.json", "metrics.jsonl", "push_report.json"}
        for name in report.files:
            assert files[name] == (folder / name).read_bytes()
        written = json.loads((folder / "push_report.json").read_text())
        assert written["sample"] == report.sample
        if kind == "unconditional":
            assert report.sample == sample_without_package(repo_id, token=hub.token)
        assert written["revision"] == HfApi().model_info(repo_id).sha
        card = ModelCard.load(repo_id)
        card.validate()
        assert card.data.license == "mit" and {"diffusers", "hf_genmod"} <= set(card.data.tags)
        (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        assert f'from_pretrained("{repo_id}"' in snippet
        monkeypatch.chdir(folder.parent)
        Image.new("RGB", (4, 4)).save("small.png")  # for an upsampler
        exec(snippet, {})  # as pasted
        assert (folder.parent / "sample.png").is_file()
        assert type(load_pipeline(repo_id)) is type(load_pipeline(folder))

    @pytest.mark.slow
    def test_a_branch_a_pull_request_of_a_changed_card_and_a_private_repository(self, run, hub):
        folder, repo_id = run(), hub.new_repo_id()
        first = push_checkpoint(folder, repo_id, private=True, revision="v2", license="mit")
        assert hub.repos["models", repo_id].private
        assert "model_index.json" in hub.files(repo_id, revision="v2")
        assert "model_index.json" not in hub.files(repo_id)
        card = (folder / "README.md").read_text() + "\nMine.\n"
        (folder / "README.md").write_text(card)
        second = push_checkpoint(folder, repo_id, create_pr=True)
        assert second.url.endswith("/discussions/1") and second.sample == first.sample
        assert "model_index.json" not in hub.files(repo_id)
        assert hub.files(repo_id, revision="refs/pr/1")["README.md"].decode() == card

    @pytest.mark.parametrize(
        "pattern, how",
        [
            pytest.param("POST /api/repos/create", 500, marks=pytest.mark.slow),
            pytest.param("POST .*/preupload", 503, marks=pytest.mark.slow),
            pytest.param("PUT /lfs", "reset", marks=pytest.mark.slow),
            pytest.param("POST .*/commit/", 500, marks=pytest.mark.slow),
            pytest.param("POST .*/commit/", "reset", marks=pytest.mark.slow),
            pytest.param("POST .*/commit/", "lost"),
            pytest.param("GET .*/resolve/.*safetensors", "cut", marks=pytest.mark.slow),
            pytest.param("GET .*/resolve/.*safetensors", "slow", marks=pytest.mark.slow),
        ],
    )
    def test_temporary_errors_are_retried(self, pattern, how, run, hub, monkeypatch):
        folder, repo_id = run(), hub.new_repo_id()
        if not pattern.startswith("GET"):
            without_proof(monkeypatch)
        fault = hub.fail_next(pattern, how, seconds=1.0)
        report = push_checkpoint(folder, repo_id, license="mit")
        assert fault.left == 0
        assert set(hub.files(repo_id)) == {*report.files, ".gitattributes"}

    def test_a_lasting_error_leaves_the_command_that_finishes_the_push(self, run, hub, monkeypatch, tmp_path, capsys):
        folder, repo_id = run(), hub.new_repo_id()
        hub.fail_next("POST .*/commit/", 403, times=9)
        with pytest.raises(PushError, match="the push to .* failed") as error:
            push_checkpoint(folder, repo_id, license="mit", private=True)
        assert hub.token not in str(error.value) and "\n" not in str(error.value)
        assert set(hub.files(repo_id)) == {".gitattributes"}
        hub.faults.clear()
        package, *words = shlex.split(re.search(r"finish it by: (.*)", str(error.value))[1])
        assert package == "hf_genmod"
        monkeypatch.chdir(tmp_path)
        without_proof(monkeypatch)
        assert main(words) == 0
        printed = "".join(capsys.readouterr())
        assert "loads and draws what" in printed and hub.token not in printed
        assert "model_index.json" in hub.files(repo_id)
        for file in folder.rglob("*"):
            assert not file.is_file() or hub.token.encode() not in file.read_bytes()

    @pytest.mark.slow
    def test_a_repository_that_gives_another_image_is_no_success(self, run, hub):
        """Here one that has stored other weights under the hash of these."""
        folder, repo_id = run(), hub.new_repo_id()
        others = pipeline(2)
        others.unet.conv_in.bias.data += 1
        others.save_pretrained(folder.parent / "others")
        weights, of_others = ((root / "unet" / WEIGHTS).read_bytes() for root in (folder, folder.parent / "others"))
        HfApi().create_repo(repo_id)
        hub.repos["models", repo_id].lfs[hashlib.sha256(weights).hexdigest()] = of_others
        with pytest.raises(PushError, match="gives another image .* than the folder"):
            push_checkpoint(folder, repo_id, license="mit")
        assert not (folder / "push_report.json").exists()

    def test_code_of_others_is_neither_run_nor_pushed(self, run, hub):
        folder = run()
        with open(folder / "unet" / "denoising_unet.py", "a") as code:
            code.write("\nraise SystemExit('this ran')\n")
        with pytest.raises(ValueError, match="unet/denoising_unet.py differs from the installed package"):
            push_checkpoint(folder, hub.new_repo_id(), license="mit")
        assert not hub.requests

    @pytest.mark.slow
    def test_a_folder_here_that_is_called_like_the_repository_proves_nothing(self, run, hub, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        repo_id = hub.new_repo_id()
        shutil.copytree(run(), repo_id)
        report = push_checkpoint(repo_id, repo_id, license="mit")
        asked = [request.path for request in hub.requests if request.method == "GET"]
        assert any(f"/{repo_id}/resolve/{report.revision}/unet/{WEIGHTS}" in path for path in asked)

    def test_what_was_changed_in_a_card_must_be_fit_for_others(self, run, hub):
        folder, repo_id = run(), hub.new_repo_id()
        (folder / "evaluation" / "closest_20_pixels.png").unlink()
        write_card(folder, "mit")
        card = (folder / "README.md").read_text()
        for change, message in (("", f'README.md names ("{folder}"'), ("license", "names the licence None")):
            changed = card.replace("license: mit\n", "") if change else card
            changed = changed.replace(str(folder), repo_id) if change else changed
            (folder / "README.md").write_text(f"{changed}\nMine.\n")
            with pytest.raises(PushError, match=re.escape(message)):
                push_checkpoint(folder, repo_id, license="mit")
        assert set(hub.files(repo_id)) == {".gitattributes"}

    def test_an_adapter_of_a_folder_is_of_no_use_to_others(self, run, hub, tmp_path):
        (tmp_path / "adapter").mkdir()
        save_file({"class_embedding": torch.zeros(1)}, tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
        with pytest.raises(ValueError, match="there is no training_config.json that says which model"):
            push_checkpoint(tmp_path / "adapter", hub.new_repo_id(), license="mit")
        (tmp_path / "adapter" / "training_config.json").write_text(
            json.dumps({"built_on": {"base model": str(run())}})
        )
        with pytest.raises(ValueError, match="base: .* is a folder that others do not have"):
            push_checkpoint(tmp_path / "adapter", hub.new_repo_id(), license="mit")
        assert not hub.requests

    def test_what_is_no_checkpoint_or_has_no_licence_is_refused_at_once(self, run, hub, tmp_path):
        with pytest.raises(FileNotFoundError, match="no model_index.json in it, so it holds no checkpoint"):
            push_checkpoint(tmp_path, hub.new_repo_id(), license="mit")
        with pytest.raises(ValueError, match="license: a model that is shared needs one"):
            push_checkpoint(run(), hub.new_repo_id())
        assert not hub.requests

    @pytest.mark.slow
    def test_an_adapter_is_pushed_alone_and_drawn_with_its_base(self, run, hub, tmp_path, monkeypatch):
        base, repo_id = hub.new_repo_id("base"), hub.new_repo_id("adapter")
        push_checkpoint(run(), base, license="mit")
        pipe = load_pipeline(base)
        pipe.add_class("zebra", adapter_name="default")
        attach_adapter(pipe.unet, rank=2, num_new_classes=1)
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        pipe.save_lora_weights(tmp_path / "adapter")
        (tmp_path / "adapter" / "training_config.json").write_text(json.dumps({"built_on": {"base model": base}}))
        (tmp_path / "adapter" / "provenance.json").write_text(json.dumps({"request": {"class_labels": "zebra"}}))
        report = push_checkpoint(tmp_path / "adapter", repo_id, license="mit")
        assert report.files == ["README.md", "pytorch_lora_weights.safetensors"]
        assert report.sample != sample_without_package(base, token=hub.token)
        card = ModelCard.load(repo_id)
        assert card.data.base_model == base and card.data.base_model_relation == "adapter"
        (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        assert 'pipe(class_labels="zebra")' in snippet
        monkeypatch.chdir(tmp_path)
        exec(snippet, {})  # as pasted
        assert (tmp_path / "sample.png").is_file()


@pytest.mark.slow
def test_commands_of_the_hub_and_of_diffusers_read_the_repository(hub, tmp_path):
    CHECKPOINTS["classes"]().save_pretrained(tmp_path / "run")
    report = push_checkpoint(tmp_path / "run", repo_id := hub.new_repo_id(), license="mit")
    environment = hub.environment(tmp_path / "home")

    def output_of(*words):
        command = [Path(sys.executable).with_name(words[0]), *words[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "# How to use it" in output_of("hf", "models", "card", repo_id)
    assert all(name in output_of("hf", "models", "ls", repo_id, "-R") for name in report.files)
    assert set(report.files) <= {
        file["rfilename"] for file in json.loads(output_of("hf", "models", "info", repo_id))["siblings"]
    }
    output_of("hf", "download", repo_id, "--local-dir", str(tmp_path / "copy"))
    assert load_pipeline(tmp_path / "copy").labels == {"cat": 0, "dog": 1}
    request = json.dumps({"class_labels": "dog", "num_inference_steps": 20})
    output_of(
        "diffusers-cli", "run", "-m", repo_id, "--trust-remote-code", "--pipeline-kwargs", request, "-o",
        str(tmp_path / "dog.png"),
    )  # fmt: skip
    assert Image.open(tmp_path / "dog.png").size == (8, 8)
