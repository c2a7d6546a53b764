"""What is known of a run, read from its folder."""

import json
import math
import os
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from hf_genmod.checkpoints.safety import shapes_in
from hf_genmod.training.run_folder import PROVENANCE


class Facts:
    """What is known of a checkpoint or an adapter, from the files in its folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = folder.resolve().name
        self.index = _read(folder / "model_index.json")  # empty for an adapter
        self.config = config = _read(folder / "training_config.json")
        self.provenance = _read(folder / PROVENANCE)
        self.report = _read(folder / "evaluation" / "evaluation.json")
        built_on = config.get("built_on", {})
        self.base = None if self.index else built_on.get("base model") or config.get("lora", {}).get("base")
        self.asked = config.get("asked") or self.provenance.get("request", {})  # for what an adapter has learned
        if not self.index and self.base is None:
            raise ValueError(f"{folder}: there is no training_config.json that says which model the adapter is for")
        self.configs = {
            name: _read(folder / name / "config.json")
            for name, entry in self.index.items()
            if isinstance(entry, list) and entry[0] is not None and name != "_class_name"
        }
        self.factor = self.index.get("factor")  # of an upsampler
        self.is_autoencoder = "vae" in self.configs and "unet" not in self.configs
        names = self.index.get("id2label") or {}  # JSON has made the keys strings, and sorted them as such
        self.classes = [names[index] for index in sorted(names, key=int)]
        self.num_parameters = 0
        parts = [part for name in self.configs for part in (folder / name).glob("*.safetensors")]
        for file in parts if self.index else [folder / LORA_WEIGHT_NAME_SAFE]:
            self.num_parameters += sum(math.prod(shape) for shape in shapes_in(file))
        captions = self.provenance.get("captions", []) if "tokenizer" in self.index else []  # others were told none
        self.captions = [caption if isinstance(caption, str) else caption[0] for caption in captions if caption]

    @property
    def stages(self) -> list[tuple[str, "Facts"]]:
        """The runs that led to it, the last one its own."""
        before = {
            "The autoencoder": self.config.get("built_on", {}).get("autoencoder"),
            "The diffusion model": self.config.get("built_on", {}).get("diffusion model"),
        }
        before = [(what, Facts(Path(path))) for what, path in before.items() if path and os.path.isdir(path)]
        return [*(earlier for what, facts in before for earlier in [*facts.stages[:-1], (what, facts)]),
                ("Then" if before else "", self)]  # fmt: skip

    @property
    def request(self) -> str:
        """How to ask the pipeline for a picture, in Python."""
        if self.base:
            return ", ".join(f"{name}={_in_quotes(value)}" for name, value in self.asked.items())
        if self.factor:
            return 'image=Image.open("small.png")'
        if self.classes:
            return f"class_labels={_in_quotes(self.classes[0])}"
        if self.configs.get("classifier", self.configs.get("unet", {})).get("num_classes"):
            return "class_labels=0"  # they have no names
        if "tokenizer" in self.index:
            return f"prompt={_in_quotes(self.captions[0] if self.captions else '')}"
        return 'prior="fitted"' if self.is_autoencoder and self.index["vae"][1] == "Autoencoder" else ""

    @property
    def model_size(self) -> str:
        millions = self.num_parameters / 1e6
        return f"{millions:.1f} million numbers" if millions >= 1 else f"{self.num_parameters:,} numbers"

    @property
    def picture_size(self) -> str:
        config = self.configs.get("vae") or self.configs.get("unet")
        channels = config["in_channels"]
        kind = {1: "grey", 2: "grey and alpha", 3: "RGB", 4: "RGBA"}.get(channels, f"{channels} channels")
        if self.index.get("value_range") is not None:
            kind = f"measured values in {channels} channels"
        size = self.configs.get("unet", config)["sample_size"]
        factor = self._downsampling_factor if "unet" in self.configs and "vae" in self.configs else 1
        height, width = (factor * side for side in (size if isinstance(size, list) else [size, size]))
        return f"{height}×{width} pixels, {kind}"

    @property
    def _downsampling_factor(self) -> int:
        """How many times higher than its latents a picture of the autoencoder is."""
        config = self.configs["vae"]
        return config.get("patch_size", 1) * 2 ** (len(config["block_out_channels"]) - 1)


def _in_quotes(text: str) -> str:
    """As Python has it."""
    return json.dumps(str(text), ensure_ascii=False)


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
