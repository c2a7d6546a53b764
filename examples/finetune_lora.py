"""
Teaches a trained model something new by a few pictures, as an adapter (LoRA) that leaves the model as it is: a new
class of a class-conditional model, or a new word of a text-to-image model.

    python examples/finetune_lora.py --base runs/model --dataset path/to/zebras --class_name zebra \
        --output_dir runs/zebra --max_train_minutes 4
    python examples/finetune_lora.py --base runs/text --dataset path/to/zebras --caption "a zebra" \
        --output_dir runs/zebra --max_train_minutes 4
"""

import dataclasses
import os

from diffusers.utils import make_image_grid

from hf_genmod import DenoisingObjective, Trainer, TrainingConfig, load_pipeline
from hf_genmod.data.captions import Tokens, all_captions
from hf_genmod.data.encoding import weights_fingerprint
from hf_genmod.drawing.grids import caption_rows, class_rows
from hf_genmod.drawing.samples import draw_images
from hf_genmod.processes import processes
from hf_genmod.recipes.arguments import SharingArguments
from hf_genmod.recipes.pictures import CaptionedDataArguments
from hf_genmod.recipes.run import run
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.training.adapters import attach_adapter, with_names_for
from hf_genmod.training.prior_samples import PriorSamples
from hf_genmod.training.text_encoder import TextConditionedUNet


@dataclasses.dataclass
class LoraArguments:
    base: str = dataclasses.field(
        metadata={
            "help": "The model: the folder of its run, or its id on the Hub.",
            "built_on": "base model",
            "may_change": True,
        }
    )
    class_name: str | None = dataclasses.field(
        default=None, metadata={"help": "Class of the pictures, where they are not in class folders."}
    )
    caption: str | None = dataclasses.field(
        default=None, metadata={"help": "Caption of the pictures, where they have none."}
    )
    rank: int = dataclasses.field(default=3, metadata={"help": "Rank of the adapter."})
    train_text_encoder: bool = dataclasses.field(default=False, metadata={"help": "Adapt the text encoder, too."})
    prior_samples: int = dataclasses.field(
        default=256,
        metadata={"help": "Samples of the model among the pictures, for it to keep what it knows; 0 for none."},
    )
    prior_captions: list[str] = dataclasses.field(
        default_factory=lambda: [""], metadata={"help": "What these show, for a text-to-image model."}
    )
    condition_dropout: float = dataclasses.field(
        default=0.1, metadata={"help": "How often a class or caption is left out."}
    )
    guidance_scale: float = dataclasses.field(default=2.0, metadata={"help": "γ of the samples drawn while training."})

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank: {self.rank} is not positive")


def main(
    data: CaptionedDataArguments, lora: LoraArguments, config: TrainingConfig, sharing: SharingArguments
) -> Trainer:
    pipeline = load_pipeline(lora.base).to(processes().device)
    unet, text_encoder = pipeline.components.get("unet"), pipeline.components.get("text_encoder")
    if "classifier" in pipeline.components:
        raise ValueError("base: an adapter of a ClassifierGuidedPipeline is trained for the model that it guides")
    if sharing.push_to_hub and os.path.isdir(lora.base):
        raise ValueError("base: it is a folder here, which others do not have; push it first, and give its id")
    if lora.train_text_encoder and text_encoder is None:
        raise ValueError("train_text_encoder: the model has none; leave it out")
    pictures = data.load_more_for(pipeline, mirrored=config.horizontal_flip)
    num_known = unet.config.num_classes or 0
    pictures = with_names_for(pipeline, pictures, lora.class_name, lora.caption)

    network, text = unet, None
    prior = {"class_labels": list(range(num_known))} if num_known else {}
    if text_encoder is not None:
        network, text = TextConditionedUNet(unet, text_encoder), Tokens(pipeline.tokenizer, text_encoder)
        prior = {"prompt": lora.prior_captions}
    fingerprint = weights_fingerprint(network)
    scheduler = AncestralDDPMScheduler.from_config(pipeline.scheduler.config)
    objective = DenoisingObjective(scheduler, unet.null_label, "balanced", lora.condition_dropout, text)
    dataset = PriorSamples(pictures, pipeline, lora.prior_samples, prior, config.seed)

    network.requires_grad_(False)
    attach_adapter(
        unet, lora.rank, config.seed, num_new_classes=unet.config.num_classes - num_known if num_known else 0
    )
    if lora.train_text_encoder:
        attach_adapter(text_encoder, lora.rank, config.seed)

    def make_pipeline(network):
        pipeline.unet = getattr(network, "unet", network)
        if text_encoder is not None:
            pipeline.text_encoder = network.text_encoder
        return pipeline

    def draw(pipeline):
        if text_encoder is not None:
            captions = [*all_captions(pictures)[:6], *lora.prior_captions[:2]]
            return caption_rows(pipeline, captions, guidance_scale=lora.guidance_scale)
        if num_known:
            return class_rows(pipeline, range(pipeline.num_classes)[::-1], guidance_scale=lora.guidance_scale)
        return make_image_grid(draw_images(pipeline, count=64), rows=8, cols=8)

    def load(folder):
        pipeline = load_pipeline(lora.base)
        pipeline.load_lora_weights(folder)
        return pipeline

    return Trainer(
        network,
        objective,
        dataset,
        config,
        make_pipeline,
        draw,
        save=lambda pipeline, folder: pipeline.save_lora_weights(folder),
        load=load,
        depends_on={"base": fingerprint},
    )


if __name__ == "__main__":
    run(main)
