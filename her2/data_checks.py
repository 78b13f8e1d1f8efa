"""What the annotation readers share: the polygon, the checks of its coordinates, and the account of a file.

What was never meant as a polygon of this image (points, deleted ones, detected cells) is left out, with the
reason. What is broken is a problem, and a file with problems is refused: a polygon that quietly vanishes is
background to a network.
"""

import re
import unicodedata
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from reprlib import repr as show   # short, whatever the length or the depth of the value

import numpy as np

from her2.run_errors import UserError

MAX_COORDINATE = 1e8   # pixels; the largest slides have some 1e6 a side
REMEDY = "export it again from the annotation program, as EXACT, QuPath GeoJSON, ASAP XML or COCO"


class Malformed(Exception):
    """What is wrong with one annotation."""


@dataclass(frozen=True, eq=False)
class Polygon:
    rings: list       # (n, 2) float64 arrays of x, y: the outline, then its holes
    name: str         # the class as the file spells it; "" where it gives none
    source_id: str    # what the file calls the annotation: its id, else its number


class Found:
    """What a file holds: polygons, what else was left out, and what is wrong with which."""

    def __init__(self, path):
        self.path, self.polygons, self.left_out, self.problems, self._ids = path, [], [], [], set()
        self.about = (None, None, None)     # name, width and height of the image, None: the file does not say

    def leave_out(self, reason, rings=lambda: []):
        """Keep an annotation that is no polygon of this image; `rings()` gives its outline, if any."""
        self.left_out.append((reason, []))
        with suppress(Malformed):
            self.left_out[-1] = reason, [make_ring(ring) for ring in rings()]

    @contextmanager
    def annotation(self, where):
        """Collects the Malformed of one annotation, so that a user hears of all of them at once."""
        try:
            yield
        except Malformed as problem:
            self.problems.append(f"{where} {problem}")

    def new_id(self, value, number) -> str:
        """What to call an annotation: its id, or else `number`. Malformed when the id was seen before."""
        if value is None or isinstance(value, str) and re.fullmatch("(Path|TMA)[A-Za-z]*(Object)?", value):
            return str(number)      # QuPath up to 0.3 wrote the kind of object as the id of all
        if not isinstance(value, (int, str)):
            raise Malformed(f"has the id {show(value)}, neither a number nor a text")
        if value in self._ids:
            raise Malformed(f"has the id {show(value)}, which stands twice in the file")
        self._ids.add(value)
        return str(value)

    def add(self, rings, name, source_id):
        """One polygon from its rings, each a flat list x1, y1, x2, y2, ... as it stood in the file."""
        self.polygons.append(Polygon([make_ring(ring) for ring in rings], name, str(source_id)))


def make_ring(numbers) -> np.ndarray:
    """x1, y1, x2, y2, ... -> (n, 2) float64, not closed. Malformed when it cannot enclose an area."""
    for value in numbers:
        if type(value) not in (int, float):   # a bool is an int to isinstance
            raise Malformed(f"has the coordinate {show(value)}, not a number")
        if not abs(value) <= MAX_COORDINATE:  # not >, which is false for NaN
            raise Malformed(f"has the coordinate {show(value)}, not finite or beyond {MAX_COORDINATE:g}")
    if len(numbers) % 2:
        raise Malformed(f"has {len(numbers)} numbers, an x without its y")
    ring = np.array(numbers, dtype=np.float64).reshape(-1, 2)
    if len(ring) > 1 and (ring[0] == ring[-1]).all():
        ring = ring[:-1]
    if len(ring) < 3:
        raise Malformed(f"has {len(ring)} points, a polygon needs 3")
    arms = ring - ring[0]
    x, y = arms[np.hypot(*arms.T).argmax()]
    if (np.abs(arms[:, 0] * y - arms[:, 1] * x) <= 1e-9 * (x * x + y * y)).all():
        raise Malformed(f"has {len(ring)} points on one line, no area")
    return ring


def as_object(value) -> dict:
    if not isinstance(value, dict):
        raise Malformed(f"has {show(value)} where an object should stand")
    return value


def as_list(value, least=0) -> list:
    if not isinstance(value, list) or len(value) < least:
        raise Malformed(f"has {show(value)} where a list of {least} or more should stand")
    return value


def as_name(value) -> str:
    """A class name; "" for null: the comparison with the class table then says that it is missing."""
    if not isinstance(value, (str, type(None))):
        raise Malformed(f"has the class {show(value)}, not a text")
    return (value or "").strip()


def rows_of(value, what, path) -> list:
    """A list that makes up the file; UserError where it is none: the file is of another kind."""
    if not isinstance(value, list):
        raise UserError(f"{path}: {what} is {show(value)}, not a list; {REMEDY}")
    return value


def choose_image(names: dict, image, path):
    """Which of several images in a file is `image`: a key of `names`, {key: file name}. Names are compared
    without their folders, and if that finds none, without their suffix."""
    wanted = plain_path(image or "")
    for part in ("name", "stem"):
        keys = [k for k, name in names.items() if getattr(plain_path(name), part) == getattr(wanted, part)]
        if len(keys) == 1:
            return keys[0]
    raise UserError(f"{path}: annotations of {len(names)} images ({show(list(names.values()))}), and "
                    f"{wanted.name or 'the image'} is not exactly one of them; give it the same name, or "
                    "export one file per image")


def plain_path(name) -> PurePosixPath:
    """A path as any system writes it, letters in Unicode form C (a Mac's archive has them in form D)."""
    return PurePosixPath(unicodedata.normalize("NFC", str(name).replace("\\", "/")))
