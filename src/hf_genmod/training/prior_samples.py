"""Samples by which a model keeps what it knows while it learns something new."""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from hf_genmod.data.encoding import weights_fingerprint
from hf_genmod.data.labelled_dataset import LabelledDataset
from hf_genmod.data.randomness import Augmentation, BatchRandom
from hf_genmod.drawing.samples import draw_images
from hf_genmod.errors import counted
from hf_genmod.pipelines.base import GenerationPipeline
from hf_genmod.processes import processes


class PriorSamples(torch.utils.data.Dataset):
    """
    New images and, equally often, samples of the model before its training: the prior preservation of Ruiz et al. 2022
    (https://arxiv.org/abs/2208.12242, Eq. 2). All are kept in memory, and the samples in the cache folder of
    `datasets`, too, so that a run that is continued does not draw them again.

    Args:
        pictures ([`PictureDataset`] or [`LatentDataset`]): The new images.
        pipeline ([`GenerationPipeline`]): The model before its training.
        count (`int`): The number of samples, not negative; with 0 there are only the new images.
        request (`dict[str, list]`): The arguments to draw samples by, "class_labels" or "prompt"; the values of a list
            are used in turn.
        seed (`int`): The seed of the first sample.
    """

    def __init__(
        self, pictures: LabelledDataset, pipeline: GenerationPipeline, count: int, request: dict[str, list], seed=0
    ):
        if count < 0:
            raise ValueError(f"prior_samples: {count} is negative")
        self.name, self.skipped, self.resolution = pictures.name, pictures.skipped, pictures.resolution
        self.pictures, self.num_new, self.count = pictures, len(pictures), count
        self._rows, key = pictures.__getitems__(range(self.num_new)), ""
        if count:
            request = {name: [values[i % len(values)] for i in range(count)] for name, values in request.items()}
            key, new = _key(pipeline, request, count, seed), self._rows
            self._rows = rows = pictures.joined(new, _kept_samples(key, pipeline, request, count, seed))
            if "class_labels" in request:
                rows["class_labels"] = torch.cat([new["class_labels"], torch.tensor(request["class_labels"])])
            if "prompt" in request:
                rows["captions"] = [*new["captions"], *request["prompt"]]
        self.fingerprint = hashlib.blake2b(f"{pictures.fingerprint} {key}".encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return 2 * max(self.num_new, self.count) if self.count else self.num_new

    def __getitems__(self, indices: Sequence[int]) -> dict:
        """A batch as that of the new images. The first half of the indices counts the new images, the second half the
        samples; the smaller group is repeated."""
        half = max(self.num_new, self.count)
        rows = [i % self.num_new if i < half else self.num_new + i % self.count for i in indices]
        return {
            name: values[rows] if isinstance(values, torch.Tensor) else [values[row] for row in rows]
            for name, values in self._rows.items()
        }

    def x_0(
        self, batch: dict | Sequence[int], rng: BatchRandom | None = None, augment: Augmentation = Augmentation()
    ) -> torch.Tensor:
        """The images or latents of a batch as the models see them."""
        return self.pictures.x_0(batch if isinstance(batch, dict) else self.__getitems__(batch), rng, augment)

    def check_augmentation(self, augment: Augmentation):
        """Raises a `ValueError` if the new images do not allow the augmentation."""
        self.pictures.check_augmentation(augment)


def _key(pipeline: GenerationPipeline, request: dict[str, list], count: int, seed: int) -> str:
    """A hash of all that `unguided_samples` depend on."""
    models = [pipeline.components.get(name) for name in ("unet", "text_encoder")]
    weights = [weights_fingerprint(model) for model in models if model is not None]
    sampler = sorted(item for item in pipeline.scheduler.config.items() if not item[0].startswith("_"))
    sampler = (type(pipeline.scheduler).__name__, sampler, pipeline.config.get("defaults"))
    key = f"{weights} {request} {count} {seed} {sampler}"
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def _kept_samples(
    key: str, pipeline: GenerationPipeline, request: dict[str, list], count: int, seed: int
) -> torch.Tensor:
    """`unguided_samples`, drawn once for a key."""
    file, state = Path(datasets.config.HF_DATASETS_CACHE, "hf_genmod", "samples", f"{key}.pt"), processes()
    if all(gather_object([file.is_file()])):  # on all machines
        return torch.load(file, weights_only=True)
    if state.is_main_process:
        tqdm.write(f"drawing {counted(count, 'sample')} of the model to keep what it knows", file=sys.stderr)
    samples = unguided_samples(pipeline, request, count, seed)
    if state.is_local_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(samples, partial := file.with_suffix(f".{os.getpid()}"))
        partial.replace(file)
    return samples


def unguided_samples(pipeline: GenerationPipeline, request: dict[str, list], count: int, seed=0) -> torch.Tensor:
    """Samples x_0 without guidance, (count, c, h, w), as the U-Net sees them."""
    off = {"guidance_scale": 1.0, "classifier_scale": 0.0}
    guidance = {name: scale for name, scale in off.items() if name == pipeline.guidance_argument}
    samples = draw_images(pipeline, request, count, seed, output_type="latent", **guidance)
    samples = torch.stack(samples).cpu()
    return samples.clamp(-1, 1) if pipeline.vae is None else samples
