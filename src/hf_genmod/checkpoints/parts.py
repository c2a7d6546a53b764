"""Checks of what a pipeline is made of: its components, and the values that its index holds."""

import inspect
import math
from collections.abc import Iterator
from numbers import Integral, Real
from operator import attrgetter

from diffusers import DDPMScheduler, DiffusionPipeline

from hf_genmod.errors import a_or_an, first_line

# Of each component: what pipelines use of it, and a class that has that.
_USED = {
    "unet": (("config.num_classes", "config.in_channels", "config.out_channels"), "DenoisingUNet2DModel"),
    "guiding_unet": (("config.num_classes", "config.in_channels", "config.out_channels"), "DenoisingUNet2DModel"),
    "classifier": (("config.num_classes", "config.noise_schedule"), "NoisyImageClassifier"),
    "vae": (("encode", "decode", "config.in_channels"), "VariationalAutoencoder, Autoencoder or AutoencoderKL"),
    "scheduler": (("set_timesteps", "config"), "scheduler of diffusers"),
    "text_encoder": (("forward", "config.hidden_size"), "text encoder of transformers"),
    "tokenizer": (("__call__", "pad_token"), "tokenizer of transformers"),
}


def check_parts(pipeline: DiffusionPipeline, components: dict | None = None, config: dict | None = None) -> None:
    """
    Checks what a pipeline is to be made of or, without the other arguments, what it has, before it is saved.

    Args:
        pipeline: The pipeline, whose class says which components may be `None`.
        components (`dict`, *optional*): Models, scheduler and tokenizer, by their names.
        config (`dict`, *optional*): The other arguments, of which `process`, `consistent`, `defaults`, `value_range`
            and `id2label` are checked.

    Raises:
        ValueError: If a component is of another kind than its name says, or a value is malformed.
    """
    components = pipeline.components if components is None else components
    config = pipeline.config if config is None else config
    for name, (attributes, expected) in _USED.items():
        part = components.get(name)
        if name not in components or (part is None and name in pipeline._optional_components):
            continue
        for attribute in attributes:
            try:
                attrgetter(attribute)(None if isinstance(part, type) else part)
            except AttributeError:
                kind = "None" if part is None else a_or_an(type(part).__name__)
                raise ValueError(f"{name}: {kind} has no {attribute}; give {a_or_an(expected)}") from None
    _check_guiding(components.get("guiding_unet"), components.get("unet"))
    if (process := config.get("process")) is not None:
        check_process(process)
    if type(consistent := config.get("consistent", False)) is not bool:
        raise ValueError(f"consistent: {consistent!r:.60} is neither True nor False; give one of them")
    if (defaults := config.get("defaults")) is not None:
        _check_defaults(defaults, inspect.signature(type(pipeline).__call__).parameters)
    if (value_range := config.get("value_range")) is not None:
        pixels = components["unet"] if components.get("vae") is None else components["vae"]
        _check_value_range(value_range, pixels.config.in_channels)
    if (id2label := config.get("id2label")) is not None:
        num_classes = components.get("classifier", components["unet"]).config.num_classes or 0
        if fault := next(_faults_of_names(id2label, num_classes), None):
            remedy = f"give a name for each label, 0 ... {num_classes - 1}" if num_classes else "leave it out"
            raise ValueError(f"id2label: {fault}; {remedy}")


def _check_guiding(guiding, unet) -> None:
    """Raises a ValueError if a `guiding_unet` is for other images or conditions than the U-Net. It may lack classes,
    which adapters add to the U-Net."""
    for name in ("in_channels", "cross_attention_dim", "conditioning_channels") if guiding is not None else ():
        own, others = (model.config.get(name) for model in (unet, guiding))
        if own != others:
            raise ValueError(
                f"guiding_unet: its {name} is {others} and that of the U-Net {own}; give one that fits it"
            )
    if guiding is not None and (guiding.config.num_classes or 0) > (unet.config.num_classes or 0):
        classes = f"it has {guiding.config.num_classes} classes and the U-Net {unet.config.num_classes}"
        raise ValueError(f"guiding_unet: {classes}; give an earlier version of the U-Net")


def check_process(process: dict) -> None:
    """Raises a ValueError if the `process` of a pipeline describes no noise and prediction."""
    keys = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    remedy = "give process_of(scheduler.config) of the scheduler of the training, or leave it out"
    if not isinstance(process, dict):
        raise ValueError(f"process: {process!r:.60} is no dict; {remedy}")
    if missing := [key for key in keys if key not in process]:
        raise ValueError(f"process: {process!r:.60} has no {missing[0]}; {remedy}")
    try:
        DDPMScheduler.from_config(process)
    except Exception as error:  # of torch and diffusers, about values
        raise ValueError(f"process: {process!r:.60} makes no scheduler ({first_line(error)}); {remedy}") from error


def _check_defaults(defaults, parameters) -> None:
    arguments = defaults.get("arguments") if isinstance(defaults, dict) else None
    if not isinstance(arguments, dict) or defaults.keys() - {"arguments", "chosen_on"}:
        raise ValueError(f"defaults: {defaults!r:.60} is no {{'arguments': {{...}}}}; give such a dict, or None")
    for name, value in arguments.items():
        if name not in parameters or type(parameters[name].default) not in (int, float):
            raise ValueError(f"defaults: {name!r:.60} is no argument that takes a number; leave it out")
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"defaults: {name} is {value!r:.60}, which is not a number")


def _check_value_range(value_range, channels: int) -> None:
    ends = [value_range.get(end) if isinstance(value_range, dict) else None for end in ("low", "high")]
    are_lists = all(isinstance(values, (list, tuple)) and len(values) in (1, channels) for values in ends)
    numbers = [x for values in ends for x in values] if are_lists else [None]
    are_finite = all(isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x) for x in numbers)
    if not are_finite or len(ends[0]) != len(ends[1]) or any(map(float.__gt__, *(map(float, x) for x in ends))):
        remedy = "give the lowest and the highest value of each channel, or None for images of 8 bits"
        raise ValueError(
            f"value_range: {value_range!r:.60} is no {{'low': [...], 'high': [...]}} of {channels} channels; {remedy}"
        )


def _faults_of_names(id2label, num_classes: int) -> Iterator[str]:
    """What is wrong with the names of labels, whose numbers are strings in JSON."""
    if not isinstance(id2label, dict):
        yield f"{id2label!r:.60} is no dict"
    elif id2label and not num_classes:
        yield "given, but its model was made without num_classes"
    elif id2label:
        labels, names = [], []
        for label, name in id2label.items():
            is_number = isinstance(label, Integral) and not isinstance(label, bool)
            labels.append(int(label) if is_number or (isinstance(label, str) and label.isdecimal()) else -1)
            if labels[-1] not in range(num_classes):
                yield f"{label!r:.60} is no label"
            if not isinstance(name, str) or not name:
                yield f"{name!r:.60} is no name"
            if name in names:
                yield f"{name!r:.60} is the name of several labels"
            names.append(name)
        for label in range(num_classes):
            if labels.count(label) != 1:
                yield f"label {label} has {'several names' if label in labels else 'no name'}"
