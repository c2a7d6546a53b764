"""Initial weights depend on a seed alone."""

import pytest
import torch
from tiny import TINY_UNET

from hf_genmod import DenoisingUNet2DModel
from hf_genmod.models.initial_weights import SeededWeights


@pytest.mark.parametrize(
    "make",
    [
        lambda: DenoisingUNet2DModel(**TINY_UNET, num_classes=3),
        lambda: torch.nn.init.trunc_normal_(torch.empty(1000)),
        lambda: torch.nn.init.orthogonal_(torch.empty(20, 30)),
    ],
)
def test_they_are_those_of_the_global_generator_which_does_not_move(make):
    def values():
        made = make()
        return list(made.state_dict().values()) if isinstance(made, torch.nn.Module) else [made]

    torch.manual_seed(5)
    expected = values()
    state = torch.get_rng_state()
    with SeededWeights(5):
        actual = values()
    assert all(map(torch.equal, actual, expected)) and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert not all(map(torch.equal, values(), expected))


def test_a_generator_that_is_given_is_used():
    with SeededWeights(5):
        actual = torch.empty(9).normal_(generator=torch.Generator().manual_seed(1))
    assert torch.equal(actual, torch.empty(9).normal_(generator=torch.Generator().manual_seed(1)))


def test_a_network_without_storage_can_be_made():
    with SeededWeights(5), torch.device("meta"):
        assert DenoisingUNet2DModel(**TINY_UNET).conv_in.weight.is_meta
