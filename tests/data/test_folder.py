"""Splits and classes follow from the folders, or a sentence says why not."""

import subprocess
import warnings

import pytest
from made_images import picture, save

from hf_genmod.data.archives import list_images
from hf_genmod.data.folder import in_order, read_folder
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.sources import splits_of


def folder_of(tmp_path, arrays, *names):
    for i, name in enumerate(names):
        save(picture(arrays[i % len(arrays)]), tmp_path / "data" / name)
    return tmp_path / "data"


def quietly_read(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {split: load_pictures(folder, split=split) for split in splits_of(folder)}
    return {
        split: [images.label_names and images.label_names[images.labels[i]] for i in range(len(images))]
        for split, images in found.items()
    }


@pytest.mark.parametrize(
    "names, expected",
    [
        (
            ["Train/a/0.png", "Train/b/1.png", "VAL/a/2.png", "VAL/b/3.png"],
            {"train": ["a", "b"], "validation": ["a", "b"]},
        ),
        (["data/train/a/0.png", "data/train/b/1.png", "data/test/b/2.png"], {"train": ["a", "b"], "test": ["b"]}),
        (["train/train/0.png", "test/test/1.png"], {"train": [None], "test": [None]}),
        (["train/train/0.png", "train/car/1.png", "test/car/2.png"], {"train": ["car", "train"], "test": ["car"]}),
        (
            ["a/train/0.png", "a/test/1.png", "b/train/2.png", "b/test/3.png"],
            {"train": ["a", "b"], "test": ["a", "b"]},
        ),
        (["train2017/0.png", "val2017/1.png"], {"train": [None], "validation": [None]}),
        (["my-train/a/0.png", "my-train/b/1.png", "my-test/b/1.png"], {"train": ["a", "b"], "test": ["b"]}),
        (["train_0.png", "test_0.png"], {"train": [None], "test": [None]}),
        (["a/train_0.png", "a/test_0.png", "b/train_1.png"], {"train": ["a", "b"], "test": ["a"]}),
        (["train/a/0.png", "train/b/1.png", "test/2.png"], {"train": ["a", "b"], "test": [None]}),
        (["train/test tube/0.png", "train/b/1.png", "test/b/2.png"], {"train": ["b", "test tube"], "test": ["b"]}),
        (["my_test_data/a/0.png", "my_test_data/b/1.png"], {"train": ["a", "b"]}),
        (["test.png", "test tube.png", "cat.png"], {"train": [None] * 3}),
        (["train/a/0.png", "train/b/1.png", "test1/2.png"], {"train": ["a", "b"], "test": [None]}),
        (["a/\u00e9.png", "a/e\u0301.png", "b/0.png"], {"train": ["a", "a", "b"]}),
        (["a/images/0.png", "b/images/1.png"], {"train": ["a", "b"]}),
        (["x/y/a/0.png", "x/y/b/1.png"], {"train": ["a", "b"]}),
        (["one/0.png", "one/1.png"], {"train": [None] * 2}),
        (["__a/0.png", "__b/1.png"], {"train": ["__a", "__b"]}),
        (["data.jpg/a/0.png", "data.jpg/b/1.png"], {"train": ["a", "b"]}),
    ],
)
def test_splits_and_classes(tmp_path, arrays, names, expected):
    assert quietly_read(folder_of(tmp_path, arrays, *names)) == expected


@pytest.mark.parametrize(
    "names, expected, message",
    [
        (["bullet train/0.png", "car/1.png"], ["bullet train", "car"], "'bullet train' is taken for a class, not for"),
        (
            ["animals/cat/0.png", "plants/rose/1.png"],
            ["cat", "rose"],
            "innermost folders, such as 'cat' of animals/cat",
        ),
        (
            ["0.png", "a/1.png", "b/2.png"],
            [None] * 3,
            r"outside its class folders \(a, b\), .* 1 of 3 images, such as .*data/0.png, so labels are not",
        ),
        (
            ["a/0.png", "b/1.png", "b/c/2.png"],
            [None] * 3,
            r"or at another depth in them: 1 of 3 images, such as .*b/c/2.png, so labels are",
        ),
    ],
)
def test_what_is_not_plain_is_said(tmp_path, arrays, names, expected, message):
    folder = folder_of(tmp_path, arrays, *names)
    with pytest.warns(UserWarning, match=message):
        images = load_pictures(folder)
    assert [images.label_names and images.label_names[images.labels[i]] for i in range(len(images))] == expected
    if None in expected:
        with pytest.raises(ValueError, match="outside its class folders .*; put all images into class folders"):
            load_pictures(folder, require_labels=True)


@pytest.mark.parametrize(
    "names, classes",
    [
        ("cat.0.png cat.1.png dog.0.png dog.12.png", ["cat", "dog"]),
        ("great_dane_1.jpg great_dane_20.jpg red-fox_3.jpg red-fox_4.jpg", ["great_dane", "red-fox"]),
        ("n01-2.png n01-3.png n02-2-x.png n02-5.png", ["n01", "n02"]),
    ],
)
def test_classes_in_the_names_of_images_are_told_with_the_command_that_sorts_them(tmp_path, arrays, names, classes):
    folder = folder_of(tmp_path, arrays, *names.split())
    with pytest.raises(ValueError, match=r"begin with what may be classes \(" + ", ".join(classes)) as refused:
        load_pictures(folder, require_labels=True)
    assert load_pictures(folder).labels is None
    command = str(refused.value).partition("running in their folder: ")[2]
    subprocess.run(["sh", "-c", command], cwd=folder, check=True)
    sorted_images = load_pictures(folder, require_labels=True)
    assert sorted_images.label_names == classes and sorted_images.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "names",
    ["0.png 1.png 2.png 3.png", "IMG_0.png IMG_1.png", "a_0.png b_0.png c_0.png", "1_0.png 1_1.png 2_0.png 2_1.png"],
)
def test_other_names_hold_no_classes(tmp_path, arrays, names):
    with pytest.raises(ValueError, match="hold class labels; sort the images into two or more class folders"):
        load_pictures(folder_of(tmp_path, arrays, *names.split()), require_labels=True)


@pytest.mark.parametrize(
    "names, classes, told",
    [
        (
            "caf\u00e9 cafe\u0301 tea",
            ["caf\u00e9", "tea"],
            "differ only in how Unicode writes them are one class: caf\u00e9;",
        ),
        ("cat Cat dog", ["Cat", "cat", "dog"], "differ by case, blanks or .* alone: 'Cat', 'cat'; rename one if they"),
        ("cat,cat ,dog", ["cat", "cat ", "dog"], "differ by case, blanks or .* alone: 'cat', 'cat '; rename one if"),
        (
            "images masks",
            ["images", "masks"],
            "'images' is taken for a class beside masks; if it holds all images, give",
        ),
        (
            "trainA testA trainB",
            ["testA", "trainA", "trainB"],
            "'trainA' and 'testA' are taken for classes; if they",
        ),
        ("JPEGImages a b", ["JPEGImages", "a", "b"], "'JPEGImages' is taken for a class beside a, b; if it holds"),
    ],
)
def test_folders_that_look_like_one_class_or_like_none_are_told(tmp_path, arrays, names, classes, told):
    folders = names.split("," if "," in names else None)
    folder = folder_of(tmp_path, arrays, *(f"{name}/{i}.png" for i, name in enumerate(folders)))
    if len(set(p.name for p in folder.iterdir())) < len(folders):
        pytest.skip("the file system takes these names for one")
    with pytest.warns(UserWarning, match=told):
        assert load_pictures(folder, require_labels=True).label_names == classes


def test_of_two_depths_with_as_many_images_the_upper_one_has_the_classes(tmp_path, arrays):
    folder = folder_of(tmp_path, arrays, "a/0.png", "b/1.png", "a/x/2.png", "b/y/3.png")
    with pytest.warns(UserWarning, match=r"outside its class folders \(a, b\), .* 2 of 4 images"):
        load_pictures(folder)


def test_splits_that_leave_images_out_are_refused(tmp_path, arrays):
    folder = folder_of(tmp_path, arrays, "train_images/0.png", "test_images/1.png", "more/2.png")
    with pytest.raises(ValueError, match=r"1 of its 3 images \(such as more/2.png\) would be ignored"):
        load_pictures(folder)


@pytest.mark.parametrize(
    "names, told",
    [
        (
            "cat_train cat_test dog_train dog_test",
            "train would be made of folders of several names (cat_train, dog_train)",
        ),
        ("train_cats train_dogs val_cats val_dogs", "train would be .* (train_cats, train_dogs)"),
        ("train val dev", "validation would be made of folders of several names (dev, val)"),
        ("train/a a/training test/a", "train would be .* (train, training)"),
    ],
)
def test_splits_of_folders_of_several_names_are_refused(tmp_path, arrays, names, told):
    folder = folder_of(tmp_path, arrays, *(f"{name}/{i}.png" for i, name in enumerate(names.split())))
    with pytest.raises(ValueError, match=f"the split {told}; if they are".replace("(", r"\(").replace(")", r"\)")):
        splits_of(folder)


def test_folders_without_images_are_named(tmp_path, arrays):
    folder = folder_of(tmp_path, arrays, "train/a/0.png", "train/b/1.png")
    (folder / "train" / "c" / "d").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    with pytest.warns(UserWarning, match=r"folders without images \(1\): train/c; fill or remove them$"):
        assert load_pictures(folder).label_names == ["a", "b"]


def test_numbers_are_in_their_order(tmp_path, arrays):
    folder = folder_of(tmp_path, arrays, *(f"{number}/0.png" for number in range(12)))
    images = load_pictures(folder)
    assert images.label_names == [str(number) for number in range(12)]
    assert images.where(images.labels.tolist().index(2)).endswith("/2/0.png")
    assert in_order({"10", "9", "01", "1"}) == ["01", "1", "9", "10"] and in_order(["1", "01"]) == ["01", "1"]
    assert in_order({"10.5", "2.0", "-3"}) == ["-3", "2.0", "10.5"] and in_order({"1e3", "9"}) == ["1e3", "9"]
    assert in_order({"10", "9", "a"}) == ["10", "9", "a"] and in_order({10, 9}) == [9, 10]


@pytest.mark.parametrize(
    "names, told",
    [
        ("1 2 3 10", "label 0 is the class '1'"),
        ("0 1 3", "label 2 is the class '3'"),
        ("10.5 2.0", "label 0 is the class '2.0'"),
        ("00 01 02", None),
        ("1 2 b", None),
    ],
)
def test_numbers_that_are_not_the_labels_are_named(tmp_path, arrays, names, told):
    folder = folder_of(tmp_path, arrays, *(f"{name}/0.png" for name in names.split()))
    if told:
        with pytest.warns(UserWarning, match=f"labels count from 0: {told}"):
            load_pictures(folder)
    else:
        quietly_read(folder)


@pytest.mark.parametrize(
    "names, told",
    [
        ("steam_train test_tube", "'steam_train' and 'test_tube' are taken for the splits train and test; if they"),
        ("Test Pilot,Train Driver", "'test pilot' and 'train driver' are taken for the splits test and train; if"),
        ("train2017 val2017 test-2018", None),
        ("birds-train birds-test", None),
        ("training_images test_images", None),
        ("train-clean/a train-clean/b test-other/a", None),
    ],
)
def test_splits_whose_names_may_be_those_of_classes_are_told(tmp_path, arrays, names, told):
    folder = folder_of(tmp_path, arrays, *(f"{name}/0.png" for name in names.split("," if "," in names else None)))
    if told:
        with pytest.warns(UserWarning, match=told):
            load_pictures(folder)
    else:
        assert "test" in quietly_read(folder)


def test_one_name_in_both_forms_of_unicode_is_one_class(tmp_path, arrays):
    folder = folder_of(tmp_path, arrays, "train/\u00e9/0.png", "train/b/1.png", "test/e\u0301/2.png")
    assert load_pictures(folder, split="test").label_names == ["b", "\u00e9"]


def test_links_to_nowhere_are_bad_images(tmp_path, arrays):
    folder = folder_of(tmp_path, arrays, "0.png")
    (folder / "1.png").symlink_to("gone.png")
    with pytest.raises(ValueError, match="data/1.png: a link to gone.png, which is not there"):
        load_pictures(folder)
    assert len(load_pictures(folder, on_bad_image="skip")) == 1


def test_arrays_and_images_are_not_mixed(tmp_path, arrays):
    (folder_of(tmp_path, arrays, "0.png") / "1.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="it holds both arrays, 1.npy, and images, 0.png; keep one kind"):
        load_pictures(tmp_path / "data")


def test_images_beside_parquet_files_are_named(class_folders, arrays, tmp_path):
    table = load_folder_as_table(class_folders)
    table.to_parquet(tmp_path / "table" / "train.parquet")
    save(picture(arrays[0]), tmp_path / "table" / "preview.png")
    with pytest.warns(UserWarning, match=r"images that are not used, as its parquet files .*\(1\): preview.png"):
        assert len(load_pictures(tmp_path / "table")) == 6


def load_folder_as_table(folder):
    return read_folder(list_images(folder), "folder")["train"]


def test_the_readme_may_say_what_the_splits_are(tmp_path, arrays):
    folder = folder_of(tmp_path, arrays, "one/0.png", "two/1.png", "three/2.png")
    lines = ["configs:", "- config_name: default", "  data_files:", "  - {split: train, path: one/*}"]
    (folder / "README.md").write_text("\n".join(["---", *lines, "  - {split: test, path: two/*}", "---"]))
    with pytest.warns(UserWarning, match=r"images that are not used, .* its README .*\(1\): three/2.png"):
        assert [len(load_pictures(folder, split=split)) for split in ("train", "test")] == [1, 1]
