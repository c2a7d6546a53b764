"""Pictures of numbers."""

from pathlib import Path


def draw_losses(lines: list[dict], file: Path):
    """
    Draws the losses of training and, if there are any, of held-out pictures over the steps, on logarithmic scales.

    Args:
        lines (`list[dict]`): Lines of metrics.jsonl.
        file (`Path`): PNG to write.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib import colormaps  # optional, and slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    names = {name for line in lines for name in line if name == "loss" or name.startswith("validation_loss")}
    for name in sorted(names):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            if name == "loss":
                label, style = "training", {"color": "tab:blue", "linewidth": 1}
            elif name == "validation_loss":
                label, style = "held-out pictures", {"color": "black", "linewidth": 2, "marker": "."}
            else:
                low, high = name.split("_")[-2:]
                label = f"held out, t/T from {low} to {high}"
                style = {"color": colormaps["plasma"](float(low)), "linewidth": 1, "marker": "."}
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss", xscale="log", yscale="log")
    axes.grid(which="both", alpha=0.2)
    figure.legend(loc="outside right upper")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(file)
