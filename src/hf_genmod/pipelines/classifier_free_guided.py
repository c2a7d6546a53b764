"""Classifier-free guidance."""

from collections.abc import Callable

import torch
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import PipelineImageInput

from .labels import ClassConditionalPipeline
from .requests import check_guidance, generates, is_within


class ClassifierFreeGuidedPipeline(ClassConditionalPipeline):
    """
    Class-conditional generation by classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598):

        ε̃ = ε_∅ + γ (ε_y − ε_∅),    ε_y = ε_θ(x_t, t, y),  ε_∅ = ε_θ(x_t, t, null label)

    with γ the `guidance_scale`: 1 is the conditional model, 0 the unconditional one, and the paper's w is γ − 1. The
    combination is the same for predictions of x_0 and v, which are affine in ε at fixed x_t. For several labels with
    weights, the differences are added (Liu et al. 2022, https://arxiv.org/abs/2206.01714):

        ε̃ = ε_∅ + γ Σ_k w_k (ε_k − ε_∅)

    Args:
        unet ([`DenoisingUNet2DModel`]): ε_θ(x_t, t, y), with `num_classes`.
        id2label (`dict[int, str]`, *optional*): The name of each label.
        scheduler, vae, value_range, process, defaults, consistent, guiding_unet: As [`UnconditionalPipeline`] takes
            them.
    """

    _scales = ("guidance_scale",)

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict | None = None,
        value_range: dict[str, list[float]] | None = None,
        process: dict | None = None,
        defaults: dict | None = None,
        consistent: bool = False,
        guiding_unet: ModelMixin | None = None,
    ):
        components = {"unet": unet, "scheduler": scheduler, "vae": vae, "guiding_unet": guiding_unet}
        super().__init__(components, value_range, process, id2label, defaults, consistent)
        if unet.config.num_classes is None:
            raise ValueError("unet: it was made without num_classes; use UnconditionalPipeline")

    @generates
    def __call__(
        self,
        class_labels: str | int | dict | list[str | int | dict] | torch.Tensor,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] | None = None,
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
            class_labels (`str`, `int`, `dict`, a list of them, or a `torch.Tensor` of shape `(n,)` or `(n, 1)`): The
                label of each image, by name or number; or weights of several labels: `{"cat": 1.0, "dog": -0.5}`
                guides toward one and away from the other.
            guidance_scale (`float`, defaults to 2.0): γ. A step costs one forward pass at 0 and 1, else a pass of
                twice the batch, or more where images have several labels.
            guidance_interval (`(float, float)`, *optional*): (sigma_low, sigma_high): the noise levels
                σ = √((1−ᾱ_t)/ᾱ_t) in which γ applies; outside, γ is 1 (Kynkäänniemi et al. 2024,
                https://arxiv.org/abs/2404.07724).
            num_inference_steps, generator, latents, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs, image, mask_image, strength, num_resample,
                autoguidance_scale: As [`UnconditionalPipeline`] takes them. The callback may set
                `pipe._guidance_scale` for the next steps.
            num_images_per_prompt (`int`, defaults to 1): Images of each label, one after another.

        Raises:
            ValueError: If a label is unknown, an argument out of its range or too large for a finite result, or a
                shape does not fit the U-Net.
        """
        labels = self._weighted_labels(class_labels, num_images_per_prompt)
        check_guidance(guidance_interval, guidance_scale=guidance_scale)

        def predict(x_t, t, sigma):
            gamma = self._guidance_scale if is_within(sigma, guidance_interval) else 1.0
            return self._classifier_free_guidance(x_t, t, labels, gamma)

        scales = {"guidance_scale": guidance_scale, "autoguidance_scale": autoguidance_scale}
        callback = (callback_on_step_end, callback_on_step_end_tensor_inputs, scales)
        n, edit = labels.num_images, (image, mask_image, strength, num_resample)
        return self._generate(
            predict, n, num_inference_steps, generator, latents, output_type, return_dict, callback, edit
        )

    def add_class(self, name: str, embedding: torch.Tensor | None = None, adapter_name: str | None = None) -> int:
        """
        Adds a class, on which an adapter is to be trained, after the others, and returns its label.

        Args:
            name (`str`): Its name. A name that is taken is a `ValueError`.
            embedding (`torch.Tensor` of shape `(d,)`, *optional*): Its row of the class-embedding table; by default
                the mean of the other rows.
            adapter_name (`str`, *optional*): The adapter that the class is saved with and removed with.
        """
        labels = self._known_labels()
        if name in labels:
            raise ValueError(f"name: {name!r} is a class of this model already; choose another")
        label = self.unet.add_label(embedding)
        self.register_to_config(id2label={index: name for name, index in (labels | {name: label}).items()})
        if adapter_name is not None:
            self._brought.setdefault(adapter_name, []).append(name)
        return label

    def _add_classes_of(self, path, adapter_name, names, rows):
        if known := [name for name in names if name in self._known_labels()]:
            raise ValueError(f"{path}: this model has a class {known[0]!r} already, and the adapter brings another")
        if len(names) != len(rows) or rows.shape[1:] != self.unet.class_embedding.weight.shape[1:]:
            raise ValueError(f"{path}: the embeddings of its classes are not those of {len(names)} of this model")
        for name, row in zip(names, rows, strict=True):
            self.add_class(name, row, adapter_name)

    def _known_labels(self) -> dict[str, int]:
        """`labels`, with their numbers as names where they have none."""
        return self.labels or {str(label): label for label in range(self.num_classes)}
