import os
import subprocess
import sys

import pytest
from example_scripts import EXAMPLES, SMALL, run

from hf_genmod import load_pipeline


def test_training_without_labels_and_with_a_learned_variance_in_bf16(tmp_path):
    flags = ["--learn_variance", "--mixed_precision", "bf16", "--gradient_checkpointing", "--report_to", "tensorboard"]
    done = run("train_unconditional.py", "--output_dir", tmp_path / "run", "--max_train_steps", 2, *flags, *SMALL)
    assert done.returncode == 0, done.stderr
    (image,) = load_pipeline(tmp_path / "run")(num_inference_steps=2).images
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert list((tmp_path / "run" / "logs").rglob("events*"))


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_ends_with_a_card_and_a_push(number, class_folders, tmp_path, hub, monkeypatch):
    repo_id = hub.new_repo_id("pushed")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", number]
    flags = ["--dataset", class_folders, "--output_dir", tmp_path / repo_id.split("/")[1], "--max_train_steps", 2,
             "--license", "mit", "--push_to_hub", "--hub_private_repo", *SMALL]  # fmt: skip
    if number == 1:  # without the proof, which takes seconds
        monkeypatch.setattr("hf_genmod.sharing.push.sample_without_package", lambda where, **options: "sha256:0")
        done = run("train_unconditional.py", *flags)
    else:
        command = [sys.executable, *launcher, EXAMPLES / "train_unconditional.py", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "loads and draws what" in done.stderr and hub.token not in done.stdout + done.stderr
    assert hub.repos["models", repo_id].private
    files = hub.files(repo_id)
    assert {"README.md", "samples.png", "model_index.json"} <= set(files)
    assert not [name for name in files if name.startswith(("checkpoints/", "samples/")) or "training" in name]
    card = files["README.md"].decode()
    assert f'from_pretrained("{repo_id}"' in card and "--push_to_hub" in card and "2 steps in" in card
    assert ("torchrun --nproc_per_node 2" in card) == (number == 2)
