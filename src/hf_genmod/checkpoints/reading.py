"""Reads a checkpoint with the installed classes: none of its code is executed."""

import json
import os
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin  # noqa: F401 (see `__getattr__`)
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import hf_hub_download, snapshot_download

import hf_genmod
from hf_genmod.checkpoints.safety import check_checkpoint
from hf_genmod.errors import first_line


def checked(cls: type, path: str | os.PathLike, kwargs: dict) -> tuple[str | os.PathLike, dict]:
    """
    The folder of a checkpoint, downloaded without its code, and the arguments by which diffusers reads it safely.

    Args:
        cls (`type`): The pipeline that it is loaded as.
        path (`str` or `os.PathLike`): A folder, or the id of a repository on the Hub.
        kwargs (`dict`): The arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: If there is no checkpoint at the path, or a component lacks its weights.
        ValueError: If it asks for code, for files elsewhere or for more memory than its weights take.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in ("trust_remote_code", "use_safetensors")}
    folder = path if os.path.isdir(path) else download_checkpoint(str(path), kwargs)
    check_complete(folder, replaced=kwargs)
    check_checkpoint(folder, cls.load_config(folder), cls, replaced=kwargs)
    return folder, kwargs | {"use_safetensors": True}


def use_installed_classes(index: dict) -> None:
    """
    Replaces the files in an index by the modules of the installed classes, which are found by the names of these.

    Raises:
        ValueError: If a class is neither of this package nor of diffusers or transformers.
    """
    if isinstance(index.get("_class_name"), list):
        index["_class_name"] = index["_class_name"][1]
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] in (None, "diffusers", "transformers"):
            continue
        if entry[1] not in hf_genmod.__all__:
            raise ValueError(
                f"model_index.json: {name!r} names the module {entry[0]!r}, which is neither part of this package "
                "nor of diffusers or transformers; if you trust the checkpoint, open it with "
                "DiffusionPipeline.from_pretrained(..., trust_remote_code=True)"
            )
        index[name] = [__name__, entry[1]]


def __getattr__(name: str):
    """The installed classes: diffusers looks for a class, and for the base class that says how to load it, in one
    module, which an index thus names."""
    if name in hf_genmod.__all__:
        return getattr(hf_genmod, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def download_checkpoint(repo_id: str, kwargs: dict) -> str:
    """Fetches the index, configs and safetensors of a repository on the Hub, and no code; pops what it uses."""
    names = ("cache_dir", "force_download", "local_files_only", "revision", "token")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    if repo_id.count("/") > 1 or repo_id.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{repo_id!r} is not a folder, nor can it be the id of a repository on the Hub")
    parent = Path(repo_id).parent
    siblings = sorted(index.parent.name for index in parent.glob("*/model_index.json")) if parent.name else []
    if siblings:
        raise FileNotFoundError(
            f"{repo_id!r} is not a folder; {parent} holds the checkpoints {', '.join(siblings[:10])}: check the "
            "spelling"
        )
    try:
        index_file = hf_hub_download(repo_id, DiffusionPipeline.config_name, **options)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{repo_id!r} is not a folder here, nor a pipeline on the Hub: {first_line(error)}"
        ) from error
    components = [name for name, entry in read_index(index_file).items() if isinstance(entry, list)]
    patterns = [f"{name}/*{ending}" for name in components for ending in (".json", ".safetensors", ".txt", ".model")]
    return snapshot_download(repo_id, allow_patterns=[DiffusionPipeline.config_name, *patterns], **options)


def check_complete(folder: str | os.PathLike, replaced: dict) -> None:
    """Says what is missing before a loader three libraries down does."""
    index_file = Path(folder, DiffusionPipeline.config_name)
    if not index_file.is_file():
        kind = "not the folder of a pipeline"
        if Path(folder, "training_config.json").is_file():
            kind = "a run that is not over; repeat its command, which continues it"
        if Path(folder, LORA_WEIGHT_NAME_SAFE).is_file():
            kind = "an adapter; load the model that it is for, and then it by load_lora_weights"
        raise FileNotFoundError(f"{folder}: no {index_file.name} in it, so it is {kind}")
    for name, entry in read_index(index_file).items():
        if not isinstance(entry, list) or entry[0] is None or name in replaced:
            continue
        if Path(folder, name, "config.json").is_file() and not list(Path(folder, name).glob("*.safetensors")):
            raise FileNotFoundError(f"{Path(folder, name)}: the weights of {name!r} (*.safetensors) are missing")
        if not Path(folder, name).is_dir():
            raise FileNotFoundError(f"{Path(folder, name)}: the folder of the component {name!r} is missing")


def read_index(file: str | os.PathLike) -> dict:
    """The index of a checkpoint, without its first line, whose components are (module, class)."""
    try:
        index = dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: not the index of a checkpoint ({type(error).__name__})") from error
    index.pop("_class_name", None)
    for name, entry in index.items():
        words = entry if isinstance(entry, list) else []
        if (words and not name.isidentifier()) or not all(word is None or isinstance(word, str) for word in words):
            raise ValueError(f"{file}: {name!r}: {entry!r} is no component of a pipeline")
    return index
