"""Loss, accuracy and guidance curves, as PNG files."""

import math
import re
from pathlib import Path

import numpy as np

SYMBOLS = {"guidance_scale": "γ", "classifier_scale": "s", "autoguidance_scale": "w"}


def draw_losses(lines: list[dict], file: Path):
    """Draws the training loss and, if there is any, the held-out loss of the lines of `metrics.jsonl` over the steps.
    Scales are logarithmic; that of losses is linear if one falls below zero."""
    from matplotlib import colormaps, ticker  # slow to import

    figure, axes = _figure()
    for name in sorted({name for line in lines for name, value in line.items() if value is not None}):
        if name == "loss":
            label, style = "training", {"color": "tab:blue", "linewidth": 1}
        elif name == "validation_loss":
            label, style = "held-out images", {"color": "black", "linewidth": 2, "marker": "."}
        elif match := re.fullmatch(r"validation_loss_(\d\.\d)_(\d\.\d)", name):
            label = "held out, t/T from {} to {}".format(*match.groups())
            style = {"color": colormaps["plasma"](float(match[1])), "linewidth": 1, "marker": "."}
        else:
            continue
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        points = evenly_on_a_log_axis(points)
        style |= {"marker": "."} if len(points) == 1 else {}  # a line of one point has no length
        axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss", xscale="log")
    if all(y > 0 for line in axes.lines for y in line.get_ydata()):  # a likelihood of real values may not be
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 3, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(which="both", alpha=0.2)
    figure.legend(loc="outside right upper")
    _save(figure, file)


def evenly_on_a_log_axis(points: list, most: int = 4000) -> list:
    """All points of a curve, or about as many as can be seen of a longer one: the first, the last, and those between
    whose places have even logarithms."""
    if len(points) <= most:
        return points
    places = np.geomspace(1, len(points), most).round().astype(int) - 1
    return [points[place] for place in np.unique(places)]


def draw_accuracy(levels: list[dict], chance: float, file: Path):
    """Draws the accuracy of a classifier over the timesteps, as `accuracy_by_noise_level` returns it, with 95%
    intervals, and the accuracy of guessing."""
    figure, axes = _figure()
    t, shares = [level["t"] for level in levels], [level["accuracy"] for level in levels]
    axes.fill_between(t, [share.low for share in shares], [share.high for share in shares], alpha=0.2, linewidth=0)
    axes.plot(t, [share.value for share in shares], marker=".", label=f"{shares[0].count} held-out images")
    axes.axhline(chance, color="black", linewidth=1, linestyle="--", label="chance")
    axes.set(xlabel="timestep t", ylabel="share recognised", ylim=(0, 1.02))
    above = axes.secondary_xaxis("top")
    above.set_xticks(t, [f"{level['sigma']:.2g}" for level in levels])
    above.set_xlabel("noise level σ")
    axes.grid(alpha=0.2)
    figure.legend(loc="outside lower right")
    _save(figure, file)


def draw_guidance(settings: list[dict], scale: str, file: Path):
    """Draws Fréchet distance, share recognised and recall of the settings of a report over the strength of guidance,
    the argument `scale`; settings with one sampler and number of steps are one line."""
    panels = {"frechet_distance": "Fréchet distance", "recognised_share": "share recognised", "recall": "recall"}
    panels = {name: label for name, label in panels.items() if all(name in setting for setting in settings)}
    figure, axes = _figure(len(panels))
    lines = {}
    for setting in sorted(settings, key=lambda setting: setting[scale]):
        name = f"{setting['sampler'].removesuffix('Scheduler')}, {setting['num_inference_steps']} steps"
        lines.setdefault(name, []).append(setting)
    for panel, (name, label) in zip(axes, panels.items(), strict=True):
        for line, of_line in lines.items():
            values = [setting[name] for setting in of_line]
            errors = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
            x = [setting[scale] for setting in of_line]
            panel.errorbar(x, [v.value for v in values], errors, marker=".", capsize=3, label=line)
        panel.set(xlabel=scale.replace("_", " "), ylabel=label)
        panel.grid(alpha=0.2)
    axes[0].legend()
    _save(figure, file)


def draw_sweep(settings: list[dict], chosen: dict, file: Path):
    """Draws the kernel distance of the settings of a sweep over their forward passes, with 95% intervals; a panel for
    each sampler, a line for each strength of guidance. The points of settings with the most "samples" are filled. A
    ring marks the setting that holds all of `chosen`."""
    from matplotlib import colormaps, ticker  # slow to import

    samplers = list(dict.fromkeys(setting["sampler"] for setting in settings))
    figure, axes = _figure(len(samplers), sharey=True)
    names = [name for name in SYMBOLS if name in settings[0]]

    def strength(setting):
        return tuple(setting[name] for name in names)

    scales, most = sorted(set(map(strength, settings))), max(x["samples"] for x in settings)
    distances = [setting["kernel_distance"] for setting in settings]
    error = min(v.high - v.value for v, setting in zip(distances, settings, strict=True) if setting["samples"] == most)
    apart = {value: 1.03 ** (i - len(scales) / 2) for i, value in enumerate(scales)}  # so that none hides another
    for panel, sampler in zip(axes, samplers, strict=True):
        for i, value in enumerate(scales):
            of_line = [x for x in settings if x["sampler"] == sampler and strength(x) == value]
            of_line.sort(key=lambda setting: setting["forward_passes"])
            color = colormaps["viridis"](i / max(1, len(scales) - 0.5))
            x, y = [apart[value] * x["forward_passes"] for x in of_line], [x["kernel_distance"] for x in of_line]
            errors = [[v.value - v.low for v in y], [v.high - v.value for v in y]]
            label = ", ".join(f"{SYMBOLS[name]} = {x:g}" for name, x in zip(names, value, strict=True)) or None
            panel.errorbar(x, [v.value for v in y], errors, color=color, linewidth=1, capsize=2, label=label)
            faces = [color if setting["samples"] == most else "white" for setting in of_line]
            panel.scatter(x, [v.value for v in y], 22, color=faces, edgecolors=[color], zorder=3)
        for best in (x for x in settings if x["sampler"] == sampler and chosen.items() <= x.items()):
            x = apart[strength(best)] * best["forward_passes"]
            panel.scatter(x, best["kernel_distance"].value, 130, "none", edgecolors="tab:red",
                          linewidths=1.5, zorder=4, label="chosen")  # fmt: skip
        panel.set(title=sampler.removesuffix("Scheduler").removesuffix("Multistep"), xscale="log")
        panel.set(xlabel="forward passes for each sample")
        if min(v.low for v in distances) > 0:
            panel.set_yscale("log")
        else:  # an unbiased estimate of a small distance may be below 0
            panel.axhline(0, color="black", linewidth=0.5)
            panel.set_yscale("symlog", linthresh=10 ** math.ceil(math.log10(max(error, 1e-9))))
            panel.set_ylim(bottom=min(0, min(v.value for v in distances)) - error)
        ticks = sorted({setting["forward_passes"] for setting in settings})
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.grid(alpha=0.2)
    axes[0].set(ylabel="kernel distance")
    for face, text in (("grey", f"{most} samples"), ("white", "fewer samples")):
        if face == "grey" or any(setting["samples"] < most for setting in settings):
            axes[0].scatter([], [], 22, color=face, edgecolors="grey", label=text)
    handles = {text: x for panel in axes for x, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside right upper")
    _save(figure, file)


def _figure(num_panels: int | None = None, **options):
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(9, 5) if num_panels is None else (4 * num_panels, 4), layout="constrained")
    if num_panels is None:
        return figure, figure.subplots()
    return figure, figure.subplots(1, num_panels, squeeze=False, **options)[0]


def _save(figure, file: Path):
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(file)
