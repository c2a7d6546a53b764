"""Measures a checkpoint."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.drawing.curves import draw_guidance, draw_sweep
from hf_genmod.drawing.grids import draw_enlarged, draw_steps, draw_trajectory
from hf_genmod.errors import counted
from hf_genmod.evaluation.comparison import Comparison, evaluate_features
from hf_genmod.evaluation.config import EvaluationConfig
from hf_genmod.evaluation.draws import Draws, file_name
from hf_genmod.evaluation.estimates import Estimate
from hf_genmod.evaluation.features import as_bytes, extract_features
from hf_genmod.evaluation.likelihood_bounds import bits_per_dimension
from hf_genmod.evaluation.report import Report, setting_name
from hf_genmod.evaluation.sweep import ROUNDS, SEED, last_measures, sweep
from hf_genmod.evaluation.two_samples import told_apart
from hf_genmod.processes import processes


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
    continues where it was. A sweep comes before, with samples of other seeds, if the `config` asks for it.

    Args:
        pictures, held_out ([`PictureDataset`]): Training and held-out images, at the resolution of the pipeline.
        model (`str`): The folder or id of the checkpoint.

    Returns:
        [`Report`]: The report; `None` on all processes but the first.

    Raises:
        ValueError: If a setting does not fit the pipeline, or there are fewer than six samples or held-out images.
    """
    folder, say = Path(folder), _speaker()
    pipeline.to(processes().device)
    pipeline.set_progress_bar_config(disable=True)
    settings, example = config.settings_for(pipeline), pipeline.example_request()
    comparison = Comparison(pictures, held_out, "class_labels" in example, folder, config, say)

    def draws(count: int, seed: int) -> Draws:
        source = held_out if "image" in example else pictures  # of an upsampler
        return Draws(pipeline, source, count, seed, folder / "samples")

    swept = None
    if config.sweep:
        count = max((count for count in ROUNDS if count <= config.samples), default=config.samples)
        swept = sweep(draws(count, config.seed + SEED), settings, comparison, say)
        settings = [swept["chosen"]]
        say(f"the sweep chose {setting_name(swept['chosen'])}")
    say(f"drawing {config.samples:,} samples of each of {counted(len(settings), 'setting')}")
    asked = draws(config.samples, config.seed)
    drawn = [asked.draw(setting) for setting in settings]
    if not processes().is_main_process:
        return None

    facts = {"name": pictures.name, "num_pictures": len(pictures), "num_held_out": len(held_out)}
    facts |= {"held_out_is_unseen": not held_out.may_have_been_trained_on, "fingerprint": pictures.fingerprint}
    features = config.features or "a network trained on the data set"
    report = Report(model, facts, features, config.seed, [], left_out=comparison.left_out, sweep=swept)
    _measure(report, settings, drawn, asked, comparison, say)
    report.save(folder)

    say("drawing the figures")
    pipeline.set_progress_bar_config(desc="drawing a figure", leave=False)
    best = settings[report.settings.index(report.best)]
    try:
        with asked.by_sampler_of(best):
            draw_figures(pipeline, report, best, asked.request, held_out, folder)
    except ValueError as error:  # strong guidance that diverges in few steps
        print(f"not all figures could be drawn: {error}")
    say("done")
    return report


def _measure(
    report: Report, settings: list[dict], drawn: list[dict], draws: Draws, comparison: Comparison, say
) -> None:
    """Compares samples, held-out images and, of an upsampler, interpolated images with the training images, and
    measures the likelihood of held-out images."""
    say("measuring the held-out images, which show what can be reached")
    report.held_out = comparison.of_held_out()
    for setting, samples in zip(settings, drawn, strict=True):
        say(f"measuring {setting_name(setting)}")
        cost = {"seconds": Estimate.of(samples["seconds"]), "forward_passes": samples["forward_passes"]}
        measures = comparison.of_samples(samples["images"], draws.labels, file_name(setting))
        report.settings.append(setting | cost | measures)
    best = drawn[report.settings.index(report.best)]["images"]
    say("telling samples from images by networks that learn twice as long")
    apart = told_apart(best, comparison.real, report.seed, longer=2)
    report.best["told_apart_by_longer_training"] = apart
    if "image" in draws.request:
        inputs = draws.pipeline.unet_inputs(draws.source, draws.indices)
        bicubic = extract_features(as_bytes(inputs["conditioning_image"].cpu()), comparison.network)
        report.interpolated = evaluate_features(bicubic, comparison.of_real)
    say("measuring the likelihood")
    pipeline, held_out = draws.pipeline, comparison.held_out
    conditions = pipeline.unet_inputs(held_out, range(len(held_out))) if pipeline.denoises else {}
    report.bits_per_dimension = bits_per_dimension(pipeline, comparison.unseen.to(processes().device), **conditions)


def _speaker() -> Callable[[str], None]:
    """A function that says on the first process what takes time now, after the minutes and seconds since this call."""
    started = time.monotonic()

    def say(what: str) -> None:
        if processes().is_main_process:
            seconds = round(time.monotonic() - started)
            tqdm.write(f"{seconds // 60}:{seconds % 60:02} {what}", file=sys.stderr)

    return say


def draw_figures(
    pipeline, report: Report, best: dict, request: dict[str, list], held_out: PictureDataset, folder: Path
) -> None:
    """Draws what a sweep has measured, measures by guidance, samples by guidance and number of steps, samples of the
    `best` setting as they emerge from noise, and what an upsampler enlarges. An autoencoder has none of these
    figures."""
    if not pipeline.denoises:
        return
    settings, argument, choices = report.settings, pipeline.guidance_argument, [1.0, 2.0, 4.0]
    if report.sweep:
        draw_sweep(last_measures(report.sweep), best, folder / "sweep.png")
    strengths = {name: {setting.get(name) for setting in settings} for name in (argument, "autoguidance_scale")}
    for name in [name for name, values in strengths.items() if len(values) > 1][:1]:
        draw_guidance(settings, name, folder / "guidance.png")
    if "image" in request:
        draw_enlarged(pipeline, held_out, shared=False).save(folder / "enlarged.png")
        argument = "noise_level"
        choices = [share * pipeline.config.max_noise_level // 4 for share in (0, 1, 2, 4)]
    classes = request.get("class_labels", [])[:500]
    first = sorted(range(len(classes)), key=lambda i: classes[:i].count(classes[i]))[
        :4
    ]  # of as many classes as can be
    few = {name: [values[i] for i in first or range(4)] for name, values in request.items()}
    values = sorted({setting[argument] for setting in settings if argument in setting} or choices)
    asked = sorted({setting["num_inference_steps"] for setting in settings})
    steps = {"steps": asked} if len(asked) > 1 else {}
    draw_steps(pipeline, few, {argument: values} if argument else {}, **steps).save(folder / "steps.png")
    options = {name: value for name, value in best.items() if name != "sampler"}
    draw_trajectory(pipeline, few, **options).save(folder / "trajectory.png")
