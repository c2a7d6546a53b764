"""The best setting to draw by: successive halving."""

import math
from collections.abc import Callable

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from hf_genmod.errors import counted, first_line
from hf_genmod.evaluation.comparison import Comparison
from hf_genmod.evaluation.distances import kernel_distance
from hf_genmod.evaluation.draws import Draws
from hf_genmod.evaluation.estimates import with_interval
from hf_genmod.evaluation.features import extract_features
from hf_genmod.evaluation.report import setting_name
from hf_genmod.evaluation.two_samples import told_apart
from hf_genmod.processes import processes

ROUNDS = (50, 100, 200, 400)  # samples of each setting; whole files of samples, which a later round reads again
SEED = 10**6  # of the first sample, beyond those of the report
_FINALISTS = 3  # the most settings of the last of several rounds
_REAL = 1000  # training images that a round compares samples with, the same for all settings


def halve(settings: list, score: Callable[[list, int], list[float]], counts: list[int], finalists: int) -> list[list]:
    """
    Successive halving (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943): scores all settings on few
    samples, the better half of them on more, and so on.

    Args:
        settings (`list`): What is tried.
        score (`Callable`): Returns a number for each of some settings on a number of samples; less is better, and ∞
            drops a setting.
        counts (`list[int]`): The number of samples of each setting, for each round.
        finalists (`int`): The most settings of the last round, if there are several.

    Returns:
        `list[list]`: The settings of each round, the best first.
    """
    rounds, kept = [], settings
    for index, count in enumerate(counts):
        if index and count == counts[-1]:
            kept = kept[:finalists]
        scores = score(kept, count)
        order = sorted(range(len(kept)), key=scores.__getitem__)
        rounds.append([kept[i] for i in order if scores[i] < math.inf])
        kept = rounds[-1][: math.ceil(len(kept) / 2)]
    return rounds


def sweep(draws: Draws, settings: list[dict], comparison: Comparison, say: Callable[[str], None]) -> dict:
    """
    Finds the setting by which a pipeline draws best: halves the settings by the kernel distance, which is unbiased for
    few samples, until three are left, and [chooses][hf_genmod.evaluation.sweep.choose] one of these.

    Args:
        draws ([`Draws`]): As many samples as the last round takes.
        say (`Callable`): Is told what takes time.

    Returns:
        `dict`: "chosen", the setting; "seed" of the first sample; "failed", for each setting that cannot be drawn the
        reason, by its name; and "rounds", the first first, each with the number of "samples" and "settings" with their
        measures: "forward_passes" per sample, "kernel_distance" and in the last round "told_apart".

    Raises:
        ValueError: If no setting can be drawn.
    """
    needed = 1 + max(0, math.ceil(math.log2(len(settings) / _FINALISTS)))
    counts = [count for count in ROUNDS if count < draws.count][-needed + 1 :] if needed > 1 else []
    counts.append(draws.count)
    rng = torch.Generator().manual_seed(draws.seed)
    some = torch.randperm(len(comparison.pictures), generator=rng)[:_REAL]
    rounds, failed = [], {}

    def score(kept: list[dict], count: int) -> list[float]:
        tried = f"{counted(len(kept), 'setting')}, {count} samples each"
        say(f"sweep: round {len(rounds) + 1} of {len(counts)}, {tried}")
        found = []
        for setting in tqdm(kept, "Settings", leave=False, disable=None if processes().is_main_process else True):
            try:
                samples = draws.draw(setting, count)
            except ValueError as error:  # a sampler that fails in few steps, or guidance that diverges
                failed[setting_name(setting)] = first_line(error)
                found.append(None)
                continue
            measures = {"forward_passes": samples["forward_passes"]}
            if processes().is_main_process:
                real, features = comparison.of_real[some], extract_features(samples["images"], comparison.network)
                measures["kernel_distance"] = with_interval(lambda x, y=real: kernel_distance(x, y), features)
                if count == counts[-1]:
                    measures["told_apart"] = told_apart(samples["images"], comparison.real, draws.seed)
            found.append(setting | broadcast_object_list([measures])[0])
        rounds.append({"samples": count, "settings": [measured for measured in found if measured]})
        return [measured["kernel_distance"].value if measured else math.inf for measured in found]

    halve(settings, score, counts, _FINALISTS)
    if not rounds[-1]["settings"]:
        raise ValueError(f"sweep: no setting can be drawn, such as {'; '.join([*failed.items()][0])}")
    best = choose(rounds[-1]["settings"])
    chosen = next(setting for setting in settings if setting.items() <= best.items())
    return {"chosen": chosen, "seed": draws.seed, "failed": failed, "rounds": rounds}


def choose(measured: list[dict]) -> dict:
    """The setting with the fewest forward passes among those as good as the best one: whose kernel distance is within
    the 95% interval of the lowest one, and of these the interval of `told_apart` overlaps with the lowest one."""
    lowest = min((setting["kernel_distance"] for setting in measured), key=lambda estimate: estimate.value)
    close = [setting for setting in measured if setting["kernel_distance"].value <= lowest.high]
    least = min((setting["told_apart"] for setting in close), key=lambda share: share.value)
    as_good = [setting for setting in close if setting["told_apart"].low <= least.high]
    return min(as_good, key=lambda setting: (setting["forward_passes"], setting["kernel_distance"].value))


def last_measures(sweep: dict) -> list[dict]:
    """The measures of each setting in its last round, with its number of "samples", sorted by round, the last first,
    and then by kernel distance. Settings that could not be drawn in a later round are left out."""
    found = {}
    for of_round in reversed(sweep["rounds"]):
        for setting in sorted(of_round["settings"], key=lambda setting: setting["kernel_distance"].value):
            if setting_name(setting) not in sweep["failed"]:
                found.setdefault(setting_name(setting), setting | {"samples": of_round["samples"]})
    return list(found.values())


def sweep_table(sweep: dict) -> list[list[str]]:
    """The rows of a table with the kernel distance of each setting in each round, below a row of headings."""
    rounds = [
        (of_round["samples"], {setting_name(x): x for x in of_round["settings"]}) for of_round in sweep["rounds"]
    ]
    rows = [["", *(f"{count} samples" for count, _ in rounds), "told apart", "forward passes"]]
    for setting in last_measures(sweep):
        name, apart = setting_name(setting), setting.get("told_apart")
        distances = [found[name]["kernel_distance"].interval if name in found else "" for _, found in rounds]
        rows.append([name, *distances, apart.interval if apart else "", f"{setting['forward_passes']:.0f}"])
    return rows + [[name, reason, *[""] * (len(rounds) + 1)] for name, reason in sweep["failed"].items()]
