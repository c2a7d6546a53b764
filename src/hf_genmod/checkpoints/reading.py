"""Reads a checkpoint with the installed classes: none of its code is executed."""

import inspect
import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin  # noqa: F401 (see `__getattr__`)
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import hf_hub_download, snapshot_download

import hf_genmod
from hf_genmod.checkpoints.safety import check_component, class_of_component, read_json
from hf_genmod.errors import a_or_an, first_line, shortened
from hf_genmod.hub import can_be_id, did_you_mean, why_missing
from hf_genmod.schedulers.ancestral_ddpm import TRAINING_KEYS


def checked(cls: type, path: str | os.PathLike, kwargs: dict) -> tuple[str | os.PathLike, dict]:
    """
    The folder of a checkpoint, downloaded without its code, and the arguments by which diffusers reads it safely, for
    the pipeline class, the path and the keyword arguments of a call of `from_pretrained`.

    Raises:
        FileNotFoundError: If there is no checkpoint at the path, or a component lacks its weights.
        ValueError: If the checkpoint needs foreign code, files elsewhere or more memory than its weights, or holds a
            component that the pipeline does not have.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in ("trust_remote_code", "use_safetensors")}
    kwargs = with_dtypes(kwargs)
    folder, known = complete_folder(path, kwargs), inspect.signature(cls.__init__).parameters
    index = cls.load_config(folder)
    for name in component_names(index):
        if name not in known:
            raise ValueError(f"model_index.json: {a_or_an(cls.__name__)} has no component {name!r}")
        if name not in kwargs:
            check_component(Path(folder, name), class_of_component(name, *index[name]))
    if "scheduler" in kwargs and "process" in known and "process" not in index:  # of an earlier version
        config = read_json(Path(folder, "scheduler", "scheduler_config.json"))
        kwargs = {"process": {key: config[key] for key in TRAINING_KEYS & config.keys()}} | kwargs
    return folder, kwargs | {"use_safetensors": True}


def with_dtypes(kwargs: dict) -> dict:
    """The keyword arguments of a call of `from_pretrained`, whose `torch_dtype` or `dtype` may be the name of one."""

    def dtype_of(name, value):
        if isinstance(value, dict):  # of each component
            return {component: dtype_of(name, dtype) for component, dtype in value.items()}
        dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
        if value is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            return dtype
        raise ValueError(
            f"{name}: {value!r} is no dtype of floats; give torch.float16, torch.bfloat16 or torch.float32"
        )

    return {name: dtype_of(name, x) if name in ("torch_dtype", "dtype") else x for name, x in kwargs.items()}


def complete_folder(path: str | os.PathLike, kwargs: dict) -> str | os.PathLike:
    """
    The folder of a checkpoint, downloaded without its code if `path` is the id of a repository on the Hub. The options
    of the download are removed from `kwargs`, the keyword arguments of a call of `from_pretrained`.

    Raises:
        FileNotFoundError: If there is no checkpoint at the path, or a component lacks its weights.
    """
    folder = path if os.path.isdir(path) else _download(str(path), kwargs)
    index_file = Path(folder, DiffusionPipeline.config_name)
    if not index_file.is_file():
        kind = "not the folder of a pipeline"
        if Path(folder, "training_config.json").is_file():
            kind = "an unfinished run; repeat the command of the run, which continues it"
        if Path(folder, LORA_WEIGHT_NAME_SAFE).is_file():
            kind = "an adapter; load its model, then the adapter by load_lora_weights or --adapter"
        raise FileNotFoundError(f"{folder}: no {index_file.name} in it, so it is {kind}")
    for name in component_names(read_json(index_file)):
        component = Path(folder, name)
        if name not in kwargs and not component.is_dir():
            raise FileNotFoundError(f"{component}: the folder of the component {name!r} is missing")
        if name not in kwargs and (component / "config.json").is_file() and not list(component.glob("*.safetensors")):
            raise FileNotFoundError(f"{component}: the weights of {name!r} (*.safetensors) are missing")
    return folder


def _download(repo_id: str, kwargs: dict) -> str:
    """Downloads the index, configs and safetensors of a repository on the Hub."""
    names = ("cache_dir", "force_download", "local_files_only", "revision", "token")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    if not can_be_id(repo_id):
        reason = "is not a folder, nor can it be the id of a repository on the Hub"
        raise FileNotFoundError(f"{repo_id!r} {reason}; {did_you_mean(repo_id) or 'check the path'}")
    parent = Path(repo_id).parent
    siblings = sorted(index.parent.name for index in parent.glob("*/model_index.json")) if parent.name else []
    if siblings:
        others = f"{parent} holds the checkpoints {shortened(siblings)}: check the spelling"
        raise FileNotFoundError(f"{repo_id!r} is not a folder; {did_you_mean(repo_id) or others}")
    of_hub = {name: options[name] for name in ("cache_dir", "token") if name in options}
    if not options.get("local_files_only") and (reason := why_missing(repo_id, **of_hub)):
        raise FileNotFoundError(f"{repo_id!r} is not a folder here, and {reason}")
    try:
        index_file = hf_hub_download(repo_id, DiffusionPipeline.config_name, **options)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise FileNotFoundError(f"{repo_id!r} is not a folder here, nor a pipeline on the Hub: {reason}") from error
    components, endings = component_names(read_json(Path(index_file))), (".json", ".safetensors", ".txt", ".model")
    patterns = [f"{name}/*{ending}" for name in components for ending in endings]
    return snapshot_download(repo_id, allow_patterns=[DiffusionPipeline.config_name, *patterns], **options)


def component_names(index: dict) -> list[str]:
    """The names of the components in a `model_index.json`. Each entry must be (module, class), or (None, None) for an
    absent component, or there is a ValueError."""
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and name != "_class_name"}
    for name, entry in entries.items():
        are_words = len(entry) == 2 and all(word is None or isinstance(word, str) for word in entry)
        if not are_words or not name.isidentifier():
            raise ValueError(f"model_index.json: {name!r}: {entry!r} is not a component of a pipeline")
    return [name for name, entry in entries.items() if entry[0] is not None]


def use_installed_classes(index: dict) -> None:
    """
    Replaces the file of each own class in an index by this module, which has the installed classes.

    Raises:
        ValueError: If a class is neither of this package nor of diffusers or transformers, or `AutoModel` would be
            given another file than that of this package.
    """
    own = {"AutoModel": "component.Component"}  # as `ImagePipeline.to_json_string` writes it
    if index.pop("auto_map", own) != own:
        raise ValueError("model_index.json: 'auto_map' names code from outside this package, which is not loaded")
    if isinstance(index.get("_class_name"), list):
        index["_class_name"] = index["_class_name"][1]
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] in (None, "diffusers", "transformers"):
            continue
        if entry[1] not in hf_genmod.__all__:
            raise ValueError(
                f"model_index.json: {name!r} names the module {entry[0]!r}, which is neither part of this package nor "
                "of diffusers or transformers; if you trust the checkpoint, open it with "
                "DiffusionPipeline.from_pretrained(..., trust_remote_code=True)"
            )
        index[name] = [__name__, entry[1]]


def __getattr__(name: str):
    """The installed classes. diffusers looks for a class, and for the base class that says how to load it, in the one
    module that an index names."""
    if name in hf_genmod.__all__:
        return getattr(hf_genmod, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
