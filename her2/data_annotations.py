"""Annotations of one image: any of the five formats -> polygons in image pixels with class ids.

The format is told by the content, not by the suffix: EXACT and COCO both write `.json`, QuPath writes either.
Everything that a file can get wrong is a UserError that names the file, what was found and what to do.
Source: paper, section 2.1 (annotated in EXACT); the other formats are what other laboratories have.
"""

import json
import re
from dataclasses import replace
from difflib import get_close_matches

from her2.data_formats import read_asap, read_coco, read_exact_rest, read_exact_text, read_geojson
from her2.data_checks import REMEDY, Found, plain_path, show
from her2.data_classes import NO_CLASS, ClassTable, normal_form, parse_json, read_text
from her2.run_errors import UserError, one_line


def read_file(path, image=None) -> Found:
    """What an annotation file (gzipped or not) holds. UserError for an unknown format and broken polygons.
    `image` is the image's path: needed where a file (COCO, EXACT text) holds several images. Polygons may
    cross themselves, lie partly outside the image and have any number of points."""
    found, text = Found(path), read_text(path, REMEDY)
    start = text.lstrip().partition("\n")[0]
    obj = parse_json(text, path, REMEDY) if start.startswith(("{", "[")) else None
    first = obj[0] if isinstance(obj, list) and obj else obj
    if not start:
        raise UserError(f"{path}: an empty file; {REMEDY}, or leave the column empty for an image without")
    if start[0] == "<":
        read_asap(text, found)
    elif obj is None and "|" in start:
        read_exact_text(text, found, image)
    elif obj is None:
        raise UserError(f"{path}: begins with {show(start[:30])}, no known format; {REMEDY}")
    elif obj == [] or isinstance(first, dict) and first.get("type") in ("FeatureCollection", "Feature"):
        read_geojson(obj, found)
    elif isinstance(first, dict) and ("results" if first is obj else "vector") in first:
        read_exact_rest(obj, found)
    elif first is obj and "annotations" in obj:
        read_coco(obj, found, image)
    else:
        raise UserError(f"{path}: JSON of another kind ({show(obj)}); {REMEDY}")
    if found.problems:
        more = f" (and {len(found.problems) - 3} more)" if len(found.problems) > 3 else ""
        raise UserError(one_line(f"{path}: {'; '.join(found.problems[:3])}{more}; correct or delete "
                                 "them in the annotation program and export again"))
    return found


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
    part = name.rpartition(":")[2].strip()                      # QuPath's derived classes: "Tumor: 3+"
    guesses = [part] if part in classes.names else []
    guesses += ["LCIS/DCIS"] if re.search(r"\bin.?situ|dcis|lcis", text) else []      # whatever its staining
    guesses += [f"{score[1] or score[2]}+".replace("0+", "0")] if score else []
    tumor = re.search(r"tumou?r|carcinom|cancer|invasi|metasta|ignore|\?", text)
    if not tumor and re.search(r"strom|normal|benign|necro|fat\b|adipo|lympho|immune|vessel|muscle|"
                               r"background|glass|region", text):
        guesses.append(classes.names[0])
    close = get_close_matches(name, classes.names, n=1, cutoff=0.8) if len(name) > 3 else []
    return next((guess for guess in [*guesses, *close] if classes.knows(guess)), "ignore")


def _listed(names) -> str:
    shown = [name if name == NO_CLASS else show(name) for name in names[:30]]
    return ", ".join(shown) + ", ..." * (len(names) > 30)
