import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_genmod.models.denoising_unet import DenoisingUNet2DModel
from hf_genmod.training import muon
from hf_genmod.training.muon import Muon


class Model(nn.Module):
    """Every kind of parameter: kernel, matrix, embedding, vector, one that nothing uses, one that is frozen."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.linear = nn.Linear(8, 12)
        self.conv = nn.Conv2d(12, 4, 3, padding=1)
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, labels):
        hidden = self.linear(self.embedding(labels))[:, :, None, None].expand(-1, -1, 3, 3)
        return self.frozen(self.conv(hidden).mean((2, 3)))


MATRICES = ["linear.weight", "conv.weight"]
OTHERS = ["embedding.weight", "linear.bias", "conv.bias"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def backward(model, step):
    labels = torch.randint(0, 5, (7,), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    (model(labels) - 1).square().mean().backward()


def orthogonalize(matrices):
    """With singular values of about 1."""
    return [X / max(X.shape) ** 0.5 for X in muon.orthogonalize(matrices, matrices[0].dtype)]


def polar(M):
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


@pytest.mark.parametrize("shape", [(3, 3), (6, 40), (40, 6), (1, 9), (9, 1), (64, 64)])
def test_orthogonalize_keeps_directions_and_levels_their_lengths(shape):
    M = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    U, singular_values, Vh = torch.linalg.svd(M, full_matrices=False)
    levelled = U.T @ orthogonalize([M])[0] @ Vh.T
    torch.testing.assert_close(levelled, torch.diag(levelled.diagonal()), atol=1e-10, rtol=0)
    counts = singular_values > 0.01 * singular_values.norm()
    assert counts.any()
    assert ((levelled.diagonal()[counts] > 0.6) & (levelled.diagonal()[counts] < 1.25)).all()


def test_orthogonalize_is_the_iteration_on_the_matrix_itself():
    M = torch.randn(12, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 12)[:, None]
    X = M.double() / torch.linalg.svdvals(M.double()).pow(8).sum().pow(1 / 8)
    for _ in range(3):
        gram = X @ X.T
        X = 3.4445 * X - 4.7750 * gram @ X + 2.0315 * gram @ gram @ X
    torch.testing.assert_close(orthogonalize([M])[0], X.float(), atol=1e-4, rtol=1e-3)


def test_orthogonalize_treats_each_matrix_as_if_alone():
    rng = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=rng) for shape in [(6, 40), (3, 5), (40, 6), (6, 6), (1, 1)]]
    for M, together in zip(matrices, orthogonalize(matrices), strict=True):
        torch.testing.assert_close(together, orthogonalize([M])[0], atol=1e-5, rtol=1e-5)


def test_orthogonalize_in_bf16_keeps_to_the_bounds():
    M = torch.randn(96, 432, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 432)
    U, singular_values, Vh = torch.linalg.svd(M, full_matrices=False)
    (X,) = orthogonalize([M.bfloat16()])
    assert X.dtype == torch.bfloat16
    levelled = (U.T @ X.float() @ Vh.T).diagonal()
    assert (levelled > 0.6).all() and (levelled < 1.25).all()


def test_orthogonalize_knows_no_scale_and_leaves_zero():
    M = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for scale in (1e-8, 1e6):
        torch.testing.assert_close(orthogonalize([scale * M])[0], orthogonalize([M])[0], atol=1e-5, rtol=0)
    assert torch.equal(orthogonalize([torch.zeros(5, 7)])[0], torch.zeros(5, 7))


def test_matrices_take_the_step_of_the_equation(model):
    lr, momentum, decay = 0.03, 0.9, 0.1
    optimizer = Muon(model, lr=lr, momentum=momentum, weight_decay=decay)
    expected = {name: model.get_parameter(name).detach().clone() for name in MATRICES}
    buffers = {name: torch.zeros_like(W) for name, W in expected.items()}
    for step in range(4):
        backward(model, step)
        for name, W in expected.items():
            G = model.get_parameter(name).grad
            buffers[name] = momentum * buffers[name] + (1 - momentum) * G
            M = (momentum * buffers[name] + (1 - momentum) * G).flatten(1)
            update = lr * 0.2 * max(M.shape) ** 0.5 * orthogonalize([M])[0].reshape(W.shape)
            expected[name] = (1 - lr * decay) * W - update
        optimizer.step()
        for name, W in expected.items():
            torch.testing.assert_close(model.get_parameter(name).detach(), W, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("in_bf16", [False, True])
def test_the_first_step_goes_along_the_polar_factor_with_the_rms_of_adamw(in_bf16):
    linear = nn.Linear(64, 64, bias=False)
    before = linear.weight.detach().clone()
    linear.weight.grad = 1e-6 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    factor = polar(linear.weight.grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        Muon(linear, lr=0.01, weight_decay=0.0).step()
    change = before - linear.weight.detach()
    assert torch.cosine_similarity(change.flatten(), factor.flatten(), dim=0) > 0.97
    assert 0.7 < change.square().mean().sqrt() / (0.2 * 0.01) < 1.2


def test_autocast_lowers_fp32_alone(model):
    model = model.double()
    twin = copy.deepcopy(model)
    for of_model, lowered in ((model, True), (twin, False)):
        backward(of_model, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            Muon(of_model, lr=0.1).step()
    for name in MATRICES:
        assert torch.equal(model.get_parameter(name), twin.get_parameter(name))


def test_the_layout_in_memory_changes_nothing(model):
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert not twin.conv.weight.is_contiguous()
    for of_model in (model, twin):
        optimizer = Muon(of_model, lr=0.1)
        for step in range(2):
            backward(of_model, step)
            of_model.conv.weight.grad = of_model.conv.weight.grad.contiguous()  # whatever that of the weight is
            optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(twin.get_parameter(name), parameter, atol=1e-5, rtol=1e-4)


def test_vectors_and_embeddings_take_the_steps_of_adamw_bitwise(model):
    twin = copy.deepcopy(model)
    optimizer = Muon(model, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    adamw = torch.optim.AdamW(
        [twin.get_parameter(name) for name in OTHERS], lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, fused=True
    )
    for step in range(3):
        backward(model, step)
        for name in OTHERS:
            twin.get_parameter(name).grad = model.get_parameter(name).grad.clone()
        optimizer.step()
        adamw.step()
    for name in OTHERS:
        assert torch.equal(model.get_parameter(name), twin.get_parameter(name)), name


def test_a_gradient_that_overflowed_is_no_step_of_any_parameter(model):
    optimizer, scaler = Muon(model, lr=0.01), torch.amp.GradScaler("cpu", init_scale=2.0)
    backward(model, 0)
    optimizer.step()  # so that there is a state to spoil
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    backward(model, 1)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(torch.inf)
    scaler.scale(torch.zeros(()))  # which it wants to have done
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


@pytest.mark.parametrize("in_bf16", [False, True])
def test_a_step_that_the_device_forbids_changes_nothing_and_is_forgotten(model, in_bf16):
    twin = copy.deepcopy(model)
    optimizers = [Muon(of_model, lr=0.01) for of_model in (model, twin)]
    for step in range(3):
        for of_model, optimizer in zip((model, twin), optimizers, strict=True):
            backward(of_model, step)
            optimizer.found_inf = torch.zeros(())
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
                optimizer.step()
        backward(model, 3)
        model.linear.weight.grad[0, 0] = torch.nan
        model.conv.bias.grad[0] = torch.inf
        optimizers[0].found_inf = torch.ones(())
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            optimizers[0].step()
        states = [(m.state_dict(), o.state_dict()["state"]) for m, o in zip((model, twin), optimizers, strict=True)]
        torch.testing.assert_close(*states, rtol=0, atol=0)


class Operators(TorchDispatchMode):
    """Counts the operators that are called, as a device would be asked for them."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


NARROW = {"block_out_channels": (16, 32, 64), "norm_num_groups": 8, "attention_head_dim": 8}


@pytest.mark.parametrize("in_bf16, widths", [(False, {}), (False, NARROW), (True, NARROW)])  # bf16 may be emulated
def test_a_step_of_the_default_unet_takes_at_most_300_operators(in_bf16, widths):
    unet = DenoisingUNet2DModel(**widths).to(memory_format=torch.channels_last)
    optimizer = Muon(unet, lr=1e-3)
    for _ in range(2):  # the first one makes the state
        for parameter in unet.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16), Operators() as operators:
            optimizer.step()
    assert operators.count <= 300


def test_parts_take_the_same_step_as_all_matrices_together(model, monkeypatch):
    twin = copy.deepcopy(model)
    backward(model, 0)
    backward(twin, 0)
    Muon(model, lr=0.1).step()
    monkeypatch.setattr(muon._parts, "__defaults__", (100,))
    assert len(list(muon._parts(list(twin.parameters())))) > 1
    Muon(twin, lr=0.1).step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(twin.get_parameter(name), parameter, atol=1e-6, rtol=0)


def trained(shared=False, in_bf16=False):
    torch.manual_seed(0)
    model = Model() if in_bf16 else Model().double()
    optimizer = Muon(model, lr=0.05, shared=shared)
    for step in range(3):
        backward(model, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            optimizer.step()
    return model.state_dict()


def train_in_processes(process, count, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=count)
    inner = muon.orthogonalize
    for in_bf16 in (False, True):
        counts = []
        muon.orthogonalize = lambda matrices, dtype, counts=counts: (
            counts.append(len(matrices)) or inner(matrices, dtype)
        )
        torch.save({"weights": trained(True, in_bf16), "counts": counts}, f"{folder}/{process}-{in_bf16}.pt")
    dist.barrier()  # else a thread of gloo may still hold a tensor when Python ends, which aborts the process
    dist.destroy_process_group()


def test_processes_share_the_work_and_take_the_same_step(tmp_path):
    count = 3
    torch.multiprocessing.set_forkserver_preload([Muon.__module__])  # imports the libraries once for all of them
    torch.multiprocessing.start_processes(train_in_processes, (count, tmp_path), count, start_method="forkserver")
    for in_bf16, tolerance in ((False, 1e-12), (True, 1e-6)):
        alone = trained(in_bf16=in_bf16)
        runs = [torch.load(tmp_path / f"{process}-{in_bf16}.pt") for process in range(count)]
        assert [run["counts"] for run in runs] == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]  # there are two matrices
        for run in runs:
            for name, value in run["weights"].items():
                torch.testing.assert_close(value, alone[name], atol=tolerance, rtol=0)


def test_what_has_no_gradient_stays(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = Muon(model, lr=0.1)
    backward(model, 0)
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("unused", "frozen")), name


def test_layout_of_a_kernel_in_memory_changes_nothing(model):
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for copy_of_it in (model, twin):
        optimizer = Muon(copy_of_it, lr=0.1)
        backward(copy_of_it, 0)
        optimizer.step()
    torch.testing.assert_close(twin.conv.weight, model.conv.weight, atol=1e-5, rtol=0)


def test_closure_gives_the_loss(model):
    def closure():
        backward(model, 0)
        return torch.tensor(3.5)

    before = model.linear.weight.detach().clone()
    assert Muon(model, lr=0.1).step(closure) == 3.5
    assert not torch.equal(model.linear.weight, before)


def test_saved_state_continues_bitwise(model):
    optimizer = Muon(model, lr=0.05)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    twin = copy.deepcopy(model)
    other = Muon(twin, lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for copy_of_it, its_optimizer in ((model, optimizer), (twin, other)):
        for step in range(2, 4):
            backward(copy_of_it, step)
            its_optimizer.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
