"""The steps of a sampler as HTML with a slider over t."""

import html
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from hf_genmod.demo.pictures import data_url, zoom_of

MOST_SHOWN = 50  # steps in the HTML


class Frame(NamedTuple):
    """A step of a sampler: its timestep t, the image after it, and its x̂_0."""

    t: int
    x_t: Image.Image
    x_0: Image.Image


def places_of(count: int) -> list[int]:
    """The steps that are shown of `count`: up to 50, at even distances, the last one among them."""
    shown = min(count, MOST_SHOWN)
    return sorted({round(k * (count - 1) / max(1, shown - 1)) for k in range(shown - 1)} | {count - 1})


def trajectory_html(rows: dict[str, Sequence[Frame]]) -> str:
    """A slider over the steps, and a row for each trajectory, by its name, with x_t and x̂_0 of the step that is
    chosen; page.js shows them."""
    parts = []
    for name, frames in rows.items():
        width = zoom_of(frames[0].x_t, 192) * frames[0].x_t.width
        cells = []
        for title, kind in (("x after the step", "x_t"), ("x̂₀ of the step", "x_0")):
            images = "".join(
                f'<img src="{data_url(getattr(frame, kind))}" alt="{title} at t = {frame.t}" data-t="{frame.t}" '
                f'style="width:{width}px"{"" if frame is frames[-1] else " hidden"}>'
                for frame in frames
            )
            caption = html.escape(f"{name}: {title}" if name else title)
            cells.append(f"<figure>{images}<figcaption>{caption}</figcaption></figure>")
        parts.append(f'<div class="genmod-row">{"".join(cells)}</div>')
    times = [frame.t for frame in next(iter(rows.values()))]
    slider = (
        f'<label class="genmod-time">t <input type="range" min="0" max="{len(times) - 1}" value="{len(times) - 1}" '
        f'data-times="{",".join(map(str, times))}" aria-label="timestep t"> <output>{times[-1]}</output></label>'
    )
    return f'<div class="genmod-trajectory">{slider}{"".join(parts)}</div>'
