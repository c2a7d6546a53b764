"""Unconditional generation."""

from collections.abc import Callable

import torch
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import PipelineImageInput

from .base import GenerationPipeline
from .requests import generates, number_of_images


class UnconditionalPipeline(GenerationPipeline):
    """
    Unconditional generation by Algorithm 2 of Ho et al. 2020 (https://arxiv.org/abs/2006.11239).

    Args:
        unet ([`DenoisingUNet2DModel`]): ε_θ(x_t, t), without labels.
        scheduler: [`AncestralDDPMScheduler`], or a scheduler of diffusers made by `from_config` from its config.
        vae (*optional*): An autoencoder with `decode(z).sample`; then the U-Net works on its latents.
        value_range (`dict`, *optional*): `{"low": [...], "high": [...]}`, for each channel the measured values that -1
            and 1 stand for. `None` for images of 8 bits.
        process (`dict`, *optional*): The keys of a scheduler's config that describe the noise and the prediction of
            the training; by default those of `scheduler`. Schedulers that differ from them are refused.
        defaults (`dict`, *optional*): `{"arguments": {"num_inference_steps": 50, ...}}`: numbers that `__call__` takes
            where an argument is left out, instead of those in its signature. `"chosen_on"` may say what chose them.
        consistent (`bool`, defaults to `False`): Whether the U-Net predicts, as a consistency model, the end of the
            trajectory of x_t, and not the mean of x_0.
        guiding_unet (*optional*): D_w of `autoguidance_scale`: an early version of the U-Net, or a smaller one.
    """

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        value_range: dict[str, list[float]] | None = None,
        process: dict | None = None,
        defaults: dict | None = None,
        consistent: bool = False,
        guiding_unet: ModelMixin | None = None,
    ):
        components = {"unet": unet, "scheduler": scheduler, "vae": vae, "guiding_unet": guiding_unet}
        super().__init__(components, value_range, process, defaults, consistent)
        if unet.config.num_classes is not None:
            raise ValueError(
                f"unet: it has {unet.config.num_classes} classes; use ClassifierFreeGuidedPipeline, which at "
                "guidance_scale=0 ignores them"
            )

    @generates
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (never written to)
        num_images_per_prompt: int = 1,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float | None = None,
        num_resample: int | None = None,
        autoguidance_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            batch_size (`int`, defaults to 1): Number of images n.
            num_inference_steps (`int`, defaults to 20): Steps of the scheduler.
            generator (`torch.Generator` or a list of n, *optional*): One per image. A single one is that of a single
                image; of several images it draws the seeds, so that an image depends on its seed alone.
            latents (`torch.Tensor` of shape `(n, in_channels, height, width)`, *optional*): x_T, instead of noise.
            output_type (`str`, defaults to `"pil"`): `"pil"`, with the first three of more than four channels; `"np"`,
                (n, height, width, channels) in [0, 1], or measured values in the units of the data; `"pt"`, the same
                as (n, channels, height, width); or `"latent"`, x_0 without decoding.
            return_dict (`bool`, defaults to `True`): `False` returns a plain tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)` after
                each step. It may return a dict whose `"latents"` replace x_t.
            callback_on_step_end_tensor_inputs (`list[str]`): The tensors it is given: `"latents"`, x_t, and
                `"pred_original_sample"`, the x̂_0 of the step, not clipped.
            num_images_per_prompt (`int`, defaults to 1): Another name of `batch_size`.
            image (*optional*): What to start from, as PIL, array or tensor, in [0, 1] or the units of the data: one
                image for all results, or one for each.
            mask_image (*optional*): A black and white mask, or one for each image: only what is white is drawn anew.
            strength (`float`, *optional*): Where in the noise to start, in (0, 1]: by default 0.6, and 1, in pure
                noise, with a mask.
            num_resample (`int`, *optional*): How often each step is taken, with a mask: by default once where a class
                or prompt is given, else 5 times where the sampler allows it.
            autoguidance_scale (`float`, defaults to 1.0): w, of a model with a `guiding_unet`. Predictions are then
                D_w + w (D − D_w), with D of the U-Net and D_w of the guiding one, which errs in the same way, and more
                (Karras et al. 2024, https://arxiv.org/abs/2406.02507). Unless it is 1, a step costs a pass of both.

        Returns:
            [`~diffusers.ImagePipelineOutput`] with `images`, or a tuple of them.

        Raises:
            ValueError: If an argument is out of its range or a shape does not fit the U-Net.
        """

        def predict(x_t, t, sigma):
            return self._denoise(x_t, t)

        scales = {"autoguidance_scale": autoguidance_scale}
        callback = (callback_on_step_end, callback_on_step_end_tensor_inputs, scales)
        given = len(image) if isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4 else 1
        n = number_of_images(batch_size, num_images_per_prompt)
        n = (given or 1) if n == 1 else n  # that there are none is said when they are read
        edit = (image, mask_image, strength, num_resample)
        return self._generate(
            predict, n, num_inference_steps, generator, latents, output_type, return_dict, callback, edit
        )
