"""The loss of a consistency model, which draws in one to four steps."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler

from hf_genmod.objectives.denoising import DenoisingObjective


@dataclass(eq=False)
class ConsistencyObjective:
    r"""
    The loss of a consistency model f, which maps every x_t of a trajectory to the end of the trajectory, x_0 (Song et
    al. 2023, https://arxiv.org/abs/2303.01469). Trajectories are solutions of the probability-flow ODE of a trained
    model, the teacher, with classifier-free guidance (Meng et al. 2022, https://arxiv.org/abs/2210.03142). In the
    angle θ_t = arccos √ᾱ_t it is a rotation (Lu & Song 2024, https://arxiv.org/abs/2410.11081):

        x_t = cos θ_t x_0 + sin θ_t ε,   dx / dθ = v̂(x, t, y),   v̂ = v_∅ + γ (v_y − v_∅)
        f(x_t, t, y) = x̂_0 = cos θ_t x_t − sin θ_t v(x_t, t, y)
        L = (√(‖f(x_t, t, y) − x_0‖² + c²) − c) / √d,   c = 0.00054 √d    for d values

    with the distance of Song & Dhariwal 2023 (https://arxiv.org/abs/2310.14189). Trajectories start at noise, at
    T − 1; of the images of a batch only the conditions are used. All x_t of a trajectory at the `timesteps` are
    trained on, so a batch of n images gives n / len(timesteps) trajectories. Drawing starts at the largest of the
    timesteps, so the model is given the noise itself there.

    Args:
        denoising ([`DenoisingObjective`]): The process, the conditions and their dropout.
        teacher (`Callable`): The trained model, frozen.
        timesteps (`Sequence[int]`): At which the model is to draw, descending.
        guidance_scale (`float`, defaults to 1.0): γ.
        solver ([`~diffusers.DPMSolverMultistepScheduler`]): Solves the ODE, in a step for each of the timesteps.
    """

    denoising: DenoisingObjective
    teacher: Callable
    timesteps: Sequence[int]
    solver: DPMSolverMultistepScheduler
    guidance_scale: float = 1.0

    def __call__(self, model, batch, rng) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        denoising, levels = self.denoising, len(self.timesteps)
        images, small = denoising.x_0_of(batch, rng)
        condition = small | denoising.condition_of(batch, rng)
        epsilon = rng.normal(images.shape[1:], dtype=images.dtype)
        n = max(1, len(images) // levels)
        condition = {name: value[:n] for name, value in condition.items()}
        x_t, x_0 = self.trajectories(epsilon[:n], condition)
        t = torch.tensor(self.timesteps, device=x_t.device).repeat_interleave(n)
        condition = {name: torch.cat([value] * levels) for name, value in condition.items()}
        f = denoising.scheduler.predict_original_sample(self._prediction(model, x_t, t, condition), t, x_t)
        squared_distance = (f - x_0.repeat(levels, 1, 1, 1)).square().flatten(1).sum(dim=1)
        d = x_0[0].numel()
        c = 0.00054 * math.sqrt(d)
        return (((squared_distance + c**2).sqrt() - c) / math.sqrt(d)).mean(), {}

    @torch.no_grad()
    def trajectories(self, epsilon, condition) -> tuple[torch.Tensor, torch.Tensor]:
        """The x_t of n trajectories at each of the `timesteps`, one after another, (len(timesteps) · n, C, H, W), and
        their ends, (n, C, H, W). They start at the noise ε, (n, C, H, W)."""
        solver, x, states = copy.deepcopy(self.solver), epsilon, []
        solver.set_timesteps(timesteps=sorted({len(self.denoising.scheduler) - 1, *self.timesteps}, reverse=True))
        for t in solver.timesteps.tolist():
            states.append(x)
            x = solver.step(self._guided_prediction(x, t, condition), t, x).prev_sample
        return torch.cat([epsilon, *states[len(states) - len(self.timesteps) + 1 :]]), x

    def _guided_prediction(self, x_t, t, condition):
        t = torch.full((len(x_t),), t, device=x_t.device)
        prediction = self._prediction(self.teacher, x_t, t, condition)
        if self.guidance_scale == 1:
            return prediction
        without = self._prediction(self.teacher, x_t, t, self.denoising.without_condition(condition))
        return without + self.guidance_scale * (prediction - without)

    def _prediction(self, model, x_t, t, condition):
        output = model(x_t, t, **condition).sample.to(x_t.dtype)
        return self.denoising.scheduler.split_model_output(output, x_t)[0]
