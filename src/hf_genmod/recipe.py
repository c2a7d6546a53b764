"""What the training examples share: their arguments, and the recipe by which they build a model by default."""

import argparse
import contextlib
import dataclasses
import difflib
import math
import sys
import warnings
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, SchedulerMixin
from transformers import HfArgumentParser

from hf_genmod.data import PictureDataset, load_pictures, splits_of, to_model_range
from hf_genmod.evaluation import accuracy_by_noise_level
from hf_genmod.hub import load_vae
from hf_genmod.latents import LatentDataset, standardised
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel, NoisyImageClassifier
from hf_genmod.models.image_autoencoder import ImageAutoencoder
from hf_genmod.pipelines.genmod_pipelines import GenerationPipeline
from hf_genmod.plots import draw_accuracy
from hf_genmod.processes import processes
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler, FewStepDDPMScheduler

# What a classifier records of the process whose noise it has seen.
NOISE_SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
)  # fmt: skip


@dataclasses.dataclass
class DataArguments:
    """Which pictures. Each is a flag of the training examples."""

    dataset: str = dataclasses.field(
        default="shapes",
        metadata={"help": "'shapes', a folder of pictures or class folders, a parquet data set, or an id on the Hub."},
    )
    split: str = dataclasses.field(default="train", metadata={"help": "Split of the data set."})
    validation_split: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Split of held-out pictures; by default 'validation' or 'test', where the data set has one (else "
            "a classifier holds out a tenth of the pictures)."
        },
    )
    resolution: str | None = dataclasses.field(
        default=None, metadata={"help": "Size, or HEIGHTxWIDTH, of the pictures; by default that of the data."}
    )
    channels: int | None = dataclasses.field(
        default=None, metadata={"help": "1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; by default as the data has."}
    )
    image_column: str | None = dataclasses.field(default=None, metadata={"help": "Column of the pictures."})
    label_column: str | None = dataclasses.field(default=None, metadata={"help": "Column of the class labels."})
    on_bad_image: str = dataclasses.field(
        default="error",
        metadata={"help": "A picture that cannot be used: 'error' names it and stops, 'skip' leaves it out."},
    )

    def load(
        self, vae: str | None = None, mirrored: bool = False, **required: bool
    ) -> tuple[PictureDataset | LatentDataset, PictureDataset | LatentDataset | None]:
        """
        The pictures to train on, and up to 256 held-out ones, where the data set has such; `require_labels` or
        `require_captions`, as [`~hf_genmod.data.load_pictures`] takes them.

        With a `vae`, a path or an id, they are its latents (with `mirrored`, of their mirror images too), standardised
        by what is measured on the pictures to train on; the `vae` of the result has these factors in its config.
        """
        if vae is None:
            return self.load_in_pixels(**required)
        value_range = _value_range_of(vae)
        vae = load_vae(vae).to(processes().device).eval()
        channels = vae.config.in_channels if value_range is None else None
        arguments = dataclasses.replace(self, channels=self.channels or channels)
        if isinstance(vae, ImageAutoencoder) and self.resolution is None:
            arguments.resolution = vae.config.sample_size
        training, held_out = arguments.load_in_pixels(**required)
        _check_kind("vae: it", value_range, training)
        colored = any(picture.has_color for picture in training.properties)
        if self.channels is None and training.channels < 3 and colored:
            raise ValueError(
                f"vae: it is for grey pictures, and some of {training.name} are stored in colour; train one for "
                f"them, or give --channels {training.channels} to turn them grey"
            )
        training.value_range = value_range
        latents = standardised(vae, training, mirrored)
        if held_out is None:
            return latents, None
        held_out.value_range = value_range
        return latents, LatentDataset(held_out, latents.vae, mirrored)

    def load_for(
        self, pipeline: GenerationPipeline, mirrored: bool = False
    ) -> tuple[PictureDataset | LatentDataset, PictureDataset | LatentDataset]:
        """Labelled pictures, or latents of them, as the U-Net of a pipeline sees them, and up to 1,000 held-out ones:
        a tenth of them, where the data set has none."""
        names = list(getattr(pipeline, "labels", {}))
        training, held_out = self._as_of(pipeline).load_in_pixels(
            num_held_out=1000, hold_out=True, require_labels=True
        )
        if names and names != training.label_names:
            raise ValueError(
                f"for_model: its labels are {_shortened(names)}, and those of the pictures "
                f"{_shortened(training.label_names)}; choose the labels of the model, or a model without labels"
            )
        return tuple(_as_seen_by(pipeline, pictures, mirrored) for pictures in (training, held_out))

    def load_beside(self, pipeline: GenerationPipeline) -> tuple[PictureDataset, PictureDataset]:
        """Pictures as a pipeline makes them, to measure it by, and up to 1,000 held-out ones: a tenth of them, where
        the data set has none (which the `name` of these then says)."""
        names = list(getattr(pipeline, "labels", {}))
        training, held_out = self._as_of(pipeline).load_in_pixels(
            num_held_out=1000,
            hold_out=True,
            require_labels=getattr(pipeline, "num_classes", None) is not None,
            require_captions="tokenizer" in pipeline.components,
        )
        if names and names != training.label_names:
            raise ValueError(
                f"dataset: the labels of the model are {_shortened(names)}, and those of the pictures "
                f"{_shortened(training.label_names)}; give the data set that it was trained on"
            )
        _check_kind("dataset: the model", pipeline.config.value_range, training)
        training.value_range = held_out.value_range = pipeline.config.value_range
        return training, held_out

    def load_more_for(self, pipeline: GenerationPipeline, mirrored: bool = False) -> PictureDataset | LatentDataset:
        """More pictures, or latents of them, for the U-Net of a pipeline to be trained on."""
        return _as_seen_by(pipeline, self._as_of(pipeline).load_in_pixels()[0], mirrored)

    def _as_of(self, pipeline: GenerationPipeline) -> "DataArguments":
        """These arguments, for pictures of the size that a pipeline makes."""
        channels, height, width = pipeline.picture_shape
        if self.resolution is not None or self.channels is not None:
            raise ValueError(
                f"resolution: the model was trained on {height}x{width} pictures of {channels} channels, and so is "
                "what belongs to it; leave out --resolution and --channels"
            )
        channels = channels if pipeline.config.value_range is None else None
        return dataclasses.replace(self, resolution=f"{height}x{width}", channels=channels)

    def load_in_pixels(self, num_held_out: int = 256, hold_out: bool = False, **required: bool):
        """Those to train on, and up to `num_held_out` of those held out; where the data set has none, a tenth of its
        pictures if `hold_out`, else `None`."""
        arguments = dataclasses.asdict(self) | required
        held_out = arguments.pop("validation_split")
        training = load_pictures(**arguments)
        if required.get("require_labels"):
            untrained = _unseen(training)
            if untrained:
                warnings.warn(
                    f"{training.name}: no picture is of {_shortened(untrained)}, which a model thus cannot learn",
                    stacklevel=3,
                )
        if held_out is None:
            known = set(splits_of(self.dataset)) - {self.split}
            held_out = next((split for split in ("validation", "test") if split in known), None)
        if held_out is None:
            return training, training.hold_out(min(-(-len(training) // 10), num_held_out)) if hold_out else None
        arguments |= {"split": held_out, "resolution": training.resolution, "channels": training.channels}
        validation = load_pictures(**arguments, limit=num_held_out)
        if validation.label_names != training.label_names:
            raise ValueError(
                f"validation_split: the classes of {held_out!r} are not those of {self.split!r}; choose another"
            )
        validation.value_range = training.value_range
        return training, validation


@dataclasses.dataclass
class CaptionedDataArguments(DataArguments):
    """Which pictures, with captions where there are any."""

    caption_column: str | None = dataclasses.field(default=None, metadata={"help": "Column of the captions."})


@dataclasses.dataclass
class NetworkArguments:
    """Which network. Each is a flag of the training examples."""

    patch_size: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Squares of pixels folded into channels; by default 2 where the size is even, 1 for latents."
        },
    )
    block_out_channels: list[int] | None = dataclasses.field(
        default=None, metadata={"help": "Width of each level; by default the last of 48 96 144 that the size allows."}
    )
    layers_per_block: int = dataclasses.field(default=1, metadata={"help": "Blocks per level."})
    attention_levels: list[int] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Levels with self-attention, from 0; by default the lowest, or none if that is of at most 2x2 "
            "positions, as its kernels see them all. With a text, which comes in there, the lowest of more than one."
        },
    )
    fourier_frequencies: list[float] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Frequencies of the sines and cosines of the pixels that the network sees beside them; by default "
            "2 and 8, and none for latents."
        },
    )
    dropout: float = dataclasses.field(default=0.0, metadata={"help": "Dropout in the residual blocks."})

    def architecture(self, dataset: PictureDataset, has_text: bool = False) -> dict:
        """
        The config of a network for pictures of the data set's size: pixels are folded 2x2 into channels where the size
        is even, and it has as many levels, up to three, as the size can be halved.
        """
        in_pixels = dataset.vae is None
        patch_size = self.patch_size or (
            2 if in_pixels and not any(length % 2 for length in dataset.resolution) else 1
        )
        frequencies = self.fourier_frequencies
        if frequencies is None:
            frequencies = (2.0, 8.0) if in_pixels else ()
        widths = self.block_out_channels
        if widths is None:
            size = math.gcd(*dataset.resolution) // patch_size
            num_levels = 3 if size % 4 == 0 else 2 if size % 2 == 0 else 1
            widths = (48, 96, 144)[-num_levels:]
        attention_levels = self.attention_levels
        if attention_levels is None:
            sides = [max(dataset.resolution) // (patch_size * 2**level) for level in range(len(widths))]
            attention_levels = [max((level for level, side in enumerate(sides) if side > 1), default=0)]
            if sides[-1] <= 2 and not has_text:
                attention_levels = []
        unknown = [level for level in attention_levels if not 0 <= level < len(widths)]
        if unknown:
            raise ValueError(f"attention_levels: {unknown[0]} is not one of the levels 0 to {len(widths) - 1}")
        base = math.gcd(*widths)
        return {
            "sample_size": tuple(dataset.resolution),
            "in_channels": dataset.channels,
            "block_out_channels": tuple(widths),
            "layers_per_block": self.layers_per_block,
            "attention_levels": tuple(level in attention_levels for level in range(len(widths))),
            "attention_head_dim": base if base <= 64 else math.gcd(base, 64),
            "norm_num_groups": _norm_num_groups(widths),
            "dropout": self.dropout,
            "patch_size": patch_size,
            "fourier_frequencies": tuple(frequencies),
        }

    def make_classifier(
        self, dataset: PictureDataset, scheduler: AncestralDDPMScheduler, seed: int = 0
    ) -> NoisyImageClassifier:
        """A classifier of the data set's pictures under the scheduler's noise."""
        torch.manual_seed(seed)
        schedule = {key: value for key, value in scheduler.config.items() if key in NOISE_SCHEDULE}
        return NoisyImageClassifier(
            **self.architecture(dataset), num_classes=len(dataset.label_names), noise_schedule=schedule
        )


@dataclasses.dataclass
class AutoencoderArguments:
    """Which autoencoder. Each is a flag of the training examples."""

    latent_channels: int = dataclasses.field(
        default=8, metadata={"help": "Channels of the latents, or with --vector_latents their number."}
    )
    downsampling_factor: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "How many times higher and wider than the latents a picture is: 1, 2, 4, 8, ...; by default 4, "
            "from 64 pixels on 8 where it divides them, and with --vector_latents the most up to 8 that does."
        },
    )
    vector_latents: bool = dataclasses.field(
        default=False, metadata={"help": "Make each picture a vector, instead of a small feature map."}
    )
    autoencoder_channels: list[int] | None = dataclasses.field(
        default=None,
        metadata={"help": "Width of each level; by default 48, 96 for feature maps up to 16 high, 144 up to 8."},
    )

    def make_autoencoder(self, kind: type[ImageAutoencoder], dataset: PictureDataset, seed: int = 0, **config):
        """An autoencoder for pictures of the data set's size; 2 of the factor by folding pixels into channels."""
        factor = self.downsampling_factor
        if factor is None:
            most = 8 if self.vector_latents or min(dataset.resolution) >= 64 else 4
            factor = math.gcd(*dataset.resolution, most)
            if factor < 4 and not self.vector_latents:
                fitting = "x".join(str(-(-length // 4) * 4) for length in dataset.resolution)
                height, width = dataset.resolution
                raise ValueError(
                    f"downsampling_factor: pictures of {height}x{width} cannot be halved twice; give --resolution "
                    f"{fitting}, or another factor"
                )
        if dataset.value_range is not None and config.get("likelihood", "gaussian") != "gaussian":
            raise ValueError(f"likelihood: {config['likelihood']!r} is of pictures of 8 bits, and not measured values")
        if factor < 1 or factor & (factor - 1):
            raise ValueError(f"downsampling_factor: {factor} is not one of 1, 2, 4, 8, ...")
        patch_size = 2 if factor > 1 else 1
        num_levels = (factor // patch_size).bit_length()
        sides = [min(dataset.resolution) // patch_size // 2**level for level in range(num_levels)]
        widths = self.autoencoder_channels or [48 if side > 16 else 96 if side > 8 else 144 for side in sides]
        if len(widths) != num_levels:
            raise ValueError(
                f"autoencoder_channels: {len(widths)} widths for a downsampling_factor of {factor}, which takes "
                f"{num_levels}"
            )
        torch.manual_seed(seed)
        return kind(
            sample_size=tuple(dataset.resolution),
            in_channels=dataset.channels,
            latent_channels=self.latent_channels,
            block_out_channels=tuple(widths),
            norm_num_groups=_norm_num_groups(widths),
            patch_size=patch_size,
            vector_latents=self.vector_latents,
            **config,
        )


def _norm_num_groups(widths) -> int:
    """Groups of 16 channels, or a multiple of that, where the widths allow it: smaller ones take a CPU up to ten times
    as long."""
    base = math.gcd(*widths)
    return 1 if base % 16 else base // 16


@dataclasses.dataclass
class DiffusionArguments(NetworkArguments):
    """Which U-Net and which diffusion process. Each is a flag of the training examples."""

    beta_schedule: str = dataclasses.field(default="squaredcos_cap_v2", metadata={"help": "Noise schedule."})
    prediction_type: str = dataclasses.field(
        default="v_prediction", metadata={"help": "What the U-Net predicts: 'v_prediction', 'epsilon' or 'sample'."}
    )
    weighting: str = dataclasses.field(
        default="balanced", metadata={"help": "Weighting of the timesteps: 'simple', 'min_snr', 'balanced' or 'vlb'."}
    )
    learn_variance: bool = dataclasses.field(
        default=False, metadata={"help": "Learn the variance of the reverse process, by the hybrid loss."}
    )

    def make_unet(
        self,
        dataset: PictureDataset,
        num_classes: int | None = None,
        seed: int = 0,
        cross_attention_dim: int | None = None,
        conditioning_channels: int = 0,
    ) -> DenoisingUNet2DModel:
        if dataset.vae is not None and (self.learn_variance or self.weighting == "vlb"):
            raise ValueError(
                "vae: the variational bound, which --learn_variance and --weighting vlb minimise, is that of pictures "
                "of 8 bits and not of latents; leave these out"
            )
        torch.manual_seed(seed)
        return DenoisingUNet2DModel(
            **self.architecture(dataset, has_text=cross_attention_dim is not None),
            out_channels=dataset.channels * (2 if self.learn_variance else 1),
            num_classes=num_classes,
            cross_attention_dim=cross_attention_dim,
            conditioning_channels=conditioning_channels,
        )

    def make_scheduler(self) -> AncestralDDPMScheduler:
        """A process that reaches pure noise, sampled from there ("trailing")."""
        return AncestralDDPMScheduler(
            beta_schedule=self.beta_schedule,
            prediction_type=self.prediction_type,
            variance_type="learned_range" if self.learn_variance else "fixed_small",
            timestep_spacing="trailing",
        )

    def make_sampler(
        self, scheduler: AncestralDDPMScheduler, dataset: PictureDataset | LatentDataset
    ) -> SchedulerMixin:
        """
        What the checkpoint samples with: the reverse process in steps of second order, of which fewer are needed than
        of Algorithm 2; x̂_0 is clipped as it is there, but for latents, which have no limits. A learned variance is
        known to Algorithm 2 alone.

        These are steps of SDE-DPM-Solver++ 2M (Lu et al. 2022, https://arxiv.org/abs/2211.01095), even in t; but of
        [`FewStepDDPMScheduler`], which corrects a little less, for pictures of which more than half is plain black or
        white, such as handwriting: what was better for each kind in `benchmarks/README.md`.
        """
        in_pixels = dataset.vae is None
        if not in_pixels:
            scheduler = AncestralDDPMScheduler.from_config(scheduler.config, clip_sample=False)
        if self.learn_variance:
            return scheduler
        if not in_pixels:
            return DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="sde-dpmsolver++")
        some = to_model_range(dataset.__getitems__(range(0, len(dataset), math.ceil(len(dataset) / 256)))["images"])
        colors = some[:, :-1] if dataset.value_range is None and dataset.channels in (2, 4) else some  # without alpha
        black_or_white = ((colors == -1).all(dim=1) | (colors == 1).all(dim=1)).float().mean().item()
        # Dynamic thresholding held at 1 is clipping, by a key that all samplers of the family know.
        clipping = {"thresholding": True, "sample_max_value": 1.0}
        if black_or_white > 0.5:
            return FewStepDDPMScheduler.from_config(scheduler.config, **clipping)
        return DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="sde-dpmsolver++", **clipping)


@dataclasses.dataclass
class ModelArguments(DiffusionArguments):
    """The same for a model that may work in the latent space of an autoencoder."""

    vae: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Autoencoder in whose latent space the model works: the folder of its run, or the folder or id of "
            "one of diffusers."
        },
    )


def report_accuracy(classifier: NoisyImageClassifier, scheduler, held_out: PictureDataset, file: Path):
    """Prints how often a classifier is right about held-out pictures at each noise level, and draws the curve."""
    levels = accuracy_by_noise_level(classifier, scheduler, held_out)
    absent = _unseen(held_out)
    if absent:
        print(f"no picture of {_shortened(absent)} is held out: how well it is recognised is not known")
    print("   t   noise level σ   accuracy")
    for level in levels:
        print(f"{level['t']:4}{level['sigma']:16.3g}   {level['accuracy']}")
    try:
        draw_accuracy(levels, chance=1 / classifier.config.num_classes, file=file)
        print(f"{file} shows the curve")
    except (ImportError, OSError) as error:
        print(f"the curve could not be drawn: {error}")


def _value_range_of(checkpoint: str) -> dict | None:
    """The measured values that -1 and 1 stand for in the pictures of a checkpoint, if it is of such."""
    try:
        return DiffusionPipeline.load_config(checkpoint).get("value_range")
    except OSError:  # a component by itself
        return None


def _as_seen_by(pipeline, pictures: PictureDataset, mirrored: bool) -> PictureDataset | LatentDataset:
    """Pictures, or latents of them, as the U-Net of a pipeline was trained on."""
    if "unet" not in pipeline.components:
        raise ValueError("the model is an autoencoder and no diffusion model; give another")
    if pipeline.unet.config.conditioning_channels:
        raise ValueError("the model is an upsampler, which makes pictures of others; give another")
    value_range, channels = pipeline.config.value_range, pipeline.picture_shape[0]
    _check_kind("dataset: the model", value_range, pictures)
    if pictures.channels != channels:
        raise ValueError(f"dataset: the model was trained on {channels} channels, and these are {pictures.channels}")
    pictures.value_range = value_range
    if pipeline.vae is None:
        return pictures
    pipeline.vae.to(processes().device)
    return LatentDataset(pictures, pipeline.vae, mirrored)


def _check_kind(argument: str, value_range: dict | None, dataset: PictureDataset):
    if (value_range is None) != (dataset.value_range is None):
        kinds = ["measured values", "pictures of 8 bits"]
        raise ValueError(f"{argument} was trained on {kinds[value_range is None]}, and these are not")


def _unseen(dataset: PictureDataset) -> list[str]:
    """The classes of which there is no picture."""
    seen = set(dataset.labels.tolist())
    return [name for label, name in enumerate(dataset.label_names) if label not in seen]


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextlib.contextmanager
def one_line_errors(errors=(ValueError, OSError), status: int = 2):
    """
    Around a part of a script: one of `errors` ends it with one sentence and this status, and a Ctrl-C with status 130.
    By default they are those of mistaken arguments and data.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except errors as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(status)


def parse_arguments(*dataclass_types, argv: list[str] | None = None):
    """
    Flags, or a YAML file of them (`--config file.yaml`, flags go before it), as instances of dataclasses.

    Args:
        dataclass_types: The dataclasses whose fields are the flags.
        argv (`list[str]`, *optional*): The arguments; those of the command line by default.

    Raises:
        ValueError: If a flag or a setting of the file is unknown, or a value out of its range.
        SystemExit: If a value is not of its type (by argparse, status 2).
    """
    purpose = (sys.modules["__main__"].__doc__ or "").strip().split("\n\n")[0]
    parser = HfArgumentParser(
        dataclass_types, usage="%(prog)s [--FLAG VALUE ...]", description=purpose, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file of settings, by the names of the flags.")
    for action in parser._actions:
        if action.required:
            action.default = argparse.SUPPRESS  # which --help would show as None
    argv = sys.argv[1:] if argv is None else argv
    file = parser.parse_known_args(argv)[0].config
    namespace, unknown = parser.parse_known_args((_flags_of_file(file, parser) if file else []) + argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        raise ValueError(
            f"{unknown[0]}: no such flag; {f'did you mean {close[0]}?' if close else '--help lists them'}"
        )
    namespace = vars(namespace)
    return tuple(
        dataclass_type(**{field.name: namespace[field.name] for field in dataclasses.fields(dataclass_type)})
        for dataclass_type in dataclass_types
    )


def _flags_of_file(file: str, parser: HfArgumentParser) -> list[str]:
    """
    The settings of a YAML file, or of the `training_config.json` of a run, as the flags that say the same; the text as
    it stands, so that `no` stays "no".
    """
    try:
        settings = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a YAML file ({str(error).splitlines()[0]})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: holds no settings, which would be lines such as 'batch_size: 32'")
    for written_down in ("pictures", "weights", "asked"):  # for a run to know its data and its models again
        settings.pop(written_down, None)
    of_that_run = ("push_to_hub", "hub_model_id", "hub_private_repo")
    for part in [settings.pop(name) for name, value in list(settings.items()) if isinstance(value, dict)]:
        settings |= {key: value for key, value in part.items() if key not in of_that_run}
    known = {action.dest for action in parser._actions}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"{file}: {unknown[0]!r} is not a setting; `--help` lists them")
    flags = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{file}: {name!r} is neither a value nor a list of values")
        if value not in ("", "null", "~"):
            flags += [f"--{name}", *values]
    return flags
