"""The drawn data set: what an image shows, and that it depends on its seed and index alone."""

import hashlib
import itertools
import math
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest

from hf_genmod.data.shapes import (
    BACKGROUND,
    COLORS,
    RADII,
    SHAPES,
    SIZES,
    Object,
    ShapesDataset,
    caption,
    draw,
)

OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def lens(r: float, d: float) -> float:
    """Area that a disc of radius 1 shares with one of radius r at distance d."""
    a, b = math.acos((d**2 + 1 - r**2) / (2 * d)), math.acos((d**2 + r**2 - 1) / (2 * d * r))
    return a - math.sin(2 * a) / 2 + r**2 * (b - math.sin(2 * b) / 2)


AREAS = {  # of shapes of radius 1
    "circle": math.pi,
    "ring": 0.75 * math.pi,
    "square": 1.94**2,
    "triangle": 1.8,
    "cross": 4 * 0.6 - 0.6**2,
    "star": 5 * 0.5 * math.sin(math.pi / 5),
    "heart": (4 + math.pi) * 0.586**2,
    "crescent": math.pi - lens(0.8, 0.6),
}


def pixels(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


def picture(array: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(array), 0, 255).astype(np.uint8)


def coverage(image: PIL.Image.Image) -> np.ndarray:
    """Share of each pixel that white objects cover."""
    return (pixels(image)[..., 0] - BACKGROUND[0]) / (COLORS["white"][0] - BACKGROUND[0])


def centroid(alpha: np.ndarray) -> np.ndarray:
    return np.array([(alpha * (axis + 0.5)).sum() for axis in np.indices(alpha.shape)[::-1]]) / alpha.sum()


def names(objects) -> list[str]:
    return sorted(map(str, objects))


def test_picture_depends_on_seed_and_index_alone():
    digest = (
        "import hashlib, sys; from hf_genmod.data.shapes import ShapesDataset; d = ShapesDataset(50, 24, 7, 2, None);"
        "print(*[hashlib.sha256(d[i]['image'].tobytes() + d[i]['caption'].encode()).hexdigest() for i in range(50)])"
    )
    elsewhere = subprocess.run([sys.executable, "-c", digest], capture_output=True, text=True, check=True)

    longer = ShapesDataset(9000, 24, seed=7, num_objects=2, label=None)
    copy = pickle.loads(pickle.dumps(longer))
    backwards = [copy[i] for i in reversed(range(50))][::-1]
    here = [hashlib.sha256(item["image"].tobytes() + item["caption"].encode()).hexdigest() for item in backwards]
    assert here == elsewhere.stdout.split()
    assert len(set(here)) == 50


def test_data_set_stays_the_same_from_release_to_release():
    dataset = ShapesDataset(3, seed=0)
    assert [dataset[i]["caption"] for i in range(3)] == [
        "a large red circle",
        "a small black crescent",
        "a large black cross",
    ]
    assert ShapesDataset(seed=2**64 - 1).scene(0) != ShapesDataset(seed=0).scene(0)


def test_scene_is_the_same_at_every_resolution():
    low, high = (ShapesDataset(50, resolution, num_objects=2, label=None) for resolution in (16, 128))
    for i in range(50):
        assert low.scene(i) == high.scene(i)
        average = pixels(high[i]["image"]).reshape(16, 8, 16, 8, 3).mean((1, 3))
        difference = abs(pixels(low[i]["image"]) - average)
        assert difference.max() < 32 and difference.mean() < 1


def test_shapes_colors_sizes_and_places_are_uniform():
    dataset = ShapesDataset()
    scenes = [dataset.scene(i)[0] for i in range(len(dataset))]
    counts = Counter((item.shape, item.color, item.size) for item in scenes)
    expected = len(dataset) / 128
    chi_square = sum((counts[kind] - expected) ** 2 / expected for kind in itertools.product(SHAPES, COLORS, SIZES))
    assert chi_square < 127 + 5 * math.sqrt(2 * 127)

    for size in SIZES:
        centers = np.array([item.center for item in scenes if item.size == size])
        low = RADII[1][size] + 0.03
        np.testing.assert_allclose(centers.min(0), low, atol=0.01)
        np.testing.assert_allclose(centers.max(0), 1 - low, atol=0.01)
        np.testing.assert_allclose(centers.mean(0), 0.5, atol=0.02)
        np.testing.assert_allclose(centers.std(0), (1 - 2 * low) / math.sqrt(12), atol=0.02)


def test_wide_pictures_are_used_in_full():
    dataset = ShapesDataset(1000, (20, 60))
    assert dataset[0]["image"].size == (60, 20)
    x, y = np.array([dataset.scene(i)[0].center for i in range(1000)]).T
    assert x.min() < 0.3 and x.max() > 2.7 and y.min() > 0.13 and y.max() < 0.87


def test_objects_lie_inside_the_picture():
    for dataset in (ShapesDataset(200, 64), ShapesDataset(200, (64, 80), num_objects=2, label=None)):
        for item in dataset:
            image = np.asarray(item["image"])
            border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
            assert (border == BACKGROUND).all()


def test_label_is_that_of_the_caption():
    for label in ("shape", "shape_color"):
        dataset = ShapesDataset(200, label=label)
        for i, item in enumerate(dataset):
            article, size, color, shape = item["caption"].split()
            assert (article, dataset.scene(i)[0].size) == ("a", size)
            assert dataset.label_names[item["label"]] == (shape if label == "shape" else f"{color} {shape}")
    assert ShapesDataset().label_names == list(SHAPES)
    assert len(set(ShapesDataset(label="shape_color").label_names)) == 64

    unlabeled = ShapesDataset(1, label=None)
    assert unlabeled.label_names == [] and set(unlabeled[0]) == {"image", "caption"}


def test_captions_of_two_objects_are_true():
    dataset = ShapesDataset(1000, num_objects=2, label=None)
    relations = Counter()
    for i in range(1000):
        first, second = dataset.scene(i)
        said = caption((first, second))
        (relation,) = (word for word in OPPOSITE if f" {word} " in said)
        assert said == f"a {first} {relation} a {second}"
        assert caption((second, first)) == f"a {second} {OPPOSITE[relation]} a {first}"

        # True of the objects as wholes, and along the larger of the two displacements.
        axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
        ahead = sign * np.subtract(second.center, first.center)[axis]
        assert ahead >= RADII[2][first.size] + RADII[2][second.size] + 0.06
        assert ahead >= abs(np.subtract(second.center, first.center)).max()
        relations[relation] += 1
    assert min(relations.values()) > 180


def test_two_objects_never_touch():
    dataset = ShapesDataset(200, 64, num_objects=2, label=None)
    for i in range(200):
        unseen = Object("circle", "red", "small", (9, 9))  # sizes are those of objects in twos
        covered = [(np.asarray(draw([item, unseen], 64)) != BACKGROUND).any(-1) for item in dataset.scene(i)]
        rows, columns = (sum(mask.any(axis).astype(int) for mask in covered) for axis in (1, 0))
        assert rows.max() < 2 or columns.max() < 2
        both = np.asarray(dataset[i]["image"])
        assert ((both != BACKGROUND).any(-1) == covered[0] | covered[1]).all()


def test_excluded_never_occurs_and_everything_else_does():
    everything = ShapesDataset(3000, seed=3)
    dataset = ShapesDataset(3000, seed=3, exclude=("heart", "red circle"))
    left = {(c, s) for c, s in itertools.product(COLORS, SHAPES) if s != "heart" and (c, s) != ("red", "circle")}
    assert {(item.color, item.shape) for i in range(3000) for item in dataset.scene(i)} == left

    for i in range(3000):
        (before,), (after,) = everything.scene(i), dataset.scene(i)
        assert before == after or before.shape == "heart" or (before.color, before.shape) == ("red", "circle")
    assert dataset.label_names == everything.label_names
    kept = [i for i in range(200) if everything.scene(i) == dataset.scene(i)]
    assert [dataset[i]["label"] for i in kept] == [everything[i]["label"] for i in kept]

    two = ShapesDataset(1000, num_objects=2, label=None, exclude="star")
    assert {item.shape for i in range(1000) for item in two.scene(i)} == set(SHAPES) - {"star"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images: 0 is not positive"),
        ({"resolution": 15}, "resolution: 15x15 is too small"),
        ({"resolution": (32, 8)}, "resolution: 32x8 is too small"),
        ({"seed": -1}, "seed: -1 is outside"),
        ({"num_objects": 3}, "num_objects: 3 is neither 1 nor 2"),
        ({"label": "color"}, "label: 'color' is none of"),
        ({"num_objects": 2}, "label: two objects have no single 'shape'"),
        ({"exclude": "hart"}, "exclude: 'hart' is not a shape or colored shape; did you mean 'heart'?"),
        ({"exclude": ["rad circle"]}, "'rad circle' is not a shape or colored shape; did you mean 'red circle'?"),
        ({"exclude": SHAPES}, "exclude: all shapes are excluded"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError) as error:
        ShapesDataset(**arguments)
    assert message in str(error.value)


def test_index_outside_the_data_set():
    dataset = ShapesDataset(3)
    assert len(dataset) == len(list(dataset)) == 3
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"index: {index} is not one of the 3 images"):
            dataset[index]


def test_colors_are_well_apart():
    colors = np.array([BACKGROUND, *COLORS.values()]) / 255
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colors, 2)) > 0.55


@pytest.mark.parametrize("shape", SHAPES)
def test_mass_is_the_area_at_every_place(shape):
    rng = np.random.default_rng(0)
    cases = ((16, "small", 0.1, 0.2), (32, "small", 0.03, 0.1), (32, "large", 0.015, 0.1), (64, "large", 0.005, 0.05))
    for resolution, size, mass_error, drift in cases:
        area = AREAS[shape] * (RADII[1][size] * resolution) ** 2
        offsets = []
        for center in rng.uniform(0.4, 0.6, (20, 2)):
            alpha = coverage(draw([Object(shape, "white", size, tuple(center))], resolution))
            assert alpha.min() == 0 and alpha.max() < 1.001
            assert alpha.sum() == pytest.approx(area, rel=mass_error)
            offsets.append(centroid(alpha) - center * resolution)
        assert np.ptp(offsets, axis=0).max() < drift  # pixels


@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_have_the_symmetries_of_their_shapes(shape):
    image = pixels(draw([Object(shape, "red", "large", (0.5, 0.5))], 32))
    assert (image[:, ::-1] == image).all() == (shape != "crescent")
    assert (image[::-1] == image).all() == (shape in ("circle", "ring", "square", "cross", "crescent"))
    assert (image.transpose(1, 0, 2) == image).all() == (shape in ("circle", "ring", "square", "cross"))


@pytest.mark.parametrize("shape", SHAPES)
def test_moving_an_object_by_whole_pixels_moves_its_picture(shape):
    here = pixels(draw([Object(shape, "blue", "large", (0.41, 0.52))], 32))
    there = pixels(draw([Object(shape, "blue", "large", (0.41 + 5 / 32, 0.52 - 3 / 32))], 32))
    assert abs(np.roll(here, (-3, 5), axis=(0, 1)) - there).max() <= 1


def test_outside_of_the_picture_is_cut_off():
    whole = pixels(draw([Object("ring", "pink", "large", (0.5, 0.5))], 32))
    for dx, dy in ((0.5, 0), (-0.5, -0.5), (0, 0.5)):
        cut = pixels(draw([Object("ring", "pink", "large", (0.5 + dx, 0.5 + dy))], 32))
        rows, columns = (slice(max(0, -int(32 * d)), 32 - max(0, int(32 * d))) for d in (dy, dx))
        seen = whole[rows, columns]
        shown = cut[::-1, ::-1][rows, columns][::-1, ::-1]
        assert abs(seen - shown).max() <= 1 and (cut != BACKGROUND).any()
    assert (pixels(draw([Object("ring", "pink", "large", (2, 0.5))], 32)) == BACKGROUND).all()
