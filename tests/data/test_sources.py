"""The images of folders, files and splits are found, or what is missing is named."""

import logging
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from made_images import chw, coded, picture, rows, save

from hf_genmod.data.loading import load_pictures
from hf_genmod.data.shapes import ShapesDataset
from hf_genmod.data.sources import splits_of

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")


def test_class_folders_give_pixels_labels_and_sorted_names(class_folders, arrays):
    dataset = load_pictures(class_folders)
    assert dataset.label_names == ["ant", "bee", "zebra"]
    assert (dataset.channels, dataset.resolution, len(dataset)) == (3, (8, 8), 6)
    batch = dataset.__getitems__([5, 0, 2])
    assert torch.equal(batch["images"], chw(arrays[[5, 0, 2]]))
    assert batch["class_labels"].tolist() == [2, 0, 1] and batch["class_labels"].dtype == torch.int64
    assert "captions" not in batch
    assert torch.equal(dataset[-1]["images"], chw(arrays[5])) and dataset[-1]["class_labels"] == 2
    with pytest.raises(IndexError):
        dataset[6]


def test_parquet_and_saved_data_equal_the_folder(class_folders, arrays, tmp_path):
    folder = load_pictures(class_folders)
    source = datasets.load_dataset("imagefolder", data_dir=str(class_folders))
    embedded = rows(
        [coded(picture(a)) for a in arrays],
        label=(datasets.ClassLabel(names=["ant", "bee", "zebra"]), [0, 0, 1, 1, 2, 2]),
    )
    (tmp_path / "parquet").mkdir()
    embedded.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    embedded.save_to_disk(tmp_path / "saved")
    source.save_to_disk(tmp_path / "saved_dict")
    parquet_file = tmp_path / "parquet" / "train-00000-of-00001.parquet"
    for other in (tmp_path / "parquet", parquet_file, tmp_path / "saved", tmp_path / "saved_dict", embedded, source):
        dataset = load_pictures(other)
        assert torch.equal(dataset.images, folder.images) and torch.equal(dataset.labels, folder.labels)
        assert dataset.label_names == folder.label_names
        assert dataset.fingerprint == folder.fingerprint


def test_pictures_without_classes(tmp_path, arrays):
    for where in ("flat", "one/class"):
        for i, array in enumerate(arrays):
            save(picture(array), tmp_path / where / f"{i}.png")
    for where in ("flat", "one"):
        dataset = load_pictures(tmp_path / where)
        assert torch.equal(dataset.images, chw(arrays))
        assert dataset.labels is None and dataset.label_names is None and set(dataset[0]) == {"images"}
        with pytest.raises(ValueError, match=r"\(image\) is known to hold class labels.*--label_column"):
            load_pictures(tmp_path / where, require_labels=True)


def test_splits(tmp_path, arrays):
    for split, part in (("train", arrays[:4]), ("test", arrays[4:])):
        for i, array in enumerate(part):
            save(picture(array), tmp_path / "labelled" / split / "ab"[i % 2] / f"{i}.png")
            save(picture(array), tmp_path / "alone" / split / f"{i}.png")
    assert torch.equal(load_pictures(tmp_path / "labelled", split="test").images, chw(arrays[4:]))
    assert load_pictures(tmp_path / "labelled").label_names == ["a", "b"]
    # Folders of splits are no classes, though they are to the imagefolder builder of datasets.
    assert load_pictures(tmp_path / "alone").label_names is None
    with pytest.raises(ValueError, match=r"no 'validation'; it has 'train', 'test'"):
        load_pictures(tmp_path / "labelled", split="validation")


@pytest.mark.parametrize(
    "dataset, told",
    [
        ("", "^dataset: it is empty; give a folder, a file or an id"),
        (" ", "^dataset: it is empty"),
        ("https://huggingface.co/datasets/user/name", "give the id of the data set, user/name$"),
        (
            "https://huggingface.co/datasets/user/my.name-1/viewer/default/train",
            "the id of the data set, user/my.name-1$",
        ),
        ("hf://datasets/user/name/data/train.parquet", "give the id of the data set, user/name$"),
        ("hf.co/datasets/user/name", "give the id of the data set, user/name$"),
        ("datasets/user/name", "give the id of the data set, user/name$"),
        ("https://example.com/birds.zip", "an address; download what is there, and give its path$"),
    ],
)
def test_addresses_and_nothing_are_no_data_sets(dataset, told):
    for load in (load_pictures, splits_of):
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            load(dataset)


def test_tables_of_several_data_sets_are_refused(tmp_path, arrays):
    images = [coded(picture(array)) for array in arrays[:2]]
    classes = {name: (datasets.ClassLabel(names=name.split()), [0, 1]) for name in ("cat dog", "dog cat")}
    of_words = (datasets.Value("string"), ["a", "b"])
    several = {
        "columns": (
            {"label": classes["cat dog"]},
            {"caption": of_words},
            "label .cat, dog., two/.* has caption, image",
        ),
        "more": (
            {"label": of_words},
            {"label": of_words, "caption": of_words},
            "label, two/.* has caption, image, label;",
        ),
        "classes": (
            {"label": classes["cat dog"]},
            {"label": classes["dog cat"]},
            "label .cat, dog., .* label .dog, cat",
        ),
    }
    for kind, (*both, told) in several.items():
        for place, columns in zip(("one", "two"), both, strict=True):
            (tmp_path / kind / place).mkdir(parents=True)
            rows(images, **columns).to_parquet(tmp_path / kind / place / "train.parquet")
        with pytest.raises(ValueError, match=f"several data sets: one/train.parquet has image, {told}"):
            load_pictures(tmp_path / kind)
        assert len(load_pictures(tmp_path / kind / "two")) == 2
    (tmp_path / "beside").mkdir()
    rows(images, label=of_words).to_parquet(tmp_path / "beside" / "a.parquet")
    datasets.Dataset.from_list([{"file_name": "0.png"}]).to_parquet(tmp_path / "beside" / "metadata.parquet")
    with pytest.raises(
        ValueError, match="data sets: a.parquet has image, label, metadata.parquet has file_name; give"
    ):
        load_pictures(tmp_path / "beside")
    (tmp_path / "splits").mkdir()
    rows(images, label=of_words).to_parquet(tmp_path / "splits" / "train.parquet")
    rows(images).to_parquet(tmp_path / "splits" / "test.parquet")
    assert load_pictures(tmp_path / "splits").label_names == ["a", "b"]
    assert load_pictures(tmp_path / "splits", split="test").labels is None
    for place in ("one", "two"):
        rows(images).save_to_disk(tmp_path / "saved" / place)
    with pytest.raises(
        ValueError, match="one/data-.* belongs to a data set that `save_to_disk` wrote; give the folder one itself"
    ):
        load_pictures(tmp_path / "saved")


@pytest.mark.parametrize(
    "beside, kept",
    [
        (("0.png", "1.png", "pics.parquet"), "pics.parquet"),
        (("extra/0.png", "extra/1.png", "x.parquet"), "x.parquet"),
        (("train/0.png", "test/1.png", "x.parquet"), "x.parquet"),
        (("train.parquet", "more.parquet"), "more.parquet"),
        (("__old/x.parquet", "train.parquet"), "__old/x.parquet"),
        (("a.parquet", "b.parquet", "c.arrow"), "c.arrow"),
    ],
)
def test_tables_that_are_not_read_are_refused(tmp_path, arrays, beside, kept):
    """The package datasets leaves them out without a word."""
    for name in beside:
        save(picture(arrays[0]), path) if (path := tmp_path / name).suffix == ".png" else write_table(path, arrays)
    remedy = "move it " if kept.endswith("arrow") else "give this file alone as the data set, or move it "
    with pytest.raises(ValueError, match=f"{kept}: a table that is not read beside .*; {remedy}to another folder"):
        load_pictures(tmp_path)


def test_parquet_files_without_rows_or_of_several_types_are_named(tmp_path, arrays, caplog):
    images = [coded(picture(array)) for array in arrays[:2]]
    labels = {"int64": [0, 1], "string": ["a", "b"], "double": [0.5, 1.0]}

    def write(name, kind, number=2):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = rows(images[:number], label=(datasets.Value(kind.replace("double", "float64")), labels[kind][:number]))
        data.to_parquet(tmp_path / name)

    write("empty/train.parquet", "int64")
    write("empty/test.parquet", "int64", 0)
    for place in (tmp_path / "empty", tmp_path / "empty" / "test.parquet"):
        with pytest.raises(ValueError, match="empty/test.parquet: it has no rows; add them or remove the file"):
            load_pictures(place)
    logger = logging.getLogger("datasets.packaged_modules.parquet.parquet")
    logger.addHandler(caplog.handler)
    for kind in ("string", "double"):
        write(f"{kind}/a.parquet", "int64")
        write(f"{kind}/b.parquet", kind)
        told = f"its column 'label' holds int64 in a.parquet and {kind} in b.parquet; give all files one type"
        with pytest.raises(ValueError, match=told):
            load_pictures(tmp_path / kind)
    logger.removeHandler(caplog.handler)
    assert not caplog.records and not logger.disabled


@pytest.mark.parametrize(
    "columns, told",
    [
        (
            {"url": "https://a.b/0.png", "text": "x"},
            r"\(url, text\) .*; the links in 'url' are not downloaded; write a column image with the bytes or",
        ),
        (
            {"text": "x", "label": 0},
            r"\(text, label\) is known to hold images; write a column image with the bytes or",
        ),
        ({"text": "x", "file": "0.PNG", "url": "s3://a/0.png"}, "; choose file by --image_column, if these are"),
        ({"pixels": [[1, 2], [3, 4]]}, "; choose pixels by --image_column, if these are"),
    ],
)
def test_tables_without_a_column_of_images(columns, told):
    data = datasets.Dataset.from_list([columns] * 3)
    with pytest.raises(ValueError, match=told):
        load_pictures(data)
    if "url" in columns:
        with pytest.raises(
            ValueError, match="://a.*/0.png: a link, which is not downloaded; download the images, and"
        ):
            load_pictures(data, image_column="url")


def test_splits_of_several_kinds_of_files_are_refused(tmp_path, arrays):
    write_table(tmp_path / "images" / "x.parquet", arrays)
    for name in ("train/0.png", "test/1.png"):
        save(picture(arrays[0]), tmp_path / "images" / name)
    (tmp_path / "images" / "test" / "1.txt").write_text("a cat")
    (tmp_path / "images" / "test" / "1.png.txt").write_text("a cat")
    write_table(tmp_path / "tables" / "train.parquet", arrays)
    (tmp_path / "tables" / "test.csv").write_text("image,label\n0.png,1\n")
    for kind, both in (("images", "x.parquet and test/1.png"), ("tables", "train.parquet and test.csv")):
        with pytest.raises(ValueError, match=f"{kind}: its splits hold .* several kinds, such as {both}; keep one"):
            load_pictures(tmp_path / kind)


def write_table(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = rows([coded(picture(array)) for array in arrays])
    if path.suffix == ".parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(path.parent / "saved")
        next((path.parent / "saved").glob("*.arrow")).rename(path)
        shutil.rmtree(path.parent / "saved")
    return path


def test_files_beside_tables_and_saved_data_are_named(tmp_path, arrays):
    data = rows([coded(picture(array)) for array in arrays])
    write_table(tmp_path / "table" / "train.parquet", arrays)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "both")
    for kind in ("table", "saved", "both"):
        (tmp_path / kind / "more.csv").write_text("image,label\n0.png,1\n")
        (tmp_path / kind / "notes.pdf").write_text("%PDF")
        (tmp_path / kind / "cache-0123456789abcdef.arrow").write_text("what `map` of datasets leaves")
        save(picture(arrays[0]), tmp_path / kind / "extra" / "0.png")
        with pytest.warns(UserWarning) as caught:
            assert len(load_pictures(tmp_path / kind)) == 6
        told = [str(warning.message) for warning in caught]
        assert len(told) == 2 and "images that are not used" in told[0] and "(1): extra/0.png;" in told[0]
        assert re.search(r"files that are not used \(2\): more.csv \(a table.*notes.pdf \(a PDF", told[1])


def test_a_table_in_no_configuration_is_named(tmp_path, arrays):
    for name in ("one/train.parquet", "two/train.parquet", "three.parquet"):
        write_table(tmp_path / name, arrays)
    files = [f"- {{config_name: {name}, data_files: {name}/*}}" for name in ("one", "two", "gone")]
    (tmp_path / "README.md").write_text("\n".join(["---", "configs:", *files, "---"]))
    with pytest.warns(UserWarning) as caught:
        assert len(load_pictures(tmp_path, config_name="one")) == 6
    (told,) = [str(warning.message) for warning in caught]
    assert "files that are not used (1): three.parquet (in no configuration of the README)" in told


def test_names_of_splits_do_not_hide_pictures(tmp_path, arrays):
    for name in ("train/0.png", "plane/0.png", "car/0.png"):
        save(picture(arrays[0]), tmp_path / "vehicles" / name)
    with pytest.raises(ValueError, match=r"2 of its 3 images \(such as car/0.png\) would be ignored.*train/0.png"):
        load_pictures(tmp_path / "vehicles")


def test_missing_and_empty_places(tmp_path, monkeypatch):
    for bad in ("./nowhere", str(tmp_path / "nowhere"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no such folder or file; check"):
            load_pictures(bad)
    (tmp_path / "birds" / "robins").mkdir(parents=True)
    (tmp_path / "birds" / "wren.tar.gz").touch()
    for bad, near in (("bids/robins", "birds"), ("birds/robbins", "birds/robins"), ("birds/wren.zip", "wren.tar.gz")):
        with pytest.raises(FileNotFoundError, match=rf"or file; did you mean .*/{near}\?$"):
            load_pictures(tmp_path / bad)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"^birds/robbins: there is .*, and the Hub has .*did you mean birds/robins\?$"
    ):
        load_pictures("birds/robbins")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it holds no data set that can be read.*it should hold images"):
        load_pictures(tmp_path / "empty")
    for name, content, told in (
        ("0.mp4", b"\0\0\0\x18ftypmp42", "a video; save"),
        ("0.x", b"%PDF-1.4", "a PDF; save"),
    ):
        (tmp_path / "empty" / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"no data set that can be read: .*{name} \\({told}"):
            load_pictures(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_text("no parquet")
    with pytest.raises(
        ValueError, match=r"broken/train.parquet: no parquet file that can be read \(.*\); write it again"
    ):
        load_pictures(tmp_path / "broken")
    (tmp_path / "pictures.txt").write_text("")
    with pytest.raises(ValueError, match="a file, but neither a parquet file, a .npy file nor an archive"):
        load_pictures(tmp_path / "pictures.txt")
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "a[1]" / "train.parquet").write_text("")
    with pytest.raises(ValueError, match="for a pattern; rename the folder"):
        load_pictures(tmp_path / "a[1]")


@needs_shared
def test_shared_data():
    mnist = load_pictures(SHARED / "mnist", split="test", resolution=32, require_labels=True)
    assert tuple(mnist.images.shape) == (10000, 1, 32, 32) and mnist.label_names == list("0123456789")
    pets = load_pictures(SHARED / "cats_dogs32", split="test")
    assert tuple(pets.images.shape) == (2000, 3, 32, 32) and pets.label_names == ["cat", "dog"]
    assert pets.labels.bincount().tolist() == [1000, 1000]
    reference = datasets.load_dataset(str(SHARED / "cats_dogs32"), split="test")[7]
    assert torch.equal(pets[7]["images"], chw(np.asarray(reference["image"])))
    assert pets[7]["class_labels"] == reference["label"]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "file", "csv", "jsonl"])
def test_pointers_of_git_lfs_are_named(tmp_path, arrays, kind):
    data = rows([coded(picture(array)) for array in arrays])
    if kind == "arrow":
        data.save_to_disk(tmp_path)
        (file,) = tmp_path.glob("*.arrow")
    else:
        file = tmp_path / f"train.{'parquet' if kind == 'file' else kind}"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n")
    with pytest.raises(ValueError, match=f"{file}: a pointer of Git LFS, not the file itself; run `git lfs pull`"):
        load_pictures(file if kind == "file" else tmp_path)


def test_what_is_no_data_set_in_memory(arrays):
    data = rows([coded(picture(array)) for array in arrays])
    streams = [data.to_iterable_dataset(), datasets.IterableDatasetDict({"train": data.to_iterable_dataset()})]
    for stream in streams:
        with pytest.raises(ValueError, match=r"^dataset: a stream \(IterableDataset\) .*; load it without streaming$"):
            load_pictures(stream)
    for other in ([1, 2], 3, {"train": [1]}, arrays):
        with pytest.raises(
            ValueError, match="^dataset: (a list|an int|a ndarray|a dict); give a path, an id or a datasets.Dataset$"
        ):
            load_pictures(other)


@pytest.mark.parametrize("kind", ["folder", "file", "saved", "memory", "shapes", "drawn", "listed"])
def test_arguments_that_say_nothing_of_a_data_set_are_refused(class_folders, tmp_path, kind):
    data = rows([coded(picture(np.zeros((8, 8, 3), np.uint8)))])
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    places = {"folder": class_folders, "file": tmp_path / "a.parquet", "saved": tmp_path / "saved", "memory": data}
    dataset = {"drawn": ShapesDataset(4, 32, 0)}.get(kind, places.get(kind, "shapes"))
    function = splits_of if kind == "listed" else load_pictures
    with pytest.raises(ValueError, match="^config_name: .* has no configurations; leave out --config_name$"):
        function(dataset, config_name="small")
    with pytest.raises(ValueError, match="^array_axes: .* is not read from .npy files; leave out --array_axes$"):
        function(dataset, array_axes="NHW")


def test_axes_of_arrays_beside_a_table_are_refused(tmp_path):
    rows([coded(picture(np.zeros((8, 8, 3), np.uint8)))]).to_parquet(tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", np.zeros((8, 8)))
    with pytest.raises(ValueError, match="^array_axes: .* is not read from .npy files"):
        load_pictures(tmp_path, array_axes="HW")


@pytest.mark.parametrize("name", ["a.PARQUET", "a.Csv"])
def test_endings_in_capitals(tmp_path, arrays, name):
    """The package datasets reads no such files of a folder, and leaves them out beside others."""
    data = rows([coded(picture(array)) for array in arrays])
    (data.to_parquet if name == "a.PARQUET" else data.to_csv)(str(tmp_path / name))
    if name == "a.PARQUET":
        assert torch.equal(load_pictures(tmp_path / name).images, chw(arrays))
        data.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=f"{name}: datasets does not read .*; rename it to {name[1:].lower()}$"):
        load_pictures(tmp_path)


def test_a_column_of_splits_in_a_table_is_named(arrays):
    data = rows([coded(picture(array)) for array in arrays[:2]], split=(datasets.Value("string"), ["train", "test"]))
    with pytest.warns(UserWarning, match=r"its column 'split' \(test, train\) is not used, so all its rows are in"):
        assert len(load_pictures(data)) == 2


def test_a_transform_of_a_data_set_in_memory_is_refused(arrays):
    data = rows([coded(picture(array)) for array in arrays])
    for other in (data.with_transform(lambda batch: batch), datasets.DatasetDict(test=data.with_transform(dict))):
        with pytest.raises(ValueError, match="^dataset: its transform would not be applied .*; apply it by `map`, or"):
            load_pictures(other)
    assert len(load_pictures(data.with_format("torch"))) == len(data)


def test_labels_of_two_types_in_two_splits_are_named(arrays):
    images = [coded(picture(array)) for array in arrays[:2]]
    splits = datasets.DatasetDict(
        train=rows(images, label=(datasets.Value("int64"), [0, 1])),
        test=rows(images, label=(datasets.Value("string"), ["0", "1"])),
    )
    for split in splits:
        with pytest.raises(
            ValueError, match="column 'label' holds int64 in 'train', string in 'test'; give the labels"
        ):
            load_pictures(splits, split=split)


def test_a_mode_of_images_that_is_not_applied_is_named(arrays):
    data = rows([coded(picture(array)) for array in arrays[:2]]).cast_column("image", datasets.Image(mode="L"))
    with pytest.warns(
        UserWarning, match="its column 'image' asks for the mode 'L', which is not applied; give --chann"
    ):
        assert load_pictures(data).channels == 3
