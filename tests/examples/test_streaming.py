import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from example_scripts import EXAMPLES, SMALL, SMALL_AUTOENCODER, SMALL_LATENT, run
from small_shards import FEATURES, write_parquet, write_tar

from hf_genmod import load_pipeline

MODEL = [*SMALL, "--sampling_steps", 1, "--max_train_steps", 2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("shards"))


def test_training_on_a_stream_of_web_datasets(tmp_path):
    write_tar(tmp_path / "shards" / "a.tar", 40)
    flags = ["--dataset", f"{tmp_path}/shards/*.tar", "--streaming", "--output_dir", tmp_path / "run"]
    done = run("train_cfg.py", *flags, *MODEL, "--max_train_steps", 1, "--sampling_steps", 0, "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert load_pipeline(tmp_path / "run")("0", num_inference_steps=1).images[0].size == (16, 16)


@pytest.mark.slow
def test_every_task_trains_on_a_stream(shards, tmp_path):
    tasks = {
        "unconditional": MODEL,
        "cfg": MODEL,
        "classifier": ["--for_model", tmp_path / "cfg", *MODEL[2:]],
        "text_to_image": MODEL,
        "upsampler": ["--factor", 2, *MODEL],
        "autoencoder": [*SMALL_AUTOENCODER, *MODEL[-4:]],
        "vae": [*SMALL_AUTOENCODER, *MODEL[-4:]],
        "latent_cfg": [*SMALL_LATENT, *MODEL[-4:], "--vae", tmp_path / "vae", "--horizontal_flip", "--cache_latents"],
    }
    for task, flags in tasks.items():
        command = [f"train_{task}.py", "--dataset", shards, "--streaming", "--output_dir", tmp_path / task, *flags]
        done = run(*command)
        assert done.returncode == 0 and "failed" not in done.stderr, done.stderr
    done = run("evaluate.py", "--model", tmp_path / "cfg", "--guidance_scales", 1, "--num_inference_steps", 2)
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr


def test_an_adapter_refuses_a_stream(shards, tmp_path):
    flags = ["--dataset", shards, "--streaming", "--output_dir", tmp_path / "run", "--max_train_steps", 2]
    done = run("finetune_lora.py", *flags, "--base", "x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "streaming: an adapter learns from few images" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_shards_that_can_no_longer_be_read_end_all_processes_with_their_state(num_processes, tmp_path):
    features = {name: feature for name, feature in FEATURES.items() if name != "text"}
    folder = write_parquet(tmp_path / "shards", (1000, 1000, 1000), features=features)
    contents = {file: file.read_bytes() for file in folder.iterdir()}
    flags = ["--dataset", folder, "--streaming", "--output_dir", tmp_path / "run", "--checkpointing_steps", 0]
    flags = [*flags, *SMALL, "--max_train_steps", 60, "--logging_steps", 1, "--num_processes", num_processes]
    command = [sys.executable, "-m", "hf_genmod", "train", "cfg", *map(str, flags)]
    process, said = subprocess.Popen(command, stderr=subprocess.PIPE, text=True), []
    for line in process.stderr:
        said.append(line)
        if re.search(r"step 3, ", line):
            for file, content in contents.items():
                file.write_bytes(bytes(len(content) * 9 // 10) + content[len(content) * 9 // 10 :])
    assert process.wait() == 1
    error = re.fullmatch(
        r"error: .*parquet: the shard cannot be read .* stopped at step (\d+) with the st.*\n", said[-1]
    )
    assert (tmp_path / "run" / "checkpoints" / f"step-{error[1]}").is_dir()
    for file, content in contents.items():
        file.write_bytes(content)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"continuing {tmp_path / 'run'} from step {error[1]}" in done.stdout


@pytest.mark.slow
def test_a_script_killed_while_it_streams_ends_as_if_it_was_not(shards, tmp_path):
    def command(name):
        flags = ["--dataset", shards, "--streaming", "--output_dir", tmp_path / name, "--checkpointing_steps", 1]
        flags = [*flags, *SMALL, "--max_train_steps", 40, "--logging_steps", 1]
        return [sys.executable, *map(str, [EXAMPLES / "train_cfg.py", *flags])]

    subprocess.run(command("whole"), check=True)
    process = subprocess.Popen(command("cut"), stderr=subprocess.PIPE, text=True)
    for line in process.stderr:  # of the progress bar
        if (step := re.search(r"step (\d+), ", line)) and int(step[1]) >= 9:
            process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut" / "model_index.json").exists()
    subprocess.run(command("cut"), check=True)
    whole, cut = (torch.load(tmp_path / name / "checkpoints" / "step-40" / "state.pt") for name in ("whole", "cut"))
    for part in ("model", "averaged_model"):
        assert all(torch.equal(whole[part][name], cut[part][name]) for name in whole[part])


# Training in which an encoded file has 40 rows. The process is killed before the n-th of them gets its name.
KILLED = """
import os, runpy, signal, sys
sys.path.insert(0, {examples!r})
from hf_genmod.data import stream_encoding
stream_encoding._ROWS, left = 40, int(sys.argv[1])

def before_renaming(event, arguments):
    global left
    if event == "os.rename" and str(arguments[0]).endswith(".partial"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(before_renaming)
sys.argv[:] = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_script_killed_while_it_encodes_a_stream_and_while_it_trains_ends_as_if_it_was_not(tmp_path):
    shards = write_parquet(tmp_path / "shards", (200, 120), group=50)
    vae = ["--output_dir", tmp_path / "vae", *SMALL_AUTOENCODER, "--max_train_steps", 2]
    done = run("train_vae.py", "--dataset", shards, "--streaming", *vae)
    assert done.returncode == 0, done.stderr

    def command(name, nth=0):
        flags = ["--dataset", shards, "--streaming", "--cache_latents", "--vae", tmp_path / "vae", "--horizontal_flip"]
        flags += ["--output_dir", tmp_path / name, "--checkpointing_steps", 1, *SMALL_LATENT]
        flags += ["--max_train_steps", 60, "--logging_steps", 1]
        program = KILLED.format(examples=str(EXAMPLES))
        return [sys.executable, "-c", program, *map(str, [nth, EXAMPLES / "train_latent_cfg.py", *flags])]

    def environment(name):
        return {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / f"{name}-cache")}

    subprocess.run(command("whole"), check=True, env=environment("whole"))
    killed = subprocess.run(command("cut", 5), env=environment("cut"))
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "cut-cache" / "hf_genmod" / "latents"
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*.parquet")}
    assert len(times) == 4 and len([*folder.glob("*.partial")]) == 1
    process = subprocess.Popen(command("cut"), stderr=subprocess.PIPE, text=True, env=environment("cut"))
    for line in process.stderr:
        if (step := re.search(r"step (\d+), ", line)) and int(step[1]) >= 49:  # in the second epoch
            process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "cut" / "model_index.json").exists()
    done = subprocess.run(command("cut"), stderr=subprocess.PIPE, text=True, env=environment("cut"))
    assert done.returncode == 0 and "the latents of" not in done.stderr
    assert len([*folder.glob("*.parquet")]) == 8 and not [*folder.glob("*.partial")]
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    whole, cut = (torch.load(tmp_path / name / "checkpoints" / "step-60" / "state.pt") for name in ("whole", "cut"))
    for part in ("model", "averaged_model"):
        assert all(torch.equal(whole[part][name], cut[part][name]) for name in whole[part])
