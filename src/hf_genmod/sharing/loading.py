"""Loads pipelines and autoencoders."""

import os
from pathlib import Path

from diffusers import AutoencoderKL, ModelMixin
from huggingface_hub import snapshot_download

import hf_genmod
from hf_genmod.checkpoints.reading import complete_folder, with_dtypes
from hf_genmod.checkpoints.safety import check_component
from hf_genmod.errors import first_line
from hf_genmod.hub import why_missing
from hf_genmod.models.image_autoencoder import Autoencoder
from hf_genmod.models.variational_autoencoder import VariationalAutoencoder
from hf_genmod.pipelines.checkpoint import ImagePipeline


def load_pipeline(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> ImagePipeline:
    """
    Loads a checkpoint of this package as the pipeline that its index names, with the installed classes: the code in
    the checkpoint is not executed, and weights are read from safetensors only.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or the id of a repository on the Hub.
        kwargs (`dict`): As [`~diffusers.DiffusionPipeline.from_pretrained`] takes them (`dtype`, `variant`,
            `revision`, `token`, `scheduler=...`, ...).

    Raises:
        FileNotFoundError: If there is no checkpoint at the path, or the weights of a component are missing.
        ValueError: If the checkpoint is not one of this package, or needs foreign code, files elsewhere or more memory
            than its weights.
    """
    folder = complete_folder(pretrained_model_name_or_path, kwargs)
    name = ImagePipeline.load_config(folder).get("_class_name")
    cls = getattr(hf_genmod, name) if name in hf_genmod.__all__ else None
    if not (isinstance(cls, type) and issubclass(cls, ImagePipeline)):
        raise ValueError(f"{folder}: its pipeline {name!r} is not of this package; open it with DiffusionPipeline")
    return cls.from_pretrained(folder, **kwargs)


def load_vae(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> ModelMixin:
    """
    Loads an autoencoder for latent diffusion: the `vae/` of a checkpoint of this package or of diffusers, or a folder
    that holds an autoencoder alone. As in `load_pipeline`, no code is executed and no pickle is read.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or the id of a repository on the Hub.
        kwargs (`dict`): As `from_pretrained` takes them (`dtype`, `revision`, `token`, ...).

    Raises:
        ValueError: If the autoencoder needs foreign code, files elsewhere or more memory than its weights.
        FileNotFoundError: If the path has no [`Autoencoder`], [`VariationalAutoencoder`] or `AutoencoderKL`, or the
            weights are missing.
    """
    path, kwargs = str(pretrained_model_name_or_path), with_dtypes(kwargs)
    options = {name: kwargs[name] for name in ("cache_dir", "local_files_only", "revision", "token") if name in kwargs}
    of_hub = {name: options[name] for name in ("cache_dir", "token") if name in options}
    is_local = os.path.isdir(path) or options.get("local_files_only", False)
    reason = None if is_local else why_missing(path, **of_hub)
    known = {model_class.__name__: model_class for model_class in (Autoencoder, VariationalAutoencoder, AutoencoderKL)}
    for subfolder in ("vae", None) if reason is None else ():
        try:
            config = AutoencoderKL.load_config(path, subfolder=subfolder, **options)
        except OSError as error:
            reason = first_line(error)
            continue
        name = config.get("_class_name")
        if name not in known:
            reason = f"its class is {name} and not one of {', '.join(known)}"
            break
        try:
            patterns = [Path(subfolder or "", kind).as_posix() for kind in ("*.json", "*.safetensors")]
            folder = path if os.path.isdir(path) else snapshot_download(path, allow_patterns=patterns, **options)
            check_component(Path(folder, subfolder or ""), known[name])
            return known[name].from_pretrained(path, subfolder=subfolder, use_safetensors=True, **kwargs)
        except OSError as error:
            raise FileNotFoundError(f"vae: the weights in {path!r} cannot be read ({first_line(error)})") from error
    place = "" if os.path.isdir(path) else ", and no folder here"
    raise FileNotFoundError(
        f"vae: {path!r} is neither an autoencoder nor a checkpoint with one{place} ({reason}); give the folder "
        "of one, such as the output_dir of train_vae.py, or an id on the Hub"
    )
