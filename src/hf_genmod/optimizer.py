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
        embeddings = {
            row for module in model.modules() if isinstance(module, nn.Embedding) for row in module.parameters()
        }
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
        matrices = [W for W in matrices if W.grad is not None]
        momenta = []
        for W in matrices:
            state = self.state[W]
            if not state:
                state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(W)}  # AdamW expects a "step"
            B = state["momentum_buffer"].lerp_(W.grad, 1 - momentum)
            momenta.append(W.grad.lerp(B, momentum).flatten(1))
        for W, M in zip(matrices, orthogonalize(momenta), strict=True):
            W.mul_(1 - lr * weight_decay)
            W.sub_(M.view_as(W), alpha=lr * 0.2 * max(M.shape) ** 0.5)
            W.grad = None  # which AdamW takes for a parameter to leave alone


def orthogonalize(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """
    (M Mᵀ)^(−1/2) M for each M, roughly: M with its singular values brought to about 1 (0.7 to 1.2 for those above a
    hundredth of its norm) by three steps of the iteration X ← (a + b X Xᵀ + c (X Xᵀ)²) X of Jordan et al. 2024. All
    steps are polynomials of the Gram matrix M Mᵀ, so they are taken on it, and on all of one size together.

    The iteration starts from singular values σ of at most 1, the larger the better: M is divided by (Σ σ⁸)^(1/8),
    which is closer to the largest than the norm of M is.

    Args:
        matrices (`list[torch.Tensor]`): Of shapes `(m, n)`.

    Returns:
        `list[torch.Tensor]`: Of the same shapes; zero where M is.
    """
    wide = [M if M.shape[0] <= M.shape[1] else M.T for M in matrices]
    wide = [M / M.norm().clamp(min=1e-30) for M in wide]
    results = list(matrices)
    for size in {len(M) for M in wide}:
        members = [i for i, M in enumerate(wide) if len(M) == size]
        roots = _inverse_square_root(torch.stack([wide[i] @ wide[i].T for i in members]))
        for i, root in zip(members, roots, strict=True):
            X = (root @ wide[i]).to(matrices[i].dtype)
            results[i] = X if X.shape == matrices[i].shape else X.T
    return results


def _inverse_square_root(gram):
    """About G^(−1/2) for each G of (k, m, m)."""
    scale = (gram @ gram).square().sum((1, 2), keepdim=True).pow(0.25)  # (Σ σ⁸)^(1/4), as G has σ²
    scale = scale.clamp(min=1e-4)  # the norm of M is 1, so it is more than that but for M = 0
    gram = gram / scale
    product = factor = _factor(gram)  # what M, and X, are multiplied by
    for _ in range(2):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    return product * scale.rsqrt()


def _factor(gram):
    """a + b G + c G²."""
    factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    factor.diagonal(dim1=1, dim2=2).add_(3.4445)
    return factor
