"""What `doctor` says of a data set."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from example_scripts import run
from PIL import Image

from hf_genmod.__main__ import main
from hf_genmod.data.archives import list_images
from hf_genmod.data.folder import read_folder
from hf_genmod.recipes.dataset_doctor import examine_dataset
from hf_genmod.recipes.pictures import CaptionedDataArguments


def report_of(folder, **arguments):
    return examine_dataset(CaptionedDataArguments(dataset=str(folder), **arguments))


def save_pictures(folder, count=600, classes=2, size=(8, 8), mode="RGB"):
    rng = np.random.default_rng(0)
    for index in range(count):
        file = folder / f"class{index % classes}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(256, size=(*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(file)


def test_says_what_a_sound_data_set_holds_and_how_to_train_on_it(tmp_path, capsys):
    save_pictures(tmp_path / "train")
    save_pictures(tmp_path / "test", count=20)
    assert main(["doctor", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    *contents, command, last = printed.out.splitlines()
    assert contents == [
        "images    600 in 'train', 20 in 'test'",
        "classes   2: class0 (300), class1 (300)",
        "sizes     all 8x8 (height x width)",
        "channels  3 (RGB)",
        "captions  none",
    ]
    assert command.startswith(f"to train on it: hf_genmod train cfg --dataset {tmp_path} --max_train_minutes 30 ")
    assert last == f"{tmp_path}: no findings" and printed.err.startswith("loading PyTorch\n")
    assert "ownload" not in printed.out + printed.err


def test_the_command_is_one_that_trains(tmp_path, monkeypatch):
    folder = tmp_path / "my pictures"
    save_pictures(folder, count=20, size=(10, 14))
    Image.new("RGB", (20, 30)).save(folder / "class0" / "other.png")
    (folder / "class1" / "broken.png").write_bytes(b"x")
    (command,) = report_of(folder).commands
    hf_genmod, train, task, *flags = shlex.split(command)
    assert (hf_genmod, train, *flags[:2]) == ("hf_genmod", "train", "--dataset", str(folder))
    assert flags[2:6] == ["--on_bad_image", "skip", "--resolution", "8x16"]
    flags[flags.index("30")] = "0.001"  # minutes: one step
    flags += "--sampling_steps 0 --block_out_channels 8 8".split()
    monkeypatch.chdir(tmp_path)
    done = run(f"train_{task}.py", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "my-pictures" / "model_index.json").is_file()


def test_classes_with_few_images_are_named(tmp_path):
    save_pictures(tmp_path, count=120, classes=3)
    assert report_of(tmp_path).contents[2].startswith("sizes")  # no class has less than half of the average
    for file in sorted((tmp_path / "class2").iterdir())[:25]:
        file.unlink()
    lines = report_of(tmp_path).contents
    assert lines[1] == "classes   3: class0 (40), class1 (40), class2 (15)"
    assert lines[2] == "          the rarest is 'class2' with 15, and the average 32"


def test_images_that_cannot_be_used_are_told_of_where_images_are_counted(tmp_path):
    save_pictures(tmp_path, count=7)
    (tmp_path / "class1" / "broken.png").write_bytes(b"x")
    assert report_of(tmp_path).contents[:2] == [
        "images    8 in 'train' (of which 1 cannot be used)",
        "classes   2: class0 (4), class1 (3)",
    ]


def test_images_of_one_class_have_none(tmp_path):
    save_pictures(tmp_path / "folder", count=3, classes=1)
    table = read_folder(list_images(tmp_path / "folder"), "folder")["train"]
    report = report_of(tmp_path / "folder")
    assert report.contents[1] == "classes   none: all images are in the folder 'class0'"
    assert "train unconditional" in report.commands[0]
    table = table.add_column("label", ["cat"] * 3)
    table.to_parquet(tmp_path / "train.parquet")
    report = report_of(tmp_path / "train.parquet")
    assert report.contents[1] == "classes   1: cat (3)" and "train unconditional" in report.commands[0]
    assert report.findings[-1].startswith("all images are of one class, 'cat', so labels tell a model nothing; train")


def test_a_single_file_is_in_no_class_folder(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(640.0).reshape(10, 8, 8))
    assert report_of(tmp_path / "a.npy").contents[1] == "classes   none"


def test_small_images_are_found(tmp_path):
    save_pictures(tmp_path / "tiny", count=4, size=(3, 3))
    (finding,) = [finding for finding in report_of(tmp_path / "tiny").findings if finding.startswith("small")]
    assert finding.startswith("small images: 4 of 4 (such as ") and " half as high or wide as 8x8, " in finding
    save_pictures(tmp_path / "mixed", count=4, size=(80, 60))
    Image.new("RGB", (20, 20)).save(tmp_path / "mixed" / "class0" / "small.png")
    (finding,) = [finding for finding in report_of(tmp_path / "mixed").findings if finding.startswith("small")]
    assert "1 of 5 (such as " in finding and "small.png)" in finding and " as 64x48, " in finding


def test_classes_that_differ_by_case_and_empty_captions_are_found(tmp_path):
    save_pictures(tmp_path, count=4)
    (tmp_path / "class1").rename(tmp_path / "Class0")
    for file in tmp_path.rglob("*.png"):
        file.with_suffix(".txt").write_text("" if file.stem == "0" else "words")
    findings = report_of(tmp_path).findings
    assert any(
        "classes whose names differ by case, " in finding and "'Class0', 'class0'; " in finding for finding in findings
    )
    assert any(finding.startswith("empty captions: 1 of 4 (such as that of ") for finding in findings)


def test_names_that_hold_classes_are_found(tmp_path):
    save_pictures(tmp_path, count=8)
    for file in sorted(tmp_path.rglob("*.png")):
        file.rename(tmp_path / f"{file.parent.name}.{file.name}")
    report = report_of(tmp_path)
    (finding,) = [finding for finding in report.findings if "begin with what may be classes" in finding]
    assert "(class0, class1); if so, sort them into class folders by running in their folder: for f in" in finding
    assert report.would_start and report.contents[1] == "classes   none"


def test_columns_that_nothing_uses_are_told(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text("file_name,Text,breed\n0.png,a dog,collie\n")
    (line,) = [line for line in report_of(tmp_path).contents if line.startswith("columns")]
    assert line == "columns   image, Text, breed; --label_column and --caption_column choose others"


def test_captions_and_sizes_are_told(tmp_path):
    for index, size in enumerate([(30, 20), (32, 24), (200, 100)]):
        Image.new("L", size, 50 * index).save(tmp_path / f"{index}.png")
    rows = [f'{{"file_name": "{index}.png", "text": "number {index}"}}' for index in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    report = report_of(tmp_path)
    assert report.contents == [
        "images    3 in 'train'",
        "classes   none",
        "sizes     from 20x30 to 100x200 (height x width), with 24x32 in the middle",
        "channels  1 (grey)",
        "captions  one or more for each image, such as 'number 0'",
    ]
    (command,) = report.commands
    assert "hf_genmod train text-to-image " in command and "--resolution 24x32" in command


def test_sound_pictures_have_no_findings(tmp_path):
    save_pictures(tmp_path)
    report = report_of(tmp_path)
    assert report.would_start and not report.findings


def test_each_fault_of_a_data_set_is_found(tmp_path):
    save_pictures(tmp_path, count=60)
    picture = Image.open(tmp_path / "class0" / "0.png")
    picture.save(tmp_path / "class0" / "copy.png")
    picture.save(tmp_path / "class1" / "also.png")
    picture.convert("L").save(tmp_path / "class0" / "grey.png")
    picture.resize((8, 12)).save(tmp_path / "class0" / "long.png")
    transparent = picture.convert("RGBA")
    transparent.putalpha(100)
    transparent.save(tmp_path / "class0" / "transparent.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "class0" / "red.png")
    (tmp_path / "class1" / "broken.png").write_bytes(b"x")
    (tmp_path / "rare").mkdir()
    picture.rotate(90).save(tmp_path / "rare" / "1.png")
    report = report_of(tmp_path)
    expected = [
        "unusable images: 1, which would stop a run (", "number of images: 67, so few that",
        "the images differ in size", "colour and grey: 66 of 67 images are in colour",
        "transparent in places: 1 of 67 images", "copies of other images: 2 (", "the same image in two classes: 1 (",
        "images of one colour only: 1 (", "images in the class 'rare': 1, in the largest 35",
    ]  # fmt: skip
    assert not report.would_start and len(report.findings) == len(expected)
    for finding, start in zip(report.findings, expected, strict=True):
        assert finding.startswith(start)
    assert "broken.png" in report.findings[0]
    assert "copy.png, the same as " in report.findings[5] and "0.png)" in report.findings[5]
    assert "also.png and " in report.findings[6] and "red.png" in report.findings[7]
    assert all(len(finding.splitlines()) == 1 for finding in report.findings)


def test_the_status_is_1_where_a_run_would_not_start(tmp_path, capsys):
    save_pictures(tmp_path, count=4)
    assert main(["doctor", str(tmp_path)]) == 0  # findings do not stop a run
    Path(tmp_path, "class1", "broken.png").write_bytes(b"x")
    assert main(["doctor", str(tmp_path)]) == 1
    assert main(["doctor", str(tmp_path), "--split", "test"]) == 1
    assert "- split: " in capsys.readouterr().out


def test_nothing_there_is_an_error_of_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", str(tmp_path / "no" / "where")])
    assert stopped.value.code == 2
    _, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith("there is no such folder or file; check the path")


def test_classes_that_are_all_small_are_found(tmp_path):
    save_pictures(tmp_path, count=10)
    assert report_of(tmp_path).findings[-1].startswith("no class has more than 5 images")


def test_a_class_of_another_split_alone_is_found(tmp_path):
    save_pictures(tmp_path / "train")
    save_pictures(tmp_path / "test", count=6, classes=3)
    (finding,) = report_of(tmp_path).findings
    assert finding.startswith("classes without images: class2, which a model cannot learn")


def test_outliers_that_set_the_range_of_a_channel_are_found(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(600):
        even, skewed = rng.uniform(size=(8, 8)), rng.lognormal(0, 3, size=(8, 8))
        np.save(tmp_path / f"{index}.npy", np.stack([even, skewed]))
    report = report_of(tmp_path)
    assert report.contents[3] == "channels  2, of measured values"
    (finding,) = report.findings
    assert finding.startswith("channel 1: 99% of its values lie in a tenth of its range, ")


def test_measured_values_of_another_unit_are_not_called_one_colour(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(rng.integers(65536, size=(8, 8), dtype=np.uint16)).save(tmp_path / f"{index}.png")
    Image.fromarray(rng.standard_normal((8, 8), dtype=np.float32)).save(tmp_path / "small.tif")
    Image.fromarray(np.full((8, 8), 999, np.uint16)).save(tmp_path / "plain.png")
    findings = "\n".join(report_of(tmp_path).findings)
    assert re.search("images of one colour only: 1 .such as .*plain.png.*remove them", findings)
    assert re.search("less than a sixtieth of those of all: 1 .such as .*small.tif.*in one unit", findings)


def test_an_alpha_channel_that_is_opaque_everywhere_is_no_transparency(tmp_path):
    save_pictures(tmp_path, mode="RGBA")
    report = report_of(tmp_path)
    assert not report.findings and "channels  3 (RGB)" in report.contents


def test_the_command_has_the_axes_of_arrays(tmp_path, capsys):
    np.save(tmp_path / "fields.npy", np.random.default_rng(0).random((6, 8, 8)))
    assert main(["doctor", str(tmp_path)]) == 1
    assert "give --array_axes CHW or --array_axes NHW" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path), "--array_axes", "NHW"]) == 0
    printed = capsys.readouterr().out
    assert "images    6 in 'train'" in printed and " --array_axes NHW " in printed


def test_captions_of_numbers_alone_are_found(tmp_path):
    save_pictures(tmp_path, count=3)
    texts = ["0 0.5 0.5 0.1 0.1\n1 .2 .3 -1e-3 .1", "3 dogs", "7"]
    for file, text in zip(sorted(tmp_path.rglob("*.png")), texts, strict=True):
        file.with_suffix(".txt").write_text(text)
    (finding,) = [finding for finding in report_of(tmp_path).findings if finding.startswith("captions of")]
    assert finding.startswith("captions of numbers alone: 2 of 3 (such as that of ")


def test_held_out_images_that_a_run_would_not_use_are_told(tmp_path):
    for i in range(4):
        for folder in (f"labels/{('train/a', 'train/b', 'test', 'test')[i]}", f"captions/{('train', 'test')[i % 2]}"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 50 * i).save(tmp_path / folder / f"{i}.png")
    for split, column in (("train", "text"), ("test", "subtitle")):
        lines = [f"{i}.png,a cat" for i in range(4) if ("train", "test")[i % 2] == split]
        (tmp_path / "captions" / split / "metadata.csv").write_text("\n".join([f"file_name,{column}", *lines]))
    for target in ("labels", "captions"):
        arguments = CaptionedDataArguments(str(tmp_path / target))
        told = f"{target} (test): its images have no {target}, so they are not held out"
        report = examine_dataset(arguments)
        assert [told in finding for finding in report.findings].count(True) == 1 and report.would_start
    arguments = CaptionedDataArguments(str(tmp_path / "labels"), validation_split="test")
    assert not examine_dataset(arguments).would_start  # as it is asked for


def test_of_a_split_that_is_not_there_it_tells_what_is(tmp_path):
    save_pictures(tmp_path / "test", count=4)
    report = report_of(tmp_path)
    assert report.contents == ["images    4 in 'test'"] and report.findings[0].endswith("such as --split test")
    assert report_of(tmp_path, split="test").contents[0] == report.contents[0]
