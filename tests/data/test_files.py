"""The files of a folder are images, belong to images or systems, or are named."""

import os
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from made_images import coded, picture, pixels, save
from PIL import Image

from hf_genmod.data.files import list_files
from hf_genmod.data.loading import load_pictures


def places(files):
    return [file.place for file in files]


@pytest.fixture
def image():
    return picture(pixels(1)[0])


@pytest.mark.parametrize(
    "ending", ["png", "PNG", "Jpg", "webp", "TIFF", "avif", "jp2", "qoi", "npy", "heic", "CR2", "svg"]
)
def test_endings_of_images(tmp_path, ending):
    (tmp_path / f"0.{ending}").write_bytes(b"whatever")
    (tmp_path / f"0.{ending}.txt").write_text("a caption")
    found = list_files(tmp_path)
    assert places(found.images) == [f"0.{ending}"] and places(sum(found.captions.values(), [])) == [f"0.{ending}.txt"]
    assert not found.others


def test_images_that_nothing_opens_are_images_without_an_ending_too(tmp_path, image):
    (tmp_path / "IMG_1").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "slides.pptx").write_bytes(b"PK\x03\x04")
    found = list_files(tmp_path)
    assert places(found.images) == ["IMG_1"] and places(file for file, _ in found.others) == ["slides.pptx"]


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("birds.7z", b"", "packed; unpack it"),
        ("birds", b"Rar!\x1a\x07", "packed; unpack it"),
        ("train-images-idx3-ubyte.gz", b"", "packed; unpack it"),
        pytest.param(
            "birds.HDF5",
            b"",
            "an HDF5 file; install h5py and give the folder that it is in, or write its images into",
            marks=pytest.mark.skipif(find_spec("h5py") is not None, reason="h5py is installed, so that it is read"),
        ),
        (
            "birds-train.tfrecord-00000-of-00010",
            b"",
            "a TFRecord file; write its images into class folders, or as .npy",
        ),
        ("train_32x32.mat", b"", "a file of MATLAB; write its images"),
        ("data.mdb", b"", "an LMDB database; write its images"),
        ("train.rec", b"", "a RecordIO file; write its images"),
        ("t10k-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "an IDX file, as of MNIST; write its images"),
        ("data_batch_1", b"\x80\x02}q", "a pickle; write its images"),
        ("data_batch_1.bin", b"", "numbers without a shape, as of CIFAR; write its images"),
        ("train.pt", b"PK\x03\x04", "a file of PyTorch; write its images"),
    ],
)
def test_files_that_may_hold_many_images_are_named_with_what_to_do(tmp_path, image, name, content, told):
    (tmp_path / name).write_bytes(content)
    for dataset, where in ((tmp_path, rf"read: {name} \("), (tmp_path / name, f"{name}: ")):
        with pytest.raises(ValueError, match=where + told):
            load_pictures(dataset)
    save(image, tmp_path / "0.png")
    with pytest.warns(UserWarning, match=rf"files that are not used \(1\): {name} \({told}"):
        assert len(load_pictures(tmp_path)) == 1


@pytest.mark.parametrize("name", ["labels.csv", "captions_train2017.json", "labels.XLSX", "train.tsv"])
def test_tables_of_other_names_are_told_how_to_be_used(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    ((file, why),) = list_files(tmp_path).others
    assert file.place == name and why.startswith("a table, which is used as a metadata.csv or metadata.jsonl with")


@pytest.mark.parametrize("name", ["download", "0.jpg_large", "0.dat", "0.png.1", "0.txt", "image.php"])
def test_the_content_counts_where_the_name_says_nothing(tmp_path, image, name):
    (tmp_path / name).write_bytes(coded(image)["bytes"])
    assert places(list_files(tmp_path).images) == [name]


@pytest.mark.parametrize("name", ["0.jpg.thumb", "0.jpg.preview", "0.jpg.1"])
def test_an_image_called_after_another_is_none_of_its_own_and_named(tmp_path, image, name):
    for file in ("0.jpg", name):
        save(image, tmp_path / "0.png")
        (tmp_path / "0.png").rename(tmp_path / file)
    found = list_files(tmp_path)
    assert places(found.images) == ["0.jpg"]
    assert [(file.name, why) for file, why in found.others] == [(name, "called after another image")]


@pytest.mark.parametrize(
    "name",
    """0.jpg.json 0.jpg.xmp 0.jpg~ 0.json 0.xmp 0.AAE 0.jpg.bak 0.jpg_original 0.jpg.part0 ._0.jpg .DS_Store Thumbs.db
 desktop.ini README.md README LICENSE.txt dataset_infos.json __MACOSX/0.jpg @eaDir/0.jpg/THUMB.jpg .cache/x.png .git/x
 .thumbnails/0.jpg __pycache__/x.pyc .gitattributes SHA256SUMS""".split(),
)
def test_what_belongs_to_images_and_systems_is_no_matter(tmp_path, image, name):
    save(image, tmp_path / "0.jpg")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"no image")
    found = list_files(tmp_path)
    assert places(found.images) == ["0.jpg"]
    assert not found.others and not found.captions and not found.archives and not found.metadata


@pytest.mark.parametrize(
    "name", ["0.pdf", "notes.docx", "0.mp4", "0.mov", "notes.txt", "labels.csv", ".x.png", ".x/0.png"]
)
def test_other_files_are_named(tmp_path, image, name):
    save(image, tmp_path / "0.jpg")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("something else")
    found = list_files(tmp_path)
    assert places(found.images) == ["0.jpg"] and places(file for file, _ in found.others) == [name]


class TestLinks:
    def test_are_what_they_lead_to(self, tmp_path, image):
        save(image, tmp_path / "elsewhere" / "robin" / "0.png")
        save(image, tmp_path / "birds" / "wren" / "1.png")
        (tmp_path / "birds" / "robin").symlink_to(tmp_path / "elsewhere" / "robin")
        (tmp_path / "birds" / "wren" / "2.png").symlink_to("../../elsewhere/robin/0.png")
        (tmp_path / "link").symlink_to("birds")
        for folder in ("birds", "link"):
            assert places(list_files(tmp_path / folder).images) == ["robin/0.png", "wren/1.png", "wren/2.png"]

    def test_to_nowhere_are_called_that(self, tmp_path, image):
        save(image, tmp_path / "0.png")
        (tmp_path / "robin").symlink_to("gone")
        with pytest.raises(ValueError, match="robin: a link to gone, which is not there; correct or remove it"):
            list_files(tmp_path)

    @pytest.mark.parametrize("target", [".", "..", "/", "../.."])
    def test_in_a_circle_end(self, tmp_path, image, target):
        save(image, tmp_path / "top" / "a" / "0.png")
        (tmp_path / "top" / "a" / "around").symlink_to(target)
        found = list_files(tmp_path / "top")
        assert places(found.images) == ["a/0.png"]
        assert places(file for file, _ in found.others) == ["a/around"]

    def test_to_each_other_end(self, tmp_path, image):
        for here, there in ("ab", "ba"):
            save(image, tmp_path / here / "0.png")
            (tmp_path / here / "other").symlink_to(f"../{there}")
        assert places(list_files(tmp_path).images) == ["a/0.png", "a/other/0.png", "b/0.png", "b/other/0.png"]


def test_a_pipe_is_not_read(tmp_path):
    for name in ("0.png", "0.txt", "pipe", ".hidden"):
        os.mkfifo(tmp_path / name)
    others = [(file.name, why) for file, why in list_files(tmp_path).others]
    assert others == [(name, "neither a file nor a folder") for name in ("0.png", "0.txt", "pipe")]


def test_the_folder_of_a_run_is_not_read(tmp_path, image):
    for name in ("data/a/0.png", "data/run/samples/step-1.png"):
        save(image, tmp_path / name)
    (tmp_path / "data" / "run" / "training_config.json").write_text("{}")
    found = list_files(tmp_path / "data")
    assert places(found.images) == ["a/0.png"] and places(file for file, _ in found.others) == ["run"]
    assert found.others[0][1] == "the folder of a run" and found.folders == {(), ("a",)}
    assert places(list_files(tmp_path / "data" / "run").images) == ["samples/step-1.png"]  # which a person asked for


def test_a_name_that_is_no_text_is_refused(tmp_path):
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(ValueError, match="its name is not UTF-8; rename it"):
        list_files(tmp_path)


def test_many_folders_in_each_other(tmp_path):
    folder = tmp_path
    for _ in range(300):
        folder = folder / "a"
    folder.mkdir(parents=True)
    Image.new("L", (2, 2)).save(folder / "0.png")
    assert len(list_files(tmp_path).images[0].folders) == 300


@pytest.mark.parametrize(
    "name",
    [
        "1.jpg_original",
        "1.jpg.bak",
        "photo_original",
        "1.png~",
        "1.tmp",
        "1.orig",
        "notice_board",
        "License 7",
        "x.log",
    ],
)
def test_the_only_copy_of_an_image_is_one_whatever_its_name_is(tmp_path, name):
    for place in ("alone", "beside"):
        save(Image.new("L", (4, 4), 7), tmp_path / place / "0.png")
        shutil.copy(tmp_path / place / "0.png", tmp_path / place / name)
    assert [file.name for file in list_files(tmp_path / "alone").images] == sorted(["0.png", name])
    for original in ("1.jpg", "1.png", "photo.png"):
        shutil.copy(tmp_path / "beside" / "0.png", tmp_path / "beside" / original)
    found = [file.name for file in list_files(tmp_path / "beside").images]
    assert (name in found) == (name in ("notice_board", "License 7", "x.log"))


def test_links_that_lead_nowhere_or_to_themselves_are_named(tmp_path):
    save(Image.new("L", (4, 4)), tmp_path / "data" / "0.png")
    for name, target in (("self.png", "self.png"), ("gone.png", "/nope")):
        (tmp_path / "data" / name).symlink_to(target)
        with pytest.raises(ValueError, match=f"data/{name}: a link to {target}, which is not there"):
            load_pictures(tmp_path / "data")
        assert len(load_pictures(tmp_path / "data", on_bad_image="skip")) == 1
        (tmp_path / "data" / name).unlink()
    for name, target in (("0.txt", "/nope"), ("metadata.csv", "metadata.csv"), ("notes", "notes")):
        (tmp_path / "data" / name).symlink_to(target)
        with pytest.raises(ValueError, match=f"data/{name}: a link to {target}, which is not there; correct or"):
            load_pictures(tmp_path / "data")
        (tmp_path / "data" / name).unlink()
    for name in ("README.md", "0.xmp"):  # which nobody needs
        (tmp_path / "data" / name).symlink_to("/nope")
    assert len(load_pictures(tmp_path / "data")) == 1
    for name, target in (("gone", "/nope"), ("self", "self")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(FileNotFoundError, match=f"{name}: a link to {target}, which is not there; correct"):
            load_pictures(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_pictures(tmp_path / "self" / "inner")


def test_a_format_that_pillow_opens_without_its_ending_is_an_image(tmp_path):
    Image.fromarray(np.arange(16, dtype=np.float32).reshape(4, 4)).save(tmp_path / "0.spi", "SPIDER")
    assert load_pictures(tmp_path).value_range == {"low": [0], "high": [15]}
