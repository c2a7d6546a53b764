"""The arguments that choose a network and a diffusion process, and their defaults."""

import dataclasses
import math

from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from transformers.hf_argparser import HfArg

from hf_genmod.data.labelled_dataset import LabelledDataset
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel
from hf_genmod.models.image_autoencoder import ImageAutoencoder
from hf_genmod.models.initial_weights import SeededWeights
from hf_genmod.models.noisy_classifier import NoisyImageClassifier
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler

# The settings of a noise schedule, which a classifier of noisy images records.
NOISE_SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
)  # fmt: skip


@dataclasses.dataclass
class NetworkArguments:
    """Network."""

    patch_size: int | None = HfArg(
        default=None, help="Side of the pixel squares folded into channels. Default: 2 if the size is even, else 1."
    )
    block_out_channels: list[int] | None = HfArg(
        default=None, help="Channels per level. Default: the last of 48 96 144, one more each time the size halves."
    )
    layers_per_block: int = HfArg(default=1, help="Residual blocks per level.")
    attention_levels: list[int] | None = HfArg(
        default=None,
        help="Levels with self-attention, counted from 0. Default: the lowest level, or none if it has at most 2x2 "
        "positions; with text, the lowest level of more than one position.",
    )
    fourier_frequencies: list[float] | None = HfArg(
        default=None, help="Frequencies of sines and cosines of the input. Default: 2 and 8; for latents, none."
    )
    dropout: float = HfArg(default=0.0, help="Dropout in the residual blocks.")

    def architecture(self, channels: int, resolution: tuple[int, int], is_latent: bool, has_text=False) -> dict:
        """The config of a network for images or latents of one size. By default, pixels are folded 2x2 into channels
        if the size is even, and there are up to three levels, as many as the size can be halved."""
        patch_size, frequencies = self.patch_size, self.fourier_frequencies
        widths, attention_levels = self.block_out_channels, self.attention_levels
        if patch_size is None:
            patch_size = 1 if is_latent or any(length % 2 for length in resolution) else 2
        if patch_size < 1:
            raise ValueError(f"patch_size: {patch_size} is not positive")
        if frequencies is None:
            frequencies = () if is_latent else (2.0, 8.0)
        if widths is None:
            size = math.gcd(*resolution) // patch_size
            widths = (48, 96, 144)[-math.gcd(size, 4).bit_length() :]
        if attention_levels is None:
            sides = [max(resolution) // (patch_size * 2**level) for level in range(len(widths))]
            attention_levels = [max((level for level, side in enumerate(sides) if side > 1), default=0)]
            if sides[-1] <= 2 and not has_text:  # the kernels of convolutions cover all positions
                attention_levels = []
        unknown = [level for level in attention_levels if not 0 <= level < len(widths)]
        if unknown:
            raise ValueError(f"attention_levels: {unknown[0]} is not one of the levels 0 to {len(widths) - 1}")
        base = math.gcd(*widths)
        return {
            "sample_size": tuple(resolution),
            "in_channels": channels,
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
        self, pictures: LabelledDataset, scheduler: AncestralDDPMScheduler, seed: int = 0
    ) -> NoisyImageClassifier:
        """A classifier of the images of a data set with the noise of a scheduler."""
        architecture = self.architecture(pictures.channels, pictures.resolution, pictures.vae is not None)
        schedule = {key: value for key, value in scheduler.config.items() if key in NOISE_SCHEDULE}
        num_classes = len(pictures.label_names)
        with SeededWeights(seed):
            return NoisyImageClassifier(**architecture, num_classes=num_classes, noise_schedule=schedule)


@dataclasses.dataclass
class AutoencoderArguments:
    """Autoencoder."""

    latent_channels: int = HfArg(default=8, help="Channels of the latents. With --vector_latents, their length.")
    downsampling_factor: int | None = HfArg(
        default=None,
        help="Height of the images divided by that of the latents: 1, 2, 4, 8, ... Default: 4; 8 from 64 pixels on if "
        "that divides the size; with --vector_latents, the largest factor up to 8 that divides the size.",
    )
    vector_latents: bool = HfArg(default=False, help="Make the latent of an image a vector instead of a feature map.")
    autoencoder_channels: list[int] | None = HfArg(
        default=None, help="Channels of each level. Default: 48; 96 in feature maps up to 16 high, 144 up to 8."
    )

    def make_autoencoder(
        self, kind: type[ImageAutoencoder], pictures: PictureDataset, seed: int = 0, **config
    ) -> ImageAutoencoder:
        """An autoencoder for images of a data set's size. Folding pixels into channels gives 2 of its factor."""
        factor, resolution = self.downsampling_factor, pictures.resolution
        if factor is None:
            largest = 8 if self.vector_latents or min(resolution) >= 64 else 4
            factor = math.gcd(*resolution, largest)
            if factor < 4 and not self.vector_latents:
                height, width = resolution
                remedy = f"give --resolution {-(-height // 4) * 4}x{-(-width // 4) * 4}, or another factor"
                raise ValueError(f"downsampling_factor: images of {height}x{width} cannot be halved twice; {remedy}")
        if pictures.value_range is not None and config.get("likelihood", "gaussian") != "gaussian":
            raise ValueError(f"likelihood: {config['likelihood']!r} is for images of 8 bits, not for measured values")
        if pictures.channels > 1 and config.get("likelihood") == "bernoulli":
            kind = f"black and white or grey images, and these have {pictures.channels} channels"
            raise ValueError(f"likelihood: 'bernoulli' is for {kind}; choose another, or give --channels 1")
        if factor < 1 or factor & (factor - 1):
            raise ValueError(f"downsampling_factor: {factor} is not one of 1, 2, 4, 8, ...")
        patch_size = 2 if factor > 1 else 1
        num_levels = (factor // patch_size).bit_length()
        sides = [min(resolution) // patch_size // 2**level for level in range(num_levels)]
        widths = self.autoencoder_channels or [48 if side > 16 else 96 if side > 8 else 144 for side in sides]
        if len(widths) != num_levels:
            expected = f"a downsampling_factor of {factor}, which takes {num_levels}"
            raise ValueError(f"autoencoder_channels: {len(widths)} widths for {expected}")
        with SeededWeights(seed):
            return kind(
                sample_size=tuple(resolution),
                in_channels=pictures.channels,
                latent_channels=self.latent_channels,
                block_out_channels=tuple(widths),
                norm_num_groups=_norm_num_groups(widths),
                patch_size=patch_size,
                vector_latents=self.vector_latents,
                **config,
            )


def _norm_num_groups(widths) -> int:
    """Groups of 16 channels or a multiple of 16, if the widths allow it. Smaller groups are slow on a CPU."""
    base = math.gcd(*widths)
    return 1 if base % 16 else base // 16


@dataclasses.dataclass
class DiffusionArguments(NetworkArguments):
    """U-Net and diffusion process."""

    beta_schedule: str = HfArg(default="squaredcos_cap_v2", help="Noise schedule.")
    prediction_type: str = HfArg(default="v_prediction", help="U-Net output: 'v_prediction', 'epsilon' or 'sample'.")
    weighting: str = HfArg(default="balanced", help="Weight of timesteps: 'simple', 'min_snr', 'balanced' or 'vlb'.")
    learn_variance: bool = HfArg(default=False, help="Learn the variance of the reverse process by the hybrid loss.")

    def make_unet(
        self, pictures: LabelledDataset, num_classes: int | None = None, seed: int = 0, **conditioning
    ) -> DenoisingUNet2DModel:
        """The U-Net for a data set; the other arguments are those of [`~DiffusionArguments.make_unet_of_size`]."""
        of_data = pictures.channels, pictures.resolution, pictures.vae is not None
        return self.make_unet_of_size(*of_data, num_classes, seed, **conditioning)

    def make_unet_of_size(
        self,
        channels: int,
        resolution: tuple[int, int],
        is_latent: bool = False,
        num_classes: int | None = None,
        seed: int = 0,
        cross_attention_dim: int | None = None,
        conditioning_channels: int = 0,
    ) -> DenoisingUNet2DModel:
        """The U-Net for images, or latents, of one size."""
        if is_latent and (self.learn_variance or self.weighting == "vlb"):
            raise ValueError(
                "vae: --learn_variance and --weighting vlb minimise the variational bound of images of 8 bits, which "
                "latents do not have; leave these flags out"
            )
        with SeededWeights(seed):
            return DenoisingUNet2DModel(
                **self.architecture(channels, resolution, is_latent, has_text=cross_attention_dim is not None),
                out_channels=channels * (2 if self.learn_variance else 1),
                num_classes=num_classes,
                cross_attention_dim=cross_attention_dim,
                conditioning_channels=conditioning_channels,
            )

    def make_scheduler(self) -> AncestralDDPMScheduler:
        """The diffusion process. It ends at pure noise, where sampling starts ("trailing")."""
        return AncestralDDPMScheduler(
            beta_schedule=self.beta_schedule,
            prediction_type=self.prediction_type,
            variance_type="learned_range" if self.learn_variance else "fixed_small",
            timestep_spacing="trailing",
        )

    def make_sampler(self, scheduler: AncestralDDPMScheduler, pictures: LabelledDataset) -> SchedulerMixin:
        """The sampler that a checkpoint is saved with. SDE-DPM-Solver++ 2M (Lu et al. 2022,
        https://arxiv.org/abs/2211.01095) needs fewer steps than Algorithm 2. [`FewStepDDPMScheduler`] takes its place
        for images of which more than half is plain black or white, such as handwriting; `benchmarks/README.md`
        compares them. A learned variance needs Algorithm 2. Samplers of latents do not clip x̂_0."""
        if pictures.vae is not None:
            scheduler = AncestralDDPMScheduler.from_config(scheduler.config, clip_sample=False)
        if self.learn_variance:
            return scheduler
        if pictures.vae is not None:
            return DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="sde-dpmsolver++")
        pictures = pictures.sample
        some = pictures.x_0(range(0, len(pictures), math.ceil(len(pictures) / 256)))
        has_alpha = pictures.value_range is None and pictures.channels in (2, 4)
        colors = some[:, :-1] if has_alpha else some
        black_or_white = ((colors == -1).all(dim=1) | (colors == 1).all(dim=1)).float().mean().item()
        # Dynamic thresholding held at 1 is clipping, by a key that all samplers of the family know.
        clipping = {"thresholding": True, "sample_max_value": 1.0}
        if black_or_white > 0.5:
            return FewStepDDPMScheduler.from_config(scheduler.config, **clipping)
        return DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="sde-dpmsolver++", **clipping)


def sampler_with_classifier(sampler: SchedulerMixin) -> SchedulerMixin:
    """The sampler of a diffusion model in steps of first order, as guided steps of second order overshoot."""
    few_steps = isinstance(sampler, FewStepDDPMScheduler)
    kind = DPMSolverMultistepScheduler if few_steps else type(sampler)
    return kind.from_config(sampler.config, algorithm_type="sde-dpmsolver++", solver_order=1, use_lu_lambdas=few_steps)


@dataclasses.dataclass
class ModelArguments(DiffusionArguments):
    """U-Net and diffusion process, of images or latents."""

    vae: str | None = HfArg(
        default=None,
        help="Autoencoder whose latents the model generates: the folder of its run, or a folder or id of diffusers.",
        metadata={"built_on": "autoencoder"},
    )
