"""Tokenizers and text encoders of one's own, and those of others."""

import pytest
import torch
from tiny import CAPTIONS, tiny_text_encoder, tiny_text_pipeline, tiny_tokenizer, tiny_unet
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextModel, T5EncoderModel

from hf_genmod.data.captions import Tokens
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


@pytest.mark.parametrize("folder", ["", "tokenizer"])
def test_a_pointer_of_git_lfs_in_place_of_a_tokenizer_is_named(tmp_path, folder):
    tiny_text_encoder().save_pretrained(tmp_path / ("text_encoder" if folder else ""))
    tiny_tokenizer().save_pretrained(tmp_path / folder)
    file = tmp_path / folder / "tokenizer.json"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n")
    with pytest.raises(ValueError, match=f"{file}: a pointer of Git LFS, not the file itself; run `git lfs pull`"):
        load_text_encoder(tmp_path)


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
        with pytest.raises(FileNotFoundError, match="is neither a text encoder nor a pipeline with one"):
            load_text_encoder(tmp_path)
        for nothing in (tmp_path / "missing", hub.new_repo_id()):
            with pytest.raises(FileNotFoundError, match=f"text_encoder: '{nothing}' is no folder here, and "):
                load_text_encoder(nothing)
