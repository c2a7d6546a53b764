"""The card of a checkpoint, `README.md`: what a run knows of it, and what was measured. Nothing in it is typed."""

import hashlib
import os
import re
import shutil
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_genmod.drawing.grids import draw_checkpoint
from hf_genmod.processes import processes
from hf_genmod.sharing.facts import Facts
from hf_genmod.sharing.loading import load_pipeline
from hf_genmod.training.run_folder import RunFolder

TEMPLATE = Path(__file__).with_name("model_card_template.md")


_KINDS = {
    "UnconditionalPipeline": "A diffusion model (DDPM)",
    "ClassifierGuidedPipeline": "A diffusion model (DDPM) with a classifier of noisy pictures that guides it",
    "ClassifierFreeGuidedPipeline": "A class-conditional diffusion model (DDPM with classifier-free guidance)",
    "TextToImagePipeline": "A text-to-image diffusion model (DDPM with classifier-free guidance)",
    "AutoencoderPipeline": "An autoencoder",
    "SuperResolutionPipeline": "A diffusion model (DDPM) that enlarges pictures",
}


_CURVES = {
    "loss.png": "Loss of training and of held-out pictures",
    "accuracy.png": "Accuracy of the classifier by noise level",
}


_FIGURES = {
    "evaluation/guidance.png": "The strength of guidance against quality, with 95% intervals",
    "evaluation/steps.png": "The same noise by strengths of guidance and numbers of steps",
    "evaluation/trajectory.png": "How pictures come out of noise",
}


_OF_PICTURES = {
    "evaluation/enlarged.png": "Held-out pictures made small; enlarged by bicubic interpolation, and by the model; as "
    "they are",
}


# Name in evaluation.json -> heading here, and metric on the Hub.
_METRICS = {
    "frechet_distance": ("Fréchet distance", "frechet-distance"),
    "kernel_distance": ("kernel distance", "kernel-distance"),
    "precision": ("precision", "precision"),
    "recall": ("recall", "recall"),
    "density": ("density", "density"),
    "coverage": ("coverage", "coverage"),
    "recognised_share": ("recognised", "accuracy"),
}


_SCALES = {"guidance_scale": "γ", "classifier_scale": "s"}


_SHARES = ("precision", "recall", "coverage", "recognised_share")


def write_card(
    folder: str | os.PathLike, license: str | None = None, repo_id: str | None = None, revision: str | None = None
) -> ModelCard:
    """
    Writes the card of a checkpoint or an adapter, from what the run has written down and, where there is an
    `evaluation/` in the folder, from what was measured; and `samples.png`, if there is none. A card that somebody has
    changed since is left as it is.

    Args:
        folder (`str` or `os.PathLike`): The folder of a run that is over.
        license (`str`, *optional*): Licence of the model, as the Hub calls it, such as "mit"; by default that of the
            card that is there.
        repo_id (`str`, *optional*): Where on the Hub it is to be. Such a card shows no training pictures.
        revision (`str`, *optional*): On which branch.

    Raises:
        ValueError: If there is no licence, or it is spelled as the Hub spells none, or an adapter's run has not
            written down which model it is for.
        FileNotFoundError: If there is no checkpoint in the folder.
    """
    run, folder = RunFolder(folder), Path(folder)
    if not run.is_complete:
        raise FileNotFoundError(f"{folder}: no model_index.json in it, so there is no checkpoint to write a card for")
    file = folder / "README.md"
    if file.is_file() and not _is_as_written(file.read_text(encoding="utf-8")):
        return ModelCard.load(file)
    license = check_license(license) if license else license_of(folder)
    facts = Facts(folder)
    if not (folder / "samples.png").is_file():
        _draw_samples(facts)
    words = _words(facts, license, repo_id, revision)
    card = ModelCard.from_template(_metadata(facts, license, repo_id), template_path=TEMPLATE, **words)
    text = re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"
    file.write_text(f"{text}\n<!-- {_digest(text)} -->\n", encoding="utf-8")
    return ModelCard.load(file)


def check_license(license: str) -> str:
    """A licence, if it is spelled as the Hub does.

    Raises:
        ValueError: If not.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(
            f"license: {license!r} is not as the Hub calls one, such as mit, apache-2.0, cc-by-4.0 or other; "
            "https://huggingface.co/docs/hub/repositories-licenses lists them"
        )
    return license


def license_of(folder: str | os.PathLike) -> str:
    """The licence that the card in a folder names.

    Raises:
        ValueError: If there is none.
    """
    file = Path(folder, "README.md")
    license = ModelCard.load(file).data.license if file.is_file() else None
    if not license:
        raise ValueError("license: a model that is shared needs one; give it, such as --license mit")
    return license


def base_of(folder: str | os.PathLike) -> str | None:
    """The model that an adapter in a folder is for; `None` of a checkpoint of its own.

    Raises:
        ValueError: If the run of the adapter has not written it down.
    """
    return Facts(Path(folder)).base


def figures_of(folder: str | os.PathLike) -> list[str]:
    """The figures in a folder that show no training pictures and belong to its card."""
    figures = _figures(Facts(Path(folder)), shared=True)
    return [name for name in ("samples.png", *_CURVES, *figures) if Path(folder, name).is_file()]


def _figures(facts: "Facts", shared: bool) -> dict[str, str]:
    """Names and descriptions; those of an upsampler show pictures that were given to it."""
    if facts.factor:
        return {} if shared else _FIGURES | _OF_PICTURES
    return _FIGURES


def _digest(text: str) -> str:
    return f"hf_genmod {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def _is_as_written(text: str) -> bool:
    written, _, last = text.rstrip().rpartition("\n\n<!-- ")
    return last == f"{_digest(written + chr(10))} -->"


def _draw_samples(facts: Facts):
    file = facts.folder / "samples.png"
    if facts.base is None and facts.index.get("vae", [None, None])[1] == "AutoencoderKL" and facts.is_autoencoder:
        return  # which has no prior to draw from
    if facts.factor:
        return  # of whose pictures?
    if facts.base is None:
        pipeline = load_pipeline(facts.folder).to(processes().device)
        pipeline.set_progress_bar_config(disable=True)
        draw_checkpoint(pipeline, facts.captions).save(file)
    else:
        drawn = sorted((facts.folder / "samples").glob("step-*.png"))  # by the model with the adapter
        if drawn:
            shutil.copyfile(drawn[-1], file)


def _metadata(facts: Facts, license: str, repo_id: str | None) -> ModelCardData:
    is_text = "tokenizer" in facts.configs or "prompt" in facts.asked
    on_hub = facts.base is not None and not os.path.isdir(facts.base)
    task = "text-to-image" if is_text else "unconditional-image-generation"
    task = "image-to-image" if facts.factor else task
    results = [
        EvalResult(
            task_type=task,
            dataset_type=facts.report["dataset"]["fingerprint"],
            dataset_name=_shared_name(facts.report["dataset"]["name"]),
            metric_type=_METRICS[name][1],
            metric_name=f"{_METRICS[name][0]} ({_called(setting)})",
            metric_value=_rounded(setting[name]["value"]),
            metric_args={
                "interval": [_rounded(setting[name][end]) for end in ("low", "high")],
                "samples": setting[name]["count"],
            },
        )
        for setting in facts.report.get("settings", [])
        for name in _METRICS
        if name in setting
    ]
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=task,
        tags=["diffusers", "hf_genmod", *(["lora"] if facts.base else [])],
        base_model=facts.base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        model_name=(repo_id or facts.name).split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _words(facts: Facts, license: str, repo_id: str | None, revision: str | None) -> dict:
    """What the template is filled with."""
    report, where = facts.report, f'"{repo_id or facts.folder}"'
    where += f', revision="{revision}"' if revision else ""

    def there(names):
        return [(name, alt) for name, alt in names.items() if (facts.folder / name).is_file()]

    closest = {
        f"evaluation/{file.name}": "The samples closest to a training picture, and below them these pictures: "
        + ", by ".join(file.stem.split("_")[1:])
        for file in sorted((facts.folder / "evaluation").glob("closest_*.png"))
    }
    return {
        "title": repo_id or facts.name,
        "summary": _summary(facts),
        "caption": _caption(facts),
        "has_samples": (facts.folder / "samples.png").is_file(),
        "usage": _usage(facts, where),
        "needs": _needs(facts),
        "data": _data(facts),
        "balance": list(facts.provenance.get("class_balance", {}).items()),
        "stages": [(what, *_procedure(stage)) for what, stage in facts.stages if stage.provenance],
        "curves": there(_CURVES),
        "evaluation": _evaluation(facts),
        "settings": _settings(report) if report.get("settings") else "",
        "by_class": _by_class(report),
        "figures": there(_figures(facts, shared=repo_id is not None)),
        "audit": _audit(report, shared=repo_id is not None),
        "closest": [] if repo_id else list(closest.items()),
        "limits": _limits(facts),
        "license": license,
    }


def _summary(facts: Facts) -> str:
    if facts.base:
        learned = _listed(list(facts.asked.values()))
        teaches = f", to which it teaches {learned!r}" if learned else ""
        return (
            f"An adapter (LoRA) of {facts.model_size} for the model `{facts.base}`{teaches}. It does nothing without "
            "that model."
        )
    kind = _KINDS[facts.index["_class_name"][1]]
    if facts.is_autoencoder and facts.index["vae"][1] != "Autoencoder":
        kind = "A variational autoencoder"
    if facts.factor:
        kind += f" to {facts.factor} times their height and width"
    if "unet" in facts.configs and "vae" in facts.configs:
        kind += " in the latent space of an autoencoder"
    classes = f", of {len(facts.classes)} classes: {_listed(facts.classes)}" if facts.classes else ""
    ready = {
        "vae": facts.index.get("vae", [None, None])[1] == "AutoencoderKL",
        "text encoder": "text_encoder" in facts.config.get("depends_on", {}),
    }
    but = [name for name, was in ready.items() if was]
    return (
        f"{kind}, which makes pictures of {facts.picture_size}{classes}. It has {facts.model_size}, trained from "
        f"scratch by `hf_genmod`{f', but for the {_listed(but)}, which was trained by others' if but else ''}."
    )


def _caption(facts: Facts) -> str:
    if facts.base:
        return "Samples of the model with the adapter."
    steps = ", in 20 steps" if "unet" in facts.configs else ""
    return f"Samples, not chosen: the first has the seed 0, the next 1, and so on{steps}."


def _usage(facts: Facts, where: str) -> str:
    lines = ["from diffusers import DiffusionPipeline", *(["from PIL import Image"] if facts.factor else []), ""]
    model = f'"{facts.base}"' if facts.base else where
    lines.append(f"pipe = DiffusionPipeline.from_pretrained({model}, trust_remote_code=True)")
    if facts.base:
        lines.append(f"pipe.load_lora_weights({where})")
    lines.append(f'pipe({facts.request}).images[0].save("sample.png")')
    return "\n".join(lines)


def _needs(facts: Facts) -> str:
    versions = facts.provenance.get("versions", {})
    packages = ["torch", "diffusers", *(["transformers"] if "tokenizer" in facts.configs else [])]
    packages += ["transformers", "peft"] if facts.base else []
    known = ", ".join(f"{name} {versions[name]}" if name in versions else name for name in packages)
    return (
        f"It was made with {known}. `trust_remote_code` agrees to run the Python files that the checkpoint carries; "
        "where `hf_genmod` is installed, its `load_pipeline` opens the same checkpoint and runs none of them."
    )


def _data(facts: Facts) -> str:
    pictures = facts.config.get("pictures")
    if not pictures:
        return "The folder of the model does not say what it was trained on."
    held_out = f"; the loss of {pictures['num_held_out']:,} others was watched" if pictures["num_held_out"] else ""
    skipped = f"; {len(pictures['skipped'])} that could not be used were left out" if pictures["skipped"] else ""
    made = {**pictures, **facts.provenance}  # of an adapter or of latents the pictures themselves
    among = ", among samples of the model as it was, for it to keep what it knows" if facts.base else ""
    return (
        f"{made['num_pictures']:,} pictures of `{_shared_name(pictures['name'])}`{among}{held_out}{skipped}. Their "
        f"fingerprint, a hash of what was trained on: `{made['fingerprint']}`."
    )


def _shared_name(name: str) -> str:
    """A data set as others may call it: the id, or the last name of a folder, with its split in brackets."""
    path, bracket, split = name.partition(" (")
    is_path = Path(path).expanduser().exists() or path.startswith(("/", ".", "~"))
    return f"{Path(path).name if is_path else path}{bracket}{split}"


def _procedure(facts: Facts) -> tuple[str, str]:
    """The command, and what became of it."""
    made = facts.provenance
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    commit = made["commit"]
    if commit:
        versions += f"; commit {commit.rstrip('+')} of hf_genmod" + (", with changes" if commit.endswith("+") else "")
    training = facts.config.get("training", {})
    precision, averages = training.get("mixed_precision", "no"), training.get("ema_length", 0)
    average = " The weights are a moving average of those of the steps." if averages else ""
    return made["command"], (
        f"{made['steps']:,} steps in {made['minutes']:.1f} minutes on {made['hardware']}"
        f"{'' if precision == 'no' else f', in {precision}'}.{average} Versions: {versions}."
    )


def _evaluation(facts: Facts) -> str:
    report = facts.report
    if not report:
        return "How good it is has not been measured. `examples/evaluate.py` of `hf_genmod` does, and writes it here."
    count = report["settings"][0]["frechet_distance"]["count"] if report["settings"] else 0
    text = (
        f"{count:,} samples of each setting, seeds {report['seed']} to {report['seed'] + count - 1}, beside the "
        f"{report['dataset']['num_pictures']:,} training pictures, and {report['dataset']['num_held_out']:,} held-out "
        f"pictures, which a perfect model would come close to. The features are of {_features(report)}; distances by "
        "other features or of other numbers of samples cannot be compared with these. In brackets 95% intervals: "
        "Wilson's of shares, of distances by halves of the samples."
    )
    if "interpolated" in report:
        text += " Samples are held-out pictures, made small and enlarged again; bicubic is interpolation."
    if not report["dataset"]["held_out_is_unseen"]:
        text += " The held-out pictures are some of those that it was trained on, as there are no others."
    for name, bits in report.get("bits_per_dimension", {}).items():
        of = f"{bits['count']:,} held-out pictures of 8 bits"
        text += f"\n\n{name.capitalize()}: {_shown(bits)} bits per dimension, of {of}."
    return text


def _features(report: dict) -> str:
    name = report["features"]
    if name.endswith(".safetensors"):
        return f"a small network, `{Path(name).name}`, that other reports may share"
    return f"`{_shared_name(name)}`" if "/" in name else name


def _settings(report: dict) -> str:
    """A table, a row for each setting."""
    names = [name for name in _METRICS if any(name in setting for setting in report["settings"])]
    rows = [["", *(_METRICS[name][0] for name in names), "passes", "seconds"]]
    for setting in report["settings"]:
        cost = [f"{setting['forward_passes']:.0f}", _shown(setting["seconds"])]
        rows.append([_called(setting), *(_shown(setting[name], name) for name in names), *cost])
    if "interpolated" in report:
        rows.append(["bicubic", *(_shown(report["interpolated"].get(name), name) for name in names), "", ""])
    rows.append(["held-out pictures", *(_shown(report["held_out"].get(name), name) for name in names), "", ""])
    return _table(rows)


def _by_class(report: dict) -> str:
    """A table of how well each class is recognised, of the settings that have classes."""
    settings = [setting for setting in report.get("settings", []) if "recognised_share_by_class" in setting]
    if not settings:
        return ""
    rows = [["recognised", *(_called(setting) for setting in settings), "held-out pictures"]]
    columns = [setting["recognised_share_by_class"] for setting in [*settings, report["held_out"]]]
    for name in columns[0]:
        rows.append([name, *(_shown(column.get(name), "recognised_share") for column in columns)])
    return _table(rows)


def _called(setting: dict) -> str:
    words = [setting.get("sampler", "").removesuffix("Scheduler").removesuffix("Multistep")]
    words += [f"{setting['num_inference_steps']} steps"] if "num_inference_steps" in setting else []
    words += [f"{symbol} = {setting[name]:g}" for name, symbol in _SCALES.items() if name in setting]
    words += [f"{setting['prior']} prior"] if "prior" in setting else []
    words += [f"noise level {setting['noise_level']}"] if "noise_level" in setting else []
    return ", ".join(word for word in words if word)


def _shown(estimate: dict | None, name: str = "") -> str:
    """A value with its interval."""
    if estimate is None:
        return ""
    value, low, high = (estimate[key] * (100 if name in _SHARES else 1) for key in ("value", "low", "high"))
    return f"{value:.1f}% ({low:.1f}–{high:.1f})" if name in _SHARES else f"{value:.3g} ({low:.3g}–{high:.3g})"


def _audit(report: dict, shared: bool) -> str:
    if not report:
        return "Whether it has learned pictures by heart has not been measured."
    lines = [
        "For each sample the nearest training picture was sought. Of held-out pictures"
        + (", which cannot be copies," if report["dataset"]["held_out_is_unseen"] else " (which it has seen, too)")
        + " 1% are nearer to one than the threshold. More than 1% of the samples by over three standard errors are "
        "flagged.",
        "",
        _table(
            [["samples", "compared by", "nearer than the threshold", "flagged"]]
            + [
                [_called(setting), space, _shown(found["share"], "recognised_share"), _yes_or_no(found["flagged"])]
                for setting in report["settings"]
                for space, found in setting["memorisation"].items()
            ]
        ),
    ]
    if shared:
        lines += ["", "The closest pairs are not shown here, as they show training pictures."]
    return "\n".join(lines)


def _yes_or_no(flagged: bool) -> str:
    return "**yes**" if flagged else "no"


def _limits(facts: Facts) -> list[str]:
    """What follows from the data and the measurements."""
    limits, report = [], facts.report
    balance = facts.provenance.get("class_balance", {})
    if "pictures" in facts.config and not facts.base:
        count = facts.config["pictures"]["num_pictures"]
        limits.append(f"It knows {count:,} pictures and nothing else; what is not among them it cannot make.")
    rare = [name for name, count in balance.items() if count < sum(balance.values()) / len(balance) / 2]
    if rare:
        limits.append(f"Of {_listed(rare)} there were less than half as many pictures as of the average class.")
    settings, held_out = report.get("settings", []), report.get("held_out", {})
    if settings:
        best = min(settings, key=lambda setting: setting["frechet_distance"]["value"])
        by, distances = _called(best), [measured["frechet_distance"] for measured in (best, held_out)]
        comparable = distances[0]["count"] == distances[1]["count"] and distances[1]["value"] > 0
        if comparable and distances[0]["low"] > distances[1]["high"]:
            limits.append(
                "Its samples can be told from pictures: their Fréchet distance is at best "
                f"{distances[0]['value'] / distances[1]['value']:.1f} times that of held-out pictures ({by})."
            )
        if best["coverage"]["high"] < held_out["coverage"]["low"]:
            limits.append(
                f"Its samples are less varied than the pictures: coverage {_shown(best['coverage'], 'coverage')} "
                f"where held-out pictures have {_shown(held_out['coverage'], 'coverage')} ({by})."
            )
        overall, classes = best.get("recognised_share"), best.get("recognised_share_by_class", {})
        worse = [name for name, share in classes.items() if share["high"] < overall["value"]]
        if worse:
            limits.append(f"Less often recognised than the average: {_listed(worse)} ({by}).")
    flagged = [setting for setting in settings if any(found["flagged"] for found in setting["memorisation"].values())]
    if flagged:
        limits.append(
            "**Some samples are copies of training pictures, or close to it.** Do not share them, or the model, where "
            "these pictures are not to be shared."
        )
    if not report:
        limits.append("Its quality and whether it copies are not known: look at its samples before you rely on them.")
    limits.append("Its pictures are invented. Do not pass them off as photographs, measurements or anybody's work.")
    return limits


def _table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(word.replace('|', '¦') for word in row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _listed(names: list[str], most: int = 12) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
