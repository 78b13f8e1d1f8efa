"""The whole protocol as a user runs it, on a dataset of noise and with two optimiser steps per training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_factory import rectangles, save, write_csv
from PIL import Image

from her2 import study
from her2.data_classes import DEFAULT_CLASSES

ROOT = Path(__file__).resolve().parents[1]


def run(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True,
                          text=True, encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study in a folder of its own: six slides of 64 x 96 pixels, no split column, DCIS on one only."""
    folder = tmp_path_factory.mktemp("study")
    rows, rng = [], np.random.default_rng(0)
    for k in range(6):
        ids = (1, 2, 3, 4, 5) if k == 0 else (1 + k % 4, 1 + (k + 1) % 4)
        save(folder / f"data/images/{k}.png", rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
        save(folder / f"data/masks/{k}.png", rectangles(64, 96, ids))
        rows.append({"image": f"images/{k}.png", "mask": f"masks/{k}.png", "slide": f"s{k}",
                     "score": str(k % 3)})
    write_csv(folder / "data", rows)
    command = ("-m", "her2.study", "--data", "data", "--out", "out", "--trial", "2")
    return folder, command, run(folder, *command)


def test_ends_with_results_in_the_agreed_form(finished):
    folder, _, process = finished
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "out/results.json").read_text(encoding="utf-8"))
    configs = {config["name"]: config for config in results["configs"]}
    assert set(configs) == {"tumor", "subtype", "gan-100", "ldm-100", "inpaint-100", "reconstructed"}
    assert ((configs["ldm-100"]["method"], configs["ldm-100"]["ratio"], configs["ldm-100"]["sampling"])
            == ("ldm", 1.0, "subtype"))
    for config in configs.values():
        assert [one["seed"] for one in config["runs"]] == [0]
        for one in config["runs"]:
            assert set(one["recall"]) == {DEFAULT_CLASSES.names[k] for k in DEFAULT_CLASSES.tumor_ids}
            assert {"dice", "subtype_variance", "precision", "fpr", "confusion", "matched"} <= set(one)
            assert {"fpr", "dice", "recall", "subtype_variance"} <= set(one["matched"])
            assert all(value is None or 0 <= value <= 1 for value in one["recall"].values())
    baseline = configs["subtype"]["runs"][0]
    assert baseline["matched"]["dice"] == pytest.approx(baseline["dice"])     # its own operating point


def test_prints_commands_that_can_be_run_by_hand(finished):
    folder, _, process = finished
    shown = [line[2:] for line in process.stdout.splitlines() if line.startswith("$ python ")]
    assert len(shown) == len(study.stages(study.Config(data="data", out="out")))
    by_hand = next(line for line in shown if "train_gan.py" in line).split()
    again = run(folder, str(ROOT / by_hand[1]), *by_hand[2:])
    assert again.returncode == 0 and "complete" in again.stdout


def test_does_not_repeat_what_is_complete(finished):
    folder, command, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("model.pt")}
    again = run(folder, *command)
    assert (again.returncode == 0
            and again.stdout.count(": complete") == len(study.stages(study.Config(data="data", out="out"))))
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("model.pt")}
    other = run(folder, *command, "--seed", "1")
    assert other.returncode == 2 and other.stderr.startswith("error:") and "seed: 0 -> 1" in other.stderr


def test_every_picture_is_there_and_can_be_opened(finished):
    folder, _, _ = finished
    wanted = ["report/fig2.png", "report/fig4.png", "report/fig5.png", "report/fig6.png",
              "report/staining.png", "vq/curves.png", "vq/samples/step000002.png",
              "ldm/curves.png", "ldm/samples/step000002.png",
              "gan/curves.png", "gan/samples/step000002.png", "seg-subtype-seed0/samples/step000002.png"]
    for name in wanted:
        with Image.open(folder / "out" / name) as picture:
            assert picture.convert("RGB").getextrema() != ((255, 255),) * 3, f"{name} is blank"
    page = (folder / "out/report/report.md").read_text(encoding="utf-8")
    assert all(Path(name).name in page for name in wanted[:5])


def test_inpainting_left_the_background_untouched(finished):
    """Every background pixel of the mask equals the source image at the position that the manifest names."""
    folder, _, _ = finished
    lines = (folder / "out/synth-inpaint/manifest.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    changed = 0
    for record in map(json.loads, lines):
        name = Path(record["image"]).name
        made, mask, source = (np.array(Image.open(path)) for path in (
            folder / "out/synth-inpaint/images" / name, folder / "out/synth-inpaint/masks" / name,
            folder / "data" / record["source_image"]))
        source = source[record["y"]:record["y"] + 64, record["x"]:record["x"] + 64]
        assert (made[mask == 0] == source[mask == 0]).all()
        changed += int((made[mask > 0] != source[mask > 0]).any())
        instance = np.array(Image.open(folder / "out/synth-inpaint/instances" / name))
        for i, (_, new) in record["instances"].items():
            assert set(mask[instance == int(i)].tolist()) == {new}
    assert changed == len(lines)


def test_split_holds_everywhere(finished):
    """One split for all stages, and no synthetic image from a slide of val or test."""
    folder, _, _ = finished
    splits = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "out").rglob("split.json")]
    assert len(splits) == 12 and all(split == splits[0] for split in splits)
    for method in study.METHODS:
        for line in (folder / f"out/synth-{method}/manifest.jsonl").read_text(encoding="utf-8").splitlines():
            assert splits[0]["slides"][json.loads(line)["source_slide"]] == "train"


def test_paper_protocol_has_its_configurations():
    """14 configurations x 5 seeds and the control, as the paper's section 3 asks."""
    runs = [name for name, _, _ in study.stages(study.Config(preset="paper"))
            if name.startswith("segmentation")]
    names = {name.split(": ")[1].split(",")[0] for name in runs}
    assert names == ({"tumor", "subtype", "reconstructed"}
                     | {f"{m}-{r}" for m in study.METHODS for r in (50, 100, 200, 400)})
    assert len(runs) == 15 * 5
