"""Sweeps find what an exhaustive search finds, and what is best by construction."""

import itertools
import math

import pytest
import torch
from diffusers import ConfigMixin
from PIL import Image
from small_pipelines import ExactDenoiser
from tiny import tiny_unet

from hf_genmod import AncestralDDPMScheduler, ClassifierFreeGuidedPipeline, UnconditionalPipeline
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.evaluation.comparison import Comparison
from hf_genmod.evaluation.config import EvaluationConfig
from hf_genmod.evaluation.draws import Draws
from hf_genmod.evaluation.estimates import Estimate, Share
from hf_genmod.evaluation.features import FeatureClassifier
from hf_genmod.evaluation.report import setting_name
from hf_genmod.evaluation.sweep import choose, halve, last_measures, sweep, sweep_table

SETTINGS = [{"num_inference_steps": steps, "guidance_scale": scale} for steps in (1, 20) for scale in (1.0, 3.0)]


class TestHalving:
    def halve(self, quality, counts, noise):
        """The settings of each round by means of noisy samples, and how many samples were drawn of each setting."""
        rng, drawn = torch.Generator().manual_seed(0), [0] * len(quality)
        noises = noise * torch.randn(len(quality), max(counts), generator=rng, dtype=torch.float64)

        def score(kept, count):
            for setting in kept:
                drawn[setting] = count  # those of the rounds before are the first
            return [quality[setting] + noises[setting, :count].mean().item() for setting in kept]

        return halve(list(range(len(quality))), score, counts, 3), drawn

    @pytest.mark.parametrize("n", [1, 2, 3, 7, 24, 36])
    def test_the_winner_is_that_of_an_exhaustive_search(self, n):
        quality = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).tolist()
        rounds, drawn = self.halve(quality, [5000, 10000, 20000, 40000], noise=0.1)
        assert rounds[-1][0] == min(range(n), key=quality.__getitem__)
        sizes = [n, math.ceil(n / 2), math.ceil(math.ceil(n / 2) / 2)]
        assert [len(of_round) for of_round in rounds] == [*sizes, min(3, math.ceil(sizes[-1] / 2))]
        assert all(set(after) == set(before[: len(after)]) for before, after in itertools.pairwise(rounds))
        assert sum(drawn) == sum(
            count * (len(of_round) - len(after))
            for count, of_round, after in zip([5000, 10000, 20000, 40000], rounds, [*rounds[1:], []], strict=True)
        )

    def test_it_draws_less_than_half_and_finds_one_of_the_best_amid_noise(self):
        quality = [i / 24 for i in range(24)]
        rounds, drawn = self.halve(quality, [50, 100, 200, 400], noise=1.0)
        assert sum(drawn) == 12 * 50 + 6 * 100 + 3 * 200 + 3 * 400 < 24 * 400 / 2
        assert rounds[-1][0] < 5

    def test_what_cannot_be_scored_is_dropped(self):
        rounds = halve([1, 2, 3, 4], lambda kept, count: [math.inf if x < 4 else x for x in kept], [50, 100], 3)
        assert rounds == [[4], [4]]
        assert halve([1, 2], lambda kept, count: [math.inf] * len(kept), [50, 100], 3) == [[], []]


def test_of_settings_as_good_as_the_best_the_cheapest_is_chosen():
    def measured(passes, distance, apart, error=1.0):
        apart = Share(apart, 400, apart - 0.02, apart + 0.02)
        return {
            "forward_passes": passes,
            "kernel_distance": Estimate(distance, 400, distance - error, distance + error),
            "told_apart": apart,
        }

    best, cheaper = measured(100, 2.0, 0.6), measured(40, 2.9, 0.61)
    cheapest, worse = measured(10, 2.8, 0.7), measured(5, 3.1, 0.6)
    assert choose([best, cheaper, cheapest, worse]) == cheaper
    assert choose([best, cheapest, worse]) == best
    assert choose([best, worse]) == best
    assert choose([cheapest, worse]) == worse
    # Where nearly all are told, one image more decides nothing.
    nearly, each = (Share.of(torch.arange(800) >= missed) for missed in (1, 0))
    assert nearly.high < each.value
    told = [best | {"told_apart": nearly}, cheaper | {"told_apart": each}]
    assert choose(told) == told[1]


S = 0.3  # deviation of the pixels of a class


class GaussianDenoiser(ExactDenoiser, ConfigMixin):
    """The optimum of training where the pixels of class y are N(m_y, S²); those without a label have a Gaussian of the
    same mean and variance. Guidance makes the classes more extreme than they are: γ = 1 is best."""

    def forward(self, sample, timestep, class_labels=None):
        m, alpha_bar = self.x_0[class_labels], self.alpha_bar(timestep)
        is_null = (class_labels == self.config.num_classes)[:, None, None, None]
        variance = torch.where(is_null, S**2 + self.x_0[:2].var(unbiased=False), S**2)
        gain = alpha_bar.sqrt() * variance / (alpha_bar * variance + 1 - alpha_bar)
        return self.predict(sample, timestep, m + gain * (sample - alpha_bar.sqrt() * m))


class Pixels:
    """Pixels as features, of which the kernel distance sees means and covariances."""

    def features(self, images):
        return images.flatten(1)


@pytest.fixture(scope="module")
def gaussian():
    """A pipeline that draws its data exactly at γ = 1 and enough steps, and the data."""
    unet = GaussianDenoiser([[-0.3], [0.3], [0.0]], num_classes=2, sample_size=8)
    pipeline = ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)
    rng, labels = torch.Generator().manual_seed(0), torch.arange(400) % 2
    values = torch.tensor([-0.3, 0.3])[labels, None, None] + S * torch.randn(400, 8, 8, generator=rng)
    images = [Image.fromarray(x.numpy()) for x in ((values.clamp(-1, 1) + 1) * 127.5).round().byte()]
    parts = (slice(0, 300), slice(300, 400))
    names = {"label_names": ["dark", "bright"]}
    return pipeline, *(PictureDataset(images[part], "two", labels=labels[part], **names) for part in parts)


@pytest.fixture
def swept(gaussian, tmp_path):
    """A function that sweeps the settings of the pipeline in a folder, and the lines that it said."""
    pipeline, pictures, held_out = gaussian
    FeatureClassifier(1, 2).save(tmp_path / "features.safetensors")
    config = EvaluationConfig(features=str(tmp_path / "features.safetensors"))

    def run(settings=SETTINGS, count=100):
        said = []
        comparison = Comparison(pictures, held_out, True, tmp_path, config, said.append)
        comparison.network = Pixels()
        return sweep(Draws(pipeline, pictures, count, 10**6, tmp_path), settings, comparison, said.append), said

    return run


def test_a_sweep_finds_the_setting_that_is_best_by_construction_and_goes_on_where_it_was(swept, tmp_path, gaussian):
    asked = Draws(gaussian[0], gaussian[1], 100, 10**6, tmp_path)
    for setting, count in ((SETTINGS[0], 50), (SETTINGS[2], 100)):
        asked.draw(setting, count)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*.pt")}
    found, said = swept()
    assert found["chosen"] == {"num_inference_steps": 20, "guidance_scale": 1.0} and found["failed"] == {}
    assert [line for line in said if "sweep" in line] == [
        "sweep: round 1 of 2, 4 settings, 50 samples each",
        "sweep: round 2 of 2, 2 settings, 100 samples each",
    ]
    assert [(of_round["samples"], len(of_round["settings"])) for of_round in found["rounds"]] == [(50, 4), (100, 2)]
    for of_round in found["rounds"]:
        for setting in of_round["settings"]:
            assert setting["kernel_distance"].count == of_round["samples"]
            assert ("told_apart" in setting) == (of_round["samples"] == 100)
            passes = setting["num_inference_steps"] * (1 if setting["guidance_scale"] == 1 else 2)
            assert setting["forward_passes"] == passes
    assert len(times) == 3 and {file: file.stat().st_mtime_ns for file in times} == times
    assert len(list(tmp_path.glob("*/*.pt"))) == 4 + 2  # the second round has the samples of the first one
    first, all_of_them = (asked.draw(found["chosen"], count)["images"] for count in (50, 100))
    assert torch.equal(all_of_them[:50], first)


def test_settings_that_cannot_be_drawn_are_named(swept):
    settings = [SETTINGS[0], {"num_inference_steps": 1001, "guidance_scale": 1.0}]
    found, said = swept(settings, 50)
    reason = "num_inference_steps: 1001 must be within 1 ... 1000, the steps of training"
    assert found["failed"] == {"1001 steps, γ = 1": reason} and found["chosen"] == SETTINGS[0]
    assert "sweep: round 1 of 1, 2 settings, 50 samples each" in said
    assert sweep_table(found)[-1] == ["1001 steps, γ = 1", reason, "", ""]
    later = found | {
        "failed": found["failed"] | {setting_name(SETTINGS[0]): "not finite"}
    }  # after a round with measures
    assert [row[:2] for row in sweep_table(later)[1:]] == [
        ["1001 steps, γ = 1", reason],
        [setting_name(SETTINGS[0]), "not finite"],
    ]
    with pytest.raises(ValueError, match="^sweep: no setting can be drawn, such as 1001 steps, γ = 1; num_inference"):
        swept(settings[1:], 50)


def test_the_table_has_the_settings_that_stayed_longest_first():
    def of_round(count, *distances):
        measured = [
            {
                "num_inference_steps": steps,
                "forward_passes": steps,
                "kernel_distance": Estimate(x, count, x - 1, x + 1),
            }
            for steps, x in distances
        ]
        return {"samples": count, "settings": measured}

    found = {"rounds": [of_round(50, (10, 5.0), (20, 4.0), (50, 9.0)), of_round(100, (10, 3.0), (20, 6.0))]}
    found["failed"] = {}
    assert [x["num_inference_steps"] for x in last_measures(found)] == [10, 20, 50]
    assert [x["samples"] for x in last_measures(found)] == [100, 100, 50]
    assert sweep_table(found) == [
        ["", "50 samples", "100 samples", "told apart", "forward passes"],
        ["10 steps", "5 (4–6)", "3 (2–4)", "", "10"],
        ["20 steps", "4 (3–5)", "6 (5–7)", "", "20"],
        ["50 steps", "9 (8–10)", "", "", "50"],
    ]


class TestWhatIsTried:
    def settings(self, pipeline, **config):
        return EvaluationConfig(sweep=True, **config).settings_for(pipeline)

    def test_samplers_steps_and_guidance(self, gaussian):
        settings = self.settings(gaussian[0])
        assert {setting["sampler"] for setting in settings} == {
            "AncestralDDPMScheduler", "FewStepDDPMScheduler", "DPMSolverMultistepScheduler"}  # fmt: skip
        assert {setting["num_inference_steps"] for setting in settings} == {10, 20, 50}
        assert {setting["guidance_scale"] for setting in settings} == {1.0, 1.5, 2.0, 3.0}
        assert len({tuple(setting.items()) for setting in settings}) == len(settings) == 36

    def test_what_is_given_limits_it(self, gaussian):
        settings = self.settings(gaussian[0], samplers=["DDIMScheduler"], guidance_scales=[4.0])
        assert settings == [
            {"sampler": "DDIMScheduler", "num_inference_steps": steps, "guidance_scale": 4.0} for steps in (10, 20, 50)
        ]

    def test_the_defaults_of_the_checkpoint_are_among_it(self):
        defaults = {"arguments": {"num_inference_steps": 30, "guidance_scale": 1.25}}
        pipe = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler(), defaults=defaults)
        settings = self.settings(pipe)
        assert {setting["num_inference_steps"] for setting in settings} == {10, 20, 30, 50}
        assert {setting["guidance_scale"] for setting in settings} == {1.0, 1.25, 1.5, 2.0, 3.0}
        assert EvaluationConfig().settings_for(pipe) == [
            {"sampler": "AncestralDDPMScheduler", "num_inference_steps": 30}
        ]

    def test_without_guidance_none(self):
        settings = self.settings(UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler()))
        assert len(settings) == 9 and all(setting.keys() == {"sampler", "num_inference_steps"} for setting in settings)
