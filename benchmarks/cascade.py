"""
Low resolution plus upsampling. First the upsampler alone: test pictures made small and enlarged again, beside bicubic
interpolation. Then, with --small, a cascade beside one model of the large pictures, all in the same minutes of
training; its upsampler with and without noise in the small pictures.

    python benchmarks/cascade.py --dataset DATA --resolution 32 --factor 2 --output_dir runs/cascade
"""

from pathlib import Path

import torch
from judge import Judge, draw, once, parser, to_uint8, train

from hf_genmod import load_pipeline
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.value_range import to_model_range
from hf_genmod.drawing.cascade import draw_cascade
from hf_genmod.models.conditioning import enlarge, shrink

parser = parser(__doc__)
parser.add_argument("--factor", type=int, default=2)
parser.add_argument("--minutes", type=float, default=8.0, help="Training of the upsampler, and of each way to draw.")
parser.add_argument(
    "--base_share", type=float, default=0.5, help="Part of the minutes for the model of the small pictures; 0: none."
)
parser.add_argument("--num_inference_steps", type=int, default=20)
parser.add_argument("--noise_levels", type=int, nargs="+", default=[0, 10, 25, 50, 100])
arguments = parser.parse_args()
out, size = Path(arguments.output_dir), int(arguments.resolution)
judge = Judge(arguments.dataset, arguments.resolution, arguments.samples, arguments.flip, out)
test = load_pictures(
    arguments.dataset, resolution=size, split="test", limit=arguments.samples, in_memory=True, require_labels=True
)
x = test.x_0(range(len(test)))
small = shrink(x, arguments.factor)


def train_upsampler(folder: Path, minutes: float, *flags) -> float:
    """Returns the pictures seen per second."""
    return train("train_upsampler.py", folder, arguments, minutes, "--factor", str(arguments.factor), *flags)


def enlarged(folder: Path, noise_level: int, batch_size: int = 100) -> torch.Tensor:
    """The small test pictures; picture i has seed i."""
    pipeline, parts = load_pipeline(folder), []
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(small), batch_size):
        image = small[start : start + batch_size] / 2 + 0.5
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(image))]
        steps = {"num_inference_steps": arguments.num_inference_steps, "noise_level": noise_level}
        parts.append(pipeline(image, generator=seeds, output_type="pt", **steps).images)
    return to_uint8(torch.cat(parts))


def drawn_by_cascade(stages: list[Path], noise_level: int, batch_size: int = 100) -> torch.Tensor:
    """Pictures of the classes that the judge asks for; picture i has seed i."""
    stages, parts = [load_pipeline(folder) for folder in stages], []
    for pipeline in stages:
        pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(judge.labels), batch_size):
        labels = judge.labels[start : start + batch_size]
        seeds, steps = range(start, start + len(labels)), arguments.num_inference_steps
        request = {"class_labels": labels, "guidance_scale": 1.0, "output_type": "pt"}
        parts.append(draw_cascade(stages, seeds, noise_level, steps, **request))
    return to_uint8(torch.cat(parts))


def row(name: str, pictures: torch.Tensor, labels=None) -> float:
    metrics = judge(pictures, labels)
    ratio = metrics["frechet_distance"] / bicubic["frechet_distance"]
    faithful = ""
    if labels is not None:
        error = 127.5 * (shrink(to_model_range(pictures), arguments.factor) - small).abs().mean()
        mse = ((pictures.float() - test.images.float()) / 255).square().flatten(1).mean(dim=1)
        faithful = f"{error:.2f} | {-10 * torch.log10(mse.clamp(min=1e-10)).mean():.2f} | "
    print(f"| {name} | {metrics['frechet_distance']:.3f} | {ratio:.3f} | {metrics['recognised_share']} | {faithful}")


interpolated = to_uint8(enlarge(small, arguments.factor) / 2 + 0.5)
bicubic = judge(interpolated, test.labels)
rate = once(out / "upsampler.rate.pt", train_upsampler, out / "upsampler", arguments.minutes)
print(
    f"{arguments.dataset}, {size // arguments.factor} to {size} pixels; {arguments.minutes:g} minutes of training on "
    f"{torch.get_num_threads()} threads ({rate:.0f} images/s); {len(test)} test pictures, "
    f"{arguments.num_inference_steps} steps. Back: mean difference of the result made small again from what it was "
    "made of, of 255.\n\n"
    "| | Fréchet distance | of bicubic's | recognised | back | PSNR, dB |\n|---|---|---|---|---|---|"
)
print(f"| {arguments.samples} training pictures | {judge.floor['frechet_distance']:.3f} | | | | |")
row("the test pictures themselves", test.images, test.labels)
row("bicubic", interpolated, test.labels)
for noise_level in arguments.noise_levels:
    file = out / f"upsampler-{noise_level}.pt"
    pictures = once(file, enlarged, out / "upsampler", noise_level)
    judge.grid(pictures).save(file.with_suffix(".png"))
    row(f"upsampler, noise level {noise_level}", pictures, test.labels)

if arguments.base_share:
    share, minutes = arguments.base_share, arguments.minutes
    base, whole = out / "base", out / "whole"
    arguments.resolution = str(size // arguments.factor)
    once(out / "base.rate.pt", train, "train_cfg.py", base, arguments, share * minutes)
    arguments.resolution = str(size)
    once(out / "whole.rate.pt", train, "train_cfg.py", whole, arguments, minutes)
    upsamplers = {"with noise": (), "without noise": ("--max_noise_level", "0")}
    print(
        f"\n{minutes:g} minutes each: a model of {size} pixels; a cascade, whose base has {share * minutes:g} of "
        f"them. {len(judge.labels)} samples, γ = 1, {arguments.num_inference_steps} steps of each model.\n\n"
        "| | Fréchet distance | of bicubic's | recognised |\n|---|---|---|---|"
    )
    request = {"guidance_scale": 1.0, "num_inference_steps": arguments.num_inference_steps}
    pictures = once(out / "whole.pt", lambda: draw(load_pipeline(whole), judge.labels, **request))
    judge.grid(pictures).save(out / "whole.png")
    row(f"a model of {size} pixels", pictures)
    for name, flags in upsamplers.items():
        folder = out / f"upsampler {name}".replace(" ", "-")
        once(out / f"{folder.name}.rate.pt", train_upsampler, folder, (1 - share) * minutes, *flags)
        for noise_level in arguments.noise_levels if not flags else [0]:
            file = out / f"cascade-{folder.name}-{noise_level}.pt"
            pictures = once(file, drawn_by_cascade, [base, folder], noise_level)
            judge.grid(pictures).save(file.with_suffix(".png"))
            row(f"cascade, upsampler trained {name}, noise level {noise_level}", pictures)
