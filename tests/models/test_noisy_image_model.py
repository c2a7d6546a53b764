"""Configs of networks that do not fit together are refused, in one sentence."""

import re

import numpy as np
import pytest
from tiny import (
    TINY_UNET,
    tiny_unet,
)

from hf_genmod.models.denoising_unet import DenoisingUNet2DModel


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"attention_levels": (True,)},
            "attention_levels: (True,) has 1 entries for the 2 levels of block_out_channels (16, 32); give one",
        ),
        (
            {"norm_num_groups": 12},
            "block_out_channels: 16 is not a positive multiple of norm_num_groups (12)",
        ),
        (
            {"attention_head_dim": 24},
            "block_out_channels: 32 is not a multiple of attention_head_dim (24); change one of them, or turn att",
        ),
        (
            {"attention_levels": (False, False), "cross_attention_dim": 12},
            "attention_levels: (False, False) leaves no level to look at the text of width 12; set one to True",
        ),
        ({"out_channels": 4}, "out_channels: 4 is neither in_channels (3) nor twice that (learned variance)"),
        (
            {"sample_size": 9},
            "resolution 9x9: this network (patch_size 1, 2 levels) needs a height and width that 2 divides, such "
            "as 8x8 or 10x10",
        ),
        ({"sample_size": (8, 6), "patch_size": 2}, "resolution 8x6: this network (patch_size 2, 2 levels) needs"),
        ({"sample_size": 1}, "that 2 divides, such as 2x2 or 2x2"),
    ],
)
def test_errors_of_construction(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DenoisingUNet2DModel(**(TINY_UNET | config))


@pytest.mark.parametrize("size", [(8, 8), [8, 8], np.array([8, 8])])
def test_check_size_passes_what_divides(size):
    tiny_unet(patch_size=2).check_size(size)
