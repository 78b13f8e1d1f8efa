"""Readers of the annotation programs' files: from text, JSON or XML to polygons with class names.

    EXACT, text   slide|class|{"x1": 1, "y1": 2, ...}|        one annotation a line; integer pixels, no holes
    EXACT, REST   {"results": [{"vector": {"x1": 1, ...}, "annotation_type": {"name", "vector_type"}}]}
    QuPath        GeoJSON: Polygon or MultiPolygon, class in properties.classification
    ASAP          XML: Annotation/Coordinates/Coordinate, class in PartOfGroup
    COCO          {"images", "categories", "annotations": [{"category_id", "segmentation"}]}

Coordinates are pixels, x right, y down. Each reader fills a `Found`; data_checks says what is left out and
what is refused. Source: the files that these programs write; the paper (section 2.1) used EXACT.
"""

import re
from collections import Counter
from xml.etree import ElementTree

import numpy as np

from her2.data_checks import REMEDY, Malformed, as_list, as_name, as_object, choose_image, rows_of, show
from her2.data_classes import parse_json
from her2.run_errors import UserError
from her2.polygons import outlines

EXACT_OTHERS = {1: "box", 2: "point", 3: "line", 4: "lines", 6: "fixed box", 7: "whole image",
                5: "", None: ""}                     # a polygon, and so it is where the type is not given
DETECTED = "(not an annotation)"
GEOJSON_OTHERS = ("Point", "MultiPoint", "LineString", "MultiLineString", "GeometryCollection")
ASAP_POLYGONS = ("Polygon", "Spline", "Rectangle")   # a spline's control points are taken as corners
ASAP_OTHERS = ("Dot", "PointSet", "Measurement", "None")
DECIMAL = re.compile(r"[+-]?[0-9]+([.,][0-9]*)?([eE][+-]?[0-9]+)?")   # ASAP writes a comma in some locales
MAX_MASK_PIXELS = 1 << 29   # of a run-length coded mask: 512 MiB


def exact_vector(vector) -> list:
    """x1, y1, x2, y2, ... of {"x1":, "y1":, ...}; other keys, such as "frame", may stand among them."""
    count = sum(1 for key in as_object(vector) if re.fullmatch("[xy][0-9]+", key))
    keys = [f"{axis}{k}" for k in range(1, (count + 1) // 2 + 1) for axis in "xy"]
    missing = [key for key in keys if key not in vector]
    if missing:   # reading up to the gap would give another polygon
        raise Malformed(f"lacks {missing[0]} although it has {count} coordinates")
    return [vector[key] for key in keys]


def read_exact_text(text, found, image):
    """The text export. The last bar may be missing and a comma may stand before the brace; "not in image"
    says that an annotator found nothing there. The first column names the slide, there may be several."""
    lines = [(number, [part.strip() for part in line.split("|", 2)])
             for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    slides = {name: name for _, (name, *parts) in lines if parts} or {lines[0][1][0]: lines[0][1][0]}
    slide = choose_image(slides, image, found.path) if len(slides) > 1 else next(iter(slides))
    found.about = (slide, None, None)
    for number, (name, *parts) in lines:
        with found.annotation(f"line {number}"):
            last = "|".join(parts).rstrip("|").rpartition("|")[2].strip()
            other = "of another image" if name != slide else "not in image" * (last.lower() == "not in image")
            # A line that is cut off would be passed over as the name of another image.
            if not parts or not other and (len(parts) < 2 or not last.startswith("{")):
                raise Malformed(f"is {show('|'.join([name, *parts]))}, not "
                                'slide|class|{"x1": 1, "y1": 2, ...}|')
            if other:
                found.leave_out(other)
                continue
            try:
                numbers = exact_vector(parse_json(re.sub(r",\s*}$", "}", last), "cut off or damaged", ""))
            except UserError as error:
                raise Malformed(f"is {str(error).rstrip('; ')}") from error
            if len(numbers) in (2, 4):   # points and boxes: this format does not name the type
                found.leave_out(f"point or box ({len(numbers) // 2} vertices)")
            else:
                found.add([numbers], parts[0].strip(), number)


def exact_type(kind) -> tuple:
    """(class name, vector_type or None) of an annotation_type: an object, an id, or null."""
    if type(kind) is int:   # an id must not pass for a class: type 3 is not the score 3
        return f"annotation_type {kind}", None
    kind = {} if kind is None else as_object(kind)
    vector_type = kind.get("vector_type")
    if vector_type is not None and type(vector_type) is not int:
        raise Malformed(f"has vector_type {show(vector_type)}, not a whole number")
    return as_name(kind.get("name")), vector_type


def read_exact_rest(obj, found):
    """What EXACT's REST interface answers: an object with "results", or the list alone. Deleted annotations
    stay in it, and so do those that say something of the whole image (vector null)."""
    page = obj if isinstance(obj, dict) else {"results": obj}
    if page.get("next") or page.get("previous"):
        raise UserError(f'{found.path}: one page of several ("next" or "previous" is set), the rest is '
                        "missing; ask EXACT for all annotations with a larger limit")
    sources = set()
    for number, row in enumerate(rows_of(page["results"], "results", found.path), 1):
        with found.annotation(f"annotation {number}"):
            if "vector" not in as_object(row):
                raise Malformed(f"is {show(row)}, without a vector")
            name, vector_type = exact_type(row.get("annotation_type"))
            deleted, vector = row.get("deleted"), row["vector"]
            if deleted not in (None, False, True):
                raise Malformed(f'has "deleted": {show(deleted)}, neither true nor false')
            reason = "deleted" if deleted else "vector null" if vector is None else EXACT_OTHERS.get(
                vector_type, f"vector_type {vector_type}")
            if reason:
                found.leave_out(reason, lambda: [exact_vector(vector)])
            else:
                found.add([exact_vector(vector)], name, found.new_id(row.get("id"), number))
                sources.add(show(row.get("image")))
    if len(sources - {"None"}) > 1:
        raise UserError(f"{found.path}: annotations of several images ({', '.join(sorted(sources)[:5])}) "
                        "without their names; export one file per image")


def qupath_class(properties) -> str:
    """The class: {"name"}, {"names": [...]}, a text, or none, by QuPath's version. The annotation's own name
    is no class: people number their regions, and "2" would become the score 2+."""
    kind = properties.get("classification")
    kind = kind if isinstance(kind, dict) else {"name": kind}
    if kind.get("names") is not None:   # a derived class, which QuPath shows as "Tumor: 3+"
        return ": ".join(as_name(name) for name in as_list(kind["names"]))
    return as_name(kind.get("name"))


def qupath_object(feature, properties) -> str:
    """"annotation", or what else QuPath exports as polygons: "cell", "detection", "tile", "tma_core", ...
    QuPath says it in properties.objectType since 0.3, before in the id that all objects of a kind share."""
    match = re.fullmatch("(?:Path)?([A-Za-z]+)Object", str(feature.get("id")))
    kind = properties.get("objectType") or (match[1] if match else "annotation")
    return "cell" if "nucleusGeometry" in feature else str(kind).lower()


def read_geojson(obj, found):
    """QuPath's export: a FeatureCollection, a list of features, or one. Rings after the first are holes. What
    QuPath detected by itself (cells, tiles) is left out: its classes are a score per cell."""
    if isinstance(obj, dict):
        obj = [obj] if obj["type"] == "Feature" else obj.get("features")
    for number, feature in enumerate(rows_of(obj, "features", found.path), 1):
        with found.annotation(f"feature {number}"):
            if as_object(feature).get("type") != "Feature":
                raise Malformed(f"has the type {show(feature.get('type'))}, not Feature")
            geometry = as_object(feature.get("geometry") or {"type": None})
            kind, parts = geometry.get("type"), geometry.get("coordinates")
            if kind is None or kind in GEOJSON_OTHERS:
                found.leave_out(f"geometry {kind}")
                continue
            if kind not in ("Polygon", "MultiPolygon"):
                raise Malformed(f"has the geometry {show(kind)}, which GeoJSON does not know")
            properties = as_object(feature.get("properties") or {})
            source_id = found.new_id(feature.get("id"), number)
            # PAPER: an instance is one drawn polygon; the parts of a MultiPolygon are instances of their own.
            polygons = [[[value for point in as_list(ring) for value in as_list(point, least=2)[:2]]
                         for ring in as_list(rings, least=1)]
                        for rings in as_list([parts] if kind == "Polygon" else parts, least=1)]
            kind = qupath_object(feature, properties)
            for rings in polygons:
                if kind == "annotation":
                    found.add(rings, qupath_class(properties), source_id)
                else:
                    found.leave_out(f"{kind} {DETECTED}", lambda: rings)
    skipped = Counter(reason for reason, _ in found.left_out)
    if skipped and not found.polygons + found.problems and all(DETECTED in reason for reason in skipped):
        kinds = ", ".join(f"{count} x {reason.split()[0]}" for reason, count in skipped.items())
        raise UserError(f"{found.path}: no annotation, only what QuPath detected by itself ({kinds}); export "
                        "the selected annotations, or leave the cell empty for an image without tumor")


def asap_number(text) -> float:
    # Not float() alone: it also takes "nan", "1_0" and the digits of other scripts.
    if text is None or not DECIMAL.fullmatch(text.strip()):
        raise Malformed(f"has the coordinate {show(text)}, not a number")
    return float(text.strip().replace(",", "."))


def read_asap(text, found):
    """ASAP's XML. Coordinates count by their Order, not by their place; the class is the group, if any."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UserError(f"{found.path}: declares a document type or entities, refused since entities can "
                        "expand without end; remove the declaration, ASAP writes none")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"{found.path}: not whole XML ({error}); {REMEDY}") from error
    if root.tag != "ASAP_Annotations" and root.find(".//Annotation/Coordinates") is None:
        raise UserError(f"{found.path}: XML of another kind ({show(root.tag)}); {REMEDY}")
    for number, annotation in enumerate(root.iter("Annotation"), 1):
        with found.annotation(f"annotation {number} ({show(annotation.get('Name'))})"):
            kind, group = annotation.get("Type"), annotation.get("PartOfGroup")
            if kind in ASAP_OTHERS:
                found.leave_out(f"type {kind}")
                continue
            if kind not in ASAP_POLYGONS:
                raise Malformed(f"has the type {show(kind)}, which ASAP does not know")
            points = annotation.findall("Coordinates/Coordinate")
            if any(point.get("Order") is not None for point in points):
                numbers = [asap_number(point.get("Order")) for point in points]
                if len(set(numbers)) < len(numbers):
                    raise Malformed("has two coordinates of the same Order")
                points = [points[k] for k in np.argsort(numbers)]
            name = as_name(annotation.get("Name") if group in (None, "None") else group)
            found.add([[asap_number(point.get(axis)) for point in points for axis in "XY"]], name, number)


def run_length_polygons(code) -> list:
    """The polygons of a COCO mask {"size": [h, w], "counts": runs of 0 and 1 in turn, column by column}."""
    size, counts = as_list(code.get("size"), least=2), code.get("counts")
    if isinstance(counts, str):
        raise Malformed("has a mask in compressed run lengths; export polygons, or the masks as PNG")
    if not all(type(v) is int and v >= 0 for v in [*size, *as_list(counts)]) or len(size) != 2:
        raise Malformed(f"has the size {show(size)} and counts {show(counts)}, not whole numbers from 0")
    height, width = size
    # Before anything of that size is made: a few bytes can ask for terabytes.
    if not 0 < height * width <= MAX_MASK_PIXELS or sum(counts) != height * width:
        raise Malformed(f"has counts that sum to {sum(counts)} in a mask of {height} x {width} pixels")
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    if not flat.any():
        raise Malformed("has a mask without a pixel")
    return [[ring.ravel().tolist() for ring in rings] for rings in outlines(flat.reshape(width, height).T)]


def read_coco(obj, found, image):
    """COCO's object detection format. One file usually covers many images: `image` chooses by file name."""
    tables = {"categories": {}, "images": {}}                   # {id: row}
    for what, table in tables.items():
        for row in rows_of(obj.get(what, []), what, found.path):
            if not isinstance(row, dict) or type(row.get("id")) is not int or row["id"] in table:
                raise UserError(f"{found.path}: {what} has {show(row)}, without an id of its own; {REMEDY}")
            table[row["id"]] = row
    categories, images = tables.values()
    rows = rows_of(obj["annotations"], "annotations", found.path)
    sources = {key: row.get("file_name") for key, row in images.items()} or {
        row["image_id"]: row["image_id"] for row in rows
        if isinstance(row, dict) and type(row.get("image_id")) is int}
    wanted = choose_image(sources, image, found.path) if len(sources) > 1 else next(iter(sources), None)
    if wanted in images:
        found.about = tuple(images[wanted].get(key) for key in ("file_name", "width", "height"))
    for number, row in enumerate(rows, 1):
        with found.annotation(f"annotation {number}"):
            category, source = as_object(row).get("category_id"), row.get("image_id")
            if sources and (type(source) is not int or source not in sources):
                raise Malformed(f"has the image_id {show(source)}, which is none of the images")
            if type(category) is not int or category not in categories:
                raise Malformed(f"has the category_id {show(category)}, which is none of the categories")
            shape = row.get("segmentation")
            other = bool(sources) and source != wanted
            if other or shape in (None, []):
                found.leave_out("of another image" if other else "without segmentation")
                continue
            source_id, name = found.new_id(row.get("id"), number), as_name(categories[category].get("name"))
            if isinstance(shape, dict):
                polygons = run_length_polygons(shape)
            else:   # the parts of one object; some sets write a single part without the outer list
                polygons = [[part] for part in (shape if isinstance(as_list(shape)[0], list) else [shape])]
            for rings in polygons:
                found.add([as_list(ring) for ring in rings], name, source_id)
