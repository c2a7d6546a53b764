"""What the checker reads in images, and what it refuses to name."""

import itertools
import math

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
    draw,
)
from hf_genmod.data.shapes_checker import check, matches


def pixels(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


def picture(array: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(array), 0, 255).astype(np.uint8)


def names(objects) -> list[str]:
    return sorted(map(str, objects))


def share_read_right(dataset: ShapesDataset, noise: float = 0.0) -> float:
    rng = np.random.default_rng(0)
    right = 0
    for i, item in enumerate(dataset):
        image = picture(pixels(item["image"]) + 255 * noise * rng.standard_normal((*dataset.resolution, 3)))
        right += names(check(image)) == names(dataset.scene(i))
    return right / len(dataset)


@pytest.mark.parametrize("num_images", [1000, pytest.param(4000, marks=pytest.mark.slow)])
def test_check_reads_single_objects(num_images):
    assert share_read_right(ShapesDataset(num_images, seed=1)) >= 0.999


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
    with pytest.raises(ValueError, match="label: 'cyan stat' is not a shape .* did you mean 'cyan star'"):
        matches(image, "cyan stat")


def test_check_takes_rgb_pictures_only():
    image = draw([Object("star", "cyan", "large", (0.3, 0.3))], 32)
    assert check(np.asarray(image)) == check(image) != ()
    for other in (image.convert("L"), image.convert("RGBA"), pixels(image)):
        with pytest.raises(ValueError, match="is not an RGB image"):
            check(other)
    with pytest.raises(ValueError, match=f"use at least {MIN_RESOLUTION}"):
        check(image.resize((15, 15)))


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0, 0.03])
@pytest.mark.parametrize("num_objects", [1, 2])
@pytest.mark.parametrize("resolution", [24, 28, 32, 48, 64, (32, 64)])
def test_check_reads_many(resolution, num_objects, noise):
    assert share_read_right(ShapesDataset(4000, resolution, 5, num_objects, label=None), noise) >= 0.999
