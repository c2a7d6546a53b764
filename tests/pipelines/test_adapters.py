"""An adapter is W + B A, attached, saved, fused and detached."""

import accelerate
import pytest
import torch
from adapter_cases import WEIGHTS, draw, of_classes, trained, with_product
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from safetensors.torch import load_file
from tiny import assert_rounded_alike

from hf_genmod import ClassifierFreeGuidedPipeline, load_pipeline


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

    @pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
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
