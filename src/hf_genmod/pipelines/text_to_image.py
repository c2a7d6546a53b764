"""Text-to-image generation."""

import threading
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import PipelineImageInput

from ..models.conditioning import tokenize
from .base import GenerationPipeline
from .requests import check_guidance, check_positive, generates, is_within, of_call

_TOKENIZING = threading.Lock()  # the fast tokenizers of transformers fail if several threads use one at once


class TextToImagePipeline(GenerationPipeline):
    """
    Text-to-image generation: the U-Net attends to the tokens of a text encoder (Rombach et al. 2022,
    https://arxiv.org/abs/2112.10752, section 3.3), with classifier-free guidance (Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598):

        ε̃ = ε_∅ + γ (ε_y − ε_∅),    ε_y = ε_θ(x_t, t, prompt),  ε_∅ = ε_θ(x_t, t, "" or the negative prompt)

    with γ the `guidance_scale`. Padding is masked, so that an image does not depend on the other prompts of the batch.

    Args:
        unet ([`DenoisingUNet2DModel`]): ε_θ(x_t, t, y), with `cross_attention_dim`.
        text_encoder (`transformers.PreTrainedModel`): A text encoder with hidden states of that width:
            `CLIPTextModel`, `T5EncoderModel`, ...
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        scheduler, vae, value_range, process, defaults, consistent, guiding_unet: As [`UnconditionalPipeline`] takes
            them.

    Raises:
        ValueError: If the U-Net takes no text, or text of another width, or the tokenizer cannot pad.
    """

    _scales = ("guidance_scale",)
    guidance_argument = "guidance_scale"
    _guidance_rescale = of_call("guidance_rescale")
    guidance_rescale = property(lambda self: self._guidance_rescale, doc="φ of the call of this thread.")

    def __init__(
        self,
        unet: ModelMixin,
        text_encoder: torch.nn.Module,
        tokenizer: Callable,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        value_range: dict[str, list[float]] | None = None,
        process: dict | None = None,
        defaults: dict | None = None,
        consistent: bool = False,
        guiding_unet: ModelMixin | None = None,
    ):
        components = {"unet": unet, "scheduler": scheduler, "vae": vae, "guiding_unet": guiding_unet}
        components |= {"text_encoder": text_encoder, "tokenizer": tokenizer}
        super().__init__(components, value_range, process, defaults, consistent)
        width = unet.config.cross_attention_dim
        if width is None:
            raise ValueError("unet: it was made without cross_attention_dim, so that it takes no text")
        if width != text_encoder.config.hidden_size:
            raise ValueError(
                f"text_encoder: its hidden states have a width of {text_encoder.config.hidden_size}, and the U-Net's "
                f"cross_attention_dim is {width}; use the one it was trained with"
            )
        if tokenizer.pad_token is None:
            raise ValueError("tokenizer: it has no padding token; set tokenizer.pad_token")

    @generates
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        guidance_scale: float = 3.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (never written to)
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float | None = None,
        num_resample: int | None = None,
        autoguidance_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            prompt (`str` or `list[str]`, *optional*): The text of each image. A prompt with more tokens than the text
                encoder takes is truncated, with a warning.
            negative_prompt (`str` or `list[str]`, *optional*): The text to guide away from; by default "".
            guidance_scale (`float`, defaults to 3.0): γ. A step costs one forward pass at 0 and 1, else a pass of
                twice the batch.
            guidance_interval (`(float, float)`, *optional*): As [`ClassifierFreeGuidedPipeline`] takes it.
            guidance_rescale (`float`, defaults to 0.0): φ in [0, 1], which brings ε̃ toward the standard deviation of
                ε_y: φ ε̃ std(ε_y) / std(ε̃) + (1 − φ) ε̃ (Lin et al. 2023, https://arxiv.org/abs/2305.08891,
                Eq. 15 and 16).
            num_images_per_prompt (`int`, defaults to 1): Images of each prompt, one after another.
            num_inference_steps, generator, latents: As [`UnconditionalPipeline`] takes them, with n the number of
                prompts times `num_images_per_prompt`.
            prompt_embeds (`torch.Tensor` of shape `(prompts, tokens, cross_attention_dim)`, *optional*): The result of
                `encode_prompt`, instead of a prompt.
            prompt_attention_mask (`torch.Tensor` of shape `(prompts, tokens)`, *optional*): 0 for padding; by default
                1 everywhere.
            negative_prompt_embeds, negative_prompt_attention_mask (`torch.Tensor`, *optional*): The same for the
                negative prompt.
            output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs: As
                [`UnconditionalPipeline`] takes them. The callback may set `pipe._guidance_scale` and
                `pipe._guidance_rescale` for the next steps.
            image, mask_image, strength, num_resample, autoguidance_scale: As [`UnconditionalPipeline`] takes them.

        Raises:
            ValueError: If there is no prompt or more than one kind, an argument is out of its range or too large for
                a finite result, or a shape does not fit.
        """
        check_guidance(guidance_interval, guidance_scale=guidance_scale, guidance_rescale=guidance_rescale)
        check_positive(num_images_per_prompt=num_images_per_prompt)
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale: {guidance_rescale} is not between 0 and 1")
        positive = self._condition("prompt", prompt, prompt_embeds, prompt_attention_mask)
        if negative_prompt is None and negative_prompt_embeds is None:
            negative_prompt = ""
        negative = self._condition(
            "negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask
        )
        count = len(positive[0])
        if len(negative[0]) not in (1, count):
            raise ValueError(f"negative_prompt: {len(negative[0])} for {count} prompts; give one, or one for each")
        negative = tuple(x.expand(count, *x.shape[1:]) for x in negative)
        tokens, mask = (
            torch.cat(parts).repeat_interleave(num_images_per_prompt, dim=0)
            for parts in zip(*_padded_alike(negative, positive), strict=True)
        )  # (2n, tokens, d) and (2n, tokens), of ∅ and then of y

        scales = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale}
        scales["autoguidance_scale"] = autoguidance_scale

        def predict(x_t, t, sigma):
            gamma = self._guidance_scale if is_within(sigma, guidance_interval) else 1.0
            return self._guided_by_text(x_t, t, tokens, mask, gamma, self._guidance_rescale)

        callback = (callback_on_step_end, callback_on_step_end_tensor_inputs, scales)
        n, edit = count * num_images_per_prompt, (image, mask_image, strength, num_resample)
        return self._generate(
            predict, n, num_inference_steps, generator, latents, output_type, return_dict, callback, edit
        )

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states, (n, tokens, cross_attention_dim), and the attention mask, (n, tokens), of n prompts. A
        prompt with more tokens than the text encoder takes is truncated, with a warning."""
        is_one = isinstance(prompt, (str, dict)) or not isinstance(prompt, Iterable)
        prompts = [prompt] if is_one else list(prompt)
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"prompt: {prompt!r} is neither a string nor a list of one or more")
        with _TOKENIZING:
            tokens = tokenize(prompts, self.tokenizer, self.text_encoder)
        tokens = {name: ids.to(self._execution_device) for name, ids in tokens.items()}
        return self.text_encoder(**tokens).last_hidden_state, tokens["attention_mask"]

    def request_for(self, pictures, indices):
        captions = [pictures.captions[i] for i in indices]
        return {"prompt": [caption if isinstance(caption, str) else caption[0] for caption in captions]}

    def example_request(self):
        return {"prompt": "an image"}

    def unet_inputs(self, pictures, indices):
        tokens, mask = self.encode_prompt(self.request_for(pictures, indices)["prompt"])
        return {"encoder_hidden_states": tokens, "encoder_attention_mask": mask}

    def _condition(self, name, prompt, embeds, mask) -> tuple[torch.Tensor, torch.Tensor]:
        if (prompt is None) == (embeds is None):
            raise ValueError(f"{name}: give either it or {name}_embeds{', not both' if prompt is not None else ''}")
        if embeds is None:
            if mask is not None:
                raise ValueError(f"{name}_attention_mask: it belongs to {name}_embeds, and none are given")
            embeds, mask = self.encode_prompt(prompt)
        width = self.unet.config.cross_attention_dim
        for part, given in ((f"{name}_embeds", embeds), (f"{name}_attention_mask", mask)):
            if not isinstance(given, torch.Tensor | None):
                raise ValueError(f"{part}: {type(given).__name__} is no torch.Tensor; give what encode_prompt returns")
        if embeds.ndim != 3 or embeds.shape[2] != width or 0 in embeds.shape:
            raise ValueError(f"{name}_embeds: shape {tuple(embeds.shape)} is not (prompts, tokens, {width})")
        mask = torch.ones(embeds.shape[:2]) if mask is None else mask
        if mask.shape != embeds.shape[:2] or not mask.any(dim=1).all():
            raise ValueError(
                f"{name}_attention_mask: shape {tuple(mask.shape)} is not {tuple(embeds.shape[:2])}, that of the "
                "tokens, or none of the tokens of a prompt counts"
            )
        device = self._execution_device
        return embeds.to(device, self.unet.dtype), mask.to(device).bool()

    def _guided_by_text(self, x_t, t, tokens, mask, gamma, phi):
        n, channels = x_t.shape[:2]
        if gamma in (0, 1):
            half = slice(n) if gamma == 0 else slice(n, None)
            return self._denoise(x_t, t, encoder_hidden_states=tokens[half], encoder_attention_mask=mask[half])
        both = self._denoise(torch.cat([x_t, x_t]), t, encoder_hidden_states=tokens, encoder_attention_mask=mask)
        eps_null, eps_y = both[:, :channels].chunk(2)
        eps = eps_null + gamma * (eps_y - eps_null)
        if phi > 0:
            ratio = eps_y.std(dim=(1, 2, 3), keepdim=True) / eps.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
            eps = phi * ratio * eps + (1 - phi) * eps
        return torch.cat([eps, both[n:, channels:]], dim=1)  # a learned variance is not guided


def _padded_alike(*conditions):
    """Pairs of (n, tokens, d) and (n, tokens), padded to as many tokens as the longest has."""
    longest = max(mask.shape[1] for _, mask in conditions)
    for tokens, mask in conditions:
        missing = longest - mask.shape[1]
        yield F.pad(tokens, (0, 0, 0, missing)), F.pad(mask, (0, missing))
