"""Reconstruction, interpolation and sampling with an autoencoder."""

import math
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from diffusers import ImagePipelineOutput, ModelMixin

from ..models.image_model import pair
from .checkpoint import ImagePipeline
from .given_pictures import PictureReader
from .pictures import in_enough_precision
from .requests import check_output_type, check_positive, number_of_images, one_generator_each, standard_normal


class AutoencoderPipeline(ImagePipeline):
    r"""
    An autoencoder, z = f(x) and x̂ = g(z) (Kingma & Welling 2014, https://arxiv.org/abs/1312.6114): reconstruction,
    interpolation, latent traversal, and new images decoded from a prior over z.

    Args:
        vae ([`VariationalAutoencoder`], [`Autoencoder`] or `AutoencoderKL` of diffusers): The encoder and decoder. A
            variational encoder gives the mean of q(z | x).
        value_range (`dict`, *optional*): As [`UnconditionalPipeline`] takes it.
    """

    model_cpu_offload_seq = "vae"
    _optional_components = []
    _processor = PictureReader

    def __init__(self, vae: ModelMixin, value_range: dict[str, list[float]] | None = None):
        super().__init__({"vae": vae}, value_range=value_range)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        prior: str = "standard",
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        num_images_per_prompt: int = 1,
    ) -> ImagePipelineOutput | tuple:
        """
        Decodes latents drawn from a prior.

        Args:
            batch_size (`int`, defaults to 1): Number of images n.
            prior (`str`, defaults to `"standard"`): `"standard"`, N(0, I), the prior of a variational autoencoder; or
                `"fitted"`, the Gaussian that the training script fits to the latents of the training images and saves
                with the weights, the only prior of a plain autoencoder.
            latents (`torch.Tensor` of shape `(n, c, h, w)`, *optional*): z, instead of drawing it.
            generator, output_type, return_dict, num_images_per_prompt: As [`UnconditionalPipeline`] takes them;
                `"latent"` gives z.

        Raises:
            ValueError: If an argument is out of its range, or the autoencoder has no such prior.
        """
        n = number_of_images(batch_size, num_images_per_prompt)
        if latents is None:
            latents = self._sample_prior(prior, one_generator_each(generator, n))
        are_floats = torch.is_tensor(latents) and latents.is_floating_point()
        if not are_floats or latents.ndim != 4 or n not in (1, len(latents)):
            given = tuple(latents.shape) if are_floats else torch.typename(latents)
            raise ValueError(f"latents: {given} is no tensor of floats ({n}, c, h, w)")
        return self._decoded(latents.to(self._execution_device), output_type, return_dict)

    @torch.no_grad()
    def reconstruct(self, images, output_type: str = "pil", return_dict: bool = True) -> ImagePipelineOutput | tuple:
        """
        x̂ = g(f(x)).

        Args:
            images (`PIL.Image.Image`, a list of them, `np.ndarray` or `torch.Tensor`): n images; arrays are
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
        `steps` images from image `a` to image `b`, both included, by spherical interpolation of their latents
        (Shoemake 1985): z_τ = (sin((1−τ) Ω) z_a + sin(τ Ω) z_b) / sin Ω, with Ω the angle between them.
        """
        check_positive(steps=steps)
        z_a, z_b = (self._encoded_one(image, name) for image, name in ((a, "a"), (b, "b")))  # (1, c, h, w)
        if z_a.shape != z_b.shape:
            raise ValueError(
                f"b: its latents are of shape {tuple(z_b.shape[1:])}, those of a {tuple(z_a.shape[1:])}; give two "
                "images of one size"
            )
        cosine = torch.cosine_similarity(z_a.flatten(), z_b.flatten(), dim=0)
        omega = torch.arccos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))  # at Ω = 0 the division would fail
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
        An image with one or two of its latents set to each of `values`: one row of images for one latent; for two a
        grid, row by row, in which the first latent is constant along a row and the second along a column (Kingma &
        Welling 2014, Figure 4).

        Args:
            image (`PIL.Image`, array or tensor): One image, as `reconstruct` takes it.
            dims (`int` or a tuple of one or two): The latents, as indices into the flattened (c, h, w).
            values (`list[float]`): The values; latents of a variational autoencoder mostly lie within ±3.
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

    @property
    def priors(self) -> list[str]:
        """The priors that latents can be drawn from."""
        standard = ["standard"] if getattr(self.vae, "has_standard_prior", False) else []
        return standard + ["fitted"] * (self.vae.config.get("prior_rank") is not None)

    def example_request(self):
        return {"prior": self.priors[0]} if self.priors else {}

    def _sample_prior(self, prior, generators):
        if prior not in ("standard", "fitted"):
            raise ValueError(f"prior: {prior!r} is not one of 'standard', 'fitted'")
        if prior == "fitted":
            if self.vae.config.get("prior_rank") is None:
                raise ValueError("prior: 'fitted', but this autoencoder has no fitted prior; use 'standard'")
            noise = standard_normal((self.vae.config.prior_rank,), generators)
            return self.vae.sample_prior(noise.to(self.vae.device, self.vae.dtype))
        if not getattr(self.vae, "has_standard_prior", False):
            raise ValueError(
                "prior: 'standard', but the latents of this autoencoder do not follow N(0, I), so samples would not "
                "be images; use prior='fitted' if it has one, or train a variational autoencoder"
            )
        return standard_normal(self.vae.latent_shape(*pair(self.vae.config.sample_size)), generators)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of its images."""
        return (self.vae.config.in_channels, *pair(self.vae.config.sample_size))

    def _encoded_one(self, image, name) -> torch.Tensor:
        z = self._encoded(image)
        if len(z) != 1:
            raise ValueError(f"{name}: {len(z)} images; give one")
        return z

    def _encoded(self, images) -> torch.Tensor:
        x = self.preprocess(images, self.vae.config.in_channels).to(self._execution_device)
        if not hasattr(self.vae, "check_size"):  # diffusers' would crop the image
            factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
            if any(length % factor for length in x.shape[2:]):
                height, width = x.shape[2:]
                raise ValueError(f"images: {height}x{width} pixels; this model needs both to be divisible by {factor}")

        def latents_of(x):
            output = self.vae.encode(x)
            return output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents

        return in_enough_precision(self.vae, latents_of, x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """The images of latents, (n, channels, height, width) in [-1, 1]."""
        return in_enough_precision(self.vae, lambda z: self.vae.decode(z).sample, z)

    def _decoded(self, z, output_type, return_dict):
        check_output_type(output_type)
        return self._finished(z, output_type, return_dict)
