"""DenoisingUNet2DModel is diffusers' UNet2DModel, given the same weights."""

import pytest
import torch
from diffusers import UNet2DModel
from tiny import predict, randomized, unet_inputs

from hf_genmod.models.denoising_unet import DenoisingUNet2DModel


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


@pytest.mark.parametrize(
    "attention_levels, layers_per_block, num_classes",
    [((False, False, True), 1, 10), ((False, True, True), 2, None), ((True, False, True), 2, 10)],
)
def test_is_unet2dmodel_weight_by_weight(attention_levels, layers_per_block, num_classes):
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
    inputs = unet_inputs(ours)
    torch.testing.assert_close(predict(ours, inputs), predict(theirs, inputs), rtol=1e-5, atol=1e-5)
