"""Tokenizers and text encoders, trained from scratch or pretrained."""

import os
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
)

from hf_genmod.errors import first_line, refuse_lfs_pointers
from hf_genmod.hub import why_missing
from hf_genmod.models.initial_weights import SeededWeights

MAX_TOKENS = 77  # as CLIP has; a longer caption raises the number
VOCAB_SIZE = 8192  # most tokens


def train_tokenizer(captions: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Trains a byte-level tokenizer of up to `vocab_size` tokens on captions, by byte pair encoding (Sennrich et al.
    2016, https://arxiv.org/abs/1508.07909). It can encode any text, and ignores case."""
    captions = list(captions)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    pad, start, end = special_tokens = ["<pad>", "<start>", "<end>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    longest = max([MAX_TOKENS, *(len(encoding.ids) for encoding in tokenizer.encode_batch(captions))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=start, eos_token=end, model_max_length=longest
    )


def make_text_encoder(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, num_layers: int = 2, seed: int = 0
) -> CLIPTextModel:
    """An untrained small text encoder with the architecture of CLIP's (Radford et al. 2021,
    https://arxiv.org/abs/2103.00020)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 32),
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with SeededWeights(seed):
        return CLIPTextModel(config)


def load_text_encoder(pretrained_model_name_or_path: str | os.PathLike):
    """
    Loads a tokenizer and a text encoder of transformers (CLIP, T5, BERT, ...), alone or as components of a pipeline,
    from safetensors and without executing code. The text encoder is in evaluation mode, and frozen.

    Raises:
        FileNotFoundError: If there is no text encoder in this folder, or repository on the Hub.
    """
    path = str(pretrained_model_name_or_path)
    refuse_lfs_pointers(*(os.path.join(path, folder) for folder in ("", "text_encoder", "tokenizer")))
    if not os.path.isdir(path) and (reason := why_missing(path)):
        raise FileNotFoundError(f"text_encoder: {path!r} is no folder here, and {reason}")
    for of_encoder, of_tokenizer in (("text_encoder", "tokenizer"), ("", "")):
        try:
            config = AutoConfig.from_pretrained(path, subfolder=of_encoder)
            config = getattr(config, "text_config", config)  # CLIP's text tower
            tokenizer = AutoTokenizer.from_pretrained(path, subfolder=of_tokenizer)
            text_encoder = AutoModelForTextEncoding.from_pretrained(
                path, subfolder=of_encoder, config=config, use_safetensors=True
            )
            return tokenizer, text_encoder.eval().requires_grad_(False)
        except (OSError, ValueError) as error:  # ValueError: not a config of transformers
            reason = first_line(error)
    raise FileNotFoundError(f"text_encoder: {path!r} is neither a text encoder nor a pipeline with one ({reason})")


class TextConditionedUNet(torch.nn.Module):
    """A U-Net and a text encoder that are trained together, as one model of x_t, t and tokens."""

    def __init__(self, unet, text_encoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, sample, timestep, input_ids, attention_mask):
        mask = attention_mask
        if isinstance(self.text_encoder, CLIPTextModel):  # of a mask (n, tokens) it asks whether it is needed
            tokens = mask.shape[1]
            causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
            mask = mask.bool()[:, None, None] & causal  # (n, 1, tokens, tokens)
        text = self.text_encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return self.unet(sample, timestep, encoder_hidden_states=text, encoder_attention_mask=attention_mask)

    def enable_gradient_checkpointing(self):
        self.unet.enable_gradient_checkpointing()
