"""Pipelines of every kind to be saved, and the fixtures of tests about checkpoints."""

import json
from pathlib import Path

import torch
from tiny import tiny_autoencoder, tiny_classifier, tiny_text_pipeline, tiny_unet, tiny_vae
from transformers import T5EncoderModel

import hf_genmod
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel
from hf_genmod.models.image_autoencoder import Autoencoder
from hf_genmod.models.variational_autoencoder import VariationalAutoencoder
from hf_genmod.pipelines.autoencoder import AutoencoderPipeline
from hf_genmod.pipelines.classifier_free_guided import ClassifierFreeGuidedPipeline
from hf_genmod.pipelines.classifier_guided import ClassifierGuidedPipeline
from hf_genmod.pipelines.super_resolution import SuperResolutionPipeline
from hf_genmod.pipelines.unconditional import UnconditionalPipeline
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler

PACKAGE = Path(hf_genmod.__file__).parent


NAMES = {0: "cat", 1: "dog", 2: "lizard"}


LEARNED = {
    "timestep_spacing": "trailing",
    "variance_type": "learned_range",
    "prediction_type": "v_prediction",
    "beta_schedule": "squaredcos_cap_v2",
}


WEIGHTS = "diffusion_pytorch_model.safetensors"


def guided(scheduler=None):
    return ClassifierFreeGuidedPipeline(
        tiny_unet(num_classes=3), scheduler or AncestralDDPMScheduler(), id2label=NAMES
    )


def fitted(kind):
    """An autoencoder of 16x16 pictures that knows what its latents are distributed like."""
    vae = tiny_autoencoder(kind, sample_size=16, scaling_factor=0.7, shift_factor=0.3)
    vae.fit_prior(torch.randn(20, 2, 8, 8, generator=torch.Generator().manual_seed(0)))
    return vae


def of_latents(pipeline_class, kind, **components):
    scheduler = AncestralDDPMScheduler(clip_sample=False)
    unet = tiny_unet(in_channels=2, out_channels=2, **components.pop("unet", {}))
    return pipeline_class(unet=unet, scheduler=scheduler, vae=fitted(kind), **components)


PIPELINES = {
    "guided": guided,
    "unconditional": lambda: UnconditionalPipeline(tiny_unet(out_channels=6), AncestralDDPMScheduler(**LEARNED)),
    "guided by a classifier": lambda: ClassifierGuidedPipeline(
        tiny_unet(), tiny_classifier(), AncestralDDPMScheduler(), id2label=NAMES
    ),
    "in latent space": lambda: UnconditionalPipeline(
        tiny_unet(in_channels=4, out_channels=4),
        AncestralDDPMScheduler(clip_sample=False),
        tiny_vae(latent_channels=4),
    ),
    "in the latent space of ours": lambda: of_latents(UnconditionalPipeline, Autoencoder),
    "guided in latent space": lambda: of_latents(
        ClassifierFreeGuidedPipeline, VariationalAutoencoder, unet={"num_classes": 3}, id2label=NAMES
    ),
    "guided by a classifier in latent space": lambda: of_latents(
        ClassifierGuidedPipeline, VariationalAutoencoder, classifier=tiny_classifier(in_channels=2), id2label=NAMES
    ),
    "upsampler": lambda: SuperResolutionPipeline(
        tiny_unet(conditioning_channels=3, num_classes=3), AncestralDDPMScheduler(), NAMES, 4, max_noise_level=100
    ),
    "autoencoder": lambda: AutoencoderPipeline(fitted(Autoencoder)),
    "variational autoencoder": lambda: AutoencoderPipeline(fitted(VariationalAutoencoder)),
}


TEXT_PIPELINES = {
    "CLIP": tiny_text_pipeline,
    "T5 in latent space": lambda: tiny_text_pipeline(
        T5EncoderModel, vae=fitted(VariationalAutoencoder), in_channels=2, out_channels=2
    ),
}


OURS = (DenoisingUNet2DModel, AncestralDDPMScheduler, Autoencoder, VariationalAutoencoder)


def index_of(folder):
    return json.loads(Path(folder, "model_index.json").read_text())
