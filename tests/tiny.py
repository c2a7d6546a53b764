"""Models small enough for tests, in which no layer is left at zero."""

import torch
from diffusers import AutoencoderKL

from hf_genmod.models.denoising_unet import DenoisingUNet2DModel, NoisyImageClassifier
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler

TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_levels": (False, True),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


def randomized(module, seed=0):
    """Many layers start at zero, where a test proves nothing: every parameter gets noise."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return module


def tiny_unet(**config):
    """A random U-Net, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomized(DenoisingUNet2DModel(**(TINY_UNET | config))).eval()


def tiny_classifier(**config):
    """A random classifier of three classes under the default noise, the same at each call."""
    schedule = {"noise_schedule": dict(AncestralDDPMScheduler().config)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = NoisyImageClassifier(**(TINY_UNET | {"num_classes": 3} | schedule | config))
        return randomized(classifier).eval()


def tiny_vae(**config):
    """A random autoencoder that halves height and width, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=(8, 16),
            norm_num_groups=8,
            **config,
        )
        return randomized(vae).eval()
