"""The embedded data set: drawn images of simple shapes, with exact labels and captions.

A scene has one or two objects on a plain grey ground. An object has one of 8 shapes, one of 8 colors and one of 2
sizes. Nothing is downloaded or stored: image i is a function of (seed, i) alone. `shapes_checker.check` recognises
the objects from the pixels, so that the samples of a model can be compared with the request.

Lengths are in units of the image's shorter side, x to the right and y down from the top left corner, so that a scene
is the same at every resolution.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL.Image
import torch


def _disc(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return radius - np.sqrt(x**2 + y**2)


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.minimum(half_width - abs(x), half_height - abs(y))


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # By symmetry all ten halves of arms are one, with an outline from the tip, at radius 1, to the notch, at 0.5.
    angle = abs((np.arctan2(x, -y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    along, across = np.hypot(x, y) * (np.cos(angle), np.sin(angle))
    notch_along, notch_across = 0.5 * math.cos(math.pi / 5), 0.5 * math.sin(math.pi / 5)
    return (notch_across * (1 - along) - (1 - notch_along) * across) / math.hypot(notch_across, 1 - notch_along)


# A shape is the distance of a point (x, y) in [-1, 1]² from the outline, positive inside; y points down. The minimum
# of two distances is the intersection of the shapes, the maximum their union.
_DISTANCE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: _disc(x, y, 1),
    "ring": lambda x, y: np.minimum(_disc(x, y, 1), -_disc(x, y, 0.5)),
    "square": lambda x, y: _box(x, y, 0.97, 0.97),
    "triangle": lambda x, y: np.minimum(0.9 - y, (y + 0.9 - 1.8 * abs(x)) / math.hypot(1, 1.8)),
    "cross": lambda x, y: np.maximum(_box(x, y, 0.3, 1), _box(x, y, 1, 0.3)),
    "star": _star,
    "heart": lambda x, y: np.maximum(  # a square on its corner, and a disc on either of its upper sides
        0.586 - (abs(x) + abs(y - 0.086)) / math.sqrt(2), _disc(abs(x) - 0.414, y + 0.328, 0.586)
    ),
    "crescent": lambda x, y: np.minimum(_disc(x, y, 1), -_disc(x - 0.6, y, 0.8)),
}

SHAPES = tuple(_DISTANCE)

# The colors are near the eight corners of the RGB cube, as far as possible from each other and from the grey ground.
COLORS = {
    "red": (225, 40, 40),
    "green": (0, 170, 55),
    "blue": (30, 60, 235),
    "yellow": (250, 220, 40),
    "cyan": (50, 215, 230),
    "pink": (245, 60, 200),
    "black": (20, 20, 24),
    "white": (250, 250, 250),
}
BACKGROUND = (128, 128, 128)

# Half the side of the square around an object, by the number of objects of the scene.
RADII = {1: {"small": 0.22, "large": 0.3}, 2: {"small": 0.13, "large": 0.2}}
SIZES = ("small", "large")
MIN_RESOLUTION = 16

_COLORED_SHAPES = [f"{color} {shape}" for shape in SHAPES for color in COLORS]
_LABEL_NAMES = {"shape": list(SHAPES), "shape_color": _COLORED_SHAPES, None: []}
_GAP = 0.06  # smallest distance of two objects along x or y; half of it is that of an object to the border
_SAMPLES = 2  # points per pixel and axis at which the distance from an outline is taken


@dataclass(frozen=True)
class Object:
    """One object of a scene; its names are of `SHAPES`, `COLORS` and `SIZES`."""

    shape: str
    color: str
    size: str
    center: tuple[float, float]  # (x, y) of the middle of the square around the object

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


def caption(objects: Sequence[Object]) -> str:
    """The caption of one or two objects, such as "a small red circle above a large blue square"; the relation is along
    the axis on which the distance of their centers is larger."""
    if len(objects) == 1:
        return f"a {objects[0]}"
    first, second = objects
    dx, dy = np.subtract(first.center, second.center)
    if abs(dx) > abs(dy):
        relation = "left of" if dx < 0 else "right of"
    else:
        relation = "above" if dy < 0 else "below"
    return f"a {first} {relation} a {second}"


def draw(objects: Sequence[Object], resolution: int | tuple[int, int] = 32) -> PIL.Image.Image:
    """Draws one or two objects, antialiased, as an RGB image on a ground of the color `BACKGROUND`. Objects cover
    earlier ones, and are cut off at the border. The resolution is a side, or (height, width), in pixels."""
    height, width = height_width(resolution)
    unit = min(height, width)
    pixels = np.full((height, width, 3), BACKGROUND, dtype=np.float64)
    for item in objects:
        (x, y), r = np.multiply(item.center, unit), RADII[len(objects)][item.size] * unit
        left, right = max(math.floor(x - r), 0), min(math.ceil(x + r), width)
        top, bottom = max(math.floor(y - r), 0), min(math.ceil(y + r), height)
        window = pixels[top:bottom, left:right]
        alpha = coverage(item.shape, x - left, y - top, r, *window.shape[:2])[..., None]
        window += alpha * (np.array(COLORS[item.color]) - window)
    return PIL.Image.fromarray(np.rint(pixels).astype(np.uint8))


class ShapesDataset(torch.utils.data.Dataset):
    """Drawn images of simple shapes with exact labels and captions.

    `dataset[i]` is `{"image": PIL.Image, "label": int, "caption": str}`, the same in every process and order. Shape,
    color and size are uniformly distributed. Two objects are independent, except that a vertical or horizontal strip
    of ground separates them: they never touch, and each as a whole is above, below, left or right of the other.

    Args:
        num_images (`int`): Length of the data set; image i does not depend on it.
        resolution (`int` or `tuple[int, int]`): Side, or (height, width), in pixels, at least 16.
        seed (`int`): From 0 to 2⁶⁴ - 1.
        num_objects (`int`): 1 or 2.
        label (`str` or `None`): "shape" for the 8 names of `SHAPES`, "shape_color" for 64 names such as "red circle",
            `None` for items without "label", which two objects need.
        exclude (`str` or sequence of `str`): Shapes ("heart") and colored shapes ("red circle") that never occur. Only
            images that would have shown them change. `label_names` and the numbers of labels do not.

    Raises:
        ValueError: If an argument is none of the above, or nothing is left to draw.
    """

    def __init__(
        self,
        num_images: int = 8192,
        resolution: int | tuple[int, int] = 32,
        seed: int = 0,
        num_objects: int = 1,
        label: Literal["shape", "shape_color"] | None = "shape",
        exclude: str | Sequence[str] = (),
    ):
        if num_images < 1:
            raise ValueError(f"num_images: {num_images} is not positive; ask for at least one image")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: {seed} is outside the range from 0 to 2**64 - 1")
        if num_objects not in (1, 2):
            raise ValueError(f"num_objects: {num_objects} is neither 1 nor 2")
        if label not in _LABEL_NAMES:
            raise ValueError(f"label: {label!r} is none of 'shape', 'shape_color' and None")
        if label is not None and num_objects == 2:
            raise ValueError(f"label: two objects have no single {label!r}; pass label=None and use their caption")
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        for name in self.exclude:
            check_name("exclude", name)
        if all({name, name.split()[1]} & set(self.exclude) for name in _COLORED_SHAPES):
            raise ValueError("exclude: all shapes are excluded; leave at least one to draw")
        self.num_images, self.resolution, self.seed = num_images, height_width(resolution), seed
        self.num_objects, self.label = num_objects, label

    @property
    def label_names(self) -> list[str]:
        """The name of each label, in order, excluded ones too; empty if items have no label."""
        return list(_LABEL_NAMES[self.label])

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict:
        objects = self.scene(index)
        item = {"image": draw(objects, self.resolution), "caption": caption(objects)}
        if self.label is not None:
            name = objects[0].shape if self.label == "shape" else f"{objects[0].color} {objects[0].shape}"
            item["label"] = _LABEL_NAMES[self.label].index(name)
        return item

    def scene(self, index: int) -> tuple[Object, ...]:
        """The objects of image `index`, in the order of its caption."""
        if not 0 <= index < self.num_images:
            raise IndexError(f"index: {index} is not one of the {self.num_images} images, counted from 0")
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], dtype=np.uint64)))
        kinds = [self._draw_kind(rng) for _ in range(self.num_objects)]
        radii = np.array([[RADII[self.num_objects][size]] for _, _, size in kinds])
        height, width = self.resolution
        low = radii + _GAP / 2
        high = np.array([width, height]) / min(height, width) - low
        while True:
            centers = low + (high - low) * rng.random((self.num_objects, 2))
            if self.num_objects == 1 or abs(centers[0] - centers[1]).max() >= radii.sum() + _GAP:
                break
        return tuple(Object(*kind, tuple(center)) for kind, center in zip(kinds, centers.tolist(), strict=True))

    def _draw_kind(self, rng: np.random.Generator) -> tuple[str, str, str]:
        while True:
            shape, color, size = (names[rng.integers(len(names))] for names in (SHAPES, tuple(COLORS), SIZES))
            if shape not in self.exclude and f"{color} {shape}" not in self.exclude:
                return shape, color, size


def height_width(resolution: int | Sequence[int]) -> tuple[int, int]:
    height, width = resolution if isinstance(resolution, Sequence) else (resolution, resolution)
    if min(height, width) < MIN_RESOLUTION:
        raise ValueError(f"resolution: {height}x{width} is too small for shapes; use at least {MIN_RESOLUTION}")
    return height, width


def check_name(argument: str, name: str) -> None:
    known = [*SHAPES, *_COLORED_SHAPES]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise ValueError(f"{argument}: {name!r} is not a shape or colored shape; did you mean {close!r}?")


def coverage(shape: str, x, y, radius, height: int, width: int) -> np.ndarray:
    """Share of each pixel that a shape covers, (..., height, width), for numbers or arrays (..., 1, 1) in pixels."""
    columns = (np.arange(width * _SAMPLES, dtype=np.float32) + 0.5) / _SAMPLES
    rows = (np.arange(height * _SAMPLES, dtype=np.float32) + 0.5)[:, None] / _SAMPLES
    distance = _DISTANCE[shape]((columns - x) / radius, (rows - y) / radius) * radius  # in pixels
    inside = np.clip(distance * _SAMPLES + 0.5, 0, 1)
    return sum(inside[..., i::_SAMPLES, j::_SAMPLES] for i in range(_SAMPLES) for j in range(_SAMPLES)) / _SAMPLES**2
