"""Figures of curves."""

import numpy as np
import pytest
from PIL import Image

from hf_genmod.drawing.curves import draw_losses


@pytest.mark.parametrize("name, color", [("loss", (31, 119, 180)), ("validation_loss", (0, 0, 0))])
def test_a_single_line_of_metrics_is_seen(name, color, tmp_path):
    draw_losses([{"step": 4, name: 0.5}], tmp_path / "loss.png")
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"), dtype=int)
    height, width, _ = pixels.shape
    inside = pixels[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]  # of the axes, without the legend
    assert (abs(inside - color).sum(axis=-1) < 30).any()
