"""Folders of any layout are read as a person reads them, or what differs is named."""

import random
import warnings

import pytest
from layouts import draw, write, write_pool

from hf_genmod.data.loading import load_pictures
from hf_genmod.data.sources import splits_of


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write_pool(tmp_path_factory.mktemp("pool") / "images")


def read(folder) -> dict[int, tuple]:
    """The split, label and caption of each image, by its grey level; label names are compared by number."""
    found = {}
    for split in splits_of(folder):
        pictures = load_pictures(folder, split=split)
        if pictures.label_names:
            by_number = all(name.isdecimal() for name in pictures.label_names)
            assert pictures.label_names == sorted(pictures.label_names, key=int if by_number else None)
        for index, level in enumerate(pictures.images[:, 0, 0, 0].tolist()):
            label = pictures.label_names[pictures.labels[index]] if pictures.label_names else None
            number = round(level / 4)
            assert number not in found, f"twice: {pictures.where(index)}"
            found[number] = (split, label, pictures.captions[index] if pictures.captions else None)
    return found


def check(seed, folder, pool):
    rng = random.Random(seed)
    layout = draw(rng)
    write(layout, folder, pool, rng)
    if len({label for _, label, _ in layout.expected.values()}) == 1:  # one class is none
        layout.expected = {key: (split, None, text) for key, (split, _, text) in layout.expected.items()}
    told = f"seed {seed}: {layout}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = read(folder)
        except (ValueError, OSError) as error:
            name = layout.refused or "".join(path[-1] for path in layout.tables)
            assert name and name in str(error) and "\n" not in str(error), f"{told}: {error!r}"
            return
    said = "; ".join(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning))
    assert layout.refused is None, f"{told} was not refused"
    for number in layout.tables.values():  # then they are the data set, and all images are named
        layout.named = {f"define the data set ({len(layout.images)})"}
        layout.expected = {number: (next(iter(found.values()))[0], None, None)}
    assert found == layout.expected, told
    assert all(name in said for name in layout.named), f"{told}: {said}"
    assert layout.named or not said, f"{told}: {said}"


def test_layouts(tmp_path, pool):
    for seed in range(100):
        check(seed, tmp_path / str(seed), pool)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100, 1000, 50))
def test_many_layouts(tmp_path, pool, start):
    for seed in range(start, start + 50):
        check(seed, tmp_path / str(seed), pool)


def test_the_order_does_not_depend_on_the_order_of_writing(tmp_path, pool):
    for seed in range(1000, 1010):
        fingerprints = set()
        for time in range(2):
            layout = draw(random.Random(seed))
            if layout.refused:
                continue
            write(layout, tmp_path / f"{seed} {time}", pool, random.Random(time))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                folder = tmp_path / f"{seed} {time}"
                fingerprints.add(load_pictures(folder, split=next(iter(splits_of(folder)))).fingerprint)
        assert len(fingerprints) <= 1
