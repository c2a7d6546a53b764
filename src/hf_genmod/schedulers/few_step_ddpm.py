"""Sampling in few steps."""

import torch

from .ancestral_ddpm import AncestralDDPMScheduler, AncestralDDPMSchedulerOutput


class FewStepDDPMScheduler(AncestralDDPMScheduler):
    """Algorithm 2 for few steps, with the covariance of x_0 that Algorithm 2 omits.

    For every t' < t, the mean of p(x_{t'} | x_t) is μ̃_t(x_t, E[x_0 | x_t]), and its covariance is

        β̃_t I + ᾱ_{t'} δ_t² Cov(x_0 | x_t),   δ_t = β_t / (1 − ᾱ_t).

    Algorithm 2 has the first term only, which makes images of few steps too smooth. Cov(x_0 | x_t) equals
    (1 − ᾱ_t) / √ᾱ_t · ∂x̂_0 / ∂x_t, so the change of x̂_0 that the noise of the previous step caused is a sample in the
    missing directions. It is added with a weight that keeps nearly all of the variance of Gaussian data, unless their
    standard deviation is close to the last σ:

        x_{t'} = μ̃_t(x_t, D_t) + √Σ_θ z,   D_t = x̂_0(x_t) + κ_t (x̂_0(x_t) − x̂_0(x_{t_before}))
        κ_t = (√(1 + δ_t² / δ_before) − 1) / δ_t

    The first step has κ = 0, and the last returns x̂_0. For short steps κ_t is δ_t / (2 δ_before), the second-order
    correction of SDE-DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095); for some tens of steps it is smaller. Use
    `variance_type` "fixed_small": the other types already contain part of that covariance.

    Config, methods and `from_config` are those of [`AncestralDDPMScheduler`], except that `timestep_spacing` and
    `steps_offset` are ignored: n steps are spaced evenly in arctan ⁴√σ, σ² = (1 − ᾱ_t) / ᾱ_t, from σ = 80 (Karras et
    al. 2022, arXiv:2206.00364) to 0.02 or the ends of the schedule. This lies between log σ and arctan σ.
    Two steps are the first two of three.
    """

    _before = None  # x̂_0 and δ of the previous step

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, timesteps: list[int] | None = None):
        """Chooses n timesteps as above, or takes `timesteps`; raises as in the base class."""
        super().set_timesteps(num_inference_steps, device, timesteps)
        self._before = None
        if timesteps is not None:
            return
        alpha_bar = self.alphas_cumprod.cpu().double()
        angles = torch.arctan(((1 - alpha_bar) / alpha_bar) ** (1 / 8))  # (T,), of σ^(1/4)
        ends = torch.arctan(torch.tensor([80.0, 0.02]).double() ** (1 / 4)).tolist()
        even = torch.linspace(*ends, max(3, num_inference_steps))[:num_inference_steps]
        chosen = (even.double()[:, None] - angles).abs().argmin(dim=1)
        # For a large n some timesteps are chosen twice; the later ones then move to the next.
        i = torch.arange(num_inference_steps)
        self.timesteps = torch.maximum((chosen + i).cummin(dim=0).values - i, i.flip(0)).to(device)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, check_finite=True):
        """One step as above. Call it once per timestep, in order: each step stores x̂_0 for the next. Arguments and
        errors as in the base class."""
        x_prev, x_0 = super().step(model_output, timestep, sample, generator, False, check_finite)
        t = int(timestep)
        prev_t = int(self.previous_timestep(t))
        alpha_bar_t, alpha_bar_prev, _, beta_t = self._chain(t, sample, prev_t)
        delta = (beta_t / (1 - alpha_bar_t)).clamp(min=1e-6)  # fp32 ᾱ does not resolve smaller betas
        if self._before is not None and prev_t >= 0:
            x_0_before, delta_before = self._before
            kappa = ((1 + delta**2 / delta_before).sqrt() - 1) / delta
            # √ᾱ_{t'} δ is the coefficient of x_0 in μ̃.
            x_prev = (x_prev + alpha_bar_prev.sqrt() * delta * kappa * (x_0 - x_0_before)).to(sample.dtype)
        self._before = None if prev_t < 0 else (x_0, delta)
        return AncestralDDPMSchedulerOutput(x_prev, x_0) if return_dict else (x_prev, x_0)
