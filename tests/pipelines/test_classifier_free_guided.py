"""Classifier-free guidance is its formula."""

import pytest
import torch
from small_pipelines import ExactDenoiser, draw, guided, seeded
from tiny import tiny_unet

from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler


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
        labels = pipeline._weighted_labels([{"cat": 1.0, "dog": -0.5}, {"lizard": 2.0}])
        with torch.no_grad():
            both = pipeline._classifier_free_guidance(x_t, t, labels, 3.0)
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
