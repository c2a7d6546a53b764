"""Captions become the same condition in training as in sampling, however they get there."""

from pathlib import Path

import datasets
import pytest
import torch
from tiny import CAPTIONS, tiny_text_encoder, tiny_text_pipeline, tiny_tokenizer, tiny_unet
from transformers import CLIPTextModel, T5EncoderModel

from hf_genmod.data.captions import FrozenText, Tokens, all_captions
from hf_genmod.training.text_encoder import TextConditionedUNet, train_tokenizer

UNKNOWN = ["a purple fox", "über 3 × 4 …", "猫"]


@pytest.fixture(params=[CLIPTextModel, T5EncoderModel])
def text_encoder(request):
    return tiny_text_encoder(request.param)


def test_both_ways_give_the_unet_what_the_pipeline_gives_it(text_encoder):
    tokenizer, unet = tiny_tokenizer(), tiny_unet(cross_attention_dim=16)
    captions = [CAPTIONS[3], "", CAPTIONS[0]]
    x, t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500, 900])
    pipeline = tiny_text_pipeline(type(text_encoder))
    embeds, mask = pipeline.encode_prompt(captions)
    with torch.no_grad():
        expected = unet(x, t, encoder_hidden_states=embeds, encoder_attention_mask=mask).sample
        joint = TextConditionedUNet(unet, text_encoder)(x, t, **Tokens(tokenizer, text_encoder)(captions)).sample
        frozen = unet(x, t, **FrozenText(CAPTIONS, tokenizer, text_encoder)(captions)).sample
    torch.testing.assert_close(joint, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(frozen, expected, rtol=1e-5, atol=1e-5)


class TestFrozenText:
    def files(self):
        folder = Path(datasets.config.HF_DATASETS_CACHE, "hf_genmod", "text")
        return {file: file.stat().st_mtime_ns for file in folder.iterdir()} if folder.is_dir() else {}

    def test_is_what_the_encoder_says_of_each_caption_alone(self, text_encoder):
        tokenizer, captions = tiny_tokenizer(), ["a red cat", "two lizards", "", "a red cat"]
        condition = FrozenText(CAPTIONS, tokenizer, text_encoder)(captions)
        states, mask = condition["encoder_hidden_states"], condition["encoder_attention_mask"]
        for caption, state, counts in zip(captions, states, mask, strict=True):
            with torch.no_grad():
                expected = text_encoder(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
            torch.testing.assert_close(state[counts], expected, rtol=1e-5, atol=1e-5)
            assert not state[~counts].any()

    def test_is_computed_once_as_long_as_all_is_the_same(self, text_encoder):
        tokenizer = tiny_tokenizer()
        first = FrozenText(CAPTIONS, tokenizer, text_encoder)
        files = self.files()
        again = FrozenText(reversed(CAPTIONS), tokenizer, text_encoder)
        assert self.files() == files and again.fingerprint == first.fingerprint
        assert FrozenText(CAPTIONS[:3], tokenizer, text_encoder).fingerprint != first.fingerprint
        text_encoder.get_input_embeddings().weight.data[5, 0] += 1
        assert FrozenText(CAPTIONS, tokenizer, text_encoder).fingerprint != first.fingerprint
        assert (
            FrozenText(CAPTIONS, train_tokenizer(UNKNOWN, 300), tiny_text_encoder()).fingerprint != first.fingerprint
        )

    def test_a_file_of_an_earlier_version_is_left_alone(self, text_encoder):
        captions = ["a word of old", text_encoder.config.model_type]
        first = FrozenText(captions, tiny_tokenizer(), text_encoder)
        (file,) = [file for file in self.files() if first.fingerprint in file.name]
        file.unlink()
        old = datasets.Dataset.from_dict({"caption": ["", *captions]}).map(
            lambda row: {"hidden": [0.0]},
            remove_columns="caption",
            cache_file_name=str(file.parent / f"{first.fingerprint}.arrow"),
            new_fingerprint=first.fingerprint,
        )
        assert old.column_names == ["hidden"]
        again = FrozenText(captions, tiny_tokenizer(), text_encoder)
        assert again.fingerprint == first.fingerprint
        assert torch.equal(*(text(captions)["encoder_hidden_states"] for text in (first, again)))


def test_captions_of_data_sets_are_listed_once():
    class Captioned(list):
        captions = property(list)

    assert all_captions(Captioned(["b", ["a", "c"]]), None, Captioned(["b"])) == ["a", "b", "c"]
