# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_genmod"]
#
# [tool.uv.sources]
# hf_genmod = { path = "..", editable = true }  # the checkout that this script is in
# ///
"""
Trains a text-to-image model on images with captions, such as a folder with a metadata.jsonl.

    hf_genmod train text-to-image --dataset path/to/folder --resolution 32 --max_train_minutes 60
"""

import dataclasses

from transformers.hf_argparser import HfArg

from hf_genmod import DenoisingObjective, TextToImagePipeline, Trainer, TrainingConfig
from hf_genmod.data.captions import FrozenText, Tokens, all_captions
from hf_genmod.drawing.grids import caption_rows
from hf_genmod.recipes.arguments import GuidanceArguments
from hf_genmod.recipes.networks import ModelArguments
from hf_genmod.recipes.pictures import CaptionedDataArguments
from hf_genmod.recipes.run import run
from hf_genmod.training.text_encoder import TextConditionedUNet, load_text_encoder, make_text_encoder, train_tokenizer


@dataclasses.dataclass
class TextArguments(GuidanceArguments):
    """Text encoder and guidance."""

    text_encoder: str = HfArg(
        default="scratch", help="'scratch', or a pretrained one that stays frozen: a folder or id."
    )
    guidance_scale: float = HfArg(default=3.0, help="Guidance scale γ of the samples drawn during training.")


def main(data: CaptionedDataArguments, model: ModelArguments, text: TextArguments, config: TrainingConfig) -> Trainer:
    pictures, held_out = data.load(
        model.vae, config.horizontal_flip, max_shift=config.max_shift, require_captions=True
    )
    captions = all_captions(pictures, held_out)
    is_trained = text.text_encoder == "scratch"
    if is_trained:
        tokenizer = train_tokenizer(all_captions(pictures))
        text_encoder = make_text_encoder(tokenizer, seed=config.seed)
        condition = Tokens(tokenizer, text_encoder)
    else:
        tokenizer, text_encoder = load_text_encoder(text.text_encoder)
        condition = FrozenText(captions, tokenizer, text_encoder)
    unet = model.make_unet(pictures, seed=config.seed, cross_attention_dim=text_encoder.config.hidden_size)
    network = TextConditionedUNet(unet, text_encoder) if is_trained else unet
    scheduler = model.make_scheduler()
    sampler = model.make_sampler(scheduler, pictures)
    objective = DenoisingObjective(scheduler, None, model.weighting, text.condition_dropout, text=condition)

    def make_pipeline(network):
        models = (network.unet, network.text_encoder) if is_trained else (network, text_encoder)
        return TextToImagePipeline(*models, tokenizer, sampler, pictures.vae, pictures.value_range)

    def draw_samples(pipeline):
        options = {"guidance_scale": text.guidance_scale}
        return caption_rows(pipeline, captions[:: -(-len(captions) // 8)], **options)

    depends_on = {} if is_trained else {"text_encoder": condition.fingerprint}
    return Trainer(network, objective, pictures, config, make_pipeline, draw_samples, held_out, depends_on=depends_on)


if __name__ == "__main__":
    run(main)
