"""Train image generative models from scratch and share them as checkpoints of diffusers.

The public names below are imported when they are first used.
"""

import importlib
import sys

__version__ = "0.1.0.dev0"

_MODULES = {
    "AncestralDDPMScheduler": "schedulers.ancestral_ddpm",
    "Autoencoder": "models.image_autoencoder",
    "AutoencoderPipeline": "pipelines.autoencoder",
    "ClassifierFreeGuidedPipeline": "pipelines.classifier_free_guided",
    "ClassifierGuidedPipeline": "pipelines.classifier_guided",
    "ConsistencyObjective": "objectives.consistency",
    "DenoisingObjective": "objectives.denoising",
    "DenoisingUNet2DModel": "models.denoising_unet",
    "ElboObjective": "objectives.elbo",
    "FewStepDDPMScheduler": "schedulers.few_step_ddpm",
    "NoisyClassificationObjective": "objectives.noisy_classification",
    "NoisyImageClassifier": "models.noisy_classifier",
    "ReconstructionObjective": "objectives.reconstruction",
    "SuperResolutionPipeline": "pipelines.super_resolution",
    "TextToImagePipeline": "pipelines.text_to_image",
    "Trainer": "training.trainer",
    "TrainingConfig": "training.config",
    "UnconditionalPipeline": "pipelines.unconditional",
    "VariationalAutoencoder": "models.variational_autoencoder",
    "load_pipeline": "sharing.loading",
    "load_vae": "sharing.loading",
    "push_checkpoint": "sharing.push",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    except KeyboardInterrupt:  # in the seconds that torch and diffusers take
        if hasattr(sys, "ps1"):  # a person's session, which goes on
            raise
        sys.exit(130)


def __dir__():
    return [*globals(), *__all__]
