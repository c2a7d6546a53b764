"""DenoisingUNet2DModel does what its equations say, and whatever diffusers' own models do."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from tiny import TINY_UNET, randomized, tiny_classifier, tiny_unet

from hf_genmod.models.blocks import Attention, UNetBlock
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel
from hf_genmod.models.noisy_classifier import NoisyImageClassifier

KINDS = {
    "unconditional": {},
    "labels": {"num_classes": 3},
    "text": {"cross_attention_dim": 12},
    "image": {"conditioning_channels": 2},
    "everything": {
        "sample_size": (16, 8),
        "in_channels": 4,
        "out_channels": 8,
        "attention_levels": (True, True),
        "layers_per_block": 2,
        "num_classes": 3,
        "cross_attention_dim": 12,
        "conditioning_channels": 1,
        "patch_size": 2,
        "fourier_frequencies": (1.0, 3.0),
    },
}
needs_accelerator = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")


def make_inputs(unet, n=2, seed=1):
    rng, config = torch.Generator().manual_seed(seed), unet.config
    size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
    inputs = {
        "sample": torch.randn(n, config.in_channels, *size, generator=rng),
        "timestep": torch.randint(1000, (n,), generator=rng),
    }
    if config.num_classes is not None:
        inputs["class_labels"] = torch.randint(config.num_classes + 1, (n,), generator=rng)
    if config.cross_attention_dim is not None:
        inputs["encoder_hidden_states"] = torch.randn(n, 5, config.cross_attention_dim, generator=rng)
        inputs["encoder_attention_mask"] = torch.arange(5) < torch.randint(1, 6, (n, 1), generator=rng)
    if config.conditioning_channels:
        inputs["conditioning_image"] = torch.randn(n, config.conditioning_channels, *size, generator=rng)
        inputs["conditioning_timestep"] = torch.randint(1000, (n,), generator=rng)
    return inputs


@torch.no_grad()
def predict(unet, inputs, **changed):
    return unet(**(inputs | changed)).sample


def same_weights(config, unet):
    """A model of another config with the weights of `unet`."""
    other = DenoisingUNet2DModel(**config).eval()
    other.load_state_dict(unet.state_dict())
    return other


def relative_error(actual, expected):
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.fixture(params=KINDS)
def unet(request):
    return tiny_unet(**KINDS[request.param])


@pytest.fixture
def inputs(unet):
    return make_inputs(unet)


class TestAsAModelOfDiffusers:
    @pytest.mark.parametrize(
        "options, names",
        [
            ({}, "diffusion_pytorch_model.safetensors"),
            ({"variant": "fp16"}, "diffusion_pytorch_model.fp16.safetensors"),
            ({"max_shard_size": "50KB"}, "diffusion_pytorch_model-00003-of-*.safetensors"),
            ({"max_shard_size": "50KB", "variant": "fp16"}, "diffusion_pytorch_model.fp16-00003-of-*.safetensors"),
        ],
        ids=["plain", "variant", "sharded", "sharded variant"],
    )
    def test_comes_back_bitwise_from_disk(self, unet, inputs, tmp_path, options, names):
        unet.save_pretrained(tmp_path, **options)
        assert list(tmp_path.glob(names))
        loaded = DenoisingUNet2DModel.from_pretrained(tmp_path, variant=options.get("variant"))
        assert torch.equal(predict(loaded, inputs), predict(unet, inputs))
        hidden = {"_name_or_path", "_use_default_values"}
        assert {k: v for k, v in loaded.config.items() if k not in hidden} == {
            k: list(v) if isinstance(v, tuple) else v for k, v in unet.config.items() if k not in hidden
        }

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_loads_in_the_dtype_asked_for(self, unet, tmp_path, dtype):
        unet.save_pretrained(tmp_path)
        loaded = DenoisingUNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype).state_dict()
        for name, weight in unet.state_dict().items():
            assert torch.equal(loaded[name], weight.to(dtype)), name

    @pytest.mark.parametrize(
        "dtype, tolerance", [(torch.float64, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.05)]
    )
    def test_computes_in_its_dtype(self, unet, inputs, dtype, tolerance):
        expected = predict(unet, inputs)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        actual = predict(unet.to(dtype), inputs)
        assert actual.dtype == dtype
        assert relative_error(actual, expected) < tolerance

    def test_is_deterministic_and_the_same_in_training(self, unet, inputs):
        expected = predict(unet, inputs)
        assert torch.equal(predict(unet, inputs), expected)
        assert torch.equal(predict(unet.train(), inputs), expected)

    def test_dropout_acts_in_training_only(self):
        unet = tiny_unet(dropout=0.5)
        inputs = make_inputs(unet)
        expected = predict(same_weights(TINY_UNET, unet), inputs)
        assert torch.equal(predict(unet, inputs), expected)
        assert not torch.allclose(predict(unet.train(), inputs), expected)

    def test_tuple_and_output_hold_the_same(self, unet, inputs):
        prediction = unet(**inputs)
        (sample,) = unet(**inputs, return_dict=False)
        assert torch.equal(prediction.sample, sample)
        assert torch.equal(prediction[0], sample)

    def test_every_parameter_has_a_gradient(self, unet, inputs):
        unet(**inputs).sample.square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())

    def test_gradient_checkpointing_computes_blocks_twice_and_the_same_gradients(self, unet, inputs):
        def gradients():
            calls = []
            hooks = [
                block.register_forward_pre_hook(lambda *_: calls.append(1))
                for block in unet.modules()
                if isinstance(block, UNetBlock)
            ]
            unet.zero_grad()
            unet(**inputs).sample.square().mean().backward()
            for hook in hooks:
                hook.remove()
            return len(calls) / len(hooks), [p.grad.clone() for p in unet.parameters()]

        once, plain = gradients()
        unet.train().enable_gradient_checkpointing()
        twice, checkpointed = gradients()
        assert (once, twice) == (1, 2)
        for expected, actual in zip(plain, checkpointed, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "storage, tolerance", [(torch.bfloat16, 0.05), (torch.float8_e4m3fn, 0.5)], ids=["bf16", "fp8"]
    )
    def test_layerwise_casting_rounds_the_weights_and_nothing_else(self, unet, inputs, storage, tolerance):
        expected = predict(unet, inputs)
        rounded = same_weights(unet.config, unet)
        for module in rounded.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.Embedding)):
                module.to(storage).to(torch.float32)
        unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        assert unet.conv_in.weight.dtype == storage
        assert unet.norm_out.weight.dtype == torch.float32
        actual = predict(unet, inputs)
        assert torch.equal(actual, predict(rounded, inputs))
        assert 0 < relative_error(actual, expected) < tolerance

    @pytest.mark.parametrize("how", ["block_level", "leaf_level"])
    def test_group_offloading_brings_back_each_weight_in_time(self, unet, inputs, tmp_path, how):
        expected = predict(unet, inputs)
        unet.enable_group_offload("cpu", offload_type=how, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.fill_(torch.nan)  # the weights are on the disk now
        assert torch.equal(predict(unet, inputs), expected)

    @needs_accelerator
    @pytest.mark.parametrize("how", ["block_level", "leaf_level"])
    def test_group_offloading_with_an_accelerator(self, unet, inputs, how):
        expected = predict(unet, inputs)
        device = torch.accelerator.current_accelerator()
        unet.enable_group_offload(device, offload_type=how, num_blocks_per_group=1)
        actual = predict(unet, {name: value.to(device) for name, value in inputs.items()})
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-3, atol=1e-3)
        assert unet.mid_blocks[0].residual.conv1.weight.device.type == "cpu"

    def test_an_untrained_model_predicts_zero(self):
        unet = DenoisingUNet2DModel(**TINY_UNET)
        assert torch.equal(predict(unet, make_inputs(unet)), torch.zeros(2, 3, 8, 8))

    @pytest.mark.parametrize(
        "backend, tolerance", [("eager", 0), pytest.param("inductor", 1e-4, marks=pytest.mark.slow)]
    )
    def test_compiles_without_a_graph_break(self, backend, tolerance):
        torch.compiler.reset()
        unet = tiny_unet(**(KINDS["everything"] | {"layers_per_block": 1, "attention_levels": (False, True)}))
        inputs = make_inputs(unet)
        expected = predict(unet, inputs)
        compiled = torch.compile(unet, fullgraph=True, backend=backend)
        torch.testing.assert_close(predict(compiled, inputs), expected, rtol=tolerance, atol=tolerance)


class TestAdapters:
    @pytest.fixture
    def unet(self):
        return tiny_unet(**KINDS["text"])

    @pytest.fixture
    def lora(self):
        targets = ["to_q", "to_k", "to_v", "to_out"]
        return LoraConfig(r=2, target_modules=targets, init_lora_weights=False)  # False: B is random too

    def test_an_adapter_changes_the_prediction_until_it_is_disabled_or_unloaded(self, unet, inputs, lora):
        expected = predict(unet, inputs)
        unet.add_adapter(lora)
        adapted = predict(unet, inputs)
        assert relative_error(adapted, expected) > 0.01
        unet.disable_adapters()
        assert torch.equal(predict(unet, inputs), expected)
        unet.enable_adapters()
        assert torch.equal(predict(unet, inputs), adapted)
        unet.unload_lora()
        assert torch.equal(predict(unet, inputs), expected)

    def test_an_adapter_comes_back_bitwise_from_disk(self, unet, inputs, lora, tmp_path):
        fresh = same_weights(unet.config, unet)
        unet.add_adapter(lora)
        unet.save_lora_adapter(tmp_path)
        fresh.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        assert torch.equal(predict(fresh, inputs), predict(unet, inputs))

    def test_a_fused_adapter_is_part_of_the_weights(self, unet, inputs, lora, tmp_path):
        unet.add_adapter(lora)
        adapted = predict(unet, inputs)
        unet.fuse_lora()
        unet.unload_lora()
        unet.save_pretrained(tmp_path)
        loaded = DenoisingUNet2DModel.from_pretrained(tmp_path)
        torch.testing.assert_close(predict(loaded, inputs), adapted, rtol=1e-4, atol=1e-5)

    def test_is_not_saved_with_an_adapter_attached(self, unet, lora, tmp_path):
        unet.add_adapter(lora)
        with pytest.raises(ValueError, match=r"adapters \['default'\] are attached; save them by the pipeline's"):
            unet.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())


class TestPrediction:
    def test_pictures_do_not_see_each_other(self, unet):
        inputs = make_inputs(unet, n=4)
        batch = predict(unet, inputs)
        for i in range(4):
            single = predict(unet, {name: value[i : i + 1] for name, value in inputs.items()})
            torch.testing.assert_close(batch[i : i + 1], single, rtol=1e-5, atol=1e-5)

    def test_one_time_for_all_may_be_given_in_any_form(self):
        unet = tiny_unet()
        sample = make_inputs(unet)["sample"]
        expected = unet(sample, torch.tensor([7, 7])).sample
        for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0, dtype=torch.bfloat16)):
            assert torch.equal(unet(sample, timestep).sample, expected)

    def test_each_picture_has_its_own_time(self):
        unet = tiny_unet()
        sample = make_inputs(unet)["sample"][:1].repeat(2, 1, 1, 1)
        early, late = unet(sample, torch.tensor([10, 900])).sample
        assert relative_error(early, late) > 0.01

    def test_each_label_and_the_null_label_predict_something_else(self):
        unet = tiny_unet(num_classes=3)
        assert unet.null_label == 3
        assert unet.class_embedding.num_embeddings == 4
        sample = make_inputs(unet)["sample"][:1].repeat(4, 1, 1, 1)
        predictions = unet(sample, 7, class_labels=torch.arange(4)).sample
        for i in range(4):
            for j in range(i):
                assert relative_error(predictions[i], predictions[j]) > 0.01

    def test_a_model_without_labels_has_no_null_label(self):
        assert tiny_unet().null_label is None

    def test_learned_variance_doubles_the_channels(self):
        unet = tiny_unet(out_channels=6)
        prediction = predict(unet, make_inputs(unet))
        assert prediction.shape == (2, 6, 8, 8)
        assert not torch.equal(prediction[:, :3], prediction[:, 3:])

    def test_conditioning_image_and_its_noise_level_matter(self):
        unet = tiny_unet(conditioning_channels=2)
        inputs = make_inputs(unet)
        expected = predict(unet, inputs, conditioning_timestep=0)
        assert torch.equal(predict(unet, inputs, conditioning_timestep=None), expected)
        assert relative_error(predict(unet, inputs, conditioning_timestep=500), expected) > 0.01
        other = inputs["conditioning_image"].flip(-1)
        assert (
            relative_error(predict(unet, inputs, conditioning_timestep=0, conditioning_image=other), expected) > 0.01
        )

    def test_patches_are_the_same_network_on_unshuffled_pixels(self):
        p, kind = 2, KINDS["everything"]
        patched = tiny_unet(**kind)
        inputs = make_inputs(patched)
        channels = {name: kind[name] * p**2 for name in ("in_channels", "out_channels", "conditioning_channels")}
        inner = same_weights(TINY_UNET | kind | channels | {"sample_size": (8, 4), "patch_size": 1}, patched)
        images = {name: F.pixel_unshuffle(inputs[name], p) for name in ("sample", "conditioning_image")}
        assert torch.equal(predict(patched, inputs), F.pixel_shuffle(predict(inner, inputs, **images), p))

    def test_fourier_features_are_sines_and_cosines_beside_the_pixels(self):
        unet = tiny_unet(fourier_frequencies=(1.5, 4.0))
        inputs = make_inputs(unet)
        # The same network with the waves as a conditioning image, whose noise level it does not look at.
        other = DenoisingUNet2DModel(**TINY_UNET, conditioning_channels=12).eval()
        zeros = {name: torch.zeros_like(p) for name, p in other.conditioning_time_embedding.named_parameters()}
        other.load_state_dict(
            unet.state_dict() | {f"conditioning_time_embedding.{name}": zero for name, zero in zeros.items()}
        )
        x = inputs["sample"]
        waves = [wave(torch.pi * f * x) for f in (1.5, 4.0) for wave in (torch.sin, torch.cos)]
        expected = predict(other, inputs, conditioning_image=torch.cat(waves, dim=1))
        torch.testing.assert_close(predict(unet, inputs), expected)

    def test_height_and_width_are_treated_alike(self):
        tall = tiny_unet(sample_size=(16, 8))
        inputs = make_inputs(tall)
        expected = predict(tall, inputs)
        with torch.no_grad():
            for parameter in tall.parameters():
                if parameter.ndim == 4:
                    parameter.copy_(parameter.mT.clone())
        torch.testing.assert_close(predict(tall, inputs, sample=inputs["sample"].mT), expected.mT)

    @pytest.mark.parametrize(
        "size, levels, lowest_kernel",
        [(2, {}, (1, 1)), ((2, 8), {}, (1, 3)), ((16, 2), {}, (3, 1)), ((4, 8), {"patch_size": 2}, (1, 3)),
         ((2, 4), {"patch_size": 2, "block_out_channels": (16,), "attention_levels": (True,)}, (1, 3))],
        ids=str,
    )  # fmt: skip
    def test_kernels_do_not_reach_past_a_side_of_one_pixel(self, size, levels, lowest_kernel):
        channels = {"num_classes": 3, "attention_levels": (True, True)} | levels
        unet, wide = tiny_unet(sample_size=size, **channels), tiny_unet(sample_size=16, **channels)
        middles = {}
        for name, weight in unet.state_dict().items():
            middle = wide.state_dict()[name]
            for axis in range(2, weight.ndim):
                middle = middle.narrow(axis, (middle.shape[axis] - weight.shape[axis]) // 2, weight.shape[axis])
            middles[name] = middle
        unet.load_state_dict(middles)
        inputs = make_inputs(unet)
        torch.testing.assert_close(predict(unet, inputs), predict(wide, inputs))
        unet(**inputs).sample.square().mean().backward()
        lowest = unet.mid_blocks[0].residual.conv1.weight
        assert lowest.shape[2:] == lowest_kernel
        assert lowest.grad.ne(0).all()  # all of it is of use

    def test_takes_pictures_of_other_sizes_than_its_own(self):
        unet = tiny_unet()
        sample = torch.randn(1, 3, 16, 12, generator=torch.Generator().manual_seed(0))
        assert predict(unet, {"sample": sample, "timestep": 7}).shape == (1, 3, 16, 12)


class TestAttention:
    @pytest.fixture(autouse=True)
    def _default_backend_is_restored(self):
        with attention_backend("native"):
            yield

    @pytest.fixture
    def unet(self):
        return tiny_unet(**KINDS["text"])

    def test_is_softmax_of_scaled_products_head_by_head(self):
        attention = randomized(Attention(channels=16, context_dim=12, head_dim=4)).double()
        rng = torch.Generator().manual_seed(0)
        tokens, context = (torch.randn(2, *size, generator=rng).double() for size in ((6, 16), (5, 12)))
        mask = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
        q, k, v = attention.to_q(tokens), attention.to_k(context), attention.to_v(context)
        heads = []
        for i in range(0, 16, 4):
            scores = q[..., i : i + 4] @ k[..., i : i + 4].mT / 4**0.5  # (n, l, m)
            scores[~mask[:, None].expand_as(scores)] = -torch.inf
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            heads.append(weights @ v[..., i : i + 4])
        expected = attention.to_out(torch.cat(heads, dim=-1))
        torch.testing.assert_close(attention(tokens, context, mask[:, None, None, :]), expected)

    def test_on_a_cpu_half_precision_is_rounded_before_and_after_but_not_within(self):
        attention = randomized(Attention(channels=16, context_dim=16, head_dim=16)).bfloat16()
        tokens = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
        q, k, v = (project(tokens).float() for project in (attention.to_q, attention.to_k, attention.to_v))
        expected = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).squeeze(1).bfloat16()
        assert torch.equal(attention(tokens, tokens), attention.to_out(expected))

    def test_masked_tokens_are_not_seen(self, unet, inputs):
        mask, text = inputs["encoder_attention_mask"], inputs["encoder_hidden_states"]
        assert not mask.all()
        expected = predict(unet, inputs)
        hidden = torch.where(mask[..., None], text, 100.0)
        assert torch.equal(predict(unet, inputs, encoder_hidden_states=hidden), expected)
        seen = torch.where(mask[..., None], text + 1.0, text)
        assert relative_error(predict(unet, inputs, encoder_hidden_states=seen), expected) > 0.01

    def test_no_mask_means_that_every_token_counts(self, unet, inputs):
        expected = predict(unet, inputs, encoder_attention_mask=None)
        all_ones = torch.ones(2, 5, dtype=torch.long)
        torch.testing.assert_close(predict(unet, inputs, encoder_attention_mask=all_ones), expected)

    def test_the_order_of_tokens_does_not_matter(self, unet, inputs):
        order = torch.tensor([3, 1, 4, 0, 2])
        permuted = {name: inputs[name][:, order] for name in ("encoder_hidden_states", "encoder_attention_mask")}
        torch.testing.assert_close(predict(unet, inputs, **permuted), predict(unet, inputs), rtol=1e-5, atol=1e-5)

    def test_every_backend_reads_the_mask_alike(self, unet):
        # As many pictures as positions at the level with attention: a mask that is broadcast wrongly would fit.
        inputs = make_inputs(unet, n=16)
        expected = predict(unet, inputs)
        unet.set_attention_backend("native")
        assert torch.equal(predict(unet, inputs), expected)
        unet.set_attention_backend("_native_math")
        torch.testing.assert_close(predict(unet, inputs), expected, rtol=1e-5, atol=1e-5)

    def test_the_backend_chosen_for_a_model_is_the_one_that_runs(self, unet, inputs):
        expected = predict(unet, inputs)
        unet.set_attention_backend("_native_efficient")  # has no kernel for a CPU
        with attention_backend("native"):  # the default, which the line before has changed for all models
            with pytest.raises(RuntimeError, match="No (viable backend|available kernel)"):
                predict(unet, inputs)
            unet.reset_attention_backend()
            assert torch.equal(predict(unet, inputs), expected)


def weights_from_diffusers(theirs):
    """The state dict of a UNet2DModel under the names of ours."""
    state = theirs.state_dict()
    renamed = {name: state[name] for name in state if name.startswith(("time_embedding", "class_embed", "conv_"))}

    def copy(source, target, renames=()):
        for name in [name for name in state if name.startswith(source + ".")]:
            rest = name.removeprefix(source)
            for old, new in renames:
                rest = rest.replace(old, new)
            renamed[target + rest] = state[name]

    def copy_blocks(source, target, first):
        resnets, attentions = len(source[1].resnets), getattr(source[1], "attentions", [])
        for i in range(resnets):
            block = f"{target}.{first + i}"
            names = [("time_emb_proj", "scale_shift"), ("conv_shortcut", "skip")]
            copy(f"{source[0]}.resnets.{i}", f"{block}.residual", names)
            if i < len(attentions):
                name = f"{source[0]}.attentions.{i}"
                copy(f"{name}.group_norm", f"{block}.attention.norm")
                for layer in ("to_q", "to_k", "to_v", "to_out"):
                    copy(f"{name}.{layer}", f"{block}.attention.self_attention.{layer}", [(".0.", ".")])
        return first + resnets

    for direction, sampler in (("down", "downsamplers"), ("up", "upsamplers")):
        position = 0
        for i, level in enumerate(getattr(theirs, f"{direction}_blocks")):
            name, target = f"{direction}_blocks.{i}", f"{direction}_layers"
            position = copy_blocks((name, level), target, position)
            if getattr(level, sampler):
                renames = [(".conv", "")] if direction == "up" else []
                copy(f"{name}.{sampler}.0", f"{target}.{position}", renames)
                position += 1
    copy_blocks(("mid_block", theirs.mid_block), "mid_blocks", 0)
    for part in ("weight", "bias"):
        renamed[f"norm_out.{part}"] = renamed.pop(f"conv_norm_out.{part}")
    return renamed


class TestAgainstDiffusers:
    @pytest.mark.parametrize(
        "attention_levels, layers_per_block, num_classes",
        [((False, False, True), 1, 10), ((False, True, True), 2, None), ((True, False, True), 2, 10)],
    )
    def test_is_unet2dmodel_weight_by_weight(self, attention_levels, layers_per_block, num_classes):
        widths = (32, 64, 128)
        theirs = UNet2DModel(
            sample_size=16,
            block_out_channels=widths,
            layers_per_block=layers_per_block,
            down_block_types=["AttnDownBlock2D" if has else "DownBlock2D" for has in attention_levels],
            up_block_types=["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention_levels)],
            attention_head_dim=32,
            attn_norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=None if num_classes is None else num_classes + 1,
        )
        theirs = randomized(theirs).eval()
        ours = DenoisingUNet2DModel(
            sample_size=16,
            block_out_channels=widths,
            layers_per_block=layers_per_block,
            attention_levels=attention_levels,
            num_classes=num_classes,
        ).eval()
        assert ours.num_parameters() == theirs.num_parameters()
        ours.load_state_dict(weights_from_diffusers(theirs))
        inputs = make_inputs(ours)
        torch.testing.assert_close(predict(ours, inputs), predict(theirs, inputs), rtol=1e-5, atol=1e-5)


class TestClassifier:
    CONFIG = {"patch_size": 2, "fourier_frequencies": (1.0, 3.0), "layers_per_block": 2, "sample_size": (16, 8)}

    @pytest.fixture(params=[{}, CONFIG, {"attention_levels": (False, False)}])
    def classifier(self, request):
        return tiny_classifier(**request.param)

    @staticmethod
    def x_t(classifier, n=4, seed=1):
        size = classifier.config.sample_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))

    def gradient(self, classifier, x_t, t, y):
        """∇_{x_t} Σ log f(y | x_t)"""
        x_t = x_t.clone().requires_grad_()
        log_f = classifier(x_t, t).logits.log_softmax(dim=1)
        return torch.autograd.grad(log_f.gather(1, y[:, None]).sum(), x_t)[0]

    def test_comes_back_bitwise_from_disk_with_the_noise_it_has_seen(self, classifier, tmp_path):
        classifier.save_pretrained(tmp_path)
        loaded = NoisyImageClassifier.from_pretrained(tmp_path)
        x_t = self.x_t(classifier)
        assert torch.equal(loaded(x_t, 10).logits, classifier(x_t, 10).logits)
        assert loaded.config.noise_schedule == dict(classifier.config.noise_schedule)
        assert loaded.config.noise_schedule["beta_schedule"] == "linear"

    def test_has_a_logit_for_each_label_which_depends_on_picture_and_time(self, classifier):
        x_t = self.x_t(classifier)
        with torch.no_grad():
            logits = classifier(x_t, 10).logits
            assert logits.shape == (4, 3)
            assert torch.equal(classifier(x_t, 10, return_dict=False)[0], logits)
            assert (logits[0] - logits[1]).abs().max() > 1e-3
            assert (classifier(x_t, 900).logits - logits).abs().max() > 1e-3
            own_times = classifier(x_t, torch.tensor([10, 900, 10, 900])).logits
            expected = torch.stack([logits[0], classifier(x_t, 900).logits[1]])
            torch.testing.assert_close(own_times[:2], expected, rtol=1e-4, atol=1e-5)

    def test_untrained_it_says_nothing(self):
        classifier = NoisyImageClassifier(**TINY_UNET, num_classes=3)
        assert not classifier(torch.randn(2, 3, 8, 8), 5).logits.any()

    def test_pictures_do_not_see_each_other(self, classifier):
        classifier.train()
        x_t, t, y = self.x_t(classifier), torch.tensor([0, 5, 500, 999]), torch.tensor([0, 1, 2, 1])
        with torch.no_grad():
            together = classifier(x_t, t).logits
            for i in range(4):
                alone = classifier(x_t[i : i + 1], t[i : i + 1]).logits
                torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
        gradients = self.gradient(classifier, x_t, t, y)
        other = x_t.clone()
        other[1:] = self.x_t(classifier, 3, seed=2)
        torch.testing.assert_close(self.gradient(classifier, other, t, y)[0], gradients[0], rtol=1e-4, atol=1e-5)

    def test_gradient_in_x_t_is_the_difference_quotient(self, classifier):
        classifier.double()
        x_t, y = self.x_t(classifier).double(), torch.tensor([0, 1, 2, 1])
        direction = self.x_t(classifier, seed=3).double()
        expected = (self.gradient(classifier, x_t, 30, y) * direction).flatten(1).sum(dim=1)
        with torch.no_grad():
            h = 1e-5
            ends = [classifier(x_t + sign * h * direction, 30).logits.log_softmax(dim=1) for sign in (1, -1)]
        quotient = ((ends[0] - ends[1]) / (2 * h)).gather(1, y[:, None])[:, 0]
        torch.testing.assert_close(quotient, expected, rtol=1e-6, atol=1e-8)
        assert expected.abs().min() > 1e-4

    def test_every_parameter_has_a_gradient_with_checkpointing_too(self, classifier):
        x_t, y = self.x_t(classifier), torch.tensor([0, 1, 2, 1])

        def gradients():
            classifier.zero_grad()
            F.cross_entropy(classifier(x_t, 30).logits, y).backward()
            return {name: parameter.grad for name, parameter in classifier.named_parameters()}

        expected = gradients()
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in expected.values())
        classifier.train()
        classifier.enable_gradient_checkpointing()
        torch.testing.assert_close(gradients(), expected)

    @pytest.mark.parametrize(
        "config, inputs, message",
        [
            ({}, {"sample": torch.zeros(2, 4, 8, 8)}, "sample: shape (2, 4, 8, 8) is not (n, 3, height, width)"),
            ({}, {"sample": torch.zeros(2, 3, 8, 7)}, "resolution 8x7: this network"),
            ({}, {"timestep": torch.zeros(3)}, "timestep: shape (3,) is neither () nor (2,)"),
            ({"block_out_channels": (16, 24), "attention_head_dim": 16, "attention_levels": (True, False)}, {},
             "block_out_channels: 24 is not a multiple of attention_head_dim (16), as the pooling needs"),
            ({"block_out_channels": (12, 32)}, {}, "block_out_channels: 12 is not a multiple of norm_num_groups (8)"),
        ],
    )  # fmt: skip
    def test_errors(self, config, inputs, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            tiny_classifier(**config)(**({"sample": torch.zeros(2, 3, 8, 8), "timestep": 0} | inputs))


class TestErrors:
    @pytest.mark.parametrize(
        "config, message",
        [
            (
                {"attention_levels": (True,)},
                "attention_levels: (True,) has 1 entries for the 2 levels of block_out_channels (16, 32); give one",
            ),
            ({"norm_num_groups": 12}, "block_out_channels: 16 is not a multiple of norm_num_groups (12); change one"),
            (
                {"attention_head_dim": 24},
                "block_out_channels: 32 is not a multiple of attention_head_dim (24); change one of them, or turn att",
            ),
            (
                {"attention_levels": (False, False), "cross_attention_dim": 12},
                "attention_levels: (False, False) leaves no level to look at the text of width 12; set one to True",
            ),
            ({"out_channels": 4}, "out_channels: 4 is neither in_channels (3) nor twice that, for a learned variance"),
            (
                {"sample_size": 9},
                "resolution 9x9: this network (patch_size 1, 2 levels) needs a height and width that 2 divides, such "
                "as 8x8 or 10x10",
            ),
            ({"sample_size": (8, 6), "patch_size": 2}, "resolution 8x6: this network (patch_size 2, 2 levels) needs"),
            ({"sample_size": 1}, "that 2 divides, such as 2x2 or 2x2"),
        ],
    )
    def test_of_construction(self, config, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            DenoisingUNet2DModel(**(TINY_UNET | config))

    @pytest.mark.parametrize(
        "kind, changed, message",
        [
            ("unconditional", {"sample": torch.zeros(2, 4, 8, 8)}, "sample: shape (2, 4, 8, 8) is not (n, 3, height"),
            (
                "unconditional",
                {"sample": torch.zeros(3, 8, 8)},
                "sample: shape (3, 8, 8) is not (n, 3, height, width)",
            ),
            ("unconditional", {"sample": torch.zeros(2, 3, 8, 7)}, "resolution 8x7: this network"),
            (
                "unconditional",
                {"timestep": torch.zeros(3)},
                "timestep: shape (3,) is neither () nor (2,), one for each picture",
            ),
            (
                "labels",
                {"class_labels": None},
                "class_labels: missing, and this U-Net was made to be conditioned on it",
            ),
            ("labels", {"class_labels": None}, "; `null_label` (3) stands for no label"),
            (
                "labels",
                {"class_labels": torch.tensor([1])},
                "class_labels: shape (1,) is not (2,), one label for each",
            ),
            (
                "unconditional",
                {"class_labels": torch.tensor([1, 1])},
                "class_labels: given, but this U-Net was made without it; leave it out",
            ),
            ("text", {"encoder_hidden_states": None}, "encoder_hidden_states: missing, and this U-Net was made to be"),
            (
                "text",
                {"encoder_hidden_states": torch.zeros(2, 5, 11)},
                "encoder_hidden_states: shape (2, 5, 11) is not (2, tokens, 12)",
            ),
            (
                "text",
                {"encoder_hidden_states": torch.zeros(2, 12)},
                "encoder_hidden_states: shape (2, 12) is not (2, tokens, 12)",
            ),
            (
                "text",
                {"encoder_attention_mask": torch.ones(2, 4)},
                "encoder_attention_mask: shape (2, 4) is not (2, 5), that of the tokens",
            ),
            (
                "unconditional",
                {"encoder_hidden_states": torch.zeros(2, 5, 12)},
                "encoder_hidden_states: given, but this U-Net was made without it; leave it out",
            ),
            (
                "unconditional",
                {"encoder_attention_mask": torch.ones(2, 5)},
                "encoder_attention_mask: given, but this U-Net was made without it; leave it out",
            ),
            ("image", {"conditioning_image": None}, "conditioning_image: missing, and this U-Net was made to be"),
            (
                "image",
                {"conditioning_image": torch.zeros(2, 2, 4, 4)},
                "conditioning_image: shape (2, 2, 4, 4) is not (2, 2, 8, 8)",
            ),
            (
                "image",
                {"conditioning_timestep": torch.zeros(3)},
                "conditioning_timestep: shape (3,) is neither () nor (2,), one for each picture",
            ),
            (
                "unconditional",
                {"conditioning_image": torch.zeros(2, 2, 8, 8)},
                "conditioning_image: given, but this U-Net was made without it; leave it out",
            ),
            (
                "unconditional",
                {"conditioning_timestep": 3},
                "conditioning_timestep: given, but this U-Net was made without it; leave it out",
            ),
        ],
    )
    def test_of_a_request(self, kind, changed, message):
        unet = tiny_unet(**KINDS[kind])
        with pytest.raises(ValueError, match=re.escape(message)):
            predict(unet, make_inputs(unet), **changed)

    @pytest.mark.parametrize("size", [(8, 8), [8, 8], np.array([8, 8])])
    def test_check_size_passes_what_divides(self, size):
        tiny_unet(patch_size=2).check_size(size)
