"""What a call is asked for: how many images, from which generators, of which labels."""

import re

import numpy as np
import pytest
import torch
from small_pipelines import PIPELINES, guided, images_of, of_images, seeded, unconditional
from tiny import assert_rounded_alike

from hf_genmod.pipelines.requests import one_generator_each


def generators(n):
    return [seeded(i) for i in range(n)]


@pytest.mark.parametrize("kind", PIPELINES)
class TestEachPipeline:
    def test_a_generator_of_one_image_is_a_list_of_one(self, kind):
        make, request = PIPELINES[kind]
        pipeline = make()
        expected = images_of(pipeline, request(1), [seeded(5)])
        assert torch.equal(images_of(pipeline, request(1), seeded(5)), expected)

    def test_a_generator_of_many_images_draws_a_seed_for_each(self, kind):
        make, request = PIPELINES[kind]
        pipeline = make()
        seeds = torch.randint(2**63 - 1, (3,), generator=seeded(5)).tolist()
        expected = images_of(pipeline, request(3), [torch.Generator().manual_seed(seed) for seed in seeds])
        assert torch.equal(images_of(pipeline, request(3), seeded(5)), expected)

    def test_draws_many_images_for_each_request_one_after_another(self, kind):
        make, request = PIPELINES[kind]
        pipeline, n = make(), 1 if "batch_size" in request(1) else 2
        many = images_of(pipeline, request(n), generators(3 * n), num_images_per_prompt=3)
        assert len(many) == 3 * n
        for i, name in enumerate(many):
            asked = {key: value[i // 3 : i // 3 + 1] for key, value in request(n).items() if len_of(value) == n}
            alone = images_of(pipeline, request(1) | asked, generators(3 * n)[i : i + 1])
            torch.testing.assert_close(alone[0], name, rtol=0, atol=1e-4)

    def test_needs_a_generator_for_each_image(self, kind):
        make, request = PIPELINES[kind]
        with pytest.raises(ValueError, match="generator: a list of 1 for 3 images; give one for each"):
            images_of(make(), request(1), generators(1), num_images_per_prompt=3)

    @pytest.mark.parametrize("count", [0, 2.0, True])
    def test_the_number_of_images_is_a_positive_whole_number(self, kind, count):
        make, request = PIPELINES[kind]
        with pytest.raises(ValueError, match=f"num_images_per_prompt: {count} is not a positive whole number"):
            images_of(make(), request(1), num_images_per_prompt=count)


def len_of(value):
    return len(value) if isinstance(value, (list, torch.Tensor)) else None


@pytest.mark.parametrize("make", [unconditional, of_images])
def test_the_two_names_of_a_number_of_images_agree(make):
    pipeline = make()
    expected = images_of(pipeline, {"batch_size": 2}, seeded())
    for request in ({"num_images_per_prompt": 2}, {"batch_size": 2, "num_images_per_prompt": 2}):
        assert torch.equal(images_of(pipeline, request, seeded()), expected)
    with pytest.raises(ValueError, match="num_images_per_prompt: 3, but batch_size is 2; give one"):
        images_of(pipeline, {"batch_size": 2, "num_images_per_prompt": 3})


def test_generators_of_no_image_are_left_alone():
    one = seeded()
    assert one_generator_each(one, 1) == [one] and one_generator_each([one], 1) == [one]
    assert torch.equal(one.get_state(), seeded().get_state())


@pytest.mark.parametrize("generator", [5, "5", [1, 2], [seeded(), None], (None, None)])
def test_what_is_no_generator_is_named(generator):
    message = f"^generator: {re.escape(repr(generator))} is neither a torch.Generator nor a list of them; give one or "
    with pytest.raises(ValueError, match=message):
        images_of(unconditional(), {"batch_size": 2}, generator)


LABELS = [2, 0, 1]


class TestShapesOfLabels:
    @pytest.fixture
    def expected(self):
        return images_of(guided(), {"class_labels": LABELS}, generators(3))

    @pytest.mark.parametrize(
        "labels",
        [
            torch.tensor(LABELS),
            torch.tensor(LABELS)[:, None],
            torch.tensor(LABELS, dtype=torch.uint8)[:, None],
            np.array(LABELS),
            np.array(LABELS)[:, None],
            np.array(["lizard", "cat", "dog"]),
            np.array([["lizard"], ["cat"], ["dog"]]),
            [[2], [0], [1]],
            ((2,), [0], "dog"),
            [torch.tensor(2), torch.tensor([0]), np.int16(1)],
            [np.array(2), np.array([0]), {1: np.float32(1)}],
            [{"lizard": torch.tensor(1.0)}, ["cat"], [{"dog": 1}]],
        ],
        ids=repr,
    )
    def test_one_for_each_image(self, labels, expected):
        assert torch.equal(images_of(guided(), {"class_labels": labels}, generators(3)), expected)

    @pytest.mark.parametrize(
        "labels",
        [
            torch.tensor([LABELS]),
            torch.tensor([[0, 1], [1, 2]]),
            torch.zeros(2, 1, 1, dtype=torch.long),
            np.zeros((1, 1, 1), int),
            np.zeros((2, 0), int),
            [[0, 1]],
            [[0], [1, 2]],
            [[[0]]],
            [[]],
        ],
        ids=repr,
    )
    def test_another_shape_is_refused(self, labels):
        with pytest.raises(ValueError, match=re.escape("class_labels: their shape is neither (n,) nor (n, 1); give")):
            guided()(labels)

    @pytest.mark.parametrize(
        "labels, shown",
        [
            (torch.tensor([True, False]), "True"),
            (np.array([[True]]), "True"),
            (torch.tensor([1.0, 2.0]), "1.0"),
            (np.array([2.5]), "2.5"),
            ([torch.tensor(3)], "3"),
            ([None], "None"),
            (range(2), "range(0, 2)"),
        ],
        ids=repr,
    )
    def test_what_is_no_label_is_named(self, labels, shown):
        with pytest.raises(ValueError, match=re.escape(f"class_labels: {shown} is not a label of this model; give a")):
            guided()(labels)

    @pytest.mark.parametrize("labels", [[], (), torch.zeros(0, dtype=torch.long), np.zeros((0, 1), int)], ids=repr)
    def test_there_must_be_some(self, labels):
        with pytest.raises(ValueError, match="class_labels: there are none; give one for each image"):
            guided()(labels)


def test_a_weighted_label_is_repeated_as_any_other():
    pipeline, weights = guided(), {"cat": 1.5, "dog": -0.5}
    many = images_of(pipeline, {"class_labels": [weights, 2]}, generators(4), num_images_per_prompt=2)
    expected = images_of(pipeline, {"class_labels": [weights, weights, 2, 2]}, generators(4))
    assert_rounded_alike(many, expected)
