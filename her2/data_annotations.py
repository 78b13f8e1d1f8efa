"""Annotations of one image: the polygons of a file, what is wrong with them, their place and their classes.

`data_formats` reads the files into a `Found`. What was never meant as a polygon of this image (points,
deleted ones, detected cells) is left out, with the reason. What is broken is a problem, and a file with
problems is refused: a polygon that quietly vanishes is background to a network. Every refusal is a UserError
that names the file, what was found and what to do.
"""

import json
import re
import unicodedata
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from reprlib import repr as show   # short, whatever the length or the depth of the value

import numpy as np

from her2.data_classes import NO_CLASS, ClassTable, normal_form
from her2.run_errors import UserError, one_line

MAX_COORDINATE = 1e8   # pixels; the largest slides have some 1e6 a side
REMEDY = "correct it in the annotation program and export it again, as EXACT, GeoJSON, ASAP XML or COCO"
KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false",      # of values in a file
         int: "a whole number", float: "a number"}


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

    @contextmanager
    def part(self, where):
        """Collects the UserErrors of the parts of a file, without its name: a user hears of all at once."""
        try:
            yield
        except UserError as problem:
            self.problems.append(f"{where} {problem}")

    def new_id(self, value, number) -> str:
        """What to call an annotation: its id, or else `number`. UserError when the id was seen before."""
        if not isinstance(value, (int, str)):
            return str(number)
        if str(value) in self._ids:
            raise UserError(f"has the id {show(value)}, which stands twice in the file")
        self._ids.add(str(value))
        return str(value)

    def add(self, rings, name, source_id):
        """One polygon from its rings as they stood in the file, each a list of points [x, y, ...]."""
        rings = [make_ring(ring) for ring in want(list, rings, least=1)]
        self.polygons.append(Polygon(rings, name, str(source_id)))

    def leave_out(self, reason, rings=None):
        """Keep an annotation that is no polygon of this image, and its outline if `rings` is one."""
        self.left_out.append((reason, []))
        with suppress(UserError):
            self.left_out[-1] = reason, [make_ring(ring) for ring in want(list, rings)]


def want(kind, value, least=0):
    """`value`, if it is of this kind (a key of KINDS) and, being a list, long enough. UserError otherwise."""
    if type(value) is not kind or least and len(value) < least:     # to isinstance, True is a number
        what = f"a list of {least} or more" if least else KINDS[kind]
        raise UserError(f"has {show(value)} where {what} should stand")
    return value


def as_name(value) -> str:
    """A class name; "" for null: the comparison with the class table then says that it is missing."""
    return want(str, "" if value is None else value).strip()


def make_ring(points) -> np.ndarray:
    """[[x, y, ...], ...] -> (n, 2) float64, not closed. UserError when it cannot enclose an area."""
    points = [want(list, point, least=2)[:2] for point in want(list, points)]
    for point in points:
        for value in point:
            # Neither isinstance, to which True is an int, nor >, which is false for NaN.
            if type(value) not in (int, float) or not abs(value) <= MAX_COORDINATE:
                raise UserError(f"has the coordinate {show(value)}, not a number up to {MAX_COORDINATE:g}")
    ring = np.array(points, dtype=np.float64).reshape(-1, 2)
    if len(ring) > 1 and (ring[0] == ring[-1]).all():
        ring = ring[:-1]
    if len(ring) < 3:
        raise UserError(f"has {len(ring)} points, a polygon needs 3")
    arms = ring - ring[0]
    x, y = arms[np.hypot(*arms.T).argmax()]
    if (np.abs(arms[:, 0] * y - arms[:, 1] * x) <= 1e-9 * (x * x + y * y)).all():
        raise UserError(f"has {len(ring)} points on one line, no area")
    return ring


def choose_image(names: dict, image):
    """Which of the images in a file is `image`: a key of `names`, {key: file name}; the only one, if there is
    one, and None if there is none. Names are compared without their folders, and if that finds none, without
    their suffix."""
    if len(names) < 2:
        return next(iter(names), None)
    wanted = plain_path(image or "")
    for part in ("name", "stem"):
        keys = [k for k, name in names.items() if getattr(plain_path(name), part) == getattr(wanted, part)]
        if len(keys) == 1:
            return keys[0]
    raise UserError(f"has annotations of {len(names)} images ({show(list(names.values()))}), and "
                    f"{wanted.name or 'the image'} is not exactly one of them: give it the same name, or "
                    "export one file per image")


def plain_path(name) -> PurePosixPath:
    """A path as any system writes it, letters in Unicode form C (a Mac's archive has them in form D)."""
    return PurePosixPath(unicodedata.normalize("NFC", str(name).replace("\\", "/")))


def check_image(found: Found, image, slide: str, height: int, width: int) -> None:
    """UserError where the file says that it belongs to an image of another name or size. For images in their
    own coordinates: a crop of a slide has neither the slide's name nor its size."""
    name, *size = found.about
    if size != [None, None] and size != [width, height]:
        raise UserError(f"{found.path}: annotations of an image of {show(size[0])} x {show(size[1])} pixels, "
                        f"but {image} has {width} x {height}; annotate it, or give x, y and downsample")
    theirs, ours, known = map(normal_form, (plain_path(name or "").stem, plain_path(image).stem, slide))

    def within(part, whole):        # the image "1" is not the image "10"
        return re.search(rf"(?:(?<!\d)|(?!\d)){re.escape(part)}(?:(?!\d)|(?<!\d))", whole)

    # Programs add to names (a folder, a hash, an ending): one name inside the other is the same image.
    if name and not (within(theirs, ours) or within(ours, theirs) or within(known, theirs)):
        raise UserError(f"{found.path}: annotations of the image {show(name)}, not of {image}; correct the "
                        "annotations cell, or give the image that name if it is the one")


def place_polygons(polygons, path, height, width, x=0.0, y=0.0, downsample=1.0) -> tuple[list, list]:
    """The polygons in pixels of an image, p_image = (p - (x, y)) / downsample, and those outside of it.
    Annotations of an image that is not moved or scaled are its own: one outside is a mistake (x, y swapped,
    or of the slide). A crop of a slide (x, y, downsample given) leaves annotations of the slide outside, but
    where it leaves all of them the numbers are wrong. Both mistakes are a UserError."""
    assert downsample > 0, f"downsample is an image pixel in annotation pixels, found {downsample}"
    kept, outside = [], []
    for polygon in polygons:
        polygon = replace(polygon, rings=[(ring - (x, y)) / downsample for ring in polygon.rings])
        low, high = polygon.rings[0].min(axis=0), polygon.rings[0].max(axis=0)
        (kept if (high > 0).all() and (low < (width, height)).all() else outside).append(polygon)
    if outside and (not kept or (x, y, downsample) == (0, 0, 1)):
        (left, top), (right, bottom) = outside[0].rings[0].min(axis=0), outside[0].rings[0].max(axis=0)
        raise UserError(
            f"{path}: {len(outside)} of {len(polygons)} polygons lie outside the image of {width} x {height} "
            f"pixels (annotation {show(outside[0].source_id)}: x {left:g} to {right:g}, y {top:g} to "
            f"{bottom:g}); correct x, y, downsample in slides.csv (now {x:g}, {y:g}, {downsample:g})")
    return kept, outside


def polygon_classes(polygons, classes: ClassTable, path) -> list[int]:
    """The class id of each polygon. UserError when a name is not in the class table."""
    names = list(dict.fromkeys(p.name or NO_CLASS for p in polygons))
    unknown = [name for name in names if not classes.knows(name)]
    if unknown:
        where = next(p.source_id for p in polygons if (p.name or NO_CLASS) in unknown)
        aliases = {name: likely_class(name, classes) for name in unknown[:8] if len(name) <= 60}
        raise UserError(one_line(
            f"{path}: unknown class {_listed(unknown)} (annotation {show(where)}); names seen: "
            f"{_listed(names)}; names known: {_listed([*classes.names, *classes.aliases])}; rename it where "
            "it was drawn, or give its class in classes.json, which python -m her2.data DIR --draft-classes "
            f"writes for all files; a guess: {json.dumps({'aliases': aliases}, ensure_ascii=False)}"))
    return [classes.id_of(p.name or NO_CLASS) for p in polygons]


def likely_class(name: str, classes: ClassTable) -> str:
    """The class of a name, or a guess at it for a person to check: a class's name, or "ignore" if unclear.
    Never a tumor class without a sign of which, and the background only for what is named as other tissue: a
    wrong guess that nobody corrects must not teach a network anything."""
    if classes.knows(name):
        return dict(enumerate(classes.names)).get(classes.id_of(name), "ignore")
    text = name.casefold()
    score = re.search(r"(?<![0-9.,])([0-3]) ?\+|(?:her ?-?2|score|neu)\W*([0-3])(?![0-9])", text)
    guesses = [name.rpartition(":")[2].strip()]                 # QuPath's derived classes: "Tumor: 3+"
    guesses += ["LCIS/DCIS"] if re.search(r"\bin.?situ|dcis|lcis", text) else []      # whatever its staining
    guesses += [f"{score[1] or score[2]}+".replace("0+", "0")] if score else []
    tumor = re.search(r"tumou?r|carcinom|cancer|invasi|metasta|ignore|\?", text)
    other = re.search(r"strom|normal|benign|necro|fat\b|adipo|lympho|immune|vessel|muscle|background|glass|"
                      r"region", text)
    guesses += [classes.names[0]] if other and not tumor else []
    return next((guess for guess in guesses if guess in classes.names), "ignore")


def _listed(names) -> str:
    shown = [name if name == NO_CLASS else show(name) for name in names[:30]]
    return ", ".join(shown) + ", ..." * (len(names) > 30)
