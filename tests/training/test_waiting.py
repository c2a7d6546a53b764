"""What the host waits for: nothing in a step, as each tensor that it looks at would idle an accelerator."""

import contextlib
import itertools
import sys

import pytest
import torch
from runs import make_other_trainer, make_trainer
from tiny import CAPTIONS, tiny_autoencoder, tiny_classifier, tiny_text_encoder, tiny_tokenizer, tiny_unet
from torch.utils._python_dispatch import TorchDispatchMode

from hf_genmod import (
    AncestralDDPMScheduler,
    Autoencoder,
    DenoisingObjective,
    ElboObjective,
    NoisyClassificationObjective,
    ReconstructionObjective,
)
from hf_genmod.data.captions import Tokens
from hf_genmod.data.latents import draw_latents
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.randomness import Augmentation, BatchRandom, DeviceRandom
from hf_genmod.data.shapes import ShapesDataset
from hf_genmod.objectives.denoising import WEIGHTINGS
from hf_genmod.objectives.upsampling import ConditioningAugmentation
from hf_genmod.training.text_encoder import TextConditionedUNet

N = 4


def scheduler(**config):
    return AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2", **config)


def tasks():
    """Name, model and objective of every task."""
    for prediction, weighting in itertools.product(("epsilon", "sample", "v_prediction"), WEIGHTINGS):
        unet = tiny_unet(num_classes=3)
        objective = DenoisingObjective(scheduler(prediction_type=prediction), unet.null_label, weighting)
        yield f"{prediction} {weighting}", unet, objective
    learned = scheduler(variance_type="learned_range")
    yield "learned variance", tiny_unet(out_channels=6), DenoisingObjective(learned)
    small = ConditioningAugmentation(scheduler(), factor=2, crop_size=4)
    yield "upsampler", tiny_unet(conditioning_channels=3), DenoisingObjective(scheduler(), small=small)
    text_encoder = tiny_text_encoder()
    text = Tokens(tiny_tokenizer(), text_encoder)
    model = TextConditionedUNet(tiny_unet(cross_attention_dim=16), text_encoder)
    yield "text", model, DenoisingObjective(scheduler(), text=text)
    yield "classifier", tiny_classifier(), NoisyClassificationObjective(scheduler())
    for likelihood in ("gaussian", "discretised_gaussian", "bernoulli"):
        yield f"{likelihood} autoencoder", tiny_autoencoder(likelihood=likelihood), ElboObjective(beta_warmup=0.5)
    yield "masked autoencoder", tiny_autoencoder(Autoencoder), ReconstructionObjective(mask=0.5)


@pytest.mark.parametrize("name, model, objective", [pytest.param(*task, id=task[0]) for task in tasks()])
def test_no_objective_looks_at_what_the_device_computes(name, model, objective, monkeypatch):
    """Tensors on the device "meta" have no values, so to look at one is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which does not know the device
    model, rng = model.train().to("meta"), DeviceRandom(0, 0, range(N), N, "meta")
    batch = {
        "images": torch.zeros(N, 3, 8, 8, device="meta"),
        "class_labels": torch.zeros(N, dtype=torch.long, device="meta"),
        "captions": CAPTIONS[:N],
        "fraction": 0.25,
    }
    loss, metrics = objective(model, batch, rng)
    loss.backward()
    assert loss.device.type == "meta" and all(value.device.type == "meta" for value in metrics.values())


def test_no_augmentation_looks_at_what_the_device_computes():
    pictures = load_pictures(ShapesDataset(N, resolution=16))
    batch = {"images": torch.zeros(N, 3, 16, 16, dtype=torch.uint8, device="meta")}
    rng = DeviceRandom(0, 0, range(N), N, "meta")
    assert pictures.x_0(batch, rng, Augmentation(mirror=True, max_shift=2)).shape == (N, 3, 16, 16)
    for mirror in (False, True):
        assert draw_latents(torch.zeros(N, 2, 2, 3, 4, 4, device="meta"), rng, mirror).shape == (N, 3, 4, 4)


class Waits(TorchDispatchMode):
    """Collects the places where the host asks for a value that the device would have to compute."""

    OPERATORS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.OPERATORS:
            frame = sys._getframe(1)
            callers = [frame := frame.f_back for _ in range(6) if frame.f_back is not None]
            # The first looks on a CPU alone, the second at what the tokenizer has made.
            if not any(caller.f_code.co_name in ("_alpha_bar", "tokenize") for caller in callers):
                self.places.append((function, [f"{caller.f_code.co_name}:{caller.f_lineno}" for caller in callers]))
        return function(*args, **(kwargs or {}))


RUNS = {
    "labels": {"horizontal_flip": True, "max_shift": 1, "gradient_accumulation_steps": 2},
    "learned variance": {"learn_variance": True, "weighting": "min_snr", "mixed_precision": "bf16"},
    "autoencoder": {"kind": "autoencoder"},
    "text": {"kind": "text", "ema_length": 0.0},
    "adapter": {"kind": "adapter"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_fifty_steps_between_two_lines_wait_for_nothing(dataset, tmp_path, name):
    make = make_other_trainer if "kind" in RUNS[name] else make_trainer
    off = {"logging_steps": 51, "sampling_steps": 0, "checkpointing_steps": 0}
    trainer = make(dataset, tmp_path, max_train_steps=52, **off, **RUNS[name])
    inner, waits, steps = trainer.objective, Waits(), []

    def objective(model, batch, rng):
        step = trainer.progress.step
        if step not in steps:
            steps.append(step)
            if step == 0:
                waits.__enter__()
            elif step == 50:
                waits.__exit__(None, None, None)
        return inner(model, batch, rng)

    trainer.objective = objective
    trainer.train()
    assert steps == list(range(52))
    assert waits.places == []


COMPILED = ("v_prediction simple", "learned variance", "upsampler", "text", "classifier", "bernoulli autoencoder")


def compiled_tasks():
    """Two of them always, as each takes seconds."""
    for task in tasks():
        if task[0] in COMPILED:
            is_fast = task[0] in ("learned variance", "classifier")
            yield pytest.param(*task, id=task[0], marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize("name, model, objective", list(compiled_tasks()))
def test_a_model_is_compiled_as_one_graph_once(name, model, objective):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, graphs = torch.compile(model.train(), fullgraph=True, backend="eager"), []
    for step in range(3):
        batch = {
            "images": torch.zeros(N, 3, 8, 8).contiguous(memory_format=torch.channels_last),
            "class_labels": torch.zeros(N, dtype=torch.long),
            "captions": CAPTIONS[:N],
            "fraction": step / 4,
        }
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = objective(compiled, batch, BatchRandom(0, step, range(N), N))
        loss.backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1]
