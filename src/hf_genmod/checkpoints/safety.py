"""What a foreign checkpoint may ask for, checked before anything of it is loaded."""

import importlib
import inspect
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
from hf_genmod.errors import first_line
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel
from hf_genmod.models.image_autoencoder import Autoencoder
from hf_genmod.models.noisy_classifier import NoisyImageClassifier
from hf_genmod.models.variational_autoencoder import VariationalAutoencoder

_MOST_PIXELS, _MOST_TIMESTEPS = 2**26, 10**6


def check_checkpoint(folder: str | Path, index: dict, pipeline_class: type, replaced: dict) -> None:
    """
    Whether a checkpoint holds what one of this package does, and nothing that would run code, read elsewhere, or take
    more memory than its weights do.

    Args:
        folder (`str` or `Path`): Where it is.
        index (`dict`): Its `model_index.json`, with the modules as they are imported here.
        pipeline_class (`type`): Its pipeline.
        replaced (`dict`): What is passed instead of components of the checkpoint.

    Raises:
        ValueError: If not, in one sentence.
        FileNotFoundError: If a part of the weights is missing.
    """
    known = inspect.signature(pipeline_class.__init__).parameters
    for name, entry in index.items():
        if not isinstance(entry, list) or name.startswith("_") or entry[0] is None:
            continue
        if name not in known:
            raise ValueError(f"model_index.json: {name!r} is no component of a {pipeline_class.__name__}")
        if name not in replaced:
            check_component(Path(folder, name), _component_class(name, *entry))


def check_code(folder: Path) -> None:
    """
    Whether all Python files in a checkpoint are those of the installed package, for it to be run.

    Raises:
        ValueError: If one is not.
    """
    package = Path(hf_genmod.__file__).parent
    for file in [*folder.glob("*.py"), *folder.glob("*/*.py")]:
        modules = [package / part / file.name for part in ("models", "pipelines", "schedulers")]
        modules = [module for module in modules if module.is_file()]
        if not modules:
            raise ValueError(
                f"{file.relative_to(folder)} is no file of this package, or one of an earlier version: do not "
                "trust it; `load_pipeline(...).save_pretrained(...)` writes the installed code; delete what remains"
            )
        if bundle(modules[0]).encode() != file.read_bytes():
            raise ValueError(
                f"{file.relative_to(folder)} differs from the installed package, so the checkpoint may act "
                "differently without it; `load_pipeline(...).save_pretrained(...)` brings it up to date"
            )


def _component_class(name: str, module: str, class_name: str) -> type:
    kinds = {
        "unet": DenoisingUNet2DModel,
        "classifier": NoisyImageClassifier,
        "vae": (Autoencoder, VariationalAutoencoder, AutoencoderKL),
        "scheduler": SchedulerMixin,
    }
    if name not in kinds:
        from transformers import PreTrainedModel, PreTrainedTokenizerBase  # slow to import, and of use for text alone

        kinds |= {"text_encoder": PreTrainedModel, "tokenizer": PreTrainedTokenizerBase}
    cls = getattr(importlib.import_module(module), class_name, None)  # of this package, diffusers or transformers
    if not isinstance(cls, type) or not issubclass(cls, kinds[name]):
        raise ValueError(
            f"model_index.json: {name!r} is to be a {class_name!r} of {module}, which is none of its kind"
        )
    return cls


def check_component(folder: Path, cls: type) -> None:
    """The same of the folder of one component, which is to be of a class.

    Raises:
        ValueError: If it is not that.
    """
    for file in folder.glob("*.index.json"):
        _check_shards(folder, file.name, read_json(file))
    configs = {file.name: read_json(file) for file in folder.glob("*config.json")}
    for file, config in configs.items():
        for key, value in _settings_in(config):
            names_a_kernel = "implementation" in key and "/" in str(value)  # which is downloaded, and run
            if key in ("auto_map", "quantization_config", "custom_pipelines") or names_a_kernel:
                raise ValueError(f"{folder / file}: {key!r} names code that is not of this package; it is not loaded")
    scheduler_config = configs.get("scheduler_config.json", {})
    if not _is_at_most(scheduler_config.get("num_train_timesteps", 1), _MOST_TIMESTEPS):
        raise ValueError(f"{folder}: {scheduler_config['num_train_timesteps']!r} timesteps are no diffusion process")
    if issubclass(cls, torch.nn.Module) and list(folder.glob("*.safetensors")):
        _check_size(folder, cls, configs.get("config.json", {}))


def _settings_in(config) -> Iterator[tuple[str, object]]:
    """All settings of a config, and of the configs in it."""
    if isinstance(config, dict):
        yield from config.items()
        config = list(config.values())
    for part in config if isinstance(config, list) else ():
        yield from _settings_in(part)


def _check_shards(folder: Path, file: str, index: dict) -> None:
    shards = index.get("weight_map", {})
    shards = set(shards.values()) if isinstance(shards, dict) else {shards}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{folder / file}: {shard!r} is no file of safetensors beside it")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard}: a part of the weights is missing")


def _check_size(folder: Path, cls: type, config: dict) -> None:
    """Whether the config makes a model that the weights fill; nothing is allocated to find out."""
    size = config.get("sample_size", 1)
    sides = size if isinstance(size, list) else [size, size]
    if (
        len(sides) != 2
        or not all(_is_at_most(side, _MOST_PIXELS) for side in sides)
        or math.prod(sides) > _MOST_PIXELS
    ):
        raise ValueError(f"{folder}: pictures of the size {size!r} are more than {_MOST_PIXELS:,} pixels, or none")
    num_tensors, num_values = 0, 0
    for file in folder.glob("*.safetensors"):
        shapes = shapes_in(file)
        num_tensors += len(shapes)
        num_values += sum(math.prod(shape) for shape in shapes)
    for key, value in config.items():
        if re.search("layers|blocks", key) and isinstance(value, int) and value > num_tensors:
            raise ValueError(f"{folder}: {key} is {value:,}, and the weights are only {num_tensors} tensors")
    try:
        with torch.device("meta"):
            model = cls.from_config(config) if hasattr(cls, "from_config") else cls(cls.config_class(**config))
    except Exception as error:  # whatever a config can be the reason of
        raise ValueError(f"{folder}: its config is that of no {cls.__name__} ({first_line(error)})") from error
    expected = sum(parameter.numel() for parameter in model.parameters())
    if expected > num_values:
        raise ValueError(f"{folder}: its config is of {expected:,} numbers, and its weights are only {num_values:,}")


def shapes_in(file: Path) -> list[list[int]]:
    """Those of the tensors in a file of safetensors."""
    try:
        with safe_open(file, framework="pt") as opened:
            return [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a file of safetensors ({first_line(error)})") from error


def read_json(file: Path) -> dict:
    """The dictionary in a file of JSON."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise ValueError(f"{file}: not a file of JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: it holds no settings")
    return value


def _is_at_most(value, most: int) -> bool:
    return isinstance(value, int) and 1 <= value <= most
