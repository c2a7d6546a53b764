"""The settings of a training run."""

import contextlib
import math
import os
from dataclasses import dataclass, replace

import torch
from transformers.hf_argparser import HfArg

from hf_genmod.data.randomness import Augmentation
from hf_genmod.errors import counted
from hf_genmod.processes import multiplies_in_bf16
from hf_genmod.training.averaging import check_length


def changeable(default, help: str):
    """A setting that may differ when a run is continued."""
    return HfArg(default=default, help=help, metadata={"may_change": True})


@dataclass
class TrainingConfig:
    """Training."""

    output_dir: str = changeable("runs/model", help="Folder of the run. At the end it is the checkpoint.")
    max_train_steps: int | None = HfArg(default=None, help="Budget in optimizer steps. Give it or max_train_minutes.")
    max_train_minutes: float | None = HfArg(default=None, help="Budget in minutes, samples and validation included.")
    batch_size: int = HfArg(default=64, help="Images per optimizer step, over all processes and accumulated batches.")
    gradient_accumulation_steps: int = changeable(1, help="Number of parts in which a process computes its batch.")
    learning_rate: float = HfArg(default=5e-3, help="Peak learning rate of Muon.")
    lr_schedule: str = HfArg(default="cosine", help="Schedule after the warm-up: 'cosine' (to zero) or 'constant'.")
    lr_warmup_fraction: float = HfArg(default=0.05, help="Fraction of the budget in which the learning rate rises.")
    adam_beta1: float = HfArg(default=0.9, help="β1 of AdamW (vectors and embeddings).")
    adam_beta2: float = HfArg(default=0.99, help="β2 of AdamW (vectors and embeddings).")
    weight_decay: float = HfArg(default=0.01, help="Weight decay.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are clipped to this norm.")
    ema_length: float = HfArg(
        default=0.05, help="Width of the moving average of the weights, as a fraction of the steps so far. 0: none."
    )
    guiding_fraction: float = HfArg(
        default=0.0,
        help="Keep the averaged weights at this fraction of the budget, such as 0.2, as a second U-Net, by which "
        "--autoguidance_scale guides the first. 0: none.",
    )
    horizontal_flip: bool = HfArg(default=False, help="Mirror half the images, at random. Not for letters or digits.")
    max_shift: int = HfArg(default=0, help="Shift each image by up to this many pixels, at random; edges repeat.")
    mixed_precision: str | None = HfArg(
        default=None,
        help="'no', 'bf16' or 'fp16'. Default: that of `accelerate launch`, else 'bf16' where that is fast.",
    )
    gradient_checkpointing: bool = changeable(False, help="Recompute activations in the backward pass to save memory.")
    compile: bool = HfArg(default=False, help="Compile the model with torch.compile.")
    seed: int = HfArg(default=0, help="Seed of all random numbers of the run.")
    num_threads: int | None = changeable(
        None, help="CPU threads of each process. Default: OMP_NUM_THREADS, or all cores, shared."
    )
    num_workers: int = changeable(0, help="Processes that load images, if these do not fit in memory.")
    logging_steps: int = changeable(10, help="Steps between lines of metrics.jsonl.")
    sampling_steps: int = changeable(500, help="Steps between images in samples/. 0: none.")
    validation_steps: int = changeable(200, help="Steps between losses on held-out images. 0: none.")
    checkpointing_steps: int = changeable(500, help="Steps between saved training states. 0: none.")
    checkpoints_total_limit: int = changeable(2, help="Number of training states to keep; the oldest are deleted.")
    max_bad_steps: int = changeable(20, help="Number of skipped steps (loss not finite) in a row that ends the run.")
    report_to: str | None = changeable(None, help="Tracker of Accelerate, such as 'tensorboard'.")
    has_default_budget = False  # of a kind of run, which finds it later

    def __post_init__(self):
        self.output_dir = os.path.expanduser(self.output_dir)
        if self.mixed_precision is None:
            device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
            default = "bf16" if multiplies_in_bf16(device) else "no"
            self.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", default)
        if self.max_train_steps is None and self.max_train_minutes is None and not self.has_default_budget:
            raise ValueError("a run needs a budget; give one, such as --max_train_minutes 30 (or --max_train_steps N)")
        if self.max_train_steps is not None and self.max_train_minutes is not None:
            both = f"max_train_steps: {self.max_train_steps} with max_train_minutes: {self.max_train_minutes}"
            raise ValueError(f"{both}; a run has one budget, so give one of the two")
        for name in ("max_train_steps", "max_train_minutes", "batch_size", "gradient_accumulation_steps",
                     "learning_rate", "max_grad_norm", "logging_steps", "checkpoints_total_limit",
                     "max_bad_steps", "num_threads"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: {value} is not positive")
        for name in ("num_workers", "sampling_steps", "validation_steps", "checkpointing_steps", "weight_decay",
                     "max_shift"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative")
        for name in ("lr_warmup_fraction", "ema_length", "adam_beta1", "adam_beta2", "guiding_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not in [0, 1)")
        for name, choices in (("lr_schedule", ("cosine", "constant")), ("mixed_precision", ("no", "bf16", "fp16"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(choices)}")
        check_length(self.ema_length)

    @property
    def budget(self) -> str:
        """That of the run, in words."""
        if self.max_train_steps is not None:
            return counted(self.max_train_steps, "step")
        return f"{self.max_train_minutes:g} minute{'s' * (self.max_train_minutes != 1)}"

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(mirror=self.horizontal_flip, max_shift=self.max_shift)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which a model computes in the `mixed_precision`. (That of Accelerate is the one of the newest
        `Accelerator` of the process.)"""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed_precision)
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    def part(self, share: float, **changes) -> "TrainingConfig":
        """The settings of a run with a share of the budget, and other changes."""
        if self.max_train_steps is None:
            changes["max_train_minutes"] = share * self.max_train_minutes
        else:
            changes["max_train_steps"] = max(1, round(share * self.max_train_steps))
        return replace(self, **changes)

    def learning_rate_at(self, fraction: float) -> float:
        """The learning rate after a `fraction`, in [0, 1], of the budget: warm-up, then cosine or constant."""
        warmup = min(1.0, fraction / self.lr_warmup_fraction) if self.lr_warmup_fraction else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * fraction)) if self.lr_schedule == "cosine" else 1.0
        return self.learning_rate * warmup * decay


@contextlib.contextmanager
def fast_matrix_products(device: torch.device):
    """Lets matrix products in fp32 on CUDA round their factors to TF32, as convolutions do anyway."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
