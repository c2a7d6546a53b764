"""Classifier guidance."""

import math
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import PipelineImageInput

from ..models.image_model import pair
from .labels import ClassConditionalPipeline
from .predictions import clipped, prediction_of, x_0_of
from .requests import check_guidance, generates, is_within, of_call
from .samplers import check_process

MOST_NOISE = 20.0  # the σ up to which a classifier guides unless told otherwise


class ClassifierGuidedPipeline(ClassConditionalPipeline):
    r"""
    Class-conditional generation by classifier guidance (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233): the
    gradient g = ∇_{x_t} log f_φ(y | x_t) of a classifier of noisy images guides a diffusion model. With s the
    `classifier_scale`,

        ε̂ = ε_θ(x_t, t) − s √(1−ᾱ_t) g           "noise": Algorithm 2 there, for any sampler
        x_{t-1} ~ N(μ + s Σ g, Σ)                "mean": Algorithm 1 there, for ancestral sampling

    In the noise form x̂_0 is clipped, where the scheduler clips, before it is guided. A U-Net with labels is
    conditioned on y as well (ADM-G), by classifier-free guidance.

    Args:
        unet ([`DenoisingUNet2DModel`]): ε_θ(x_t, t), or ε_θ(x_t, t, y) with the classes of the classifier.
        classifier ([`NoisyImageClassifier`]): log f_φ(y | x_t), trained on x_t of the same process. Its parameters
            are frozen.
        id2label (`dict[int, str]`, *optional*): The name of each label.
        scheduler, vae, value_range, process, defaults, consistent, guiding_unet: As [`UnconditionalPipeline`] takes
            them. A classifier of latents needs a `vae`. A consistency model is refused.

    Raises:
        ValueError: If the classifier does not fit the images, the noise schedule and the labels of the U-Net.
    """

    _scales = ("classifier_scale", "guidance_scale")
    guidance_argument = "classifier_scale"
    _classifier_scale = of_call("classifier_scale")
    classifier_scale = property(lambda self: self._classifier_scale, doc="s of the call of this thread.")
    _exclude_from_cpu_offload = ["classifier"]  # the backward pass needs its weights

    def __init__(
        self,
        unet: ModelMixin,
        classifier: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict | None = None,
        value_range: dict[str, list[float]] | None = None,
        process: dict | None = None,
        defaults: dict | None = None,
        consistent: bool = False,
        guiding_unet: ModelMixin | None = None,
    ):
        components = {"unet": unet, "classifier": classifier, "scheduler": scheduler, "vae": vae}
        components["guiding_unet"] = guiding_unet
        super().__init__(components, value_range, process, id2label, defaults, consistent)
        if self.is_consistent:
            reason = "it is tuned to few steps, and a classifier guides in many"
            raise ValueError(f"unet: {reason}; use the model that it was tuned from")
        classifier.requires_grad_(False)  # only the gradient in x_t is needed
        self._check_classifier()

    @property
    def num_classes(self) -> int:
        """The number of labels that can be asked for."""
        return self.classifier.config.num_classes

    @generates
    def __call__(
        self,
        class_labels: str | int | dict | list[str | int | dict] | torch.Tensor,
        classifier_scale: float = 2.0,
        guidance_form: str = "noise",
        guidance_interval: tuple[float, float] | None = None,
        guidance_scale: float = 1.0,
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
                guides toward one and away from the other: then log f_φ(y | x_t) is the weighted sum over them.
            classifier_scale (`float`, defaults to 2.0): s. At 0 the classifier does not run; a negative s guides away
                from the label.
            guidance_form (`str`, defaults to `"noise"`): `"noise"` or `"mean"`.
            guidance_interval (`(float, float)`, *optional*): (sigma_low, sigma_high): the noise levels
                σ = √((1−ᾱ_t)/ᾱ_t) in which s and γ apply; outside, s is 0 and γ is 1. By default γ applies everywhere
                and s where σ is at most 20: a classifier recognises nothing in more noise, and the noise form would
                multiply its errors by σ.
            guidance_scale (`float`, defaults to 1.0): γ of [`ClassifierFreeGuidedPipeline`], for a U-Net with labels.
            num_inference_steps, generator, latents, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs, num_images_per_prompt: As [`ClassifierFreeGuidedPipeline`] takes
                them. The callback may set `pipe._classifier_scale`, too.
            image, mask_image, strength, num_resample, autoguidance_scale: As [`UnconditionalPipeline`] takes them.

        Raises:
            ValueError: If a label is unknown, an argument out of its range or too large for a finite result, or the
                scheduler is not that of the classifier's process, or not Algorithm 2 with `guidance_form="mean"`.
        """
        labels = self._weighted_labels(class_labels, num_images_per_prompt)
        check_guidance(guidance_interval, classifier_scale=classifier_scale, guidance_scale=guidance_scale)
        self._check_classifier()
        has_labels = self.unet.config.num_classes is not None
        is_mean, prediction_type = guidance_form == "mean", self.scheduler.config.prediction_type
        if guidance_form not in ("noise", "mean"):
            raise ValueError(f"guidance_form: {guidance_form!r} is not one of 'noise', 'mean'")
        if is_mean and type(self.scheduler).__name__ != "AncestralDDPMScheduler":
            raise ValueError(
                f"guidance_form: 'mean' is for Algorithm 2, not for {type(self.scheduler).__name__}; use "
                "'noise', or set pipe.scheduler = AncestralDDPMScheduler.from_config(pipe.scheduler.config)"
            )
        if guidance_scale != 1 and not has_labels:
            raise ValueError(
                f"guidance_scale: {guidance_scale} is for a U-Net with labels, and this one has none; the strength of "
                "the classifier is classifier_scale"
            )

        scales = {"guidance_scale": guidance_scale, "classifier_scale": classifier_scale}
        scales["autoguidance_scale"] = autoguidance_scale
        interval = (0.0, MOST_NOISE) if guidance_interval is None else guidance_interval
        never_guides = classifier_scale == 0 and callback_on_step_end is None

        def guidance(x_t, t, sigma):
            """s g, zero outside of the interval."""
            if self._classifier_scale == 0 or sigma == math.inf or not is_within(sigma, interval):
                return torch.zeros_like(x_t)
            return self._classifier_scale * self._classifier_gradient(x_t, t, labels)

        def predict(x_t, t, sigma):
            if has_labels:
                gamma = self._guidance_scale if is_within(sigma, guidance_interval) else 1.0
                prediction = self._classifier_free_guidance(x_t, t, labels, gamma)
            else:
                prediction = self._denoise(x_t, t)
            if is_mean or never_guides or sigma == math.inf:
                return prediction
            # x̂_0 is clipped as the scheduler would clip it, and then guided.
            prediction, variance = prediction.tensor_split([x_t.shape[1]], dim=1)
            x_0 = clipped(self.scheduler, x_0_of(prediction_type, prediction, x_t, sigma))
            x_0 = x_0 + sigma**2 / math.hypot(1, sigma) * guidance(x_t, t, sigma)  # (1−ᾱ)/√ᾱ = σ²/√(1+σ²)
            return torch.cat([prediction_of(prediction_type, x_0, x_t, sigma), variance], dim=1)

        def shift(scheduler, x_t, t, sigma, prediction):
            _, predicted_variance = scheduler.split_model_output(prediction, x_t)
            log_variance = scheduler.reverse_log_variance(
                int(t), x_t, int(scheduler.previous_timestep(t)), predicted_variance
            )
            return log_variance.exp() * guidance(x_t, t, sigma)

        callback = (callback_on_step_end, callback_on_step_end_tensor_inputs, scales)
        form = {"shift": shift if is_mean else None, "clip": is_mean or never_guides}
        n, edit = labels.num_images, (image, mask_image, strength, num_resample)
        return self._generate(
            predict, n, num_inference_steps, generator, latents, output_type, return_dict, callback, edit, **form
        )

    def _classifier_gradient(self, x_t, t, labels):
        """∇_{x_t} Σ_k w_k log f_φ(k | x_t) for each image, of the shape and dtype of x_t."""
        with torch.inference_mode(False), torch.enable_grad():
            # Cloned, as tensors made in inference mode have no gradient.
            x_t, t = x_t.clone().requires_grad_(), t.clone()
            image, label, weight = (x.clone() for x in (labels.image, labels.label, labels.weight))
            logits = self.classifier(x_t.to(self.classifier.dtype), t).logits.to(x_t.dtype)
            log_probabilities = logits.log_softmax(dim=1)[image, label]
            return torch.autograd.grad((weight * log_probabilities).sum(), x_t)[0]

    def _check_classifier(self):
        def refuse(reason):
            raise ValueError(f"classifier: {reason}; train one for this model")

        unet, classifier, schedule = self.unet.config, self.classifier.config, self.classifier.config.noise_schedule
        for name in ("sample_size", "in_channels"):
            if pair(unet[name]) != pair(classifier[name]):
                refuse(f"its {name} is {classifier[name]} and that of the U-Net {unet[name]}")
        if unet.num_classes not in (None, classifier.num_classes):
            refuse(f"it has {classifier.num_classes} classes and the U-Net {unet.num_classes}")
        if schedule is None:
            refuse("its config has no noise_schedule, so the noise that it was trained on is not known")
        check_process(self.scheduler, self.config.process)
        seen, process = DDPMScheduler.from_config(schedule).alphas_cumprod.sqrt(), self.scheduler.alphas_cumprod.sqrt()
        # Some schedulers have no rescale_betas_zero_snr, so that their last √ᾱ is not 0.
        if len(seen) != len(process) or (seen - process.cpu()).abs().max() > 0.01:
            refuse("it was trained on the noise of another schedule than that of the scheduler")
