import multiprocessing

import psutil
import pytest
import torch
from runs import assert_same_state, make_trainer, metrics

from hf_genmod.data.loading import load_pictures
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.shapes import ShapesDataset


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
