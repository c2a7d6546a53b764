"""Captions as the inputs of a text-conditioned U-Net."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence

from hf_genmod.data.latents import weights_fingerprint
from hf_genmod.models.conditioning import tokenize
from hf_genmod.processes import processes


def all_captions(*datasets) -> list[str]:
    """Every caption of some data sets, once, in alphabetical order; of those that are `None`, none."""
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
    Captions as `encoder_hidden_states`, (n, tokens, d), and `encoder_attention_mask`, (n, tokens), for a U-Net: what a
    text encoder that is not trained makes of them. Each caption, and "", is encoded once, and found again by
    `datasets` as long as captions, tokenizer and text encoder are the same.

    Args:
        captions (`Iterable[str]`): All that will be asked for.
        tokenizer, text_encoder: Of transformers.

    Attributes:
        fingerprint (`str`): Hash of captions, tokenizer and text encoder.
    """

    def __init__(self, captions: Iterable[str], tokenizer, text_encoder):
        captions = sorted({"", *captions})
        text_encoder.to(processes().device)
        self._rows = {caption: row for row, caption in enumerate(captions)}
        self._width = text_encoder.config.hidden_size
        words = f"{captions} {sorted(tokenizer.get_vocab().items())} {tokenizer.model_max_length}"
        key = hashlib.blake2b(f"{words} {weights_fingerprint(text_encoder)}".encode(), digest_size=16).hexdigest()
        self.fingerprint = key

        @torch.no_grad()
        def encode_rows(batch):
            tokens = tokenize(batch["caption"], tokenizer, text_encoder)
            tokens = {name: ids.to(text_encoder.device) for name, ids in tokens.items()}
            hidden = text_encoder(**tokens).last_hidden_state.float().cpu()
            masks = tokens["attention_mask"].bool().cpu()
            return {"hidden": [states[mask].flatten().numpy() for states, mask in zip(hidden, masks, strict=True)]}

        folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_genmod" / "text"
        folder.mkdir(parents=True, exist_ok=True)
        with processes().main_process_first():
            self._hidden = (
                datasets.Dataset.from_dict({"caption": captions})
                .map(
                    encode_rows,
                    batched=True,
                    batch_size=256,
                    remove_columns="caption",
                    features=datasets.Features({"hidden": datasets.List(datasets.Value("float32"))}),
                    cache_file_name=str(folder / f"{key}.arrow"),
                    load_from_cache_file=True,
                    new_fingerprint=key,
                    desc="Encoding captions",
                )
                .with_format("torch")
            )

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        rows = [self._rows[caption] for caption in captions]
        hidden = [self._hidden[row]["hidden"].unflatten(0, (-1, self._width)) for row in rows]  # (tokens, d) each
        lengths = torch.tensor([len(states) for states in hidden])
        mask = torch.arange(lengths.max()) < lengths[:, None]
        return {"encoder_hidden_states": pad_sequence(hidden, batch_first=True), "encoder_attention_mask": mask}
