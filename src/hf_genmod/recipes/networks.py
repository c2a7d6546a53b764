"""The arguments that choose a network, and its defaults."""

import dataclasses
import math

import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin

from hf_genmod.data.latents import LatentDataset
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.value_range import to_model_range
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel
from hf_genmod.models.image_autoencoder import ImageAutoencoder
from hf_genmod.models.noisy_classifier import NoisyImageClassifier
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler

# What a classifier records of the process whose noise it has seen.
NOISE_SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
)  # fmt: skip


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
            "one of diffusers.",
            "built_on": "autoencoder",
        },
    )
