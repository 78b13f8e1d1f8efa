"""From a program's export to an evaluated network, for each kind of user, by the commands as printed."""

import csv
import json
import re

import numpy as np
import pytest
from data_exports import KINDS, SIDE, SLIDES, SUBTYPES, label_of, write_export

import evaluate
import train_seg
from PIL import Image
from data_factory import read_annotations, transform_polygons
from her2 import data, predict
from her2.data_classes import IGNORE
from her2.data_folder import load_dataset
from her2.data_regions import read_roi
from her2.polygons import paint
from her2.run_errors import command


def run(main, *argv) -> int:
    with pytest.raises(SystemExit) as stopped:
        command(main, [str(value) for value in argv])
    return stopped.value.code


def add_columns(root) -> None:
    """What only the user knows: score and split."""
    with open(root / "slides.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(root / "slides.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "score", "split"])
        writer.writeheader()
        for k, row in enumerate(rows):
            split = "train" if k < 4 else ("val", "test")[k - 4]
            writer.writerow({**row, "score": SUBTYPES[k % 4], "split": split})


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_export_to_an_evaluated_network(tmp_path, capsys, kind):
    root = tmp_path / "data"
    write_export(kind, root)
    assert run(data.main, root, "--index") == 0
    add_columns(root)
    if kind in ("qupath", "qupath 0.2", "black and white", "colours"):
        assert run(data.main, root, "--out", tmp_path / "check.png") == 2
        told = capsys.readouterr().err
        assert "classes.json" in told and run(data.main, root, "--draft-classes") == 0
        if kind == "black and white":       # no names to draft: what the message says is written by hand
            (root / "classes.json").write_text(re.search(r'into classes.json (\{.*?\})', told)[1], encoding="utf-8")
        draft = json.loads((root / "classes.json").read_text(encoding="utf-8"))
        assert draft == {"qupath": {"aliases": {"(none)": "ignore", "Region*": "Background",
                                                "Ignore*": "ignore"}},
                         "qupath 0.2": {"aliases": {f"Tumor: {name}": name for name in SUBTYPES}},
                         "black and white": {"masks": "score"},
                         "colours": {"aliases": {"#000000": "Background", "#ffcc33": "0", "#3d3df5": "1+",
                                                 "#34d1b7": "2+", "#fa3253": "3+"}}}[kind]
        if kind == "qupath":        # the frame without a class is no reason to ignore all that lies in it
            draft["aliases"]["(none)"] = "Background"
        (root / "classes.json").write_text(json.dumps(draft), encoding="utf-8")
        assert run(data.main, root, "--draft-classes") == 2, "never over an existing one"
    assert run(data.main, root, "--out", tmp_path / "check.png") == 0
    out = capsys.readouterr().out
    assert (tmp_path / "check_overlay001.png").exists()
    if kind == "qupath":
        assert f"annotations left out: {3 * SLIDES} cell (not an annotation)" in out
    assert not [line for line in out.splitlines() if line.startswith("note:") and "left out" not in line
                and "ignored" not in line and "nothing is" not in line], out

    dataset = load_dataset(root)
    assert len(dataset.rois) == SLIDES
    for k, roi in enumerate(dataset.rois):
        expected = label_of(k)
        if kind == "qupath" and k == 0:
            expected[88:, :30] = IGNORE
        assert np.array_equal(read_roi(roi, dataset.classes)[1], expected), roi.name

    common = ["--device", "cpu", "--cache", tmp_path / "cache"]
    assert run(train_seg.main, "--data", root, "--out", tmp_path / "seg", "--steps", 2, "--batch", 2,
               "--patch", 32, "--width", 8, *common) == 0
    assert run(evaluate.main, tmp_path / "seg", "--out", tmp_path / "report", *common) == 0
    [config] = json.loads((tmp_path / "report/results.json").read_text(encoding="utf-8"))["configs"]
    confusion = np.array(config["runs"][0]["confusion"])
    assert confusion.sum() == SIDE * SIDE, "every pixel of the test image"

    # And back, in the coordinates that the program has: the polygons are the mask, pixel for pixel.
    assert run(predict.main, root, "--model", tmp_path / "seg", "--out", tmp_path / "found", "--min-area", 1,
               "--device", "cpu", "--tile", 32, "--overlap", 0) == 0
    for roi in dataset.rois:
        found, _ = read_annotations(next((tmp_path / "found/polygons").rglob(f"{roi.image.stem}.geojson")))
        polygons = transform_polygons(found, roi.x, roi.y, roi.downsample)
        again, _ = paint([one.rings for one in polygons], [1] * len(polygons), SIDE, SIDE)
        with Image.open(next((tmp_path / "found/masks").rglob(f"{roi.image.stem}.png"))) as mask:
            assert np.array_equal(again > 0, np.array(mask) > 0), roi.name
