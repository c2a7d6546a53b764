"""Columns become images, labels and captions."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_images import chw, coded, picture, rows, save

from hf_genmod.data.loading import load_pictures
from hf_genmod.data.shapes import ShapesDataset


def test_captions(tmp_path, arrays):
    texts = [f"number {i}" for i in range(6)]
    for i, array in enumerate(arrays):
        save(picture(array), tmp_path / "jsonl" / f"{i}.png")
        save(picture(array), tmp_path / "csv" / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "jsonl" / "metadata.jsonl").write_text("\n".join(lines))
    table = ["file_name,note,words", *(f"{i}.png,x,{text}" for i, text in enumerate(texts))]
    (tmp_path / "csv" / "metadata.csv").write_text("\n".join(table))
    assert load_pictures(tmp_path / "jsonl").__getitems__([4, 1])["captions"] == ["number 4", "number 1"]
    assert load_pictures(tmp_path / "csv").captions is None
    assert load_pictures(tmp_path / "csv", caption_column="words")[3]["captions"] == "number 3"
    with pytest.raises(ValueError, match="its columns; choose note or words with --caption_column"):
        load_pictures(tmp_path / "csv", require_captions=True)

    (tmp_path / "jsonl" / "metadata.jsonl").write_text("\n".join(lines).replace("file_name", "photo_file_name"))
    assert load_pictures(tmp_path / "jsonl").captions == texts

    (tmp_path / "jsonl" / "metadata.jsonl").write_text("\n".join(lines[:4]))
    with pytest.warns(UserWarning, match=r"images left out, as its metadata has no line of them \(2\)"):
        assert len(load_pictures(tmp_path / "jsonl")) == 4

    images = [coded(picture(array)) for array in arrays[:2]]
    several = rows(images, captions=(datasets.List(datasets.Value("string")), [["a", "b"], ["c"]]))
    assert load_pictures(several).captions == [["a", "b"], ["c"]]
    missing = rows(images, text=(datasets.Value("string"), ["a", None]))
    assert load_pictures(missing).captions is None
    with pytest.raises(ValueError, match=r"without a caption \('text'\): 1 of 2 images, such as row 1"):
        load_pictures(missing, require_captions=True)


def test_label_columns(arrays):
    images = [coded(picture(array)) for array in arrays[:4]]
    text, number, real = (datasets.Value(dtype) for dtype in ("string", "int64", "float32"))
    dataset = rows(
        images,
        kind=(text, ["pear", "fig", "pear", "apple"]),
        digit=(number, [2, 0, 1, 2]),
        sparse=(number, [30, 4, 4, 30]),
        score=(real, [0.1, 0.2, 0.3, 0.4]),
    )
    assert load_pictures(dataset).labels is None
    for column, labels, names in (
        ("kind", [2, 1, 2, 0], ["apple", "fig", "pear"]),
        ("digit", [2, 0, 1, 2], ["0", "1", "2"]),
        ("sparse", [1, 0, 0, 1], ["4", "30"]),
    ):
        loaded = load_pictures(dataset, label_column=column)
        assert loaded.labels.tolist() == labels and loaded.label_names == names
    with pytest.raises(
        ValueError, match="the data set: its column 'score' holds float32, not classes; write one integer or name for"
    ):
        load_pictures(dataset, label_column="score")
    with pytest.raises(
        ValueError, match="label_column: 'kid' is no column of the data set; it has image, kind, digit"
    ):
        load_pictures(dataset, label_column="kid")

    assert load_pictures(rows(images, label=(number, [1, 0, 1, 0]))).label_names == ["0", "1"]
    with pytest.warns(
        UserWarning, match="'label' holds float32, not classes, so labels are not used; write one integer"
    ):
        assert load_pictures(rows(images, label=(real, [0.5, 0.5, 1, 1]))).labels is None
    with pytest.warns(UserWarning, match="its column 'text' holds no captions .*, so captions are not used"):
        assert load_pictures(rows(images, text=(number, [1, 2, 3, 4]))).captions is None
    with pytest.warns(UserWarning, match="without a label .* 1 of 4 images, such as row 2"):
        assert load_pictures(rows(images, label=(text, ["a", "b", "", "a"]))).labels is None
    two = {key: (datasets.ClassLabel(names=["a", "b"]), [0, 1, 1, 0]) for key in ("coarse", "fine")}
    with pytest.warns(UserWarning, match=r"labels \(coarse, fine\), so labels are not used; choose one by --label"):
        assert load_pictures(rows(images, **two)).labels is None
    with pytest.raises(ValueError, match=r"several of its columns hold class labels \(coarse, fine\); choose one by"):
        load_pictures(rows(images, **two), require_labels=True)
    assert load_pictures(rows(images, **two), label_column="fine").labels.tolist() == [0, 1, 1, 0]

    # A class that a split lacks keeps its number there.
    splits = datasets.DatasetDict(train=dataset, test=dataset.select([0]))
    loaded = load_pictures(splits, split="test", label_column="kind")
    assert loaded.labels.tolist() == [2] and loaded.label_names == ["apple", "fig", "pear"]


@pytest.mark.parametrize("kind, labels", [("string", ["2", "10"]), ("int64", [10, 2]), ("names", [0, 1])])
def test_numbers_that_are_not_the_labels_are_named(arrays, kind, labels):
    feature = datasets.ClassLabel(names=["2", "10"]) if kind == "names" else datasets.Value(kind)
    with pytest.warns(UserWarning, match="the data set: labels count from 0: label 0 is the class '2'"):
        load_pictures(rows([coded(picture(array)) for array in arrays[:2]], label=(feature, labels)))


@pytest.mark.parametrize("feature", [datasets.ClassLabel(names=["a", "b"]), datasets.Value("int64")])
def test_unlabelled_pictures(arrays, feature):
    dataset = rows([coded(picture(array)) for array in arrays[:3]], label=(feature, [0, -1, None]))
    assert load_pictures(dataset).labels is None
    with pytest.raises(
        ValueError, match=r"without a label \(-1, none or empty\) in the column 'label': 2 of 3 images"
    ):
        load_pictures(dataset, require_labels=True)


def test_image_column(arrays):
    images = [coded(picture(array)) for array in arrays[:2]]
    both = rows(images, mask=(datasets.Image(), images[::-1]))
    with pytest.raises(ValueError, match=r"several of its columns hold images \(image, mask\).*--image_column"):
        load_pictures(both)
    assert torch.equal(load_pictures(both, image_column="mask").images, chw(arrays[[1, 0]]))
    plain = datasets.Dataset.from_dict({"png": [image["bytes"] for image in images], "id": [0, 1]})
    assert torch.equal(load_pictures(plain, image_column="png").images, chw(arrays[:2]))
    with pytest.raises(ValueError, match="image_column: 'id' of the data set holds no images"):
        load_pictures(plain, image_column="id")


def test_shapes():
    shapes = ShapesDataset(num_images=5, resolution=(16, 24), num_objects=2, label=None)
    dataset = load_pictures(shapes)
    assert torch.equal(dataset.images, chw(np.stack([np.asarray(item["image"]) for item in shapes])))
    assert dataset.labels is None and dataset.captions == [item["caption"] for item in shapes]
    with pytest.raises(ValueError, match="no labels; draw them with label='shape'"):
        load_pictures(shapes, require_labels=True)
    with pytest.raises(
        ValueError, match="no 'validation'; it has 'train', 'test'; choose one, such as --split train$"
    ):
        load_pictures("shapes", split="validation")
    named = load_pictures("shapes", split="test", resolution=16, channels=1)
    assert tuple(named.images.shape) == (2048, 1, 16, 16) and named.label_names == ShapesDataset().label_names
    assert named[3]["class_labels"] == ShapesDataset(seed=1)[3]["label"]


def test_a_limit_takes_pictures_at_even_distances(class_folders, arrays):
    assert torch.equal(load_pictures(class_folders, limit=3).images, chw(arrays)[::2])
    assert torch.equal(load_pictures(class_folders, limit=100).images, chw(arrays))
    drawn = ShapesDataset(10, resolution=16)
    some, whole = (load_pictures(drawn, limit=limit) for limit in (4, None))
    assert torch.equal(some.images, whole.images[[0, 2, 5, 7]])
    assert torch.equal(some.labels, whole.labels[[0, 2, 5, 7]])


def test_where_nothing_can_be_a_caption_the_remedy_is_to_write_some(tmp_path):
    for name in ("cat", "dog"):
        save(picture(np.zeros((8, 8, 3), dtype=np.uint8)), tmp_path / name / "1.png")
    for column, where in ((None, "its columns"), ("label", "'label'")):
        with pytest.raises(ValueError, match=f"no captions .* in {where}; write that of 1.png into 1.txt"):
            load_pictures(str(tmp_path), caption_column=column, require_captions=True)


@pytest.mark.parametrize("is_struct", [True, False])
def test_bytes_of_images_in_a_parquet_file_without_features_are_images(tmp_path, is_struct):
    arrays = [np.full((8, 8, 3), 50 * i, dtype=np.uint8) for i in range(3)]
    contents = [coded(picture(array))["bytes"] for array in arrays]
    column = [{"bytes": content, "path": None} for content in contents] if is_struct else contents
    pq.write_table(pa.table({"image": column, "label": [0, 1, 0]}), tmp_path / "train.parquet")
    pictures = load_pictures(str(tmp_path))
    assert torch.equal(pictures.x_0(range(3)), chw(arrays).float() / 127.5 - 1)
    assert pictures.labels.tolist() == [0, 1, 0]
