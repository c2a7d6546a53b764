"""Images of every kind are decoded faithfully, or refused in a sentence."""

import gc
import io
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from made_images import chw, coded, in_own_units, load, needs_avif, picture, pixels, rows, save, tiff
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from hf_genmod.data.loading import load_pictures


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


def test_large_jpeg_is_decoded_in_reduced_size_without_harm():
    smooth = picture(pixels(1, 6, 8)[0]).resize((1024, 768), Image.Resampling.BICUBIC)
    entry = coded(smooth, "JPEG", quality=95)
    full = Image.open(io.BytesIO(entry["bytes"])).convert("RGB")
    expected = ImageOps.fit(full, (32, 32), Image.Resampling.LANCZOS)
    error = load([entry], resolution=32).images[0].float() - chw(np.asarray(expected)).float()
    assert error.abs().max() <= 4


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


@pytest.mark.parametrize("name, mode", [("deep.png", "I;16"), ("deep.tiff", "I;16"), ("deep.tiff", "F")])
def test_grey_pictures_of_more_than_8_bits_keep_their_values(tmp_path, name, mode):
    levels = np.arange(0, 64 * 1000, 1000).reshape(8, 8)
    save(Image.fromarray(levels.astype(np.uint16 if mode == "I;16" else np.float32)), tmp_path / name)
    dataset = load_pictures(tmp_path)
    assert dataset.value_range == {"low": [0.0], "high": [63000.0]}
    assert torch.equal(in_own_units(dataset, dataset[0]["images"]).round(), torch.from_numpy(levels)[None].double())


def test_measured_values_that_cannot_be_used(tmp_path):
    for name, array in {
        "good": np.zeros((4, 4)), "infinite": np.full((4, 4), np.inf), "deep": np.zeros((2, 2, 2, 4, 4)),
        "words": np.array([["a"]]), "objects": np.array([[None]]),
    }.items():  # fmt: skip
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    dataset = load_pictures(tmp_path, on_bad_image="skip")
    reasons = {Path(line.split(": ")[0]).stem: line for line in dataset.skipped}
    assert len(dataset) == 1 and sorted(reasons) == ["deep", "infinite", "objects", "words"]
    assert "not finite" in reasons["infinite"] and "(2, 2, 2, 4, 4)" in reasons["deep"] and "<U1" in reasons["words"]

    np.save(tmp_path / "more.npy", np.zeros((3, 4, 4)))
    with pytest.raises(
        ValueError, match=r"several kinds: \S*good.npy of 1 channel, \S*more.npy of 3 channels of meas"
    ):
        load_pictures(tmp_path, on_bad_image="skip")
    with pytest.raises(
        ValueError, match="it holds measured values of 1 channel, which stay as they are and cannot become 3"
    ):
        load_pictures(rows([coded(Image.new("I;16", (4, 4)))]), channels=3)
    with pytest.raises(ValueError, match="several kinds: row 1 .* of 8 bits, row 0 .* of 1 channel of measured"):
        load_pictures(rows([coded(Image.new("I;16", (4, 4))), coded(Image.new("L", (4, 4)))]))
    save(Image.new("L", (4, 4)), tmp_path / "picture.png")
    with pytest.raises(ValueError, match="both arrays, .*.npy, and images"):
        load_pictures(tmp_path)


def test_colours_of_16_bits_are_refused(arrays):
    eight = coded(picture(arrays[0]))["bytes"]
    header = eight[12:24] + b"\x10" + eight[25:29]  # 16 bits instead of 8
    sixteen = eight[:12] + header + struct.pack(">I", zlib.crc32(header)) + eight[33:]
    with pytest.raises(
        ValueError, match="its channels have 16 bits, of which Pillow reads 8; save it with 8 bits, or"
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
    with pytest.raises(ValueError, match="ant/0.png: no image that Pillow knows"):
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


def test_what_is_known_of_an_image_takes_few_bytes(tmp_path):
    """In memory, at the first start and at one that finds everything known."""
    count = 1000
    for i in range(count):
        save(Image.new("L", (2, 2), i % 256), tmp_path / f"{i}.png")
    captions = "".join(f"{i}.png,a picture of grey that is as light as {i}\n" for i in range(count))
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + captions)
    load_pictures(tmp_path)  # which imports what it needs
    for _ in range(2):
        tracemalloc.start()
        dataset = load_pictures(tmp_path, in_memory=False)
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(dataset.properties) == len(dataset.captions) == count and kept / count < 100


def test_processes_that_inspect_at_once_find_the_same(tmp_path):
    for i, array in enumerate(pixels(40)):
        save(picture(array), tmp_path / "pictures" / f"{i}.png")
    script = f"""
import datasets, sys
datasets.config.HF_DATASETS_CACHE = {str(tmp_path / "cache")!r}
from hf_genmod.data.loading import load_pictures
print(load_pictures({str(tmp_path / "pictures")!r}, in_memory=False).fingerprint)
"""
    started = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = {process.communicate()[0].strip() for process in started}
    assert found == {load_pictures(tmp_path / "pictures").fingerprint}


def test_an_image_that_points_beyond_its_end_is_left_out(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "sound.png")
    (tmp_path / "broken.tif").write_bytes(b"II+\0" + struct.pack("<HHQ", 8, 0, 2**62))  # a BigTIFF, no directory there
    dataset = load_pictures(tmp_path, on_bad_image="skip")
    assert len(dataset) == 1 and "broken.tif" in dataset.skipped[0]
    with pytest.raises(ValueError, match="broken.tif"):
        load_pictures(tmp_path)


def opaque(mode, **options):
    """A PNG of random pixels that could be transparent anywhere, and is nowhere."""
    image = Image.fromarray(pixels(1, channels={"LA": 2, "RGBA": 4, "P": 3}[mode])[0])
    if mode == "P":
        return coded(image.quantize(8), transparency=bytes([255] * 8))
    image.putalpha(255)
    return coded(image)


@pytest.mark.parametrize("mode, channels", [("LA", 1), ("RGBA", 3), ("P", 3)])
def test_an_alpha_channel_that_is_opaque_everywhere_is_none(mode, channels):
    entry = opaque(mode)
    image = Image.open(io.BytesIO(entry["bytes"]))
    assert image.mode == mode and image.has_transparency_data
    dataset = load([entry])
    assert dataset.channels == channels and not dataset.properties[0].has_alpha
    expected = np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(8, 8, channels)
    assert torch.equal(dataset.images[0], chw(expected))
    rgba = pixels(1, channels=4)[0]
    rgba[..., 3] = 255
    rgba[3, 4, 3] = 254  # in one pixel
    assert load([entry, coded(picture(rgba))]).channels == 4
    assert load([entry], channels=4).images[0, 3].unique().tolist() == [255]


KINDS = {  # the first bytes of files, their names, and what is said
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": ("1.HEIC", "a HEIC image; install pillow-heif, or save it as PNG"),
    b"\0\0\0\x18ftypmif1\0\0\0\0": ("1.jpg", "a HEIC image; install pillow-heif"),
    b"\0\0\0\x1cftypavif\0\0\0\0": ("1.png", "an AVIF image; install a Pillow with AVIF"),
    b"\xff\x0a\xfa\x1f": ("1.webp", "a JPEG XL image; install pillow-jxl-plugin"),
    b"\0\0\0\x0cJXL \r\n\x87\n": ("1.jpg", "a JPEG XL image"),
    b"\0\0\0\x18ftypcrx \0": ("1.png", "a RAW file of a camera; develop it and save it as TIFF, for example by rawpy"),
    b"II*\0\x10\0\0\0CR\2\0": ("1.jpg", "a RAW file of a camera"),
    bytes(128) + b"DICM": ("1.png", "a DICOM image; save its values as .npy, by pydicom"),
    b"SIMPLE  =                    T": ("1.png", "a FITS image; .* by astropy"),
    b"v/1\1": ("1.png", "an OpenEXR image; .*by OpenEXR"),
    b"#?RADIANCE\n": ("1.png", "a Radiance HDR image"),
    b'<?xml version="1.0"?>\n<!-- a drawing -->\n<svg xmlns="http://www.w3.org/2000/svg">': (
        "1.png",
        "an SVG drawing",
    ),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n": ("1.png", "a PostScript drawing"),
    b"gimp xcf v011\0": ("1.png", "a GIMP file"),
    b"\x89PNG\r\n\x1a\n": ("1.jpg", "a PNG that Pillow cannot read; it is damaged"),
    b"\xff\xd8\xff\xdb": ("1.png", "a JPEG that Pillow cannot read; it is damaged"),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n": ("1.png", "Git LFS; run `git lfs pull`"),
    b"<!DOCTYPE html><html><body>404 Not Found": ("1.jpg", "a web page; download the image again"),
    b"\x89HDF\r\n\x1a\n": ("1.png", "an HDF5 file"),
    b"nothing known": ("1.png", "no image that Pillow knows"),
}


@pytest.mark.parametrize("content", KINDS, ids=[message for _, message in KINDS.values()])
def test_what_pillow_does_not_open_is_named_by_its_content(tmp_path, content):
    name, message = KINDS[content]
    Image.new("L", (8, 8)).save(tmp_path / "sound.png")
    (tmp_path / name).write_bytes(content)
    entries = [{"bytes": content, "path": name}, {"bytes": None, "path": str(tmp_path / name)}]
    for entry in entries:
        with pytest.raises(ValueError, match=message):
            load([entry])


def test_the_content_of_a_file_counts_and_not_its_ending(arrays):
    for kind, ending in (("PNG", "jpg"), ("TIFF", "png"), ("WEBP", "heic"), ("JPEG2000", "jpg")):
        entry = coded(picture(arrays[0]), kind) | {"path": f"1.{ending}"}
        expected = Image.open(io.BytesIO(entry["bytes"]))
        assert expected.format == kind and torch.equal(load([entry]).images[0], chw(np.asarray(expected)))


@pytest.mark.parametrize("name", ["0.nef", "0.DNG"])
def test_the_preview_in_a_raw_file_is_not_taken_for_the_photo(tmp_path, arrays, name):
    save(picture(arrays[0]), tmp_path / name, format="TIFF")
    with pytest.raises(ValueError, match=f"{name}: a RAW file of a camera; develop it and save it as TIFF"):
        load_pictures(tmp_path)


def test_a_photoshop_file_is_what_its_layers_are_together(tmp_path):
    """One with two layers; what all layers are together is in the file, too."""
    merged, plane = pixels(1)[0], bytes(64)
    layer = struct.pack(">4iH", 0, 0, 8, 8, 3) + b"".join(struct.pack(">hI", i, 66) for i in range(3))
    layer += b"8BIMnorm\xff\0\0\0" + struct.pack(">I", 12) + bytes(8) + b"\0\0\0\0"
    layers = struct.pack(">h", 2) + layer * 2 + (b"\0\0" + plane) * 6
    layers = struct.pack(">I", len(layers)) + layers
    content = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(8)
    content += struct.pack(">I", len(layers)) + layers + b"\0\0" + merged.transpose(2, 0, 1).tobytes()
    entry = {"bytes": content, "path": None}
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert torch.equal(load([entry]).images[0], chw(merged))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", pytest.param("AVIF", marks=needs_avif)])
def test_images_of_several_frames_are_refused_with_their_number(arrays, kind):
    frames = [picture(array) for array in arrays[:3]]
    with pytest.raises(ValueError, match="row 0 of the data set: it has 3 frames; save the one that you want"):
        load([coded(frames[0], kind, save_all=True, append_images=frames[1:])])


def test_colours_of_a_lab_tiff():
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.new("RGB", (8, 8), (200, 30, 60)), to_lab)
    colour = load([coded(lab, "TIFF")]).images[0, :, 3, 4]
    assert (colour.int() - torch.tensor([200, 30, 60])).abs().max() <= 2


def test_grey_that_is_multiplied_by_its_alpha():
    premultiplied = np.array([[[50, 128], [100, 255]]], dtype=np.uint8)
    content = tiff(premultiplied, extra=[1])
    try:
        Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        pytest.skip("earlier versions of Pillow do not read them")
    images = load([{"bytes": content, "path": None}]).images
    assert images[0, 1].tolist() == [[128, 255]] and (images[0, 0] - torch.tensor([[100, 100]])).abs().max() <= 1


def test_what_lies_in_a_folder_and_cannot_be_opened_is_named(tmp_path):
    heic = next(iter(KINDS))
    Image.new("L", (8, 8)).save(tmp_path / "sound.png")
    (tmp_path / "index.html").write_text("<html>")
    with pytest.warns(UserWarning, match="index.html .no image"):
        assert len(load_pictures(tmp_path)) == 1
    for name in ("photo", "photo.HEIC", "photo.dat"):
        (tmp_path / name).write_bytes(heic)
        with pytest.raises(ValueError, match=f"{name}: a HEIC image; install pillow-heif, or save it as PNG"):
            load_pictures(tmp_path)
        (tmp_path / name).unlink()


def test_pointers_of_git_lfs_without_the_ending_of_an_image_are_named(tmp_path):
    pointer = next(content for content in KINDS if content.startswith(b"version"))
    (tmp_path / "photo").write_bytes(pointer)
    with pytest.raises(ValueError, match="photo: a pointer of Git LFS; run `git lfs pull`"):
        load_pictures(tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "photo", "PNG")
    (tmp_path / "photo.dat").write_bytes(pointer)
    with pytest.warns(UserWarning, match="photo.dat .a pointer of Git LFS; run `git lfs pull`"):
        assert len(load_pictures(tmp_path)) == 1


class ByPlugin(ImageFile.ImageFile):
    """Images of a format that Pillow does not know, a line of hexadecimal numbers for each line of pixels."""

    format = format_description = "HEX"

    def _open(self):
        lines = [bytes.fromhex(line.decode()) for line in self.fp.read().split()[1:]]
        self._size, self._mode = (len(lines[0]), len(lines)), "L"
        self.fp, self.filename = io.BytesIO(b"".join(lines)), ""
        self.tile = [("raw", (0, 0, *self.size), 0, "L")]


def test_a_plugin_of_pillow_that_somebody_registered_is_used(tmp_path):
    Image.register_open("HEX", ByPlugin, lambda start: start.startswith(b"HEX"))
    (tmp_path / "1.png").write_text("HEX 0001 feff")
    assert load_pictures(tmp_path).images.tolist() == [[[[0, 1], [254, 255]]]]
