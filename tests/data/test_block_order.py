import collections

import numpy as np
import pytest

from hf_genmod.data.block_order import BlockOrder, lanes_and_window
from hf_genmod.data.randomness import GlobalBatchSampler, _Philox, batch_positions

SIZES = {
    "one": [7],
    "uneven": [10, 3, 1, 25, 8, 0, 13, 10, 10, 10, 4, 9],
    "many": [5] * 60,
    "fewer rows than lanes": [2, 3],
}


def batches(sizes, batch_size, num_steps, num_lanes, window, seed=0, process=0, num_processes=1, start=0):
    """The rows of the micro-batches of a process."""

    def order(philox, epoch, batch_size):
        return BlockOrder(np.array(sizes), batch_size, num_lanes, window, philox, epoch)

    parts = [batch_positions(batch_size, process_index=process, num_processes=num_processes)]
    sampler = iter(GlobalBatchSampler(sum(sizes), batch_size, seed, start, parts, order))
    return [next(sampler) for _ in range(start, num_steps)]


@pytest.mark.parametrize("batch_size", [6, 16])
@pytest.mark.parametrize(("num_lanes", "window"), [(1, 1), (4, 3), (64, 2), (64, 1000)])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_row_occurs_once_in_each_epoch(sizes, num_lanes, window, batch_size):
    n = sum(sizes)
    rows = np.concatenate(batches(sizes, batch_size, -(-3 * n // batch_size), num_lanes, window))
    epochs = rows[: 3 * n].reshape(3, n)
    assert all(np.array_equal(np.sort(epoch), np.arange(n)) for epoch in epochs)
    assert n < 20 or not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("num_processes", [2, 4])
def test_any_number_of_processes_and_a_run_that_is_continued_see_the_same_batches(num_processes):
    settings = SIZES["uneven"], 8, 40, 16, 3
    whole = batches(*settings)
    shares = [batches(*settings, process=k, num_processes=num_processes) for k in range(num_processes)]
    for step, batch in enumerate(whole):
        joined = [None] * 8
        for k, share in enumerate(shares):
            joined[k::num_processes] = share[step]
        assert joined == batch
    assert batches(*settings, start=17) == whole[17:]
    assert batches(*settings, seed=1) != whole


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 4), (8, 8)])
def test_processes_and_their_loaders_read_other_blocks(num_processes, num_workers):
    sizes, num_lanes, epochs = np.full(500, 10), 64, 2
    owner, readers = np.repeat(np.arange(500), 10), collections.defaultdict(set)
    num_steps = epochs * 5000 // 40
    for process in range(num_processes):
        rows = batches(sizes, 40, num_steps, num_lanes, 30, process=process, num_processes=num_processes)
        for step, batch in enumerate(rows):
            for row in batch:
                epoch = int(step >= num_steps // epochs)
                readers[epoch, owner[row]].add((process, step % num_workers))
    read = sum(map(len, readers.values()))
    assert epochs * 500 <= read <= epochs * (500 + num_lanes)  # a block at the border of two lanes belongs to both


@pytest.mark.parametrize(
    ("num_blocks", "mebibytes", "num_lanes", "num_loaders"),
    [(3000, 2, 64, [0, 1, 2, 4, 8]), (1000, 5, 16, [0, 1, 2])]
    + [(600, 11, 8, [0, 1]), (90, 8, 8, [0, 1]), (400, 1, 1, [0, 1]), (6, 200, 1, [0, 1]), (30, 500, 1, [0, 1])],
)
def test_each_block_is_read_once_in_an_epoch_into_the_memory_for_blocks(num_blocks, mebibytes, num_lanes, num_loaders):
    """Of 512 MiB, of which each loader process has its share and keeps the blocks that it used last."""
    buffer, epochs, batch_size = 512, 2, 64
    sizes = np.random.default_rng(0).integers(5, 16, num_blocks)
    lanes, window = lanes_and_window(sizes, np.full(num_blocks, mebibytes), buffer)
    assert lanes == num_lanes
    settings = batch_size, epochs * sizes.sum() // batch_size, lanes, window
    steps, owner = batches(sizes, *settings), np.repeat(np.arange(num_blocks), sizes)
    order = BlockOrder(sizes, batch_size, lanes, window, _Philox(0, b"order"), 0)
    assert sorted({order.num_loaders(most) for most in range(9)}) == num_loaders
    for loaders in num_loaders:
        num_read = 0
        for loader in range(max(loaders, 1)):
            kept = collections.OrderedDict()
            for row in np.concatenate(steps[loader :: max(loaders, 1)]):
                num_read += owner[row] not in kept
                kept[owner[row]] = None
                kept.move_to_end(owner[row])
                if len(kept) * mebibytes > max(buffer // max(loaders, 1), 2.5 * mebibytes):
                    kept.popitem(last=False)
        assert num_read <= 1.15 * epochs * num_blocks  # some are at the border of two lanes, or used once more later


def test_the_rows_of_a_lane_come_from_one_window_after_the_other():
    sizes, window, num_lanes = np.full(64, 10), 40, 4
    order = BlockOrder(sizes, 4, num_lanes, window, _Philox(0, b"order"), 0)
    lane = [order[place] for place in range(0, 640, 4)]  # the position 0
    blocks = [row // 10 for row in lane]
    for start in range(0, len(lane), window):
        assert len(set(blocks[start : start + window])) <= window // 10 + 1
    assert sorted(set(blocks), key=blocks.index) != sorted(set(blocks))
    assert lane != sorted(lane)


def test_a_batch_is_mixed_from_all_over_the_rows():
    means = [np.mean(batch) for batch in batches([100] * 1000, 64, 100, 64, 1000)]
    # The standard deviation is 3,608 for 64 independent numbers below 100,000, and 28,868 for 64 neighbours.
    assert np.std(means) < 7000
