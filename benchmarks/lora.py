"""
A shape that a class-conditional model never saw, learned from a handful of pictures by an adapter: how often the exact
checker finds it in samples, how many samples are near-copies of these pictures, and what becomes of the other classes.

    python benchmarks/lora.py --shape heart --output_dir runs/lora
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import make_image_grid
from judge import once
from PIL import Image
from safetensors.torch import load_file

from hf_genmod import load_pipeline
from hf_genmod.data.shapes import SHAPES, ShapesDataset
from hf_genmod.data.shapes_checker import check
from hf_genmod.evaluation.recognition import recognised_share

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shape", default="heart", help="Which shape the model is trained without.")
parser.add_argument("--pictures", type=int, default=20, help="How many pictures of it the adapter learns from.")
parser.add_argument("--base_minutes", type=float, default=12.0)
parser.add_argument("--minutes", type=float, default=4.0, help="Of the adapter, its own samples not included.")
parser.add_argument("--samples", type=int, default=1000, help="Of each class.")
parser.add_argument("--num_inference_steps", type=int, default=20)
parser.add_argument("--guidance_scale", type=float, default=2.0)
parser.add_argument("--flags", nargs="*", default=[], help="More flags of the adapter, without their dashes.")
parser.add_argument("--name", default="adapter", help="Folder of the adapter in the output folder.")
parser.add_argument("--output_dir", default="runs/lora", help="What is found there is not computed again.")
arguments = parser.parse_args()
out = Path(arguments.output_dir)
known = [shape for shape in SHAPES if shape != arguments.shape]


def write_folder(folder: Path, drawn: ShapesDataset) -> None:
    """Class folders, as a person has them."""
    for i in range(len(drawn)):
        file = folder / check(np.asarray(drawn[i]["image"]))[0].shape / f"{i:05}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn[i]["image"].save(file)


def run(script: str, folder: Path, minutes: float, *flags) -> None:
    command = [sys.executable, f"examples/{script}.py", "--output_dir", folder, "--max_train_minutes", minutes,
               "--sampling_steps", 0, *flags]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True)


def draw(name: str) -> torch.Tensor:
    """(n, H, W, C) uint8; picture i has seed i."""
    pictures = []
    for start in range(0, arguments.samples, 100):
        seeds = [torch.Generator().manual_seed(i) for i in range(start, min(start + 100, arguments.samples))]
        request = {"guidance_scale": arguments.guidance_scale, "num_inference_steps": arguments.num_inference_steps}
        images = pipeline([name] * len(seeds), generator=seeds, output_type="np", **request).images
        pictures.append(torch.from_numpy(images))
    return (torch.cat(pictures) * 255).round().to(torch.uint8)


def share_right(pictures: torch.Tensor, shape: str):
    """Of pictures that show one object, of that shape."""
    right = [[item.shape for item in check(picture.numpy())] == [shape] for picture in pictures]
    return recognised_share(torch.tensor(right).long(), torch.ones(len(right)))


def distances(pictures: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Root mean square difference to the nearest of the others, in [0, 255]."""
    return torch.cdist(pictures.flatten(1).double(), others.flatten(1).double()).min(dim=1).values / (
        pictures[0].numel() ** 0.5
    )


if not (out / "pictures").is_dir():
    write_folder(out / "pictures" / "train", ShapesDataset(8192, 32, 0, exclude=arguments.shape))
    write_folder(out / "pictures" / "test", ShapesDataset(256, 32, 1, exclude=arguments.shape))
new = ShapesDataset(arguments.pictures + 1000, 32, 2, exclude=known)  # of the one shape that is left
new = [new[i]["image"] for i in range(len(new))]
if not (out / "new").is_dir():
    (out / "new").mkdir()
    for i, picture in enumerate(new[: arguments.pictures]):
        picture.save(out / "new" / f"{i:02}.png")
if not (out / "base" / "model_index.json").is_file():
    run("train_cfg", out / "base", arguments.base_minutes, "--dataset", out / "pictures")
adapter = out / arguments.name
if not (adapter / "pytorch_lora_weights.safetensors").is_file():
    flags = [f"--{flag}" for flag in arguments.flags]
    run("finetune_lora", adapter, arguments.minutes, "--base", out / "base", "--dataset", out / "new",
        "--class_name", arguments.shape, *flags)  # fmt: skip

pipeline = load_pipeline(out / "base")
pipeline.set_progress_bar_config(disable=True)
before = {name: once(out / f"{name}.pt", draw, name) for name in known}
size = sum(weight.numel() for weight in load_file(adapter / "pytorch_lora_weights.safetensors").values())
total = sum(parameter.numel() for parameter in pipeline.unet.parameters())
pipeline.load_lora_weights(adapter)
pipeline.fuse_lora()  # twice as fast, and the same pictures but for rounding
after = {name: once(adapter / f"{name}.pt", draw, name) for name in [*known, arguments.shape]}

print(
    f"{arguments.pictures} pictures of a {arguments.shape}, {arguments.minutes:g} minutes on "
    f"{torch.get_num_threads()} threads, {size:,} numbers, {size / total:.2%} of the model's; {arguments.samples} "
    f"samples of {arguments.num_inference_steps} steps of each class at γ = {arguments.guidance_scale:g}\n\n"
    "| class | before | after |\n|---|---|---|"
)
for name in known:
    print(f"| {name} | {share_right(before[name], name)} | {share_right(after[name], name)} |")
print(f"| **{arguments.shape}** | | {share_right(after[arguments.shape], arguments.shape)} |")

as_tensor = lambda pictures: torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))  # noqa: E731
few, fresh = as_tensor(new[: arguments.pictures]), as_tensor(new[arguments.pictures :])
near = distances(fresh, few).quantile(0.01)
copies = (distances(after[arguments.shape], few) < near).float().mean()
print(
    f"\nnearer to one of the {arguments.pictures} pictures than 1% of fresh ones are (a difference of {near:.1f} "
    f"levels): {copies:.1%}"
)
grid = [few[:20], after[arguments.shape][:40], *(after[name][:20] for name in known[:2])]
pictures = [Image.fromarray(picture.numpy()) for picture in torch.cat(grid)]
make_image_grid(pictures, len(pictures) // 20, 20).save(adapter / "samples.png")
print(f"{adapter}/samples.png: the pictures, 40 samples of {arguments.shape}, 20 each of {', '.join(known[:2])}")
