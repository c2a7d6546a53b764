"""Low-rank adapters (LoRA; Hu et al. 2021, https://arxiv.org/abs/2106.09685): what a model learns from a few pictures
while its own weights stay as they are, and the samples that keep it from forgetting the rest.
"""

import hashlib
from collections.abc import Sequence

import torch
from peft import LoraConfig
from torch.nn.utils import parametrize

from hf_genmod.data import PictureDataset, to_model_range
from hf_genmod.latents import LatentDataset, weights_fingerprint
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel
from hf_genmod.pipelines.genmod_pipelines import GenerationPipeline
from hf_genmod.sampling import draw_images
from hf_genmod.text import all_captions

ADAPTER = "default"  # its name while it is trained

# Of the U-Net the convolutions and linear layers of residual blocks and attention, but for the 1x1 ones of the skips;
# `Upsample` is no plain convolution.
_UNET_LAYERS = r".*\.(conv1|conv2|scale_shift|to_q|to_k|to_v|to_out)"


def attach_adapter(model: torch.nn.Module, rank: int, seed: int = 0, num_new_classes: int = 0):
    """
    Attaches an adapter that does nothing yet, W + B A with B = 0, and leaves nothing else to train than it and the
    embeddings of the newest classes.

    Args:
        model ([`DenoisingUNet2DModel`] or a text encoder of transformers): Which is changed.
        rank (`int`): Rows of A and columns of B.
        seed (`int`): Of A.
        num_new_classes (`int`): How many rows of the class embedding are trained along, the last before the null row.

    Raises:
        ValueError: If the rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"rank: {rank} is not positive")
    model.requires_grad_(False)
    torch.manual_seed(seed)
    layers = _UNET_LAYERS if isinstance(model, DenoisingUNet2DModel) else "all-linear"
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), ADAPTER)
    if num_new_classes:
        embedding = model.class_embedding.requires_grad_(True)
        parametrize.register_parametrization(embedding, "weight", _NewRows(embedding.weight, num_new_classes))


def name_pictures(
    pipeline: GenerationPipeline,
    pictures: PictureDataset | LatentDataset,
    class_name: str | None = None,
    caption: str | None = None,
) -> dict[str, list[str]]:
    """
    Gives pictures the labels or captions by which a pipeline is to be asked for such; their classes that it does not
    know are added to it.

    Args:
        pipeline ([`GenerationPipeline`]): Which is to learn them.
        pictures ([`PictureDataset`] or [`LatentDataset`]): Which are changed.
        class_name (`str`, *optional*): The class of those without labels, for a class-conditional pipeline.
        caption (`str`, *optional*): The caption of those without captions, for a text-to-image pipeline.

    Returns:
        `dict`: How to ask for them: the "class_labels" or the "prompt" that occur; nothing of an unconditional one.

    Raises:
        ValueError: If a name is missing, or the pipeline takes none of the kind.
    """
    takes_classes, takes_text = hasattr(pipeline, "add_class"), "tokenizer" in pipeline.components
    for argument, value, is_taken in (("class_name", class_name, takes_classes), ("caption", caption, takes_text)):
        if value is not None and not is_taken:
            raise ValueError(f"{argument}: a {type(pipeline).__name__} is not asked by it; leave it out")
    if takes_text:
        if (pictures.captions is None) == (caption is None):
            has = "the pictures have captions; leave it out" if caption else "say what they show, or caption each"
            raise ValueError(f"caption: {has}")
        pictures.captions = pictures.captions or [caption] * len(pictures)
        return {"prompt": all_captions(pictures)}
    if not takes_classes:
        return {}
    if (pictures.labels is None) == (class_name is None):
        has = (
            f"the pictures are of {', '.join(pictures.label_names)}; leave it out"
            if class_name
            else ("name the class of the pictures, or sort them into class folders")
        )
        raise ValueError(f"class_name: {has}")
    if class_name is not None:
        pictures.labels, pictures.label_names = torch.zeros(len(pictures)).long(), [class_name]
    for name in pictures.label_names:
        if name not in pipeline.labels:
            pipeline.add_class(name, adapter_name=ADAPTER)
    asked = {"class_labels": list(pictures.label_names)}
    pictures.labels = torch.tensor([pipeline.labels[name] for name in pictures.label_names])[pictures.labels]
    pictures.label_names = list(pipeline.labels)
    return asked


class _NewRows(torch.nn.Module):
    """The rows of a class embedding as a function of those that are trained: known ones, new ones, the null row."""

    def __init__(self, weight, count):
        super().__init__()
        self.count = count
        self.register_buffer("known", weight[: -1 - count].detach().clone())
        self.register_buffer("null", weight[-1:].detach().clone())

    def forward(self, new):
        return torch.cat([self.known, new, self.null])

    def right_inverse(self, weight):
        return weight[-1 - self.count : -1].clone()


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


def draw_samples(pipeline: GenerationPipeline, asked: dict[str, list], count: int, seed: int) -> torch.Tensor:
    """Unguided samples x_0 as the U-Net sees them, (count, c, h, w), of "class_labels", "captions" or nothing."""
    guidance = {"guidance_scale": 1.0} if asked else {}
    samples = draw_images(
        pipeline, asked.get("class_labels"), asked.get("captions"), count, seed,
        num_inference_steps=20, output_type="latent", **guidance,
    )  # fmt: skip
    samples = torch.stack(samples).cpu()
    return samples.clamp(-1, 1) if pipeline.vae is None else samples


def _joined(new, old):
    return torch.cat([new, torch.as_tensor(old)]) if isinstance(new, torch.Tensor) else new + old
