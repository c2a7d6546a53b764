import io
import itertools
import json
import os
import pickle
import resource
import shutil
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hf_genmod.data.loading import load_pictures
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.randomness import GlobalBatchSampler
from hf_genmod.data.shapes import ShapesDataset
from hf_genmod.data.value_range import to_model_range

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def pixels(n, height=8, width=8, channels=3, seed=0):
    """Random pictures, `uint8` (n, height, width, channels)."""
    return np.random.RandomState(seed).randint(256, size=(n, height, width, channels), dtype=np.uint8)


def picture(array):
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def chw(arrays):
    return torch.from_numpy(np.array(arrays)).movedim(-1, -3)


def coded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def rows(images, **columns):
    """A data set of encoded pictures and further columns."""
    features = datasets.Features({"image": datasets.Image()} | {key: feature for key, (feature, _) in columns.items()})
    return datasets.Dataset.from_dict(
        {"image": images} | {key: values for key, (_, values) in columns.items()}, features=features
    )


@pytest.fixture
def arrays():
    return pixels(6)


@pytest.fixture
def class_folders(tmp_path, arrays):
    """Six pictures in the folders "zebra", "ant" and "bee", two each, beside files that are none of its business."""
    folder = tmp_path / "pictures"
    for i, array in enumerate(arrays):
        save(picture(array), folder / ("ant", "bee", "zebra")[i // 2] / f"{i}.png")
    save(picture(arrays[0]), folder / "ant" / ".hidden.png")
    save(picture(arrays[0]), folder / ".cache" / "x.png")
    (folder / "ant" / "notes.txt").write_text("hello")
    return folder


# ------------------------------------------------------------------------------------------------------- data sets


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


@pytest.mark.parametrize("in_memory", [True, False])
def test_held_out_pictures_are_a_random_part_and_no_longer_of_the_rest(class_folders, in_memory):
    whole, training = (load_pictures(class_folders, in_memory=in_memory) for _ in range(2))
    held_out = training.hold_out(2)
    assert (len(training), len(held_out)) == (len(whole) - 2, 2)

    def contents(dataset):
        batch = dataset.__getitems__(range(len(dataset)))
        images, labels = batch["images"], batch["class_labels"].tolist()
        assert [dataset.where(i) for i in range(len(dataset))] and len(dataset.properties) == len(dataset)
        return sorted((image.numpy().tobytes(), label) for image, label in zip(images, labels, strict=True))

    assert sorted(contents(training) + contents(held_out)) == contents(whole)
    again, other = (load_pictures(class_folders, in_memory=in_memory) for _ in range(2))
    assert contents(again.hold_out(2)) == contents(held_out)
    assert contents(other.hold_out(2, seed=2)) != contents(held_out)
    assert len({dataset.fingerprint for dataset in (whole, training, held_out, other)}) == 4
    assert again.fingerprint == training.fingerprint
    with pytest.raises(ValueError, match=f"{len(training)} of its {len(training)} pictures cannot be held out"):
        training.hold_out(len(training))


def test_held_out_pictures_are_shared_out_among_the_classes(tmp_path):
    for name, count in (("rare", 1), ("few", 3), ("some", 30), ("many", 300)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (2, 2)).save(tmp_path / name / f"{i}.png")
    for seed in range(5):
        training = load_pictures(tmp_path)
        held_out = training.hold_out(33, seed)
        counts = dict(zip(training.label_names, torch.bincount(held_out.labels, minlength=4).tolist(), strict=True))
        assert counts == {"rare": 0, "few": 0, "some": 3, "many": 30}
    training = load_pictures(tmp_path)
    half = training.hold_out(167)
    assert len(half) == len(training) and half.fingerprint != training.fingerprint
    training = load_pictures(tmp_path)
    training.hold_out(330)
    assert sorted(training.labels.tolist()) == [0, 1, 2, 3]  # the last one of each
    with pytest.raises(ValueError, match="331 of its 334 pictures cannot be held out without emptying a class"):
        load_pictures(tmp_path).hold_out(331)


def test_fingerprint_is_that_of_another_process_and_tells_data_apart(class_folders):
    dataset = load_pictures(class_folders)
    assert dataset.fingerprint == "42bc8f7838d593c0"  # as computed by another process
    assert load_pictures(class_folders, in_memory=False).fingerprint == dataset.fingerprint
    assert load_pictures(class_folders, channels=4).fingerprint != dataset.fingerprint
    assert load_pictures(class_folders, resolution=(4, 16)).fingerprint != dataset.fingerprint
    (class_folders / "bee").rename(class_folders / "bug")
    assert load_pictures(class_folders).fingerprint != dataset.fingerprint


def test_on_access_equals_in_memory_bitwise(class_folders):
    kept, decoded = (load_pictures(class_folders, resolution=5, in_memory=m) for m in (None, False))
    assert kept.images is not None and decoded.images is None
    for indices in ([0], [3, 1, 1], list(range(6))):
        assert torch.equal(kept.__getitems__(indices)["images"], decoded.__getitems__(indices)["images"])
    assert torch.equal(kept[4]["images"], decoded[4]["images"])
    assert torch.equal(pickle.loads(pickle.dumps(decoded))[4]["images"], decoded[4]["images"])  # for spawned workers


def identity(batch):
    return batch


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_loader_serves_whole_batches(class_folders, num_workers):
    dataset = load_pictures(class_folders)
    sampler = GlobalBatchSampler(6, 4, seed=0)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=identity, num_workers=num_workers)
    for indices, batch in itertools.islice(zip(sampler, loader, strict=True), 3):
        assert torch.equal(batch["images"], dataset.images[indices])
        assert torch.equal(batch["class_labels"], dataset.labels[indices])


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


def test_names_of_splits_do_not_hide_pictures(tmp_path, arrays):
    for name in ("train/0.png", "plane/0.png", "car/0.png"):
        save(picture(arrays[0]), tmp_path / "vehicles" / name)
    with pytest.raises(ValueError, match=r"2 of its 3 pictures \(car/0.png, for one\) would be ignored.*train/0.png"):
        load_pictures(tmp_path / "vehicles")


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
    with pytest.raises(ValueError, match="name one of image, note, words with --caption_column"):
        load_pictures(tmp_path / "csv", require_captions=True)

    (tmp_path / "jsonl" / "metadata.jsonl").write_text("\n".join(lines).replace("file_name", "photo_file_name"))
    assert load_pictures(tmp_path / "jsonl").captions == texts

    (tmp_path / "jsonl" / "metadata.jsonl").write_text("\n".join(lines[:4]))
    with pytest.warns(UserWarning, match="2 pictures have no line in its metadata"):
        assert len(load_pictures(tmp_path / "jsonl")) == 4

    images = [coded(picture(array)) for array in arrays[:2]]
    several = rows(images, captions=(datasets.List(datasets.Value("string")), [["a", "b"], ["c"]]))
    assert load_pictures(several).captions == [["a", "b"], ["c"]]
    missing = rows(images, text=(datasets.Value("string"), ["a", None]))
    assert load_pictures(missing).captions is None
    with pytest.raises(ValueError, match="1 of the 2 pictures .* no caption in 'text', row 1"):
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
    with pytest.raises(ValueError, match="'score' of the data set holds float32, not classes"):
        load_pictures(dataset, label_column="score")
    with pytest.raises(
        ValueError, match="label_column: 'kid' is no column of the data set; it has image, kind, digit"
    ):
        load_pictures(dataset, label_column="kid")

    assert load_pictures(rows(images, label=(number, [1, 0, 1, 0]))).label_names == ["0", "1"]
    two = {key: (datasets.ClassLabel(names=["a", "b"]), [0, 1, 1, 0]) for key in ("coarse", "fine")}
    assert load_pictures(rows(images, **two)).labels is None
    assert load_pictures(rows(images, **two), label_column="fine").labels.tolist() == [0, 1, 1, 0]

    # A class that a split lacks keeps its number there.
    splits = datasets.DatasetDict(train=dataset, test=dataset.select([0]))
    loaded = load_pictures(splits, split="test", label_column="kind")
    assert loaded.labels.tolist() == [2] and loaded.label_names == ["apple", "fig", "pear"]


@pytest.mark.parametrize("feature", [datasets.ClassLabel(names=["a", "b"]), datasets.Value("int64")])
def test_unlabelled_pictures(arrays, feature):
    dataset = rows([coded(picture(array)) for array in arrays[:3]], label=(feature, [0, -1, None]))
    assert load_pictures(dataset).labels is None
    with pytest.raises(ValueError, match=r"2 of the 3 pictures .* have no label in 'label' \(-1 or none\)"):
        load_pictures(dataset, require_labels=True)


def test_image_column(arrays):
    images = [coded(picture(array)) for array in arrays[:2]]
    both = rows(images, mask=(datasets.Image(), images[::-1]))
    with pytest.raises(ValueError, match=r"2 of its columns \(image, mask\).*--image_column"):
        load_pictures(both)
    assert torch.equal(load_pictures(both, image_column="mask").images, chw(arrays[[1, 0]]))
    plain = datasets.Dataset.from_dict({"png": [image["bytes"] for image in images], "id": [0, 1]})
    assert torch.equal(load_pictures(plain, image_column="png").images, chw(arrays[:2]))
    with pytest.raises(ValueError, match="image_column: 'id' of the data set holds no pictures"):
        load_pictures(plain, image_column="id")


def test_missing_and_empty_places(tmp_path):
    for bad in ("./nowhere", str(tmp_path / "nowhere"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no such folder or file here"):
            load_pictures(bad)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no data set in there that could be read.*it should hold pictures"):
        load_pictures(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="no data set in there that could be read"):
        load_pictures(tmp_path / "broken")
    (tmp_path / "pictures.zip").write_text("")
    with pytest.raises(ValueError, match="not of parquet"):
        load_pictures(tmp_path / "pictures.zip")
    (tmp_path / "a[1]").mkdir()
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


def test_shapes():
    shapes = ShapesDataset(num_images=5, resolution=(16, 24), num_objects=2, label=None)
    dataset = load_pictures(shapes)
    assert torch.equal(dataset.images, chw(np.stack([np.asarray(item["image"]) for item in shapes])))
    assert dataset.labels is None and dataset.captions == [item["caption"] for item in shapes]
    with pytest.raises(ValueError, match="no labels; draw them with label='shape'"):
        load_pictures(shapes, require_labels=True)
    with pytest.raises(ValueError, match="no 'validation'; it has 'train', 'test'"):
        load_pictures("shapes", split="validation")
    named = load_pictures("shapes", split="test", resolution=16, channels=1)
    assert tuple(named.images.shape) == (2048, 1, 16, 16) and named.label_names == ShapesDataset().label_names
    assert named[3]["class_labels"] == ShapesDataset(seed=1)[3]["label"]


# -------------------------------------------------------------------------------------------------------- pictures


def load(images, **kwargs):
    return load_pictures(rows(images), **kwargs)


def test_channels_are_the_fewest_that_lose_nothing():
    grey, grey_alpha, rgb, rgba = (pixels(1, channels=c, seed=c)[0] for c in (1, 2, 3, 4))
    one, two, three, four = (coded(picture(array)) for array in (grey, grey_alpha, rgb, rgba))
    opaque = np.full_like(grey, 255)
    as_rgb = grey.repeat(3, -1)
    for images, expected in (
        ([one], [grey]),
        ([two], [grey_alpha]),
        ([three], [rgb]),
        ([four], [rgba]),
        ([one, three], [as_rgb, rgb]),
        ([one, two], [np.concatenate([grey, opaque], -1), grey_alpha]),
        ([two, three], [np.concatenate([grey_alpha[..., [0, 0, 0, 1]]], -1), np.concatenate([rgb, opaque], -1)]),
    ):
        assert torch.equal(load(images).images, chw(np.stack(expected)))
    assert torch.equal(
        load([one, three], channels=1).images[1, 0], torch.from_numpy(np.array(picture(rgb).convert("L")))
    )
    with pytest.raises(ValueError, match="channels: 5 is none of 1"):
        load([one], channels=5)


def test_alpha_that_is_given_up_is_laid_on_white():
    rgba = pixels(1, channels=4)[0]
    rgba[0, 0, 3], rgba[0, 1, 3] = 0, 255
    rgb = load([coded(picture(rgba))], channels=3).images[0]
    assert rgb[:, 0, 0].tolist() == [255] * 3 and rgb[:, 0, 1].tolist() == rgba[0, 1, :3].tolist()
    alpha = rgba[..., 3:] / 255
    assert np.abs(rgb.movedim(0, -1).numpy() - (alpha * rgba[..., :3] + (1 - alpha) * 255)).max() <= 1


def test_palettes_bilevel_transparent_color_and_cmyk():
    rgb = pixels(1)[0]
    indexed = picture(rgb).quantize(16)
    dataset = load([coded(indexed)])
    assert dataset.channels == 3 and torch.equal(dataset.images[0], chw(np.asarray(indexed.convert("RGB"))))

    dataset = load([coded(indexed, transparency=3)])
    assert dataset.channels == 4
    assert torch.equal(dataset.images[0, 3] == 0, torch.from_numpy(np.asarray(indexed) == 3))

    greys = Image.fromarray(pixels(1, channels=1)[0, ..., 0])
    grey_palette = greys.copy()
    grey_palette.putpalette([value for value in range(256) for _ in range(3)])
    dataset = load([coded(grey_palette)])
    assert grey_palette.mode == "P" and dataset.channels == 1
    assert torch.equal(dataset.images[0, 0], torch.from_numpy(np.array(greys)))

    bilevel = greys.convert("1")
    dataset = load([coded(bilevel)])
    assert dataset.channels == 1 and torch.equal(dataset.images[0, 0] == 255, torch.from_numpy(np.array(bilevel)))

    color = tuple(rgb[2, 5].tolist())
    dataset = load([coded(picture(rgb), transparency=color)])
    assert dataset.channels == 4 and dataset.images[0, 3, 2, 5] == 0 and dataset.images[0, 3, 0, 0] == 255

    cmyk = coded(picture(rgb).convert("CMYK"), "TIFF")
    dataset = load([cmyk])
    assert dataset.channels == 3
    assert torch.equal(dataset.images[0], chw(np.asarray(picture(rgb).convert("CMYK").convert("RGB"))))


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_exif_orientation_is_applied(format):
    array = np.zeros((16, 24, 3), dtype=np.uint8)
    array[:8, :12] = 255  # the upper left quarter
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        entry = coded(picture(array), format, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(entry["bytes"])))
        dataset = load([entry])
        assert dataset.resolution == upright.size[::-1] == ((16, 24) if orientation < 5 else (24, 16))
        assert torch.equal(dataset.images[0], chw(np.asarray(upright)))
    assert dataset.images[0, 0, -4, 4] > 250 and dataset.images[0, 0, 4, 4] < 5  # 8: a quarter turn to the left


def test_resolution_is_antialiased_and_cropped_to_the_middle():
    square, wide = pixels(1, 48, 48)[0], pixels(1, 32, 64)[0]
    with pytest.raises(ValueError, match=r"differ in size, from 32x48 to 48x64 \(height x width\).*--resolution 64"):
        load([coded(picture(square)), coded(picture(wide))])
    expected = [
        picture(square).resize((16, 16), Image.Resampling.LANCZOS),
        picture(wide).resize((32, 16), Image.Resampling.LANCZOS).crop((8, 0, 24, 16)),
    ]
    both = [coded(picture(square)), coded(picture(wide))]
    assert torch.equal(load(both, resolution=16).images, chw(np.stack(expected)))
    # One white column in 16 leaves a sixteenth of its light; without antialiasing it would be all or nothing.
    stripes = np.zeros((64, 64, 1), dtype=np.uint8)
    stripes[:, ::16] = 255
    assert abs(load([coded(picture(stripes))], resolution=4).images.float().mean() - 255 / 16) < 1
    for resolution in ("12x20", (12, 20)):
        assert load(both, resolution=resolution).images.shape[2:] == (12, 20)
    assert load([coded(picture(square))], resolution="96").images.shape[2:] == (96, 96)
    for bad in (0, "12x", "big", (1, 2, 3), "-4"):
        with pytest.raises(ValueError, match="is neither a number of pixels nor HEIGHTxWIDTH"):
            load(both, resolution=bad)


def test_large_jpeg_is_decoded_in_reduced_size_without_harm():
    smooth = picture(pixels(1, 6, 8)[0]).resize((1024, 768), Image.Resampling.BICUBIC)
    entry = coded(smooth, "JPEG", quality=95)
    full = Image.open(io.BytesIO(entry["bytes"])).convert("RGB")
    expected = ImageOps.fit(full, (32, 32), Image.Resampling.LANCZOS)
    error = load([entry], resolution=32).images[0].float() - chw(np.asarray(expected)).float()
    assert error.abs().max() <= 4


def test_unusable_pictures_are_named_before_training(class_folders, arrays):
    (class_folders / "ant" / "empty.png").write_bytes(b"")  # known by its header
    truncated = (class_folders / "bee" / "2.png").read_bytes()[:-60]  # by its pixels
    (class_folders / "bee" / "truncated.png").write_bytes(truncated)
    both = (
        r"2 of the 8 pictures .* remove them: \S*ant/empty.png: no picture that Pillow knows; \S*bee/truncated.png: "
    )
    with pytest.raises(ValueError, match=both):
        load_pictures(class_folders)
    (class_folders / "ant" / "empty.png").unlink()
    for in_memory in (True, False):
        with pytest.raises(ValueError, match=r"1 of the 7 pictures .* remove it: \S*bee/truncated.png: .*truncated"):
            load_pictures(class_folders, in_memory=in_memory)

    good, jpeg = coded(picture(arrays[0])), coded(picture(pixels(1, 64, 64)[0]), "JPEG")["bytes"]
    half = {"bytes": jpeg[: len(jpeg) // 2], "path": None}
    with pytest.raises(ValueError, match="1 of the 2 pictures .*: row 1 of the data set: .*truncated"):
        load([good, half], resolution=8)
    with pytest.raises(ValueError, match="row 1 of the data set: the row holds no picture"):
        load([good, None])
    with pytest.raises(ValueError, match=r"^9 of the 10 .*row 1 of .*row 5 of [^;]*; and 4 more$"):
        load([good, *[{"bytes": b"x", "path": None}] * 9])


@pytest.mark.parametrize("in_memory", [True, False])
def test_unusable_pictures_are_left_out_on_request(class_folders, arrays, in_memory):
    whole = load_pictures(class_folders, in_memory=in_memory)
    frames = [picture(array) for array in arrays]
    save(frames[0], class_folders / "ant" / "animated.gif", save_all=True, append_images=frames[1:])
    (class_folders / "ant" / "empty.png").write_bytes(b"")
    truncated = (class_folders / "bee" / "2.png").read_bytes()[:-60]
    (class_folders / "bee" / "truncated.png").write_bytes(truncated)
    dataset = load_pictures(class_folders, in_memory=in_memory, on_bad_image="skip")
    assert dataset.fingerprint == whole.fingerprint
    assert torch.equal(dataset.__getitems__(range(6))["images"], whole.__getitems__(range(6))["images"])
    assert torch.equal(dataset.labels, whole.labels)
    reasons = [reason.split("/")[-1] for reason in dataset.skipped]
    assert reasons[0] == "animated.gif: it has 6 frames; save the one that you want as a picture of its own"
    assert reasons[1] == "empty.png: no picture that Pillow knows"
    assert reasons[2].startswith("truncated.png: ") and len(reasons) == 3


def test_rows_left_out_are_counted_as_the_data_set_counts_them(arrays):
    good, jpeg = coded(picture(arrays[0])), coded(picture(pixels(1, 64, 64)[0]), "JPEG")["bytes"]
    half = {"bytes": jpeg[: len(jpeg) // 2], "path": None}
    words = {"text": (datasets.Value("string"), list("abcd"))}
    data = rows([None, good, half, good], **words)
    dataset = load_pictures(data, resolution=8, on_bad_image="skip")
    assert [reason.split(":")[0] for reason in dataset.skipped] == ["row 0 of the data set", "row 2 of the data set"]
    assert dataset.captions == ["b", "d"]
    small = [coded(picture(array)) for array in arrays]
    dataset = load_pictures(rows([half, *small]), on_bad_image="skip")  # without a word from the one left out
    assert dataset.resolution == (8, 8) and dataset.where(0) == "row 1 of the data set"
    with pytest.raises(ValueError, match="none of the 2 pictures of the data set can be used: row 0 of"):
        load_pictures(rows([None, half]), resolution=8, on_bad_image="skip")
    with pytest.raises(ValueError, match="on_bad_image: 'ignore' is neither 'error' nor 'skip'"):
        load_pictures(data, on_bad_image="ignore")


def test_a_failing_disk_is_not_taken_for_a_bad_picture(class_folders):
    """Without handles for files, by which nothing is learned about the pictures."""
    dataset = load_pictures(class_folders, in_memory=False, on_bad_image="skip")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            dataset[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_picture_with_others_beside_it_is_taken_and_a_bomb_is_not(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    save(frames[0], tmp_path / "photo.mpo", save_all=True, append_images=frames[1:])
    photo = {"bytes": (tmp_path / "photo.mpo").read_bytes(), "path": None}
    dataset = load_pictures(rows([photo]))
    assert dataset[0]["images"][0].min() > 200 and dataset[0]["images"][2].max() < 50

    bomb = coded(Image.new("L", (8, 8)))  # 50,000 x 50,000 pixels, by its header
    header = b"IHDR" + struct.pack(">II", 50_000, 50_000) + bomb["bytes"][24:29]
    bomb["bytes"] = bomb["bytes"][:12] + header + struct.pack(">I", zlib.crc32(header)) + bomb["bytes"][33:]
    with pytest.raises(ValueError, match="row 1 of the data set: .*decompression bomb"):
        load_pictures(rows([photo, bomb]), resolution=8)


def values(n, channels=3, height=8, width=6):
    """Measurements, `float32` (n, channels, height, width), each channel in units of its own."""
    units = 10.0 ** np.arange(-2, channels - 2)[:, None, None]
    return (np.random.RandomState(0).randn(n, channels, height, width) * units).astype(np.float32)


def in_own_units(dataset, images):
    low, high = (torch.tensor(dataset.value_range[end]).double()[:, None, None] for end in ("low", "high"))
    return low + (high - low) * (images.double() + 1) / 2


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("source", ["npy", "column", "last"])
def test_arrays_of_any_number_of_channels_are_mapped_to_the_range_of_the_models(tmp_path, source, in_memory):
    arrays = values(5, channels=2 if source == "last" else 5)
    if source == "npy":
        for i, array in enumerate(arrays):
            (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
            np.save(tmp_path / "ab"[i % 2] / f"{i}.npy", array.astype(np.float64))
        dataset = load_pictures(tmp_path, in_memory=in_memory)
        arrays = arrays[[0, 2, 4, 1, 3]]
        assert dataset.label_names == ["a", "b"] and dataset.labels.tolist() == [0, 0, 0, 1, 1]
    else:
        shaped = arrays.transpose(0, 2, 3, 1) if source == "last" else arrays
        feature = datasets.Array3D(shaped.shape[1:], "float32")
        rows = datasets.Dataset.from_dict({"field": list(shaped)}, features=datasets.Features({"field": feature}))
        dataset = load_pictures(rows, in_memory=in_memory)
    images = dataset.__getitems__(range(5))["images"]
    assert (dataset.channels, dataset.resolution, images.dtype) == (arrays.shape[1], (8, 6), torch.float32)
    low, high = arrays.min((0, 2, 3)).tolist(), arrays.max((0, 2, 3)).tolist()
    assert dataset.value_range == {"low": low, "high": high}
    assert torch.equal(images.amin((0, 2, 3)), -torch.ones(dataset.channels))
    assert torch.equal(images.amax((0, 2, 3)), torch.ones(dataset.channels))
    for channel, unit in enumerate(np.abs(arrays).max((0, 2, 3))):
        error = in_own_units(dataset, images)[:, channel] - torch.from_numpy(arrays[:, channel])
        assert error.abs().max() < 1e-6 * unit
    assert torch.equal(to_model_range(dataset[3]["images"]), images[3])


@pytest.mark.parametrize("name, mode", [("deep.png", "I;16"), ("deep.tiff", "I;16"), ("deep.tiff", "F")])
def test_grey_pictures_of_more_than_8_bits_keep_their_values(tmp_path, name, mode):
    levels = np.arange(0, 64 * 1000, 1000).reshape(8, 8)
    save(Image.fromarray(levels.astype(np.uint16 if mode == "I;16" else np.float32)), tmp_path / name)
    dataset = load_pictures(tmp_path)
    assert dataset.value_range == {"low": [0.0], "high": [63000.0]}
    assert torch.equal(in_own_units(dataset, dataset[0]["images"]).round(), torch.from_numpy(levels)[None].double())


def test_measured_values_are_scaled_in_size_without_rounding(tmp_path):
    ramp = np.linspace(0, 1e-3, 64, dtype=np.float32)
    np.save(tmp_path / "ramp.npy", np.tile(ramp, (64, 1)))
    dataset = load_pictures(tmp_path, resolution=16)
    image = in_own_units(dataset, dataset[0]["images"])[0]
    middle = ramp.reshape(16, 4).mean(axis=1)
    np.testing.assert_allclose(image[8, 3:-3], middle[3:-3], rtol=1e-3)  # the filter rings at the edges


def test_measured_values_that_cannot_be_used(tmp_path):
    for name, array in {
        "good": np.zeros((4, 4)), "infinite": np.full((4, 4), np.inf), "deep": np.zeros((2, 2, 4, 4)),
        "words": np.array([["a"]]), "objects": np.array([[None]]),
    }.items():  # fmt: skip
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    dataset = load_pictures(tmp_path, on_bad_image="skip")
    reasons = {Path(line.split(": ")[0]).stem: line for line in dataset.skipped}
    assert len(dataset) == 1 and sorted(reasons) == ["deep", "infinite", "objects", "words"]
    assert "not finite" in reasons["infinite"] and "(2, 2, 4, 4)" in reasons["deep"] and "<U1" in reasons["words"]

    np.save(tmp_path / "more.npy", np.zeros((3, 4, 4)))
    with pytest.raises(
        ValueError, match=r"several kinds: \S*good.npy of 1 channels, \S*more.npy of 3 channels of meas"
    ):
        load_pictures(tmp_path, on_bad_image="skip")
    with pytest.raises(ValueError, match="it holds measured values of 1 channels, which stay as they are; .* made 3"):
        load_pictures(rows([coded(Image.new("I;16", (4, 4)))]), channels=3)
    with pytest.raises(ValueError, match="several kinds: row 1 .* of 8 bits, row 0 .* of 1 channels of measured"):
        load_pictures(rows([coded(Image.new("I;16", (4, 4))), coded(Image.new("L", (4, 4)))]))
    save(Image.new("L", (4, 4)), tmp_path / "picture.png")
    with pytest.raises(ValueError, match="both arrays, .*.npy, and pictures"):
        load_pictures(tmp_path)


def test_colours_of_16_bits_are_refused(arrays):
    eight = coded(picture(arrays[0]))["bytes"]
    header = eight[12:24] + b"\x10" + eight[25:29]  # 16 bits instead of 8
    sixteen = eight[:12] + header + struct.pack(">I", zlib.crc32(header)) + eight[33:]
    with pytest.raises(
        ValueError, match="colours of 16 bits, of which Pillow reads 8; save it with 8, or as an array"
    ):
        load_pictures(rows([{"bytes": sixteen, "path": None}]))


def test_a_picture_is_decoded_anew_when_its_file_has_changed(class_folders, arrays):
    """In place, with the size and, at first, the time of before."""
    file = class_folders / "ant" / "0.png"
    stat, old = file.stat(), load_pictures(class_folders, in_memory=False)
    content = file.read_bytes()
    file.write_bytes(b"x" * len(content))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_pictures(class_folders, in_memory=False).fingerprint == old.fingerprint  # as nothing was decoded
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="ant/0.png: no picture that Pillow knows"):
        load_pictures(class_folders, in_memory=False)
    file.write_bytes(content)
    assert load_pictures(class_folders, in_memory=False).fingerprint == old.fingerprint
    assert load_pictures(class_folders, resolution=4, in_memory=False).fingerprint != old.fingerprint


def test_a_damaged_or_unwritable_cache_costs_nothing(class_folders):
    fingerprint = load_pictures(class_folders).fingerprint
    cache = Path(datasets.config.HF_DATASETS_CACHE, "hf_genmod")
    (file,) = cache.iterdir()
    file.write_text("{")
    assert load_pictures(class_folders, in_memory=False).fingerprint == fingerprint
    shutil.rmtree(cache)
    cache.write_text("a file where a folder should be")
    assert load_pictures(class_folders, in_memory=False).fingerprint == fingerprint


def test_a_limit_takes_pictures_at_even_distances(class_folders, arrays):
    assert torch.equal(load_pictures(class_folders, limit=3).images, chw(arrays)[::2])
    assert torch.equal(load_pictures(class_folders, limit=100).images, chw(arrays))
    drawn = ShapesDataset(10, resolution=16)
    some, whole = (load_pictures(drawn, limit=limit) for limit in (4, None))
    assert torch.equal(some.images, whole.images[[0, 2, 5, 7]])
    assert torch.equal(some.labels, whole.labels[[0, 2, 5, 7]])


def test_file_that_vanishes_is_named(class_folders):
    dataset = load_pictures(class_folders, in_memory=False)
    (class_folders / "ant" / "0.png").unlink()
    with pytest.raises(ValueError, match="ant/0.png: No such file"):
        dataset[0]


def test_model_range():
    every = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(every)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8), every)


# --------------------------------------------------------------------------------------------- order and randomness


def test_dataset_of_bare_pictures(arrays):
    dataset = PictureDataset([picture(array) for array in arrays], "mine", in_memory=False)
    assert torch.equal(dataset.__getitems__(range(6))["images"], chw(arrays))
