"""
Trains a text-to-image model on captioned pictures: those of a folder with a metadata.jsonl of lines such as
{"file_name": "1.png", "text": "a cat on a sofa"}, or of a data set with a column "text" or "caption".

    python examples/train_text_to_image.py --dataset path/to/folder --resolution 32 --max_train_minutes 60
"""

import dataclasses

from hf_genmod import DenoisingObjective, TextToImagePipeline, Trainer, TrainingConfig
from hf_genmod.data.captions import FrozenText, Tokens, all_captions
from hf_genmod.drawing.grids import caption_rows
from hf_genmod.recipes.networks import ModelArguments
from hf_genmod.recipes.pictures import CaptionedDataArguments
from hf_genmod.recipes.run import run
from hf_genmod.training.text_encoder import TextConditionedUNet, load_text_encoder, make_text_encoder, train_tokenizer


@dataclasses.dataclass
class TextArguments:
    text_encoder: str = dataclasses.field(
        default="scratch",
        metadata={
            "help": "'scratch', a tokenizer and a small text encoder that learn from the captions; or a pretrained "
            "one, which stays as it is: a folder, or an id on the Hub."
        },
    )
    condition_dropout: float = dataclasses.field(
        default=0.1, metadata={"help": "How often a caption is left out, so that the model learns to do without."}
    )
    guidance_scale: float = dataclasses.field(default=3.0, metadata={"help": "γ of the samples drawn while training."})


def main(data: CaptionedDataArguments, model: ModelArguments, text: TextArguments, config: TrainingConfig) -> Trainer:
    dataset, held_out = data.load(vae=model.vae, mirrored=config.horizontal_flip, require_captions=True)
    captions = all_captions(dataset, held_out)
    shown = captions[:: -(-len(captions) // 8)]
    learns_along = text.text_encoder == "scratch"
    if learns_along:
        tokenizer = train_tokenizer(all_captions(dataset))
        text_encoder = make_text_encoder(tokenizer, seed=config.seed)
        of_captions = Tokens(tokenizer, text_encoder)
    else:
        tokenizer, text_encoder = load_text_encoder(text.text_encoder)
        of_captions = FrozenText(captions, tokenizer, text_encoder)
    unet = model.make_unet(dataset, seed=config.seed, cross_attention_dim=text_encoder.config.hidden_size)
    network = TextConditionedUNet(unet, text_encoder) if learns_along else unet
    scheduler = model.make_scheduler()
    sampler = model.make_sampler(scheduler, dataset)

    def make_pipeline(network):
        models = (network.unet, network.text_encoder) if learns_along else (network, text_encoder)
        return TextToImagePipeline(*models, tokenizer, sampler, dataset.vae, dataset.value_range)

    return Trainer(
        network,
        DenoisingObjective(
            scheduler, weighting=model.weighting, condition_dropout=text.condition_dropout, text=of_captions
        ),
        dataset,
        config,
        make_pipeline,
        draw_samples=lambda pipeline: caption_rows(pipeline, shown, guidance_scale=text.guidance_scale),
        validation_dataset=held_out,
        depends_on=None if learns_along else {"text_encoder": of_captions.fingerprint},
    )


if __name__ == "__main__":
    run(main)
