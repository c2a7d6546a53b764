"""Classifier guidance is its formula, in both forms."""

import re

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, IPNDMScheduler
from small_pipelines import SAMPLERS, ExactDenoiser, classifier_guided, draw, guided, seeded, unconditional
from tiny import TINY_UNET, tiny_classifier, tiny_unet, tiny_vae

from hf_genmod.models.noisy_classifier import NoisyImageClassifier, NoisyImageClassifierOutput
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # samplers of diffusers, thousands


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
        if prediction_type == "sample" and name in ("Euler ancestral", "PNDM", "KDPM2"):
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
            draw(pipe, num_inference_steps=20, callback_on_step_end=callback, **request)
        assert len(states) >= 10
        for guided_state, state in zip(guided_states, states, strict=True):
            torch.testing.assert_close(guided_state, state, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    @pytest.mark.parametrize("num_inference_steps", [30, pytest.param(50, marks=pytest.mark.slow)])
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
        scheduler.set_timesteps(num_inference_steps)
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
        labels = pipeline._weighted_labels([{"cat": 1.0, "dog": -0.5}, "lizard"])
        labels = labels._replace(weight=labels.weight.double())
        gradient = pipeline._classifier_gradient(x_t, t, labels)
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
        g = pipeline._classifier_gradient(x_T, torch.tensor(t), pipeline._weighted_labels(1))
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
        unguided, guided = (draw(pipeline, [0, 2], classifier_scale=s, num_inference_steps=20) for s in (0, 1e-6))
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
            (
                {"noise_schedule": None},
                "classifier: its config has no noise_schedule, so the noise that it was trained on",
            ),
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

    def test_a_sampler_that_does_not_tell_its_noise_is_refused(self):
        sampler = IPNDMScheduler.from_config(AncestralDDPMScheduler().config)
        with pytest.raises(
            ValueError, match="scheduler: IPNDMScheduler is for another kind of model; use DPMSolverMultistep"
        ):
            classifier_guided(scheduler=sampler)

    def test_a_sampler_of_another_process_is_refused_later_too(self):
        pipeline = classifier_guided()
        pipeline.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
        with pytest.raises(
            ValueError, match="scheduler: its beta_schedule is 'squaredcos_cap_v2', and 'linear' in the"
        ):
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
