"""
How well a model completes, inverts and interpolates held-out images, given their classes or without labels. Completed
images have their lower half drawn anew, beside plain replacement (the known part is pasted into x_t with noise of its
level) and beside real images completed by the lower half of the training image with the nearest upper half.

    python benchmarks/editing.py --dataset ../shared/data/mnist --output_dir runs/editing --samples 500
"""

import math
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from judge import Judge, parser, to_uint8, train

from hf_genmod import load_pipeline
from hf_genmod.data.loading import load_pictures
from hf_genmod.editing import edits
from hf_genmod.evaluation.distances import frechet_distance
from hf_genmod.evaluation.estimates import Share
from hf_genmod.evaluation.features import extract_features

parser = parser(__doc__)
parser.add_argument("--minutes", type=float, default=8.0, help="Training of the model.")
parser.add_argument("--num_inference_steps", type=int, default=20)
parser.add_argument("--inverted", type=int, default=100, help="Images to invert, and pairs to interpolate.")
parser.add_argument("--without_labels", action="store_true", help="Measure a model without labels.")
parser.add_argument("--num_resample", type=int, nargs="+", default=[1, 5], help="How often a step is taken.")
parser.add_argument("--train_flags", nargs="*", default=[], help="More flags of it, without their dashes.")
arguments = parser.parse_args()
out, flags = Path(arguments.output_dir), [f"--{flag}" for flag in arguments.train_flags]
judge = Judge(arguments.dataset, arguments.resolution, 1000, arguments.flip, out)
test = load_pictures(arguments.dataset, resolution=arguments.resolution, split="test", in_memory=True)
chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: arguments.samples]
images, labels = test.images[chosen], test.labels[chosen]
x = images.float() / 255
middle = x.shape[2] // 2
mask = torch.zeros(x.shape[2:])
mask[middle:] = 1
kinds = ("with_labels", "train_cfg.py"), ("without_labels", "train_unconditional.py")
name, example = kinds[arguments.without_labels]
path = out / name
if not (path / "model_index.json").is_file():
    train(example, path, arguments, arguments.minutes, *flags)
pipeline = load_pipeline(path)
pipeline.set_progress_bar_config(disable=True)


def asked(labels: torch.Tensor) -> dict[str, list]:
    """The arguments that ask for images of some classes."""
    return {} if arguments.without_labels else {"class_labels": labels.tolist()}


def recognised(shown: torch.Tensor) -> torch.Tensor:
    """The class that the judge sees in each image, (n,)."""
    with torch.no_grad():
        return judge.classifier.head(extract_features(shown, judge.classifier)).argmax(dim=1)


def row(name: str, shown: torch.Tensor, seconds: float | None = None) -> None:
    own = Share.of(recognised(shown) == labels)
    distance = frechet_distance(extract_features(shown, judge.classifier), judge.real)
    print(f"| {name} | {own} | {distance:.2f} | {'' if seconds is None else f'{seconds:.2f}'} |", flush=True)


def in_parts(draw, *parts: torch.Tensor) -> torch.Tensor:
    """What `draw` makes of 50 images at a time."""
    return torch.cat([draw(*some) for some in zip(*(part.split(50) for part in parts), strict=True)])


def replacing(y, known, predict, prediction_type):
    """Plain replacement, with the same noise in all steps."""
    epsilon = torch.randn_like(y)

    def predict_replaced(x_t, t, sigma):
        level = min(sigma, 1e6)
        return predict(torch.where(known, (y + level * epsilon) / math.hypot(1, level), x_t), t, sigma)

    return predict_replaced


def completed(**options) -> tuple[torch.Tensor, float]:
    """Images with their lower half drawn anew, and seconds of each."""
    start = time.perf_counter()

    def draw(x, labels, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        request = {"image": x, "mask_image": mask, "generator": generators, "output_type": "pt"} | options
        return pipeline(**asked(labels), num_inference_steps=arguments.num_inference_steps, **request).images

    drawn = in_parts(draw, x, labels, torch.arange(len(x)))
    assert torch.equal(drawn[:, :, :middle], x[:, :, :middle])  # what is kept, bitwise
    return to_uint8(drawn), (time.perf_counter() - start) / len(x)


def psnr(drawn: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Of each image, in dB."""
    return -10 * torch.log10((drawn - image).square().flatten(1).mean(dim=1).clamp(min=1e-10))


print(f"{len(x)} held-out images of {arguments.dataset}, {arguments.num_inference_steps} steps, lower half drawn\n")
print("| | recognised as its class | Fréchet distance | seconds |\n|---|---|---|---|")
row("real images", images)
upper = judge.train.images[:, :, :middle].flatten(1).float()
nearest = in_parts(lambda part: torch.cdist(part[:, :, :middle].flatten(1).float(), upper).argmin(dim=1), images)
row("completed by the nearest", torch.cat([images[:, :, :middle], judge.train.images[nearest][:, :, middle:]], dim=2))
of_known = edits.denoiser_given
with_class = {"its class, γ = 2": {"guidance_scale": 2.0}, "its class, γ = 1": {"guidance_scale": 1.0}}
for name, options in ({"without labels": {}} if arguments.without_labels else with_class).items():
    for num_resample in arguments.num_resample:
        row(f"{name}, num_resample {num_resample}", *completed(num_resample=num_resample, **options))
    edits.denoiser_given = replacing
    row(f"{name}, plain replacement", *completed(num_resample=1, **options))
    edits.denoiser_given = of_known

print("\n| | steps | images | mean PSNR, dB | lowest |\n|---|---|---|---|---|")
some, of_some = x[: arguments.inverted], labels[: arguments.inverted]
process = {"timestep_spacing": "trailing", "thresholding": True, "sample_max_value": 1.0}
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.config.process, **process)
off = {} if arguments.without_labels else {"guidance_scale": 1.0}
for corrections in (0, 1, 8):

    def again(x, labels, corrections=corrections):
        request = {**asked(labels), **off, "num_inference_steps": 50}
        x_T = pipeline.invert(x, num_corrections=corrections, **request)
        count = {"batch_size": len(x)} if arguments.without_labels else {}
        return pipeline(**request, **count, latents=x_T, output_type="pt").images

    found = psnr(in_parts(again, some, of_some), some)
    print(f"| {corrections} corrections | 50 | {len(some)} | {found.mean():.1f} | {found.min():.1f} |", flush=True)

between, ends, count = [], [], 0
num = 8
for a, b, first, second in zip(x[0::2], x[1::2], labels[0::2].tolist(), labels[1::2].tolist(), strict=False):
    if first == second or count == arguments.inverted // 4:
        continue
    image_a, image_b = (image.permute(1, 2, 0).numpy() for image in (a, b))
    shown = pipeline.interpolate(
        image_a, image_b, num, **asked(torch.tensor([first, second])), output_type="pt"
    ).images
    ends += psnr(shown[[0, -1]], torch.stack([a, b])).tolist()
    seen = recognised(to_uint8(shown[1:-1]))
    between, count = [*between, (seen == first) | (seen == second)], count + 1
share = Share.of(torch.cat(between))
print(
    f"\n{count} pairs of two classes: ends at {sum(ends) / len(ends):.1f} dB; between them {share} are one of the two"
)
