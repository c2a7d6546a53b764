"""
Peak memory of a step guided by a classifier, beside that of an unguided step and of the classifier's own forward and
backward pass, each in a process of its own (Linux; CPU or one GPU).

    python benchmarks/guidance_memory.py
"""

import argparse
import multiprocessing

import torch
from speed import device, peak_of

from hf_genmod import AncestralDDPMScheduler, ClassifierGuidedPipeline
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel
from hf_genmod.models.noisy_classifier import NoisyImageClassifier

ARCHITECTURE = {"sample_size": 32, "patch_size": 2, "block_out_channels": (48, 96, 144), "layers_per_block": 1,
                "attention_levels": (False, False, True), "attention_head_dim": 48, "norm_num_groups": 3}  # fmt: skip


def work(kind: str, n: int):
    """A function that takes one step of sampling n pictures, or passes forward and backward through the classifier."""
    torch.manual_seed(0)
    process = AncestralDDPMScheduler()
    classifier = NoisyImageClassifier(**ARCHITECTURE, num_classes=10, noise_schedule=dict(process.config))
    pipeline = ClassifierGuidedPipeline(DenoisingUNet2DModel(**ARCHITECTURE), classifier, process).to(device)
    pipeline.set_progress_bar_config(disable=True)
    labels = [i % 10 for i in range(n)]
    if kind == "classifier":
        x_t, weighted = torch.randn(n, 3, 32, 32, device=device), pipeline._weighted_labels(labels)
        return lambda: pipeline._classifier_gradient(x_t, torch.tensor(500, device=device), weighted)
    scale = {"unguided": 0.0, "guided": 2.0}[kind]
    return lambda: pipeline(labels, classifier_scale=scale, num_inference_steps=1, output_type="latent")


def measure(queue, kind: str, n: int, num_threads: int):
    """Puts the MiB that the second call takes at its peak: the first chooses algorithms and stays in caches."""
    torch.set_num_threads(num_threads)
    run = work(kind, n)
    work(kind, 2)()
    queue.put(peak_of(run))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256)
    arguments = parser.parse_args()
    peaks = {}
    for kind in ("unguided", "classifier", "guided"):
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=measure, args=(queue, kind, arguments.pictures, torch.get_num_threads()))
        process.start()
        peaks[kind] = queue.get()
        process.join()
    together = peaks["unguided"] + peaks["classifier"]
    print(f"{arguments.pictures} pictures, 3x32x32, {device}, torch {torch.__version__}\n")
    print("| unguided step | classifier, forward and backward | guided step | guided / sum of the others |")
    print("|---|---|---|---|")
    columns = " | ".join(f"{peaks[kind]:.0f} MiB" for kind in ("unguided", "classifier", "guided"))
    print(f"| {columns} | {peaks['guided'] / together:.2f} |")
