"""
Measures a checkpoint on the data set that it was trained on: draws samples, compares them with the pictures, and
writes `evaluation.json`, figures, and the card of the model. What was drawn is kept, so that an interrupted command
goes on where it was.

    python examples/evaluate.py --model runs/mine --dataset path/to/folder --guidance_scales 1 2 3 --license mit
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from hf_genmod import load_pipeline
from hf_genmod.data.encoding import weights_fingerprint
from hf_genmod.drawing.grids import draw_enlarged
from hf_genmod.drawing.samples import draw_to_folder
from hf_genmod.errors import one_line_errors
from hf_genmod.evaluation.estimates import Estimate
from hf_genmod.evaluation.features import (
    FEATURE_DIM,
    FeatureClassifier,
    all_bytes,
    extract_features,
    find_features,
    train_feature_classifier,
)
from hf_genmod.evaluation.likelihood_bounds import bits_per_dimension
from hf_genmod.evaluation.neighbours import nearest_of
from hf_genmod.evaluation.report import evaluate_features
from hf_genmod.evaluation.settings import (
    audit,
    draw_figures,
    enlarged_by_interpolation,
    is_upsampler,
    make_sampler,
    recognised,
    settings_of,
    what_the_unet_is_told,
    what_to_ask,
)
from hf_genmod.processes import processes
from hf_genmod.recipes.arguments import parse_arguments
from hf_genmod.recipes.pictures import CaptionedDataArguments
from hf_genmod.sharing.model_card import check_license, license_of, write_card


@dataclasses.dataclass
class EvaluationArguments:
    model: str = dataclasses.field(metadata={"help": "The checkpoint: the folder of its run, or its id on the Hub."})
    samples: int = dataclasses.field(default=1000, metadata={"help": "Samples of each setting."})
    guidance_scales: list[float] = dataclasses.field(
        default_factory=list,
        metadata={"help": "γ, or s of a classifier, one setting each; by default that of the pipeline."},
    )
    num_inference_steps: list[int] = dataclasses.field(
        default_factory=lambda: [20], metadata={"help": "Steps of the sampler, one setting each."}
    )
    samplers: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "Schedulers of diffusers by name, one setting each; by default that of the checkpoint."},
    )
    noise_levels: list[int] = dataclasses.field(
        default_factory=list,
        metadata={"help": "Noise in the small pictures, of an upsampler, one setting each; by default none."},
    )
    features: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "What is compared: a vision model of transformers, a folder or id, or features-*.safetensors of "
            "another report; by default a small network is trained on the data set, and kept beside the report."
        },
    )
    seed: int = dataclasses.field(default=0, metadata={"help": "Sample i has this seed plus i."})
    output_dir: str | None = dataclasses.field(
        default=None, metadata={"help": "Folder of the report; by default `evaluation` in that of the model."}
    )
    license: str | None = dataclasses.field(
        default=None, metadata={"help": "Licence of the model for its card; by default that of the card there is."}
    )


with one_line_errors():
    data, arguments = parse_arguments(CaptionedDataArguments, EvaluationArguments)
    state = processes()
    pipeline = load_pipeline(arguments.model).to(state.device)
    is_folder = Path(arguments.model).is_dir()
    if not is_folder and (arguments.output_dir is None or arguments.license is not None):
        raise ValueError("output_dir: the model is no folder here; say where its report is to be, which has no card")
    pipeline.set_progress_bar_config(disable=True)
    own_sampler = pipeline.components.get("scheduler")
    settings = settings_of(
        pipeline,
        arguments.samplers,
        arguments.num_inference_steps,
        arguments.guidance_scales,
        arguments.noise_levels,
    )
    samplers = {name: make_sampler(name, own_sampler) for name in arguments.samplers}
    writes_card = is_folder and arguments.output_dir is None
    if arguments.license is not None:
        check_license(arguments.license)
    elif writes_card and Path(arguments.model, "README.md").is_file():
        license_of(arguments.model)
    else:
        writes_card = False
    given = find_features(arguments.features) if arguments.features else None
    training, held_out = data.load_beside(pipeline)
    real, unseen = (all_bytes(pictures) for pictures in (training, held_out))
    out = Path(arguments.output_dir or Path(arguments.model, "evaluation"))
    asked_of = held_out if is_upsampler(pipeline) else training
    drawn_of = torch.Generator().manual_seed(arguments.seed)
    drawn_of = torch.randint(len(asked_of), (arguments.samples,), generator=drawn_of).tolist()
    each = what_to_ask(pipeline, asked_of, drawn_of)

    width = FEATURE_DIM if given is None else extract_features(real[:2], given).shape[1]
    least = 2 * (width + 1)  # for the Fréchet distance of halves
    for kind, count, needed in (
        ("samples", arguments.samples, least),
        ("held-out pictures", len(unseen), max(least, 100)),  # for their 1% quantile
    ):
        if count < needed:
            raise ValueError(f"{kind}: {count} are too few for features of {width} dimensions; {needed} or more")

    file = out / f"features-{training.fingerprint}.safetensors"
    if isinstance(given, FeatureClassifier):
        classifier = given
        if "class_labels" in each and classifier.config["num_classes"] != pipeline.num_classes:
            raise ValueError(f"features: {arguments.features} is of {classifier.config['num_classes']} other classes")
    else:
        with state.main_process_first():
            if not file.is_file() and (training.labels is not None or given is None):
                file.parent.mkdir(parents=True, exist_ok=True)
                train_feature_classifier(real, training.labels, len(training.label_names or [])).save(file)
        classifier = FeatureClassifier.load(file) if file.is_file() else None
    feature_fn = given or classifier
    models = [model for model in pipeline.components.values() if isinstance(model, torch.nn.Module)]
    process = own_sampler and own_sampler.to_json_string()
    drawn_by = (
        f"{[*map(weights_fingerprint, models)]} {process} {asked_of.fingerprint} {arguments.samples} {arguments.seed}"
    )
    drawn_by = hashlib.blake2b(drawn_by.encode(), digest_size=4).hexdigest()

report = {
    "model": arguments.model,
    "dataset": {"name": training.name, "num_pictures": len(real), "num_held_out": len(unseen),
                "held_out_is_unseen": "-held-" not in held_out.fingerprint, "fingerprint": training.fingerprint},
    "features": arguments.features or "a network trained on the data set",
    "seed": arguments.seed,
    "settings": settings,
}  # fmt: skip
drawn = []
for setting in settings:
    request = {name: value for name, value in setting.items() if name != "sampler"}
    if arguments.samplers:
        pipeline.scheduler = samplers[setting["sampler"]]
    name = "-".join(map(str, setting.values()))
    drawn.append(
        draw_to_folder(
            pipeline, out / "samples" / f"{name}-{drawn_by}", each, arguments.samples, arguments.seed, **request
        )
    )

if own_sampler is not None:
    pipeline.scheduler = own_sampler

if state.is_main_process:
    of_real, of_unseen = (extract_features(x, feature_fn) for x in (real, unseen))
    flat = [x.flatten(1).float() for x in (real, unseen)]
    spaces = {
        "pixels": (lambda images: images.flatten(1).float(), flat[0], nearest_of(flat[1], flat[0])[0]),
        "features": (lambda images: extract_features(images, feature_fn), of_real, nearest_of(of_unseen, of_real)[0]),
    }
    for setting, samples in zip(settings, drawn, strict=True):
        name, images = "-".join(map(str, setting.values())), samples.pop("images")
        setting |= samples | {"seconds": Estimate.of(samples["seconds"])}  # of parts of the samples
        setting |= evaluate_features(extract_features(images, feature_fn), of_real)
        if "class_labels" in each:
            setting |= recognised(classifier, images, torch.tensor(each["class_labels"]), training.label_names)
        setting["memorisation"] = audit(spaces, images, real, out / f"closest_{name}.png")
        numbers = {key: value for key, value in setting.items() if not isinstance(value, (dict, str))}
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in numbers.items()), flush=True)
    report["held_out"] = evaluate_features(of_unseen, of_real)
    if "class_labels" in each:
        report["held_out"] |= recognised(classifier, unseen, held_out.labels, training.label_names)
    if is_upsampler(pipeline):
        enlarged = enlarged_by_interpolation(pipeline, asked_of, drawn_of)
        report["interpolated"] = evaluate_features(extract_features(enlarged, feature_fn), of_real)
        draw_enlarged(pipeline, held_out, shared=False, num_inference_steps=20).save(out / "enlarged.png")
    told = what_the_unet_is_told(pipeline, held_out) if "unet" in pipeline.components else {}
    report["bits_per_dimension"] = bits_per_dimension(pipeline, unseen.to(state.device), **told)
    text = json.dumps(report, indent=2, default=dataclasses.asdict)
    (out / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    print(f"{out}/evaluation.json holds all of it; closest_*.png shows the samples that are closest to a picture")
    try:
        draw_figures(pipeline, settings, each, out)
    except (ImportError, ValueError) as error:  # no matplotlib; a strength at which few steps diverge
        print(f"not all figures could be drawn: {error}")
    if writes_card:
        write_card(arguments.model, arguments.license)
