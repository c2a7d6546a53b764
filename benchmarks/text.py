"""
Text to image on the embedded captions, with eight pairs of shape and color withheld from training: how often the exact
checker finds what the caption says, for pairs that were seen and pairs that never were, over γ.

    python benchmarks/text.py --output_dir runs/text
    python benchmarks/text.py --num_objects 2 --output_dir runs/text2
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from judge import once
from PIL import Image

from hf_genmod import load_pipeline
from hf_genmod.data.shapes import COLORS, SHAPES, ShapesDataset, caption
from hf_genmod.data.shapes_checker import check
from hf_genmod.evaluation.recognition import recognised_share

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--num_objects", type=int, default=1)
parser.add_argument("--minutes", type=float, default=12.0)
parser.add_argument("--samples", type=int, default=1000, help="Per row and γ.")
parser.add_argument("--num_inference_steps", type=int, default=20)
parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
parser.add_argument("--train_flags", nargs="*", default=[], help="More flags of training, without their dashes.")
parser.add_argument("--output_dir", default="runs/text", help="What is found there is not computed again.")
arguments = parser.parse_args()
out = Path(arguments.output_dir)

# One of each shape and of each color.
WITHHELD = [f"{color} {shape}" for color, shape in zip([*COLORS][3:] + [*COLORS][:3], SHAPES, strict=True)]


def write_folder(folder: Path) -> None:
    """Pictures and a metadata.jsonl, as a person has them."""
    for split, count, seed in (("train", 8192, 0), ("test", 256, 1)):
        drawn = ShapesDataset(count, 32, seed, arguments.num_objects, label=None, exclude=WITHHELD)
        (folder / split).mkdir(parents=True)
        lines = []
        for i, row in enumerate(drawn[i] for i in range(count)):
            row["image"].save(folder / split / f"{i:05}.png")
            lines.append(json.dumps({"file_name": f"{i:05}.png", "text": row["caption"]}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def scenes(withheld: bool) -> list:
    """Scenes that were never trained on; with `withheld` such as have a pair that never was."""
    drawn = ShapesDataset(100 * arguments.samples, 32, 2, arguments.num_objects, label=None)
    pairs = lambda scene: {f"{item.color} {item.shape}" for item in scene}  # noqa: E731
    chosen = (scene for scene in map(drawn.scene, range(len(drawn))) if bool(pairs(scene) & {*WITHHELD}) == withheld)
    return list(itertools.islice(chosen, arguments.samples))


def draw(prompts: list[str], guidance_scale: float) -> torch.Tensor:
    """(n, H, W, C) uint8; picture i has seed i."""
    pictures = []
    for start in range(0, len(prompts), 100):
        part = prompts[start : start + 100]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        request = {"guidance_scale": guidance_scale, "num_inference_steps": arguments.num_inference_steps}
        pictures.append(torch.from_numpy(pipeline(part, generator=seeds, output_type="np", **request).images))
    return (torch.cat(pictures) * 255).round().to(torch.uint8)


def has_objects(scene, found) -> bool:
    """Whether the colors and shapes are those of the scene."""
    first, second = (sorted((item.color, item.shape) for item in objects) for objects in (scene, found))
    return first == second


def has_caption(scene, found) -> bool:
    """Whether sizes and relation are, too."""
    orders = itertools.permutations(found) if len(found) == len(scene) else ()
    return any(caption(order) == caption(scene) for order in orders)


if not (out / "pictures").is_dir():
    write_folder(out / "pictures")
if not (out / "model" / "model_index.json").is_file():
    flags = [f"--{flag}" for flag in arguments.train_flags]
    command = [sys.executable, "examples/train_text_to_image.py", "--dataset", out / "pictures", "--output_dir",
               out / "model", "--max_train_minutes", arguments.minutes, "--sampling_steps", 0, *flags]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True)
pipeline = load_pipeline(out / "model")
pipeline.set_progress_bar_config(disable=True)

print(
    f"{arguments.num_objects} object(s), {arguments.minutes:g} minutes on {torch.get_num_threads()} threads, "
    f"{arguments.samples} samples of {arguments.num_inference_steps} steps each\n\n"
    "| pairs | γ | colors and shapes | sizes and relation too |\n|---|---|---|---|"
)
for name, withheld in (("seen in training", False), ("never seen", True)):
    asked = scenes(withheld)
    prompts = [caption(scene) for scene in asked]
    for scale in arguments.guidance_scales:
        pictures = once(out / f"{name.split()[0]}-{scale:g}.pt", draw, prompts, scale)
        found = [check(picture.numpy()) for picture in pictures]
        right = torch.tensor([[has_objects(*pair), has_caption(*pair)] for pair in zip(asked, found, strict=True)])
        shares = [recognised_share(column.long(), torch.ones(len(asked))) for column in right.T]
        print(f"| {name} | {scale:g} | {shares[0]} | {shares[1]} |", flush=True)

prompts = [f"a large {name}" for name in WITHHELD] if arguments.num_objects == 1 else prompts[:8]
columns = [draw([prompt for prompt in prompts for _ in range(8)], scale) for scale in (1.0, 3.0)]
rows = torch.cat([column.unflatten(0, (len(prompts), 8)) for column in columns], dim=1).flatten(0, 1)
make_image_grid([Image.fromarray(picture.numpy()) for picture in rows], len(prompts), 16).save(out / "guidance.png")
print(f"\n{out}/guidance.png: γ = 1 and, from the same noise, γ = 3; row by row {', '.join(prompts)}")
