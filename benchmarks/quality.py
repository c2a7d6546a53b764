"""
What a budget of minutes buys: `train_cfg.py` by its defaults, against a U-Net of diffusers of about the same cost in
parameters (class embedding with a null row) trained in two ways: as rectified flow by a strong recipe, and by the
recipe of diffusers' unconditional example.

    python benchmarks/quality.py --dataset ../shared/data/mnist --resolution 32 --minutes 8 --output_dir runs/mnist
"""

import itertools
import math
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from judge import Judge, draw, once, parser, to_uint8, train
from torch.optim.swa_utils import AveragedModel

from hf_genmod import load_pipeline
from hf_genmod.processes import multiplies_in_bf16

parser = parser(__doc__)
parser.add_argument("--minutes", type=float, default=8.0, help="Training time of each model.")
parser.add_argument(
    "--num_inference_steps", type=int, nargs="+", default=[10, 20], help="Steps of ours; diffusers takes 50."
)
parser.add_argument(
    "--learning_rates", type=float, nargs="+", default=[1e-4, 1e-3], help="Those of diffusers' recipe."
)
arguments = parser.parse_args()
out = Path(arguments.output_dir)
judge = Judge(arguments.dataset, arguments.resolution, arguments.samples, arguments.flip, out)
label_names = judge.train.label_names


def train_ours() -> float:
    """Trains to `out`/hf_genmod; returns the pictures seen per second."""
    return train("train_cfg.py", out / "hf_genmod", arguments, arguments.minutes)


def their_unet() -> UNet2DModel:
    """The U-Net of diffusers, with the same weights at each call."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=judge.train.resolution,
        in_channels=judge.train.channels,
        out_channels=judge.train.channels,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=len(label_names) + 1,
    )


def train_steps(unet, optimizer, learning_rate: float, warmup_steps: int, loss_of, after_step, batch_size=64) -> float:
    """Steps for the minutes of the budget, with a cosine to zero and gradients clipped to 1; labels are dropped with
    probability 0.1. Returns the images per second."""
    started, step, fraction = time.perf_counter(), 0, 0.0
    while fraction < 1:
        for group in optimizer.param_groups:
            warmup = min(1, (step + 1) / warmup_steps)
            group["lr"] = learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * fraction))
        index = torch.randint(len(judge.train), (batch_size,))
        images, labels = judge.train.x_0(index), judge.train.labels[index]
        labels = labels.masked_fill(torch.rand(batch_size) < 0.1, len(label_names))
        loss_of(images, labels).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        after_step(step)
        fraction = (time.perf_counter() - started) / (60 * arguments.minutes)
    return step * batch_size / (time.perf_counter() - started)


def train_tutorial(folder: Path, learning_rate: float) -> float:
    """AdamW (betas 0.95 and 0.999, weight decay 1e-6), 500 steps of warm-up, EMA with its own warm-up, ε-prediction on
    the default schedule."""
    unet, scheduler = their_unet(), DDPMScheduler()
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, betas=(0.95, 0.999), weight_decay=1e-6)

    def loss_of(images, labels):
        noise, t = torch.randn_like(images), torch.randint(1000, (len(images),))
        prediction = unet(scheduler.add_noise(images, noise, t), t, class_labels=labels).sample
        return torch.nn.functional.mse_loss(prediction, noise)

    rate = train_steps(unet, optimizer, learning_rate, 500, loss_of, lambda step: ema.step(unet.parameters()))
    ema.copy_to(unet.parameters())
    unet.save_pretrained(folder)
    return rate


def train_flow(folder: Path, learning_rate: float = 2e-3) -> float:
    """Rectified flow (Liu et al. 2022, https://arxiv.org/abs/2209.03003) with logit-normal times (Esser et al. 2024,
    https://arxiv.org/abs/2403.03206): x_s = (1 − s) x_0 + s ε, s = sigmoid(N(0, 1)), ‖ε − x_0 − v(x_s, 1000 s)‖².
    AdamW (betas 0.9 and 0.99), 100 steps of warm-up, an EMA over the last twentieth of the steps, bf16 where that is
    fast."""
    unet = their_unet().to(memory_format=torch.channels_last)
    average = AveragedModel(unet, avg_fn=lambda mean, new, n: mean + (new - mean) / max(1.0, 0.05 * float(n)))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)
    in_bf16 = multiplies_in_bf16(torch.device("cpu"))

    def loss_of(images, labels):
        noise, s = torch.randn_like(images), torch.randn(len(images)).sigmoid()
        x_s = torch.lerp(images, noise, s[:, None, None, None]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            velocity = unet(x_s, 1000 * s, class_labels=labels).sample
        return torch.nn.functional.mse_loss(velocity.float(), noise - images)

    rate = train_steps(unet, optimizer, learning_rate, 100, loss_of, lambda step: average.update_parameters(unet))
    average.module.save_pretrained(folder)
    return rate


@torch.no_grad()
def draw_flow(folder: Path, kind: str, passes: int, batch_size: int = 100) -> torch.Tensor:
    """Images by the ODE dx/ds = v from s = 1 to 0, by Euler's or Heun's method in so many forward passes at most."""
    unet, rng = UNet2DModel.from_pretrained(folder).eval(), torch.Generator().manual_seed(0)
    steps = passes if kind == "Euler" else (passes + 1) // 2  # the last step of Heun's method is one of Euler's
    times, pictures = torch.linspace(1, 0, steps + 1).tolist(), []
    for labels in torch.tensor(judge.labels).split(batch_size):
        x = torch.randn(len(labels), judge.train.channels, *judge.train.resolution, generator=rng)
        for s, after in itertools.pairwise(times):
            velocity = unet(x, 1000 * s, class_labels=labels).sample
            if kind == "Heun" and after > 0:
                second = unet(x + (after - s) * velocity, 1000 * after, class_labels=labels).sample
                velocity = (velocity + second) / 2
            x = x + (after - s) * velocity
        pictures.append(x)
    return to_uint8(torch.cat(pictures) / 2 + 0.5)


@torch.no_grad()
def draw_tutorial(folder: Path, scheduler, batch_size: int = 100) -> torch.Tensor:
    unet = UNet2DModel.from_pretrained(folder).eval()
    scheduler.set_timesteps(50)
    rng = torch.Generator().manual_seed(0)
    pictures = []
    for labels in torch.tensor(judge.labels).split(batch_size):
        x_t = torch.randn(len(labels), judge.train.channels, *judge.train.resolution, generator=rng)
        for t in scheduler.timesteps:
            x_t = scheduler.step(unet(x_t, t, class_labels=labels).sample, t, x_t, generator=rng).prev_sample
        pictures.append(x_t)
    return to_uint8(torch.cat(pictures) / 2 + 0.5)


def draw_ours(folder: Path, guidance_scale: float, steps: int) -> torch.Tensor:
    return draw(load_pipeline(folder), judge.labels, guidance_scale=guidance_scale, num_inference_steps=steps)


rows = []  # name, images/s, pictures
folder = out / "hf_genmod"
rate = once(out / "hf_genmod.rate.pt", train_ours)
for guidance_scale in (1.0, 2.0):
    for steps in arguments.num_inference_steps:
        name = f"hf_genmod, γ = {guidance_scale:g}, {steps} steps"
        file = out / f"hf_genmod-{guidance_scale:g}-{steps}.pt"
        rows.append((name, rate, once(file, draw_ours, folder, guidance_scale, steps)))
folder = out / "diffusers-flow"
rate = once(out / "diffusers-flow.rate.pt", train_flow, folder)
for kind in ("Euler", "Heun"):
    for passes in (max(arguments.num_inference_steps), 50):
        name = f"diffusers, rectified flow, {kind}, {passes} passes"
        rows.append((name, rate, once(out / f"diffusers-flow-{kind}-{passes}.pt", draw_flow, folder, kind, passes)))
for learning_rate in arguments.learning_rates:
    folder = out / f"diffusers-{learning_rate:g}"
    rate = once(out / f"{folder.name}.rate.pt", train_tutorial, folder, learning_rate)
    for scheduler in (DDPMScheduler(), DDIMScheduler()):
        sampler = type(scheduler).__name__.removesuffix("Scheduler")
        file = folder.with_name(f"{folder.name}-{sampler}.pt")
        rows.append(
            (f"diffusers, rate {learning_rate:g}, {sampler}", rate, once(file, draw_tutorial, folder, scheduler))
        )

size = arguments.resolution or "its own size"
lines = [
    f"{arguments.dataset} at {size}, {arguments.minutes:g} minutes each on {torch.get_num_threads()} threads; "
    f"{arguments.samples} samples, of one forward pass a step (two at γ ≠ 1), diffusers' of 50 steps. "
    f"The judging classifier is right on {judge.accuracy} of real test pictures.",
    "",
    "| model | images/s | Fréchet distance | times the floor | recognised |",
    "|---|---|---|---|---|",
]
floor = judge.floor["frechet_distance"]
lines.append(f"| {arguments.samples} real training pictures | | {floor:.3f} | 1 | {judge.floor['recognised_share']} |")
distances = {}
for name, rate, pictures in rows:
    metrics = judge(pictures)
    distances[name] = metrics["frechet_distance"]
    lines.append(
        f"| {name} | {rate:.0f} | {distances[name]:.3f} | {distances[name] / floor:.1f} | "
        f"{metrics['recognised_share']} |"
    )
    judge.grid(pictures).save(out / f"{name.replace(', ', '-').replace(' ', '-')}.png")
ours = min(distance for name, distance in distances.items() if name.startswith("hf_genmod, γ = 1,"))
theirs = min(distance for name, distance in distances.items() if name.startswith("diffusers"))
lines += ["", f"At γ = 1, {ours / theirs:.3f} of the least distance of diffusers."]
(out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
print("\n".join(lines))
