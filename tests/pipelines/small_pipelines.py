"""Small pipelines, and a denoiser whose samples are known exactly."""

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
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    ModelMixin,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from tiny import CAPTIONS, tiny_autoencoder, tiny_classifier, tiny_text_pipeline, tiny_unet, tiny_vae

from hf_genmod.models.denoising_unet import DenoisingUNet2DOutput
from hf_genmod.pipelines.autoencoder import AutoencoderPipeline
from hf_genmod.pipelines.classifier_free_guided import ClassifierFreeGuidedPipeline
from hf_genmod.pipelines.classifier_guided import ClassifierGuidedPipeline
from hf_genmod.pipelines.super_resolution import SuperResolutionPipeline
from hf_genmod.pipelines.unconditional import UnconditionalPipeline
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.schedulers.few_step_ddpm import FewStepDDPMScheduler

NAMES = {0: "cat", 1: "dog", 2: "lizard"}


SAMPLERS = {  # those that draw in 20 steps
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
}


STOCHASTIC = {"Ancestral", "DDPM", "Few-step DDPM", "SDE-DPM-Solver", "Euler ancestral"}


needs_accelerator = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")


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


def upsampler(unet=None, scheduler=None, id2label=NAMES, **kwargs):
    unet = unet or tiny_unet(num_classes=3, conditioning_channels=3)
    scheduler = scheduler or AncestralDDPMScheduler()
    return quiet(SuperResolutionPipeline(unet, scheduler, id2label, max_noise_level=300, **kwargs))


def of_latents(**kwargs):
    return unconditional(tiny_unet(in_channels=4, out_channels=4), vae=tiny_vae(latent_channels=4), **kwargs)


def of_text(**kwargs):
    return quiet(tiny_text_pipeline(**kwargs))


def of_images(kind=None, **kwargs):
    return quiet(AutoencoderPipeline(kind or tiny_autoencoder(), **kwargs))


def _of_labels(n):
    return {"class_labels": [i % 3 for i in range(n)]}


def _of_small_images(n):
    return {"image": torch.rand(4, 3, 4, 4, generator=seeded())[:n], "noise_level": 100} | _of_labels(n)


# For each kind of pipeline what makes one, and what asks it for n different images, of up to four.
PIPELINES = {
    "unconditional": (unconditional, lambda n: {"batch_size": n}),
    "latents": (of_latents, lambda n: {"batch_size": n}),
    "guided": (guided, _of_labels),
    "classifier guided": (classifier_guided, _of_labels),
    "text": (of_text, lambda n: {"prompt": CAPTIONS[:n]}),
    "upsampler": (upsampler, _of_small_images),
    "autoencoder": (of_images, lambda n: {"batch_size": n}),
}
DIFFUSION = [kind for kind in PIPELINES if kind != "autoencoder"]


def images_of(pipeline, request, generator=None, output_type="latent", num_inference_steps=3, **kwargs):
    """What a pipeline of any kind draws."""
    steps = {"num_inference_steps": num_inference_steps} if pipeline.denoises else {}
    return pipeline(**(steps | request), generator=generator, output_type=output_type, **kwargs).images


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
