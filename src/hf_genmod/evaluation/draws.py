"""Samples of a pipeline at several settings, kept in a folder."""

import contextlib
import hashlib
from pathlib import Path

import torch

from hf_genmod.data.encoding import weights_fingerprint
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.drawing.samples import draw_to_folder
from hf_genmod.evaluation.config import make_sampler
from hf_genmod.processes import multiplies_in_bf16


class Draws:
    """
    Samples that are drawn once for each setting, whatever interrupts: those in the folder are not drawn again. A U-Net
    of pixels computes in bf16 where that is fast, as in training. What it rounds is multiplied by the noise level of
    its step, so that the last steps leave none of it. (Of a decoder's output it would be half a grey level.)

    Args:
        pipeline: A pipeline of this package.
        source ([`PictureDataset`]): Its labels, captions or, for an upsampler, images are asked for, in their
            proportions: those of `count` random images.
        count (`int`): The number of samples of each setting.
        seed (`int`): The seed of the first sample, and of the choice of images.
        folder (`Path`): The folder, in which every model, data set, count and seed has a folder for each setting.

    Attributes:
        indices (`list[int]`): The images of the data set that are asked for.
        request (`dict[str, list]`): The arguments of the pipeline that ask for them, with one value per sample.
    """

    def __init__(self, pipeline, source: PictureDataset, count: int, seed: int, folder: Path):
        self.pipeline, self.source, self.count, self.seed, self.folder = pipeline, source, count, seed, folder
        rng = torch.Generator().manual_seed(seed)
        self.indices = torch.randint(len(source), (count,), generator=rng).tolist()
        self.request = pipeline.request_for(source, self.indices)
        models = [model for model in pipeline.components.values() if isinstance(model, torch.nn.Module)]
        own = pipeline.components.get("scheduler")
        key = f"{[*map(weights_fingerprint, models)]} {own and own.to_json_string()} {source.fingerprint} "
        self._in_bf16 = pipeline.denoises and "vae" not in pipeline.components and multiplies_in_bf16(pipeline.device)
        key += f"{pipeline.config.get('defaults') or ''}{count} {seed} {self._in_bf16}"
        self._key = hashlib.blake2b(key.encode(), digest_size=4).hexdigest()

    @property
    def labels(self) -> torch.Tensor | None:
        """The classes that are asked for, (n,), of a model that has classes."""
        return torch.tensor(self.request["class_labels"]) if "class_labels" in self.request else None

    @contextlib.contextmanager
    def by_sampler_of(self, setting: dict):
        """A context in which the pipeline has the sampler of a setting."""
        own = self.pipeline.components.get("scheduler")
        if "sampler" in setting:
            self.pipeline.scheduler = make_sampler(setting["sampler"], own)
        try:
            yield
        finally:
            if own is not None:
                self.pipeline.scheduler = own

    def draw(self, setting: dict, count: int | None = None) -> dict[str, torch.Tensor | float]:
        """The samples of a setting, or the first `count` of them (a multiple of 50), as [`draw_to_folder`] returns
        them. Raises a `ValueError` if the pipeline cannot draw by this setting."""
        count = self.count if count is None else count
        request = {name: values[:count] for name, values in self.request.items()}
        options = {argument: value for argument, value in setting.items() if argument != "sampler"}
        folder = self.folder / f"{file_name(setting)}-{self._key}"
        precision = torch.autocast(self.pipeline.device.type, torch.bfloat16, enabled=self._in_bf16)
        with self.by_sampler_of(setting), precision:
            return draw_to_folder(self.pipeline, folder, request, count, self.seed, **options)


def file_name(setting: dict) -> str:
    """A setting in the names of files, such as "DDIMScheduler-20-1.5", with a w before that of autoguidance."""
    return "-".join(f"{'w' * (name == 'autoguidance_scale')}{value}" for name, value in setting.items())
