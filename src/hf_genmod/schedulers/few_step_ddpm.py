"""Sampling in few steps."""

import torch
from torch import Tensor

from .ancestral_ddpm import AncestralDDPMScheduler, AncestralDDPMSchedulerOutput


class FewStepDDPMScheduler(AncestralDDPMScheduler):
    """Algorithm 2 for few steps, with the spread of x_0 that it leaves out.

    However far t' is from t, μ̃_t(x_t, E[x_0 | x_t]) is the mean of p(x_{t'} | x_t), but its covariance is

        β̃_t I + ᾱ_{t'} δ_t² Cov(x_0 | x_t),   δ_t = β_t / (1 − ᾱ_t),

    of which Algorithm 2 has the first term alone: without the second, few steps make pictures too smooth. As
    Cov(x_0 | x_t) is (1 − ᾱ_t) / √ᾱ_t · ∂x̂_0 / ∂x_t, x_0 spreads the way in which x̂_0 has just answered the noise of
    the step before, t_before. So that answer is used once more, at a size by which samples of Gaussian data keep
    nearly all of their variance, unless its root is close to the last σ:

        x_{t'} = μ̃_t(x_t, D_t) + √Σ_θ z,   D_t = x̂_0(x_t) + κ_t (x̂_0(x_t) − x̂_0(x_{t_before}))
        κ_t = (√(1 + δ_t² / δ_before) − 1) / δ_t

    The first step has κ = 0, and the last ends at x̂_0. In short steps κ_t is δ_t / (2 δ_before), the correction of the
    second order of SDE-DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095); in some tens of steps it is less. Meant for
    `variance_type` "fixed_small": the others add of that covariance themselves.

    Config, methods and `from_config` are those of [`AncestralDDPMScheduler`], but that `timestep_spacing` and
    `steps_offset` say nothing here: n steps are even in arctan ⁴√σ, σ² = (1 − ᾱ_t) / ᾱ_t, from σ = 80 (Karras et al.
    2022, arXiv:2206.00364) to 0.02, as far as the schedule goes, which is between steps even in log σ and in arctan σ.
    """

    _before = None  # x̂_0 and δ of the step before

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, timesteps: list[int] | None = None):
        """Chooses n timesteps as above, or takes `timesteps`; arguments and errors as in the base class."""
        super().set_timesteps(num_inference_steps, device, timesteps)
        self._before = None
        if timesteps is not None:
            return
        alpha_bar = self.alphas_cumprod.cpu().double()
        angles = torch.arctan(((1 - alpha_bar) / alpha_bar) ** (1 / 8))  # (T,), of σ^(1/4)
        ends = torch.arctan(torch.tensor([80.0, 0.02]).double() ** (1 / 4)).tolist()
        chosen = (torch.linspace(*ends, num_inference_steps).double()[:, None] - angles).abs().argmin(dim=1)
        # Where n is so large that some are chosen twice, the others move on.
        i = torch.arange(num_inference_steps)
        self.timesteps = torch.maximum((chosen + i).cummin(dim=0).values - i, i.flip(0)).to(device)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator=None, return_dict=True):
        """One step as above. Steps follow one another: each remembers x̂_0 for the next, up to the last.

        Arguments and errors as in the base class.
        """
        x_prev, x_0 = super().step(model_output, timestep, sample, generator, return_dict=False)
        t = int(timestep)
        prev_t = int(self.previous_timestep(t))
        alpha_bar_t, alpha_bar_prev, _, beta_t = self._chain(t, sample, prev_t)
        delta = (beta_t / (1 - alpha_bar_t)).clamp(min=1e-6)  # betas below that are lost in the fp32 of ᾱ
        if self._before is not None and prev_t >= 0:
            x_0_before, delta_before = self._before
            kappa = ((1 + delta**2 / delta_before).sqrt() - 1) / delta
            # √ᾱ_{t'} δ is the coefficient of x_0 in μ̃.
            x_prev = (x_prev + alpha_bar_prev.sqrt() * delta * kappa * (x_0 - x_0_before)).to(sample.dtype)
        self._before = None if prev_t < 0 else (x_0, delta)
        return AncestralDDPMSchedulerOutput(x_prev, x_0) if return_dict else (x_prev, x_0)
