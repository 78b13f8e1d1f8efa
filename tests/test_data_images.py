"""Reading pictures: what is accepted comes back exactly, all else is one line; damage is never misread."""

import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from data_factory import chunk, png, save
from her2 import data_images
from her2.run_errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
IDS = (RGB[..., 0] % 6).astype(np.uint8)
INSTANCES = (RGB[..., 0].astype(np.uint16) * 257)


def encoded(array, kind, mode=None, **options):
    buffer = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(RGB, kind, exif=exif)


def late_exif():
    """A PNG whose eXIf chunk stands behind the pixels, where a reader of headers does not see it."""
    return png(30, 24, 8, 2, [row.tobytes() for row in RGB], chunk(b"eXIf", bytes.fromhex(
        "49492a0008000000010012010300010000000600000000000000")))


def pages(kind):
    return encoded(RGB, kind, save_all=True, append_images=[Image.fromarray(RGB[::-1])])


def tiff_of(bits):
    return encoded((RGB[..., 0].astype({16: np.uint16, 32: np.int32}[bits])), "TIFF")


def bomb(kind, side):
    """The header of a picture of side x side pixels, with hardly anything behind it."""
    if kind == "PNG":
        return png(side, side, 8, 2, [b"\0" * 30])
    data = bytearray(encoded(RGB, "JPEG"))
    frame = data.index(b"\xff\xc0") + 5
    data[frame:frame + 4] = side.to_bytes(2, "big") * 2
    return bytes(data)


CLEAR = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])     # one transparent pixel
CLEAR[0, 0, 3] = 254
GREY = [bytes(range(30))] * 24
BAD_IMAGES = {   # name: (file name, content, what the message must say)
    "empty": ("a.png", b"", "cannot identify"),
    "text": ("a.png", b"this is no picture", "cannot identify"),
    "html": ("a.jpg", b"<!doctype html><p>404</p>", "cannot identify"),
    "gif": ("a.png", encoded(RGB, "GIF"), "cannot identify"),
    "bmp under another name": ("a.tif", encoded(RGB, "BMP"), "cannot identify"),
    "webp": ("a.webp", encoded(RGB, "WEBP"), "ending in '.webp'"),
    "no ending": ("a", encoded(RGB, "PNG"), "ending in"),
    "svs": ("a.svs", encoded(RGB, "TIFF"), "ending in '.svs'"),
    "JPEG named png": ("a.png", encoded(RGB, "JPEG"), "a JPEG file that is named .png"),
    "PNG named tif": ("a.tif", encoded(RGB, "PNG"), "a PNG file that is named .tif"),
    "TIFF named jpg": ("a.jpg", encoded(RGB, "TIFF"), "a TIFF file that is named .jpg"),
    "truncated PNG": ("a.png", encoded(RGB, "PNG")[:-300], "truncated"),
    "truncated PNG header": ("a.png", encoded(RGB, "PNG")[:20], "a.png"),
    "PNG without end": ("a.png", encoded(RGB, "PNG")[:-12], "truncated"),
    "PNG of another checksum": ("a.png", encoded(RGB, "PNG")[:-13] + b"?" + encoded(RGB, "PNG")[-12:],
                                "checksum"),
    "truncated JPEG": ("a.jpg", encoded(RGB, "JPEG")[:-200], "truncated"),
    "truncated TIFF": ("a.tif", encoded(RGB, "TIFF", compression="tiff_lzw")[:200], "a.tif"),
    "grey": ("a.png", encoded(IDS, "PNG"), "grey values"),
    "grey JPEG": ("a.jpg", encoded(IDS, "JPEG"), "grey values"),
    "black and white": ("a.png", encoded(RGB, "PNG", "1"), "1 bits"),
    "16-bit grey": ("a.png", encoded(INSTANCES, "PNG"), "16 bits"),
    "16-bit colour": ("a.png", png(30, 24, 16, 2, [bytes(180)] * 24), "16 bits"),
    "16-bit TIFF": ("a.tif", tiff_of(16), "16 bits"),
    "palette": ("a.png", encoded(RGB, "PNG", "P"), "palette"),
    "alpha": ("a.png", encoded(CLEAR, "PNG"), "1 pixels are transparent"),
    "alpha TIFF": ("a.tif", encoded(CLEAR, "TIFF"), "1 pixels are transparent"),
    "grey with alpha": ("a.png", encoded(IDS, "PNG", "LA"), "alpha"),
    "one transparent colour": ("a.png", encoded(RGB, "PNG", transparency=(1, 2, 3)), "alpha"),
    "CMYK JPEG": ("a.jpg", encoded(RGB, "JPEG", "CMYK"), "CMYK"),
    "CMYK TIFF": ("a.tif", encoded(RGB, "TIFF", "CMYK"), "CMYK"),
    "LAB TIFF": ("a.tif", encoded(RGB, "TIFF", "LAB"), "LAB"),
    "float TIFF": ("a.tif", encoded(IDS.astype(np.float32), "TIFF"), "32 bits"),
    "animated PNG": ("a.png", pages("PNG"), "2 frames"),
    "pages of a TIFF": ("a.tif", pages("TIFF"), "2 frames"),
    "turned by EXIF, JPEG": ("a.jpg", turned("JPEG"), "EXIF"),
    "turned by EXIF, TIFF": ("a.tif", turned("TIFF"), "EXIF"),
    "turned by EXIF, PNG": ("a.png", turned("PNG"), "EXIF"),
    "turned by EXIF behind the pixels": ("a.png", late_exif(), "EXIF"),
    "bomb, PNG": ("a.png", bomb("PNG", 50000), "million pixels"),
    "bomb, just above the limit": ("a.png", bomb("PNG", 20001), "million pixels"),
    "bomb, JPEG": ("a.jpg", bomb("JPEG", 65000), "million pixels"),
    "width 0": ("a.png", png(0, 24, 8, 2, [b""] * 24), "a.png"),
}
BAD_MASKS = {
    "grey with alpha": ("a.png", encoded(IDS, "PNG", "LA"), "kind LA"),
    "colour with alpha": ("a.png", encoded(CLEAR, "PNG"), "1 pixels are transparent"),
    "16-bit": ("a.png", encoded(INSTANCES, "PNG"), "16-bit"),
    "2-bit grey": ("a.png", png(30, 24, 2, 0, [bytes(8)] * 24), "2-bit"),
    "4-bit grey": ("a.png", png(30, 24, 4, 0, [b"\x12" * 15] * 24), "4-bit"),
    "JPEG": ("a.jpg", encoded(IDS, "JPEG"), "ending in '.jpg'"),
    "JPEG named png": ("a.png", encoded(IDS, "JPEG"), "a JPEG file"),
    "16-bit TIFF": ("a.tif", tiff_of(16), "16-bit"),
    "truncated": ("a.png", encoded(IDS, "PNG")[:-100], "truncated"),
}
BAD_INSTANCES = {
    "8-bit": ("a.png", encoded(IDS, "PNG"), "kind L"),
    "colour": ("a.png", encoded(RGB, "PNG"), "kind RGB"),
    "float": ("a.tif", encoded(IDS.astype(np.float32), "TIFF"), "kind F"),
    "negative": ("a.tif", encoded(-IDS.astype(np.int32), "TIFF"), "from -5"),
    "huge ids": ("a.tif", encoded(IDS.astype(np.int32) * 2**28, "TIFF"), "number them"),
    "JPEG": ("a.jpg", encoded(IDS, "JPEG"), "ending in '.jpg'"),
}
CASES = [(reader, name, case)
         for reader, cases in ((data_images.read_image, BAD_IMAGES), (data_images.read_mask, BAD_MASKS),
                               (data_images.read_instances, BAD_INSTANCES))
         for name, case in cases.items()]


@pytest.mark.parametrize("reader, name, case", CASES, ids=[f"{r.__name__}: {name}" for r, name, _ in CASES])
def test_bad_pictures_are_one_line_with_file_and_remedy(tmp_path, reader, name, case):
    file_name, content, phrase = case
    (tmp_path / file_name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        reader(tmp_path / file_name)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / file_name)) and phrase in message, message
    assert "\n" not in message and ";" in message and len(message) < 500


@pytest.mark.parametrize("name", ["grey with alpha", "16-bit colour", "CMYK JPEG", "animated PNG", "bomb, PNG",
                                  "empty", "turned by EXIF, JPEG", "JPEG named png"])
def test_the_header_alone_is_enough_to_refuse(tmp_path, monkeypatch, name):
    """A bad kind is found before a pixel is decoded: a bomb must not go off first."""
    def explode(*args, **kwargs):
        raise AssertionError("pixels were decoded")
    file_name, content, phrase = BAD_IMAGES[name]
    (tmp_path / file_name).write_bytes(content)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", explode)
    with pytest.raises(UserError, match="a[.]"):
        data_images.read_size(tmp_path / file_name)


def test_the_size_comes_from_the_header(tmp_path, monkeypatch):
    for name, kind in (("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.tif", "TIFF")):
        (tmp_path / name).write_bytes(encoded(RGB, kind))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for name in ("a.png", "b.jpg", "c.tif"):
        assert data_images.read_size(tmp_path / name) == (24, 30)


def test_good_pictures_come_back_exactly(tmp_path):
    for name, options in (("a.png", {}), ("b.tif", {}), ("c.tiff", {"compression": "tiff_lzw"}),
                          ("D.PNG", {}), ("e.tif", {"compression": "tiff_adobe_deflate"})):
        read = data_images.read_image(save(tmp_path / name, RGB, **options))
        assert read.dtype == np.uint8 and np.array_equal(read, RGB), name
    smooth = np.linspace(0, 255, 24 * 30 * 3).reshape(24, 30, 3).astype(np.uint8)
    assert np.abs(data_images.read_image(save(tmp_path / "f.jpg", smooth, quality=95)).astype(int)
                  - smooth).max() < 20


def test_upright_exif_and_other_metadata_do_no_harm(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010f] = 1, "scanner"
    for name in ("a.jpg", "b.png", "c.tif"):
        assert data_images.read_image(save(tmp_path / name, RGB, exif=exif)).shape == (24, 30, 3)
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[282], info[270] = 4132.2, "1.5 mm region"
    assert np.array_equal(data_images.read_image(save(tmp_path / "d.tif", RGB, tiffinfo=info)), RGB)


def test_masks_are_ids_with_and_without_palette(tmp_path):
    picture = Image.fromarray(IDS)
    picture.putpalette([7 * k % 256 for k in range(768)])   # the colours mean nothing
    picture.save(tmp_path / "palette.png")
    picture.save(tmp_path / "small.png", bits=4)
    save(tmp_path / "grey.png", IDS)
    for name in ("palette.png", "small.png", "grey.png"):
        read = data_images.read_mask(tmp_path / name)
        assert read.dtype == np.uint8 and np.array_equal(read, IDS), name


def test_instances_of_16_and_32_bits(tmp_path):
    wide = INSTANCES.astype(np.int32) * 200
    for name, ids in (("a.png", INSTANCES), ("b.tif", INSTANCES), ("c.tif", wide)):
        read = data_images.read_instances(save(tmp_path / name, ids))
        assert read.dtype == np.int32 and np.array_equal(read, ids), name


def mutate(data, rng):
    """Flip bits, cut off, replace a stretch, or set a byte of the header."""
    data = bytearray(data)
    kind, at = int(rng.integers(4)), int(rng.integers(len(data)))
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at + 12] = rng.integers(0, 256, int(rng.integers(16)), dtype=np.uint8).tobytes()
    else:
        data[at % 120] = int(rng.integers(256))
    return bytes(data)


@pytest.mark.parametrize("name, content, reader, expected", [
    ("a.png", encoded(RGB, "PNG"), data_images.read_image, RGB),
    ("a.png", encoded(IDS, "PNG"), data_images.read_mask, IDS),
    ("a.png", encoded(INSTANCES, "PNG"), data_images.read_instances, INSTANCES),
    ("a.jpg", encoded(RGB, "JPEG"), data_images.read_image, None),
    ("a.tif", encoded(RGB, "TIFF"), data_images.read_image, None),
])
def test_damage_gives_a_user_error_and_in_a_png_never_other_pixels(tmp_path, name, content, reader, expected):
    """Property: 400 random mutations each. JPEG and TIFF have no checksum, only PNG can promise pixels."""
    rng, refused = np.random.default_rng(7), 0
    for _ in range(400):
        (tmp_path / name).write_bytes(mutate(content, rng))
        try:
            pixels = reader(tmp_path / name)
        except UserError as error:
            refused += 1
            assert str(error).startswith(str(tmp_path / name)) and "\n" not in str(error)
        else:
            assert expected is None or np.array_equal(pixels, expected)
    assert refused > (390 if expected is not None else 100)
