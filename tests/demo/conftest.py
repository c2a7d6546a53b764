"""Small checkpoints in folders, and the page of one at 127.0.0.1."""

import pytest
import torch

pytest.importorskip("gradio", reason="the page needs the extra [demo]")

from demo_cases import CHECKPOINTS  # noqa: E402
from pages import Server  # noqa: E402


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a small checkpoint of a kind, the same for all tests."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(kind):
        if not (folder / kind).is_dir():
            CHECKPOINTS[kind]().save_pretrained(folder / kind)
        return str(folder / kind)

    return make


@pytest.fixture(scope="session")
def server(checkpoint):
    """The page of the checkpoints of a kind, started once."""
    started = {}

    def start(*kinds):
        if kinds not in started:
            started[kinds] = Server(*map(checkpoint, kinds))
        return started[kinds]

    yield start
    for one in started.values():
        one.page.close()


@pytest.fixture(autouse=True, scope="session")
def _the_same_threads():
    """Rounding depends on their number."""
    torch.get_num_threads()
