"""Damaged files end in an image, an image left out, or one sentence; never otherwise."""

import io
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

GIGABYTE = 2**30


def pixels(*shape):
    return np.random.RandomState(0).randint(256, size=shape, dtype=np.uint8)


def coded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sound_files():
    """A small file of each kind, by the ending of its name."""
    color, grey = Image.fromarray(pixels(12, 10, 3)), Image.fromarray(pixels(12, 10))
    alpha = Image.fromarray(pixels(12, 10, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif[0x010F] = "a camera"
    deep = Image.fromarray(pixels(12, 10).astype(np.uint16) * 257)
    array = io.BytesIO()
    np.save(array, pixels(2, 12, 10).astype(np.float32))
    return [
        ("png", coded(color, "PNG", exif=exif)),
        ("png", coded(alpha, "PNG")),
        ("png", coded(color.quantize(8), "PNG", transparency=1)),
        ("png", coded(deep, "PNG")),
        ("jpg", coded(color, "JPEG", exif=exif)),
        ("jpg", coded(color.convert("CMYK"), "JPEG", progressive=True)),
        ("gif", coded(grey.quantize(8), "GIF")),
        ("bmp", coded(color, "BMP")),
        ("tiff", coded(color, "TIFF", compression="tiff_lzw")),
        ("tiff", coded(Image.fromarray(pixels(12, 10).astype(np.float32)), "TIFF")),
        ("webp", coded(color, "WEBP", lossless=True)),
        ("ppm", coded(color, "PPM")),
        ("ico", coded(color.resize((16, 16)), "ICO", sizes=[(16, 16)])),
        ("npy", array.getvalue()),
    ]


def mutant(data: bytes, rng: random.Random) -> bytes:
    """One of the ways in which files break."""
    data = bytearray(data)
    way = rng.randrange(7)
    if way == 0:  # cut short
        del data[rng.randrange(len(data)) :]
    elif way == 1:  # a few bits or bytes
        for _ in range(rng.choice((1, 1, 3, 30))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif way == 2:  # the header, where sizes and kinds are
        for _ in range(rng.choice((1, 2, 4))):
            data[rng.randrange(min(64, len(data)))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif way == 3:  # a number in four bytes
        start = rng.randrange(max(len(data) - 4, 1))
        data[start : start + 4] = rng.choice(
            (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\xff\xff")
        )
    elif way == 4:  # a part twice, or left out
        start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        data[start:end] = data[start:end] * rng.choice((0, 2))
    elif way == 5:  # a block of zeros, as a full disk leaves
        start = rng.randrange(len(data))
        data[start:] = bytes(len(data) - start)
    else:  # another file's end
        start = rng.randrange(len(data))
        data[start:] = rng.randbytes(rng.randrange(200))
    return bytes(data)


# What a machine with little memory makes of folders: how many pictures each has, and how many are left out.
LOAD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
import json
from hf_genmod.data.loading import load_pictures
for folder, on_bad_image in json.loads(sys.argv[2]):
    try:
        pictures = load_pictures(folder, resolution=8, on_bad_image=on_bad_image)
        batch = pictures.__getitems__(range(len(pictures)))["images"]
        print(json.dumps([len(batch), len(pictures.skipped), list(batch.shape[2:]), bool(batch.isfinite().all())]))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def load(cache, *folders):
    """The answers for folders, each with what to do about an unusable image, by one process."""
    folders = json.dumps([(str(folder), on_bad_image) for folder, on_bad_image in folders])
    command = [sys.executable, "-c", LOAD, str(8 * GIGABYTE), folders]
    environment = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(json.loads(folders))
    return answers


def write_mutants(folder, files, count, seed):
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        ending, data = files[i % len(files)]
        (folder / f"{i:05}.{ending}").write_bytes(mutant(data, rng))
    ending, data = files[0]
    (folder / f"sound.{ending}").write_bytes(data)


def of_kind(measured):
    """Pictures of 8 bits and measured values do not go together in one data set."""
    files = sound_files()
    kinds = {True: [files[3], files[9]], False: [file for i, file in enumerate(files) if i not in (3, 9, 13)]}
    return kinds[measured]


def check(answer, count):
    """Checks what a folder of mutants gave; returns how many were left out."""
    if isinstance(answer, str):  # a mutant became a sound file of another kind, which is named
        assert "\n" not in answer and ("several kinds" in answer or "value" in answer), answer
        return 0
    kept, skipped, size, finite = answer
    assert kept + skipped == count + 1 and kept >= 1
    assert size == [8, 8] and finite
    return skipped


def check_folder(folder, cache, count):
    (answer,) = load(cache, (folder, "skip"))
    check(answer, count)


class TestPictures:
    def test_sound_files_all_load(self, tmp_path):
        for measured in (False, True):
            (tmp_path / str(measured)).mkdir()
            for i, (ending, data) in enumerate(of_kind(measured)):
                (tmp_path / str(measured) / f"{i}.{ending}").write_bytes(data)
        answers = load(tmp_path / "cache", *((tmp_path / str(measured), "skip") for measured in (False, True)))
        assert [answer[:2] for answer in answers] == [[len(of_kind(measured)), 0] for measured in (False, True)]

    def test_mutants_load_or_are_left_out(self, tmp_path):
        counts = {False: 300, True: 60}
        for measured, count in counts.items():
            write_mutants(tmp_path / str(measured), of_kind(measured), count, seed=0)
        folders = [(tmp_path / str(measured), mode) for measured in counts for mode in ("skip", "error")]
        of_pictures, error_of_pictures, of_values, error_of_values = load(tmp_path / "cache", *folders)
        assert check(of_pictures, counts[False]) > 10 and check(of_values, counts[True]) > 10
        for answer in (error_of_pictures, error_of_values):
            assert isinstance(answer, str) and "\n" not in answer

    def test_mutants_of_arrays_load_or_are_left_out(self, tmp_path):
        for seed in range(3):
            write_mutants(tmp_path / str(seed), [sound_files()[13]], 40, seed)
        for answer in load(tmp_path / "cache", *((tmp_path / str(seed), "skip") for seed in range(3))):
            check(answer, 40)

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(1, 21))
    def test_many_mutants_load_or_are_left_out(self, tmp_path, seed):
        write_mutants(tmp_path / "pictures", of_kind(False), 1000, seed)
        check_folder(tmp_path / "pictures", tmp_path / "cache", 1000)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", range(14))
    def test_many_mutants_of_one_kind_load_or_are_left_out(self, tmp_path, kind):
        write_mutants(tmp_path / "pictures", [sound_files()[kind]], 500, seed=kind)
        check_folder(tmp_path / "pictures", tmp_path / "cache", 500)
