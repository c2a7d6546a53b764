"""Checkpoints in and out of folders and the Hub."""

import json
import os
from pathlib import Path

from diffusers import AutoModel, ModelMixin

from hf_genmod.models import image_autoencoder
from hf_genmod.pipelines.genmod_pipelines import GenerationPipeline


def load_pipeline(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> GenerationPipeline:
    """
    Loads any checkpoint of this package, as the pipeline that it names, with the installed classes: no code of the
    checkpoint is executed, and weights are read from safetensors only.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or the id of a repository on the Hub.
        kwargs: As [`~diffusers.DiffusionPipeline.from_pretrained`] takes them (`torch_dtype`, `variant`, `revision`,
            `token`, `scheduler=...`, ...).

    Raises:
        FileNotFoundError: If there is no checkpoint at the path, or a component lacks its weights.
        ValueError: If the checkpoint is not one of this package.
    """
    return GenerationPipeline.from_pretrained(pretrained_model_name_or_path, **kwargs)


def load_vae(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> ModelMixin:
    """
    Loads an autoencoder for a latent space: the one in a checkpoint of this package, of diffusers (its folder `vae/`),
    or one by itself; as `load_pipeline`, without executing code or reading pickles.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or the id of a repository on the Hub.
        kwargs: As `from_pretrained` takes them (`torch_dtype`, `revision`, `token`, ...).

    Raises:
        FileNotFoundError, ValueError: If there is none.
    """
    path = str(pretrained_model_name_or_path)
    config_file = Path(path, "config.json")
    if config_file.is_file():
        name = json.loads(config_file.read_text(encoding="utf-8")).get("_class_name")
        model_class = getattr(image_autoencoder, name, AutoModel) if isinstance(name, str) else AutoModel
        return model_class.from_pretrained(path, use_safetensors=True, **kwargs)
    try:
        vae = load_pipeline(path, **kwargs).components.get("vae")
    except (ValueError, OSError) as not_ours:
        vae = None
        for subfolder in ("vae", None):
            try:
                vae = AutoModel.from_pretrained(path, subfolder=subfolder, use_safetensors=True, **kwargs)
                break
            except (ValueError, OSError):
                continue
        if vae is None:
            raise type(not_ours)(f"vae: {not_ours}") from not_ours
    if vae is None:
        raise ValueError(f"vae: the checkpoint {path} has no autoencoder; it works on pixels")
    return vae
