"""The optimizer of every training run: Muon for matrices, AdamW for all else."""

import torch
from torch import nn


class Muon(torch.optim.AdamW):
    r"""
    Steps of equal length in every direction of a weight matrix (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon):

        B ← μ B + (1 − μ) G,   M = μ B + (1 − μ) G
        W ← (1 − η λ) W − η · 0.2 √max(m, n) · (M Mᵀ)^(−1/2) M

    for a weight W (m × n) with gradient G, where the kernel of a convolution, (out, in, height, width), counts as
    out × (in · height · width). The factor 0.2 √max(m, n) gives the step the root mean square that AdamW's has (Liu et
    al. 2025, https://arxiv.org/abs/2502.16982, Eq. 4), so that both share the learning rate η. Vectors (biases,
    normalisations) and embeddings, whose rows have gradients of their own, take steps of AdamW.

    Args:
        model (`nn.Module`): Whose parameters are trained, where they require a gradient.
        lr (`float`): Learning rate η.
        momentum (`float`, defaults to 0.95): μ of the matrices.
        betas (`tuple[float, float]`, defaults to `(0.9, 0.99)`): β1 and β2 of AdamW.
        weight_decay (`float`, defaults to 0.01): λ.
    """

    def __init__(self, model: nn.Module, lr: float, momentum=0.95, betas=(0.9, 0.99), weight_decay=0.01):
        embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim > 1 and parameter not in embeddings]
        others = [parameter for parameter in trained if parameter.ndim <= 1 or parameter in embeddings]
        groups = [{"params": matrices, "momentum": momentum}, {"params": others, "momentum": None}]
        super().__init__(groups, lr=lr, betas=betas, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["momentum"] is not None:
                self._step_matrices(group["lr"], group["momentum"], group["weight_decay"], group["params"])
        super().step()
        return loss

    def _step_matrices(self, lr, momentum, weight_decay, matrices):
        for W in matrices:
            if W.grad is None:
                continue
            state = self.state[W]
            if not state:
                state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(W)}  # AdamW expects a "step"
            B = state["momentum_buffer"].lerp_(W.grad, 1 - momentum)
            M = W.grad.lerp(B, momentum).flatten(1)
            W.mul_(1 - lr * weight_decay)
            W.sub_(orthogonalize(M).view_as(W), alpha=lr * 0.2 * max(M.shape) ** 0.5)
            W.grad = None  # which AdamW takes for a parameter to leave alone


def orthogonalize(M: torch.Tensor) -> torch.Tensor:
    """
    (M Mᵀ)^(−1/2) M, roughly: M with its singular values brought to about 1 (0.7 to 1.2 for those above a hundredth of
    its norm) by four steps of the iteration X ← (a + b X Xᵀ + c (X Xᵀ)²) X of Jordan et al. 2024. As all steps are
    polynomials of one Gram matrix, they are taken on it, and applied to M once.

    Args:
        M (`torch.Tensor` of shape `(m, n)`).

    Returns:
        `torch.Tensor` of shape `(m, n)`; zero where M is.
    """
    if M.shape[0] > M.shape[1]:
        return orthogonalize(M.T).T
    M = M / M.norm().clamp(min=1e-30)
    gram = M @ M.T  # (m, m), of the current X
    product = factor = _factor(gram)  # what M, and X, are multiplied by
    for _ in range(3):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    return product @ M


def _factor(gram):
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
