"""What models are conditioned on: text tokens, low-resolution images and noise."""

import math
import warnings

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin


def tokenize(texts: list[str], tokenizer, text_encoder) -> dict[str, torch.Tensor]:
    """
    Tokenizes n texts to `input_ids` and `attention_mask`, (n, tokens), padded to the longest.

    Texts longer than the text encoder allows are cut off, with a warning that shows what is left out.

    Raises:
        ValueError: If a text has no token.
    """
    longest = min(tokenizer.model_max_length, getattr(text_encoder.config, "max_position_embeddings", math.inf))
    longest = longest if longest < 1e6 else None  # tokenizers write a very large number for "unlimited"
    tokens = tokenizer(texts, padding=True, truncation=longest is not None, max_length=longest, return_tensors="pt")
    left_out = []
    for text, mask in zip(texts, tokens["attention_mask"], strict=True):
        if not mask.any():
            raise ValueError(f"tokenizer: it makes no token of {text!r}; let it add one at the start or the end")
        if mask.sum() == longest:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if rest := ids[longest - tokenizer.num_special_tokens_to_add() :]:
                left_out.append(repr(tokenizer.decode(rest)))
    if left_out:
        more = f" and that of {len(left_out) - 5} more" if len(left_out) > 5 else ""
        warnings.warn(
            f"{len(left_out)} of {len(texts)} texts are cut off after {longest} tokens, all that the text encoder "
            f"takes; left out is {', '.join(left_out[:5])}{more}",
            stacklevel=4,
        )
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def shrink(images: torch.Tensor, factor: int) -> torch.Tensor:
    """
    Images (n, C, H, W) in [-1, 1], scaled to 1/`factor` of their size by Pillow's Lanczos filter, as data sets are.

    The result is R_h x R_wᵀ. Row i of R is w((j + ½) / factor − (i + ½)) for each pixel j, divided by its sum, with
    w(u) = sinc(u) sinc(u / 3) for |u| < 3.

    Raises:
        ValueError: If the factor does not divide height and width.
    """
    height, width = images.shape[2:]
    if height % factor or width % factor:
        raise ValueError(f"factor: {factor} does not divide {height}x{width}, the size of the images")
    rows, columns = (_lanczos(length, factor).to(images, non_blocking=images.is_cuda) for length in (height, width))
    with torch.autocast(images.device.type, enabled=False):
        images = (images @ columns.T).clamp(-1, 1)  # the filter overshoots at edges
        return (rows @ images).clamp(-1, 1)


def enlarge(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Images (n, C, h, w), scaled to `factor` times their size by bicubic interpolation."""
    return F.interpolate(images, scale_factor=factor, mode="bicubic")


def noised_by(scheduler: SchedulerMixin, images, epsilon, s: torch.Tensor) -> torch.Tensor:
    """Images y with the noise ε of s steps, (n,), of the process: √ᾱ_s y + √(1−ᾱ_s) ε; y itself for s = 0."""
    alpha_bar = F.pad(scheduler.alphas_cumprod.to(s.device), (1, 0), value=1.0)[s]
    alpha_bar = alpha_bar[:, None, None, None].to(images.dtype)
    return alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * epsilon


def _lanczos(length: int, factor: int) -> torch.Tensor:
    """R, (length / factor, length)."""
    centers = torch.arange(length // factor, dtype=torch.float64)[:, None] + 0.5
    u = (torch.arange(length, dtype=torch.float64) + 0.5) / factor - centers
    weights = torch.where(u.abs() < 3, torch.sinc(u) * torch.sinc(u / 3), 0.0)
    return weights / weights.sum(dim=1, keepdim=True)
