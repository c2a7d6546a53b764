"""
What the trainer costs beside the bare computation: its step against forward, backward and optimizer alone, a saved
state, the loading of pictures against PIL and numpy on each access, and two processes against one.

    python benchmarks/training.py --dataset ../shared/data/cats_dogs32
"""

import argparse
import collections
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps

from hf_genmod import DenoisingObjective, Trainer, TrainingConfig, UnconditionalPipeline
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.randomness import Augmentation, BatchRandom, GlobalBatchSampler
from hf_genmod.recipes.networks import ModelArguments
from hf_genmod.training.muon import Muon

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dataset", required=True, help="Folder of parquet files with pictures of one size.")
parser.add_argument("--steps", type=int, default=100, help="Steps of each of the two loops.")
arguments = parser.parse_args()
pictures = load_pictures(arguments.dataset, in_memory=True)
model = ModelArguments()
batch_size = 64


def step_against_bare_loop(folder):
    """A step of each in turns, as the speed of the machine drifts; both train a U-Net of their own.

    The bare loop is Algorithm 1: noise, forward, backward, optimizer. Ours adds the order of the pictures, noise of
    each picture's own, weights of the noise levels, clipping, the moving average, and all that guards a run."""
    scheduler = model.make_scheduler()
    objective = DenoisingObjective(scheduler, None, model.weighting)
    bare = model.make_unet(pictures).to(memory_format=torch.channels_last)
    optimizer = Muon(bare, lr=1e-3)
    images = pictures.x_0(range(batch_size)).contiguous(memory_format=torch.channels_last)
    seconds = {"bare loop": [], "trainer": []}

    def bare_step():
        noise = torch.randn_like(images)
        t = torch.randint(scheduler.config.num_train_timesteps, (batch_size,))
        with trainer.accelerator.autocast():
            prediction = bare(scheduler.add_noise(images, noise, t), t).sample
        target = scheduler.get_velocity(images, noise, t)
        torch.nn.functional.mse_loss(prediction.float(), target).backward()
        with trainer.accelerator.autocast():
            optimizer.step()
        optimizer.zero_grad()

    started = None

    def with_interludes(unet, batch, rng):
        nonlocal started
        now = time.perf_counter()
        if started is not None:
            seconds["trainer"].append(now - started)
        bare_step()
        started = time.perf_counter()
        seconds["bare loop"].append(started - now)
        return objective(unet, batch, rng)

    config = TrainingConfig(
        output_dir=str(folder), max_train_steps=arguments.steps + 10, sampling_steps=0, checkpointing_steps=0
    )
    trainer = Trainer(
        model.make_unet(pictures),
        with_interludes,
        pictures,
        config,
        lambda unet: UnconditionalPipeline(unet, scheduler),
    )
    trainer.train()
    bare, ours = (sum(seconds[name][-arguments.steps :]) / arguments.steps for name in ("bare loop", "trainer"))
    print(f"| step of the trainer, of the bare loop | {ours * 1e3:.0f} ms | {bare * 1e3:.0f} ms | {ours / bare:.3f} |",
          flush=True)  # fmt: skip
    times = []
    for _ in range(9):
        start = time.perf_counter()
        trainer.state.save(trainer.folder, trainer.config.checkpoints_total_limit)
        times.append(time.perf_counter() - start)
        trainer.progress.step += 1
    print(f"| saving the training state | {statistics.median(times) * 1e3:.0f} ms | | |", flush=True)


def loading():
    """Pictures per second as batches in [-1, 1], mirrored at random, after a first epoch, in one process."""
    files = sorted(str(file) for file in Path(arguments.dataset).rglob("*train*.parquet"))
    rows = datasets.load_dataset("parquet", data_files=files, split="train")
    height, width = pictures.resolution
    rng = np.random.default_rng(0)

    def transform(examples):
        """What diffusers' unconditional example does without torchvision."""
        images = []
        for image in examples["image"]:
            image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BILINEAR)
            if rng.random() < 0.5:
                image = ImageOps.mirror(image)
            images.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1)
        return {"input": images}

    theirs = torch.utils.data.DataLoader(rows.with_transform(transform), batch_size=batch_size, shuffle=True)

    def our_epoch():
        steps = len(pictures) // batch_size
        sampler = GlobalBatchSampler(len(pictures), batch_size, seed=0)
        loader = torch.utils.data.DataLoader(pictures, batch_sampler=sampler, collate_fn=lambda batch: batch)
        for step, batch in enumerate(itertools.islice(loader, steps)):
            pictures.x_0(batch, BatchRandom(0, step, range(batch_size), batch_size), Augmentation(mirror=True))

    def their_epoch():
        for _ in theirs:
            pass

    rates = {our_epoch: [], their_epoch: []}
    for _ in range(4):
        for epoch, values in rates.items():
            start = time.perf_counter()
            epoch()
            values.append(len(pictures) / (time.perf_counter() - start))
    ours, theirs = (statistics.median(values[1:]) for values in rates.values())
    ratio = ours / theirs
    print(f"| pictures loaded a second, by PIL and numpy on each access | {ours:.0f} | {theirs:.0f} | {ratio:.1f} |",
          flush=True)  # fmt: skip


def processes(folder):
    """Images per second of two processes of one thread, and of one, in turn: of a batch that they share, and with as
    many pictures for each as the one has alone."""
    rates = collections.defaultdict(list)
    settings = ((1, 64), (2, 64), (2, 128), (1, 128), (2, 256))
    for turn, (number, pictures_a_step) in itertools.product(range(5), settings):
        output_dir = folder / f"{number}-{pictures_a_step}-{turn}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number),
                   "examples/train_unconditional.py", "--dataset", arguments.dataset, "--batch_size",
                   str(pictures_a_step), "--max_train_steps", "40", "--sampling_steps", "0", "--checkpointing_steps",
                   "0", "--num_threads", "1", "--output_dir", str(output_dir)]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        rates[number, pictures_a_step].append(statistics.median(line["images_per_second"] for line in lines[1:]))
    for what, of_two, of_one in (("a batch of 64", 64, 64), ("64 pictures each", 128, 64), ("128 each", 256, 128)):
        two, one = rates[2, of_two], rates[1, of_one]
        ratio = statistics.median(a / b for a, b in zip(two, one, strict=True))
        print(f"| images a second of two processes with {what}, of one | {statistics.median(two):.0f} | "
              f"{statistics.median(one):.0f} | {ratio:.2f} |", flush=True)  # fmt: skip


print(f"{batch_size} pictures of {pictures.resolution[0]}x{pictures.resolution[1]} a step, "
      f"{torch.get_num_threads()} threads\n\n| | ours | | ratio |\n|---|---|---|---|")  # fmt: skip
with tempfile.TemporaryDirectory() as folder:
    loading()
    step_against_bare_loop(Path(folder) / "run")
    processes(Path(folder))
