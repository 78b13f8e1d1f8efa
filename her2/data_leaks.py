"""One slide under two names: what a split by slide cannot keep apart, because it takes them for two.

Found are names that differ in spelling alone (case, leading zeros, blanks, Unicode form), and equal images
under two slides: files of the same bytes (copies, hard links), and where everything is decoded anyway
(`her2.data`) equal pixels in whatever files. In two splits that is a leak from training into the test and a
problem, in one split a note.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict

from her2.data_images import read_image


def plain_name(slide: str) -> str:
    """What two spellings of a name have in common: "Case 007" and "CASE7" -> "case7"."""
    text = unicodedata.normalize("NFKC", slide).casefold()
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)   # between two numbers a blank tells them apart
    return re.sub(r"(?<!\d)0+(?=\d)", "", text)


def double_slides(rois, contents=None) -> tuple[list[str], list[str]]:
    """(problems, notes): a line for each two slides that are probably one.

    `contents` is a key per region, equal where the pixels are, "" for an image of one colour: that is like
    any other. Without it the files of different splits are compared.
    """
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


def equal_files(rois) -> list[str]:
    """A key per region, equal where files of different splits have the same content, else "".

    A file is read only where its size and its end are those of another.
    """
    def end(path):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            return file.read()

    groups = [range(len(rois))]
    for key_of in (lambda path: path.stat().st_size, end,
                   lambda path: hashlib.sha256(path.read_bytes()).digest()):
        parts = defaultdict(list)
        for number, group in enumerate(groups):
            for k in group:
                parts[number, key_of(rois[k].image)].append(k)
        groups = [part for part in parts.values() if len({rois[k].split for k in part}) > 1]
    keys = [""] * len(rois)
    for group in groups:
        pixels = read_image(rois[group[0]].image)
        for k in group if (pixels != pixels[0, 0]).any() else ():
            keys[k] = str(group[0])
    return keys
