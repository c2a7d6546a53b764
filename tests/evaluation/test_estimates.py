"""Intervals."""

import pytest
import torch
from tiny import randn

from hf_genmod.evaluation.estimates import Estimate, with_interval


def test_intervals_cover_the_truth_nineteen_times_in_twenty():
    # Of a mean, whose standard error is known and whose coverage thus can be counted.
    covered, widths = 0, []
    for i in range(300):
        estimate = with_interval(lambda x: x.mean().item(), randn(100, 1, seed=i) + 3, seed=i)
        covered += estimate.low <= 3 <= estimate.high
        widths.append(estimate.high - estimate.low)
    assert 0.90 <= covered / 300 <= 0.98
    assert sum(widths) / 300 == pytest.approx(2 * 1.96 / 10, rel=0.05)


def test_an_estimate_is_a_mean_and_its_standard_error():
    estimate = Estimate.of(randn(400, 1)[:, 0])
    assert estimate.value == pytest.approx(randn(400, 1).mean().item())
    assert estimate.standard_error == pytest.approx(randn(400, 1).std().item() / 20)
    assert estimate == Estimate.with_error(estimate.value, 400, estimate.standard_error)
    assert str(Estimate(1.2345, 1000, 1.1, 1.36)) == "1.23 (1.1–1.36, n = 1000)"


def test_a_single_value_has_no_error():
    estimate = Estimate.of(torch.tensor([3.0]))
    assert (estimate.low, estimate.value, estimate.high, estimate.count) == (3.0, 3.0, 3.0, 1)
