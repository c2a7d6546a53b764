"""What the tests of data sets share."""

import datasets
import pytest
from made_images import picture, pixels, save


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An empty cache of `datasets`."""
    folder = tmp_path_factory.mktemp("home") / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def arrays():
    return pixels(6)


@pytest.fixture
def class_folders(tmp_path, arrays):
    """Six pictures in the folders "zebra", "ant" and "bee", two each, beside files that are none of its business."""
    folder = tmp_path / "pictures"
    for i, array in enumerate(arrays):
        save(picture(array), folder / ("ant", "bee", "zebra")[i // 2] / f"{i}.png")
    save(picture(arrays[0]), folder / "ant" / ".hidden.png")
    save(picture(arrays[0]), folder / ".cache" / "x.png")
    (folder / "ant" / "notes.txt").write_text("hello")
    return folder
