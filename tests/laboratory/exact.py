"""What the tests of the laboratory share: pipelines with exact networks, and distances to exact distributions."""

import math

import torch
from small_pipelines import classifier_guided, guided, seeded, unconditional

from hf_genmod.data.exact_networks import ExactClassifier, ExactDenoiser
from hf_genmod.data.mixtures import in_the_plane, of_pictures
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler

PLANE, PICTURES = in_the_plane(), of_pictures()
PROCESS = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "clip_sample": False}


def process_of(prediction_type="v_prediction", **config):
    return AncestralDDPMScheduler(prediction_type=prediction_type, **PROCESS | config)


def plane_pipeline(make=unconditional, scheduler=None, size=None, **config):
    """A pipeline of the plane; with a size, of images of many points."""
    process = process_of(**config)
    denoiser = ExactDenoiser(PLANE, process, conditional=make is guided, size=size)
    parts = {"classifier": ExactClassifier(denoiser, process)} if make is classifier_guided else {}
    names = {} if make is unconditional else {"id2label": None}
    return make(denoiser, (scheduler or type(process)).from_config(process.config), **parts, **names)


def draw(pipeline, n, steps=50, seed=0, **request):
    """n points of a pipeline of single points."""
    latents = torch.randn(n, 2, 1, 1, generator=seeded(seed)) if "latents" not in request else request.pop("latents")
    options = {"num_inference_steps": steps, "output_type": "latent", "latents": latents, "generator": seeded(seed)}
    return pipeline(**options, **request).images[:, :, 0, 0].double()


def kolmogorov(points, mixture, directions=8):
    """The largest distance of a distribution function of points, (n, 2), along one of the directions, from that of a
    mixture."""
    angles = math.pi * torch.arange(directions, dtype=torch.float64) / directions
    distances = []
    for u in torch.stack([angles.cos(), angles.sin()], dim=1):
        z = (points.double() @ u).sort().values
        deviations = torch.einsum("d,kde,e->k", u, mixture.covariances, u).sqrt()
        cdf = torch.special.ndtr((z[:, None] - mixture.means @ u) / deviations) @ mixture.weights
        distances.append((cdf - (torch.arange(len(z)) + 0.5) / len(z)).abs().max().item())
    return max(distances)


def of_class(mixture, y):
    """The mixture of the components of a class."""
    chosen = mixture.classes == y
    return type(mixture)(mixture.weights[chosen], mixture.means[chosen], mixture.covariances[chosen])


def divergence_of_drawn(draw, log_density, n=400, h=3e-3, seed=0):
    """KL(q ‖ p), and its standard error, of the density q of what a deterministic sampler draws from noise, x_0 =
    `draw(x_T)`, by the determinant of its derivative, from central differences."""
    x_T = torch.randn(n, 2, generator=seeded(seed))
    steps = h * torch.eye(2)
    moved = torch.cat([x_T, *(x_T + sign * step for step in steps for sign in (1, -1))])
    x_0, *ends = draw(moved).chunk(5)
    columns = [(ends[2 * i] - ends[2 * i + 1]) / (2 * h) for i in range(2)]
    log_q = -0.5 * x_T.double().square().sum(dim=1) - math.log(2 * math.pi)
    log_q = log_q - torch.stack(columns, dim=2).det().abs().log()
    gaps = log_q - log_density(x_0)
    return gaps.mean().item(), (gaps.std() / n**0.5).item()
