"""Archives are read as the folders that were packed, once."""

import io
import json
import os
import re
import shutil
import tarfile
import zipfile

import datasets
import pytest
from made_images import coded, picture, save
from PIL import Image

from hf_genmod.data.archives import list_images, unpacked
from hf_genmod.data.folder import read_folder
from hf_genmod.data.loading import load_pictures

FORMATS = {"zip": "zip", "tar": "tar", "tar.gz": "gztar", "tgz": "gztar", "tar.bz2": "bztar", "tar.xz": "xztar"}


def pack(folder, file, inside=None):
    """Packs a folder, or the folder itself with all in it."""
    ending = file.name.split(".", 1)[1]
    file.parent.mkdir(parents=True, exist_ok=True)
    made = shutil.make_archive(str(file.with_name("made")), FORMATS[ending.lower()], folder, inside)
    shutil.move(made, file)
    return file


@pytest.mark.parametrize("ending", [*FORMATS, "ZIP"])
def test_class_folders_in_an_archive(class_folders, tmp_path, ending):
    folder = load_pictures(class_folders)
    for file, inside in (
        (tmp_path / "a" / f"data.{ending}", None),
        (tmp_path / "b" / f"pictures.{ending}", "pictures"),
    ):
        pack(class_folders.parent if inside else class_folders, file, inside)
        for dataset in (file, file.parent):
            pictures = load_pictures(dataset, require_labels=True)
            assert pictures.fingerprint == folder.fingerprint and pictures.label_names == folder.label_names
            assert file.name in pictures.where(0) and pictures.where(0).endswith("ant/0.png")


def test_archives_are_folders(class_folders, tmp_path):
    for name in ("ant", "bee", "zebra"):
        pack(class_folders / name, tmp_path / "classes" / f"{name}.zip")
    folder = load_pictures(class_folders)
    assert load_pictures(tmp_path / "classes").fingerprint == folder.fingerprint
    for split in ("train", "test"):
        pack(tmp_path / "classes", tmp_path / "splits" / f"{split}.tar")
    assert load_pictures(tmp_path / "splits", split="test").fingerprint == folder.fingerprint
    (tmp_path / "splits" / "test.zip").write_bytes((tmp_path / "classes" / "ant.zip").read_bytes())
    pack(class_folders / "ant", tmp_path / "twice" / "ant.zip")
    pack(class_folders / "ant", tmp_path / "twice" / "ant.tar")
    with pytest.raises(ValueError, match=r"ant/0.png is in several of its archives \(ant.tar, ant.zip\); keep one"):
        load_pictures(tmp_path / "twice")


def test_an_archive_beside_what_was_unpacked_from_it(class_folders, tmp_path):
    alone = load_pictures(class_folders)
    for ending in ("zip", "tar.gz"):
        file = pack(class_folders, tmp_path / f"pictures.{ending}")
        shutil.move(file, class_folders / file.name)
        with pytest.warns(UserWarning, match=rf"pictures.{ending} \(its images lie unpacked beside it\)"):
            assert load_pictures(class_folders).fingerprint == alone.fingerprint
        (class_folders / file.name).unlink()
    pack(class_folders / "bee", class_folders / "bee.zip")
    shutil.rmtree(class_folders / "bee")
    with pytest.raises(ValueError, match="bee.zip: it holds 2 images, such as 2.png, not unpacked beside it"):
        load_pictures(class_folders)


@pytest.mark.parametrize("ending", ["zip", "tar.bz2"])
@pytest.mark.parametrize("alike", [False, True])
def test_an_image_that_is_not_unpacked_is_told_with_its_folder(tmp_path, arrays, ending, alike):
    for i, folder in enumerate("ab"):
        for number in (2, 3):
            save(picture(arrays[0 if alike else 2 * i + number - 2]), tmp_path / "data" / folder / f"{number}.png")
    file = pack(tmp_path / "data", tmp_path / f"all.{ending}")
    shutil.move(file, tmp_path / "data")
    (tmp_path / "data" / "b" / "3.png").unlink()
    with pytest.raises(ValueError, match=f"all.{ending}: it holds 1 image, such as b/3.png, not unpacked beside it"):
        load_pictures(tmp_path / "data")


@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_other_images_of_the_same_names_and_sizes_are_not_unpacked(tmp_path, arrays, ending):
    for i, split in enumerate(("train", "test")):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"{split}.bmp")
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}.bmp").rename(tmp_path / split / "0.bmp")
    pack(tmp_path / "test", tmp_path / "data" / f"test.{ending}")
    shutil.move(tmp_path / "train", tmp_path / "data" / "train")
    with pytest.raises(ValueError, match="it holds 1 image, such as 0.bmp, not unpacked beside it"):
        load_pictures(tmp_path / "data")


def test_metadata_and_captions_in_an_archive(tmp_path, arrays):
    for i in range(2):
        save(picture(arrays[i]), tmp_path / "data" / "images" / f"{i}.png")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\nimages/0.png,a\nimages/1.png,b\n")
    assert load_pictures(pack(tmp_path / "data", tmp_path / "a.zip")).captions == ["a", "b"]


@pytest.mark.parametrize(
    "names, reason",
    [
        (["a/0.png", "../0.png"], "'../0.png' would be outside the folder"),
        (["/a/0.png"], "'/a/0.png' would be outside the folder"),
        (["a/0.png", "a/0.png"], "it holds 'a/0.png' twice"),
        (["a/0.png", "./a//0.png"], "it holds 'a/0.png' twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("ending", ["zip", "tar", "tgz"])
def test_an_archive_that_would_lose_or_move_files_is_refused(tmp_path, names, reason, ending):
    file = tmp_path / f"a.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, b"")
    else:
        with tarfile.open(file, "w:gz" if ending == "tgz" else "w") as archive:
            for name in names:
                archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(
        ValueError, match=rf"a.{ending}: the archive cannot be read \({reason}.*\); unpack it yourself"
    ):
        load_pictures(file)
    with pytest.raises(ValueError, match=rf"a.{ending}: the archive cannot be read \({reason}"):
        load_pictures(tmp_path)


@pytest.mark.parametrize("kind", ["LNKTYPE", "SYMTYPE"])
def test_links_in_an_archive_are_images(tmp_path, arrays, kind):
    save(picture(arrays[0]), tmp_path / "data" / "0.png")
    link = tarfile.TarInfo("1.png")
    link.type, link.linkname = getattr(tarfile, kind), "0.png"
    with tarfile.open(tmp_path / "data" / "a.tar", "w") as archive:
        archive.add(tmp_path / "data" / "0.png", "0.png")
        archive.addfile(link)
    with pytest.raises(ValueError, match="it holds 1 image, such as 1.png, not unpacked beside it"):
        load_pictures(tmp_path / "data")
    assert len(load_pictures(tmp_path / "data" / "a.tar")) == 2


def test_what_cannot_be_unpacked_is_named(class_folders, tmp_path):
    sound = pack(class_folders, tmp_path / "sound.zip").read_bytes()
    packed = pack(class_folders, tmp_path / "sound.tar.gz").read_bytes()
    locked = bytearray(sound)
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # of each file, where it is and in the directory
        for start in (match.start() for match in re.finditer(re.escape(mark), sound)):
            locked[start + flags] |= 1
    for name, content, reason in (
        ("broken.zip", sound[:-100], "File is not a zip file"),
        ("empty.zip", b"", "File is not a zip file"),
        ("locked.zip", bytes(locked), "it needs a password"),
        ("broken.tar.gz", packed[: len(packed) // 2], "ended before the end-of-stream marker"),
        ("other.tar", b"no archive at all", "file could not be opened"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{name}: the archive cannot be read \(.*{reason}.*\); unpack it yourself"
        ):
            load_pictures(tmp_path / name)
    folders = [
        path for path in (datasets.config.HF_DATASETS_CACHE / "hf_genmod" / "unpacked").glob("*/*") if path.is_dir()
    ]
    assert not folders  # half an archive is not left


def test_a_web_dataset_is_left_to_datasets(tmp_path, arrays):
    for i in range(2):
        save(picture(arrays[i]), tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.cls").write_text(str(i))
    pack(tmp_path / "data", tmp_path / "shards" / "train-0.tar")
    assert load_pictures(tmp_path / "shards", label_column="cls").labels.tolist() == [0, 1]
    shutil.copy(tmp_path / "shards" / "train-0.tar", tmp_path / "data")
    with pytest.warns(UserWarning, match="train-0.tar .its images lie unpacked beside it"):
        assert len(load_pictures(tmp_path / "data")) == 2


@pytest.mark.parametrize(
    "files, told",
    [
        ({"0.cls": b"1", "1.cls": b"cat", "2.cls": b"2"}, "1.cls holds b'cat', not a number from 0 on; write it"),
        ({"0.cls": b"1", "2.cls": b"1"}, "the sample 1 has png, and others have cls, png; give all samples files of"),
        ({"0.json": b"{}", "1.json": b"{", "2.json": b"{}"}, "1.json holds b'{', not JSON; write it"),
        ({"0.cls": b"1", "1.cls": b"1", "2.cls": b"1", "1.txt": b"\xff", "0.txt": b"", "2.txt": b""}, "not UTF-8; wr"),
        (
            {"0.cls": b"1", "1.cls": b"1", "2.cls": b"1", "0.txt": b"after it"},
            "sample 0 do not follow each other; pack",
        ),
    ],
)
def test_faulty_samples_of_a_web_dataset_are_named(tmp_path, arrays, files, told):
    images = {f"{i}.png": coded(picture(arrays[i]))["bytes"] for i in range(3)}
    names = sorted(images | files)
    if b"after it" in files.values():
        names.append(names.pop(names.index("0.txt")))
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for name in ("._0.cls", *names):
            info, content = tarfile.TarInfo(name), (images | files).get(name, b"of macOS")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    for place in (tmp_path, tmp_path / "b.tar"):
        with pytest.raises(ValueError, match=f"b.tar: .*{told}"):
            load_pictures(place)


def test_backslashes_separate_folders(tmp_path, arrays):
    with zipfile.ZipFile(tmp_path / "birds.zip", "w") as archive:
        for i, name in enumerate(("robin\\0.png", "wren\\1.png")):
            archive.writestr(name, coded(picture(arrays[i]))["bytes"])
    assert load_pictures(tmp_path / "birds.zip").label_names == ["robin", "wren"]


def test_nothing_is_written_outside(tmp_path, cache):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("../../evil.png", b"")
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("../evil.png"))
    for name in ("bad.zip", "bad.tar"):
        with pytest.raises(
            ValueError, match=f"{name}: the archive cannot be read .*outside the folder of the archive"
        ):
            unpacked(str(tmp_path / name))
    assert not [*tmp_path.rglob("evil.png"), *cache.parent.rglob("evil.png")]


def test_other_archives_are_to_be_unpacked(tmp_path):
    (tmp_path / "images.rar").write_bytes(b"Rar!")
    with pytest.raises(ValueError, match="images.rar \\(packed; unpack it\\)"):
        load_pictures(tmp_path)


@pytest.mark.parametrize("ending, is_read", [(".cls", True), (".json", True), (".xml", False)])
def test_a_web_dataset_has_its_labels(tmp_path, arrays, ending, is_read):
    for i in range(3):
        save(picture(arrays[i]), tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}{ending}").write_text(str(2 - i) if ending == ".cls" else f'{{"width": {i}}}')
        if ending == ".cls":
            (tmp_path / "data" / f"{i}.txt").write_text(f"number {i}")
    file = pack(tmp_path / "data", tmp_path / "shards" / "train-0.tar")
    for dataset in (file.parent, file):
        pictures = load_pictures(dataset)
        assert len(pictures) == 3 and ("row" in pictures.where(0)) == is_read
        if ending == ".cls":
            assert pictures.labels.tolist() == [2, 1, 0] and pictures.captions == ["number 0", "number 1", "number 2"]


@pytest.mark.parametrize("has_texts", [False, True])
def test_a_web_dataset_has_the_labels_and_captions_of_its_json(tmp_path, arrays, has_texts):
    for i in range(3):
        save(picture(arrays[i]), tmp_path / "data" / f"{i}.png")
        fields = {"caption": f"field {i}", "label": 2 - i, "size": {"width": 8}}
        (tmp_path / "data" / f"{i}.json").write_text(json.dumps(fields))
        if has_texts:
            (tmp_path / "data" / f"{i}.txt").write_text(f"text {i}")
    told = (
        "data: 'label'" + (" in the" if has_texts else " and 'caption' in the") + " .json files of its images are not"
    )
    with pytest.warns(UserWarning, match=told):
        assert load_pictures(tmp_path / "data").labels is None
    pictures = load_pictures(pack(tmp_path / "data", tmp_path / "shards" / "train-0.tar").parent)
    assert pictures.labels.tolist() == [2, 1, 0] and pictures.label_names == ["0", "1", "2"]
    assert pictures.captions == [f"{'text' if has_texts else 'field'} {i}" for i in range(3)]


def test_a_tar_of_class_folders_with_a_json_of_each_image_is_none_of_datasets(class_folders, tmp_path):
    for file in class_folders.glob("*/*.png"):
        file.with_suffix(".json").write_text("{}")
    assert load_pictures(pack(class_folders, tmp_path / "a.tar")).label_names == ["ant", "bee", "zebra"]


def test_an_archive_that_changes_is_unpacked_again(tmp_path):
    sizes = set()
    for i in range(2):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            content = coded(Image.new("L", (4, 4), i))["bytes"]
            info = tarfile.TarInfo("0.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        os.utime(tmp_path / "a.tar", ns=(i, i))
        sizes.add((tmp_path / "a.tar").stat().st_size)
        assert load_pictures(tmp_path / "a.tar").images.unique().tolist() == [i]
    assert len(sizes) == 1


def test_an_archive_in_an_archive_is_called_by_both(tmp_path, arrays):
    for i in range(2):
        save(picture(arrays[i]), tmp_path / "inner" / f"{i}.png")
    save(picture(arrays[2]), tmp_path / "outer" / "2.png")
    pack(tmp_path / "inner", tmp_path / "outer" / "more.zip")
    outer = pack(tmp_path / "outer", tmp_path / "packed" / "all.tar.gz")
    with pytest.raises(
        ValueError, match="^all.tar.gz: more.zip: it holds 2 images, such as 0.png, not unpacked beside"
    ):
        load_pictures(outer)
    (tmp_path / "outer" / "2.png").unlink()
    assert len(load_pictures(pack(tmp_path / "outer", outer))) == 2
    (tmp_path / "outer" / "more.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="^all.tar.gz: more.zip: the archive cannot be read"):
        load_pictures(pack(tmp_path / "outer", outer))


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("robin/1.png", b"x", "^set.*: 1 of 3 images cannot be used; .* skip: birds.zip: robin/1.png: no image that"),
        ("2.png", None, r"outside its class folders \(robin, wren\), .* 1 of 3 images, such as birds.zip: 2.png; put"),
        ("wren/0.txt", b"\xff", "^birds.zip: wren/0.txt, line 1: the text is not UTF-8"),
        ("metadata.csv", b"file_name,text\nrobin/0.png", "^birds.zip: metadata.csv, line 2: 1 cell, not the 2"),
        ("metadata.csv", b"name,text\nrobin/0.png,a", "^birds.zip: metadata.csv: no column file_name"),
    ],
)
def test_what_is_wrong_in_an_archive_is_called_by_its_place_there(tmp_path, arrays, name, content, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("robin/0.png", "wren/0.png", *([name] if name.endswith(".png") else [])):
        save(picture(arrays[0]), tmp_path / "birds" / place)
    if content:
        (tmp_path / "birds" / name).write_bytes(content)
    file = pack(tmp_path / "birds", tmp_path / "set" / "birds.zip").relative_to(tmp_path)
    for dataset in (file, file.parent):
        with pytest.raises(ValueError, match=told) as refused:
            load_pictures(dataset, require_labels=True)
        assert "unpacked" not in str(refused.value)


def test_archives_and_tables(class_folders, tmp_path):
    (tmp_path / "tables").mkdir()
    read_folder(list_images(class_folders), "")["train"].to_parquet(tmp_path / "tables" / "train.parquet")
    packed = pack(tmp_path / "tables", tmp_path / "a.zip")
    assert load_pictures(packed).fingerprint == load_pictures(class_folders).fingerprint
    shutil.copy(packed, tmp_path / "tables")
    message = "tables/a.zip: an archive, which is not read with tables .train.parquet.; unpack it, or move it"
    with pytest.raises(ValueError, match=message):
        load_pictures(tmp_path / "tables")
