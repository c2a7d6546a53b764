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
    MIN_RESOLUTION,
    RADII,
    SHAPES,
    SIZES,
    Object,
    ShapesDataset,
    caption,
    draw,
)
from hf_genmod.data.shapes_checker import check, matches

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


def share_read_right(dataset: ShapesDataset, noise: float = 0.0) -> float:
    rng = np.random.default_rng(0)
    right = 0
    for i, item in enumerate(dataset):
        image = picture(pixels(item["image"]) + 255 * noise * rng.standard_normal((*dataset.resolution, 3)))
        right += names(check(image)) == names(dataset.scene(i))
    return right / len(dataset)


# The data set


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
        ({"exclude": "hart"}, "exclude: 'hart' is no shape or colored shape; did you mean 'heart'?"),
        ({"exclude": ["rad circle"]}, "'rad circle' is no shape or colored shape; did you mean 'red circle'?"),
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
        with pytest.raises(IndexError, match=f"index: {index} is not one of the 3 pictures"):
            dataset[index]


# The drawing


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


# The checker


def test_check_reads_single_objects():
    assert share_read_right(ShapesDataset(4000, seed=1)) >= 0.999


@pytest.mark.parametrize("resolution", [16, 24, 28, 48, 64, (24, 40), (40, 32)])
def test_check_reads_every_resolution(resolution):
    assert share_read_right(ShapesDataset(200, resolution, seed=2)) == 1


@pytest.mark.parametrize(("resolution", "num_images"), [(24, 200), (32, 400), ((32, 48), 200)])
def test_check_reads_two_objects(resolution, num_images):
    assert share_read_right(ShapesDataset(num_images, resolution, 3, num_objects=2, label=None)) == 1


@pytest.mark.parametrize(("resolution", "noise", "num_images"), [(32, 0.03, 1000), (32, 0.05, 300), (16, 0.03, 300)])
def test_check_reads_through_noise(resolution, noise, num_images):
    assert share_read_right(ShapesDataset(num_images, resolution, seed=4), noise) >= 0.999


def test_check_finds_the_place():
    dataset = ShapesDataset(100, 32, num_objects=2, label=None)
    for i, item in enumerate(dataset):
        drawn = sorted(dataset.scene(i), key=lambda thing: thing.center[1])
        found = check(item["image"])
        assert [thing.center[1] for thing in found] == sorted(thing.center[1] for thing in found)
        for thing in drawn:
            nearest = min(found, key=lambda other: math.dist(other.center, thing.center))
            assert math.dist(nearest.center, thing.center) < 0.1 / 32  # a tenth of a pixel
            assert str(nearest) == str(thing)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_check_bears_small_distortions(shape, size):
    item = Object(shape, "green", size, (0.47, 0.52))
    image = draw([item], 32)
    soft = image.filter(PIL.ImageFilter.GaussianBlur(0.5))
    larger = image.resize((34, 34), PIL.Image.Resampling.BICUBIC).crop((1, 1, 33, 33))
    smaller = draw([item], 34).resize((32, 32), PIL.Image.Resampling.BICUBIC)
    sheared = image.transform((32, 32), PIL.Image.Transform.AFFINE, (1, 0.08, -1.3, 0, 1, 0), 2, fillcolor=BACKGROUND)
    faded = picture(BACKGROUND + 0.85 * (pixels(image) - BACKGROUND))
    tinted = picture(pixels(image) + (8, -8, 8))
    for distorted in (soft, larger, smaller, sheared, faded, tinted):
        assert names(check(distorted)) == [str(item)]
        assert not np.array_equal(distorted, image)


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_check_names_nothing_where_nothing_is_drawn(resolution):
    rng = np.random.default_rng(0)
    shape = (resolution, resolution, 3)
    for value in (0, 100, 128, 150, 255):
        assert check(np.full(shape, value, np.uint8)) == ()
    for _ in range(20):
        assert check(rng.integers(0, 256, shape, dtype=np.uint8)) == ()
        for std in (0.03, 0.1, 0.3):
            assert check(picture(BACKGROUND + 255 * std * rng.standard_normal(shape))) == ()
        clouds = PIL.Image.fromarray(picture(BACKGROUND + 500 * rng.standard_normal(shape)))
        assert check(clouds.filter(PIL.ImageFilter.GaussianBlur(2))) == ()


@pytest.mark.parametrize("size", SIZES)
def test_check_refuses_what_lies_halfway_between_names(size):
    def middle(first, second):
        return picture((pixels(draw([first], 32)) + pixels(draw([second], 32))) / 2)

    for a, b in itertools.combinations(SHAPES, 2):
        assert check(middle(Object(a, "red", size, (0.5, 0.5)), Object(b, "red", size, (0.5, 0.5)))) == ()
    for a, b in itertools.combinations(COLORS, 2):
        assert check(middle(Object("heart", a, size, (0.5, 0.5)), Object("heart", b, size, (0.5, 0.5)))) == ()
    for shape in SHAPES:
        scale = sum(RADII[1].values()) / 2 / RADII[1][size]
        image = draw([Object(shape, "red", size, (0.5, 0.5))], 256)
        near, far = 128 - 128 / scale, 128 + 128 / scale
        medium = PIL.Image.new("RGB", (512, 512), BACKGROUND)
        medium.paste(image, (128, 128))
        box = (128 + near, 128 + near, 128 + far, 128 + far)
        assert check(medium.resize((32, 32), PIL.Image.Resampling.BOX, box)) == ()


def test_allowance_for_noise_does_not_decide_between_shapes():
    circle, square = (pixels(draw([Object(shape, "red", "small", (0.5, 0.5))], 16)) for shape in ("circle", "square"))
    checkers = 14 * (-1.0) ** np.indices((16, 16)).sum(0)[..., None]
    for mixture, found in ((circle, ["small red circle"]), ((circle + square) / 2, [])):
        ground = (abs(mixture - BACKGROUND) < 4).all(-1, keepdims=True)
        assert names(check(picture(np.where(ground, BACKGROUND + checkers, mixture)))) == found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_check_refuses_malformed_objects(shape, size):
    whole = pixels(draw([Object(shape, "yellow", size, (0.5, 0.5))], 32))
    for half in (np.s_[:16], np.s_[16:], np.s_[:, :16], np.s_[:, 16:]):
        erased, painted = whole.copy(), whole.copy()
        erased[half] = BACKGROUND
        painted[half] = pixels(draw([Object(shape, "blue", size, (0.5, 0.5))], 32))[half]
        assert check(picture(erased)) == ()
        assert check(picture(painted)) == ()
    assert check(picture(BACKGROUND + 0.6 * (whole - BACKGROUND))) == ()
    assert check(draw([Object(shape, "yellow", size, (0.5, 0.02))], 32)) == ()


@pytest.mark.parametrize("size", SIZES)
def test_check_refuses_ellipses_and_turned_shapes(size):
    def turned(shape, angle):
        image = draw([Object(shape, "black", size, (0.5, 0.5))], 32)
        return image.rotate(angle, PIL.Image.Resampling.BICUBIC, fillcolor=BACKGROUND)

    for shape, angle in (
        ("square", 45),
        ("cross", 45),
        ("triangle", 180),
        ("heart", 180),
        ("crescent", 180),
        ("star", 36),
    ):
        assert names(check(turned(shape, 0))) == [f"{size} black {shape}"]
        assert check(turned(shape, angle)) == ()
    for resolution in ((32, 48), (48, 32)):
        assert check(draw([Object("circle", "black", size, (0.7, 0.7))], resolution).resize((32, 32))) == ()


def test_check_answers_for_the_whole_picture():
    star, ring = Object("star", "cyan", "large", (0.3, 0.3)), Object("ring", "red", "small", (0.75, 0.7))
    both = pixels(draw([star, ring], 32))
    assert [str(item) for item in check(picture(both))] == [str(star), str(ring)]
    assert [str(item) for item in check(picture(np.roll(both, 16, axis=0)))] == [str(ring), str(star)]

    both[20:, 24:] = BACKGROUND  # half of the ring
    assert check(picture(both)) == ()
    alone = pixels(draw([star], 32))
    assert names(check(picture(alone))) == [str(star)]
    assert check(picture(np.where((alone == BACKGROUND).all(-1, keepdims=True), 158, alone))) == ()  # another ground
    touching = draw([star, Object("ring", "red", "small", (0.5, 0.5))], 32)
    assert check(touching) == ()


def test_matches_exactly_one_object():
    star, ring = Object("star", "cyan", "large", (0.3, 0.3)), Object("ring", "red", "small", (0.75, 0.7))
    image = draw([star], 32)
    assert matches(image, "star") and matches(image, "cyan star")
    assert not matches(image, "ring") and not matches(image, "red star") and not matches(image, "cyan ring")
    assert not matches(draw([star, ring], 32), "star")
    assert not matches(draw([], 32), "star")
    with pytest.raises(ValueError, match="label: 'cyan stat' is no shape .* did you mean 'cyan star'"):
        matches(image, "cyan stat")


def test_check_takes_rgb_pictures_only():
    image = draw([Object("star", "cyan", "large", (0.3, 0.3))], 32)
    assert check(np.asarray(image)) == check(image) != ()
    for other in (image.convert("L"), image.convert("RGBA"), pixels(image)):
        with pytest.raises(ValueError, match="is no RGB picture"):
            check(other)
    with pytest.raises(ValueError, match=f"use at least {MIN_RESOLUTION}"):
        check(image.resize((15, 15)))


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0, 0.03])
@pytest.mark.parametrize("num_objects", [1, 2])
@pytest.mark.parametrize("resolution", [24, 28, 32, 48, 64, (32, 64)])
def test_check_reads_many(resolution, num_objects, noise):
    assert share_read_right(ShapesDataset(4000, resolution, 5, num_objects, label=None), noise) >= 0.999
