"""Annotation files: each format written and read back, the traps of each, and what a bad file says.

The writers below follow the descriptions of the formats; the project writes only what its phantom needs.
"""

import json
from collections import Counter

import numpy as np
import pytest
from data_factory import read_annotations

from her2.data_annotations import likely_class, place_polygons, polygon_classes
from her2.data_classes import DEFAULT_CLASSES, IGNORE, ClassTable
from her2.run_errors import UserError
from her2.polygons import paint
from parity_polygons import rasterize

SQUARE = [(2, 2), (12, 2), (12, 12), (2, 12)]
ISLAND = [(5, 5), (8, 5), (8, 9), (5, 9)]
NEIGHBOUR = [(12, 2), (20, 2), (20, 12), (12, 12)]
ODD = [(1.25, 14.5), (9.75, 13.0), (6.5, 19.125)]


def flat(ring):
    return [value for point in ring for value in point]


def vector(ring):
    return {f"{axis}{k}": value for k, point in enumerate(ring, 1) for axis, value in zip("xy", point)}


def exact_text(shapes, slide="s.tif"):
    return "".join(f"{slide}|{name}|{json.dumps(vector(ring))}|\n" for name, [ring] in shapes)


def exact_rest(shapes):
    return json.dumps({"count": len(shapes), "next": None, "previous": None, "results": [
        {"id": 10 + k, "image": 3, "deleted": False, "vector": vector(ring),
         "annotation_type": {"id": 7, "name": name, "vector_type": 5, "closed": True}}
        for k, (name, [ring]) in enumerate(shapes)]})


def feature(name, rings, **more):
    coordinates = [[list(point) for point in [*ring, *ring[:1]]] for ring in rings]
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": coordinates},
            "properties": {"objectType": "annotation", "classification": {"name": name}}, **more}


def geojson(shapes):
    features = [feature(name, rings, id=f"id-{k}") for k, (name, rings) in enumerate(shapes)]
    return json.dumps({"type": "FeatureCollection", "features": features})


def asap(shapes):
    rows = []
    for k, (name, [ring]) in enumerate(shapes):
        points = [f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in enumerate(ring)]
        rows.append(f'<Annotation Name="Annotation {k}" Type="Polygon" PartOfGroup="{name}" Color="#F4FA58">'
                    f'<Coordinates>{"".join(points[::-1])}</Coordinates></Annotation>')
    return ('<?xml version="1.0"?>\n<ASAP_Annotations><Annotations>' + "".join(rows)
            + "</Annotations><AnnotationGroups /></ASAP_Annotations>")


def coco(shapes):
    names = list(dict.fromkeys(name for name, _ in shapes))
    return json.dumps({
        "images": [{"id": 4, "file_name": "a/s.png", "width": 24, "height": 20}],
        "categories": [{"id": 50 + k, "name": name} for k, name in enumerate(names)],
        "annotations": [{"id": k, "image_id": 4, "category_id": 50 + names.index(name), "iscrowd": 0,
                         "segmentation": [flat(ring)]} for k, (name, [ring]) in enumerate(shapes)]})


WRITERS = {"exact.txt": exact_text, "exact.json": exact_rest, "qupath.geojson": geojson, "asap.xml": asap,
           "coco.json": coco}
SHAPES = [("1+", [SQUARE]), ("Stroma", [ISLAND]), ("3+", [NEIGHBOUR]), ("LCIS/DCIS", [ODD])]


@pytest.fixture
def read(tmp_path):
    def read(content, name="file", image=None):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return read_annotations(path, image)
    return read


def labels(polygons, height=20, width=24):
    return paint([p.rings for p in polygons], polygon_classes(polygons, DEFAULT_CLASSES, "f"), height, width)


@pytest.mark.parametrize("name", WRITERS)
def test_round_trip(name, read):
    """Stroma inside tumor, touching polygons of two subtypes, fractions of a pixel: always the same."""
    polygons, skipped = read(WRITERS[name](SHAPES), name)
    assert [p.name for p in polygons] == [name for name, _ in SHAPES] and not skipped
    for polygon, (_, [ring]) in zip(polygons, SHAPES):
        assert np.array_equal(polygon.rings, [ring]) and polygon.rings[0].dtype == np.float64
    label, instance = labels(polygons)
    assert (label[5:9, 5:8] == 0).all() and (label[2:12, 2:12] == 2).sum() == 100 - 12
    assert (instance[2:12, 12:20] == 3).all() and (label[2:12, 12:20] == 4).all()
    assert np.array_equal(instance == 4, rasterize([np.array(ODD)], 20, 24))
    assert (label[instance == 4] == 5).all()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("change", ["mark", "crlf", "blank ends", "upper suffix"])
def test_harmless_differences_change_nothing(name, change, read):
    text = WRITERS[name](SHAPES)
    content = {"mark": b"\xef\xbb\xbf" + text.encode(), "crlf": text.replace("\n", "\r\n"),
               "blank ends": f"{text}\n \n\n", "upper suffix": text}[change]
    polygons, _ = read(content, name.upper() if change == "upper suffix" else name)
    assert [p.name for p in polygons] == [name for name, _ in SHAPES]


@pytest.mark.parametrize("name", WRITERS)
def test_a_hundred_thousand_vertices_and_self_crossing(name, read):
    angle = np.linspace(0, 14 * np.pi, 100_000, endpoint=False)
    spiral = 500 + 9 * angle * np.stack([np.cos(angle), np.sin(angle)])
    ring = list(map(tuple, spiral.T.round(3).tolist()))
    [polygon], _ = read(WRITERS[name]([("2+", [ring])]), name)
    assert polygon.rings[0].shape == (100_000, 2) and rasterize(polygon.rings, 64, 64).shape == (64, 64)


BROKEN = {   # a polygon that is none, in every format -> what the message says
    "no point": ([], "0 points"), "one point": ([(1, 1)], "1 points"), "two points": (SQUARE[:2], "2 points"),
    "there and back": ([(1, 1), (5, 5), (1, 1)], "points"), "line": ([(1, 1), (5, 5), (9, 9)], "no area"),
    "one place": ([(3, 3)] * 5, "no area"), "far line": ([(1e7, 1e7 + k) for k in range(4)], "no area"),
    **{f"x is {str(x)[:9]}": ([(1, 1), (x, 5), (9, 1)], what) for x, what in (
        (float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "inf"), (1e9, "up to 1e+08"),
        (-1e9, "up to 1e+08"), (10 ** 400, "up to 1e+08"), ("five", "not a number"), ("5", "not a number"),
        (None, "not a number"),
        (True, "not a number"), ([5], "not a number"), ({}, "not a number"))},
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_polygon_is_never_dropped_in_silence(name, case, read, tmp_path):
    ring, what = BROKEN[case]
    content = WRITERS[name]([("1+", [SQUARE]), ("2+", [ring])])
    if name == "exact.txt" and len(ring) in (1, 2):   # points and boxes, which this format does not name
        polygons, skipped = read(content, name)
        assert len(polygons) == 1 and skipped == {{1: "point", 2: "box"}[len(ring)]: 1}
        return
    if name == "asap.xml" and ring[1:2] == [("5", 5)]:   # text is how XML writes a number
        assert len(read(content, name)[0]) == 2
        return
    with pytest.raises(UserError) as error:
        read(content, name)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / name}: ") and "\n" not in message and len(message) < 600
    assert what in message or name == "asap.xml" and "not a number" in message
    assert "correct it" in message


def test_all_broken_polygons_of_a_file_are_named_at_once(read):
    shapes = [("1+", [SQUARE[:2]]), ("1+", [SQUARE]), ("1+", [SQUARE[:1]])] + [("1+", [SQUARE[:2]])] * 4
    with pytest.raises(UserError, match=r"annotation 1 has 2 points.*annotation 3 has 1 p.*\(and 3 more\)"):
        read(exact_rest(shapes))


def test_exact_text_details(read):
    polygons, skipped = read(
        's.tif|2+|{"x1":2,"y1":2,"x2":12,"y2":2,"frame":0,"x3":12,"y3":12,}\n'      # last comma, no last pipe
        's.tif| LCIS/DCIS |{"y1":-3,"x1":-2.5,"x2":3,"y2":0,"x3":0,"y3":9}|\n'
        "s.tif|2+|not in image\n\ns.tif|not in image|\n")
    assert [(p.name, p.source_id) for p in polygons] == [("2+", "1"), ("LCIS/DCIS", "2")]
    assert polygons[0].rings[0].tolist() == [[2, 2], [12, 2], [12, 12]]
    assert polygons[1].rings[0].tolist() == [[-2.5, -3], [3, 0], [0, 9]], "negative coordinates are legal"
    assert skipped == {"not in image": 2}


def test_exact_text_of_several_slides(read):
    text = exact_text([("1+", [SQUARE])], "a/one.tif") + exact_text([("2+", [SQUARE])] * 2, "two.tif")
    for image, count in (("images/one.tif", 1), ("one.png", 1), ("C:\\x\\two.tif", 2)):
        polygons, skipped = read(text, image=image)
        assert len(polygons) == count and skipped == {"of another image": 3 - count}
    with pytest.raises(UserError, match="line 4 is 'two.tif|2'"):
        read(text + "two.tif|2", image="one.tif")                   # cut off: of another image, but broken
    for image in (None, "three.tif"):
        with pytest.raises(UserError, match="2 images .*one file per image"):
            read(text, image=image)


def test_exact_rest_details(read):
    def row(**changes):
        kind = {"id": 3, "name": "2+", "vector_type": 5}
        return {"id": 1, "image": 8, "deleted": False, "vector": vector(SQUARE), "annotation_type": kind,
                **changes}

    rows = [row(), row(id=2, deleted=True), row(id=3, vector=None),
            row(id=4, annotation_type={"name": "Mitosis", "vector_type": 2}, vector={"x1": 1, "y1": 2}),
            row(id=5, annotation_type={"name": "Area", "vector_type": 1}), row(id=6, annotation_type=3),
            row(id=7, annotation_type=None), row(id=None, annotation_type={"name": " 3+ "}),
            row(id=9, vector={"frame": 0, **vector(ISLAND)})]
    for content in ({"results": rows}, rows):
        polygons, skipped = read(json.dumps(content))
        assert [p.name for p in polygons] == ["2+", "annotation_type 3", "", "3+", "2+"]
        assert [p.source_id for p in polygons] == ["1", "6", "7", "8", "9"]
        assert skipped == {"deleted": 1, "not in image": 1, "point": 1, "box": 1}
    with pytest.raises(UserError, match="unknown class 'annotation_type 3', \\(none\\)"):
        polygon_classes(polygons, DEFAULT_CLASSES, "f")    # type 3 is not the score 3

    gap = vector(SQUARE * 2)
    del gap["x5"]
    for changes, what in (
        (dict(vector=gap), "coordinate None"), (dict(vector=[1, 2]), "object should stand"),
        (dict(deleted="false"), "true or false"), (dict(annotation_type="2+"), "object should stand"),
        (dict(annotation_type={"name": 2}), "2 where a text"),
        (dict(annotation_type={"name": "2+", "vector_type": "5"}), "'5' where a whole number"),
    ):
        with pytest.raises(UserError, match=what):
            read(json.dumps({"results": [row(**changes)]}))
    for content, what in (
        ({"results": [row(), row()]}, "id 1, which stands twice"), ({"results": [7]}, "object"),
        ({"results": [{"id": 1}]}, "without a vector"), ({"results": {}}, "where a list"),
        ({"results": [row(), row(id=2, image=9)]}, "several images"),
        ({"results": [], "next": "http://exact/?offset=50"}, "one page of several"),
    ):
        with pytest.raises(UserError, match=what):
            read(json.dumps(content))
    assert read(json.dumps({"results": []})) == ([], Counter())


def test_geojson_details(read):
    hole = [(4, 4), (9, 4), (9, 9), (4, 9)]
    island = [(6, 6), (7, 6), (7, 7), (6, 7)]
    parts = [[SQUARE + SQUARE[:1], hole], [island], [NEIGHBOUR]]
    multi = {"type": "Feature", "id": 5, "geometry": {"type": "MultiPolygon", "coordinates": parts},
             "properties": {"classification": {"name": "3+"}}}
    polygons, skipped = read(json.dumps(multi))
    assert [len(p.rings) for p in polygons] == [2, 1, 1] and not skipped
    assert {p.source_id for p in polygons} == {"5"}
    label, instance = labels(polygons)
    assert not label[4:6, 4:9].any() and label[6, 6] == 4 and instance[6, 6] == 2, "an island in a hole"

    classes = [
        ({"classification": {"names": ["Tumor", "3+"]}}, "Tumor: 3+"), ({"classification": "2+"}, "2+"),
        ({"classification": {"name": "1+", "color": [1, 2, 3]}}, "1+"), ({"name": "DCIS"}, ""),
        ({"classification": {"names": ["0"], "name": "x"}, "name": "y"}, "0"), ({}, ""), (None, ""),
        ({"classification": None, "name": "2"}, ""), ({"classification": {"name": None}}, ""),
    ]
    features = [dict(feature("", [SQUARE]), properties=properties) for properties, _ in classes]
    polygons, _ = read(json.dumps(features))
    assert [p.name for p in polygons] == [name for _, name in classes]

    other = [{"type": "Feature", "geometry": geometry, "properties": {}} for geometry in (
        {"type": "Point", "coordinates": [1, 2]}, {"type": "LineString", "coordinates": [[1, 2], [3, 4]]},
        None)]
    polygons, skipped = read(json.dumps([*other, feature("2+", [SQUARE])]))
    assert len(polygons) == 1
    assert skipped == {"geometry Point": 1, "geometry LineString": 1, "geometry None": 1}
    height = [[x, y, 0.0] for x, y in SQUARE]
    assert read(json.dumps(feature("2+", [height])))[0][0].rings[0].shape == (4, 2)
    assert read("[]") == ([], Counter())
    assert read('{"type": "FeatureCollection", "features": []}') == ([], Counter())

    good = feature("2+", [SQUARE])
    for bad, what in (
        (feature("2+", [SQUARE, hole[:2]]), "2 points"), (feature(7, [SQUARE]), "7 where a text"),
        (feature({"x": 1}, [SQUARE]), "where a text"), (dict(good, type="f"), "Feature"),
        (dict(good, geometry=[1]), "object"),
        (dict(good, properties=[1]), "object"),
        (dict(good, geometry={"type": "Circle"}), "GeoJSON does not know"),
        (dict(good, geometry={"type": "Polygon"}), "None where a list"),
        *[(dict(good, geometry={"type": "Polygon", "coordinates": parts}), what) for parts, what in (
            ([], "list of 1"), ([[1, 2, 3]], "1 where a list"), ([[[1], [2], [3]]], "list of 2"))],
    ):
        with pytest.raises(UserError, match=what):
            read(json.dumps({"type": "FeatureCollection", "features": [bad]}))
    with pytest.raises(UserError, match="id 'a', which stands twice"):
        read(json.dumps([feature("2+", [SQUARE], id="a"), feature("2+", [ISLAND], id="a")]))


def test_asap_details(read):
    def annotation(points, **attributes):
        inside = "".join("<Coordinate " + " ".join(f'{k}="{v}"' for k, v in p.items()) + "/>" for p in points)
        attributes = {"Name": "n", "Type": "Polygon", "PartOfGroup": "2+", **attributes}
        return ("<Annotation " + " ".join(f'{k}="{v}"' for k, v in attributes.items() if v is not None)
                + f"><Coordinates>{inside}</Coordinates></Annotation>")

    def document(*annotations):
        return f"<ASAP_Annotations><Annotations>{''.join(annotations)}</Annotations></ASAP_Annotations>"

    points = [{"Order": k, "X": x, "Y": y} for k, (x, y) in enumerate(SQUARE)]
    comma = [{"Order": str(k), "X": f"{x},5", "Y": f"{y}.25"} for k, (x, y) in enumerate(SQUARE)]
    unordered = [{"X": x, "Y": y} for x, y in SQUARE]
    polygons, skipped = read(document(
        annotation(points[2:] + points[:2]), annotation(comma, Type="Spline"),
        annotation(unordered, Type="Rectangle"), annotation(points, PartOfGroup="None", Name="DCIS"),
        annotation(points, PartOfGroup=None, Name="0"), annotation(points[:1], Type="Dot"),
        annotation(points, Type="Measurement"), annotation(points, Type="PointSet")))
    assert [p.name for p in polygons] == ["2+", "2+", "2+", "DCIS", "0"]
    assert np.array_equal(polygons[0].rings[0], SQUARE) and np.array_equal(polygons[2].rings[0], SQUARE)
    assert np.array_equal(polygons[1].rings[0], np.array(SQUARE) + (0.5, 0.25))
    assert skipped == {"type Dot": 1, "type Measurement": 1, "type PointSet": 1}
    many = [{"Order": k, "X": k, "Y": k * k} for k in range(12)]             # 10 comes after 9, not after 1
    assert read(document(annotation(many)))[0][0].rings[0][:, 0].tolist() == list(range(12))
    assert read("<ASAP_Annotations><Annotations/></ASAP_Annotations>") == ([], Counter())

    for bad, what in (
        (annotation([dict(p, Order=1) for p in points]), "same Order"), (annotation([]), "0 points"),
        (annotation(points, Type=None), "not know"),
        (annotation(points, Type="Blob"), "not know"), (annotation([{"Order": 0, "X": 1}]), "not a number"),
        *[(annotation([*points, {"Order": 9, "X": x, "Y": 0}]), "not a number")
          for x in ("nan", "inf", "1,234.5", "1 2", "0x10", "1_0", "", "\u0663")],
        (annotation([*points, {"Order": 9, "X": "1e999", "Y": 0}]), "up to 1e.08"),
    ):
        with pytest.raises(UserError, match=what):
            read(document(bad))


@pytest.mark.parametrize("content, what", [
    ('<!DOCTYPE a [<!ENTITY x "y">]><ASAP_Annotations/>', "refused"),
    ('<!DOCTYPE a SYSTEM "file:///etc/hostname"><ASAP_Annotations/>', "refused"),
    ("<ASAP_Annotations><Annotations>", "not whole XML"), ("<a></b>", "not whole XML"),
    ("<", "not whole XML"),
    ("<ASAP_Annotations>&x;</ASAP_Annotations>", "not whole XML"), ("<html><body/></html>", "another kind"),
    ("<Annotations><Annotation><Regions/></Annotation></Annotations>", "another kind"),
    ("<a>" * 50_000 + "</a>" * 50_000, "another kind"),
])
def test_xml_of_another_kind(content, what, read):
    with pytest.raises(UserError, match=what):
        read(content, "a.xml")


def test_coco_details(read):
    def document(*annotations, **more):
        rows = [{"id": k, "image_id": 4, "category_id": 2, **a} for k, a in enumerate(annotations)]
        return json.dumps({"images": [{"id": 4, "file_name": "s.png"}], "annotations": rows,
                           "categories": [{"id": 2, "name": "2+"}], **more})

    polygons, skipped = read(document(
        {"segmentation": [flat(SQUARE), flat(NEIGHBOUR)]}, {"segmentation": [flat(ISLAND)]},
        {"bbox": [1, 2, 3, 4]},
        {"segmentation": []}))
    assert [(p.source_id, len(p.rings)) for p in polygons] == [("0", 1), ("0", 1), ("1", 1)]
    assert skipped == {"without segmentation": 2} and np.array_equal(polygons[2].rings[0], ISLAND)

    for counts in (":46N", [0, 480]):
        with pytest.raises(UserError, match="run lengths: export polygons, or the masks as PNG"):
            read(document({"segmentation": {"size": [20, 24], "counts": counts}}))

    good, second = {"segmentation": [flat(SQUARE)]}, {"segmentation": [flat(ISLAND)], "image_id": 5}
    several = dict(images=[{"id": 4, "file_name": "a/s.png"}, {"id": 5, "file_name": "t.png"}])
    polygons, skipped = read(document(good, second, **several), image="images/t.jpg")
    assert [p.source_id for p in polygons] == ["1"] and skipped == {"of another image": 1}
    for bad, what in (
        (document(good, **several), "of 2 images"), (document(good, images=[]), "image_id 4"),
        (document(dict(good, category_id=3)), "category_id 3"),
        (document(dict(good, image_id=9)), "image_id 9"),
        (document(dict(good, category_id=[2])), "category_id"),
        (document(good, dict(good, id=0)), "stands twice"),
        (document({"segmentation": [flat(SQUARE) + [1]]}), "list of 2"),
        (document({"segmentation": [flat(SQUARE), 5]}), "list"), (document({"segmentation": "x"}), "list"),
        (document(good, categories=[{"id": 2, "name": 5}]), "5 where a text"),
        (document(categories={}), "where a list"),
        (document(categories=[{"id": 2}, {"id": 2}]), "of the same id"),
        (document(annotations={}), "where a list"),
        (document(images=[{"file_name": "s"}]), "None where a whole number"),
    ):
        with pytest.raises(UserError, match=what):
            read(bad)
    assert read(document()) == ([], Counter())


@pytest.mark.parametrize("content, what", [
    (b"", "empty file"), (b"\n \r\n", "empty file"), (b"\xef\xbb\xbf", "empty file"),
    (b"\xff\xfe{\x00", "'utf-8' codec"), (b"caf\xe9|2+|{}", "'utf-8' codec"),
    (b"\x89PNG\r\n\x1a\n\x00", "'utf-8' codec"), (b"hello", "no known format"),
    (b"slide,class,x,y\n", "no known format"), (b"s|2+\n", "line 1 is"), (b"s|2+|\n", "line 1 is"), (b's|a|b|{"x1":1}\n', "line 1 is"),
    (b's|2+|{"x1":1,"y1":2,"x2', "line 1 is damaged"), (b"[" * 200_000, "too deep"), (b"{}", "no known format"),
    (b'{"a":' * 200_000, "too deep"), (b'{"type": "Polygon", "coordinates": []}', "no known format"),
    (b'{"type": "FeatureCollection"}', "where a list"), (b'{"features": []}', "no known format"),
    (b'{"images": [], "categories": []}', "no known format"), (b'{"results": [1}', "not JSON"),
    (b'{"results": [], "results": []}', "twice"), (b'[{"results": []}]', "no known format"),
    (b"{'results': []}", "not JSON"), (b"[null]", "no known format"), (b"[[]]", "no known format"),
    (b"[5]", "no known format"),
])
def test_files_of_no_known_kind(content, what, read, tmp_path):
    with pytest.raises(UserError) as error:
        read(content, "notes.json")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'notes.json'}: ") and what in message and "; " in message
    assert "\n" not in message and len(message) < 500


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "gone.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_annotations(path)


@pytest.mark.parametrize("name", WRITERS)
def test_cut_off_anywhere(name, read):
    """A download that broke off must not pass for a slide with less tumor. In text, line ends hide it."""
    text = WRITERS[name](SHAPES[:2])
    for length in range(0, len(text.rstrip()), 1 if name == "exact.txt" else 5):
        try:
            polygons, _ = read(text[:length], name)
        except UserError:
            continue
        assert name == "exact.txt" and text[:length].rstrip("|\n").endswith("}")
        assert len(polygons) == text[:length].count("}")


def replaced(value, rng, what):
    """A JSON value in which one node, drawn at random, is `what`."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return what
    if isinstance(value, list):
        k = int(rng.integers(len(value)))
        return [*value[:k], replaced(value[k], rng, what), *value[k + 1:]]
    key = list(value)[rng.integers(len(value))]
    return {**value, key: replaced(value[key], rng, what)}


@pytest.mark.parametrize("name", WRITERS)
def test_mutated_files_are_read_or_refused(name, read):
    """Random damage: whatever happens is either polygons with finite numbers or one line of a UserError."""
    rng = np.random.default_rng(11)
    text = WRITERS[name](SHAPES)
    odd = [None, True, "x", "", [], {}, [[]], -1, 0, 2.5, 10 ** 400, 1e400, {"name": None}, [1, 2], "5"]
    refused = 0
    for k in range(300):
        if k % 2 and name not in ("exact.txt", "asap.xml"):
            content = json.dumps(replaced(json.loads(text), rng, odd[rng.integers(len(odd))])).encode()
        else:
            content = bytearray(text.encode())
            for _ in range(rng.integers(1, 4)):
                a, b = np.sort(rng.integers(0, len(content), 2)).tolist()
                b = min(b, a + 12)
                filling = bytes(rng.choice(list(b'{}[]<>|":,.05-eE xy\xff\x00&\n'), rng.integers(4)).tolist())
                content[a:b] = [b"", filling, bytes(content[a:b]) * 2][rng.integers(3)]
        try:
            polygons, skipped = read(bytes(content), name)
        except UserError as error:
            assert "\n" not in str(error) and str(error).count(name) >= 1
            refused += 1
            continue
        assert all(np.isfinite(ring).all() and len(ring) >= 3 for p in polygons for ring in p.rings)
        assert all(isinstance(p.name, str) and isinstance(p.source_id, str) for p in polygons)
    assert 30 < refused < 300, f"{refused} of 300"


def test_transform_moves_then_scales(read):
    polygons, _ = read(geojson([("2+", [SQUARE, ISLAND])]))
    ([moved], []) = place_polygons(polygons, "a.json", 99, 99, x=2, y=-4, downsample=0.5)
    assert np.array_equal(moved.rings[0], (np.array(SQUARE) - (2, -4)) * 2) and len(moved.rings) == 2
    assert (moved.name, moved.source_id) == ("2+", "id-0")
    assert np.array_equal(polygons[0].rings[0], SQUARE), "the polygons of the file stay as they are"
    with pytest.raises(AssertionError, match="found 0"):
        place_polygons(polygons, "a.json", 99, 99, downsample=0)


def test_polygons_outside_the_image(read):
    polygons, _ = read(exact_rest([("1+", [SQUARE]), ("2+", [NEIGHBOUR])]))
    kept, skipped = place_polygons(polygons, "f", 20, 24)
    assert len(kept) == 2 and skipped == []
    kept, _ = place_polygons(polygons, "f", 20, 24, x=6, y=-4)                      # partly outside is legal
    assert len(kept) == 2 and kept[0].rings[0].min() == -4
    with pytest.raises(UserError, match="f: 1 of 2 polygons .*12 x 20 .*annotation '11': x 12 to 20.*x, y"):
        place_polygons(polygons, "f", 20, 12)                                       # touches from outside
    kept, skipped = place_polygons(polygons, "f", 20, 12, x=-1e-9)                  # a crop of a larger slide
    assert len(kept) == 1 and len(skipped) == 1
    with pytest.raises(UserError, match="2 of 2 .*now 500, 0, 4"):
        place_polygons(polygons, "f", 20, 24, x=500, downsample=4)
    assert place_polygons([], "f", 20, 24, x=500) == ([], [])


def test_unknown_classes_are_listed_with_the_remedy(read):
    shapes = [("her2 2+", [SQUARE]), ("Tumör", [ISLAND]), ("Tumör", [ODD]), ("", [NEIGHBOUR])]
    polygons, _ = read(geojson(shapes))
    with pytest.raises(UserError) as error:
        polygon_classes(polygons, DEFAULT_CLASSES, "a/f.json")
    message = str(error.value)
    assert message.startswith("a/f.json: unknown class 'Tumör', (none) (annotation 'id-1'); ")
    assert "names seen: 'her2 2+', 'Tumör', (none);" in message
    assert "'LCIS/DCIS'" in message and "'Necrosis'" in message
    alias = message[message.index("{"):]
    table = ClassTable.from_json(json.loads(alias))
    assert polygon_classes(polygons, table, "f") == [3, IGNORE, IGNORE, IGNORE], "the remedy works as printed"
    for none in ("", "(none)"):
        table = ClassTable.from_json({"aliases": {"Tumör": 0, none: "LCIS/DCIS"}})
        assert polygon_classes(polygons, table, "f") == [3, 0, 0, 5]
    many = [p for k in range(40) for p in read(geojson([(f"class {k}", [SQUARE])]))[0]]
    with pytest.raises(UserError) as error:
        polygon_classes(many, DEFAULT_CLASSES, "f")
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("name, expected", [
    ("HER2 (3+)", "3+"), ("Tumor: 2+", "2+"), ("her2-1", "1+"), ("Score 0", "0"), ("tumour 0+", "0"),
    ("DCIS 3+", "LCIS/DCIS"), ("2+ DCIS", "LCIS/DCIS"), ("Ductal carcinoma in situ", "LCIS/DCIS"), ("DCIS high grade", "LCIS/DCIS"), ("Tumor: DCIS", "LCIS/DCIS"),
    ("Stromal cells", "Background"), ("Immune cells", "Background"), ("Region*", "Background"),
    ("Tumor", "ignore"), ("Tumor: 0", "0"), ("invasive", "ignore"), ("Tumor stroma?", "ignore"),
    ("Tumor stroma", "ignore"), ("region 12", "Background"), ("(none)", "ignore"), ("4+", "ignore"),
    ("13+", "ignore"), ("Artefact", "ignore"),
])
def test_a_guess_is_never_a_tumor_class_without_a_sign_of_which(name, expected):
    assert likely_class(name, DEFAULT_CLASSES) == expected
