"""Checkpoints that carry the code of their own classes."""

import importlib
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from ..models.image_model import in_safetensors_only, source_of
from .pictures import PictureProcessor

IS_INSTALLED = not __name__.startswith("diffusers_modules.")  # else this file was read from a checkpoint


def _of_vae(name: str):
    """A method of a pipeline that calls the method `name` of its autoencoder."""

    def switch(self):
        if not hasattr(getattr(self, "vae", None), name):
            raise ValueError(f"vae: this pipeline has no autoencoder with {name}; leave it out")
        getattr(self.vae, name)()

    return switch


class ImagePipeline(DiffusionPipeline):
    """A pipeline that makes images and saves its own source: `from_pretrained(..., trust_remote_code=True)` of
    diffusers loads the checkpoint where this package is not installed."""

    denoises = False  # whether images are sampled in steps of a U-Net
    guidance_argument = None  # the argument that is the strength of guidance
    labels = {}  # the label of each class name
    _processor = PictureProcessor
    save_pretrained = in_safetensors_only(DiffusionPipeline.save_pretrained)
    push_to_hub = in_safetensors_only(DiffusionPipeline.push_to_hub)
    # Images are decoded one by one, or in tiles, which takes less memory.
    enable_vae_slicing, disable_vae_slicing = _of_vae("enable_slicing"), _of_vae("disable_slicing")
    enable_vae_tiling, disable_vae_tiling = _of_vae("enable_tiling"), _of_vae("disable_tiling")

    def __init__(self, components: dict, **config):
        super().__init__()
        self._check_config(components, config)
        self.register_modules(**components)
        self.register_to_config(**config)

    def _check_config(self, *parts):
        """See `check_parts`."""
        if IS_INSTALLED:
            importlib.import_module("hf_genmod.checkpoints.parts").check_parts(self, *parts)

    def request_for(self, pictures, indices: Sequence[int]) -> dict[str, list]:
        """What asks the pipeline for images like some of a [`PictureDataset`]: for each argument of `__call__` a list
        with one value per image; empty where images differ by their seeds alone."""
        return {}

    def example_request(self) -> dict:
        """The arguments of `__call__` for one image; the defaults serve for those left out."""
        return {}

    def _shipped(self):
        """(name in the index, class, file name, source) of the pipeline and its components whose source is saved."""
        for name, module in {"_class_name": self, **self.components}.items():
            cls = type(getattr(module, "_orig_mod", module))  # `_orig_mod`: compiled by torch
            if shipped := source_of(cls):
                yield name, cls, *shipped

    def to_json_string(self) -> str:
        """The index of the checkpoint: an own class is (file, class), a file that lies beside the weights."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        index |= {name: [stem, cls.__name__] for name, cls, stem, _ in self._shipped()}
        if any(hasattr(model, "component_source") for model in self.components.values()):
            index["auto_map"] = {"AutoModel": "component.Component"}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Writes `model_index.json` and the source of each own class; removes old sources, and paths in configs."""
        roots = {name: Path(save_directory, name) for name in self.components} | {"_class_name": Path(save_directory)}
        index_file = Path(save_directory, self.config_name)
        index = json.loads(index_file.read_text(encoding="utf-8")) if index_file.is_file() else {}
        for name, root in roots.items():
            if isinstance(old := index.get(name), list) and str(old[0]).isidentifier():  # foreign ones may be any path
                (root / f"{old[0]}.py").unlink(missing_ok=True)
        for name, _, stem, source in self._shipped():
            roots[name].mkdir(parents=True, exist_ok=True)
            (roots[name] / f"{stem}.py").write_text(source, encoding="utf-8", newline="\n")  # alike on every system
        sources = [model.component_source for model in self.components.values() if hasattr(model, "component_source")]
        for file in [file for name in self.components for file in roots[name].glob("*config.json")]:
            config = json.loads(file.read_text(encoding="utf-8"))
            kept = {*config} - {"_name_or_path", "name_or_path", "is_local", "local_files_only"}
            file.write_text(json.dumps({key: config[key] for key in sorted(kept)}, indent=2) + "\n", encoding="utf-8")
            if sources and file.name == "config.json":
                file.with_name("component.py").write_text(sources[0], encoding="utf-8", newline="\n")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):  # diffusers would warn of what is for `AutoModel`
        return super().extract_init_dict({key: config_dict[key] for key in {*config_dict} - {"auto_map"}}, **kwargs)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Reads the index; where this package is installed, with the installed classes."""
        loaded = super().load_config(*args, **kwargs)
        if IS_INSTALLED:
            reading = importlib.import_module("hf_genmod.checkpoints.reading")
            reading.use_installed_classes(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """
        Loads a checkpoint from a folder or the Hub, with the arguments of
        [`~diffusers.DiffusionPipeline.from_pretrained`]. Where this package is installed, its own classes are used: no
        code of the checkpoint is executed, and weights are read from safetensors only.

        Raises:
            FileNotFoundError: If there is no checkpoint at the path, or a component lacks its weights.
        """
        if IS_INSTALLED:
            reading = importlib.import_module("hf_genmod.checkpoints.reading")
            pretrained_model_name_or_path, kwargs = reading.checked(cls, pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """A pipeline that shares the components of another one and has its config, except for those in `kwargs`."""
        given = {**pipeline.config, **pipeline.components}
        return cls(**{name: given[name] for name in inspect.signature(cls).parameters if name in given} | kwargs)

    @property
    def image_processor(self) -> PictureProcessor:
        """Converts images of the pipeline to tensors in [-1, 1] and back."""
        channels = (getattr(self, "vae", None) or self.unet).config.in_channels
        return self._processor(channels, self.config.get("value_range"))

    def postprocess(self, images: torch.Tensor, output_type: str = "pil"):
        """Images in [-1, 1], (n, channels, height, width), as `"pil"`, `"np"` or `"pt"`, see `__call__`."""
        return self.image_processor.postprocess(images, output_type)

    def _finished(self, z: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """The output of a call that ends with the latents z."""
        images = self.postprocess(z if output_type == "latent" else self.decode(z), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def preprocess(self, images, channels: int) -> torch.Tensor:
        """The inverse of `postprocess`, see [`PictureReader`] and [`PictureProcessor`]."""
        return self._processor(channels, self.config.get("value_range")).preprocess(images)
