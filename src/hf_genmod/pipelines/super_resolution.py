"""Super-resolution."""

from collections.abc import Callable
from numbers import Integral

import torch
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin

from ..models.conditioning import enlarge, noised_by, shrink
from .given_pictures import PictureReader
from .labels import ClassConditionalPipeline
from .requests import (
    check_guidance,
    check_positive,
    generates,
    is_within,
    one_generator_each,
    standard_normal,
)
from .samplers import check_process
from .tiles import blend_tiles


class SuperResolutionPipeline(ClassConditionalPipeline):
    r"""
    Super-resolution by a diffusion model conditioned on the low-resolution image y, enlarged and concatenated to x_t
    (Saharia et al. 2021, https://arxiv.org/abs/2104.07636), with conditioning augmentation: noise of a level s that
    the model is conditioned on (Ho et al. 2022, https://arxiv.org/abs/2106.15282, section 4.2):

        ε_θ(x_t, t, c, s),   c = U(√ᾱ_s y + √(1−ᾱ_s) ε′),   ε′ ~ N(0, I)

    where U is bicubic interpolation, and ᾱ_0 = 1. At s = 0 the result agrees with y; a larger s lets the model correct
    artifacts of y, such as those of a base model. The U-Net is convolutional, so images may have any size; for large
    ones the predictions of overlapping tiles are blended in every step (Bar-Tal et al. 2023,
    https://arxiv.org/abs/2302.08113).

    Args:
        unet ([`DenoisingUNet2DModel`]): ε_θ, with `conditioning_channels`.
        id2label (`dict[int, str]`, *optional*): The name of each label, for a U-Net with labels.
        factor (`int`, defaults to 2): The factor by which height and width grow.
        max_noise_level (`int`, defaults to 0): The largest s that the U-Net was trained with.
        scheduler, value_range, process, defaults, consistent, guiding_unet: As [`UnconditionalPipeline`] takes them.

    Raises:
        ValueError: If the U-Net takes no conditioning image.
    """

    _optional_components = ["guiding_unet"]
    _scales = ("guidance_scale",)
    _processor = PictureReader
    vae = None  # it works on pixels

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        factor: int = 2,
        max_noise_level: int = 0,
        value_range: dict[str, list[float]] | None = None,
        process: dict | None = None,
        defaults: dict | None = None,
        consistent: bool = False,
        guiding_unet: ModelMixin | None = None,
    ):
        components, config = (
            {"unet": unet, "scheduler": scheduler, "guiding_unet": guiding_unet},
            {"factor": factor, "max_noise_level": max_noise_level},
        )
        super().__init__(components, value_range, process, id2label, defaults, consistent, **config)
        if unet.config.conditioning_channels != unet.config.in_channels:
            raise ValueError(
                f"unet: its conditioning_channels are {unet.config.conditioning_channels}, and not the "
                f"{unet.config.in_channels} of its images"
            )
        if type(factor) is not int or factor not in (2, 4, 8):
            raise ValueError(f"factor: {factor!r} is not one of 2, 4, 8")
        T = scheduler.config.get("num_train_timesteps", 0)
        if type(max_noise_level) is not int or not 0 <= max_noise_level <= T:
            raise ValueError(f"max_noise_level: {max_noise_level!r} is not a whole number from 0 to {T}")

    @generates
    def __call__(
        self,
        image,
        class_labels: str | int | dict | list[str | int | dict] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        noise_level: int = 0,
        tile_size: int = 512,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (never written to)
        num_images_per_prompt: int = 1,
        autoguidance_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            image (`PIL.Image.Image`, a list of them, `np.ndarray` or `torch.Tensor`): Low-resolution images, all of
                one size; arrays are (n, height, width, channels) and tensors (n, channels, height, width), in
                [0, 1] or, of measured values, in the units of the data.
            class_labels (*optional*): The label of each image, as [`ClassifierFreeGuidedPipeline`] takes it, for a
                U-Net with labels; by default the null label.
            guidance_scale, guidance_interval: γ and where it applies, as [`ClassifierFreeGuidedPipeline`] takes them.
            noise_level (`int`, defaults to 0): s, in timesteps, from 0 to the `max_noise_level` of the model.
            tile_size (`int`, defaults to 512): Height and width of a tile, in pixels of the result; smaller tiles take
                less memory. Neighbouring tiles overlap by a quarter.
            num_inference_steps, generator, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs: As
                [`UnconditionalPipeline`] takes them.
            latents (`torch.Tensor` of shape `(n, channels, height, width)`, *optional*): x_T, of the size of the
                result, instead of noise.
            output_type: As [`UnconditionalPipeline`] takes it.
            num_images_per_prompt (`int`, defaults to 1): Results for each image, one after another.
            autoguidance_scale: As [`UnconditionalPipeline`] takes it.

        Raises:
            ValueError: If an image has other channels than the model, a label is unknown, an argument out of its
                range or too large for a finite result.
        """
        check_positive(num_images_per_prompt=num_images_per_prompt)
        small = self.preprocess(image, self.unet.config.in_channels).to(self._execution_device)
        small = small.repeat_interleave(num_images_per_prompt, dim=0)  # (n, C, h, w)
        n, channels, *size = small.shape
        larger = tuple(self.config.factor * length for length in size)
        if class_labels is not None and self.num_classes is None:
            raise ValueError("class_labels: given, but this model has no labels; leave them out")
        labels = None if class_labels is None else self._weighted_labels(class_labels, num_images_per_prompt)
        check_guidance(guidance_interval, guidance_scale=guidance_scale)
        self._check_enlargement(n, labels, guidance_scale, noise_level, tile_size)

        generators = one_generator_each(generator, n)
        if latents is None:
            latents = standard_normal((channels, *larger), generators)
        epsilon = standard_normal((channels, *size), generators).to(small.device)
        s = torch.full((n,), noise_level, device=small.device)
        seen = enlarge(noised_by(self.scheduler, small, epsilon, s), self.config.factor).to(self.unet.dtype)

        def predict(x_t, t, sigma):
            gamma = self._guidance_scale if is_within(sigma, guidance_interval) else 1.0

            def of_tile(x_t, seen):
                condition = {"conditioning_image": seen, "conditioning_timestep": s}
                if self.num_classes is None:
                    return self._denoise(x_t, t, **condition)
                strength = 0 if labels is None else gamma  # at 0 there is the null label alone
                return self._classifier_free_guidance(x_t, t, labels, strength, **condition)

            return blend_tiles(of_tile, (x_t, seen), tile_size, self.unet.size_factor)

        scales = {"guidance_scale": guidance_scale, "autoguidance_scale": autoguidance_scale}
        callback = (callback_on_step_end, callback_on_step_end_tensor_inputs, scales)
        return self._generate(
            predict, n, num_inference_steps, generators, latents, output_type, return_dict, callback, size=larger
        )

    @property
    def guidance_argument(self) -> str | None:
        return None if self.num_classes is None else "guidance_scale"

    def request_for(self, pictures, indices):
        small = self.postprocess(self._made_small(pictures, indices), "pt")
        return {"image": list(small)} | super().request_for(pictures, indices)

    def example_request(self):
        ramp = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).expand(-1, self.unet.config.in_channels, -1, -1)
        return {"image": self.postprocess(ramp, "pt")} | super().example_request()

    def unet_inputs(self, pictures, indices):
        enlarged = enlarge(self._made_small(pictures, indices), self.config.factor)
        return super().unet_inputs(pictures, indices) | {"conditioning_image": enlarged.to(self._execution_device)}

    def _made_small(self, pictures, indices) -> torch.Tensor:
        """Images of a data set at 1/factor of their size, (n, C, h, w) in [-1, 1]."""
        parts = torch.as_tensor(indices).split(256)
        return torch.cat([shrink(pictures.x_0(part.tolist()), self.config.factor) for part in parts])

    def _check_enlargement(self, n, labels, guidance_scale, noise_level, tile_size):
        if labels is None and guidance_scale != 1:
            raise ValueError(f"guidance_scale: {guidance_scale} is towards class_labels, and none are given")
        if labels is not None and labels.num_images != n:
            raise ValueError(f"class_labels: {labels.num_images} for {n} images; give one for each, or none")
        most = self.config.max_noise_level
        if isinstance(noise_level, bool) or not isinstance(noise_level, Integral) or not 0 <= noise_level <= most:
            raise ValueError(
                f"noise_level: {noise_level!r} is not a whole number from 0 to {most}, the highest of training"
            )
        check_positive(tile_size=tile_size)
        if tile_size < 4 * self.unet.size_factor:
            raise ValueError(f"tile_size: {tile_size} is less than {4 * self.unet.size_factor}, the least that blends")
        check_process(self.scheduler, self.config.process, self.is_consistent)
