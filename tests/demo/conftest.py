"""Small checkpoints in folders, and their pages at 127.0.0.1."""

import pytest
from demo_cases import CHECKPOINTS


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
    """The page of checkpoints of some kinds, started once."""
    from pages import Server  # which needs Gradio

    started = {}

    def start(*kinds):
        if kinds not in started:
            started[kinds] = Server(*map(checkpoint, kinds))
        return started[kinds]

    yield start
    for one in started.values():
        one.page.close(verbose=False)
