"""Checks of a pipeline's arguments, one random generator per image, and what belongs to a call."""

import contextlib
import functools
import inspect
import math
import threading
from numbers import Integral, Real

import torch


def of_call(name: str) -> property:
    """An attribute of a pipeline with one value for each call; a thread without a call sees that of another thread."""

    def values(pipeline):
        return pipeline._calls.get(threading.get_ident(), [{}, *sum(pipeline._calls.values(), [])])[-1]

    return property(lambda self: values(self).get(name), lambda self, value: values(self).update({name: value}))


@contextlib.contextmanager
def new_call(pipeline, **values):
    """A call with `values`. They stay until the next call of the thread, unless the call is within another one."""
    calls = pipeline._calls.setdefault(threading.get_ident(), [{}])  # the last call, and those that are running
    calls.append(values)
    try:
        yield
    finally:
        del calls[0 if len(calls) == 2 else -1]


def generates(call):
    """A `__call__` without gradients; the `defaults` in the config of the pipeline serve for arguments left out."""

    @torch.no_grad()
    @functools.wraps(call)
    def with_defaults(self, *args, **kwargs):
        given = inspect.signature(call).bind(self, *args, **kwargs).arguments
        return call(**((self.config.defaults or {}).get("arguments", {}) | given))

    return with_defaults


def plain(value):
    """A tensor or array as a number or a list, a tuple as a list."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, tuple) else value


def check_positive(**numbers) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise ValueError(f"{name}: {number!r} is not a positive whole number")


def checked_latents(z, shape: tuple[int, ...]) -> torch.Tensor:
    given = tuple(z.shape) if torch.is_tensor(z) and z.is_floating_point() else torch.typename(z)
    if given != shape:
        raise ValueError(f"latents: {given} is no tensor of floats {shape}, the number and size of the images")
    return z


def check_output_type(output_type) -> None:
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type: {output_type!r} is not one of 'pil', 'np', 'pt', 'latent'")


def standard_normal(shape, generators) -> torch.Tensor:
    """ε ~ N(0, I), (n, *shape), from one generator per image, in fp32 on the CPU."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device).cpu() for g in generators])


def check_guidance(interval, **scales) -> None:
    for name, scale in scales.items():
        if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
            raise ValueError(f"{name}: {scale!r} is not a finite number")
    if interval is not None:
        is_pair = isinstance(interval, (list, tuple)) and [isinstance(x, Real) for x in interval] == [True, True]
        if not is_pair or not 0 <= interval[0] <= interval[1]:
            raise ValueError(f"guidance_interval: {interval} is not (low, high) with 0 <= low <= high")


def is_within(sigma: float, interval: tuple[float, float] | None) -> bool:
    return interval is None or interval[0] <= sigma <= interval[1]


def number_of_images(batch_size: int, num_images_per_prompt: int) -> int:
    """The number of images of a call without prompts, where the two arguments mean the same."""
    check_positive(batch_size=batch_size, num_images_per_prompt=num_images_per_prompt)
    if 1 not in (batch_size, num_images_per_prompt) and batch_size != num_images_per_prompt:
        raise ValueError(f"num_images_per_prompt: {num_images_per_prompt}, but batch_size is {batch_size}; give one")
    return max(batch_size, num_images_per_prompt)


def one_generator_each(generator, n: int) -> list[torch.Generator]:
    """One generator per image, so that an image does not depend on the others of its batch."""
    given = list(generator) if (is_list := isinstance(generator, (list, tuple))) else [generator]
    if generator is not None and not all(isinstance(g, torch.Generator) for g in given):
        raise ValueError(f"generator: {generator!r} is neither a torch.Generator nor a list of them; give one or None")
    if is_list and len(given) != n:
        raise ValueError(f"generator: a list of {len(given)} for {n} images; give one for each, or only one")
    if is_list or (n == 1 and generator is not None):
        return given
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (n,), generator=generator, device=device)
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]
