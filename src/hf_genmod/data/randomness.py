"""The randomness of training: the order of the images, the numbers drawn in a step, and what varies images.

All random numbers are a function of (seed, step, position in the global batch), by counter-based generators: nothing
has to be replayed to resume a run, and any number of processes sees the same global batches.

    sampler = GlobalBatchSampler(len(dataset), batch_size=128, seed=0)
    for step, batch in enumerate(DataLoader(dataset, batch_sampler=sampler, collate_fn=identity)):
        rng = batch_random(seed=0, step=step, positions=batch_positions(128), batch_size=128, device="cuda")
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from hf_genmod.processes import upload


class _Philox:
    """Random numbers of a seed and a stream as functions of a counter such as (draw, step, position). Philox (Salmon
    et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a function of a key of 128 bits and a counter of 256
    bits, whose lowest quarter counts the numbers: no seeds are hashed, and streams do not overlap."""

    def __init__(self, seed: int, stream: bytes):
        key = np.array([seed % 2**64, int.from_bytes(stream, "big")], dtype=np.uint64)
        self._bits = np.random.Philox(key=key)
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state

    def at(self, *counter: int) -> np.random.Generator:
        """The generator, set to (0, *counter)."""
        self._state["state"]["counter"][:] = (0, *counter)
        self._bits.state = self._state
        return self._generator


def batch_positions(
    batch_size: int, micro_step: int = 0, accumulation: int = 1, process_index: int = 0, num_processes: int = 1
) -> torch.Tensor:
    """Positions in the global batch of one micro-batch, `int64` (batch_size / accumulation / num_processes,). They are
    interleaved, so that each micro-batch has its even share of `BatchRandom.stratified`. Raises a `ValueError` if the
    batch cannot be shared evenly."""
    parts = accumulation * num_processes
    if batch_size < 1 or batch_size % parts:
        shares = f"{num_processes} processes x {accumulation} gradient accumulation steps"
        raise ValueError(f"batch_size: {batch_size} cannot be shared evenly among {shares}; use a multiple of {parts}")
    return torch.arange(micro_step * num_processes + process_index, batch_size, parts)


class GlobalBatchSampler(torch.utils.data.Sampler):
    """
    The indices of this process's micro-batches, without end, for `DataLoader(batch_sampler=...)`. Accelerate must not
    prepare it.

    Place g = step · batch_size + position of the endless sequence shows image π_e(g mod n), e = ⌊g / n⌋, where the
    permutation π_e of the n images derives from (seed, e): every image occurs once in each epoch, and a step's batch
    depends on neither the steps before nor the number of processes.

    Args:
        num_pictures (`int`): n; may be less than a batch.
        batch_size (`int`): Images in an optimizer step, over all processes and gradient accumulation steps.
        start_step (`int`): The first optimizer step; to resume, the number of steps done.
        parts (`Sequence[torch.Tensor]`, *optional*): The positions of each micro-batch of this process, from
            `batch_positions`; by default one with the whole batch.
        order (`Callable`, *optional*): `(philox, epoch, batch_size) -> π_e`, a sequence, of a data set that is not
            read in any order, see [`~hf_genmod.data.block_order.BlockOrder`].

    Raises:
        ValueError: If there are no images.
    """

    def __init__(
        self,
        num_pictures: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        parts: Sequence[torch.Tensor] = (),
        order: Callable | None = None,
    ):
        if num_pictures < 1:
            raise ValueError(f"num_pictures: {num_pictures} is not positive; there is nothing to sample")
        self.num_pictures, self.batch_size, self.seed, self.start_step = num_pictures, batch_size, seed, start_step
        self.parts = [positions.numpy() for positions in parts or [batch_positions(batch_size)]]
        self.order = order or (lambda philox, epoch, _: philox.at(0, 0, epoch).permutation(num_pictures))

    def of_epoch(self, epoch: int) -> Sequence[int]:
        """π_e."""
        return self.order(_Philox(self.seed, b"order"), epoch, self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = functools.lru_cache(2)(self.of_epoch)
        for step in itertools.count(self.start_step):
            for positions in self.parts:
                epochs, places = np.divmod(step * self.batch_size + positions, self.num_pictures)
                yield [int(order(epoch)[place]) for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)]


class BatchRandom:
    """
    The random numbers of a training step for the images at `positions` of its global batch.

    Each image has numbers of its own, a function of (seed, step, position) and of how many calls came before, whatever
    the processes, micro-batches, device and dtype of the model: all are drawn in fp32 on the CPU.

    Args:
        positions (`torch.Tensor` or `Sequence[int]`): (n,), from `batch_positions`.
        batch_size (`int`): Of the global batch.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        positions: torch.Tensor | Sequence[int],
        batch_size: int,
        device: torch.device | str = "cpu",
    ):
        self.positions, self.batch_size, self.device = torch.as_tensor(positions).cpu(), batch_size, device
        self._places = self.positions  # on the device on which `_draw` draws
        self._philox, self._step, self._num_draws = _Philox(seed, b"step"), step, 0

    def __len__(self) -> int:
        return len(self.positions)

    def normal(self, *shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Standard normal numbers, (n, *shape), the shape as in `torch.randn`; drawn in fp32 whatever the dtype."""
        return self._draw("standard_normal", shape).to(self.device, dtype)

    def uniform(self, *shape: int | tuple[int, ...]) -> torch.Tensor:
        """Uniform numbers in [0, 1), (n, *shape)."""
        return self._draw("random", shape).to(self.device)

    def stratified(self) -> torch.Tensor:
        """Uniform numbers in [0, 1), (n,): (position + u) / batch_size, evenly spread over the global batch."""
        spread = (self._places + self._draw("random", ()).double()) / self.batch_size
        return spread.float().clamp(max=1 - 2**-24).to(self.device)  # the cast can round up to 1

    def on_host(self) -> list[float]:
        """Uniform numbers in [0, 1), one for each image, for what the host decides."""
        return BatchRandom._draw(self, "random", ()).tolist()

    def _draw(self, distribution: str, shape: tuple) -> torch.Tensor:
        shape = _of_shape(shape)
        numbers = np.empty((len(self), math.prod(shape)), dtype=np.float32)
        for position, row in zip(self.positions.tolist(), numbers, strict=True):
            generator = self._philox.at(self._num_draws, self._step, position)
            getattr(generator, distribution)(dtype=np.float32, out=row)
        self._num_draws += 1
        return torch.from_numpy(numbers).reshape(len(self), *shape)


class DeviceRandom(BatchRandom):
    """
    Other numbers with the same properties, drawn on the device, so that it does not wait for the host: SplitMix64
    (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195) from a start that is a hash of (seed, step,
    position), and the transform of Box and Muller (1958).
    """

    def __init__(self, seed, step, positions, batch_size, device):
        super().__init__(seed, step, positions, batch_size, device)
        starts = torch.tensor(_signed(seed))
        for number in (step, self.positions):
            starts = _mixed_(starts + number + _GAMMA)
        self._starts = upload(starts, device)[:, None]  # (n, 1)
        self._places = upload(self.positions, device)

    def _draw(self, distribution: str, shape: tuple) -> torch.Tensor:
        shape, is_normal = _of_shape(shape), distribution == "standard_normal"
        count, of_32_bits = math.prod(shape), 2**32
        words = torch.arange(1, (count + 1) // 2 + 1 if is_normal else count + 1, device=self.device) * _GAMMA
        words = _mixed_(words + (self._starts + _signed(self._num_draws * _DRAW)))  # (n, words), of 64 bits
        self._num_draws += 1
        if is_normal:
            radius = ((((words >> 32) & (of_32_bits - 1)).float() + 1) / of_32_bits).log_().mul_(-2).sqrt_()
            angle = (words & (of_32_bits - 1)).float() * (2 * math.pi / of_32_bits)
            numbers = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]
        else:
            numbers = ((words >> 40) & (2**24 - 1)).float() / 2**24
        return numbers.reshape(len(self), *shape)


def batch_random(seed: int, step: int, positions, batch_size: int, device: torch.device | str = "cpu") -> BatchRandom:
    """The random numbers of a training step as the device draws them fastest; arguments as of [`BatchRandom`]."""
    kind = DeviceRandom if torch.device(device).type == "cuda" else BatchRandom
    return kind(seed, step, positions, batch_size, device)


def _of_shape(shape: tuple) -> tuple[int, ...]:
    """The arguments of `torch.randn`, numbers or one tuple, as a tuple."""
    return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape


def _signed(number: int) -> int:
    """A number modulo 2^64, as `int64` holds it."""
    return (number + 2**63) % 2**64 - 2**63


_GAMMA = _signed(0x9E3779B97F4A7C15)  # the step of SplitMix64
_DRAW = 0xD1342543DE82EF95  # how far the starts of two draws are apart


def _mixed_(words: torch.Tensor) -> torch.Tensor:
    """The output of SplitMix64 for its states, `int64`, in their place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words ^= (words >> shift) & (2 ** (64 - shift) - 1)
        words *= _signed(factor)
    words ^= (words >> 31) & (2**33 - 1)
    return words


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How a data set varies its images in training."""

    mirror: bool = False  # each image left to right with probability 1/2
    max_shift: int = 0  # by how many pixels at most each image is moved along each axis


def flip(images: torch.Tensor, rng: BatchRandom) -> torch.Tensor:
    """Mirrors each image of (n, C, H, W) left to right with probability 1/2."""
    mirrored = rng.uniform() < 0.5  # (n,)
    return torch.where(mirrored[:, None, None, None].to(images.device), images.flip(-1), images)


def shift(images: torch.Tensor, rng: BatchRandom, max_shift: int) -> torch.Tensor:
    """Moves each image of (n, C, H, W) by up to `max_shift` pixels along each axis; the gap repeats its edge."""
    corners = ((2 * max_shift + 1) * rng.uniform(2)).long().to(images.device)  # (n, 2)
    return cut(F.pad(images, [max_shift] * 4, mode="replicate"), corners, images.shape[2:])


def cut(images: torch.Tensor, corners: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Crops each image of (n, C, H, W) to `size`, (height, width), from its corner, (top, left) of (n, 2), on."""
    rows, columns = (
        corners[:, axis, None] + torch.arange(length, device=images.device) for axis, length in enumerate(size)
    )  # (n, height), (n, width)
    of_image = torch.arange(len(images), device=images.device)[:, None, None]
    return images[of_image, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
