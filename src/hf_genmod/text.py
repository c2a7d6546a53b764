"""Captions as a model learns from them: tokens for a text encoder that learns with it, or what a frozen one says.

Either is a function from captions to the keyword arguments of the model, `text` of [`DenoisingObjective`].
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
)

from hf_genmod.latents import weights_fingerprint
from hf_genmod.pipelines.genmod_pipelines import tokenize
from hf_genmod.processes import processes

SPECIAL_TOKENS = ("<pad>", "<start>", "<end>")
MAX_TOKENS = 77  # of CLIP; more where a caption is longer


def all_captions(*datasets) -> list[str]:
    """Every caption of some data sets, once, in alphabetical order; of those that are `None`, none."""
    captions = [caption for dataset in datasets if dataset is not None for caption in dataset.captions]
    return sorted({text for caption in captions for text in ([caption] if isinstance(caption, str) else caption)})


def train_tokenizer(captions: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """
    A tokenizer of the words and parts of words that occur in captions, by byte pair encoding (Sennrich et al. 2016,
    https://arxiv.org/abs/1508.07909): any text can be written in it, upper and lower case being the same.

    Args:
        captions (`Iterable[str]`): What it is trained on.
        vocab_size (`int`, defaults to 8192): The most tokens that it has.
    """
    captions = list(captions)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    pad, start, end = SPECIAL_TOKENS
    ids = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    longest = max(len(encoding.ids) for encoding in tokenizer.encode_batch(captions))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=start,
        eos_token=end,
        model_max_length=max(MAX_TOKENS, longest),
    )


def make_text_encoder(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, num_layers: int = 2, seed: int = 0
) -> CLIPTextModel:
    """A small text encoder in the style of CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020), untrained."""
    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
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
    )


def load_text_encoder(pretrained_model_name_or_path: str | os.PathLike):
    """
    Loads a tokenizer and a text encoder of transformers (CLIP, T5, BERT, ...), by themselves or as parts of a
    pipeline, from safetensors and without executing code.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or the id of a repository on the Hub.

    Returns:
        The tokenizer, and the text encoder in evaluation mode.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = str(pretrained_model_name_or_path)
    for of_encoder, of_tokenizer in (("text_encoder", "tokenizer"), ("", "")):
        try:
            config = AutoConfig.from_pretrained(path, subfolder=of_encoder)
            config = getattr(config, "text_config", config)  # of the whole of CLIP the half that reads
            tokenizer = AutoTokenizer.from_pretrained(path, subfolder=of_tokenizer)
            text_encoder = AutoModelForTextEncoding.from_pretrained(
                path, subfolder=of_encoder, config=config, use_safetensors=True
            )
            return tokenizer, text_encoder.eval().requires_grad_(False)
        except (OSError, ValueError) as error:  # a config of no model of transformers gives the latter
            reason = str(error).splitlines()[0]
    raise FileNotFoundError(f"text_encoder: {path!r} is neither a text encoder nor a pipeline with one ({reason})")


class TextConditionedUNet(torch.nn.Module):
    """A U-Net and the text encoder that is trained with it, as one model of x_t, t and tokens."""

    def __init__(self, unet, text_encoder):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, sample, timestep, input_ids, attention_mask):
        text = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.unet(sample, timestep, encoder_hidden_states=text, encoder_attention_mask=attention_mask)

    def enable_gradient_checkpointing(self):
        self.unet.enable_gradient_checkpointing()


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
