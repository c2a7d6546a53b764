"""The loss of an autoencoder."""

import torch
import torch.nn.functional as F

PIXEL_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}


class ReconstructionObjective:
    r"""
    The loss of an autoencoder x̂ = g(f(x)), a mean over values:

        L = ‖x − x̂‖² or |x − x̂|

    With a `mask`, f sees x with squares of 4×4 pixels blackened, so that its features learn which parts of images
    belong together (masking noise, Vincent et al. 2010, https://jmlr.org/papers/v11/vincent10a.html).

    Args:
        loss (`str`, defaults to `"mse"`): `"mse"` or `"l1"`.
        mask (`float`, defaults to 0.0): Probability with which each square is hidden from f, in [0, 1).
    """

    def __init__(self, loss: str = "mse", mask: float = 0.0):
        if loss not in PIXEL_LOSSES:
            raise ValueError(f"loss: {loss!r} is not one of {', '.join(PIXEL_LOSSES)}")
        if not 0 <= mask < 1:
            raise ValueError(f"mask: {mask} is not a probability in [0, 1)")
        self.loss = loss
        self.mask = mask

    def __call__(self, model, batch, rng) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = batch["images"]
        seen, (height, width) = x, x.shape[2:]
        if self.mask:
            hidden = rng.uniform(1, -(-height // 4), -(-width // 4)) < self.mask
            hidden = hidden.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :height, :width]
            seen = x.masked_fill(hidden.to(x.device), -1)
        return PIXEL_LOSSES[self.loss](model(seen).sample.to(x.dtype), x), {}
