import dataclasses
import json
import re

import pytest
import torch

from hf_genmod.evaluation.estimates import Estimate, Share
from hf_genmod.evaluation.report import Report


def test_a_report_is_read_as_it_was_saved(tmp_path):
    hits, values = torch.arange(9) > 3, torch.arange(9.0)
    share, estimate = Share.of(hits), Estimate.of(values)
    report = Report(
        model="a",
        dataset={"name": "b", "num_pictures": 9, "held_out_is_unseen": True},
        features="c",
        seed=0,
        settings=[
            {
                "sampler": "DDIMScheduler",
                "guidance_scale": 2.0,
                "seconds": estimate,
                "forward_passes": 4.0,
                "frechet_distance": estimate,
                "density": estimate,
                "precision": share,
                "recognised_share_by_class": {"density": share, "share": share},
                "memorisation": {"pixels": {"threshold": 0.5, "share": share, "flagged": False}},
            }
        ],
        held_out={"coverage": share},
        bits_per_dimension={"variational bound": estimate},
    )
    assert Report.read(tmp_path / "report") is None
    report.save(tmp_path / "report")
    text = (tmp_path / "report" / "evaluation.json").read_text()
    assert "interpolated" not in text and '"low"' in text
    assert Report.read(tmp_path / "report") == report
    interpolated = dataclasses.replace(report, interpolated={"recall": share})
    interpolated.save(tmp_path / "report")
    assert Report.read(tmp_path / "report") == interpolated
    file = tmp_path / "report" / "evaluation.json"
    for content, reason in (("{", "not a JSON file"), ('{"score": 1}', "not a report as this version writes it")):
        file.write_text(content)
        with pytest.raises(ValueError, match=re.escape(f"{file}: {reason}")):
            Report.read(tmp_path / "report")


def test_a_report_is_printed_as_a_table_that_names_the_best_setting():
    def measures(distance):
        hits = torch.arange(400) < 300
        return {"frechet_distance": Estimate(distance, 400, distance - 1, distance + 1), "precision": Share.of(hits)}

    settings = [{"num_inference_steps": 20, "guidance_scale": scale} for scale in (1.0, 2.5)]
    settings = [setting | measures(distance) for setting, distance in zip(settings, (7.0, 3.0), strict=True)]
    report = Report("model", {}, "features", 0, settings, measures(2.0))
    share = "75.0% (70.5–79.0%)"
    assert [re.split(" {2,}", line) for line in str(report).splitlines()] == [
        ["", "Fréchet distance", "precision"],
        ["20 steps, γ = 1", "7 (6–8)", share],
        ["20 steps, γ = 2.5 (best)", "3 (2–4)", share],
        ["held-out images", "2 (1–3)", share],
    ]


class TestUnableToJudge:
    @staticmethod
    def report(samples, held_out):
        return Report("model", {}, "features", 0, [{"num_inference_steps": 20} | samples], held_out)

    @staticmethod
    def share(hits, count=1000):
        return Share.of(torch.arange(count) < hits)

    @staticmethod
    def around(value, count=1000):
        return Estimate(value, count, value - 0.5, value + 0.5)

    @pytest.mark.parametrize("name", ["precision", "recall", "coverage", "recognised_share"])
    def test_are_shares_that_exceed_those_of_real_images_beyond_both_intervals(self, name):
        real = {name: self.share(900)}
        (reason,) = self.report({name: self.share(970)}, real).unable_to_judge.values()
        assert "20 steps: 97.0% (" in reason and "held out (90.0% (" in reason
        for hits in (915, 600):  # within the intervals, and worse
            assert self.report({name: self.share(hits)}, real).unable_to_judge == {}

    @pytest.mark.parametrize("name", ["frechet_distance", "kernel_distance"])
    def test_are_distances_below_those_of_real_images(self, name):
        real = {name: self.around(3)}
        assert [*self.report({name: self.around(1)}, real).unable_to_judge] == [name]
        for value in (2.2, 5):
            assert self.report({name: self.around(value)}, real).unable_to_judge == {}

    def test_is_no_frechet_distance_of_more_samples_than_held_out_images(self):
        samples, real = {"frechet_distance": self.around(1)}, {"frechet_distance": self.around(3, count=200)}
        assert self.report(samples, real).unable_to_judge == {}

    def test_is_a_classifier_that_does_not_know_the_images(self):
        for hits, is_able in ((799, False), (800, True)):
            report = self.report({"recognised_share": self.share(100)}, {"recognised_share": self.share(hits)})
            assert (report.unable_to_judge == {}) == is_able
        # No share is recognised, so none is marked.
        assert self.report({}, {}).unable_to_judge == {}

    def test_mark_their_columns_and_say_what_to_try(self, tmp_path):
        real = {"precision": self.share(812), "recall": self.share(700), "recognised_share": self.share(651)}
        samples = {"precision": self.share(915), "recall": self.share(200), "recognised_share": self.share(660)}
        report = self.report(samples, real)
        head, *_, precise, recognised, remedy = str(report).splitlines()
        assert re.split(" {2,}", head) == ["", "precision *", "recall", "recognised *"]
        assert precise.startswith("* unable to judge: by the precision, samples (20 steps: 91.5% (")
        assert recognised.startswith("* unable to judge: the classifier recognises only 65.1% (62.1–68.0%) of real")
        assert remedy.startswith("--features facebook/dinov2-base compares images by a larger network, ")
        report.save(tmp_path)
        assert json.loads((tmp_path / "evaluation.json").read_text())["unable_to_judge"] == report.unable_to_judge
        assert Report.read(tmp_path) == report
