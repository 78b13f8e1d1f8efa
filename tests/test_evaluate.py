"""The evaluation against slow sums over pixels, and what it makes of missing, changed and wrong input.

The networks here are untrained: what is tested is the counting, not the learning.
"""

import csv
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_factory import save, write_csv, write_dataset
from PIL import Image

import evaluate
from her2 import draw, report, report_images, report_staining, report_study, run
from her2.data_classes import DEFAULT_CLASSES
from her2.data_folder import NEW_TISSUE, load_dataset, write_split
from her2.run_errors import command
from her2.metrics import BINS, THRESHOLDS, ProbabilityHistogram
from her2.segmenter import UNet
from her2.stains import compose, deconvolve

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {"seed": 0, "steps": 10, "patch": 96, "sampling": "subtype", "synthetic": "", "ratio": 1.0,
          "lr": 0.1}


def make_run(folder, data, step=10, **fields):
    """What train_seg.py leaves behind, with random weights that depend on the fields."""
    fields = {**FIELDS, "data": str(data), "out": str(folder), **fields}
    torch.manual_seed(len(str(fields["sampling"])) + 10 * fields["seed"])
    network = UNet(num_classes=2, width=8)
    dataset = load_dataset(data)
    folder = Path(folder)
    run.write_json(folder / "config.json", {"script": "train_seg.py", "fields": fields, "git": "0123abc",
                                            "versions": {}})
    run.save_model(folder, "segmenter", network.config, network.state_dict(), step=step,
                   patch=fields["patch"], classes=dataset.classes.to_json())
    write_split(folder / "split.json", dataset)
    return folder


def make_synthetic(folder, data, method, amounts=None, script="generate.py"):
    """Three images of 32 x 32 cut from the first training image; one instance each, of class 1, 2, 4.

    Their DAB is constant inside the instance: `amounts`, by default as it should be for the class.
    """
    folder, entries, rows = Path(folder), [], []
    source = next(roi for roi in load_dataset(data).rois if roi.split == "train")
    for i, (k, dab) in enumerate(zip((1, 2, 4), amounts or (0.1, 0.2, 0.7))):
        label = np.zeros((32, 32), np.uint8)
        label[8:24, 4:24] = k
        image = compose(np.full((32, 32), 0.1), np.where(label > 0, dab, 0.0)).round().astype(np.uint8)
        save(folder / f"images/{i}.png", image)
        save(folder / f"masks/{i}.png", label)
        save(folder / f"instances/{i}.png", (label > 0).astype(np.uint16))
        rows.append({"image": f"images/{i}.png", "mask": f"masks/{i}.png", "instances": f"instances/{i}.png",
                     "slide": source.slide, "split": "train"})
        entries.append({"image": f"images/{i}.png", "source_image": source.name, "source_slide": source.slide,
                        "x": 8 * i, "y": 4, "instances": {"1": [1, k]}})
    write_csv(folder, rows)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    run.write_json(folder / "config.json", {"script": script, "fields": {"method": method}})
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A dataset of 8 slides, two runs of the baseline, one of `tumor`, one with a synthetic folder."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rows = write_dataset("data", slides=8, height=64, width=96)
        for k in (6, 7):                # slides of two regions: 2 and 6 are val, 3 and 7 test
            rows[k]["slide"] = rows[k - 4]["slide"]
        write_csv("data", rows)
        for seed in (0, 1):
            make_run(f"runs/subtype{seed}", "data", seed=seed)
        make_run("runs/tumor0", "data", sampling="tumor")
        make_synthetic("synth/ldm", "data", "ldm")
        make_run("runs/ldm1", "data", seed=1, synthetic="synth/ldm")
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch):
    """A copy of the template as working directory."""
    shutil.copytree(template, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


RUNS = ["runs/subtype0", "runs/subtype1", "runs/tumor0", "runs/ldm1"]


def results(path="runs/report/results.json"):
    """results.json, read as strict JSON: NaN and Infinity are not."""
    def refuse(text):
        raise AssertionError(f"{text} in {path}")
    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


def by_name(content):
    return {config["name"]: config for config in content["configs"]}


# ---- figures against slow sums -------------------------------------------------------------------

@torch.no_grad()
def slow_pixels(folder, split, rois=None):
    """(probabilities, class ids) of all pixels of a split, each ROI in one forward pass."""
    content = run.load_model(folder, "segmenter")
    network, dataset = run.build_model(UNet, content, folder), load_dataset("data")
    probs, labels = [], []
    for roi in rois or dataset.split(split):
        image = torch.from_numpy(np.array(Image.open(roi.image))).permute(2, 0, 1)[None].float() / 127.5 - 1
        probs.append(network(image).softmax(1)[0, 1].numpy().ravel())
        labels.append(np.array(Image.open(roi.mask)).ravel())
    return np.concatenate(probs), np.concatenate(labels)


@torch.no_grad()
def by_tiles(folder, image, side):
    """(H, W) probabilities of an image, (H, W, 3) uint8: every tile, of `side` pixels, a pass of its own."""
    network = run.build_model(UNet, run.load_model(folder, "segmenter"), folder)
    prob = np.empty(image.shape[:2], np.float32)
    for y, x in itertools.product(*(range(0, length, side) for length in prob.shape)):
        part = torch.from_numpy(image[y:y + side, x:x + side].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        prob[y:y + side, x:x + side] = network(part).softmax(1)[0, 1].numpy()
    return prob


def slow_figures(prob, label, threshold):
    called, tumor = prob >= threshold, label > 0
    both = (called & tumor).sum()
    recall = {DEFAULT_CLASSES.names[k]: called[label == k].mean() for k in range(1, 6)}
    four = [recall[name] for name in ("0", "1+", "2+", "3+")]
    return {"dice": 2 * both / (called.sum() + tumor.sum()), "recall": recall,
            "precision": both / called.sum(), "fpr": called[~tumor].mean(),
            "subtype_variance": sum((r - sum(four) / 4) ** 2 for r in four) / 4}


def check(found, expected):
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=2e-4), key       # a pixel may round to the other side


def test_every_figure_of_results_json_against_sums_over_pixels(place):
    evaluate.main([*RUNS, "--tile", "96", "--synthetic", "synth/ldm"])
    configs = by_name(results())
    assert list(configs) == ["tumor", "subtype", "ldm-100"]
    assert [(c["method"], c["ratio"], c["sampling"]) for c in configs.values()] == [
        ("real", 0.0, "tumor"), ("real", 0.0, "subtype"), ("ldm", 1.0, "subtype")]
    for name, seed, folder, base in (("subtype", 0, "runs/subtype0", "runs/subtype0"),
                                     ("subtype", 1, "runs/subtype1", "runs/subtype1"),
                                     ("tumor", 0, "runs/tumor0", "runs/subtype0"),
                                     ("ldm-100", 1, "runs/ldm1", "runs/subtype1")):
        record = next(r for r in configs[name]["runs"] if r["seed"] == seed)
        prob, label = slow_pixels(folder, "test")
        check(record, slow_figures(prob, label, 0.5))
        assert np.array(record["confusion"]).sum() == label.size
        # matched: the threshold whose false-positive rate on val is nearest to the baseline's there
        val_prob, val_label = slow_pixels(folder, "val")
        base_prob, base_label = slow_pixels(base, "val")
        target = (base_prob[base_label == 0] >= 0.5).mean()
        rates = np.array([(val_prob[val_label == 0] >= t).mean() for t in THRESHOLDS])
        threshold = record["matched"]["threshold"]
        chosen = (val_prob[val_label == 0] >= threshold).mean()
        assert abs(chosen - target) == pytest.approx(np.abs(rates - target).min(), abs=2e-4)
        check(record["matched"], slow_figures(prob, label, threshold))
        if folder == base:
            assert threshold == 0.5
        metrics = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))
        assert metrics["figures"]["dice"] == record["dice"]


def test_results_csv_has_a_row_per_run_and_roi_and_the_worst_are_drawn(place):
    dataset = load_dataset("data")
    hole = np.array(Image.open("data/masks/roi3.png"))
    hole[:9] = 255                                      # to be ignored
    save("data/masks/roi3.png", hole)
    evaluate.main(RUNS)
    first = Path("runs/report/results.csv").read_bytes()
    rows = list(csv.DictReader(first.decode("utf-8").splitlines()))
    assert len(rows) == len(RUNS) * (2 + 4) and {row["run"] for row in rows} == set(RUNS)
    for folder in RUNS:
        mine = [row for row in rows if row["run"] == folder]
        shares = {}
        for row in mine:
            rois = [roi for roi in dataset.split(row["split"]) if row["roi"] in ("", roi.name)]
            parts = [slow_pixels(folder, row["split"], [roi]) for roi in rois]
            prob, label = (np.concatenate(part) for part in zip(*parts))
            prob, label = prob[label != 255], label[label != 255]
            expected = slow_figures(prob, label, 0.5)
            assert int(row["pixels"]) == label.size
            for key in ("dice", "precision", "fpr", "subtype_variance"):
                assert float(row[key]) == pytest.approx(expected[key], abs=2e-4), key
            for name, value in expected["recall"].items():
                assert float(row[f"recall {name}"]) == pytest.approx(value, abs=2e-4)
            assert row["slide"] == (rois[0].slide if row["roi"] else "")
            if row["roi"] and row["split"] == "test":
                shares[row["roi"]] = np.mean((prob >= 0.5) != (label > 0))
        assert sum(int(row["pixels"]) for row in mine if row["roi"]) == sum(
            int(row["pixels"]) for row in mine if not row["roi"]) and len(shares) == 2
        roi = next(roi for roi in dataset.rois if roi.name == max(shares, key=shares.get))
        with Image.open(Path(folder, "worst.png")) as picture:
            drawn = {color for _, color in picture.convert("RGB").getcolors(1 << 24)}
        mask, prob = np.array(Image.open(roi.mask)), slow_pixels(folder, "test", [roi])[0]
        share, (_, _, wrong) = draw.errors(np.array(Image.open(roi.image)), mask,
                                                   prob.reshape(mask.shape), dataset.classes, evaluate.CELL)
        assert share == pytest.approx(shares[roi.name], abs=2e-4)
        found = prob.reshape(mask.shape) >= 0.5
        assert np.array_equal((wrong == draw.BLUE).all(-1), (mask > 0) & (mask != 255) & ~found), "missed"
        assert np.array_equal((wrong == draw.VERMILION).all(-1), (mask == 0) & found), "false"
        assert {evaluate.draw.BLUE, evaluate.draw.VERMILION} <= drawn
    evaluate.main(RUNS)
    assert Path("runs/report/results.csv").read_bytes() == first, "from metrics.json"


def test_tiles_do_not_change_the_figures_much_and_never_the_counts(place):
    evaluate.main(["runs/subtype0", "--tile", "96"])
    whole = results()["configs"][0]["runs"][0]
    evaluate.main(["runs/subtype0", "--tile", "64", "--overlap", "32"])
    tiled = results()["configs"][0]["runs"][0]
    assert np.array_equal(np.sum(whole["confusion"], axis=1), np.sum(tiled["confusion"], axis=1))
    assert sum(np.sum(part["confusion"]) for part in tiled["slides"].values()) == np.sum(tiled["confusion"])


def test_each_network_sees_tiles_of_its_own_patches(place):
    """Patches of 32 px: tiles of 32 px, which share nothing: each is a forward pass of its own."""
    make_run("runs/few", "data", seed=3, patch=32)
    evaluate.main(["runs/few", "runs/subtype0"])
    few = next(one for one in by_name(results())["subtype"]["runs"] if one["seed"] == 3)
    rois = load_dataset("data").split("test")
    probs = [by_tiles("runs/few", np.array(Image.open(roi.image)), 32).ravel() for roi in rois]
    labels = [np.array(Image.open(roi.mask)).ravel() for roi in rois]
    check(few, slow_figures(np.concatenate(probs), np.concatenate(labels), 0.5))
    whole = run.read_json("runs/subtype0/metrics.json")["key"]
    assert (whole["tile"], whole["overlap"]) == (96, 32)


def test_report_names_its_figures_and_prints_the_table(place, capsys):
    evaluate.main([*RUNS, "--synthetic", "synth/ldm"])
    page = Path("runs/report/report.md").read_text(encoding="utf-8")
    for name in ("fig2.png", "fig4.png", "fig5.png", "fig6.png", "staining.png"):
        assert f"({name})" in page
        with Image.open(Path("runs/report") / name) as image:
            assert image.mode == "RGB" and min(image.size) > 100
    printed = capsys.readouterr().out
    dice = by_name(results())["ldm-100"]["runs"][0]["dice"]
    assert f"{dice:.3f}" in printed and "dice at 0.5" in printed and "equal FPR" not in printed
    [row] = [line for line in page.splitlines() if line.startswith("| ldm-100 | 1 |")]
    assert f" {dice:.3f} " in row and "| ldm-100 against subtype |" in page
    assert "nan" not in page.lower() and "nan" not in printed.lower()


def test_absent_subtypes_are_not_available_never_zero(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_dataset("data", slides=8, height=64, width=96, class_ids=(1, 2, 4))
    make_run("runs/tumor", "data", sampling="tumor")
    evaluate.main(["runs/tumor"])
    record = results()["configs"][0]["runs"][0]
    assert record["recall"]["2+"] is None and record["recall"]["LCIS/DCIS"] is None
    three = [record["recall"][name] for name in ("0", "1+", "3+")]
    assert record["subtype_variance"] == pytest.approx(np.var(three))
    assert record["matched"] is None, "no baseline, so there is nothing to match"
    page = Path("runs/report/report.md").read_text(encoding="utf-8")
    assert page.count("n/a") > 10 and "nan" not in page.lower() and "n/a" in capsys.readouterr().out


# ---- what is computed again ----------------------------------------------------------------------

@pytest.fixture
def predicted(monkeypatch):
    """Folders that `predict` is called for."""
    calls, predict = [], evaluate.predict
    monkeypatch.setattr(evaluate, "predict",
                        lambda one, *rest: (calls.append(one.folder), predict(one, *rest)))
    return calls


def test_runs_are_predicted_once_and_again_when_something_changed(place, predicted):
    def again(*argv):
        predicted.clear()
        evaluate.main([*RUNS[:2], *argv])
        return predicted

    assert again() == RUNS[:2]
    first = Path("runs/report/results.json").read_bytes()
    assert again() == [] and Path("runs/report/results.json").read_bytes() == first
    make_run("runs/subtype1", "data", seed=1, sampling="subtype", lr=0.1)
    content = run.load_model("runs/subtype1", "segmenter")
    content["state_dict"]["encoder.conv1.weight"] *= 2
    run.save_model("runs/subtype1", "segmenter", content["kwargs"], content["state_dict"], step=10,
                   classes=content["classes"])
    assert again() == ["runs/subtype1"], "the model changed"
    Path("runs/subtype0/metrics.json").write_text('{"key": ', encoding="utf-8")
    assert again() == ["runs/subtype0"], "half a file"
    content = json.loads(Path("runs/subtype0/metrics.json").read_text(encoding="utf-8"))
    Path("runs/subtype0/metrics.json").write_text(json.dumps({**content, "test": {"s3": [1]}}), encoding="utf-8")
    assert again() == ["runs/subtype0"], "damaged counts"
    assert json.loads(Path("runs/subtype0/metrics.json").read_text(encoding="utf-8")) == content
    assert again("--tile", "128") == RUNS[:2], "another setting"
    assert again("--tile", "128") == []
    label = np.array(Image.open("data/masks/roi3.png"))
    label[0, 0] = 1
    save("data/masks/roi3.png", label)
    assert again("--tile", "128") == RUNS[:2], "a test annotation changed"
    save("data/masks/roi0.png", label)
    assert again("--tile", "128") == [], "a training annotation is not evaluated"


def test_a_folder_named_twice_counts_once_and_stars_are_replaced(place, predicted):
    evaluate.main(["runs/subtype0", "./runs/subtype0", "runs/subtype*", "runs/tum*"])
    assert sorted(Path(folder).name for folder in predicted) == ["subtype0", "subtype1", "tumor0"]


# ---- input that is wrong -------------------------------------------------------------------------

def edit(path, **fields):
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    content["fields"].update(fields)
    run.write_json(path, content)


def other_dataset():
    shutil.copytree("data", "data2")
    edit("runs/subtype1/config.json", data="data2")


def other_split():
    path = Path("runs/subtype1/split.json")
    table = json.loads(path.read_text(encoding="utf-8"))
    table["slides"]["s3"] = "train"
    run.write_json(path, table)


def other_script():
    content = json.loads(Path("runs/tumor0/config.json").read_text(encoding="utf-8"))
    run.write_json("runs/tumor0/config.json", {**content, "script": "train_gan.py"})


def lost_field():
    content = json.loads(Path("runs/tumor0/config.json").read_text(encoding="utf-8"))
    del content["fields"]["sampling"]
    run.write_json("runs/tumor0/config.json", content)


def other_classes():
    table = DEFAULT_CLASSES.to_json()
    table[1]["name"] = "zero"
    run.write_json("data/classes.json", table)


def moved_window():
    path = Path("synth/ldm/manifest.jsonl")
    path.write_text(path.read_text(encoding="utf-8").replace('"y": 4', '"y": 40'), encoding="utf-8")


def more_steps():
    """The run was evaluated, then its command asked for more, and was interrupted."""
    evaluate.main([*RUNS, "--out", "runs/before"])
    edit("runs/tumor0/config.json", steps=20)


def one_image():
    rows = Path("synth/ldm/slides.csv").read_text(encoding="utf-8").splitlines()
    Path("synth/ldm/slides.csv").write_text("\n".join(rows[:2]), encoding="utf-8")
    path = Path("synth/ldm/manifest.jsonl")
    path.write_text(path.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")


def odd_size():
    for path in Path("synth/ldm").rglob("*.png"):
        save(path, np.array(Image.open(path))[:, :24])


def test_slide_source():
    path = Path("synth/ldm/manifest.jsonl")
    text = path.read_text(encoding="utf-8").replace("roi0", "roi3").replace('"s0"', '"s3"')
    path.write_text(text, encoding="utf-8")


test_slide_source.__test__ = False          # a way to break the input, not a test


BAD = {
    "no such folder": (lambda: None, ["runs/nothing"], ["runs/nothing", "train_seg.py"]),
    "no run at all": (lambda: None, ["runs/no*"], ["runs/no*", "train_seg.py"]),
    "a file": (lambda: None, ["data/slides.csv"], ["slides.csv"]),
    "no model.pt": (lambda: Path("runs/tumor0/model.pt").unlink(), RUNS, ["tumor0", "model.pt"]),
    "no config.json": (lambda: Path("runs/tumor0/config.json").unlink(), RUNS, ["tumor0", "config.json"]),
    "config.json is a list": (lambda: run.write_json("runs/tumor0/config.json", [1]), RUNS, ["tumor0"]),
    "no split.json": (lambda: Path("runs/tumor0/split.json").unlink(), RUNS, ["tumor0", "split.json"]),
    "another script": (other_script, RUNS, ["tumor0", "train_gan.py"]),
    "a field is lost": (lost_field, RUNS, ["tumor0", "sampling"]),
    "other data": (other_dataset, RUNS, ["runs/subtype1", "data2"]),
    "another split": (other_split, RUNS, ["runs/subtype1", "s3"]),
    "not finished": (lambda: make_run("runs/tumor0", "data", step=4, sampling="tumor"), RUNS,
                     ["tumor0", "step 4"]),
    "another kind of model": (lambda: run.save_model("runs/tumor0", "gan", {}, {}), RUNS,
                              ["tumor0", "'gan'"]),
    "damaged model": (lambda: Path("runs/tumor0/model.pt").write_bytes(b"PK"), RUNS, ["tumor0", "model.pt"]),
    "another class table": (other_classes, RUNS, ["class table"]),
    "data are gone": (lambda: shutil.move("data", "elsewhere"), RUNS, ["not found (data)", "--data"]),
    "synthetic folder of the run is gone": (lambda: shutil.move("synth/ldm", "x"), RUNS, ["synth/ldm"]),
    "not a synthetic folder": (lambda: None, [*RUNS, "--synthetic", "data"], ["data"]),
    "two folders of one method": (lambda: shutil.copytree("synth/ldm", "synth/b"),
                                  [*RUNS, "--synthetic", "synth/ldm", "synth/b"], ["synth/b", "ldm"]),
    "synthetic without manifest": (lambda: Path("synth/ldm/manifest.jsonl").unlink(),
                                   [*RUNS, "--synthetic", "synth/ldm"], ["manifest.jsonl"]),
    "synthetic from a test slide": (test_slide_source, [*RUNS, "--synthetic", "synth/ldm"], ["s3", "test"]),
    "more steps asked for": (more_steps, RUNS, ["tumor0", "step 10 of 20"]),
    "one image for the judge": (one_image, [*RUNS, "--synthetic", "synth/ldm", "--judge", "runs/tumor0"],
                                ["synth/ldm", "two images"]),
    "an odd size for the judge": (odd_size, [*RUNS, "--synthetic", "synth/ldm", "--judge", "runs/tumor0"],
                                  ["synth/ldm", "multiples of 32"]),
    "window outside its image": (moved_window, [*RUNS, "--synthetic", "synth/ldm"], ["y 40", "roi0"]),
    "tile": (lambda: None, [*RUNS, "--tile", "50"], ["--tile 50"]),
    "overlap": (lambda: None, [*RUNS, "--tile", "64", "--overlap", "64"], ["--overlap 64"]),
    "unknown flag": (lambda: None, [*RUNS, "--nonsense"], ["--nonsense"]),
    "bad device": (lambda: None, [*RUNS, "--device", "tpu"], ["--device"]),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_one_line_and_status_2(place, capsys, case):
    spoil, argv, words = BAD[case]
    spoil()
    with pytest.raises(SystemExit) as end:
        command(evaluate.main, argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert end.value.code == 2 and len(lines) == 1, lines
    assert ";" in lines[0] and all(word in lines[0] for word in words), lines[0]
    assert not Path("runs/report/results.json").exists()


def test_the_script_itself(place):
    def start(*argv):
        return subprocess.run([sys.executable, ROOT / "evaluate.py", *argv], capture_output=True, text=True,
                              encoding="utf-8")
    done = start(*RUNS[:2], "--out", "there")
    assert done.returncode == 0 and "subtype" in done.stdout and Path("there/report.md").exists(), done.stderr
    failed = start()
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "train_seg.py" in failed.stderr


def test_the_file_of_a_seed_matches_on_test_and_chooses_on_val(place):
    """Known counts in place of the networks': val and test differ, and so do the two arms."""
    evaluate.main([RUNS[0], RUNS[2], "--out", "out/seed0/report"])
    sums, rng = {}, np.random.default_rng(3)
    for folder, shift in (("runs/subtype0", 0), ("runs/tumor0", 120)):
        content = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))
        for split, move in (("val", -180), ("test", 60)):
            for slide in content[split]:
                counts = np.zeros((6, BINS), np.int64)
                for k, row in enumerate(counts):
                    at = rng.normal((300, 640)[k > 0] + shift + move, 120, 500).clip(0, BINS - 1).astype(int)
                    np.add.at(row, at, 1)
                content[split][slide] = ProbabilityHistogram(DEFAULT_CLASSES, counts).to_json()
                sums[folder, split] = sums.get((folder, split), 0) + counts
        run.write_json(Path(folder, "metrics.json"), content)
    config = SimpleNamespace(out="out", preset="small", data="data", split_seed=0, device="cpu", amp="off", trial=0)
    report_study.write_seed(config, 0, {})
    content = json.loads(Path("out/seeds/seed0.json").read_text(encoding="utf-8"))
    whole = {key: ProbabilityHistogram(DEFAULT_CLASSES, counts) for key, counts in sums.items()}
    target = whole["runs/subtype0", "test"].report(0.5)["fpr"]
    for arm, folder in (("subtype", "runs/subtype0"), ("tumor", "runs/tumor0")):
        found = content["arms"][arm]
        rates = [whole[folder, "test"].report(t)["fpr"] for t in THRESHOLDS]
        assert abs(found["figures"]["matched"]["fpr"] - target) == pytest.approx(min(abs(r - target) for r in rates))
        dice = [whole[folder, "val"].report(t)["dice"] for t in THRESHOLDS]
        assert dice[int(np.abs(THRESHOLDS - found["thresholds"]["best"]).argmin())] == max(dice)
        assert np.array(found["tables"]["half"]).sum() == sums[folder, "test"].sum()
    assert content["commit"] == run.read_json("runs/subtype0/config.json")["git"]


def test_a_synthetic_set_that_moved_with_its_run_is_found(place, monkeypatch):
    shutil.move("synth", "runs/synth")                      # beside the run now, as it was before the move
    run.write_json("runs/ldm1/config.json", json.loads(Path("runs/ldm1/config.json").read_text(encoding="utf-8"))
                   | {"cwd": str(place / "runs")})
    edit("runs/ldm1/config.json", data=str(place / "data"))
    evaluate.main(["runs/ldm1"])
    assert list(by_name(results())) == ["ldm-100"]


def test_runs_with_other_hyperparameters_are_named(place, capsys):
    edit("runs/tumor0/config.json", lr=0.3, workers=5)
    evaluate.main(RUNS[:3])
    errors, page = capsys.readouterr().err, Path("runs/report/report.md").read_text(encoding="utf-8")
    for text in (errors, page):
        assert "differ in lr (0.1, 0.3)" in text and "workers" not in text


# ---- staining ------------------------------------------------------------------------------------

def test_staining_is_measured_per_instance_and_by_the_subtype_asked_for(place):
    for k, dab in zip((0, 1, 4, 5), (0.15, 0.25, 0.3, 0.6)):    # the training images: one amount of DAB each
        label = np.array(Image.open(f"data/masks/roi{k}.png"))
        image = compose(np.full(label.shape, 0.05), np.where(label > 0, dab, 0.0)).round().astype(np.uint8)
        save(f"data/images/roi{k}.png", image)
    make_synthetic("synth/gan", "data", "gan", amounts=(0.4, 0.3, 0.2))
    evaluate.main([*RUNS, "--synthetic", "synth/ldm", "synth/gan"])
    found = results()["staining"]
    assert list(found) == ["real", "GAN", "diffusion"]
    for name in ("0", "1+", "2+", "3+", "LCIS/DCIS"):
        assert found["real"][name]["n"] == 4
        assert found["real"][name]["median"] == pytest.approx(0.275, abs=0.03)
    # Glass of the training images is 0.05 of haematoxylin darker than white, the same for every source.
    offset = found["diffusion"]["0"]["median"] - 0.1
    assert abs(offset) < 0.03
    for method, amounts in (("GAN", (0.4, 0.3, 0.2)), ("diffusion", (0.1, 0.2, 0.7))):
        medians = [found[method][name]["median"] for name in ("0", "1+", "3+")]
        assert np.allclose(np.array(medians) - offset, amounts, atol=0.02)
        assert found[method]["2+"] == {"n": 0, "q25": None, "median": None, "q75": None}
        assert found[method]["ordered"] is None


def test_examples_stand_beside_the_patch_they_were_made_from(place, monkeypatch):
    shown, grid = [], draw.image_grid
    monkeypatch.setattr(report_images.draw, "image_grid", lambda rows, captions, columns, **more: (
        shown.extend(dict(zip(columns, row)) for row in rows), grid(rows, captions, columns, **more))[1])
    evaluate.main(["runs/subtype0", "--synthetic", "synth/ldm"])
    shown = [row for row in shown if "original" in row]                         # the other grid is worst.png
    source = np.array(Image.open("data/images/roi0.png"))
    entries = [json.loads(line) for line in Path("synth/ldm/manifest.jsonl").read_text("utf-8").splitlines()]
    assert len(shown) == 3
    for row in shown:
        [entry] = [one for one in entries
                   if np.array_equal(np.array(Image.open(f"synth/ldm/{one['image']}")), row["diffusion"])]
        y, x = entry["y"], entry["x"]
        assert np.array_equal(row["original"], source[y:y + 32, x:x + 32])


def test_new_tissue_alone_has_examples_without_originals(place):
    """`fresh` has no source in the dataset: beside another set each shows patches of its own."""
    make_synthetic("synth/fresh", "data", "fresh")
    lines = Path("synth/fresh/manifest.jsonl").read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        entry = json.loads(line)
        lines[i] = json.dumps(dict(entry, source_image=f"{NEW_TISSUE}{i}", source_slide=f"{NEW_TISSUE}{i}"))
    Path("synth/fresh/manifest.jsonl").write_text("\n".join(lines), encoding="utf-8")
    write_csv("synth/fresh", [dict(row, slide=f"{NEW_TISSUE}{i}") for i, row in enumerate(
        csv.DictReader(Path("synth/fresh/slides.csv").open(encoding="utf-8", newline="")))])
    Path("data/phantom.json").write_text("{}", encoding="utf-8")
    shutil.copytree("synth/ldm", "synth/restain")
    config = run.read_json("synth/restain/config.json")
    config["fields"]["method"] = "restain"                  # behind `fresh` in the order of methods
    run.write_json("synth/restain/config.json", config)
    sizes = {}
    for sets in (["synth/fresh"], ["synth/fresh", "synth/restain"], ["synth/restain"]):
        evaluate.main(["runs/subtype0", "--synthetic", *sets])
        with Image.open("runs/report/fig4.png") as picture:
            sizes[len(sets), sets[0]] = picture.width
    assert sizes[1, "synth/fresh"] < sizes[1, "synth/restain"] <= sizes[2, "synth/fresh"]


def test_instance_densities_against_a_loop():
    rng = np.random.default_rng(0)
    image = rng.integers(20, 256, (30, 40, 3), dtype=np.uint8)
    instance = rng.integers(0, 4, (30, 40))
    instance[instance == 3] = 0
    instance[0, :5] = 3                                 # five pixels: too small
    white = np.array([250.0, 248.0, 245.0])
    found = report_staining.instance_densities(image, instance, 5, white)
    for i in (1, 2):
        assert found[i] == pytest.approx(deconvolve(image[instance == i], white)[1].mean())
    assert np.isnan(found[3]) and np.isnan(found[4])
    assert found[3:].size == 2
    assert not np.isnan(report_staining.instance_densities(image, instance, 5, white, 9)[3])


@pytest.mark.parametrize("medians, ordered", [((1, 2, 3, 4), True), ((1, 3, 2, 4), False),
                                              ((1, 1, 2, 3), False)])
def test_order_of_the_medians(medians, ordered):
    densities = {"real": {k: [m] for k, m in zip(range(1, 6), (*medians, 0))}}
    summary = report_staining.summary(densities, DEFAULT_CLASSES)
    assert summary["real"]["ordered"] is ordered


# ---- the table's arithmetic ----------------------------------------------------------------------

@pytest.mark.parametrize("fields, method, name", [
    ({"sampling": "tumor"}, "", "tumor"), ({"sampling": "subtype", "ratio": 2.0}, "", "subtype"),
    ({"sampling": "subtype", "synthetic": "x", "ratio": 0.5}, "gan", "gan-50"),
    ({"sampling": "subtype", "synthetic": "x", "ratio": 4.0}, "inpaint", "inpaint-400"),
    ({"sampling": "tumor", "synthetic": "x", "ratio": 1.0}, "ldm", "ldm-100-tumor"),
    ({"sampling": "subtype", "synthetic": "x", "ratio": 1.0}, "reconstruct", "reconstruct-100"),
    ({"sampling": "subtype", "synthetic": "x", "ratio": 1.0}, "ldm-same", "ldm-100-same"),
    ({"sampling": "subtype", "synthetic": "x", "ratio": float("inf")}, "ldm", "ldm-only"),
    ({"sampling": "subtype", "synthetic": "x", "ratio": 1.0, "name": "my fork"}, "ldm", "my fork"),
])
def test_names_of_configurations(fields, method, name):
    assert report.configuration_name({"synthetic": "", **fields}, method) == name


def test_two_runs_of_one_name_and_seed_are_told_apart():
    runs = [report.Run(f"runs/{k}", {**FIELDS, "seed": seed}, "", {})
            for k, seed in enumerate((0, 0, 1, 0))]
    notes = report.check_comparable(runs)
    assert [one.name for one in runs] == ["subtype", "subtype (2)", "subtype", "subtype (3)"]
    assert len(notes) == 2 and all("runs/0 and runs/" in note and "--name" in note for note in notes)


def test_order_of_configurations():
    protocol = ["tumor", "subtype", *(f"{method}-{ratio}" for ratio in (50, 100, 200, 400)
                                      for method in ("gan", "ldm", "inpaint")), "ldm-100-same",
                "oracle-100", "restain-100", "reconstruct-100", "a fork"]
    assert sorted(sorted(protocol), key=report.order) == protocol


def config_of(name, method="real", ratio=0.0, **runs):
    """A configuration of results.json from seed=(dice, variance) pairs, as s0=..., s1=..."""
    return {"name": name, "method": method, "ratio": ratio, "sampling": "subtype", "runs": [
        {"seed": int(seed[1:]), "dice": dice, "subtype_variance": variance, "precision": None, "fpr": 0.1,
         "recall": {"0": None}, "confusion": [[9, 1], [3, 1]], "matched": None}
        for seed, (dice, variance) in runs.items()]}


def test_a_name_may_hold_any_words():
    """Arms are compared by their names, whatever --name says."""
    def run_of(name):
        histogram = ProbabilityHistogram(DEFAULT_CLASSES).add(np.full(6, 0.7), np.arange(6))
        return report.Run("x", {**FIELDS, "name": name}, "", {split: {"s": histogram} for split in ("val", "test")})

    dataset = SimpleNamespace(rois=[SimpleNamespace(slide="s", score=None)], classes=DEFAULT_CLASSES)
    study = report.study_of([run_of(name) for name in ("subtype", "mine against | yours")], dataset)
    page = "\n".join(report.sections(study, report.compare(study), {}, []))
    assert "| mine against \\| yours against subtype | +0.000 |" in page


def test_texts_of_one_several_and_no_numbers():
    assert report.spread([0.8334]) == "0.833" and report.spread([None, None]) == "n/a"
    assert report.spread([0.8, 0.9, None]) == "0.850 \u00b1 0.071" and report.spread([]) == "n/a"
    one = {"mean": 0.0213, "low": None, "high": None}
    assert report.interval_text(one) == "+0.021" and report.interval_text(None) == "n/a"
    assert report.interval_text({**one, "low": -0.0001, "high": 0.1}) == "+0.021 [-0.000, +0.100]", "0 is inside"
    assert report.interval_text(dict(one, mean=0.0), ratio=True) == "x 1.00"
    assert report.markdown([{"a|b": "1", "c": "2"}]) == "| a\\|b | c |\n| --- | --- |\n| 1 | 2 |"
    assert report.markdown([]) == "n/a", "no second arm, nothing to compare"
    assert report.plain([{"name": "a", "x": "12"}]).splitlines() == ["name  x", "-" * 8, "a     12"]


def test_confusion_rows_sum_to_one_and_empty_rows_are_nan():
    two = config_of("subtype", s0=(0, 0), s1=(0, 0))
    two["runs"][0]["confusion"], two["runs"][1]["confusion"] = [[8, 2], [0, 0]], [[6, 4], [0, 0]]
    [(title, mean, deviation)] = report.before_and_after([two], [1, 0])
    assert title == "subtype (2 runs)" and np.allclose(mean[1], [0.7, 0.3]) and np.isnan(mean[0]).all()
    assert np.allclose(deviation[1], np.std([0.8, 0.6], ddof=1))
    assert report.before_and_after([config_of("subtype", s0=(0, 0))], [0, 1])[0][2] is None


@pytest.mark.parametrize("names, pair", [
    (["tumor", "subtype", "gan-100", "ldm-50", "ldm-100", "ldm-200"], ["subtype", "ldm-100"]),
    (["subtype", "gan-50", "gan-400"], ["subtype", "gan-50"]), (["subtype"], ["subtype"]),
    (["tumor"], ["tumor"]), (["tumor", "ldm-100"], ["ldm-100"])])
def test_the_pair_of_figure_6_depends_on_no_result(names, pair):
    parts = [(name, *name.split("-")) if "-" in name else (name, "real", 0) for name in names]
    configs = [config_of(name, method, float(ratio) / 100, s0=(0, 0)) for name, method, ratio in parts]
    assert [title for title, *_ in report.before_and_after(configs, [0, 1])] == [f"{name} (1 run)" for name in pair]


def test_a_run_is_matched_to_its_own_seed():
    def run_of(seed, sampling, fpr):
        """Half of 1000 background pixels lie at 0.3, `fpr` of them at 0.9; 100 tumor pixels at 0.6."""
        prob = np.concatenate([np.full(100, 0.6), np.full(500, 0.3), np.full(500, 0.1)])
        prob[100:100 + int(1000 * fpr)] = 0.9
        histogram = ProbabilityHistogram(DEFAULT_CLASSES).add(prob, (np.arange(1100) < 100).astype(int))
        fields = {**FIELDS, "seed": seed, "sampling": sampling}
        return report.Run("x", fields, "", {"val": {"s": histogram}, "test": {"s": histogram}})

    content = report.collect([run_of(0, "subtype", 0.05), run_of(1, "subtype", 0.5), run_of(0, "tumor", 0.2),
                              run_of(1, "tumor", 0.2), run_of(2, "tumor", 0.2)])
    matched = [record["matched"] for record in content["configs"][0]["runs"]]
    assert matched[0]["threshold"] > 0.9, "0.2 of the background lies at 0.9, and 0 is nearer to 0.05"
    assert matched[1]["fpr"] == pytest.approx(0.5) and matched[2] is None
