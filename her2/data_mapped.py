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

import math
import zlib
from functools import lru_cache
from itertools import accumulate

import numpy as np

from her2.run_errors import atomic_write

VERSION = 3  # part of every key: raise it when the layout or the meaning of the file changes
HEADER = 40  # bytes: H, W, K, N + 1 and a checksum as int64; then the arrays in the order of `layout`


class MappedRegion:
    """The mapped arrays of one region; see the module's docstring for their shapes. Never write to them."""

    def __init__(self, class_of, row_counts, instance, image):
        self.class_of, self.row_counts, self.instance, self.image = class_of, row_counts, instance, image
        self.height, self.width = image.shape[:2]

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


def layout(height: int, width: int, num_classes: int, ids: int) -> dict:
    """{array: (shape, dtype)} as they lie in the file. In this order each is aligned to its item size."""
    return {"row_counts": ((num_classes, height), np.dtype("<i4")),
            "instance": ((height, width), np.min_scalar_type(ids - 1)),
            "image": ((height, width, 3), np.dtype("u1")), "class_of": ((ids,), np.dtype("u1"))}


def checksum(numbers, row_counts, class_of) -> int:
    """CRC-32 of all but the two maps: a wrong pixel shows, a wrong index would move patches unseen."""
    return zlib.crc32(class_of, zlib.crc32(row_counts, zlib.crc32(np.array(numbers, "<i8"))))


def write_region(path, image, label, instance, num_classes: int) -> None:
    """Write image (H, W, 3) uint8, label (H, W) uint8 and instance (H, W) int32; atomic."""
    class_of = classes_of(instance, label)
    assert (class_of[instance] == label).all(), "an instance has more than one class"
    rows = [np.bincount(row, minlength=num_classes)[:num_classes] for row in label]    # without IGNORE
    row_counts = np.array(rows, np.int32).T.copy()                                     # (K, H)
    numbers = (*instance.shape, num_classes, len(class_of))
    header = np.array([*numbers, checksum(numbers, row_counts, class_of)], "<i8")

    def write(file):
        file.write(header)
        arrays = {"row_counts": row_counts, "instance": instance, "image": image, "class_of": class_of}
        for name, (_, dtype) in layout(*numbers).items():
            file.write(np.ascontiguousarray(arrays[name], dtype))
    atomic_write(path, write)


@lru_cache(maxsize=128)  # an open file holds a handle, and systems grant as few as 256 of them
def open_region(path) -> MappedRegion:
    """Map a region file. Raises ValueError when it is not whole, FileNotFoundError when there is none."""
    content = np.memmap(path, dtype=np.uint8, mode="r")  # one mapping, so one file handle, for all arrays
    if len(content) < HEADER:
        raise ValueError(f"{len(content)} bytes")
    *numbers, expected = content[:HEADER].view("<i8").tolist()
    table = layout(*numbers)
    lengths = (math.prod(shape) * dtype.itemsize for shape, dtype in table.values())
    *starts, end = accumulate(lengths, initial=HEADER)
    if end != len(content):
        raise ValueError(f"{len(content)} bytes, which is not the length in its header")
    arrays = {name: np.ndarray(*table[name], content, start) for name, start in zip(table, starts)}
    if expected != checksum(numbers, arrays["row_counts"], arrays["class_of"]):
        raise ValueError("wrong checksum")
    return MappedRegion(**arrays)
