import copy
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from runs import FOLDERS, IN_SHARDS, metrics, run
from torch import nn
from torch.distributed.tensor import DTensor

from hf_genmod import load_pipeline
from hf_genmod.training import sharding
from hf_genmod.training.averaging import PowerFunctionAverage
from hf_genmod.training.muon import Muon


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Blocks(nn.Module):
    """Blocks in a list, a kernel, an embedding, a frozen layer, a number, and a weight in two places."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.SiLU()), nn.Identity(), nn.Linear(8, 8)])
        self.conv = nn.Conv2d(8, 6, 3, padding=1)
        self.frozen = nn.Linear(6, 5).requires_grad_(False)
        self.last = nn.Linear(8, 5, bias=False)
        self.last.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, labels):
        x = self.embedding(labels)
        for block in self.blocks:
            x = block(x)
        return self.frozen(self.conv(x[:, :, None, None]).flatten(1)) + self.scale * self.last(x)


def train(model, average, optimizer, steps):
    for step in steps:
        labels = torch.randint(0, 5, (7,), generator=torch.Generator().manual_seed(step))
        (model(labels) - 1).square().mean().backward()
        norm = sharding.whole(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        optimizer.zero_grad()
        average.update(unchanged_if=torch.zeros(()))
    return norm


def made(in_shards):
    torch.manual_seed(0)
    model = Blocks().to(memory_format=torch.channels_last)
    average = PowerFunctionAverage(model, 0.1)
    if in_shards:
        sharding.shard(model, torch.device("cpu"), "no")
    return model, average, Muon(model, lr=0.01)


def test_a_model_in_shards_trains_and_continues_as_one_that_is_whole(group):
    model, average, optimizer = made(in_shards=False)
    norm = train(model, average, optimizer, range(2))
    model_2, average_2, optimizer_2 = made(in_shards=True)
    with sharding.in_shards(average_2.module, model_2):
        for module in (model_2, average_2.module):
            assert all(isinstance(p, DTensor) for p in module.parameters() if p is not module.scale)
        torch.testing.assert_close(train(model_2, average_2, optimizer_2, range(2)), norm)
        states = [part.state_dict() for part in (model_2, average_2, optimizer_2)]
        left = sharding.whole_state(states[0], keep=False)
        assert [name for name, value in left.items() if value is not None] == ["scale"]
        states = [sharding.whole_state(state, keep=True) for state in states]
        shards = average_2.module.conv.weight
        with sharding.gathered(average_2.module):
            torch.testing.assert_close(average_2.module.conv.weight, average.module.conv.weight)
            assert average_2.module.last.weight is average_2.module.embedding.weight
        assert average_2.module.conv.weight is shards
    torch.testing.assert_close(average_2.module.state_dict(), average.module.state_dict())
    assert not sharding.is_sharded(average_2.module)

    saved = [part.state_dict() for part in (model, average, optimizer)]
    torch.testing.assert_close(states[0], saved[0])
    torch.testing.assert_close(states[2]["state"], saved[2]["state"])
    parts = model_3, average_3, optimizer_3 = made(in_shards=True)
    with sharding.in_shards(average_3.module, model_3):
        for part, state in zip(parts, copy.deepcopy(saved), strict=True):
            part.load_state_dict(sharding.state_in_shards(part, state))
        train(*parts, range(2, 4))
    model_4, average_4, optimizer_4 = parts = made(in_shards=False)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(sharding.state_in_shards(part, state))
    for parts in ((model, average, optimizer), (model_4, average_4, optimizer_4)):
        train(*parts, range(2, 4))
    torch.testing.assert_close(average_3.module.state_dict(), average.module.state_dict())
    torch.testing.assert_close(average_4.module.state_dict(), average.module.state_dict())


@pytest.mark.parametrize(
    "name, value, arguments, message",
    [
        (
            "ACCELERATE_USE_DEEPSPEED",
            "true",
            ("no", False),
            "accelerate_config: DeepSpeed cannot train here; ",
        ),
        ("ACCELERATE_USE_MEGATRON_LM", "true", ("no", False), "accelerate_config: Megatron-LM cannot train here; "),
        ("FSDP_VERSION", "1", ("no", False), "accelerate_config: fsdp_version 1 cannot train here; version 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", ("no", False), "fsdp_offload_params is true, .* set it to false"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", ("no", False), "fsdp_cpu_ram_efficient_loading is true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", ("no", False), "fsdp_activation_checkpointing is true"),
        ("FSDP_VERSION", "2", ("fp16", False), "mixed_precision: 'fp16' cannot train in shards; take bf16 or no"),
        ("FSDP_VERSION", "2", ("bf16", True), "compile: a model in shards cannot be compiled; leave out --compile"),
    ],
)
def test_what_cannot_train_in_shards_is_refused(name, value, arguments, message, monkeypatch):
    for each, its_value in {"WORLD_SIZE": "2", **IN_SHARDS, name: value}.items():
        monkeypatch.setenv(each, its_value)
    with pytest.raises(ValueError, match=message):
        sharding.is_asked_for(*arguments)


def test_shards_are_for_several_processes_whose_launcher_asks_for_them(monkeypatch):
    assert not sharding.is_asked_for("fp16", True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not sharding.is_asked_for("fp16", True)
    for name, value in IN_SHARDS.items():
        monkeypatch.setenv(name, value)
    assert sharding.is_asked_for("bf16", False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not sharding.is_asked_for("fp16", True)


of_several = pytest.mark.skipif(
    torch.accelerator.is_available() and torch.accelerator.device_count() < 4, reason="each process takes a device"
)


@of_several
@pytest.mark.slow
def test_two_processes_train_in_shards_as_with_copies(tmp_path):
    settings = {"max_train_steps": 50, "validation_steps": 25, "checkpointing_steps": 25}
    runs = {"fp32": settings, "fp64": settings | {"double": True, "gradient_accumulation_steps": 2}}
    for name, in_shards in (("copies", False), ("shards", True)):
        (tmp_path / name).mkdir()
        run(tmp_path / name, runs, 2, in_shards=in_shards)
    for kind, tolerance in (("fp32", 1e-5), ("fp64", 1e-10)):
        of_copies, of_shards = (metrics(tmp_path / name / kind) for name in ("copies", "shards"))
        assert len(of_copies) == 50
        for one, other in zip(of_copies, of_shards, strict=True):
            assert one.keys() == other.keys()
            assert math.isclose(one["loss"], other["loss"], abs_tol=tolerance)
            assert math.isclose(one["gradient_norm"], other["gradient_norm"], rel_tol=1e3 * tolerance)
        loaded = [load_pipeline(tmp_path / name / kind).unet.state_dict() for name in ("copies", "shards")]
        torch.testing.assert_close(*loaded, atol=1e2 * tolerance, rtol=0)


@of_several
@pytest.mark.slow
def test_a_state_of_shards_goes_on_in_others_and_in_none(tmp_path):
    settings = {"max_train_steps": 20, "double": True, "checkpointing_steps": 10, "batch_size": 12}
    run(tmp_path, {"whole": settings}, 1)
    run(tmp_path, {"two": settings}, 2, in_shards=True)
    for number, in_shards in ((1, False), (2, False), (3, True)):
        resumed = tmp_path / f"resumed-{number}"
        shutil.copytree(tmp_path / "two", resumed)
        (resumed / "model_index.json").unlink()
        shutil.rmtree(resumed / "checkpoints" / "step-20")
        run(tmp_path, {resumed.name: settings}, number, in_shards=in_shards)
        for part in ("raw", "averaged"):
            weights = [torch.load(f"{name}.pt")[part] for name in (resumed, tmp_path / "whole")]
            torch.testing.assert_close(*weights, atol=1e-8, rtol=0)


@of_several
@pytest.mark.slow
def test_every_kind_of_model_trains_in_shards_as_on_one_process(tmp_path):
    kinds = {kind: {"kind": kind} for kind in ("autoencoder", "text", "adapter")}
    runs = {name: {"max_train_steps": 10, "validation_steps": 5} | kind for name, kind in kinds.items()}
    for name, number in (("alone", 1), ("shards", 2)):
        (tmp_path / name).mkdir()
        run(tmp_path / name, runs, number, in_shards=number > 1)
    for kind in kinds:
        for part in ("raw", "averaged"):
            weights = [torch.load(tmp_path / name / f"{kind}.pt")[part] for name in ("alone", "shards")]
            torch.testing.assert_close(*weights, atol=1e-8, rtol=0)


@of_several
@pytest.mark.slow
def test_shards_in_bf16_train_as_one_process_does_but_for_rounding(tmp_path):
    settings = {"max_train_steps": 10, "mixed_precision": "bf16", "max_grad_norm": 1e9}
    run(tmp_path, {"alone": settings}, 1)
    run(tmp_path, {"shards": settings}, 2, in_shards=True)
    for one, two in zip(*(metrics(tmp_path / name) for name in ("alone", "shards")), strict=True):
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-2)


SHARES = """
import os
import sys
sys.path[:0] = {folders!r}
from runs import make_trainer
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.shapes import ShapesDataset
from hf_genmod.training.sharding import local

def values(trainer):
    state = [value for values in trainer.optimizer.optimizer.state.values() for value in values.values()]
    parts = [[*trainer.state.model.parameters()], [*trainer.averaged_model.parameters()], state]
    return [sum(tensor.numel() for tensor in local(part)) for part in parts]

def objective(model, batch, rng):
    if trainer.progress.step == 2:
        numbers = [*values(trainer), sum(p.numel() for p in model.parameters())]
        sys.stdout.write(f"values {{numbers}}\\n")  # at once, as two processes write
    return inner(model, batch, rng)

trainer = make_trainer(load_pictures(ShapesDataset(40, resolution=16)), sys.argv[1], max_train_steps=3)
inner, trainer.objective = trainer.objective, objective
trainer.train()
"""


@of_several
@pytest.mark.slow
def test_each_of_two_processes_holds_half_of_weights_averages_and_state(tmp_path):
    (tmp_path / "script.py").write_text(SHARES.format(folders=FOLDERS))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(tmp_path / "script.py"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | IN_SHARDS)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line.removeprefix("values ")) for line in done.stdout.splitlines() if "values [" in line]
    (*first, whole), (*second, _) = lines
    for one, two in zip(first, second, strict=True):
        assert one < 0.52 * (one + two) and two < 0.52 * (one + two)
    assert first[0] + second[0] == first[1] + second[1] == whole
