"""The settings by which samples are drawn."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from tiny import tiny_autoencoder, tiny_classifier, tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    AutoencoderPipeline,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    FewStepDDPMScheduler,
    SuperResolutionPipeline,
    UnconditionalPipeline,
)
from hf_genmod.evaluation.config import EvaluationConfig, make_sampler
from hf_genmod.evaluation.draws import file_name


def settings_of(pipeline, samplers, num_inference_steps, guidance_scales, noise_levels=()):
    config = EvaluationConfig(
        samplers=samplers,
        num_inference_steps=num_inference_steps,
        guidance_scales=guidance_scales,
        noise_levels=list(noise_levels),
    )
    return config.settings_for(pipeline)


def of_classes():
    return ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler())


def guided():
    return ClassifierGuidedPipeline(tiny_unet(), tiny_classifier(num_classes=2), AncestralDDPMScheduler())


def plain():
    return UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler())


def upsampler(**config):
    unet = tiny_unet(conditioning_channels=3, **config)
    return SuperResolutionPipeline(unet, AncestralDDPMScheduler(), factor=4, max_noise_level=200)


def test_settings_are_all_combinations_by_the_names_that_the_pipeline_takes():
    settings = settings_of(of_classes(), ["DDIMScheduler", "UniPCMultistepScheduler"], [5, 10], [1.0, 3.0])
    assert len({tuple(setting.items()) for setting in settings}) == 8
    assert settings[0] == {"sampler": "DDIMScheduler", "num_inference_steps": 5, "guidance_scale": 1.0}
    assert settings_of(guided(), [], [5], [2.0])[0]["classifier_scale"] == 2.0
    assert settings_of(plain(), [], [5], []) == [{"sampler": "AncestralDDPMScheduler", "num_inference_steps": 5}]
    variational, fitted = AutoencoderPipeline(tiny_autoencoder()), AutoencoderPipeline(tiny_autoencoder(Autoencoder))
    fitted.vae.fit_prior(torch.randn(50, *fitted.vae.latent_shape(8, 8)))
    assert settings_of(variational, [], [5], []) == [{"prior": "standard"}]
    assert settings_of(fitted, [], [5], []) == [{"prior": "fitted"}]
    with pytest.raises(ValueError, match="guidance_scales: an UnconditionalPipeline is not guided"):
        settings_of(plain(), [], [5], [2.0])
    with pytest.raises(ValueError, match="sweep: an AutoencoderPipeline draws in one step without guidance; leave"):
        EvaluationConfig(sweep=True).settings_for(variational)
    levels = settings_of(upsampler(), [], [5], [], noise_levels=[0, 100])
    assert [setting["noise_level"] for setting in levels] == [0, 100]
    with pytest.raises(ValueError, match="guidance_scales: a SuperResolutionPipeline is not guided"):
        settings_of(upsampler(), [], [5], [2.0])
    assert settings_of(upsampler(num_classes=2), [], [5], [2.0])[0]["guidance_scale"] == 2.0
    with pytest.raises(ValueError, match="noise_levels: an UnconditionalPipeline is no upsampler"):
        settings_of(plain(), [], [5], [], noise_levels=[0])


def test_a_sweep_tries_the_scales_of_a_model_with_a_guiding_network_and_one_guidance_at_a_time():
    pipe = of_classes()
    with pytest.raises(ValueError, match="^autoguidance_scales: this model has no guiding_unet; leave them out$"):
        EvaluationConfig(autoguidance_scales=[2.0]).settings_for(pipe)
    pipe.register_modules(guiding_unet=tiny_unet(num_classes=2))
    asked = EvaluationConfig(autoguidance_scales=[1.0, 3.0], guidance_scales=[1.0, 2.0]).settings_for(pipe)
    assert len({tuple(setting.items()) for setting in asked}) == 4
    swept = EvaluationConfig(sweep=True, num_inference_steps=[5], samplers=["DDIMScheduler"]).settings_for(pipe)
    both = {(setting["guidance_scale"], setting["autoguidance_scale"]) for setting in swept}
    assert both == {(1.0, 1.0), (1.5, 1.0), (2.0, 1.0), (3.0, 1.0), (1.0, 1.5), (1.0, 2.0)} and len(swept) == 6
    alone = plain()
    alone.register_modules(guiding_unet=tiny_unet())
    swept = EvaluationConfig(sweep=True, num_inference_steps=[5], samplers=["DDIMScheduler"]).settings_for(alone)
    assert [setting["autoguidance_scale"] for setting in swept] == [1.0, 1.5, 2.0]


def test_settings_that_differ_have_files_of_other_names():
    scales = [{"guidance_scale": 1.5}, {"autoguidance_scale": 1.5}, {"guidance_scale": 1.5, "autoguidance_scale": 1.0}]
    assert len({file_name({"sampler": "DDIMScheduler", "num_inference_steps": 5} | x) for x in scales}) == 3


def test_a_sampler_is_of_the_same_process():
    own = AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    sampler = make_sampler("DDIMScheduler", own)
    assert isinstance(sampler, DDIMScheduler) and sampler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(sampler.alphas_cumprod, own.alphas_cumprod)
    assert make_sampler("AncestralDDPMScheduler", own) is own
    few_steps = make_sampler("FewStepDDPMScheduler", own)
    assert type(few_steps) is FewStepDDPMScheduler
    assert type(make_sampler("AncestralDDPMScheduler", few_steps)) is AncestralDDPMScheduler
    name = "DPMSolverMultistepScheduler"
    assert make_sampler(name, few_steps).config.algorithm_type == "sde-dpmsolver++"
    deterministic = DPMSolverMultistepScheduler.from_config(own.config)
    assert make_sampler(name, deterministic).config.algorithm_type == "dpmsolver++"
    for name in ("NoScheduler", "DDPMPipeline"):
        with pytest.raises(ValueError, match=f"samplers: '{name}' is no scheduler of diffusers"):
            make_sampler(name, own)
