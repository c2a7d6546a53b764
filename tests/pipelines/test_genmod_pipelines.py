"""The pipelines draw what their equations say, each picture from its own seed, with any sampler."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    ModelMixin,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from PIL import Image
from tiny import (
    CAPTIONS,
    TINY_UNET,
    tiny_autoencoder,
    tiny_classifier,
    tiny_text_pipeline,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)
from tokenizers import processors
from transformers import CLIPTextModel, T5EncoderModel

from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel, DenoisingUNet2DOutput
from hf_genmod.models.image_autoencoder import Autoencoder, AutoencoderOutput, ImageLatentsOutput
from hf_genmod.models.noisy_classifier import NoisyImageClassifier, NoisyImageClassifierOutput
from hf_genmod.models.variational_autoencoder import VariationalAutoencoder
from hf_genmod.pipelines.autoencoder import AutoencoderPipeline
from hf_genmod.pipelines.classifier_free_guided import ClassifierFreeGuidedPipeline
from hf_genmod.pipelines.classifier_guided import ClassifierGuidedPipeline
from hf_genmod.pipelines.text_to_image import TextToImagePipeline
from hf_genmod.pipelines.unconditional import UnconditionalPipeline
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler
from hf_genmod.sharing.loading import load_pipeline

NAMES = {0: "cat", 1: "dog", 2: "lizard"}
SAMPLERS = {
    "Ancestral": (AncestralDDPMScheduler, {}),
    "DDPM": (DDPMScheduler, {}),
    "DDIM": (DDIMScheduler, {}),
    "DPM-Solver": (DPMSolverMultistepScheduler, {}),
    "Few-step DDPM": (FewStepDDPMScheduler, {}),
    "SDE-DPM-Solver": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "DPM-Solver singlestep": (DPMSolverSinglestepScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "Heun": (HeunDiscreteScheduler, {}),
    "PNDM": (PNDMScheduler, {}),
    "LMS": (LMSDiscreteScheduler, {}),
    "DEIS": (DEISMultistepScheduler, {}),
    "KDPM2": (KDPM2DiscreteScheduler, {}),
    "KDPM2 ancestral": (KDPM2AncestralDiscreteScheduler, {}),
}
STOCHASTIC = {"Ancestral", "DDPM", "Few-step DDPM", "SDE-DPM-Solver", "Euler ancestral", "KDPM2 ancestral"}
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # samplers of diffusers, thousands
needs_accelerator = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    """A name, and a function from the config of a scheduler to the sampler."""
    cls, options = SAMPLERS[request.param]
    return request.param, lambda config: cls.from_config(config, **options)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unconditional(unet=None, scheduler=None, vae=None, **kwargs):
    return quiet(UnconditionalPipeline(unet or tiny_unet(), scheduler or AncestralDDPMScheduler(), vae, **kwargs))


def guided(unet=None, scheduler=None, id2label=NAMES, **kwargs):
    unet = unet or tiny_unet(num_classes=3)
    scheduler = scheduler or AncestralDDPMScheduler()
    return quiet(ClassifierFreeGuidedPipeline(unet, scheduler, id2label=id2label, **kwargs))


def classifier_guided(unet=None, scheduler=None, classifier=None, id2label=NAMES, **kwargs):
    classifier, scheduler = classifier or tiny_classifier(), scheduler or AncestralDDPMScheduler()
    return quiet(ClassifierGuidedPipeline(unet or tiny_unet(), classifier, scheduler, id2label=id2label, **kwargs))


def draw(pipeline, *args, generator=None, num_inference_steps=4, output_type="latent", **kwargs):
    generator = seeded() if generator is None else generator
    return pipeline(
        *args, generator=generator, num_inference_steps=num_inference_steps, output_type=output_type, **kwargs
    ).images


class ExactDenoiser(ModelMixin, ConfigMixin):
    """The optimum of training where a class is a single point: x̂_0 is that point, at whatever x_t."""

    @register_to_config
    def __init__(self, points, prediction_type="epsilon", out_channels=None, num_classes=None, sample_size=4):
        super().__init__()
        self.x_0 = torch.nn.Parameter(torch.tensor(points)[..., None, None])  # (labels, channels, 1, 1)
        self.register_to_config(in_channels=self.x_0.shape[1])
        self.log_snr = torch.log(1 / AncestralDDPMScheduler().alphas_cumprod.double() - 1).neg()

    def alpha_bar(self, timestep):
        t = float(timestep)  # not whole where a sampler of the second order looks between two timesteps
        below, above = self.log_snr[int(t)], self.log_snr[min(int(t) + 1, 999)]
        return torch.lerp(below, above, t - int(t)).sigmoid().float()

    def forward(self, sample, timestep, class_labels=None):
        x_0 = self.x_0[0 if class_labels is None else class_labels].expand_as(sample)
        return self.predict(sample, timestep, x_0)

    def predict(self, sample, timestep, x_0):
        alpha_bar = self.alpha_bar(timestep)
        epsilon = (sample - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        velocity = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x_0
        prediction = {"epsilon": epsilon, "sample": x_0, "v_prediction": velocity}[self.config.prediction_type]
        if self.config.out_channels is not None:  # a learned variance
            prediction = torch.cat([prediction, torch.zeros_like(prediction)], dim=1)
        return DenoisingUNet2DOutput(sample=prediction)


class TestSamplers:
    @pytest.mark.parametrize(
        "prediction_type, variance, channels",
        [
            ("epsilon", "fixed", 1),
            ("epsilon", "learned", 3),
            ("epsilon", "learned", 4),
            ("v_prediction", "learned", 4),
        ],
    )
    def test_each_ends_at_the_only_picture_there_is(self, sampler, prediction_type, variance, channels):
        name, from_config = sampler
        point = [0.7, -0.2, 0.4, -0.6][:channels]
        learned = {"variance_type": "learned_range"} if variance == "learned" else {}
        unet = ExactDenoiser([point], prediction_type, out_channels=2 * channels if learned else None)
        training = AncestralDDPMScheduler(clip_sample=False, prediction_type=prediction_type, **learned)
        pictures = draw(unconditional(unet, from_config(training.config)), 2, num_inference_steps=20)
        # These two stop at timestep 0, where the noise that is left has a σ of 0.01.
        tolerance = 0.05 if name in ("PNDM", "DEIS") else 1e-5
        expected = unet.x_0.detach().expand_as(pictures)
        torch.testing.assert_close(pictures, expected, rtol=0, atol=tolerance)

    def test_the_network_first_sees_noise_of_deviation_one(self, sampler):
        _, from_config = sampler
        pipeline, seen = unconditional(ExactDenoiser([[0.5]], sample_size=64)), []
        pipeline.scheduler = from_config(pipeline.scheduler.config)
        pipeline.unet.register_forward_pre_hook(lambda unet, args: seen.append(args[0]))
        draw(pipeline, 1)
        assert seen[0].std().item() == pytest.approx(1, rel=0.05)

    def test_sampling_leaves_the_config_of_the_scheduler_alone(self, sampler):
        _, from_config = sampler
        config = AncestralDDPMScheduler(variance_type="learned_range").config
        pipeline = unconditional(tiny_unet(out_channels=6), from_config(config))
        before = dict(pipeline.scheduler.config)
        draw(pipeline, 1)
        assert dict(pipeline.scheduler.config) == before
        assert AncestralDDPMScheduler.from_config(pipeline.scheduler.config).config.variance_type == "learned_range"

    def test_noise_of_a_picture_is_bitwise_its_own(self, sampler):
        name, from_config = sampler
        unet = DenoisingUNet2DModel(**TINY_UNET)  # untrained, it predicts 0: only the noise is left
        pipeline = unconditional(unet, from_config(AncestralDDPMScheduler(clip_sample=False).config))
        together = draw(pipeline, 3, generator=[seeded(0), seeded(1), seeded(2)])
        for i in range(3):
            assert torch.equal(draw(pipeline, 1, generator=[seeded(i)]), together[i : i + 1])
        assert not torch.equal(together[0], together[1])

    def test_pictures_of_a_seed_agree_and_of_another_seed_do_not(self, sampler):
        _, from_config = sampler
        pipeline = unconditional(scheduler=from_config(AncestralDDPMScheduler().config))
        first = draw(pipeline, 2, generator=seeded(0))
        assert torch.equal(draw(pipeline, 2, generator=seeded(0)), first)
        assert not torch.allclose(draw(pipeline, 2, generator=seeded(1)), first)
        assert first.isfinite().all()

    def test_noise_within_the_chain_comes_from_the_generator(self, sampler):
        name, from_config = sampler
        pipeline = unconditional(scheduler=from_config(AncestralDDPMScheduler().config))
        x_T = torch.randn(1, 3, 8, 8, generator=seeded())
        first, second = (draw(pipeline, 1, latents=x_T, generator=seeded(i)) for i in range(2))
        assert torch.equal(first, second) == (name not in STOCHASTIC)

    @pytest.mark.parametrize(
        "name, steps", [("Ancestral", 1000), ("DDIM", 1000), ("DPM-Solver", 100), ("SDE-DPM-Solver", 100)]
    )
    def test_normal_data_come_out_with_their_mean_and_deviation(self, name, steps):
        mean, deviation = 0.3, 0.2

        class NormalDenoiser(ExactDenoiser):
            """x̂_0 = E[x_0 | x_t] for x_0 ~ N(mean, deviation²) in each pixel."""

            def forward(self, sample, timestep):
                alpha_bar = self.log_snr[int(timestep)].sigmoid().float()
                gain = alpha_bar.sqrt() * deviation**2 / (alpha_bar * deviation**2 + 1 - alpha_bar)
                return DenoisingUNet2DOutput(sample=mean + gain * (sample - alpha_bar.sqrt() * mean))

        cls, options = SAMPLERS[name]
        training = AncestralDDPMScheduler(
            clip_sample=False, prediction_type="sample", variance_type="fixed_large", timestep_spacing="trailing"
        )
        pipeline = unconditional(NormalDenoiser([[0.0]], sample_size=128), cls.from_config(training.config, **options))
        picture = draw(pipeline, 1, num_inference_steps=steps)
        assert picture.mean().item() == pytest.approx(mean, rel=0.02)
        assert picture.std().item() == pytest.approx(deviation, rel=0.02)


class TestSeeds:
    def test_a_seed_gives_the_first_picture_however_many_are_drawn(self):
        pipeline = unconditional()
        one = draw(pipeline, 1, generator=seeded(7))
        for n in (2, 4, 20):
            many = draw(pipeline, n, generator=seeded(7))
            torch.testing.assert_close(many[:1], one, rtol=1e-4, atol=1e-4)

    def test_pixels_of_a_picture_do_not_depend_on_the_batch(self):
        pipeline = guided()
        generators = lambda: [seeded(i) for i in range(4)]  # noqa: E731
        together = draw(pipeline, [0, 1, 2, 1], generator=generators(), output_type="pt")
        for i, label in enumerate([0, 1, 2, 1]):
            alone = draw(pipeline, label, generator=generators()[i : i + 1], output_type="pt")
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)

    def test_one_generator_goes_on_from_call_to_call(self):
        pipeline, generator = unconditional(), seeded()
        assert not torch.allclose(draw(pipeline, 1, generator=generator), draw(pipeline, 1, generator=generator))

    def test_without_a_generator_the_seed_of_torch_counts(self):
        pipeline = unconditional()

        def picture(seed):
            torch.manual_seed(seed)
            return pipeline(num_inference_steps=2, output_type="latent").images

        assert torch.equal(picture(0), picture(0))
        assert not torch.allclose(picture(0), picture(1))

    @pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
    def test_latents_take_the_place_of_the_noise(self, scheduler):
        pipeline = unconditional(scheduler=scheduler.from_config(AncestralDDPMScheduler().config))
        noise = torch.stack([torch.randn(3, 8, 8, generator=seeded(i)) for i in range(2)])
        expected = draw(pipeline, 2, generator=[seeded(0), seeded(1)])
        assert torch.equal(draw(pipeline, 2, latents=noise), expected)

    def test_latents_may_have_another_size(self):
        assert draw(unconditional(), 2, latents=torch.zeros(2, 3, 16, 12)).shape == (2, 3, 16, 12)


class TestGuidance:
    STEPS = 4

    @pytest.fixture
    def pipeline(self):
        return guided()

    @pytest.fixture
    def passes(self, pipeline):
        """The batch size of each forward pass of the U-Net."""
        sizes = []
        pipeline.unet.register_forward_pre_hook(lambda unet, args: sizes.append(len(args[0])))
        return sizes

    def guided_by_hand(self, pipeline, labels, gamma):
        """The same pictures from a plain loop; gamma is a function of the timestep."""
        unet, scheduler = pipeline.unet, AncestralDDPMScheduler.from_config(pipeline.scheduler.config)
        generators = [seeded(i) for i in range(len(labels))]
        x_t = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generators])
        scheduler.set_timesteps(self.STEPS)
        y, null = torch.tensor(labels), torch.full((len(labels),), unet.null_label)
        for t in scheduler.timesteps:
            with torch.no_grad():
                eps_y, eps_null = unet(x_t, t, y).sample, unet(x_t, t, null).sample
                if gamma(t) not in (0, 1):  # one batch of 4 rounds otherwise than two of 2, which γ would multiply
                    eps_y, eps_null = unet(torch.cat([x_t, x_t]), t, torch.cat([y, null])).sample.chunk(2)
            if gamma(t) == 1:
                eps = eps_y
            elif gamma(t) == 0:
                eps = eps_null
            else:
                eps = eps_null + gamma(t) * (eps_y - eps_null)
            x_t = scheduler.step(eps, t, x_t, generator=generators).prev_sample
        return x_t

    def draw(self, pipeline, labels, **kwargs):
        generators = [seeded(i) for i in range(len(labels))]
        return draw(pipeline, labels, generator=generators, num_inference_steps=self.STEPS, **kwargs)

    @pytest.mark.parametrize("gamma", [0, 1, 0.0, 1.0])
    def test_off_is_bitwise_the_one_model_in_one_pass(self, pipeline, passes, gamma):
        pictures = self.draw(pipeline, [0, 2], guidance_scale=gamma)
        assert passes == [2] * self.STEPS
        assert torch.equal(pictures, self.guided_by_hand(pipeline, [0, 2], lambda t: gamma))

    @pytest.mark.parametrize("gamma", [-1.0, 0.5, 2.0, 7.5])
    def test_on_is_the_formula_in_one_pass_of_twice_the_batch(self, pipeline, passes, gamma):
        pictures = self.draw(pipeline, [0, 2], guidance_scale=gamma)
        assert passes == [4] * self.STEPS
        expected = self.guided_by_hand(pipeline, [0, 2], lambda t: gamma)
        torch.testing.assert_close(pictures, expected, rtol=1e-4, atol=1e-4)

    def test_strength_changes_the_picture(self, pipeline):
        weak, strong = (self.draw(pipeline, [0, 2], guidance_scale=gamma) for gamma in (1.5, 4.0))
        assert (weak - strong).abs().mean() > 0.01

    @pytest.mark.parametrize("first, last, scales", [(1, 2, [4, 4]), (0, 3, [4] * 4), (3, 3, [4]), (0, 0, [4])])
    def test_interval_limits_guidance_to_its_noise_levels(self, pipeline, passes, first, last, scales):
        pipeline.scheduler.set_timesteps(self.STEPS)
        timesteps = pipeline.scheduler.timesteps.tolist()
        alpha_bar = pipeline.scheduler.alphas_cumprod[timesteps].double()
        sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().tolist()  # falling
        interval = (sigmas[last] * 0.999, sigmas[first] * 1.001)
        inside = set(timesteps[first : last + 1])
        pictures = self.draw(pipeline, [0, 2], guidance_scale=3.0, guidance_interval=interval)
        assert passes == [4 if t in inside else 2 for t in timesteps]
        expected = self.guided_by_hand(pipeline, [0, 2], lambda t: 3.0 if int(t) in inside else 1.0)
        torch.testing.assert_close(pictures, expected, rtol=1e-4, atol=1e-4)

    def test_an_interval_beyond_all_noise_levels_guides_nothing(self, pipeline, passes):
        pictures = self.draw(pipeline, [0, 2], guidance_scale=3.0, guidance_interval=(1e6, float("inf")))
        assert passes == [2] * self.STEPS
        assert torch.equal(pictures, self.draw(pipeline, [0, 2], guidance_scale=1.0))

    @pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 3.0])
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_moves_the_picture_from_the_null_point_through_that_of_the_class(self, prediction_type, gamma):
        unet = ExactDenoiser([[0.1, 0.2], [-0.3, 0.1], [0.05, -0.1]], prediction_type, num_classes=2)
        scheduler = AncestralDDPMScheduler(clip_sample=False, prediction_type=prediction_type)
        pipeline = guided(unet, scheduler, id2label=None)
        pictures = draw(pipeline, [0, 1], guidance_scale=gamma, num_inference_steps=10)
        null = unet.x_0[2]
        expected = (null + gamma * (unet.x_0[:2] - null)).detach().expand_as(pictures)
        torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-5)

    def test_a_label_of_weight_one_is_bitwise_the_label(self, pipeline, passes):
        for gamma in (1.0, 2.5):
            expected = self.draw(pipeline, ["cat", 2], guidance_scale=gamma)
            passes_before = passes.copy()
            passes.clear()
            composed = self.draw(pipeline, [{"cat": 1.0}, {"lizard": 0.5, 2: 0.5}], guidance_scale=gamma)
            assert torch.equal(composed, expected)
            assert passes == passes_before
            passes.clear()

    @pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
    def test_toward_one_label_and_away_from_another_is_the_sum_of_their_directions(self, gamma):
        unet = ExactDenoiser([[0.1, 0.2], [-0.3, 0.1], [0.05, -0.1]], num_classes=2)
        pipeline = guided(unet, AncestralDDPMScheduler(clip_sample=False), id2label={0: "cat", 1: "dog"})
        request = [{"cat": 1.0, "dog": -0.5}, "dog", {"dog": 0.25, "cat": 0.25}]
        pictures = draw(pipeline, request, guidance_scale=gamma, num_inference_steps=10)
        weights = torch.tensor([[1.0, -0.5], [0.0, 1.0], [0.25, 0.25]])
        null, points = unet.x_0[2], unet.x_0[:2]
        expected = null + gamma * (weights @ (points - null).flatten(1))[:, :, None, None]
        torch.testing.assert_close(pictures, expected.detach().expand_as(pictures), rtol=0, atol=1e-5)

    def test_learned_variance_of_several_labels_is_the_mean_of_theirs_by_weight(self):
        process = AncestralDDPMScheduler(variance_type="learned_range")
        pipeline = guided(tiny_unet(num_classes=3, out_channels=6), process)
        x_t, t = torch.randn(2, 3, 8, 8, generator=seeded()), torch.tensor(500)
        weights = torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 2.0]])
        with torch.no_grad():
            both = pipeline._classifier_free_guidance(x_t, t, weights, 3.0)
            cat, dog, lizard = (pipeline.unet(x_t, t, torch.full((2,), label)).sample[:, 3:] for label in range(3))
        expected = torch.stack([(2 * cat[0] + dog[0]) / 3, lizard[1]])
        torch.testing.assert_close(both[:, 3:], expected, rtol=1e-4, atol=1e-5)

    def test_learned_variance_stays_that_of_the_class(self):
        unet = tiny_unet(num_classes=3, out_channels=6)
        pipeline = guided(unet, AncestralDDPMScheduler(variance_type="learned_range", clip_sample=False))
        x_T = torch.randn(1, 3, 8, 8, generator=seeded())
        pipeline.scheduler.set_timesteps(2)
        t = pipeline.scheduler.timesteps[0]
        with torch.no_grad():
            y, null = (unet(x_T, t, torch.tensor([label])).sample for label in (1, 3))
        prediction = torch.cat([null[:, :3] + 3.0 * (y[:, :3] - null[:, :3]), y[:, 3:]], dim=1)
        expected = pipeline.scheduler.step(prediction, t, x_T, generator=seeded(5)).prev_sample
        states = []
        callback = lambda pipe, step, t, tensors: states.append(tensors["latents"])  # noqa: E731
        arguments = {"latents": x_T, "generator": [seeded(5)], "callback_on_step_end": callback}
        draw(pipeline, 1, guidance_scale=3.0, num_inference_steps=2, **arguments)
        torch.testing.assert_close(states[0], expected, rtol=1e-4, atol=1e-4)


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
        assert torch.equal(several, repeated)

    def test_prompts_may_be_encoded_before(self, pipeline):
        embeds, mask = pipeline.encode_prompt(self.PROMPTS)
        negative, negative_mask = pipeline.encode_prompt("two lizards")
        given = self.draw(
            pipeline, None, range(2), prompt_embeds=embeds, prompt_attention_mask=mask,
            negative_prompt_embeds=negative, negative_prompt_attention_mask=negative_mask,
        )  # fmt: skip
        assert torch.equal(given, self.draw(pipeline, self.PROMPTS, negative_prompt="two lizards"))

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
            ({"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 16)}, "prompt: give .*, and not both"),
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


class ExactClassifier(NoisyImageClassifier):
    """Bayes' rule where a class is a single point: log f(k | x_t) = −‖x_t − √ᾱ x_0^k‖² / 2(1−ᾱ) but for a constant."""

    def __init__(self, denoiser):
        super().__init__(**TINY_UNET, num_classes=len(denoiser.x_0))
        config = denoiser.config
        self.register_to_config(sample_size=config.sample_size, in_channels=config.in_channels)
        self.register_to_config(noise_schedule=dict(AncestralDDPMScheduler().config))
        self.denoiser = denoiser

    def forward(self, sample, timestep):
        alpha_bar = self.denoiser.alpha_bar(timestep)
        distance = sample[:, None] - alpha_bar.sqrt() * self.denoiser.x_0.detach()
        logits = -distance.square().sum(dim=(2, 3, 4)) / (2 * (1 - alpha_bar))
        return NoisyImageClassifierOutput(logits=logits)


class MixtureDenoiser(ExactDenoiser):
    """The optimum of training without labels on the points: x̂_0 is their mean, weighted by how likely each is."""

    def forward(self, sample, timestep):
        likelihood = ExactClassifier(self)(sample, timestep).logits.softmax(dim=1)
        x_0 = (likelihood @ self.x_0.flatten(1))[:, :, None, None].expand_as(sample)
        return self.predict(sample, timestep, x_0)


class TestClassifierGuidance:
    STEPS = 4

    @pytest.fixture
    def passes(self):
        """Counts forward passes of a model."""

        def count(model):
            sizes = []
            model.register_forward_pre_hook(lambda model, args: sizes.append(len(args[0])))
            return sizes

        return count

    @pytest.mark.parametrize("name", ["Ancestral", "SDE-DPM-Solver", "Euler"])
    @pytest.mark.parametrize("form", ["noise", "mean"])
    def test_off_is_bitwise_the_unguided_model_and_runs_no_classifier(self, name, form, passes):
        if form == "mean" and name != "Ancestral":
            pytest.skip("the mean form is for ancestral sampling")
        cls, options = SAMPLERS[name]
        scheduler = cls.from_config(AncestralDDPMScheduler().config, **options)
        pipeline = classifier_guided(scheduler=scheduler)
        runs = passes(pipeline.classifier)
        pictures = draw(pipeline, [0, 2], classifier_scale=0, guidance_form=form)
        assert runs == []
        assert torch.equal(pictures, draw(unconditional(scheduler=scheduler), 2))
        arguments = {"guidance_form": form, "guidance_interval": (0, float("inf"))}
        assert (draw(pipeline, [0, 2], classifier_scale=20.0, **arguments) - pictures).abs().max() > 0.01
        assert runs == [2] * self.STEPS

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_at_one_an_exact_classifier_makes_an_exact_model_that_of_the_class(self, sampler, prediction_type):
        # Bayes: ∇ log p(x_t | y) = ∇ log p(x_t) + ∇ log p(y | x_t), at every step of every sampler.
        name, from_config = sampler
        if prediction_type == "sample" and name in ("Euler ancestral", "PNDM", "KDPM2", "KDPM2 ancestral"):
            pytest.skip("diffusers has no such prediction for this sampler")
        points = [[0.4, -0.3], [-0.2, 0.1], [0.1, 0.5]]
        training = AncestralDDPMScheduler(clip_sample=False, prediction_type=prediction_type)
        unet = MixtureDenoiser(points, prediction_type)
        pipeline = classifier_guided(unet, from_config(training.config), ExactClassifier(unet))
        single = unconditional(ExactDenoiser([points[2]], prediction_type), from_config(training.config))
        guided_states, states = [], []
        exact = {"classifier_scale": 1.0, "guidance_interval": (0, float("inf"))}
        for pipe, request, seen in (
            (pipeline, {"class_labels": "lizard", **exact}, guided_states),
            (single, {}, states),
        ):
            callback = lambda pipe, i, t, tensors, seen=seen: seen.append(tensors["latents"])  # noqa: E731
            draw(pipe, num_inference_steps=10, callback_on_step_end=callback, **request)
        assert len(states) >= 10
        for guided_state, state in zip(guided_states, states, strict=True):
            torch.testing.assert_close(guided_state, state, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    @pytest.mark.parametrize("num_inference_steps", [4, 50])
    def test_the_forms_shift_the_mean_by_amounts_in_the_ratio_of_the_algebra(
        self, prediction_type, num_inference_steps
    ):
        scheduler = AncestralDDPMScheduler(
            clip_sample=False, variance_type="fixed_large", prediction_type=prediction_type
        )
        pipeline = classifier_guided(scheduler=scheduler)
        x_t = torch.randn(2, 3, 8, 8, generator=seeded())
        means = {}
        for form, scale in (("noise", 0.0), ("noise", 1e5), ("mean", 1e5)):
            seen = means[form, scale] = []

            def callback(pipe, i, t, tensors, seen=seen):
                seen.append(tensors["latents"])
                return {"latents": x_t}  # so that every step starts from the same x_t

            draw(
                pipeline,
                [0, 2],
                classifier_scale=scale,
                guidance_form=form,
                guidance_interval=(0, float("inf")),
                latents=x_t,
                num_inference_steps=num_inference_steps,
                callback_on_step_end=callback,
            )
        alpha_bar, timesteps = scheduler.alphas_cumprod, scheduler.timesteps.tolist()
        for i, t in enumerate(timesteps):
            alpha_bar_prev = alpha_bar[timesteps[i + 1]] if i + 1 < len(timesteps) else 1.0
            alpha_t = alpha_bar[t] / alpha_bar_prev
            unguided = means["noise", 0.0][i]
            by_noise, by_mean = (means[form, 1e5][i] - unguided for form in ("noise", "mean"))
            assert by_mean.abs().max() > 0.05
            torch.testing.assert_close(by_noise, by_mean / alpha_t.sqrt(), rtol=1e-3, atol=1e-4)

    def test_mean_form_is_the_equation_with_a_learned_variance_too(self):
        unet = tiny_unet(out_channels=6)
        pipeline = classifier_guided(unet, AncestralDDPMScheduler(variance_type="learned_range"))
        scheduler, states = pipeline.scheduler, []
        x_T = torch.randn(1, 3, 8, 8, generator=seeded())
        scheduler.set_timesteps(2)
        t, prev_t = scheduler.timesteps.tolist()
        x = x_T.clone().requires_grad_()
        (g,) = torch.autograd.grad(pipeline.classifier(x, t).logits.log_softmax(dim=1)[0, 1], x)
        with torch.no_grad():
            output = unet(x_T, t).sample
        variance = scheduler.reverse_log_variance(t, x_T, prev_t, output[:, 3:]).exp()
        expected = scheduler.step(output, t, x_T, generator=seeded(5)).prev_sample + 30.0 * variance * g
        callback = lambda pipe, step, t, tensors: states.append(tensors["latents"])  # noqa: E731
        arguments = {"latents": x_T, "generator": [seeded(5)], "callback_on_step_end": callback}
        draw(pipeline, 1, classifier_scale=30.0, guidance_form="mean", num_inference_steps=2, **arguments)
        torch.testing.assert_close(states[0], expected)

    def test_gradient_is_the_difference_quotient_of_the_weighted_sum(self):
        pipeline = classifier_guided()
        classifier = pipeline.classifier.double()
        x_t, direction = (torch.randn(2, 3, 8, 8, generator=seeded(i)).double() for i in range(2))
        weights = torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 1.0]]).double()
        t, h = torch.tensor(300), 1e-5

        def log_f(x):
            with torch.no_grad():
                return (weights * classifier(x, t).logits.log_softmax(dim=1)).sum(dim=1)

        expected = (log_f(x_t + h * direction) - log_f(x_t - h * direction)) / (2 * h)
        gradient = pipeline._classifier_gradient(x_t, t, weights)
        torch.testing.assert_close((gradient * direction).flatten(1).sum(dim=1), expected, rtol=1e-6, atol=1e-9)
        assert expected.abs().min() > 1e-4

    @pytest.mark.parametrize("form", ["noise", "mean"])
    def test_a_picture_does_not_depend_on_its_neighbours(self, form):
        pipeline, arguments = classifier_guided(), {"classifier_scale": 20.0, "guidance_form": form}
        requests = ["cat", {"dog": 1.0, "cat": -0.5}, 2]
        together = draw(pipeline, requests, generator=[seeded(i) for i in range(3)], **arguments)
        for i, request in enumerate(requests):
            alone = draw(pipeline, request, generator=[seeded(i)], **arguments)
            torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-3)

    def test_weights_of_labels_weigh_their_gradients(self):
        pipeline = classifier_guided(scheduler=AncestralDDPMScheduler(clip_sample=False))
        x_T = torch.randn(1, 3, 8, 8, generator=seeded())

        def first(request, scale=30.0):
            states = []
            callback = lambda pipe, step, t, tensors: states.append(tensors["latents"])  # noqa: E731
            draw(pipeline, request, classifier_scale=scale, latents=x_T, callback_on_step_end=callback)
            return states[0]

        unguided = first(0, scale=0)
        cat, dog = (first(name) - unguided for name in ("cat", "dog"))
        composed = first({"cat": 1.0, "dog": -0.5}) - unguided
        torch.testing.assert_close(composed, cat - 0.5 * dog, rtol=1e-3, atol=1e-4)
        assert torch.equal(first({"cat": 1.0}), first("cat"))

    def test_pure_noise_is_not_guided(self, passes):
        scheduler = AncestralDDPMScheduler(
            rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
        )
        pipeline = classifier_guided(
            scheduler=scheduler, classifier=tiny_classifier(noise_schedule=dict(scheduler.config))
        )
        assert scheduler.alphas_cumprod[-1] == 0
        runs = passes(pipeline.classifier)
        for form in ("noise", "mean"):
            arguments = {"guidance_form": form, "guidance_interval": (0, float("inf"))}
            assert draw(pipeline, [0, 2], **arguments).isfinite().all()
            assert runs == [2] * (self.STEPS - 1)
            runs.clear()

    def test_by_default_hopeless_noise_is_not_guided(self, passes):
        # The process and sampler of the training examples, whose first steps have a σ of thousands.
        process = AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
        sampler = DPMSolverMultistepScheduler.from_config(
            process.config, algorithm_type="sde-dpmsolver++", use_lu_lambdas=True, thresholding=True
        )
        pipeline = classifier_guided(
            scheduler=sampler, classifier=tiny_classifier(noise_schedule=dict(process.config))
        )
        runs = passes(pipeline.classifier)
        pictures = draw(pipeline, [0, 2], num_inference_steps=10, classifier_scale=20.0)
        sampler.set_timesteps(10)
        assert len(runs) == (sampler.sigmas[:10] <= 20).sum() > 0
        assert sampler.sigmas[0] > 1000
        unguided = draw(pipeline, [0, 2], num_inference_steps=10, classifier_scale=0)
        assert 0.01 < (pictures - unguided).abs().max() < 2

    @pytest.mark.parametrize("clipping", [{"clip_sample": True}, {"clip_sample": False, "thresholding": True}])
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_clipping_comes_before_guidance(self, prediction_type, clipping):
        process = AncestralDDPMScheduler(prediction_type=prediction_type, **clipping)
        pipeline, states, s = classifier_guided(scheduler=process), [], 300.0
        x_T = torch.randn(1, 3, 8, 8, generator=seeded())
        process.set_timesteps(4)
        t, prev_t = process.timesteps.tolist()[:2]
        g = pipeline._classifier_gradient(x_T, torch.tensor(t), torch.tensor([[0.0, 1.0, 0.0]]))
        with torch.no_grad():
            unguided = process.predict_original_sample(pipeline.unet(x_T, t).sample, t, x_T, clip=True)
        assert unguided.abs().max() == 1  # it was clipped
        alpha_bar = process.alphas_cumprod[t]
        x_0 = unguided + s * (1 - alpha_bar) / alpha_bar.sqrt() * g
        assert x_0.abs().max() > 1.1  # and is not clipped again
        noise = process.step(torch.zeros_like(x_T), t, x_T, generator=seeded(5)).prev_sample
        noise = noise - process.posterior_mean(
            process.predict_original_sample(torch.zeros_like(x_T), t, x_T, clip=True), t, x_T, prev_t
        )
        expected = process.posterior_mean(x_0, t, x_T, prev_t) + noise
        callback = lambda pipe, step, t, tensors: states.append(tensors["latents"])  # noqa: E731
        arguments = {"latents": x_T, "generator": [seeded(5)], "callback_on_step_end": callback}
        draw(pipeline, 1, classifier_scale=s, **arguments)
        torch.testing.assert_close(states[0], expected, rtol=1e-4, atol=1e-4)
        assert process.config.clip_sample == clipping["clip_sample"]

    def test_a_little_guidance_changes_a_picture_a_little(self, sampler):
        name, from_config = sampler
        # Where it clips, DDIM of diffusers goes on from the noise that belongs to x̂_0 before it was clipped.
        config = AncestralDDPMScheduler(clip_sample=name != "DDIM").config
        pipeline = classifier_guided(scheduler=from_config(config))
        unguided, guided = (draw(pipeline, [0, 2], classifier_scale=s) for s in (0, 1e-6))
        torch.testing.assert_close(guided, unguided, rtol=1e-3, atol=1e-3)

    def test_interval_limits_guidance_to_its_noise_levels(self, passes):
        pipeline = classifier_guided()
        pipeline.scheduler.set_timesteps(self.STEPS)
        alpha_bar = pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps].double()
        sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().tolist()
        runs = passes(pipeline.classifier)
        draw(pipeline, [0, 2], guidance_interval=(sigmas[2] * 0.999, sigmas[1] * 1.001))
        assert runs == [2, 2]

    def test_a_model_with_labels_is_told_them_too(self):
        unet = tiny_unet(num_classes=3)
        pipeline, plain = classifier_guided(unet), guided(unet)
        for gamma in (0.0, 1.0, 2.5):
            expected = draw(plain, [0, 2], guidance_scale=gamma)
            assert torch.equal(draw(pipeline, [0, 2], classifier_scale=0, guidance_scale=gamma), expected)
            both = draw(pipeline, [0, 2], classifier_scale=20.0, guidance_scale=gamma)
            assert (both - expected).abs().max() > 0.01

    def test_is_the_same_in_an_inference_mode_and_leaves_no_graph(self):
        pipeline = classifier_guided()
        expected = draw(pipeline, [0, 2], classifier_scale=5.0)
        assert not expected.requires_grad
        assert all(parameter.grad is None for parameter in pipeline.classifier.parameters())
        with torch.inference_mode():
            assert torch.equal(draw(pipeline, [0, 2], classifier_scale=5.0), expected)

    def test_keeps_no_graph_of_the_unet(self):
        pipeline, kept = classifier_guided(), []
        pipeline.unet.register_forward_hook(lambda unet, args, output: kept.append(output.sample.requires_grad))
        draw(pipeline, [0, 2], classifier_scale=5.0)
        assert kept == [False] * self.STEPS

    def test_in_latent_space_the_classifier_sees_latents(self):
        unet, classifier = tiny_unet(in_channels=4, out_channels=4), tiny_classifier(in_channels=4)
        vae = tiny_vae(latent_channels=4)
        pipeline = classifier_guided(unet, AncestralDDPMScheduler(clip_sample=False), classifier, vae=vae)
        seen = []
        pipeline.classifier.register_forward_pre_hook(lambda classifier, args: seen.append(args[0].shape))
        guided = draw(pipeline, [0, 2], output_type="pt", classifier_scale=20.0)
        assert guided.shape == (2, 3, 16, 16) and set(seen) == {(2, 4, 8, 8)}
        assert not torch.equal(guided, draw(pipeline, [0, 2], output_type="pt", classifier_scale=0))

    def test_in_half_precision_the_picture_is_nearly_the_same(self):
        pipeline = classifier_guided()
        expected = draw(pipeline, [0, 2], classifier_scale=5.0)
        pictures = draw(pipeline.to(torch.bfloat16), [0, 2], classifier_scale=5.0)
        assert 0 < (pictures - expected).abs().mean() < 0.05

    def test_models_under_hooks_draw_the_same(self):
        pipeline = classifier_guided()
        expected = draw(pipeline, [0, 2], classifier_scale=5.0)
        pipeline.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert torch.equal(draw(pipeline, [0, 2], classifier_scale=5.0), expected)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"sample_size": 16}, "classifier: its sample_size is 16 and that of the U-Net 8; train one for this"),
            ({"in_channels": 1}, "classifier: its in_channels is 1 and that of the U-Net 3; train one for this"),
            ({"noise_schedule": None}, "classifier: its config has no noise_schedule, so nobody knows which noise"),
            ({"noise_schedule": {"beta_schedule": "squaredcos_cap_v2"}}, "classifier: it was trained on the noise of"),
            ({"noise_schedule": {"beta_end": 0.012}}, "classifier: it was trained on the noise of another schedule"),
            ({"noise_schedule": {"num_train_timesteps": 500}}, "classifier: it was trained on the noise of another"),
        ],
    )
    def test_a_classifier_of_something_else_is_refused(self, changes, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            classifier_guided(classifier=tiny_classifier(**changes))

    def test_a_classifier_of_other_labels_is_refused(self):
        with pytest.raises(ValueError, match="classifier: it has 3 classes and the U-Net 5; train one for this model"):
            classifier_guided(tiny_unet(num_classes=5))

    def test_a_sampler_that_does_not_tell_its_noise_is_for_unguided_pictures_only(self):
        sampler = IPNDMScheduler.from_config(AncestralDDPMScheduler().config)
        assert draw(unconditional(scheduler=sampler), 1).isfinite().all()
        with pytest.raises(ValueError, match="scheduler: IPNDMScheduler does not tell its noise levels; use another"):
            classifier_guided(scheduler=sampler)

    def test_a_sampler_of_another_process_is_refused_later_too(self):
        pipeline = classifier_guided()
        pipeline.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
        with pytest.raises(ValueError, match="classifier: it was trained on the noise of another schedule"):
            draw(pipeline, 0)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"class_labels": 3}, "class_labels: 3 is not a label of this model; give a whole number from 0 to 2"),
            ({"class_labels": "catt"}, "did you mean 'cat'?"),
            ({"guidance_form": "score"}, "guidance_form: 'score' is not one of 'noise', 'mean'"),
            ({"guidance_scale": 2.0}, "guidance_scale: 2.0 is for a U-Net with labels, and this one has none"),
            ({"guidance_interval": (2.0, 1.0)}, "guidance_interval: (2.0, 1.0) is not (low, high)"),
            ({"classifier_scale": 1e39}, "is not finite; lower classifier_scale or guidance_scale"),
            (
                {"classifier_scale": 1e39, "guidance_form": "mean"},
                "is not finite; lower classifier_scale or guidance_scale",
            ),
            ({"classifier_scale": float("nan")}, "classifier_scale: nan is not a finite number"),
            ({"classifier_scale": "2"}, "classifier_scale: '2' is not a finite number"),
            ({"classifier_scale": None}, "classifier_scale: None is not a finite number"),
            ({"guidance_scale": float("inf")}, "guidance_scale: inf is not a finite number"),
            ({"guidance_interval": ("a", "b")}, "guidance_interval: ('a', 'b') is not (low, high)"),
            ({"guidance_interval": (float("nan"), 1.0)}, "guidance_interval: (nan, 1.0) is not (low, high)"),
        ],
    )
    def test_errors_of_a_request(self, arguments, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            draw(classifier_guided(), **({"class_labels": 0} | arguments))

    @pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, FewStepDDPMScheduler])
    def test_mean_form_wants_algorithm_2(self, scheduler):
        pipeline = classifier_guided(scheduler=scheduler.from_config(AncestralDDPMScheduler().config))
        message = f"guidance_form: 'mean' is for Algorithm 2, not for {scheduler.__name__}; use 'noise', or set"
        with pytest.raises(ValueError, match=message):
            draw(pipeline, 0, guidance_form="mean")


class TestLabels:
    @pytest.fixture
    def pipeline(self):
        return guided()

    @pytest.mark.parametrize(
        "label",
        [
            "dog",
            1,
            ["dog"],
            [1],
            ("dog",),
            torch.tensor(1),
            torch.tensor([1]),
            np.int64(1),
            np.array([1]),
            [np.int64(1)],
        ],
        ids=repr,
    )
    def test_a_class_has_many_names(self, pipeline, label):
        assert torch.equal(draw(pipeline, label), draw(pipeline, [1]))

    def test_one_label_for_each_picture_in_order(self, pipeline):
        mixed = draw(pipeline, ["cat", 2, "dog"], generator=[seeded(i) for i in range(3)])
        numbers = draw(pipeline, torch.tensor([0, 2, 1]), generator=[seeded(i) for i in range(3)])
        assert torch.equal(mixed, numbers)
        assert len(mixed) == 3

    def test_names_are_a_dictionary_to_numbers(self, pipeline):
        assert pipeline.labels == {"cat": 0, "dog": 1, "lizard": 2}
        assert guided(id2label={"0": "cat", "1": "dog"}).labels == {"cat": 0, "dog": 1}
        assert guided(id2label=None).labels == {}

    @pytest.mark.parametrize(
        "label, message",
        [
            ("catt", "class_labels: 'catt' is not one of the 3 labels of this model; did you mean 'cat'?"),
            (
                "xylophone",
                "class_labels: 'xylophone' is not one of the 3 labels of this model; `pipe.labels` lists them",
            ),
            (
                3,
                "class_labels: 3 is not a label of this model; give a whole number from 0 to 2 or a name from `pipe.l",
            ),
            (-1, "class_labels: -1 is not a label of this model; give a whole number from 0 to 2"),
            ([0, 5], "class_labels: 5 is not a label"),
            (True, "class_labels: True is not a label"),
            (1.0, "class_labels: 1.0 is not a label"),
            (torch.tensor([0.5]), "class_labels: 0.5 is not a label"),
            (None, "class_labels: None is not a label"),
            ([], "class_labels: there are none; give one for each picture"),
            ({"catt": 1.0}, "class_labels: 'catt' is not one of the 3 labels of this model; did you mean 'cat'?"),
            ({"cat": "1"}, "class_labels: the weight '1' of 'cat' is not a finite number"),
            ({"cat": float("nan")}, "class_labels: the weight nan of 'cat' is not a finite number"),
            ({"cat": 1e300}, "class_labels: the weights {'cat': 1e+300} are too large"),
            ({"cat": 0.0}, "class_labels: {'cat': 0.0} gives no label a weight"),
            ({}, "class_labels: {} gives no label a weight"),
        ],
    )
    def test_what_is_no_label_is_named(self, pipeline, label, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            draw(pipeline, label)

    def test_a_model_without_names_wants_numbers(self):
        pipeline = guided(id2label=None)
        with pytest.raises(ValueError, match="'cat' .* it has no names, so give numbers from 0 to 2"):
            draw(pipeline, "cat")
        with pytest.raises(ValueError, match="give a whole number from 0 to 2$"):
            draw(pipeline, 3)


class TestOutput:
    @pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
    def test_every_type_holds_the_same_picture(self, channels, mode):
        pipeline = unconditional(tiny_unet(in_channels=channels, out_channels=channels, sample_size=(8, 16)))
        latent, pt, array, pil = (draw(pipeline, 2, output_type=kind) for kind in ("latent", "pt", "np", "pil"))
        assert latent.shape == (2, channels, 8, 16)
        assert torch.equal(pt, (latent / 2 + 0.5).clamp(0, 1))
        assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
        assert all(isinstance(image, Image.Image) and image.mode == mode and image.size == (16, 8) for image in pil)
        pixels = np.stack([np.asarray(image).reshape(8, 16, channels) for image in pil])
        assert np.array_equal(pixels, (array * 255).round())

    @pytest.mark.parametrize("make", [unconditional, guided])
    def test_measured_values_come_in_their_own_units_from_a_checkpoint_too(self, make, tmp_path):
        unet = tiny_unet(in_channels=5, out_channels=5, num_classes=3 if make is guided else None)
        ranges = {"low": [0.0, -1.0, 200.0, 5.0, -1e-3], "high": [1.0, 1.0, 300.0, 5.0, 1e-3]}
        made = make(unet, value_range=ranges)
        made.save_pretrained(tmp_path)
        kinds = ("latent", "pt", "np", "pil")
        for pipeline in (made, quiet(load_pipeline(tmp_path))):
            latent, pt, array, pil = (draw(pipeline, 1, output_type=kind) for kind in kinds)
            low, high = (torch.tensor(ranges[end])[:, None, None] for end in ("low", "high"))
            torch.testing.assert_close(pt, low + (high - low) * (latent + 1) / 2)
            assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy()) and (array[..., 3] == 5).all()
            shown = (latent[0, :3] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
            assert np.array_equal(np.asarray(pil[0]), (shown * 255).round())  # the first three channels

    @pytest.mark.parametrize("kind", ["latent", "pt"])
    def test_a_tuple_holds_what_the_output_holds(self, kind):
        pipeline = unconditional()
        (pictures,) = pipeline(2, 4, generator=seeded(), output_type=kind, return_dict=False)
        assert torch.equal(pictures, draw(pipeline, 2, output_type=kind))

    def test_is_detached(self):
        assert not draw(unconditional()).requires_grad

    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
    def test_in_half_precision_the_picture_is_nearly_the_same(self, dtype, tolerance):
        pipeline = guided()
        expected = draw(pipeline, [0, 2])
        pictures = draw(pipeline.to(dtype), [0, 2])
        assert pipeline.unet.dtype == dtype
        assert pictures.dtype == torch.float32
        assert 0 < (pictures - expected).abs().mean() < tolerance


class TestCallback:
    def test_sees_each_state_on_the_way(self):
        pipeline, seen = unconditional(), []

        def callback(pipe, step, timestep, tensors):
            assert pipe is pipeline
            seen.append((step, int(timestep), tensors["latents"].clone()))
            return {}

        last = draw(pipeline, 2, callback_on_step_end=callback)
        steps, timesteps, states = zip(*seen, strict=True)
        assert steps == (0, 1, 2, 3)
        assert list(timesteps) == pipeline.scheduler.timesteps.tolist()
        assert torch.equal(states[-1], last)
        assert not torch.equal(states[0], states[1])

    def test_may_ask_for_no_tensors_and_return_nothing(self):
        pipeline, seen = unconditional(), []
        callback = lambda pipe, step, t, tensors: seen.append(tensors)  # noqa: E731
        pictures = draw(pipeline, 2, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
        assert seen == [{}] * 4
        assert torch.equal(pictures, draw(pipeline, 2))

    def test_may_replace_the_latents(self):
        other = torch.full((2, 3, 8, 8), 0.25)
        replaced = draw(unconditional(), 2, callback_on_step_end=lambda *_: {"latents": other})
        assert torch.equal(replaced, other)

    def test_may_interrupt_this_call_and_not_the_next(self):
        pipeline, steps = unconditional(), []

        def callback(pipe, step, timestep, tensors):
            steps.append(step)
            pipe._interrupt = step == 1

        draw(pipeline, 1, num_inference_steps=5, callback_on_step_end=callback)
        assert steps == [0, 1]
        passes = []
        pipeline.unet.register_forward_pre_hook(lambda *_: passes.append(1))
        draw(pipeline, 1, num_inference_steps=5)
        assert len(passes) == 5


class TestProgressBar:
    @pytest.mark.parametrize("disable, expected", [(False, True), (True, False)])
    def test_counts_the_steps_unless_it_is_disabled(self, capsys, disable, expected):
        pipeline = unconditional()
        pipeline.set_progress_bar_config(disable=disable)
        draw(pipeline, 1, num_inference_steps=7)
        assert ("7/7" in capsys.readouterr().err) == expected


class TestLatentSpace:
    @pytest.mark.parametrize("shift", [None, 0.3])
    def test_decodes_what_the_loop_leaves(self, shift):
        vae = tiny_vae(latent_channels=4, scaling_factor=0.5, shift_factor=shift)
        unet = tiny_unet(in_channels=4, out_channels=4)
        pipeline = unconditional(unet, vae=vae)
        latents = draw(pipeline, 2)
        assert torch.equal(latents, draw(unconditional(unet), 2))
        with torch.no_grad():
            decoded = vae.decode(latents / 0.5 + (shift or 0.0)).sample
        assert decoded.shape == (2, 3, 16, 16)
        assert torch.equal(draw(pipeline, 2, output_type="pt"), (decoded / 2 + 0.5).clamp(0, 1))

    def test_decodes_in_the_dtype_of_the_autoencoder(self):
        pipeline = unconditional(tiny_unet(in_channels=4, out_channels=4), vae=tiny_vae(latent_channels=4))
        expected = draw(pipeline, 2, output_type="pt")
        pipeline.vae.to(torch.bfloat16)
        pictures = draw(pipeline, 2, output_type="pt")
        assert 0 < (pictures - expected).abs().mean() < 0.02


class TestOffloading:
    """Accelerate's hooks move each model to the device before its turn; here the device is the CPU as well."""

    def test_models_under_hooks_draw_the_same(self):
        pipeline = unconditional(tiny_unet(in_channels=4, out_channels=4), vae=tiny_vae(latent_channels=4))
        expected = draw(pipeline, 2, output_type="pt")
        pipeline.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert torch.equal(draw(pipeline, 2, output_type="pt"), expected)

    @needs_accelerator
    @pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
    @pytest.mark.parametrize("request_", [2, [0, 2]])
    def test_models_come_back_to_the_cpu(self, how, request_):
        pipeline = unconditional(tiny_unet(in_channels=4, out_channels=4), vae=tiny_vae(latent_channels=4))
        if request_ != 2:
            pipeline = classifier_guided()
        expected = draw(pipeline, request_, output_type="pt")
        getattr(pipeline, how)()
        for _ in range(2):
            torch.testing.assert_close(draw(pipeline, request_, output_type="pt").cpu(), expected, rtol=0, atol=1e-2)
            assert pipeline.unet.device.type in ("cpu", "meta")

    @needs_accelerator
    def test_noise_is_the_same_on_an_accelerator(self):
        pipeline = unconditional(DenoisingUNet2DModel(**TINY_UNET))
        expected = draw(pipeline, 2)
        actual = draw(pipeline.to(torch.accelerator.current_accelerator()), 2)
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)


class TestErrors:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"batch_size": 0}, "batch_size: 0 is not a positive whole number"),
            ({"batch_size": 2.0}, "batch_size: 2.0 is not a positive whole number"),
            ({"batch_size": True}, "batch_size: True is not a positive whole number"),
            ({"num_inference_steps": 0}, "num_inference_steps: 0 is not a positive whole number"),
            ({"num_inference_steps": -1}, "num_inference_steps: -1 is not a positive whole number"),
            ({"num_inference_steps": 1.5}, "num_inference_steps: 1.5 is not a positive whole number"),
            ({"num_inference_steps": 1001}, "num_inference_steps: 1001 must be within 1 ... 1000"),
            ({"output_type": "jpg"}, "output_type: 'jpg' is not one of 'pil', 'np', 'pt', 'latent'"),
            (
                {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
                "callback_on_step_end_tensor_inputs: 'noise' is not one of ['latents']",
            ),
            (
                {"batch_size": 2, "generator": [seeded()] * 3},
                "generator: a list of 3 for 2 pictures; give one for each, or only one",
            ),
            (
                {"batch_size": 2, "latents": torch.zeros(3, 3, 8, 8)},
                "latents: shape (3, 3, 8, 8) is not (2, 3, height, width), noise for the 2 pictures asked for",
            ),
            ({"latents": torch.zeros(1, 4, 8, 8)}, "latents: shape (1, 4, 8, 8) is not (1, 3, height, width)"),
            ({"latents": torch.zeros(3, 8, 8)}, "latents: shape (3, 8, 8) is not (1, 3, height, width)"),
            ({"latents": torch.zeros(1, 3, 8, 7)}, "resolution 8x7: this network"),
        ],
    )
    def test_of_a_request(self, arguments, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            unconditional()(**arguments)

    @pytest.mark.parametrize("interval", [(2.0, 1.0), (-1.0, 1.0), (1.0,), (1.0, 2.0, 3.0), 1.0])
    def test_of_a_guidance_interval(self, interval):
        message = f"guidance_interval: {interval} is not (low, high) with 0 <= low <= high"
        with pytest.raises(ValueError, match=re.escape(message)):
            guided()(0, guidance_interval=interval)

    def test_of_a_model_for_the_other_pipeline(self):
        with pytest.raises(ValueError, match="unet: it has 3 classes; use ClassifierFreeGuidedPipeline"):
            unconditional(tiny_unet(num_classes=3))
        with pytest.raises(ValueError, match="unet: it was made without num_classes; use UnconditionalPipeline"):
            guided(tiny_unet())


class TestAutoencoder:
    """What `AutoencoderPipeline` makes of a picture is what its autoencoder, called by hand, makes of it."""

    @pytest.fixture(params=["plain", "variational", "vector", "of diffusers"])
    def pipeline(self, request):
        return autoencoder(request.param)

    @pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
    @pytest.mark.parametrize("kind", ["plain", "variational", "of diffusers"])
    def test_reconstructs_what_the_decoder_makes_of_the_latents(self, kind, channels, mode):
        pipeline = autoencoder(kind, channels)
        pil, array, tensor = same_pictures(mode)
        expected = by_hand(pipeline.vae, 2 * tensor - 1)
        assert expected.shape == tensor.shape
        for images in (pil, array, tensor):
            pictures = pipeline.reconstruct(images, output_type="pt").images
            torch.testing.assert_close(pictures, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
        (first,) = pipeline.reconstruct(pil[0], output_type="np", return_dict=False)
        assert np.allclose(first, pictures[:1].permute(0, 2, 3, 1).numpy(), atol=1e-5)
        shown = pipeline.reconstruct(pil).images
        assert all(image.mode == mode for image in shown)
        pixels = np.stack([np.asarray(image).reshape(8, 8, channels) for image in shown]) / 255
        assert np.allclose(pixels, pictures.permute(0, 2, 3, 1).numpy(), atol=0.6 / 255)

    def test_latents_are_the_means_of_the_posterior(self):
        pipeline = autoencoder("variational")
        tensor = same_pictures("RGB")[2]
        with torch.no_grad():
            posterior = pipeline.vae.encode(2 * tensor - 1).latent_dist
        assert torch.equal(pipeline.reconstruct(tensor, output_type="latent").images, posterior.mean)
        assert (posterior.std > 0.1).all()

    def test_pictures_of_as_many_channels_as_the_latents_are_pictures(self):
        pipeline = autoencoder("of diffusers", channels=4)
        assert pipeline.vae.config.latent_channels == 4
        tensor = same_pictures("RGBA")[2]
        expected = (by_hand(pipeline.vae, 2 * tensor - 1) / 2 + 0.5).clamp(0, 1)
        pictures = pipeline.reconstruct(tensor, output_type="pt").images
        torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-6)

    def test_pictures_of_pillow_are_read_as_those_for_training(self):
        picture = Image.new("RGBA", (8, 8), (200, 10, 10, 255))
        picture.paste((0, 0, 0, 0), (0, 0, 4, 8))  # black, but nobody has seen it
        palette = picture.convert("RGB").quantize(4)
        for image, channels in ((picture, 3), (picture, 1), (picture, 4), (palette, 3), (picture.convert("L"), 4)):
            pixels = PictureDataset([image], "one", channels=channels)[0]["images"][None] / 255
            pipeline = autoencoder("plain", channels)
            expected = pipeline.reconstruct(pixels, output_type="pt").images
            actual = pipeline.reconstruct(image, output_type="pt").images
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)

    def test_measured_values_go_in_and_come_out_in_their_units(self, tmp_path):
        ranges = {"low": [0.0, -1.0, 200.0, 5.0, -1e-3], "high": [1.0, 1.0, 300.0, 5.0, 1e-3]}
        low, high = (torch.tensor(ranges[end])[:, None, None] for end in ("low", "high"))
        made = quiet(AutoencoderPipeline(tiny_autoencoder(in_channels=5), value_range=ranges))
        made.save_pretrained(tmp_path)
        x = 2 * torch.rand(2, 5, 8, 8, generator=seeded()) - 1
        x[:, 3] = -1  # a channel that is the same everywhere
        values = low + (high - low) * (x + 1) / 2
        expected = low + (high - low) * (by_hand(made.vae, x) + 1) / 2
        for pipeline in (made, load_pipeline(tmp_path)):
            pt = pipeline.reconstruct(values, output_type="pt").images
            torch.testing.assert_close(pt, expected, rtol=1e-4, atol=1e-6)
            array = pipeline.reconstruct(values.permute(0, 2, 3, 1).numpy(), output_type="np").images
            assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
        with pytest.raises(ValueError, match="images: this model is of measured values; give an array or a tensor"):
            made.reconstruct(Image.new("L", (8, 8)))

    def test_a_seed_gives_a_picture_however_many_are_drawn(self, pipeline):
        pipeline = with_prior(pipeline) if pipeline.vae.config.get("prior_rank", 0) is None else pipeline
        for prior in priors(pipeline):
            together = pipeline(3, prior, generator=[seeded(i) for i in range(3)], output_type="pt").images
            assert (together[0] - together[1]).abs().max() > 1e-3
            for i in range(3):
                alone = pipeline(1, prior, generator=[seeded(i)], output_type="pt").images
                torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-4)
            one, many = (pipeline(n, prior, generator=seeded(7), output_type="latent").images for n in (1, 5))
            torch.testing.assert_close(many[:1], one)

    def test_decodes_the_latents_of_the_standard_prior_or_those_it_is_given(self, pipeline):
        z = torch.stack([torch.randn(latent_shape(pipeline), generator=seeded(i)) for i in range(2)])
        with torch.no_grad():
            expected = (pipeline.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
        assert torch.equal(pipeline(latents=z, output_type="pt").images, expected)
        if "standard" in priors(pipeline):
            drawn = pipeline(2, generator=[seeded(0), seeded(1)], output_type="pt").images
            assert torch.equal(drawn, expected)

    @pytest.mark.parametrize("kind", ["plain", "variational"])
    def test_samples_of_a_fitted_prior_have_the_mean_and_covariance_of_the_latents(self, kind):
        pipeline = with_prior(autoencoder(kind, latent_channels=1, sample_size=4), count=500)
        z = pipeline(40_000, "fitted", generator=seeded(), output_type="latent").images.flatten(1)
        fitted = prior_latents(pipeline, 500).flatten(1)
        assert z.shape[1] == 4
        scale = fitted.std(dim=0)
        assert ((z.mean(dim=0) - fitted.mean(dim=0)) / scale).abs().max() < 0.03
        difference = (z.T.cov() - fitted.T.cov()) / torch.outer(scale, scale)
        assert difference.abs().max() < 0.04
        assert (fitted.T.corrcoef() - torch.eye(4)).abs().max() > 0.2  # that of independent latents would not do

    def test_only_a_prior_that_the_autoencoder_has_can_be_drawn_from(self):
        plain, variational = autoencoder("plain"), autoencoder("variational")
        for pipeline in (plain, autoencoder("of diffusers")):
            with pytest.raises(ValueError, match="prior: nothing makes the latents of this autoencoder follow N"):
                pipeline()
        for pipeline in (plain, variational, autoencoder("of diffusers")):
            with pytest.raises(ValueError, match="prior: 'fitted', but none has been fitted"):
                pipeline(prior="fitted")
        with pytest.raises(ValueError, match="prior: 'normal' is not one of 'standard', 'fitted'"):
            variational(prior="normal")
        with_prior(plain)
        with pytest.raises(
            ValueError, match="use prior='fitted', if one was fitted, or train a variational autoencoder"
        ):
            plain(prior="standard")

    def test_ends_of_an_interpolation_are_the_reconstructions(self, pipeline):
        a, b = same_pictures("RGB")[2].split(1)
        pictures = pipeline.interpolate(a, b, steps=5, output_type="pt").images
        ends = torch.cat([pipeline.reconstruct(x, output_type="pt").images for x in (a, b)])
        torch.testing.assert_close(pictures[[0, -1]], ends, rtol=0, atol=1e-5)
        assert len(pictures) == 5 and (pictures[0] - pictures[-1]).abs().max() > 1e-3

    def test_latents_of_an_interpolation_are_those_of_the_great_circle(self, pipeline):
        a, b = same_pictures("RGB")[2].split(1)
        z = pipeline.interpolate(a, b, steps=9, output_type="latent").images.double().flatten(1)
        z_a, z_b = z[0], z[-1]
        omega = math.acos(float(z_a @ z_b / z_a.norm() / z_b.norm()))
        for tau, z_tau in zip(torch.linspace(0, 1, 9).tolist(), z, strict=True):
            weights = math.sin((1 - tau) * omega) / math.sin(omega), math.sin(tau * omega) / math.sin(omega)
            torch.testing.assert_close(z_tau, weights[0] * z_a + weights[1] * z_b, rtol=1e-4, atol=1e-5)

    def test_equal_norms_stay_equal_and_angles_are_even_on_the_way(self):
        pipeline = autoencoder("identity")
        a, b = torch.rand(2, 3, 8, 8, generator=seeded())[:, None].unbind(0)
        b = b.mul(2).sub(1)
        b = (b * (2 * a - 1).norm() / b.norm() + 1) / 2  # on the sphere of a
        a, b = (0.5 + (x - 0.5) * 0.5 for x in (a, b))  # within [0, 1]
        z = pipeline.interpolate(a, b, steps=7, output_type="latent").images.double().flatten(1)
        torch.testing.assert_close(z.norm(dim=1), z[0].norm().expand(7), rtol=1e-5, atol=0)
        angles = torch.cosine_similarity(z[1:], z[:-1]).clamp(max=1).arccos()
        torch.testing.assert_close(angles, angles[0].expand(6), rtol=1e-3, atol=0)
        assert angles[0] > 0.05

    def test_between_identical_and_opposite_pictures_lie_pictures(self):
        pipeline = autoencoder("identity")
        a = torch.rand(1, 3, 8, 8, generator=seeded())
        same = pipeline.interpolate(a, a, steps=5, output_type="latent").images
        torch.testing.assert_close(same, (2 * a - 1).expand(5, -1, -1, -1), rtol=0, atol=1e-3)
        assert pipeline.interpolate(a, 1 - a, steps=5, output_type="latent").images.isfinite().all()
        grey = torch.full_like(a, 0.5)  # latents of length 0
        assert pipeline.interpolate(grey, grey, steps=3, output_type="latent").images.abs().max() == 0

    @pytest.mark.parametrize("dim", [0, 17])
    def test_a_traversal_sets_one_latent_and_leaves_the_others(self, dim):
        pipeline = autoencoder("variational")
        x = same_pictures("RGB")[2][:1]
        z = pipeline.reconstruct(x, output_type="latent").images
        values = [-2.0, 0.5, z.flatten()[dim].item(), 3]
        changed = pipeline.traverse(x, dim, values, output_type="latent").images.flatten(1)
        expected = z.flatten(1).repeat(4, 1)
        expected[:, dim] = torch.tensor(values)
        assert torch.equal(changed, expected)
        pictures = pipeline.traverse(x, (dim,), np.array(values), output_type="pt").images
        with torch.no_grad():
            decoded = pipeline.vae.decode(expected.unflatten(1, z.shape[1:])).sample
        assert torch.equal(pictures, (decoded / 2 + 0.5).clamp(0, 1))
        own = pipeline.reconstruct(x, output_type="pt").images
        torch.testing.assert_close(pictures[2:3], own, rtol=0, atol=1e-5)
        assert (pictures[0] - own).abs().max() > 1e-3

    def test_a_traversal_of_two_is_a_grid_with_the_first_constant_in_a_row(self):
        pipeline = autoencoder("vector", latent_channels=4)
        x = same_pictures("RGB")[2][:1]
        z = pipeline.reconstruct(x, output_type="latent").images.flatten()
        values = [-1.0, 0.0, 1.5]
        grid = pipeline.traverse(x, (3, 1), values, output_type="latent").images
        assert grid.shape == (9, 4, 1, 1)
        for (row, column), latents in zip(itertools.product(values, values), grid.flatten(1), strict=True):
            assert latents.tolist() == [z[0].item(), column, z[2].item(), row]
        assert len(pipeline.traverse(x, [3, 1], values).images) == 9

    @pytest.mark.parametrize(
        "dims, values, message",
        [
            (32, [0.0], "dims: (32,) is not one or two of the 32 latents, 0 to 31"),
            (-1, [0.0], "dims: (-1,) is not one or two of the 32 latents"),
            (1.0, [0.0], "dims: (1.0,) is not one or two of the 32 latents"),
            (True, [0.0], "dims: (True,) is not one or two of the 32 latents"),
            (None, [0.0], "dims: (None,) is not one or two of the 32 latents"),
            ((0, 1, 2), [0.0], "dims: (0, 1, 2) is not one or two of the 32 latents"),
            ((), [0.0], "dims: () is not one or two of the 32 latents"),
            ((3, 3), [0.0], "dims: (3, 3) is not one or two of the 32 latents"),
            (0, [], "values: [] is not a list of one or more finite numbers"),
            (0, [0.0, float("nan")], "values: [0.0, nan] is not a list of one or more finite numbers"),
            (0, "ab", "values: ['a', 'b'] is not a list of one or more finite numbers"),
            (0, None, "values: [None] is not a list of one or more finite numbers"),
        ],
    )
    def test_errors_of_a_traversal(self, dims, values, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            autoencoder("variational").traverse(same_pictures("RGB")[2][:1], dims, values)

    @pytest.mark.parametrize(
        "images, message",
        [
            (torch.full((1, 3, 8, 8), 1.01), "images: values from 1.01 to 1.01 are not in [0, 1]"),
            (np.full((1, 8, 8, 3), -0.5), "images: values from -0.5 to -0.5 are not in [0, 1]"),
            (np.full((1, 8, 8, 3), 255, np.uint8), "images: values from 255 to 255 are not in [0, 1]"),
            (torch.full((1, 3, 8, 8), float("nan")), "images: values from nan to nan are not in [0, 1]"),
            (torch.zeros(3, 8, 8), "images: an array of shape (3, 8, 8) has not four axes"),
            (torch.zeros(2, 1, 8, 8), "images: 2 of 1 channels; this model takes one or more of 3"),
            (np.zeros((1, 3, 8, 8)), "images: 1 of 8 channels; this model takes one or more of 3"),
            (torch.zeros(0, 3, 8, 8), "images: 0 of 3 channels; this model takes one or more of 3"),
            ([], "images: they are none or differ in size"),
            ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))], "images: they are none or differ in size"),
            ("picture.png", "images: they are neither pictures of PIL (Image.open(file)) nor one array or tensor"),
            ([np.zeros((8, 8, 3))], "neither pictures of PIL (Image.open(file)) nor one array or tensor"),
        ],
    )
    def test_errors_of_pictures(self, images, message):
        for kind in ("plain", "of diffusers"):
            with pytest.raises(ValueError, match=re.escape(message)):
                autoencoder(kind).reconstruct(images)

    def test_sizes_that_do_not_fit_are_named(self):
        for kind, message in (
            ("plain", "resolution 8x9: this network (patch_size 1, 2 levels) needs a height and width that 2 divides"),
            ("vector", "resolution 8x16: this network makes vectors (vector_latents) of pictures of 8x8 alone"),
            ("of diffusers", "images: 8x9 pixels; this model needs both to be divisible by 2"),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                autoencoder(kind).reconstruct(Image.new("RGB", (16 if kind == "vector" else 9, 8)))

    @pytest.mark.parametrize("steps", [0, -1, 2.0, True])
    def test_errors_of_an_interpolation(self, steps):
        a, b = same_pictures("RGB")[0]
        pipeline = autoencoder("plain")
        with pytest.raises(ValueError, match=f"steps: {steps} is not a positive whole number"):
            pipeline.interpolate(a, b, steps)
        message = "b: its latents are of shape (2, 8, 8), those of a (2, 4, 4); give two pictures of one size"
        with pytest.raises(ValueError, match=re.escape(message)):
            pipeline.interpolate(a, b.resize((16, 16)))
        with pytest.raises(ValueError, match="b: 2 pictures; give one"):
            pipeline.interpolate(a, [a, b])
        with pytest.raises(ValueError, match="image: 2 pictures; give one"):
            pipeline.traverse([a, b], 0, [0.0])

    def test_errors_of_a_request(self):
        pipeline, x = autoencoder("variational"), same_pictures("RGB")[2][:1]
        for request in (
            lambda: pipeline(output_type="jpg"),
            lambda: pipeline.reconstruct(x, "jpg"),
            lambda: pipeline.interpolate(x, x, 2, "jpg"),
            lambda: pipeline.traverse(x, 0, [0.0], "jpg"),
        ):
            with pytest.raises(ValueError, match="output_type: 'jpg' is not one of 'pil', 'np', 'pt', 'latent'"):
                request()
        for n in (0, 1.0, True):
            with pytest.raises(ValueError, match=f"batch_size: {n} is not a positive whole number"):
                pipeline(n)
        with pytest.raises(ValueError, match="generator: a list of 3 for 2 pictures"):
            pipeline(2, generator=[seeded()] * 3)
        with pytest.raises(ValueError, match=re.escape("z: shape (1, 3, 4, 4) is not (n, 2, h, w)")):
            pipeline(latents=torch.zeros(1, 3, 4, 4))

    def test_tells_the_shape_of_its_pictures(self):
        assert autoencoder("plain", channels=4).picture_shape == (4, 8, 8)
        assert autoencoder("plain", sample_size=(8, 12)).picture_shape == (3, 8, 12)

    def test_computes_in_the_dtype_of_the_autoencoder_and_under_hooks(self, pipeline):
        x = same_pictures("RGB")[2]
        expected = pipeline.reconstruct(x, output_type="pt").images
        pipeline.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert torch.equal(pipeline.reconstruct(x, output_type="pt").images, expected)
        pipeline.remove_all_hooks()
        half = pipeline.to(torch.bfloat16).reconstruct(x, output_type="pt").images
        assert half.dtype == torch.float32 and 0 < (half - expected).abs().mean() < 0.02


class IdentityAutoencoder(ModelMixin, ConfigMixin):
    """Latents are the picture."""

    @register_to_config
    def __init__(self, in_channels=3, sample_size=8):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def check_size(self, size):
        pass

    def encode(self, x):
        return ImageLatentsOutput(latents=x)

    def decode(self, z):
        return AutoencoderOutput(sample=z)


def autoencoder(kind, channels=3, **config):
    if kind == "identity":
        return quiet(AutoencoderPipeline(IdentityAutoencoder()))
    if kind == "of diffusers":
        vae = tiny_vae(in_channels=channels, out_channels=channels, sample_size=8, **config)
    elif kind == "vector":
        vae = tiny_autoencoder(in_channels=channels, vector_latents=True, **config)
    else:
        vae = tiny_autoencoder(
            Autoencoder if kind == "plain" else VariationalAutoencoder, in_channels=channels, **config
        )
    return quiet(AutoencoderPipeline(vae))


def same_pictures(mode):
    """Two noisy pictures as those of Pillow, an array and a tensor."""
    channels = len(mode)
    pixels = np.random.default_rng(0).integers(256, size=(2, 8, 8, channels), dtype=np.uint8)
    pil = [Image.fromarray(picture[..., 0] if mode == "L" else picture) for picture in pixels]
    array = pixels.astype(np.float32) / 255
    return pil, array, torch.from_numpy(array).permute(0, 3, 1, 2)


@torch.no_grad()
def by_hand(vae, x):
    output = vae.encode(x)
    return vae.decode(output.latent_dist.mean if "latent_dist" in output else output.latents).sample


def latent_shape(pipeline):
    channels, height, width = pipeline.picture_shape
    with torch.no_grad():
        output = pipeline.vae.encode(torch.zeros(1, channels, height, width))
    return (output.latent_dist.mean if "latent_dist" in output else output.latents).shape[1:]


def prior_latents(pipeline, count):
    x = torch.rand(count, *pipeline.picture_shape, generator=seeded(1)).cumsum(dim=3) / 4  # neighbours are alike
    return pipeline.reconstruct(x.clamp(0, 1), output_type="latent").images


def with_prior(pipeline, count=20):
    pipeline.vae.fit_prior(prior_latents(pipeline, count))
    return pipeline


def priors(pipeline):
    """Those that can be drawn from."""
    standard = ["standard"] if getattr(pipeline.vae, "has_standard_prior", False) else []
    return standard + (["fitted"] if pipeline.vae.config.get("prior_rank") is not None else [])
