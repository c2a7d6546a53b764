"""What all networks share: the sizes of images and the widths of layers that they take, and how they are saved."""

import functools
import importlib
import inspect
import os
from pathlib import Path

from diffusers import ConfigMixin, ModelMixin


def pair(size) -> tuple[int, int]:
    """(height, width) of a size, which a config gives as one number or as two."""
    return (size, size) if isinstance(size, int) else tuple(size)


def in_safetensors_only(save):
    """A method of diffusers that saves, which is to refuse `safe_serialization=False`."""

    @functools.wraps(save)
    def save_safely(self, *args, **kwargs):
        if not inspect.signature(save).bind(self, *args, **kwargs).arguments.get("safe_serialization", True):
            raise ValueError("safe_serialization: False would write pickles, which are not loaded again; leave it out")
        self._check_config()
        return save(self, *args, **kwargs)

    return save_safely


def source_of(cls: type) -> tuple[str, str] | None:
    """The name of the file, without its ending, and the source that a class is shipped with; `None` for others'."""
    if not cls.__module__.startswith("hf_genmod."):
        return vars(cls).get("_bundle")  # set at the end of a bundle
    return importlib.import_module("hf_genmod.checkpoints.bundle").bundle_of(cls)


# `AutoModel` reads the index of a checkpoint, which names one file and class for the models in all folders: this one.
COMPONENT = '''"""The model in this folder, of the class that the index names."""

import importlib

from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

_OF_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class Component:
    @classmethod
    def from_pretrained(cls, path, subfolder, **kwargs):
        options = {name: kwargs[name] for name in _OF_HUB if kwargs.get(name) is not None}
        module, name = DiffusionPipeline.load_config(path, **options)[subfolder]
        if module in ("diffusers", "transformers"):
            known = getattr(importlib.import_module(module), name)
        else:
            options |= {"class_name": name, "trust_remote_code": True}  # `AutoModel` has asked
            known = get_class_from_dynamic_module(path, f"{module}.py", subfolder, **options)
        return known.from_pretrained(path, subfolder=subfolder, **kwargs)
'''


class ImageModel(ModelMixin, ConfigMixin):
    """A network that folds patches of an image into channels and halves height and width from level to level."""

    component_source = COMPONENT
    _auto_class = "AutoModel"  # so that config.json names the file and the class
    save_pretrained = in_safetensors_only(ModelMixin.save_pretrained)
    push_to_hub = in_safetensors_only(ModelMixin.push_to_hub)
    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Writes the config and, beside it, the source of the class."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        if shipped := source_of(type(self)):
            Path(save_directory, f"{shipped[0]}.py").write_text(shipped[1], encoding="utf-8", newline="\n")

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """The arguments of the class in a config, without `auto_map`, which diffusers would warn of."""
        return super().extract_init_dict({key: config_dict[key] for key in {*config_dict} - {"auto_map"}}, **kwargs)

    @property
    def size_factor(self) -> int:
        """The number that divides height and width of every image that the network takes."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises `ValueError` if the network cannot fold and halve images of `size` = (height, width)."""
        factor = self.size_factor
        if any(length % factor for length in size):
            below = tuple(max(length // factor, 1) * factor for length in size)
            above = tuple(-(-length // factor) * factor for length in size)
            raise ValueError(
                f"resolution {size[0]}x{size[1]}: this network (patch_size {self.config.patch_size}, "
                f"{len(self.config.block_out_channels)} levels) needs a height and width that {factor} divides, such "
                f"as {below[0]}x{below[1]} or {above[0]}x{above[1]}"
            )

    def _check_config(self) -> None:
        for width in self.config.block_out_channels:
            if width < 1 or width % self.config.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: {width} is not a positive multiple of norm_num_groups "
                    f"({self.config.norm_num_groups}); change one of them"
                )
        self.check_size(pair(self.config.sample_size))

    def _check_images(self, sample) -> None:
        channels = self.config.in_channels
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"sample: shape {tuple(sample.shape)} is not (n, {channels}, height, width)")
        self.check_size(tuple(sample.shape[2:]))
