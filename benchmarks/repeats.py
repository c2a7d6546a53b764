"""
Do two reports of one model, by other seeds, agree? Counts of how many pairs the 95% intervals of a measure overlap,
and how many samples are told apart from images: their interval is above 50%.

    OMP_NUM_THREADS=1 python benchmarks/repeats.py --dataset data/cats_dogs32 --resolution 32 --pairs 40

Three kinds of samples, which cost nothing to draw, take the place of a model: images that no network has learned from,
which should not be told apart; the same with noise of one grey level, which a judge hardly sees; and Gaussian
combinations of principal components, blurred and wrong, as of a model that was trained for minutes.
"""

from collections import Counter

import torch
from judge import Judge, parser

from hf_genmod.evaluation.comparison import evaluate_features
from hf_genmod.evaluation.features import extract_features
from hf_genmod.evaluation.recognition import recognised
from hf_genmod.evaluation.two_samples import told_apart


def held_out(pool: torch.Tensor, labels: torch.Tensor, count: int, rng: torch.Generator):
    chosen = torch.randperm(len(pool), generator=rng)[:count]
    return pool[chosen], labels[chosen]


def noisy(pool: torch.Tensor, labels: torch.Tensor, count: int, rng: torch.Generator):
    images, labels = held_out(pool, labels, count, rng)
    return (images + torch.randn(images.shape, generator=rng)).round().clamp(0, 255).byte(), labels


def components(pool: torch.Tensor, labels: torch.Tensor, count: int, rng: torch.Generator, rank: int = 200):
    x = pool.flatten(1).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, s, v = torch.svd_lowrank(x - x.mean(0), q=rank, niter=4)
    z = torch.randn(count, rank, generator=rng) * s / len(x) ** 0.5
    samples = (x.mean(0) + z @ v.T).round().clamp(0, 255).byte().view(count, *pool.shape[1:])
    return samples, labels[torch.randperm(len(labels), generator=rng)[:count]]


KINDS = {draw.__name__: draw for draw in (held_out, noisy, components)}


def report(judge: Judge, real, of_real, samples, labels, seed: int) -> dict:
    features = extract_features(samples, judge.classifier)
    found = recognised(judge.classifier, samples, labels, judge.train.label_names)
    measures = {"told_apart": told_apart(samples, real, seed), **evaluate_features(features, of_real)}
    return measures | {"recognised_share": found["recognised_share"]}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--pairs", type=int, default=40)
    arguments.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    arguments = arguments.parse_args()
    judge = Judge(arguments.dataset, arguments.resolution, arguments.samples, arguments.flip, arguments.output_dir)
    order = torch.randperm(len(judge.train), generator=torch.Generator().manual_seed(0))
    trained, others = order[: len(order) // 2], order[len(order) // 2 :]
    real = judge.train.images[trained]
    of_real = extract_features(real, judge.classifier)
    pool, labels = judge.train.images[others], judge.train.labels[others]
    for kind in arguments.kinds:
        met, values, told = Counter(), {}, 0
        for pair in range(arguments.pairs):
            first, second = (
                report(judge, real, of_real, *KINDS[kind](pool, labels, arguments.samples, rng), rng.initial_seed())
                for rng in (torch.Generator().manual_seed(2 * pair + i) for i in (1, 2))
            )
            for name, estimate in first.items():
                met[name] += estimate.low <= second[name].high and second[name].low <= estimate.high
                values.setdefault(name, []).extend([estimate.value, second[name].value])
            told += sum(one["told_apart"].low > 0.5 for one in (first, second))
            print(f"{pair + 1} pairs: {dict(met)}, {told} samples told apart", flush=True)
        print(f"\n{told} of {2 * arguments.pairs} samples of the kind {kind} are told apart from images\n")
        print("| measure | intervals of pairs that overlap | lowest | highest |\n|---|---|---|---|")
        for name, seen in values.items():
            print(f"| {name} | {met[name]} of {arguments.pairs} | {min(seen):.3g} | {max(seen):.3g} |", flush=True)


if __name__ == "__main__":
    main()
