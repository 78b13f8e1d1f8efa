"""The report of the study from the files of seeds: what is merged, compared and refused."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_factory import write_dataset

from her2 import report_images, report_study
from her2.data_classes import DEFAULT_CLASSES
from her2.data_folder import load_dataset
from her2.metrics import BINS, ProbabilityHistogram
from her2.report_statistics import outcome
from her2.run_errors import UserError
from her2.segmenter import UNet

TUMOR = [DEFAULT_CLASSES.names[k] for k in DEFAULT_CLASSES.tumor_ids]
ARMS = ("subtype", "tumor", "ldm-100", "oracle-100")


def counts(rng, shift):
    """(slides, K, BINS) pixels: tumor is likelier to be called tumor, more so with `shift`."""
    table = np.zeros((4, 6, BINS), dtype=np.int64)
    for slide in table:
        for k, row in enumerate(slide):
            middle = 250 + 300 * (k > 0) + shift * (k == 1)
            place = np.clip(rng.normal(middle, 150, 400), 0, BINS - 1).astype(int)
            np.add.at(row, place, 1)
    return table


def seed_file(folder, seed, preset="small", names=ARMS, **more):
    rng = np.random.default_rng(seed)
    arms, configs, fpr = {}, [], None
    for arm, shift in zip(names, (0, -40, 80, 150)):
        val, test = counts(rng, shift), counts(rng, shift)
        one = outcome(val, test, ["0", "0", "3+", "3+"], DEFAULT_CLASSES, fpr)
        fpr = one.figures["half"]["fpr"] if fpr is None else fpr
        arms[arm] = report_study.to_json(one)
        method, _, percent = arm.partition("-")
        figures = ProbabilityHistogram(DEFAULT_CLASSES, test.sum(axis=0)).report()
        configs.append({"name": arm, "method": method if percent else "real", "ratio": 1.0 * bool(percent),
                        "sampling": "subtype", "runs": [{"seed": seed, **figures}]})
    content = {"format": report_study.FORMAT, "seed": seed, "preset": preset, "commit": "x",
               "machine": f"m{seed}", "classes": DEFAULT_CLASSES.to_json(), "slides": list("abcd"),
               "arms": arms, "configs": configs,
               "images": {"oracle": {"dice": 0.9, "recall": {"0": 0.5 + seed / 100}, "fpr": 0.1,
                                     "sharpness": 1.0, "frechet": 0.1, "kernel": 0.0}},
               "staining": {"real": {"0": {"n": seed, "median": 0.1 * seed}, "ordered": True}},
               "old and new": {"gan": {old: {new: {"n": 5, "mean": seed + i + 10.0 * j, "half": 1.0}
                                             for i, new in enumerate(TUMOR)} for j, old in enumerate(TUMOR)}},
               "seconds": {f"seed {seed}: GAN": 60.0 * seed}, **more}
    path = folder / f"seed{seed}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    return [seed_file(folder, seed) for seed in (12, 10, 11)]


def test_seeds_become_one_report(files, tmp_path):
    results = report_study.write_report(files, tmp_path)
    assert results["seeds"] == [10, 11, 12] and results["machines"] == ["m10", "m11", "m12"]
    assert [config["name"] for config in results["configs"]] == ["tumor", "subtype", "ldm-100", "oracle-100"]
    dice = {config["name"]: {run["seed"]: run["dice"] for run in config["runs"]}
            for config in results["configs"]}
    found = results["comparisons"]["ldm-100 against subtype"]["dice half"]
    expected = [dice["ldm-100"][seed] - dice["subtype"][seed] for seed in (10, 11, 12)]
    assert found["values"] == pytest.approx(expected) and found["mean"] == pytest.approx(np.mean(expected))
    half = 4.30265 * np.std(expected, ddof=1) / math.sqrt(3)                    # t(.975, 2), printed tables
    assert found["high"] - found["mean"] == pytest.approx(half, rel=1e-4)
    assert [claim["claim"] for claim in results["verdicts"]] == ["P1", "P2", "P3", "P4"]
    assert results["images"]["oracle"]["recall"]["0"] == pytest.approx(0.61)
    assert results["staining"]["real"]["0"] == {"n": 33, "median": pytest.approx(1.1)}
    moved = results["old and new"]["gan"][TUMOR[2]][TUMOR[1]]           # 10, 11, 12 + 1 + 20, the sd is 1
    assert moved == {"n": 3, "mean": pytest.approx(32), "half": pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)}
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(claim["sentence"] in page for claim in results["verdicts"])
    assert "| GAN | 11.0 |" in page
    for name in ("fig5.png", "fig6.png", "ladder.png", "old_and_new.png"):
        assert (tmp_path / name).stat().st_size < 300_000 and f"({name})" in page
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == json.loads(json.dumps(results))


@pytest.mark.parametrize("names, rows", [
    (("subtype",), None), (("subtype", "gan-200"), ["gan-200"]),
    (("subtype", "ldm-only", "ldm-100", "ldm-100-clusters"), ["ldm-100", "ldm-100-clusters", "ldm-only"])])
def test_the_ladder_has_whatever_arms_there_are(tmp_path, monkeypatch, names, rows):
    drawn, shown = [], []
    monkeypatch.setattr(report_study.draw_charts, "intervals", lambda panels, names: (
        drawn.append(names), shown.append(panels), np.zeros((9, 9, 3), np.uint8))[2])
    files = [seed_file(tmp_path, seed, names=names) for seed in (10, 11)]
    found = report_study.write_report(files, tmp_path / "out")["comparisons"]
    assert drawn == ([rows] if rows else []) and (tmp_path / "out" / "report.md").exists()
    for (_, ends, _), figure in zip(shown[0] if shown else (), ("dice matched", "log_variance matched")):
        for arm, end in zip(rows, ends, strict=True):
            one = found[f"{arm} against subtype"][figure]
            assert end == (one and (one["mean"], one["low"], one["high"]))


def test_seeds_of_real_patients_share_them_and_say_so(files, tmp_path):
    mine = [seed_file(tmp_path, seed, settings={"data": "my_data"}) for seed in (1, 2)]
    for seeds, own in ((mine, False), (files, True)):
        report_study.write_report(seeds, tmp_path / "out")
        page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
        assert ("its own tissue" in page) == own and ("not for other patients" in page) == (not own)


def test_a_share_of_the_oracles_gain_needs_two_seeds_with_all_three(tmp_path):
    seeds = [seed_file(tmp_path, 10), seed_file(tmp_path, 11, names=ARMS[:3])]
    report_study.write_report(seeds, tmp_path / "out")
    line = next(line for line in (tmp_path / "out" / "report.md").read_text(encoding="utf-8").splitlines()
                if line.startswith("| ldm-100 against subtype"))
    assert line.endswith("| n/a |")


def test_a_seed_survives_its_file(files):
    content = report_study.read_seeds(files)[0]
    for arm in ARMS:
        again = report_study.from_json(content["arms"][arm])
        assert report_study.to_json(again) == content["arms"][arm]
        assert again.tables["half"].shape == (1, 4, 6, 2)
        old = {**content["arms"][arm], "tables": {point: table[0] for point, table in    # before there were R
                                                  content["arms"][arm]["tables"].items()}}
        assert report_study.to_json(report_study.from_json(old)) == content["arms"][arm]


def test_wrong_files_are_refused(files, tmp_path):
    with pytest.raises(UserError, match="seed 10 was given before"):
        report_study.write_report([*files, files[1]], tmp_path)
    with pytest.raises(UserError, match="other presets"):
        report_study.write_report([*files, seed_file(tmp_path, 13, "tiny")], tmp_path / "out")
    for settings in ({"trial": 2}, {"data": "my_data"}, {"tile": 64}):     # a file without: 256
        with pytest.raises(UserError, match="kinds of data, sizes of tiles or --trial"):
            report_study.write_report([*files, seed_file(tmp_path, 13, settings=settings)], tmp_path / "out")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="not the file of a seed"):
        report_study.write_report([tmp_path / "list.json"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- images ------------------------------------------------------------------------------------------------

def test_the_judge_is_the_network_and_a_set_is_at_no_distance_from_itself(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network, image = UNet(2, width=8).eval(), torch.rand(5, 3, 64, 64) * 2 - 1
    prob, features = report_images.judge(network, image, "cpu", batch=2)
    with torch.no_grad():
        assert torch.allclose(prob, network(image).softmax(1)[:, 1], atol=5e-3)   # steep, untrained
        maps = network.encoder(network.normalised(image))
    assert torch.allclose(features, torch.cat([maps[k].mean((2, 3)) for k in (2, 3)], 1), rtol=1e-4, atol=1e-5)
    # Distances go from every second real patch to the others: a set of the others is at none.
    write_dataset(tmp_path / "data", slides=4, height=64, width=64)
    dataset, train = load_dataset(tmp_path / "data"), report_images.PatchSampler
    batch = train(dataset, "train", 32, "subtype", 0, flips=False, cache=tmp_path / "c", uniform=0.25).batch(0, 16)
    monkeypatch.setattr(report_images, "to_tensors", lambda image, label, _: (image, label))
    monkeypatch.setattr(report_images, "open_roi", lambda roi, *_: SimpleNamespace(
        whole=lambda: (batch["image"][roi.number], batch["label"][roi.number], None)))
    monkeypatch.setattr(report_images.PatchSampler, "batch", lambda self, *_: batch)
    sets = {name: [SimpleNamespace(number=k, height=32, width=32) for k in range(first, 16, 2)]
            for name, first in (("same", 1), ("other", 0))}
    found = report_images.measure(sets, dataset, network, "cpu", cache=tmp_path / "c")
    # The kernel distance leaves out pairs of one patch with itself, so between equal sets it is below 0.
    assert abs(found["same"]["frechet"]) < 1e-6 < found["other"]["frechet"] and found["same"]["kernel"] <= 1e-9
    assert found["other"]["frechet"] == pytest.approx(found["real, train"]["frechet"], rel=1e-6)


def test_sharpness_falls_with_blur_and_counts_each_subtype_alike():
    rng = torch.Generator().manual_seed(0)
    image = torch.rand(4, 3, 16, 16, generator=rng) * 2 - 1
    label = torch.ones(4, 16, 16, dtype=torch.long)
    label[:, 8:] = 2
    sharp = report_images.sharpness(image, label, DEFAULT_CLASSES)
    smooth = torch.nn.functional.avg_pool2d(image, 3, 1, 1)
    assert report_images.sharpness(smooth, label, DEFAULT_CLASSES) < 0.5 * sharp
    grey = image.mean(1).numpy() * 127.5                    # the definition, pixel by pixel
    padded = np.pad(grey, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    local = np.nanmean([padded[:, y:y + 16, x:x + 16] for y in range(3) for x in range(3)], axis=0)
    fine = np.abs(grey - local)
    assert sharp == pytest.approx((fine[:, :8].mean() + fine[:, 8:].mean()) / 2, rel=1e-4)
    label[:, 8:12] = 1                                      # fewer pixels of class 2 do not weigh less
    by_class = np.mean([fine[(label == k).numpy()].mean() for k in (1, 2)])
    assert report_images.sharpness(image, label, DEFAULT_CLASSES) == pytest.approx(by_class, rel=1e-4)
    assert report_images.sharpness(image, label * 0, DEFAULT_CLASSES) is None
