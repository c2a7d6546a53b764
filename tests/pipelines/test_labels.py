"""Labels are given by name, by number or with weights."""

import re

import numpy as np
import pytest
import torch
from small_pipelines import draw, guided, seeded


class TestLabels:
    @pytest.fixture
    def pipeline(self):
        return guided()

    @pytest.mark.parametrize(
        "label",
        [
            "dog",
            1,
            ["dog"],
            [1],
            ("dog",),
            torch.tensor(1),
            torch.tensor([1]),
            np.int64(1),
            np.array([1]),
            [np.int64(1)],
        ],
        ids=repr,
    )
    def test_a_class_has_many_names(self, pipeline, label):
        assert torch.equal(draw(pipeline, label), draw(pipeline, [1]))

    def test_one_label_for_each_picture_in_order(self, pipeline):
        mixed = draw(pipeline, ["cat", 2, "dog"], generator=[seeded(i) for i in range(3)])
        numbers = draw(pipeline, torch.tensor([0, 2, 1]), generator=[seeded(i) for i in range(3)])
        assert torch.equal(mixed, numbers)
        assert len(mixed) == 3

    def test_names_are_a_dictionary_to_numbers(self, pipeline):
        assert pipeline.labels == {"cat": 0, "dog": 1, "lizard": 2}
        assert guided(id2label={"1": "dog", "0": "cat", "2": "bee"}).labels == {"cat": 0, "dog": 1, "bee": 2}
        assert guided(id2label=None).labels == {}

    @pytest.mark.parametrize(
        "label, message",
        [
            ("catt", "class_labels: 'catt' is not a label of this model; did you mean 'cat'?"),
            (
                "xylophone",
                "is not a label of this model; give a whole number from 0 to 2, or one of cat, dog, lizard",
            ),
            (3, "class_labels: 3 is not a label of this model; give a whole number from 0 to 2, or one of cat"),
            (-1, "class_labels: -1 is not a label of this model; give a whole number from 0 to 2"),
            ([0, 5], "class_labels: 5 is not a label"),
            (True, "class_labels: True is not a label"),
            (1.0, "class_labels: 1.0 is not a label"),
            (torch.tensor([0.5]), "class_labels: 0.5 is not a label"),
            (None, "class_labels: None is not a label"),
            ([], "class_labels: there are none; give one for each image"),
            ({"catt": 1.0}, "class_labels: 'catt' is not a label of this model; did you mean 'cat'?"),
            ({"cat": "1"}, "class_labels: the weight '1' of 'cat' is not a finite number"),
            ({"cat": float("nan")}, "class_labels: the weight nan of 'cat' is not a finite number"),
            ({"cat": 1e300}, "class_labels: {'cat': 1e+300} gives no label a weight, or one that is too large"),
            ({"cat": 0.0}, "class_labels: {'cat': 0.0} gives no label a weight"),
            ({}, "class_labels: {} gives no label a weight"),
        ],
    )
    def test_what_is_no_label_is_named(self, pipeline, label, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            draw(pipeline, label)

    def test_a_model_without_names_wants_numbers(self):
        pipeline = guided(id2label=None)
        with pytest.raises(ValueError, match="'cat' is not a label of this model; give a whole number from 0 to 2$"):
            draw(pipeline, "cat")
        with pytest.raises(ValueError, match="give a whole number from 0 to 2$"):
            draw(pipeline, 3)
