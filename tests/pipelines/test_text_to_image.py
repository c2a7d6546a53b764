"""Text-to-image generation is guided by prompts."""

import math

import pytest
import torch
from small_pipelines import draw, quiet, seeded
from tiny import CAPTIONS, assert_rounded_alike, tiny_text_pipeline, tiny_tokenizer, tiny_unet
from tokenizers import processors
from transformers import CLIPTextModel, T5EncoderModel

from hf_genmod.pipelines.text_to_image import TextToImagePipeline
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler


class TestText:
    STEPS = 3
    PROMPTS = ["a red cat", "a green dog on a blue hill"]

    @pytest.fixture(params=[CLIPTextModel, T5EncoderModel])
    def pipeline(self, request):
        return quiet(tiny_text_pipeline(request.param))

    @pytest.fixture
    def passes(self, pipeline):
        """The batch size of each forward pass of the U-Net."""
        sizes = []
        pipeline.unet.register_forward_pre_hook(lambda unet, args: sizes.append(len(args[0])))
        return sizes

    def draw(self, pipeline, prompts, seeds=None, **kwargs):
        seeds = range(len(prompts)) if seeds is None else seeds
        generators = [seeded(i) for i in seeds]
        return draw(pipeline, prompts, generator=generators, num_inference_steps=self.STEPS, **kwargs)

    def by_hand(self, pipeline, prompt, gamma, negative="", seed=0):
        """One picture from a plain loop, with neither batches nor padding."""
        unet, scheduler = pipeline.unet, AncestralDDPMScheduler.from_config(pipeline.scheduler.config)
        rng = seeded(seed)
        x_t = torch.randn(1, 3, 8, 8, generator=rng)
        scheduler.set_timesteps(self.STEPS)
        with torch.no_grad():
            states = [
                pipeline.text_encoder(**pipeline.tokenizer(text, return_tensors="pt")).last_hidden_state
                for text in (negative, prompt)
            ]
            for t in scheduler.timesteps:
                eps_null, eps_y = (unet(x_t, t, encoder_hidden_states=state).sample for state in states)
                x_t = scheduler.step(eps_null + gamma * (eps_y - eps_null), t, x_t, generator=rng).prev_sample
        return x_t

    @pytest.mark.parametrize("gamma, size", [(0, 2), (1.0, 2), (-0.5, 4), (3.0, 4)])
    def test_is_the_formula_in_as_few_passes_as_there_can_be(self, pipeline, passes, gamma, size):
        pictures = self.draw(pipeline, self.PROMPTS, guidance_scale=gamma)
        assert passes == [size] * self.STEPS
        expected = [self.by_hand(pipeline, prompt, gamma, seed=seed) for seed, prompt in enumerate(self.PROMPTS)]
        torch.testing.assert_close(pictures, torch.cat(expected), rtol=1e-4, atol=1e-4)

    def test_a_negative_prompt_takes_the_place_of_none(self, pipeline):
        (picture,) = self.draw(pipeline, ["a red cat"], guidance_scale=4.0, negative_prompt="two lizards")
        expected = self.by_hand(pipeline, "a red cat", 4.0, "two lizards")[0]
        torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-4)
        assert (picture - self.draw(pipeline, ["a red cat"], guidance_scale=4.0)[0]).abs().max() > 0.01

    def test_each_prompt_may_have_its_own_negative_one(self, pipeline):
        together = self.draw(pipeline, self.PROMPTS, negative_prompt=["", "two lizards"])
        for i, negative in enumerate(["", "two lizards"]):
            alone = self.draw(pipeline, self.PROMPTS[i : i + 1], [i], negative_prompt=negative)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)

    def test_a_picture_does_not_depend_on_longer_prompts_beside_it(self, pipeline):
        longest = CAPTIONS[1]
        alone, beside = self.draw(pipeline, ["a"]), self.draw(pipeline, ["a", longest])
        torch.testing.assert_close(alone[0], beside[0], rtol=1e-4, atol=1e-4)

    def test_pictures_of_one_prompt_are_those_of_the_prompt_repeated(self, pipeline):
        several = self.draw(pipeline, self.PROMPTS, range(6), num_images_per_prompt=3)
        repeated = self.draw(pipeline, [prompt for prompt in self.PROMPTS for _ in range(3)])
        assert_rounded_alike(several, repeated)  # the prompts are encoded in batches of other sizes

    def test_prompts_may_be_encoded_before(self, pipeline):
        embeds, mask = pipeline.encode_prompt(self.PROMPTS)
        negative, negative_mask = pipeline.encode_prompt("two lizards")
        given = self.draw(
            pipeline, None, range(2), prompt_embeds=embeds, prompt_attention_mask=mask,
            negative_prompt_embeds=negative, negative_prompt_attention_mask=negative_mask,
        )  # fmt: skip
        assert_rounded_alike(given, self.draw(pipeline, self.PROMPTS, negative_prompt="two lizards"))

    def test_a_string_is_one_prompt(self, pipeline):
        assert torch.equal(self.draw(pipeline, "a red cat", [0]), self.draw(pipeline, ["a red cat"]))

    def test_interval_limits_guidance_to_its_noise_levels(self, pipeline, passes):
        pipeline.scheduler.set_timesteps(self.STEPS)
        alpha_bar = pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps]
        first, second, third = ((1 - alpha_bar) / alpha_bar).sqrt().tolist()
        self.draw(pipeline, ["a"], guidance_interval=((second + third) / 2, (first + second) / 2))
        assert passes == [1, 2, 1]

    def test_rescaling_brings_guidance_to_the_deviation_of_the_conditional_prediction(self, pipeline):
        x_t = torch.randn(2, 3, 8, 8, generator=seeded())
        embeds, mask = pipeline.encode_prompt(["", "a", *self.PROMPTS])
        guided, half, plain = (
            pipeline._guided_by_text(x_t, 500, embeds, mask.bool(), 5.0, phi) for phi in (1.0, 0.5, 0.0)
        )
        conditional = pipeline._guided_by_text(x_t, 500, embeds, mask.bool(), 1.0, 0.0)
        torch.testing.assert_close(guided.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)))
        torch.testing.assert_close(half, (guided + plain) / 2)
        assert (plain.std(dim=(1, 2, 3)) - conditional.std(dim=(1, 2, 3))).abs().max() > 0.1

    def test_learned_variance_is_that_of_the_prompt(self):
        pipeline = tiny_text_pipeline(out_channels=6)
        x_t = torch.randn(2, 3, 8, 8, generator=seeded())
        embeds, mask = pipeline.encode_prompt(["", "a", *self.PROMPTS])
        guided, conditional = (pipeline._guided_by_text(x_t, 500, embeds, mask.bool(), g, 0.0) for g in (5.0, 1.0))
        torch.testing.assert_close(guided[:, 3:], conditional[:, 3:], rtol=1e-4, atol=1e-4)

    def test_what_is_too_long_is_cut_off_and_shown(self):
        pipeline = quiet(tiny_text_pipeline())
        words = ["cat", "dog"] * 10
        message = "1 of 2 texts are cut off after 16 tokens.*left out is ' cat dog cat dog cat dog'"
        with pytest.warns(UserWarning, match=message):
            cut = self.draw(pipeline, [" ".join(words), "a cat"])
        assert torch.equal(cut, self.draw(pipeline, [" ".join(words[:14]), "a cat"]))

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({}, "prompt: give either it or prompt_embeds"),
            ({"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 16)}, "prompt: give .*, not both"),
            ({"prompt": []}, r"prompt: \[\] is neither a string nor a list of one or more"),
            ({"prompt": [1]}, r"prompt: \[1\] is neither a string"),
            ({"prompt": ["a", "b", "c"], "negative_prompt": ["d", "e"]}, "negative_prompt: 2 for 3 prompts"),
            ({"prompt": "a", "prompt_attention_mask": torch.ones(1, 2)}, "prompt_attention_mask: it belongs to"),
            (
                {"prompt_embeds": torch.zeros(1, 2, 8)},
                r"prompt_embeds: shape \(1, 2, 8\) is not \(prompts, tokens, 16",
            ),
            (
                {"prompt_embeds": torch.zeros(1, 2, 16), "prompt_attention_mask": torch.zeros(1, 2)},
                "none of the tokens of a prompt counts",
            ),
            ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt: 0 is not a positive whole number"),
            ({"prompt": "a", "guidance_rescale": 2.0}, "guidance_rescale: 2.0 is not between 0 and 1"),
            ({"prompt": "a", "guidance_scale": math.nan}, "guidance_scale: nan is not a finite number"),
            ({"prompt": "a", "guidance_interval": (2, 1)}, "guidance_interval"),
        ],
    )
    def test_errors_of_a_request(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            tiny_text_pipeline()(**arguments)

    def test_parts_that_do_not_fit_are_refused(self):
        parts = dict(tiny_text_pipeline().components)
        with pytest.raises(ValueError, match="unet: it was made without cross_attention_dim"):
            TextToImagePipeline(**parts | {"unet": tiny_unet()})
        with pytest.raises(ValueError, match="a width of 16, and the U-Net's cross_attention_dim is 8"):
            TextToImagePipeline(**parts | {"unet": tiny_unet(cross_attention_dim=8)})
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = None
        with pytest.raises(ValueError, match="tokenizer: it has no padding token"):
            TextToImagePipeline(**parts | {"tokenizer": tokenizer})
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
        with pytest.raises(ValueError, match="tokenizer: it makes no token of ''"):
            TextToImagePipeline(**parts | {"tokenizer": tokenizer})("a")
