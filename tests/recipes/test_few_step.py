"""What is tuned of a model of any process."""

import copy

import diffusers
import pytest
import torch
from tiny import randomized, tiny_unet

from hf_genmod import AncestralDDPMScheduler, ClassifierFreeGuidedPipeline, UnconditionalPipeline
from hf_genmod.data.randomness import batch_positions, batch_random
from hf_genmod.recipes.few_step import SIGNAL, FewStepArguments, FewStepModel

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # samplers of diffusers, thousands


def tuned(scheduler, **changes):
    """What is tuned, after its loss has been seen to have a gradient."""
    model = FewStepModel(UnconditionalPipeline(tiny_unet(**changes), scheduler), FewStepArguments(model="mine"))
    batch = {"images": torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)}
    loss, _ = model.objective(model.network, batch, batch_random(0, 0, batch_positions(4), 4))
    loss.backward()
    assert loss.isfinite() and all(x.grad is None or x.grad.isfinite().all() for x in model.network.parameters())
    return model


@pytest.mark.parametrize(
    "schedule, prediction_type, rescaled",
    [
        ("linear", "epsilon", False),
        ("linear", "v_prediction", True),
        ("scaled_linear", "sample", False),
        ("squaredcos_cap_v2", "epsilon", False),
        ("squaredcos_cap_v2", "sample", True),
        ("sigmoid", "v_prediction", False),
    ],
)
def test_drawing_starts_at_the_same_noise_level_whatever_the_process(schedule, prediction_type, rescaled):
    config = {"prediction_type": prediction_type, "beta_schedule": schedule, "rescale_betas_zero_snr": rescaled}
    model = tuned(AncestralDDPMScheduler(**config))
    sampler, (first, *_) = model.sampler, model.objective.timesteps
    assert sampler.alphas_cumprod[first].sqrt().item() == pytest.approx(SIGNAL, abs=0.01)
    assert len(model.objective.timesteps) == 4
    pipe = model.make_pipeline(model.network)
    pipe.set_progress_bar_config(disable=True)
    for n in (1, 2, 4):
        assert pipe(num_inference_steps=n, output_type="pt").images.isfinite().all()


def test_the_cosine_schedule_is_started_at_a_share_of_its_timesteps():
    for T in (100, 4000):
        process = {"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
        assert tuned(AncestralDDPMScheduler(**process)).objective.timesteps[0] == pytest.approx(0.85 * T, abs=1.5)


@pytest.mark.parametrize(
    "scheduler, changes",
    [
        (AncestralDDPMScheduler(variance_type="learned_range"), {"out_channels": 6}),
        (AncestralDDPMScheduler(variance_type="learned"), {"out_channels": 6}),
        (AncestralDDPMScheduler(beta_schedule="laplace", prediction_type="v_prediction"), {}),
        (AncestralDDPMScheduler(beta_end=0.005), {}),  # it keeps some of the image at T
        (diffusers.DPMSolverMultistepScheduler(), {}),
        (diffusers.EulerDiscreteScheduler(), {}),
        (diffusers.HeunDiscreteScheduler(), {}),
    ],
)
def test_a_learned_variance_other_ends_and_other_samplers_are_tuned_too(scheduler, changes):
    model = tuned(scheduler, **changes)
    pipe = model.make_pipeline(model.network)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=4, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("T", [1, 4, 5])
def test_a_process_that_few_steps_do_not_draw_from_is_refused(T):
    process = f"few steps do not draw from its process, {T} timesteps of beta_schedule 'squaredcos_cap_v2'"
    with pytest.raises(ValueError, match=f"^model: {process}; train it with 1000 timesteps of 'squaredcos_cap_v2'$"):
        tuned(AncestralDDPMScheduler(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2"))


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="^scheduler: FlowMatchEulerDiscreteScheduler is for another kind of model; "):
        tuned(diffusers.FlowMatchEulerDiscreteScheduler())


def autoguided(**settings):
    """What is tuned of a model with classes and a guiding network, and the two networks."""
    unet = tiny_unet(num_classes=3)
    guiding = randomized(tiny_unet(num_classes=3), seed=5)
    pipe = ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(), guiding_unet=guiding)
    return FewStepModel(pipe, FewStepArguments(model="mine", **settings)), copy.deepcopy(unet), guiding


def test_the_teacher_of_a_model_with_a_guiding_network_is_guided_by_it():
    model, unet, guiding = autoguided()
    x_t, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 100])
    with torch.no_grad():
        D, D_w = (network(x_t, t, class_labels=torch.tensor([0, 1])).sample for network in (unet, guiding))
    taught = model.objective.teacher(x_t, t, class_labels=torch.tensor([0, 1])).sample
    torch.testing.assert_close(taught, 2 * D - D_w)
    assert model.objective.guidance_scale == 1
    assert model.make_pipeline(model.network).guiding_unet is None


@pytest.mark.parametrize(
    "settings, gamma, w",
    [({"guidance_scale": 3.0}, 3, 1), ({"autoguidance_scale": 1.0}, 2, 1), ({"autoguidance_scale": 1.5}, 1, 1.5),
     ({"guidance_scale": 3.0, "autoguidance_scale": 1.5}, 3, 1.5)],
)  # fmt: skip
def test_either_guidance_is_asked_for_or_both(settings, gamma, w):
    objective = autoguided(**settings)[0].objective
    assert objective.guidance_scale == gamma and getattr(objective.teacher, "w", 1) == w


def test_autoguidance_is_refused_without_a_guiding_network():
    with pytest.raises(ValueError, match="^autoguidance_scale: this model has no guiding_unet"):
        FewStepModel(
            UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler()),
            FewStepArguments(model="mine", autoguidance_scale=2.0),
        )
