"""Pipelines that turn noise into pictures: one base class with the sampling loop, then one class for each way to ask.

Pictures and latents are (n, channels, height, width); inside the loop they are fp32 with pictures in [-1, 1]. The
file is complete in itself: it travels inside every checkpoint.
"""

import contextlib
import copy
import difflib
import importlib
import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from huggingface_hub import hf_hub_download, snapshot_download
from PIL import Image, ImageOps

# Captured at import: a later load may overwrite the file that this module was read from.
_SHIPPED_FILE = (Path(__file__).stem, Path(__file__).read_text(encoding="utf-8"))

MOST_NOISE = 20.0  # the σ up to which a classifier guides unless told otherwise

# Where the classes of a checkpoint are found when this file is part of the installed package.
_INSTALLED = {
    "ancestral_ddpm": "hf_genmod.schedulers.ancestral_ddpm",
    "denoising_unet": "hf_genmod.models.denoising_unet",
    "image_autoencoder": "hf_genmod.models.image_autoencoder",
}
_IS_INSTALLED = not __name__.startswith("diffusers_modules.")


class GenerationPipeline(DiffusionPipeline, LoraBaseMixin):
    """What the pipelines share: the sampling loop, one seed per picture, checkpoints that carry their code, adapters.

    A pipeline with a `vae` samples in its latent space and decodes at the end. One of measured values, with a
    `value_range` in its config, gives "np" and "pt" in the units of the data.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]
    _lora_loadable_modules = ["unet", "text_encoder"]
    _scales = ()  # the arguments that may be too large
    _shipped_file = _SHIPPED_FILE

    # ---- sampling ----

    def _generate(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
        batch_size: int,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
        shift: Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor], torch.Tensor] | None = None,
        clip: bool = True,
    ):
        """
        Algorithm 2 of Ho et al. 2020 (https://arxiv.org/abs/2006.11239) with any scheduler: x_T ~ N(0, I), then
        x_{t-1} from x_t and the model's prediction until x_0. Pipelines differ in `predict(x_t, t, σ)`, where x_t is
        as the network sees it, √ᾱ_t x_0 + √(1−ᾱ_t) ε with σ = √((1−ᾱ_t)/ᾱ_t), and in `shift(x_t, t, σ, prediction)`,
        which is added to x_{t-1}. Without `clip` the scheduler is kept from clipping x̂_0.
        """
        self._check_request(batch_size, num_inference_steps, output_type, callback_on_step_end_tensor_inputs, latents)
        device = self._execution_device
        generators = _one_generator_each(generator, batch_size)
        x_t = self._initial_noise(batch_size, generators, latents).to(device)
        scheduler, takes_variance = self._sampler(clip)
        scheduler.set_timesteps(num_inference_steps, device=device)
        x_t = x_t * scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generators} if takes_generator else {}
        self._interrupt = False

        for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
            model_input, sigma = scheduler.scale_model_input(x_t, t), self._sigma(scheduler, i, t)
            prediction = self._finite(predict(model_input, t, sigma), t)
            if not takes_variance:
                prediction = prediction[:, : x_t.shape[1]]
            x_prev = scheduler.step(prediction, t, x_t, **step_kwargs).prev_sample
            if shift is not None:
                x_prev = x_prev + self._finite(shift(model_input, t, sigma, prediction), t)
            x_t = x_prev

            if callback_on_step_end is not None:
                tensors = {"latents": x_t}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                x_t = (callback_on_step_end(self, i, t, chosen) or {}).get("latents", x_t)
                if self._interrupt:
                    break

        images = x_t if output_type == "latent" else self.postprocess(self._decode(x_t), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise(self, x_t, t, **condition):
        """The network's prediction, in fp32."""
        return self.unet(x_t.to(self.unet.dtype), t, **condition).sample.float()

    def _finite(self, tensor, t):
        if not tensor.isfinite().all():
            too_large = f"; lower {' or '.join(self._scales)}" if self._scales else ""
            raise ValueError(
                f"the prediction at timestep {t:.6g} is not finite{too_large}, or sample in float32, or look for "
                "weights that are not finite by `python -m hf_genmod doctor`"
            )
        return tensor

    def _initial_noise(self, batch_size, generators, latents):
        """x_T ~ N(0, I), each picture from its own generator, in fp32 whatever the model's dtype."""
        if latents is not None:
            return latents.float()
        config = self.unet.config
        return _standard_normal((config.in_channels, *_pair(config.sample_size)), generators)

    def _sampler(self, clip: bool) -> tuple[SchedulerMixin, bool]:
        """The scheduler, clipping x̂_0 or not, and whether it takes a learned variance along with the prediction."""
        config = self.scheduler.config
        learned = str(getattr(config, "variance_type", None)).startswith("learned")
        takes_variance = learned and "DDPM" in type(self.scheduler).__name__
        changes = {} if clip else {name: False for name in self._clips()}
        if learned and not takes_variance:
            changes["variance_type"] = None  # DPM-Solver would cut once more, at three channels
        if not changes:
            return self.scheduler, takes_variance
        scheduler = copy.deepcopy(self.scheduler)  # the config in the checkpoint stays what it is
        scheduler.register_to_config(**changes)
        return scheduler, takes_variance

    def _clips(self) -> list[str]:
        """By which of its ways the scheduler clips x̂_0; a config may have keys of others that it does not act on."""
        known = inspect.signature(type(self.scheduler).__init__).parameters
        return [name for name in ("thresholding", "clip_sample") if name in known and self.scheduler.config[name]]

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the pictures that it makes."""
        config = self.unet.config
        shape = (config.in_channels, *_pair(config.sample_size))
        if self.vae is None:
            return shape
        with torch.no_grad():
            noise = torch.zeros(1, *shape, device=self.vae.device, dtype=self.vae.dtype)
            return tuple(self.vae.decode(noise).sample.shape[1:])

    def _decode(self, latents):
        if self.vae is None:
            return latents
        config = self.vae.config
        z = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return self.vae.decode(z.to(self.vae.dtype)).sample.float()

    def postprocess(self, images: torch.Tensor, output_type: str = "pil"):
        """Pictures in [-1, 1], (n, channels, height, width), as `"pil"`, `"np"` or `"pt"`, see `__call__`."""
        if self.config.get("value_range") is not None and output_type != "pil":
            low, high = (
                torch.tensor(self.config.value_range[end], device=images.device)[:, None, None]
                for end in ("low", "high")
            )  # (C, 1, 1)
            values = low + (high - low) * (images + 1) / 2
            return values.permute(0, 2, 3, 1).cpu().numpy() if output_type == "np" else values
        if output_type == "pil" and images.shape[1] > 4:
            images = images[:, :3]
        return VaeImageProcessor().postprocess(images, output_type=output_type)

    def preprocess(self, images, channels: int) -> torch.Tensor:
        """The way back, to (n, channels, height, width) in [-1, 1]: pictures of PIL, one or a list of them; an array,
        (n, height, width, channels), or a tensor, (n, channels, height, width), in [0, 1] or in the units of the data.
        """
        value_range = self.config.value_range
        low, high = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
        if value_range is not None:
            low, high = (torch.tensor(value_range[end])[:, None, None] for end in ("low", "high"))  # (C, 1, 1)
        if isinstance(images, (list, tuple)) and images and all(isinstance(image, torch.Tensor) for image in images):
            images = torch.stack(images)
        if not isinstance(images, (np.ndarray, torch.Tensor)):
            images = images if isinstance(images, (list, tuple)) else [images]
            mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(channels)
            if value_range is not None or mode is None:
                raise ValueError("images: this model is of measured values; give an array or a tensor of them")
            if not all(isinstance(image, Image.Image) for image in images):
                raise ValueError("images: they are neither pictures of PIL (Image.open(file)) nor one array or tensor")
            if any(image.mode[0] in "IF" for image in images):
                raise ValueError("images: some are of more than 8 bits, which this model does not know; convert them")
            images = [_converted(image, mode) for image in images]
            if len({image.size for image in images}) != 1:
                raise ValueError("images: they are none or differ in size; give one or more of one size")
            pixels = [np.asarray(image, np.float32).reshape(image.height, image.width, -1) for image in images]
            images = np.stack(pixels) / 255
        values = torch.as_tensor(images).float().cpu()
        if values.ndim != 4:
            raise ValueError(
                f"images: an array of shape {tuple(values.shape)} has not four axes, the first for the pictures"
            )
        values = values.permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else values
        if values.shape[1] != channels or not len(values):
            raise ValueError(
                f"images: {len(values)} of {values.shape[1]} channels; this model takes one or more of {channels}"
            )
        if value_range is None and not (0 <= values.min() and values.max() <= 1):
            raise ValueError(f"images: values from {values.min():.3g} to {values.max():.3g} are not in [0, 1]")
        return 2 * (values - low) / (high - low).clamp(min=1e-30) - 1

    def _sigma(self, scheduler, i, t) -> float:
        """σ = √((1−ᾱ_t)/ᾱ_t) of what the network sees in step i."""
        scale = float(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), t))
        if scale != 1:  # x_0 + σ ε, divided by √(1+σ²)
            return (scale**-2 - 1) ** 0.5
        if hasattr(scheduler, "sigmas"):
            return float(scheduler.sigmas[i])
        if not hasattr(scheduler, "alphas_cumprod"):
            return math.nan  # IPNDM does not say
        alpha_bar_t = float(scheduler.alphas_cumprod[int(t)])
        return math.inf if alpha_bar_t == 0 else ((1 - alpha_bar_t) / alpha_bar_t) ** 0.5

    def _check_request(self, batch_size, num_inference_steps, output_type, tensor_inputs, latents):
        _check_positive(batch_size=batch_size, num_inference_steps=num_inference_steps)
        _check_output_type(output_type)
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: {unknown[0]!r} is not one of {self._callback_tensor_inputs}"
            )
        if latents is not None:
            expected = (batch_size, self.unet.config.in_channels)
            if latents.ndim != 4 or tuple(latents.shape[:2]) != expected:
                raise ValueError(
                    f"latents: shape {tuple(latents.shape)} is not ({expected[0]}, {expected[1]}, height, width), "
                    f"noise for the {batch_size} pictures asked for"
                )

    # ---- adapters ----

    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str | None = None,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ):
        """
        Attaches an adapter (LoRA: W + B A with B A of low rank; Hu et al. 2021, https://arxiv.org/abs/2106.09685) to
        the U-Net, and to the text encoder if it has one for that, and activates it alone; `set_adapters` activates
        several, with weights. Classes that it was trained for join `labels`, until it is deleted or unloaded.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or file, or the id of a repository on the
                Hub.
            adapter_name (`str`, *optional*): What to call it; by default "default_0", "default_1", ...
            weight_name (`str`): The name of the file.
            subfolder (`str`, *optional*): Where in the folder or repository the file is.
            revision, token, cache_dir, force_download, local_files_only: As
                [`~huggingface_hub.hf_hub_download`] takes them.

        Raises:
            FileNotFoundError: If there is no adapter at the path.
            ValueError: If it is of another model, or the name, or that of one of its classes, is taken. Nothing is
                attached then.
        """
        from peft import LoraConfig, set_peft_model_state_dict

        self._check_not_compiled()
        path = os.fspath(pretrained_model_name_or_path)
        state, metadata = _read_adapter(
            path,
            weight_name,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        names, rows = metadata.pop("class_names", []), state.pop("class_embedding", ())
        taken = self._attached()
        adapter_name = adapter_name or next(
            name for i in range(len(taken) + 1) if (name := f"default_{i}") not in taken
        )
        if adapter_name in taken:
            raise ValueError(f"adapter_name: {adapter_name!r} is attached already; choose another, or delete that one")
        if "." in adapter_name:
            raise ValueError(f"adapter_name: {adapter_name!r} has a dot in it, which names of modules cannot have")
        parts = {
            component: tuple(_without_prefix(part, f"{component}.") for part in (state, metadata))
            for component in {key.split(".")[0] for key in state}
        }
        for component, (weights, config) in parts.items():
            _check_adapter(path, component, getattr(self, component, None), weights, config)
        if names or len(rows):
            self._check_new_classes(path, names, rows)
        with self._without_offloading(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
            try:
                for name, row in zip(names, rows, strict=True):
                    self.add_class(name, row, adapter_name)
                if "text_encoder" in parts:
                    weights, config = parts["text_encoder"]
                    self.text_encoder.add_adapter(LoraConfig(**config), adapter_name)
                    set_peft_model_state_dict(self.text_encoder, weights, adapter_name)
                if "unet" in parts:
                    weights, config = parts["unet"]
                    self.unet.load_lora_adapter(
                        weights, prefix=None, adapter_name=adapter_name, metadata=config or None, _pipeline=self
                    )
                self.set_adapters(adapter_name)
            except Exception as error:  # of peft, about a config that it does not understand
                self._detach(adapter_name)
                raise ValueError(f"{path}: it cannot be attached ({str(error).splitlines()[0]})") from error

    def save_lora_weights(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str | None = None,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
    ):
        """
        Writes an adapter as diffusers and peft know it, and the classes that belong to it.

        Args:
            save_directory (`str` or `os.PathLike`): A folder.
            adapter_name (`str`, *optional*): Which; may be left out where only one is attached.
            weight_name (`str`): The name of the file.

        Raises:
            ValueError: If there is none of that name, or several to choose from.
            NotADirectoryError: If there is a file of the folder's name.
        """
        from peft import get_peft_model_state_dict

        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"save_directory: {os.fspath(save_directory)!r} is a file; give a folder")
        known = self._attached()
        if adapter_name is None and len(known) == 1:
            adapter_name = known[0]
        if adapter_name not in known:
            raise ValueError(f"adapter_name: {adapter_name!r} is not one of the adapters {known}; name one of them")
        state, metadata = {}, {}
        for component, adapters in self.get_list_adapters().items():
            if adapter_name in adapters:
                model = getattr(self, component)
                state |= self.pack_weights(get_peft_model_state_dict(model, adapter_name=adapter_name), component)
                config = model.peft_config[adapter_name].to_dict()
                config["base_model_name_or_path"] = None  # which may be a folder of its own
                config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
                metadata |= self.pack_weights(config, component)
        names = [name for name, adapter in self._adapter_of_class.items() if adapter == adapter_name]
        if names:
            labels = [self.labels[name] for name in names]
            state["class_embedding"] = self.unet.class_embedding.weight.detach()[labels]
            metadata["class_names"] = names
        state = {name: weight.contiguous() for name, weight in state.items()}
        self.write_lora_layers(state, save_directory, True, weight_name, None, True, metadata)

    def fuse_lora(self, components: list[str] | None = None, lora_scale: float = 1.0, **kwargs):
        """Adds the active adapters, times `lora_scale`, to the weights, from where `unfuse_lora` takes them back;
        after `unload_lora_weights` they stay, and the model is saved with them."""
        super().fuse_lora(components or self._adapted_components(), lora_scale, **kwargs)
        self._fused_scale = lora_scale

    def unfuse_lora(self, components: list[str] | None = None, **kwargs):
        """Takes fused adapters out of the weights."""
        components = components or self._adapted_components()
        super().unfuse_lora(components, **kwargs)
        for component in components:
            for module in getattr(self, component).modules():
                if hasattr(module, "unscale_layer"):  # which fusing has scaled
                    module.unscale_layer(getattr(self, "_fused_scale", 1.0))
        self._fused_scale = 1.0

    def unload_lora_weights(self):
        """Detaches all adapters, and removes the classes that came with them; what is fused stays."""
        self._check_not_compiled()
        with self._without_offloading():
            for name, adapter in list(self._adapter_of_class.items()):
                self._release_class(name, adapter)
            super().unload_lora_weights()
        self._merged_adapters = set()

    def delete_adapters(self, adapter_names: str | list[str]):
        """Detaches some adapters, and removes the classes that came with them.

        Raises:
            ValueError: If there is none of a name.
        """
        self._check_not_compiled()
        names, known = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names), self._attached()
        for name in names:
            if name not in known:
                raise ValueError(f"adapter_names: {name!r} is not one of the adapters {known}")
        for name in names:
            self._detach(name)

    def _detach(self, adapter_name):
        with self._without_offloading():
            for name, adapter in list(self._adapter_of_class.items()):
                if adapter == adapter_name:
                    self._release_class(name, adapter)
            super().delete_adapters(adapter_name)
        if not self._attached():
            self.unload_lora_weights()  # what is left wraps every layer, and would be saved under other names

    def _attached(self) -> list[str]:
        """The names of all adapters."""
        return sorted({name for adapters in self.get_list_adapters().values() for name in adapters})

    def _adapted_components(self) -> list[str]:
        if not self._attached():
            raise ValueError("no adapter is attached; load one by load_lora_weights")
        return list(self.get_list_adapters())

    def _is_fused(self, adapter_name) -> bool:
        return any(adapter_name in getattr(module, "merged_adapters", ()) for module in self.unet.modules())

    @contextlib.contextmanager
    def _without_offloading(self):
        """The weights are where they belong meanwhile."""
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
                raise ValueError(
                    f"{name}: it was compiled as a whole; attach and detach adapters before, or compile it by "
                    f"pipe.{name}.compile()"
                )

    @property
    def _adapter_of_class(self) -> dict[str, str]:
        """Which adapter brought a class, by its name."""
        return self.__dict__.setdefault("_brought_classes", {})

    def _check_new_classes(self, path, names, rows):
        raise ValueError(f"{path}: it is for the classes {', '.join(names)}, and {type(self).__name__} takes none")

    # ---- checkpoints ----

    def _classes(self):
        """(folder in the checkpoint, name in the index, class) of the pipeline and of its components."""
        yield "", "_class_name", type(self)
        for name, component in self.components.items():
            yield name, name, type(getattr(component, "_orig_mod", component))  # `_orig_mod`: compiled by torch

    def to_json_string(self) -> str:
        """The index of a checkpoint, in which a class of ours is (file, class) and found beside the weights."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        for _, name, cls in self._classes():
            if hasattr(cls, "_shipped_file"):
                index[name] = [cls._shipped_file[0], cls.__name__]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Writes `model_index.json` and, where the loader of diffusers looks for it, the source of each class."""
        for folder, _, cls in self._classes():
            if hasattr(cls, "_shipped_file"):
                stem, source = cls._shipped_file
                file = Path(save_directory, folder, f"{stem}.py")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(source, encoding="utf-8")
            for name in ("config.json", "tokenizer_config.json"):
                _forget_path(Path(save_directory, folder, name))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Reads the index; the installed package answers for its own classes, whatever code lies in the checkpoint."""
        loaded = super().load_config(*args, **kwargs)
        if not _IS_INSTALLED:
            return loaded
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][1]
        for name, entry in index.items():
            if isinstance(entry, list) and entry[0] in _INSTALLED:
                index[name] = [importlib.import_module(_INSTALLED[entry[0]]).__name__, entry[1]]
            elif isinstance(entry, list) and entry[0] not in (None, "diffusers", "transformers"):
                raise ValueError(
                    f"model_index.json: {name!r} names the module {entry[0]!r}, which is neither part of this package "
                    "nor of diffusers or transformers; if you trust the checkpoint, open it with "
                    "DiffusionPipeline.from_pretrained(..., trust_remote_code=True)"
                )
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """
        Loads a checkpoint from a folder or the Hub with the classes of the installed package: no code of the
        checkpoint is executed, and weights are read from safetensors only. `GenerationPipeline` itself loads
        whichever of its pipelines the checkpoint names.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or the id of a repository on the Hub.
            kwargs: As [`~diffusers.DiffusionPipeline.from_pretrained`] takes them (`torch_dtype`, `variant`,
                `revision`, `token`, `scheduler=...`, ...).

        Raises:
            FileNotFoundError: If there is no checkpoint at the path, or a component lacks its weights.
        """
        if not _IS_INSTALLED:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for name in ("trust_remote_code", "use_safetensors"):  # neither code nor pickles, whatever is asked for
            kwargs.pop(name, None)
        folder = pretrained_model_name_or_path
        if not os.path.isdir(folder):
            folder = _download(str(folder), kwargs)
        _check_complete(folder, replaced=kwargs)
        if cls is GenerationPipeline:
            cls = _pipeline_class(folder)
            return cls.from_pretrained(folder, **kwargs)
        checks = importlib.import_module("hf_genmod.untrusted")
        checks.check_checkpoint(folder, cls.load_config(folder), cls, replaced=kwargs)
        return super().from_pretrained(folder, use_safetensors=True, **kwargs)


class UnconditionalPipeline(GenerationPipeline):
    """
    Pictures from nothing but noise: Algorithm 2 of Ho et al. 2020 (https://arxiv.org/abs/2006.11239).

    Args:
        unet ([`DenoisingUNet2DModel`]): ε_θ(x_t, t), without labels.
        scheduler: [`AncestralDDPMScheduler`] or any sampler of diffusers that `from_config`s from it.
        vae (*optional*): An autoencoder with `decode(z).sample`; then the U-Net works on its latents.
        value_range (`dict`, *optional*): The measured values that -1 and 1 stand for in each channel, as two lists,
            `{"low": [...], "high": [...]}`.
    """

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        value_range: dict[str, list[float]] | None = None,
    ):
        super().__init__()
        if unet.config.num_classes is not None:
            raise ValueError(
                f"unet: it has {unet.config.num_classes} classes; use ClassifierFreeGuidedPipeline, which at "
                "guidance_scale=0 ignores them"
            )
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(value_range=value_range)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (never written to)
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            batch_size (`int`, defaults to 1): Number of pictures n.
            num_inference_steps (`int`, defaults to 50): Steps of the scheduler.
            generator (`torch.Generator` or a list of n, *optional*): One for each picture; a single one first draws n
                seeds from itself, so that a picture depends on its seed and not on how many are drawn together.
            latents (`torch.Tensor` of shape `(n, in_channels, height, width)`, *optional*): x_T, instead of noise.
            output_type (`str`, defaults to `"pil"`): `"pil"`, of which those with more than four channels show three;
                `"np"`, (n, height, width, channels) in [0, 1] or, of measured values, in the units of the data;
                `"pt"`, the same as (n, channels, height, width); or `"latent"`, x_0 as the loop leaves it.
            return_dict (`bool`, defaults to `True`): `False` returns a plain tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)` after
                each step; returns a dict, whose `"latents"`, if any, replace x_t.
            callback_on_step_end_tensor_inputs (`list[str]`): The tensors it is given: `"latents"`.

        Returns:
            [`~diffusers.ImagePipelineOutput`] with `images`, or a tuple of them.

        Raises:
            ValueError: If an argument is out of its range or a shape does not fit the U-Net.
        """

        def predict(x_t, t, sigma):
            return self._denoise(x_t, t)

        return self._generate(
            predict,
            batch_size,
            num_inference_steps,
            generator,
            latents,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )


class ClassConditionalPipeline(GenerationPipeline):
    """What the pipelines that are asked for classes share: the names of the labels, and classifier-free guidance."""

    @property
    def num_classes(self) -> int | None:
        """The number of labels that can be asked for; `None` of an upsampler without labels."""
        return self.unet.config.num_classes

    @property
    def labels(self) -> dict[str, int]:
        """The label of each name, such as `{"airplane": 0, ...}`; empty where the checkpoint has no names."""
        return {name: index for index, name in (self.config.id2label or {}).items()}

    def _register_names(self, id2label, value_range):
        if id2label is not None:
            # JSON has made the keys strings, and sorted them as such.
            id2label = dict(sorted((int(index), name) for index, name in id2label.items()))
        self.register_to_config(id2label=id2label, value_range=value_range)

    def _classifier_free_guidance(self, x_t, t, weights, gamma, **condition):
        """ε̃ = ε_∅ + γ Σ_k w_k (ε_k − ε_∅) with the weights (n, num_classes), in as few passes as there can be; of what
        else each picture is conditioned on, (n, ...), both ε know."""
        n, channels = x_t.shape[:2]
        picture, label = weights.nonzero(as_tuple=True)
        null = torch.full((n,), self.unet.config.num_classes, device=x_t.device)
        if gamma == 0:
            return self._denoise(x_t, t, class_labels=null, **condition)
        w = weights[picture, label, None, None, None]
        if gamma == 1 and len(picture) == n and (w == 1).all():
            return self._denoise(x_t, t, class_labels=label, **condition)
        condition = {name: torch.cat([value, value[picture]]) for name, value in condition.items()}
        labels = torch.cat([null, label])
        together = self._denoise(torch.cat([x_t, x_t[picture]]), t, class_labels=labels, **condition)
        eps_null, eps_k = together[:n, :channels], together[n:, :channels]
        direction = torch.zeros_like(eps_null).index_add(0, picture, w * (eps_k - eps_null[picture]))
        # A learned variance is not guided: it is the mean of those of the labels.
        share = w.abs() / weights.abs().sum(dim=1)[picture, None, None, None]
        variance = torch.zeros_like(together[:n, channels:]).index_add(0, picture, share * together[n:, channels:])
        return torch.cat([eps_null + gamma * direction, variance], dim=1)

    def _label_weights(self, class_labels) -> torch.Tensor:
        """The weight of each label for each picture, (n, num_classes): a one where a single label is asked for."""
        if hasattr(class_labels, "tolist"):  # of torch or numpy
            class_labels = class_labels.reshape(-1).tolist()
        if not isinstance(class_labels, (list, tuple)):
            class_labels = [class_labels]
        if not class_labels:
            raise ValueError("class_labels: there are none; give one for each picture")
        weights = torch.zeros(len(class_labels), self.num_classes)
        for row, request in zip(weights, class_labels, strict=True):
            for label, weight in request.items() if isinstance(request, dict) else [(request, 1.0)]:
                if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
                    raise ValueError(f"class_labels: the weight {weight!r} of {label!r} is not a finite number")
                row[self._label_index(label)] += weight
            if not row.isfinite().all():
                raise ValueError(f"class_labels: the weights {request!r} are too large")
            if not row.any():
                raise ValueError(f"class_labels: {request!r} gives no label a weight")
        return weights.to(self._execution_device)

    def _label_index(self, label) -> int:
        num_classes = self.num_classes
        if isinstance(label, str) and label in self.labels:
            return self.labels[label]
        if isinstance(label, str):
            close = difflib.get_close_matches(label, self.labels, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else "`pipe.labels` lists them"
            if not self.labels:
                hint = f"it has no names, so give numbers from 0 to {num_classes - 1}"
            raise ValueError(
                f"class_labels: {label!r} is not one of the {len(self.labels)} labels of this model; {hint}"
            )
        if isinstance(label, bool) or not isinstance(label, Integral) or not 0 <= label < num_classes:
            raise ValueError(
                f"class_labels: {label!r} is not a label of this model; give a whole number from 0 to "
                f"{num_classes - 1}{' or a name from `pipe.labels`' if self.labels else ''}"
            )
        return label


class ClassifierGuidedPipeline(ClassConditionalPipeline):
    r"""
    Pictures of a chosen class by classifier guidance (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233): a
    model that knows no labels is steered by the gradient g = ∇_{x_t} log f_φ(y | x_t) of a classifier of noisy
    pictures. With s the `classifier_scale`,

        ε̂ = ε_θ(x_t, t) − s √(1−ᾱ_t) g           "noise": Algorithm 2 there, for any sampler
        x_{t-1} ~ N(μ + s Σ g, Σ)                "mean": Algorithm 1 there, for ancestral sampling

    In the noise form x̂_0 is clipped, where the sampler clips, before it is guided. A U-Net with labels is told y as
    well (ADM-G), by classifier-free guidance.

    Args:
        unet ([`DenoisingUNet2DModel`]): ε_θ(x_t, t), or ε_θ(x_t, t, y) with the classes of the classifier.
        classifier ([`NoisyImageClassifier`]): log f_φ(y | x_t), trained on x_t of the same process. Its parameters
            are frozen.
        scheduler: [`AncestralDDPMScheduler`] or any sampler of diffusers that `from_config`s from it.
        vae (*optional*): An autoencoder with `decode(z).sample`; then U-Net and classifier work on its latents.
        id2label (`dict[int, str]`, *optional*): The name of each label.
        value_range (`dict`, *optional*): The measured values that -1 and 1 stand for in each channel, as two lists,
            `{"low": [...], "high": [...]}`.

    Raises:
        ValueError: If the classifier was not made for pictures, noise and labels of this model.
    """

    _scales = ("classifier_scale", "guidance_scale")
    _exclude_from_cpu_offload = ["classifier"]  # its weights are needed until its backward pass is over

    def __init__(
        self,
        unet: ModelMixin,
        classifier: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict | None = None,
        value_range: dict[str, list[float]] | None = None,
    ):
        super().__init__()
        classifier.requires_grad_(False)  # only the gradient in x_t is of use
        self.register_modules(unet=unet, classifier=classifier, scheduler=scheduler, vae=vae)
        self._register_names(id2label, value_range)
        self._check_classifier()

    @property
    def num_classes(self) -> int:
        """The number of labels that can be asked for."""
        return self.classifier.config.num_classes

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | dict | list[str | int | dict] | torch.Tensor,
        classifier_scale: float = 2.0,
        guidance_form: str = "noise",
        guidance_interval: tuple[float, float] | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (never written to)
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            class_labels (`str`, `int`, `dict`, a list of them, or a `torch.Tensor` of shape `(n,)`): The class of each
                of the n pictures, by name or number; or weights of several, `{"cat": 1.0, "dog": -0.5}` for a picture
                toward one and away from another: then log f_φ(y | x_t) is the weighted sum over them.
            classifier_scale (`float`, defaults to 2.0): s. At 0 the classifier is not run; below, it is guided away
                from the label.
            guidance_form (`str`, defaults to `"noise"`): `"noise"` or `"mean"`.
            guidance_interval (`(float, float)`, *optional*): (sigma_low, sigma_high): the noise levels
                σ = √((1−ᾱ_t)/ᾱ_t) in which s and γ apply; outside, s is 0 and γ is 1. By default γ applies everywhere
                and s where σ is at most 20: in more noise a classifier knows nothing, but by its mistakes, which the
                noise form multiplies by σ, it would ruin the picture.
            guidance_scale (`float`, defaults to 1.0): γ of [`ClassifierFreeGuidedPipeline`], for a U-Net with labels.
            num_inference_steps, generator, latents, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs: As [`UnconditionalPipeline`] takes them.

        Returns:
            [`~diffusers.ImagePipelineOutput`] with `images`, or a tuple of them.

        Raises:
            ValueError: If a label is unknown, an argument out of its range or too large for finite pictures, or the
                sampler is not that of the classifier's process, or not Algorithm 2 with `guidance_form="mean"`.
        """
        weights = self._label_weights(class_labels)  # (n, num_classes)
        _check_finite(classifier_scale=classifier_scale, guidance_scale=guidance_scale)
        _check_interval(guidance_interval)
        self._check_classifier()
        has_labels = self.unet.config.num_classes is not None
        if guidance_form not in ("noise", "mean"):
            raise ValueError(f"guidance_form: {guidance_form!r} is not one of 'noise', 'mean'")
        if guidance_form == "mean" and type(self.scheduler).__name__ != "AncestralDDPMScheduler":
            raise ValueError(
                f"guidance_form: 'mean' is for Algorithm 2, not for {type(self.scheduler).__name__}; use "
                "'noise', or set pipe.scheduler = AncestralDDPMScheduler.from_config(pipe.scheduler.config)"
            )
        if guidance_scale != 1 and not has_labels:
            raise ValueError(
                f"guidance_scale: {guidance_scale} is for a U-Net with labels, and this one has none; the strength of "
                "the classifier is classifier_scale"
            )

        interval = (0.0, MOST_NOISE) if guidance_interval is None else guidance_interval

        def guidance(x_t, t, sigma):
            """s g, which is 0 where there is no guidance."""
            if classifier_scale == 0 or sigma == math.inf or not _is_within(sigma, interval):
                return torch.zeros_like(x_t)
            return classifier_scale * self._classifier_gradient(x_t, t, weights)

        def predict(x_t, t, sigma):
            if has_labels:
                gamma = guidance_scale if _is_within(sigma, guidance_interval) else 1.0
                prediction = self._classifier_free_guidance(x_t, t, weights, gamma)
            else:
                prediction = self._denoise(x_t, t)
            if guidance_form == "mean" or classifier_scale == 0 or sigma == math.inf:
                return prediction
            # x̂_0 is clipped as the sampler would do it, and guided after that.
            prediction, variance = prediction.tensor_split([x_t.shape[1]], dim=1)
            x_0 = self._clip(self._x_0_of(prediction, x_t, sigma))
            x_0 = x_0 + sigma**2 / math.hypot(1, sigma) * guidance(x_t, t, sigma)  # (1−ᾱ)/√ᾱ = σ²/√(1+σ²)
            return torch.cat([self._prediction_of(x_0, x_t, sigma), variance], dim=1)

        def shift(x_t, t, sigma, prediction):
            scheduler = self.scheduler
            _, predicted_variance = scheduler.split_model_output(prediction, x_t)
            log_variance = scheduler.reverse_log_variance(
                int(t), x_t, int(scheduler.previous_timestep(t)), predicted_variance
            )
            return log_variance.exp() * guidance(x_t, t, sigma)

        return self._generate(
            predict,
            len(weights),
            num_inference_steps,
            generator,
            latents,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            shift if guidance_form == "mean" else None,
            clip=guidance_form == "mean" or classifier_scale == 0,
        )

    def _classifier_gradient(self, x_t, t, weights):
        """∇_{x_t} Σ_k w_k log f_φ(k | x_t) for each picture, of the shape and dtype of x_t."""
        with torch.inference_mode(False), torch.enable_grad():
            # Clones, as tensors made in an inference mode have no gradient.
            x_t, t, weights = x_t.clone().requires_grad_(), t.clone(), weights.clone()
            logits = self.classifier(x_t.to(self.classifier.dtype), t).logits.to(x_t.dtype)
            return torch.autograd.grad((weights * logits.log_softmax(dim=1)).sum(), x_t)[0]

    def _x_0_of(self, prediction, x_t, sigma):
        """x̂_0 of what the U-Net predicts, with √ᾱ = 1/√(1+σ²) and √(1−ᾱ) = σ/√(1+σ²)."""
        prediction_type, root = self.scheduler.config.prediction_type, math.hypot(1, sigma)
        if prediction_type == "epsilon":
            return root * x_t - sigma * prediction
        return (x_t - sigma * prediction) / root if prediction_type == "v_prediction" else prediction

    def _prediction_of(self, x_0, x_t, sigma):
        """The other way round."""
        prediction_type, root = self.scheduler.config.prediction_type, math.hypot(1, sigma)
        if prediction_type == "epsilon":
            return (root * x_t - x_0) / sigma
        return (x_t - root * x_0) / sigma if prediction_type == "v_prediction" else x_0

    def _clip(self, x_0):
        clips, config = self._clips(), self.scheduler.config
        if "thresholding" in clips:
            return self.scheduler._threshold_sample(x_0)
        return x_0.clamp(-config.clip_sample_range, config.clip_sample_range) if clips else x_0

    def _check_classifier(self):
        unet, classifier, schedule = self.unet.config, self.classifier.config, self.classifier.config.noise_schedule
        for name in ("sample_size", "in_channels"):
            of_unet, of_classifier = (_pair(config[name]) for config in (unet, classifier))
            if of_unet != of_classifier:
                raise ValueError(
                    f"classifier: its {name} is {classifier[name]} and that of the U-Net {unet[name]}; train one for "
                    "this model"
                )
        if unet.num_classes not in (None, classifier.num_classes):
            raise ValueError(
                f"classifier: it has {classifier.num_classes} classes and the U-Net {unet.num_classes}; train one for "
                "this model"
            )
        if schedule is None:
            raise ValueError(
                "classifier: its config has no noise_schedule, so nobody knows which noise it was trained on; train "
                "one for this model"
            )
        if not hasattr(self.scheduler, "alphas_cumprod"):
            raise ValueError(f"scheduler: {type(self.scheduler).__name__} does not tell its noise levels; use another")
        seen, process = DDPMScheduler.from_config(schedule).alphas_cumprod.sqrt(), self.scheduler.alphas_cumprod.sqrt()
        # Some samplers know no rescale_betas_zero_snr, so that at the end √ᾱ is not 0 there.
        if len(seen) != len(process) or (seen - process.cpu()).abs().max() > 0.01:
            raise ValueError(
                "classifier: it was trained on the noise of another schedule than that of the scheduler; train one "
                "for this model"
            )


class ClassifierFreeGuidedPipeline(ClassConditionalPipeline):
    """
    Pictures of a chosen class by classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598):

        ε̃ = ε_∅ + γ (ε_y − ε_∅),    ε_y = ε_θ(x_t, t, y),  ε_∅ = ε_θ(x_t, t, null label)

    with γ the `guidance_scale`: 1 is the conditional model, 0 the unconditional one, and the paper's w is γ − 1. The
    combination is the same for predictions of x_0 and v, which are affine in ε at fixed x_t. Of several labels with
    weights, the differences are summed (Liu et al. 2022, https://arxiv.org/abs/2206.01714):

        ε̃ = ε_∅ + γ Σ_k w_k (ε_k − ε_∅)

    Args:
        unet ([`DenoisingUNet2DModel`]): ε_θ(x_t, t, y), with `num_classes`.
        scheduler: [`AncestralDDPMScheduler`] or any sampler of diffusers that `from_config`s from it.
        vae (*optional*): An autoencoder with `decode(z).sample`; then the U-Net works on its latents.
        id2label (`dict[int, str]`, *optional*): The name of each label.
        value_range (`dict`, *optional*): The measured values that -1 and 1 stand for in each channel, as two lists,
            `{"low": [...], "high": [...]}`.
    """

    _scales = ("guidance_scale",)

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict | None = None,
        value_range: dict[str, list[float]] | None = None,
    ):
        super().__init__()
        if unet.config.num_classes is None:
            raise ValueError("unet: it was made without num_classes; use UnconditionalPipeline")
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self._register_names(id2label, value_range)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | dict | list[str | int | dict] | torch.Tensor,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (never written to)
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            class_labels (`str`, `int`, `dict`, a list of them, or a `torch.Tensor` of shape `(n,)`): The class of each
                of the n pictures, by name or number; or weights of several, `{"cat": 1.0, "dog": -0.5}` for a picture
                toward one and away from another.
            guidance_scale (`float`, defaults to 2.0): γ. 1 and 0 cost one forward pass a step, any other value one
                pass of twice the batch, and more of it where several labels have weights.
            guidance_interval (`(float, float)`, *optional*): (sigma_low, sigma_high): the noise levels
                σ = √((1−ᾱ_t)/ᾱ_t) in which γ applies; outside, γ is 1 (Kynkäänniemi et al. 2024,
                https://arxiv.org/abs/2404.07724).
            num_inference_steps, generator, latents, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs: As [`UnconditionalPipeline`] takes them.

        Returns:
            [`~diffusers.ImagePipelineOutput`] with `images`, or a tuple of them.

        Raises:
            ValueError: If a label is unknown, an argument out of its range or too large for finite pictures, or a
                shape does not fit the U-Net.
        """
        weights = self._label_weights(class_labels)  # (n, num_classes)
        _check_finite(guidance_scale=guidance_scale)
        _check_interval(guidance_interval)

        def predict(x_t, t, sigma):
            gamma = guidance_scale if _is_within(sigma, guidance_interval) else 1.0
            return self._classifier_free_guidance(x_t, t, weights, gamma)

        return self._generate(
            predict,
            len(weights),
            num_inference_steps,
            generator,
            latents,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

    def add_class(self, name: str, embedding: torch.Tensor | None = None, adapter_name: str | None = None) -> int:
        """
        Adds a class after the others, and before the null label, for an adapter to learn.

        Args:
            name (`str`): Its name.
            embedding (`torch.Tensor` of shape `(d,)`, *optional*): Its row of the class embedding; by default the mean
                of those of the other classes.
            adapter_name (`str`, *optional*): The adapter that it belongs to: it is saved with that, and removed with
                it.

        Returns:
            `int`: Its label.

        Raises:
            ValueError: If there is a class of that name, or the embedding is of another size.
        """
        labels = self._known_labels()
        if name in labels:
            raise ValueError(f"name: {name!r} is a class of this model already; choose another")
        label = self.unet.add_label(embedding)
        self.register_to_config(id2label={index: name for name, index in (labels | {name: label}).items()})
        if adapter_name is not None:
            self._adapter_of_class[name] = adapter_name
        return label

    def _release_class(self, name, adapter):
        """Removes a class that came with an adapter, unless that is part of the weights by now."""
        del self._adapter_of_class[name]
        if self._is_fused(adapter):
            self.unet.set_label_embeddings(self.unet.class_embedding.weight)
        else:
            self.unet.remove_label(self.labels[name])
            self.register_to_config(id2label=dict(enumerate(other for other in self.labels if other != name)))

    def _known_labels(self) -> dict[str, int]:
        """`labels`, by their numbers where they have no names."""
        return self.labels or {str(label): label for label in range(self.num_classes)}

    def _check_new_classes(self, path, names, rows):
        known = [name for name in names if name in self._known_labels()]
        if known:
            raise ValueError(f"{path}: this model has a class {known[0]!r} already, and the adapter brings another")
        if len(names) != len(rows) or rows.shape[1:] != self.unet.class_embedding.weight.shape[1:]:
            raise ValueError(f"{path}: the embeddings of its classes are not those of {len(names)} of this model")


class TextToImagePipeline(GenerationPipeline):
    """
    Pictures of what a prompt says: the U-Net attends to the tokens of a text encoder (Rombach et al. 2022,
    https://arxiv.org/abs/2112.10752, section 3.3), and is guided as by labels (Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598):

        ε̃ = ε_∅ + γ (ε_y − ε_∅),    ε_y = ε_θ(x_t, t, prompt),  ε_∅ = ε_θ(x_t, t, "" or the negative prompt)

    with γ the `guidance_scale`. Padding is masked, so that a picture does not depend on the prompts beside its own.

    Args:
        unet ([`DenoisingUNet2DModel`]): ε_θ(x_t, t, y), with `cross_attention_dim`.
        text_encoder (`transformers.PreTrainedModel`): One whose last hidden states are of that width: `CLIPTextModel`,
            `T5EncoderModel`, ...
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        scheduler: [`AncestralDDPMScheduler`] or any sampler of diffusers that `from_config`s from it.
        vae (*optional*): An autoencoder with `decode(z).sample`; then the U-Net works on its latents.
        value_range (`dict`, *optional*): The measured values that -1 and 1 stand for in each channel, as two lists,
            `{"low": [...], "high": [...]}`.

    Raises:
        ValueError: If the U-Net takes no text, or one of another width, or the tokenizer cannot pad.
    """

    _scales = ("guidance_scale",)

    def __init__(
        self,
        unet: ModelMixin,
        text_encoder: torch.nn.Module,
        tokenizer: Callable,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        value_range: dict[str, list[float]] | None = None,
    ):
        super().__init__()
        width = unet.config.cross_attention_dim
        if width is None:
            raise ValueError("unet: it was made without cross_attention_dim, so that it takes no text")
        if width != text_encoder.config.hidden_size:
            raise ValueError(
                f"text_encoder: its hidden states have a width of {text_encoder.config.hidden_size}, and the U-Net's "
                f"cross_attention_dim is {width}; use the one it was trained with"
            )
        if tokenizer.pad_token is None:
            raise ValueError("tokenizer: it has no padding token; set tokenizer.pad_token")
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler, vae=vae)
        self.register_to_config(value_range=value_range)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        guidance_scale: float = 3.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (never written to)
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            prompt (`str` or `list[str]`, *optional*): What each picture is to show. What is longer than the text
                encoder takes is cut off, with a warning.
            negative_prompt (`str` or `list[str]`, *optional*): What it is guided away from; by default "", nothing.
            guidance_scale (`float`, defaults to 3.0): γ. 1 and 0 cost one forward pass a step, any other value one
                pass of twice the batch.
            guidance_interval (`(float, float)`, *optional*): (sigma_low, sigma_high): the noise levels
                σ = √((1−ᾱ_t)/ᾱ_t) in which γ applies; outside, γ is 1 (Kynkäänniemi et al. 2024,
                https://arxiv.org/abs/2404.07724).
            guidance_rescale (`float`, defaults to 0.0): φ in [0, 1]: how far ε̃ is brought to the standard deviation
                of ε_y, φ ε̃ std(ε_y) / std(ε̃) + (1 − φ) ε̃ (Lin et al. 2023, https://arxiv.org/abs/2305.08891,
                Eq. 15 and 16).
            num_images_per_prompt (`int`, defaults to 1): Pictures of each prompt, one after another.
            num_inference_steps, generator, latents: As [`UnconditionalPipeline`] takes them, with n the number of
                prompts times `num_images_per_prompt`.
            prompt_embeds (`torch.Tensor` of shape `(prompts, tokens, cross_attention_dim)`, *optional*): Instead of
                a prompt, what `encode_prompt` made of it.
            prompt_attention_mask (`torch.Tensor` of shape `(prompts, tokens)`, *optional*): 1 where a token counts; by
                default all do.
            negative_prompt_embeds, negative_prompt_attention_mask (`torch.Tensor`, *optional*): The same instead of a
                negative prompt.
            output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs: As
                [`UnconditionalPipeline`] takes them.

        Returns:
            [`~diffusers.ImagePipelineOutput`] with `images`, or a tuple of them.

        Raises:
            ValueError: If there is no prompt or more than one kind, an argument is out of its range or too large for
                finite pictures, or a shape does not fit.
        """
        _check_finite(guidance_scale=guidance_scale, guidance_rescale=guidance_rescale)
        _check_interval(guidance_interval)
        _check_positive(num_images_per_prompt=num_images_per_prompt)
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale: {guidance_rescale} is not between 0 and 1")
        positive = self._condition("prompt", prompt, prompt_embeds, prompt_attention_mask)
        if negative_prompt is None and negative_prompt_embeds is None:
            negative_prompt = ""
        negative = self._condition(
            "negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask
        )
        count = len(positive[0])
        if len(negative[0]) not in (1, count):
            raise ValueError(
                f"negative_prompt: {len(negative[0])} for {count} prompts; give one for each, or only one"
            )
        negative = tuple(x.expand(count, *x.shape[1:]) for x in negative)
        tokens, mask = (
            torch.cat(parts).repeat_interleave(num_images_per_prompt, dim=0)
            for parts in zip(*_padded_alike(negative, positive), strict=True)
        )  # (2n, tokens, d) and (2n, tokens), of ∅ and then of y

        def predict(x_t, t, sigma):
            gamma = guidance_scale if _is_within(sigma, guidance_interval) else 1.0
            return self._guided_by_text(x_t, t, tokens, mask, gamma, guidance_rescale)

        return self._generate(
            predict,
            count * num_images_per_prompt,
            num_inference_steps,
            generator,
            latents,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the U-Net attends to, (n, tokens, cross_attention_dim), and the mask of its padding, (n, tokens), of n
        prompts; what is longer than the text encoder takes is cut off, with a warning."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"prompt: {prompt!r} is neither a string nor a list of one or more")
        tokens = tokenize(prompts, self.tokenizer, self.text_encoder)
        tokens = {name: ids.to(self._execution_device) for name, ids in tokens.items()}
        return self.text_encoder(**tokens).last_hidden_state, tokens["attention_mask"]

    def _condition(self, name, prompt, embeds, mask) -> tuple[torch.Tensor, torch.Tensor]:
        if (prompt is None) == (embeds is None):
            raise ValueError(
                f"{name}: give either it or {name}_embeds{', and not both' if prompt is not None else ''}"
            )
        if embeds is None:
            if mask is not None:
                raise ValueError(f"{name}_attention_mask: it belongs to {name}_embeds, and none are given")
            embeds, mask = self.encode_prompt(prompt)
        width = self.unet.config.cross_attention_dim
        if embeds.ndim != 3 or embeds.shape[2] != width or 0 in embeds.shape:
            raise ValueError(f"{name}_embeds: shape {tuple(embeds.shape)} is not (prompts, tokens, {width})")
        mask = torch.ones(embeds.shape[:2]) if mask is None else mask
        if mask.shape != embeds.shape[:2] or not mask.any(dim=1).all():
            raise ValueError(
                f"{name}_attention_mask: shape {tuple(mask.shape)} is not {tuple(embeds.shape[:2])}, that of the "
                "tokens, or none of the tokens of a prompt counts"
            )
        device = self._execution_device
        return embeds.to(device, self.unet.dtype), mask.to(device).bool()

    def _guided_by_text(self, x_t, t, tokens, mask, gamma, phi):
        n, channels = x_t.shape[:2]
        if gamma in (0, 1):
            half = slice(n) if gamma == 0 else slice(n, None)
            return self._denoise(x_t, t, encoder_hidden_states=tokens[half], encoder_attention_mask=mask[half])
        both = self._denoise(torch.cat([x_t, x_t]), t, encoder_hidden_states=tokens, encoder_attention_mask=mask)
        eps_null, eps_y = both[:, :channels].chunk(2)
        eps = eps_null + gamma * (eps_y - eps_null)
        if phi > 0:
            ratio = eps_y.std(dim=(1, 2, 3), keepdim=True) / eps.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
            eps = phi * ratio * eps + (1 - phi) * eps
        return torch.cat([eps, both[n:, channels:]], dim=1)  # a learned variance is not guided


class SuperResolutionPipeline(ClassConditionalPipeline):
    r"""
    Larger pictures from small ones, by a diffusion model that sees the small picture y enlarged beside x_t (Saharia et
    al. 2021, https://arxiv.org/abs/2104.07636), with noise in it of a level that the model is told (conditioning
    augmentation, Ho et al. 2022, https://arxiv.org/abs/2106.15282, section 4.2):

        ε_θ(x_t, t, c, s),   c = U(√ᾱ_s y + √(1−ᾱ_s) ε′),   ε′ ~ N(0, I)

    where U enlarges by bicubic interpolation and ᾱ_s is what s steps of the process leave, ᾱ_0 = 1. With s = 0 the
    picture is taken at its word; with more, what is wrong in it, as in a picture that another model has drawn, may be
    mended. The U-Net is convolutional, so that pictures of any size can be enlarged; a large one is looked at in
    overlapping tiles, whose predictions are blended in every step (Bar-Tal et al. 2023,
    https://arxiv.org/abs/2302.08113).

    Args:
        unet ([`DenoisingUNet2DModel`]): ε_θ, with `conditioning_channels`.
        scheduler: [`AncestralDDPMScheduler`] or any sampler of diffusers that `from_config`s from it.
        id2label (`dict[int, str]`, *optional*): The name of each label, of a U-Net with labels.
        factor (`int`, defaults to 2): How many times higher and wider the pictures become.
        max_noise_level (`int`, defaults to 0): The most s that the U-Net was trained with.
        value_range (`dict`, *optional*): The measured values that -1 and 1 stand for in each channel, as two lists,
            `{"low": [...], "high": [...]}`.

    Raises:
        ValueError: If the U-Net takes no picture beside x_t.
    """

    _optional_components = []
    _scales = ("guidance_scale",)
    vae = None  # it works on pixels

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        factor: int = 2,
        max_noise_level: int = 0,
        value_range: dict[str, list[float]] | None = None,
    ):
        super().__init__()
        if unet.config.conditioning_channels != unet.config.in_channels:
            raise ValueError(
                f"unet: its conditioning_channels are {unet.config.conditioning_channels}, and not the "
                f"{unet.config.in_channels} of its pictures, which it has to see enlarged"
            )
        if factor not in (2, 4, 8):
            raise ValueError(f"factor: {factor!r} is not one of 2, 4, 8")
        T = scheduler.config.num_train_timesteps
        if not isinstance(max_noise_level, int) or not 0 <= max_noise_level <= T:
            raise ValueError(f"max_noise_level: {max_noise_level!r} is not a whole number from 0 to {T}")
        self.register_modules(unet=unet, scheduler=scheduler)
        self._register_names(id2label, value_range)
        self.register_to_config(factor=factor, max_noise_level=max_noise_level)

    @torch.no_grad()
    def __call__(
        self,
        image,
        class_labels: str | int | dict | list[str | int | dict] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        noise_level: int = 0,
        tile_size: int = 512,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (never written to)
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            image (`PIL.Image.Image`, a list of them, `np.ndarray` or `torch.Tensor`): n small pictures of one size,
                whatever that is; arrays are (n, height, width, channels) and tensors (n, channels, height, width), in
                [0, 1] or, of measured values, in the units of the data.
            class_labels (*optional*): The class of each picture, as [`ClassifierFreeGuidedPipeline`] takes it; for a
                U-Net with labels, which by default is told none.
            guidance_scale, guidance_interval: γ and where it applies, as [`ClassifierFreeGuidedPipeline`] takes them.
            noise_level (`int`, defaults to 0): s, in timesteps, from 0 to the `max_noise_level` of the model.
            tile_size (`int`, defaults to 512): Height and width, in pixels of the result, of what the U-Net is shown
                at once; smaller ones take less memory. Neighbours share a quarter of it.
            num_inference_steps, generator, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs: As
                [`UnconditionalPipeline`] takes them.
            latents (`torch.Tensor` of shape `(n, channels, height, width)`, *optional*): x_T, of the size of the
                result, instead of noise.
            output_type: As [`UnconditionalPipeline`] takes it.

        Returns:
            [`~diffusers.ImagePipelineOutput`] with `images`, or a tuple of them.

        Raises:
            ValueError: If a picture has other channels than the model, a label is unknown, an argument out of its
                range or too large for finite pictures.
        """
        small = self.preprocess(image, self.unet.config.in_channels).to(self._execution_device)  # (n, C, h, w)
        n, channels, *size = small.shape
        larger = tuple(self.config.factor * length for length in size)
        if class_labels is not None and self.num_classes is None:
            raise ValueError("class_labels: given, but this model knows no classes; leave them out")
        weights = None if class_labels is None else self._label_weights(class_labels)  # (n, num_classes)
        _check_finite(guidance_scale=guidance_scale)
        _check_interval(guidance_interval)
        self._check_enlargement(n, weights, guidance_scale, noise_level, tile_size)
        if latents is not None and tuple(latents.shape[2:]) != larger:
            raise ValueError(f"latents: {tuple(latents.shape[2:])} is not {larger}, the size of the result")

        generators = _one_generator_each(generator, n)
        if latents is None:
            latents = _standard_normal((channels, *larger), generators)
        epsilon = _standard_normal((channels, *size), generators).to(small.device)
        s = torch.full((n,), noise_level, device=small.device)
        seen = enlarge(noised_by(self.scheduler, small, epsilon, s), self.config.factor).to(self.unet.dtype)

        def predict(x_t, t, sigma):
            gamma = guidance_scale if _is_within(sigma, guidance_interval) else 1.0

            def of_tile(x_t, seen):
                condition = {"conditioning_image": seen, "conditioning_timestep": s}
                if self.num_classes is None:
                    return self._denoise(x_t, t, **condition)
                if weights is None:
                    null = torch.full((n,), self.num_classes, device=x_t.device)
                    return self._denoise(x_t, t, class_labels=null, **condition)
                return self._classifier_free_guidance(x_t, t, weights, gamma, **condition)

            return _blended(of_tile, (x_t, seen), tile_size, self.unet.size_factor)

        return self._generate(
            predict,
            n,
            num_inference_steps,
            generators,
            latents,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

    def _check_enlargement(self, n, weights, guidance_scale, noise_level, tile_size):
        if weights is None and guidance_scale != 1:
            raise ValueError(f"guidance_scale: {guidance_scale} is towards class_labels, and none are given")
        if weights is not None and len(weights) != n:
            raise ValueError(f"class_labels: {len(weights)} for {n} pictures; give one for each, or none")
        most = self.config.max_noise_level
        if isinstance(noise_level, bool) or not isinstance(noise_level, Integral) or not 0 <= noise_level <= most:
            raise ValueError(f"noise_level: {noise_level!r} is not a whole number from 0 to {most}, all it has seen")
        _check_positive(tile_size=tile_size)
        if tile_size < 4 * self.unet.size_factor:
            raise ValueError(f"tile_size: {tile_size} is less than {4 * self.unet.size_factor}, the least that blends")
        if not hasattr(self.scheduler, "alphas_cumprod"):
            raise ValueError(f"scheduler: {type(self.scheduler).__name__} does not tell its noise levels; use another")


class AutoencoderPipeline(GenerationPipeline):
    r"""
    Pictures through the latent space of an autoencoder, z = f(x) and x̂ = g(z): reconstructions, what lies between two
    pictures, what each latent stands for, and new pictures of z drawn from a prior (Kingma & Welling 2014,
    https://arxiv.org/abs/1312.6114).

    Args:
        vae ([`VariationalAutoencoder`], [`Autoencoder`] or `AutoencoderKL` of diffusers): The encoder and decoder. Of
            a distribution of latents its mean is taken, but for new pictures.
        value_range (`dict`, *optional*): The measured values that -1 and 1 stand for in each channel, as two lists,
            `{"low": [...], "high": [...]}`.
    """

    model_cpu_offload_seq = "vae"
    _optional_components = []

    def __init__(self, vae: ModelMixin, value_range: dict[str, list[float]] | None = None):
        super().__init__()
        self.register_modules(vae=vae)
        self.register_to_config(value_range=value_range)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        prior: str = "standard",
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """
        Decodes latents drawn from a prior.

        Args:
            batch_size (`int`, defaults to 1): Number of pictures n.
            prior (`str`, defaults to `"standard"`): `"standard"`, N(0, I), which a variational autoencoder is trained
                to have; or `"fitted"`, the Gaussian that its examples fit to the latents of the training pictures
                and save with it, the only one for a plain autoencoder.
            generator (`torch.Generator` or a list of n, *optional*): One for each picture; a single one first draws n
                seeds from itself.
            latents (`torch.Tensor` of shape `(n, c, h, w)`, *optional*): z, instead of drawing it.
            output_type, return_dict: As [`UnconditionalPipeline`] takes them; `"latent"` gives z.

        Returns:
            [`~diffusers.ImagePipelineOutput`] with `images`, or a tuple of them.

        Raises:
            ValueError: If an argument is out of its range, or the autoencoder has no such prior.
        """
        if latents is None:
            _check_positive(batch_size=batch_size)
            generators = _one_generator_each(generator, batch_size)
            latents = self._sample_prior(prior, generators)
        return self._decoded(latents.to(self._execution_device), output_type, return_dict)

    @torch.no_grad()
    def reconstruct(self, images, output_type: str = "pil", return_dict: bool = True) -> ImagePipelineOutput | tuple:
        """
        x̂ = g(f(x)).

        Args:
            images (`PIL.Image.Image`, a list of them, `np.ndarray` or `torch.Tensor`): n pictures; arrays are
                (n, height, width, channels) and tensors (n, channels, height, width), in [0, 1] or, of measured
                values, in the units of the data.
            output_type, return_dict: As `__call__` takes them.

        Raises:
            ValueError: If their size or channels do not fit the autoencoder.
        """
        return self._decoded(self._encoded(images), output_type, return_dict)

    @torch.no_grad()
    def interpolate(
        self, a, b, steps: int = 8, output_type: str = "pil", return_dict: bool = True
    ) -> ImagePipelineOutput | tuple:
        """
        `steps` pictures on the way from picture `a` to picture `b`, both included, along the great circle between
        their latents (Shoemake 1985): z_τ = (sin((1−τ) Ω) z_a + sin(τ Ω) z_b) / sin Ω, with Ω the angle between them.
        """
        _check_positive(steps=steps)
        z_a, z_b = (self._encoded_one(image, name) for image, name in ((a, "a"), (b, "b")))  # (1, c, h, w)
        if z_a.shape != z_b.shape:
            raise ValueError(
                f"b: its latents are of shape {tuple(z_b.shape[1:])}, those of a {tuple(z_a.shape[1:])}; give two "
                "pictures of one size"
            )
        cosine = torch.cosine_similarity(z_a.flatten(), z_b.flatten(), dim=0)
        omega = torch.arccos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))  # ends of a line, as they are at Ω = 0
        tau = torch.linspace(0, 1, steps, device=z_a.device)[:, None, None, None]
        z = (torch.sin((1 - tau) * omega) * z_a + torch.sin(tau * omega) * z_b) / torch.sin(omega)
        return self._decoded(z, output_type, return_dict)

    @torch.no_grad()
    def traverse(
        self,
        image,
        dims: int | tuple[int, int],
        values: list[float],
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """
        The picture with one or two of its latents set to each of `values`: a row of pictures, or a grid of them, row
        by row, with the first latent constant in a row and the second in a column (Kingma & Welling 2014, Figure 4).

        Args:
            image: A picture, as `reconstruct` takes it.
            dims (`int` or a tuple of one or two): Which latents, counting those of (c, h, w) in a row.
            values (`list[float]`): What to set them to; those of a variational autoencoder lie within ±3 or so.
            output_type, return_dict: As `__call__` takes them.

        Raises:
            ValueError: If there is no such latent, or a value is not finite.
        """
        z = self._encoded_one(image, "image")
        dims = tuple(dims) if isinstance(dims, (list, tuple)) else (dims,)
        values = list(values) if isinstance(values, Iterable) else [values]
        d = z.numel()
        are_latents = all(isinstance(i, Integral) and not isinstance(i, bool) and 0 <= i < d for i in dims)
        if not are_latents or len(dims) not in (1, 2) or len(set(dims)) < len(dims):
            raise ValueError(f"dims: {dims} is not one or two of the {d} latents, 0 to {d - 1}")
        if not values or not all(isinstance(value, Real) and math.isfinite(value) for value in values):
            raise ValueError(f"values: {values} is not a list of one or more finite numbers")
        grid = torch.cartesian_prod(*[torch.as_tensor(values, dtype=z.dtype, device=z.device)] * len(dims))
        grid = grid.reshape(-1, len(dims))
        changed = z.flatten(1).repeat(len(grid), 1)
        changed[:, list(dims)] = grid
        return self._decoded(changed.unflatten(1, z.shape[1:]), output_type, return_dict)

    def _sample_prior(self, prior, generators):
        if prior not in ("standard", "fitted"):
            raise ValueError(f"prior: {prior!r} is not one of 'standard', 'fitted'")
        if prior == "fitted":
            if self.vae.config.get("prior_rank") is None:
                raise ValueError("prior: 'fitted', but none has been fitted; only a plain autoencoder comes with one")
            noise = _standard_normal((self.vae.config.prior_rank,), generators)
            return self.vae.sample_prior(noise.to(self.vae.device, self.vae.dtype))
        if not getattr(self.vae, "has_standard_prior", False):  # that of diffusers hardly has one
            raise ValueError(
                "prior: nothing makes the latents of this autoencoder follow N(0, I), so what it decodes from there "
                "is no picture; use prior='fitted', if one was fitted, or train a variational autoencoder"
            )
        return _standard_normal(self.vae.latent_shape(*_pair(self.vae.config.sample_size)), generators)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the pictures that it is made for."""
        return (self.vae.config.in_channels, *_pair(self.vae.config.sample_size))

    def _encoded_one(self, image, name) -> torch.Tensor:
        z = self._encoded(image)
        if len(z) != 1:
            raise ValueError(f"{name}: {len(z)} pictures; give one")
        return z

    def _encoded(self, images) -> torch.Tensor:
        x = self.preprocess(images, self.vae.config.in_channels).to(self._execution_device, self.vae.dtype)
        if not hasattr(self.vae, "check_size"):  # that of diffusers would cut off what is left over
            factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
            if any(length % factor for length in x.shape[2:]):
                height, width = x.shape[2:]
                raise ValueError(f"images: {height}x{width} pixels; this model needs both to be divisible by {factor}")
        output = self.vae.encode(x)
        return (output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents).float()

    def _decoded(self, z, output_type, return_dict):
        _check_output_type(output_type)
        if output_type == "latent":
            images = z
        else:
            images = self.postprocess(self.vae.decode(z.to(self.vae.dtype)).sample.float(), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def tokenize(texts: list[str], tokenizer, text_encoder) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, (n, tokens), of n texts, padded to the longest; what is longer than the text
    encoder takes is cut off, with a warning that shows it."""
    longest = min(tokenizer.model_max_length, getattr(text_encoder.config, "max_position_embeddings", math.inf))
    longest = longest if longest < 1e6 else None  # unlimited, as tokenizers put it
    tokens = tokenizer(texts, padding=True, truncation=longest is not None, max_length=longest, return_tensors="pt")
    left_out = []
    for text, mask in zip(texts, tokens["attention_mask"], strict=True):
        if not mask.any():
            raise ValueError(f"tokenizer: it makes no token of {text!r}; let it add one at the start or the end")
        if mask.sum() == longest:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            rest = ids[longest - tokenizer.num_special_tokens_to_add() :]
            if rest:
                left_out.append(repr(tokenizer.decode(rest)))
    if left_out:
        more = f" and that of {len(left_out) - 5} more" if len(left_out) > 5 else ""
        warnings.warn(
            f"{len(left_out)} of {len(texts)} texts are cut off after {longest} tokens, all that the text encoder "
            f"takes; left out is {', '.join(left_out[:5])}{more}",
            stacklevel=4,
        )
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def shrink(images: torch.Tensor, factor: int) -> torch.Tensor:
    """
    Pictures (n, C, H, W) in [-1, 1] at 1/`factor` of their size, by the antialiased filter with which data sets are
    scaled (Lanczos, as Pillow has it): R_h x R_wᵀ, where row i of R is w((j + ½) / factor − (i + ½)) for the pixels
    j, divided by its sum, with w(u) = sinc(u) sinc(u / 3) up to |u| = 3.

    Raises:
        ValueError: If the factor does not divide their height and width.
    """
    if any(length % factor for length in images.shape[2:]):
        height, width = images.shape[2:]
        raise ValueError(f"factor: {factor} does not divide {height}x{width}, the size of the pictures")
    rows, columns = (_lanczos(length, factor).to(images) for length in images.shape[2:])
    with torch.autocast(images.device.type, enabled=False):
        images = (images @ columns.T).clamp(-1, 1)  # it swings beyond edges
        return (rows @ images).clamp(-1, 1)


def enlarge(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Pictures (n, C, h, w) at `factor` times their size, by bicubic interpolation."""
    return F.interpolate(images, scale_factor=factor, mode="bicubic")


def noised_by(scheduler: SchedulerMixin, images, epsilon, s: torch.Tensor) -> torch.Tensor:
    """√ᾱ_s y + √(1−ᾱ_s) ε after s steps, (n,), of the process; none at s = 0."""
    alpha_bar = torch.cat([torch.ones(1), scheduler.alphas_cumprod.cpu()]).to(s.device)[s]
    alpha_bar = alpha_bar[:, None, None, None].to(images.dtype)
    return alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * epsilon


def _lanczos(length: int, factor: int) -> torch.Tensor:
    """R, (length / factor, length)."""
    centers = torch.arange(length // factor, dtype=torch.float64)[:, None] + 0.5
    u = (torch.arange(length, dtype=torch.float64) + 0.5) / factor - centers
    weights = torch.where(u.abs() < 3, torch.sinc(u) * torch.sinc(u / 3), 0.0)
    return weights / weights.sum(dim=1, keepdim=True)


def _blended(predict, inputs, tile_size: int, multiple: int) -> torch.Tensor:
    """predict(*inputs) of tensors (n, C, H, W) by overlapping tiles, each weighted less towards its edges; sizes that
    are no `multiple` are continued by their mirror image."""
    height, width = inputs[0].shape[2:]
    rows, columns = (_mirrored(length, -(-length // multiple) * multiple) for length in (height, width))
    inputs = [x[:, :, rows][:, :, :, columns] for x in inputs]
    tile_size = tile_size // multiple * multiple
    if max(inputs[0].shape[2:]) <= tile_size:
        return predict(*inputs)[:, :, :height, :width]

    total, weights = None, torch.zeros(inputs[0].shape[2:], device=inputs[0].device)
    for of_rows, weights_of_rows in _tiles(len(rows), tile_size, multiple):
        for of_columns, weights_of_columns in _tiles(len(columns), tile_size, multiple):
            weight = (weights_of_rows[:, None] * weights_of_columns).to(weights)
            prediction = weight * predict(*(x[:, :, of_rows, of_columns] for x in inputs))
            total = prediction.new_zeros(*prediction.shape[:2], *weights.shape) if total is None else total
            total[:, :, of_rows, of_columns] += prediction
            weights[of_rows, of_columns] += weight
    return (total / weights)[:, :, :height, :width]


def _mirrored(length: int, longer: int) -> torch.Tensor:
    """The indices of 0 ... length - 1 continued to and fro."""
    index = torch.arange(longer) % (2 * length)
    return torch.minimum(index, 2 * length - 1 - index)


def _tiles(length: int, tile_size: int, multiple: int):
    """(slice, weights) of tiles that cover a length, neighbours sharing about a quarter of a tile or more."""
    size, overlap = min(length, tile_size), tile_size // 4
    count = 1 if length <= size else -(-(length - overlap) // (size - overlap))
    position = torch.arange(size) + 0.5
    weights = (torch.minimum(position, size - position) / overlap).clamp(max=1)
    for i in range(count):
        start = round(i * (length - size) / max(count - 1, 1) / multiple) * multiple
        yield slice(start, start + size), weights


def _padded_alike(*conditions):
    """Pairs of (n, tokens, d) and (n, tokens), padded to as many tokens as the longest has."""
    longest = max(mask.shape[1] for _, mask in conditions)
    for tokens, mask in conditions:
        missing = longest - mask.shape[1]
        yield F.pad(tokens, (0, 0, 0, missing)), F.pad(mask, (0, missing))


def _converted(image, mode):
    """A picture upright, in a mode of Pillow, laid on white where its alpha is given up: as it was for training."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if not mode.endswith("A"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _check_positive(**numbers) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise ValueError(f"{name}: {number!r} is not a positive whole number")


def _check_output_type(output_type) -> None:
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type: {output_type!r} is not one of 'pil', 'np', 'pt', 'latent'")


def _standard_normal(shape, generators) -> torch.Tensor:
    """Each picture's from its own generator, (n, *shape), in fp32 on the CPU."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device).cpu() for g in generators])


def _check_finite(**numbers) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
            raise ValueError(f"{name}: {number!r} is not a finite number")


def _check_interval(interval) -> None:
    if interval is not None and not (
        isinstance(interval, (list, tuple))
        and len(interval) == 2
        and all(isinstance(sigma, Real) for sigma in interval)
        and 0 <= interval[0] <= interval[1]
    ):
        raise ValueError(f"guidance_interval: {interval} is not (low, high) with 0 <= low <= high")


def _is_within(sigma: float, interval: tuple[float, float] | None) -> bool:
    return interval is None or interval[0] <= sigma <= interval[1]


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _one_generator_each(generator, n: int) -> list[torch.Generator]:
    """One generator per picture, so that what a picture is made of does not depend on its neighbours."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != n:
            raise ValueError(f"generator: a list of {len(generator)} for {n} pictures; give one for each, or only one")
        return list(generator)
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (n,), generator=generator, device=device)
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]


def _forget_path(config_file: Path) -> None:
    """Drops from the config of a component how it was loaded, which is nobody else's business."""
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    known = len(config)
    for key in ("_name_or_path", "name_or_path", "is_local", "local_files_only"):
        config.pop(key, None)
    if len(config) < known:
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _download(repo_id: str, kwargs: dict) -> str:
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
        lines = [line for line in str(error).splitlines() if line and "Client Error." not in line]
        reason = lines[0] if lines else type(error).__name__
        raise FileNotFoundError(f"{repo_id!r} is not a folder here, nor a pipeline on the Hub: {reason}") from error
    components = [name for name, entry in _read_index(index_file).items() if isinstance(entry, list)]
    patterns = [f"{name}/*{ending}" for name in components for ending in (".json", ".safetensors", ".txt", ".model")]
    return snapshot_download(repo_id, allow_patterns=[DiffusionPipeline.config_name, *patterns], **options)


def _read_adapter(path: str, weight_name: str, **options) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights of an adapter, and the configs of its parts, from a file, a folder or the Hub."""
    from safetensors import SafetensorError, safe_open

    file = Path(path, options["subfolder"] or "", weight_name) if os.path.isdir(path) else Path(path)
    if not file.is_file() and not os.path.isdir(path):
        if path.count("/") > 1 or path.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{path!r} is not a folder or a file, nor can it be the id of a repository")
        try:
            file = hf_hub_download(path, weight_name, **options)
        except (OSError, ValueError) as error:
            lines = [line for line in str(error).splitlines() if line and "Client Error." not in line]
            reason = lines[0] if lines else type(error).__name__
            raise FileNotFoundError(f"{path!r} is not a folder here, nor an adapter on the Hub: {reason}") from error
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118 (no dict)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: there is no {weight_name} in it, so it is no adapter") from error
    except SafetensorError as error:
        raise ValueError(f"{file}: not a file of safetensors ({str(error).splitlines()[0]})") from error


def _check_adapter(path: str, component: str, model, weights: dict[str, torch.Tensor], config: dict) -> None:
    """Says that an adapter is of another model before it is half attached, or more memory taken than it fills."""
    ranks = {weight.shape[0] for key, weight in weights.items() if ".lora_A" in key}
    for rank in (config.get("r"), *(config.get("rank_pattern") or {}).values()):
        if rank is not None and rank not in ranks:
            raise ValueError(f"{path}: it says that it is of rank {rank!r}, and its weights are not")
    if config.get("megatron_config") or config.get("megatron_core", "megatron.core") != "megatron.core":
        raise ValueError(f"{path}: it names code that is not of this package; it is not loaded")
    modules = {} if model is None else dict(model.named_modules())
    for key, weight in weights.items():
        name, _, kind = key.partition(".lora_")
        of_model = getattr(modules.get(name), "weight", None)
        axes = {"A": slice(1, None), "B": slice(0, 1)}.get(kind[:1])  # a kernel is all in A
        if of_model is None or axes is None or weight.shape[axes] != of_model.shape[axes]:
            raise ValueError(
                f"{path}: {component}.{key} fits no layer of this model; load it into the one it was trained for"
            )


def _without_prefix(named: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}


def _check_complete(folder: str | os.PathLike, replaced: dict) -> None:
    """Says what is missing before a loader three libraries down does."""
    index_file = Path(folder, DiffusionPipeline.config_name)
    if not index_file.is_file():
        kind = "not the folder of a pipeline"
        if Path(folder, "training_config.json").is_file():
            kind = "a run that is not over; repeat its command, which continues it"
        if Path(folder, LORA_WEIGHT_NAME_SAFE).is_file():
            kind = "an adapter; load the model that it is for, and then it by load_lora_weights"
        raise FileNotFoundError(f"{folder}: no {index_file.name} in it, so it is {kind}")
    for name, entry in _read_index(index_file).items():
        if not isinstance(entry, list) or entry[0] is None or name in replaced:
            continue
        if Path(folder, name, "config.json").is_file() and not list(Path(folder, name).glob("*.safetensors")):
            raise FileNotFoundError(f"{Path(folder, name)}: the weights of {name!r} (*.safetensors) are missing")
        if not Path(folder, name).is_dir():
            raise FileNotFoundError(f"{Path(folder, name)}: the folder of the component {name!r} is missing")


def _read_index(file: str | os.PathLike) -> dict:
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


def _pipeline_class(folder: str | os.PathLike) -> type[GenerationPipeline]:
    """The class of this file that the index names."""
    name = GenerationPipeline.load_config(folder)["_class_name"]
    cls = globals().get(name)
    if not (isinstance(cls, type) and issubclass(cls, GenerationPipeline) and cls is not GenerationPipeline):
        raise ValueError(
            f"{folder}: its pipeline, {name!r}, is not one of this package; open it with DiffusionPipeline"
        )
    return cls
