"""Images as the latents of an autoencoder, for diffusion models in its latent space."""

import copy
import hashlib
import json
import math
import os
import types
from collections.abc import Iterable, Sequence

import datasets
import numpy as np
import torch
from diffusers import ModelMixin

from hf_genmod.data.block_order import BlockOrder
from hf_genmod.data.encoding import cache_folder, encode_once, weights_fingerprint
from hf_genmod.data.labelled_dataset import LabelledDataset
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.randomness import Augmentation, BatchRandom
from hf_genmod.data.shards import Shards
from hf_genmod.data.stream import ShardEntries
from hf_genmod.data.stream_encoding import encode_stream
from hf_genmod.errors import counted
from hf_genmod.models.image_autoencoder import ImageAutoencoder
from hf_genmod.processes import processes

_PIXELS = 2**18  # of images that a CPU, with its caches, encodes together


class LatentDataset(LabelledDataset):
    r"""
    The posteriors q(z | x) = N(μ, diag σ²) of images and, where wanted, of their mirror images, standardised by the
    factors in the config of the autoencoder: (z − shift_factor) · scaling_factor. The images are encoded once.

    Args:
        pictures ([`PictureDataset`]): The images.
        vae (`ModelMixin`): [`VariationalAutoencoder`], [`Autoencoder`] (whose σ is 0) or an `AutoencoderKL`.
        mirrored (`bool`): Whether to encode the mirror image of each image, too.

    Attributes:
        resolution (`tuple[int, int]`), channels (`int`): (h, w) and c of the latents.

    Raises:
        ValueError: If the size or channels of the images do not fit the autoencoder.
    """

    def __init__(self, pictures: PictureDataset, vae: ModelMixin, mirrored: bool = False):
        _check_fit(pictures, vae)
        self.pictures, self.vae, self.mirrored = pictures, vae, mirrored
        self.labels, self.label_names, self.captions = pictures.labels, pictures.label_names, pictures.captions
        self.name, self.skipped, self.value_range = pictures.name, pictures.skipped, pictures.value_range
        self.may_have_been_trained_on = pictures.may_have_been_trained_on
        shape = encode(vae, pictures.sample.x_0([0])).shape  # (1, 2, c, h, w)
        self.channels, self.resolution, self._shape = shape[2], tuple(shape[3:]), (1 + mirrored, *shape[1:])
        # The fingerprint of a stream covers the pixels of its sample alone by that of the sample.
        images = " ".join(dict.fromkeys([pictures.fingerprint, pictures.sample.fingerprint]))
        variants = f"{images} {weights_fingerprint(vae)} {mirrored}"
        key = hashlib.blake2b(variants.encode(), digest_size=16).hexdigest()
        self._posteriors = self._encode_all(key)
        self._factors = cache_folder("latents") / f"{key}.json"  # that standardise them, once they have been measured
        # The last digits of the factors depend on the number of threads that measured them.
        factors = f"{key} {vae.config.scaling_factor:.4g} {vae.config.get('shift_factor') or 0.0:.4g}"
        self.fingerprint = hashlib.blake2b(factors.encode(), digest_size=8).hexdigest()

    def _encode_all(self, key: str) -> datasets.Dataset:
        """The posteriors of all images in the column "encoded"."""

        def encode_rows(batch):
            return {"encoded": self._encode(self.pictures.x_0(batch["index"])).flatten(1).numpy()}

        feature = datasets.List(datasets.Value("float32"), length=math.prod(self._shape))
        rows = {"index": range(len(self))}
        return encode_once(rows, encode_rows, feature, "latents", key, _batch_size(self.pictures, self.vae))

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """μ and σ of images and their mirror images, (n, variants, 2, c, h, w) on the CPU."""
        variants = [x, x.flip(-1)] if self.mirrored else [x]
        return torch.stack([encode(self.vae, x) for x in variants], dim=1)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getstate__(self) -> dict:
        """What a process that loads batches needs: the autoencoder without its weights, which an accelerator has."""
        return vars(self) | {"vae": types.SimpleNamespace(config=self.vae.config)}

    def __getitems__(self, indices: Sequence[int]) -> dict:
        """A batch as of [`PictureDataset`], but with "posteriors" for "images": `float32` (n, variants, 2, c, h, w),
        the standardised μ and σ of each image and of its mirror image."""
        indices = torch.as_tensor(indices).tolist()
        posteriors = self._standardised(self._posteriors[indices]["encoded"].unflatten(1, self._shape))
        return {"posteriors": posteriors, **self._targets(indices)}

    def _standardised(self, posteriors: torch.Tensor) -> torch.Tensor:
        """μ and σ, (n, variants, 2, c, h, w), of the standardised latents."""
        (mean, std), shift = posteriors.unbind(2), self.vae.config.get("shift_factor") or 0.0
        return torch.stack([mean - shift, std], dim=2) * self.vae.config.scaling_factor

    def x_0(
        self, batch: dict | Sequence[int], rng: BatchRandom | None = None, augment: Augmentation = Augmentation()
    ) -> torch.Tensor:
        """Standardised latents of a batch, `float32` (n, c, h, w): drawn from the posteriors, or without `rng` their
        means. Arguments as of [`PictureDataset.x_0`]."""
        posteriors = (batch if isinstance(batch, dict) else self.__getitems__(batch))["posteriors"]
        return posteriors[:, 0, 0] if rng is None else draw_latents(posteriors, rng, augment.mirror)

    def joined(self, batch: dict, x_0: torch.Tensor) -> dict:
        """A batch of the posteriors of another, followed by latents given as x_0, which have no variance."""
        posteriors = batch["posteriors"]
        known = torch.stack([x_0, torch.zeros_like(x_0)], dim=1)[:, None]  # (m, 1, 2, c, h, w)
        return {"posteriors": torch.cat([posteriors, known.expand(-1, posteriors.shape[1], -1, -1, -1, -1)])}

    def check_augmentation(self, augment: Augmentation) -> None:
        """Raises a `ValueError` for an augmentation that needs other images than those encoded."""
        if augment.mirror and not self.mirrored:
            raise ValueError("horizontal_flip: the mirrored images were not encoded; encode them as well")
        refuse_shift(augment.max_shift)


class StreamedLatents(LatentDataset):
    """
    The latents of streamed images, of which each step computes the posteriors q(z | x), of images varied as the run
    asks for. They are standardised as those of a [`LatentDataset`].

    Args:
        pictures ([`StreamedPictures`]): The images.
        vae (`ModelMixin`): As of [`LatentDataset`].
    """

    def __init__(self, pictures: PictureDataset, vae: ModelMixin):
        sample = LatentDataset(pictures.sample, vae)
        vars(self).update(vars(sample))
        self.pictures, self.labels, self.captions = pictures, pictures.labels, pictures.captions
        self.name, self.skipped, self.order = pictures.name, pictures.skipped, pictures.order
        factors = f"{pictures.fingerprint} {sample.fingerprint}"
        self.fingerprint = hashlib.blake2b(factors.encode(), digest_size=8).hexdigest()

    def __getitems__(self, indices: Sequence[int]) -> dict:
        """A batch of the images, see [`StreamedPictures`]."""
        return self.pictures.__getitems__(indices)

    def x_0(
        self, batch: dict | Sequence[int], rng: BatchRandom | None = None, augment: Augmentation = Augmentation()
    ) -> torch.Tensor:
        """As of [`LatentDataset.x_0`], on the device of the autoencoder."""
        posteriors = self._standardised(moments(self.vae, self.pictures.x_0(batch, rng, augment))[:, None])
        return posteriors[:, 0, 0] if rng is None else draw_latents(posteriors, rng)

    def check_augmentation(self, augment: Augmentation) -> None:
        """The images are varied before they are encoded, in every way."""


class CachedLatents(LatentDataset):
    """
    The latents of streamed images, which are encoded once, into parquet files that are read as those of the images.
    They hold fp16 numbers, where rounding changes the latents by at most a thousandth of their standard deviation.

    Args:
        pictures ([`StreamedPictures`]): The images.
        vae, mirrored: As of [`LatentDataset`].
    """

    def _encode_all(self, key: str) -> ShardEntries:
        num_bytes = len(self._as_bytes(self.pictures.sample.x_0([0]))[0])
        batch_size = _batch_size(self.pictures, self.vae)
        shards = Shards(encode_stream(self.pictures, self._as_bytes, num_bytes, key, batch_size))
        if self.labels is not None:  # also of images that took the place of others
            self.labels = torch.tensor(shards.labels("label").with_format("numpy")["label"][:])
        return ShardEntries(shards, self.name, "encoded", None if self.captions is None else "caption")

    def _as_bytes(self, x: torch.Tensor) -> list[bytes]:
        """The posteriors of images."""
        posteriors = self._encode(x)
        half = posteriors.half()
        error = (half.float() - posteriors).square().mean().sqrt()
        is_small = error <= 1e-3 * posteriors[:, :, 0].std()  # not if a number is infinite in fp16
        return [row.tobytes() for row in (half if is_small else posteriors).numpy()]

    def __getitems__(self, indices: Sequence[int]) -> dict:
        """As of [`LatentDataset`], with "failure" or "unusable" as of [`StreamedPictures`]."""

        def decode(_, entry: dict | Exception) -> np.ndarray:
            if isinstance(entry, Exception):  # why it cannot be read
                raise entry
            content = entry["bytes"]
            return np.frombuffer(content, f"f{len(content) // math.prod(self._shape)}").reshape(self._shape)

        blank, skip = np.zeros(self._shape, "float16"), self.pictures.on_bad_image == "skip"
        posteriors, batch = self._posteriors.batch(indices, decode, blank, self.labels, skip)
        if "captions" in batch:
            batch["captions"] = [json.loads(caption or '""') for caption in batch["captions"]]
        return {"posteriors": self._standardised(posteriors.float()), **batch}

    def order(self, philox, epoch: int, batch_size: int) -> BlockOrder:
        """As of [`StreamedPictures`]."""
        return self._posteriors.order(philox, epoch, batch_size)


def refuse_shift(max_shift: int) -> None:
    """Raises a `ValueError` if latents that are encoded once are to be those of shifted images."""
    if max_shift:
        remedy = "shift the images of their autoencoder, or stream them without --cache_latents"
        raise ValueError(f"max_shift: latents cannot be moved by pixels; {remedy}")


def latents_of(
    pictures: PictureDataset, vae: ModelMixin, mirrored: bool = False, cached: bool = False
) -> LatentDataset:
    """The latents of images, encoded once, or of a stream, encoded in each step or, if they are `cached`, once."""
    if pictures.sample is pictures:
        return LatentDataset(pictures, vae, mirrored)
    return CachedLatents(pictures, vae, mirrored) if cached else StreamedLatents(pictures, vae)


def draw_latents(posteriors: torch.Tensor, rng: BatchRandom, mirror: bool = False) -> torch.Tensor:
    """z = μ + σ ε, (n, c, h, w), of posteriors (n, variants, 2, c, h, w); with `mirror`, half of them mirrored."""
    if mirror:
        mirrored = (rng.uniform() < 0.5).to(posteriors.device)[:, None, None, None, None]
        mean, std = torch.where(mirrored, posteriors[:, 1], posteriors[:, 0]).unbind(1)
    else:
        mean, std = posteriors[:, 0].unbind(1)
    return mean + std * rng.normal(mean.shape[1:])


def standardised(
    vae: ModelMixin, pictures: PictureDataset, mirrored: bool = False, cached: bool = False
) -> LatentDataset:
    """The latents of images, as of [`latents_of`], under a copy of an autoencoder whose factors standardise them."""
    vae = copy.deepcopy(vae)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    latents = latents_of(pictures if cached else pictures.sample, vae, mirrored, cached)
    with processes().main_process_first():
        if not latents._factors.is_file():
            parts = torch.arange(len(latents)).split(1024)
            _standardise(vae, (latents.__getitems__(part)["posteriors"].flatten(0, 1) for part in parts))
            factors = {name: vae.config[name] for name in ("scaling_factor", "shift_factor")}
            partial = latents._factors.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(factors), encoding="utf-8")
            partial.replace(latents._factors)
    vae.register_to_config(**json.loads(latents._factors.read_text(encoding="utf-8")))
    return latents_of(pictures, vae, mirrored, cached)


def with_statistics(vae: ImageAutoencoder, pictures: PictureDataset, count: int = 1024) -> ImageAutoencoder:
    """A copy of an autoencoder with statistics of the latents of up to `count` images: the factors that standardise
    them and, where the autoencoder has no other prior, a Gaussian fitted to them."""
    vae = copy.deepcopy(vae).eval()
    indices = torch.arange(0, len(pictures), -(-len(pictures) // count))
    posteriors = torch.cat([encode(vae, pictures.x_0(part)) for part in indices.split(_batch_size(pictures, vae))])
    _standardise(vae, [posteriors])
    if not vae.has_standard_prior:
        vae.fit_prior(posteriors[:, 0])
    return vae


def encode(vae: ModelMixin, x: torch.Tensor) -> torch.Tensor:
    """μ and σ of q(z | x), (n, 2, c, h, w) on the CPU, of images x (n, C, H, W) in [-1, 1]."""
    return moments(vae, x).cpu()


@torch.no_grad()
def moments(vae: ModelMixin, x: torch.Tensor) -> torch.Tensor:
    """The same on the device of the autoencoder."""
    output = vae.encode(x.to(vae.device, vae.dtype))
    if hasattr(output, "latent_dist"):
        mean, std = output.latent_dist.mean, output.latent_dist.std
    else:
        mean, std = output.latents, torch.zeros_like(output.latents)
    return torch.stack([mean, std], dim=1).float()


def _batch_size(pictures: PictureDataset, vae: ModelMixin) -> int:
    pixels = _PIXELS if vae.device.type == "cpu" else 16 * _PIXELS
    return max(1, pixels // (pictures.resolution[0] * pictures.resolution[1]))


def _standardise(vae: ModelMixin, parts: Iterable[torch.Tensor]) -> None:
    """Sets `shift_factor` and `scaling_factor` to the mean of latents and the inverse of their standard deviation."""
    total, squares, count = 0.0, 0.0, 0
    for part in parts:  # (n, 2, c, h, w)
        mean, std = part.double().unbind(1)
        total, squares, count = total + mean.sum(), squares + (mean**2 + std**2).sum(), count + mean.numel()
    shift = (total / count).item()
    variance = max((squares / count).item() - shift**2, 1e-12)  # E[z²] = E[μ² + σ²]
    vae.register_to_config(scaling_factor=variance**-0.5, shift_factor=shift)


def _check_fit(pictures: PictureDataset, vae: ModelMixin) -> None:
    channels, (height, width) = vae.config.in_channels, pictures.resolution
    if pictures.channels != channels:
        raise ValueError(
            f"vae: it takes images of {counted(channels, 'channel')}, and these have {pictures.channels}; train one "
            f"for them, or give --channels {channels}"
        )
    if hasattr(vae, "check_size"):
        vae.check_size(pictures.resolution)
        return
    factor = 2 ** (len(vae.config.block_out_channels) - 1)  # diffusers would cut off the rest
    if height % factor or width % factor:
        raise ValueError(
            f"vae: it needs a height and width that {factor} divides, and these images are {height}x{width}; give "
            f"--resolution {-(-height // factor) * factor}x{-(-width // factor) * factor}, for example"
        )
