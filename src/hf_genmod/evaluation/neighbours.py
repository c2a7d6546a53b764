"""Precision, recall, density, coverage and memorisation, by nearest neighbours."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_genmod.evaluation.distances import checked_features
from hf_genmod.evaluation.estimates import Estimate, Share, with_interval


def neighbourhoods(real: Tensor, generated: Tensor, k: int = 5, batch_size: int = 2048) -> dict[str, Estimate]:
    """
    Measures how much the regions of generated and of real images overlap, by features (n, d) and (m, d), more than k
    of each, and best as many of both. With B(x) the ball around x whose radius is the distance to the k-th nearest
    neighbour in the set of x:

    - precision: the share of generated images that are in the B of a real image (Kynkäänniemi et al. 2019,
      https://arxiv.org/abs/1904.06991, Eq. 2);
    - recall: the share of real images that are in the B of a generated image (the same, Eq. 3), whose interval also
      covers how it varies among random halves of the generated images, a few of which may reach many real ones;
    - density: the number of B of real images that a generated image is in, over k: about 1 for real images (Naeem et
      al. 2020, https://arxiv.org/abs/2002.09797, Eq. 5);
    - coverage: the share of real images whose B holds a generated image (the same, Eq. 6).

    `batch_size` rows of the distance matrix are computed at once. Raises a `ValueError` as `checked_features` does.
    """
    real, generated = checked_features(real, generated, least=k + 1)
    of_real = _radii(real, k, batch_size)
    precise, density, covered = [], [], torch.zeros(len(real), dtype=torch.bool)
    for part in generated.split(batch_size):
        within_real = torch.cdist(part, real) <= of_real  # (part, n)
        precise.append(within_real.any(dim=1))
        density.append(within_real.sum(dim=1))
        covered |= within_real.any(dim=0)
    recall = Share.of(_recalled(real, generated, k, batch_size))
    if len(generated) >= 2 * (k + 1):
        of_halves = with_interval(lambda x: _recalled(real, x, k, batch_size).double().mean().item(), generated)
        recall = recall.widened(of_halves.standard_error)
    return {
        "precision": Share.of(torch.cat(precise)),
        "recall": recall,
        "density": Estimate.of(torch.cat(density) / k),
        "coverage": Share.of(covered),
    }


def _radii(x: Tensor, k: int, batch_size: int) -> Tensor:
    """The distance of each image to its k-th neighbour; the nearest is the image itself."""
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(batch_size)])


def _recalled(real: Tensor, generated: Tensor, k: int, batch_size: int) -> Tensor:
    """Which of the real images are in the B of a generated image, (n,)."""
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for part, radii in zip(
        generated.split(batch_size), _radii(generated, k, batch_size).split(batch_size), strict=True
    ):
        recalled |= (torch.cdist(part, real) <= radii[:, None]).any(dim=0)
    return recalled


@dataclass(frozen=True, eq=False)
class MemorisationAudit:
    """How many samples are nearer to a training image than held-out images are."""

    threshold: float  # 1% of held-out images are nearer than this to a training image
    share: Share  # of samples that are nearer than the threshold
    flagged: bool  # whether the share exceeds 1% by more than three standard errors
    nearest: Tensor  # the index of the training image nearest to each sample, (n,)
    distances: Tensor  # the distance to that image, (n,)


def audit_memorisation(samples: Tensor, training: Tensor, held_out_distances: Tensor) -> MemorisationAudit:
    """
    Tests whether samples (n, ...) copy training images (N, ...), by distances of pixels or of features. The threshold
    is the 1% quantile of the distances of m held-out images to the nearest training image, as [`nearest_of`] returns
    them; `ValueError` if m < 100. The standard error of the share p is √(p (1 − p) (1/n + 1/m)).
    """
    n, m = len(samples), len(held_out_distances)
    if m < 100:
        raise ValueError(f"held_out_distances: {m} images have no 1% quantile; hold out 100")
    threshold = held_out_distances.quantile(0.01).item()
    distances, nearest = nearest_of(samples, training)
    share = Share.of(distances < threshold)
    error = math.sqrt(share.value * (1 - share.value) * (1 / n + 1 / m))
    return MemorisationAudit(threshold, share, share.value - 0.01 > 3 * error, nearest, distances)


def nearest_of(
    x: Tensor, others: Tensor, batch_size: int = 256, candidates: int = 16, at_once: int = 2**28
) -> tuple[Tensor, Tensor]:
    """
    The Euclidean distance in fp64 of each of `x`, (n, ...), to the nearest of `others`, (N, ...), and its index. So
    many values of `others` are in memory in fp32 `at_once`.

    Of each such part it is the nearest of the `candidates` y of the least ‖y − c‖² − 2 (x − c)·(y − c), computed in
    fp32 with the mean c of the part. So another one is nearer only if fp32 cannot tell it apart from that many.
    """
    x, parts = x.flatten(1), others.flatten(1).split(max(1, at_once // others[0].numel()))
    found = [_nearest_of_part(x, part, batch_size, candidates) for part in parts]
    distances, part = torch.stack([distance for distance, _ in found]).min(dim=0)
    place = torch.stack([index for _, index in found]).gather(0, part[None])[0]
    return distances, place + part * len(parts[0])


def _nearest_of_part(x: Tensor, others: Tensor, batch_size: int, candidates: int) -> tuple[Tensor, Tensor]:
    centre = others.mean(dim=0, dtype=torch.float32)
    centred = others.float() - centre  # (N, D)
    squares = centred.square().sum(dim=1)
    distances, indices = [], []
    for part in tqdm(x.split(batch_size), "Nearest images", leave=False, disable=None):
        near = torch.addmm(squares, part.float() - centre, centred.T, alpha=-2)  # (part, N)
        near = near.topk(min(candidates, len(others)), largest=False).indices
        exact = [  # of few at once, as images may be large
            torch.cdist(few[:, None].double(), others[those].double())[:, 0]
            for few, those in zip(part.split(16), near.split(16), strict=True)
        ]
        distance, place = torch.cat(exact).min(dim=1)
        distances.append(distance)
        indices.append(near.gather(1, place[:, None])[:, 0])
    return torch.cat(distances), torch.cat(indices)
