"""Train image generative models from scratch and share them as checkpoints of diffusers.

The public names below are imported when they are first used.
"""

import importlib

__version__ = "0.1.0.dev0"

_MODULES = {
    "AncestralDDPMScheduler": "schedulers.ancestral_ddpm",
    "Autoencoder": "models.image_autoencoder",
    "AutoencoderPipeline": "pipelines.genmod_pipelines",
    "ClassifierFreeGuidedPipeline": "pipelines.genmod_pipelines",
    "ClassifierGuidedPipeline": "pipelines.genmod_pipelines",
    "DenoisingObjective": "objectives",
    "DenoisingUNet2DModel": "models.denoising_unet",
    "ElboObjective": "objectives",
    "FewStepDDPMScheduler": "schedulers.ancestral_ddpm",
    "NoisyClassificationObjective": "objectives",
    "NoisyImageClassifier": "models.denoising_unet",
    "ReconstructionObjective": "objectives",
    "SuperResolutionPipeline": "pipelines.genmod_pipelines",
    "TextToImagePipeline": "pipelines.genmod_pipelines",
    "Trainer": "training",
    "TrainingConfig": "training",
    "UnconditionalPipeline": "pipelines.genmod_pipelines",
    "VariationalAutoencoder": "models.image_autoencoder",
    "load_pipeline": "hub",
    "load_vae": "hub",
    "push_checkpoint": "hub",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
