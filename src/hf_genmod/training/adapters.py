"""Prepares a model and images for the training of a low-rank adapter."""

import torch
from peft import LoraConfig
from torch.nn.utils import parametrize

from hf_genmod.data.labelled_dataset import LabelledDataset
from hf_genmod.errors import a_or_an
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel
from hf_genmod.models.initial_weights import SeededWeights
from hf_genmod.pipelines.base import GenerationPipeline

ADAPTER = "default"  # its name while it is trained

# The convolutions and linear layers of the U-Net's residual blocks and attention, without the 1x1 convolutions of the
# skips. (`Upsample` is no plain convolution.)
_UNET_LAYERS = r".*\.(conv1|conv2|scale_shift|to_q|to_k|to_v|to_out)"


def attach_adapter(model: torch.nn.Module, rank: int, seed: int = 0, num_new_classes: int = 0):
    """
    Attaches an adapter W + B A, with B = 0 at first, and freezes all other weights but the embeddings of new classes.

    Args:
        model ([`DenoisingUNet2DModel`] or a text encoder of transformers): The model, which is changed.
        rank (`int`): Number of rows of A and columns of B; positive.
        seed (`int`): Seed of A.
        num_new_classes (`int`): Number of rows of the class embedding to train, the last ones before the null row.
    """
    if rank < 1:
        raise ValueError(f"rank: {rank} is not positive")
    model.requires_grad_(False)
    layers = _UNET_LAYERS if isinstance(model, DenoisingUNet2DModel) else "all-linear"
    with SeededWeights(seed):
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), ADAPTER)
    if num_new_classes:
        embedding = model.class_embedding.requires_grad_(True)
        parametrize.register_parametrization(embedding, "weight", _NewRows(embedding.weight, num_new_classes))


def with_names_for(
    pipeline: GenerationPipeline, pictures: LabelledDataset, class_name: str | None = None, caption: str | None = None
) -> LabelledDataset:
    """
    Images with the labels or captions by which a pipeline will be asked for them; for an unconditional pipeline, the
    images as they are. Classes that the pipeline does not know are added to it.

    Args:
        class_name (`str`, *optional*): The class of images without labels, for a class-conditional pipeline.
        caption (`str`, *optional*): The caption of images without captions, for a text-to-image pipeline.

    Raises:
        ValueError: If a name is missing, or the pipeline is not asked by names of this kind.
    """
    taken = pipeline.example_request()
    for argument, value, name in (("class_name", class_name, "class_labels"), ("caption", caption, "prompt")):
        if value is not None and name not in taken:
            raise ValueError(f"{argument}: {a_or_an(type(pipeline).__name__)} is not asked by it; leave it out")
    if "prompt" in taken:
        if (pictures.captions is None) == (caption is None):
            has = "the images have captions; leave it out" if caption else "say what they show, or caption each"
            raise ValueError(f"caption: {has}")
        return pictures if caption is None else pictures.with_captions([caption] * len(pictures))
    if "class_labels" not in taken:
        return pictures
    names, labels = pictures.label_names, pictures.labels
    if (labels is None) == (class_name is None):
        if class_name:
            raise ValueError(f"class_name: the images are of {', '.join(names)}; leave it out")
        raise ValueError("class_name: name the class of the images, or sort them into class folders")
    if class_name is not None:
        names, labels = [class_name], torch.zeros(len(pictures)).long()
    for name in [name for name in names if name not in pipeline.labels]:
        if not hasattr(pipeline, "add_class"):
            kind = a_or_an(type(pipeline).__name__)
            raise ValueError(f"class_name: {kind} is not asked by {name!r} and cannot learn it")
        pipeline.add_class(name, adapter_name=ADAPTER)
    labels = torch.tensor([pipeline.labels[name] for name in names])[labels]
    return pictures.with_labels(labels, list(pipeline.labels))


class _NewRows(torch.nn.Module):
    """The class-embedding table, of which only the new rows are trained: known rows, new rows, null row."""

    def __init__(self, weight, count):
        super().__init__()
        self.count = count
        self.register_buffer("known", weight[: -1 - count].detach().clone())
        self.register_buffer("null", weight[-1:].detach().clone())

    def forward(self, new):
        return torch.cat([self.known, new, self.null])

    def right_inverse(self, weight):
        return weight[-1 - self.count : -1].clone()
