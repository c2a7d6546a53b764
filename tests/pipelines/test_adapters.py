"""Adapters (LoRA) of pipelines: what they add to the weights, the classes they bring, and the ways in and out."""

import copy
import json

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import assert_rounded_alike, tiny_classifier, tiny_text_pipeline, tiny_unet, tiny_vae
from transformers import T5EncoderModel

from hf_genmod import (
    AncestralDDPMScheduler,
    ClassifierFreeGuidedPipeline,
    ClassifierGuidedPipeline,
    UnconditionalPipeline,
    load_pipeline,
)
from hf_genmod.training.adapters import attach_adapter

WEIGHTS = "pytorch_lora_weights.safetensors"


def unconditional(**kwargs):
    return UnconditionalPipeline(tiny_unet(), AncestralDDPMScheduler(), **kwargs)


def of_classes(**kwargs):
    unet = tiny_unet(num_classes=3)
    return ClassifierFreeGuidedPipeline(unet, AncestralDDPMScheduler(), id2label={0: "a", 1: "b", 2: "c"}, **kwargs)


def of_latents():
    scheduler = AncestralDDPMScheduler(clip_sample=False)
    return UnconditionalPipeline(tiny_unet(in_channels=4, out_channels=4), scheduler, tiny_vae())


def of_text(kind=None):
    return tiny_text_pipeline(kind) if kind else tiny_text_pipeline()


KINDS = {
    "unconditional": unconditional,
    "classes": of_classes,
    "latents": of_latents,
    "clip": of_text,
    "t5": lambda: of_text(T5EncoderModel),
}


def draw(pipeline, asked=None, **kwargs):
    pipeline.set_progress_bar_config(disable=True)
    if asked is None:
        asked = {"ClassifierFreeGuidedPipeline": "b", "TextToImagePipeline": "a red cat"}.get(type(pipeline).__name__)
    arguments = () if asked is None else (asked,)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(*arguments, generator=generator, num_inference_steps=3, output_type="np", **kwargs).images
    return torch.from_numpy(images)


def trained(pipeline, seed=0, rank=2, name=None):
    """The pipeline with an adapter as after training: none of its numbers is zero; with a class of this name."""
    known = pipeline.unet.config.num_classes
    if name is not None:
        pipeline.add_class(name, adapter_name="default")
    attach_adapter(pipeline.unet, rank, seed, num_new_classes=0 if name is None else 1)
    if "text_encoder" in pipeline.components:
        attach_adapter(pipeline.text_encoder, rank, seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for model in (pipeline.unet, pipeline.components.get("text_encoder")):
            for parameter in model.parameters() if model is not None else ():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=rng)
    assert pipeline.unet.config.num_classes == (known if name is None else known + 1)
    return pipeline


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


@pytest.fixture
def zebra(tmp_path):
    """The folder of an adapter for `of_classes` that brings a class."""
    trained(of_classes(), name="zebra").save_lora_weights(tmp_path / "zebra")
    return tmp_path / "zebra"


def with_product(model, weights, prefix, scale=1.0):
    """A copy of a model whose weights are W + scale · B A, of the file of an adapter."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for key in weights:
            if key.startswith(f"{prefix}.") and key.endswith(".lora_A.weight"):
                A, B = weights[key], weights[key.replace("lora_A", "lora_B")]
                W = modules[key.removeprefix(f"{prefix}.").removesuffix(".lora_A.weight")].weight
                W += scale * (B.flatten(1) @ A.flatten(1)).view_as(W)
    return model


class TestAnAdapter:
    def test_comes_back_from_disk(self, make, tmp_path):
        pipeline = trained(make())
        pipeline.save_lora_weights(tmp_path)
        fresh = make()
        assert not torch.equal(draw(fresh), draw(pipeline))
        fresh.load_lora_weights(tmp_path)
        assert_rounded_alike(draw(fresh), draw(pipeline))
        fresh.save_lora_weights(tmp_path / "again")
        ours, again = (load_file(folder / WEIGHTS) for folder in (tmp_path, tmp_path / "again"))
        assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)

    def test_is_the_product_of_two_matrices_added_to_each_weight(self, make, tmp_path):
        trained(make()).save_lora_weights(tmp_path)
        weights, pipeline, by_hand = load_file(tmp_path / WEIGHTS), make(), make()
        components = {key.split(".")[0] for key in weights}
        assert components == {"unet", *({"text_encoder"} & set(pipeline.components))}
        for component in components:
            setattr(by_hand, component, with_product(getattr(by_hand, component), weights, component))
        pipeline.load_lora_weights(tmp_path)
        torch.testing.assert_close(draw(pipeline), draw(by_hand), atol=1e-4, rtol=0)
        assert (draw(by_hand) - draw(make())).abs().max() > 1e-2

    def test_leaves_the_base_what_it_was_when_disabled_deleted_or_unloaded(self, make, tmp_path):
        trained(make()).save_lora_weights(tmp_path)
        pipeline, before = make(), draw(make())
        pipeline.load_lora_weights(tmp_path)
        adapted = draw(pipeline)
        pipeline.disable_lora()
        assert_rounded_alike(draw(pipeline), before)
        pipeline.enable_lora()
        assert_rounded_alike(draw(pipeline), adapted)
        pipeline.unload_lora_weights()
        assert_rounded_alike(draw(pipeline), before)
        pipeline.load_lora_weights(tmp_path, adapter_name="one")
        pipeline.delete_adapters("one")
        assert_rounded_alike(draw(pipeline), before)
        pipeline.save_pretrained(tmp_path / "base")
        loaded, base = load_pipeline(tmp_path / "base").unet.state_dict(), make().unet.state_dict()
        assert loaded.keys() == base.keys() and all(torch.equal(loaded[name], base[name]) for name in base)

    @pytest.mark.parametrize("scale", [1.0, 0.5])
    def test_is_part_of_the_weights_when_it_is_fused(self, make, scale, tmp_path):
        pipeline, before = trained(make()), draw(make())
        full = draw(pipeline)
        pipeline.set_adapters("default", scale)
        adapted = draw(pipeline)
        pipeline.set_adapters("default")
        pipeline.save_lora_weights(tmp_path / "adapter")
        for _ in range(2):
            pipeline.fuse_lora(lora_scale=scale)
            torch.testing.assert_close(draw(pipeline), adapted, atol=1e-4, rtol=0)
            pipeline.unfuse_lora()
            torch.testing.assert_close(draw(pipeline), full, atol=1e-4, rtol=0)
        pipeline.disable_lora()
        torch.testing.assert_close(draw(pipeline), before, atol=1e-4, rtol=0)

        pipeline = make()
        pipeline.load_lora_weights(tmp_path / "adapter")
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
        pipeline.save_pretrained(tmp_path / "fused")
        torch.testing.assert_close(draw(load_pipeline(tmp_path / "fused")), adapted, atol=1e-4, rtol=0)
        pipeline.load_lora_weights(tmp_path / "adapter")  # nothing of the first is left in its way
        assert pipeline.get_active_adapters() == ["default_0"]

    def test_is_read_by_the_unet_alone_as_diffusers_reads_it(self, make, tmp_path):
        pipeline = trained(make())
        pipeline.save_lora_weights(tmp_path)
        unet = make().unet
        unet.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
        ours, theirs = pipeline.unet.state_dict(), unet.state_dict()
        for name, weight in theirs.items():
            assert torch.equal(weight, ours[name.replace(".default_0.", ".default.")])

    def test_of_another_seed_joins_with_weights(self, make, tmp_path):
        for seed in (0, 1):
            trained(make(), seed).save_lora_weights(tmp_path / str(seed))
        pipeline, by_hand = make(), make()
        for seed, scale in ((0, 0.5), (1, 1.5)):
            pipeline.load_lora_weights(tmp_path / str(seed), adapter_name=f"number {seed}")
            weights = load_file(tmp_path / str(seed) / WEIGHTS)
            for component in {key.split(".")[0] for key in weights}:
                setattr(by_hand, component, with_product(getattr(by_hand, component), weights, component, scale))
        assert pipeline.get_active_adapters() == ["number 1"]
        pipeline.set_adapters(["number 0", "number 1"], [0.5, 1.5])
        torch.testing.assert_close(draw(pipeline), draw(by_hand), atol=1e-4, rtol=0)
        alone = make()
        alone.load_lora_weights(tmp_path / "1")
        pipeline.delete_adapters("number 0")
        pipeline.set_adapters("number 1")
        assert_rounded_alike(draw(pipeline), draw(alone))

    def test_works_on_a_pipeline_in_bf16(self, tmp_path):
        trained(of_classes(), name="zebra").save_lora_weights(tmp_path)
        pipeline, exact = of_classes().to(torch.bfloat16), of_classes()
        for pipe in (pipeline, exact):
            pipe.load_lora_weights(tmp_path)
        assert pipeline.unet.class_embedding.weight.dtype == torch.bfloat16
        x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([9, 900]), torch.tensor([3, 0])
        with torch.no_grad():
            low, high = (pipe.unet(x.to(pipe.unet.dtype), t, labels).sample.float() for pipe in (pipeline, exact))
            exact.disable_lora()
            without = exact.unet(x, t, labels).sample
        assert (low - high).norm() < 0.1 * (without - high).norm()

    def test_reaches_weights_that_are_offloaded(self, zebra):
        plain, offloaded = of_classes(), of_classes()
        accelerate.cpu_offload(offloaded.unet, "cpu")
        offloaded.enable_sequential_cpu_offload = lambda: accelerate.cpu_offload(offloaded.unet, "cpu")
        before = draw(offloaded)
        for pipe in (plain, offloaded):
            pipe.load_lora_weights(zebra)
        assert_rounded_alike(draw(offloaded, "zebra"), draw(plain, "zebra"))
        offloaded.unload_lora_weights()
        assert_rounded_alike(draw(offloaded), before)
        assert offloaded.unet.class_embedding.weight.device.type == "meta"  # offloaded again

    def test_works_on_the_code_of_a_checkpoint(self, zebra, tmp_path):
        of_classes().save_pretrained(tmp_path / "base")
        theirs = DiffusionPipeline.from_pretrained(tmp_path / "base", trust_remote_code=True)
        assert type(theirs) is not ClassifierFreeGuidedPipeline
        ours = load_pipeline(tmp_path / "base")
        for pipeline in (ours, theirs):
            pipeline.load_lora_weights(zebra)
        assert_rounded_alike(draw(ours, "zebra"), draw(theirs, "zebra"))

    def test_comes_from_the_hub(self, zebra, hub):
        repo_id = hub.new_repo_id("adapter")
        HfApi().create_repo(repo_id)
        HfApi().upload_folder(repo_id=repo_id, folder_path=zebra)
        here, there = of_classes(), of_classes()
        here.load_lora_weights(zebra / WEIGHTS)
        there.load_lora_weights(repo_id)
        assert_rounded_alike(draw(here, "zebra"), draw(there, "zebra"))


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
        with pytest.raises(ValueError, match="class_labels: 'zebra' is not one of the 3 labels"):
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
        for path, error, message in (
            (tmp_path, ValueError, "not a file of safetensors"),
            (tmp_path / "empty", FileNotFoundError, f"there is no {WEIGHTS} in it"),
            (tmp_path / "missing", FileNotFoundError, "is not a folder or a file"),
            ("user/nothing", FileNotFoundError, "nor an adapter on the Hub"),
        ):
            with pytest.raises(error, match=message):
                unchanged.load_lora_weights(path)

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
