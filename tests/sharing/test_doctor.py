"""Findings about checkpoints, runs and data sets."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from tiny import tiny_autoencoder, tiny_classifier, tiny_unet, tiny_vae

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    FewStepDDPMScheduler,
    SuperResolutionPipeline,
    VariationalAutoencoder,
)
from hf_genmod.__main__ import main
from hf_genmod.sharing import push
from hf_genmod.sharing.doctor import examine, is_checkpoint

COSINE = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}


@pytest.fixture
def folder(tmp_path):
    """Called as a run's own states are, which must not matter."""
    return tmp_path / "checkpoints" / "mine"


# Draws from one checkpoint after another: a process imports the libraries once for all of them.
_SERVER = """
import contextlib, io, json, sys
code = compile(json.loads(sys.stdin.readline()), "sample", "exec")
for line in sys.stdin:
    sys.argv, printed, error = ["-c", json.loads(line), "", "", ""], io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {})
    except Exception as caught:
        error = str(caught) or type(caught).__name__
    print(json.dumps([printed.getvalue(), error]), flush=True)
"""


@pytest.fixture(scope="module")
def sample():
    """What `sample_without_package` runs, run by one process for all tests, which starts faster than one for each."""
    command, pipe = [sys.executable, "-c", _SERVER], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        print(json.dumps(push._SAMPLE_WITHOUT_PACKAGE), file=process.stdin, flush=True)

        def draw(folder):
            print(json.dumps(str(folder)), file=process.stdin, flush=True)
            printed, error = json.loads(process.stdout.readline())
            if error:
                raise RuntimeError(error.splitlines()[-1])
            return printed.split()[-1]

        yield draw
        process.stdin.close()


@pytest.fixture(autouse=True)
def _sampled_by_one_process(monkeypatch, request):
    """All tests but the first, which starts a process of its own."""
    if request.node.originalname != "test_a_sound_checkpoint_has_no_findings_and_status_0":
        draw = request.getfixturevalue("sample")
        monkeypatch.setattr("hf_genmod.sharing.doctor.sample_without_package", draw)


def save_checkpoint(folder, vae=None, **scheduler):
    unet = tiny_unet(num_classes=3, **({"in_channels": 4, "out_channels": 4} if vae else {}))
    process = AncestralDDPMScheduler(**{**COSINE, **scheduler})
    ClassifierFreeGuidedPipeline(unet, process, vae=vae).save_pretrained(folder)


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def only(findings):
    (finding,) = findings
    return finding


def test_a_sound_checkpoint_has_no_findings_and_status_0(tmp_path, capsys):
    save_checkpoint(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1000, "bad_steps": 3}\n')
    assert main(["doctor", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: no findings\n"


def test_an_adapter_is_examined_without_its_model(tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    (tmp_path / "training_config.json").write_text("{}")
    save_file({"unet.a.lora_A.weight": torch.ones(2)}, file)
    assert not list(examine(tmp_path))
    save_file({"unet.a.lora_A.weight": torch.tensor([1.0, torch.inf])}, file)
    assert "1 of its weights, such as unet.a.lora_A.weight, are not finite" in only(examine(tmp_path))
    file.write_bytes(b"torn")
    assert "pytorch_lora_weights.safetensors: the file cannot be read" in only(examine(tmp_path))


@pytest.mark.slow
def test_a_classifier_of_other_noise_is_found(tmp_path):
    process = AncestralDDPMScheduler(**COSINE)
    classifier = tiny_classifier(noise_schedule=dict(process.config))
    ClassifierGuidedPipeline(tiny_unet(), classifier, process).save_pretrained(tmp_path)
    assert not list(examine(tmp_path))
    edit(tmp_path / "classifier/config.json", noise_schedule={"beta_schedule": "linear"})
    assert "classifier: it was trained on the noise of another schedule" in only(examine(tmp_path))


def test_a_checkpoint_that_loads_but_does_not_sample_is_found(tmp_path):
    ClassifierFreeGuidedPipeline(tiny_unet(num_classes=3), DDIMScheduler(**COSINE)).save_pretrained(tmp_path)
    assert not list(examine(tmp_path))
    edit(tmp_path / "scheduler/scheduler_config.json", prediction_type="none")
    assert "it does not sample where this package is not installed" in only(examine(tmp_path))


def test_an_upsampler_is_sound_without_an_image_of_its_own(tmp_path):
    unet = tiny_unet(conditioning_channels=3)
    SuperResolutionPipeline(unet, AncestralDDPMScheduler(**COSINE)).save_pretrained(tmp_path)
    assert list(examine(str(tmp_path))) == []


def test_an_autoencoder_is_sound_without_a_prior(tmp_path):
    plain = tiny_autoencoder(Autoencoder, sample_size=(8, 16), in_channels=5)
    ranges = {"low": [200.0] * 5, "high": [300.0] * 5}
    AutoencoderPipeline(plain, value_range=ranges).save_pretrained(tmp_path)
    assert not list(examine(tmp_path))


def test_an_autoencoder_that_does_not_reconstruct_elsewhere_is_found(tmp_path):
    AutoencoderPipeline(tiny_autoencoder(VariationalAutoencoder)).save_pretrained(tmp_path)
    (tmp_path / "vae/variational_autoencoder.py").unlink()
    assert "it does not sample where this package is not installed" in only(examine(tmp_path))
    AutoencoderPipeline(tiny_autoencoder(VariationalAutoencoder)).save_pretrained(tmp_path)
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    weights = load_file(file)
    weights["decoder.conv_out.bias"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    assert "vae: 1 of its weights, such as decoder.conv_out.bias, are not finite" in only(examine(tmp_path))


def test_each_finding_is_a_line_and_the_status_is_1(tmp_path, capsys):
    save_checkpoint(
        tmp_path, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading"
    )
    assert main(["doctor", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "√ᾱ_T" in lines[0] and "'leading' starts 50 steps at t = 980 of 999" in lines[1]
    assert lines[2] == f"{tmp_path}: 2 findings"


def test_the_signal_left_at_the_end_is_what_the_schedule_leaves(tmp_path):
    save_checkpoint(tmp_path, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    left = (
        AncestralDDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        .alphas_cumprod[-1]
        .sqrt()
    )
    assert f"√ᾱ_T = {left:.2f} of the image" in only(examine(str(tmp_path)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    save_checkpoint(tmp_path)
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_out.bias"][0] = value
    save_file(weights, file, metadata={"format": "pt"})
    assert "unet: 1 of its weights, such as conv_out.bias, are not finite" in only(examine(str(tmp_path)))


def test_clipped_latents_are_found(tmp_path):
    save_checkpoint(tmp_path, vae=tiny_vae(), clip_sample=True)
    assert "clip_sample clips latents at ±1.0" in only(examine(str(tmp_path)))
    save_checkpoint(tmp_path, vae=tiny_autoencoder(latent_channels=4), clip_sample=False)
    assert not list(examine(str(tmp_path)))


def test_few_steps_start_where_images_do_not_show_any_more(tmp_path):
    sampler = FewStepDDPMScheduler(beta_schedule="linear")
    ClassifierFreeGuidedPipeline(tiny_unet(num_classes=3), sampler).save_pretrained(tmp_path)
    sampler.set_timesteps(50)
    assert sampler.timesteps[0] < 950
    assert not list(examine(str(tmp_path)))


def test_every_sampler_that_starts_at_the_end_is_sound(tmp_path):
    save_checkpoint(tmp_path)
    sampler = DPMSolverMultistepScheduler.from_config(AncestralDDPMScheduler(**COSINE).config, use_lu_lambdas=True)
    sampler.save_pretrained(tmp_path / "scheduler")
    edit(tmp_path / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    assert not list(examine(str(tmp_path)))


def test_a_checkpoint_that_does_not_load_is_found(tmp_path):
    save_checkpoint(tmp_path)
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert "it does not load" in only(examine(str(tmp_path)))


def test_code_that_is_not_ours_is_found_and_not_executed(folder, tmp_path):
    save_checkpoint(folder)
    code = folder / "unet" / "denoising_unet.py"
    code.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n" + code.read_text())
    assert "unet/denoising_unet.py differs from the installed package" in only(examine(str(folder)))
    (folder / "unet" / "other.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    code.unlink()
    assert "other.py is not a file of this package" in only(examine(str(folder)))
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_without_its_code_loads_here_only(tmp_path):
    save_checkpoint(tmp_path)
    (tmp_path / "unet" / "denoising_unet.py").unlink()
    assert "does not sample where this package is not installed" in only(examine(str(tmp_path)))
    for file in tmp_path.rglob("*.py"):
        file.unlink()
    assert "it carries no code" in only(examine(str(tmp_path)))


@pytest.mark.parametrize(
    "line, finding",
    [
        ('{"step": 150}', "trained for 150 steps"),
        ('{"step": 900, "bad_steps": 10}', "10 of its 900 steps were skipped"),
    ],
)
def test_short_and_unstable_runs_are_found(tmp_path, line, finding):
    save_checkpoint(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    assert finding in only(examine(str(tmp_path)))


def test_a_run_that_is_not_over_is_found(tmp_path):
    (tmp_path / "training_config.json").write_text("{}")
    assert "the run is not finished" in only(examine(str(tmp_path)))


def test_a_part_of_a_checkpoint_is_no_data_set(tmp_path):
    save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="unet: a part of .*; examine that folder"):
        is_checkpoint(str(tmp_path / "unet"))
    assert is_checkpoint(str(tmp_path)) and not is_checkpoint(str(tmp_path.parent))


def test_a_damaged_checkpoint_of_a_run_is_written_again_by_its_command(tmp_path):
    save_checkpoint(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert only(examine(str(tmp_path))).endswith("download or train it again")
    (tmp_path / "checkpoints" / "step-5").mkdir(parents=True)
    assert only(examine(str(tmp_path))).endswith("repeat the command of the run, which writes it again")
