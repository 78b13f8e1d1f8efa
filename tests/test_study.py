"""The whole protocol as a user runs it, on a dataset of noise and with two optimiser steps per training."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_factory import rectangles, save, write_csv
from PIL import Image

import train_seg
from her2 import study, study_jobs
from her2.data_classes import DEFAULT_CLASSES
from her2.run_errors import UserError
from her2.study_jobs import Record, Stage, run_stages, seconds_left

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
    command = ("-m", "her2.study", "--data", "data", "--out", "out", "--trial", "2", "--seed", "0", "--jobs",
               "2", "--arms", "tumor,subtype,gan-100,ldm-100,inpaint-100,reconstruct-100")
    return folder, command, run(folder, *command)


def test_ends_with_results_in_the_agreed_form(finished):
    folder, _, process = finished
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "out/results.json").read_text(encoding="utf-8"))
    configs = {config["name"]: config for config in results["configs"]}
    assert set(configs) == {"tumor", "subtype", "gan-100", "ldm-100", "inpaint-100", "reconstruct-100"}
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
    assert len(shown) == 14
    by_hand = next(line for line in shown if "train_gan.py" in line).split()
    again = run(folder, str(ROOT / by_hand[1]), *by_hand[2:])
    assert again.returncode == 0 and "complete" in again.stdout


def test_does_not_repeat_what_is_complete(finished):
    folder, command, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("model.pt")}
    again = run(folder, *command)
    assert again.returncode == 0 and "14 of 14 stages are complete" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("model.pt")}
    other = run(folder, *command, "--trial", "3")
    assert other.returncode == 2 and other.stderr.startswith("error:") and "trial: 2 -> 3" in other.stderr


def test_an_arm_that_is_added_leaves_the_others_alone(finished):
    """And its figures join the report, made by one job after the other where the first were two at a time."""
    folder, command, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("model.pt")}
    more = run(folder, *command[:-1], command[-1] + ",subtype-2x,restain-100", "--jobs", "1")
    assert more.returncode == 0, more.stderr
    after = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("model.pt")}
    assert before.items() <= after.items() and len(after) == len(before) + 2
    results = json.loads((folder / "out/results.json").read_text(encoding="utf-8"))
    assert len(results["configs"]) == 8 and "restain-100 against subtype" in results["comparisons"]


def test_changed_data_make_again_what_read_them(finished, tmp_path):
    """The key of a stage hashes its data and what it needs; a folder from other data makes room."""
    plans = [study.stages(study.Config(preset="tiny", arms="subtype,ldm-100", data="data"), 0, (text, text))
             for text in ("a", "a", "b")]
    keys = [{stage.name: stage.key for stage in plan} for plan in plans]
    assert keys[0] == keys[1] and not set(keys[0].values()) & set(keys[2].values())
    other = study.stages(study.Config(preset="tiny", arms="subtype,ldm-100", data="data"), 0, ("a", "new test"))
    assert [stage.name for stage in other if stage.key != keys[0][stage.name]] == ["seed 0: evaluation"]
    one = Stage("a", "x", ("-c", "print()"), tmp_path / "a")
    changed = Stage("a", "x", ("-c", "pass"), tmp_path / "a")
    other, after = (Stage("b", "x", ("-c", "print()"), tmp_path / "b", (first,)) for first in (one, changed))
    assert other.key != after.key
    (tmp_path / "a").mkdir()
    record = Record(tmp_path / "stages.json")
    record.begin(one)
    record = Record(tmp_path / "stages.json")
    record.begin(one)
    assert (tmp_path / "a").exists() and not record.complete(one), "begun, interrupted, goes on"
    (tmp_path / "b").mkdir()
    record.begin(other)
    record = Record(tmp_path / "stages.json")
    record.begin(after)
    assert not (tmp_path / "b").exists() and (tmp_path / "b.stale").is_dir(), "begun, then its data changed"
    record.write(one, seconds=3.0)
    assert record.complete(one) and not record.complete(other)
    record = Record(tmp_path / "stages.json")
    assert not record.complete(changed) and record.seconds == {"a": 3.0}
    record.begin(changed)
    assert not (tmp_path / "a").exists() and (tmp_path / "a.stale").is_dir()


def test_a_finished_study_is_not_made_again_for_another_cache(finished):
    folder, command, _ = finished
    before = list((folder / "out").rglob("*.stale"))        # an arm was added: the report was made again
    assert run(folder, *command, "--out", "./out/").returncode == 0, "the same place"
    for flag, value in (("--cache", "elsewhere"), ("--device", "cpu"), ("--out", str(folder / "out"))):
        again = run(folder, *command, flag, value)
        assert again.returncode == 2 and flag[2:] in again.stderr and "old value" in again.stderr, again.stderr
    assert list((folder / "out").rglob("*.stale")) == before


@pytest.mark.skipif(os.name == "nt", reason="other quotes")
def test_commands_are_quoted_for_this_shell(tmp_path, monkeypatch):
    stage = Stage("a", "segmentation", ("train_seg.py", "--data", "D'Arcy (2) & co"), tmp_path)
    line = 'python train_seg.py --data "D\'Arcy (2) & co"'         # as the first studies hashed it
    assert stage.key == hashlib.sha256(json.dumps([line, ""]).encode("utf-8")).hexdigest()[:16]
    monkeypatch.chdir(tmp_path)
    words = shlex.split(stage.command)
    assert Path(words[1]).samefile(ROOT / "train_seg.py") and words[2:] == ["--data", "D'Arcy (2) & co"]


def test_a_failing_stage_names_itself_and_the_rest_goes_on(tmp_path, capfd):
    def stage(name, code, *needs):
        program = f"import pathlib; pathlib.Path({str(tmp_path / name)!r}).mkdir(); {code}"
        return Stage(name, "x", ("-m", "timeit", "-n1", "-r1", program), tmp_path / name, needs)

    plan = [stage("one", "raise SystemExit('error: no luck')")]
    plan += [stage("two", "pass", plan[0]), stage("three", "pass")]
    plan += [stage("four", "pass", plan[2])]
    plan += [stage("five", "pass", plan[3], plan[1])]
    seen, record = [], Record(tmp_path / "stages.json")
    failed = run_stages(plan, 2, record, tmp_path / "logs", {"x": 1}, lambda s: seen.append(s.name))
    assert seen == ["three", "four"] and set(record.seconds) == {"three", "four"}
    assert len(failed) == 1 and "'one'" in failed[0]
    assert not (tmp_path / "two").exists() and not (tmp_path / "five").exists()


@pytest.mark.parametrize("visible, expected", [(None, "0101"), ("2,3", "2323"), ("GPU-a,GPU-b", "abab")])
def test_jobs_share_the_gpus_that_the_user_left_them(tmp_path, monkeypatch, visible, expected):
    given = []
    monkeypatch.setattr(study_jobs.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(study_jobs.subprocess, "Popen", lambda line, env, **_: given.append(env))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for slot in range(4):
        study_jobs.Job(Stage("a", "x", ("a.py",), tmp_path), 4, slot, tmp_path)
    assert "".join(env["CUDA_VISIBLE_DEVICES"][-1] for env in given) == expected


def test_time_left_follows_the_pace_of_this_machine():
    cost = {"a": 100, "b": 10}
    waiting = [Stage(name, kind, (), Path()) for name, kind in (("1", "a"), ("2", "b"), ("3", "b"))]
    assert seconds_left(waiting, {}, {}, cost, 1) == 120
    assert seconds_left(waiting, {}, {"a": [50, 50]}, cost, 1) == 60            # twice as fast as expected
    assert seconds_left(waiting, {waiting[0]: 30}, {"b": [20]}, cost, 2) == (200 + 20 + 20 + 170) / 2


def test_every_picture_is_there_and_can_be_opened(finished):
    folder, _, _ = finished
    wanted = ["report/fig2.png", "report/fig4.png", "report/fig5.png", "report/fig6.png",
              "report/staining.png", "vq/curves.png", "vq/samples/step000002.png",
              "ldm/curves.png", "ldm/samples/step000002.png",
              "gan/curves.png", "gan/samples/step000002.png", "seg-subtype/samples/step000002.png"]
    for name in wanted:
        with Image.open(folder / "out/seed0" / name) as picture:
            assert any(low < high for low, high in picture.convert("RGB").getextrema()), f"{name} is blank"
    page = (folder / "out/seed0/report/report.md").read_text(encoding="utf-8")
    assert all(Path(name).name in page for name in wanted[:5])


def test_inpainting_left_the_background_untouched(finished):
    """Every background pixel of the mask equals the source image at the position that the manifest names."""
    folder, _, _ = finished
    lines = (folder / "out/seed0/synth-inpaint/manifest.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    changed = 0
    for record in map(json.loads, lines):
        name = Path(record["image"]).name
        made, mask, source = (np.array(Image.open(path)) for path in (
            folder / "out/seed0/synth-inpaint/images" / name, folder / "out/seed0/synth-inpaint/masks" / name,
            folder / "data" / record["source_image"]))
        source = source[record["y"]:record["y"] + 64, record["x"]:record["x"] + 64]
        assert (made[mask == 0] == source[mask == 0]).all()
        changed += int((made[mask > 0] != source[mask > 0]).any())
        instance = np.array(Image.open(folder / "out/seed0/synth-inpaint/instances" / name))
        for i, (_, new) in record["instances"].items():
            assert set(mask[instance == int(i)].tolist()) == {new}
    assert changed == len(lines)


def test_split_holds_everywhere(finished):
    """One split for all stages, and no synthetic image from a slide of val or test."""
    folder, _, _ = finished
    splits = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "out").rglob("split.json")]
    assert len(splits) >= 13 and all(split == splits[0] for split in splits)
    for method in study.METHODS:
        path = folder / f"out/seed0/synth-{method}/manifest.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            assert splits[0]["slides"][json.loads(line)["source_slide"]] == "train"


def test_repetitions_are_other_segmenters_on_the_same_images(finished):
    folder, command, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("model.pt")}
    more = run(folder, *command[:-1], "tumor", "--repeats", "2")
    assert more.returncode == 0, more.stderr
    after = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("model.pt")}
    assert before.items() <= after.items() and len(after) == len(before) + 2
    seed = json.loads((folder / "out/seeds/seed0.json").read_text(encoding="utf-8"))
    assert [[one["seed"] for one in config["runs"]] for config in seed["configs"]] == [[0, 1000]] * 2
    for config in seed["configs"]:
        dice = [one["dice"] for one in config["runs"]]
        assert seed["arms"][config["name"]]["figures"]["half"]["dice"] == pytest.approx(sum(dice) / 2)
        assert len(seed["arms"][config["name"]]["tables"]["half"]) == 2


def test_the_protocol_has_its_arms():
    """The paper's 14 configurations, the controls, and a seed that shares nothing with another."""
    config = study.Config(**{"preset": "paper", **study.PRESETS["paper"]})
    plans = [study.stages(config, seed) for seed in (10, 11)]
    runs = [stage for stage in plans[0] if "segmentation" in stage.name]
    names = {stage.name.split()[-1] for stage in runs}
    assert names == ({"tumor", "subtype"} | {f"{m}-{r}" for m in study.METHODS for r in (50, 100, 200, 400)}
                     | {"oracle-100", "fresh-100", "restain-100", "reconstruct-100", "ldm-100-same",
                        "subtype-2x"})
    shared = {stage.name for stage in plans[0]} & {stage.name for stage in plans[1]}
    assert shared == {"judge", "judge's phantom"}
    def flag(stage, name):
        return stage.line[stage.line.index(name) + 1] if name in stage.line else None

    for stage in plans[0]:
        arm = stage.name.split()[-1]
        assert (flag(stage, "--uniform") == "0.25") == (stage.kind not in ("phantom", "evaluation")), stage.name
        assert ("--no-relabel" in stage.line) == (stage.name.endswith("images ldm-same")), stage.name
        if stage.kind == "images":
            assert flag(stage, "--sampling") == "subtype"
        if stage in runs:
            assert flag(stage, "--sampling") == ("tumor" if arm == "tumor" else "subtype")
            method, percent, *same = [*arm.split("-"), ""][:3] if "-" in arm else (arm, "")
            if percent.isdigit():
                assert flag(stage, "--ratio") == str(int(percent) / 100)
                assert Path(flag(stage, "--synthetic")).name == "-".join(filter(None, ["synth", method, *same]))
            else:
                assert flag(stage, "--synthetic") is None
    double = next(stage for stage in runs if stage.name.endswith("2x"))
    for preset in study.STEPS:
        defaults = {**vars(train_seg.Config()), **train_seg.PRESETS[preset]}
        assert study.STEPS[preset] == defaults["steps"]
    assert double.line[double.line.index("--steps") + 1] == str(2 * study.STEPS["paper"])
    more = study.stages(study.Config(preset="small", arms="ldm-only,ldm-100-stained,ldm-100-clusters"), 10)
    by_name = {stage.name.split(": ")[-1]: stage for stage in more}
    assert by_name["segmentation ldm-only"].line[-5:-2] == ("inf", "--name", "ldm-only")
    numbered = study.stages(study.Config(preset="small", arms="ldm-only-32,oracle-only-512,ldm-only"), 10)
    counts = {flag(stage, "--out").split("-")[-1]: (flag(stage, "--count"), flag(stage, "--ratio"))
              for stage in numbered if stage.kind == "images"}
    assert counts == {"32": ("32", None), "512": ("512", None), "ldm": (None, "4.0")}
    sets = {flag(stage, "--name"): Path(flag(stage, "--synthetic") or "").name for stage in numbered
            if stage.kind == "segmentation" and flag(stage, "--ratio") == "inf"}
    assert sets == {"ldm-only-32": "synth-ldm-32", "oracle-only-512": "synth-oracle-512", "ldm-only": "synth-ldm"}
    for arm in ("ldm-only-0", "ldm-100-32", "tumor-32"):
        with pytest.raises(UserError, match=f"'{arm}' is unknown"):
            study.stages(study.Config(arms=arm), 10)
    for kind in ("stained", "clusters"):
        folder = str(by_name[f"classes {kind}"].folder)
        assert folder in by_name[f"diffusion {kind}"].line and folder in by_name[f"images ldm-{kind}"].line
        assert folder not in by_name[f"segmentation ldm-100-{kind}"].line       # evaluated in HER2 subtypes
    with_data = study.stages(study.Config(data="data", arms="ldm-100-clusters", split_seed=3, cache="c"), 0)
    line = next(stage for stage in with_data if stage.name.endswith("classes clusters")).line
    assert line[line.index("--split-seed") + 1] == "3" and line[line.index("--cache") + 1] == "c"
    for arms in ("all", study.PRESETS["tiny"]["arms"]):
        with_data = study.stages(study.Config(data="data", arms=arms), 0)
        assert not any("oracle" in stage.name or "fresh" in stage.name for stage in with_data)
    with pytest.raises(UserError, match="'fresh-100' is painted by the phantom"):
        study.stages(study.Config(data="data", arms="tumor,fresh-100"), 0)
    line = next(stage for stage in study.stages(study.Config(arms="ldm-100-clusters", cache="c"), 10)
                if stage.name.endswith("classes clusters")).line
    assert line[line.index("--cache") + 1] == "c"


def test_the_judge_never_saw_a_slide_of_its_seed():
    for plan in (study.stages(study.Config(arms="restain-100"), seed) for seed in (0, 1, 10)):
        stages = {stage.name.split(": ")[-1]: stage for stage in plan}
        tissue = stages["phantom"].line[:-2]                            # all but --out
        other = next(stage for name, stage in stages.items() if name.endswith("'s phantom"))
        line = stages["evaluation"].line
        assert other.line[:-2] != tissue and other.line[:4] == tissue[:4]
        assert line[line.index("--judge") + 1] == str(other.folder.parent / "seg")
