"""What an adapter is trained of: which numbers, which pictures, and the card that it leaves with."""

import pytest
import torch
from PIL import Image
from tiny import assert_rounded_alike, tiny_classifier, tiny_text_pipeline, tiny_unet

from hf_genmod import (
    AncestralDDPMScheduler,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    DenoisingObjective,
    SuperResolutionPipeline,
    Trainer,
    TrainingConfig,
    UnconditionalPipeline,
    load_pipeline,
)
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.errors import TrainingError
from hf_genmod.training.adapters import attach_adapter, with_names_for
from hf_genmod.training.muon import Muon
from hf_genmod.training.prior_samples import PriorSamples


def of_classes(**config):
    names, unet = {0: "a", 1: "b", 2: "c"}, tiny_unet(num_classes=3, **config)
    pipeline = ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(), id2label=names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(count=5, **kwargs):
    colors = [Image.new("RGB", (8, 8), (40 * i, 255 - 40 * i, 128)) for i in range(count)]
    return PictureDataset(colors, "some", **kwargs)


class TestAttaching:
    def test_changes_nothing_at_first(self):
        pipeline = of_classes()
        x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([5, 500]), torch.tensor([0, 3])
        before = pipeline.unet(x, t, labels).sample
        attach_adapter(pipeline.unet, 2)
        assert_rounded_alike(pipeline.unet(x, t, labels).sample, before)

    @pytest.mark.parametrize("size", [4, 2])
    def test_wraps_the_convolutions_of_2x2_and_1x1_positions(self, size):
        pipeline = of_classes(sample_size=size)
        x, t, labels = torch.randn(2, 3, size, size), torch.tensor([5, 500]), torch.tensor([0, 3])
        before = pipeline.unet(x, t, labels).sample
        attach_adapter(pipeline.unet, 2)
        torch.testing.assert_close(pipeline.unet(x, t, labels).sample, before)  # added zeros may change the layout

    def test_leaves_the_adapter_and_the_new_rows_to_train(self):
        pipeline = of_classes()
        pipeline.add_class("zebra", adapter_name="default")
        attach_adapter(pipeline.unet, 2, num_new_classes=1)
        trained = {name: p for name, p in pipeline.unet.named_parameters() if p.requires_grad}
        rows = {name: p for name, p in trained.items() if "lora_" not in name}
        assert [p.shape for p in rows.values()] == [(1, 64)]
        assert {p.shape[0] for name, p in trained.items() if "lora_A" in name} == {2}
        # As many as two rows of each layer's input and two columns of its output make.
        layers = [m for m in pipeline.unet.modules() if hasattr(m, "lora_A")]
        sizes = [2 * (m.weight.shape[0] + m.weight[0].numel()) for m in layers]
        assert sum(p.numel() for p in trained.values()) == sum(sizes) + 64

    def test_new_rows_take_the_steps_of_embeddings(self):
        pipeline = of_classes()
        pipeline.add_class("zebra")
        attach_adapter(pipeline.unet, 2, num_new_classes=1)
        of_muon, of_adamw = (group["params"] for group in Muon(pipeline.unet, lr=1e-3).param_groups)
        assert [p.shape for p in of_adamw] == [(1, 64)] and of_muon

    def test_a_step_moves_these_and_no_others(self):
        pipeline = of_classes()
        pipeline.add_class("zebra", adapter_name="default")
        rows = pipeline.unet.class_embedding.weight.detach().clone()
        attach_adapter(pipeline.unet, 2, num_new_classes=1)
        before = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
        optimizer = torch.optim.AdamW([p for p in pipeline.unet.parameters() if p.requires_grad], weight_decay=0.1)
        labels = torch.tensor([0, 3, 4])  # a known class, the new one, none
        pipeline.unet(torch.randn(3, 3, 8, 8), 10, labels).sample.square().mean().backward()
        optimizer.step()
        after = pipeline.unet.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert all("lora_" in name or name.endswith("weight.original") for name in moved)
        assert any("lora_B" in name for name in moved)
        new = pipeline.unet.class_embedding.weight
        assert torch.equal(new[[0, 1, 2, 4]], rows[[0, 1, 2, 4]]) and not torch.equal(new[3], rows[3])


class TestNames:
    def test_without_labels_all_are_of_the_one_class(self):
        pipeline, some = of_classes(), pictures()
        named = with_names_for(pipeline, some, class_name="zebra")
        assert named.labels.tolist() == [3] * 5 and pipeline.labels["zebra"] == 3
        assert named.label_names == ["a", "b", "c", "zebra"] and some.labels is None
        assert named.fingerprint != some.fingerprint
        assert pipeline.request_for(named, [4]) == {"class_labels": [3]}

    def test_class_folders_are_of_the_classes_of_their_names(self):
        pipeline = of_classes()
        some = pictures(labels=torch.tensor([0, 1, 2, 1, 0]), label_names=["zebra", "b", "okapi"])
        named = with_names_for(pipeline, some)
        assert named.__getitems__(range(5))["class_labels"].tolist() == [3, 1, 4, 1, 3]
        assert pipeline.labels == {"a": 0, "b": 1, "c": 2, "zebra": 3, "okapi": 4}

    def test_captions_are_their_own_or_the_one_for_all(self):
        pipeline, captions = tiny_text_pipeline(), ["a cat", "two lizards", "a cat", "a dog", ["a dog", "dogs"]]
        assert with_names_for(pipeline, pictures(captions=captions)).captions == captions
        named = with_names_for(pipeline, pictures(), caption="a zorb")
        assert named.captions == ["a zorb"] * 5
        assert pipeline.request_for(named, [1, 2]) == {"prompt": ["a zorb", "a zorb"]}

    def test_an_unconditional_pipeline_takes_images_as_they_are(self):
        some = pictures(2, **self.LABELS)
        assert with_names_for(UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler()), some) is some

    def test_a_class_that_a_pipeline_cannot_learn_is_refused(self):
        names, scheduler = {0: "a", 1: "zebra"}, AncestralDDPMScheduler()
        guided = ClassifierGuidedPipeline(tiny_unet(), tiny_classifier(num_classes=2), scheduler, id2label=names)
        assert with_names_for(guided, pictures(2, **self.LABELS)).labels.tolist() == [0, 1]
        upsampler = SuperResolutionPipeline(tiny_unet(num_classes=2, conditioning_channels=3), scheduler, names)
        for pipeline in (guided, upsampler):
            kind = type(pipeline).__name__
            with pytest.raises(ValueError, match=f"class_name: a {kind} is not asked by 'x' and cannot learn it"):
                with_names_for(pipeline, pictures(2), class_name="x")

    LABELS = {"labels": torch.tensor([0, 1]), "label_names": ["a", "zebra"]}
    CAPTIONS = {"captions": ["a cat", "a dog"]}

    @pytest.mark.parametrize(
        "make, of_pictures, arguments, message",
        [
            (of_classes, {}, {}, "class_name: name the class of the images"),
            (of_classes, LABELS, {"class_name": "x"}, "class_name: the images are of a, zebra; leave it out"),
            (of_classes, {}, {"caption": "x"}, "caption: a ClassifierFreeGuidedPipeline is not asked by it"),
            (tiny_text_pipeline, {}, {}, "caption: say what they show, or caption each"),
            (tiny_text_pipeline, CAPTIONS, {"caption": "x"}, "caption: the images have captions; leave it out"),
            (tiny_text_pipeline, {}, {"class_name": "x"}, "class_name: a TextToImagePipeline is not asked by it"),
        ],
    )
    def test_what_is_missing_or_of_no_use_is_named(self, make, of_pictures, arguments, message):
        with pytest.raises(ValueError, match=message):
            with_names_for(make(), pictures(2, **of_pictures), **arguments)


def make_trainer(folder, base, **config):
    """As the example does it."""
    pipeline = load_pipeline(base)
    some = with_names_for(pipeline, pictures(), class_name="zebra")
    dataset = PriorSamples(some, pipeline, 4, {"class_labels": [0, 1, 2]})
    attach_adapter(pipeline.unet, 2, num_new_classes=1)

    def make_pipeline(unet):
        pipeline.unet = unet
        return pipeline

    def load(folder):
        loaded = load_pipeline(base)
        loaded.load_lora_weights(folder)
        return loaded

    settings = {"max_train_steps": 4, "batch_size": 4, "sampling_steps": 0, "mixed_precision": "no", **config}
    return Trainer(
        pipeline.unet,
        DenoisingObjective(pipeline.scheduler, pipeline.unet.null_label),
        dataset,
        TrainingConfig(str(folder), **settings),
        make_pipeline,
        save=lambda pipeline, folder: pipeline.save_lora_weights(folder),
        load=load,
    )


@pytest.fixture
def base(tmp_path):
    of_classes().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    request = {"num_inference_steps": 2, "output_type": "np"}
    return torch.from_numpy(pipeline(["zebra", "a"], generator=generator, **request).images)


def test_a_run_leaves_the_adapter_alone_and_takes_it_up_again(base, tmp_path):
    trained = make_trainer(tmp_path / "run", base).train()
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    assert not (tmp_path / "run" / "unet").exists() and not (tmp_path / "run" / "model_index.json").exists()
    again = make_trainer(tmp_path / "run", base).train()  # which is over
    torch.testing.assert_close(draw(again), draw(trained), atol=1e-4, rtol=0)
    assert (draw(trained) - draw_base(base)).abs().max() > 1e-3


def draw_base(base):
    pipeline = load_pipeline(base)
    pipeline.add_class("zebra")
    return draw(pipeline)


def test_a_stopped_run_ends_bitwise_as_the_whole_one(base, tmp_path):
    make_trainer(tmp_path / "whole", base).train()
    trainer = make_trainer(tmp_path / "parts", base, checkpointing_steps=2)
    step = trainer._step

    def stop_in_the_third():
        if trainer.progress.step == 2:
            raise KeyboardInterrupt
        return step()

    trainer._step = stop_in_the_third
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    make_trainer(tmp_path / "parts", base, checkpointing_steps=2).train()
    files = [tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("whole", "parts")]
    pipelines = []
    for file in files:
        pipelines.append(load_pipeline(base))
        pipelines[-1].load_lora_weights(file)
    first, second = (pipeline.unet.state_dict() for pipeline in pipelines)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_damaged_adapter_is_written_again_from_its_state(base, tmp_path, capsys):
    make_trainer(tmp_path / "run", base, checkpointing_steps=2).train()
    file = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    whole = draw_with(base, file)
    file.write_bytes(file.read_bytes()[:1000])
    make_trainer(tmp_path / "run", base, checkpointing_steps=2).train()
    assert "cannot be read" in capsys.readouterr().err
    assert_rounded_alike(draw_with(base, file), whole)


def test_a_damaged_adapter_without_a_state_is_named(base, tmp_path):
    make_trainer(tmp_path / "run", base, checkpointing_steps=0).train()
    file = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    file.write_bytes(b"")
    with pytest.raises(TrainingError, match="delete its pytorch_lora_weights.safetensors to train it again"):
        make_trainer(tmp_path / "run", base, checkpointing_steps=0).train()


def draw_with(base, file):
    pipeline = load_pipeline(base)
    pipeline.load_lora_weights(file)
    return draw(pipeline)
