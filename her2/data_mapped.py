"""A region of interest as one flat file, so that a patch costs a copy of its pixels and nothing else.

Decoding a PNG of, say, 6200 x 6200 pixels for each random patch would cost a second, and all regions decoded
would fill 100 GB of memory. So every region is decoded once into a file of plain arrays that the operating
system maps into memory: a patch reads only the pages under it.

    image       (H, W, 3) uint8
    instance    (H, W) the smallest unsigned type that holds the largest id; 0 = background
    class_of    (N + 1,) uint8: class id of each instance, so that  label = class_of[instance]
    row_counts  (K, H) int32: pixels of class k in row y; those to be ignored are in none

The label needs no map of its own because an instance has one class. With the row counts a pixel of a class is
drawn exactly uniformly without a list of them: its rank is looked up in the running sum over rows, and only
the one row that holds it is read (`pixel`).

Cost on disk: 4 bytes per pixel up to 255 instances in a region, 5 up to 65,535: 154 MB for 6200 x 6200. Files
can be deleted whenever no program runs; one of the wrong length or with a damaged index is made again.
Flipped bits among the pixels are not looked for: each start would have to read every file to its end.

Dimension letters: H, W region; h, w window; K classes; N largest instance id.
"""

import os
import struct
import time
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from her2.run_errors import atomic_write

VERSION = 2  # part of every key: raise it when the layout or the meaning of the file changes
# The file: MAGIC, NUMBERS, a CRC-32 of NUMBERS and the two small arrays, then row_counts, instance, image,
# class_of (in this order each is aligned to its item size), and the path of the image that it was made from.
MAGIC = b"HER2TILE"     # and .tile: the names in caches that exist
NUMBERS = struct.Struct("<6q")  # H, W, K, N + 1, bytes per instance id, bytes of the path


class MappedRegion:
    """The mapped arrays of one region; see the module's docstring for their shapes. Never write to them."""

    def __init__(self, class_of, row_counts, instance, image, source=""):
        self.class_of, self.row_counts, self.instance, self.image = class_of, row_counts, instance, image
        self.source, (self.height, self.width) = source, image.shape[:2]

    def window(self, y: int, x: int, height: int, width: int):
        """Copies of image (h, w, 3) uint8, label (h, w) uint8, instance (h, w) int32 at row y, column x."""
        assert 0 <= y <= self.height - height and 0 <= x <= self.width - width, \
            f"window {height} x {width} at row {y}, column {x} leaves {self.height} x {self.width}"
        area = slice(y, y + height), slice(x, x + width)
        instance = np.array(self.instance[area])                                       # (h, w)
        return np.array(self.image[area]), self.class_of.take(instance), instance.astype(np.int32)

    def whole(self):
        """The same of the whole region."""
        return self.window(0, 0, self.height, self.width)

    def count(self, class_ids) -> int:
        """Number of pixels whose class is one of `class_ids`."""
        return int(self.row_counts[list(class_ids)].sum())

    def pixel(self, class_ids, rank: int) -> tuple[int, int]:
        """(row, column) of pixel number `rank` among those of `class_ids`, row by row from the top."""
        ends = np.cumsum(self.row_counts[list(class_ids)].sum(axis=0))                 # (H,)
        assert 0 <= rank < ends[-1], f"pixel {rank} of {ends[-1]}"
        y = int(np.searchsorted(ends, rank, side="right"))
        wanted = np.isin(self.class_of, class_ids)                                     # (N + 1,)
        columns = np.flatnonzero(wanted[self.instance[y]])
        return y, int(columns[rank - (ends[y] - len(columns))])


def classes_of(instance, label) -> np.ndarray:
    """(N + 1,) uint8: the class of each instance, from the maps (H, W); one of them if it has several."""
    class_of = np.zeros(int(instance.max()) + 1, np.uint8)
    class_of[instance] = label
    return class_of


def write_region(path, image, label, instance, num_classes: int, source="") -> None:
    """Write image (H, W, 3) uint8, label (H, W) uint8, instance (H, W) int32 and the image's path; atomic."""
    class_of, source = classes_of(instance, label), os.fsencode(source)
    assert (class_of[instance] == label).all(), "an instance has more than one class"
    rows = [np.bincount(row, minlength=num_classes)[:num_classes] for row in label]    # without IGNORE
    row_counts = np.array(rows, np.int32).T.copy()                                     # (K, H)
    instance = instance.astype(np.min_scalar_type(len(class_of) - 1))
    numbers = NUMBERS.pack(*instance.shape, num_classes, len(class_of), instance.itemsize, len(source))

    def write(file):
        file.write(MAGIC + numbers + _checksum(numbers, row_counts, class_of))
        for part in (row_counts, instance, np.ascontiguousarray(image), class_of, source):
            file.write(part)
    atomic_write(path, write)


def _checksum(numbers, row_counts, class_of) -> bytes:
    return zlib.crc32(class_of, zlib.crc32(row_counts, zlib.crc32(numbers))).to_bytes(4, "little")


@lru_cache(maxsize=128)  # an open file holds a handle, and systems grant as few as 256 of them
def open_region(path) -> MappedRegion:
    """Map a region file. Raises ValueError when it is not whole, FileNotFoundError when there is none."""
    size, start = Path(path).stat().st_size, len(MAGIC) + NUMBERS.size + 4
    if size < start:
        raise ValueError(f"{size} bytes")
    content = np.memmap(path, dtype=np.uint8, mode="r")  # one mapping, so one file handle, for all arrays
    magic, numbers, checksum = (part.tobytes() for part in np.split(content[:start], [len(MAGIC), start - 4]))
    height, width, num_classes, ids, item, letters = NUMBERS.unpack(numbers)
    table = (("row_counts", (num_classes, height), "<i4", 4 * num_classes * height),
             ("instance", (height, width), f"<u{item}", height * width * item),
             ("image", (height, width, 3), "u1", height * width * 3), ("class_of", (ids,), "u1", ids))
    lengths = [length for *_, length in table]
    if magic != MAGIC or min(lengths) <= 0 or letters < 0 or start + sum(lengths) + letters != size:
        raise ValueError(f"{size} bytes, which is not the length in its header")
    arrays = {}
    for name, shape, dtype, length in table:
        arrays[name] = np.ndarray(shape, dtype, buffer=content, offset=start)
        start += length
    if checksum != _checksum(numbers, arrays["row_counts"], arrays["class_of"]):
        raise ValueError("wrong checksum")
    return MappedRegion(**arrays, source=os.fsdecode(content[start:].tobytes()))


def prune_regions(cache, current: set, images: set, root) -> tuple[int, int, int]:
    """Remove the region files in `cache` that no program will read again: (files, bytes, files kept). These
    are files whose image is gone, those of the dataset in `root` (its `images` or others below it) that are
    not among the `current` ones, damaged ones, and half-written ones that a crash left over a day ago."""
    paths, sizes = sorted(Path(cache).glob("*.tile*")), []
    for path in paths:
        old = path.suffix == ".tmp" and time.time() - path.stat().st_mtime > 86400
        if path.suffix == ".tile":
            try:
                source = Path(open_region.__wrapped__(path).source)   # not kept open: Windows needs that
                old = not source.exists() or path not in current and (
                    source in images or source.is_relative_to(root))
            except ValueError:
                old = True
        if old:
            sizes.append(path.stat().st_size)
            path.unlink()
    return len(sizes), sum(sizes), len(paths) - len(sizes)
