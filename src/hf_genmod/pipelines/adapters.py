"""Low-rank adapters (LoRA) of a pipeline."""

import contextlib
import importlib
import inspect
import json
import os
import warnings
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from huggingface_hub import hf_hub_download

from ..errors import first_line
from .checkpoint import IS_INSTALLED


class AdapterMixin(LoraBaseMixin):
    """The part of `GenerationPipeline` about adapters of the U-Net and the text encoder: load, save, fuse and detach.
    A pipeline whose classes can grow overrides `_add_classes_of`."""

    _lora_loadable_modules = ["unet", "text_encoder"]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str | None = None,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
        **kwargs,
    ):
        """
        Attaches a low-rank adapter, W + B A (Hu et al. 2021, https://arxiv.org/abs/2106.09685), to the U-Net and, if
        the adapter has a part for it, to the text encoder. The new adapter alone is active; `set_adapters` activates
        several, with weights. The classes of the adapter join `labels` until it is deleted or unloaded.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, a file, or a repository on the Hub.
            adapter_name (`str`, *optional*): Its name; by default "default_0", "default_1", ...
            weight_name (`str`): The name of the file in the folder or repository.
            kwargs: `subfolder`, and `revision`, `token`, ... of [`~huggingface_hub.hf_hub_download`].

        Raises:
            FileNotFoundError: If there is no adapter at the path.
            ValueError: If the adapter is for another model, or its name or the name of one of its classes is taken.
                The pipeline is then unchanged.
        """
        from peft import LoraConfig, set_peft_model_state_dict

        self._check_not_compiled()
        path = os.fspath(pretrained_model_name_or_path)
        state, metadata = _read_adapter(path, weight_name, **kwargs)
        names, rows = metadata.pop("class_names", []), state.pop("class_embedding", ())
        taken = self._attached()
        adapter_name = adapter_name or next(n for i in range(len(taken) + 1) if (n := f"default_{i}") not in taken)
        if adapter_name in taken:
            raise ValueError(f"adapter_name: {adapter_name!r} is attached already; choose another, or delete that one")
        if "." in adapter_name:
            raise ValueError(f"adapter_name: {adapter_name!r} has a dot in it, which names of modules cannot have")
        parts = {}  # weights and config of each component
        for component in sorted({key.partition(".")[0] for key in state}):
            start, both = f"{component}.", (state, metadata)
            parts[component] = [{k.removeprefix(start): of[k] for k in of if k.startswith(start)} for of in both]
        if IS_INSTALLED:
            safety = importlib.import_module("hf_genmod.checkpoints.safety")
            for component, (weights, config) in parts.items():
                safety.check_adapter(path, component, getattr(self, component, None), weights, config)
        with self._without_offloading(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are allowed
            if names or len(rows):
                self._add_classes_of(path, adapter_name, names, rows)
            try:
                if "text_encoder" in parts:
                    weights, config = parts["text_encoder"]
                    self.text_encoder.add_adapter(LoraConfig(**config), adapter_name)
                    set_peft_model_state_dict(self.text_encoder, weights, adapter_name)
                if "unet" in parts:
                    weights, config = parts["unet"]
                    options = {"adapter_name": adapter_name, "metadata": config or None, "_pipeline": self}
                    self.unet.load_lora_adapter(weights, prefix=None, **options)
                self.set_adapters(adapter_name)
            except Exception as error:  # of peft, about a config that it does not understand
                self._detach(adapter_name)
                raise ValueError(f"{path}: it cannot be attached ({first_line(error)})") from error

    def save_lora_weights(self, save_directory: str | os.PathLike, adapter_name: str | None = None, **kwargs):
        """Writes an adapter to a folder, see `hf_genmod.checkpoints.adapters.save`."""
        importlib.import_module("hf_genmod.checkpoints.adapters").save(self, save_directory, adapter_name, **kwargs)

    def fuse_lora(self, components: list[str] | None = None, lora_scale: float = 1.0, **kwargs):
        """Adds the active adapters, times `lora_scale`, to the weights, which `unfuse_lora` undoes."""
        super().fuse_lora(components or self._adapted_components(), lora_scale, **kwargs)
        self._fused_scale = lora_scale

    def unfuse_lora(self, components: list[str] | None = None, **kwargs):
        """Subtracts fused adapters from the weights."""
        components = components or self._adapted_components()
        super().unfuse_lora(components, **kwargs)
        for component in components:
            for module in getattr(self, component).modules():
                if hasattr(module, "unscale_layer"):  # fusing has scaled it
                    module.unscale_layer(getattr(self, "_fused_scale", 1.0))
        self._fused_scale = 1.0

    def unload_lora_weights(self):
        """Detaches all adapters and removes the classes that they brought; fused adapters stay in the weights."""
        self._check_not_compiled()
        with self._without_offloading():
            for adapter_name in self._attached():
                self._remove_classes_of(adapter_name)
            super().unload_lora_weights()
        self._merged_adapters = set()

    def delete_adapters(self, adapter_names: str | list[str]):
        """Detaches adapters and removes the classes that they brought. An unknown name is a `ValueError`."""
        self._check_not_compiled()
        names, known = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names), self._attached()
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"adapter_names: {unknown[0]!r} is not one of the adapters {known}")
        for name in names:
            self._detach(name)

    def _detach(self, adapter_name):
        with self._without_offloading():
            self._remove_classes_of(adapter_name)
            super().delete_adapters(adapter_name)
        if not self._attached():
            self.unload_lora_weights()  # else the wrapped layers would be saved under other names

    def _remove_classes_of(self, adapter_name):
        """Removes the classes of an adapter, before it is detached; those of a fused one are part of the weights."""
        is_fused = any(adapter_name in getattr(module, "merged_adapters", ()) for module in self.unet.modules())
        for name in self._brought.pop(adapter_name, []):
            if is_fused:
                self.unet.set_label_embeddings(self.unet.class_embedding.weight)
            else:
                self.unet.remove_label(self.labels[name])
                self.register_to_config(id2label=dict(enumerate(other for other in self.labels if other != name)))

    def _attached(self) -> list[str]:
        """The names of all adapters."""
        return sorted({name for adapters in self.get_list_adapters().values() for name in adapters})

    def _adapted_components(self) -> list[str]:
        if not self._attached():
            raise ValueError("no adapter is attached; load one by load_lora_weights")
        return list(self.get_list_adapters())

    @contextlib.contextmanager
    def _without_offloading(self):
        """Turns CPU offloading off, and on again afterwards."""
        whole, by_layers, _ = self._optionally_disable_offloading(self)
        try:
            yield
        finally:
            if whole:
                self.enable_model_cpu_offload()
            elif by_layers:
                self.enable_sequential_cpu_offload()

    def _check_not_compiled(self):
        for name, component in self.components.items():
            if name in self._lora_loadable_modules and hasattr(component, "_orig_mod"):
                hint = f"attach and detach adapters before, or compile it by pipe.{name}.compile()"
                raise ValueError(f"{name}: it was compiled as a whole; {hint}")

    def _add_classes_of(self, path, adapter_name, names, rows):
        """Adds the classes of an adapter, with their embeddings, or raises if the pipeline cannot take them."""
        raise ValueError(f"{path}: it is for the classes {', '.join(names)}, and {type(self).__name__} takes none")


def _read_adapter(path: str, weight_name: str, **options) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights of an adapter and the configs of its parts, from a file, a folder or the Hub."""
    from safetensors import SafetensorError, safe_open

    inspect.signature(hf_hub_download).bind(path, weight_name, **options)  # raises where an option is unknown
    file = Path(path, options.get("subfolder") or "", weight_name) if os.path.isdir(path) else Path(path)
    try:
        if IS_INSTALLED and not os.path.exists(path) and not options.get("local_files_only"):
            hub, of_hub = importlib.import_module("hf_genmod.hub"), (options.get("cache_dir"), options.get("token"))
            if reason := hub.why_missing(path, "model", *of_hub):
                raise OSError(reason)
        file = file if os.path.exists(path) else hf_hub_download(path, weight_name, **options)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise FileNotFoundError(f"{path!r} is not a folder here, nor an adapter on the Hub: {reason}") from error
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{path}: there is no {weight_name} in it, so it is not an adapter")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118 (no dict)
    except (SafetensorError, ValueError) as error:
        is_pointer = Path(file).read_bytes().startswith(b"version https://git")
        reason = "a pointer of Git LFS; run `git lfs pull`" if is_pointer else first_line(error)
        raise ValueError(f"{file}: not a file of safetensors ({reason})") from error
