"""The metadata of a card, which the Hub reads: YAML at its top, and `.eval_results/` beside it."""

import os
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from hf_genmod.evaluation.estimates import Estimate, Share
from hf_genmod.evaluation.report import setting_name
from hf_genmod.hub import can_be_id, why_missing
from hf_genmod.sharing.facts import Facts

# Name in evaluation.json -> heading in the card, and metric on the Hub.
METRICS = {
    "told_apart": ("told apart", "classifier-two-sample-accuracy"),
    "frechet_distance": ("Fréchet distance", "frechet-distance"),
    "kernel_distance": ("kernel distance", "kernel-distance"),
    "precision": ("precision", "precision"),
    "recall": ("recall", "recall"),
    "density": ("density", "density"),
    "coverage": ("coverage", "coverage"),
    "recognised_share": ("recognised", "accuracy"),
    "copies": ("close to a training image", "share-of-copies"),
    "bits_per_dimension": ("bits per dimension", "bits-per-dimension"),
}


def headline(facts: Facts) -> list[tuple[str, str, Estimate, Estimate | None]]:
    """Three measures of the best setting that can judge it: heading, metric on the Hub, measure, and that of held-out
    images."""
    if not (facts.report and facts.report.settings):
        return []
    report, measures, held_out = facts.report, dict(facts.report.best), dict(facts.report.held_out)
    for bound in report.bits_per_dimension.values():
        measures["bits_per_dimension"] = bound  # the last
    if copies := measures.get("memorisation"):
        measures["copies"] = max((found["share"] for found in copies.values()), key=lambda share: share.value)
        held_out["copies"] = Share(0.01, facts.report.dataset["num_held_out"], 0.01, 0.01)  # by the threshold
    arrows = {"told_apart": "↓", "frechet_distance": "↓", "copies": "↓", "coverage": "↑", "recognised_share": "↑"}
    arrows |= {"bits_per_dimension": "↓", "precision": "↑"}
    return [
        (f"{METRICS[name][0]} {arrow}", METRICS[name][1], measures[name], held_out.get(name))
        for name, arrow in arrows.items()
        if name in measures and name not in report.unable_to_judge
    ][:3]


def card_metadata(facts: Facts, license: str, repo_id: str | None) -> ModelCardData:
    """The YAML at the top of a card; arguments as of `write_card`."""
    is_text = "tokenizer" in facts.configs or "prompt" in facts.learned
    task = "image-to-image" if facts.factor else "text-to-image" if is_text else "unconditional-image-generation"
    bases = [facts.base] if facts.base else facts.settings.get("built_on", {}).values()
    bases = [base for base in bases if can_be_id(base) and not os.path.isdir(base)]
    if repo_id is not None and not facts.base:  # the path of a folder that is not here looks like an id
        bases = [base for base in bases if why_missing(base) is None]
    results = [
        EvalResult(
            task_type=task,
            dataset_type=facts.measured_id or facts.report.dataset["fingerprint"],
            dataset_name=shared_name(facts.report.dataset["name"]),
            metric_type=metric,
            metric_name=f"{heading[:-2]} ({_how(facts, measure)})",
            metric_value=_rounded(measure.value),
        )
        for heading, metric, measure, _ in headline(facts)
    ]
    tags = ["diffusers", "hf_genmod", *(["lora"] if facts.base else []), *(["trackio"] if facts.uses_trackio else [])]
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=task,
        tags=tags,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation="adapter" if bases and facts.base else None,
        widget=[{"text": text, "output": {"url": file}} for text, file in facts.examples] or None,
        model_name=(repo_id or facts.name).split("/")[-1] if results else None,
        eval_results=results or None,
    )


def write_eval_results(facts: Facts, repo_id: str | None) -> None:
    """
    Writes `.eval_results/`, of which the Hub makes the leaderboard of a data set that has one
    (https://huggingface.co/docs/hub/eval-results): the measures of the headline, each under its metric as the task.
    There is none for a data set that is not on the Hub.
    """
    source = {"source_url": f"https://huggingface.co/{repo_id}", "source_name": "model card"} if repo_id else {}
    entries = [
        EvalResultEntry(facts.measured_id, metric, _rounded(measure.value), notes=_how(facts, measure), **source)
        for _, metric, measure, _ in headline(facts)
    ]
    if facts.results_file and entries:
        file = facts.folder / facts.results_file
        file.parent.mkdir(exist_ok=True)
        text = yaml.dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        file.write_text(text, encoding="utf-8")


def _how(facts: Facts, measure: Estimate) -> str:
    name, interval = setting_name(facts.report.best), f"{measure.low:.3g}–{measure.high:.3g}"
    return f"{name}, {measure.count:,} images, 95%: {interval}"


def shared_name(name: str) -> str:
    """The name of a data set without the path on this machine: an id, or the last part of a path, and the split."""
    path, bracket, split = name.partition(" (")
    is_path = Path(path).expanduser().exists() or Path(path).is_absolute() or path.startswith((".", "~"))
    return f"{Path(path).name if is_path else path}{bracket}{split}"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
