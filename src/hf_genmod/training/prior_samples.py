"""Samples that preserve what a model knows."""

import hashlib
from collections.abc import Sequence

import torch

from hf_genmod.data.latents import LatentDataset, weights_fingerprint
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.randomness import Augmentation, BatchRandom
from hf_genmod.data.value_range import to_model_range
from hf_genmod.drawing.samples import draw_images
from hf_genmod.pipelines.base import GenerationPipeline


class WithPrior(torch.utils.data.Dataset):
    """
    A few new pictures, and as often samples of the model as it was before, of what it is to keep: the prior
    preservation of Ruiz et al. 2022 (https://arxiv.org/abs/2208.12242, Eq. 2). All are kept in memory.

    Args:
        pictures ([`PictureDataset`] or [`LatentDataset`]): The new ones.
        pipeline ([`GenerationPipeline`]): The model as it was.
        count (`int`): How many samples to draw; 0 for the new pictures alone.
        conditions (`dict`): What to draw samples of, in turn: a list of "class_labels" or "captions", or nothing.
        seed (`int`): Sample i has the seed `seed` + i.

    Raises:
        ValueError: If the count is negative.
    """

    def __init__(
        self,
        pictures: PictureDataset | LatentDataset,
        pipeline: GenerationPipeline,
        count: int,
        conditions: dict[str, list],
        seed: int = 0,
    ):
        if count < 0:
            raise ValueError(f"prior_samples: {count} is negative")
        self.pictures = pictures
        self.name, self.skipped, self.resolution = pictures.name, pictures.skipped, pictures.resolution
        self.mirrored = getattr(pictures, "mirrored", True)
        self.num_new, self.count = len(pictures), count
        drawn = f"{weights_fingerprint(pipeline.unet)} {conditions} {count} {seed}"
        self.fingerprint = hashlib.blake2b(f"{pictures.fingerprint} {drawn}".encode(), digest_size=8).hexdigest()
        self._rows = pictures.__getitems__(range(self.num_new))  # the new pictures, and then the samples
        if "images" in self._rows:
            self._rows["images"] = to_model_range(self._rows["images"])
        if count:
            asked = {name: [values[i % len(values)] for i in range(count)] for name, values in conditions.items()}
            samples = draw_samples(pipeline, asked, count, seed)
            if "posteriors" in self._rows:  # (n, variants, 2, c, h, w)
                known = torch.stack([samples, torch.zeros_like(samples)], dim=1)[:, None]
                old = {"posteriors": known.expand(-1, self._rows["posteriors"].shape[1], -1, -1, -1, -1)}
            else:
                old = {"images": samples}
            self._rows = {name: _joined(new, (old | asked)[name]) for name, new in self._rows.items()}

    def __len__(self) -> int:
        return 2 * max(self.num_new, self.count) if self.count else self.num_new

    def __getitems__(self, indices: Sequence[int]) -> dict:
        """A batch as that of the new pictures. The first half of the indices counts these, the second the samples,
        whichever are fewer several times."""
        half = max(self.num_new, self.count)
        rows = [i % self.num_new if i < half else self.num_new + i % self.count for i in indices]
        return {
            name: values[rows] if isinstance(values, torch.Tensor) else [values[row] for row in rows]
            for name, values in self._rows.items()
        }

    def x_0(
        self,
        batch: dict | Sequence[int],
        rng: BatchRandom | None = None,
        augment: Augmentation = Augmentation(),
    ) -> torch.Tensor:
        """The images or latents of a batch as the models see them, as those of the new images."""
        return self.pictures.x_0(batch if isinstance(batch, dict) else self.__getitems__(batch), rng, augment)

    def check_augmentation(self, augment: Augmentation) -> None:
        """Raises a `ValueError` for an augmentation that the new images do not allow."""
        self.pictures.check_augmentation(augment)


def draw_samples(pipeline: GenerationPipeline, asked: dict[str, list], count: int, seed: int) -> torch.Tensor:
    """Unguided samples x_0 as the U-Net sees them, (count, c, h, w), of "class_labels", "captions" or nothing."""
    guidance = {"guidance_scale": 1.0} if asked else {}
    request = {"prompt" if name == "captions" else name: values for name, values in asked.items()}
    options = guidance | {"num_inference_steps": 20, "output_type": "latent"}
    samples = draw_images(pipeline, request, count, seed, **options)
    samples = torch.stack(samples).cpu()
    return samples.clamp(-1, 1) if pipeline.vae is None else samples


def _joined(new, old):
    return torch.cat([new, torch.as_tensor(old)]) if isinstance(new, torch.Tensor) else new + old
