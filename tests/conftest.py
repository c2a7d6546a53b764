"""One local Hub for the whole run, in the environment before anything imports `huggingface_hub`.

The client reads HF_ENDPOINT, HF_HOME and their like once, when it is imported: from here on this process, and every
process it starts, knows only the hub on 127.0.0.1 and a temporary cache, never a person's cache or token.
"""

import os
import sys
import tempfile

import pytest
from local_hub import LocalHub

# Products of an accelerator in full float32, added in one order, as tests compare what it computes with the CPU's:
os.environ |= {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

if "huggingface_hub" in sys.modules:
    raise RuntimeError("huggingface_hub was imported before tests/conftest.py could point it at the local Hub")

_HOME = tempfile.TemporaryDirectory(prefix="hf_genmod-tests-", ignore_cleanup_errors=True)
_HUB = LocalHub().__enter__()
_ENVIRONMENT = _HUB.environment(_HOME.name)
for _name in set(os.environ) - set(_ENVIRONMENT):
    del os.environ[_name]
os.environ.update(_ENVIRONMENT)


def pytest_unconfigure(config):
    _HUB.__exit__()
    _HOME.cleanup()


@pytest.fixture(scope="session")
def hub():
    """The Hub that `huggingface_hub`, `datasets` and `diffusers` use here. Take names from `hub.new_repo_id()`:
    clients remember repositories by name."""
    return _HUB


@pytest.fixture(autouse=True)
def _each_test_has_its_own_faults_and_log():
    _HUB.requests.clear()
    yield
    _HUB.faults.clear()
