"""The arguments that choose a data set."""

import dataclasses
import math
import sys
import warnings
from pathlib import Path

from diffusers import DiffusionPipeline
from transformers.hf_argparser import HfArg

from hf_genmod.checkpoints.safety import read_json
from hf_genmod.data.labelled_dataset import LabelledDataset
from hf_genmod.data.latents import LatentDataset, latents_of, refuse_shift, standardised
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.shard_files import find_shards
from hf_genmod.data.sources import find_splits, splits_of
from hf_genmod.data.stream import stream_pictures
from hf_genmod.errors import counted, shortened
from hf_genmod.models.image_autoencoder import ImageAutoencoder
from hf_genmod.pipelines.base import GenerationPipeline
from hf_genmod.processes import processes
from hf_genmod.sharing.loading import load_vae
from hf_genmod.training.config import changeable
from hf_genmod.training.run_folder import arguments_in


@dataclasses.dataclass
class DataArguments:
    """Images."""

    dataset: str = HfArg(
        default="shapes",
        help="'shapes', a folder or archive of images or of classes, a parquet data set, or an id on the Hub.",
    )
    split: str = HfArg(default="train", help="Split of the data set.")
    validation_split: str | None = changeable(
        None, help="Split of held-out images. Default: 'validation' or 'test', if the data set has one."
    )
    resolution: str | None = HfArg(default=None, help="Size, or HEIGHTxWIDTH. Default: that of the data set.")
    channels: int | None = HfArg(default=None, help="1 grey, 2 grey and alpha, 3 RGB, 4 RGBA. Default: as needed.")
    image_column: str | None = HfArg(default=None, help="Column of the images.")
    label_column: str | None = HfArg(default=None, help="Column of the class labels.")
    config_name: str | None = HfArg(default=None, help="Configuration of a data set that has several.")
    array_axes: str | None = HfArg(
        default=None, help="Axes of the arrays in .npy files, such as NHW or CHW. Default: by their shapes."
    )
    on_bad_image: str = changeable(
        "error", help="What to do about an unusable image: 'error' names it and stops, 'skip' leaves it out."
    )
    streaming: bool = changeable(
        False, help="Read the images, in parquet files or WebDatasets at a path or address, while the model trains."
    )

    cache_latents: bool = changeable(
        False, help="Encode the images of a stream once, into the cache folder of `datasets`, not in each step."
    )

    most_streamed = None  # how many images of a stream to take, into memory

    def load(
        self, vae: str | None = None, mirrored=False, num_held_out=256, hold_out=False, max_shift=0, **required: bool
    ) -> tuple[LabelledDataset, LabelledDataset | None]:
        """
        Loads the training images and the held-out images, if there are any, of a data set, or their latents.

        Args:
            vae (`str`, *optional*): Path or id of an autoencoder. The latents are standardised by the statistics of
                the training images, which are in the config of the `vae` of both results.
            mirrored (`bool`): Whether to encode mirrored images, too.
            num_held_out (`int`): The most held-out images to load, or 0.
            hold_out (`bool`): Whether to hold out a tenth of the training images if there is no validation split.
            max_shift (`int`): By how many pixels the training shifts images, which latents that are encoded once
                cannot be: they are refused before they are encoded.
            required (`bool`): `require_labels` or `require_captions`, as for
                [`~hf_genmod.data.loading.load_pictures`].
        """
        if vae is None:
            self._refuse_to_cache()
            return self._load_pixels(num_held_out, hold_out, **required)
        self._refuse_to_shift(max_shift)
        path, vae = vae, load_vae(vae).to(processes().device).eval()  # which asks the Hub for a few seconds at most
        value_range = _value_range_of(path)
        channels = vae.config.in_channels if value_range is None else None
        arguments = dataclasses.replace(self, channels=self.channels or channels)
        if isinstance(vae, ImageAutoencoder) and self.resolution is None:
            arguments.resolution = vae.config.sample_size
        training, held_out = arguments._load_pixels(num_held_out, hold_out, **required)
        _check_kind("vae: it", value_range, training)
        has_color = training.properties.has_color.any()
        if self.channels is None and training.channels < 3 and has_color:
            raise ValueError(
                f"vae: it is for grey images, and some of {training.name} are stored in colour; train an autoencoder "
                f"of colour images, or give --channels {training.channels} to turn them grey"
            )
        latents = standardised(vae, training.with_value_range(value_range), mirrored, self.cache_latents)
        held_out = held_out and LatentDataset(held_out.with_value_range(value_range), latents.vae, mirrored)
        return latents, held_out

    def training_pictures_for(
        self,
        pipeline: GenerationPipeline,
        mirrored=False,
        hold_out=False,
        max_shift=0,
        upsampler=False,
        **required: bool,
    ) -> tuple[LabelledDataset, LabelledDataset | None]:
        """Training images and, with `hold_out`, up to 1,000 held-out images as the U-Net of a pipeline sees them: at
        its resolution, or as latents; it may be an `upsampler` if that is asked for. The other arguments are those of
        [`~DataArguments.load`]."""
        if not pipeline.denoises:
            raise ValueError("the model is an autoencoder and no diffusion model; give another")
        if pipeline.is_consistent:
            raise ValueError("the model is tuned to few steps already; give the one that it was tuned from")
        if pipeline.unet.config.conditioning_channels and not upsampler:
            raise ValueError("the model is an upsampler, which makes images of others; give another")
        if pipeline.vae is None:
            self._refuse_to_cache()
            return self._load_pixels_for(pipeline, hold_out, **required)
        self._refuse_to_shift(max_shift)
        loaded = self._load_pixels_for(pipeline, hold_out, **required)
        pipeline.vae.to(processes().device)
        settings = pipeline.vae, mirrored, self.cache_latents
        return tuple(pictures and latents_of(pictures, *settings) for pictures in loaded)

    def evaluation_pictures(self, pipeline: GenerationPipeline) -> tuple[PictureDataset, PictureDataset]:
        """Training images and up to 1,000 held-out images at the resolution of a pipeline, to evaluate it. Without a
        validation split, a tenth is held out."""
        request = pipeline.example_request()
        required = {"require_labels": "class_labels" in request, "require_captions": "prompt" in request}
        return self._load_pixels_for(pipeline, hold_out=True, **required)

    def _load_pixels_for(self, pipeline: GenerationPipeline, hold_out: bool, **required: bool):
        """Images of the resolution, channels, value range and, where labels are required, the labels of a pipeline."""
        channels, height, width = pipeline.picture_shape
        if self.resolution is not None or self.channels is not None:
            raise ValueError(
                f"resolution: the model is for {height}x{width} images of {counted(channels, 'channel')}, which these "
                "images get too; leave out --resolution and --channels"
            )
        value_range, names = pipeline.config.value_range, list(pipeline.labels)
        size = {"resolution": f"{height}x{width}", "channels": channels if value_range is None else None}
        training, held_out = dataclasses.replace(self, **size)._load_pixels(1000 * hold_out, hold_out, **required)
        _check_kind("dataset: the model", value_range, training)
        if training.channels != channels:
            trained = f"the model was trained on images of {counted(channels, 'channel')}"
            raise ValueError(f"dataset: {trained}, and these have {training.channels}")
        if required.get("require_labels") and names and names != training.label_names:
            raise ValueError(
                f"dataset: the labels of the model are {shortened(names)}, and those of the images "
                f"{shortened(training.label_names)}; give images with the labels of the model"
            )
        return training.with_value_range(value_range), held_out and held_out.with_value_range(value_range)

    def _refuse_to_cache(self) -> None:
        if self.cache_latents:
            raise ValueError("cache_latents: there is no autoencoder to encode the images; leave it out, or give one")

    def _refuse_to_shift(self, max_shift: int) -> None:
        if self.cache_latents or not self.streaming:
            refuse_shift(max_shift)

    def _load_pixels(self, num_held_out: int, hold_out: bool, **required: bool):
        arguments = dataclasses.asdict(self) | required  # the fields are the parameters of load_pictures
        held_out_split = arguments.pop("validation_split")
        if arguments.pop("cache_latents") and not self.streaming:
            raise ValueError("cache_latents: only a stream is encoded in each step; leave it out, or give --streaming")
        load = stream_pictures if arguments.pop("streaming") else load_pictures
        if self.streaming:
            arguments |= {"dataset": find_shards(self.dataset, self.config_name), "limit": self.most_streamed}
        elif self.dataset != "shapes":  # find the files once
            arguments["dataset"] = find_splits(self.dataset, self.config_name, self.array_axes)
        training = load(**arguments)
        if required.get("require_labels") and training.classes_without_images:
            missing = f"there is no image of {shortened(training.classes_without_images)}"
            warnings.warn(f"{training.name}: {missing}, so the model cannot learn it", stacklevel=3)
        if not num_held_out:
            return training, None
        found = arguments["dataset"]
        splits = found.splits if self.streaming else splits_of(found, self.config_name, self.array_axes)
        splits = [split for split in splits if split != self.split]
        if held_out_split is not None and held_out_split not in splits:
            known = f"it has {', '.join(map(repr, splits)) or 'no other split'}"
            raise ValueError(
                f"validation_split: {self.dataset} has no {held_out_split!r} beside {self.split!r}; {known}"
            )
        if held_out_split is None:
            held_out_split = next((split for split in ("validation", "test") if split in splits), None)
        if held_out_split is not None:
            arguments |= {"split": held_out_split, "resolution": training.resolution, "channels": training.channels}
            if self.validation_split is None:
                arguments |= dict.fromkeys(required, False)
            held_out = load(**arguments | {"limit": num_held_out})
            if None not in (names := (held_out.label_names, training.label_names)) and names[0] != names[1]:
                differing = f"the classes of {held_out_split!r} are not those of {self.split!r}"
                raise ValueError(f"validation_split: {differing}; choose another")
            needed = [name.removeprefix("require_") for name, is_required in required.items() if is_required]
            absent = [name for name in needed if getattr(held_out, name) is None]
            if not absent:
                return training, held_out.with_value_range(training.value_range)
            warnings.warn(f"{held_out.name}: its images have no {absent[0]}, so they are not held out", stacklevel=3)
        return training, training.hold_out(min(-(-len(training) // 10), num_held_out)) if hold_out else None


@dataclasses.dataclass
class CaptionedDataArguments(DataArguments):
    """Images and captions."""

    caption_column: str | None = HfArg(
        default=None, help="Column, or key in a metadata.jsonl, of the captions. Default: text, caption or captions."
    )


@dataclasses.dataclass
class MeasuredDataArguments(CaptionedDataArguments):
    """Images and captions."""

    most_streamed = 10_000

    dataset: str | None = HfArg(
        default=None, help="As training takes it. Default: that of the model's run, with its flags."
    )

    def of_run(self, model: str) -> "MeasuredDataArguments":
        """These arguments. Without a `dataset` they become those of the run in the folder `model`, but for what is
        given here."""
        if self.dataset is not None:
            return self
        file, names = Path(model, "training_config.json"), [field.name for field in dataclasses.fields(self)]
        recorded = arguments_in(read_json(file)) if file.is_file() else {}
        if not recorded.get("dataset"):
            raise ValueError(f"dataset: {model} does not say on what it was trained; give --dataset")
        if processes().is_main_process:
            print(f"the data set of the run is {recorded['dataset']}", file=sys.stderr)
        for name in names:
            is_given = getattr(self, name) != getattr(type(self)(), name)
            if name in recorded and name not in ("resolution", "channels") and not is_given:  # these are of the model
                setattr(self, name, recorded[name])
        return self


def crop_size_for(resolution: tuple[int, int], factor: int, size_factor: int, crop_size: int | None) -> int | None:
    """The side of the crops that an upsampler by `factor` is trained on, a multiple of `factor` and of the
    `size_factor` of its U-Net; by default 64 for images that are larger."""
    multiple = math.lcm(factor, size_factor)
    if factor not in (2, 4, 8):
        raise ValueError(f"factor: {factor} is not one of 2, 4, 8")
    if any(length % factor for length in resolution):
        height, width = resolution
        fitting = f"{-(-height // multiple) * multiple}x{-(-width // multiple) * multiple}"
        raise ValueError(f"factor: {factor} does not divide {height}x{width}; give --resolution {fitting}")
    crop_size = crop_size or (-(-64 // multiple) * multiple if min(resolution) > 64 else None)
    if crop_size and (crop_size % multiple or crop_size > min(resolution)):
        raise ValueError(f"crop_size: {crop_size} is not a multiple of {multiple} up to {min(resolution)}")
    return crop_size


def _value_range_of(checkpoint: str) -> dict | None:
    """The value range of a checkpoint that was trained on measured values."""
    try:
        return DiffusionPipeline.load_config(checkpoint).get("value_range")
    except OSError:  # a component by itself
        return None


def _check_kind(argument: str, value_range: dict | None, pictures: PictureDataset):
    if (value_range is None) != (pictures.value_range is None):
        kind = "images of 8 bits" if value_range is None else "measured values"
        raise ValueError(f"{argument} was trained on {kind}, and these are not")
