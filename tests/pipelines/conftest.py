"""Each sampler in turn, and checkpoints in folders and on the Hub."""

import pytest
import torch
from adapter_cases import make, zebra  # noqa: F401 (fixtures)
from bare_machine import BareMachine
from checkpoint_cases import guided
from small_pipelines import SAMPLERS

# One of each kind; the others are slow: ours, deterministic, of several steps, stochastic, of noise levels.
FAST = ["Ancestral", "DDIM", "DPM-Solver", "Few-step DDPM", "SDE-DPM-Solver", "Euler", "Heun"]


@pytest.fixture(params=[pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in SAMPLERS])
def sampler(request):
    """A name, and a function from the config of a scheduler to the sampler."""
    cls, options = SAMPLERS[request.param]
    return request.param, lambda config: cls.from_config(config, **options)


@pytest.fixture(scope="session")
def elsewhere(hub, tmp_path_factory):
    """A machine with torch and diffusers and not this package, and with a cache of its own."""
    absent = ["hf_genmod", "transformers", "peft", "accelerate"]
    environment = hub.environment(tmp_path_factory.mktemp("elsewhere"))
    with BareMachine(environment | {"OMP_NUM_THREADS": str(torch.get_num_threads())}, absent) as machine:
        yield machine


@pytest.fixture(scope="session")
def elsewhere_with_transformers(hub, tmp_path_factory):
    """One with transformers, which text needs."""
    environment = hub.environment(tmp_path_factory.mktemp("elsewhere"))
    with BareMachine(environment | {"OMP_NUM_THREADS": str(torch.get_num_threads())}, ["hf_genmod"]) as machine:
        yield machine


@pytest.fixture
def pipeline():
    return guided()


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def repo_id(pipeline, hub):
    repo_id = hub.new_repo_id("checkpoint")
    pipeline.push_to_hub(repo_id)
    return repo_id


@pytest.fixture(params=["folder", pytest.param("hub", marks=pytest.mark.slow)])
def checkpoint(request):
    """Where a checkpoint is: a folder, or a repository on the Hub."""
    return str(request.getfixturevalue({"folder": "folder", "hub": "repo_id"}[request.param]))
