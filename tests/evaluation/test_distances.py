"""Fréchet and kernel distance."""

import math

import pytest
import torch
from tiny import randn

from hf_genmod.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance


def gaussian_features(n, d, mean, covariance_root, seed=0):
    """n features whose mean and covariance are exactly `mean` and `covariance_root @ covariance_root.T`."""
    x = randn(n, d, seed=seed)
    x = x - x.mean(dim=0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1)))
    return x @ whitening.T @ covariance_root.T + mean


@pytest.mark.parametrize("d, n", [(2, 50), (16, 100), (64, 1000)])
def test_frechet_distance_equals_the_matrix_square_root(d, n):
    linalg = pytest.importorskip("scipy.linalg", reason="the reference is scipy's matrix square root")
    a = randn(n, d) @ randn(d, d, seed=1)
    b = randn(2 * n, d, seed=2) @ randn(d, d, seed=3) + 0.5
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.from_numpy(linalg.sqrtm((cov_a @ cov_b).numpy()).real)
    expected = (a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), abs=1e-4)


def test_frechet_distance_of_commuting_covariances_in_closed_form():
    # Σ_a and Σ_b share the eigenvectors Q, so that Tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^{1/2}) = Σ_i (s_i - t_i)².
    d = 12
    q = torch.linalg.qr(randn(d, d)).Q
    s, t = randn(d, seed=1).abs(), randn(d, seed=2).abs()
    shift = randn(d, seed=3)
    a = gaussian_features(100, d, torch.zeros(d), q * s, seed=4)
    b = gaussian_features(80, d, shift, q * t, seed=5)
    expected = shift.square().sum() + (s - t).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_of_a_shift_is_its_squared_length():
    a = randn(200, 8) @ randn(8, 8, seed=1)
    shift = torch.arange(8.0)
    assert frechet_distance(a, a + shift) == pytest.approx(140.0, rel=1e-10)


def test_frechet_distance_of_a_scaling_of_one_feature():
    # One dimension: (σ - cσ)² + (μ - cμ)².
    a = torch.tensor([[1.0], [2.0], [3.0]])  # μ = 2, σ = 1
    assert frechet_distance(a, 3 * a) == pytest.approx(4.0 + 16.0, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_frechet_distance_of_equal_sets_is_zero(scale):
    features = scale * randn(300, 64) @ randn(64, 64, seed=1) / 8 + 3
    features[:, 5] = 0  # a dead feature: a singular covariance
    features[:, 6] = features[:, 7]
    assert 0 <= frechet_distance(features, features) < 1e-6
    assert frechet_distance(features, features.flip(0)) < 1e-6


def test_frechet_distance_is_symmetric_and_blind_to_rotation_and_order():
    a, b = randn(90, 10), 1.5 * randn(120, 10, seed=1) + 0.3
    q = torch.linalg.qr(randn(10, 10, seed=2)).Q
    expected = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a @ q, b @ q) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a[torch.randperm(90)], b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(2 * a, 2 * b) == pytest.approx(4 * expected, rel=1e-10)


def test_frechet_distance_falls_to_zero_as_samples_of_one_distribution_grow():
    distances = [frechet_distance(randn(n, 16), randn(n, 16, seed=1)) for n in (50, 500, 5000)]
    assert distances[0] > 5 * distances[1] > 25 * distances[2] > 0


def test_frechet_distance_says_how_many_samples_it_needs():
    enough = randn(65, 64)
    assert frechet_distance(enough, randn(65, 64, seed=1)) > 0
    for a, b in ((enough[:64], enough), (enough, enough[:64])):
        with pytest.raises(ValueError, match="64 samples of 64 dimensions .* at least 65"):
            frechet_distance(a, b)


def test_frechet_distance_refuses_what_it_cannot_measure():
    good = randn(20, 3)
    for value in (math.nan, math.inf):
        bad = good.clone()
        bad[4, 1] = bad[7, 2] = value
        with pytest.raises(ValueError, match="2 of 20 rows are not finite"):
            frechet_distance(good, bad)
    with pytest.raises(ValueError, match="3 and 2 dimensions"):
        frechet_distance(good, good[:, :2])
    with pytest.raises(ValueError, match=r"shape \(20,\)"):
        frechet_distance(good, good[:, 0])


def test_statistics_of_features_whose_mean_swamps_their_spread():
    features = (1000 + randn(500, 12) @ randn(12, 12, seed=1)).float()
    whole = FeatureStatistics.of(features)
    assert whole.count == 500
    torch.testing.assert_close(whole.mean, features.double().mean(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(whole.covariance, torch.cov(features.double().T), rtol=0, atol=1e-9)
    reference = randn(100, 12, seed=2)
    assert frechet_distance(whole, reference) == frechet_distance(features, reference)


class TestKernelDistance:
    def test_equals_the_sums_over_all_pairs(self):
        a, b = randn(7, 3), randn(5, 3, seed=1) + 0.5

        def k(x, y):
            return (sum(p * q for p, q in zip(x.tolist(), y.tolist(), strict=True)) / 3 + 1) ** 3

        def mean(pairs):
            values = [k(x, y) for x, y in pairs]
            return sum(values) / len(values)

        of_a = mean((x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j)
        of_b = mean((x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j)
        expected = of_a + of_b - 2 * mean((x, y) for x in a for y in b)
        assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)

    def test_equals_that_of_torchmetrics(self):
        kid = pytest.importorskip("torchmetrics.image.kid", reason="the reference is torchmetrics")
        a, b = randn(300, 64), 1.2 * randn(300, 64, seed=1) + 0.1
        assert kernel_distance(a, b) == pytest.approx(kid.poly_mmd(a, b).item(), abs=1e-4)

    def test_without_bias_is_zero_on_average_for_equal_distributions(self):
        values = torch.tensor(
            [kernel_distance(randn(50, 4, seed=2 * i), randn(50, 4, seed=2 * i + 1)) for i in range(200)]
        )
        assert values.mean().abs() < 3 * values.std() / len(values) ** 0.5

    def test_does_not_depend_on_the_batches(self):
        a, b = randn(100, 16), randn(90, 16, seed=1)
        assert kernel_distance(a, b, batch_size=7) == pytest.approx(kernel_distance(a, b), rel=1e-9)

    def test_refuses_what_it_cannot_measure(self):
        for a, b, message in (
            (randn(1, 3), randn(5, 3), "at least 2"),
            (randn(5, 3), randn(5, 4), "3 and 4 dimensions"),
            (randn(5, 3) / 0, randn(5, 3), "not finite"),
        ):
            with pytest.raises(ValueError, match=message):
                kernel_distance(a, b)
