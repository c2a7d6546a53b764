import functools
import itertools

import pytest
import torch
from tiny import assert_rounded_alike

from hf_genmod.data import randomness
from hf_genmod.data.randomness import BatchRandom, DeviceRandom, GlobalBatchSampler, batch_positions, flip, shift

KINDS = [BatchRandom, functools.partial(DeviceRandom, device="cpu")]


def first(count, batches):
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("batch_size", [4, 10, 24])
def test_every_picture_once_per_epoch(batch_size):
    n, epochs = 10, 6
    batches = first(-(-n * epochs // batch_size), GlobalBatchSampler(n, batch_size, seed=3))
    served = torch.tensor([index for batch in batches for index in batch])[: n * epochs].view(epochs, n)
    assert torch.equal(served.sort(1).values, torch.arange(n).expand(epochs, n))
    assert len({tuple(order) for order in served.tolist()}) == epochs
    assert first(2, GlobalBatchSampler(n, batch_size, seed=4)) != batches[:2]


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("num_pictures", [5, 37])
def test_processes_share_the_same_global_batches(num_processes, accumulation, num_pictures):
    whole = first(5, GlobalBatchSampler(num_pictures, 16, seed=1))
    parts = [
        first(5 * accumulation, GlobalBatchSampler(num_pictures, 16, 1, 0, micro_batches))
        for micro_batches in (
            [batch_positions(16, part, accumulation, process, num_processes) for part in range(accumulation)]
            for process in range(num_processes)
        )
    ]
    for step, expected in enumerate(whole):
        batch = [None] * 16
        for micro_step in range(accumulation):
            for process in range(num_processes):
                positions = batch_positions(16, micro_step, accumulation, process, num_processes)
                indices = parts[process][step * accumulation + micro_step]
                for position, index in zip(positions.tolist(), indices, strict=True):
                    assert batch[position] is None
                    batch[position] = index
        assert batch == expected


def test_start_step_equals_skipping():
    halves = [batch_positions(8, part, accumulation=2) for part in range(2)]
    whole = first(24, GlobalBatchSampler(23, 8, 0, parts=halves))
    assert first(14, GlobalBatchSampler(23, 8, 0, start_step=5, parts=halves)) == whole[10:]


def test_batches_that_cannot_be_shared_or_filled():
    with pytest.raises(ValueError, match="batch_size: 10 cannot be shared .* 2 processes x 2 .* a multiple of 4"):
        batch_positions(10, accumulation=2, num_processes=2)
    with pytest.raises(ValueError, match="batch_size: 0 cannot be shared"):
        GlobalBatchSampler(100, 0, 0)
    with pytest.raises(ValueError, match="num_pictures: 0 is not positive"):
        GlobalBatchSampler(0, 10, 0)


def draw(rng):
    return torch.cat([rng.normal(2, 3).flatten(1), rng.uniform(4), rng.normal((5,)), rng.uniform()[:, None]], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_randomness_belongs_to_seed_step_and_position(kind):
    whole = draw(kind(0, 7, range(8), 8))
    for process in range(4):
        positions = batch_positions(8, process_index=process, num_processes=4)
        assert_rounded_alike(draw(kind(0, 7, positions, 8)), whole[positions])
        assert torch.equal(kind(0, 7, positions, 8).uniform(5), kind(0, 7, range(8), 8).uniform(5)[positions])
    assert torch.equal(draw(kind(0, 7, range(8), 512)), whole)
    for seed, step in ((1, 7), (0, 8), (2**32, 7), (2**63 + 7, 7)):
        other = draw(kind(seed, step, range(8), 8))
        assert not torch.isin(other, whole).any()  # 32 numbers of 24 bits hardly ever meet
    rng = kind(0, 7, range(8), 8)
    assert not torch.equal(rng.normal(3), rng.normal(3))  # a stream moves on
    assert len(whole.unique()) > 0.99 * whole.numel()
    low = kind(0, 7, range(8), 8).normal(2, 3, dtype=torch.bfloat16)
    assert torch.equal(low, kind(0, 7, range(8), 8).normal(2, 3).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_distributions(kind):
    rng = kind(5, 0, range(64), 64)
    z, u = rng.normal(3, 16, 16), rng.uniform(500)
    assert z.shape == (64, 3, 16, 16) and z.dtype == u.dtype == torch.float32
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5 and abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    correlation = torch.corrcoef(z.flatten(1)) - torch.eye(64)
    assert correlation.abs().max() < 6 / z[0].numel() ** 0.5
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 5 / (12 * u.numel()) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_stratified_puts_one_picture_in_each_stratum(kind):
    for step in range(20):
        t = kind(0, step, range(32), 32).stratified()
        assert torch.equal((t * 32).long(), torch.arange(32))
    share = kind(0, 0, batch_positions(32, num_processes=4, process_index=1), 32).stratified()
    assert torch.equal((share * 8).long(), torch.arange(8))  # each process has an even share

    rng = BatchRandom(0, 0, [2**20 - 1], 2**20)
    rng._draw = lambda distribution, shape: torch.tensor([1 - 2**-24])
    assert rng.stratified() < 1  # rounds up to 1 in fp32 if left to itself


def test_the_device_draws_the_words_of_splitmix64():
    """The first outputs of the published generator for the seed 1234567."""
    states = 1234567 + torch.arange(1, 6) * randomness._GAMMA
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [word % 2**64 for word in randomness._mixed_(states).tolist()] == expected


def test_numbers_for_the_host_are_those_of_the_host():
    on_device, on_host = (kind(0, 7, range(8), 8) for kind in reversed(KINDS))
    on_device.normal(3), on_host.normal(3)
    assert on_device.on_host() == on_host.uniform().tolist()


def test_flip_mirrors_half_of_the_pictures():
    images = torch.randint(0, 256, (1000, 3, 2, 4), dtype=torch.uint8)
    flipped = flip(images, BatchRandom(0, 0, range(1000), 1000))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert torch.equal(mirrored, ~kept) and 420 < mirrored.sum() < 580
    assert torch.equal(flip(images[10:20], BatchRandom(0, 0, range(10, 20), 1000)), flipped[10:20])


def test_shift_moves_each_picture_evenly_by_up_to_so_many_pixels_and_repeats_its_edge():
    count, height, width = 2000, 5, 6
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    images = torch.stack([rows, columns]).float().expand(count, -1, -1, -1)
    shifted = shift(images, BatchRandom(0, 0, range(count), count), 2)
    moves = (shifted[:, :, 2, 2] - 2).long()  # the position shows what was so much further, down and right
    for picture, (down, right) in zip(shifted, moves.tolist(), strict=True):
        assert torch.equal(picture[0], (rows + down).clamp(0, height - 1).float())
        assert torch.equal(picture[1], (columns + right).clamp(0, width - 1).float())
    counts = torch.stack([torch.bincount(along + 2, minlength=5) for along in moves.T])
    assert counts.shape == (2, 5) and (counts - count / 5).abs().max() < 80  # 4.5 standard deviations
    assert torch.equal(shift(images[10:20], BatchRandom(0, 0, range(10, 20), count), 2), shifted[10:20])
