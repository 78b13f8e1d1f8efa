"""Readers of the annotation programs' files: from text, JSON or XML to polygons with class names.

    EXACT, text   slide|class|{"x1": 1, "y1": 2, ...}|        one annotation a line; integer pixels, no holes
    EXACT, REST   {"results": [{"vector": {"x1": 1, ...}, "annotation_type": {"name", "vector_type"}}]}
    QuPath        GeoJSON: Polygon or MultiPolygon, class in properties.classification
    ASAP          XML: Annotation/Coordinates/Coordinate, class in PartOfGroup
    COCO          {"images", "categories", "annotations": [{"category_id", "segmentation"}]}

Coordinates are pixels, x right, y down. The format is told by the content, not by the suffix: EXACT and COCO
both write `.json`, QuPath writes either. Each reader fills a `Found`; data_annotations says what is left out
and what is refused. Source: the files that these programs write; the paper (section 2.1) used EXACT.
"""

import re
from collections import Counter
from functools import lru_cache
from xml.etree import ElementTree

import numpy as np

from her2.data_annotations import REMEDY, Found, as_name, choose_image, show, want
from her2.data_classes import parse_json, read_text
from her2.run_errors import UserError, one_line

EXACT_OTHERS = {1: "box", 2: "point", 3: "line", 4: "lines", 5: "", 6: "fixed box", 7: "whole image"}
NOWHERE = "not in image"                             # what an annotator says of a class that is not there
DETECTED = "(not an annotation)"
GEOJSON_OTHERS = (None, "Point", "MultiPoint", "LineString", "MultiLineString", "GeometryCollection")
ASAP_POLYGONS = ("Polygon", "Spline", "Rectangle")   # a spline's control points are taken as corners
ASAP_OTHERS = ("Dot", "PointSet", "Measurement", "None")
# One file may be that of many images (COCO): it is parsed for the first of them alone.
parse_once = lru_cache(maxsize=1)(parse_json)
DECIMAL = re.compile(r"\s*[+-]?[0-9]+([.,][0-9]*)?([eE][+-]?[0-9]+)?\s*")   # a comma in some locales


def read_file(path, image=None) -> Found:
    """What an annotation file (gzipped or not) holds. UserError for an unknown format and broken polygons.
    `image` is the image's path: needed where a file (COCO, EXACT text) holds several images. Polygons may
    cross themselves, lie partly outside the image and have any number of points."""
    found, text = Found(path), read_text(path, REMEDY)
    start = text.lstrip().partition("\n")[0]
    obj = parse_once(text, path, REMEDY) if start.startswith(("{", "[")) else None
    first = obj[0] if isinstance(obj, list) and obj else obj
    keys = first if isinstance(first, dict) else {}
    with found.part("the file"):
        if not start:
            raise UserError("is an empty file: for an image without tumor, leave the cell empty")
        if start[0] == "<":
            read_asap(text, found)
        elif obj is None and "|" in start:
            read_exact_text(text, found, image)
        elif obj == [] or keys.get("type") in ("FeatureCollection", "Feature"):
            read_geojson(obj, found)
        elif ("results" if first is obj else "vector") in keys:
            read_exact_rest(obj, found)
        elif first is obj and "annotations" in keys:
            read_coco(obj, found, image)
        else:
            raise UserError(f"is of no known format (it begins with {show(start)})")
    if found.problems:
        more = f" (and {len(found.problems) - 3} more)" if len(found.problems) > 3 else ""
        raise UserError(one_line(f"{path}: {'; '.join(found.problems[:3])}{more}; {REMEDY}"))
    return found


def read_exact_text(text, found, image):
    """The text export. The last bar may be missing and a comma may stand before the brace; "not in image"
    says that an annotator found nothing there. The first column names the slide, there may be several."""
    lines = [(number, [field.strip() for field in line.rstrip("| ").split("|")])
             for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    slide = choose_image({fields[0]: fields[0] for _, fields in lines if len(fields) > 1}, image)
    found.about = (slide, None, None)
    for number, fields in lines:
        with found.part(f"line {number}"):
            nowhere = len(fields) > 1 and fields[-1].lower() == NOWHERE
            # A line that is cut off must not pass for one of another image.
            if not nowhere and not (len(fields) == 3 and fields[2].startswith("{")):
                raise UserError(f'is {show("|".join(fields))}, not slide|class|{{"x1": 1, "y1": 2, ...}}|')
            if fields[0] != slide:
                found.leave_out("of another image")
                continue
            vector = None if nowhere else parse_json(re.sub(r",\s*}$", "}", fields[2]), "is damaged", "")
            add_exact({"vector": vector, "annotation_type": {"name": fields[1]}}, number, found)


def read_exact_rest(obj, found):
    """What EXACT's REST interface answers: an object with "results", or the list alone."""
    page = obj if isinstance(obj, dict) else {"results": obj}
    if page.get("next") or page.get("previous"):
        raise UserError('is one page of several ("next" or "previous" is set), the rest is missing: ask '
                        "EXACT for all annotations with a larger limit")
    sources = set()
    for number, row in enumerate(want(list, page["results"]), 1):
        with found.part(f"annotation {number}"):
            if "vector" not in want(dict, row):
                raise UserError(f"is {show(row)}, without a vector")
            add_exact(row, number, found)
            sources.add(show(row.get("image")))
    if len(sources - {"None"}) > 1:
        raise UserError(f"has annotations of several images ({', '.join(sorted(sources)[:5])}) without their "
                        "names: export one file per image")


def add_exact(row, number, found):
    """One annotation of EXACT. Deleted ones stay in the database, and so do those that say something of the
    whole image (vector null). Keys such as "frame" may stand among the coordinates."""
    vector, kind, deleted = row["vector"], row.get("annotation_type"), want(bool, row.get("deleted", False))
    if type(kind) is int:   # an id must not pass for a class: type 3 is not the score 3
        kind = {"name": f"annotation_type {kind}"}
    kind = want(dict, {} if kind is None else kind)
    keys = [key for key in want(dict, vector or {}) if re.fullmatch("[xy][0-9]+", key)]
    # Half as many points as keys: where a key is missing, a coordinate is None, and no other polygon is read.
    ring = [[vector.get(f"x{k}"), vector.get(f"y{k}")] for k in range(1, (len(keys) + 1) // 2 + 1)]
    shape = kind.get("vector_type")
    if shape is None:       # the text export names no type, but a point has two numbers and a box four
        shape = {2: 2, 4: 1}.get(len(keys), 5)
    reason = ("deleted" if deleted else NOWHERE if vector is None else
              EXACT_OTHERS.get(want(int, shape), f"vector_type {shape}"))
    if reason:
        found.leave_out(reason, [ring])
    else:
        found.add([ring], as_name(kind.get("name")), found.new_id(row.get("id"), number))


def qupath_class(properties) -> str:
    """The class: {"name"}, {"names": [...]}, a text, or none, by QuPath's version. The annotation's own name
    is no class: people number their regions, and "2" would become the score 2+."""
    kind = properties.get("classification")
    kind = kind if isinstance(kind, dict) else {"name": kind}
    if kind.get("names") is not None:   # a derived class, which QuPath shows as "Tumor: 3+"
        return ": ".join(as_name(name) for name in want(list, kind["names"]))
    return as_name(kind.get("name"))


def read_geojson(obj, found):
    """QuPath's export: a FeatureCollection, a list of features, or one. Rings after the first are holes. What
    QuPath detected by itself (cells, tiles) is left out: its classes are a score per cell."""
    if isinstance(obj, dict):
        obj = [obj] if obj["type"] == "Feature" else obj.get("features")
    for number, feature in enumerate(want(list, obj), 1):
        with found.part(f"feature {number}"):
            if want(dict, feature).get("type") != "Feature":
                raise UserError(f"has the type {show(feature.get('type'))}, not Feature")
            geometry = want(dict, feature.get("geometry") or {})
            properties = want(dict, feature.get("properties") or {})
            shape, parts = geometry.get("type"), geometry.get("coordinates")
            if shape in GEOJSON_OTHERS:
                found.leave_out(f"geometry {shape}")
                continue
            if shape not in ("Polygon", "MultiPolygon"):
                raise UserError(f"has the geometry {show(shape)}, which GeoJSON does not know")
            # "annotation", "cell", "detection", ...: in objectType since QuPath 0.3, before in the id, which
            # all objects of a kind share ("PathCellObject").
            own = feature.get("id")
            shared = isinstance(own, str) and re.fullmatch("(?:Path)?([A-Za-z]+)Object", own)
            kind = as_name(properties.get("objectType")) or (shared[1] if shared else "annotation")
            kind = "cell" if "nucleusGeometry" in feature else kind.lower()
            source_id = found.new_id(None if shared else own, number)
            # PAPER: an instance is one drawn polygon; the parts of a MultiPolygon are instances of their own.
            for rings in [parts] if shape == "Polygon" else want(list, parts, least=1):
                if kind == "annotation":
                    found.add(rings, qupath_class(properties), source_id)
                else:
                    found.leave_out(f"{kind} {DETECTED}", rings)
    skipped = Counter(reason.split()[0] for reason, _ in found.left_out if DETECTED in reason)
    if skipped and not found.polygons + found.problems:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in skipped.items())
        raise UserError(f"has no annotation, only what QuPath detected by itself ({kinds}): export the "
                        "annotations, or leave the cell empty for an image without tumor")


def asap_number(text):
    """The number in an XML attribute; a text that is none stays as it is, and `make_ring` refuses it."""
    # Not float() alone: it also takes "nan", "1_0" and the digits of other scripts.
    return float(text.replace(",", ".")) if DECIMAL.fullmatch(text or "") else text


def read_asap(text, found):
    """ASAP's XML. Coordinates count by their Order, if they have one; the class is the group, if any."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UserError("declares a document type or entities, refused since entities can expand without "
                        "end: remove the declaration, ASAP writes none")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"is not whole XML ({error})") from error
    if root.tag != "ASAP_Annotations" and root.find(".//Annotation/Coordinates") is None:
        raise UserError(f"is XML of another kind ({show(root.tag)})")
    for number, annotation in enumerate(root.iter("Annotation"), 1):
        with found.part(f"annotation {number} ({show(annotation.get('Name'))})"):
            kind, group = annotation.get("Type"), annotation.get("PartOfGroup")
            if kind in ASAP_OTHERS:
                found.leave_out(f"type {kind}")
                continue
            if kind not in ASAP_POLYGONS:
                raise UserError(f"has the type {show(kind)}, which ASAP does not know")
            points = annotation.findall("Coordinates/Coordinate")
            order = [want(float, asap_number(point.get("Order", str(k)))) for k, point in enumerate(points)]
            if len(set(order)) < len(order):
                raise UserError("has two coordinates of the same Order")
            ring = [[asap_number(points[k].get(axis)) for axis in "XY"] for k in np.argsort(order)]
            name = as_name(annotation.get("Name") if group in (None, "None") else group)
            found.add([ring], name, number)


def read_coco(obj, found, image):
    """COCO's object detection format. One file usually covers many images: `image` chooses by file name."""
    tables = {}                                                 # {"images": {id: row}, "categories": ...}
    for what in ("images", "categories"):
        rows = [want(dict, row) for row in want(list, obj.get(what))]
        tables[what] = {want(int, row.get("id")): row for row in rows}
        if len(tables[what]) < len(rows):
            raise UserError(f"has two {what} of the same id")
    wanted = choose_image({key: row.get("file_name") for key, row in tables["images"].items()}, image)
    found.about = tuple(tables["images"].get(wanted, {}).get(key) for key in ("file_name", "width", "height"))
    for number, row in enumerate(want(list, obj["annotations"]), 1):
        with found.part(f"annotation {number}"):
            for key, what in (("image_id", "images"), ("category_id", "categories")):
                value = want(dict, row).get(key)
                if type(value) is not int or value not in tables[what]:
                    raise UserError(f"has the {key} {show(value)}, which is none of the {what}")
            parts = row.get("segmentation")
            if row["image_id"] != wanted or parts in (None, []):
                found.leave_out("of another image" if row["image_id"] != wanted else "without segmentation")
                continue
            if isinstance(parts, dict):
                raise UserError("has a mask in run lengths: export polygons, or the masks as PNG")
            source_id = found.new_id(row.get("id"), number)
            name = as_name(tables["categories"][row["category_id"]].get("name"))
            for part in want(list, parts):                      # the parts of one object: x, y, x, y, ...
                ring = [part[k:k + 2] for k in range(0, len(want(list, part)), 2)]
                found.add([ring], name, source_id)
