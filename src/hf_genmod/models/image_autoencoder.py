"""The autoencoder, and what it shares with the variational autoencoder.

Images x and feature maps are (n, channels, height, width); latents z are small feature maps (n, c, h, w), or vectors
(n, c, 1, 1).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .blocks import ResidualBlock
from .fast_convolutions import Upsample
from .image_model import ImageModel, pair

MAX_PRIOR_RANK = 256
KERNEL = {"kernel_size": 3, "padding": 1}


@dataclass
class ImageLatentsOutput(BaseOutput):
    """`latents`, (n, latent_channels, h, w): z."""

    latents: torch.Tensor


@dataclass
class AutoencoderOutput(BaseOutput):
    """
    `sample`, (n, in_channels, height, width): The reconstruction, or the decoded latents.
    `latents`, (n, latent_channels, h, w): z, if images were given.
    """

    sample: torch.Tensor
    latents: torch.Tensor | None = None


class ConvolutionalNetwork(nn.Module):
    """conv_out(silu(norm(layers(conv_in(x))))); each layer is a residual block or changes the size."""

    def __init__(self, conv_in: nn.Module, layers: list[nn.Module], groups: int, conv_out: nn.Conv2d):
        super().__init__()
        self.gradient_checkpointing = False
        self.conv_in = conv_in
        self.layers = nn.ModuleList(layers)
        self.norm_out = nn.GroupNorm(groups, conv_out.in_channels)
        self.conv_out = conv_out

    def forward(self, x):
        return self.conv_out(self.features(x))

    def features(self, x):
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        x = self.conv_in(x)
        for layer in self.layers:
            x = self._gradient_checkpointing_func(layer, x) if checkpointing else layer(x)
        return F.silu(self.norm_out(x))


class Encoder(ConvolutionalNetwork):
    """Maps images, with patches folded into channels, to z or the parameters of q(z | x)."""

    def __init__(self, config, out_channels: int, latent_kernel: dict):
        widths, groups = config.block_out_channels, config.norm_num_groups
        layers, channels = [], widths[0]
        for level, width in enumerate(widths):
            if level > 0:
                layers.append(nn.Conv2d(channels, channels, stride=2, **KERNEL))
            for _ in range(config.layers_per_block):
                layers.append(ResidualBlock(channels, width, groups, config.dropout, KERNEL))
                channels = width
        conv_in = nn.Conv2d(config.in_channels * config.patch_size**2, widths[0], **KERNEL)
        super().__init__(conv_in, layers, groups, nn.Conv2d(widths[-1], out_channels, **latent_kernel))


class Decoder(ConvolutionalNetwork):
    """Maps z to images, with patches folded into channels."""

    def __init__(self, config, latent_kernel: dict):
        widths, groups = config.block_out_channels, config.norm_num_groups
        layers, channels = [], widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.layers_per_block):
                layers.append(ResidualBlock(channels, width, groups, config.dropout, KERNEL))
                channels = width
            if level > 0:
                layers.append(Upsample(channels))
        convolution = nn.ConvTranspose2d if config.vector_latents else nn.Conv2d
        conv_in = convolution(config.latent_channels, widths[-1], **latent_kernel)
        conv_out = nn.Conv2d(channels, config.in_channels * config.patch_size**2, **KERNEL)
        super().__init__(conv_in, layers, groups, conv_out)


class ImageAutoencoder(ImageModel, AutoencoderMixin):
    """An encoder, a decoder, and a Gaussian prior that can be fitted to the latents of a data set."""

    _no_split_modules = ["ResidualBlock"]
    _group_offload_block_modules = ["encoder", "decoder"]
    has_standard_prior = True  # whether training makes the latents follow N(0, I)
    use_slicing = False  # see `enable_slicing`

    def _build(self, encoder_channels: int) -> None:
        config = self.config
        if config.latent_channels < 1:
            raise ValueError(f"latent_channels: {config.latent_channels} is not positive")
        self._check_config()
        size, latent_kernel = pair(config.sample_size), KERNEL
        if config.vector_latents:  # a convolution over the whole smallest feature map
            latent_kernel = {"kernel_size": tuple(side // self.size_factor for side in size)}
        self.encoder = Encoder(config, encoder_channels, latent_kernel)
        self.decoder = Decoder(config, latent_kernel)
        if config.prior_rank is not None:
            d = math.prod(self.latent_shape(*size))
            self.register_buffer("prior_mean", torch.zeros(d))
            self.register_buffer("prior_directions", torch.zeros(config.prior_rank, d))

    @property
    def downsampling_factor(self) -> int:
        """The height of an image divided by that of its smallest feature map, which is z unless z is a vector."""
        return self.size_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(c, h, w) of z for images of this height and width; raises `ValueError` as `check_size` does."""
        self.check_size((height, width))
        size = (1, 1) if self.config.vector_latents else (height // self.size_factor, width // self.size_factor)
        return (self.config.latent_channels, *size)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises `ValueError` if the network cannot fold and halve images of `size` = (height, width), or the latents
        are vectors and `size` is not `sample_size`."""
        super().check_size(size)
        height, width = pair(self.config.sample_size)
        if self.config.vector_latents and tuple(size) != (height, width):
            raise ValueError(
                f"resolution {size[0]}x{size[1]}: this network makes vectors (vector_latents) of images of "
                f"{height}x{width} alone; resize them to that"
            )

    def fit_prior(self, latents: torch.Tensor) -> None:
        r"""
        Fits N(μ, Σ) to latents as a prior to sample from; it is saved with the weights.

        `prior_mean` (d,) is μ, with d = c · h · w. `prior_directions` (k, d) are the k = min(d, n − 1, 256) principal
        directions of Σ with the largest variance, each multiplied by its standard deviation.

        Args:
            latents (`torch.Tensor` of shape `(n, c, h, w)`): Latents of n ≥ 2 images of the config's `sample_size`.

        Raises:
            ValueError: If there are fewer than two latents, or they have another shape.
        """
        shape = self.latent_shape(*pair(self.config.sample_size))
        if latents.shape[1:] != shape or len(latents) < 2:
            raise ValueError(
                f"latents: shape {tuple(latents.shape)} is not (n, {', '.join(map(str, shape))}) with n of two or more"
            )
        z = latents.detach().cpu().double().flatten(1)
        (n, d), mean = z.shape, z.mean(dim=0)
        k = min(d, n - 1, MAX_PRIOR_RANK)
        root = (z - mean) / math.sqrt(n - 1)  # Σ = rootᵀ root
        if n > d:
            root = torch.linalg.qr(root, mode="r").R  # (d, d), of the same Σ
        # root = U S V, so that S V, the directions, is Uᵀ root.
        U = torch.linalg.eigh(root @ root.T).eigenvectors.flip(1)  # the largest first
        directions = U[:, :k].T @ root
        self.register_buffer("prior_mean", mean.to(self.device, self.dtype))
        self.register_buffer("prior_directions", directions.to(self.device, self.dtype).contiguous())
        self.register_to_config(prior_rank=k)

    def sample_prior(self, epsilon: torch.Tensor) -> torch.Tensor:
        """
        z = μ + ε · directions, (n, c, h, w), a sample of the fitted prior for ε ~ N(0, I), (n, prior_rank).

        Raises:
            ValueError: If no prior has been fitted, or ε has another shape.
        """
        rank = self.config.prior_rank
        if rank is None:
            raise ValueError("prior_rank: None, no prior has been fitted to this autoencoder; call fit_prior first")
        if epsilon.ndim != 2 or epsilon.shape[1] != rank:
            raise ValueError(f"epsilon: shape {tuple(epsilon.shape)} is not (n, {rank}), n times prior_rank")
        z = self.prior_mean + epsilon @ self.prior_directions  # (n, d)
        return z.unflatten(1, self.latent_shape(*pair(self.config.sample_size)))

    @apply_forward_hook
    def features(self, x: torch.Tensor) -> torch.Tensor:
        """The feature maps (n, block_out_channels[-1], height / factor, width / factor) of images x, (n, in_channels,
        height, width). One more convolution maps them to z."""
        return self.encoder.features(self._folded(x))

    def _encode(self, x):
        # Under autocast the network computes in half precision, too coarse for a reparameterised sample.
        return self._by_slices(lambda x: self.encoder(self._folded(x)).to(x.dtype), x)

    def _folded(self, x):
        self._check_images(x)
        return F.pixel_unshuffle(x, self.config.patch_size)

    def _decode(self, z):
        config = self.config
        if z.ndim != 4 or z.shape[1] != config.latent_channels or (config.vector_latents and z.shape[2:] != (1, 1)):
            expected = f"(n, {config.latent_channels}, {'1, 1' if config.vector_latents else 'h, w'})"
            raise ValueError(f"z: shape {tuple(z.shape)} is not {expected}, the latents of this network")
        return self._by_slices(lambda z: F.pixel_shuffle(self.decoder(z), config.patch_size), z)

    def _by_slices(self, compute, x):
        """`compute(x)`, after `enable_slicing` of one image after the other."""
        return torch.cat([compute(one) for one in x.split(1)]) if self.use_slicing else compute(x)


class Autoencoder(ImageAutoencoder):
    r"""
    An autoencoder of residual blocks: z = f(x), x̂ = g(z) (Hinton & Salakhutdinov 2006,
    https://doi.org/10.1126/science.1127647).

    Args:
        sample_size (`int` or `(int, int)`, defaults to 32): Size or (height, width) of the images of training.
        in_channels (`int`, defaults to 3): Channels of x.
        latent_channels (`int`, defaults to 4): Channels of z, or with `vector_latents` its length.
        block_out_channels (`tuple[int]`, defaults to `(64, 128, 128)`): Width of each level; each level below the
            first has half the height and width of the one above.
        layers_per_block (`int`, defaults to 1): Residual blocks per level of the encoder and of the decoder.
        norm_num_groups (`int`, defaults to 32): Groups of the normalisations; divides every width.
        patch_size (`int`, defaults to 1): Squares of `patch_size` pixels are folded into channels before the first
            convolution and unfolded after the last.
        vector_latents (`bool`, defaults to `False`): The encoder ends in a convolution over the whole of its smallest
            feature map, and the decoder begins with its transpose, so that z is a vector, (n, latent_channels, 1, 1).
            Images must then have the size `sample_size`.
        dropout (`float`, defaults to 0.0): Dropout probability in the residual blocks.
        scaling_factor, shift_factor (`float`, defaults to 1.0 and 0.0): A diffusion model in the latent space
            models (z − shift_factor) · scaling_factor; encoder and decoder do not apply these factors.
        prior_rank (`int`, *optional*): Rank of the Gaussian fitted to the latents; set by `fit_prior`.

    Raises:
        ValueError: If the widths, the levels and the size of the images do not fit together.
    """

    has_standard_prior = False

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (64, 128, 128),
        layers_per_block: int = 1,
        norm_num_groups: int = 32,
        patch_size: int = 1,
        vector_latents: bool = False,
        dropout: float = 0.0,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        prior_rank: int | None = None,
    ):
        super().__init__()
        self._build(encoder_channels=latent_channels)

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> ImageLatentsOutput | tuple[torch.Tensor]:
        """z = f(x), (n, latent_channels, h, w), of images x, (n, in_channels, height, width), as `.latents`."""
        z = self._encode(x)
        return ImageLatentsOutput(latents=z) if return_dict else (z,)

    @apply_forward_hook
    def decode(self, z: torch.Tensor, return_dict: bool = True) -> AutoencoderOutput | tuple[torch.Tensor]:
        """x̂ = g(z), (n, in_channels, height, width), of latents z, (n, latent_channels, h, w), as `.sample`."""
        sample = self._decode(z)
        return AutoencoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> AutoencoderOutput | tuple[torch.Tensor, ...]:
        """g(f(x)) and f(x) of images x, `sample`, (n, in_channels, height, width), in [-1, 1]."""
        z = self._encode(sample)
        output = AutoencoderOutput(sample=self._decode(z), latents=z)
        return output if return_dict else output.to_tuple()
