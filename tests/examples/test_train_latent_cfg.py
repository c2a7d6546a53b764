import json
from pathlib import Path

import datasets
import torch
from example_scripts import SMALL_AUTOENCODER, SMALL_LATENT, run

from hf_genmod import load_pipeline


def test_latent_diffusion_in_one_command_leaves_both_checkpoints_and_names_them(class_folders, tmp_path):
    command = ["train_latent_cfg.py", "--dataset", class_folders, "--output_dir", f"{tmp_path}/run/",
               "--max_train_steps", 5, "--horizontal_flip", "--guiding_fraction", 0.5, "--latent_channels", 3,
               *SMALL_AUTOENCODER, *SMALL_LATENT, "--license", "mit"]  # fmt: skip
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "guiding_unet").is_dir() and not (tmp_path / "run-vae" / "guiding_unet").exists()
    assert "The autoencoder:" in (tmp_path / "run" / "README.md").read_text()
    names = [
        f"{tmp_path}/run-vae is the checkpoint",
        f"{tmp_path}/run/ is the checkpoint",
    ]
    too_few = "it was trained for 3 steps, too few for a model that starts from random weights"
    after = f"""{too_few}; train longer, in another output_dir

In Python:

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("{tmp_path}/run/", trust_remote_code=True)
    pipe(class_labels="circle").images[0].save("sample.png")

Next:

    hf_genmod sample {tmp_path}/run/ --output grid.png
    hf_genmod evaluate {tmp_path}/run/ --dataset {class_folders}
    hf_genmod push {tmp_path}/run/ NAME --license mit
"""
    assert done.stdout == "\n".join([*names, after])
    of_vae, of_model = (
        (tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("run-vae", "run")
    )
    assert '"step": 2' in of_vae and '"step": 3' in of_model  # 0.4 and 0.6 of 5
    of_vae, of_model = (
        json.loads((tmp_path / name / "training_config.json").read_text()) for name in ("run-vae", "run")
    )
    first, second = of_vae["training"], of_model["training"]
    assert second["batch_size"] == 4 * first["batch_size"] == of_model["arguments"]["latent"]["latent_batch_size"]
    assert second["learning_rate"] == 2 * first["learning_rate"]

    first, whole = load_pipeline(tmp_path / "run-vae"), load_pipeline(tmp_path / "run")
    for name, weight in first.vae.state_dict().items():
        assert torch.equal(whole.vae.state_dict()[name], weight)
    assert sorted(whole.labels) == sorted(folder.name for folder in class_folders.iterdir())
    images = whole(["circle", "star"], num_inference_steps=2).images + first(1).images
    assert [(image.mode, image.size) for image in images] == [("L", (16, 16))] * 3

    cache = Path(datasets.config.HF_DATASETS_CACHE, "hf_genmod", "latents")
    encoded = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    again = run(*command)
    assert encoded and {file: file.stat().st_mtime_ns for file in cache.iterdir()} == encoded
    complete = [f"{tmp_path}/{name} is complete; there is nothing left to train" for name in ("run-vae", "run/")]
    assert again.stdout == "\n".join([complete[0], names[0], complete[1], names[1], after])
