"""Settings of a training run."""

import dataclasses
import math

import torch
from huggingface_hub import get_token

from hf_genmod.sharing.model_card import check_license
from hf_genmod.training.averaging import power_function_average


@dataclasses.dataclass
class TrainingConfig:
    """Settings of a run. Each is a flag of the training examples."""

    output_dir: str = dataclasses.field(
        default="runs/model", metadata={"help": "Folder of the run; at the end it is the checkpoint."}
    )
    max_train_steps: int | None = dataclasses.field(
        default=None, metadata={"help": "Budget in optimizer steps. Exclusive with max_train_minutes."}
    )
    max_train_minutes: float | None = dataclasses.field(
        default=None, metadata={"help": "Budget in minutes of training, sampling during training included."}
    )
    batch_size: int = dataclasses.field(
        default=64, metadata={"help": "Pictures per optimizer step, over all processes and accumulated batches."}
    )
    gradient_accumulation_steps: int = dataclasses.field(
        default=1, metadata={"help": "Number of parts in which a process computes its share of a batch."}
    )
    learning_rate: float = dataclasses.field(default=5e-3, metadata={"help": "Peak learning rate of Muon."})
    lr_schedule: str = dataclasses.field(
        default="cosine", metadata={"help": "After the warm-up: 'cosine' to zero at the end, or 'constant'."}
    )
    lr_warmup_fraction: float = dataclasses.field(
        default=0.05, metadata={"help": "Part of the budget in which the learning rate rises from zero."}
    )
    adam_beta1: float = dataclasses.field(default=0.9, metadata={"help": "β1 of AdamW (vectors and embeddings)."})
    adam_beta2: float = dataclasses.field(default=0.99, metadata={"help": "β2 of AdamW (vectors and embeddings)."})
    weight_decay: float = dataclasses.field(default=0.01, metadata={"help": "Weight decay."})
    max_grad_norm: float = dataclasses.field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    ema_length: float = dataclasses.field(
        default=0.05,
        metadata={"help": "Width of the moving average of the weights, as a part of the run so far; 0 turns it off."},
    )
    horizontal_flip: bool = dataclasses.field(
        default=False, metadata={"help": "Mirror every second picture, at random. Not for letters and digits."}
    )
    max_shift: int = dataclasses.field(
        default=0,
        metadata={"help": "Move each picture by up to so many pixels, at random; what comes in repeats its edge."},
    )
    mixed_precision: str | None = dataclasses.field(
        default=None,
        metadata={"help": "'no', 'bf16' or 'fp16'; by default 'bf16' on a CPU that multiplies in it, else 'no'."},
    )
    gradient_checkpointing: bool = dataclasses.field(
        default=False, metadata={"help": "Recompute activations in the backward pass, to save memory."}
    )
    compile: bool = dataclasses.field(default=False, metadata={"help": "Compile the model with torch.compile."})
    seed: int = dataclasses.field(default=0, metadata={"help": "Everything random in the run derives from it."})
    num_workers: int = dataclasses.field(
        default=0, metadata={"help": "Processes that load pictures; of use when they do not fit in memory."}
    )
    logging_steps: int = dataclasses.field(default=10, metadata={"help": "Steps between lines of metrics.jsonl."})
    sampling_steps: int = dataclasses.field(
        default=500, metadata={"help": "Steps between pictures in samples/; 0 draws none."}
    )
    validation_steps: int = dataclasses.field(
        default=200, metadata={"help": "Steps between losses of held-out pictures, where there are any; 0: none."}
    )
    checkpointing_steps: int = dataclasses.field(
        default=500, metadata={"help": "Steps between saves of the training state in checkpoints/; 0 saves none."}
    )
    checkpoints_total_limit: int = dataclasses.field(
        default=2, metadata={"help": "How many saved states are kept; the oldest are deleted."}
    )
    max_bad_steps: int = dataclasses.field(
        default=20,
        metadata={
            "help": "A step whose loss or gradient is not finite is skipped; after so many in a row, the run ends."
        },
    )
    report_to: str | None = dataclasses.field(
        default=None, metadata={"help": "Tracker: 'tensorboard', 'wandb', 'trackio', ... as Accelerate knows them."}
    )
    license: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Licence of the model, such as 'mit'; with one the run ends with a model card."},
    )
    push_to_hub: bool = dataclasses.field(
        default=False, metadata={"help": "Push the checkpoint and its card to the Hub at the end; takes a --license."}
    )
    hub_model_id: str | None = dataclasses.field(
        default=None, metadata={"help": "Repository that it is pushed to; by default named as the output_dir."}
    )
    hub_private_repo: bool = dataclasses.field(
        default=False, metadata={"help": "Make that repository private, if there is none yet."}
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
        if self.license is not None:
            check_license(self.license)
        if self.push_to_hub and self.license is None:
            raise ValueError("push_to_hub: a model that is shared needs a licence; give one, such as --license mit")
        if self.push_to_hub and get_token() is None:
            raise ValueError("push_to_hub: nobody is logged in to the Hub; run `hf auth login`, or set HF_TOKEN")
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private_repo):
            raise ValueError("hub_model_id: it is where --push_to_hub pushes to; give that too")

    def learning_rate_at(self, fraction: float) -> float:
        """The learning rate when `fraction`, in [0, 1], of the budget is used: warm-up, then cosine or constant."""
        warmup = min(1.0, fraction / self.lr_warmup_fraction) if self.lr_warmup_fraction else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * fraction)) if self.lr_schedule == "cosine" else 1.0
        return self.learning_rate * warmup * decay


def _cpu_multiplies_in_bf16() -> bool:
    """Whether the run is on a CPU whose bf16 products are twice as fast as those in fp32, or more."""
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return bool(has_bf16) and not torch.accelerator.is_available()
