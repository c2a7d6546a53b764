"""DenoisingUNet2DModel does what its equations say, and whatever diffusers' own models do."""

import re

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from tiny import (
    TINY_UNET,
    UNET_KINDS,
    assert_rounded_alike,
    predict,
    relative_error,
    same_weights,
    tiny_unet,
    unet_inputs,
)

from hf_genmod.models.blocks import UNetBlock
from hf_genmod.models.denoising_unet import DenoisingUNet2DModel

needs_accelerator = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")


@pytest.fixture(params=UNET_KINDS)
def unet(request):
    return tiny_unet(**UNET_KINDS[request.param])


@pytest.fixture
def inputs(unet):
    return unet_inputs(unet)


def test_the_memory_format_of_the_images_changes_nothing(unet, inputs):
    """Bitwise on a CPU, which computes with the channels of a pixel beside each other whatever it is given."""
    images = {k: v.contiguous(memory_format=torch.channels_last) for k, v in inputs.items() if v.ndim == 4}
    assert torch.equal(predict(unet, inputs | images), predict(unet, inputs))
    features = []
    with torch.no_grad():
        for module in (unet.conv_in, unet.conv_out):
            module.register_forward_hook(lambda module, args, output: features.append(args[0]))
        predict(unet, inputs)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in features)


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
    def test_weights_come_back_bitwise_from_disk(self, unet, inputs, tmp_path, options, names):
        unet.save_pretrained(tmp_path, **options)
        assert list(tmp_path.glob(names))
        loaded = DenoisingUNet2DModel.from_pretrained(tmp_path, variant=options.get("variant"))
        assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in unet.state_dict().items())
        assert_rounded_alike(predict(loaded, inputs), predict(unet, inputs))
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
        inputs = unet_inputs(unet)
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
        assert_rounded_alike(predict(unet, inputs), expected)

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
        assert torch.equal(predict(unet, unet_inputs(unet)), torch.zeros(2, 3, 8, 8))

    @pytest.mark.parametrize(
        "backend, tolerance", [("eager", 1e-5), pytest.param("inductor", 1e-4, marks=pytest.mark.slow)]
    )
    def test_compiles_without_a_graph_break(self, backend, tolerance):
        torch.compiler.reset()
        unet = tiny_unet(**(UNET_KINDS["everything"] | {"layers_per_block": 1, "attention_levels": (False, True)}))
        inputs = unet_inputs(unet)
        expected = predict(unet, inputs)
        compiled = torch.compile(unet, fullgraph=True, backend=backend)
        torch.testing.assert_close(predict(compiled, inputs), expected, rtol=tolerance, atol=tolerance)


class TestAdapters:
    @pytest.fixture
    def unet(self):
        return tiny_unet(**UNET_KINDS["text"])

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

    def test_an_adapter_comes_back_from_disk(self, unet, inputs, lora, tmp_path):
        fresh = same_weights(unet.config, unet)
        unet.add_adapter(lora)
        unet.save_lora_adapter(tmp_path)
        fresh.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        assert_rounded_alike(predict(fresh, inputs), predict(unet, inputs))

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
        inputs = unet_inputs(unet, n=4)
        batch = predict(unet, inputs)
        for i in range(4):
            single = predict(unet, {name: value[i : i + 1] for name, value in inputs.items()})
            torch.testing.assert_close(batch[i : i + 1], single, rtol=1e-5, atol=1e-5)

    def test_one_time_for_all_may_be_given_in_any_form(self):
        unet = tiny_unet()
        sample = unet_inputs(unet)["sample"]
        expected = unet(sample, torch.tensor([7, 7])).sample
        for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0, dtype=torch.bfloat16)):
            assert torch.equal(unet(sample, timestep).sample, expected)

    def test_each_picture_has_its_own_time(self):
        unet = tiny_unet()
        sample = unet_inputs(unet)["sample"][:1].repeat(2, 1, 1, 1)
        early, late = unet(sample, torch.tensor([10, 900])).sample
        assert relative_error(early, late) > 0.01

    def test_each_label_and_the_null_label_predict_something_else(self):
        unet = tiny_unet(num_classes=3)
        assert unet.null_label == 3
        assert unet.class_embedding.num_embeddings == 4
        sample = unet_inputs(unet)["sample"][:1].repeat(4, 1, 1, 1)
        predictions = unet(sample, 7, class_labels=torch.arange(4)).sample
        for i in range(4):
            for j in range(i):
                assert relative_error(predictions[i], predictions[j]) > 0.01

    def test_a_model_without_labels_has_no_null_label(self):
        assert tiny_unet().null_label is None

    def test_learned_variance_doubles_the_channels(self):
        unet = tiny_unet(out_channels=6)
        prediction = predict(unet, unet_inputs(unet))
        assert prediction.shape == (2, 6, 8, 8)
        assert not torch.equal(prediction[:, :3], prediction[:, 3:])

    def test_conditioning_image_and_its_noise_level_matter(self):
        unet = tiny_unet(conditioning_channels=2)
        inputs = unet_inputs(unet)
        expected = predict(unet, inputs, conditioning_timestep=0)
        assert torch.equal(predict(unet, inputs, conditioning_timestep=None), expected)
        assert relative_error(predict(unet, inputs, conditioning_timestep=500), expected) > 0.01
        other = inputs["conditioning_image"].flip(-1)
        assert (
            relative_error(predict(unet, inputs, conditioning_timestep=0, conditioning_image=other), expected) > 0.01
        )

    def test_patches_are_the_same_network_on_unshuffled_pixels(self):
        p, kind = 2, UNET_KINDS["everything"]
        patched = tiny_unet(**kind)
        inputs = unet_inputs(patched)
        channels = {name: kind[name] * p**2 for name in ("in_channels", "out_channels", "conditioning_channels")}
        inner = same_weights(TINY_UNET | kind | channels | {"sample_size": (8, 4), "patch_size": 1}, patched)
        images = {name: F.pixel_unshuffle(inputs[name], p) for name in ("sample", "conditioning_image")}
        assert_rounded_alike(predict(patched, inputs), F.pixel_shuffle(predict(inner, inputs, **images), p))

    def test_fourier_features_are_sines_and_cosines_beside_the_pixels(self):
        unet = tiny_unet(fourier_frequencies=(1.5, 4.0))
        inputs = unet_inputs(unet)
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
        inputs = unet_inputs(tall)
        expected = predict(tall, inputs)
        with torch.no_grad():
            for parameter in tall.parameters():
                if parameter.ndim == 4:
                    parameter.copy_(parameter.mT.clone())
        torch.testing.assert_close(predict(tall, inputs, sample=inputs["sample"].mT), expected.mT)

    def test_takes_pictures_of_other_sizes_than_its_own(self):
        unet = tiny_unet()
        sample = torch.randn(1, 3, 16, 12, generator=torch.Generator().manual_seed(0))
        assert predict(unet, {"sample": sample, "timestep": 7}).shape == (1, 3, 16, 12)


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
            "timestep: shape (3,) is neither () nor (2,)",
        ),
        (
            "labels",
            {"class_labels": None},
            "class_labels: missing, but this U-Net is conditioned on it",
        ),
        ("labels", {"class_labels": None}, "; `null_label` (3) stands for no label"),
        (
            "labels",
            {"class_labels": torch.tensor([1])},
            "class_labels: shape (1,) is not (2)",
        ),
        (
            "unconditional",
            {"class_labels": torch.tensor([1, 1])},
            "class_labels: given, but this U-Net is not conditioned on it; leave it out",
        ),
        ("text", {"encoder_hidden_states": None}, "encoder_hidden_states: missing, but this U-Net is cond"),
        (
            "text",
            {"encoder_hidden_states": torch.zeros(2, 5, 11)},
            "encoder_hidden_states: shape (2, 5, 11) is not (2, 5, 12)",
        ),
        (
            "text",
            {"encoder_hidden_states": torch.zeros(2, 12)},
            "encoder_hidden_states: shape (2, 12) is not (2, tokens, 12)",
        ),
        (
            "text",
            {"encoder_attention_mask": torch.ones(2, 4)},
            "encoder_attention_mask: shape (2, 4) is not (2, 5)",
        ),
        (
            "unconditional",
            {"encoder_hidden_states": torch.zeros(2, 5, 12)},
            "encoder_hidden_states: given, but this U-Net is not conditioned on it; leave it out",
        ),
        (
            "unconditional",
            {"encoder_attention_mask": torch.ones(2, 5)},
            "encoder_attention_mask: given, but this U-Net is not conditioned on it; leave it out",
        ),
        ("image", {"conditioning_image": None}, "conditioning_image: missing, but this U-Net is cond"),
        (
            "image",
            {"conditioning_image": torch.zeros(2, 2, 4, 4)},
            "conditioning_image: shape (2, 2, 4, 4) is not (2, 2, 8, 8)",
        ),
        (
            "image",
            {"conditioning_timestep": torch.zeros(3)},
            "conditioning_timestep: shape (3,) is neither () nor (2,)",
        ),
        (
            "unconditional",
            {"conditioning_image": torch.zeros(2, 2, 8, 8)},
            "conditioning_image: given, but this U-Net is not conditioned on it; leave it out",
        ),
        (
            "unconditional",
            {"conditioning_timestep": 3},
            "conditioning_timestep: given, but this U-Net is not conditioned on it; leave it out",
        ),
    ],
)
def test_errors_of_a_request(kind, changed, message):
    unet = tiny_unet(**UNET_KINDS[kind])
    with pytest.raises(ValueError, match=re.escape(message)):
        predict(unet, unet_inputs(unet), **changed)
