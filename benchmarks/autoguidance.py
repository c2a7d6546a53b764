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
parser.add_argument("--interval", type=float, nargs=2, default=[0.3, 3.0], help="σ where guidance is on.")
parser.add_argument("--num_inference_steps", type=int, default=20)
arguments = parser.parse_args()
out, steps = Path(arguments.output_dir), arguments.num_inference_steps
judge = Judge(arguments.dataset, arguments.resolution, arguments.samples, arguments.flip, out)
path = out / "with_labels"
if not (path / "model_index.json").is_file():
    states = ["--checkpointing_steps", str(min(arguments.snapshots)), "--checkpoints_total_limit", "999"]
    flags = [*states, *(f"--{flag}" for flag in arguments.train_flags)]
    train("train_cfg.py", path, arguments, arguments.minutes, *flags)
pipeline = load_pipeline(path)
classifier_free, real = pipeline._classifier_free_guidance, extract_features(judge.train.images, judge.classifier)


def snapshot(step: int) -> torch.nn.Module:
    """The U-Net with the average of the weights after a step."""
    file = path / "checkpoints" / f"step-{step}" / "state.pt"
    state = torch.load(file, map_location="cpu", weights_only=True)["averaged_model"]
    unet = copy.deepcopy(pipeline.unet)
    unet.load_state_dict({name.removeprefix("module."): state[name] for name in state.keys() - {"n_averaged"}})
    return unet.eval()


def autoguidance(weak: torch.nn.Module, w: float):
    """In the place of classifier-free guidance: guided where γ is on, at all γ but 1."""

    def predict(x_t, t, labels, gamma):
        prediction = classifier_free(x_t, t, labels, 1.0)
        if gamma == 1:
            return prediction
        prediction_weak = weak(x_t, t, class_labels=labels.label).sample
        return prediction_weak + w * (prediction - prediction_weak)

    return predict


def row(name: str, **options) -> None:
    images = draw(pipeline, judge.labels, num_inference_steps=steps, **options)
    metrics, found = judge(images), evaluate_features(extract_features(images, judge.classifier), real)
    shares = [metrics["recognised_share"], found["precision"], found["recall"]]
    cells = [name, f"{metrics['frechet_distance']:.2f}", *(f"{share.value:.1%}" for share in shares)]
    print(f"| {' | '.join(cells)} |", flush=True)


low, high = arguments.interval
print(f"{len(judge.labels)} samples in {steps} steps; real images: {judge.floor['frechet_distance']:.2f}\n")
print("| | Fréchet distance | recognised | precision | recall |\n|---|---|---|---|---|")
for gamma in arguments.guidance_scales:
    row(f"γ = {gamma:g}", guidance_scale=gamma)
    if gamma != 1:
        row(f"γ = {gamma:g}, σ in {low:g} to {high:g}", guidance_scale=gamma, guidance_interval=(low, high))
for step in arguments.snapshots:
    weak = snapshot(step)
    for w in arguments.weights:
        pipeline._classifier_free_guidance = autoguidance(weak, w)
        row(f"step {step:,}, w = {w:g}", guidance_scale=2.0)
        row(f"step {step:,}, w = {w:g}, σ in {low:g} to {high:g}", guidance_scale=2.0, guidance_interval=(low, high))
