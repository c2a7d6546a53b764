"""The latents of an autoencoder that sliders set."""

import torch

from hf_genmod.demo.model import DemoModel
from hf_genmod.demo.request import generators, script


def latents_of_seed(model: DemoModel, seed: int) -> torch.Tensor:
    """z ~ N(0, I) of a seed, (1, c, h, w)."""
    return model.pipe(1, "standard", generator=generators(seed, 1), output_type="latent").images


def slider_values(model: DemoModel, seed: int) -> list[float]:
    """Where the sliders of a page stand at first for the z of a seed."""
    z = latents_of_seed(model, seed).flatten()
    return [round(min(4.0, max(-4.0, float(z[i]))), 2) for i, _ in model.factors]


def changed_latents(model: DemoModel, values: dict) -> torch.Tensor:
    """The z of a seed, (1, c, h, w), with the values of the sliders in their places."""
    z = latents_of_seed(model, values["seed"])
    changed = z.flatten(1).clone()
    for i, _ in model.factors:
        changed[:, i] = values[f"z{i}"]
    return changed.reshape(z.shape)


def latents_code(model: DemoModel, values: dict) -> str:
    """The Python that draws the image of `changed_latents`."""
    indices = [i for i, _ in model.factors]
    numbers = [values[f"z{i}"] for i in indices]
    seeds = f"generator=torch.Generator().manual_seed({values['seed']})"
    return script(
        model,
        [
            f'z = pipe({seeds}, output_type="latent").images',
            "changed = z.flatten(1).clone()",
            f"changed[:, {indices}] = torch.tensor({numbers})",
            "images = pipe(latents=changed.reshape(z.shape)).images",
        ],
    )
