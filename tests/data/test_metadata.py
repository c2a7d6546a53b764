"""Tables of captions and labels beside images."""

import json
import shutil
import warnings
import zipfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_images import picture, save

from hf_genmod.data.loading import load_pictures
from hf_genmod.data.metadata import read_rows
from hf_genmod.data.sources import splits_of


def write(folder, arrays, files, content, name="metadata.csv"):
    for i, array in enumerate(arrays):
        save(picture(array), folder / (files or "{}.png").format(i))
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_spaces_after_commas_are_no_part_of_names_and_cells(tmp_path, arrays):
    content = 'file_name, text, label \n0.png, "a, b", ant\n1.png, c, bee\n'
    images = load_pictures(write(tmp_path, arrays[:2], None, content))
    assert images.captions == ["a, b", "c"] and images.label_names == ["ant", "bee"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"file_name,text\n0.png,caf\xe9\n", "metadata.csv, line 2: the text is not UTF-8; save the file as UTF-8"),
        ("file_name,text\n0.png,a, b\n", 'metadata.csv, line 2: 3 cells, not the 2 of the first line; .* in "quotes"'),
        ("file_name,text\n0.png\n", "metadata.csv, line 2: 1 cell, not the 2"),
        ('file_name,text\n0.png,"open\n', "metadata.csv, line 2: unexpected end of data; correct the line"),
        ("file_name;text\n0.png;a, b\n", "metadata.csv, line 1: its columns are separated by ';'; separate them by"),
        ("file_name\ttext\n0.png\ta\n", r"metadata.csv, line 1: its columns are separated by .*; separate them"),
        ("file_name,image\n0.png,http://a\n", "2: the images of file_name would replace the column 'image'"),
        ("name,text\n0.png,a\n", "metadata.csv: no column file_name .*, of 'name', 'text'; rename 'name'"),
        ("file_name,text\n,a\n", "metadata.csv, line 2: file_name is None, not the name of a file"),
        (
            "file_name,text\n../0.png,a\n",
            "metadata.csv, line 2: file_name is '../0.png'; give a path below the folder",
        ),
        ("file_name,text\n/etc/passwd,a\n", "line 2: file_name is '/etc/passwd'; give a path below"),
        ("file_name,text\nfile:///etc/passwd,a\n", "line 2: file_name is 'file:///etc/passwd'; give a path below"),
        ("file_name,text, text\n0.png,a,b\n", "metadata.csv, line 1: the column 'text' is in it twice; rename or"),
        ("file_name,text\n", "its metadata, metadata.csv, has no rows"),
    ],
)
def test_faults_of_csv_are_named(tmp_path, arrays, content, message):
    with pytest.raises(ValueError, match=message):
        load_pictures(write(tmp_path, arrays[:1], None, content))


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"file_name": "0.png", "text": "caf\xe9"}', "metadata.jsonl, line 1: the text is not UTF-8"),
        ('{"file_name": "0.png"}\n{"file_name', r"line 2: no JSON that can be read \(Unterminated string"),
        ('{"file_name": "0.png", "text": "a", "text": "b"}', r"metadata.jsonl, line 1: .* \('text' is in it twice\)"),
        ('[{"file_name": "0.png"}]', "metadata.jsonl, line 1: it is not of the form"),
        ('{"file_name": 0}', "metadata.jsonl, line 1: file_name is 0, not the name of a file"),
        ('{"file_name": "0.png", "a": 1}\n{"file_name": "1.png", "a": "b"}', "values of the column 'a' .* do not go"),
    ],
)
def test_faults_of_jsonl_are_named(tmp_path, arrays, content, message):
    with pytest.raises(ValueError, match=message):
        load_pictures(write(tmp_path, arrays[:2], None, content, "metadata.jsonl"))


def test_two_columns_of_one_name_in_a_parquet_file_are_named(tmp_path, arrays):
    table = pa.table([pa.array([cell]) for cell in ("0.png", "a", "b")], names=["file_name", "text", "text"])
    write(tmp_path, arrays[:1], None, "", "metadata.parquet")
    pq.write_table(table, tmp_path / "metadata.parquet")
    with pytest.raises(ValueError, match=r"metadata.parquet: no parquet file that can be read \(.*text.*\); write"):
        load_pictures(tmp_path)


@pytest.mark.parametrize("column", ["split", "subset", "partition"])
def test_a_column_may_say_the_splits(tmp_path, arrays, column):
    rows = "".join(f"{i}.png,{word},{i % 2}\n" for i, word in enumerate(["train", "Train", "val", "test", "test"]))
    folder = write(tmp_path, arrays[:5], None, f"file_name,{column},label\n{rows}")
    assert splits_of(folder) == {"train": 2, "validation": 1, "test": 2}
    assert load_pictures(folder, split="test").labels.tolist() == [1, 0]
    assert load_pictures(folder, split="test").where(0).endswith("3.png")
    for word in ("fold 3", ""):
        (folder / "metadata.csv").write_text(f"file_name,{column}\n0.png,train\n1.png,{word}\n")
        with pytest.raises(ValueError, match=f"the column '{column}' .* is {word or None!r} for 1.png; give train"):
            load_pictures(folder)


def test_a_column_and_the_folders_say_the_same_split(tmp_path, arrays):
    for i, split in enumerate(("train", "test")):
        save(picture(arrays[i]), tmp_path / split / f"{i}.png")
    (tmp_path / "metadata.csv").write_text("file_name,split\ntrain/0.png,train\ntest/1.png,test\n")
    assert splits_of(tmp_path) == {"train": 1, "test": 1}
    (tmp_path / "metadata.csv").write_text("file_name,split\ntrain/0.png,train\ntest/1.png,train\n")
    with pytest.raises(ValueError, match="the column 'split' says train for test/1.png, and its place test; correct"):
        splits_of(tmp_path)


def test_cells_are_what_they_say(tmp_path):
    (tmp_path / "metadata.csv").write_bytes(
        b'\xef\xbb\xbffile_name,text,label\r\n0.png,NA,1\r\n1.png,"a ""b"",\nc",\r\n'
    )
    assert [row for _, row in read_rows(str(tmp_path / "metadata.csv"))] == [
        {"file_name": "0.png", "text": "NA", "label": 1},
        {"file_name": "1.png", "text": 'a "b",\nc', "label": None},
    ]


NAMES = ["None", "NA", "null", "nan", "true", "1e3"]


def test_names_of_files_are_the_same_in_both_forms_of_unicode(tmp_path, arrays):
    save(picture(arrays[0]), tmp_path / "e\u0301.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n\u00e9.png,a\n", encoding="utf-8")
    assert load_pictures(tmp_path).captions == ["a"]


def test_names_of_labels_are_names(tmp_path, arrays):
    rows = "".join(f"{i}.png,{name}\n" for i, name in enumerate(NAMES))
    pictures = load_pictures(write(tmp_path / "csv", arrays, None, f"file_name,label\n{rows}"), require_labels=True)
    assert pictures.label_names == sorted(NAMES)
    assert [pictures.label_names[label] for label in pictures.labels] == NAMES
    for i, name in enumerate(NAMES):
        save(picture(arrays[i]), tmp_path / "folders" / name / "0.png")
    assert load_pictures(tmp_path / "folders").label_names == sorted(NAMES)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_columns_of_labels_are_in_the_order_of_the_numbers(tmp_path, arrays, name):
    numbers = [10, 2, 0, 1, 9, 2]
    table = datasets.Dataset.from_dict({"file_name": [f"{i}.png" for i in range(6)], "label": numbers})
    write(tmp_path, arrays, None, "", name)
    getattr(table, {"csv": "to_csv", "jsonl": "to_json", "parquet": "to_parquet"}[name.split(".")[1]])(tmp_path / name)
    pictures = load_pictures(tmp_path, require_labels=True)
    assert pictures.label_names == ["0", "1", "2", "9", "10"] and pictures.labels.tolist() == [4, 2, 0, 1, 3, 2]


@pytest.mark.parametrize("where", ["", "{0}/", "b/"])
def test_captions_and_the_labels_of_class_folders(tmp_path, arrays, where):
    rows = {}
    for i, array in enumerate(arrays):
        label = "ab"[i % 2]
        save(picture(array), tmp_path / label / f"{i}.png")
        folder = where.format(label)
        if label in folder or not folder:
            name = f"{label}/{i}.png".removeprefix(folder)
            rows.setdefault(folder, []).append(json.dumps({"file_name": name, "text": f"number {i}"}))
    for folder, lines in rows.items():
        (tmp_path / folder / "metadata.jsonl").write_text("\n".join(lines))
    if where == "b/":  # the images of the other folder have none
        with pytest.raises(ValueError, match=r"without a caption \('text'\): 3 of 6 images, such as .*a/0.png"):
            load_pictures(tmp_path, require_captions=True)
        with pytest.warns(UserWarning, match="such as .*a/0.png, so captions are not used"):
            pictures = load_pictures(tmp_path, require_labels=True)
        assert pictures.captions is None
    else:
        pictures = load_pictures(tmp_path, require_labels=True, require_captions=True)
        found = dict(zip(pictures.captions, (pictures.label_names[label] for label in pictures.labels), strict=True))
        assert found == {f"number {i}": "ab"[i % 2] for i in range(6)}
    assert pictures.labels.bincount().tolist() == [3, 3]


def test_a_column_of_labels_counts_instead_of_the_folders(tmp_path, arrays):
    for label, is_told in (("{}", False), ("no {}", True)):
        rows = "".join(f"{name}/{i}.png,{label.format(name)}\n" for i, name in enumerate("ab"))
        for i, name in enumerate("ab"):
            save(picture(arrays[i]), tmp_path / name / f"{i}.png")
        (tmp_path / "metadata.csv").write_text(f"file_name,label\n{rows}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert load_pictures(tmp_path).label_names == [label.format(name) for name in "ab"]
        assert ["labels are those of the column 'label'" in str(warning.message) for warning in caught] == [
            True
        ] * is_told


def test_two_tables_do_not_speak_of_one_image(tmp_path, arrays):
    row = '{"file_name": "a/0.png", "text": "x"}'
    write(tmp_path, arrays[:1], "a/{}.png", row, "metadata.jsonl")
    (tmp_path / "a" / "metadata.jsonl").write_text(row.replace("a/", ""))
    with pytest.raises(ValueError, match="a/0.png is in both a/metadata.jsonl and metadata.jsonl; keep one"):
        load_pictures(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name\na/0.png\n")
    (tmp_path / "a" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="it holds both metadata.csv and metadata.jsonl; keep one"):
        load_pictures(tmp_path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("metadata.csv", "file_name,text\n0.png,a\n1.png,b\n./0.png,c\n"),
        ("metadata.jsonl", "".join(f'\n{{"file_name": "{i}.png", "text": "a"}}' for i in (0, 1, 0))),
    ],
)
def test_two_lines_do_not_speak_of_one_image(tmp_path, arrays, name, content):
    with pytest.raises(ValueError, match=f"{name}, line 4: line 2 is about 0.png, too; keep one of the lines"):
        load_pictures(write(tmp_path, arrays[:2], None, content, name))


def test_images_without_a_row_and_rows_without_an_image(tmp_path, arrays):
    write(tmp_path, arrays[:3], None, "file_name,text\n0.png,a\n1.png,b\n")
    with pytest.warns(UserWarning, match=r"images left out, as its metadata has no line of them \(1\): 2.png"):
        assert len(load_pictures(tmp_path)) == 2
    write(tmp_path, arrays[:1], None, "file_name,text\n0.png,a\n1.png,b\n2.png,c\n7.png,d\n")
    with pytest.raises(ValueError, match="1 of 4 images .*7.png: No such file"):
        load_pictures(tmp_path)
    assert len(load_pictures(tmp_path, on_bad_image="skip")) == 3


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet", "0.txt", "more.zip"])
def test_pointers_of_git_lfs_are_named(tmp_path, arrays, name):
    with pytest.raises(ValueError, match=f"{name}: a pointer of Git LFS, not the file itself; run `git lfs pull`"):
        load_pictures(write(tmp_path, arrays[:1], None, "version https://git-lfs.github.com/spec/v1\noid x\n", name))


class TestTexts:
    def test_are_the_captions_of_the_images_beside_them(self, tmp_path, arrays):
        for i, name in enumerate(("a/0.png", "a/1.b.png", "b/0.png")):
            save(picture(arrays[i]), tmp_path / name)
        for name, text in (("a/0.txt", "x\n"), ("a/1.b.txt", "\ufeffy"), ("b/0.png.txt", " z ")):
            (tmp_path / name).write_text(text, encoding="utf-8")
        pictures = load_pictures(tmp_path, require_captions=True, require_labels=True)
        assert pictures.captions == ["x", "y", "z"] and pictures.labels.tolist() == [0, 0, 1]

    @pytest.mark.parametrize("names", [("0.caption", "0.txt"), ("0.png.txt", "0.txt"), ("0.TXT", "0.txt")])
    def test_two_of_one_image_are_refused(self, tmp_path, arrays, names):
        save(picture(arrays[0]), tmp_path / "0.png")
        for name in names:
            (tmp_path / name).write_text(name)
        with pytest.raises(ValueError, match=f"0.png: two captions of one image: {names[0]} and {names[1]}; keep one"):
            load_pictures(tmp_path)

    def test_that_are_missing_or_no_text_are_named(self, tmp_path, arrays):
        for i in range(2):
            save(picture(arrays[i]), tmp_path / f"{i}.png")
        (tmp_path / "0.txt").write_text("a")
        with pytest.raises(ValueError, match=r"without a caption \('text'\): 1 of 2 images, such as .*1.png"):
            load_pictures(tmp_path, require_captions=True)
        (tmp_path / "1.txt").write_bytes(b"one\ncaf\xe9")
        with pytest.raises(ValueError, match="1.txt, line 2: the text is not UTF-8"):
            load_pictures(tmp_path)


def test_files_that_are_not_there_are_named_with_the_line_and_a_near_file(tmp_path, arrays):
    write(tmp_path, arrays[:2], None, "file_name,text\n0,a\n1.PNG,b\n7.png,c\n")
    told = (
        r"are not there \(3\): 0 \(metadata.csv, line 2; there is 0.png\), "
        r"1.PNG \(metadata.csv, line 3; there is 1.png\), 7.png \(metadata.csv, line 4\); correct"
    )
    with pytest.warns(UserWarning, match=told), pytest.raises(ValueError, match="0: No such file"):
        load_pictures(tmp_path)


def test_a_file_of_the_name_in_another_folder_or_archive_is_named(tmp_path, arrays):
    save(picture(arrays[0]), tmp_path / "images" / "0.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "images" / "0.png", "0.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a\n")
    for kind in ("folder", "archive"):
        told = r"are not there \(1\): 0.png \(metadata.csv, line 2; there is images/0.png\); correct"
        with pytest.warns(UserWarning, match=told), pytest.raises(ValueError, match="0.png: No such file"):
            load_pictures(tmp_path)
        if kind == "folder":
            shutil.rmtree(tmp_path / "images")


def test_labels_too_large_for_integers_are_names(tmp_path, arrays):
    names = ["12345678901234567890", "7" * 40]
    rows = "".join(f"{i}.png,{name}\n" for i, name in enumerate(names))
    assert load_pictures(write(tmp_path, arrays[:2], None, f"file_name,label\n{rows}")).label_names == names
