import multiprocessing
import pickle

import psutil
import pytest
import torch
from runs import Killed, assert_same_state, make_trainer, metrics
from small_shards import write_parquet

from hf_genmod.data.loading import load_pictures
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.shapes import ShapesDataset
from hf_genmod.data.stream import stream_pictures
from hf_genmod.errors import TrainingError
from hf_genmod.training.batches import Batches


def test_a_batch_that_cannot_be_shared_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="batch_size: 8 cannot be shared evenly"):
        make_trainer(dataset, tmp_path, max_train_steps=1, gradient_accumulation_steps=3)


def test_a_loading_process_that_dies_is_replaced(dataset, tmp_path, capsys):
    next(iter(torch.utils.data.DataLoader(range(2), num_workers=1)))  # which installs the signal handler of torch
    whole = make_trainer(dataset, tmp_path / "whole", max_train_steps=12, dropout=0.1)
    whole.train()

    def objective(model, batch, rng):
        if trainer.progress.step == 2 and psutil.Process().children():
            for worker in trainer.batches._loaded._workers:
                worker.kill()
        return whole.objective(model, batch, rng)

    trainer = make_trainer(
        dataset, tmp_path / "cut", max_train_steps=12, num_workers=2, objective=objective, dropout=0.1
    )
    trainer.train()
    assert "a process that loads images has died" in capsys.readouterr().err
    assert_same_state(trainer, whole)


@pytest.fixture
def shards(tmp_path):
    return write_parquet(tmp_path / "shards")


@pytest.mark.slow
def test_a_run_on_a_stream_continues_to_bitwise_the_same_end(shards, tmp_path):
    whole = make_trainer(stream_pictures(str(shards)), tmp_path / "whole", max_train_steps=6)
    whole.train()

    def killed_at_5(model, batch, rng):
        if trainer.progress.step == 5:
            raise Killed
        return whole.objective(model, batch, rng)

    settings = {"max_train_steps": 6, "checkpointing_steps": 2}
    stream = stream_pictures(str(shards))
    trainer = make_trainer(stream, tmp_path / "cut", objective=killed_at_5, num_workers=1, **settings)
    with pytest.raises(Killed):
        trainer.train()
    resumed = make_trainer(stream_pictures(str(shards)), tmp_path / "cut", **settings)
    resumed.batches.open, opened = lambda step: (opened.append(step), Batches.open(resumed.batches, step)), []
    resumed.train()
    assert opened == [4]
    assert_same_state(resumed, whole)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_shard_that_cannot_be_read_ends_the_run_with_its_state_or_is_left_out(shards, tmp_path, capsys):
    settings = {"max_train_steps": 6, "checkpointing_steps": 0}
    whole = make_trainer(stream_pictures(str(shards)), tmp_path / "whole", max_train_steps=6)
    whole.train()
    file, stream = max(shards.iterdir()), stream_pictures(str(shards))
    content = file.read_bytes()
    file.write_bytes(bytes(3000) + content[3000:])
    stream = pickle.loads(pickle.dumps(stream))  # as in another process, without what it has read
    trainer = make_trainer(stream, tmp_path / "cut", **settings)
    sentence = rf"{file}: the shard cannot be read \(.*\); stopped at step \d+ with the state saved; repair it, and"
    with pytest.raises(TrainingError, match=sentence):
        trainer.train()
    assert 1 <= trainer.progress.step < 6 and trainer.folder.saved_states()
    with pytest.raises(ValueError, match=f"7 of 72 images cannot be used; .*: {file}: the shard"):
        stream_pictures(str(shards))
    skipping = make_trainer(stream_pictures(str(shards), on_bad_image="skip"), tmp_path / "cut", **settings)
    skipping.open_run()
    skipping.batches.open(0)
    assert all(len(batch["images"]) == 8 for step in range(9) for batch, _ in skipping.batches.of_step(step))
    assert skipping.batches.failure is None
    assert capsys.readouterr().err.count(f"{file}: the shard cannot be read") == 1
    file.write_bytes(content)
    repaired = make_trainer(stream_pictures(str(shards)), tmp_path / "cut", num_workers=1, **settings)
    repaired.train()
    assert_same_state(repaired, whole)


def test_a_run_that_skips_already_is_not_told_to_skip(shards, tmp_path):
    stream = pickle.loads(pickle.dumps(stream_pictures(str(shards), on_bad_image="skip")))
    for file in shards.iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(TrainingError) as error:
        make_trainer(stream, tmp_path / "run", max_train_steps=2).train()
    assert "the shard cannot be read" in str(error.value)
    assert str(error.value).endswith("; repair it, and the same command continues the run")


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_no_more_processes_load_images_than_can_share_the_blocks(shards, tmp_path, parts, monkeypatch):
    settings = {"max_train_steps": 1, "batch_size": 6, "gradient_accumulation_steps": parts}
    stream = stream_pictures(str(shards))
    here = make_trainer(stream, tmp_path / "here", **settings).batches
    here.open(3)
    expected = [here.of_step(step) for step in (3, 4, 5)]
    batches = make_trainer(stream, tmp_path / "run", num_workers=4, **settings).batches
    with pytest.warns(UserWarning, match="num_workers: 4 processes would read each block of .*; the number .* is 1"):
        batches.open(3)
    assert batches._loaded._num_workers == 1
    for step, each in zip((3, 4, 5), expected, strict=True):
        for (part, rng), (its, its_rng) in zip(batches.of_step(step), each, strict=True):
            assert len(part["images"]) == len(part["captions"]) == len(rng) == 6 // parts
            assert torch.equal(part["images"], its["images"]) and part["captions"] == its["captions"]
            assert torch.equal(rng.positions, its_rng.positions)
    batches.close()


class Unreachable(PictureDataset):
    """Images from a server that cannot be reached after the first step."""

    error = ConnectionError("the server of the images says no")

    def __getitems__(self, indices):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > 1:
            raise self.error
        return super().__getitems__(indices)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("error", [Unreachable.error, RuntimeError("DataLoader worker: says no"), EOFError("says no")])
def test_an_error_of_the_data_set_is_shown_and_not_taken_for_a_dead_process(tmp_path, capsys, num_workers, error):
    pictures = load_pictures(ShapesDataset(16, resolution=16))
    trainer = make_trainer(pictures, tmp_path, max_train_steps=4, num_workers=num_workers)
    pictures.__class__, pictures.error = Unreachable, error
    with pytest.raises(type(error), match="says no"):
        trainer.train()
    assert "has died" not in capsys.readouterr().err


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_processes_that_load_images_can_be_started_by_any_method(dataset, tmp_path, method, capsys):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        make_trainer(dataset, tmp_path / "run", max_train_steps=3, num_workers=1).train()
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert "has died" not in capsys.readouterr().err
    make_trainer(dataset, tmp_path / "here", max_train_steps=3).train()
    assert metrics(tmp_path / "run") == metrics(tmp_path / "here")
