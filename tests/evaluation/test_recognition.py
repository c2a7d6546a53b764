"""Shares, and accuracy by noise level."""

import math
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny import tiny_classifier

from hf_genmod import AncestralDDPMScheduler
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.evaluation.estimates import Share
from hf_genmod.evaluation.features import FeatureClassifier
from hf_genmod.evaluation.recognition import accuracy_by_noise_level, recognised, recognised_share, report_accuracy


@pytest.mark.parametrize(
    "k, n, low, high",  # Newcombe 1998, Table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_share_equals_published_wilson_intervals(k, n, low, high):
    predictions = torch.arange(n) < k
    share = recognised_share(predictions.long(), [1] * n)
    assert (share.value, share.count) == (k / n, n)
    assert (share.low, share.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirror = recognised_share(predictions.long(), [0] * n)
    assert (mirror.low, mirror.high) == (pytest.approx(1 - share.high), pytest.approx(1 - share.low))
    assert 0 <= share.low <= share.value <= share.high <= 1


def test_share_covers_the_truth_nineteen_times_in_twenty():
    n = 60
    shares = [recognised_share((torch.arange(n) < k).long(), [1] * n) for k in range(n + 1)]
    truths = [(i + 0.5) / 400 for i in range(400)]
    coverage = [
        sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k)
            for k, share in enumerate(shares)
            if share.low <= p <= share.high
        )
        for p in truths
    ]
    assert sum(coverage) / len(coverage) == pytest.approx(0.95, abs=0.01)


def test_share_from_logits_and_in_print():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 4.0, 4.5], [0.0, 0.0, 0.1]])
    assert recognised_share(logits, torch.tensor([0, 1, 2, 2])).value == 0.75
    assert str(recognised_share((torch.arange(1000) < 964).long(), [1] * 1000)) == "96.4% (95.1–97.4%, n = 1000)"
    assert str(Share(1.0, 3, 0.4385, 1.0)) == "100.0% (43.9–100.0%, n = 3)"


def test_share_needs_one_label_per_prediction():
    with pytest.raises(ValueError, match="2 for 3 predictions"):
        recognised_share(torch.zeros(3, 2), [0, 1])
    with pytest.raises(ValueError, match="0 for 0 predictions"):
        recognised_share(torch.zeros(0, 2), [])


class TestAccuracyByNoiseLevel:
    """Pictures of two grey levels ±a of N pixels: a threshold at zero is the best classifier of them."""

    A, N = 0.1, 16

    @pytest.fixture
    def dataset(self):
        level = round(127.5 * self.A)
        images = [Image.new("L", (4, 4), 127 - level if i % 2 else 128 + level) for i in range(1000)]
        return PictureDataset(images, "levels", labels=torch.arange(1000) % 2, label_names=["bright", "dark"])

    def classifier(self, seen):
        class Threshold(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.zero = torch.nn.Parameter(torch.zeros(()))

            def forward(self, x_t, t):
                seen.append((int(t), len(x_t)))
                mean = x_t.mean(dim=(1, 2, 3)) + self.zero
                return SimpleNamespace(logits=torch.stack([mean, -mean], dim=1))

        return Threshold()

    def test_is_that_of_the_closed_form(self, dataset):
        scheduler, seen = AncestralDDPMScheduler(), []
        levels = accuracy_by_noise_level(self.classifier(seen), scheduler, dataset, num_levels=5, batch_size=300)
        assert [level["t"] for level in levels] == [0, 250, 500, 749, 999]
        assert seen == [(level["t"], size) for level in levels for size in (300, 300, 300, 100)]
        a = (2 * (128 + round(127.5 * self.A)) / 255) - 1
        for level in levels:
            alpha_bar = scheduler.alphas_cumprod[level["t"]].item()
            assert level["sigma"] == pytest.approx(math.sqrt((1 - alpha_bar) / alpha_bar))
            expected = NormalDist().cdf(a * math.sqrt(self.N) / level["sigma"])
            share = level["accuracy"]
            assert share.count == 1000
            assert abs(share.value - expected) < 4 * math.sqrt(expected * (1 - expected) / 1000) + 1e-9
        assert levels[0]["accuracy"].value == 1 and levels[-1]["accuracy"].value < 0.6

    def test_does_not_depend_on_the_batch_size(self, dataset):
        by_batch_size = [
            accuracy_by_noise_level(self.classifier([]), AncestralDDPMScheduler(), dataset, 4, batch_size)
            for batch_size in (1000, 7)
        ]
        assert by_batch_size[0] == by_batch_size[1]


def test_the_share_of_each_class_is_of_the_pictures_of_that_class():
    classifier = FeatureClassifier(1, 3).eval()
    images = torch.randint(0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        said = classifier(images / 127.5 - 1).argmax(dim=1)
    labels = said.clone()
    labels[:20] = (labels[:20] + 1) % 3
    found = recognised(classifier, images, labels, ["a", "b", "c"])
    assert found["recognised_share"] == Share.of(torch.arange(60) >= 20)
    for i, name in enumerate("abc"):
        if (labels == i).any():
            assert found["recognised_share_by_class"][name] == Share.of((said == labels)[labels == i])


def test_the_report_of_a_classifier_is_a_table_and_an_image_of_the_curve(tmp_path, capsys):
    held_out = PictureDataset(
        [Image.new("RGB", (8, 8), (i, i, i)) for i in range(30)], "greys", labels=torch.arange(30) % 3,
        label_names=["a", "b", "c"],
    )  # fmt: skip
    report_accuracy(tiny_classifier(), AncestralDDPMScheduler(), held_out, tmp_path / "new" / "accuracy.png")
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["t", "noise", "level", "σ", "accuracy"]
    assert len(rows) == 11 and all("n = 30)" in row for row in rows)
    assert [int(row.split()[0]) for row in rows] == torch.linspace(0, 999, 11).round().int().tolist()
    assert last == f"{tmp_path / 'new' / 'accuracy.png'} shows the curve"
    with Image.open(tmp_path / "new" / "accuracy.png") as picture:
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 10  # not blank
    held_out.label_names = ["a", "b", "c", "d"]
    report_accuracy(tiny_classifier(num_classes=4), AncestralDDPMScheduler(), held_out, tmp_path / "accuracy.png")
    assert capsys.readouterr().out.startswith("no image of d is held out")
