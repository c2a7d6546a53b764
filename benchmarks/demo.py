"""
What visitors of `hf_genmod demo` wait for an image: several at once, each of whom asks for one image after another, of
other seeds, by the default steps of the model. Prints the median and the 95th percentile, and the seconds until the
page is there.

    python benchmarks/demo.py --model runs/mine
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import torch

from hf_genmod.demo.model import DemoModel

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="Folder of a run.")
parser.add_argument("--visitors", type=int, default=4)
parser.add_argument("--images", type=int, default=10, help="Images of each visitor, after one that is not counted.")


def ask(url: str, data: list) -> float:
    """Seconds until the page has drawn."""
    started = time.perf_counter()
    event = httpx.post(f"{url}/gradio_api/call/draw", json={"data": data}, timeout=60).json()["event_id"]
    answer = httpx.get(f"{url}/gradio_api/call/draw/{event}", timeout=600).text
    assert "event: complete" in answer and "<img" in answer, answer[-500:]
    return time.perf_counter() - started


if __name__ == "__main__":
    arguments = parser.parse_args()
    settings = [*DemoModel(arguments.model).settings.values()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.perf_counter()
    command = [sys.executable, "-m", "hf_genmod", "demo", arguments.model, "--port", str(port)]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = page.stdout.readline().split()[0].rstrip("/")
        httpx.get(url).raise_for_status()
        start = time.perf_counter() - started

        def visit(visitor: int) -> list[float]:
            seeds = [1000 * visitor + i for i in range(arguments.images + 1)]
            changed = [{"seed": seed, "number": 1} for seed in seeds]
            return [ask(url, [c.get(s.name, s.default) for s in settings] + [None]) for c in changed][1:]

        with ThreadPoolExecutor(arguments.visitors) as visitors:
            seconds = np.concatenate([*visitors.map(visit, range(arguments.visitors))])
    finally:
        page.send_signal(signal.SIGINT)
        page.wait()
    print(f"{torch.cpu.get_capabilities()['cpu_name']}, {len(os.sched_getaffinity(0))} cores; {len(seconds)} images\n")
    print("| visitors | median | 95th percentile | until the page is there, with all imports |\n|---|---|---|---|")
    middle, slow = np.quantile(seconds, [0.5, 0.95])
    print(f"| {arguments.visitors} | {middle:.2f} s | {slow:.2f} s | {start:.1f} s |")
