"""Small checkpoints of every kind, what visitors send, and what they see."""

import base64
import io
import re

import numpy as np
import torch
from PIL import Image
from small_pipelines import classifier_guided, guided, of_latents, of_text, quiet, unconditional, upsampler
from tiny import tiny_autoencoder, tiny_unet

from hf_genmod import AncestralDDPMScheduler, Autoencoder, AutoencoderPipeline, SuperResolutionPipeline
from hf_genmod.demo.pictures import data_url


def plain_autoencoder():
    vae = tiny_autoencoder(Autoencoder)
    vae.fit_prior(torch.randn(50, *vae.latent_shape(8, 8), generator=torch.Generator().manual_seed(0)))
    return AutoencoderPipeline(vae)


def larger():
    """An upsampler from 8 to 16 pixels."""
    unet = tiny_unet(conditioning_channels=3, sample_size=16)
    return quiet(SuperResolutionPipeline(unet, AncestralDDPMScheduler()))


CHECKPOINTS = {
    "unconditional": unconditional,
    "guided": guided,
    "unnamed": lambda: guided(id2label=None),
    "marked": lambda: guided(id2label={0: "<b>cat</b>", 1: "\"dog'", 2: "<script>alert(1)</script>"}),
    "classifier guided": classifier_guided,
    "latents": of_latents,
    "text": of_text,
    "upsampler": upsampler,
    "larger": larger,
    "vae": lambda: AutoencoderPipeline(tiny_autoencoder()),
    "autoencoder": plain_autoencoder,
}


def picture(size=(12, 9), mode="RGB", seed=0):
    """A picture of random pixels, which are smooth enough to be scaled."""
    rng = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    small = rng.integers(0, 256, (4, 4, channels), dtype=np.uint8).squeeze()
    return Image.fromarray(small, mode if channels > 1 else "L").resize(size, Image.Resampling.BICUBIC)


def painted(size=(8, 8), box=(0, 0, 4, 4)):
    """What the brush sends: opaque where somebody has painted."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    image.paste((255, 106, 0, 255), box)
    return image


def sent(image=None, mask=None):
    return {"picture": data_url(image or picture()), "mask": None if mask is None else data_url(mask)}


def pixels_in(html: str) -> dict[str, np.ndarray]:
    """The images in the HTML of a page, by the files that a click saves them to."""
    found = re.findall(r'<a href="data:image/png;base64,([^"]+)" download="([^"]+)"', html)
    return {name: np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))) for body, name in found}
