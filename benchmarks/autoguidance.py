"""
What guidance by an earlier version of the model itself buys (autoguidance, Karras et al. 2024,
https://arxiv.org/abs/2406.02507), beside classifier-free guidance at γ: with D_w the average of the weights after few
of the training steps,

    D̃ = D_w + w (D − D_w),    both with the class

    python benchmarks/autoguidance.py --dataset ../shared/data/mnist --resolution 32 --output_dir runs/autoguidance
"""

import copy
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from judge import Judge, draw, parser, train

from hf_genmod import load_pipeline
from hf_genmod.evaluation.comparison import evaluate_features
from hf_genmod.evaluation.features import extract_features

parser = parser(__doc__)
parser.add_argument("--minutes", type=float, default=8.0, help="Training of the model.")
parser.add_argument("--train_flags", nargs="*", default=[], help="More flags of it, without their dashes.")
parser.add_argument("--snapshots", type=int, nargs="+", default=[500], help="Steps of D_w; multiples of the smallest.")
parser.add_argument("--weights", type=float, nargs="+", default=[1.5, 2.0], help="w.")
parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 1.25, 1.5], help="γ.")
parser.add_argument("--interval", type=float, nargs=2, default=[0.3, 3.0], help="σ where γ is on, too.")
parser.add_argument("--num_inference_steps", type=int, default=20)
parser.add_argument("--guided_steps", type=int, nargs="+", default=[20, 15], help="Steps with D_w, of two passes.")
parser.add_argument("--deterministic", action="store_true", help="Draw by DPM-Solver++ 2M of the ODE.")
arguments = parser.parse_args()
out, steps = Path(arguments.output_dir), arguments.num_inference_steps
judge = Judge(arguments.dataset, arguments.resolution, arguments.samples, arguments.flip, out)
path = out / "with_labels"
if not (path / "model_index.json").is_file():
    states = ["--checkpointing_steps", str(min(arguments.snapshots)), "--checkpoints_total_limit", "999"]
    flags = [*states, *(f"--{flag}" for flag in arguments.train_flags)]
    train("train_cfg.py", path, arguments, arguments.minutes, *flags)
pipeline = load_pipeline(path)
if arguments.deterministic:
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.config.process)
real = extract_features(judge.train.images, judge.classifier)


def snapshot(step: int) -> torch.nn.Module:
    """The U-Net with the average of the weights after a step."""
    file = path / "checkpoints" / f"step-{step}" / "state.pt"
    state = torch.load(file, map_location="cpu", weights_only=True)["averaged_model"]
    unet = copy.deepcopy(pipeline.unet)
    unet.load_state_dict({name.removeprefix("module."): state[name] for name in state.keys() - {"n_averaged"}})
    return unet.eval()


def row(name: str, num_inference_steps: int = steps, **options) -> None:
    images = draw(pipeline, judge.labels, num_inference_steps=num_inference_steps, **options)
    metrics, found = judge(images), evaluate_features(extract_features(images, judge.classifier), real)
    shares = [metrics["recognised_share"], found["precision"], found["recall"]]
    cells = [name, str(num_inference_steps), f"{metrics['frechet_distance']:.2f}"]
    print(f"| {' | '.join([*cells, *(f'{share.value:.1%}' for share in shares)])} |", flush=True)


low, high = arguments.interval
print(f"{len(judge.labels)} samples; real images: {judge.floor['frechet_distance']:.2f}\n")
print("| | steps | Fréchet distance | recognised | precision | recall |\n|---|---|---|---|---|---|")
for gamma in arguments.guidance_scales:
    row(f"γ = {gamma:g}", guidance_scale=gamma)
    if gamma != 1:
        row(f"γ = {gamma:g}, σ in {low:g} to {high:g}", guidance_scale=gamma, guidance_interval=(low, high))
for step in arguments.snapshots:
    pipeline.register_modules(guiding_unet=snapshot(step))
    for w in arguments.weights:
        for guided_steps in arguments.guided_steps:
            row(f"step {step:,}, w = {w:g}", guided_steps, guidance_scale=1.0, autoguidance_scale=w)
