"""Attention and residual blocks are their equations."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from tiny import (
    UNET_KINDS,
    predict,
    randomized,
    relative_error,
    tiny_unet,
    unet_inputs,
)

from hf_genmod.models.blocks import Attention


class TestAttention:
    @pytest.fixture(autouse=True)
    def _default_backend_is_restored(self):
        with attention_backend("native"):
            yield

    @pytest.fixture
    def unet(self):
        return tiny_unet(**UNET_KINDS["text"])

    @pytest.fixture
    def inputs(self, unet):
        return unet_inputs(unet)

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
        one_rounding = torch.finfo(torch.bfloat16).eps
        actual = attention(tokens, tokens)
        torch.testing.assert_close(actual, attention.to_out(expected), rtol=one_rounding, atol=one_rounding)

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
        inputs = unet_inputs(unet, n=16)
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


@pytest.mark.parametrize(
    "size, levels, lowest_kernel",
    [(2, {}, (1, 1)), ((2, 8), {}, (1, 3)), ((16, 2), {}, (3, 1)), ((4, 8), {"patch_size": 2}, (1, 3)),
     ((2, 4), {"patch_size": 2, "block_out_channels": (16,), "attention_levels": (True,)}, (1, 3))],
    ids=str,
)  # fmt: skip
def test_kernels_do_not_reach_past_a_side_of_one_pixel(size, levels, lowest_kernel):
    channels = {"num_classes": 3, "attention_levels": (True, True)} | levels
    unet, wide = tiny_unet(sample_size=size, **channels), tiny_unet(sample_size=16, **channels)
    middles = {}
    for name, weight in unet.state_dict().items():
        middle = wide.state_dict()[name]
        for axis in range(2, weight.ndim):
            middle = middle.narrow(axis, (middle.shape[axis] - weight.shape[axis]) // 2, weight.shape[axis])
        middles[name] = middle
    unet.load_state_dict(middles)
    inputs = unet_inputs(unet)
    torch.testing.assert_close(predict(unet, inputs), predict(wide, inputs))
    unet(**inputs).sample.square().mean().backward()
    lowest = unet.mid_blocks[0].residual.conv1.weight
    assert lowest.shape[2:] == lowest_kernel
    assert lowest.grad.ne(0).all()  # all of it is of use
