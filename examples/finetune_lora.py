# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Teaches a trained model a new class or a new word from a few images, by an adapter (LoRA). The model stays as it is.

    hf_genmod train lora --base runs/model --dataset zebras --class_name zebra --max_train_minutes 4
"""

import dataclasses
import os

from transformers.hf_argparser import HfArg

from hf_genmod import DenoisingObjective, Trainer, TrainingConfig, load_pipeline
from hf_genmod.data.captions import Tokens, all_captions
from hf_genmod.data.encoding import weights_fingerprint
from hf_genmod.drawing.grids import caption_rows, class_rows, sample_rows
from hf_genmod.processes import processes
from hf_genmod.recipes.arguments import GuidanceArguments, SharingArguments
from hf_genmod.recipes.pictures import CaptionedDataArguments
from hf_genmod.recipes.run import run
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.training.adapters import attach_adapter, with_names_for
from hf_genmod.training.prior_samples import PriorSamples
from hf_genmod.training.text_encoder import TextConditionedUNet


@dataclasses.dataclass
class LoraArguments:
    """Adapter."""

    base: str = HfArg(help="The model: a folder, or an id.", metadata={"may_change": True, "built_on": "base model"})
    class_name: str | None = HfArg(default=None, help="Class of the images, if they are not in class folders.")
    caption: str | None = HfArg(default=None, help="Caption of the images, if they have no captions.")
    rank: int = HfArg(default=3, help="Rank of the adapter.")
    train_text_encoder: bool = HfArg(default=False, help="Adapt the text encoder, too.")
    prior_samples: int = HfArg(default=256, help="Samples of the model to mix in, to keep what it knows; 0: none.")
    prior_captions: list[str] = HfArg(default_factory=lambda: [""], help="Captions of these samples.")

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank: {self.rank} is not positive")


def main(data: CaptionedDataArguments, lora: LoraArguments, guidance: GuidanceArguments, sharing: SharingArguments,
         config: TrainingConfig) -> Trainer:  # fmt: skip
    if data.streaming:
        raise ValueError("streaming: an adapter learns from few images, which are kept in memory; leave it out")
    if sharing.push_to_hub and os.path.isdir(lora.base):
        raise ValueError("base: it is a folder here, which others do not have; push it first, and give its id")
    pipeline = load_pipeline(lora.base).to(processes().device)
    pipeline.set_progress_bar_config(desc="drawing", disable=not processes().is_main_process)
    unet, encoder = pipeline.components.get("unet"), pipeline.components.get("text_encoder")
    if "classifier" in pipeline.components:
        raise ValueError("base: an adapter of a ClassifierGuidedPipeline is trained for the model that it guides")
    if lora.train_text_encoder and encoder is None:
        raise ValueError("train_text_encoder: the model has none; leave it out")
    pictures, _ = data.training_pictures_for(pipeline, config.horizontal_flip, max_shift=config.max_shift)
    num_known = unet.config.num_classes or 0
    pictures = with_names_for(pipeline, pictures, lora.class_name, lora.caption)
    network = TextConditionedUNet(unet, encoder) if encoder else unet
    text = Tokens(pipeline.tokenizer, encoder) if encoder else None
    prior = {"class_labels": [*range(num_known)]} if num_known else {"prompt": lora.prior_captions} if encoder else {}

    def load(folder):
        pipeline = load_pipeline(lora.base)
        pipeline.load_lora_weights(folder)
        return pipeline

    files = {"save": type(pipeline).save_lora_weights, "load": load}
    files["depends_on"] = {"model": weights_fingerprint(network)}  # before an adapter is attached
    scheduler = AncestralDDPMScheduler.from_config(pipeline.scheduler.config)
    objective = DenoisingObjective(scheduler, unet.null_label, "balanced", guidance.condition_dropout, text)
    dataset = PriorSamples(pictures, pipeline, lora.prior_samples, prior, config.seed)
    network.requires_grad_(False)
    attach_adapter(unet, lora.rank, config.seed, (unet.config.num_classes or 0) - num_known)
    if lora.train_text_encoder:
        attach_adapter(encoder, lora.rank, config.seed)

    def make_pipeline(network):
        models = {"unet": network.unet, "text_encoder": network.text_encoder} if encoder else {"unet": network}
        pipeline.register_modules(**models)
        return pipeline

    def draw_samples(pipeline):
        options = {}
        if encoder or num_known:
            options["guidance_scale"] = guidance.guidance_scale
        if encoder:
            return caption_rows(pipeline, [*all_captions(pictures)[:6], *lora.prior_captions[:2]], **options)
        if num_known:
            return class_rows(pipeline, range(pipeline.num_classes)[::-1], **options)
        return sample_rows(pipeline, **options)

    return Trainer(network, objective, dataset, config, make_pipeline, draw_samples, **files)


if __name__ == "__main__":
    run(main)
