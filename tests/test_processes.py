import json
import os
import subprocess
import sys

import psutil
import pytest
import torch

from hf_genmod.processes import available_memory, check_processes, threads_of, use_cores

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
LAUNCHED = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}
CASES = [  # the environment, what is asked for, and the number of threads
    ({**LAUNCHED, "OMP_NUM_THREADS": "1"}, None, max(1, CORES // 2)),  # what torchrun sets where nobody did
    ({"ACCELERATE_DYNAMO_MODE": "default", "OMP_NUM_THREADS": "1"}, None, CORES),  # what `accelerate launch` sets
    ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, None, 1),  # of a person
    ({**LAUNCHED, "LOCAL_WORLD_SIZE": f"{CORES}", "OMP_NUM_THREADS": "2"}, None, min(2, CORES)),
    ({"OMP_NUM_THREADS": "1"}, None, 1),  # of a person
    ({**LAUNCHED, "OMP_NUM_THREADS": "1"}, 1, 1),
]
# One process for the cases of each OMP_NUM_THREADS, as torch reads it once, when it is imported.
PROGRAM = """
import json, os, sys, torch
from hf_genmod.processes import use_cores
inherited, at_first = dict(os.environ), torch.get_num_threads()
for environment, num_threads in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(inherited | environment)
    torch.set_num_threads(at_first)
    use_cores(num_threads)
    print(torch.get_num_threads())
"""


@pytest.mark.parametrize("omp_num_threads", ["1", "2"])
def test_a_launched_process_takes_its_share_of_the_cores_unless_a_person_says_otherwise(omp_num_threads):
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "TORCH", "MKL"))
    }
    cases = [case for case in CASES if case[0]["OMP_NUM_THREADS"] == omp_num_threads]
    command = [sys.executable, "-c", PROGRAM, json.dumps([case[:2] for case in cases])]
    environment = inherited | {"OMP_NUM_THREADS": omp_num_threads}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert [int(line) for line in done.stdout.split()] == [expected for _, _, expected in cases], done.stderr


def test_accelerate_takes_no_more_threads_than_were_asked_for():
    """In a single process that a launcher has started, for which it takes all cores by itself."""
    program = "from hf_genmod.processes import processes, use_cores; import torch; use_cores(1); processes(); "
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | launched
    command = [sys.executable, "-c", program + "print(torch.get_num_threads())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize("number", [0, -1, 10**12])
def test_numbers_of_threads_that_cannot_be_are_refused(number):
    with pytest.raises(ValueError, match=f"num_threads: {number} is not within 1 ... 1024"):
        use_cores(number)


def test_processes_share_the_cores():
    assert threads_of(1) == CORES
    assert threads_of(CORES) == threads_of(10 * CORES) == 1


@pytest.mark.parametrize("controller, file", [("", "memory.max"), ("memory", "memory.limit_in_bytes")])
def test_memory_is_limited_by_all_control_groups_above_and_shared(controller, file, tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:cpu:/x\n5:{controller}:/jobs/7/step\n")
    group = tmp_path / "sys/fs/cgroup" / controller / "jobs/7/step"
    group.mkdir(parents=True)
    free = available_memory(tmp_path)
    assert free > 2**20
    (group / file).write_text("max\n")
    (group.parent / file).write_text(f"{2**20}\n")
    (tmp_path / "sys/fs/cgroup" / controller / file).write_text(f"{2**21}\n")
    (tmp_path / file).write_text("1")  # belongs to no group
    assert available_memory(tmp_path) == 2**20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_memory(tmp_path) == 2**18
    assert 0 < available_memory() <= psutil.virtual_memory().total / 4


@pytest.mark.skipif(torch.accelerator.is_available(), reason="counts CPU cores")
def test_more_processes_than_cores_are_refused():
    check_processes(1)
    check_processes(CORES)
    for number in (0, CORES + 1):
        with pytest.raises(ValueError, match=rf"num_processes: {number} is not within 1 ... {CORES}, "):
            check_processes(number)
