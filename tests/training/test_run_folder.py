import dataclasses
import json
import shutil

import psutil
import pytest
import torch
from runs import Killed, assert_same_state, make_trainer, metrics

from hf_genmod import load_pipeline
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.shapes import ShapesDataset
from hf_genmod.errors import TrainingError
from hf_genmod.training.run_folder import RunFolder


@dataclasses.dataclass
class Size:
    resolution: int
    threads: int = dataclasses.field(default=1, metadata={"may_change": True})
    base: str | None = dataclasses.field(default=None, metadata={"built_on": "base model", "may_change": True})


def test_a_run_records_its_arguments_and_is_continued_with_those_that_may_change(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=1, depends_on={"unet": "abc"})
    trainer.open_run({"data": Size(8, base="runs/base")})
    trainer.train()
    written = json.loads((tmp_path / "training_config.json").read_text())
    assert written["training"] == dataclasses.asdict(trainer.config)
    assert written["arguments"] == {"data": {"resolution": 8, "threads": 1, "base": "runs/base"}}
    assert written["built_on"] == {"base model": "runs/base"} and written["depends_on"] == {"unet": "abc"}
    (tmp_path / "model_index.json").unlink()

    def again(size, weights="abc", **settings):
        trainer = make_trainer(dataset, tmp_path, max_train_steps=1, depends_on={"unet": weights}, **settings)
        trainer.open_run({"data": size})

    again(Size(8, threads=2), logging_steps=7)
    written = json.loads((tmp_path / "training_config.json").read_text())
    assert (written["arguments"]["data"]["threads"], written["training"]["logging_steps"]) == (2, 7)
    with pytest.raises(ValueError, match=r"run \(--resolution was 8, is 9\); choose another folder, or repeat"):
        again(Size(9), weights="abd")
    with pytest.raises(ValueError, match=r"\(the weights of its unet have changed\)"):
        again(Size(8), weights="abd")
    dataset = load_pictures(ShapesDataset(2, resolution=16))
    with pytest.raises(ValueError, match=r"\(the images have changed; the number of images was \d+, is 2"):
        again(Size(8))
    with pytest.raises(ValueError, match=r"\(--resolution was 8, is 9\)"):
        again(Size(9))


def test_a_run_of_an_earlier_version_is_complete_or_starts_again_elsewhere(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=1)
    trainer.train()
    file = tmp_path / "training_config.json"
    settings = json.loads(file.read_text())
    old = {name: settings[name] for name in ("training", "pictures")} | {"data": {"resolution": 8, "threads": 2}}
    old |= {"weights": {"base": "abc"}, "asked": {"resolution": 9}}
    old["training"]["license"] = "mit"
    file.write_text(json.dumps(old))

    def must_not_be_called(model, batch, rng):
        raise AssertionError("trained again")

    again = make_trainer(dataset, tmp_path, max_train_steps=1, objective=must_not_be_called)
    again.open_run({"size": Size(8, base="runs/base")})
    again.train()
    assert json.loads(file.read_text()) == old
    with pytest.raises(ValueError, match=r"holds a different run \(--seed was 0, is 1\)"):
        make_trainer(dataset, tmp_path, max_train_steps=1, seed=1).open_run()
    with pytest.raises(ValueError, match=r"holds a different run \(--resolution was 8, is 9\)"):
        make_trainer(dataset, tmp_path, max_train_steps=1).open_run({"size": Size(9, threads=3)})
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(
        ValueError, match="holds an unfinished run that an earlier version of this package wrote; choose"
    ):
        make_trainer(dataset, tmp_path, max_train_steps=1).open_run()


def test_the_folder_of_another_run_is_left_alone(dataset, tmp_path):
    make_trainer(dataset, tmp_path, max_train_steps=1).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a different run .--learning_rate was 0.005, is 0.001"):
        make_trainer(dataset, tmp_path, max_train_steps=1, learning_rate=1e-3).train()
    with pytest.raises(ValueError, match="holds a different run .--resolution was not given, is 8"):
        make_trainer(dataset, tmp_path, max_train_steps=1).open_run({"data": Size(8)})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_of_other_things_is_left_alone(dataset, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no training run"):
        make_trainer(dataset, tmp_path, max_train_steps=1).train()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content, reason", [
    ("{}", "records no training run; choose another folder"), ("{", "not a JSON file"), ("[]", "not a dictionary"),
    ('{"training": 1, "pictures": {}}', "records no training run; choose another folder"),
])  # fmt: skip
def test_a_training_config_of_something_else_is_named(dataset, tmp_path, content, reason):
    for name in ("model_index.json", "training_config.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"training_config.json:? {reason}"):
        make_trainer(dataset, tmp_path, max_train_steps=1).open_run()


def test_a_torn_line_of_metrics_is_left_out(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=4, checkpointing_steps=2)
    inner = trainer.objective

    def killed_at_step_3(model, batch, rng):
        if trainer.progress.step == 3:
            raise Killed
        return inner(model, batch, rng)

    trainer.objective = killed_at_step_3
    with pytest.raises(Killed):
        trainer.train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0][:20] + lines[0], *lines[1:], lines[2][:10]]))
    make_trainer(dataset, tmp_path, max_train_steps=4, checkpointing_steps=2).train()
    assert [line["step"] for line in metrics(tmp_path)] == [2, 3, 4]


def test_a_folder_is_trained_in_by_one_run_at_a_time(dataset, tmp_path):
    settings = dict(max_train_steps=3, checkpointing_steps=1)
    second = []

    def objective(model, batch, rng):
        if trainer.progress.step == 2:
            second.append(make_trainer(dataset, tmp_path, **settings))
            with pytest.raises(TrainingError, match="another process is training in"):
                second[0].train()
        return inner(model, batch, rng)

    trainer = make_trainer(dataset, tmp_path, **settings)
    inner, trainer.objective = trainer.objective, objective
    trainer.train()
    assert second and trainer.folder.is_complete
    make_trainer(dataset, tmp_path, **settings).train()


def test_a_checkpoint_that_cannot_be_written_is_written_by_the_same_command_later(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=3, checkpointing_steps=5)
    trainer.open_run()
    blocked = tmp_path / "unet"
    blocked.write_text("a file where a folder should be")
    message = "the checkpoint could not be written .*; make room, and repeat the command, .* from the state step-3"
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert not (tmp_path / "partial").exists()
    blocked.unlink()

    def must_not_be_called(model, batch, rng):
        raise AssertionError("trained again")

    again = make_trainer(dataset, tmp_path, max_train_steps=3, checkpointing_steps=5, objective=must_not_be_called)
    again.train()
    assert_same_state(again, trainer)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    load_pipeline(tmp_path)


def test_a_damaged_checkpoint_is_written_again(dataset, tmp_path, capsys):
    settings = dict(max_train_steps=3, checkpointing_steps=5)
    make_trainer(dataset, tmp_path, **settings).train()
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-100])
    make_trainer(dataset, tmp_path, **settings).train()
    assert "cannot be read" in capsys.readouterr().err
    assert weights.read_bytes() == right
    weights.write_bytes(right[:-100])
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(TrainingError, match="no saved state to write it from; delete its model_index.json"):
        make_trainer(dataset, tmp_path, **settings).train()


def test_a_state_takes_no_memory_until_it_is_used(tmp_path):
    folder, size = RunFolder(tmp_path), 2**25  # in bytes
    folder.save_state(1, {"weight": torch.ones(size // 4)}, limit=1)
    before = psutil.Process().memory_info().rss
    state = folder.newest_state(print)
    assert psutil.Process().memory_info().rss - before < size / 4
    assert state["weight"].sum() == size // 4
