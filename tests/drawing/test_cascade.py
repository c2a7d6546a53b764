"""Cascades of a base model and upsamplers."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    ClassifierFreeGuidedPipeline,
    SuperResolutionPipeline,
    UnconditionalPipeline,
)
from hf_genmod.drawing.cascade import draw_cascade
from hf_genmod.drawing.grids import grid
from hf_genmod.processes import processes

NAMES = {0: "cat", 1: "dog", 2: "lizard"}


def tiny_upsampler(factor=2, sample_size=16, num_classes=None, id2label=None):
    unet = tiny_unet(conditioning_channels=3, sample_size=sample_size, num_classes=num_classes)
    pipe = SuperResolutionPipeline(
        unet, AncestralDDPMScheduler(timestep_spacing="trailing"), id2label, factor=factor, max_noise_level=200
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestCascade:
    @pytest.fixture
    def stages(self):
        base = ClassifierFreeGuidedPipeline(
            tiny_unet(num_classes=3), AncestralDDPMScheduler(timestep_spacing="trailing"), id2label=NAMES
        )
        base.set_progress_bar_config(disable=True)
        return [base, tiny_upsampler(num_classes=3, id2label=NAMES), tiny_upsampler(4, sample_size=64)]

    def test_each_stage_enlarges_what_the_one_before_has_drawn_by_one_seed(self, stages):
        drawn = draw_cascade(
            stages, [5], [0, 100], num_inference_steps=2, output_type="pt", all_stages=True, class_labels=["dog"]
        )
        seed, options = [torch.Generator().manual_seed(5)], {"num_inference_steps": 2, "output_type": "pt"}
        small = stages[0](["dog"], generator=seed, **options).images
        larger = stages[1](small, class_labels=["dog"], generator=seed, **options).images
        largest = stages[2](larger, noise_level=100, generator=seed, **options).images
        assert all(torch.equal(ours, expected) for ours, expected in zip(drawn, (small, larger, largest), strict=True))

    def test_without_a_number_of_steps_each_stage_takes_its_own(self, stages):
        for steps, stage in zip((1, 3), stages, strict=False):
            stage.register_to_config(defaults={"arguments": {"num_inference_steps": steps}})
        drawn = draw_cascade(stages[:2], [5], output_type="pt", all_stages=True, class_labels=["dog"])
        seed = [torch.Generator().manual_seed(5)]
        small = stages[0](["dog"], generator=seed, num_inference_steps=1, output_type="pt").images
        larger = stages[1](small, ["dog"], generator=seed, num_inference_steps=3, output_type="pt").images
        assert torch.equal(drawn[0], small) and torch.equal(drawn[1], larger)

    def test_a_picture_is_that_of_its_seed_whatever_is_drawn_beside_it(self, stages):
        # Rounding differs with the size of a batch, and three networks that were not trained amplify it.
        stages = [stage.to(torch.float64) for stage in stages]
        request = {"noise_level": 50, "num_inference_steps": 2, "output_type": "pt"}
        together = draw_cascade(stages, [7, 8, 9], class_labels=[0, 1, 2], **request)
        alone = draw_cascade(stages, [8], class_labels=[1], **request)
        torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-5)
        assert not torch.allclose(together[0], together[1], atol=0.1)

    def test_only_the_stage_at_work_is_on_the_accelerator(self, stages, monkeypatch):
        log = []
        for i, pipe in enumerate(stages):
            monkeypatch.setattr(pipe, "to", lambda device, i=i: log.append((i, str(device))))
            pipe.unet.register_forward_hook(lambda *_, i=i: log.append((i, "works")))
        draw_cascade(stages, [0], num_inference_steps=1, class_labels=["cat"])
        device = str(processes().device)
        assert log == [(i, what) for i in range(3) for what in (device, "works", "cpu")]

    def test_without_labels_it_draws_as_many_as_there_are_seeds(self):
        base = UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler(timestep_spacing="trailing"))
        base.set_progress_bar_config(disable=True)
        drawn = draw_cascade([base, tiny_upsampler()], range(3), num_inference_steps=1, all_stages=True)
        assert [[picture.size for picture in of_stage] for of_stage in drawn] == [[(8, 8)] * 3, [(16, 16)] * 3]
        figure = grid(drawn)  # all as large as the last, and six times that
        assert figure.size == (3 * 100, 2 * 100)
        for row in (0, 1):
            shown = figure.crop((100, 100 * row, 196, 100 * row + 96))
            assert shown.tobytes() == drawn[row][1].resize((96, 96), Image.Resampling.NEAREST).tobytes()

    def test_an_upsampler_may_be_the_first(self):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8))
        (picture,) = draw_cascade([tiny_upsampler()], [0], num_inference_steps=1, image=[image])
        assert picture.size == (18, 10)

    @pytest.mark.parametrize(
        "second, options, message",
        [
            (
                lambda: tiny_upsampler(sample_size=32),
                {},
                "makes images of 8x8 pixels in 3 channels, and the next takes",
            ),
            (
                lambda: UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler(timestep_spacing="trailing")),
                {},
                "only the first stage can be",
            ),
            (lambda: tiny_upsampler(num_classes=3, id2label={0: "a", 1: "b", 2: "c"}), {}, "has the labels"),
            (tiny_upsampler, {"noise_level": [0, 0]}, "noise_level: 2 values for 1 upsamplers"),
            (tiny_upsampler, {"noise_level": 500}, "noise_level: 500 is not a whole number from 0 to 200"),
            (tiny_upsampler, {"class_labels": ["cat", "dog"]}, "generator: a list of 1 for 2 images"),
        ],
    )
    def test_mistakes_are_named(self, stages, second, options, message):
        with pytest.raises(ValueError, match=message):
            draw_cascade([stages[0], second()], [0], num_inference_steps=1, **({"class_labels": ["cat"]} | options))
