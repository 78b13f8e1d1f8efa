"""One slide under two names: what a split by slide cannot keep apart, because it takes them for two.

Found are names that differ in spelling alone (case, leading zeros, blanks, Unicode form), and equal images
under two slides: copies of a file, and where everything is decoded anyway (`her2.data`) equal pixels in
whatever files. In two splits that is a leak from training into the test and a problem, in one split a note.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict

import numpy as np

from her2.data_images import read_image


def plain_name(slide: str) -> str:
    """What two spellings of a name have in common: "Case 007" and "CASE7" -> "case7"."""
    text = unicodedata.normalize("NFKC", slide).casefold()
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)   # between two numbers a blank tells them apart
    return re.sub(r"(?<!\d)0+(?=\d)", "", text)


def double_slides(rois, contents=None) -> tuple[list[str], list[str]]:
    """(problems, notes): a line for each two slides that are probably one. `contents`: `content_key` of each
    region; without it the files of different splits are compared."""
    pairs = {}                              # {(slide, slide): (region, region, what, remedy)}
    for keys, what, remedy in (
            ([plain_name(roi.slide) for roi in rois], "differ in spelling alone",
             "write the same slide (and split) in the rows of one slide, and clearly different ones for two"),
            (equal_files(rois) if contents is None else contents, "have the same image",
             "remove the line of one of the two images")):
        first = {}
        for key, roi in zip(keys, rois):
            other = first.setdefault(key, roi)
            if key and other.slide != roi.slide:
                pairs.setdefault((other.slide, roi.slide), (other, roi, what, remedy))
    problems, notes = [], []
    for a, b, what, remedy in pairs.values():
        leak = a.split != b.split
        (problems if leak else notes).append(
            f"the slides {a.slide!r} ({a.name}) and {b.slide!r} ({b.name}) {what}"
            + (f" and are in {a.split} and {b.split}" if leak else "") + f"; {remedy}")
    return problems, notes


def content_key(image) -> str:
    """Equal where all pixels (H, W, 3) are; "" for an image of one colour, which is like any other."""
    return hashlib.sha256(np.ascontiguousarray(image)).hexdigest() if (image != image[0, 0]).any() else ""


def equal_files(rois) -> list[str]:
    """The `content_key` of each region whose file may be that of another split, "" for the others: to decode
    all files would take minutes, so size, middle and end say which."""
    def glance(path) -> tuple:
        size, pieces = path.stat().st_size, []
        with open(path, "rb") as file:
            for start in (size // 2, max(0, size - 4096)):
                file.seek(start)
                pieces.append(file.read(4096))
        return size, *pieces

    alike = defaultdict(set)                # {glance: splits}
    glances = [glance(roi.image) for roi in rois]
    for key, roi in zip(glances, rois):
        alike[key].add(roi.split)
    return [content_key(read_image(roi.image)) if len(alike[key]) > 1 else ""
            for key, roi in zip(glances, rois)]
