"""Captions as the inputs of a text-conditioned U-Net."""

import hashlib
from collections.abc import Iterable

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence

from hf_genmod.data.encoding import encode_once, weights_fingerprint
from hf_genmod.models.conditioning import tokenize
from hf_genmod.processes import processes


def all_captions(*datasets) -> list[str]:
    """Every caption of some data sets once, in alphabetical order. A data set may be `None`."""
    captions = [caption for dataset in datasets if dataset is not None for caption in dataset.captions]
    return sorted({text for caption in captions for text in ([caption] if isinstance(caption, str) else caption)})


class Tokens:
    """Captions as `input_ids` and `attention_mask`, (n, tokens), for a [`TextConditionedUNet`]."""

    def __init__(self, tokenizer, text_encoder):
        self.tokenizer, self.text_encoder = tokenizer, text_encoder

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        return tokenize(captions, self.tokenizer, self.text_encoder)


class FrozenText:
    """
    Captions as the hidden states of a frozen text encoder: `encoder_hidden_states`, (n, tokens, d), and
    `encoder_attention_mask`, (n, tokens), for a U-Net. The captions given here, and "", are encoded once; others, of a
    stream, each time. The `fingerprint` is a hash of captions, tokenizer and text encoder.
    """

    def __init__(self, captions: Iterable[str], tokenizer, text_encoder):
        captions = sorted({"", *captions})
        text_encoder.to(processes().device)
        self._rows = {caption: row for row, caption in enumerate(captions)}
        self._width = text_encoder.config.hidden_size
        words = f"{captions} {sorted(tokenizer.get_vocab().items())} {tokenizer.model_max_length}"
        key = f"{words} {weights_fingerprint(text_encoder)}"
        self.fingerprint = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

        @torch.no_grad()
        def encode(captions):
            tokens = tokenize(captions, tokenizer, text_encoder)
            tokens = {name: ids.to(text_encoder.device) for name, ids in tokens.items()}
            hidden = text_encoder(**tokens).last_hidden_state.float().cpu()
            masks = tokens["attention_mask"].bool().cpu()
            return [states[mask] for states, mask in zip(hidden, masks, strict=True)]

        def encode_rows(batch):
            return {"encoded": [states.flatten().numpy() for states in encode(batch["caption"])]}

        self._encode = encode
        feature = datasets.List(datasets.Value("float32"))
        self._hidden = encode_once(
            {"caption": captions}, encode_rows, feature, "text", self.fingerprint, batch_size=256
        )

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        others = [caption for caption in dict.fromkeys(captions) if caption not in self._rows]
        others = dict(zip(others, self._encode(others), strict=True)) if others else {}
        known = iter(self._hidden[[self._rows[caption] for caption in captions if caption in self._rows]]["encoded"])
        hidden = [
            others[caption] if caption in others else next(known).unflatten(0, (-1, self._width))
            for caption in captions
        ]
        mask = pad_sequence([torch.ones(len(states), dtype=torch.bool) for states in hidden], batch_first=True)
        return {"encoder_hidden_states": pad_sequence(hidden, batch_first=True), "encoder_attention_mask": mask}
