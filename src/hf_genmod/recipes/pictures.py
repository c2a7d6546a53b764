"""The arguments that choose a data set."""

import dataclasses
import warnings

from diffusers import DiffusionPipeline

from hf_genmod.data.latents import LatentDataset, standardised
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.sources import splits_of
from hf_genmod.models.image_autoencoder import ImageAutoencoder
from hf_genmod.pipelines.base import GenerationPipeline
from hf_genmod.processes import processes
from hf_genmod.sharing.loading import load_vae


@dataclasses.dataclass
class DataArguments:
    """Images."""

    dataset: str = dataclasses.field(
        default="shapes",
        metadata={"help": "'shapes', a folder of pictures or class folders, a parquet data set, or an id on the Hub."},
    )
    split: str = dataclasses.field(default="train", metadata={"help": "Split of the data set."})
    validation_split: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Split of held-out pictures; by default 'validation' or 'test', where the data set has one (else "
            "a classifier holds out a tenth of the pictures).",
            "may_change": True,
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
        `require_captions`, as [`~hf_genmod.data.loading.load_pictures`] takes them.

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
