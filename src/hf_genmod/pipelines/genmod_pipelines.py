"""Pipelines that turn noise into pictures: one base class with the sampling loop, then one class for each way to ask.

Pictures and latents are (n, channels, height, width); inside the loop they are fp32 with pictures in [-1, 1]. The
file is complete in itself: it travels inside every checkpoint.
"""

import copy
import difflib
import importlib
import inspect
import json
import os
from collections.abc import Callable
from numbers import Integral
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import hf_hub_download, snapshot_download

# Captured at import: a later load may overwrite the file that this module was read from.
_SHIPPED_FILE = (Path(__file__).stem, Path(__file__).read_text(encoding="utf-8"))

# Where the classes of a checkpoint are found when this file is part of the installed package.
_INSTALLED = {
    "ancestral_ddpm": "hf_genmod.schedulers.ancestral_ddpm",
    "denoising_unet": "hf_genmod.models.denoising_unet",
}
_IS_INSTALLED = not __name__.startswith("diffusers_modules.")


class GenerationPipeline(DiffusionPipeline):
    """What the pipelines share: the sampling loop, one seed per picture, and checkpoints that carry their code.

    A pipeline with a `vae` samples in its latent space and decodes at the end. One of measured values, with a
    `value_range` in its config, gives "np" and "pt" in the units of the data.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]
    _shipped_file = _SHIPPED_FILE

    # ---- sampling ----

    def _generate(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        batch_size: int,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
    ):
        """
        Algorithm 2 of Ho et al. 2020 (https://arxiv.org/abs/2006.11239) with any scheduler: x_T ~ N(0, I), then
        x_{t-1} from x_t and the model's prediction until x_0. `predict(x_t, t)` is all in which pipelines differ.
        """
        self._check_request(batch_size, num_inference_steps, output_type, callback_on_step_end_tensor_inputs, latents)
        device = self._execution_device
        generators = _one_generator_each(generator, batch_size)
        x_t = self._initial_noise(batch_size, generators, latents).to(device)
        scheduler, takes_variance = self._sampler()
        scheduler.set_timesteps(num_inference_steps, device=device)
        x_t = x_t * scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generators} if takes_generator else {}
        self._interrupt = False

        for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
            model_input = scheduler.scale_model_input(x_t, t)
            prediction = predict(model_input.to(self.unet.dtype), t).float()
            if not takes_variance:
                prediction = prediction[:, : x_t.shape[1]]
            x_t = scheduler.step(prediction, t, x_t, **step_kwargs).prev_sample

            if callback_on_step_end is not None:
                tensors = {"latents": x_t}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                x_t = (callback_on_step_end(self, i, t, chosen) or {}).get("latents", x_t)
                if self._interrupt:
                    break

        images = x_t if output_type == "latent" else self._postprocess(self._decode(x_t), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _initial_noise(self, batch_size, generators, latents):
        """x_T ~ N(0, I), each picture from its own generator, in fp32 whatever the model's dtype."""
        if latents is not None:
            return latents.float()
        config = self.unet.config
        size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
        shape = (config.in_channels, *size)
        return torch.stack([torch.randn(shape, generator=g, device=g.device).cpu() for g in generators])

    def _sampler(self) -> tuple[SchedulerMixin, bool]:
        """The scheduler, and whether it takes a learned variance along with the prediction."""
        learned = str(getattr(self.scheduler.config, "variance_type", None)).startswith("learned")
        if learned and "DDPM" not in type(self.scheduler).__name__:
            scheduler = copy.deepcopy(self.scheduler)  # the config in the checkpoint stays what it is
            scheduler.register_to_config(variance_type=None)  # DPM-Solver would cut once more, at three channels
            return scheduler, False
        return self.scheduler, learned

    def _decode(self, latents):
        if self.vae is None:
            return latents
        config = self.vae.config
        z = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return self.vae.decode(z.to(self.vae.dtype)).sample.float()

    def _postprocess(self, images, output_type):
        """From [-1, 1] to what was asked for."""
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

    def _sigma(self, t) -> float:
        """The noise level σ = √((1−ᾱ_t)/ᾱ_t); between two whole timesteps by interpolation."""
        alpha_bar = self.scheduler.alphas_cumprod.cpu().double()
        t = float(t)
        below = min(int(t), len(alpha_bar) - 1)
        above = min(below + 1, len(alpha_bar) - 1)
        alpha_bar_t = torch.lerp(alpha_bar[below], alpha_bar[above], t - below).item()
        return float("inf") if alpha_bar_t == 0 else ((1 - alpha_bar_t) / alpha_bar_t) ** 0.5

    def _check_request(self, batch_size, num_inference_steps, output_type, tensor_inputs, latents):
        for name, value in (("batch_size", batch_size), ("num_inference_steps", num_inference_steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {value!r} is not a positive whole number")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: {output_type!r} is not one of 'pil', 'np', 'pt', 'latent'")
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
            _forget_path(Path(save_directory, folder, "config.json"))
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

        def predict(x_t, t):
            return self.unet(x_t, t).sample

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


class ClassifierFreeGuidedPipeline(GenerationPipeline):
    """
    Pictures of a chosen class by classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598):

        ε̃ = ε_∅ + γ (ε_y − ε_∅),    ε_y = ε_θ(x_t, t, y),  ε_∅ = ε_θ(x_t, t, null label)

    with γ the `guidance_scale`: 1 is the conditional model, 0 the unconditional one, and the paper's w is γ − 1. The
    combination is the same for predictions of x_0 and v, which are affine in ε at fixed x_t.

    Args:
        unet ([`DenoisingUNet2DModel`]): ε_θ(x_t, t, y), with `num_classes`.
        scheduler: [`AncestralDDPMScheduler`] or any sampler of diffusers that `from_config`s from it.
        vae (*optional*): An autoencoder with `decode(z).sample`; then the U-Net works on its latents.
        id2label (`dict[int, str]`, *optional*): The name of each label.
        value_range (`dict`, *optional*): The measured values that -1 and 1 stand for in each channel, as two lists,
            `{"low": [...], "high": [...]}`.
    """

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
        if id2label is not None:
            id2label = {int(index): name for index, name in id2label.items()}  # JSON has made the keys strings
        self.register_to_config(id2label=id2label, value_range=value_range)

    @property
    def labels(self) -> dict[str, int]:
        """The label of each name, such as `{"airplane": 0, ...}`; empty where the checkpoint has no names."""
        return {name: index for index, name in (self.config.id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | list[str | int] | torch.Tensor,
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
            class_labels (`str`, `int`, a list of them, or a `torch.Tensor` of shape `(n,)`): The class of each of the
                n pictures, by name or number.
            guidance_scale (`float`, defaults to 2.0): γ. 1 and 0 cost one forward pass a step, any other value one
                pass of twice the batch.
            guidance_interval (`(float, float)`, *optional*): (sigma_low, sigma_high): the noise levels
                σ = √((1−ᾱ_t)/ᾱ_t) in which γ applies; outside, γ is 1 (Kynkäänniemi et al. 2024,
                https://arxiv.org/abs/2404.07724).
            num_inference_steps, generator, latents, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs: As [`UnconditionalPipeline`] takes them.

        Returns:
            [`~diffusers.ImagePipelineOutput`] with `images`, or a tuple of them.

        Raises:
            ValueError: If a label is unknown, an argument out of its range, or a shape does not fit the U-Net.
        """
        y = self._label_indices(class_labels).to(self._execution_device)  # (n,)
        null = torch.full_like(y, self.unet.config.num_classes)
        channels = self.unet.config.in_channels
        if guidance_interval is not None and not (
            isinstance(guidance_interval, (list, tuple))
            and len(guidance_interval) == 2
            and 0 <= guidance_interval[0] <= guidance_interval[1]
        ):
            raise ValueError(f"guidance_interval: {guidance_interval} is not (low, high) with 0 <= low <= high")

        def predict(x_t, t):
            guided = guidance_interval is None or guidance_interval[0] <= self._sigma(t) <= guidance_interval[1]
            gamma = guidance_scale if guided else 1.0
            if gamma in (0.0, 1.0):
                return self.unet(x_t, t, class_labels=y if gamma == 1.0 else null).sample
            both = self.unet(torch.cat([x_t, x_t]), t, class_labels=torch.cat([null, y])).sample.float()
            eps_null, eps_y = both.chunk(2)
            eps_tilde = eps_null + gamma * (eps_y - eps_null)
            return torch.cat([eps_tilde[:, :channels], eps_y[:, channels:]], dim=1)  # a learned variance is not guided

        return self._generate(
            predict,
            len(y),
            num_inference_steps,
            generator,
            latents,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

    def _label_indices(self, class_labels) -> torch.Tensor:
        if hasattr(class_labels, "tolist"):  # of torch or numpy
            class_labels = class_labels.reshape(-1).tolist()
        if not isinstance(class_labels, (list, tuple)):
            class_labels = [class_labels]
        if not class_labels:
            raise ValueError("class_labels: there are none; give one for each picture")
        return torch.tensor([self._label_index(label) for label in class_labels], dtype=torch.long)

    def _label_index(self, label) -> int:
        num_classes = self.unet.config.num_classes
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
    """Drops from the config of a model where it was loaded from, which is nobody else's business."""
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    if config.pop("_name_or_path", None) is not None:
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _download(repo_id: str, kwargs: dict) -> str:
    """Fetches the index, configs and safetensors of a repository on the Hub, and no code; pops what it uses."""
    names = ("cache_dir", "force_download", "local_files_only", "revision", "token")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    if repo_id.count("/") > 1 or repo_id.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{repo_id!r} is not a folder, nor can it be the id of a repository on the Hub")
    try:
        index_file = hf_hub_download(repo_id, DiffusionPipeline.config_name, **options)
    except (OSError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if line and "Client Error." not in line]
        reason = lines[0] if lines else type(error).__name__
        raise FileNotFoundError(f"{repo_id!r} is not a folder here, nor a pipeline on the Hub: {reason}") from error
    index = json.loads(Path(index_file).read_text(encoding="utf-8"))
    components = [name for name, entry in index.items() if isinstance(entry, list) and name != "_class_name"]
    patterns = [f"{name}/*{ending}" for name in components for ending in (".json", ".safetensors", ".txt", ".model")]
    return snapshot_download(repo_id, allow_patterns=[DiffusionPipeline.config_name, *patterns], **options)


def _check_complete(folder: str | os.PathLike, replaced: dict) -> None:
    """Says what is missing before a loader three libraries down does."""
    index_file = Path(folder, DiffusionPipeline.config_name)
    if not index_file.is_file():
        raise FileNotFoundError(f"{folder}: no {index_file.name} in it, so it is not the folder of a pipeline")
    for name, entry in json.loads(index_file.read_text(encoding="utf-8")).items():
        if not isinstance(entry, list) or name == "_class_name" or entry[0] is None or name in replaced:
            continue
        if Path(folder, name, "config.json").is_file() and not list(Path(folder, name).glob("*.safetensors")):
            raise FileNotFoundError(f"{Path(folder, name)}: the weights of {name!r} (*.safetensors) are missing")
        if not Path(folder, name).is_dir():
            raise FileNotFoundError(f"{Path(folder, name)}: the folder of the component {name!r} is missing")


def _pipeline_class(folder: str | os.PathLike) -> type[GenerationPipeline]:
    """The class of this file that the index names."""
    name = GenerationPipeline.load_config(folder)["_class_name"]
    cls = globals().get(name)
    if not (isinstance(cls, type) and issubclass(cls, GenerationPipeline) and cls is not GenerationPipeline):
        raise ValueError(
            f"{folder}: its pipeline, {name!r}, is not one of this package; open it with DiffusionPipeline"
        )
    return cls
