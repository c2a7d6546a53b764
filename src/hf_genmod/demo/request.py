"""The arguments of a call that the settings of a page ask for, and the Python that makes the same call."""

import torch

from hf_genmod.demo.model import NO_CLASS, DemoModel


def arguments_of(model: DemoModel, values: dict, guided: bool = True) -> dict:
    """
    Arguments of the pipeline: what to draw, the strengths of guidance, and the steps.

    Args:
        model ([`DemoModel`]): The model.
        values (`dict`): The settings, checked.
        guided (`bool`): `False` turns guidance off.
    """
    arguments = _condition(model, values)
    for name, off in (("classifier_scale", 0.0), ("guidance_scale", 1.0)):
        if name in values:
            arguments[name] = values[name] if guided else off
    if "steps" in values:
        arguments["num_inference_steps"] = values["steps"]
    return arguments


def _condition(model: DemoModel, values: dict) -> dict:
    if "prompt" in values:
        negative = values["negative_prompt"]
        return {"prompt": values["prompt"]} | ({"negative_prompt": negative} if negative else {})
    weights = {}
    for k in (1, 2, 3):
        name = values.get(f"class_{k}", NO_CLASS)
        if name != NO_CLASS:
            label = name if name in model.pipe.labels else int(name)
            weights[label] = weights.get(label, 0.0) + values.get(f"weight_{k}", 1.0)
    if not weights:
        return {}
    return {"class_labels": next(iter(weights)) if [*weights.values()] == [1.0] else weights}


def generators(seed: int, number: int) -> list[torch.Generator]:
    """One for each image; image i has the seed `seed` + i."""
    return [torch.Generator().manual_seed(seed + i) for i in range(number)]


def call_of(function: str, *arguments: str, **named) -> str:
    """A call of a pipeline whose images are kept, one argument a line; those in `arguments` are Python already."""
    words = [*arguments, *(f"{name}={value!r}" for name, value in named.items())]
    return "\n".join([f"images = {function}(", *(f"    {word}," for word in words), ").images"])


def script(model: DemoModel, lines: list[str], sampler: str | None = None, imports: list[str] | None = None) -> str:
    """Python that loads the model as `pipe`, with a sampler, and goes on with `lines`."""
    of_sampler, changes = ([], []) if sampler is None else model.sampler_code(sampler)
    on = "" if str(model.device) == "cpu" else f'.to("{model.device}")'
    own = sorted(line.removeprefix("from hf_genmod import ") for line in of_sampler if "hf_genmod" in line)
    others = [line for line in of_sampler if "hf_genmod" not in line]
    top = ["import torch", *sorted([*others, *(imports or [])])]
    adapt = [] if model.adapter is None else [f".load_lora_weights({model.adapter!r})"]
    if not model.is_cascade:
        names = ", ".join([*own, "load_pipeline"])
        words = ", ".join([repr(model.places[0]), *(f"{name}={value!r}" for name, value in model.options.items())])
        load = [f"pipe = load_pipeline({words}){on}", *(f"pipe{call}" for call in adapt), *changes]
        return "\n".join([*top, f"from hf_genmod import {names}", "", *load, *lines])
    top += ["from hf_genmod import load_pipeline", "from hf_genmod.drawing.cascade import draw_cascade", ""]
    load = f"stages = [load_pipeline(place) for place in {model.places!r}]"
    return "\n".join([*top, load, *(f"stages[0]{call}" for call in adapt), *lines])


def seeds_line(values: dict, number: int) -> str:
    seed = values["seed"]
    return f"seeds = [torch.Generator().manual_seed(seed) for seed in range({seed}, {seed + number})]"
