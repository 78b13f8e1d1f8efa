"""`python -m her2.data`: the table of bad datasets (exit status 2, one line each), good ones, and --index.

Each case of the table takes one valid dataset and breaks one thing in it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_factory import rectangles, save, write_csv, write_dataset, write_manifest
from her2 import data
from her2.data_folder import load_dataset
from her2.run_errors import command

ROOT = Path(__file__).resolve().parents[1]


def run(capsys, *argv):
    """(exit status, lines of stdout, lines of stderr) of the command, in this process."""
    with pytest.raises(SystemExit) as stopped:
        command(data.main, [str(value) for value in argv])
    out, err = capsys.readouterr()
    return stopped.value.code, out.splitlines(), err.splitlines()


def edit(column, value, row=0):
    """A case that changes one cell of slides.csv."""
    def change(root, rows):
        rows[row][column] = value
        write_csv(root, rows)
    return change


def edit_text(function):
    """A case that changes slides.csv as bytes."""
    def change(root, rows):
        path = root / "slides.csv"
        path.write_bytes(function(path.read_bytes()))
    return change


def drop(column):
    def change(root, rows):
        write_csv(root, [{key: value for key, value in row.items() if key != column} for row in rows])
    return change


def mask(function):
    """A case that changes the label map of roi0."""
    def change(root, rows):
        save(root / "masks/roi0.png", function(rectangles(40, 60, (1, 2, 3, 4, 5))))
    return change


def classes(value):
    def change(root, rows):
        (root / "classes.json").write_text(value if isinstance(value, str) else json.dumps(value),
                                           encoding="utf-8")
    return change


def instances(function, dtype=np.uint16):
    def change(root, rows):
        label = rectangles(40, 60, (1, 2, 3, 4, 5)).astype(dtype)
        save(root / "instances.png", function(label))
        edit("instances", "instances.png")(root, rows)
    return change


def put(array, row, column, value):
    array[row, column] = value
    return array


def polygons(results):
    """A case whose first region has EXACT polygons instead of a mask."""
    def change(root, rows):
        (root / "a.json").write_text(json.dumps({"results": results}), encoding="utf-8")
        rows[0].update(mask="", annotations="a.json")
        write_csv(root, rows)
    return change


def polygon(name="1+", dx=0):
    vector = {"x1": 5 + dx, "y1": 5, "x2": 20 + dx, "y2": 5, "x3": 20 + dx, "y3": 20}
    return {"id": 1, "deleted": False, "vector": vector, "annotation_type": {"name": name, "vector_type": 5}}


def no_tumor(root, rows):
    for row in rows:
        save(root / row["mask"], np.zeros((40, 60), np.uint8))


def rows_only(count):
    def change(root, rows):
        write_csv(root, [{key: value for key, value in row.items() if key != "split"}
                         for row in rows[:count]])
    return change


def all_splits(*names):
    def change(root, rows):
        for k, row in enumerate(rows):
            row["split"] = names[k % len(names)]
        write_csv(root, rows)
    return change


def colour_class(**change):
    row = {"id": 1, "name": "tumor", "tumor": True, "variance": True, "color": [1, 2, 3]}
    return [{"id": 0, "name": "none", "tumor": False, "variance": False, "color": [255, 255, 255]},
            {**row, **change}]


BAD = {   # name: (what is done to a valid dataset, the file and the words that the line must have)
    "no slides.csv": (lambda root, rows: (root / "slides.csv").unlink(), "slides.csv", "--index"),
    "unfinished synthetic set": (lambda root, rows: ((root / "slides.csv").unlink(),
                                                     (root / "manifest.jsonl").touch()), "", "generate.py again"),
    "slides.csv is a folder": (lambda root, rows: ((root / "slides.csv").unlink(),
                                                   (root / "slides.csv").mkdir()),
                               "slides.csv", "no such file"),
    "empty table": (edit_text(lambda raw: b""), "slides.csv", "empty file"),
    "blank table": (edit_text(lambda raw: b"\n , \n\r\n"), "slides.csv", "empty file"),
    "header only": (edit_text(lambda raw: raw.splitlines()[0]), "slides.csv", "no rows"),
    "no header": (edit_text(lambda raw: raw.split(b"\n", 1)[1]), "slides.csv", "no column 'image'"),
    "semicolons": (edit_text(lambda raw: raw.replace(b",", b";")), "slides.csv", "with commas"),
    "tabs": (edit_text(lambda raw: raw.replace(b",", b"\t")), "slides.csv", "with commas"),
    "UTF-16": (edit_text(lambda raw: raw.decode().encode("utf-16")), "slides.csv", "UTF-8"),
    "Latin-1": (edit_text(lambda raw: raw.replace(b"s0", b"\xe4")), "slides.csv", "UTF-8"),
    "binary": (edit_text(lambda raw: bytes(range(256))), "slides.csv", "UTF-8"),
    "an open quote": (edit_text(lambda raw: raw.replace(b"s0", b'"s0')), "slides.csv", "CSV"),
    "text after a quote": (edit_text(lambda raw: raw.replace(b"s0", b'"s"0')), "slides.csv", "CSV"),
    "a cell too many": (edit_text(lambda raw: raw.replace(b"s0,", b"s,0,")), "slides.csv",
                        "line 2 has 6 cells"),
    "a cell too few": (edit_text(lambda raw: raw.replace(b",train", b"", 1)), "slides.csv",
                       "line 2 has 4 cells"),
    "a huge cell": (edit_text(lambda raw: raw.replace(b"s0", b"s" * 200000)), "slides.csv", "CSV"),
    "no column image": (drop("image"), "slides.csv", "no column 'image'"),
    "no column slide": (drop("slide"), "slides.csv", "no column 'slide'"),
    "no column for labels": (drop("mask"), "slides.csv", "no column 'annotations' or 'mask'"),
    "a column twice": (edit_text(lambda raw: raw.replace(b"score", b"slide", 1)), "slides.csv",
                       "'slide' stands twice"),
    "a mistyped column": (edit_text(lambda raw: raw.replace(b"split", b"spilt", 1)), "slides.csv",
                          "write 'split'"),
    "a plural column": (edit_text(lambda raw: raw.replace(b"score", b"scores", 1)), "slides.csv",
                        "write 'score'"),
    "cells behind the last column": (edit_text(lambda raw: raw.replace(b"train", b"train,x", 1)),
                                     "slides.csv", "6 cells"),
    "no image": (edit("image", ""), "slides.csv", "line 2: the image cell is empty"),
    "no slide": (edit("slide", " "), "slides.csv", "line 2: the slide cell is empty"),
    "the same image twice": (edit("image", "images/roi1.png"), "slides.csv", "stands in line 2"),
    "the same image spelled differently": (edit("image", "./images//roi1.png"), "slides.csv",
                                           "stands in line 2"),
    "missing image": (edit("image", "images/none.png"), "slides.csv", "line 2: image 'images/none.png'"),
    "missing mask": (edit("mask", "masks/none.png"), "slides.csv", "mask 'masks/none.png'"),
    "image is a folder": (edit("image", "images"), "slides.csv", "no such file"),
    "absolute path": (edit("image", "/etc/hostname"), "slides.csv", "not a path inside"),
    "absolute path to the own file": (
        lambda root, rows: edit("image", str(root / "images/roi0.png"))(root, rows),
        "slides.csv", "not a path inside"),
    "Windows path": (edit("image", "C:\\images\\roi0.png"), "slides.csv", "not a path inside"),
    "network path": (edit("image", "\\\\server\\roi0.png"), "slides.csv", "not a path inside"),
    "path to the parent": (edit("mask", "../masks/roi0.png"), "slides.csv", "not a path inside"),
    "path out and in again": (edit("mask", "masks/../masks/roi0.png"), "slides.csv", "not a path inside"),
    "very long path": (edit("image", "a" * 3000), "slides.csv", "no such file"),
    "home path": (edit("image", "~/roi0.png"), "slides.csv", "no such file"),
    "mask and annotations": (edit("annotations", "masks/roi0.png"), "slides.csv", "both given"),
    "instances without mask": (lambda root, rows: (rows[0].update(mask="", instances="masks/roi1.png"),
                                                   write_csv(root, rows)), "slides.csv",
                               "instances without a mask"),
    "x is a word": (edit("x", "left"), "slides.csv", "x is 'left'"),
    "x is not a number": (edit("x", "nan"), "slides.csv", "x is 'nan'"),
    "y is infinite": (edit("y", "-inf"), "slides.csv", "y is '-inf'"),
    "y is astronomic": (edit("y", "1e300"), "slides.csv", "y is '1e300'"),
    "downsample 0": (edit("downsample", "0"), "slides.csv", "downsample is '0'"),
    "downsample negative": (edit("downsample", "-2"), "slides.csv", "downsample is '-2'"),
    "decimal comma": (edit("downsample", "0,5"), "slides.csv", "decimal point"),
    "unknown split": (edit("split", "training"), "slides.csv", "split is 'training'"),
    "split missing in a row": (edit("split", ""), "slides.csv", "1 rows have no split"),
    "slide in two splits": (lambda root, rows: (edit("slide", "s2")(root, rows),
                                                edit("score", "2")(root, rows)),
                            "slides.csv", "slide 's2' has the splits 'train', 'val'"),
    "slide with two scores": (edit("slide", "s1"), "slides.csv", "slide 's1' has the scores '0', '1'"),
    "no val": (all_splits("train", "test"), "slides.csv", "no image in the split 'val'"),
    "no test": (all_splits("train", "val"), "slides.csv", "no image in the split 'test'"),
    "no train": (all_splits("val", "test"), "slides.csv", "no image in the split 'train'"),
    "one slide": (rows_only(1), "slides.csv", "found 1; add slides"),
    "two slides": (rows_only(2), "slides.csv", "found 2; add slides"),
    "image is text": (lambda root, rows: (root / "images/roi0.png").write_text("hello"), "roi0.png",
                      "cannot identify"),
    "image is empty": (lambda root, rows: (root / "images/roi0.png").write_bytes(b""), "roi0.png",
                       "cannot identify"),
    "image is truncated": (lambda root, rows: (root / "images/roi0.png").write_bytes(
        (root / "images/roi0.png").read_bytes()[:2000]), "roi0.png", "truncated"),
    "image has alpha": (lambda root, rows: save(root / "images/roi0.png", np.zeros((40, 60, 4), np.uint8)),
                        "roi0.png", "alpha"),
    "image is grey": (lambda root, rows: save(root / "images/roi0.png", np.zeros((40, 60), np.uint8)),
                      "roi0.png", "grey"),
    "mask too small": (mask(lambda m: m[:-1]), "masks/roi0.png", "60 x 39 pixels, but its image"),
    "mask turned": (mask(lambda m: m.T.copy()), "masks/roi0.png", "40 x 60 pixels"),
    "mask 0/255": (mask(lambda m: (m > 0).astype(np.uint8) * 255), "masks/roi0.png", "black-and-white"),
    "mask 255": (mask(lambda m: m * 0 + 255), "masks/roi0.png", "black-and-white"),
    "mask with unknown ids": (mask(lambda m: put(m, 0, slice(2), [6, 200])), "masks/roi0.png",
                              "2 values that are not in the class table (6, 200)"),
    "mask with unknown ids and 255": (mask(lambda m: put(m, 0, slice(2), [6, 255])), "masks/roi0.png",
                                      "1 values that are not in the class table (6)"),
    "mask in colour": (mask(lambda m: np.stack([m, m, m], 2)), "masks/roi0.png",
                       "6 values that are not in the class table"),
    "mask of 16 bits": (mask(lambda m: m.astype(np.uint16)), "masks/roi0.png", "16-bit"),
    "mask of one bit": (mask(lambda m: m > 0), "masks/roi0.png", "black-and-white"),
    "instances of 8 bits": (instances(lambda m: m, np.uint8), "instances.png", "instance ids belong"),
    "instances of another size": (instances(lambda m: m[:20]), "instances.png", "60 x 20 pixels"),
    "instance of two classes": (instances(lambda m: np.minimum(m, 4)), "instances.png",
                                "instance 4 (1 in all) spans"),
    "instance on background": (instances(lambda m: put(m, 0, 0, 9)), "instances.png",
                               "1 pixels where only one"),
    "tumor without instance": (instances(lambda m: m * (m != 3)), "instances.png", "pixels where only one"),
    "polygon of an unknown class": (polygons([polygon("Tumour")]), "a.json", "Tumour"),
    "polygon without class": (polygons([polygon("")]), "a.json", "unknown class"),
    "polygon outside": (polygons([polygon(dx=500)]), "a.json", "outside"),
    "annotation file is a PNG": (lambda root, rows: (rows[0].update(annotations=rows[0]["mask"], mask=""),
                                                     write_csv(root, rows)), "masks/roi0.png", "UTF-8"),
    "no tumor in train": (no_tumor, "", "no tumor pixel in the split 'train'"),
    "classes.json is no JSON": (classes("{"), "classes.json", "JSON"),
    "classes.json is empty": (classes(""), "classes.json", "empty"),
    "classes.json is a number": (classes("3"), "classes.json", "list"),
    "class without tumor flag": (classes([{"id": 0, "name": "a", "color": [0, 0, 0]}]), "classes.json",
                                 "lacks"),
    "class ids with a gap": (classes(colour_class(id=2)), "classes.json", "0, 1, 2"),
    "class ids as text": (classes(colour_class(id="1")), "classes.json", "whole number"),
    "class names twice": (classes(colour_class(name="None")), "classes.json", "two meanings"),
    "class colour wrong": (classes(colour_class(color=[1, 2, 300])), "classes.json", "color"),
    "classes too few for the mask": (classes(colour_class()), "roi0.png", "not in the class table"),
    "alias of nothing": (classes({"aliases": {"x": "no such class"}}), "classes.json", "no such class"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_datasets_give_exit_status_2_and_one_line(tmp_path, capsys, name):
    change, file, words = BAD[name]
    rows = write_dataset(tmp_path, slides=4)
    change(tmp_path, rows)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status, out, err = run(capsys, tmp_path, "--out", tmp_path / "picture.png")
    assert status == 2 and not out
    lines = [line for line in err if file in line and words in line]
    assert lines, "\n".join(err)
    expected = 4 if name == "classes too few for the mask" else 1
    assert len(err) == expected, "one problem, one line:\n" + "\n".join(err)
    assert all(line.startswith(f"error: {tmp_path}") and ";" in line for line in err), err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}, (
        "files changed")


def test_all_problems_at_once(tmp_path, capsys):
    rows = write_dataset(tmp_path, slides=8)
    save(tmp_path / "masks/roi3.png", np.full((40, 60), 9, np.uint8))
    save(tmp_path / "masks/roi4.png", np.zeros((10, 10), np.uint8))
    (tmp_path / "images/roi5.png").write_bytes(b"")
    edit("image", "gone.png", row=6)(tmp_path, rows)
    status, _, err = run(capsys, tmp_path)
    assert status == 2 and len(err) == 4
    for words in ("masks/roi3.png", "masks/roi4.png", "images/roi5.png", "gone.png"):
        assert sum(words in line for line in err) == 1, words


@pytest.mark.parametrize("folder", ["nowhere", "file"])
def test_a_wrong_folder(tmp_path, capsys, folder):
    (tmp_path / "file").touch()
    status, _, err = run(capsys, tmp_path / folder)
    assert status == 2 and len(err) == 1 and "no such folder" in err[0]


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["d", "--seed", "x"], ["d", "--nonsense"]])
def test_wrong_flags(capsys, argv):
    status, _, err = run(capsys, *argv)
    assert status == 2 and len(err) == 1 and err[0].startswith("error:")


# ---------------------------------------------------------------- good datasets

def test_the_table_has_the_right_numbers(tmp_path, capsys):
    write_dataset(tmp_path, slides=8, height=240, width=600)         # 4 train, 2 val, 2 test
    first, label = rectangles(240, 600, (1, 1, 4)), rectangles(240, 600, (1, 2, 3, 4, 5))
    save(tmp_path / "masks/roi0.png", first)
    status, out, err = run(capsys, tmp_path, "--out", tmp_path / "picture.png")
    assert status == 0 and not err
    at = [k for k, line in enumerate(out) if "by score" in line]
    assert [out[k].partition(", by")[0] for k in at] == [
        "train: 4 regions of 4 slides", "val: 2 regions of 2 slides", "test: 2 regions of 2 slides"]
    for labels, k in zip(([first, label, label, label], [label] * 2, [label] * 2), at):
        tumor = sum((one > 0).sum() for one in labels)
        for class_id, line in enumerate(out[k + 2:k + 8]):
            name, instances, area, share = line.split()
            pixels = sum((one == class_id).sum() for one in labels)
            assert abs(float(area) - pixels / 1e6) <= 5.01e-4 and (class_id == 0) == (share == "-")
            if class_id:
                assert name == ("", "0", "1+", "2+", "3+", "LCIS/DCIS")[class_id]
                assert abs(float(share.rstrip("%")) - 100 * pixels / tumor) < 0.06
                parts = len(labels) + (labels[0] is first) * {1: 1, 4: 0}.get(class_id, -1)
                assert int(instances) == parts
    assert out[-1] == (f"usable. Pictures: {tmp_path / 'picture.png'}, and to check the outlines "
                       f"{tmp_path / 'picture_overlay001.png'}")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size[0] > 300 and len(picture.getcolors(100000)) > 10


def test_notes_on_what_is_left_out(tmp_path, capsys):
    rows = write_dataset(tmp_path, slides=6, split=False, class_ids=(1, 4))
    point = {**polygon(), "id": 2, "annotation_type": {"name": "1+", "vector_type": 2}}
    polygons([polygon(), point, {**polygon(), "id": 3, "deleted": True}])(tmp_path, rows)
    status, out, _ = run(capsys, tmp_path, "--out", tmp_path / "picture.png", "--seed", 3)
    notes = "\n".join(line for line in out if line.startswith("note:"))
    assert status == 0 and "split 60/20/20 from seed 3" in notes
    assert "1 deleted" in notes and "1 point" in notes


def test_a_synthetic_folder_needs_no_held_out_images(tmp_path, capsys):
    write_dataset(tmp_path, slides=2, split=False)
    write_manifest(tmp_path, [(f"images/roi{k}.png", "a.png", "a") for k in range(2)])
    status, out, err = run(capsys, tmp_path, "--out", tmp_path / "picture.png")
    assert status == 0 and not err and "2 slides, 2 regions" in out[0]


def test_as_a_program(tmp_path):
    """Once as users call it: exit status, default place of the picture, nothing written into the data."""
    write_dataset(tmp_path / "my data", slides=4)
    before = sorted((tmp_path / "my data").rglob("*"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-m", "her2.data", "my data"], cwd=tmp_path, env=environment,
                            capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert (tmp_path / "runs" / "data_my data.png").is_file() and "usable" in result.stdout
    assert sorted((tmp_path / "my data").rglob("*")) == before


# ---------------------------------------------------------------- --index

def loose_folder(root, names=("caseA_1", "caseA_2", "caseB_1", "caseC_1", "caseD_1"), label="masks"):
    for k, name in enumerate(names):
        save(root / f"images/{name}.png", np.full((40, 60, 3), k, np.uint8))
        if label == "masks":
            save(root / f"masks/{name}.png", rectangles(40, 60, (1, 2, 3, 4, 5)))
        else:
            (root / label).mkdir(exist_ok=True)
            (root / label / f"{name}.json").write_text(json.dumps({"results": [polygon()]}), encoding="utf-8")


@pytest.mark.parametrize("label", ["masks", "annotations"])
def test_index_pairs_by_stem_and_lists_what_found_no_partner(tmp_path, capsys, label):
    loose_folder(tmp_path, label=label)
    save(tmp_path / "images/lonely_1.png", np.zeros((40, 60, 3), np.uint8))
    save(tmp_path / "masks/orphan_1.png", np.zeros((40, 60), np.uint8))
    (tmp_path / "images/Thumbs.db").touch()
    status, out, err = run(capsys, tmp_path, "--index")
    assert status == 0 and not err
    assert [line for line in out if line.startswith("no partner")] == [
        f"no partner: {tmp_path / 'images/lonely_1.png'}", f"no partner: {tmp_path / 'masks/orphan_1.png'}"]
    dataset = load_dataset(tmp_path)
    assert [roi.slide for roi in dataset.rois] == ["caseA", "caseA", "caseB", "caseC", "caseD"]
    assert all((roi.mask if label == "masks" else roi.annotations).stem == roi.image.stem
               for roi in dataset.rois)
    assert run(capsys, tmp_path, "--out", tmp_path / "picture.png")[0] == 0


def test_index_never_overwrites(tmp_path, capsys):
    write_dataset(tmp_path, slides=3)
    before = (tmp_path / "slides.csv").read_bytes()
    status, _, err = run(capsys, tmp_path, "--index")
    assert status == 2 and "never overwritten" in err[0] and (tmp_path / "slides.csv").read_bytes() == before


def test_slide_pattern(tmp_path, capsys):
    loose_folder(tmp_path, ("2021-A7 core 3", "2021-A7 core 4", "2022-B1, old"))
    status, out, _ = run(capsys, tmp_path, "--index", "--slide-pattern", r"(\d+-[A-Z]\d)")
    assert status == 0 and "3 images of 2 slides (2021-A7, 2022-B1)" in out[0]
    (tmp_path / "slides.csv").unlink()
    assert run(capsys, tmp_path, "--index", r"--slide-pattern=-(\w)")[0] == 0
    dataset = load_dataset(tmp_path, require=(), split={"A": "train", "B": "val"})
    assert [roi.slide for roi in dataset.rois] == ["A", "A", "B"]


@pytest.mark.parametrize("prepare, argv, words", [
    (loose_folder, ["--slide-pattern", "("], "not a regular expression"),
    (loose_folder, ["--slide-pattern", "caseA"], "finds no slide in 'caseB_1'"),
    (loose_folder, ["--slide-pattern", "x*"], "finds no slide"),
    (lambda root: None, [], "put the images into this folder"),
    (lambda root: loose_folder(root / "deeper"), [], "put the images into this folder"),
    (lambda root: save(root / "images/a.png", np.zeros((9, 9, 3), np.uint8)), [], "no image has a partner"),
    (lambda root: (loose_folder(root), loose_folder(root, label="annotations")), [],
     "has a mask and annotations"),
    (lambda root: (loose_folder(root), save(root / "images/caseA_1.jpg", np.zeros((9, 9, 3), np.uint8))), [],
     "caseA_1.jpg and caseA_1.png have the same stem"),
])
def test_index_says_what_is_wrong_and_writes_nothing(tmp_path, capsys, prepare, argv, words):
    prepare(tmp_path)
    status, _, err = run(capsys, tmp_path, "--index", *argv)
    assert status == 2 and any(words in line for line in err), err
    assert all(line.startswith("error:") for line in err) and not (tmp_path / "slides.csv").exists()
