"""The optimizer: Muon for matrices, AdamW for the other parameters."""

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.sgd import sgd

from hf_genmod.training.averaging import fused_lerp_
from hf_genmod.training.sharding import local, of_whole_matrices


class Muon(torch.optim.AdamW):
    r"""
    Orthogonalised steps for weight matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon):

        B ← μ B + (1 − μ) G,   M = μ B + (1 − μ) G
        W ← (1 − η λ) W − η · 0.2 √max(m, n) · (M Mᵀ)^(−1/2) M

    for a weight W (m × n) with gradient G. The kernel of a convolution, (out, in, height, width), is the matrix
    out × (in · height · width). The factor 0.2 √max(m, n) gives the step the same root mean square as a step of AdamW
    (Liu et al. 2025, https://arxiv.org/abs/2502.16982, Eq. 4), so both share the learning rate η. AdamW updates
    vectors (biases, normalisations) and embeddings.

    If an attribute `found_inf`, fp32 () on the device of the parameters, is 1 and not 0 in `step`, the step changes
    nothing. The device decides so, and the host does not wait for it.

    Args:
        model (`nn.Module`): The model, whose parameters that require a gradient are trained.
        lr (`float`): Learning rate η.
        momentum (`float`, defaults to 0.95): μ of the matrices.
        betas (`tuple[float, float]`, defaults to `(0.9, 0.99)`): β1 and β2 of AdamW.
        weight_decay (`float`, defaults to 0.01): λ.
        shared (`bool`, defaults to `False`): Whether all processes of `torch.distributed` have the same gradients, or
            their shards. Each then computes a share of the (M Mᵀ)^(−1/2) M and broadcasts it.
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
                for matrices in _parts([W for W in group["params"] if W.grad is not None]):
                    self._step_matrices(matrices, group["lr"], group["momentum"], group["weight_decay"])
        super().step()
        return loss

    def _step_matrices(self, matrices, lr, momentum, weight_decay):
        for W in matrices:
            if not self.state[W]:  # AdamW expects a "step"
                self.state[W] |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(W)}
        dtype, device = matrices[0].dtype, matrices[0].device.type
        if dtype == torch.float32 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        skip = getattr(self, "found_inf", None)

        shards = local(matrices)
        buffers = local([self.state[W]["momentum_buffer"] for W in matrices])
        momenta = [_laid_out_as(W, G) for W, G in zip(shards, local([W.grad for W in matrices]), strict=True)]
        fused_lerp_(buffers, momenta, 1 - momentum, unchanged_if=skip)
        torch._foreach_lerp_(momenta, buffers, momentum)  # M, in the memory of G
        with torch.autocast(device, enabled=False):
            compute = functools.partial(_in_shares if self.shared else orthogonalize, dtype=dtype)
            directions = of_whole_matrices(compute, momenta, matrices)
        if dtype != matrices[0].dtype:
            torch._foreach_copy_(momenta, directions)
            directions = momenta
        directions = [_laid_out_as(W, X) for W, X in zip(shards, directions, strict=True)]
        sgd(  # W ← W − 0.2 η (X + λ / 0.2 W), by the kernel that has a `found_inf`
            shards, directions, [None] * len(shards), lr=0.2 * lr, weight_decay=weight_decay / 0.2, fused=True,
            found_inf=skip, momentum=0.0, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
        for W in matrices:
            W.grad = None  # so that AdamW skips the parameter


def _laid_out_as(W, G):
    """G in the order in memory of W, which kernels for many tensors at once need."""
    strides = zip(W.shape, W.stride(), G.stride(), strict=True)
    return G if all(a == b or length == 1 for length, a, b in strides) else torch.empty_like(W).copy_(G)


def _parts(matrices, max_values=2**24):
    """The matrices in parts of so many values, or of one matrix, which bounds the memory that a step takes. Those of
    one shape are together where they can be."""
    part, values = [], 0
    for W in sorted(matrices, key=lambda W: (min(_size(W)), W.shape)):
        if part and values + W.numel() > max_values:
            yield part
            part, values = [], 0
        part.append(W)
        values += W.numel()
    if part:
        yield part


def _size(M):
    """Height and width of the matrix that M, (height, ...), is."""
    return len(M), M.numel() // len(M)


def _in_shares(matrices, dtype):
    """`orthogonalize`, of which each process computes a share and broadcasts it."""
    by_size = sorted(range(len(matrices)), key=lambda i: matrices[i].numel())
    shares = [by_size[process :: dist.get_world_size()] for process in range(dist.get_world_size())]
    mine = orthogonalize([matrices[i] for i in shares[dist.get_rank()]], dtype)
    results = [None] * len(matrices)
    for process, share in enumerate(shares):
        if not share:  # there are more processes than matrices
            continue
        sizes = [matrices[i].numel() for i in share]
        flat = torch.empty(sum(sizes), dtype=dtype, device=matrices[0].device)
        parts = [part.as_strided(matrices[i].shape, matrices[i].stride())
                 for i, part in zip(share, flat.split(sizes), strict=True)]  # fmt: skip
        if process == dist.get_rank():
            torch._foreach_copy_(parts, mine)
        dist.broadcast(flat, process)
        for i, part in zip(share, parts, strict=True):
            results[i] = part
    return results


def orthogonalize(matrices: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """
    Approximates √n (M Mᵀ)^(−1/2) M for each M, where n is the larger of its height and width: its singular values
    become about √n (0.7 to 1.2 times that for those above a hundredth of the norm of M), and the root mean square of
    its values about 1. Three steps of the iteration X ← (a + b X Xᵀ + c (X Xᵀ)²) X of Jordan et al. 2024 do that. Each
    is a polynomial of the Gram matrix M Mᵀ, and is computed on it, for all matrices of one size together.

    The iteration needs singular values σ of at most 1 and converges faster the larger they are, so M is first divided
    by (Σ σ⁸)^(1/8), which is closer to the largest σ than the norm of M. The result is zero for M = 0.

    Args:
        matrices (`list[torch.Tensor]`): (height, ...), each with its rows in one piece in memory.
        dtype (`torch.dtype`): Of the computation and of the results.
    """
    results = [None] * len(matrices)
    for size, groups in _stacked(matrices, dtype).items():
        grams = [_gram(stack, size) for _, stack in groups]
        roots = _inverse_square_roots(grams, [max(stack.shape[1:]) ** 0.5 for _, stack in groups])
        del grams
        for root in roots:
            members, stack = groups.pop(0)  # so that its memory is free for the next
            m = min(stack.shape[1:])
            root = root if m == size else root[:, :m, :m]
            X = torch.bmm(root, stack) if _is_wide(stack) else torch.bmm(stack, root)
            for i, result in zip(members, _unstacked(X, matrices[members[0]]), strict=True):
                results[i] = result
    return results


def _stacked(matrices, dtype):
    """By the size of the Gram matrix: the indices of matrices of one shape, and these matrices as (k, height, width).
    Gram matrices below 64 are filled up with zeros, which changes nothing and makes fewer sizes."""
    by_shape, by_size, sources, copies = {}, {}, [], []
    for i, M in enumerate(matrices):
        by_shape.setdefault(M.shape, []).append(i)
    for members in by_shape.values():
        M = matrices[members[0]]
        if len(members) == 1:
            stack = M.to(dtype).as_strided((1, *_size(M)), (M.numel(), _size(M)[1], 1))
        else:
            stack = M.new_empty((len(members), *_size(M)), dtype=dtype)
            sources += [matrices[i] for i in members]
            copies += _unstacked(stack, M)
        by_size.setdefault(max(64, min(_size(M))), []).append((members, stack))
    if copies:
        torch._foreach_copy_(copies, sources)
    return by_size


def _unstacked(stack, M):
    """Each of a stack of matrices, (k, height, width), with the shape of M and its order in memory. The order of the
    columns does not matter, so a row is taken as it lies there."""
    if len(stack) == 1:
        return [stack.as_strided(M.shape, M.stride())]
    if M.ndim > 2:
        stack = stack.as_strided((len(stack), *M.shape), (M.numel(), *M.stride()))
    return stack.unbind()


def _is_wide(stack):
    return stack.shape[1] <= stack.shape[2]


def _gram(stack, size):
    """M Mᵀ, or Mᵀ M where that is smaller, of each M, (k, height, width), filled up with zeros to (k, size, size)."""
    gram = torch.bmm(stack, stack.mT) if _is_wide(stack) else torch.bmm(stack.mT, stack)
    missing = size - gram.shape[1]
    return F.pad(gram, (0, missing, 0, missing)) if missing else gram


def _inverse_square_roots(grams, factors):
    """Approximates f G^(−1/2) for each G of each stack, (k, m, m), where f is the factor of the stack."""
    counts, gram = [len(stack) for stack in grams], torch.cat(grams)
    largest = gram.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)[..., None].clamp(min=1e-30)  # at least Σ σ² / m
    gram.div_(largest)
    scale = torch.linalg.matrix_norm(torch.bmm(gram, gram), keepdim=True).sqrt()  # (Σ σ⁸)^(1/4), as G has σ²
    scale = scale.clamp(min=1e-4)  # only below 1 for M = 0
    gram.div_(scale)
    root = factor = _factor(gram)  # which M and X are multiplied by
    for _ in range(2):
        gram = torch.bmm(torch.bmm(factor, gram), factor)
        factor = _factor(gram)
        root = torch.bmm(factor, root)
    lengths = (largest * scale).rsqrt()
    torch._foreach_mul_(lengths.split(counts), factors)
    return root.mul_(lengths).split(counts)


def _factor(gram):
    """a + b G + c G²."""
    factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    factor.diagonal(dim1=1, dim2=2).add_(3.4445)
    return factor
