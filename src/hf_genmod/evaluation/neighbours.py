"""Precision, recall, density, coverage and memorisation, by nearest neighbours."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_genmod.evaluation.distances import _as_features
from hf_genmod.evaluation.estimates import Estimate, Share


def neighbourhoods(
    real: Tensor, generated: Tensor, k: int = 5, batch_size: int = 2048
) -> dict[str, "Estimate | Share"]:
    """Whether generated pictures lie where real ones do, and the other way round. With B(x) the ball around x that
    reaches to its k-th nearest neighbour in its own set:

    - precision: the share of generated pictures within the B of a real one (Kynkäänniemi et al. 2019,
      https://arxiv.org/abs/1904.06991, Eq. 2);
    - recall: the share of real pictures within the B of a generated one (the same, Eq. 3);
    - density: how many B of real pictures a generated one lies in, over k: about 1 for real pictures (Naeem et al.
      2020, https://arxiv.org/abs/2002.09797, Eq. 5);
    - coverage: the share of real pictures within whose B a generated one lies (the same, Eq. 6).

    Args:
        real, generated (`torch.Tensor`): features (n, d) and (m, d), more than k of each; better as many of both.
        k (`int`, defaults to 5): which neighbour.
        batch_size (`int`, defaults to 2048): rows of the matrix of distances that are computed at once.

    Raises:
        `ValueError`: too few features, another d, or features that are not finite.
    """
    real, generated = _as_features(real, generated, least=k + 1)
    of_real, of_generated = (_distance_to_neighbour(x, k, batch_size) for x in (real, generated))
    precise, density = [], []
    recalled, covered = torch.zeros(2, len(real), dtype=torch.bool)
    for part, radii in zip(generated.split(batch_size), of_generated.split(batch_size), strict=True):
        distance = torch.cdist(part, real)  # (part, n)
        within_real = distance <= of_real
        precise.append(within_real.any(dim=1))
        density.append(within_real.sum(dim=1))
        covered |= within_real.any(dim=0)
        recalled |= (distance <= radii[:, None]).any(dim=0)
    return {
        "precision": Share.of(torch.cat(precise)),
        "recall": Share.of(recalled),
        "density": Estimate.of(torch.cat(density) / k),
        "coverage": Share.of(covered),
    }


def _distance_to_neighbour(x: Tensor, k: int, batch_size: int) -> Tensor:
    """From each row to its k-th nearest other, (n,)."""
    # The first of them is itself.
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(batch_size)])


@dataclass(frozen=True, eq=False)
class MemorisationAudit:
    """How many samples are nearer to a training picture than real pictures are that were not trained on.

    Args:
        threshold (`float`): the distance to the nearest training picture that 1% of held-out pictures are within.
        share (`Share`): the share of samples that are.
        flagged (`bool`): whether that is more than 1% by more than three standard errors.
        nearest (`torch.Tensor`): (n,), the index of the training picture that is nearest to each sample.
        distances (`torch.Tensor`): (n,), how far that is.
    """

    threshold: float
    share: "Share"
    flagged: bool
    nearest: Tensor
    distances: Tensor


def audit_memorisation(
    samples: Tensor, training: Tensor, held_out_distances: Tensor, quantile: float = 0.01
) -> MemorisationAudit:
    """Whether samples copy training pictures, by the distances of pixels or of features.

    The standard error of the share p is √(p (1 − p) (1/n + 1/m)), of n samples and m held-out pictures, which only
    estimate the threshold.

    Args:
        samples, training (`torch.Tensor`): (n, ...) and (N, ...), pictures or features.
        held_out_distances (`torch.Tensor`): (m,), of held-out pictures to the nearest training pictures, as
            `nearest_of` gives them.
        quantile (`float`, defaults to 0.01): of the held-out pictures' distances; 1/m or more.

    Raises:
        `ValueError`: too few held-out pictures for the quantile.
    """
    n, m = len(samples), len(held_out_distances)
    if m * quantile < 1:
        raise ValueError(
            f"held_out_distances: {m} pictures have no {quantile:.0%} quantile; hold out {math.ceil(1 / quantile)}"
        )
    threshold = held_out_distances.quantile(quantile).item()
    distances, nearest = nearest_of(samples, training)
    share = Share.of(distances < threshold)
    error = math.sqrt(share.value * (1 - share.value) * (1 / n + 1 / m))
    return MemorisationAudit(threshold, share, share.value - quantile > 3 * error, nearest, distances)


def nearest_of(x: Tensor, others: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """The Euclidean distance of each of `x`, (n, ...), to the nearest of the others, (N, ...), and which that is."""
    x, others = x.flatten(1).double(), others.flatten(1).double()
    nearest = [torch.cdist(part, others).min(dim=1) for part in x.split(batch_size)]
    return torch.cat([part.values for part in nearest]), torch.cat([part.indices for part in nearest])
