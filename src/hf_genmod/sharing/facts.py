"""What the folder of a run says about its checkpoint or adapter."""

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from hf_genmod.checkpoints.reading import component_names
from hf_genmod.checkpoints.safety import read_json, shapes_in
from hf_genmod.evaluation.report import Report
from hf_genmod.hub import did_you_mean
from hf_genmod.training.run_folder import PROVENANCE, RunFolder

_MOST_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Facts:
    """
    The files in the folder of a run, read once by `Facts.read`.

    Args:
        folder (`Path`): The folder.
        index (`dict`): `model_index.json`; empty for an adapter.
        configs (`dict[str, dict]`): The `config.json` of each component.
        settings (`dict`): `training_config.json`; empty where no run has written the folder.
        provenance (`dict`): `provenance.json`, likewise.
        report ([`Report`], *optional*): `evaluation/evaluation.json`, where something was measured.
        num_parameters (`int`): Of all components but the `guiding_unet`, or of the adapter.
        base (`str`, *optional*): The model that an adapter is for, a folder or an id on the Hub.
    """

    folder: Path
    index: dict
    configs: dict[str, dict]
    settings: dict
    provenance: dict
    report: Report | None
    num_parameters: int
    base: str | None

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Facts":
        """
        Reads the files in a folder.

        Raises:
            FileNotFoundError: If there is neither a checkpoint nor an adapter in it.
            ValueError: If the run of an adapter has not recorded which model the adapter is for.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: there is no such folder; {did_you_mean(str(folder)) or 'check the path'}"
            )
        if not RunFolder(folder).is_complete:
            raise FileNotFoundError(f"{folder}: no model_index.json in it, so it holds no checkpoint")
        index, settings = _read(folder / "model_index.json"), _read(folder / "training_config.json")
        base = None if index else settings.get("built_on", {}).get("base model")
        if not index and base is None:
            if isinstance(lora := settings.get("lora"), dict) and "base" in lora:
                raise ValueError(
                    f"{folder}: an earlier version of this package wrote the run; add "
                    f'"built_on": {json.dumps({"base model": lora["base"]})} to its training_config.json and '
                    f'"request": {json.dumps(settings.get("asked", {}), ensure_ascii=False)} to its provenance.json'
                )
            raise ValueError(f"{folder}: there is no training_config.json that says which model the adapter is for")
        components = component_names(index)
        counted = [name for name in components if name != "guiding_unet"]
        weights = [file for name in counted for file in (folder / name).glob("*.safetensors")]
        weights = weights if index else [folder / LORA_WEIGHT_NAME_SAFE]
        return cls(
            folder,
            index,
            configs={name: _read(folder / name / "config.json") for name in components},
            settings=settings,
            provenance=_read(folder / PROVENANCE),
            report=Report.read(folder / "evaluation"),
            num_parameters=sum(math.prod(shape) for file in weights for shape in shapes_in(file)),
            base=base,
        )

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def factor(self) -> int | None:
        """How many times an upsampler enlarges height and width."""
        return self.index.get("factor")

    @property
    def class_names(self) -> list[str]:
        names = self.index.get("id2label") or {}  # JSON makes the keys strings, and sorts them as strings
        return [names[index] for index in sorted(names, key=int)]

    @property
    def captions(self) -> list[str]:
        """Some captions of the training images, of a text-to-image model."""
        captions = self.provenance.get("captions", []) if "tokenizer" in self.index else []
        return [caption if isinstance(caption, str) else caption[0] for caption in captions if caption]

    @property
    def learned(self) -> dict:
        """What an adapter is asked by for what it has learned, such as `{"class_labels": "zebra"}`."""
        return self.provenance.get("request", {}) if self.base else {}

    @property
    def request(self) -> str:
        """The arguments, in Python, that ask the pipeline for one image."""
        if self.base:
            return ", ".join(f"{name}={_literal(value)}" for name, value in self.learned.items())
        if self.factor:
            return 'image=Image.open("small.png")'
        if self.class_names:
            return f"class_labels={_literal(self.class_names[0])}"
        if self.configs.get("classifier", self.configs.get("unet", {})).get("num_classes"):
            return "class_labels=0"  # the classes have no names
        if "tokenizer" in self.index:
            return f"prompt={_literal(self.captions[0] if self.captions else '')}"
        return 'prior="fitted"' if "unet" not in self.configs and self.index["vae"][1] == "Autoencoder" else ""

    @property
    def defaults(self) -> dict:
        """The arguments that a call takes where they are left out, if the checkpoint has its own: "arguments", and
        "chosen_on" if it is known what they were chosen on."""
        return self.index.get("defaults") or {}

    @property
    def is_consistent(self) -> bool:
        """Whether the model is tuned to few steps; earlier versions wrote it into the process."""
        return any(part.get("consistent", False) for part in (self.index, self.index.get("process") or {}))

    def usage(self, where: str, revision: str | None = None) -> str:
        """Python that draws an image with the checkpoint, or adapter, at `where`, a folder or an id on the Hub."""
        place = f'"{where}"' + (f', revision="{revision}"' if revision else "")
        model = f'"{self.base}"' if self.base else place
        lines = ["from diffusers import DiffusionPipeline", *(["from PIL import Image"] if self.factor else []), ""]
        lines.append(f"pipe = DiffusionPipeline.from_pretrained({model}, trust_remote_code=True)")
        if self.base:
            lines.append(f"pipe.load_lora_weights({place})")
        return "\n".join([*lines, f'pipe({self.request}).images[0].save("sample.png")'])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        vae, unet = self.configs.get("vae"), self.configs.get("unet")
        size = (unet or vae)["sample_size"]
        height, width = size if isinstance(size, list) else (size, size)
        factor = 1
        if vae and unet:  # an image is higher than its latents by this factor
            factor = vae.get("patch_size", 1) * 2 ** (len(vae["block_out_channels"]) - 1)
        return (vae or unet)["in_channels"], factor * height, factor * width

    @property
    def trained_by_others(self) -> list[str]:
        """The components that no run of this package has trained."""
        frozen = self.settings.get("depends_on") or self.settings.get("weights") or {}  # of earlier versions
        names = ["autoencoder"] if self.index.get("vae", [None, None])[1] == "AutoencoderKL" else []
        return names + ["text encoder"] * ("text_encoder" in self.configs and "text_encoder" in frozen)

    @property
    def stages(self) -> list[tuple[str | None, "Facts"]]:
        """The runs on which this one is built, as far as their folders are here, under what each has trained; then
        this one, under `None`."""
        stages = []
        for kind, path in self.settings.get("built_on", {}).items():
            if os.path.isdir(path) and RunFolder(path).is_complete:
                *before, (_, facts) = Facts.read(path).stages
                stages += [*before, (kind, facts)]
        return [*stages, (None, self)]

    @property
    def dataset_id(self) -> str | None:
        """The id on the Hub of the data set, if it was loaded from there."""
        return self.provenance.get("dataset_id")

    @property
    def measured_id(self) -> str | None:
        """The id on the Hub of the data set that the report compares samples with."""
        is_same = self.report and self.report.dataset["name"] == self.settings.get("pictures", {}).get("name")
        return self.dataset_id if is_same else None

    @property
    def results_file(self) -> str | None:
        """Where the measures lie of which the Hub makes the leaderboard of that data set, in the folder."""
        return f".eval_results/{self.measured_id.split('/')[-1]}.yaml" if self.measured_id else None

    @property
    def uses_trackio(self) -> bool:
        return self.settings.get("training", {}).get("report_to") == "trackio"

    @property
    def example_request(self) -> tuple[list[str], dict[str, list]]:
        """What the images in `images/` are of, in words and as arguments with one value per image, which are empty if
        the images differ by their seeds alone."""
        if self.class_names:
            names = self.class_names[:_MOST_EXAMPLES]
            return names, {"class_labels": list(range(len(names)))}
        if count := self.configs.get("classifier", self.configs.get("unet", {})).get("num_classes"):
            labels = list(range(min(count, _MOST_EXAMPLES)))
            return [f"class {label}" for label in labels], {"class_labels": labels}
        if captions := self.captions[:_MOST_EXAMPLES]:
            return captions, {"prompt": captions}
        seeds = [f"seed {i}" for i in range(_MOST_EXAMPLES)]
        return seeds, {"prompt": [""] * len(seeds)} if "tokenizer" in self.index else {}

    @property
    def examples(self) -> list[tuple[str, str]]:
        """The images that the Hub shows of the model: (what is asked for, file)."""
        if self.base:
            found = [(str(value), "samples.png") for value in self.learned.values()]
        else:
            found = [(name, f"images/{i}.png") for i, name in enumerate(self.example_request[0])]
        return [(name, file) for name, file in found if (self.folder / file).is_file()]

    def figures(self, shared: bool) -> list[str]:
        """The figures for the card that are in the folder; for a card that is shared, those that show no images of
        the data set, unless the package draws these. The figures of an upsampler do."""
        is_open = not shared or self.settings.get("pictures", {}).get("name") == "shapes"
        names = ["reconstructions.png"] if is_open else []
        names += ["samples.png", "loss.png", "accuracy.png"]
        if is_open or not self.factor:
            swept = ["sweep"] if self.report and self.report.sweep else []
            names += [f"evaluation/{name}.png" for name in (*swept, "guidance", "steps", "trajectory")]
        names += ["evaluation/enlarged.png"] if is_open and self.factor else []
        names += [self.closest[0]] if self.closest and not shared else []
        return [name for name in names if (self.folder / name).is_file()]

    @property
    def closest(self) -> tuple[str, dict, str] | None:
        """The figure of the samples that are closest to training images, and its setting and space: those with most
        samples nearer than the threshold."""
        settings = self.report.settings if self.report else []
        audits = [(setting, space) for setting in settings for space in setting["memorisation"]]
        if not audits:
            return None
        setting, space = max(audits, key=lambda audit: audit[0]["memorisation"][audit[1]]["share"].value)
        arguments = itertools.takewhile(lambda item: item[0] != "seconds", setting.items())  # then come measures
        return f"evaluation/closest_{'-'.join(str(value) for _, value in arguments)}_{space}.png", setting, space


def _literal(value: str | int) -> str:
    return json.dumps(value, ensure_ascii=False)


def _read(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}
