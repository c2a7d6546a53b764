"""An adapter brings its classes, and mistakes are named before anything is attached."""

import json

import pytest
import torch
from adapter_cases import WEIGHTS, draw, of_classes, of_text, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import assert_rounded_alike, tiny_classifier, tiny_unet

from hf_genmod import AncestralDDPMScheduler, ClassifierFreeGuidedPipeline, ClassifierGuidedPipeline, load_pipeline
from hf_genmod.training.adapters import attach_adapter


class TestClasses:
    def test_a_new_class_comes_before_the_null_label_and_changes_no_other(self):
        pipeline, before = of_classes(), of_classes()
        rows = pipeline.unet.class_embedding.weight.detach().clone()
        assert pipeline.add_class("zebra") == 3
        assert pipeline.labels == {"a": 0, "b": 1, "c": 2, "zebra": 3}
        assert pipeline.unet.null_label == pipeline.num_classes == 4
        for asked, gamma in (("a", 1.0), ("c", 3.0), ("b", 0.0)):
            assert torch.equal(*(draw(pipe, asked, guidance_scale=gamma) for pipe in (pipeline, before)))
        new = pipeline.unet.class_embedding.weight
        assert torch.equal(new[[0, 1, 2, 4]], rows)
        torch.testing.assert_close(new[3], rows[:3].mean(dim=0))

    def test_a_model_with_a_new_class_is_saved_as_any_other(self, tmp_path):
        pipeline = of_classes()
        pipeline.add_class("zebra", torch.linspace(-1, 1, 64))
        pipeline.save_pretrained(tmp_path)
        loaded = load_pipeline(tmp_path)
        assert loaded.labels == pipeline.labels
        torch.testing.assert_close(draw(loaded, "zebra"), draw(pipeline, "zebra"), atol=1e-4, rtol=0)

    def test_classes_without_names_are_named_by_their_numbers(self):
        pipeline = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=2), AncestralDDPMScheduler())
        pipeline.add_class("zebra")
        assert pipeline.labels == {"0": 0, "1": 1, "zebra": 2}

    def test_an_adapter_brings_its_class_and_takes_it_away(self, zebra):
        pipeline, before = of_classes(), of_classes()
        trained_one = trained(of_classes(), name="zebra")
        pipeline.load_lora_weights(zebra)
        assert_rounded_alike(draw(pipeline, "zebra"), draw(trained_one, "zebra"))
        pipeline.disable_lora()
        assert_rounded_alike(draw(pipeline), draw(before))
        pipeline.unload_lora_weights()
        assert pipeline.labels == before.labels and pipeline.num_classes == 3
        assert torch.equal(pipeline.unet.class_embedding.weight, before.unet.class_embedding.weight)
        with pytest.raises(ValueError, match="class_labels: 'zebra' is not a label of this model"):
            draw(pipeline, "zebra")

    def test_two_adapters_keep_their_classes_apart(self, zebra, tmp_path):
        trained(of_classes(), seed=1, name="okapi").save_lora_weights(tmp_path / "okapi")
        pipeline, alone = of_classes(), of_classes()
        pipeline.load_lora_weights(zebra, adapter_name="first")
        pipeline.load_lora_weights(tmp_path / "okapi", adapter_name="second")
        alone.load_lora_weights(tmp_path / "okapi")
        assert pipeline.labels == {"a": 0, "b": 1, "c": 2, "zebra": 3, "okapi": 4}
        assert_rounded_alike(draw(pipeline, "okapi"), draw(alone, "okapi"))
        pipeline.delete_adapters("first")
        assert pipeline.labels == {"a": 0, "b": 1, "c": 2, "okapi": 3}
        assert_rounded_alike(draw(pipeline, "okapi"), draw(alone, "okapi"))
        pipeline.save_lora_weights(tmp_path / "saved")
        ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("saved", "okapi"))
        assert torch.equal(ours["class_embedding"], theirs["class_embedding"])

    def test_a_fused_class_stays(self, zebra, tmp_path):
        pipeline = of_classes()
        pipeline.load_lora_weights(zebra)
        adapted = draw(pipeline, "zebra")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        pipeline.save_pretrained(tmp_path / "fused")
        loaded = load_pipeline(tmp_path / "fused")
        assert loaded.labels == {"a": 0, "b": 1, "c": 2, "zebra": 3}
        torch.testing.assert_close(draw(loaded, "zebra"), adapted, atol=1e-4, rtol=0)

    def test_is_removed_from_many_after_a_journey_over_disk(self, tmp_path):
        names = {i: f"class {i}" for i in range(12)}
        pipeline = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=12), AncestralDDPMScheduler(), id2label=names)
        pipeline.save_pretrained(tmp_path / "base")
        trained(pipeline, name="zebra").save_lora_weights(tmp_path / "zebra")
        loaded = load_pipeline(tmp_path / "base")
        for detach in (loaded.unload_lora_weights, lambda: loaded.delete_adapters("default_0")):
            loaded.load_lora_weights(tmp_path / "zebra")
            assert loaded.labels["zebra"] == 12
            detach()
            assert list(loaded.labels.items()) == [(name, i) for i, name in names.items()]

    def test_goes_with_its_adapter_though_that_was_fused_once(self, zebra, tmp_path):
        trained(of_classes(), seed=1).save_lora_weights(tmp_path / "other")
        pipeline = of_classes()
        pipeline.load_lora_weights(zebra, adapter_name="first")
        pipeline.fuse_lora()
        with pytest.warns(UserWarning, match="merged"):
            pipeline.load_lora_weights(tmp_path / "other", adapter_name="second")  # for which peft unmerges the first
        pipeline.unload_lora_weights()
        assert pipeline.labels == of_classes().labels

    def test_stays_or_goes_as_well_where_it_was_trained(self, tmp_path):
        pipeline = trained(of_classes(), name="zebra")
        pipeline.add_class("okapi")
        assert pipeline.labels == {"a": 0, "b": 1, "c": 2, "zebra": 3, "okapi": 4}
        pipeline.unload_lora_weights()
        assert pipeline.labels == {"a": 0, "b": 1, "c": 2, "okapi": 3}
        pipeline = trained(of_classes(), name="zebra")
        adapted = draw(pipeline, "zebra")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        pipeline.save_pretrained(tmp_path)
        torch.testing.assert_close(draw(load_pipeline(tmp_path), "zebra"), adapted, atol=1e-4, rtol=0)


def rewritten(source, target, change):
    """A copy of an adapter's file in which `change(weights, metadata)` has changed something."""
    weights = load_file(source / WEIGHTS)
    with safe_open(source / WEIGHTS, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    change(weights, metadata)
    target.mkdir()
    save_file(weights, target / WEIGHTS, {"lora_adapter_metadata": json.dumps(metadata)})
    return target


class TestMistakes:
    @pytest.fixture
    def unchanged(self):
        """A pipeline to which nothing may have happened."""
        pipeline = of_classes()
        yield pipeline
        assert pipeline.get_list_adapters() == {} and pipeline.labels == of_classes().labels
        assert_rounded_alike(draw(pipeline), draw(of_classes()))

    def test_an_adapter_of_another_model_is_refused(self, unchanged, tmp_path):
        wider = ClassifierFreeGuidedPipeline(
            tiny_unet(num_classes=3, block_out_channels=(16, 48)), AncestralDDPMScheduler()
        )
        trained(wider).save_lora_weights(tmp_path)
        with pytest.raises(ValueError, match=r"unet\..* fits no layer of this model; load it into the one it was"):
            unchanged.load_lora_weights(tmp_path)

    def test_an_adapter_of_a_text_encoder_is_refused_where_there_is_none(self, unchanged, tmp_path):
        trained(of_text()).save_lora_weights(tmp_path)
        with pytest.raises(ValueError, match="fits no layer of this model"):
            unchanged.load_lora_weights(tmp_path)

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda weights, metadata: metadata.update({"unet.from_the_future": 1}), "it cannot be attached"),
            (lambda weights, metadata: weights.pop("class_embedding"), "the embeddings of its classes are not those"),
            (lambda weights, metadata: metadata.pop("class_names"), "the embeddings of its classes are not those"),
            (lambda weights, metadata: weights.update(class_embedding=torch.zeros(1, 5)), "the embeddings of its"),
            (
                lambda weights, metadata: weights.update(
                    {"unet.mid_blocks.0.residual.conv1.lora_A.weight": torch.zeros(2, 32, 1, 1)}
                ),
                "unet.mid_blocks.0.residual.conv1.lora_A.weight fits no layer",
            ),
        ],
    )
    def test_an_adapter_that_cannot_be_attached_leaves_nothing(self, unchanged, zebra, tmp_path, change, message):
        with pytest.raises(ValueError, match=message):
            unchanged.load_lora_weights(rewritten(zebra, tmp_path / "changed", change))
        assert not any(".base_layer." in name for name in unchanged.unet.state_dict())

    def test_half_of_an_adapter_of_text_leaves_nothing(self, tmp_path):
        trained(of_text()).save_lora_weights(tmp_path / "whole")
        pipeline, before = of_text(), draw(of_text())
        for name, change in (
            ("without", lambda weights, metadata: [metadata.pop(key) for key in list(metadata) if key[0] == "t"]),
            ("unknown", lambda weights, metadata: metadata.update({"text_encoder.from_the_future": 1})),
        ):
            with pytest.raises(ValueError, match="it cannot be attached"):
                pipeline.load_lora_weights(rewritten(tmp_path / "whole", tmp_path / name, change))
            assert pipeline.get_list_adapters() == {}
            assert_rounded_alike(draw(pipeline), before)

    def test_a_class_of_a_model_without_names_is_told_from_its_numbers(self, tmp_path):
        unnamed = ClassifierFreeGuidedPipeline(tiny_unet(num_classes=3), AncestralDDPMScheduler())
        trained(of_classes(), name="1").save_lora_weights(tmp_path)
        with pytest.raises(ValueError, match="this model has a class '1' already"):
            unnamed.load_lora_weights(tmp_path)
        assert unnamed.get_list_adapters() == {}

    @pytest.mark.slow
    def test_a_model_compiled_as_a_whole_is_refused(self, unchanged, zebra):
        unet = unchanged.unet
        unchanged.unet = torch.compile(unet)
        for change in (lambda: unchanged.load_lora_weights(zebra), unchanged.unload_lora_weights):
            with pytest.raises(ValueError, match=r"unet: it was compiled as a whole; .* pipe.unet.compile\(\)"):
                change()
        unchanged.unet = unet

    def test_what_is_no_adapter_is_named(self, unchanged, tmp_path, hub):
        (tmp_path / WEIGHTS).write_bytes(b"no safetensors")
        (tmp_path / "empty").mkdir()
        (tmp_path / "pointer").mkdir()
        (tmp_path / "pointer" / WEIGHTS).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        )
        for path, error, message in (
            (tmp_path, ValueError, "not a file of safetensors"),
            (tmp_path / "pointer", ValueError, "a pointer of Git LFS; run `git lfs pull`"),
            (tmp_path / "empty", FileNotFoundError, f"there is no {WEIGHTS} in it"),
            (tmp_path / "missing", FileNotFoundError, "is not a folder here, nor an adapter on the Hub"),
            ("user/nothing", FileNotFoundError, "nor an adapter on the Hub"),
        ):
            with pytest.raises(error, match=message):
                unchanged.load_lora_weights(path)

    def test_a_hub_that_fails_is_asked_once(self, unchanged, hub):
        fault = hub.fail_next("/api/models/user/adaptr", 503, times=10)
        with pytest.raises(
            FileNotFoundError,
            match="^'user/adaptr' is not a folder here, .*the Hub cannot be asked .*; check the spell",
        ):
            unchanged.load_lora_weights("user/adaptr")
        assert fault.left == 9 and len(hub.requests) == 1

    def test_pickles_are_not_read(self, unchanged, tmp_path):
        torch.save({}, tmp_path / "pytorch_lora_weights.bin")
        with pytest.raises(FileNotFoundError, match="so it is not an adapter"):
            unchanged.load_lora_weights(tmp_path)
        with pytest.raises(ValueError, match="not a file of safetensors"):
            unchanged.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.bin")

    def test_names_are_taken_once(self, zebra):
        pipeline = of_classes()
        pipeline.load_lora_weights(zebra, adapter_name="mine")
        with pytest.raises(ValueError, match="adapter_name: 'mine' is attached already"):
            pipeline.load_lora_weights(zebra, adapter_name="mine")
        with pytest.raises(ValueError, match="this model has a class 'zebra' already"):
            pipeline.load_lora_weights(zebra)
        with pytest.raises(ValueError, match="name: 'zebra' is a class of this model already"):
            pipeline.add_class("zebra")
        with pytest.raises(ValueError, match=r"embedding: shape \(3,\) is not \(64,\)"):
            pipeline.add_class("okapi", torch.zeros(3))
        with pytest.raises(ValueError, match="adapter_name: 'v1.0' has a dot in it"):
            pipeline.load_lora_weights(zebra, adapter_name="v1.0")
        with pytest.raises(ValueError, match=r"adapter_names: 'yours' is not one of the adapters \['mine'\]"):
            pipeline.delete_adapters(["mine", "yours"])
        with pytest.raises(TypeError, match="adaptor_name"):
            pipeline.load_lora_weights(zebra, adaptor_name="third")
        assert pipeline.get_list_adapters() == {"unet": ["mine"]}

    def test_a_class_needs_a_pipeline_that_takes_more_of_them(self, zebra):
        unet, classifier = tiny_unet(num_classes=3), tiny_classifier(num_classes=3)
        pipeline = ClassifierGuidedPipeline(unet, classifier, AncestralDDPMScheduler())
        with pytest.raises(ValueError, match="it is for the classes zebra, and ClassifierGuidedPipeline takes none"):
            pipeline.load_lora_weights(zebra)

    def test_saving_needs_one_adapter(self, zebra, tmp_path):
        pipeline = of_classes()
        with pytest.raises(ValueError, match=r"adapter_name: None is not one of the adapters \[\]"):
            pipeline.save_lora_weights(tmp_path / "none")
        pipeline.load_lora_weights(zebra, adapter_name="mine")
        with pytest.raises(ValueError, match=r"'yours' is not one of the adapters \['mine'\]"):
            pipeline.save_lora_weights(tmp_path / "none", "yours")
        assert not (tmp_path / "none").exists()
        with pytest.raises(NotADirectoryError, match="is a file; give a folder"):
            pipeline.save_lora_weights(zebra / WEIGHTS)

    def test_fusing_needs_an_adapter(self, unchanged):
        for fuse in (unchanged.fuse_lora, unchanged.unfuse_lora):
            with pytest.raises(ValueError, match="no adapter is attached; load one by load_lora_weights"):
                fuse()

    def test_a_rank_that_is_none_is_refused(self, unchanged):
        with pytest.raises(ValueError, match="rank: 0 is not positive"):
            attach_adapter(unchanged.unet, 0)
