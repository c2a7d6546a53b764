"""Makes what a sweep chose the defaults of a checkpoint."""

import os
import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline

from hf_genmod.checkpoints.parts import check_parts
from hf_genmod.evaluation.config import make_sampler
from hf_genmod.evaluation.report import Report, num_swept
from hf_genmod.evaluation.sweep import last_measures
from hf_genmod.sharing.facts import Facts
from hf_genmod.sharing.metadata import shared_name
from hf_genmod.sharing.model_card import draw_samples


def adopt(folder: str | os.PathLike, pipeline: DiffusionPipeline, report: Report) -> None:
    """
    Writes the setting that a sweep chose into a checkpoint: its sampler into `scheduler/`, its other arguments, and
    what they were chosen on, as `defaults` into `model_index.json`. A call of the pipeline that leaves arguments out
    then draws by this setting, with this package and without. If there is a `samples.png`, it is drawn anew.

    Args:
        folder (`str` or `os.PathLike`): The folder of the checkpoint.
        pipeline ([`~diffusers.DiffusionPipeline`]): What was loaded from it, and has these defaults then, too.
        report ([`Report`]): Its report, with a sweep.
    """
    folder, chosen = Path(folder), dict(report.sweep["chosen"])
    measured = next(setting for setting in last_measures(report.sweep) if chosen.items() <= setting.items())
    distance = measured["kernel_distance"]
    chosen_on = {
        "dataset": shared_name(report.dataset["name"]),
        "fingerprint": report.dataset["fingerprint"],
        "settings": num_swept(report.sweep),
        "samples": distance.count,
        "kernel_distance": distance.value,
        "interval": [distance.low, distance.high],
    }
    pipeline.scheduler = make_sampler(chosen.pop("sampler"), pipeline.scheduler)
    pipeline.register_to_config(defaults={"arguments": chosen, "chosen_on": chosen_on})
    check_parts(pipeline)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as partial:
        pipeline.scheduler.save_pretrained(Path(partial, "scheduler"))
        pipeline.save_config(partial)
        files = [file.relative_to(partial) for file in Path(partial).rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: (file.name == pipeline.config_name, file)):  # the index last
            os.replace(Path(partial, file), folder / file)
    for source in (folder / "scheduler").glob("*.py"):
        if source.relative_to(folder) not in files:  # of the sampler before
            source.unlink()
    if (folder / "samples.png").is_file():
        (folder / "samples.png").unlink()
        draw_samples(Facts.read(folder))
