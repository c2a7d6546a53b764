import collections
import functools
import http.server
import io
import os
import pickle
import re
import shutil
import tarfile
import threading

import datasets
import pytest
import torch
from small_shards import FEATURES, NAMES, damage, write_parquet, write_tar

from hf_genmod.data import shards as shards_module
from hf_genmod.data import stream as stream_module
from hf_genmod.data import web_dataset
from hf_genmod.data.loading import load_pictures
from hf_genmod.data.randomness import GlobalBatchSampler, _Philox, batch_positions
from hf_genmod.data.stream import stream_pictures


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("parquet"))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    write_tar(folder / "train-000.tar", 60)
    write_tar(folder / "train-001.tar", 20, start=60)
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("hf_genmod.data.web_dataset.BLOCK", 25)


@pytest.fixture
def server(tmp_path):
    """The address of a folder, and the folder."""
    handler = functools.partial(OfParts, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", tmp_path
        server.shutdown()


class OfParts(http.server.SimpleHTTPRequestHandler):
    """A server of files that sends the part that is asked for, or breaks off in its midst for those of `breaks`."""

    breaks = []

    def log_message(self, *_):
        pass

    def send_head(self):
        path, asked = self.translate_path(self.path), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or not os.path.exists(path):
            return super().send_head()
        with open(path, "rb") as file:
            content = file.read()
        part = content[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        is_cut = self.breaks and len(part) > 1 and self.breaks.pop()
        self.wfile.write(part[: len(part) // 2] if is_cut else part)


def assert_same_pictures(stream, pictures):
    assert len(stream) == len(pictures)
    mine, theirs = (each.__getitems__(range(len(pictures))) for each in (stream, pictures))
    assert torch.equal(mine["images"], theirs["images"])
    assert torch.equal(mine["class_labels"], theirs["class_labels"])
    assert mine["captions"] == theirs["captions"]
    assert stream.label_names == pictures.label_names
    assert (stream.channels, stream.resolution) == (pictures.channels, pictures.resolution)
    order = [5, 71, 5, 0]
    assert torch.equal(stream.x_0(order), pictures.x_0(order))


def test_a_stream_of_parquet_files_has_the_images_of_the_loaded_data_set(parquet, tmp_path):
    pictures = load_pictures(parquet)
    assert_same_pictures(stream_pictures(str(parquet)), pictures)
    assert_same_pictures(stream_pictures(f"{parquet}/train-{{00000..00002}}-of-00003.parquet"), pictures)
    assert_same_pictures(stream_pictures(f"{parquet}/*.parquet"), pictures)
    small = {"resolution": "8x12", "channels": 1}
    assert_same_pictures(stream_pictures(str(parquet), **small), load_pictures(parquet, **small))


def test_a_stream_of_web_datasets_has_the_images_of_the_loaded_data_set(tars, tmp_path):
    pictures = load_pictures(tars)
    assert_same_pictures(stream_pictures(str(tars)), pictures)
    assert_same_pictures(stream_pictures(str(tars)), pictures)  # by what was written down at first
    write_tar(tmp_path / "x.tar", 72, json_fields=True)
    assert_same_pictures(stream_pictures(str(tmp_path / "x.tar")), load_pictures(tmp_path / "x.tar"))


def test_shards_at_an_address_are_read_in_parts(server, parquet, tars):
    address, folder = server
    for file in [*parquet.iterdir(), *tars.iterdir()]:
        shutil.copy(file, folder)
    assert_same_pictures(stream_pictures(f"{address}/train-{{00000..00002}}-of-00003.parquet"), load_pictures(parquet))
    assert_same_pictures(stream_pictures(f"{address}/train-{{000..001}}.tar"), load_pictures(tars))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_what_a_connection_breaks_off_is_asked_for_again(server, parquet, tars, kind, monkeypatch):
    address, folder = server
    file = min({"parquet": parquet, "tar": tars}[kind].iterdir())
    shutil.copy(file, folder)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(OfParts, "breaks", [True])
    stream = stream_pictures(f"{address}/{file.name}")
    assert not OfParts.breaks
    pictures = load_pictures(file)
    stream = in_another_process(stream)
    OfParts.breaks += [True, False, True]
    assert torch.equal(stream.x_0(range(len(pictures))), pictures.x_0(range(len(pictures))))
    assert not OfParts.breaks


def test_an_address_without_such_a_file_is_named(server):
    address, folder = server
    with pytest.raises(
        ValueError, match=r"a.parquet.download=true: the shard cannot be read \(the server answers 404: File not found"
    ):
        stream_pictures(f"{address}/a.parquet?download=true")
    (folder / "b.tar").write_text("no archive")
    with pytest.raises(ValueError, match=r"b.tar: the shard cannot be read"):
        stream_pictures(f"{address}/b.tar")


def test_a_data_set_on_the_hub(hub, parquet):
    repo_id = hub.new_repo_id()
    datasets.load_dataset(str(parquet), split="train").push_to_hub(repo_id, max_shard_size="2KB", token=hub.token)
    assert_same_pictures(stream_pictures(repo_id), load_pictures(parquet))


def test_without_a_feature_the_classes_are_the_values_of_all_splits(tmp_path):
    features = {**FEATURES, "label": datasets.Value("int64")}
    write_parquet(tmp_path, features=features)
    write_parquet(tmp_path / "test", (2,), features=features)
    shutil.move(tmp_path / "test" / "train-00000-of-00001.parquet", tmp_path / "test-00000-of-00001.parquet")
    (tmp_path / "test").rmdir()
    streams = [stream_pictures(str(tmp_path), split=split) for split in ("train", "test")]
    assert [stream.label_names for stream in streams] == [[*"01234567"]] * 2
    assert_same_pictures(streams[0], load_pictures(tmp_path))
    assert streams[0].fingerprint != streams[1].fingerprint


def test_images_held_out_are_not_in_the_stream(parquet):
    whole = stream_pictures(str(parquet))
    stream = stream_pictures(str(parquet))
    held_out = stream.hold_out(20)
    assert (len(stream), len(held_out)) == (52, 20)
    assert stream.fingerprint != whole.fingerprint
    captions = [each.__getitems__(range(len(each)))["captions"] for each in (stream, held_out, whole)]
    assert not set(captions[0]) & set(captions[1])
    assert sorted(captions[0] + captions[1]) == sorted(captions[2])
    for its, each in zip(captions, (stream, held_out), strict=False):
        labels = each.__getitems__(range(len(each)))["class_labels"].tolist()
        assert labels == [int(caption.split()[1]) % 8 for caption in its]
    assert held_out.images is not None and held_out.label_names == NAMES
    with pytest.raises(ValueError, match="to hold out 52 images of its 52 would leave none"):
        stream.hold_out(52)


@pytest.mark.parametrize("num_loaders", [0, 1, 2, 4])
def test_each_block_is_read_once_in_an_epoch(tmp_path, monkeypatch, num_loaders):
    """There are 60 blocks, of which 16 fit into memory: there are four lanes, of which two belong to each step."""
    whole, loaders = stream_pictures(str(write_parquet(tmp_path, (72, 48), group=2))), max(num_loaders, 1)
    largest = int(whole._entries.shards.num_bytes.max())
    monkeypatch.setattr(stream_module, "BUFFER", 16 * largest)
    monkeypatch.setattr(shards_module, "BUFFER", 16 * largest // loaders)  # the share of a loader process
    sampler, read = GlobalBatchSampler(120, 2, 0, order=whole.order), []
    assert sampler.of_epoch(0).num_loaders(num_loaders) == min(num_loaders, 2)
    steps = [batch for batch, _ in zip(iter(sampler), range(60), strict=False)]
    for loader in range(loaders):
        shards = in_another_process(whole)._entries.shards
        shards._read = lambda block, shards=shards: (read.append(block), type(shards)._read(shards, block))
        for batch in steps[loader::loaders]:
            for row in batch:
                assert not isinstance(shards[row], Exception)
    assert set(read) == set(range(60))
    assert len(read) <= 66 if num_loaders <= 2 else len(read) > 100  # one at the border of two lanes belongs to both


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_any_number_of_processes_sees_every_image_once_in_an_epoch(tmp_path, monkeypatch, num_processes):
    """Four processes have three shards, which do not fit into the memory for blocks."""
    whole = stream_pictures(str(write_parquet(tmp_path, group=2)))
    for module in (shards_module, stream_module):
        monkeypatch.setattr(module, "BUFFER", 16 * int(whole._entries.shards.num_bytes.max()))
    assert len(whole.order(_Philox(0, b"order"), 0, 8).intervals) == 4  # lanes
    epochs = [collections.Counter(), collections.Counter()]
    for process in range(num_processes):
        stream = in_another_process(whole)
        parts = [batch_positions(8, process_index=process, num_processes=num_processes)]
        sampler = iter(GlobalBatchSampler(72, 8, 0, 0, parts, stream.order))
        for step in range(18):
            epochs[step // 9].update(stream.__getitems__(next(sampler))["captions"])
    every = collections.Counter(f"number {i}" for i in range(72))
    assert epochs == [every, every]


def test_a_file_that_was_written_again_is_read_anew(tmp_path):
    stream_pictures(str(write_parquet(tmp_path, (40,)))).x_0(range(40))
    write_parquet(tmp_path, (40,), group=7, features={"image": datasets.Image()})
    stream = stream_pictures(str(tmp_path))
    assert torch.equal(stream.x_0(range(40)), load_pictures(tmp_path).x_0(range(40)))


def test_blocks_of_a_web_dataset_have_few_bytes(tmp_path, monkeypatch):
    """The samples have 1,536 + 512 k bytes."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for k in range(13):
            info = tarfile.TarInfo(f"{k}.png")
            info.size = 1024 + 512 * k
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    monkeypatch.setattr(web_dataset, "BLOCK_BYTES", 8000)
    blocks = web_dataset.index_of_samples(str(tmp_path / "a.tar"), {"cls"})["blocks"]
    assert [size for *_, size in blocks] == [3, 2, *[1] * 8]
    assert all(num_bytes <= 8000 or size == 1 for _, num_bytes, size in blocks)
    ends = [first + num_bytes for first, num_bytes, _ in blocks]
    assert [first for first, *_ in blocks] == [0, *ends[:-1]]
    read = [web_dataset.read_samples(str(tmp_path / "a.tar"), *block[:2]) for block in blocks]
    assert [[len(row["png"]["bytes"]) for row in rows] for rows in read[:2]] == [[1024, 1536, 2048], [2560, 3072]]
    monkeypatch.setattr(shards_module, "BUFFER", 2000)
    with pytest.raises(ValueError, match="a.tar: it has a sample of .* can be kept; store smaller images"):
        stream_pictures(str(tmp_path))


@pytest.mark.parametrize(("ending", "content"), [("txt", b"\xff"), ("cls", b"bee"), ("json", b"{")])
def test_a_small_file_that_cannot_be_read_costs_its_sample(tmp_path, ending, content):
    file = write_tar(tmp_path / "train.tar", 40, json_fields=ending == "json")
    whole = stream_pictures(str(tmp_path))
    rewritten = tmp_path / "train.part"
    with tarfile.open(file) as before, tarfile.open(rewritten, "w") as after:
        for info in before:
            written = content if info.name == f"000027.{ending}" else before.extractfile(info).read()
            info.size = len(written)
            after.addfile(info, io.BytesIO(written))
    rewritten.replace(file)
    stream = stream_pictures(str(tmp_path), on_bad_image="skip")
    batch = stream.__getitems__(range(40))
    (reason,) = batch["unusable"]
    assert reason == f"{file}: 000027.{ending} holds {content!r}; write it again"
    others = [*range(27), 28, *range(28, 40)]
    assert torch.equal(batch["images"], whole.__getitems__(others)["images"])
    assert batch["captions"] == whole.__getitems__(others)["captions"]
    if ending == "txt":
        assert torch.equal(batch["class_labels"], whole.__getitems__(others)["class_labels"])
    else:
        with pytest.raises(ValueError, match="images without a label .* 1 of 40 images, such as row 27 of"):
            stream_pictures(str(tmp_path), on_bad_image="skip", require_labels=True)


def test_captions_at_the_start_are_read_without_the_images(parquet, tars, monkeypatch):
    read, its_read = [], shards_module.Shards._read
    monkeypatch.setattr(
        shards_module.Shards, "_read", lambda self, block: (read.append((block, *self.columns)), its_read(self, block))
    )
    monkeypatch.setattr("hf_genmod.data.stream.NUM_SAMPLE_IMAGES", 2)
    stream = stream_pictures(str(parquet))
    assert len(stream.captions) == 72 and len({block for block, *columns in read if "image" in columns}) == 2
    assert not stream._entries.shards._kept  # nor are the blocks of the sample kept

    class Counted(io.FileIO):
        def readinto(self, buffer):
            counts.append(super().readinto(buffer))
            return counts[-1]

    counts, path = [], str(tars / "train-000.tar")
    monkeypatch.setattr(web_dataset, "opened", lambda path: io.BufferedReader(Counted(path), 512))
    (place, num_bytes, size), *_ = web_dataset.index_of_samples(path, set())["blocks"][1:]
    whole = web_dataset.read_samples(path, place, num_bytes)
    assert sum(counts) >= num_bytes
    counts.clear()
    alone = web_dataset.read_samples(path, place, num_bytes, ["txt"])
    assert alone == [{"txt": row["txt"]} for row in whole] and len(alone) == size
    assert sum(counts) < num_bytes


def test_what_is_in_a_web_dataset_is_noted_for_all_who_share_the_cache(tars, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    stream_pictures(str(tars))
    files = [file for file in tmp_path.glob("hf_genmod/shards/*")]
    (tmp_path / "other").touch()
    assert {file.stat().st_mode for file in files} == {(tmp_path / "other").stat().st_mode}
    assert [file.suffix for file in files] == [".json"] * 2


def test_few_blocks_are_kept(parquet, monkeypatch):
    stream = in_another_process(stream_pictures(str(parquet)))
    shards = stream._entries.shards
    monkeypatch.setattr(shards_module, "BUFFER", int(shards.num_bytes[:4].sum()))
    for row in range(len(stream)):
        stream.__getitems__([row])
        assert len(shards._kept) <= 4
    monkeypatch.setattr(shards_module, "BUFFER", 100)
    with pytest.raises(ValueError, match="parquet: it has a row group of .*; write it again with smaller ones"):
        stream_pictures(str(parquet))


def in_another_process(stream):
    """The stream with none of its blocks in memory."""
    stream = pickle.loads(pickle.dumps(stream))
    assert not stream._entries.shards._kept
    return stream


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_shard_that_cannot_be_read_is_named_or_left_out(kind, tmp_path, parquet, tars):
    shutil.copytree({"parquet": parquet, "tar": tars}[kind], tmp_path, dirs_exist_ok=True)
    whole = stream_pictures(str(tmp_path))
    first = min(tmp_path.iterdir())
    first.write_bytes(first.read_bytes()[:2000])
    with pytest.raises(
        ValueError, match=rf"{first}: the shard cannot be read \(.*\) \(1 of \d shards\); repair or re"
    ):
        stream_pictures(str(tmp_path))
    with pytest.warns(UserWarning, match=f"{first}: the shard cannot be read"):
        rest = stream_pictures(str(tmp_path), on_bad_image="skip")
    (reason,) = rest.skipped
    assert str(first) in reason
    lost = len(whole) - len(rest)
    assert lost == {"parquet": 40, "tar": 60}[kind]
    assert torch.equal(rest.x_0(range(20)), whole.x_0(range(lost, lost + 20)))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_in_place_of_a_block_that_cannot_be_read_others_are_taken(kind, tmp_path, parquet, tars):
    shutil.copytree({"parquet": parquet, "tar": tars}[kind], tmp_path, dirs_exist_ok=True)
    whole = stream_pictures(str(tmp_path))
    stream, skipping = in_another_process(whole), in_another_process(whole)
    skipping.on_bad_image = "skip"
    file, size = min(tmp_path.iterdir()), int(whole._entries.shards.sizes[0])
    if kind == "parquet":
        damage(file, 4, 3000)  # in the first row group
    else:
        file.write_bytes(file.read_bytes()[:1000])
        size = 60  # all of its blocks
    batch = skipping.__getitems__([0, 1, size, size + 1])
    expected = whole.__getitems__([size, size, size, size + 1])
    assert set(batch["unusable"]) == {batch["unusable"][0]}
    assert batch["unusable"][0].startswith(f"{file}: the shard cannot be read (")
    assert torch.equal(batch["images"], expected["images"])
    assert torch.equal(batch["class_labels"], expected["class_labels"]) and batch["captions"] == expected["captions"]
    assert "failure" not in batch
    batch = stream.__getitems__([0, 1, size, size + 1])
    assert batch["failure"] == batch["unusable"][0]
    assert torch.equal(batch["images"], expected["images"] * torch.tensor([0, 0, 1, 1])[:, None, None, None])


def test_the_reason_of_a_failure_is_that_of_its_image(tmp_path):
    """Of twelve blocks of one image, the second is damaged and replaced, and in place of the sixth the next four are
    tried."""
    whole = stream_pictures(str(write_parquet(tmp_path, [1] * 12)))
    files = sorted(tmp_path.iterdir())
    for i in (1, *range(5, 11)):
        damage(files[i], 4, 300)
    stream, skipping = in_another_process(whole), in_another_process(whole)
    skipping.on_bad_image = "skip"
    batch = skipping.__getitems__([0, 1, 2, 5])
    assert batch["failure"].startswith(f"{files[9]}: the shard cannot be read")
    assert batch["unusable"][0].startswith(str(files[1]))
    assert torch.equal(batch["images"][:3], whole.__getitems__([0, 2, 2])["images"]) and not batch["images"][3].any()
    assert stream.__getitems__([0, 1, 2, 5])["failure"].startswith(str(files[1]))


def test_images_of_another_kind_than_the_sample_are_named(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    grey = datasets.load_dataset(str(write_parquet(tmp_path / "made", (30,))), split="train")
    images = [image.convert("L") for image in grey["image"]]
    colored, small = grey[7]["image"], images[8].resize((8, 8))
    images[27:29] = [colored, small]
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(folder / "train.parquet")
    stream = stream_pictures(str(folder), resolution=16, channels=1)
    assert "unusable" not in stream.__getitems__(range(30))
    shards = stream_pictures(str(folder), resolution=16, channels=1)._entries.shards
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("hf_genmod.data.stream.NUM_SAMPLE_IMAGES", 20)
        stream = stream_pictures(str(folder))
    assert (stream.channels, stream.resolution) == (1, (16, 16))
    assert len(shards) == 30
    stream.on_bad_image = "skip"
    batch = stream.__getitems__([27, 28])
    assert re.search(r"row 27 of .*train.parquet: it differs in colour", batch["unusable"][0])
    assert "row 28" in batch["unusable"][1] and "--resolution 64" in batch["unusable"][1]
    assert torch.equal(batch["images"][0], batch["images"][1])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"require_labels": True}, "none of its columns .* is known to hold class labels"),
        ({"label_column": "x"}, "label_column: 'x' is no column"),
        ({"require_captions": True}, "no captions .* in its columns"),
        ({"split": "test"}, "has no 'test'; it has 'train'"),
        ({"array_axes": "NHW"}, "array_axes: a stream is not read from .npy files"),
    ],
)
def test_what_a_stream_lacks_is_told_before_training(tmp_path, options, told):
    write_parquet(tmp_path, features={"image": datasets.Image()})
    with pytest.raises(ValueError, match=told):
        stream_pictures(str(tmp_path), **options)


def test_other_data_sets_are_no_streams(tmp_path, class_folders):
    with pytest.raises(ValueError, match="streaming: .*png is neither a parquet file nor a WebDataset"):
        stream_pictures(str(class_folders))
    with pytest.raises(ValueError, match="streaming: the embedded shapes are drawn here"):
        stream_pictures("shapes")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        stream_pictures("./nothing")
    with pytest.raises((FileNotFoundError, ValueError), match=r"nothing-\*.parquet"):
        stream_pictures(str(tmp_path / "nothing-*.parquet"))
    write_parquet(tmp_path / "two", (20,))
    write_parquet(tmp_path / "other", (20,), features={"image": datasets.Image()})
    shutil.copy(tmp_path / "other" / "train-00000-of-00001.parquet", tmp_path / "two" / "z-train.parquet")
    with pytest.raises(ValueError, match="differ in their columns label, text; give the shards of one data set"):
        stream_pictures(str(tmp_path / "two"))
