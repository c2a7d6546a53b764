"""Captions become the same condition in training as in sampling, however they get there."""

from pathlib import Path

import datasets
import pytest
import torch
from tiny import CAPTIONS, tiny_text_encoder, tiny_text_pipeline, tiny_tokenizer, tiny_unet
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextModel, T5EncoderModel

from hf_genmod.data.captions import FrozenText, Tokens, all_captions
from hf_genmod.training.text_encoder import TextConditionedUNet, load_text_encoder, make_text_encoder, train_tokenizer

UNKNOWN = ["a purple fox", "über 3 × 4 …", "猫"]


class TestTokenizer:
    @pytest.mark.parametrize("text", [*CAPTIONS, *UNKNOWN])
    def test_writes_any_text_so_that_it_can_be_read(self, text):
        tokenizer = tiny_tokenizer()
        ids = tokenizer(text)["input_ids"]
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.replace("…", "...")

    def test_knows_words_that_occur_as_wholes_and_no_upper_case(self):
        tokenizer = train_tokenizer(CAPTIONS * 2)
        assert len(tokenizer("a red cat")["input_ids"]) == 2 + 3
        assert tokenizer("A RED Cat") == tokenizer("a red cat")

    def test_takes_captions_longer_than_those_of_clip(self):
        assert train_tokenizer(["red " * 100]).model_max_length >= 102
        assert train_tokenizer(["red"]).model_max_length == 77

    def test_is_the_same_after_a_journey_over_disk(self, tmp_path):
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded(CAPTIONS + UNKNOWN) == tokenizer(CAPTIONS + UNKNOWN)
        assert (loaded.model_max_length, loaded.pad_token) == (tokenizer.model_max_length, tokenizer.pad_token)


def test_a_text_encoder_of_ones_own_fits_its_tokenizer():
    tokenizer = tiny_tokenizer()
    first, again, other = (make_text_encoder(tokenizer, hidden_size=32, num_layers=1, seed=seed) for seed in (0, 0, 1))
    pipeline = tiny_text_pipeline()
    tokens = tokenizer(["a red cat", "猫" * 40], padding=True, truncation=True, return_tensors="pt")
    assert first(**tokens).last_hidden_state.shape == (*tokens["input_ids"].shape, 32)
    weights = [encoder.embeddings.token_embedding.weight for encoder in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert type(first) is type(pipeline.text_encoder)


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


def test_a_text_encoder_learns_with_its_unet():
    text_encoder, unet = tiny_text_encoder(), tiny_unet(cross_attention_dim=16)
    model = TextConditionedUNet(unet, text_encoder)
    tokens = Tokens(tiny_tokenizer(), text_encoder)(CAPTIONS)
    model(torch.randn(4, 3, 8, 8), torch.arange(4), **tokens).sample.square().mean().backward()
    assert all(
        parameter.grad.abs().max() > 0
        for name, parameter in model.named_parameters()
        if "k_proj.bias" not in name and "to_k.bias" not in name
    )


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


def test_captions_of_data_sets_are_listed_once():
    class Captioned(list):
        captions = property(list)

    assert all_captions(Captioned(["b", ["a", "c"]]), None, Captioned(["b"])) == ["a", "b", "c"]


class TestTextEncoders:
    @pytest.fixture(params=[CLIPTextModel, T5EncoderModel])
    def pipeline(self, request):
        return tiny_text_pipeline(request.param)

    def is_the_same(self, loaded, pipeline):
        tokenizer, text_encoder = loaded
        assert type(text_encoder) is type(pipeline.text_encoder) and not text_encoder.training
        assert not any(parameter.requires_grad for parameter in text_encoder.parameters())
        for name, weight in pipeline.text_encoder.state_dict().items():
            assert torch.equal(text_encoder.state_dict()[name], weight)
        assert tokenizer(CAPTIONS) == pipeline.tokenizer(CAPTIONS)

    def test_are_found_by_themselves_and_in_pipelines_here_and_on_the_hub(self, pipeline, tmp_path, hub):
        pipeline.save_pretrained(tmp_path / "run")
        for part in (pipeline.text_encoder, pipeline.tokenizer):
            part.save_pretrained(tmp_path / "bare")
        self.is_the_same(load_text_encoder(tmp_path / "run"), pipeline)
        self.is_the_same(load_text_encoder(str(tmp_path / "bare")), pipeline)
        pipeline.push_to_hub(repo_id := hub.new_repo_id())
        hub.requests.clear()
        self.is_the_same(load_text_encoder(repo_id), pipeline)
        assert not any(request.path.endswith((".py", ".bin")) for request in hub.requests)

    def test_of_a_whole_clip_its_half(self, tmp_path):
        text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
        vision = text | {"image_size": 8, "patch_size": 4}
        clip = CLIPModel(CLIPConfig(text_config=text | {"vocab_size": 400}, vision_config=vision, projection_dim=8))
        clip.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        _, text_encoder = load_text_encoder(tmp_path)
        assert type(text_encoder) is CLIPTextModel
        ids = torch.tensor([[1, 5, 2]])
        with torch.no_grad():
            expected = clip.text_model(ids).last_hidden_state
            torch.testing.assert_close(text_encoder(ids).last_hidden_state, expected)

    def test_what_is_none_is_named_in_a_sentence(self, tmp_path, hub):
        for nothing in (tmp_path, tmp_path / "missing", hub.new_repo_id()):
            with pytest.raises(FileNotFoundError, match="is neither a text encoder nor a pipeline with one"):
                load_text_encoder(nothing)
