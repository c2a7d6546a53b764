import resource
import shutil

import pytest
import torch
from PIL import Image
from runs import Killed, assert_same_state, make_other_trainer, make_trainer, metrics
from tiny import tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    ClassifierGuidedPipeline,
    NoisyClassificationObjective,
    Trainer,
    TrainingConfig,
)
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.errors import TrainingError
from hf_genmod.recipes.networks import NetworkArguments


@pytest.mark.parametrize(
    "settings",
    [
        {
            "dropout": 0.1,
            "logging_steps": 4,
            "guiding_fraction": 0.3,
        },  # a window of the metrics is open when the state is saved
        {"gradient_accumulation_steps": 2, "horizontal_flip": True, "max_shift": 1},
        pytest.param({"weighting": "min_snr", "prediction_type": "epsilon"}, marks=pytest.mark.slow),
        {"weighting": "balanced", "prediction_type": "sample", "num_workers": 1},
        pytest.param({"learn_variance": True, "ema_length": 0.0}, marks=pytest.mark.slow),
        pytest.param({"weighting": "vlb", "validation_steps": 4}, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_continues_to_bitwise_the_same_end(dataset, held_out, tmp_path, settings):
    whole = make_trainer(dataset, tmp_path / "whole", max_train_steps=9, held_out=held_out, **settings)
    whole.train()

    def killed_at(step):
        inner = whole.objective

        def objective(model, batch, rng):
            if trainer.progress.step == step:
                raise Killed
            return inner(model, batch, rng)

        objective.by_noise_level = inner.by_noise_level
        return objective

    settings = dict(max_train_steps=9, checkpointing_steps=2, held_out=held_out, **settings)
    trainer = make_trainer(dataset, tmp_path / "cut", objective=killed_at(5), **settings)
    with pytest.raises(Killed):
        trainer.train()
    resumed = make_trainer(dataset, tmp_path / "cut", objective=whole.objective, **settings)
    resumed.train()

    assert_same_state(resumed, whole)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()) == ["step-8", "step-9"]


def test_a_classifier_learns_what_it_can_at_each_noise_level_and_takes_up_its_run_bitwise(tmp_path):
    levels = torch.arange(64) % 2 * 200
    images = [Image.new("RGB", (8, 8), (int(level), 0, 0)) for level in levels]
    pictures = PictureDataset(images, "levels", labels=(levels > 0).long(), label_names=["dark", "bright"])
    held_out = pictures.hold_out(20)
    process = AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2")

    def trainer(folder, objective, **settings):
        config = TrainingConfig(str(tmp_path / folder), max_train_steps=30, batch_size=16, mixed_precision="no",
                                validation_steps=15, checkpointing_steps=10, **settings)  # fmt: skip
        classifier = NetworkArguments(block_out_channels=[16, 32]).make_classifier(pictures, process)
        return Trainer(
            classifier,
            objective,
            pictures,
            config,
            make_pipeline=lambda classifier: ClassifierGuidedPipeline(tiny_unet(), classifier, process),
            validation_dataset=held_out,
        )

    class KilledAt20(NoisyClassificationObjective):
        def __call__(self, model, batch, rng):
            if cut.progress.step == 20 and model.training:
                raise Killed
            return super().__call__(model, batch, rng)

    whole = trainer("whole", NoisyClassificationObjective(process))
    whole.train()
    last = metrics(tmp_path / "whole")[-1]
    assert last["validation_accuracy_0.0_0.2"] == 1
    assert last["validation_loss_0.0_0.2"] < 0.9 * last["validation_loss_0.8_1.0"]  # of nearly pure noise

    cut = trainer("cut", KilledAt20(process))
    with pytest.raises(Killed):
        cut.train()
    resumed = trainer("cut", NoisyClassificationObjective(process))
    resumed.train()
    assert_same_state(resumed, whole)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_run_killed_before_its_first_save_starts_anew(dataset, tmp_path):
    def killed_at_step_3(model, batch, rng):
        if trainer.progress.step == 3:
            raise Killed
        return inner(model, batch, rng)

    trainer = make_trainer(dataset, tmp_path, max_train_steps=5)
    inner, trainer.objective = trainer.objective, killed_at_step_3
    with pytest.raises(Killed):
        trainer.train()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    make_trainer(dataset, tmp_path, max_train_steps=5).train()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_state_that_cannot_be_read_is_passed_over(dataset, tmp_path, capsys):
    settings = dict(max_train_steps=8, checkpointing_steps=2, checkpoints_total_limit=3)
    whole = make_trainer(dataset, tmp_path / "whole", **settings)
    whole.train()
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    (cut / "model_index.json").unlink()
    for step, damage in ((8, b""), (6, (cut / "checkpoints" / "step-6" / "state.pt").read_bytes()[:-5000])):
        (cut / "checkpoints" / f"step-{step}" / "state.pt").write_bytes(damage)
    again = make_trainer(dataset, cut, **settings)
    again.train()
    printed = capsys.readouterr()
    assert "step-8 cannot be read" in printed.err and "step-6 cannot be read" in printed.err
    assert "from step 4" in printed.out
    assert_same_state(again, whole)
    assert metrics(cut) == metrics(tmp_path / "whole")
    for state in (cut / "checkpoints").iterdir():
        torch.load(state / "state.pt")
        (state / "state.pt").write_bytes(b"damaged")
    (cut / "model_index.json").unlink()
    with pytest.raises(TrainingError, match="no state in .*checkpoints can be read; delete that folder"):
        make_trainer(dataset, cut, **settings).train()


def test_a_full_disk_leaves_the_states_before_as_they_are(dataset, tmp_path, capsys):
    trainer = make_trainer(dataset, tmp_path, max_train_steps=6, checkpointing_steps=2)
    inner = trainer.objective
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def objective(model, batch, rng):
        limit = 10_000 if trainer.progress.step == 3 else soft  # in bytes a file: at the save after this step
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return inner(model, batch, rng)

    trainer.objective = objective
    try:
        trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "saving the training state failed (OSError: the disk is full or broken; step-2 stays the newest)" in (
        capsys.readouterr().err
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-6"]
    assert torch.load(tmp_path / "checkpoints" / "step-2" / "state.pt")["progress"]["step"] == 2


@pytest.mark.parametrize("kind", ["as saved now", "as saved once", "of a compiled model, as saved once"])
def test_a_state_of_an_adapter_holds_what_is_trained_and_continues_bitwise(dataset, tmp_path, kind):
    def trainer(name, steps=4):
        return make_other_trainer(dataset, tmp_path / name, "adapter", max_train_steps=steps, checkpointing_steps=2)

    whole = trainer("whole")
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("pytorch_lora_weights.safetensors", "checkpoints/step-4/state.pt"):
        (tmp_path / "cut" / name).unlink()
    (tmp_path / "cut" / "checkpoints" / "step-4").rmdir()
    file = tmp_path / "cut" / "checkpoints" / "step-2" / "state.pt"
    state, model = torch.load(file), whole.state.model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(state["model"]) == trained | {name for name, _ in model.named_buffers()}
    assert set(state["averaged_model"]) == {"n_averaged", *(f"module.{name}" for name in state["model"])}
    if kind != "as saved now":
        state["model"] = model.state_dict() | state["model"]  # the frozen weights as well
        state["averaged_model"] = whole.averaged_model.state_dict() | state["averaged_model"]
    if "compiled" in kind:
        state["model"] = {f"_orig_mod.{name}": value for name, value in state["model"].items()}
    torch.save(state, file)
    resumed = trainer("cut")
    resumed.train()
    assert_same_state(resumed, whole)


def test_a_state_with_a_missing_weight_is_refused(dataset, tmp_path):
    make_trainer(dataset, tmp_path, max_train_steps=2, checkpointing_steps=1).train()
    (tmp_path / "model_index.json").unlink()
    file = tmp_path / "checkpoints" / "step-2" / "state.pt"
    state = torch.load(file)
    del state["model"]["conv_in.weight"]
    torch.save(state, file)
    with pytest.raises(RuntimeError, match="conv_in.weight"):
        make_trainer(dataset, tmp_path, max_train_steps=2, checkpointing_steps=1).train()
