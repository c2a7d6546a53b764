"""The page of a model."""

import contextlib
import html
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from hf_genmod.demo.drawing import TAKE_PICTURES, shown
from hf_genmod.demo.latents import slider_values
from hf_genmod.demo.model import LARGEST_SEED, DemoModel
from hf_genmod.demo.pictures import said
from hf_genmod.demo.settings import Setting, checked_values, from_query
from hf_genmod.errors import first_line

LOG = logging.getLogger(__name__)
FILES = Path(__file__).parent
TITLES = {
    "draw": "images", "between": "a strip between two seeds", "edit": "variations, or a part anew",
    "steps": "step by step", "enlarge": "an image enlarged", "reconstruct": "a reconstruction",
    "latents": "an image by its latents",
}  # fmt: skip
FAILED = "This failed for a reason that is not your input; the terminal of the page names it."


class Page(gr.Blocks):
    """A page that hands values on as they were sent: it takes no files by Gradio, so that none is looked for on the
    server or elsewhere, and checks each value itself."""

    async def preprocess_data(self, block_fn, inputs, state, explicit_call=False):
        if len(inputs) != len(block_fn.inputs):
            message = f"{len(inputs)} values were sent, and this takes {len(block_fn.inputs)}"
            raise gr.Error(message, print_exception=False)
        if block_fn.fn is None:
            raise gr.Error("this happens in the browser alone", print_exception=False)
        return inputs


class Controls:
    """
    The settings of a model as components, and what they do.

    Args:
        model ([`DemoModel`]): The model.
    """

    def __init__(self, model: DemoModel):
        self.model, self.settings = model, [*model.settings.values()]

    def draw(self, *sent) -> Iterator[tuple[str, str]]:
        """(HTML, Python) for the values of all settings, and a picture, as they were sent; what is wrong with them is
        a sentence in the HTML."""
        try:
            *values, picture = sent
            values = checked_values(self.settings, dict(zip([s.name for s in self.settings], values, strict=True)))
            used = {setting.name: values[setting.name] for setting in self.model.settings_of(values["do"])}
            yield from shown(self.model, values["do"], used, picture)
        except (ValueError, OSError) as error:
            yield said(first_line(error), "problem"), ""
        except Exception as error:  # a page goes on
            LOG.error("%s: %s", type(error).__name__, first_line(error))
            yield said(FAILED, "problem"), ""

    def draw_first(self, *sent) -> Iterator[tuple[str, str]]:
        """As `draw`, when the page opens and nobody has given a picture yet."""
        if sent[0] in TAKE_PICTURES:
            yield said("Choose an image, then press Draw."), ""
        else:
            yield from self.draw(*sent)

    def read(self, request: gr.Request) -> list:
        """The values of all settings in the URL, and what does not fit, as HTML."""
        values, complaints = from_query(self.settings, dict(request.query_params))
        missing = [name for name in values if name[0] == "z" and name[1:].isdecimal()]
        if missing and values["do"] == "latents":
            own = slider_values(self.model, values["seed"])
            values |= {name: x for name, x in zip(missing, own, strict=True) if name not in request.query_params}
        problems = "".join(said(text, "problem") for text in complaints)
        return [*values.values(), gr.update(value=problems, visible=bool(complaints))]

    def sliders(self, seed) -> list[float]:
        """Where the sliders of the latents stand for a seed."""
        try:
            return slider_values(self.model, self.model.settings["seed"].checked(seed))
        except ValueError:
            return [0.0] * len(self.model.factors)

    def visible(self, tab) -> list:
        """Which components a tab shows."""
        tab = tab if tab in self.model.tabs else self.model.tabs[0]
        names = {setting.name for setting in self.model.settings_of(tab)}
        pictures = [gr.update(visible=tab == name) for name in self.model.tabs if name in TAKE_PICTURES]
        return [gr.update(visible=setting.name in names) for setting in self.settings[1:]] + pictures


def component(setting: Setting, visible: bool):
    """The component of a setting: a slider, or a field where a slider would be too wide or too coarse."""
    options = {"label": setting.label, "info": setting.info, "visible": visible, "elem_id": f"genmod-{setting.name}"}
    if setting.name == "do":
        choices = [(TITLES[choice], choice) for choice in setting.choices]
        return gr.Radio(choices, value=setting.default, **options | {"visible": len(choices) > 1})
    if setting.choices:
        return gr.Dropdown(list(setting.choices), value=setting.default, **options)
    if isinstance(setting.default, str):
        return gr.Textbox(setting.default, max_lines=3, **options)
    is_whole = isinstance(setting.default, int)
    if setting.name.startswith("weight") or setting.high - setting.low > 1000:
        options |= {"minimum": setting.low, "maximum": setting.high, "step": setting.step, "min_width": 90}
        return gr.Number(setting.default, precision=0 if is_whole else None, **options)
    return gr.Slider(setting.low, setting.high, value=setting.default, step=setting.step, **options)


def picture_area(tab: str, model: DemoModel) -> str:
    """Where a visitor gives a picture and, to edit it, paints on it; page.js does the rest."""
    _, height, width = model.shape
    paint = (
        '<div class="genmod-tools"><label>brush <input type="range" min="1" max="8" value="3" class="genmod-brush">'
        '</label><button type="button" class="genmod-clear">clear the paint</button></div>'
        "<p>Paint over what is to be drawn anew; without paint the whole image is varied.</p>"
    )
    is_edit, whole = tab == "edit", "" if tab == "enlarge" else f'data-width="{width}" data-height="{height}"'
    return (
        f'<div class="genmod-give" data-tab="{tab}" {whole}><label class="genmod-file">image: choose a file, or drop '
        f'one here<input type="file" accept="image/*"></label><div class="genmod-canvas" hidden><canvas '
        f'class="genmod-shown"></canvas><canvas class="{"genmod-paint" if is_edit else "genmod-nothing"}"></canvas>'
        f"</div>{paint if is_edit else ''}</div>"
    )


def heading(model: DemoModel) -> str:
    """The name of a model and what it is, as HTML."""
    last = model.stages[-1]
    channels, height, width = last.picture_shape
    kinds = " + ".join(type(stage).__name__ for stage in model.stages)
    parts = [kinds, f"{height}×{width}", {1: "grey", 3: "RGB", 4: "RGBA"}.get(channels, f"{channels} channels")]
    parts += [f"{len(model.class_names)} classes"] * bool(model.class_names)
    return f'<div class="genmod-head"><h1>{html.escape(model.name)}</h1><p>{html.escape(" · ".join(parts))}</p></div>'


def build(model: DemoModel) -> Page:
    """The page of a model, to be launched."""
    controls = Controls(model)
    first = {"do", *(setting.name for setting in model.settings_of(model.tabs[0]))}
    with Page(title=f"{model.name} · hf_genmod", analytics_enabled=False) as page:
        gr.HTML(heading(model))
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                parts, areas = {}, []
                for row in _in_rows(controls.settings):
                    with gr.Row() if len(row) > 1 else contextlib.nullcontext():
                        parts |= {setting.name: component(setting, setting.name in first) for setting in row}
                    if row[0].name == "do":
                        areas = [
                            gr.HTML(picture_area(tab, model), visible=tab == model.tabs[0], js_on_load=None)
                            for tab in model.tabs
                            if tab in TAKE_PICTURES
                        ]
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    button = gr.Button("Draw", variant="primary", elem_id="genmod-go", min_width=90)
                    another = gr.Button(
                        "Another seed", visible="seed" in parts, elem_id="genmod-another", min_width=90
                    )
                    stop = gr.Button("Stop", elem_id="genmod-stop", min_width=90)
                complaints = gr.HTML("", visible=False, js_on_load=None)
                pictures = gr.HTML("", elem_id="genmod-out", js_on_load=None)
                code = gr.Code(
                    "", language="python", label="the same in Python", wrap_lines=True, elem_id="genmod-code"
                )
        _connect(page, controls, parts, areas, (button, another, stop), (complaints, pictures, code))
    return page


def _in_rows(settings: list[Setting]) -> list[list[Setting]]:
    """Settings that stand beside each other."""
    beside = ("weight_", "sampler", "number")
    rows = []
    for setting in settings:
        if rows and setting.name.startswith(beside) and len(rows[-1]) == 1 and rows[-1][0].name != "do":
            rows[-1].append(setting)
        else:
            rows.append([setting])
    return rows


def _connect(page: Page, controls: Controls, parts: dict, areas: list, buttons: tuple, outputs: tuple) -> None:
    """What happens on a page, and when."""
    (button, another, stop), (complaints, pictures, code) = buttons, outputs
    model, inputs, sent = controls.model, list(parts.values()), gr.JSON(visible=False)
    defaults = {setting.name: setting.default for setting in controls.settings}
    tabs = {tab: ["do", *(s.name for s in model.settings_of(tab))] for tab in model.tabs}
    drawing = {
        "fn": controls.draw, "inputs": [*inputs, sent], "outputs": [pictures, code], "show_progress": "hidden",
        "js": "(...values) => genmod.withPicture(values)", "concurrency_id": "draw",
        "concurrency_limit": max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2),
    }  # fmt: skip
    hidden = {"show_progress": "hidden", "api_visibility": "private"}
    started = [button.click(**drawing, api_name="draw")]
    loaded = page.load(controls.read, None, [*inputs, complaints], **hidden)
    shown_parts = [*inputs[1:], *areas]
    loaded = loaded.then(controls.visible, parts["do"], shown_parts, **hidden)
    started.append(loaded.then(**drawing | {"fn": controls.draw_first}, api_visibility="private"))
    parts["do"].input(controls.visible, parts["do"], shown_parts, **hidden)
    if "seed" in parts:
        random = f"() => Math.floor(Math.random() * {LARGEST_SEED})"
        chosen = another.click(None, None, parts["seed"], js=random)
        if any(name[0] == "z" for name in parts if name[1:].isdecimal()):
            sliders = [part for name, part in parts.items() if name[0] == "z" and name[1:].isdecimal()]
            chosen = chosen.then(controls.sliders, parts["seed"], sliders, **hidden)
            parts["seed"].input(controls.sliders, parts["seed"], sliders, **hidden)
            moved = [slider.input for slider in sliders]
            gr.on(moved, **drawing, trigger_mode="always_last", api_visibility="private")
        started.append(chosen.then(**drawing, api_visibility="private"))
    stop.click(None, cancels=started)
    into_url = f"(...values) => genmod.intoUrl(values, {json.dumps(defaults)}, {json.dumps(tabs)})"
    gr.on([part.change for part in inputs], None, inputs, None, js=into_url)
