"""
A stream against the same images in memory: a million images of 32x32 are written as parquet shards, and the U-Net of
the defaults trains on them, streamed and from memory. Prints the time of a step and the most memory of each.

    python benchmarks/streaming.py --folder /tmp/million
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--folder", type=Path, required=True, help="Where the shards are, or are to be written.")
parser.add_argument("--images", type=int, default=1_000_000, help="Number of images, a multiple of 10,000.")
parser.add_argument("--steps", type=int, default=100, help="Steps that are measured, after a fifth as many.")
parser.add_argument("--batch_size", type=int, default=64)
parser.add_argument("--num_workers", type=int, default=0)
parser.add_argument("--kind", choices=("stream", "memory"), help="Measure this kind, in this process.")
arguments = parser.parse_args()

PER_SHARD, GROUP = 10_000, 1000


def write_shards(folder: Path):
    """Images of smooth colours, which PNG stores in about 2 kB, and labels of ten classes."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    for shard in range(arguments.images // PER_SHARD):
        file = folder / f"train-{shard:05}.parquet"
        if file.exists():
            continue
        rng = np.random.default_rng(shard)
        corners = rng.integers(0, 256, (PER_SHARD, 4, 4, 3), dtype=np.uint8)
        images = [Image.fromarray(corner).resize((32, 32), Image.Resampling.BICUBIC) for corner in corners]
        labels = rng.integers(0, 10, PER_SHARD).tolist()
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        pq.write_table(rows.with_format("arrow")[:], file.with_suffix(".part"), row_group_size=GROUP)
        file.with_suffix(".part").rename(file)


def measure(kind: str) -> dict:
    """The median seconds of a step, and the most memory in MiB."""
    from hf_genmod import DenoisingObjective, Trainer, TrainingConfig, UnconditionalPipeline
    from hf_genmod.data.loading import load_pictures
    from hf_genmod.data.stream import stream_pictures
    from hf_genmod.recipes.networks import ModelArguments

    started = time.perf_counter()
    pictures = stream_pictures(str(arguments.folder)) if kind == "stream" else load_pictures(arguments.folder)
    seconds_to_start = time.perf_counter() - started
    model, ends = ModelArguments(), []
    scheduler = model.make_scheduler()
    inner = DenoisingObjective(scheduler)

    def objective(*args):
        ends.append(time.perf_counter())
        return inner(*args)

    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            output_dir=folder, max_train_steps=arguments.steps * 6 // 5, batch_size=arguments.batch_size,
            num_workers=arguments.num_workers, sampling_steps=0, checkpointing_steps=0, validation_steps=0,
        )  # fmt: skip
        unet = model.make_unet(pictures)
        Trainer(unet, objective, pictures, config, lambda unet: UnconditionalPipeline(unet, scheduler)).train()
    steps = np.diff(ends)[-arguments.steps :]
    return {
        "seconds a step": statistics.mean(steps),
        "median": statistics.median(steps),
        "slowest": max(steps),
        "seconds to start": seconds_to_start,
        "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if arguments.kind:
    print(json.dumps(measure(arguments.kind)))
else:
    write_shards(arguments.folder)
    measured = {}
    for kind in ("stream", "memory"):
        command = [sys.executable, *sys.argv, "--kind", kind]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        measured[kind] = json.loads(output.splitlines()[-1])
        print(f"{kind}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured[kind].items()), flush=True)
    ratio = measured["stream"]["seconds a step"] / measured["memory"]["seconds a step"]
    print(f"a step on a stream takes {ratio:.3f} times the one on images in memory")
