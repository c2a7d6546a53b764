"""The order in which the rows of blocks are read: at random, but from a few blocks at a time."""

import math

import numpy as np

_MOST_LANES = 64


def lanes_and_window(sizes: np.ndarray, num_bytes: np.ndarray, buffer: int) -> tuple[int, int]:
    """The number of lanes, a power of two, and of rows in a window, for blocks of so many rows and bytes. The windows
    of all lanes, with two more blocks for each, fit into `buffer` bytes, or two and a half blocks if that is more, so
    that a process, or `num_loaders` of them with their share of these bytes, reads each block about once. Blocks that
    fit as a whole are one window."""
    largest, total = int(num_bytes.max()), int(num_bytes.sum())
    most = 1 if total <= buffer else min(_MOST_LANES, buffer // (4 * largest), len(sizes) // 8)
    num_lanes = 2 ** max(0, most.bit_length() - 1)
    of_lane = buffer if total <= buffer else max(buffer // num_lanes - 2 * largest, largest // 2)  # bytes
    return num_lanes, max(1, of_lane * int(sizes.sum()) // total)


class BlockOrder:
    """
    The rows of one epoch of a data set that is read by blocks, as a function of their place, so that nothing is
    replayed to resume.

    The blocks are in a random order and their rows behind each other, in as many intervals as there are lanes. Place
    g = step · batch_size + position of the endless sequence takes the next row of the lane (step mod S, position mod
    P), so that each of up to P processes, and of up to S loader processes that take steps in turn, reads other blocks,
    if these numbers are powers of two. A lane takes its rows
    from windows of consecutive rows, those of a window in a random order. Every row occurs once in an epoch.

    Args:
        sizes (`np.ndarray`): The number of rows in each block, `int64` (blocks,).
        batch_size (`int`): Images in an optimizer step.
        num_lanes (`int`): P · S, a power of two; P is the largest common divisor of it, 8 and the batch size.
        window (`int`): The number of rows in a window.
        philox (`_Philox`): The random numbers, of which this order takes those of the counters (1, place, epoch).
        epoch (`int`): The epoch, from 0 on.
    """

    def __init__(self, sizes: np.ndarray, batch_size: int, num_lanes: int, window: int, philox, epoch: int):
        self.batch_size, self.window, self.epoch, self._philox = batch_size, window, epoch, philox
        self.num_positions = math.gcd(num_lanes, 8, batch_size)
        self.num_steps = num_lanes // self.num_positions
        self.blocks = philox.at(0, 0, epoch).permutation(len(sizes))
        self.ends = sizes[self.blocks].cumsum()
        self.first_rows = (sizes.cumsum() - sizes)[self.blocks]
        self.start = epoch * int(self.ends[-1])
        lanes = [(step, position) for step in range(self.num_steps) for position in range(self.num_positions)]
        self.before = {lane: self._count(self.start, *lane) for lane in lanes}
        stop, offset, self.intervals = self.start + int(self.ends[-1]), 0, {}
        for lane in lanes:
            size = self._count(stop, *lane) - self.before[lane]
            self.intervals[lane] = offset, size
            offset += size
        self._windows = {}

    def __getitem__(self, place: int) -> int:
        """The row at a place of the epoch."""
        step, position = divmod(self.start + place, self.batch_size)
        lane = step % self.num_steps, position % self.num_positions
        offset, size = self.intervals[lane]
        index = self._count(self.start + place, *lane) - self.before[lane]  # in the lane
        # The lanes begin in the midst of a window, each at another place, to read their next blocks at other times.
        shift = (lane[0] * self.num_positions + lane[1]) * self.window // len(self.intervals)
        number = (index + shift) // self.window
        low, high = max(number * self.window - shift, 0), min((number + 1) * self.window - shift, size)
        if self._windows.get(lane, (None,))[0] != low:
            self._windows[lane] = low, self._philox.at(1, offset + low, self.epoch).permutation(high - low)
        row = offset + low + int(self._windows[lane][1][index - low])  # of the blocks behind each other
        block = int(self.ends.searchsorted(row, side="right"))
        return int(self.first_rows[block]) + row - int(self.ends[block - 1] if block else 0)

    def num_loaders(self, most: int) -> int:
        """How many of up to `most` loader processes can share the blocks, so that each reads other ones."""
        return 2 ** (min(most, self.num_steps).bit_length() - 1) if most else 0

    def _count(self, places: int, step: int, position: int) -> int:
        """How many of the first places of the endless sequence belong to a lane."""
        rounds, rest = divmod(places, self.num_steps * self.batch_size)
        rest = min(max(rest - step * self.batch_size, 0), self.batch_size)  # positions of the lane's step
        in_rest = max(0, -(-(rest - position) // self.num_positions))
        return rounds * (self.batch_size // self.num_positions) + in_rest
