"""The losses of exact networks are what x_t leaves open: the variance of x_0, or the entropy of the class."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from exact import PICTURES, PLANE, process_of
from tiny import randn

from hf_genmod.data.exact_networks import ExactClassifier, ExactDenoiser
from hf_genmod.data.randomness import BatchRandom
from hf_genmod.objectives.consistency import ConsistencyObjective
from hf_genmod.objectives.denoising import DenoisingObjective, draw_x_t
from hf_genmod.objectives.noisy_classification import NoisyClassificationObjective

TILES = {PLANE: (2, 1, 1), PICTURES: (1, 8, 8)}
N = 4096


def batch_of(mixture, n=N):
    x_0, y = mixture.sample(n, torch.Generator().manual_seed(0))
    return {"images": x_0.reshape(n, *TILES[mixture]), "class_labels": y}


def rng(n=N):
    return BatchRandom(0, 0, range(n), n)


def alpha_bar_of(process, batch):
    t, x_t, _ = draw_x_t(batch["images"], process, rng(len(batch["images"])))
    return t, x_t.flatten(1), process.alphas_cumprod.double()[t]


@pytest.mark.parametrize("weighting", ["simple", "min_snr", "balanced"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("mixture", [PLANE, pytest.param(PICTURES, marks=pytest.mark.slow)])
def test_the_loss_of_denoising_is_the_variance_that_is_left(mixture, prediction_type, weighting):
    process, batch = process_of(prediction_type), batch_of(mixture)
    objective = DenoisingObjective(process, weighting=weighting)
    unet = ExactDenoiser(mixture, process, tile=TILES[mixture])
    loss = objective(unet, batch, rng())[0].item()
    t, x_t, alpha_bar = alpha_bar_of(process, batch)
    snr = alpha_bar / (1 - alpha_bar)
    scale = {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1}[prediction_type]
    left = mixture.posterior_variance(x_t, alpha_bar) / mixture.dimensions * scale * objective._weight(t)
    assert loss == pytest.approx(left.mean().item(), rel=0.05)


def test_no_other_prediction_has_a_smaller_loss():
    process, batch = process_of(), batch_of(PLANE)
    objective, unet = DenoisingObjective(process), ExactDenoiser(PLANE, process)
    least = objective(unet, batch, rng())[0].item()
    for change in (
        lambda v, t: 1.05 * v,
        lambda v, t: v + 0.05,
        lambda v, t: v + 0.1 * (t / 1000)[:, None, None, None],
    ):

        def other(x_t, t, change=change):
            output = unet(x_t, t)
            return type(output)(sample=change(output.sample, t))

        assert objective(other, batch, rng())[0].item() > least


def test_the_label_lowers_the_loss_to_the_variance_that_is_left_given_it():
    process, batch = process_of(), batch_of(PLANE)
    objective = DenoisingObjective(process, null_label=3, condition_dropout=0.0)
    loss = objective(ExactDenoiser(PLANE, process, conditional=True), batch, rng())[0].item()
    _, x_t, alpha_bar = alpha_bar_of(process, batch)
    left, without = (
        (PLANE.posterior_variance(x_t, alpha_bar, y) / 2 / (1 - alpha_bar)).mean().item()
        for y in (batch["class_labels"], None)
    )
    assert loss == pytest.approx(left, rel=0.05) and left < 0.8 * without


def test_the_loss_of_classification_is_the_entropy_of_the_class():
    process, batch = process_of(), batch_of(PLANE)
    classifier = ExactClassifier(ExactDenoiser(PLANE, process), process)
    loss, metrics = NoisyClassificationObjective(process)(classifier, batch, rng())
    _, x_t, alpha_bar = alpha_bar_of(process, batch)
    log_p = PLANE.log_class_probabilities(x_t, alpha_bar)
    assert loss.item() == pytest.approx(-(log_p.exp() * log_p).sum(dim=1).mean().item(), rel=0.05)
    assert metrics["accuracy"].item() == pytest.approx(log_p.exp().max(dim=1).values.mean().item(), abs=0.03)


@pytest.mark.parametrize("gamma", [1.0, 2.5])
def test_trajectories_to_learn_few_steps_from_are_those_of_the_guided_flow(gamma):
    process = process_of()
    unet = ExactDenoiser(PLANE, process, conditional=True)
    denoising = DenoisingObjective(process, null_label=3, condition_dropout=0.0)
    timesteps = torch.linspace(990, 0, 60).long().tolist()
    solver = DPMSolverMultistepScheduler.from_config(process.config)
    of_noise = process.alphas_cumprod[-1].double()
    objective = ConsistencyObjective(denoising, unet, timesteps, solver, gamma)
    epsilon, y = randn(90, 2, 1, 1), torch.arange(90) % 3
    x_t, end = objective.trajectories(epsilon, {"class_labels": y})
    alpha_bar = process.alphas_cumprod.double()[timesteps]
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    noise, start = epsilon[:, :, 0, 0] / of_noise.sqrt(), ((1 - of_noise) / of_noise).sqrt().item()
    exact, _ = PLANE.flow(noise, start, 1e-3, y, gamma)
    assert (end[:, :, 0, 0] - exact).square().mean().sqrt() < 0.02
    middle = len(timesteps) // 2
    exact, _ = PLANE.flow(noise, start, sigma[middle].item(), y, gamma, 200)
    found = x_t.chunk(len(timesteps))[middle][:, :, 0, 0] / alpha_bar[middle].sqrt()
    assert (found - exact).square().mean().sqrt() < 0.02
