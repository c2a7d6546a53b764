"""What was measured of a checkpoint: `evaluation.json`."""

import dataclasses
import json
import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from hf_genmod.checkpoints.safety import read_json
from hf_genmod.drawing.curves import SYMBOLS
from hf_genmod.evaluation.estimates import Estimate, Share
from hf_genmod.evaluation.standard import standard_table

# Measures that are shares, or that hold shares by the name of a class.
_SHARES = {"told_apart", "told_apart_by_longer_training", "precision", "recall", "coverage", "share"}
_SHARES |= {"recognised_share", "recognised_share_by_class"}

# Measures of which held-out images show the best that can be reached, and whether less is better.
_BOUNDED = {"frechet_distance": True, "kernel_distance": True}
_BOUNDED |= dict.fromkeys(("precision", "recall", "density", "coverage", "recognised_share"), False)

_LEAST_RECOGNISED = 0.8  # of held-out images, by a classifier that is to recognise samples

# A network that knows more than one that is trained on a small data set.
_PRETRAINED = "facebook/dinov2-base"

# What the table of a report shows.
_COLUMNS = {
    "told_apart": "told apart (50% is best)",
    "frechet_distance": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "recognised_share": "recognised",
    "seconds": "seconds per image",
}


def setting_name(setting: dict) -> str:
    """How the samples of a setting were drawn, such as "DDIM, 50 steps, γ = 2"."""
    words = [setting.get("sampler", "").removesuffix("Scheduler").removesuffix("Multistep")]
    words += [f"{setting['num_inference_steps']} steps"] if "num_inference_steps" in setting else []
    words += [f"{symbol} = {setting[name]:g}" for name, symbol in SYMBOLS.items() if name in setting]
    words += [f"{setting['prior']} prior"] if "prior" in setting else []
    words += [f"noise level {setting['noise_level']}"] if "noise_level" in setting else []
    return ", ".join(filter(None, words))


def num_swept(sweep: dict) -> int:
    """The number of settings that a sweep has tried."""
    return len({setting_name(setting) for setting in sweep["rounds"][0]["settings"]} | {*sweep["failed"]})


@dataclasses.dataclass
class Report:
    """
    What was measured of a checkpoint. Measures are of type [`Estimate`], or of its kind [`Share`].

    Attributes:
        model (`str`): The checkpoint: a folder, or an id on the Hub.
        dataset (`dict`): "name", "num_pictures", "num_held_out", "held_out_is_unseen" and "fingerprint".
        features (`str`): The network whose features are compared.
        seed (`int`): The seed of the first sample.
        settings (`list[dict]`): For each setting the arguments by which samples were drawn ("sampler",
            "num_inference_steps", "guidance_scale", "classifier_scale", "autoguidance_scale", "noise_level" or
            "prior") and the measures: "seconds" and "forward_passes" per sample, [`told_apart`] (of the best setting
            also by judges that learned twice as long, "told_apart_by_longer_training"), those of
            [`evaluate_features`], those of [`recognised`] if samples have labels, "memorisation" as [`audit`] returns
            it, and "standard" as [`StandardMeasures`] measures it.
        held_out (`dict`): The same measures of held-out images.
        bits_per_dimension (`dict`): Upper bounds by their names.
        interpolated (`dict`, *optional*): The same measures of bicubic interpolation, if the model is an upsampler.
        left_out (`dict`): The measures for which there are too few images, and how many they need.
        sweep (`dict`, *optional*): What a sweep has tried and chosen, as [`sweep`][hf_genmod.evaluation.sweep.sweep]
            returns it. Then `settings` is the one that it chose, measured on other samples.
    """

    model: str
    dataset: dict
    features: str
    seed: int
    settings: list[dict]
    held_out: dict = dataclasses.field(default_factory=dict)
    bits_per_dimension: dict = dataclasses.field(default_factory=dict)
    interpolated: dict | None = None
    left_out: dict = dataclasses.field(default_factory=dict)
    sweep: dict | None = None

    def __str__(self) -> str:
        """Tables with a line for each setting, the best one named, and one for held-out images: of own measures, and
        of standard ones if there are any. A column with a star is unable to judge, which is explained below."""
        names = [name for name in _COLUMNS if any(name in setting for setting in self.settings)]
        lines = [[setting_name(setting), setting] for setting in self.settings]
        if len(lines) > 1:
            next(line for line in lines if line[1] is self.best)[0] += " (best)"
        lines.append(["held-out images", self.held_out])
        notes = [f"chosen by a sweep of {num_swept(self.sweep)} settings"] if self.sweep else []
        notes += [f"left out: the {name}, which {reason}" for name, reason in self.left_out.items()]
        notes += [f"* unable to judge: {reason}" for reason in self.unable_to_judge.values()]
        if self.unable_to_judge and self.features != _PRETRAINED:
            is_here = isinstance(try_to_load_from_cache(_PRETRAINED, "config.json"), str)
            where = "which is in the cache of this machine" if is_here else "from the Hub"
            notes.append(f"--features {_PRETRAINED} compares images by a larger network, {where}")
        table = [["", *(_COLUMNS[name] + " *" * (name in self.unable_to_judge) for name in names)]]
        for text, measures in lines:
            found = [measures.get(name) for name in names]
            table.append([text, *("" if estimate is None else estimate.interval for estimate in found)])
        tables = [_aligned(rows) for rows in (table, standard_table(dict(lines))) if rows]
        return "\n\n".join([*tables, *(["\n".join(notes)] if notes else [])])

    @property
    def best(self) -> dict:
        """The setting of the lowest Fréchet distance; of the lowest kernel distance if there are too few samples."""
        name = "frechet_distance" if "frechet_distance" in self.settings[0] else "kernel_distance"
        return min(self.settings, key=lambda setting: setting[name].value)

    @property
    def unable_to_judge(self) -> dict[str, str]:
        """
        The measures that cannot judge the samples, and a sentence that says why. A classifier can if it recognises
        80% of held-out images. A measure cannot if samples are better by it than held-out images, beyond both
        intervals, as these are the best that a model could draw. (The Fréchet distance falls with the number of
        images, so more samples than held-out images may have a lower one.)
        """
        reasons = {}
        for name, less_is_better in _BOUNDED.items():
            real = self.held_out.get(name)
            for setting in self.settings if real else ():
                found = setting.get(name)
                if found is None or (name == "frechet_distance" and found.count > real.count):
                    continue
                if found.high < real.low if less_is_better else found.low > real.high:
                    words = name.replace("_", " ").replace("frechet", "Fréchet")
                    reasons[name] = (
                        f"by the {words}, samples ({setting_name(setting)}: {found.interval}) are better than real "
                        f"images that were held out ({real.interval})"
                    )
        known = self.held_out.get("recognised_share")
        if known and known.value < _LEAST_RECOGNISED:
            reasons["recognised_share"] = (
                f"the classifier recognises only {known.interval} of real images that were held out"
            )
        return reasons

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `evaluation.json` into a folder."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        fields["unable_to_judge"] = self.unable_to_judge
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "evaluation.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Report | None":
        """The report that `save` wrote; `None` if there is none. Raises a `ValueError` if it cannot be read."""
        file = Path(folder, "evaluation.json")
        try:
            if not file.is_file():
                return None
            found = _measures(read_json(file))
            found.pop("unable_to_judge", None)  # follows from the measures
            return cls(**found)
        except TypeError as error:
            raise ValueError(f"{file}: not a report as this version writes it ({error}); evaluate again") from error


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _measures(found, is_share: bool = False):
    """What was read from JSON, with measures as `Estimate` or `Share`."""
    if isinstance(found, list):
        return [_measures(value) for value in found]
    if not isinstance(found, dict):
        return found
    if found.keys() == {field.name for field in dataclasses.fields(Estimate)}:
        return (Share if is_share else Estimate)(**found)
    return {name: _measures(value, is_share or name in _SHARES) for name, value in found.items()}
