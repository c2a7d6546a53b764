"""
Training and sampling in bf16 on an accelerator: DenoisingUNet2DModel and the Trainer against UNet2DModel of diffusers
at the same widths, depth and attention, eager and compiled. A process for each row: those of a mode start at once,
then measure in turn.

    python benchmarks/accelerator.py
"""

import argparse
import contextlib
import itertools
import multiprocessing
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from speed import make
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hf_genmod import DenoisingObjective, Trainer, TrainingConfig, UnconditionalPipeline
from hf_genmod.data.loading import load_pictures
from hf_genmod.recipes.networks import ModelArguments

SIZES = {  # resolution, widths, layers per block, levels with attention, batch size
    "tiny": (8, (32, 64), 1, (False, True), 4),
    "32": (32, (128, 256, 256), 2, (False, True, True), 256),
    "64": (64, (128, 256, 384, 512), 2, (False, False, True, True), 128),
    "128": (128, (128, 256, 384, 512, 512), 2, (False, False, False, True, True), 32),
}
ROWS = ("diffusers eager", "diffusers compiled", "hf_genmod eager", "hf_genmod compiled", "Trainer eager",
        "Trainer compiled")  # fmt: skip
PEAKS = {"H100": 989, "H200": 989, "A100": 312}  # dense bf16, TFLOP/s, by the datasheets
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")  # of the host for the device
device = "cuda" if torch.cuda.is_available() else "cpu"


def synchronize():
    if device == "cuda":
        torch.cuda.synchronize()


def flops(model, inputs) -> float:
    """Of a training step: those of the forward pass, and twice as many of the backward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs[:2], class_labels=inputs[2])
    return 3 * counter.get_total_flops()


def measure_model(library, size, is_compiled, rounds, ready) -> dict:
    """The network alone: forward pass, gradients, fused AdamW."""
    model, (x, t, y) = make(library, *SIZES[size])
    model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compute = torch.compile(model) if is_compiled else model

    def training_step():
        with torch.autocast(device, torch.bfloat16):
            loss = compute(x, t, class_labels=y).sample.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def sampling_pass():
        with torch.autocast(device, torch.bfloat16):
            compute(x, t, class_labels=y)

    seconds = {}
    for function in (training_step, sampling_pass):
        for _ in range(3):  # compile, and choose algorithms
            function()
    result = {"TFLOP": flops(model, (x, t, y)) / 1e12}
    ready()
    for function in (training_step, sampling_pass):
        synchronize()
        started = time.perf_counter()
        for _ in range(rounds):
            function()
        synchronize()
        seconds[function] = (time.perf_counter() - started) / rounds
    return result | {"seconds": seconds[training_step], "sampling": len(x) / seconds[sampling_pass]}


def measure_trainer(library, size, is_compiled, rounds, ready) -> dict:
    """A run: also images, noise, the weighted loss, clipping, Muon, the moving average and all that guards a run."""
    resolution, widths, layers_per_block, attention, batch_size = SIZES[size]
    network = ModelArguments(
        block_out_channels=list(widths), layers_per_block=layers_per_block, patch_size=1, fourier_frequencies=[],
        attention_levels=[level for level, has in enumerate(attention) if has],
    )  # fmt: skip
    scheduler = network.make_scheduler()
    objective, first, result = DenoisingObjective(scheduler), 5, {}
    profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda"))
    step = 0

    def observed(model, batch, rng):  # called in each step
        nonlocal step
        if step == first:
            ready()
        if step in (first, first + rounds):
            synchronize()
            result["seconds"] = (time.perf_counter() - result.get("started", 0)) / rounds
            result["started"] = time.perf_counter()
        if step == first + rounds:
            profiler.start()
        if step == first + 2 * rounds:
            profiler.stop()
        step += 1
        return objective(model, batch, rng)

    with tempfile.TemporaryDirectory() as folder:
        values = np.random.default_rng(0).integers(256, size=(4 * batch_size, resolution, resolution, 3), dtype="u1")
        for i, picture in enumerate(values):
            Image.fromarray(picture).save(f"{folder}/{i}.png")
        pictures = load_pictures(folder, in_memory=True)
        steps = first + 2 * rounds + 1
        config = TrainingConfig(
            output_dir=f"{folder}/run", max_train_steps=steps, batch_size=batch_size, mixed_precision="bf16",
            compile=is_compiled, logging_steps=steps, sampling_steps=0, validation_steps=0, checkpointing_steps=0,
        )  # fmt: skip
        unet = network.make_unet(pictures)
        trainer = Trainer(unet, observed, pictures, config, lambda unet: UnconditionalPipeline(unet, scheduler))
        trainer.train()
        x = torch.zeros(batch_size, 3, resolution, resolution, device=device)
        result["TFLOP"] = flops(trainer.averaged_model.module, (x, 0, None)) / 1e12
    counts = {event.key: event.count for event in profiler.key_averages()}
    waits = sum(counts.get(name, 0) for name in WAITS) / rounds
    return result | {"waits": waits if device == "cuda" else None}


def measure(connection, row, size, rounds):
    """In a process of its own: says that it is ready, waits for its turn, sends what it measured."""
    torch.set_float32_matmul_precision("high")
    library, mode = row.split()

    def ready():
        if device == "cuda":
            torch.cuda.empty_cache()
        connection.send("ready")
        connection.recv()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    measured = measure_trainer if library == "Trainer" else measure_model
    result = measured(library, size, mode == "compiled", rounds, ready)
    connection.send(result | {"GiB": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None})


def shown(value, form) -> str:
    return "" if value is None else format(value, form)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sizes", nargs="+", default=["32", "64", "128"], choices=SIZES)
parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
parser.add_argument("--rounds", type=int, default=20)

if __name__ == "__main__":
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if device == "cuda" else torch.cpu.get_capabilities()["cpu_name"]
    print(f"{name}, torch {torch.__version__}, bf16\n")
    print("| size | batch | | images/s | TFLOP/s | of the peak | memory | waits a step | one pass, images/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    peak = next((PEAKS[kind] for kind in PEAKS if kind in name), None)
    for mode in ("eager", "compiled"):
        rows = []
        for size, row in itertools.product(arguments.sizes, arguments.rows):
            if row.endswith(mode):
                here, there = context.Pipe()
                context.Process(target=measure, args=(there, row, size, arguments.rounds), daemon=True).start()
                there.close()
                rows.append((size, row, here))
        for *_, connection in rows:
            with contextlib.suppress(EOFError):  # of a process that failed, which has said why
                connection.recv()
        for size, row, connection in rows:
            batch_size = SIZES[size][-1]
            try:
                connection.send("go")
                result = connection.recv()
            except (EOFError, BrokenPipeError):
                print(f"| {size} | {batch_size} | {row} | failed |")
                continue
            tflops = result["TFLOP"] / result["seconds"]
            cells = (
                (batch_size / result["seconds"], ".0f"), (tflops, ".0f"), (peak and tflops / peak, ".0%"),
                (result["GiB"], ".1f"), (result.get("waits"), ".1f"), (result.get("sampling"), ".0f"),
            )  # fmt: skip
            print(f"| {size} | {batch_size} | {row} |", " | ".join(shown(*cell) for cell in cells), "|", flush=True)
