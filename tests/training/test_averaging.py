import pytest
import torch
from runs import averaged_weights, make_other_trainer, make_trainer, raw_weights

from hf_genmod import load_pipeline
from hf_genmod.training.averaging import PowerFunctionAverage, check_length


def test_power_function_average_weighs_step_tau_by_its_power():
    """θ̂_t = Σ_τ w_τ θ_τ with w_τ = (τ^{γ+1} − (τ−1)^{γ+1}) / t^{γ+1}, and a standard deviation of length · t."""
    length, steps = 0.1, 400
    model = torch.nn.Linear(steps, 1, bias=False).double()
    average = PowerFunctionAverage(model, length)
    for step in range(steps):
        model.weight.data.zero_()[0, step] = 1.0
        average.update(unchanged_if=torch.zeros(()))
    (weights,) = average.module.weight.detach()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    tau = torch.arange(1, steps + 1, dtype=torch.float64)
    mean = (weights * tau).sum()
    deviation = (weights * (tau - mean) ** 2).sum().sqrt() / steps
    assert abs(deviation.item() - length) < 0.002


def test_average_of_no_length_is_the_last_step_and_too_long_ones_are_refused(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=3, ema_length=0.0)
    trainer.train()
    assert torch.equal(averaged_weights(trainer), raw_weights(trainer))
    with pytest.raises(ValueError, match="ema_length: 0.5"):
        check_length(0.5)


@pytest.mark.parametrize("length", [0.0, 0.1])
def test_a_skipped_step_is_not_averaged_and_a_frozen_weight_stays(length):
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    averages = [PowerFunctionAverage(model, length) for _ in range(2)]
    for step in range(3):
        averages[0].update(unchanged_if=torch.ones(()))  # of weights that a skipped step has left as they were
        model.weight.data += torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        for average in averages:
            average.update(unchanged_if=torch.zeros(()))
        states = [average.state_dict() for average in averages]
        torch.testing.assert_close(*states, rtol=0, atol=0)
        assert average.n_averaged == step + 1
        if step == 0:
            torch.testing.assert_close(average.module.state_dict(), model.state_dict())
    assert average.module.bias.data_ptr() == model.bias.data_ptr()  # as the base of an adapter may be large
    assert average.module.weight.data_ptr() != model.weight.data_ptr()


def test_the_averaged_weights_after_a_part_of_the_run_become_the_guiding_unet(dataset, tmp_path):
    kept = {"checkpointing_steps": 3, "checkpoints_total_limit": 9}
    trainer = make_trainer(dataset, tmp_path / "whole", max_train_steps=8, guiding_fraction=0.3, **kept)
    trainer.train()
    state = torch.load(tmp_path / "whole" / "checkpoints" / "step-3" / "state.pt", weights_only=True)["averaged_model"]
    loaded = load_pipeline(tmp_path / "whole")
    for name, weight in loaded.guiding_unet.state_dict().items():
        assert torch.equal(weight, state[f"module.{name}"].to(weight.dtype)), name
    assert not torch.equal(loaded.guiding_unet.conv_out.weight, loaded.unet.conv_out.weight)
    make_trainer(dataset, tmp_path / "none", max_train_steps=2).train()
    assert load_pipeline(tmp_path / "none").guiding_unet is None


@pytest.mark.parametrize("kind", ["autoencoder", "adapter", "text encoder"])
def test_early_weights_are_refused_where_a_unet_is_not_all_that_is_trained(dataset, tmp_path, kind):
    trainer = make_other_trainer(dataset, tmp_path, kind, max_train_steps=2, guiding_fraction=0.5)
    with pytest.raises(ValueError, match="guiding_fraction: it is for a run that trains a U-Net from scratch"):
        trainer.train()
