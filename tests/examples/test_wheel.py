"""Every command, from the wheel alone, outside the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = "--max_train_steps 2 --batch_size 4 --sampling_steps 0".split()
TINY_UNET = [*TINY, "--block_out_channels", "16", "32"]
COMMANDS = {  # in this order; {data} is a data set
    "cfg": "train cfg --dataset {data} --output_dir cfg --license mit",
    "plain": "train unconditional --dataset {data} --output_dir plain",
    "guided": "train classifier --for_model plain --dataset {data} --output_dir guided",
    "autoencoder": "train autoencoder --dataset {data} --output_dir autoencoder",
    "vae": "train vae --dataset {data} --output_dir vae",
    "latent": "train latent-cfg --dataset {data} --output_dir latent",
    "text": "train text-to-image --dataset {data} --output_dir text",
    "upsampler": "train upsampler --factor 2 --dataset {data} --output_dir upsampler",
    "sample": "sample guided --class_labels dark --num 4 --num_inference_steps 2 --output drawn",
    "lora": "train lora --base cfg --dataset drawn --class_name new --prior_samples 0 --output_dir lora",
    "enlarge": "enlarge drawn/dark-0.png --upsamplers upsampler --num_inference_steps 2 --output_dir enlarged",
    "evaluate": "evaluate cfg --dataset {data} --samples 150 --num_inference_steps 2",
    "transfer": "transfer vae --dataset {data} --labels_per_class 1 --max_train_steps 2 --learning_rates 0.001",
    "doctor": "doctor {data}",
    "push": "push cfg {repo_id}",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel unpacked in a folder of its own; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site", wheel]
    subprocess.run(command, check=True)
    return folder / "site"


@pytest.mark.slow
def test_every_command_works_from_the_wheel_alone(installed, measured_data, hub, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    where = run(sys.executable, "-c", "import hf_genmod.__main__ as m; print(m.__file__, m.EXAMPLES)")
    assert where == f"{installed}/hf_genmod/__main__.py {installed}/hf_genmod/examples"
    for name, command in COMMANDS.items():
        words = command.format(data=measured_data, repo_id=hub.new_repo_id()).split()
        if words[0] == "train":
            words += TINY if name in ("autoencoder", "vae", "latent", "lora") else TINY_UNET
        run(sys.executable, installed / "bin" / "hf_genmod", *words)
    assert len(list((tmp_path / "drawn").iterdir())) == 4 and list((tmp_path / "enlarged").glob("*.png"))
