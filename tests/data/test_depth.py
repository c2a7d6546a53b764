"""Images of more than 8 bits keep the values of their files, or are refused; they are never cut or misread."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from made_images import in_own_units, load, needs_avif, picture, pixels, tiff
from PIL import Image

from hf_genmod.data.depth import jpeg_xl_header

GREYS = np.random.RandomState(0).randint(1024, size=(5, 7))
GREYS[0, :2] = 0, 1023


# Images by encoders that the tests do not need: GREYS with so many bits, colours, and the first bytes of others.
ENCODED = {
    "j2k 10": (
        "|4;u>04V?f0000700005000000000000007000050000000000009XB0sm3}3;+NC0RR951ONg5TmS?>Q2%5AB>(|Ka%Ew3Wn>^?c_2@4"
        "Wo}APMMofZWpZ<AZ*CwmE;TMR|BwI*0000007C!)|C8UbkP;yoxf6?$7<eHE+6WzFUw%*#1;ztpNv8vbzV}2z8Ks5udk`_F$*~EAR*!sx"
        "a!$AZ*#"
    ),
    "j2k signed": (
        "|4;u>04V?f000070000500000000000000700005000000000000EBy0sm3}3;+NC0RR951ONg5TmS?>fd6CwB>(|Ka%Ew3Wn>^?c_2@4"
        "Wo}APMMofZWpZ<AZ*CwmE;TMR|BwI*0000007L)*|C7Le#y}Dw8MzaSk{Ea)2igc7WM6(z5e3ErWJ#w3hQ9YiLK&rn^Lr36r^&Gig;tMz"
        "gK|!{|Je"
    ),
    "jp2 12": (
        "0000CYEU2`4GM<}0000KW^{RQYH%_j00000YH%_j0000jYH%`W0000MX=r3}0000500007009dJ0000001sntY;pkr000005dZ)HwQ6uO"
        "WB*V8Q2;3b000002LJ#71poj500000000002LJ#71poj5000000003C0RjI~01N;C009611Oxy9|6BkBKw$r503`qcLvm$dbY)~9VtF7>"
        "aAj^vP(?=|c4cyNX>V>IGA=bPH2;tQ3IG5A002V(0soWV;K&jlMQXIzFCXl`<G)Gn1`qw&$LTVzibd8fWO|te>=x!wF{IHd%HI24Xy#av"
        "=lLgF|Je"
    ),
    "jp2 rgb": (
        "0000CYEU2`4GM<}0000KW^{RQYH%_j00000YH%_j0000jYH%`W0000MX=r3}000050000700RjJ0000001sntY;pkr000005C8xGy=rhW"
        "WB*V8Q2;Lh000002LJ#71poj500000000002LJ#71poj5000000009C0RagC0SN&C|55-9000010RRL900IA800cl#|6~9q00BdCWnpw>"
        "WFTUBAWv{*Zc0!^M<8}(a&u{KZXhx)H7+#&kN^q*00000MF0W+li#tB5+ND66N{1<cp(Sc2pwc!eozqw#sg$Yrvrw*_e4S&rG@i*5HY98"
        "u?dA%k9>o2PPc%7|Je"
    ),
    "avif 10": (
        "0000WW^{RQVRmU|00000VRmU|ZE0pPZE0a<O+hh10002%ZDn*}000000000XXk=`10000000000aA{+7000000000000000000004sdC7"
        "Z2$lO000310016oY;R)#0000)000310RR910RR926951J9{>OVC~0YKW&i*H00031000_kZf0cy000000RRADb}%tRZ)|UJ00000YH4tC"
        "Z~y=ROKEUpZvX%Q6lrsCWdHyG000002mk;82mk;85O8UDX#fBK00RmN3IG5A3}JRLLxCVb000006Ju{|a&BX6cmM(b0ssbp0000NX>e^}"
        "0000000001009I60)qqq001X#WMOm?015~=2)}Ov0tS#W5g9^b1i%0^0001xKbs6;Lb3"
    ),
    "avif 12": (
        "0000SW^{RQVRmU|00000VRmU|ZE0pPZE0a<0002%ZDn*}000000000XXk=`10000000000aA{+7000000000000000000004sdC7Z2$lO"
        "000310016oY;R)#0000)000310RR910RR924*&oF9smFUC~0YKW&i*H00031000_kZf0cy000000RRADb}%tRZ)|UJ00000YH4tCZ~y=R"
        "OKEUpZvX%Q6lrsCWdHyG000002mk;82mk;85O8UDX#fBK00RsR3;+NC3}JRLLxDhG000006Ju{|a&BX6cmM(b0ssbp0000NX>e^}00000"
        "00001009I60)qqq001U!WMOm?0160L2)}DUfPtbi5E(*a1i%0^0059bn+#z>vH"
    ),
    "jxl 8": ("{|X>L5D5qb0RV&oOBjn4"),
    "jxl 12": ("{|X>L7*Mnb2m}EDd;&`t"),
    "jxl 16": ("0000CN?1%F4GM<}0000KW^{RQYItlQ00000YItlQ00009YItmH3IG5BBWieTWB&>uK>Pp{EdmGx0RS)rOBj=mg#"),
    "jxl anim": ("{|X>LK@$Lo2?zuM0E7Zd"),
}


def encoded(name):
    return base64.b85decode(ENCODED[name])


def values_of(content):
    dataset = load([{"bytes": content, "path": None}])
    assert dataset.value_range is not None
    return in_own_units(dataset, dataset[0]["images"]).numpy()


def png(samples, color, transparent=b""):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * samples.itemsize, color, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(line.dtype.newbyteorder(">")).tobytes() for line in samples)
    middle = chunk(b"tRNS", transparent) if transparent else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + middle
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def sgi(samples):
    """Verbatim, two bytes a value, the lowest line first."""
    height, width, count = samples.shape
    head = struct.pack(">hBBHHHH", 474, 0, 2, 3 if count > 1 else 2, width, height, count)
    return head.ljust(512, b"\0") + samples[::-1].transpose(2, 0, 1).astype(">u2").tobytes()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "i4", "f4", "i1"])
def test_grey_tiffs_of_every_type_byte_order_and_compression(dtype, order, compressed):
    if (dtype, order) == ("u4", ">"):  # unknown to Pillow
        return
    kind = {"u": 1, "i": 2, "f": 3}[dtype[0]]
    most = {"u2": 2**16 - 1, "i2": 2**15 - 1, "u4": 2**32 - 1, "i4": 2**31 - 1, "f4": 1.5, "i1": 127}[dtype]
    samples = (GREYS / 1023 * most).astype(dtype)
    if kind > 1:
        samples = samples * (1 - 2 * (GREYS % 2)).astype(dtype)
    np.testing.assert_allclose(
        values_of(tiff(samples, kind, order, compressed))[0], samples, rtol=1e-6, atol=1e-6 * most
    )


@pytest.mark.parametrize("dtype, least", [("u4", 2**31), ("i4", 2**30)])
def test_tiffs_whose_values_float32_does_not_hold_apart_are_refused(dtype, least):
    kind = {"u": 1, "i": 2}[dtype[0]]
    with pytest.raises(ValueError, match="its values, .* are too close together for float32; subtract"):
        values_of(tiff((np.array(least, dtype) + GREYS.astype(dtype)).astype(dtype), kind))
    np.testing.assert_allclose(values_of(tiff(GREYS.astype(dtype), kind))[0], GREYS, atol=1e-3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_turned_tiffs(orientation, order):
    turned = GREYS.astype("u2")
    turned = [
        turned, turned[:, ::-1], turned[::-1, ::-1], turned[::-1], turned.T, turned.T[:, ::-1], turned.T[::-1, ::-1],
        turned.T[::-1],
    ][orientation - 1]  # fmt: skip
    content = tiff(GREYS.astype("u2"), order=order, orientation=orientation)
    np.testing.assert_allclose(values_of(content)[0], turned, atol=1e-3)
    eight = load([{"bytes": tiff((GREYS >> 2).astype("u1"), order=order, orientation=orientation), "path": None}])
    assert eight.resolution == turned.shape and eight.images[0, 0].tolist() == (turned >> 2).tolist()


@pytest.mark.parametrize("most", [300, 1023, 4095, 65535])
def test_portable_greymaps(most):
    samples = np.minimum(GREYS, most)
    for content in (
        b"P5 7 5 %d\n" % most + samples.astype(">u2").tobytes(),
        b"P2 7 5 %d\n" % most + b" ".join(b"%d" % value for value in samples.flat),
    ):
        np.testing.assert_allclose(values_of(content)[0], samples, atol=1e-3)
    darker = load([{"bytes": b"P5 7 5 15\n" + (samples % 16).astype("u1").tobytes(), "path": None}])
    assert darker.images[0, 0].tolist() == (samples % 16 * 17).tolist()  # 4 bits are shades, as anywhere


def test_grey_pngs():
    samples = GREYS.astype("u2") * 64
    np.testing.assert_allclose(values_of(png(samples, 0))[0], samples, atol=1e-2)
    with pytest.raises(ValueError, match="one of its values of 16 bits stands for transparency; save it"):
        load([{"bytes": png(samples, 0, struct.pack(">H", int(samples[1, 1]))), "path": None}])


def icon(png, kind):
    """An icon of Windows or macOS with a PNG of 128x128 pixels."""
    if kind == "ico":
        return struct.pack("<3H4B2H2I", 0, 1, 1, 128, 128, 0, 0, 1, 48, len(png), 22) + png
    return b"icns" + struct.pack(">I", len(png) + 16) + b"ic07" + struct.pack(">I", len(png) + 8) + png


@pytest.mark.parametrize("kind", ["ico", "icns"])
def test_icons(kind):
    deep = np.random.RandomState(0).randint(2**16, size=(128, 128, 3)).astype("u2")
    flat = (deep % 256).astype("u1")
    images = load([{"bytes": icon(png(flat, 2), kind), "path": None}]).images
    np.testing.assert_array_equal(images[0].permute(1, 2, 0), flat)
    for content in [png(deep, 2)] + [png(deep[..., 0], 0)] * (kind == "icns"):
        with pytest.raises(ValueError, match="its channels have 16 bits, of which Pillow reads 8"):
            load([{"bytes": icon(content, kind), "path": None}])
    if kind == "icns":
        coded = io.BytesIO()
        Image.fromarray(deep[..., 0]).save(coded, "JPEG2000")
        with pytest.raises(ValueError, match="its channels have 16 bits, of which Pillow reads 8"):
            load([{"bytes": icon(coded.getvalue(), kind), "path": None}])
    if kind == "ico":
        np.testing.assert_allclose(values_of(icon(png(deep[..., 0], 0), kind))[0], deep[..., 0], atol=1e-2)


def deep_colours():
    rgba = np.random.RandomState(0).randint(2**16, size=(5, 7, 4)).astype("u2")
    rgb, grey_alpha = rgba[..., :3], rgba[..., :2]
    dds = struct.pack(
        "<4s7I44x8I20x", b"DDS ", 124, 0x1007, 5, 7, 28, 0, 0, 32, 0x40, 0, 32, 1023 << 20, 1023 << 10, 1023, 0
    )
    return {
        "png_rgb": png(rgb, 2), "png_rgba": png(rgba, 6), "png_grey_alpha": png(grey_alpha, 4),
        "png_transparent": png(rgb, 2, struct.pack(">3H", *map(int, rgb[0, 0]))),
        "tiff_rgb": tiff(rgb, photometric=2), "tiff_big_endian": tiff(rgb, order=">", photometric=2),
        "tiff_planar": tiff(rgb, photometric=2, planar=True), "tiff_rgba": tiff(rgba, photometric=2, extra=[2]),
        "tiff_deflated": tiff(rgb, photometric=2, compressed=True), "tiff_cmyk": tiff(rgba, photometric=5),
        "ppm": b"P6 7 5 65535\n" + rgb.astype(">u2").tobytes(),
        "ppm_1023": b"P6 7 5 1023\n" + (rgb % 1024).astype(">u2").tobytes(),
        "ppm_plain": b"P3 7 5 1023\n" + b" ".join(b"%d" % value for value in (rgb % 1024).flat),
        "sgi": sgi(rgba), "sgi_grey": sgi(rgba[..., :1]), "dds": dds + bytes(5 * 7 * 4),
    }  # fmt: skip


@pytest.mark.parametrize("name", deep_colours())
def test_colours_of_more_than_8_bits_are_refused(name):
    with pytest.raises(
        ValueError, match="row 0 of the data set: its channels have (10|16) bits, of which Pillow reads 8"
    ):
        load([{"bytes": deep_colours()[name], "path": None}])


def refused():
    """Files, and what is said about them."""
    return {
        "real colours": (tiff(np.ones((5, 7, 3), "f4"), 3, photometric=2), "a TIFF .*; .* by tifffile"),
        "half colours": (
            tiff(np.ones((6, 8, 3), "u1"), photometric=6, more={530: [2, 2]}),
            "its colours are YCbCr without compression",
        ),
        "64 bits": (tiff(np.ones((5, 7), "f8"), 3), "a TIFF that Pillow cannot read"),
        "big-endian u4": (tiff(np.ones((5, 7), "u4"), order=">"), "a TIFF that Pillow cannot read"),
        "five channels": (tiff(np.ones((5, 7, 5), "u2"), extra=[0] * 4), "a TIFF that Pillow cannot read"),
        "infrared": (tiff(np.ones((5, 7, 4), "u1"), photometric=2, extra=[0]), "it has channels that Pillow leaves"),
        "planar infrared": (
            tiff(np.ones((5, 7, 4), "u1"), photometric=2, extra=[0], planar=True, compressed=True),
                "it has channels that Pillow leaves",
        ),
        "white is zero": (tiff(np.ones((5, 7), "u2"), photometric=0), "its lowest value is white"),
        "preview": (tiff(np.ones((5, 7, 3), "u1"), photometric=2, more={254: [1]}), "Pillow reads only the preview"),
        "DNG": (tiff(np.ones((5, 7, 3), "u1"), photometric=2, more={50706: [1]}), "Pillow reads only the preview"),
        "pages": (None, "it has 2 frames; save the one"),
        "colour PFM": (b"PF\n1 1\n-1.0\n" + bytes(12), ".*in colour; save it as PNG, or its values as .npy"),
        "PAM": (b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 3\nMAXVAL 1023\nENDHDR\n" + bytes(6), "a PAM image"),
        "deep Photoshop": (
            b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 5, 7, 16, 3) + bytes(20),
            "a Photoshop file that is not of 8 bits; save it as PNG, or its values as .npy by psd-tools",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", refused())
def test_what_pillow_cannot_read_whole_is_named(tmp_path, name):
    content, reason = refused()[name]
    if name == "pages":
        frames = [picture(array) for array in pixels(2)]
        frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
        content = (tmp_path / "a.tif").read_bytes()
    with pytest.raises(ValueError, match="row 0 of the data set: " + reason):
        load([{"bytes": content, "path": None}])


@pytest.mark.parametrize("name, offset", [("j2k 10", 0), ("jp2 12", 0), ("j2k signed", -512)])
def test_grey_jpeg_2000(name, offset):
    np.testing.assert_allclose(values_of(encoded(name))[0], GREYS + offset, atol=1e-3)


@pytest.mark.parametrize(
    "name, bits",
    [("jp2 rgb", 10), pytest.param("avif 10", 10, marks=needs_avif), pytest.param("avif 12", 12, marks=needs_avif)],
)
def test_colours_that_other_encoders_wrote(name, bits):
    with pytest.raises(ValueError, match=f"its channels have {bits} bits, of which Pillow reads 8"):
        load([{"bytes": encoded(name), "path": None}])


def test_headers_of_jpeg_xl():
    found = {name: jpeg_xl_header(encoded(name)) for name in ENCODED if name.startswith("jxl")}
    assert found == {"jxl 8": (8, False), "jxl 12": (12, False), "jxl 16": (16, False), "jxl anim": (8, True)}


@pytest.mark.parametrize("bits", [17, 24, 32])
def test_a_jpeg_2000_of_more_bits_than_pillow_reads_is_refused(bits):
    content = bytearray(encoded("jp2 12"))
    content[content.find(b"ihdr") + 14] = bits - 1
    with pytest.raises(ValueError, match=f"its channels have {bits} bits, of which Pillow reads 16; save it"):
        load([{"bytes": bytes(content), "path": None}])
