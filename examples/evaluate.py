"""
Measures a checkpoint on the data set that it was trained on: draws samples, compares them with the pictures, and
writes `evaluation.json` and figures. What was drawn is kept, so that an interrupted command goes on where it was.

    python examples/evaluate.py --model runs/mine --dataset path/to/folder --guidance_scales 1 2 3
"""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path

import diffusers
import torch

from hf_genmod import AncestralDDPMScheduler, load_pipeline
from hf_genmod.evaluation import (
    Share,
    audit_memorisation,
    evaluate_features,
    variational_bound,
)
from hf_genmod.features import (
    FEATURE_DIM,
    FeatureClassifier,
    PretrainedFeatures,
    all_bytes,
    extract_features,
    train_features,
)
from hf_genmod.latents import weights_fingerprint
from hf_genmod.processes import processes
from hf_genmod.recipe import CaptionedDataArguments, one_line_errors, parse_arguments
from hf_genmod.sampling import draw_to_folder, side_by_side


@dataclasses.dataclass
class EvaluationArguments:
    model: str = dataclasses.field(metadata={"help": "The checkpoint: the folder of its run, or its id on the Hub."})
    samples: int = dataclasses.field(default=1000, metadata={"help": "Samples of each setting."})
    guidance_scales: list[float] = dataclasses.field(
        default_factory=list, metadata={"help": "γ, one setting each; by default that of the pipeline."}
    )
    num_inference_steps: list[int] = dataclasses.field(
        default_factory=lambda: [20], metadata={"help": "Steps of the sampler, one setting each."}
    )
    samplers: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "Schedulers of diffusers by name, one setting each; by default that of the checkpoint."},
    )
    features: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Vision model of transformers whose features are compared, a folder or id; by default a small "
            "network that is trained on the data set, and kept beside the report."
        },
    )
    seed: int = dataclasses.field(default=0, metadata={"help": "Sample i has this seed plus i."})
    output_dir: str | None = dataclasses.field(
        default=None, metadata={"help": "Folder of the report; by default `evaluation` in that of the model."}
    )


def what_to_draw(arguments: EvaluationArguments, pipeline) -> list[dict]:
    """The settings: by which sampler, and what is asked of the pipeline beside labels or prompts."""
    if "scheduler" not in pipeline.components:  # an autoencoder
        return [{"prior": "fitted" if pipeline.vae.config.get("prior_rank") else "standard"}]
    samplers = arguments.samplers or [type(pipeline.scheduler).__name__]
    scales = [{"guidance_scale": scale} for scale in arguments.guidance_scales] or [{}]
    return [
        {"sampler": sampler, "num_inference_steps": steps} | scale
        for sampler, steps, scale in itertools.product(samplers, arguments.num_inference_steps, scales)
    ]


def make_sampler(name: str, own):
    if name == type(own).__name__:
        return own
    cls = AncestralDDPMScheduler if name == "AncestralDDPMScheduler" else getattr(diffusers, name, None)
    if not hasattr(cls, "add_noise"):
        raise ValueError(f"samplers: {name!r} is no scheduler of diffusers, such as DDIMScheduler")
    return cls.from_config(own.config)


def what_to_ask(pipeline, pictures, count: int, seed: int) -> dict[str, list]:
    """Labels or captions in the data's own proportions."""
    some = torch.randint(len(pictures), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    if hasattr(pipeline, "labels"):
        return {"class_labels": pictures.labels[some].tolist()}
    if "tokenizer" in pipeline.components:
        captions = [pictures.captions[i] for i in some]
        return {"prompt": [caption if isinstance(caption, str) else caption[0] for caption in captions]}
    return {}


def recognised(classifier, images, labels, names: list[str]) -> dict:
    """How often a classifier finds the class that was asked for, in all and for each class."""
    with torch.no_grad():
        right = classifier.head(extract_features(images, classifier)).argmax(dim=1) == labels
    by_class = {name: Share.of(right[labels == i]) for i, name in enumerate(names) if (labels == i).any()}
    return {"recognised_share": Share.of(right), "recognised_share_by_class": by_class}


def audit(images, real, unseen, feature_fn, file: Path) -> dict:
    """In pixels and in features; the file shows the ten samples that are closest to a picture, above these."""
    result = {}
    for space, sets in (
        ("pixels", [x.float() for x in (images, real, unseen)]),
        ("features", [extract_features(x, feature_fn) for x in (images, real, unseen)]),
    ):
        found = audit_memorisation(*sets)
        closest = found.distances.argsort()[:10]
        side_by_side([images[closest], real[found.nearest[closest]]]).save(file.with_name(f"{file.stem}_{space}.png"))
        result[space] = {"threshold": found.threshold, "share": found.share, "flagged": found.flagged}
    return result


with one_line_errors():
    data, arguments = parse_arguments(CaptionedDataArguments, EvaluationArguments)
    state = processes()
    pipeline = load_pipeline(arguments.model).to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    own_sampler = pipeline.components.get("scheduler")
    settings = what_to_draw(arguments, pipeline)
    samplers = {name: make_sampler(name, own_sampler) for name in arguments.samplers}
    pretrained = PretrainedFeatures(arguments.features) if arguments.features else None
    training, held_out = data.load_beside(pipeline)
    real, unseen = (all_bytes(pictures) for pictures in (training, held_out))
    out = Path(arguments.output_dir or Path(arguments.model, "evaluation"))
    each = what_to_ask(pipeline, training, arguments.samples, arguments.seed)

    width = FEATURE_DIM if pretrained is None else extract_features(real[:2], pretrained).shape[1]
    least = 2 * (width + 1)  # for the Fréchet distance of halves
    for kind, count, needed in (
        ("samples", arguments.samples, least),
        ("held-out pictures", len(unseen), max(least, 100)),  # for their 1% quantile
    ):
        if count < needed:
            raise ValueError(f"{kind}: {count} are too few for features of {width} dimensions; {needed} or more")

    file = out / f"features-{training.fingerprint}.safetensors"
    with state.main_process_first():
        if not file.is_file() and (training.labels is not None or pretrained is None):
            file.parent.mkdir(parents=True, exist_ok=True)
            train_features(real, training.labels, len(training.label_names or [])).save(file)
    classifier = FeatureClassifier.load(file) if file.is_file() else None
    feature_fn = pretrained or classifier
    of_real, of_unseen = (extract_features(x, feature_fn) for x in (real, unseen))
    model = pipeline.components.get("unet", pipeline.vae)
    drawn_by = hashlib.blake2b(f"{weights_fingerprint(model)} {each} {arguments.seed}".encode(), digest_size=4)

report = {
    "model": arguments.model,
    "dataset": {"name": training.name, "num_pictures": len(real), "num_held_out": len(unseen),
                "fingerprint": training.fingerprint},
    "features": arguments.features or "a network trained on the data set",
    "seed": arguments.seed,
    "settings": [],
}  # fmt: skip
for setting in settings:
    request = {name: value for name, value in setting.items() if name != "sampler"}
    if arguments.samplers:
        pipeline.scheduler = samplers[setting["sampler"]]
    name = "-".join(map(str, setting.values()))
    folder = out / "samples" / f"{name}-{drawn_by.hexdigest()}"
    drawn = draw_to_folder(pipeline, folder, each, arguments.samples, arguments.seed, **request)
    if state.is_main_process:
        images = drawn.pop("images")
        measured = setting | drawn | evaluate_features(extract_features(images, feature_fn), of_real)
        if "class_labels" in each:
            measured |= recognised(classifier, images, torch.tensor(each["class_labels"]), training.label_names)
        measured["memorisation"] = audit(images, real, unseen, feature_fn, out / f"closest_{name}.png")
        report["settings"].append(measured)
        print(
            f"{name}: "
            + ", ".join(f"{key} {value}" for key, value in measured.items() if not isinstance(value, (dict, str)))
        )

if state.is_main_process:
    report["held_out"] = evaluate_features(of_unseen, of_real)
    if "unet" in pipeline.components and pipeline.vae is None and "tokenizer" not in pipeline.components:
        process = AncestralDDPMScheduler.from_config(own_sampler.config)
        labels = {"class_labels": held_out.labels} if "class_labels" in each else {}
        bits, error = variational_bound(pipeline.unet, process, unseen, **labels)
        report["bits_per_dimension"] = {"value": bits, "standard_error": error, "count": len(unseen)}
    text = json.dumps(report, indent=2, default=dataclasses.asdict)
    (out / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    print(f"{out}/evaluation.json holds all of it; closest_*.png shows the samples that are closest to a picture")
