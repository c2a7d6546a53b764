"""The loss of an autoencoder."""

import torch
import torch.nn.functional as F

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
