"""Precision, recall, density, coverage and memorisation."""

import math

import pytest
import torch
from tiny import randn

from hf_genmod.evaluation.neighbours import audit_memorisation, nearest_of, neighbourhoods


class TestNeighbourhoods:
    @staticmethod
    def by_brute_force(real, generated, k):
        def distance(x, y):
            return math.dist(x.tolist(), y.tolist())

        def radius(x, i):
            return sorted(distance(x[i], x[j]) for j in range(len(x)) if j != i)[k - 1]

        of_real = [radius(real, i) for i in range(len(real))]
        of_generated = [radius(generated, i) for i in range(len(generated))]
        hits = [[distance(g, r) <= of_real[i] for i, r in enumerate(real)] for g in generated]
        back = [[distance(g, r) <= of_generated[j] for j, g in enumerate(generated)] for r in real]
        return {
            "precision": sum(map(any, hits)) / len(generated),
            "recall": sum(map(any, back)) / len(real),
            "density": sum(map(sum, hits)) / (k * len(generated)),
            "coverage": sum(any(hit[i] for hit in hits) for i in range(len(real))) / len(real),
        }

    @pytest.mark.parametrize("k", [1, 3, 5])
    def test_equal_brute_force(self, k):
        real, generated = randn(40, 3), 0.7 * randn(30, 3, seed=1) + 0.4
        expected = self.by_brute_force(real, generated, k)
        for batch_size in (7, 2048):
            measured = neighbourhoods(real, generated, k, batch_size)
            for name in ("precision", "recall", "coverage"):
                assert measured[name].value == pytest.approx(expected[name])
            assert measured["density"].value == pytest.approx(expected["density"])
            counts = [measured[name].count for name in ("precision", "recall", "density", "coverage")]
            assert counts == [30, 40, 30, 40]

    def test_tell_what_is_missing_from_what_is_wrong(self):
        real = torch.cat([randn(200, 2), randn(200, 2, seed=1) + 20])  # two modes
        one_mode, elsewhere = randn(400, 2, seed=2), randn(400, 2, seed=3) + 100
        of_one = neighbourhoods(real, one_mode)
        assert of_one["precision"].value > 0.9 and 0.3 < of_one["recall"].value < 0.6
        assert 0.3 < of_one["coverage"].value < 0.6
        of_none = neighbourhoods(real, elsewhere)
        assert [of_none[name].value for name in ("precision", "recall", "coverage")] == [0, 0, 0]
        assert of_none["density"].value == 0

    def test_need_more_pictures_than_neighbours(self):
        with pytest.raises(ValueError, match="at least 6 images"):
            neighbourhoods(randn(5, 3), randn(50, 3))


class TestMemorisation:
    @staticmethod
    def pictures(n, seed):
        return torch.randint(0, 256, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)

    def held_out(self, training, seed):
        return nearest_of(self.pictures(200, seed), training)[0]

    def test_fresh_pictures_are_not_flagged(self):
        training = self.pictures(500, 0)
        for i in range(100):
            audit = audit_memorisation(self.pictures(200, 2 * i + 1), training, self.held_out(training, 2 * i + 2))
            assert not audit.flagged

    def test_training_pictures_are(self):
        training = self.pictures(500, 0)
        audit = audit_memorisation(training[:200], training, self.held_out(training, 1))
        assert audit.flagged and audit.share.value == 1 and audit.distances.max() == 0
        assert torch.equal(audit.nearest, torch.arange(200))

    def test_a_tenth_of_copies_is_enough_and_they_are_named(self):
        training = self.pictures(500, 0)
        samples = torch.cat([training[7:27] ^ 1, self.pictures(180, 1)])  # with one bit changed in each pixel
        audit = audit_memorisation(samples, training, self.held_out(training, 2))
        assert audit.flagged
        assert torch.equal(audit.distances.argsort()[:20].sort().values, torch.arange(20))
        assert torch.equal(audit.nearest[:20], torch.arange(7, 27))

    def test_needs_as_many_held_out_pictures_as_the_quantile_says(self):
        with pytest.raises(ValueError, match="held_out_distances: 99 images have no 1% quantile; hold out 100"):
            audit_memorisation(self.pictures(5, 0), self.pictures(5, 1), torch.ones(99))


def test_recalls_of_other_samples_agree_within_their_intervals():
    """Of a distribution with heavy tails, a few samples of which are near many real images."""

    def generated(seed):
        rng = torch.Generator().manual_seed(seed)
        tails = torch.randn(100, 2, generator=rng).square().mean(dim=1, keepdim=True).sqrt()
        return 0.5 * torch.randn(100, 10, generator=rng) / tails

    real, met = randn(100, 10, seed=99), 0
    for pair in range(40):
        first, second = (neighbourhoods(real, generated(2 * pair + i))["recall"] for i in (0, 1))
        met += first.low <= second.high and second.low <= first.high
    assert met >= 38  # 32 by the intervals of Wilson alone


class TestNearest:
    @pytest.mark.parametrize("at_once", [2**28, 150, 1])  # values in memory: all, 30 images, one image
    @pytest.mark.parametrize("shift", [0, 1e4])
    def test_equals_brute_force_for_features_far_from_the_origin(self, shift, at_once):
        x, others = (randn(60, 5) + shift).float(), (randn(300, 5, seed=1) + shift).float()
        distances, nearest = nearest_of(x, others, batch_size=25, at_once=at_once)
        expected = [min((math.dist(a, b), i) for i, b in enumerate(others.tolist())) for a in x.tolist()]
        torch.testing.assert_close(distances, torch.tensor([distance for distance, _ in expected]).double())
        assert nearest.tolist() == [i for _, i in expected]

    def test_finds_the_only_copy_among_bytes_that_fp32_cannot_tell_apart(self):
        """Squares of white pictures are 2e8 in fp32, which is good to 16; the others differ by less."""
        others = torch.full((40, 3, 32, 32), 255, dtype=torch.uint8)
        others[torch.arange(40), 0, 0, torch.arange(40) % 32] -= 1
        others[:, 1, torch.arange(40) % 32, 3] -= 1
        for i in (0, 7, 39):
            distances, nearest = nearest_of(others[i : i + 1], others)
            assert distances.tolist() == [0] and torch.equal(others[nearest[0]], others[i])

    def test_takes_the_images_there_are(self):
        distances, nearest = nearest_of(torch.zeros(2, 3), torch.tensor([[3.0, 0, 4]]))
        assert distances.tolist() == [5, 5] and nearest.tolist() == [0, 0]
