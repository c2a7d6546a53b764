import pytest
import torch
from algorithm_1 import Model, batch_random, drawn, pictures, scheduler

from hf_genmod import DenoisingObjective
from hf_genmod.data.randomness import BatchRandom, batch_positions
from hf_genmod.models.conditioning import enlarge, shrink
from hf_genmod.objectives.upsampling import ConditioningAugmentation


def test_what_is_seen_is_the_picture_made_small_noised_and_enlarged():
    process, x_0 = scheduler(), pictures((8, 3, 16, 8))
    same, seen = ConditioningAugmentation(process, factor=4, max_noise_level=300)(x_0, batch_random())
    rng = batch_random()
    s = (301 * rng.uniform() ** 2).long()
    epsilon = rng.normal(3, 4, 2)
    alpha_bar = torch.cat([torch.ones(1), process.alphas_cumprod])[s].reshape(-1, 1, 1, 1)
    noised = alpha_bar.sqrt() * shrink(x_0, 4) + (1 - alpha_bar).sqrt() * epsilon
    assert same is x_0
    assert torch.equal(seen["conditioning_timestep"], s) and s.max() > 0
    torch.testing.assert_close(seen["conditioning_image"], enlarge(noised, 4))


def test_without_noise_the_small_picture_is_kept():
    x_0 = pictures((8, 1, 8, 8))
    _, seen = ConditioningAugmentation(scheduler(), factor=2, max_noise_level=0)(x_0, batch_random())
    assert torch.equal(seen["conditioning_image"], enlarge(shrink(x_0, 2), 2))
    assert torch.equal(seen["conditioning_timestep"], torch.zeros(8, dtype=torch.long))


def test_all_noise_levels_occur_and_little_noise_more_often():
    x_0 = torch.zeros(4096, 1, 2, 2)
    _, seen = ConditioningAugmentation(scheduler(), factor=2, max_noise_level=9)(x_0, batch_random(4096))
    counts = torch.bincount(seen["conditioning_timestep"], minlength=10)
    expected = 4096 * (torch.arange(11) / 10).sqrt().diff()  # P(⌊10 u²⌋ = s)
    assert len(counts) == 10
    assert ((counts - expected).square() / expected).sum() < 27.9  # χ² of nine degrees of freedom, 0.1%


def test_a_crop_is_seen_as_it_is_in_the_whole_picture():
    x_0 = pictures((8, 3, 24, 16))
    whole, seen = ConditioningAugmentation(scheduler(), factor=4)(x_0, batch_random())
    crops, seen_of_crops = ConditioningAugmentation(scheduler(), factor=4, crop_size=8)(x_0, batch_random())
    assert crops.shape == seen_of_crops["conditioning_image"].shape == (8, 3, 8, 8)
    corners = set()
    for i in range(8):
        (corner,) = [
            (top, left)
            for top in range(0, 17, 4)
            for left in range(0, 9, 4)
            if torch.equal(whole[i, :, top : top + 8, left : left + 8], crops[i])
        ]
        region = (slice(None), slice(corner[0], corner[0] + 8), slice(corner[1], corner[1] + 8))
        assert torch.equal(seen["conditioning_image"][i][region], seen_of_crops["conditioning_image"][i])
        corners.add(corner)
    assert len(corners) > 3


def test_every_corner_of_a_crop_occurs():
    x_0 = torch.arange(16.0).reshape(1, 1, 4, 4).expand(256, 1, 4, 4) / 8 - 1
    crops, _ = ConditioningAugmentation(scheduler(), factor=2, crop_size=2)(x_0, batch_random(256))
    assert sorted(set(crops[:, 0, 0, 0].tolist())) == [-1.0, -0.75, 0.0, 0.25]


def test_a_picture_is_treated_alike_by_any_number_of_processes():
    x_0, small = pictures((8, 3, 16, 16)), ConditioningAugmentation(scheduler(), factor=2, crop_size=8)
    crops, seen = small(x_0, batch_random())
    for process in range(2):
        positions = batch_positions(8, process_index=process, num_processes=2)
        part, seen_of_part = small(x_0[positions], BatchRandom(0, 0, positions, 8))
        assert torch.equal(part, crops[positions])
        torch.testing.assert_close(seen_of_part["conditioning_image"], seen["conditioning_image"][positions])


def test_the_model_is_trained_on_the_crop_beside_what_is_seen_of_it():
    process, x_0 = scheduler(), pictures((8, 3, 16, 16))
    model = Model(lambda x_t, t: 0.1 * x_t)
    small = ConditioningAugmentation(process, factor=2, crop_size=8)
    loss, _ = DenoisingObjective(process, small=small)(model, {"images": x_0}, batch_random())
    rng = batch_random()
    crop, seen = small(x_0, rng)
    _, epsilon, _, x_t = drawn(process, crop, rng)
    torch.testing.assert_close(model.x_t, x_t)
    torch.testing.assert_close(model.condition["conditioning_image"], seen["conditioning_image"])
    torch.testing.assert_close(loss, (epsilon - 0.1 * x_t).square().mean())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_noise_level": -1}, "max_noise_level: -1 is not between 0 and 1000"),
        ({"max_noise_level": 1001}, "max_noise_level: 1001 is not"),
        ({"crop_size": 6, "factor": 4}, "crop_size: 6 is not a multiple of the factor 4"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ConditioningAugmentation(scheduler(), **settings)
