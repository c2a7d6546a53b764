"""Checkpoints in and out of folders and the Hub."""

import os

from diffusers import AutoencoderKL, ModelMixin

from hf_genmod.models.image_autoencoder import Autoencoder, VariationalAutoencoder
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
    Loads an autoencoder for a latent space: the `vae/` of a checkpoint, of this package or of diffusers, or one by
    itself; as `load_pipeline`, without executing code or reading pickles.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or the id of a repository on the Hub.
        kwargs: As `from_pretrained` takes them (`torch_dtype`, `revision`, `token`, ...).

    Raises:
        FileNotFoundError: If there is none that is an [`Autoencoder`], [`VariationalAutoencoder`] or `AutoencoderKL`,
            or it lacks its weights.
    """
    path = str(pretrained_model_name_or_path)
    options = {name: kwargs[name] for name in ("cache_dir", "local_files_only", "revision", "token") if name in kwargs}
    known = {model_class.__name__: model_class for model_class in (Autoencoder, VariationalAutoencoder, AutoencoderKL)}
    for subfolder in ("vae", None):
        try:
            config = AutoencoderKL.load_config(path, subfolder=subfolder, **options)
        except OSError as error:
            reason = str(error).splitlines()[0]
            continue
        name = config.get("_class_name")
        if name not in known:
            reason = f"its class is {name} and not one of {', '.join(known)}"
            break
        try:
            return known[name].from_pretrained(path, subfolder=subfolder, use_safetensors=True, **kwargs)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(f"vae: the weights in {path!r} cannot be read ({reason})") from error
    raise FileNotFoundError(f"vae: {path!r} is neither an autoencoder nor a checkpoint with one ({reason})")
