"""NoisyImageClassifier is a classifier at every noise level, and its gradient in x_t is right."""

import re

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    TINY_UNET,
    assert_rounded_alike,
    tiny_classifier,
)

from hf_genmod.models.noisy_classifier import NoisyImageClassifier

CONFIG = {"patch_size": 2, "fourier_frequencies": (1.0, 3.0), "layers_per_block": 2, "sample_size": (16, 8)}


@pytest.fixture(params=[{}, CONFIG, {"attention_levels": (False, False)}])
def classifier(request):
    return tiny_classifier(**request.param)


def noisy(classifier, n=4, seed=1):
    size = classifier.config.sample_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def gradient(classifier, x_t, t, y):
    """∇_{x_t} Σ log f(y | x_t)"""
    x_t = x_t.clone().requires_grad_()
    log_f = classifier(x_t, t).logits.log_softmax(dim=1)
    return torch.autograd.grad(log_f.gather(1, y[:, None]).sum(), x_t)[0]


def test_comes_back_from_disk_with_the_noise_it_has_seen(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    loaded = NoisyImageClassifier.from_pretrained(tmp_path)
    x_t = noisy(classifier)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in classifier.state_dict().items())
    assert_rounded_alike(loaded(x_t, 10).logits, classifier(x_t, 10).logits)
    assert loaded.config.noise_schedule == dict(classifier.config.noise_schedule)
    assert loaded.config.noise_schedule["beta_schedule"] == "linear"


def test_has_a_logit_for_each_label_which_depends_on_picture_and_time(classifier):
    x_t = noisy(classifier)
    with torch.no_grad():
        logits = classifier(x_t, 10).logits
        assert logits.shape == (4, 3)
        assert torch.equal(classifier(x_t, 10, return_dict=False)[0], logits)
        assert (logits[0] - logits[1]).abs().max() > 1e-3
        assert (classifier(x_t, 900).logits - logits).abs().max() > 1e-3
        own_times = classifier(x_t, torch.tensor([10, 900, 10, 900])).logits
        expected = torch.stack([logits[0], classifier(x_t, 900).logits[1]])
        torch.testing.assert_close(own_times[:2], expected, rtol=1e-4, atol=1e-5)


def test_untrained_it_says_nothing():
    classifier = NoisyImageClassifier(**TINY_UNET, num_classes=3)
    assert not classifier(torch.randn(2, 3, 8, 8), 5).logits.any()


def test_pictures_do_not_see_each_other(classifier):
    classifier.train()
    x_t, t, y = noisy(classifier), torch.tensor([0, 5, 500, 999]), torch.tensor([0, 1, 2, 1])
    with torch.no_grad():
        together = classifier(x_t, t).logits
        for i in range(4):
            alone = classifier(x_t[i : i + 1], t[i : i + 1]).logits
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    gradients = gradient(classifier, x_t, t, y)
    other = x_t.clone()
    other[1:] = noisy(classifier, 3, seed=2)
    torch.testing.assert_close(gradient(classifier, other, t, y)[0], gradients[0], rtol=1e-4, atol=1e-5)


def test_gradient_in_x_t_is_the_difference_quotient(classifier):
    classifier.double()
    x_t, y = noisy(classifier).double(), torch.tensor([0, 1, 2, 1])
    direction = noisy(classifier, seed=3).double()
    expected = (gradient(classifier, x_t, 30, y) * direction).flatten(1).sum(dim=1)
    with torch.no_grad():
        h = 1e-5
        ends = [classifier(x_t + sign * h * direction, 30).logits.log_softmax(dim=1) for sign in (1, -1)]
    quotient = ((ends[0] - ends[1]) / (2 * h)).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(quotient, expected, rtol=1e-6, atol=1e-8)
    assert expected.abs().min() > 1e-4


def test_every_parameter_has_a_gradient_with_checkpointing_too(classifier):
    x_t, y = noisy(classifier), torch.tensor([0, 1, 2, 1])

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
        ({"block_out_channels": (12, 32)}, {}, "block_out_channels: 12 is not a positive multiple of norm_num_groups"),
    ],
)  # fmt: skip
def test_errors(config, inputs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_classifier(**config)(**({"sample": torch.zeros(2, 3, 8, 8), "timestep": 0} | inputs))
