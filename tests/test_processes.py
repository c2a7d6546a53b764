import os
import subprocess
import sys

import pytest
import torch

from hf_genmod.processes import check_processes, threads_of

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
PROGRAM = "import torch; from hf_genmod.processes import use_cores; use_cores({}); print(torch.get_num_threads())"
LAUNCHED = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "environment, num_threads, expected",
    [
        ({**LAUNCHED, "OMP_NUM_THREADS": "1"}, None, max(1, CORES // 2)),  # what torchrun sets where nobody did
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, None, CORES),
        ({**LAUNCHED, "LOCAL_WORLD_SIZE": f"{CORES}", "OMP_NUM_THREADS": "2"}, None, min(2, CORES)),
        ({"OMP_NUM_THREADS": "1"}, None, 1),  # of a person
        ({**LAUNCHED, "OMP_NUM_THREADS": "1"}, 1, 1),
    ],
)
def test_a_launched_process_takes_its_share_of_the_cores_unless_a_person_says_otherwise(
    environment, num_threads, expected
):
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "TORCH", "MKL"))
    }
    command = [sys.executable, "-c", PROGRAM.format(num_threads)]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=300)
    assert int(done.stdout) == expected, done.stderr


def test_processes_share_the_cores():
    assert threads_of(1) == CORES
    assert threads_of(CORES) == threads_of(10 * CORES) == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="counts CPU cores")
def test_more_processes_than_cores_are_refused():
    check_processes(1)
    check_processes(CORES)
    for number in (0, CORES + 1):
        with pytest.raises(ValueError, match=rf"num_processes: {number} is not within 1 ... {CORES}, "):
            check_processes(number)
