import dataclasses
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
