"""Exports as the annotation programs write them, for tests that begin where a user begins: with files.

`write_export(kind, root)` makes images/ and what the program puts beside them; nothing else. The shapes are
the same for every kind, so that all of them must end in the same label maps.
"""

import gzip
import json
import uuid
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
from data_factory import save

from her2.polygons import paint
from her2.stains import compose

SLIDES, SIDE = 6, 96
SUBTYPES = ["0", "1+", "2+", "3+"]
KINDS = ["qupath", "qupath 0.2", "exact", "exact text", "asap", "coco", "masks", "black and white", "colours"]
COLORS = {"3+": (250, 50, 83), "2+": (52, 209, 183), "1+": (61, 61, 245), "0": (255, 204, 51)}   # CVAT's


def shapes(k: int) -> list:
    """[(subtype, ring)] of image k: two regions of its slide's subtype, as whole pixels."""
    name, d = SUBTYPES[k % 4], 3 * k
    return [(name, [(10 + d, 12), (50 + d, 10), (52 + d, 44), (30 + d, 56), (8 + d, 40)]),
            (name, [(60, 60 + d // 3), (88, 62), (84, 90), (58, 84)])]


def stem(k: int) -> str:
    return f"case{k}_roi1"


def label_of(k: int) -> np.ndarray:
    """The label map that image k must have, (SIDE, SIDE) uint8 in the default class table."""
    drawn = shapes(k)
    return paint([[np.array(ring, float)] for _, ring in drawn],
                 [SUBTYPES.index(name) + 1 for name, _ in drawn], SIDE, SIDE)[0]


def write_images(root) -> None:
    """Blue tissue everywhere, and brown in the tumor as much as its subtype says."""
    for k in range(SLIDES):
        rng, label = np.random.default_rng(k), label_of(k)
        blue = 0.25 + 0.05 * rng.standard_normal((SIDE, SIDE))
        brown = (0.03 + 0.25 * label) * (label > 0) + 0.02 * rng.random((SIDE, SIDE))
        picture = compose(blue.clip(0), brown, 240.0).clip(0, 255).astype(np.uint8)
        save(Path(root) / f"images/{stem(k)}.png", picture)


def closed(ring) -> list:
    return [list(point) for point in [*ring, ring[0]]]


def feature(class_name, ring, kind="annotation", **properties) -> dict:
    """As QuPath 0.4 and 0.5 write it."""
    classification = {"classification": {"name": class_name, "color": [200, 0, 0]}} if class_name else {}
    return {"type": "Feature", "id": str(uuid.uuid5(uuid.NAMESPACE_OID, repr((class_name, ring, kind)))),
            "geometry": {"type": "Polygon", "coordinates": [closed(ring)]},
            "properties": {"objectType": kind, **classification, **properties}}


def qupath(root, k) -> None:
    """Annotations, the cells that QuPath detected in them, a locked frame without class, a fold."""
    cells = [feature("3+", [(20 + j, 20), (24 + j, 20), (24 + j, 24)], "cell") for j in range(0, 12, 4)]
    for cell in cells:
        cell["nucleusGeometry"] = cell["geometry"]
    others = [feature("", [(0, 0), (SIDE, 0), (SIDE, SIDE), (0, SIDE)], isLocked=True, name="2"),
              feature("Region*", [(1, 1), (95, 1), (95, 95), (1, 95)]), *cells]
    fold = [feature("Ignore*", [(0, 88), (30, 88), (30, 96), (0, 96)])] if k == 0 else []
    content = {"type": "FeatureCollection",
               "features": [*others, *(feature(*shape) for shape in shapes(k)), *fold]}
    path = root / f"annotations/{stem(k)}.geojson.gz"
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


def qupath_old(root, k) -> None:
    """Up to 0.2: a bare list, one id for all, no object type, the colour as a number, a derived class."""
    content = [{"type": "Feature", "id": "PathAnnotationObject",
                "geometry": {"type": "Polygon", "coordinates": [closed(ring)]},
                "properties": {"classification": {"name": f"Tumor: {name}", "colorRGB": -3670016},
                               "isLocked": False, "measurements": []}} for name, ring in shapes(k)]
    cell = dict(content[0], id="PathCellObject")
    (root / f"annotations/{stem(k)}.geojson").write_text(json.dumps([*content, cell]), encoding="utf-8")


def vector(ring) -> dict:
    return {f"{axis}{i}": value for i, point in enumerate(ring, 1) for axis, value in zip("xy", point)}


def exact(root, k) -> None:
    """The REST interface's answer, with a deleted annotation and a point."""
    rows = [{"id": 10 * k + i, "image": 4 + k, "vector": vector(ring), "deleted": False,
             "annotation_type": {"id": 3, "name": name, "vector_type": 5, "color_code": "#FF0000"},
             "last_editor": {"id": 1}, "meta_data": None} for i, (name, ring) in enumerate(shapes(k))]
    rows.append(dict(rows[0], id=10 * k + 8, deleted=True))
    point = {"id": 5, "name": "Mitosis", "vector_type": 2}
    rows.append(dict(rows[0], id=10 * k + 9, vector={"x1": 5, "y1": 5}, annotation_type=point))
    content = {"count": len(rows), "next": None, "previous": None, "results": rows}
    (root / f"annotations/{stem(k)}.json").write_text(json.dumps(content), encoding="utf-8")


def exact_text(root) -> None:
    """The text export of a whole image set in one file, with a comma before each brace as EXACT puts it."""
    lines = [f"{stem(k)}.png|{name}|{json.dumps(vector(ring))[:-1]},}}|"
             for k in range(SLIDES) for name, ring in shapes(k)]
    (root / "annotations/export.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def asap(root, k) -> None:
    rows = [f'<Annotation Name="Annotation {i}" Type="Polygon" PartOfGroup={quoteattr(name)} Color="#F4FA58">'
            "<Coordinates>" + "".join(f'<Coordinate Order="{j}" X="{x}" Y="{y}" />'
                                      for j, (x, y) in enumerate(ring))
            + "</Coordinates></Annotation>" for i, (name, ring) in enumerate(shapes(k))]
    groups = "".join(f'<Group Name={quoteattr(name)} PartOfGroup="None" Color="#64FE2E"><Attributes/></Group>'
                     for name in SUBTYPES)
    text = ('<?xml version="1.0"?>\n<ASAP_Annotations><Annotations>' + "".join(rows)
            + f"</Annotations><AnnotationGroups>{groups}</AnnotationGroups></ASAP_Annotations>\n")
    (root / f"annotations/{stem(k)}.xml").write_text(text, encoding="utf-8")


def coco(root) -> None:
    """CVAT's COCO 1.0: one file for the task, areas and boxes beside the polygons."""
    images = [{"id": k + 1, "width": SIDE, "height": SIDE, "file_name": f"{stem(k)}.png", "license": 0,
               "flickr_url": "", "coco_url": "", "date_captured": 0} for k in range(SLIDES)]
    rows = [{"image_id": k + 1, "category_id": SUBTYPES.index(name) + 1, "iscrowd": 0, "area": 100.0,
             "bbox": [0, 0, 9, 9], "attributes": {"occluded": False},
             "segmentation": [[float(v) for point in ring for v in point]]}
            for k in range(SLIDES) for name, ring in shapes(k)]
    rows = [{"id": i, **row} for i, row in enumerate(rows, 1)]
    content = {"licenses": [{"name": "", "id": 0, "url": ""}], "info": {"contributor": "", "version": ""},
               "categories": [{"id": i, "name": name, "supercategory": ""}
                              for i, name in enumerate(SUBTYPES, 1)],
               "images": images, "annotations": rows}
    (root / "annotations/instances_default.json").write_text(json.dumps(content), encoding="utf-8")


def masks(root, k) -> None:
    save(root / f"masks/{stem(k)}-labels.png", label_of(k))


def black_and_white(root, k) -> None:
    save(root / f"masks/{stem(k)}_mask.tif", (label_of(k) > 0).astype(np.uint8) * 255)


def colours(root, k) -> None:
    """CVAT's segmentation mask 1.1: colours, and labelmap.txt that names them."""
    table = np.array([(0, 0, 0), *(COLORS[name] for name in SUBTYPES)], np.uint8)
    save(root / f"masks/{stem(k)}.png", table[label_of(k)])
    rows = [f"{name}:{','.join(map(str, COLORS[name]))}::" for name in SUBTYPES]
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\n"
                                       + "\n".join(rows) + "\n", encoding="utf-8")


def write_export(kind: str, root) -> None:
    """images/ and the files of `kind` (one of KINDS) in the folder `root`."""
    root = Path(root)
    write_images(root)
    (root / "annotations").mkdir()
    whole = {"exact text": exact_text, "coco": coco}
    each = {"qupath": qupath, "qupath 0.2": qupath_old, "exact": exact, "asap": asap, "masks": masks,
            "black and white": black_and_white, "colours": colours}
    if kind in whole:
        whole[kind](root)
    else:
        for k in range(SLIDES):
            each[kind](root, k)
