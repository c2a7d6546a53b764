"""Pictures that somebody sends are read, or refused in one sentence."""

import base64
import io

import numpy as np
import pytest
from demo_cases import painted, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_genmod.data.picture_dataset import PictureDataset
from hf_genmod.demo.pictures import data_url, figures, fitted, made_smaller, read_mask, read_picture, said


def encoded(content: bytes, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def file_of(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_file_is_read(kind):
    content = file_of(picture(), kind)
    assert np.array_equal(
        read_picture(encoded(content)).convert("RGB"), Image.open(io.BytesIO(content)).convert("RGB")
    )


ANIMATED = file_of(picture(), "GIF", save_all=True, append_images=[picture(seed=1)])


@pytest.mark.parametrize(
    "sent, message",
    [
        (None, "picture: there is none; choose a file, or drop one"),
        ("", "picture: there is none; choose a file, or drop one"),
        ({"path": "/etc/passwd"}, "picture: what was sent is no picture; send the file as a data URL in base64"),
        ("/etc/passwd", "picture: what was sent is no picture"),
        ("http://127.0.0.1/a.png", "picture: what was sent is no picture"),
        ("data:image/png;base64,!!!", "picture: the file is no picture that can be read; it is one of PNG, JPEG"),
        (encoded(b"%!PS-Adobe-3.0"), "picture: the file is no picture that can be read"),
        (encoded(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "picture: the file is no picture that can be read"),
        (encoded(file_of(picture(), "PNG")[:200]), "picture: the file is damaged; save it again"),
        (encoded(ANIMATED), "picture: it has 2 frames; save the one that you want"),
        (encoded(file_of(Image.new("I;16", (4, 4)), "PNG")), "picture: it has more than 8 bits"),
        (encoded(file_of(Image.new("1", (8192, 8192)), "PNG")), "picture: 8192x8192 pixels are too many"),
        (encoded(b"0" * (13 * 2**20)), "picture: more than 12 MB; save it smaller"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_sentence(sent, message):
    with pytest.raises(ValueError) as refused:
        read_picture(sent)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


@settings(max_examples=200)
@given(st.binary(max_size=60), st.integers(0, 400), st.integers(1, 8))
def test_a_damaged_file_is_read_or_refused(noise, start, count):
    content = bytearray(file_of(picture(), "PNG"))
    content[start : start + count] = noise
    try:
        read_picture(encoded(bytes(content)))
    except ValueError as error:
        assert str(error).startswith("picture: ")


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1), ("RGBA", 4), ("RGBA", 3), ("L", 3)])
@pytest.mark.parametrize("size", [(12, 9), (8, 8), (5, 16)])
def test_a_picture_is_scaled_and_cropped_as_in_training(mode, channels, size):
    image = picture(size, mode)
    entries = [{"path": "", "bytes": file_of(image, "PNG")}]
    expected = PictureDataset(entries, "pictures", (8, 8), channels, in_memory=True).images[0]
    actual = np.asarray(fitted(image, channels, (8, 8))).reshape(8, 8, -1).transpose(2, 0, 1)
    assert np.array_equal(actual, expected.numpy())


def test_a_picture_is_made_smaller_only_where_it_is_too_large():
    image = picture((12, 9))
    assert np.array_equal(made_smaller(image, 3, 12), image)
    assert made_smaller(picture((12, 8)), 3, 6).size == (6, 4)
    assert made_smaller(image, 3, 12, multiple=4).size == (12, 8)
    with pytest.raises(ValueError, match="picture: 12x9 pixels; both sides need 16 or more"):
        made_smaller(image, 3, 12, multiple=16)


def test_a_mask_is_white_where_somebody_painted():
    mask = np.asarray(read_mask(data_url(painted()), (8, 8)))
    assert (mask[:4, :4] == 255).all() and mask.sum() == 16 * 255
    assert read_mask(None, (8, 8)) is None
    assert read_mask(data_url(Image.new("RGBA", (8, 8))), (8, 8)) is None


@pytest.mark.parametrize(
    "mask, message",
    [
        (painted((9, 8)), "mask: 9x8 pixels, and the picture has 8x8; paint it on the page"),
        (painted(box=(0, 0, 8, 8)), "mask: everything is painted over; leave something, or clear the paint"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, message):
    with pytest.raises(ValueError) as refused:
        read_mask(data_url(mask), (8, 8))
    assert str(refused.value).startswith(message)


@given(st.text())
def test_names_and_sentences_are_no_markup(text):
    rest = figures([picture()], [text]).replace("&lt;", "").replace("&gt;", "")
    names = ("div", "figure", "a", "img", "figcaption")
    assert rest.count("<") == sum(
        rest.count(f"<{name} ") + rest.count(f"<{name}>") + rest.count(f"</{name}>") for name in names
    )
    assert said(text).count("<") == 2 == said(text).count(">")
