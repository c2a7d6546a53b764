"""Measures of generated pictures: pictures -> features -> numbers that carry their sample count.

Conventions: pictures are (n, C, H, W), uint8 in 0..255 or float in [-1, 1]; features are (n, d), one row per picture.
Pictures, classifier and labels stay on the device they are given on; statistics are taken in fp64 on the CPU.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

from hf_genmod.data import to_model_range
from hf_genmod.features import as_floats
from hf_genmod.latents import draw_latents
from hf_genmod.objectives import log_likelihood, variational_bound_term
from hf_genmod.randomness import BatchRandom
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Count, mean and covariance of features, in fp64; parts can be merged, in whatever batches they came.

    Args:
        count (`int`): n.
        mean (`torch.Tensor`): μ, (d,).
        scatter (`torch.Tensor`): Σ_i (f_i - μ)(f_i - μ)ᵀ, (d, d).
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """Σ = scatter / (n - 1), (d, d)."""
        return self.scatter / (self.count - 1)

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Statistics of `features`, (n, d) with n ≥ 1. Raises `ValueError` where they are not that or not finite."""
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"features: shape {tuple(features.shape)}; give (n, d) with at least one row.")
        features = features.detach().cpu().double()
        num_bad = int((~features.isfinite()).any(dim=1).sum())
        if num_bad:
            raise ValueError(f"features: {num_bad} of {len(features)} rows are not finite; look at those pictures.")
        mean = features.mean(dim=0)
        return cls(len(features), mean, (features - mean).T @ (features - mean))

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Statistics of both sets: S = S_a + S_b + (n_a n_b / n) δδᵀ with δ = μ_b - μ_a (Chan et al. 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        return FeatureStatistics(
            count,
            self.mean + delta * (other.count / count),
            self.scatter + other.scatter + torch.outer(delta, delta) * (self.count * other.count / count),
        )


def frechet_distance(a: Tensor | FeatureStatistics, b: Tensor | FeatureStatistics) -> float:
    """Fréchet distance of two sets of features, each taken as a Gaussian.

    d² = ‖μ_a - μ_b‖² + Tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^{1/2})

    (Dowson and Landau 1982; for generated pictures Heusel et al. 2017, Eq. 6). It falls as the sets grow, so compare
    it only at equal counts.

    Args:
        a, b (`torch.Tensor` or `FeatureStatistics`): features (n, d) with n > d, or their statistics.

    Returns:
        `float`: d², at least 0, in squared units of the features.

    Raises:
        `ValueError`: no more features than dimensions (a singular covariance); another d; features that are not
            finite.
    """
    a, b = (x if isinstance(x, FeatureStatistics) else FeatureStatistics.of(x) for x in (a, b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features: {len(a.mean)} and {len(b.mean)} dimensions; use one feature function for both.")
    for statistics in (a, b):
        if statistics.count <= len(statistics.mean):
            raise ValueError(
                f"features: {statistics.count} samples of {len(statistics.mean)} dimensions have a singular "
                f"covariance; give at least {len(statistics.mean) + 1} samples."
            )
    # With Σ = R Rᵀ, Tr (Σ_a Σ_b)^{1/2} is the sum of the singular values of R_aᵀ R_b: no root of a product of
    # matrices, whose small eigenvalues rounding makes negative or complex.
    root_a, root_b = (_root(statistics.covariance) for statistics in (a, b))
    trace_of_root = torch.linalg.svdvals(root_a.T @ root_b).sum()
    d2 = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root
    return max(d2.item(), 0.0)


def kernel_distance(a: Tensor, b: Tensor, biased: bool = False, batch_size: int = 2048) -> float:
    """Kernel distance of two sets of features: the squared maximum mean discrepancy

    MMD² = E k(a, a') + E k(b, b') - 2 E k(a, b),   k(x, y) = (xᵀy / d + 1)³

    (Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401, section 4). Its estimate without bias, unlike the Fréchet
    distance, does not fall as the sets grow, and may be below 0.

    Args:
        a, b (`torch.Tensor`): features (n, d) and (m, d), two or more of each.
        biased (`bool`, defaults to `False`): count the pairs of a picture with itself, too: 0 for equal sets.
        batch_size (`int`, defaults to 2048): rows of the matrix of kernels that are computed at once.

    Raises:
        `ValueError`: too few features, another d, or features that are not finite.
    """
    a, b = _as_features(a, b)

    def mean_kernel(x, y, without_pairs):
        total = sum(((part @ y.T / x.shape[1] + 1) ** 3).sum() for part in x.split(batch_size))
        if without_pairs:
            return (total - ((x * x).sum(dim=1) / x.shape[1] + 1).pow(3).sum()) / (len(x) * (len(x) - 1))
        return total / (len(x) * len(y))

    return (mean_kernel(a, a, not biased) + mean_kernel(b, b, not biased) - 2 * mean_kernel(a, b, False)).item()


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


def _as_features(a: Tensor, b: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    for x in (a, b):
        if x.ndim != 2 or len(x) < least:
            raise ValueError(f"features: shape {tuple(x.shape)}; give (n, d) of at least {least} pictures.")
        if not x.isfinite().all():
            raise ValueError("features: some are not finite; look at those pictures.")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features: {a.shape[1]} and {b.shape[1]} dimensions; use one feature function for both.")
    return a.detach().cpu().double(), b.detach().cpu().double()


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


@dataclass(frozen=True)
class Estimate:
    """What `count` pictures tell of a number, with its 95% interval, printed as "1.23 (1.1–1.36, n = 1000)"."""

    value: float
    count: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g}–{self.high:.3g}, n = {self.count})"

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """The mean of a value of each picture, (n,), ± 1.96 standard errors."""
        values = values.double()
        return cls._with_error(values.mean().item(), len(values), values.std().item() / len(values) ** 0.5)

    @classmethod
    def _with_error(cls, value, count, error):
        return cls(value, count, value - 1.96 * error, value + 1.96 * error)


def with_interval(distance: Callable[[Tensor], float], features: Tensor, draws: int = 20, seed: int = 0) -> Estimate:
    """A distance of features, and how much chance is in it: ± 1.96 standard errors, by subsampling without replacement
    (Politis, Romano and Wolf 1999). Of halves drawn so, the variance around the whole is that of the whole around the
    truth, (σ²/(n/2)) (1 − 1/2) = σ²/n.

    Args:
        distance (`Callable`): from features to the distance.
        features (`torch.Tensor`): (n, d), of generated pictures.
        draws (`int`, defaults to 20): halves that are drawn.
        seed (`int`, defaults to 0): decides them.
    """
    rng, half = torch.Generator().manual_seed(seed), len(features) // 2
    halves = [distance(features[torch.randperm(len(features), generator=rng)[:half]]) for _ in range(draws)]
    error = torch.tensor(halves, dtype=torch.float64).std().item()
    return Estimate._with_error(distance(features), len(features), error)


@dataclass(frozen=True)
class Share:
    """A share of `count` pictures with its 95% Wilson interval, printed as "96.4% (95.1–97.4%, n = 1000)"."""

    value: float
    count: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({100 * self.low:.1f}–{self.high:.1%}, n = {self.count})"

    @classmethod
    def of(cls, hits: Tensor) -> "Share":
        """The share of those that are true, of a `bool` (n,).

        With p = k/n and z = 1.96 the interval is (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) (Wilson 1927); it
        is right for shares near 0 and 1 too, where the usual ± 1.96 standard errors is not.
        """
        n, p = len(hits), hits.double().mean().item()
        z = NormalDist().inv_cdf(0.975)
        centre = p + z**2 / (2 * n)
        half_width = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        # 0 and 1 are exact ends, which rounding would miss by 1e-17.
        low = 0.0 if p == 0 else (centre - half_width) / (1 + z**2 / n)
        high = 1.0 if p == 1 else (centre + half_width) / (1 + z**2 / n)
        return cls(p, n, low, high)


def recognised_share(predictions: Tensor, labels: Tensor | Sequence[int]) -> Share:
    """Share of pictures that a classifier takes for the class they were generated for.

    Args:
        predictions (`torch.Tensor`): (n, num_classes) logits or (n,) class indices.
        labels (`torch.Tensor` or sequence of `int`): (n,) class indices.

    Raises:
        `ValueError`: no pictures, or another number of labels than of predictions.
    """
    labels = torch.as_tensor(labels, device=predictions.device)
    if len(labels) != len(predictions) or len(labels) == 0:
        raise ValueError(f"labels: {len(labels)} for {len(predictions)} predictions; give one per picture.")
    if predictions.ndim == 2:
        predictions = predictions.argmax(dim=1)
    return Share.of(predictions == labels)


def evaluate_features(generated: Tensor, real: Tensor, seed: int = 0) -> dict[str, "Estimate | Share"]:
    """All that features of generated pictures tell beside those of real ones.

    Args:
        generated (`torch.Tensor`): (n, d), with n of 2 (d + 1) or more: the intervals take the distance of halves.
        real (`torch.Tensor`): (m, d), of which the Fréchet distance takes all, and the others n at random, as they are
            made for as many of both.
        seed (`int`, defaults to 0): decides these, and the halves.

    Returns:
        `dict`: "frechet_distance" and "kernel_distance" with intervals, "precision", "recall", "density", "coverage".

    Raises:
        `ValueError`: too few of either, another d, or features that are not finite.
    """
    n, d = generated.shape
    for name, count, least in (("samples", n, 2 * (d + 1)), ("real pictures", len(real), d + 1)):
        if count < least:
            raise ValueError(f"{name}: {count} are too few for features of {d} dimensions; take {least} or more.")
    statistics = FeatureStatistics.of(real)
    some = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:n]]
    return {
        "frechet_distance": with_interval(lambda x: frechet_distance(x, statistics), generated, seed=seed),
        "kernel_distance": with_interval(lambda x: kernel_distance(x, some), generated, seed=seed),
        **neighbourhoods(some, generated),
    }


def accuracy_by_noise_level(classifier, scheduler, dataset, num_levels: int = 11, batch_size: int = 256) -> list[dict]:
    """How often a classifier of noisy pictures is right, at timesteps at even distances from the first to the last.

    Args:
        classifier ([`NoisyImageClassifier`]): f_φ(y | x_t).
        scheduler ([`AncestralDDPMScheduler`]): the process whose x_t it sees.
        dataset ([`~hf_genmod.data.PictureDataset`] or [`~hf_genmod.latents.LatentDataset`]): labelled pictures that it
            has not been trained on. Each gets the same noise at every timestep.
        num_levels (`int`): number of timesteps.
        batch_size (`int`): pictures per forward pass.

    Returns:
        `list[dict]`: `"t"`, the noise level `"sigma"` = √((1−ᾱ_t)/ᾱ_t), and `"accuracy"`, a [`Share`], of each.
    """
    device, T = next(classifier.parameters()).device, len(scheduler)
    positions = torch.arange(len(dataset))
    levels = []
    for t in torch.linspace(0, T - 1, num_levels).round().long():
        logits, labels = [], []
        for part in positions.split(batch_size):
            batch = dataset.__getitems__(part.tolist())
            rng = BatchRandom(0, 0, part, len(positions), device)
            if "posteriors" in batch:
                x_0 = draw_latents(batch["posteriors"].to(device), rng)
            else:
                x_0 = to_model_range(batch["images"]).to(device)
            epsilon = rng.normal(x_0.shape[1:], dtype=x_0.dtype)
            with torch.no_grad():
                logits.append(classifier(scheduler.add_noise(x_0, epsilon, t), t).logits.cpu())
            labels.append(batch["class_labels"])
        alpha_bar = scheduler.alphas_cumprod[t].item()
        sigma = math.inf if alpha_bar == 0 else math.sqrt((1 - alpha_bar) / alpha_bar)
        levels.append(
            {"t": t.item(), "sigma": sigma, "accuracy": recognised_share(torch.cat(logits), torch.cat(labels))}
        )
    return levels


@torch.no_grad()
def variational_bound(
    unet: nn.Module,
    scheduler,
    pictures: Tensor,
    draws: int = 10,
    seed: int = 0,
    batch_size: int = 256,
    likelihood: str = "discretised_gaussian",
    **condition: Tensor,
) -> Estimate:
    """The variational bound on −log p(x_0) of a diffusion model, in bits per dimension (Ho et al. 2020, Eq. 5):

        Σ_t L_t + L_T,   L_T = KL( q(x_T | x_0) ‖ N(0, I) )

    L_0, the largest term, is taken of every picture; the sum of the others is estimated, without bias, from `draws`
    timesteps of each picture, stratified over the pictures, so that a thousand pictures cover them all.
    The same seed draws the same timesteps and noise for every model, so differences of two models are paired.

    Args:
        unet ([`DenoisingUNet2DModel`]): the model.
        scheduler ([`AncestralDDPMScheduler`]): its process; clips x̂_0 if it does so in sampling.
        pictures (`torch.Tensor`): (n, C, H, W), uint8, or latents.
        draws (`int`, defaults to 10): timesteps per picture, 2 or more.
        seed (`int`, defaults to 0): decides timesteps and noise.
        batch_size (`int`, defaults to 256): pictures per forward pass.
        likelihood (`str`): of x_0, as `variational_bound_term` takes it; `"gaussian"` for latents.
        condition (`torch.Tensor`): (n, ...), what the U-Net is told of each picture, such as `class_labels`.

    Returns:
        [`Estimate`]: the bound, whose interval, ± 1.96 standard errors over the draws, is for these pictures.
    """
    T, n = scheduler.config.num_train_timesteps, len(pictures)
    bounds = torch.zeros(draws, dtype=torch.float64)
    for draw in range(draws):
        # Which picture is in which stratum of time has nothing to do with their order, which may be that of classes.
        stratum = torch.randperm(n, generator=torch.Generator().manual_seed(seed + draw))
        for part in torch.arange(n).split(batch_size):
            rng = BatchRandom(seed, draw, stratum[part], n, pictures.device)
            x_0 = as_floats(pictures[part])
            told = {name: values[part] for name, values in condition.items()}
            later = 1 + ((T - 1) * rng.stratified()).long()
            for t, terms in ((torch.zeros_like(later), 1), (later, T - 1)):
                x_t = scheduler.add_noise(x_0, rng.normal(x_0.shape[1:]), t)
                model_output = unet(x_t, t, **told).sample.float()
                L_t = variational_bound_term(
                    scheduler, model_output, x_0, x_t, t, clip=True, likelihood=likelihood
                )  # (n,)
                bounds[draw] += terms * L_t.cpu().double().sum() / n

    alpha_bar_T = scheduler.alphas_cumprod[-1].cpu().double()
    mean_square = as_floats(pictures).cpu().double().square().mean()
    prior = 0.5 * (alpha_bar_T * mean_square - alpha_bar_T - torch.log1p(-alpha_bar_T)) / math.log(2)  # L_T
    return Estimate._with_error((bounds.mean() + prior).item(), n, (bounds.std() / draws**0.5).item())


@torch.no_grad()
def importance_log_likelihood(
    vae: nn.Module,
    x: Tensor,
    k: int,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
    likelihood: str | None = None,
) -> Tensor:
    """log p(x) under a variational autoencoder, estimated from below (Burda et al. 2016, Eq. 8):

        log (1/k) Σ_i p(x | z_i) p(z_i) / q(z_i | x),   z_i ~ q(z | x)

    whose expectation is the evidence lower bound at k = 1 and rises with k to log p(x).

    Args:
        vae ([`VariationalAutoencoder`]): p and q.
        x (`torch.Tensor`): (n, C, H, W), float in [-1, 1]; each value -1 or 1 for a Bernoulli likelihood.
        k (`int`): samples for each picture.
        generator (`torch.Generator`, *optional*): decides the z_i, which belong to the pictures, whatever the batches.
        batch_size (`int`, defaults to 256): z decoded at once.
        likelihood (`str`, *optional*): p(x | z), by default as it was trained; `"discretised_gaussian"` for the
            probability of pictures of 8 bits under a Gaussian.

    Returns:
        `torch.Tensor`: (n,), in nats, fp64 on the CPU.

    Raises:
        `ValueError`: no samples; values other than -1 and 1 for a Bernoulli likelihood.
    """
    likelihood, n = likelihood or vae.config.likelihood, len(x)
    if k < 1:
        raise ValueError(f"k: {k} is not positive; give the number of samples for each picture.")
    if likelihood == "bernoulli" and not (x.abs() == 1).all():
        raise ValueError("x: a bernoulli likelihood is of values -1 and 1; draw or threshold the pictures first.")
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else "cpu").item()
    estimates = []
    for part in torch.arange(n).split(batch_size):
        pictures = x[part]
        q = vae.encode(pictures).latent_dist
        log_weights = []
        for draws in torch.arange(k).split(max(batch_size // len(part), 1)):
            rngs = (BatchRandom(seed, draw, part, n, x.device) for draw in draws.tolist())
            epsilon = torch.stack([rng.normal(q.mean.shape[1:], dtype=x.dtype) for rng in rngs])  # (draws, part, ...)
            z = q.mean + q.std * epsilon
            log_p_x = log_likelihood(likelihood, pictures.repeat(len(draws), 1, 1, 1), vae.decode(z.flatten(0, 1)))
            log_ratio = 0.5 * (epsilon**2 + q.logvar - z**2).flatten(2).sum(dim=2)  # log p(z) − log q(z | x)
            log_weights.append((log_p_x.unflatten(0, log_ratio.shape) + log_ratio).cpu().double())
        estimates.append(torch.cat(log_weights).logsumexp(dim=0) - math.log(k))
    return torch.cat(estimates)


def bits_per_dimension(pipeline, pictures: Tensor, num_latents: int = 64, **condition: Tensor) -> dict[str, Estimate]:
    """Upper bounds of −log p(x) in bits per dimension, of pictures of 8 bits that a model was not trained on: the
    variational bound of a diffusion model; of a variational autoencoder the evidence lower bound, and the tighter one
    of `num_latents` z for each picture. A Gaussian p(x | z) is integrated over the 8-bit bins; of a Bernoulli the
    pictures are thresholded, and have one bit. Others have no likelihood.

    Args:
        pipeline ([`~hf_genmod.pipelines.genmod_pipelines.GenerationPipeline`]): the model.
        pictures (`torch.Tensor`): (n, C, H, W), uint8.
        num_latents (`int`, defaults to 64): z for each picture.
        condition (`torch.Tensor`): (n, ...), what the U-Net is told of each picture.

    Returns:
        `dict`: "variational bound", or "evidence lower bound" and "importance-sampled bound (64 z)"; or nothing.
    """
    if pipeline.config.get("value_range") is not None:  # measured values have no 8 bits
        return {}
    scheduler = (
        AncestralDDPMScheduler.from_config(pipeline.scheduler.config) if "unet" in pipeline.components else None
    )
    if pipeline.vae is None:
        return {"variational bound": variational_bound(pipeline.unet, scheduler, pictures, **condition)}
    likelihood = pipeline.vae.config.get("likelihood")
    if likelihood is None:
        return {}
    x = as_floats(pictures)
    x = torch.where(x < 0, -1.0, 1.0) if likelihood == "bernoulli" else x
    likelihood = "bernoulli" if likelihood == "bernoulli" else "discretised_gaussian"
    if scheduler is not None:
        bound = _bound_through_latents(pipeline.vae, pipeline.unet, scheduler, x, likelihood, **condition)
        return {"variational bound": bound}
    bounds = {"evidence lower bound": 1, f"importance-sampled bound ({num_latents} z)": num_latents}
    log_p = {name: importance_log_likelihood(pipeline.vae, x, k, likelihood=likelihood) for name, k in bounds.items()}
    return {name: Estimate.of(-values / (x[0].numel() * math.log(2))) for name, values in log_p.items()}


@torch.no_grad()
def _bound_through_latents(vae, unet, scheduler, x, likelihood, batch_size=256, **condition) -> Estimate:
    """The evidence lower bound of an autoencoder whose prior is a diffusion model of its latents (Vahdat et al. 2021,
    https://arxiv.org/abs/2106.05931, Eq. 1), in bits per dimension:

        −log p(x) ≤ E [ log q(z | x) − log p(x | z) − log p(z) ],   −log p(z) ≤ Σ_t L_t + L_T − d log s

    with z ~ q(z | x), the bound of s (z − shift), as the U-Net sees it, and s its `scaling_factor`.
    """
    latents, rest, bits = [], [], x[0].numel() * math.log(2)
    for part in torch.arange(len(x)).split(batch_size):
        q = vae.encode(x[part]).latent_dist
        epsilon = BatchRandom(0, 0, part, len(x), x.device).normal(q.mean.shape[1:], dtype=x.dtype)
        z = q.mean + q.std * epsilon
        log_q = -0.5 * (epsilon**2 + q.logvar + math.log(2 * math.pi)).flatten(1).sum(dim=1)
        log_p = log_likelihood(likelihood, x[part], vae.decode(z))
        latents.append((z - vae.config.shift_factor) * vae.config.scaling_factor)
        rest.append((log_q - log_p).cpu().double() / bits)
    latents, rest = torch.cat(latents), Estimate.of(torch.cat(rest))
    prior = variational_bound(unet, scheduler, latents, batch_size=batch_size, likelihood="gaussian", **condition)
    share = latents[0].numel() / x[0].numel()  # d / D
    value = rest.value + share * (prior.value - math.log2(vae.config.scaling_factor))
    error = math.hypot(rest.high - rest.value, share * (prior.high - prior.value)) / 1.96
    return Estimate._with_error(value, len(x), error)


def _root(covariance: Tensor) -> Tensor:
    """R with R Rᵀ = `covariance`; unlike Cholesky's, it exists for a singular one too (a dead feature)."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    return eigenvectors * eigenvalues.clamp(min=0).sqrt()
