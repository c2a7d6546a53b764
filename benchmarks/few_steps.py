"""
What tuning to few steps buys: Fréchet distance and recognised share of a model and of the model tuned from it in a
quarter of its minutes, against the number of forward passes, and the seconds of 64 images.

    python benchmarks/few_steps.py --dataset ../shared/data/mnist --resolution 32 --output_dir runs/few-steps-mnist
"""

import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch
from judge import Judge, draw, parser, train

from hf_genmod import load_pipeline

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

parser = parser(__doc__)
parser.add_argument("--minutes", type=float, default=8.0, help="Training of the model.")
parser.add_argument("--guidance_scale", type=float, default=1.0, help="γ of both.")
parser.add_argument("--steps", type=int, nargs="*", default=[1, 2, 4, 10, 20], help="Steps of the model.")
parser.add_argument("--tuned_steps", type=int, nargs="+", default=[1, 2, 4, 8], help="Steps of the tuned model.")
parser.add_argument("--draws", type=int, default=1, help="Draws of all samples, each by other seeds; means are shown.")
parser.add_argument("--tuning_flags", nargs="*", default=[], help="More flags of the tuning, without their dashes.")
arguments = parser.parse_args()
out, gamma = Path(arguments.output_dir), arguments.guidance_scale
judge = Judge(arguments.dataset, arguments.resolution, arguments.samples, arguments.flip, out)
base, tuned = out / "with_labels", out / f"tuned-{gamma:g}"
if not (base / "model_index.json").is_file():
    train("train_cfg.py", base, arguments, arguments.minutes)
flags = [f"--{flag}" if not flag[0].isdigit() else flag for flag in arguments.tuning_flags]
command = [sys.executable, "examples/train_few_step.py", "--model", str(base), "--output_dir", str(tuned)]
subprocess.run([*command, "--guidance_scale", str(gamma), "--sampling_steps", "0", *flags], check=True)


def measured(folder: Path, steps: int, guidance_scale: float) -> tuple[float, float, float]:
    """Fréchet distance, recognised share, and seconds of 64 images."""
    pipeline, results = load_pipeline(folder), []
    for i in range(arguments.draws):
        seed, options = i * arguments.samples, {"guidance_scale": guidance_scale, "num_inference_steps": steps}
        images = draw(pipeline, judge.labels, first_seed=seed, **options)
        metrics = judge(images)
        results.append((metrics["frechet_distance"], metrics["recognised_share"].value))
        if i == 0:
            judge.grid(images).save(out / f"{folder.name}-{guidance_scale:g}-{steps}.png")
    start = time.perf_counter()
    draw(pipeline, judge.labels[:64], batch_size=64, **options)
    seconds = time.perf_counter() - start
    return *torch.tensor(results).mean(dim=0).tolist(), seconds


floor = judge.floor
print(f"\nγ = {gamma:g}; {arguments.samples} samples, {arguments.draws} draws; real images: "
      f"{floor['frechet_distance']:.2f}, {floor['recognised_share']}\n")  # fmt: skip
print("| model | steps | Fréchet distance | recognised | seconds of 64 images |\n|---|---|---|---|---|")
figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
for name, folder, all_steps, scale in (
    ("model", base, arguments.steps, gamma),
    ("tuned to few steps", tuned, arguments.tuned_steps, 1.0),
):
    distances = []
    for steps in all_steps:
        distance, share, seconds = measured(folder, steps, scale)
        distances.append(distance)
        print(f"| {name} | {steps} | {distance:.2f} | {share:.1%} | {seconds:.2f} |", flush=True)
    axes.plot(all_steps, distances, "o-", label=name)
axes.axhline(floor["frechet_distance"], color="grey", linestyle=":", label="real images")
axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="Fréchet distance")
ticks = sorted({*arguments.steps, *arguments.tuned_steps})
axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
axes.minorticks_off()
axes.legend()
figure.savefig(out / f"few_steps-{gamma:g}.png", dpi=150)
