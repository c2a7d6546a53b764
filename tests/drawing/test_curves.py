"""Figures of curves."""

import numpy as np
import pytest
from PIL import Image

from hf_genmod.drawing.curves import draw_losses, draw_sweep, evenly_on_a_log_axis
from hf_genmod.evaluation.estimates import Estimate


@pytest.mark.parametrize("name, color", [("loss", (31, 119, 180)), ("validation_loss", (0, 0, 0))])
def test_a_single_line_of_metrics_is_seen(name, color, tmp_path):
    draw_losses([{"step": 4, name: 0.5}], tmp_path / "loss.png")
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"), dtype=int)
    height, width, _ = pixels.shape
    inside = pixels[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]  # of the axes, without the legend
    assert (abs(inside - color).sum(axis=-1) < 30).any()


def test_no_point_is_missed_on_a_logarithmic_axis():
    assert evenly_on_a_log_axis([*range(4000)]) == [*range(4000)]
    drawn = np.array(evenly_on_a_log_axis([*range(1, 1_000_001)]))  # whose place is their value
    assert len(drawn) <= 4000 and drawn[0] == 1 and drawn[-1] == 1_000_000
    gaps = np.diff(np.log(drawn))[drawn[:-1] > 1000]  # below, all are drawn that are there
    assert gaps.max() < np.log(1_000_000) / 3000
    assert set(range(1, 100)) <= set(drawn.tolist())


@pytest.mark.parametrize(
    "scale, lowest, panel",  # on a logarithmic scale, and where an unbiased estimate is below 0
    [("guidance_scale", 0.2, 0), ("guidance_scale", -0.01, 1), (None, 0.2, 1), (None, -0.01, 0)],
)
def test_the_curve_of_a_sweep_marks_what_was_chosen(scale, lowest, panel, tmp_path):
    settings = [
        {"sampler": sampler, "num_inference_steps": steps, "forward_passes": steps * value, "samples": 10 * steps}
        | ({scale: value} if scale else {})
        | {"kernel_distance": Estimate(lowest + 1 / steps, 50, lowest, lowest + 2 / steps)}
        for sampler in ("DDIMScheduler", "UniPCMultistepScheduler")
        for steps in (10, 20, 50)
        for value in ((1.0, 2.0) if scale else (1.0,))
    ]
    chosen = {"sampler": ["DDIMScheduler", "UniPCMultistepScheduler"][panel], "num_inference_steps": 20}
    draw_sweep(settings, chosen | ({scale: 2.0} if scale else {}), tmp_path / "sweep.png")
    pixels = np.asarray(Image.open(tmp_path / "sweep.png").convert("RGB"), dtype=int)
    is_red = abs(pixels - (214, 39, 40)).sum(axis=-1) < 30
    assert pixels.shape[:2] == (480, 960)
    rings = [is_red[:, :440].sum(), is_red[:, 440:764].sum()]  # the legend is right of both panels
    assert rings[panel] > 50 and rings[1 - panel] == 0
