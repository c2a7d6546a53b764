"""Measures a checkpoint."""

import hashlib
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_genmod.data.encoding import weights_fingerprint
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.drawing.curves import draw_guidance
from hf_genmod.drawing.grids import draw_enlarged, draw_steps, draw_trajectory, side_by_side
from hf_genmod.drawing.samples import draw_to_folder
from hf_genmod.errors import counted
from hf_genmod.evaluation.config import EvaluationConfig, make_sampler
from hf_genmod.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance
from hf_genmod.evaluation.estimates import Estimate, with_interval
from hf_genmod.evaluation.features import (
    FEATURE_DIM,
    FeatureClassifier,
    PretrainedFeatures,
    all_bytes,
    as_bytes,
    extract_features,
    train_feature_classifier,
)
from hf_genmod.evaluation.likelihood_bounds import bits_per_dimension
from hf_genmod.evaluation.neighbours import audit_memorisation, nearest_of, neighbourhoods
from hf_genmod.evaluation.recognition import recognised
from hf_genmod.evaluation.report import Report, setting_name
from hf_genmod.evaluation.standard import StandardMeasures
from hf_genmod.evaluation.two_samples import told_apart
from hf_genmod.processes import processes

_NEIGHBOURS = 5  # k of the measures by neighbours


def evaluate(
    pipeline,
    pictures: PictureDataset,
    held_out: PictureDataset,
    folder: str | os.PathLike,
    config: EvaluationConfig,
    model: str,
) -> Report | None:
    """
    Draws samples of a checkpoint on all processes, compares them with the images that it was trained on, and writes
    `evaluation.json` and figures into a folder. Samples and features are kept there, so that an interrupted evaluation
    continues where it was.

    Args:
        pictures, held_out ([`PictureDataset`]): Training and held-out images, at the resolution of the pipeline.
        model (`str`): The folder or id of the checkpoint.

    Returns:
        [`Report`]: The report; `None` on all processes but the first.

    Raises:
        ValueError: If a setting does not fit the pipeline, or there are fewer than six samples or held-out images.
    """
    folder, state, started = Path(folder), processes(), time.monotonic()
    pipeline.to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    settings = config.settings_for(pipeline)
    samplers = {name: make_sampler(name, pipeline.scheduler) for name in config.samplers}
    network = None
    if config.features is not None:
        load = FeatureClassifier.load if config.features.endswith(".safetensors") else PretrainedFeatures
        network = load(config.features)
    if config.reference is not None and not config.measures:
        raise ValueError("reference: it is for --measures; give both, such as --measures standard")
    reference = config.reference or folder / f"reference-{pictures.fingerprint}.safetensors"
    standard = StandardMeasures(config.measures, pictures, reference) if config.measures else None
    _say(started, f"reading {len(pictures):,} images and {len(held_out):,} held-out ones")
    real, unseen = all_bytes(pictures), all_bytes(held_out)
    is_upsampler = "image" in pipeline.example_request()
    source, rng = held_out if is_upsampler else pictures, torch.Generator().manual_seed(config.seed)
    indices = torch.randint(len(source), (config.samples,), generator=rng).tolist()
    request = pipeline.request_for(source, indices)  # classes and captions in the proportions of the data set
    labels = torch.tensor(request["class_labels"]) if "class_labels" in request else None
    d = FEATURE_DIM if network is None else extract_features(real[:2], network).shape[1]
    counts, left_out = {"samples": config.samples, "held-out images": len(unseen)}, {}
    for kind, count in counts.items():
        if count < _NEIGHBOURS + 1:
            raise ValueError(f"{kind}: {count} are too few to measure anything; take {_NEIGHBOURS + 1} or more")
        if count < 2 * (d + 1):
            left_out[f"Fréchet distance of {kind}"] = f"needs {2 * (d + 1):,} of them, and there are {count}"
    if len(unseen) < 100:
        left_out["search for copies"] = f"needs 100 held-out images, and there are {len(unseen)}"
    _say(started, "preparing the network of the features")
    needs_classifier = network is None or labels is not None
    classifier = _find_classifier(network, pictures, real, folder) if needs_classifier else None
    network = network or classifier
    names = ["-".join(map(str, setting.values())) for setting in settings]
    _say(started, f"drawing {config.samples:,} samples of each of {counted(len(settings), 'setting')}")
    drawn = _draw_settings(pipeline, settings, names, samplers, request, source, folder / "samples", config)
    if not state.is_main_process:
        return None

    _say(started, "computing the features of the images")
    of_real, of_unseen = extract_features(real, network), extract_features(unseen, network)
    apart = {"pixels": nearest_of(unseen, real)[0], "features": nearest_of(of_unseen, of_real)[0]}
    for name, setting, samples in zip(names, settings, drawn, strict=True):
        images = samples["images"]
        _say(started, f"measuring {setting_name(setting)}")
        features = extract_features(images, network)
        setting |= {"seconds": Estimate.of(samples["seconds"]), "forward_passes": samples["forward_passes"]}
        setting["told_apart"] = told_apart(images, real, config.seed)
        setting |= evaluate_features(features, of_real)
        if labels is not None:
            setting |= recognised(classifier, images, labels, pictures.label_names)
        spaces = {"pixels": (images, real), "features": (features, of_real)}
        closest = folder / f"closest_{name}.png"
        setting["memorisation"] = audit(spaces, apart, images, real, closest) if len(unseen) >= 100 else {}
    dataset = {"name": pictures.name, "num_pictures": len(pictures), "num_held_out": len(held_out)}
    dataset |= {"held_out_is_unseen": not held_out.may_have_been_trained_on, "fingerprint": pictures.fingerprint}
    report = Report(model, dataset, config.features or "a network trained on the data set", config.seed, settings)
    report.left_out = left_out
    report.held_out = {"told_apart": told_apart(unseen, real, config.seed), **evaluate_features(of_unseen, of_real)}
    best = next(samples["images"] for setting, samples in zip(settings, drawn, strict=True) if setting is report.best)
    report.best["told_apart_by_longer_training"] = told_apart(best, real, config.seed, longer=2)
    if standard is not None:
        _say(started, "measuring by the networks of papers")
        standard.prepare(real)
        for measures, images in [*zip(settings, (samples["images"] for samples in drawn), strict=True),
                                 (report.held_out, unseen)]:  # fmt: skip
            measures["standard"] = standard.measure(images)
    if labels is not None:
        report.held_out |= recognised(classifier, unseen, held_out.labels, pictures.label_names)
    if is_upsampler:
        interpolated = as_bytes(pipeline.unet_inputs(source, indices)["conditioning_image"].cpu())  # bicubic
        report.interpolated = evaluate_features(extract_features(interpolated, network), of_real)
    _say(started, "measuring the likelihood")
    conditions = pipeline.unet_inputs(held_out, range(len(held_out))) if pipeline.denoises else {}
    report.bits_per_dimension = bits_per_dimension(pipeline, unseen.to(state.device), **conditions)
    report.save(folder)
    _say(started, "drawing the figures")
    pipeline.set_progress_bar_config(desc="drawing a figure", leave=False)
    try:
        draw_figures(pipeline, settings, request, held_out, folder)
    except ValueError as error:  # strong guidance that diverges in few steps
        print(f"not all figures could be drawn: {error}")
    _say(started, "done")
    return report


def _say(started: float, what: str) -> None:
    """Says on the first process what takes time now, after the minutes and seconds until now."""
    if processes().is_main_process:
        seconds = round(time.monotonic() - started)
        tqdm.write(f"{seconds // 60}:{seconds % 60:02} {what}", file=sys.stderr)


def _draw_settings(pipeline, settings, names, samplers, request, source, folder, config) -> list[dict]:
    """The samples of each setting, as `draw_to_folder` returns them, in folders for this model and data set."""
    models = [model for model in pipeline.components.values() if isinstance(model, torch.nn.Module)]
    own = pipeline.components.get("scheduler")
    key = f"{[*map(weights_fingerprint, models)]} {own and own.to_json_string()} {source.fingerprint} "
    key += str(pipeline.config.get("defaults") or "")
    key = hashlib.blake2b(f"{key}{config.samples} {config.seed}".encode(), digest_size=4).hexdigest()
    drawn = []
    for name, setting in zip(names, settings, strict=True):
        if samplers:
            pipeline.scheduler = samplers[setting["sampler"]]
        options = {argument: value for argument, value in setting.items() if argument != "sampler"}
        kept = folder / f"{name}-{key}"
        drawn.append(draw_to_folder(pipeline, kept, request, config.samples, config.seed, **options))
    if samplers:
        pipeline.scheduler = own
    return drawn


def _find_classifier(network, pictures, images: Tensor, folder: Path) -> FeatureClassifier:
    """The given network if it is a classifier, else one that is trained on the data set and kept in the folder."""
    if isinstance(network, FeatureClassifier):
        num_classes = network.config["num_classes"]
        if num_classes != len(pictures.label_names):
            raise ValueError(f"features: the network is of {num_classes} other classes; give one of this data set")
        return network
    file = folder / f"features-{pictures.fingerprint}.safetensors"
    with processes().main_process_first():
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            train_feature_classifier(images, pictures.labels, len(pictures.label_names or [])).save(file)
    return FeatureClassifier.load(file)


def evaluate_features(generated: Tensor, real: Tensor, seed: int = 0) -> dict[str, Estimate]:
    """
    Compares features of generated images, (n, d), with those of real images, (m, d). The Fréchet distance uses all
    real images, the other measures a random n of them. Intervals are made from distances of halves; `seed` is that of
    the n images and of the halves.

    Returns:
        `dict`: "kernel_distance", "precision", "recall", "density" and "coverage"; if n ≥ 2 (d + 1), as halves need
        it, and m > d also "frechet_distance".

    Raises:
        ValueError: If n or m is below six, d differs, or features are not finite.
    """
    n, d = generated.shape
    some = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:n]]
    measures = {}
    if n >= 2 * (d + 1) and len(real) > d:
        statistics = FeatureStatistics.of(real)
        measures["frechet_distance"] = with_interval(lambda x: frechet_distance(x, statistics), generated, seed=seed)
    measures["kernel_distance"] = with_interval(lambda x: kernel_distance(x, some), generated, seed=seed)
    return measures | neighbourhoods(some, generated, _NEIGHBOURS)


def audit(spaces: dict[str, tuple[Tensor, Tensor]], apart: dict[str, Tensor], images, real, file: Path) -> dict:
    """
    Tests whether samples `images` copy training images `real`, both `uint8`. For each of `spaces`, "pixels" and
    "features", with the values of samples and of training images and the distances `apart` of held-out images to the
    nearest training image, the result has "threshold", "share" and "flagged". A figure, NAME_SPACE.png for a `file`
    NAME.png, shows the ten samples that are closest to a training image, and below them these images.
    """
    result = {}
    for space, (samples, training) in spaces.items():
        found = audit_memorisation(samples, training, apart[space])
        closest = found.distances.argsort()[:10]
        rows = {"samples": images[closest], "their closest training images": real[found.nearest[closest]]}
        side_by_side(rows).save(file.with_name(f"{file.stem}_{space}.png"))
        result[space] = {"threshold": found.threshold, "share": found.share, "flagged": found.flagged}
    return result


def draw_figures(pipeline, settings: list[dict], request: dict[str, list], held_out: PictureDataset, folder: Path):
    """Draws measures by guidance, samples by guidance and number of steps, samples as they emerge from noise, and what
    an upsampler enlarges. An autoencoder has none of these figures."""
    if not pipeline.denoises:
        return
    argument, choices = pipeline.guidance_argument, [1.0, 2.0, 4.0]
    if len(settings) > 1 and all(argument in setting for setting in settings):
        draw_guidance(settings, argument, folder / "guidance.png")
    if "image" in request:
        draw_enlarged(pipeline, held_out, shared=False).save(folder / "enlarged.png")
        argument = "noise_level"
        choices = [share * pipeline.config.max_noise_level // 4 for share in (0, 1, 2, 4)]
    values = sorted({setting[argument] for setting in settings if argument in setting} or set(choices))
    few = {name: values[:4] for name, values in request.items()}
    asked = sorted({setting["num_inference_steps"] for setting in settings})
    steps = {"steps": asked} if len(asked) > 1 else {}
    draw_steps(pipeline, few, {argument: values} if argument else {}, **steps).save(folder / "steps.png")
    draw_trajectory(pipeline, few).save(folder / "trajectory.png")
