"""The steps of a sampler as HTML with a slider over t."""

import html
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from hf_genmod.demo.pictures import data_url

MOST_SHOWN = 50  # steps in the HTML


class Frame(NamedTuple):
    """A step of a sampler: its timestep t, the image after it, and its x̂_0."""

    t: int
    x_t: Image.Image
    x_0: Image.Image


def trajectory_html(rows: dict[str, Sequence[Frame]]) -> str:
    """A slider over the steps, and a row for each trajectory, by its name, with x_t and x̂_0 of the step that is
    chosen; page.js shows them. At most 50 steps, at even distances, the last one among them."""
    count = len(next(iter(rows.values())))
    places = sorted(
        {round(k * (count - 1) / max(1, min(count, MOST_SHOWN) - 1)) for k in range(min(count, MOST_SHOWN))}
    )
    parts = []
    for name, frames in rows.items():
        cells = []
        for title, kind in (("x after the step", "x_t"), ("x̂₀ of the step", "x_0")):
            images = "".join(
                f'<img src="{data_url(getattr(frames[i], kind))}" alt="{title} at t = {frames[i].t}" '
                f'data-t="{frames[i].t}" style="--pixels:{frames[i].x_t.width}"{"" if i == places[-1] else " hidden"}>'
                for i in places
            )
            caption = html.escape(f"{name}: {title}" if name else title)
            cells.append(f"<figure>{images}<figcaption>{caption}</figcaption></figure>")
        parts.append(f'<div class="genmod-row">{"".join(cells)}</div>')
    times = ",".join(str(frame.t) for i, frame in enumerate(next(iter(rows.values()))) if i in set(places))
    last = len(places) - 1
    slider = (
        f'<label class="genmod-time">t <input type="range" min="0" max="{last}" value="{last}" data-times="{times}" '
        f'aria-label="timestep t"> <output>{frames[places[-1]].t}</output></label>'
    )
    return f'<div class="genmod-trajectory">{slider}{"".join(parts)}</div>'
