"""What each tab of a page shows: images as HTML while they are drawn, and the Python that draws the same."""

import re
from collections.abc import Iterator

import torch
from PIL import Image

from hf_genmod.demo.latents import changed_latents, latents_code
from hf_genmod.demo.model import AS_SAVED, NO_CLASS, SAMPLERS, WITHOUT_NOISE, DemoModel
from hf_genmod.demo.pictures import figures, fitted, made_smaller, read_mask, read_picture, said, zoom_of
from hf_genmod.demo.request import arguments_of, call_of, generators, script, seeds_line
from hf_genmod.demo.stepwise import stepwise
from hf_genmod.demo.trajectory import Frame, places_of, trajectory_html
from hf_genmod.drawing.cascade import draw_cascade

Shown = Iterator[tuple[str, str]]  # (HTML, Python), again and again until all is drawn
GIVEN = "from PIL import Image"
OPEN_GIVEN = 'given = Image.open("given.png")  # a click on the image saves it'


class _Name:
    """A name in Python, which is written as it is."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self):
        return self.name


SEEDS = _Name("seeds")


def draw(model: DemoModel, values: dict) -> Shown:
    """Images of a class, a prompt or of nothing in particular; of a cascade those of all stages."""
    seed, n = values["seed"], values["number"]
    names = [f"seed {seed + i}" for i in range(n)]
    if model.is_cascade:
        yield from _draw_cascade(model, values, names)
    elif model.pipe.denoises:
        arguments = arguments_of(model, values) | {"num_images_per_prompt": n}
        lines = [seeds_line(values, n), call_of("pipe", **arguments, generator=SEEDS)]
        code = script(model, lines, values["sampler"])
        yield from _drawn(model, values, arguments, names, code)
    else:
        prior = model.pipe.priors[0]
        images = model.pipe(n, prior, generator=generators(seed, n)).images
        lines = [seeds_line(values, n), call_of("pipe", batch_size=n, prior=prior, generator=SEEDS)]
        yield figures(images, names, [f"sample-{seed + i}.png" for i in range(n)]), script(model, lines)


def _drawn(
    model, values, arguments: dict, names: list[str], code: str, before: str = "", zoom: int | None = None
) -> Shown:
    """The images of one call, after some of its steps and at its end, below the HTML `before`."""
    pipe, steps = model.with_sampler(values["sampler"]), values["steps"]
    files = [f"{_slug(model, values)}-{values['seed'] + i}.png" for i in range(len(names))]

    def call(on_step_end):
        if values.get("classifier_scale") == 0.0:  # with a callback, which may change s, another way is computed
            on_step_end = None
        seeds = generators(values["seed"], len(names))
        return pipe(**arguments, generator=seeds, callback_on_step_end=on_step_end).images

    yield before + said(f"{steps} steps ..."), code
    for kind, value in stepwise(call, steps):
        if kind == "step":
            yield before + figures(value[1], names, files, zoom) + said(f"after step {value[0] + 1} of {steps}"), code
        else:
            yield before + figures(value, names, files, zoom), code


def _draw_cascade(model, values, names: list[str]) -> Shown:
    request, n, steps = arguments_of(model, values), values["number"], values["steps"]
    request.pop("num_inference_steps")
    request |= {name: [request[name]] * n for name in ("class_labels", "prompt", "negative_prompt") if name in request}
    seed = values["seed"]
    words = [f"stages, range({seed}, {seed + n})", f"num_inference_steps={steps}", "all_stages=True"]
    words += [f"{name}={value!r}" for name, value in request.items()]
    lines = ["drawn = draw_cascade(", *(f"    {word}," for word in words), ")", "images = drawn[-1]"]
    code, slug = script(model, lines), _slug(model, values)

    def call(on_step_end):
        with model.lock:  # stages take turns on an accelerator
            of_first = request | {"callback_on_step_end": on_step_end}
            return draw_cascade(
                model.stages, range(seed, seed + n), num_inference_steps=steps, all_stages=True, **of_first
            )

    yield said(f"{len(model.stages)} stages of {steps} steps ..."), code
    for kind, value in stepwise(call, steps):
        if kind == "step":
            yield figures(value[1], names) + said(f"first stage, after step {value[0] + 1} of {steps}"), code
    parts, zoom = [], zoom_of(value[0][0])
    for images in reversed(value):
        size = f"{images[0].height}x{images[0].width}"
        files = [f"{slug}-{seed + i}-{size}.png" for i in range(n)]
        parts.append(f"<h3>{size}</h3>{figures(images, names, files, zoom)}")
    yield "".join(parts), code


def between(model: DemoModel, values: dict) -> Shown:
    """The strip of images between two seeds."""
    a, b, n, steps = values["seed"], values["seed_b"], values["frames"], values["steps"]
    name = values["sampler"]
    adds_noise = name == AS_SAVED or SAMPLERS[name][2]
    name = WITHOUT_NOISE if adds_noise else name
    arguments = {"num": n, "num_inference_steps": steps} | arguments_of(model, values)
    code = script(model, [call_of("pipe.interpolate", f"{a}, {b}", **arguments)], name)
    pipe, slug = model.with_sampler(name), _slug(model, values)
    names = [f"seed {a}", *[f"{i / (n - 1):.2f}" for i in range(1, n - 1)], f"seed {b}"]
    files = [f"{slug}-{a}-{b}-{i}.png" for i in range(n)]
    note = said(f"Drawn by {name}: a strip needs a sampler that adds no noise.") if adds_noise else ""

    def call(on_step_end):
        streamed = {} if values.get("classifier_scale") == 0.0 else {"callback_on_step_end": on_step_end}
        return pipe.interpolate(a, b, **arguments, **streamed).images

    yield said(f"{steps} steps ..."), code
    for kind, value in stepwise(call, steps):
        images = value[1] if kind == "step" else value
        progress = said(f"after step {value[0] + 1} of {steps}") if kind == "step" else note
        yield figures(images, names, files) + progress, code


def edit(model: DemoModel, values: dict, sent: dict) -> Shown:
    """Variations of a picture, or what a painted part of it could be."""
    picture = fitted(read_picture(sent.get("picture")), model.shape[0], model.shape[1:])
    mask = read_mask(sent.get("mask"), model.shape[1:])
    seed, n = values["seed"], values["number"]
    shown = [picture] if mask is None else [picture, mask]
    given = figures(shown, ["given", "drawn anew where white"][: len(shown)], ["given.png", "mask.png"][: len(shown)])
    arguments = arguments_of(model, values) | {"num_images_per_prompt": n}
    if mask is None:
        arguments["strength"] = values["strength"]
    words = ["image=given", *(["mask_image=mask"] if mask is not None else [])]
    lines = [OPEN_GIVEN, *(['mask = Image.open("mask.png")'] if mask is not None else [])]
    lines += [seeds_line(values, n), call_of("pipe", *words, **arguments, generator=SEEDS)]
    code = script(model, lines, values["sampler"], [GIVEN])
    arguments |= {"image": picture} | ({} if mask is None else {"mask_image": mask})
    yield from _drawn(model, values, arguments, [f"seed {seed + i}" for i in range(n)], code, given)


def enlarge(model: DemoModel, values: dict, sent: dict) -> Shown:
    """A picture enlarged."""
    factor, pipe = model.pipe.config.factor, model.pipe
    multiple = max(1, pipe.unet.size_factor // factor)
    picture = made_smaller(read_picture(sent.get("picture")), model.shape[0], values["longest"], multiple)
    bicubic = picture.resize([factor * length for length in picture.size], Image.Resampling.BICUBIC)
    names, files = ["given", "by bicubic interpolation"], ["given.png", "bicubic.png"]
    zoom = zoom_of(picture)
    given = figures([picture, bicubic], names, files, zoom)
    arguments = arguments_of(model, values)
    if "class_labels" not in arguments:
        arguments.pop("guidance_scale", None)
    if values.get("noise_level"):
        arguments["noise_level"] = values["noise_level"]
    lines = [OPEN_GIVEN, seeds_line(values, 1), call_of("pipe", "given", **arguments, generator=SEEDS)]
    code = script(model, lines, values["sampler"], [GIVEN])
    yield from _drawn(model, values, arguments | {"image": picture}, [f"{factor} times larger"], code, given, zoom)


def reconstruct(model: DemoModel, values: dict, sent: dict) -> Shown:
    """A picture, and what an autoencoder makes of it."""
    picture = fitted(read_picture(sent.get("picture")), model.shape[0], model.shape[1:])
    lines = [OPEN_GIVEN, "images = pipe.reconstruct(given).images"]
    images = [picture, *model.pipe.reconstruct(picture).images]
    html = figures(images, ["given", "reconstructed"], ["given.png", "reconstructed.png"])
    yield html, script(model, lines, None, [GIVEN])


def latents(model: DemoModel, values: dict) -> Shown:
    """The image of latents of which the sliders set some."""
    z = changed_latents(model, values)
    images = model.pipe(latents=z).images
    yield (
        figures(images, [f"seed {values['seed']}"], ["latents.png"], zoom_of(images[0], 256)),
        latents_code(model, values),
    )


def steps(model: DemoModel, values: dict) -> Shown:
    """x_t and x̂_0 of every step, with guidance and without."""
    pipe, n = model.with_sampler(values["sampler"]), values["steps"]
    rows = {"guided": arguments_of(model, values), "not guided": arguments_of(model, values, guided=False)}
    rows = rows if model.pipe.guidance_argument else {"": arguments_of(model, values)}
    lines = ["steps = []", "", "", "def keep(pipe, i, t, tensors):", "    steps.append((int(t), tensors))", "", ""]
    inputs = ["latents", "pred_original_sample"]
    for arguments in rows.values():
        words = [f"generator=torch.Generator().manual_seed({values['seed']})", "callback_on_step_end=keep"]
        lines.append(call_of("pipe", *words, **arguments, callback_on_step_end_tensor_inputs=inputs))
    code, found = script(model, lines, values["sampler"]), {}
    for name, arguments in rows.items():
        frames, title = found.setdefault(name, []), f"{name}, " if name else ""

        def call(on_step_end, arguments=arguments, frames=frames):
            def keep(pipe, i, t, tensors):
                if i in places_of(pipe.num_timesteps):
                    x_t, x_0 = (pipe.postprocess(pipe.decode(tensors[name]))[0] for name in inputs)
                    frames.append(Frame(int(t), x_t, x_0))
                on_step_end(pipe, i, t, tensors)

            options = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": inputs}
            pipe(**arguments, generator=generators(values["seed"], 1), **options)

        yield said(f"{title}{n} steps ..."), code
        for kind, value in stepwise(call, n):
            if kind == "step":
                yield figures(value[1], [f"{title}after step {value[0] + 1} of {n}"]), code
    yield trajectory_html(found), code


def _slug(model, values) -> str:
    """What images are of, as the beginning of the names of their files."""
    text = values.get("prompt") or values.get("class_1", NO_CLASS)
    return re.sub(r"[^\w.-]+", "-", text)[:40].strip("-–.") or "image"


TABS = {
    "draw": draw, "between": between, "edit": edit, "steps": steps, "enlarge": enlarge, "reconstruct": reconstruct,
    "latents": latents,
}  # fmt: skip
TAKE_PICTURES = ("edit", "enlarge", "reconstruct")


@torch.no_grad()
def shown(model: DemoModel, tab: str, values: dict, sent=None) -> Shown:
    """What a tab shows of the settings, which are checked, and of the picture that was sent with them."""
    if tab in TAKE_PICTURES:
        if not isinstance(sent, dict | None):
            raise ValueError("picture: there is none; choose a file, or drop one")
        yield from TABS[tab](model, values, sent or {})
    else:
        yield from TABS[tab](model, values)
