"""Attaches a low-rank adapter to a model for training."""

import torch
from peft import LoraConfig
from torch.nn.utils import parametrize

from hf_genmod.data.captions import all_captions
from hf_genmod.data.latents import LatentDataset
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel
from hf_genmod.pipelines.base import GenerationPipeline

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
