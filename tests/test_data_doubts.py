"""What the check says of data that can be read but is hardly meant: one note each, none where all is well.

And what the file itself contradicts: refused or left out with a count, each with a remedy that is tried here.
"""

import contextlib
import json
import re
import unicodedata

import numpy as np
import pytest
from data_exports import SIDE, SLIDES, SUBTYPES, feature, label_of, shapes, stem, vector, write_images
from data_factory import save, write_csv
from PIL import Image

from her2 import data
from her2.data_annotations import Found, check_image, choose_image
from her2.data_classes import load_classes
from her2.data_folder import inspect_dataset, load_dataset
from her2.data_regions import read_polygons, read_roi
from her2.data import Survey, doubts
from her2.run_errors import UserError

SQUARE = [(5, 5), (20, 5), (20, 20)]


def dataset(root, label="exact", move=lambda x, y: (x, y)):
    """The images of data_exports with EXACT polygons or masks, and their slides.csv. Returns its rows."""
    write_images(root)
    rows = []
    for k in range(SLIDES):
        row = {"image": f"images/{stem(k)}.png", "slide": f"s{k}", "score": SUBTYPES[k % 4]}
        if label == "exact":
            results = [{"id": i, "vector": vector([move(*point) for point in ring]),
                        "annotation_type": {"name": name}} for i, (name, ring) in enumerate(shapes(k))]
            (root / f"{k}.json").write_text(json.dumps({"results": results}), encoding="utf-8")
            row["annotations"] = f"{k}.json"
        else:
            save(root / f"masks/{k}.png", label_of(k))
            row["mask"] = f"masks/{k}.png"
        rows.append(row)
    write_csv(root, rows)
    return rows


def notes(root) -> list:
    found, problems = inspect_dataset(root)
    assert not problems, problems
    return doubts([Survey(roi, found.classes) for roi in found.rois], found.classes)


@pytest.mark.parametrize("label", ["exact", "masks"])
def test_nothing_is_said_where_all_is_well(tmp_path, label):
    dataset(tmp_path, label)
    assert notes(tmp_path) == []


def change_images(function):
    def change(root, rows):
        for row in rows:
            with Image.open(root / row["image"]) as picture:
                array = np.array(picture)
            save(root / row["image"], np.ascontiguousarray(function(array)))
    return change


def change_masks(function):
    def change(root, rows):
        for k, row in enumerate(rows):
            save(root / row["mask"], function(label_of(k), np.random.default_rng(k)).astype(np.uint8))
    return change


def columns(**values):
    """Sets columns of slides.csv: a value for all rows, or a function of the row's number."""
    def change(root, rows):
        for k, row in enumerate(rows):
            row.update({name: value(k) if callable(value) else value for name, value in values.items()})
        write_csv(root, rows)
    return change


def salt(label, rng):
    """What smoothing leaves between 0 and 4: single pixels of every class."""
    return np.where(rng.random(label.shape) < 0.02, rng.integers(1, 5, label.shape), label)


def twice(root, rows):
    path = root / "0.json"
    obj = json.loads(path.read_text(encoding="utf-8"))
    first = obj["results"][0]
    obj["results"].append({**first, "id": 99, "annotation_type": {"name": "DCIS"}})
    path.write_text(json.dumps(obj), encoding="utf-8")


DOUBTS = {   # name: (label, what is done, the words of the one note)
    "micrometres": ("half", None, "upper left quarter of each of 6 images"),
    "downsample half of what it is": ("exact", columns(downsample="0.5"), "half of the polygons or more"),
    "scores shifted by a row": ("exact", columns(score=lambda k: SUBTYPES[(k + 1) % 4]), "in 6 of 6 slides"),
    "masks shifted by a row": ("masks", columns(mask=lambda k: f"masks/{(k + 1) % 6}.png"), "of 6 slides"),
    "one file for all images": ("exact", columns(annotations="0.json"), "same polygons lie on 6 images"),
    "one polygon, two classes": ("exact", twice, "1 polygons stand twice with different classes, in 1"),
    "smoothed masks": ("masks", change_masks(salt), "instances of fewer than 20 pixels in 6 images"),
    "masks of 0 and 1": ("masks", change_masks(lambda m, _: m > 0), '{"masks": "score"}'),
    "white images": ("masks", change_images(lambda a: a * 0 + 250), "no dye in 6 images"),
    "black images": ("masks", change_images(lambda a: a * 0), "no dye in 6 images"),
    "inverted images": ("masks", change_images(lambda a: 255 - a), "6 images are dark like a negative"),
    "red and blue swapped": ("masks", change_images(lambda a: a[..., ::-1]), "less brown"),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_each_doubt_is_a_note_with_count_files_and_remedy(tmp_path, name):
    label, change, words = DOUBTS[name]
    halved = [lambda x, y: (x / 2, y / 2)] if label == "half" else []
    rows = dataset(tmp_path, "exact" if halved else label, *halved)
    if change:
        change(tmp_path, rows)
    said = notes(tmp_path)
    [note] = [note for note in said if words in note]
    assert ".png" in note and "; " in note, note
    alone = {"one file for all images", "masks shifted by a row", "masks of 0 and 1", "inverted images",
             "micrometres"}         # these are wrong in more ways than one
    assert len(said) == 1 or name in alone, said


# ---- contradictions --------------------------------------------------------------------------------------

def one(root, content, classes=None, **row):
    """The region of a dataset whose first image has this annotation file."""
    rows = dataset(root)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "0.json").write_text(text, encoding="utf-8")
    if classes:
        (root / "classes.json").write_text(json.dumps(classes), encoding="utf-8")
    rows[0].update(row)
    write_csv(root, rows)
    return load_dataset(root).rois[0]


def cells(count, kind="cell"):
    return [feature("3+", [(5 + j, 5), (9 + j, 5), (9 + j, 9)], kind) for j in range(count)]


def coco(**image):
    return {"images": [{"id": 1, "file_name": f"{stem(0)}.png", "width": SIDE, "height": SIDE, **image}],
            "categories": [{"id": 1, "name": "2+"}], "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[5, 5, 20, 5, 20, 20]]}]}


def exact_line(name):
    return f"{name}|2+|{json.dumps(vector(SQUARE))}|\n"


@pytest.mark.parametrize("content, words", [
    (cells(6), "6 x cell"), (cells(6, "detection"), "6 x detection"), (cells(2, "tile"), "2 x tile"),
    ([dict(cell, id="PathCellObject", properties={"classification": {"name": "Negative"}})
      for cell in cells(4)], "4 x cell"),
    (coco(width=2 * SIDE), f"{2 * SIDE} x {SIDE} pixels"), (coco(height=1), f"{SIDE} x 1 pixels"),
    (coco(file_name="other.png"), "of the image 'other.png'"), (exact_line("case9_roi1.png"), "case9_roi1"),
    (coco(file_name="b/case3_roi1.jpg"), "case3_roi1.jpg"),
    ([feature("", SQUARE, name="2")], "unknown class (none)"),
    ([feature("", SQUARE)], "unknown class (none)"), ([feature("Region*", SQUARE)], "class 'Region*'"),
])
def test_what_the_file_contradicts_is_refused(tmp_path, content, words):
    roi = one(tmp_path, content)
    with pytest.raises(UserError) as error:
        read_roi(roi, load_classes(tmp_path))
    assert words in str(error.value) and ";" in str(error.value)
    guess = re.search(r"\{\"aliases.*\}\}", str(error.value))
    if guess:       # the remedy, followed to the letter
        (tmp_path / "classes.json").write_text(guess[0], encoding="utf-8")
        assert read_roi(roi, load_classes(tmp_path))[1].max() in (0, 255), "and no tumor from a number"


@pytest.mark.parametrize("content, row", [
    (coco(), {}), (coco(file_name=f"task_1/abc-{stem(0)}.jpg"), {}), (coco(file_name="CASE0_ROI1.PNG"), {}),
    (coco(width=None, height=None), {}), (exact_line("s0.svs"), {}), (exact_line(f"{stem(0)}.tif"), {}),
    (exact_line("scan 7.svs"), {"x": "0", "y": "0", "downsample": "0.5"}),
    (coco(width=9000, height=9000, file_name="whole slide.svs"), {"x": "1"}),
])
def test_names_and_sizes_that_may_differ(tmp_path, content, row):
    """Folders, hashes, case and endings; the slide's name; and everything for a crop of a slide."""
    label = read_roi(one(tmp_path, content, **row), load_classes(tmp_path))[1]
    assert set(np.unique(label)) == {0, 3}


@pytest.mark.parametrize("name, image, slide, same", [
    ("1.png", "10.png", "10", False), ("1.png", "21.png", "s2", False), ("7.svs", "a.png", "17", False),
    ("10.png", "1.png", "1", False), ("case1.png", "case12.png", "case12", False),
    ("1.png", "a/1.jpg", "x", True), ("task_1/abc-12.png", "12.png", "12", True), ("1_roi.png", "1.png", "1", True),
    ("scan1.svs", "2.png", "scan1", True),
    (unicodedata.normalize("NFC", "M\u00fcller1.png"), unicodedata.normalize("NFD", "M\u00fcller1.png"), "x", True),
])
def test_a_number_is_not_the_beginning_of_another(name, image, slide, same):
    found = Found("a.json")
    found.about = (name, 40, 30)
    with contextlib.nullcontext() if same else pytest.raises(UserError, match="of the image"):
        check_image(found, image, slide, 30, 40)


def test_one_of_several_images_is_found_whatever_unicode_form_its_name_has(tmp_path):
    names = {k: unicodedata.normalize("NFC", f"M\u00fcller{k}.png") for k in (1, 2)}
    for form in ("NFC", "NFD"):
        assert choose_image(names, unicodedata.normalize(form, "a/M\u00fcller2.png")) == 2


def test_a_broken_class_table_is_one_problem_and_masks_are_not_blamed(tmp_path, capsys):
    for row in dataset(tmp_path, "masks"):
        save(tmp_path / row["mask"], np.full((SIDE, SIDE), 6, np.uint8))        # a class of the user's own table
    (tmp_path / "classes.json").write_text('{"classes": 5}', encoding="utf-8")
    with pytest.raises(UserError, match="classes.json"):
        data.check(tmp_path, 0, tmp_path / "a.png")
    assert not capsys.readouterr().err


def test_cells_beside_annotations_are_left_out_with_a_count_and_an_outline(tmp_path):
    roi = one(tmp_path, [*cells(5), feature("2+", SQUARE), *cells(1, "detection")[:1]])
    polygons, class_ids, left_out = read_polygons(roi, load_classes(tmp_path))
    assert len(polygons) == 1 and class_ids == [3]
    found = Survey(roi, load_classes(tmp_path))
    assert found.left_out == {"cell (not an annotation)": 5, "detection (not an annotation)": 1}
    assert all(len(rings) == 1 for _, rings, _ in left_out)
    assert (found.picture == (205, 205, 205)).all(-1).any(), "drawn in grey"


def test_the_sheet_shows_outlines_in_the_colours_of_their_classes(tmp_path):
    dataset(tmp_path)
    found = load_dataset(tmp_path)
    for k, roi in enumerate(found.rois):
        one_ = Survey(roi, found.classes)
        color = found.classes.classes[k % 4 + 1].color
        rim = (one_.picture == color).all(-1)
        scale = one_.picture.shape[0] // SIDE
        inside = np.kron(label_of(k) > 0, np.ones((scale, scale), bool))
        assert rim.sum() > 200 and not rim[~inside].any() and one_.pixels[1:].nonzero()[0] == [k % 4]


def test_a_frame_that_is_ignored_is_pointed_out(tmp_path):
    rows = dataset(tmp_path, "masks")
    for share, said in ((lambda m, _: np.where(m == 0, 255, m), True), (salt, False)):
        change_masks(share)(tmp_path, rows)
        found, problems = load_dataset(tmp_path), []
        data.survey_all(found, problems)
        assert any('call it "Background"' in note for note in found.notes) == said and not problems
