"""Pictures from disk, read so that a wrong file is named and never misread.

A dataset promises 8-bit RGB (`image`), class ids or their colours (`mask`) and 16- or 32-bit instance ids
(`instances`). An alpha channel that hides nothing is dropped, of a pyramid the level of full size is read.
Pillow converts much else without a word: a 16-bit colour PNG loses its low byte, a 4-bit grey one is
multiplied by 17, a rotated photograph comes back with sides swapped beside its own polygons. So whatever is
not exactly the promised kind is refused in one line that says how to convert it; everything but the pixels
from the header, before any memory is taken for them.
"""

import struct
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from her2.run_errors import UserError, one_line

# A region of 1.5 mm at 0.242 um/px (the paper's) has 38 M pixels; decoding takes 3 bytes for each.
MAX_PIXELS = 20000 * 20000
MAX_INSTANCE = 2**24 - 1  # tables by instance id stay small
ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
LOSSLESS = {ending: kind for ending, kind in ENDINGS.items() if kind != "JPEG"}
KINDS = {"P": "a colour palette", "CMYK": "CMYK colours",                # Pillow's modes in words
         **dict.fromkeys(("1", "L", "I", "I;16", "I;16B"), "grey values"),
         **dict.fromkeys(("LA", "PA", "La", "RGBa"), "an alpha channel")}
ON_WHITE = ("convert it, for example in Python: im = PIL.Image.open(old).convert('RGBA'); "
            "PIL.Image.alpha_composite(PIL.Image.new('RGBA', im.size, 'white'), im).convert('RGB').save(new)")
ORIENTATION = 0x0112  # EXIF 2.3, table 4; 1 = upright
# What Pillow's decoders raise on damaged files, found by feeding them mutations of valid ones.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError,
          AttributeError, AssertionError, NotImplementedError, struct.error, zlib.error)

Image.MAX_IMAGE_PIXELS = None                       # a guess at what a user wants to open; `_open` has ours
warnings.filterwarnings("ignore", module="PIL")     # they are about metadata that nobody reads


def read_size(path) -> tuple[int, int]:
    """(height, width) of a colour image from its header. UserError if it is not an 8-bit RGB picture."""
    with _open(path, ENDINGS) as picture:
        _check_colour(path, picture)
        return picture.height, picture.width


def read_image(path) -> np.ndarray:
    """The pixels of a PNG, JPEG or TIFF as uint8 (H, W, 3). UserError for all that is not 8-bit RGB."""
    with _open(path, ENDINGS) as picture:
        _check_colour(path, picture)
        return _pixels(path, picture)


def read_mask(path) -> np.ndarray:
    """A mask as its PNG or TIFF has it: grey values or palette indices uint8 (H, W), black and white as 0 and
    255, or colours uint8 (H, W, 3)."""
    remedy = "save it as an 8-bit PNG whose grey value (or palette index) is the class id"
    with _open(path, LOSSLESS, remedy) as picture:
        if picture.mode in ("RGB", "RGBA"):
            _check_colour(path, picture)
        # Grey of 2 or 4 bits is stretched to 0..255 by the decoder; palette indices never are.
        elif picture.mode not in ("1", "L", "P") or picture.mode == "L" and _bits(path, picture) != 8:
            raise UserError(f"{path}: {_bits(path, picture)}-bit values of kind {picture.mode} where 8-bit "
                            f"class ids belong; {remedy}")
        return _pixels(path, picture)


def read_instances(path) -> np.ndarray:
    """Instance ids as int32 (H, W) from a 16-bit grey PNG, or from a 16- or 32-bit TIFF. 0 = background."""
    remedy = "save it as a 16-bit grey PNG (or a 32-bit TIFF) whose value is the instance id, 0 = background"
    with _open(path, LOSSLESS, remedy) as picture:
        # Pillow calls 16-bit grey "I;16" or, before version 11, "I" in a PNG.
        if not picture.mode.startswith("I") or _bits(path, picture) not in (16, 32):
            raise UserError(f"{path}: pixels of kind {picture.mode} where instance ids belong; {remedy}")
        ids = _pixels(path, picture).astype(np.int64)
    if ids.min() < 0 or ids.max() > MAX_INSTANCE:
        raise UserError(f"{path}: instance ids from {ids.min()} to {ids.max()}; number them 1, 2, 3, ... (up "
                        f"to {MAX_INSTANCE}), 0 = background")
    return ids.astype(np.int32)


@contextmanager
def _open(path, endings, remedy="save it as an 8-bit RGB PNG, JPEG or TIFF"):
    """The opened picture, header checked: kind and ending agree, one frame, not too large."""
    path = Path(path)
    wanted = endings.get(path.suffix.lower())
    if wanted is None:
        raise UserError(f"{path}: a file name ending in {path.suffix!r}; {remedy} ({', '.join(endings)})")
    try:
        picture = Image.open(path, formats=sorted(set(ENDINGS.values())))
        kind = "JPEG" if picture.format == "MPO" else picture.format
        frames = getattr(picture, "n_frames", 1)
        if kind != "PNG":       # which may carry the tag behind its pixels: `_pixels` asks
            _check_upright(path, picture)
    except DAMAGE as error:
        raise UserError(f"{path}: {_reason(error)}; copy the file again, or {remedy}") from error
    with picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise UserError(f"{path}: {picture.width} x {picture.height} pixels, above the limit of "
                            f"{MAX_PIXELS // 10**6} million pixels; cut it into regions")
        if kind != wanted:
            raise UserError(f"{path}: a {kind} file that is named {path.suffix}; give it the right ending")
        if kind == "TIFF":      # a page smaller than the first does not count: a pyramid's level, its label
            (width, height), *others = [page.size for page in ImageSequence.Iterator(picture)]
            frames = 1 + sum(w >= width or h >= height for w, h in others)
            picture.seek(0)
        if frames != 1:
            raise UserError(f"{path}: {frames} frames or pages in one file; save the one that is meant alone")
        yield picture


def _check_upright(path, picture):
    if picture.getexif().get(ORIENTATION, 1) not in (0, 1):
        raise UserError(f"{path}: the EXIF tag asks viewers to turn the picture, so pixels and annotations "
                        "may disagree; turn the pixels and save it without the tag")


def _check_colour(path, picture):
    bits, clear = _bits(path, picture), "transparency" in picture.info
    if bits == 8 and picture.mode in ("RGB", "RGBA") and not clear:
        return
    kind = "an alpha channel" if clear else KINDS.get(picture.mode, f"pixels of kind {picture.mode}")
    # Of 16-bit grey or of fractions, convert("RGB") would make white.
    remedy = "export it in colour from the scanner's program" if picture.mode[0] in "IF" else ON_WHITE
    raise UserError(f"{path}: {kind} of {bits} bits where 8-bit RGB belongs; {remedy}")


def _bits(path, picture) -> int:
    """Bits per sample as the file has them: the mode alone does not tell 8-bit from 16-bit colour."""
    if picture.format == "PNG":
        with open(path, "rb") as file:
            return file.read(25)[24]  # IHDR stands first, at a fixed place (PNG specification, 11.2.2)
    return max(picture.tag_v2.get(258, (1,))) if picture.format == "TIFF" else 8


def _pixels(path, picture) -> np.ndarray:
    try:
        if picture.format == "PNG":
            with Image.open(path, formats=["PNG"]) as again:
                # The checksums: the decoder alone reads some damaged files without complaint. A verified
                # picture cannot be decoded, hence a second handle.
                again.verify()
        pixels = np.array(picture.convert("L") if picture.mode == "1" else picture)     # "1": to 0 and 255
        if picture.mode == "RGBA":
            if clear := int((pixels[..., 3] < 255).sum()):
                raise UserError(f"{path}: {clear} pixels are transparent (alpha channel), so their colour is "
                                f"not what viewers show; {ON_WHITE}")
            pixels = np.ascontiguousarray(pixels[..., :3])
        _check_upright(path, picture)
        return pixels
    except (*DAMAGE, MemoryError) as error:
        raise UserError(f"{path}: truncated or damaged, or too large for the memory ({_reason(error)}); copy "
                        "the file again, or cut it into regions") from error


def _reason(error) -> str:
    return getattr(error, "strerror", None) or one_line(error) or type(error).__name__
