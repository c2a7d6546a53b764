"""The images of a stream are encoded once, into files of which an interruption leaves the whole ones."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from small_shards import FEATURES, damage, spoil_image, write_parquet, write_tar

from hf_genmod.data import stream, stream_encoding
from hf_genmod.data.stream import stream_pictures
from hf_genmod.data.stream_encoding import encode_stream


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(stream_encoding, "_ROWS", 20)
    monkeypatch.setattr(stream, "NUM_SAMPLE_IMAGES", 16)  # the first two of each block


def numbers_of(x):
    """The numbers of the images, by their first pixels."""
    return ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def encoded(pictures, seen=None, until=None, num_bytes=2**18, key="key"):
    """The rows of all files; an image is encoded as its number. A Ctrl-C comes at image `until`."""

    def encode(x):
        numbers = numbers_of(x)
        if until in numbers:
            raise KeyboardInterrupt
        if seen is not None:
            seen.extend(numbers)
        return [str(number).encode() for number in numbers]

    files = encode_stream(pictures, encode, num_bytes, key, batch_size=3)
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return [(int(row["encoded"]), row["label"], json.loads(row["caption"])) for row in rows]


def row(number):
    return number, number % 8, f"number {number}"


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_an_interruption_leaves_the_whole_files_and_these_are_not_encoded_again(kind, tmp_path, cache, capsys):
    if kind == "parquet":
        write_parquet(tmp_path, (40, 25, 7))
    else:
        write_tar(tmp_path / "a.tar", 72)
    pictures, seen, folder = stream_pictures(str(tmp_path)), [], cache / "hf_genmod" / "latents"
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        encoded(pictures, seen, until=55)
    assert sorted(file.name for file in folder.glob("*[!k]")) == ["key-0-20.parquet", "key-20-40.parquet"]
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"the latents of 72 images of {pictures.name} take 18.0 MiB in {folder}, where ")
    seen.clear()
    expected = [*map(row, range(72))]
    assert encoded(pictures, seen) == expected and seen == [*range(40, 72)]
    assert "the latents of 32 images" in capsys.readouterr().err
    assert pq.read_metadata(folder / "key-0-20.parquet").num_row_groups == 5  # 4 rows have a mebibyte
    assert pictures.shards._num_kept_bytes == 0
    seen.clear()
    assert encoded(pictures, seen) == expected and not seen
    assert not capsys.readouterr().err
    (folder / "key-20-40.parquet").write_bytes((folder / "key-20-40.parquet").read_bytes()[:-9])
    (folder / "key-60-72.parquet").unlink()
    assert encoded(pictures, seen) == expected and seen == [*range(20, 40), *range(60, 72)]


def test_a_disk_without_room_is_refused_before_the_first_image(tmp_path, cache):
    pictures, seen = stream_pictures(str(write_parquet(tmp_path))), []
    told = r"cache_latents: the latents of 72 images of .* take [\d,.]+ MiB in .*, where [\d,.]+ MiB are free; set HF_"
    with pytest.raises(ValueError, match=told):
        encoded(pictures, seen, num_bytes=2**50)
    assert not seen


def test_an_unusable_image_is_named_or_the_next_one_takes_its_place(tmp_path, cache, capsys):
    spoil_image(write_parquet(tmp_path, (72,)) / "train-00000-of-00001.parquet", 45)
    seen = []
    with pytest.raises(ValueError, match="row 45 of .*; repair it, or leave such out with --on_bad_image skip, w"):
        encoded(stream_pictures(str(tmp_path)), seen)
    assert seen == [*range(44)]
    seen.clear()
    pictures = stream_pictures(str(tmp_path), on_bad_image="skip")
    expected = [row(46 if number == 45 else number) for number in range(72)]
    assert encoded(pictures, seen) == expected and min(seen) == 40
    assert "row 45 of " in (told := capsys.readouterr().err) and told.count("another image takes its place") == 1
    seen.clear()
    assert encoded(pictures, seen) == expected and not seen
    with pytest.raises(ValueError, match="row 45 of "):  # although there is a file
        encoded(stream_pictures(str(tmp_path)))


def test_images_of_a_block_that_could_not_be_read_are_encoded_when_it_can(tmp_path, cache):
    pictures = stream_pictures(str(write_parquet(tmp_path, (40, 32))), on_bad_image="skip")
    file = tmp_path / "train-00001-of-00002.parquet"
    content = file.read_bytes()
    named = stream_pictures(str(tmp_path))
    damage(file, 4, 3000)  # in its first row group, of the rows 40 to 49
    with pytest.raises(ValueError, match=f"{file}: the shard cannot be read .*; repair it, or leave such out with"):
        encoded(named)
    assert encoded(pictures) == [row(50 if 40 <= number < 50 else number) for number in range(72)]
    file.write_bytes(content)
    seen = []
    assert encoded(stream_pictures(str(tmp_path), on_bad_image="skip"), seen) == [*map(row, range(72))]
    assert seen == [*range(40, 60)]


def test_without_labels_and_captions_there_are_none(tmp_path, cache):
    pictures = stream_pictures(str(write_parquet(tmp_path, (3,), features={"image": FEATURES["image"]})))
    assert encoded(pictures) == [(number, None, None) for number in range(3)]


# Each of two processes encodes four files, then one, and then four whose third has an image that is none.
SHARES = """
import json, sys
sys.path[:0] = {folders!r}
import datasets
datasets.config.HF_DATASETS_CACHE = sys.argv[1]
from test_stream_encoding import encoded, stream, stream_encoding, stream_pictures
from hf_genmod.processes import processes
stream_encoding._ROWS, stream.NUM_SAMPLE_IMAGES, said = 20, 16, []
for name in ("four", "one", "bad"):
    mine = []
    try:
        rows = encoded(stream_pictures(sys.argv[1] + "/" + name), mine, key=name)
    except ValueError as error:
        rows = str(error)
    said.append([mine, rows])
with open(sys.argv[1] + "/" + str(processes().process_index) + ".json", "w") as file:
    json.dump(said, file)
"""


@pytest.mark.slow
def test_processes_share_the_encoding_and_end_together(tmp_path):
    for name, count in {"four": 72, "one": 15, "bad": 72}.items():
        write_parquet(tmp_path / name, (count,))
    spoil_image(tmp_path / "bad" / "train-00000-of-00001.parquet", 45)
    (tmp_path / "program.py").write_text(SHARES.format(folders=[path for path in sys.path if "tests" in path]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, str(tmp_path / "program.py"), str(tmp_path)], check=True, timeout=300)
    first, second = (json.loads((tmp_path / f"{index}.json").read_text()) for index in (0, 1))
    everything = [[*row(number)] for number in range(72)]
    assert first[0] == [[*range(20), *range(40, 60)], everything]
    assert second[0] == [[*range(20, 40), *range(60, 72)], everything]
    assert first[1] == [[*range(15)], everything[:15]] and second[1] == [[], everything[:15]]
    assert first[2][1] == second[2][1] and "row 45 of" in first[2][1]
    assert first[2][0] == [*range(20), *range(40, 44)] and second[2][0] == [*range(20, 40), *range(60, 72)]
