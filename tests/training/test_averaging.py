import pytest
import torch
from runs import averaged_weights, make_trainer, raw_weights

from hf_genmod.training.averaging import power_function_average


def test_power_function_average_weighs_step_tau_by_its_power():
    """θ̂_t = Σ_τ w_τ θ_τ with w_τ = (τ^{γ+1} − (τ−1)^{γ+1}) / t^{γ+1}, and a standard deviation of length · t."""
    length, steps = 0.1, 400
    average = power_function_average(length)
    weights = [torch.zeros(steps, dtype=torch.float64)]
    for step in range(steps):
        current = torch.zeros(steps, dtype=torch.float64)
        current[step] = 1.0
        if step == 0:
            weights[0].copy_(current)
        else:
            average(weights, [current], torch.tensor(step))
    (weights,) = weights
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
        power_function_average(0.5)
