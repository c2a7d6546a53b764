"""The settings of a training run."""

import math
from dataclasses import dataclass, field, replace

import torch

from hf_genmod.data.randomness import Augmentation
from hf_genmod.training.averaging import power_function_average


@dataclass
class TrainingConfig:
    """Training."""

    output_dir: str = field(
        default="runs/model",
        metadata={"help": "Folder of the run. At the end it is the checkpoint.", "may_change": True},
    )
    max_train_steps: int | None = field(
        default=None, metadata={"help": "Budget in optimizer steps. Give this or max_train_minutes."}
    )
    max_train_minutes: float | None = field(
        default=None, metadata={"help": "Budget in minutes, including the time for samples and validation."}
    )
    batch_size: int = field(
        default=64, metadata={"help": "Images per optimizer step, over all processes and accumulated batches."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Number of parts in which a process computes its batch.", "may_change": True}
    )
    learning_rate: float = field(default=5e-3, metadata={"help": "Peak learning rate of Muon."})
    lr_schedule: str = field(
        default="cosine", metadata={"help": "Schedule after the warm-up: 'cosine' (to zero) or 'constant'."}
    )
    lr_warmup_fraction: float = field(
        default=0.05, metadata={"help": "Fraction of the budget over which the learning rate rises from zero."}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "β1 of AdamW (vectors and embeddings)."})
    adam_beta2: float = field(default=0.99, metadata={"help": "β2 of AdamW (vectors and embeddings)."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    ema_length: float = field(
        default=0.05,
        metadata={"help": "Width of the moving average of the weights, as a fraction of the steps so far. 0: none."},
    )
    horizontal_flip: bool = field(
        default=False, metadata={"help": "Mirror each image with probability 1/2. Not for letters and digits."}
    )
    max_shift: int = field(
        default=0, metadata={"help": "Shift each image at random by up to this many pixels; its edge is repeated."}
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "'no', 'bf16' or 'fp16'. Default: 'bf16' on a CPU with fast bf16 products, else 'no'."},
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations in the backward pass to save memory.", "may_change": True},
    )
    compile: bool = field(default=False, metadata={"help": "Compile the model with torch.compile."})
    seed: int = field(default=0, metadata={"help": "Seed of all random numbers of the run."})
    num_workers: int = field(
        default=0, metadata={"help": "Processes that load images, if these do not fit in memory.", "may_change": True}
    )
    logging_steps: int = field(
        default=10, metadata={"help": "Steps between lines of metrics.jsonl.", "may_change": True}
    )
    sampling_steps: int = field(
        default=500, metadata={"help": "Steps between images in samples/. 0: none.", "may_change": True}
    )
    validation_steps: int = field(
        default=200, metadata={"help": "Steps between losses on held-out images. 0: none.", "may_change": True}
    )
    checkpointing_steps: int = field(
        default=500, metadata={"help": "Steps between saved training states. 0: none.", "may_change": True}
    )
    checkpoints_total_limit: int = field(
        default=2, metadata={"help": "Number of training states to keep; the oldest are deleted.", "may_change": True}
    )
    max_bad_steps: int = field(
        default=20,
        metadata={
            "help": "Number of skipped steps (the loss is not finite) in a row that ends the run.",
            "may_change": True,
        },
    )
    report_to: str | None = field(
        default=None, metadata={"help": "Tracker of Accelerate, such as 'tensorboard'.", "may_change": True}
    )

    def __post_init__(self):
        if self.mixed_precision is None:
            self.mixed_precision = "bf16" if _cpu_multiplies_in_bf16() else "no"
        if (self.max_train_steps is None) == (self.max_train_minutes is None):
            raise ValueError(
                f"max_train_steps: {self.max_train_steps} with max_train_minutes: {self.max_train_minutes}; a run has "
                "one budget, so give one of the two"
            )
        for name in ("max_train_steps", "max_train_minutes", "batch_size", "gradient_accumulation_steps",
                     "learning_rate", "max_grad_norm", "logging_steps", "checkpoints_total_limit",
                     "max_bad_steps"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: {value} is not positive")
        for name in ("num_workers", "sampling_steps", "validation_steps", "checkpointing_steps", "weight_decay",
                     "max_shift"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative")
        for name in ("lr_warmup_fraction", "ema_length", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not in [0, 1)")
        for name, choices in (("lr_schedule", ("cosine", "constant")), ("mixed_precision", ("no", "bf16", "fp16"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(choices)}")
        power_function_average(self.ema_length)  # raises if it is too long

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(mirror=self.horizontal_flip, max_shift=self.max_shift)

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


def _cpu_multiplies_in_bf16() -> bool:
    """Whether the run is on a CPU that multiplies in bf16 at least twice as fast as in fp32."""
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return bool(has_bf16) and not torch.accelerator.is_available()
