import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler

from hf_genmod import AncestralDDPMScheduler, DenoisingObjective
from hf_genmod.data.randomness import batch_positions, batch_random
from hf_genmod.objectives.consistency import ConsistencyObjective

DEVIATION, MEANS = 0.5, torch.tensor([-0.4, 0.1, 0.3])  # of the images of two labels, and of all
PREDICTIONS = ("v_prediction", "epsilon", "sample")


class Gaussian(torch.nn.Module):
    """What predicts best of x_0 ~ N(m_y, s²) by E[x_0 | x_t], or, if `consistent`, by the end of the trajectory."""

    def __init__(self, scheduler, consistent=False):
        super().__init__()
        self.scheduler, self.consistent = scheduler, consistent
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, class_labels):
        alpha_bar = self.scheduler.alphas_cumprod[t].double()[:, None, None, None]
        a, m = alpha_bar.sqrt(), MEANS.double()[class_labels][:, None, None, None]
        variance = alpha_bar * DEVIATION**2 + 1 - alpha_bar
        slope = DEVIATION / variance.sqrt() if self.consistent else a * DEVIATION**2 / variance
        x_0 = m + slope * (x - a * m) + self.shift
        epsilon = (x - a * x_0) / (1 - alpha_bar).sqrt()
        kinds = {"sample": x_0, "epsilon": epsilon, "v_prediction": a * epsilon - (1 - alpha_bar).sqrt() * x_0}
        return SimpleNamespace(sample=kinds[self.scheduler.config.prediction_type])


def objective(prediction_type="v_prediction", guidance_scale=1.0, num_levels=8):
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type}
    scheduler = AncestralDDPMScheduler(**config)
    sampler = LCMScheduler(**config, original_inference_steps=850)
    sampler.set_timesteps(num_levels)
    denoising = DenoisingObjective(scheduler, null_label=2, condition_dropout=0.0)
    solver = DPMSolverMultistepScheduler(**config)
    return ConsistencyObjective(denoising, Gaussian(scheduler), sampler.timesteps.tolist(), solver, guidance_scale)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("gamma", [1.0, 2.5])
def test_trajectories_are_those_of_the_guided_ode(prediction_type, gamma):
    made, labels = objective(prediction_type, gamma, num_levels=40), torch.tensor([0, 1])
    epsilon = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t, end = made.trajectories(epsilon, {"class_labels": labels})
    m = (MEANS[2] + gamma * (MEANS[labels] - MEANS[2])).double()[:, None, None, None]
    torch.testing.assert_close(end, m + DEVIATION * epsilon, rtol=0, atol=0.03)
    a = made.denoising.scheduler.alphas_cumprod[made.timesteps].double().sqrt()
    for alpha, x in list(zip(a, x_t.chunk(40), strict=True))[1:]:
        exact = alpha * m + (alpha**2 * DEVIATION**2 + 1 - alpha**2).sqrt() * epsilon
        torch.testing.assert_close(x, exact, rtol=0, atol=0.03)
    assert torch.equal(x_t[:2], epsilon)  # where drawing starts


def test_the_loss_is_least_for_what_maps_a_trajectory_to_its_end():
    made, n = objective(), 16
    batch = {"images": torch.zeros(n, 1, 8, 8), "class_labels": torch.arange(n) % 2}

    def loss(model):
        return made(model, batch, batch_random(0, 0, batch_positions(n), n))[0].item()

    scheduler = made.denoising.scheduler
    consistent, mean = loss(Gaussian(scheduler, consistent=True)), loss(Gaussian(scheduler))
    assert consistent < 0.08 < 0.15 < mean
    shifted = Gaussian(scheduler, consistent=True)
    torch.nn.init.constant_(shifted.shift, 0.1)
    assert loss(shifted) > consistent


@pytest.mark.parametrize("parts", [2, 4])
def test_processes_and_parts_of_a_batch_share_its_trajectories(parts):
    made, n = objective(num_levels=4), 16
    model, labels = Gaussian(made.denoising.scheduler), torch.arange(n) % 3

    def loss(positions):
        batch = {"images": torch.zeros(len(positions), 1, 8, 8), "class_labels": labels[positions]}
        return made(model, batch, batch_random(0, 0, positions, n))[0].item()

    shares = [loss(batch_positions(n, process_index=i, num_processes=parts)) for i in range(parts)]
    assert sum(shares) / parts == pytest.approx(loss(batch_positions(n)), rel=1e-5)


def test_the_loss_is_the_distance_in_equation():
    made, n = objective(), 8
    batch = {"images": torch.zeros(n, 1, 8, 8), "class_labels": torch.arange(n) % 2}
    model = Gaussian(made.denoising.scheduler)
    loss, _ = made(model, batch, batch_random(0, 3, batch_positions(n), n))
    rng = batch_random(0, 3, batch_positions(n), n)
    rng.uniform()  # whether each label is dropped
    epsilon = rng.normal((1, 8, 8))  # nothing else is drawn
    x_t, end = made.trajectories(epsilon[:1], {"class_labels": batch["class_labels"][:1]})
    distances = []
    for t, x in zip(made.timesteps, x_t, strict=True):
        v = model(x[None], torch.tensor([t]), batch["class_labels"][:1]).sample.detach()
        a = made.denoising.scheduler.alphas_cumprod[t].sqrt()
        f = a * x - (1 - a**2).sqrt() * v
        c = 0.00054 * 8
        distances.append((math.sqrt(float((f - end).square().sum()) + c**2) - c) / 8)
    assert loss.item() == pytest.approx(sum(distances) / len(distances), rel=1e-4)
    loss.backward()
    assert model.shift.grad.isfinite() and made.teacher.shift.grad is None
