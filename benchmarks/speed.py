"""
Time and memory of a training step and of a sampling pass: DenoisingUNet2DModel against UNet2DModel of diffusers at the
same widths, depth, attention, parameters and FLOPs, in turn in one process. FLOPs are the same where upsampling is
counted as both define it; ours computes it with fewer, and both counts are printed.

    python benchmarks/speed.py
"""

import argparse
import contextlib
import copy
import multiprocessing
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hf_genmod import DenoisingUNet2DModel
from hf_genmod.models.fast_convolutions import Upsample

SIZES = {  # resolution, widths, layers per block, levels with attention, batch size
    "small": (32, (32, 64, 128), 1, (False, False, True), 64),
    "medium": (32, (64, 128, 256), 1, (False, False, True), 32),
    "large": (64, (64, 128, 256), 2, (False, True, True), 8),
}
device = "cuda" if torch.cuda.is_available() else "cpu"


def make(library: str, resolution, widths, layers_per_block, attention_levels, batch_size):
    """A model of `library`, and a batch as its training loop would hand it over: ours is channels-last."""
    torch.manual_seed(0)
    common = dict(sample_size=resolution, block_out_channels=widths, layers_per_block=layers_per_block)
    x = torch.randn(batch_size, 3, resolution, resolution, device=device)
    if library == "hf_genmod":
        model = DenoisingUNet2DModel(
            **common, attention_levels=attention_levels, num_classes=10, norm_num_groups=widths[0] // 16
        )
        model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    else:
        model = UNet2DModel(
            **common,
            down_block_types=["AttnDownBlock2D" if has else "DownBlock2D" for has in attention_levels],
            up_block_types=["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention_levels)],
            attention_head_dim=32,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=11,
        )
    t, y = (torch.randint(high, (batch_size,), device=device) for high in (1000, 11))
    return model.to(device), (x, t, y)


def training_step(model, inputs, dtype):
    """A function that takes one: loss, gradients, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        with autocast(dtype):
            loss = model(*inputs[:2], class_labels=inputs[2]).sample.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling_pass(model, inputs, dtype):
    """A function that makes one, with the weights in the dtype, as a loaded pipeline has them."""
    model = copy.deepcopy(model).eval().to(dtype)
    x, t, y = inputs[0].to(dtype), inputs[1], inputs[2]

    @torch.no_grad()
    def forward():
        model(x, t[0], class_labels=y)

    return forward


def autocast(dtype):
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)


@torch.no_grad()
def gflops(model, inputs) -> float:
    """Of one forward pass."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs[:2], class_labels=inputs[2])
    return counter.get_total_flops() / 1e9


def upsample_as_defined(self, x):
    return F.conv2d(F.interpolate(x, scale_factor=2.0), self.weight, self.bias, padding=1)


def seconds(function) -> float:
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(queue, library, size, dtype, num_threads):
    """In a process of its own: MiB that a training step takes at its peak, beside the model."""
    torch.set_num_threads(num_threads)
    model, inputs = make(library, *SIZES[size])
    step = training_step(model, inputs, dtype)
    queue.put(peak_of(step))


def peak_of(function) -> float:
    """MiB that a call takes at its peak, beside what is there already."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far (Linux)
    before = resident_peak()
    function()
    return resident_peak() - before


def resident_peak() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--profile", action="store_true", help="List the operators by their time instead.")

if __name__ == "__main__":
    arguments = parser.parse_args()
    libraries = ("hf_genmod", "diffusers")
    name = torch.cuda.get_device_name() if device == "cuda" else torch.cpu.get_capabilities()["cpu_name"]
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")

    if arguments.profile:
        for dtype in (torch.float32, torch.bfloat16):
            for library in libraries:
                step = training_step(*make(library, *SIZES[arguments.sizes[0]]), dtype)
                step()
                with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                    for _ in range(3):
                        step()
                by = f"self_{device}_time_total"
                print(f"### {library}, {arguments.sizes[0]}, {dtype}\n")
                print(profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50))
        raise SystemExit

    print("| size | parameters | GFLOPs | precision | | hf_genmod | diffusers | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        for dtype in (torch.float32, torch.bfloat16):
            pairs = [make(library, *SIZES[size]) for library in libraries]
            parameters, their_parameters = (model.num_parameters() for model, _ in pairs)
            computed, theirs = (gflops(model, inputs) for model, inputs in pairs)
            with patch.object(Upsample, "forward", upsample_as_defined):
                ours = gflops(*pairs[0])
            assert abs(parameters / their_parameters - 1) < 0.03 and abs(ours / theirs - 1) < 0.03
            label = f"| {size} | {parameters / 1e6:.2f} M | {computed:.1f}, {theirs:.1f} | {str(dtype)[6:]} "
            for name, kind in (("training step", training_step), ("sampling pass", sampling_pass)):
                functions = [kind(model, inputs, dtype) for model, inputs in pairs]
                for function in functions:
                    seconds(function), seconds(function)  # first calls choose algorithms
                times = [[seconds(function) for function in functions] for _ in range(arguments.rounds)]
                ours, theirs = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
                ratio = statistics.median(a / b for a, b in times)
                print(f"{label}| {name} | {ours:.1f} ms | {theirs:.1f} ms | {ratio:.2f} |", flush=True)
            memory = []
            for library in libraries:
                queue = multiprocessing.get_context("spawn").Queue()
                process = multiprocessing.get_context("spawn").Process(
                    target=peak_memory, args=(queue, library, size, dtype, torch.get_num_threads())
                )
                process.start()
                memory.append(queue.get())
                process.join()
            ours, theirs = memory
            print(f"{label}| peak memory | {ours:.0f} MiB | {theirs:.0f} MiB | {ours / theirs:.2f} |", flush=True)
