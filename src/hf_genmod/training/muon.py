"""The optimizer: Muon for matrices, AdamW for the other parameters."""

import torch
import torch.distributed as dist
from torch import nn


class Muon(torch.optim.AdamW):
    r"""
    Orthogonalised steps for weight matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon):

        B ← μ B + (1 − μ) G,   M = μ B + (1 − μ) G
        W ← (1 − η λ) W − η · 0.2 √max(m, n) · (M Mᵀ)^(−1/2) M

    for a weight W (m × n) with gradient G. The kernel of a convolution, (out, in, height, width), is the matrix
    out × (in · height · width). The factor 0.2 √max(m, n) gives the step the same root mean square as a step of AdamW
    (Liu et al. 2025, https://arxiv.org/abs/2502.16982, Eq. 4), so both share the learning rate η. AdamW updates
    vectors (biases, normalisations) and embeddings.

    Args:
        model (`nn.Module`): The model, whose parameters that require a gradient are trained.
        lr (`float`): Learning rate η.
        momentum (`float`, defaults to 0.95): μ of the matrices.
        betas (`tuple[float, float]`, defaults to `(0.9, 0.99)`): β1 and β2 of AdamW.
        weight_decay (`float`, defaults to 0.01): λ.
        shared (`bool`, defaults to `False`): Whether all processes of `torch.distributed` have the same gradients, as
            under DistributedDataParallel. Each then computes a share of the (M Mᵀ)^(−1/2) M and broadcasts it.
    """

    def __init__(
        self, model: nn.Module, lr: float, momentum=0.95, betas=(0.9, 0.99), weight_decay=0.01, shared: bool = False
    ):
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        embeddings = {parameter for table in tables for parameter in table.parameters()}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim > 1 and parameter not in embeddings]
        others = [parameter for parameter in trained if parameter.ndim <= 1 or parameter in embeddings]
        groups = [{"params": matrices, "momentum": momentum}, {"params": others, "momentum": None}]
        super().__init__(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # only AdamW's kernel takes scaled gradients
        self.shared = shared

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
        if not matrices:
            return
        for W in matrices:
            state = self.state[W]
            if not state:  # AdamW expects a "step"
                state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(W)}
            state["momentum_buffer"].lerp_(W.grad, 1 - momentum)
        dtype, device = matrices[0].dtype, matrices[0].device.type
        if dtype == torch.float32 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)

        def directions_of(matrices):
            """(M Mᵀ)^(−1/2) M, each (out, height · width · in), the order of a channels-last kernel in memory."""
            momenta = [W.grad.lerp(self.state[W]["momentum_buffer"], momentum) for W in matrices]
            return orthogonalize([M.movedim(1, -1).flatten(1).to(dtype) for M in momenta])

        directions = _in_shares(directions_of, matrices, dtype) if self.shared else directions_of(matrices)
        for W, X in zip(matrices, directions, strict=True):
            W.mul_(1 - lr * weight_decay)
            W.movedim(1, -1).sub_(X.view_as(W.movedim(1, -1)), alpha=lr * 0.2 * max(X.shape) ** 0.5)
            W.grad = None  # so that AdamW skips the parameter


def _in_shares(function, tensors, dtype):
    """function(tensors), a matrix of `dtype` with as many rows and values for each tensor, of which each process
    computes a share and broadcasts it."""
    by_size = sorted(range(len(tensors)), key=lambda i: tensors[i].numel())
    shares = [by_size[process :: dist.get_world_size()] for process in range(dist.get_world_size())]
    mine = function([tensors[i] for i in shares[dist.get_rank()]])
    results = [None] * len(tensors)
    for process, share in enumerate(shares):
        if not share:  # there are more processes than matrices
            continue
        sizes = [tensors[i].numel() for i in share]
        flat = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
        if process == dist.get_rank():
            torch.cat([result.flatten() for result in mine], out=flat)
        dist.broadcast(flat, process)
        for i, part in zip(share, flat.split(sizes), strict=True):
            results[i] = part.view(len(tensors[i]), -1)
    return results


def orthogonalize(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """
    Approximates (M Mᵀ)^(−1/2) M for each M: its singular values become about 1 (0.7 to 1.2 for those above a hundredth
    of the norm of M), by three steps of the iteration X ← (a + b X Xᵀ + c (X Xᵀ)²) X of Jordan et al. 2024. Each step
    is a polynomial of the Gram matrix M Mᵀ, and is computed on it, for all matrices of one size together.

    The iteration needs singular values σ of at most 1 and converges faster the larger they are, so M is first divided
    by (Σ σ⁸)^(1/8), which is closer to the largest σ than the norm of M. The result is zero for M = 0.
    """
    wide = [M if M.shape[0] <= M.shape[1] else M.T for M in matrices]
    results = list(matrices)
    for size in {len(M) for M in wide}:
        members = [i for i, M in enumerate(wide) if len(M) == size]
        roots = _inverse_square_root(torch.stack([wide[i] @ wide[i].T for i in members]))
        for i, root in zip(members, roots, strict=True):
            X = root @ wide[i]
            results[i] = X if X.shape == matrices[i].shape else X.T
    return results


def _inverse_square_root(gram):
    """Approximates G^(−1/2) for each G, (k, m, m)."""
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=1e-30)  # Σ σ²
    gram = gram / trace
    scale = (gram @ gram).square().sum((1, 2), keepdim=True).pow(0.25)  # (Σ σ⁸)^(1/4), as G has σ²
    scale = scale.clamp(min=1e-4)  # only below that for M = 0, as the trace is 1
    gram = gram / scale
    product = factor = _factor(gram)  # which M and X are multiplied by
    for _ in range(2):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    return product * (trace * scale).rsqrt()


def _factor(gram):
    """a + b G + c G²."""
    factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    factor.diagonal(dim1=1, dim2=2).add_(3.4445)
    return factor
