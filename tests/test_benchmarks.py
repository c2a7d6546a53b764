import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_accelerator_benchmark_measures_networks_and_the_trainer_on_a_cpu_too():
    rows = ("diffusers eager", "hf_genmod eager", "Trainer eager")
    command = [sys.executable, "benchmarks/accelerator.py", "--sizes", "tiny", "--rounds", "2", "--rows", *rows]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    table = [[cell.strip() for cell in line.split("|")] for line in output.splitlines() if line.startswith("| tiny")]
    assert [cells[3] for cells in table] == list(rows)
    assert all(float(cells[4]) > 0 for cells in table)  # images/s
