"""The fast convolutions are convolutions, and compute the same bits whether or not weights are trained."""

import pytest
import torch
import torch.nn.functional as F
from tiny import randomized, tiny_classifier, tiny_unet

from hf_genmod.models.blocks import Attention, AttentionBlock
from hf_genmod.models.fast_convolutions import Convolution, Upsample

MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (2, 3), (4, 4), (1, 16), (4, 5), (8, 8)], ids=str)
@pytest.mark.parametrize("kernel_size, stride", [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_one_by_whatever_way_it_is_computed(bias, kernel_size, stride, size):
    geometry = {"stride": stride, "padding": kernel_size // 2}
    convolution = randomized(Convolution(6, 4, kernel_size, bias=bias, **geometry)).double()
    x = randn(3, 6, *size, dtype=torch.float64)
    parameters = list(convolution.parameters())
    actual, expected = convolution(x.requires_grad_()), F.conv2d(x, *parameters, **geometry)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(y.square().sum(), [x, *parameters]) for y in (actual, expected)]
    torch.testing.assert_close(*gradients)
    assert convolution(x[:0]).shape == F.conv2d(x[:0], *parameters, **geometry).shape
    with torch.autocast("cpu", torch.bfloat16):
        x, parameters = x.float(), [parameter.float() for parameter in parameters]
        actual, expected = convolution.float()(x), F.conv2d(x, *parameters, **geometry)
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("size", [(3, 5), (1, 5), (2, 2), (1, 1)], ids=str)
def test_upsampling_is_nearest_neighbour_then_a_convolution(size):
    layer = Upsample(6).double()
    x = randn(2, 6, *size, dtype=torch.float64)
    larger = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(layer(x), F.conv2d(larger, layer.weight, layer.bias, padding=1))


def trained_and_frozen(module, *inputs, **named):
    """What a module answers while its weights are trained and when they are frozen, with and without a graph."""
    answers = []
    for trained in (True, False):
        module.requires_grad_(trained)
        for grad_enabled in (True, False):
            with torch.set_grad_enabled(grad_enabled):
                answers.append(module(*inputs, **named))
    return [getattr(answer, "sample", getattr(answer, "logits", answer)).detach() for answer in answers]


def assert_all_the_same_bits(answers):
    for answer in answers[1:]:
        assert torch.equal(answer, answers[0])


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (2, 3), (4, 4), (1, 16), (8, 8)], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("n, channels", [(1, (64, 32)), (2, (96, 64)), (5, (256, 128))])
def test_a_convolution_of_frozen_weights_is_bitwise_the_same(n, channels, kernel_size, size, memory_format):
    convolution = Convolution(*channels, kernel_size, padding=kernel_size // 2).to(memory_format=memory_format)
    x = randn(n, channels[0], *size).contiguous(memory_format=memory_format)
    assert_all_the_same_bits(trained_and_frozen(convolution, x))


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_attention_of_frozen_weights_is_bitwise_the_same(size, memory_format):
    block = randomized(AttentionBlock(96, cross_attention_dim=48, head_dim=32, groups=8))
    x = randn(3, 96, size, size).contiguous(memory_format=memory_format)
    for text in (randn(3, 5, 48), randn(1, 5, 48).expand(3, -1, -1), randn(3, 48, 5).mT):
        assert_all_the_same_bits(trained_and_frozen(block, x, text))
    tokens = x.flatten(2).mT
    pooling = randomized(Attention(96, 96, 32))
    assert_all_the_same_bits(trained_and_frozen(pooling, tokens.mean(dim=1, keepdim=True), tokens))


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize("sample_size", [2, 4, 8, (4, 6)], ids=str)
def test_frozen_networks_predict_bitwise_the_same(sample_size, memory_format):
    shape = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    x = randn(2, 3, *shape).contiguous(memory_format=memory_format)
    config = {"sample_size": sample_size, "block_out_channels": (64, 96), "attention_levels": (True, True)}
    unet = tiny_unet(num_classes=3, cross_attention_dim=48, **config).to(memory_format=memory_format)
    conditions = {"class_labels": torch.tensor([0, 3]), "encoder_hidden_states": randn(2, 5, 48)}
    assert_all_the_same_bits(trained_and_frozen(unet, x, 7, **conditions))
    classifier = tiny_classifier(**config).to(memory_format=memory_format)
    assert_all_the_same_bits(trained_and_frozen(classifier, x, 7))
