"""Training objectives: callables `(model, batch, rng) -> loss, metrics`.

`batch["images"]` is x_0, (n, channels, height, width) in [-1, 1] (or latents), `batch["class_labels"]` is y, (n,).
Whatever is random is drawn from `rng` ([`~hf_genmod.randomness.BatchRandom`]), which is seeded for each picture. Where
`by_noise_level` is true, timesteps are `rng.stratified()`, in the order of the pictures' positions.
A training batch may tell in `batch["fraction"]` how much of the run is over, from 0 to 1.
"""

import math

import torch
import torch.nn.functional as F

from hf_genmod.pipelines.genmod_pipelines import enlarge, noised_by, shrink
from hf_genmod.randomness import cut

WEIGHTINGS = ("simple", "min_snr", "balanced", "vlb")
PIXEL_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}


class ReconstructionObjective:
    r"""
    The loss of an autoencoder x̂ = g(f(x)):

        L = ‖x − x̂‖² or |x − x̂|, + w ‖φ(x) − φ(x̂)‖²

    each a mean over values, where φ are the features of a network that is not trained (Johnson et al. 2016,
    https://arxiv.org/abs/1603.08155, Eq. 2). With a `mask`, f sees x with squares of 4×4 pixels blackened, and its
    features come to know what belongs together (masking noise, Vincent et al. 2010,
    https://jmlr.org/papers/v11/vincent10a.html).

    Args:
        loss (`str`, defaults to `"mse"`): `"mse"` or `"l1"`, of the pixels.
        perceptual (`Callable`, *optional*): φ, from pictures in [-1, 1] to features, a tensor or a list of them, whose
            losses are averaged. A module is frozen and put into evaluation mode.
        perceptual_weight (`float`, defaults to 1.0): w.
        mask (`float`, defaults to 0.0): Probability with which each square is hidden from f, in [0, 1).

    Raises:
        ValueError: If the loss is unknown or the mask no such probability.
    """

    def __init__(self, loss: str = "mse", perceptual=None, perceptual_weight: float = 1.0, mask: float = 0.0):
        if loss not in PIXEL_LOSSES:
            raise ValueError(f"loss: {loss!r} is not one of {', '.join(PIXEL_LOSSES)}")
        if not 0 <= mask < 1:
            raise ValueError(f"mask: {mask} is not a probability in [0, 1)")
        if isinstance(perceptual, torch.nn.Module):
            perceptual.eval().requires_grad_(False)
        self.loss = loss
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.mask = mask

    def __call__(self, model, batch, rng) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = batch["images"]
        x_hat = model(self._hide(x, rng) if self.mask else x).sample.to(x.dtype)
        loss_pixels = PIXEL_LOSSES[self.loss](x_hat, x)
        if self.perceptual is None:
            return loss_pixels, {}

        if isinstance(self.perceptual, torch.nn.Module):
            self.perceptual.to(x.device)
        with torch.no_grad():
            features = self._features(x)
        pairs = zip(self._features(x_hat), features, strict=True)
        loss_perceptual = torch.stack([F.mse_loss(ours, theirs) for ours, theirs in pairs]).mean()
        metrics = {"loss_pixels": loss_pixels.detach(), "loss_perceptual": loss_perceptual.detach()}
        return loss_pixels + self.perceptual_weight * loss_perceptual, metrics

    def _hide(self, x, rng):
        height, width = x.shape[2:]
        hidden = rng.uniform(1, -(-height // 4), -(-width // 4)) < self.mask
        hidden = hidden.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :height, :width]
        return x.masked_fill(hidden.to(x.device), -1)

    def _features(self, x):
        features = self.perceptual(x)
        return [features] if isinstance(features, torch.Tensor) else features


class ElboObjective:
    r"""
    The evidence lower bound of a variational autoencoder (Kingma & Welling 2014, https://arxiv.org/abs/1312.6114,
    Eq. 3), which is maximised:

        E_q[log p(x | z)] − β KL(q(z | x) ‖ N(0, I)),   z = μ(x) + σ(x) ε,   ε ~ N(0, I)

    p(x | z) is the `likelihood` in the config of the [`VariationalAutoencoder`]; for a Bernoulli each picture is drawn
    anew from Bernoulli((x + 1) / 2), as values in {−1, 1}. β is 1, or another (Higgins et al. 2017,
    https://openreview.net/forum?id=Sy2fzU9gl). With `free_bits` λ the KL is Σ_j max(λ, E_x[KL_j]) over the dimensions
    of z, E_x a mean over the pictures of a call: less than λ in a dimension is not rewarded (Kingma et al. 2016,
    https://arxiv.org/abs/1606.04934, appendix C.8).

    The loss is in nats per value of a picture. The metrics know neither β nor free bits: `elbo` and `reconstruction`,
    −E_q[log p(x | z)], in nats per picture; `kl_per_dimension` in nats; `active_units`, the number of dimensions whose
    μ has a variance of more than 0.01 over the pictures (Burda et al. 2016, https://arxiv.org/abs/1509.00519,
    section 5.2); for the discretised Gaussian `bits_per_dimension`, of the ELBO.

    Args:
        beta (`float`, defaults to 1.0): β.
        beta_warmup (`float`, defaults to 0.0): Fraction of the run over which β rises from 0, linearly in
            `batch["fraction"]`; a batch without it sees the full β.
        free_bits (`float`, defaults to 0.0): λ in nats.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(self, beta: float = 1.0, beta_warmup: float = 0.0, free_bits: float = 0.0):
        if not 0 <= beta_warmup <= 1:
            raise ValueError(f"beta_warmup: {beta_warmup} is not a fraction of the run between 0 and 1")
        for name, value in (("beta", beta), ("free_bits", free_bits)):
            if value < 0:
                raise ValueError(f"{name}: {value} is negative")
        self.beta = beta
        self.beta_warmup = beta_warmup
        self.free_bits = free_bits

    def __call__(self, model, batch, rng) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x, vae = batch["images"], getattr(model, "module", model)  # out of DistributedDataParallel
        likelihood = vae.config.likelihood
        if likelihood == "bernoulli":
            x = torch.where(rng.uniform(x.shape[1:]) < (x + 1) / 2, 1.0, -1.0).to(x.dtype)
        output = model(x, epsilon=rng.normal(vae.latent_shape(*x.shape[2:]), dtype=x.dtype))

        posterior, zero = output.latent_dist, x.new_zeros(())
        reconstruction = -log_likelihood(likelihood, x, output).mean()
        kl = gaussian_kl(posterior.mean, posterior.logvar, zero, zero).flatten(1).mean(dim=0)  # (d,)
        beta = self.beta * min(1.0, batch.get("fraction", 1.0) / self.beta_warmup) if self.beta_warmup else self.beta
        loss = (reconstruction + beta * kl.clamp(min=self.free_bits).sum()) / x[0].numel()

        elbo = -(reconstruction + kl.sum()).detach()
        variance_of_mean = posterior.mean.detach().flatten(1).var(dim=0, correction=0)  # (d,)
        metrics = {
            "elbo": elbo,
            "reconstruction": reconstruction.detach(),
            "kl_per_dimension": kl.detach().mean(),
            "active_units": (variance_of_mean > 0.01).sum().to(x.dtype),
        }
        if likelihood == "discretised_gaussian":
            metrics["bits_per_dimension"] = -elbo / (x[0].numel() * math.log(2))
        return loss, metrics


class NoisyClassificationObjective:
    r"""
    The cross-entropy of a classifier that sees noise (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233,
    section 4):

        t ~ Uniform{0, ..., T-1},  x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε,  L = −log f_φ(y | x_t)

    Args:
        scheduler ([`AncestralDDPMScheduler`]): The forward process of the model that it will guide.
    """

    by_noise_level = True

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def __call__(self, model, batch, rng) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x_0, y = batch["images"], batch["class_labels"]
        t, x_t, _ = noised(x_0, self.scheduler, rng)
        logits = model(x_t, t).logits.to(x_0.dtype)
        accuracy = (logits.argmax(dim=1) == y).to(x_0.dtype).mean()
        return F.cross_entropy(logits, y), {"accuracy": accuracy}


class DenoisingObjective:
    r"""
    The loss of a denoising diffusion model, Algorithm 1 of Ho et al. 2020 (https://arxiv.org/abs/2006.11239):

        t ~ Uniform{0, ..., T-1},  ε ~ N(0, I),  x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε
        L = w_t ‖target − model(x_t, t, y)‖²,  target = ε, x_0 or v, as the scheduler's `prediction_type` says

    where y, a label or a caption, is replaced by the null label or "" with probability `condition_dropout` (Ho &
    Salimans 2022, https://arxiv.org/abs/2207.12598, Algorithm 1). Of a picture's captions one is drawn.

    With `small`, the model is an upsampler: it sees the picture made small and enlarged again, too.

    A model with twice the output channels learns the variance Σ_θ too, by L_simple + 0.001 L_vlb, in which L_vlb
    does not move the mean (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, Eq. 16).

    Args:
        scheduler ([`AncestralDDPMScheduler`]): The forward process and what is predicted.
        null_label (`int`, *optional*): `unet.null_label`; `None` trains a model without labels.
        weighting (`str`, defaults to `"simple"`): `"simple"`, w_t = 1 (L_simple, Eq. 14 of Ho et al.); `"min_snr"`,
            min(SNR_t, 5) on the error of x̂_0 (Hang et al. 2023, https://arxiv.org/abs/2303.09556); `"balanced"`,
            sech(log σ_t + ½) with σ_t² = 1 / SNR_t on the error of v, which is about the inverse of the error that
            training leaves at each noise level, so that none outweighs the others, as the uncertainty weights of
            Karras et al. 2024 (https://arxiv.org/abs/2312.02696) learn to do; `"vlb"`, the variational bound
            itself, T · L_t, in bits per dimension.
        condition_dropout (`float`, defaults to 0.1): In [0, 1].
        text (`Callable`, *optional*): From n captions to the model's keyword arguments of them, tensors (n, ...):
            [`~hf_genmod.text.Tokens`] or [`~hf_genmod.text.FrozenText`].
        small (`Callable`, *optional*): From x_0 and `rng` to the x_0 to train on and the model's keyword arguments:
            [`SmallPictures`].

    Raises:
        ValueError: If the weighting is unknown or the dropout not a probability.
    """

    by_noise_level = True

    def __init__(
        self,
        scheduler,
        null_label: int | None = None,
        weighting: str = "simple",
        condition_dropout: float = 0.1,
        text=None,
        small=None,
    ):
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting: {weighting!r} is not one of {', '.join(WEIGHTINGS)}")
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"condition_dropout: {condition_dropout} is not a probability between 0 and 1")
        self.scheduler = scheduler
        self.null_label = null_label
        self.weighting = weighting
        self.condition_dropout = condition_dropout
        self.text = text
        self.small = small

    def __call__(self, model, batch, rng) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scheduler, x_0 = self.scheduler, batch["images"]
        condition = {}
        if self.small is not None:
            x_0, condition = self.small(x_0, rng)
        t, x_t, epsilon = noised(x_0, scheduler, rng)

        if self.null_label is not None:
            dropped = rng.uniform() < self.condition_dropout
            condition["class_labels"] = batch["class_labels"].masked_fill(dropped, self.null_label)
        if self.text is not None:
            captions = self._draw_captions(batch["captions"], rng)
            condition |= {name: value.to(x_0.device) for name, value in self.text(captions).items()}

        model_output = model(x_t, t, **condition).sample.to(x_0.dtype)
        if self.weighting == "vlb":
            return self._variational_bound(model_output, x_0, x_t, t), {}

        prediction, predicted_variance = scheduler.split_model_output(model_output, x_t)
        squared_error = (self._target(x_0, epsilon, t) - prediction).square().flatten(1).mean(dim=1)  # (n,)
        loss = (self._weight(t) * squared_error).mean()
        if predicted_variance is None:
            return loss, {}

        frozen_mean = torch.cat([prediction.detach(), predicted_variance], dim=1)
        vlb = self._variational_bound(frozen_mean, x_0, x_t, t)
        return loss + 0.001 * vlb, {"loss_simple": loss.detach(), "loss_vlb": vlb.detach()}

    def _draw_captions(self, captions, rng) -> list[str]:
        """One of each picture's captions, or ""."""
        dropped, which = (rng.uniform() < self.condition_dropout).tolist(), rng.uniform().tolist()
        captions = [[of_picture] if isinstance(of_picture, str) else of_picture for of_picture in captions]
        return [
            "" if drop else of_picture[int(u * len(of_picture))]
            for of_picture, drop, u in zip(captions, dropped, which, strict=True)
        ]

    def _variational_bound(self, model_output, x_0, x_t, t):
        T = self.scheduler.config.num_train_timesteps
        return T * variational_bound_term(self.scheduler, model_output, x_0, x_t, t).mean()

    def _target(self, x_0, epsilon, t):
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            return epsilon
        if prediction_type == "sample":
            return x_0
        return self.scheduler.get_velocity(x_0, epsilon, t)

    def _weight(self, t):
        """w_t: 1, or the weight of the squared error of x̂_0 over the ratio of the prediction's to it."""
        if self.weighting == "simple":
            return torch.ones_like(t, dtype=torch.float32)
        alpha_bar_t = self.scheduler.alphas_cumprod.to(t.device)[t]
        snr = (alpha_bar_t / (1 - alpha_bar_t)).clamp(min=1e-12)
        if self.weighting == "min_snr":
            weight = snr.clamp(max=5)
        else:
            weight = (snr + 1) / torch.cosh(0.5 - 0.5 * torch.log(snr))
        if self.scheduler.config.prediction_type == "epsilon":
            return weight / snr  # ‖ε − ε̂‖² = SNR ‖x_0 − x̂_0‖²
        if self.scheduler.config.prediction_type == "sample":
            return weight
        return weight / (snr + 1)  # ‖v − v̂‖² = (SNR + 1) ‖x_0 − x̂_0‖²


class SmallPictures:
    r"""
    What an upsampler sees of a picture x_0 beside x_t, as [`SuperResolutionPipeline`] shows it (conditioning
    augmentation, Ho et al. 2022, https://arxiv.org/abs/2106.15282, section 4.2):

        y = D(x_0),   c = U(√ᾱ_s y + √(1−ᾱ_s) ε′),   s = ⌊(m + 1) u²⌋,   u ~ Uniform[0, 1),  ε′ ~ N(0, I)

    where D makes the picture small and U enlarges. Little noise is more frequent than much, as it is in use.

    Args:
        scheduler ([`AncestralDDPMScheduler`]): Whose ᾱ.
        factor (`int`, defaults to 2): How many times smaller y is.
        max_noise_level (`int`, defaults to 250): m in timesteps; 0 trains without noise.
        crop_size (`int`, *optional*): Height and width of the part of each picture, drawn anew in every step, that is
            trained on; by default the whole.

    Raises:
        ValueError: If the noise level is no timestep, or the crop no multiple of the factor.
    """

    def __init__(self, scheduler, factor: int = 2, max_noise_level: int = 250, crop_size: int | None = None):
        T = scheduler.config.num_train_timesteps
        if not 0 <= max_noise_level <= T:
            raise ValueError(f"max_noise_level: {max_noise_level} is not between 0 and {T}, the timesteps there are")
        if crop_size is not None and (crop_size < 1 or crop_size % factor):
            raise ValueError(f"crop_size: {crop_size} is not a multiple of the factor {factor}")
        self.scheduler = scheduler
        self.factor = factor
        self.max_noise_level = max_noise_level
        self.crop_size = crop_size

    def __call__(self, x_0, rng) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        y = shrink(x_0, self.factor)  # (n, C, h, w)
        s = ((self.max_noise_level + 1) * rng.uniform().square()).long()
        y = noised_by(self.scheduler, y, rng.normal(y.shape[1:], dtype=y.dtype), s)
        c = enlarge(y, self.factor)
        if self.crop_size is not None:  # after all that looks beyond its border
            x_0, c = self._crop(torch.cat([x_0, c], dim=1), rng).chunk(2, dim=1)
        return x_0, {"conditioning_image": c, "conditioning_timestep": s}

    def _crop(self, images, rng):
        room = torch.tensor([(length - self.crop_size) // self.factor for length in images.shape[2:]])
        corners = self.factor * (rng.uniform(2).cpu() * (room + 1)).long()  # (n, 2)
        return cut(images, corners.tolist(), (self.crop_size, self.crop_size))


def noised(x_0, scheduler, rng) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """t ~ Uniform{0, ..., T-1}, one for each picture (n,), stratified over the batch; x_t; and the ε in it."""
    T = scheduler.config.num_train_timesteps
    t = (T * rng.stratified()).long().clamp(max=T - 1)
    epsilon = rng.normal(x_0.shape[1:], dtype=x_0.dtype)
    return t, scheduler.add_noise(x_0, epsilon, t), epsilon


def variational_bound_term(
    scheduler, model_output, x_0, x_t, t, clip: bool = False, likelihood: str = "discretised_gaussian"
) -> torch.Tensor:
    """
    L_t, one term of the variational bound on −log p(x_0) (Ho et al. 2020, Eq. 5):

        L_{t−1} = KL( q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t) ) for t > 1,   L_0 = −log p_θ(x_0 | x_1)

    in the paper's indices, whose t is the argument `t` plus one; both sides are Gaussian, and L_0 is the likelihood of
    8-bit pictures (Eq. 13).

    Args:
        scheduler ([`AncestralDDPMScheduler`]): Gives both sides; its `variance_type` says what Σ_θ is.
        model_output (`torch.Tensor` of shape `(n, c, h, w)`, or `(n, 2c, h, w)` with a learned variance).
        x_0, x_t (`torch.Tensor` of shape `(n, c, h, w)`): A picture in [-1, 1], and the same at t.
        t (`torch.Tensor` of shape `(n,)`): Integers in 0 ... T-1.
        clip (`bool`, defaults to `False`): Clip x̂_0 as sampling does, to measure rather than to train.
        likelihood (`str`): Of x_0: `"discretised_gaussian"`, or the density `"gaussian"` where it is no picture of 8
            bits but latents.

    Returns:
        `torch.Tensor` of shape `(n,)`: L_t in bits per dimension.
    """
    prediction, predicted_variance = scheduler.split_model_output(model_output, x_t)
    predicted_x_0 = scheduler.predict_original_sample(prediction, t, x_t, clip=clip)
    p_mean = scheduler.posterior_mean(predicted_x_0, t, x_t)
    p_log_variance = scheduler.reverse_log_variance(t, x_t, predicted_variance=predicted_variance)
    p_log_variance = p_log_variance.expand_as(p_mean)

    q_mean = scheduler.posterior_mean(x_0, t, x_t)
    q_log_variance = scheduler.posterior_log_variance(t, x_t)
    kl = gaussian_kl(q_mean, q_log_variance, p_mean, p_log_variance)
    log_p = {"discretised_gaussian": discretised_gaussian_log_likelihood, "gaussian": gaussian_log_likelihood}
    nll = -log_p[likelihood](x_0, p_mean, p_log_variance)
    first = (t == 0).reshape(-1, *[1] * (x_0.ndim - 1))
    return torch.where(first, nll, kl).flatten(1).mean(dim=1) / math.log(2)


def log_likelihood(likelihood: str, x, output) -> torch.Tensor:
    """
    log p(x | z) in nats, summed over the values of each picture.

    Args:
        likelihood (`str`): `"gaussian"`, `"discretised_gaussian"` or `"bernoulli"`, see [`VariationalAutoencoder`].
        x (`torch.Tensor` of shape `(n, c, h, w)`): In [-1, 1]; on the grid of 8-bit values for the discretised
            Gaussian, -1 or 1 for the Bernoulli.
        output: p(x | z), with `sample` and `log_variance` of a Gaussian or `logits` of a Bernoulli.

    Returns:
        `torch.Tensor` of shape `(n,)`.

    Raises:
        ValueError: If the output is that of another likelihood.
    """
    if (likelihood == "bernoulli") != (output.logits is not None):
        given = "a variance and no logits" if output.logits is None else "logits and no variance"
        raise ValueError(f"likelihood: {likelihood!r}, but the model gives {given}; use the likelihood of its config")
    if likelihood == "bernoulli":
        values = F.logsigmoid(x * output.logits.to(x.dtype))  # p(x = −1) = 1 − sigmoid(l) = sigmoid(−l)
    else:
        mean, log_variance = output.sample.to(x.dtype), output.log_variance.to(x.dtype)
        if likelihood == "discretised_gaussian":
            values = discretised_gaussian_log_likelihood(x, mean, log_variance)
        else:
            values = gaussian_log_likelihood(x, mean, log_variance)
    return values.flatten(1).sum(dim=1)


def gaussian_kl(mean_1, log_variance_1, mean_2, log_variance_2) -> torch.Tensor:
    """KL( N(μ_1, σ_1²) ‖ N(μ_2, σ_2²) ) = ½ (log σ_2²/σ_1² + σ_1²/σ_2² + (μ_1 − μ_2)²/σ_2² − 1), elementwise."""
    difference = log_variance_2 - log_variance_1
    return 0.5 * (difference + torch.exp(-difference) + (mean_1 - mean_2) ** 2 * torch.exp(-log_variance_2) - 1)


def gaussian_log_likelihood(x, mean, log_variance) -> torch.Tensor:
    """log N(x; μ, σ²), elementwise, in nats."""
    return -0.5 * ((x - mean) ** 2 * torch.exp(-log_variance) + log_variance + math.log(2 * math.pi))


def discretised_gaussian_log_likelihood(x_0, mean, log_variance) -> torch.Tensor:
    """
    log ∫ N(x; μ, σ²) dx over the 8-bit bin of x_0, elementwise, in nats (Ho et al. 2020, Eq. 13): bins are 2/255 wide
    around k/127.5 − 1, and the first and the last are open to −∞ and +∞.
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    lower = ((x_0 - 1 / 255 - mean) * inverse_std).masked_fill(x_0 < -0.999, -1e4)
    upper = ((x_0 + 1 / 255 - mean) * inverse_std).masked_fill(x_0 > 0.999, 1e4)
    # Φ(u) − Φ(l) = Φ(−l) − Φ(−u): on the side where both are small, the difference keeps its digits.
    right = lower + upper > 0
    lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log1p(-torch.exp((log_lower - log_upper).clamp(max=-1e-7)))
