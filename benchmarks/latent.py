"""
Diffusion of pixels against diffusion of latents: U-Nets of the same widths and the same minutes, the autoencoder's
included; the cost of a training step, and the Fréchet distance.

    python benchmarks/latent.py --dataset ../shared/data/cats_dogs32 --resolution 64 --flip --output_dir runs/latent
"""

import json
import time
from pathlib import Path

import torch
from judge import Judge, draw, once, parser, to_uint8, train
from speed import autocast, seconds

from hf_genmod import AncestralDDPMScheduler, DenoisingObjective, load_pipeline
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.randomness import BatchRandom
from hf_genmod.training.interruptions import keep_freed_memory
from hf_genmod.training.muon import Muon

parser = parser(__doc__)
parser.add_argument("--minutes", type=float, default=24.0, help="Of each of the two.")
parser.add_argument("--train_flags", nargs="*", default=[], help="More flags of both, without their dashes.")
parser.add_argument("--latent_flags", nargs="*", default=[], help="More flags of the latter.")
parser.add_argument("--num_inference_steps", type=int, default=20)
parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 2.0])
parser.add_argument("--step_rounds", type=int, default=15, help="Training steps of each that are timed, in turn.")
parser.add_argument("--step_pictures", type=int, nargs="+", default=[64, 128, 256], help="Pictures of a timed step.")
arguments = parser.parse_args()
out = Path(arguments.output_dir)
judge = Judge(arguments.dataset, arguments.resolution, arguments.samples, arguments.flip, out)
folders = {"pixels": out / "pixels", "latents": out / "latents"}
flags = [f"--{flag}" for flag in arguments.train_flags + ["horizontal_flip"] * arguments.flip]
latent_flags = [f"--{flag}" for flag in arguments.latent_flags]


def minutes_of(script: str, name: str, *flags) -> float:
    """Trains, unless that was done; all minutes that it took: what is trained, and what is done besides."""
    started = time.perf_counter()
    train(script, folders[name], arguments, arguments.minutes, *flags)
    return (time.perf_counter() - started) / 60


minutes = {
    "pixels": once(out / "pixels.pt", minutes_of, "train_cfg.py", "pixels", *flags),
    "latents": once(out / "latents.pt", minutes_of, "train_latent_cfg.py", "latents", *flags, *latent_flags),
}
pipelines = {name: load_pipeline(folder) for name, folder in folders.items()}
settings = json.loads((folders["pixels"] / "training_config.json").read_text())["training"]
precision = settings["mixed_precision"]
dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]


def training_step(pipeline, batch_size: int):
    """A function that takes one, as the trainer does, in its precision."""
    unet = pipeline.unet.train()
    size = unet.config.sample_size
    images = torch.randn(batch_size, unet.config.in_channels, *size).contiguous(memory_format=torch.channels_last)
    batch = {"images": images, "class_labels": torch.zeros(batch_size, dtype=torch.long)}
    scheduler = AncestralDDPMScheduler.from_config(pipeline.scheduler.config)
    objective, optimizer = DenoisingObjective(scheduler, unet.null_label, "balanced"), Muon(unet, lr=0.0)
    rng = BatchRandom(0, 0, torch.arange(batch_size), batch_size)

    def step():
        with autocast(dtype):
            loss = objective(unet, batch, rng)[0]
        loss.backward()
        with autocast(dtype):
            optimizer.step()
        optimizer.zero_grad()

    return step


def median_seconds(batch_size: int) -> dict[str, float]:
    keep_freed_memory()  # as the trainer does
    steps = {name: training_step(pipeline, batch_size) for name, pipeline in pipelines.items()}
    rounds = [{name: seconds(step) for name, step in steps.items()} for _ in range(arguments.step_rounds + 2)][2:]
    for pipeline in pipelines.values():
        pipeline.unet.eval()
    ratios = torch.tensor([times["pixels"] / times["latents"] for times in rounds])
    medians = {name: torch.tensor([times[name] for times in rounds]).median().item() for name in steps}
    return medians | {"ratio": ratios.median().item()}


def reconstructions() -> torch.Tensor:
    """Of test pictures."""
    vae = pipelines["latents"].vae
    parts = torch.arange(len(test)).split(100)
    with torch.no_grad():
        parts = [vae.decode(vae.encode(test.x_0(part)).latent_dist.mode()).sample for part in parts]
    return to_uint8(torch.cat(parts) / 2 + 0.5)


times = {n: once(out / f"step-{n}.pt", median_seconds, n) for n in arguments.step_pictures}
test = load_pictures(arguments.dataset, resolution=arguments.resolution, split="test", limit=arguments.samples)
rows = [
    (f"{arguments.samples} training pictures", judge.floor),
    (f"{len(test)} test pictures", judge(test.images, test.labels)),
    ("the same, reconstructed", judge(reconstructions(), test.labels)),
]
for name, pipeline in pipelines.items():
    for scale in arguments.guidance_scales:
        request = {"guidance_scale": scale, "num_inference_steps": arguments.num_inference_steps}
        pictures = once(out / f"{name}-{scale:g}.pt", lambda: draw(pipeline, judge.labels, **request))  # noqa: B023
        judge.grid(pictures).save(out / f"{name}-{scale:g}.png")
        rows.append((f"{name}, γ = {scale:g}", judge(pictures)))

print(
    f"{arguments.dataset} at {arguments.resolution or 'its own size'}, {arguments.minutes:g} minutes each on "
    f"{torch.get_num_threads()} threads, samples of {arguments.num_inference_steps} steps\n\n"
    f"minutes with loading, encoding and saving: pixels {minutes['pixels']:.1f}, latents {minutes['latents']:.1f}\n"
)
print(f"| training step in {precision} | pixels | latents | ratio |\n|---|---|---|---|")
for n, of_step in times.items():
    pixels, latents = (f"{1000 * of_step[name]:.0f} ms" for name in ("pixels", "latents"))
    print(f"| {n} pictures | {pixels} | {latents} | {of_step['ratio']:.2f} |")
print("\n| | Fréchet distance | recognised |\n|---|---|---|")
for name, metrics in rows:
    print(f"| {name} | {metrics['frechet_distance']:.3f} | {metrics['recognised_share']} |")
