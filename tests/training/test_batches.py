import psutil
import pytest
import torch
from runs import assert_same_state, make_trainer


def test_a_batch_that_cannot_be_shared_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="batch_size: 8 cannot be shared evenly"):
        make_trainer(dataset, tmp_path, max_train_steps=1, gradient_accumulation_steps=3)


def test_a_loading_process_that_dies_is_replaced(dataset, tmp_path, capsys):
    next(iter(torch.utils.data.DataLoader(range(2), num_workers=1)))  # which installs the signal handler of torch
    whole = make_trainer(dataset, tmp_path / "whole", max_train_steps=6, dropout=0.1)
    whole.train()

    def objective(model, batch, rng):
        if trainer.progress.step == 2 and psutil.Process().children():
            for worker in trainer.batches._loaded._workers:
                worker.kill()
        return whole.objective(model, batch, rng)

    trainer = make_trainer(
        dataset, tmp_path / "cut", max_train_steps=6, num_workers=2, objective=objective, dropout=0.1
    )
    trainer.train()
    assert "a process that loads images has died" in capsys.readouterr().err
    assert_same_state(trainer, whole)
