"""Checkpoints in and out of folders and the Hub."""

import os

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
