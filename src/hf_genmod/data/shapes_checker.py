"""Recognises the shapes in an image."""

import functools
import math
from collections.abc import Iterator

import numpy as np
import PIL.Image

from hf_genmod.data.shapes import BACKGROUND, COLORS, RADII, SHAPES, SIZES, Object, check_name, coverage, height_width

# The contrast of a pixel is its Euclidean distance from the ground, with channels in [0, 1]; the energy of pixels is
# the sum of their squared contrasts.
_FAINT = 0.25  # contrast of the pixels that make up a blob
_SOLID = 0.4  # contrast that some pixel of a blob must exceed for the blob to count
_MAX_NOISE = 0.1**2  # mean squared contrast of the ground
_MAX_RESIDUAL = 0.15  # energy of the difference between blob and drawing, as a share of the blob's
_MAX_RATIO = 0.4  # of this residual to that of the next best shape


def check(image: PIL.Image.Image | np.ndarray) -> tuple[Object, ...]:
    """Names the objects of an image from its pixels alone.

    Pixels that differ from the ground form connected blobs. Each blob is compared with every shape in every size and
    color, drawn at the centroid of the blob. The best drawing names the blob if its residual is small compared to the
    blob, and clearly smaller than that of every other shape. Noise as strong as that of the ground is subtracted.

    Args:
        image (`PIL.Image.Image` or `np.ndarray`): An RGB image, or `uint8` (height, width, 3), of at least 16 pixels
            each. Two objects are told apart reliably from 24 pixels on.

    Returns:
        `tuple[Object, ...]`: The objects, from top to bottom by their centers. Empty if the image shows nothing, or
        anything that is none of these objects.

    Raises:
        ValueError: If it is no RGB image, or too small.
    """
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image: {pixels.dtype} {pixels.shape} is not an RGB image, uint8 (height, width, 3)")
    unit = min(height_width(pixels.shape[:2]))
    offset = (pixels - np.array(BACKGROUND, dtype=np.float32)) / 255
    contrast = np.linalg.norm(offset, axis=-1)
    blobs = [blob for blob in _blobs(contrast > _FAINT) if contrast[blob].max() > _SOLID]
    ground = np.logical_not(np.any(blobs, axis=0))
    if len(blobs) not in RADII or not ground.any() or (noise := (contrast[ground] ** 2).mean()) > _MAX_NOISE:
        return ()
    radii = unit * np.array(list(RADII[len(blobs)].values()), dtype=np.float32)
    found = [_name(np.where(blob[..., None], offset, 0), noise * blob.sum(), radii, unit) for blob in blobs]
    return () if None in found else tuple(sorted(found, key=lambda item: item.center[1]))


def matches(image: PIL.Image.Image | np.ndarray, label: str) -> bool:
    """Whether an image shows exactly one object, which is a `label`, such as "circle" or "red circle"."""
    check_name("label", label)
    found = check(image)
    return len(found) == 1 and label in (found[0].shape, f"{found[0].color} {found[0].shape}")


def _blobs(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Splits a mask, (height, width), into its connected parts, each grown by the pixels that touch it."""
    todo = set(zip(*(indices.tolist() for indices in mask.nonzero()), strict=True))
    while todo:
        blob = np.zeros(np.add(mask.shape, 2), dtype=bool)
        frontier = [todo.pop()]
        while frontier:
            y, x = frontier.pop()
            blob[y : y + 3, x : x + 3] = True
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
            todo -= near
            frontier.extend(near)
        yield blob[1:-1, 1:-1]


def _name(offset: np.ndarray, noise: float, radii: np.ndarray, unit: int) -> Object | None:
    """Names the object of one blob, from its pixels minus the ground, (height, width, 3), of whose energy `noise` is
    ignored, and the radii of small and large objects, (2,), and the shorter side of the image, both in pixels."""
    center = _centroid(np.linalg.norm(offset, axis=-1))  # contrast is proportional to coverage
    # Every shape in every size with its centroid there, in a window that is wide enough for all of them.
    radii = radii[:, None, None]
    centers = center - _centroids()[:, None] * radii[:, 0]  # (shape, size, xy)
    reach = math.ceil(1.4 * radii.max())
    side = 2 * reach + 1
    left, top = center.astype(int)
    window = np.pad(offset, ((reach, reach), (reach, reach), (0, 0)))[top : top + side, left : left + side]
    xy = (centers - [left, top] + reach).astype(np.float32)[..., None, None]
    templates = np.stack([coverage(s, c[:, 0], c[:, 1], radii, side, side) for s, c in zip(SHAPES, xy, strict=True)])

    # |window - template * color|², less the noise, as a share of |window|²: (shape, size, color).
    colors = (np.array(list(COLORS.values())) - BACKGROUND) / 255
    products = templates.reshape(len(SHAPES), len(SIZES), -1) @ window.reshape(-1, 3) @ colors.T
    drawn = (templates**2).sum((-2, -1))[..., None] * (colors**2).sum(-1)
    energy = (offset**2).sum()
    residual = (energy - 2 * products + drawn - noise) / energy

    best, second = np.sort(residual.min((1, 2)))[:2]
    if best > _MAX_RESIDUAL or max(best, 0) > _MAX_RATIO * second:
        return None
    shape, size, color = np.unravel_index(residual.argmin(), residual.shape)
    return Object(SHAPES[shape], list(COLORS)[color], SIZES[size], tuple((centers[shape, size] / unit).tolist()))


def _centroid(weights: np.ndarray) -> np.ndarray:
    """Center of mass (x, y) of weights, (height, width), in pixels."""
    rows, columns = (np.arange(n) + 0.5 for n in weights.shape)
    return np.array([weights.sum(0) @ columns, weights.sum(1) @ rows]) / weights.sum()


@functools.cache
def _centroids() -> np.ndarray:
    return np.array([_centroid(coverage(shape, 100, 100, 100, 200, 200)) / 100 - 1 for shape in SHAPES])
