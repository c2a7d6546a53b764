"""What the tests of training share."""

import pytest
import torch

from hf_genmod.data.loading import load_pictures
from hf_genmod.data.shapes import ShapesDataset


@pytest.fixture(scope="session", autouse=True)
def one_order_of_sums():
    """On an accelerator whose kernels add in any order, ask for those that do not: runs are compared bitwise here."""
    if torch.accelerator.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(scope="session")
def dataset():
    return load_pictures(ShapesDataset(40, resolution=16))


@pytest.fixture(scope="session")
def held_out():
    return load_pictures(ShapesDataset(23, resolution=16, seed=1))


@pytest.fixture(autouse=True)
def curves(monkeypatch):
    """Draws no loss.png, which takes as long as a small run; the tests of the monitor draw it."""
    monkeypatch.setattr("hf_genmod.training.monitor.draw_losses", lambda lines, file: None)
