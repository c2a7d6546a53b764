"""The batches of a run, on the device and in the format of the model."""

import signal
import sys
import threading
import warnings

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from hf_genmod.data.randomness import Augmentation, BatchRandom, GlobalBatchSampler, batch_positions, batch_random
from hf_genmod.processes import upload
from hf_genmod.training.config import TrainingConfig


class Batches:
    """
    Loads the parts of each global batch that this process computes, and replaces loader processes that die.

    Attributes:
        failure (`str` or `None`): Why an image of a stream could not be used, which ends the run.

    Raises:
        ValueError: If the processes cannot share a batch evenly, or the data set does not allow the augmentation.
    """

    def __init__(self, dataset: Dataset, config: TrainingConfig, accelerator: Accelerator):
        self.dataset, self.config = dataset, config
        self.device, parts = accelerator.device, config.gradient_accumulation_steps
        process = accelerator.process_index, accelerator.num_processes
        self.positions = [batch_positions(config.batch_size, part, parts, *process) for part in range(parts)]
        dataset.check_augmentation(config.augmentation)
        self._loaded, self.failure, self._reported = None, None, set()

    def open(self, step: int):
        """Starts to load, from the batch of this step on."""
        config = self.config
        order = getattr(self.dataset, "order", None)  # of a stream
        # A step is loaded as a whole, as loader processes take batches in turn, and the blocks of a stream by steps.
        parts = [torch.cat(self.positions)]
        sampler = GlobalBatchSampler(len(self.dataset), config.batch_size, config.seed, step, parts, order)
        pin_memory, num_workers = self.device.type == "cuda", config.num_workers
        if order is not None and (most := sampler.of_epoch(0).num_loaders(num_workers)) < num_workers:
            what = f"num_workers: {num_workers} processes would read each block of {self.dataset.name} several times"
            warnings.warn(f"{what}; the number of those that load images is {most}", stacklevel=2)
            num_workers = most
        # `dict` changes nothing: a data set returns a batch, not its images one by one.
        loader = DataLoader(
            self.dataset, batch_sampler=sampler, collate_fn=dict, num_workers=num_workers, pin_memory=pin_memory,
            worker_init_fn=_ignore_interrupts,
        )  # fmt: skip
        self._loaded = iter(loader)
        has_handler = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        if num_workers and has_handler:
            # The handler that torch installs raises anywhere, even between two updates of weights; the next batch
            # reports a dead process as well.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def close(self):
        """Ends the loader processes."""
        self._loaded = None

    def remedy(self) -> str:
        """What to do about a `failure`."""
        is_skipping = self.dataset.pictures.on_bad_image == "skip"
        other = "" if is_skipping else ", or continue with --on_bad_image skip"
        return f"repair it, and the same command continues the run{other}"

    def of_step(self, step: int) -> list[tuple[dict, BatchRandom]]:
        """The parts of the step's batch, as the data set gives them, and the random numbers of their images."""
        try:
            whole = next(self._loaded)
        except (RuntimeError, EOFError, ConnectionError) as error:  # the last two from one still dying
            # Torch writes "Caught" before an error of the data set in another process.
            of_dataset = not self.config.num_workers or str(error).startswith("Caught ")
            if of_dataset or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
                raise
            print(f"a process that loads images has died ({error}); starting others", file=sys.stderr)
            self.open(step)
            whole = next(self._loaded)
        self.failure = whole.pop("failure", None) or self.failure  # of a stream, as is "unusable"
        for reason in dict.fromkeys(whole.pop("unusable", ())) if self.failure is None else ():
            if reason not in self._reported:
                self._reported.add(reason)
                tqdm.write(f"{reason}; another image takes its place", file=sys.stderr)
        batches, start = [], 0
        for positions in self.positions:
            part = {name: values[start : start + len(positions)] for name, values in whole.items()}
            rng = batch_random(self.config.seed, step, positions, self.config.batch_size, self.device)
            batches.append((part, rng))
            start += len(positions)
        return batches


def _ignore_interrupts(worker: int):
    """The main process decides what a Ctrl-C does. (A forked process has inherited that.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def for_model(batch: dict, dataset: Dataset, rng: BatchRandom, augment: Augmentation, dtype: torch.dtype) -> dict:
    """A batch of a data set on the device of `rng`, with x_0 as its "images" in channels-last format: in fp64 for a
    model in fp64."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    batch = batch | {name: upload(tensor, rng.device) for name, tensor in tensors.items()}
    x_0 = dataset.x_0(batch, rng, augment)
    x_0 = x_0.to(torch.promote_types(x_0.dtype, dtype))
    return {**batch, "images": x_0.contiguous(memory_format=torch.channels_last)}
