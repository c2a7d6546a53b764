"""Checkpoints that carry the code of their own classes."""

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from .pictures import from_tensor, to_tensor

_IS_INSTALLED = not __name__.startswith("diffusers_modules.")  # else this file was read from a checkpoint


class ImagePipeline(DiffusionPipeline):
    """
    A pipeline that makes images and saves its own source: `from_pretrained(..., trust_remote_code=True)` of diffusers
    loads the checkpoint where this package is not installed.
    """

    denoises = False  # whether images are sampled in steps of a U-Net
    guidance_argument = None  # the argument that is the strength of guidance
    labels = {}  # the label of each class name

    def request_for(self, pictures, indices: Sequence[int]) -> dict[str, list]:
        """
        What the pipeline is asked by to draw images like those of a data set.

        Args:
            pictures ([`PictureDataset`]): Images, with labels or captions where the pipeline takes them.
            indices (`Sequence[int]`): Which of them.

        Returns:
            `dict[str, list]`: For each argument of `__call__` a list with one value per image; empty where images
            differ by their seeds alone.
        """
        return {}

    def example_request(self) -> dict:
        """The arguments of `__call__` for one image; the defaults serve for those left out."""
        return {}

    def _shipped(self):
        """(folder in the checkpoint, name in the index, class, file name, source) of the pipeline and its components,
        of those whose source is saved."""
        modules = {"": self} | {
            name: getattr(component, "_orig_mod", component)  # `_orig_mod`: compiled by torch
            for name, component in self.components.items()
        }
        for folder, module in modules.items():
            bundle = _bundle_of(type(module))
            if bundle is not None:
                yield folder, folder or "_class_name", type(module), *bundle

    def to_json_string(self) -> str:
        """The index of the checkpoint: an own class is (file, class), a file that lies beside the weights."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        for _, name, cls, stem, _ in self._shipped():
            index[name] = [stem, cls.__name__]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Writes `model_index.json` and, where diffusers looks for it, the source of each own class; removes those of
        an earlier save."""
        index_file = Path(save_directory, self.config_name)
        index = json.loads(index_file.read_text(encoding="utf-8")) if index_file.is_file() else {}
        for name, entry in index.items():
            known = isinstance(entry, list) and name in ("_class_name", *self.components)
            if known and str(entry[0]).isidentifier():  # a foreign index could name any path
                Path(save_directory, "" if name == "_class_name" else name, f"{entry[0]}.py").unlink(missing_ok=True)
        for folder, _, _, stem, source in self._shipped():
            file = Path(save_directory, folder, f"{stem}.py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source, encoding="utf-8")
        for folder in ("", *self.components):
            for name in ("config.json", "tokenizer_config.json"):
                _forget_path(Path(save_directory, folder, name))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Reads the index; where this package is installed, with the installed classes."""
        loaded = super().load_config(*args, **kwargs)
        if _IS_INSTALLED:
            reading = importlib.import_module("hf_genmod.checkpoints.reading")
            reading.use_installed_classes(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """
        Loads a checkpoint from a folder or the Hub. Where this package is installed, its own classes are used: no code
        of the checkpoint is executed, and weights are read from safetensors only.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or the id of a repository on the Hub.
            kwargs: As [`~diffusers.DiffusionPipeline.from_pretrained`] takes them (`torch_dtype`, `variant`,
                `revision`, `token`, `scheduler=...`, ...).

        Raises:
            FileNotFoundError: If there is no checkpoint at the path, or a component lacks its weights.
        """
        if _IS_INSTALLED:
            reading = importlib.import_module("hf_genmod.checkpoints.reading")
            pretrained_model_name_or_path, kwargs = reading.checked(cls, pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def postprocess(self, images: torch.Tensor, output_type: str = "pil"):
        """Images in [-1, 1], (n, channels, height, width), as `"pil"`, `"np"` or `"pt"`, see `__call__`."""
        return from_tensor(images, output_type, self.config.get("value_range"))

    def preprocess(self, images, channels: int) -> torch.Tensor:
        """The inverse of `postprocess`: PIL images, one or a list of them, an array, (n, height, width, channels), or
        a tensor, (n, channels, height, width), in [0, 1] or in the units of the data, as a tensor in [-1, 1]."""
        return to_tensor(images, channels, self.config.get("value_range"))


def _bundle_of(cls: type) -> tuple[str, str] | None:
    """The file name, without its ending, and the source of a class of this package, installed or from a checkpoint."""
    captured = vars(cls).get("_bundle")  # set at the end of a bundle
    if captured is None and cls.__module__.startswith("hf_genmod."):
        return importlib.import_module("hf_genmod.checkpoints.bundle").bundle_of(cls)
    return captured


def _forget_path(config_file: Path) -> None:
    """Removes from the config of a component the path that it was loaded from."""
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    known = len(config)
    for key in ("_name_or_path", "name_or_path", "is_local", "local_files_only"):
        config.pop(key, None)
    if len(config) < known:
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
