"""Images of one size, in memory or decoded on access, with what goes along."""

import itertools
import pickle
import resource

import datasets
import numpy as np
import pytest
import torch
from made_images import chw, coded, in_own_units, load, picture, pixels, rows, save, values
from PIL import Image

from hf_genmod.data.loading import load_pictures
from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.data.randomness import GlobalBatchSampler
from hf_genmod.data.value_range import to_model_range


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
    with pytest.raises(ValueError, match=f"to hold out {len(training)} images of .* would empty a class"):
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
    with pytest.raises(ValueError, match="to hold out 331 images of its 334 would empty a class"):
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


def test_unusable_pictures_are_named_before_training(class_folders, arrays):
    (class_folders / "ant" / "empty.png").write_bytes(b"")  # known by its header
    truncated = (class_folders / "bee" / "2.png").read_bytes()[:-60]  # by its pixels
    (class_folders / "bee" / "truncated.png").write_bytes(truncated)
    both = r"2 of 8 .* remove them, or .*: \S*ant/empty.png: the file is empty; \S*bee/truncated.png: "
    with pytest.raises(ValueError, match=both):
        load_pictures(class_folders)
    (class_folders / "ant" / "empty.png").unlink()
    for in_memory in (True, False):
        with pytest.raises(ValueError, match=r"1 of 7 images .* remove it, or .*: \S*bee/truncated.png: .*truncated"):
            load_pictures(class_folders, in_memory=in_memory)

    good, jpeg = coded(picture(arrays[0])), coded(picture(pixels(1, 64, 64)[0]), "JPEG")["bytes"]
    half = {"bytes": jpeg[: len(jpeg) // 2], "path": None}
    with pytest.raises(ValueError, match="1 of 2 images .*: row 1 of the data set: .*truncated"):
        load([good, half], resolution=8)
    with pytest.raises(ValueError, match="row 1 of the data set: the row holds no image"):
        load([good, None])
    with pytest.raises(ValueError, match=r": 9 of 10 .*row 1 of .*row 5 of [^;]*; and 4 more$"):
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
    assert reasons[0] == "animated.gif: it has 6 frames; save the one that you want as an image of its own"
    assert reasons[1] == "empty.png: the file is empty"
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
    with pytest.raises(ValueError, match="the data set: no image can be used, of 2: row 0 of"):
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


def test_measured_values_are_scaled_in_size_without_rounding(tmp_path):
    ramp = np.linspace(0, 1e-3, 64, dtype=np.float32)
    np.save(tmp_path / "ramp.npy", np.tile(ramp, (64, 1)))
    dataset = load_pictures(tmp_path, resolution=16)
    image = in_own_units(dataset, dataset[0]["images"])[0]
    middle = ramp.reshape(16, 4).mean(axis=1)
    np.testing.assert_allclose(image[8, 3:-3], middle[3:-3], rtol=1e-3)  # the filter rings at the edges


def test_file_that_vanishes_is_named(class_folders):
    dataset = load_pictures(class_folders, in_memory=False)
    (class_folders / "ant" / "0.png").unlink()
    with pytest.raises(ValueError, match="ant/0.png: No such file"):
        dataset[0]


def test_dataset_of_bare_pictures(arrays):
    dataset = PictureDataset([picture(array) for array in arrays], "mine", in_memory=False)
    assert torch.equal(dataset.__getitems__(range(6))["images"], chw(arrays))
