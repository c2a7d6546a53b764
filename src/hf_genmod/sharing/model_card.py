"""The card of a checkpoint, `README.md`: its words are in the template beside this file, its values in the folder."""

import hashlib
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import jinja2
from huggingface_hub import ModelCard
from PIL import Image

from hf_genmod.drawing.grids import draw_checkpoint
from hf_genmod.drawing.samples import draw_images
from hf_genmod.errors import shortened
from hf_genmod.evaluation.estimates import Estimate, Share
from hf_genmod.evaluation.report import Report, setting_name
from hf_genmod.evaluation.standard import standard_table
from hf_genmod.evaluation.sweep import sweep_table
from hf_genmod.processes import processes
from hf_genmod.sharing.facts import Facts
from hf_genmod.sharing.loading import load_pipeline
from hf_genmod.sharing.metadata import METRICS, card_metadata, headline, shared_name, write_eval_results
from hf_genmod.training.run_folder import RunFolder


def write_card(
    folder: str | os.PathLike,
    license: str | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
    facts: Facts | None = None,
) -> ModelCard:
    """
    Writes the card of a checkpoint or an adapter from the files of its run and, if there is one, from its evaluation;
    draws `samples.png` if it is missing. A card that was edited by hand is left unchanged.

    Args:
        folder (`str` or `os.PathLike`): The folder of a finished run.
        license (`str`, *optional*): Name of the licence on the Hub, such as "mit"; by default that in the card.
        repo_id (`str`, *optional*): The repository that the card is for. Such a card shows no training images.
        revision (`str`, *optional*): The branch of the repository.
        facts ([`Facts`], *optional*): Those of the folder, if they are read already.

    Raises:
        ValueError: If the licence is missing or is not a name on the Hub, or the model of an adapter is not known.
        FileNotFoundError: If there is no checkpoint in the folder.
    """
    file = Path(folder, "README.md")
    if RunFolder(folder).is_complete and file.is_file() and not is_as_written(file.read_text(encoding="utf-8")):
        return ModelCard.load(file)
    facts = facts or Facts.read(folder)
    license = check_license(license) if license else license_of(folder)
    draw_samples(facts)
    text = _fill_template(facts, license, repo_id, revision)
    file.write_text(f"{text}\n<!-- {_digest(text)} -->\n", encoding="utf-8")
    write_eval_results(facts, repo_id)
    return ModelCard.load(file)


def check_license(license: str) -> str:
    """Returns a licence, or raises a ValueError if it is not spelled as a name on the Hub."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(
            f"license: {license!r} is not the name of a licence on the Hub, such as mit, apache-2.0, cc-by-4.0 or "
            "other; https://huggingface.co/docs/hub/repositories-licenses lists them"
        )
    return license


def license_of(folder: str | os.PathLike) -> str:
    """The licence in the card of a folder, or a ValueError if there is none."""
    file = Path(folder, "README.md")
    license = ModelCard.load(file).data.license if file.is_file() else None
    if not license:
        raise ValueError("license: a model that is shared needs one; give it, such as --license mit")
    return license


def is_as_written(text: str) -> bool:
    """Whether a card is as `write_card` wrote it: a digest of the text is its last line."""
    written, _, last = text.rstrip().rpartition("\n\n<!-- ")
    return last == f"{_digest(written + chr(10))} -->"


def _digest(text: str) -> str:
    return f"hf_genmod {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def draw_samples(facts: Facts) -> None:
    """Draws `samples.png` and the images that the Hub shows, if they are missing. The reconstructions of an
    autoencoder and the samples of an adapter are the last that its run has drawn."""
    file, drawn = facts.folder / "samples.png", sorted(facts.folder.glob("samples/step-*.png"))
    last = file if facts.base else facts.folder / "reconstructions.png"
    if drawn and "unet" not in facts.configs and not last.is_file():
        shutil.copyfile(drawn[-1], last)
    if facts.base or file.is_file():
        return
    pipeline = load_pipeline(facts.folder).to(processes().device)
    request = pipeline.example_request()
    if "image" in request or ("unet" not in facts.configs and not request):
        return  # an upsampler, which enlarges given images, or an autoencoder without a prior
    pipeline.set_progress_bar_config(desc="drawing samples for the card", leave=False, disable=None)
    draw_checkpoint(pipeline, facts.captions).save(file)
    names, each = facts.example_request
    options = {} if pipeline.denoises else request
    (facts.folder / "images").mkdir(exist_ok=True)
    for i, image in enumerate(draw_images(pipeline, each, len(names), shared=False, **options)):
        scale = math.ceil(256 / min(image.size))
        enlarged = image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
        enlarged.save(facts.folder / "images" / f"{i}.png")


def _fill_template(facts: Facts, license: str, repo_id: str | None, revision: str | None) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    filters = {"interval": _interval, "shortened": shortened, "shared_name": shared_name, "thousands": "{:,}".format}
    filters |= {"cell": lambda text: text.replace("|", "¦"), "value": _value}
    environment.filters |= filters | {"shared_command": _shared_command}
    template = Path(__file__).with_name("model_card_template.md").read_text(encoding="utf-8")
    report, settings = facts.report, facts.report.settings if facts.report else []
    balance = facts.provenance.get("class_balance", {})
    columns, key = {setting_name(setting): setting for setting in settings}, "recognised_share_by_class"
    columns |= {"held-out images": report.held_out} if report else {}
    recognised = {name: found[key] for name, found in columns.items() if key in found}
    text = environment.from_string(template).render(
        metadata=card_metadata(facts, license, repo_id).to_yaml(),
        title=repo_id or facts.name,
        facts=facts,
        usage=facts.usage(repo_id or facts.folder.as_posix(), revision),
        license=license,
        figures=facts.figures(shared=repo_id is not None),
        is_shared=repo_id is not None,
        report=report,
        metrics={
            name: heading + " \\*" * (name in report.unable_to_judge)
            for name, (heading, _) in METRICS.items()
            if any(name in x for x in settings)
        },
        name_of=setting_name,
        best=report.best if settings else None,
        headline=headline(facts),
        limits=_limits(report) if settings else {},
        recognised=recognised,
        standard=standard_table(columns),
        sweep=sweep_table(report.sweep) if report and report.sweep else [],
        classes=list(balance or next(iter(recognised.values()), {})),
        balance=balance,
        rare_classes=[name for name, count in balance.items() if count < sum(balance.values()) / len(balance) / 2],
    )
    text = text.encode(errors="surrogateescape").decode(errors="replace")  # paths that the locale cannot decode
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _limits(report: Report) -> dict:
    """What the measures show of the best setting."""
    held_out, best = report.held_out, report.best
    distance, perfect = best.get("frechet_distance"), held_out.get("frechet_distance")
    is_comparable = distance and perfect and distance.count == perfect.count and perfect.value > 0
    is_worse = is_comparable and distance.low > perfect.high
    classes = best.get("recognised_share_by_class", {})
    apart, expected = best.get("told_apart"), held_out.get("told_apart")
    return {
        "is_told_apart": apart and expected and apart.low > expected.high,
        "distance_ratio": distance.value / perfect.value if is_worse else None,
        "is_less_varied": best["coverage"].high < held_out["coverage"].low,
        "unrecognised": [name for name, share in classes.items() if share.high < best["recognised_share"].value],
        "copies": any(found["flagged"] for setting in report.settings for found in setting["memorisation"].values()),
    }


def _value(estimate: Estimate | Share | None) -> str:
    """An estimate without its interval."""
    is_large = estimate is not None and abs(estimate.value) >= 1000
    return f"{estimate.value:,.0f}" if is_large else _interval(estimate).split(" (")[0]


def _interval(estimate: Estimate | Share | None) -> str:
    """An estimate without the number of images, which the card names once."""
    return "" if estimate is None else estimate.interval


def _shared_command(command: str) -> str:
    """A command without folders of this machine: the last part of each path that is not relative."""
    words = [word.rpartition("=") if word.startswith("--") else ("", "", word) for word in shlex.split(command)]
    away = [Path(path).is_absolute() or path.startswith(("~/", "$HOME/")) for _, _, path in words]
    paths = [Path(path).name if is_away else path for is_away, (_, _, path) in zip(away, words, strict=True)]
    return shlex.join(f"{name}{equals}{path}" for path, (name, equals, _) in zip(paths, words, strict=True))
