"""
What guidance buys and what it costs: a model without labels steered by a classifier, at every s, beside a model with
labels under classifier-free guidance, at every γ. Both share of samples recognised, Fréchet distance and diversity.

    python benchmarks/guidance.py --dataset ../shared/data/mnist --resolution 32 --output_dir runs/guidance
"""

from pathlib import Path

import torch
from judge import Judge, draw, once, parser, train
from matplotlib.figure import Figure

from hf_genmod import load_pipeline
from hf_genmod.data.loading import load_pictures
from hf_genmod.evaluation.features import extract_features

parser = parser(__doc__)
parser.add_argument(
    "--minutes", type=float, default=8.0, help="Training of the model with and of that without labels."
)
parser.add_argument("--classifier_minutes", type=float, default=4.0, help="Training of the classifier.")
parser.add_argument("--train_flags", nargs="*", default=[], help="More flags of the three, without their dashes.")
parser.add_argument("--num_inference_steps", type=int, default=20)
parser.add_argument("--classifier_scales", type=float, nargs="+", default=[0, 0.5, 1, 2, 4, 8, 16])
parser.add_argument("--guidance_scales", type=float, nargs="+", default=[0, 0.5, 1, 1.5, 2, 3, 5])
arguments = parser.parse_args()
out = Path(arguments.output_dir)
judge = Judge(arguments.dataset, arguments.resolution, arguments.samples, arguments.flip, out)


@torch.no_grad()
def variance_within_classes(pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """The variance of the features of the recognised pictures of a class, summed over features, mean over classes."""
    features = extract_features(pictures, judge.classifier)
    recognised = judge.classifier.head(features).argmax(dim=1) == labels
    parts = [features[recognised & (labels == label)] for label in labels.unique()]
    return torch.stack([part.var(dim=0).sum() for part in parts if len(part) > 1]).mean().item()


def table(name: str, symbol: str, folder: Path, argument: str, scales: list[float]) -> list[tuple]:
    """(scale, recognised share, Fréchet distance, part of the diversity kept) at each scale; prints them."""
    print(f"\n{name}\n\n| {symbol} | recognised | Fréchet distance | times the floor | diversity |")
    print("|---|---|---|---|---|")
    rows = []
    for scale in scales:
        request = {argument: scale, "num_inference_steps": arguments.num_inference_steps}
        file = folder.with_name(f"{folder.name}-{scale:g}.pt")
        pictures = once(file, lambda: draw(load_pipeline(folder), judge.labels, **request))  # noqa: B023
        judge.grid(pictures).save(file.with_suffix(".png"))
        metrics, labels = judge(pictures), torch.tensor(judge.labels)
        diversity = variance_within_classes(pictures, labels) / variance_of_data
        share, distance = metrics["recognised_share"], metrics["frechet_distance"]
        rows.append((scale, share.value, distance, diversity))
        print(f"| {scale:g} | {share} | {distance:.3f} | {distance / floor:.1f} | {diversity:.2f} |", flush=True)
    return rows


model, classifier, with_labels = (out / name for name in ("unconditional", "classifier", "with_labels"))
flags = [f"--{flag}" for flag in arguments.train_flags]
rates = [
    once(out / "unconditional.rate.pt", train, "train_unconditional.py", model, arguments, arguments.minutes, *flags),
    once(out / "classifier.rate.pt", train, "train_classifier.py", classifier, arguments,
         arguments.classifier_minutes, "--for_model", str(model), *flags),
    once(out / "with_labels.rate.pt", train, "train_cfg.py", with_labels, arguments, arguments.minutes, *flags),
]  # fmt: skip

floor = judge.floor["frechet_distance"]
test = load_pictures(arguments.dataset, resolution=arguments.resolution, split="test", in_memory=True)
variance_of_data = variance_within_classes(test.images, test.labels)
print(
    f"{arguments.dataset}: {arguments.minutes:g} minutes each for the model without labels ({rates[0]:.0f} images/s) "
    f"and for that with labels ({rates[2]:.0f}), {arguments.classifier_minutes:g} for the classifier "
    f"({rates[1]:.0f}), on {torch.get_num_threads()} threads; {arguments.samples} samples of "
    f"{arguments.num_inference_steps} steps. {arguments.samples} real pictures: distance {floor:.3f}, recognised "
    f"{judge.floor['recognised_share']}. Diversity is the variance of features within a class, among the "
    "recognised, as a part of that of real test pictures."
)
curves = {
    "classifier guidance, s": table(
        "Classifier guidance", "s", classifier, "classifier_scale", arguments.classifier_scales
    ),
    "classifier-free guidance, γ": table(
        "Classifier-free guidance", "γ", with_labels, "guidance_scale", arguments.guidance_scales
    ),
}

figure = Figure(figsize=(11, 5), layout="constrained")
left, right = figure.subplots(1, 2)
for (label, rows), side in zip(curves.items(), (-1, 1), strict=True):
    scales, shares, distances, diversities = zip(*rows, strict=True)
    for axes, values in ((left, distances), (right, diversities)):
        axes.plot(shares, values, marker="o", markersize=4, label=label)
        for scale, share, value in zip(scales, shares, values, strict=True):
            axes.annotate(
                f"{scale:g}",
                (share, value),
                xytext=(5 * side, 0),
                textcoords="offset points",
                fontsize=8,
                ha="right" if side < 0 else "left",
                va="center",
            )
left.axhline(floor, color="black", linewidth=1, linestyle="--", label="real pictures")
left.set(xlabel="share recognised as the class asked for", ylabel="Fréchet distance", yscale="log")
right.axhline(1, color="black", linewidth=1, linestyle="--")
right.set(xlabel="share recognised as the class asked for", ylabel="diversity, real pictures = 1")
for axes in (left, right):
    axes.grid(which="both", alpha=0.2)
figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
figure.savefig(out / "guidance.png", dpi=110)
print(f"\n{out / 'guidance.png'} shows both curves")
