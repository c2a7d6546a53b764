"""Checks of a checkpoint before it is loaded: it runs no code, reads no other files, and needs no more memory than its
weights."""

import importlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from safetensors import SafetensorError, safe_open

import hf_genmod
from hf_genmod.checkpoints.bundle import bundle
from hf_genmod.errors import a_or_an, first_line, refuse_lfs_pointers
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel
from hf_genmod.models.image_autoencoder import Autoencoder
from hf_genmod.models.image_model import COMPONENT
from hf_genmod.models.noisy_classifier import NoisyImageClassifier
from hf_genmod.models.variational_autoencoder import VariationalAutoencoder

_MOST_PIXELS, _MOST_TIMESTEPS = 2**26, 10**6


def check_code(folder: Path) -> None:
    """Raises a ValueError if a Python file in a checkpoint is not as the installed package writes it."""
    package = Path(hf_genmod.__file__).parent
    for file in [*folder.glob("*.py"), *folder.glob("*/*.py")]:
        name = file.relative_to(folder)
        if name.name == "component.py" and file.read_bytes() == COMPONENT.encode():
            continue
        modules = [package / part / file.name for part in ("models", "pipelines", "schedulers")]
        modules = [module for module in modules if module.is_file()]
        if not modules:
            raise ValueError(
                f"{name} is not a file of this package, or is one of an earlier version; do not trust the file: "
                "`load_pipeline(...).save_pretrained(...)` writes the installed code; delete the file if it remains"
            )
        if bundle(modules[0]).encode() != file.read_bytes():
            raise ValueError(
                f"{name} differs from the installed package, so the checkpoint may act differently without the "
                "package; update the code by `load_pipeline(...).save_pretrained(...)`"
            )


def class_of_component(name: str, module: str, class_name: str) -> type:
    """The class that an index names for a component, or a ValueError if the class is not one for the component. The
    module is one of this package, diffusers or transformers."""
    kinds = {
        "unet": DenoisingUNet2DModel,
        "guiding_unet": DenoisingUNet2DModel,
        "classifier": NoisyImageClassifier,
        "vae": (Autoencoder, VariationalAutoencoder, AutoencoderKL),
        "scheduler": SchedulerMixin,
    }
    if name not in kinds:
        from transformers import PreTrainedModel, PreTrainedTokenizerBase  # slow to import, and needed only for text

        kinds |= {"text_encoder": PreTrainedModel, "tokenizer": PreTrainedTokenizerBase}
    cls = getattr(importlib.import_module(module), class_name, None)
    if not isinstance(cls, type) or not issubclass(cls, kinds.get(name, ())):
        raise ValueError(f"model_index.json: {class_name!r} of {module} is not a class for the component {name!r}")
    return cls


def check_component(folder: Path, cls: type) -> None:
    """
    Checks the folder of a component that will be loaded as `cls`.

    Raises:
        ValueError: If the component needs foreign code, files elsewhere or more memory than its weights, or if a part
            of the weights is a pointer of Git LFS.
        FileNotFoundError: If a part of the weights is missing.
    """
    refuse_lfs_pointers(folder)
    for file in folder.glob("*.index.json"):
        shards = read_json(file).get("weight_map", {})
        for shard in shards.values() if isinstance(shards, dict) else [shards]:
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ValueError(f"{file}: {shard!r} is not the name of a safetensors file in the same folder")
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{folder / shard}: this part of the weights is missing")
    configs = {file.name: read_json(file) for file in folder.glob("*config.json")}
    own = {"AutoModel": f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"}  # the file and the class
    for file, config in configs.items():
        for key, value in _settings_in(config):
            is_kernel = "implementation" in key and "/" in str(value)  # transformers would download and run it
            is_own = key == "auto_map" and cls.__name__ in hf_genmod.__all__ and value == own
            if (key in ("auto_map", "quantization_config", "custom_pipelines") and not is_own) or is_kernel:
                raise ValueError(f"{folder / file}: {key!r} names code from outside this package, which is not loaded")
    num_timesteps = configs.get("scheduler_config.json", {}).get("num_train_timesteps", 1)
    if not _is_at_most(num_timesteps, _MOST_TIMESTEPS):
        raise ValueError(f"{folder}: num_train_timesteps is {num_timesteps!r}, not 1 to {_MOST_TIMESTEPS:,}")
    if issubclass(cls, torch.nn.Module) and list(folder.glob("*.safetensors")):
        _check_size(folder, cls, configs.get("config.json", {}))


def check_adapter(path: str, component: str, model, weights: dict[str, torch.Tensor], config: dict) -> None:
    """Raises a ValueError if a part of an adapter does not fit this model, or its config asks for foreign code or for
    more memory than the weights. The check attaches and allocates nothing."""
    ranks = {weight.shape[0] for key, weight in weights.items() if ".lora_A" in key}
    for rank in (config.get("r"), *(config.get("rank_pattern") or {}).values()):
        if rank is not None and rank not in ranks:
            raise ValueError(f"{path}: the config gives the rank {rank!r}, which the weights do not have")
    if config.get("megatron_config") or config.get("megatron_core", "megatron.core") != "megatron.core":
        raise ValueError(f"{path}: the config names code that is not of this package; the adapter is not loaded")
    modules = {} if model is None else dict(model.named_modules())
    for key, weight in weights.items():
        name, _, kind = key.partition(".lora_")
        of_model = getattr(modules.get(name), "weight", None)
        axes = {"A": slice(1, None), "B": slice(0, 1)}.get(kind[:1])  # A holds the whole kernel
        if of_model is None or axes is None or weight.shape[axes] != of_model.shape[axes]:
            raise ValueError(
                f"{path}: {component}.{key} fits no layer of this model; load it into the one it was trained for"
            )


def _settings_in(config) -> Iterator[tuple[str, object]]:
    """All settings of a config, and of the configs in it."""
    if isinstance(config, dict):
        yield from config.items()
        config = list(config.values())
    for part in config if isinstance(config, list) else ():
        yield from _settings_in(part)


def _check_size(folder: Path, cls: type, config: dict) -> None:
    """Raises if the config defines a larger model than the weights fill. The check allocates no weights."""
    size = config.get("sample_size", 1)
    sides = size if isinstance(size, list) else [size, size]
    are_sides = len(sides) == 2 and all(_is_at_most(side, _MOST_PIXELS) for side in sides)
    if not are_sides or math.prod(sides) > _MOST_PIXELS:
        raise ValueError(f"{folder}: sample_size is {size!r}, not a height and width of 1 to {_MOST_PIXELS:,} pixels")
    shapes = [shape for file in folder.glob("*.safetensors") for shape in shapes_in(file)]
    for key, value in config.items():
        if re.search("layers|blocks", key) and isinstance(value, int) and value > len(shapes):
            raise ValueError(f"{folder}: {key} is {value:,}, but the weights have only {len(shapes)} tensors")
    try:
        with torch.device("meta"):
            model = cls.from_config(config) if hasattr(cls, "from_config") else cls(cls.config_class(**config))
    except Exception as error:  # a wrong config can lead to any error
        what = f"its config does not define {a_or_an(cls.__name__)}"
        raise ValueError(f"{folder}: {what} ({first_line(error)})") from error
    expected, given = sum(parameter.numel() for parameter in model.parameters()), sum(map(math.prod, shapes))
    if expected > given:
        raise ValueError(f"{folder}: its config defines {expected:,} parameters, but the weights have only {given:,}")


def shapes_in(file: Path) -> list[list[int]]:
    """The shapes of the tensors in a safetensors file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file ({first_line(error)})") from error


def read_json(file: Path) -> dict:
    """The dictionary in a JSON file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise ValueError(f"{file}: not a JSON file ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: not a dictionary, but {type(value).__name__}")
    return value


def _is_at_most(value, most: int) -> bool:
    return isinstance(value, int) and 1 <= value <= most
