"""Arrays are one image or many, as their axes say, or are refused in a sentence that names the flag."""

import itertools
import shutil
import warnings

import datasets
import numpy as np
import pytest
import torch
from made_images import in_own_units

from hf_genmod.data.loading import load_pictures


def distinct(*shape, dtype=np.float32):
    """Different values everywhere, so that no two readings of the axes agree."""
    return np.random.RandomState(0).permutation(np.prod(shape)).reshape(shape).astype(dtype)


def images_of(dataset):
    return in_own_units(dataset, dataset.__getitems__(range(len(dataset)))["images"])


LONE = [  # the shape of the only array, its axes
    ((7, 9), "HW"),
    ((9, 7, 3), "HWC"),
    ((6, 24), "HW"),
    ((1, 64, 64), "CHW"),
    ((1, 9, 80), "CHW"),
    ((1, 2, 2), "CHW"),
    ((500, 9, 7), "NHW"),
    ((500, 7, 9), "NHW"),
    ((40, 9, 9), "NHW"),
    ((6, 9, 7, 1), "NHWC"),
    ((6, 9, 9, 3), "NHWC"),
    ((6, 9, 7, 5), "NHWC"),
    ((6, 3, 9, 7), "NCHW"),
    ((6, 1, 9, 9), "NCHW"),
    ((6, 6, 9, 7), "NCHW"),
    ((2, 2, 3, 3), "NCHW"),
]


def expected(array, axes):
    """All images of an array as (N, C, H, W)."""
    for axis in set("NC") - set(axes):
        array, axes = array[None], axis + axes
    return torch.from_numpy(array.transpose([axes.index(axis) for axis in "NCHW"]).astype(np.float64))


@pytest.mark.parametrize("shape, axes", LONE)
def test_the_images_of_one_array(tmp_path, shape, axes):
    array = distinct(*shape)
    np.save(tmp_path / "a.npy", array)
    for place in (tmp_path, tmp_path / "a.npy"):
        dataset = load_pictures(place, in_memory=False)
        assert dataset.resolution == (shape[axes.index("H")], shape[axes.index("W")])
        assert torch.allclose(images_of(dataset), expected(array, axes), atol=1e-2)


@pytest.mark.parametrize(
    "shape, choices",
    [
        ((3, 9, 7), "CHW or --array_axes NHW"),
        ((9, 9, 9), "CHW or --array_axes NHW"),
        ((32, 30, 20), "HWC or --array_axes NHW"),
        ((6, 3, 9, 3), "NHWC or --array_axes NCHW"),
        ((6, 4, 4, 4), "NHWC or --array_axes NCHW"),
        ((8, 4, 4), "HWC or --array_axes CHW or --array_axes NHW"),
    ],
)
def test_axes_in_doubt_are_asked_for(tmp_path, shape, choices):
    array = distinct(*shape)
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(
        ValueError, match=r"a.npy: .*\(" + ", ".join(map(str, shape)) + rf"\).* --array_axes {choices} "
    ):
        load_pictures(tmp_path)
    for axes in choices.split(" or --array_axes "):
        dataset = load_pictures(tmp_path, array_axes=axes)
        assert torch.allclose(images_of(dataset), expected(array, axes), atol=1e-2)


@pytest.mark.parametrize("shape", [(600, 49), (49, 600), (5, 21), (150, 64), (80, 300)])
@pytest.mark.parametrize("count", [1, 2])
def test_flat_images_are_not_taken_for_one(tmp_path, shape, count):
    for i in range(count):
        np.save(tmp_path / f"{i}.npy", distinct(*shape))
    message = rf"0.npy: values of the shape \({shape[0]}, {shape[1]}\) .*; give --array_axes HW .* reshape"
    with pytest.raises(ValueError, match=message):
        load_pictures(tmp_path)
    dataset = load_pictures(tmp_path, array_axes="HW")
    assert dataset.resolution == shape and len(dataset) == count


@pytest.mark.parametrize("shape, count", [((8, 60), 10), ((70, 70), 2), ((50, 60), 2)])
def test_arrays_of_two_axes_are_images_where_there_are_many_or_they_are_square_or_small(tmp_path, shape, count):
    for i in range(count):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        np.save(tmp_path / "ab"[i % 2] / f"{i}.npy", distinct(*shape))
    dataset = load_pictures(tmp_path)
    assert (len(dataset), dataset.resolution, dataset.label_names) == (count, shape, ["a", "b"])


@pytest.mark.parametrize("shape", [(5, 9, 7), (9, 7, 5), (3, 9, 200), (9, 9, 9)])
def test_arrays_of_three_axes_are_images_where_a_folder_has_several(tmp_path, shape):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", distinct(*shape))
    dataset = load_pictures(tmp_path)
    axes = "HWC" if shape[2] < shape[0] else "CHW"
    assert len(dataset) == 3 and torch.allclose(images_of(dataset)[2], expected(distinct(*shape), axes)[0], atol=1e-2)


@pytest.mark.parametrize("parts", [1, 2])
def test_class_folders_of_arrays_with_many_images(tmp_path, parts):
    arrays, names = distinct(4, 60, 9, 7), ["ant", "bee"]
    for (name, part), array in zip(itertools.product(names, range(parts)), arrays, strict=False):
        (tmp_path / name).mkdir(exist_ok=True)
        np.save(tmp_path / name / f"{part}.npy", array)
    dataset = load_pictures(tmp_path)
    assert dataset.label_names == names and dataset.labels.tolist() == [0] * 60 * parts + [1] * 60 * parts
    expected = torch.from_numpy(arrays[: 2 * parts]).flatten(0, 1).double()
    assert torch.allclose(images_of(dataset)[:, 0], expected, atol=1e-2)


def test_an_array_is_not_read_as_a_whole_for_each_image(tmp_path):
    """A file of 400 gigabytes, of which only the first and last images are looked at."""
    shape = (10**5, 1024, 1024)
    np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.float32, shape=shape).flush()
    dataset = load_pictures(tmp_path, limit=2)
    assert len(dataset) == 2 and dataset.where(1).endswith("a.npy[50000]")


def test_a_bad_image_of_an_array_is_named(tmp_path):
    array = distinct(60, 9, 7)
    array[17, 3, 3] = np.nan
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"1 of 60 images .*a.npy\[17\]: some of its values are not finite"):
        load_pictures(tmp_path)
    dataset = load_pictures(tmp_path, on_bad_image="skip")
    assert len(dataset) == 59 and torch.allclose(images_of(dataset)[17, 0], torch.from_numpy(array[18]).double())


@pytest.mark.parametrize("dtype", ["uint8", "bool", "float16", ">i2", "<u4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_values_of_every_type_and_order(tmp_path, dtype, order):
    array = (distinct(60, 5, 6) % 251 % (2 if dtype == "bool" else 256)).astype(dtype)
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))
    assert torch.allclose(
        images_of(load_pictures(tmp_path))[:, 0], torch.from_numpy(array.astype(np.float64)), atol=1e-3
    )


def test_what_is_no_array_of_numbers(tmp_path):
    arrays = {
        "objects": np.array([[None]]),
        "words": np.array([["a"]]),
        "complex": np.ones((4, 4), complex),
        "phases": np.ones((4, 5, 6), complex),
        "empty": np.ones((0, 4, 4)),
        "row": np.ones(4),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    np.save(tmp_path / "long.npy", np.ones((4, 4)))
    content = (tmp_path / "long.npy").read_bytes()
    for length in (0, 8, 40, 150):
        (tmp_path / f"cut{length}.npy").write_bytes(content[:length])
    (tmp_path / "long.npy").unlink()
    (tmp_path / "pointer.npy").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    np.save(tmp_path / "sound.npy", np.ones((4, 4)))
    reasons = {
        reason.split(".npy: ")[0].split("/")[-1]: reason
        for reason in load_pictures(tmp_path, on_bad_image="skip").skipped
    }
    cut = {f"cut{length}" for length in (0, 8, 40, 150)}
    assert set(reasons) == {*arrays, "pickle", "pointer", *cut}
    assert all("the file is cut off; copy" in reasons[name] for name in cut) and "which is empty" in reasons["empty"]
    assert all("of the type" in reasons[name] for name in ("complex", "phases", "words"))
    assert "numbers" in reasons["objects"] and "numbers" in reasons["pickle"] and "git lfs pull" in reasons["pointer"]
    assert "complex128" in reasons["complex"] and "(4,) holds no image; if these are labels" in reasons["row"]
    np.savez(tmp_path / "a.npz", images=np.ones((4, 4)))
    with pytest.raises(ValueError, match="a.npz: a zip archive, as .npz is one; save the array .* as .npy"):
        load_pictures(tmp_path / "a.npz")


@pytest.mark.parametrize("name, told", [("phases", "of the type complex64; save one of real"), ("empty", "is empty")])
@pytest.mark.parametrize("axes", [None, "NHW"])
def test_an_array_alone_is_not_blamed_for_its_shape(tmp_path, name, told, axes):
    np.save(tmp_path / "a.npy", np.ones((5, 40, 3), "c8") if name == "phases" else np.ones((0, 16, 16)))
    with pytest.raises(ValueError, match=f"1 of 1 image .* an array .*{told}"):
        load_pictures(tmp_path, array_axes=axes)


@pytest.mark.parametrize("shape, axes", [((60, 9, 7), "NCHW"), ((60, 9, 7), "NHWC"), ((50, 784), "NHW")])
def test_axes_of_many_images_that_do_not_fit(tmp_path, shape, axes):
    np.save(tmp_path / "a.npy", distinct(*shape))
    told = (
        rf"a.npy as {axes}: an array of shape \({', '.join(map(str, shape))}\) .* not \({', '.join(axes)}\); correct"
    )
    with pytest.raises(ValueError, match=told):
        load_pictures(tmp_path, array_axes=axes)


@pytest.mark.parametrize("folders", [("", ""), ("train/", "test/")])
def test_all_arrays_of_three_axes_are_many_images_where_one_can_be_nothing_else(tmp_path, folders):
    for folder, name, count in zip(folders, ("train", "test"), (100, 10), strict=True):
        (tmp_path / folder).mkdir(exist_ok=True)
        np.save(tmp_path / folder / f"{name}.npy", distinct(count, 28, 28))
    for split, count in (("train", 100), ("test", 10)):
        dataset = load_pictures(tmp_path, split=split)
        assert (len(dataset), dataset.channels) == (count, 1)


@pytest.mark.parametrize("count", [2, 10])
def test_images_of_many_channels_may_be_many_of_one(tmp_path, count):
    for i in range(count):
        np.save(tmp_path / f"{i}.npy", distinct(6, 16, 16))
    with warnings.catch_warnings(record=True) as caught:
        assert load_pictures(tmp_path).channels == 6
    (told,) = [str(warning.message) for warning in caught]
    assert "0.npy: its shape (6, 16, 16) is taken for one image" in told
    assert told.endswith("; give --array_axes CHW if it is, or NHW if it holds 6 images")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_pictures(tmp_path, array_axes="CHW").channels == 6
    assert len(load_pictures(tmp_path, array_axes="NHW")) == 6 * count


def test_axes_that_do_not_fit(tmp_path):
    np.save(tmp_path / "a.npy", distinct(60, 9, 7))
    with pytest.raises(ValueError, match=r"a.npy as HW: an array of shape \(60, 9, 7\) .* not \(H, W\)"):
        load_pictures(tmp_path, array_axes="HW")
    with pytest.raises(ValueError, match="array_axes: 'WH' is none of HW, HWC, CHW, NHW, NHWC, NCHW"):
        load_pictures(tmp_path, array_axes="WH")
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(ValueError, match="array_axes: .* is not read from .npy files"):
        load_pictures(tmp_path, array_axes="HW")


@pytest.mark.parametrize("dtype, least", [("i4", 2**30), ("u4", 2**31), ("i8", 2**60), ("u8", 2**63), ("f8", 1e9)])
@pytest.mark.parametrize("axes", ["HW", "HWC"])
def test_values_that_float32_does_not_hold_apart_are_refused(tmp_path, dtype, least, axes):
    array = (np.array(least, dtype) + distinct(9, 7, dtype=dtype)).astype(dtype)
    if axes == "HWC":  # a channel of other values hides nothing
        array = np.stack([array, np.zeros_like(array)], axis=-1)
    np.save(tmp_path / "0.npy", array)
    with pytest.raises(ValueError, match=r"0.npy: its values, \d.* are too close together for float32; subtract"):
        load_pictures(tmp_path)
    np.save(tmp_path / "0.npy", array - array.min(axis=(0, 1)))
    assert load_pictures(tmp_path).value_range["high"][0] == 62


@pytest.mark.parametrize("array", [np.full((4, 4), 0.1), np.linspace(0, 2**31, 16).reshape(4, 4).astype("i8")])
def test_values_that_float32_rounds_a_little_are_kept(tmp_path, array):
    np.save(tmp_path / "0.npy", array)
    assert load_pictures(tmp_path).value_range["high"] == [np.float32(array.max())]


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint32"])
def test_columns_of_arrays_are_read_in_their_type(dtype):
    array = distinct(9, 7, dtype=dtype) + np.array(2 ** (31 if dtype == "uint32" else 40), dtype)
    features = datasets.Features({"image": datasets.Array2D((9, 7), dtype)})
    with pytest.raises(ValueError, match="row 0 of .*: its values, .* are too close together for float32"):
        load_pictures(datasets.Dataset.from_dict({"image": [array]}, features))
    less = datasets.Dataset.from_dict({"image": [distinct(9, 7).astype(dtype)]}, features)
    assert load_pictures(less).value_range["high"] == [62]


def test_arrays_of_several_types_are_named(tmp_path):
    for name, dtype in (("0", "uint8"), ("1", "float64"), ("2", "float32"), ("3", "uint8")):
        np.save(tmp_path / f"{name}.npy", distinct(9, 9, dtype=dtype))
    told = r"arrays of several types \(uint8 in .*0.npy, float in .*1.npy\), whose values count alike; save all in one"
    with pytest.warns(UserWarning, match=told):
        load_pictures(tmp_path)


def test_values_whose_range_is_not_finite_are_refused(tmp_path):
    for most, is_kept in ((9e36, True), (-9e36, True), (1.1e37, False), (-1.1e37, False), (1e39, False)):
        np.save(tmp_path / "0.npy", np.array([[0, most]]))
        if is_kept:
            value_range = load_pictures(tmp_path).value_range
            assert value_range["low" if most < 0 else "high"] == [np.float32(most)]
        else:
            with pytest.raises(ValueError, match="not finite, or beyond ±1e37; replace them"):
                load_pictures(tmp_path)
