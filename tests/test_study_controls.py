"""The controls of the study: tissue that the phantom renders again, and instances that are restained."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from her2 import phantom, report_staining, study_controls
from her2.data_classes import DEFAULT_CLASSES
from her2.data_folder import load_dataset, load_synthetic
from her2.data_patches import PatchSampler
from her2.data_regions import read_roi
from her2.phantom_microscope import render, window
from her2.run_errors import UserError
from her2.run_seeds import numpy_generator
from her2.stains import STAINS, compose, deconvolve, white_point


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("controls")
    phantom.make_phantom(root / "phantom", "tiny", seed=4, progress=False)
    return root


def make(folder, method, *flags):
    """The synthetic folder of generate.py --method `method` with six images."""
    out = folder / f"{method}{''.join(flags)}"
    assert not generate.main(["--method", method, "--data", str(folder / "phantom"), "--out", str(out), "--cache",
                          str(folder / "cache"), "--count", "6", "--sampling", "subtype", *flags])
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    read = {kind: [np.array(Image.open(out / kind / f"{k:06d}.png")) for k in range(6)]
            for kind in ("images", "masks", "instances")}
    return out, lines, read


def scene(seed=4, slide=1):
    return phantom.scene_of(phantom.Preset(1.0, 256, 1, (8, 4, 4)), seed, slide, 0)[0]


def test_filling_a_nest_anew_changes_nothing_outside_it():
    """Outlines, background and slide stay to the bit; inside, the new staining shows."""
    before = scene()
    nests = [k for k, site in enumerate(before.sites) if site.kind == "tumor"]
    k = max(nests, key=lambda k: before.sites[k].radius)
    site = before.sites[k]
    after = study_controls.with_classes(before, {k: 4}, (0,))
    old, new = (render(one, 1.0, 256, (0,)).astype(int) for one in (before, after))
    y, x = np.mgrid[:256, :256] + 0.5
    distance = site.star.distance(x.reshape(-1), y.reshape(-1)).reshape(256, 256)
    # Thin nuclei lie outside a nest along its outline, and go with it: up to 25 um where it has a corner.
    changed = (old != new).any(axis=-1)
    assert not changed[distance > 25].any() and (distance > 25).sum() > 20_000
    assert changed[distance > 9].mean() < 0.01 and changed[distance < -3].mean() > 0.9
    inside = distance < -3
    dab = [deconvolve(one[inside], white_point(one))[1].mean() for one in (old, new)]
    assert dab[1] > 0.4 > dab[0] - 0.1 * (site.subtype == 3)
    assert before.sites[k].subtype == site.subtype and len(after.cells) > len(before.cells)   # a copy


def test_staining_follows_the_class_asked_for():
    before = scene(slide=3)
    nests = [k for k, site in enumerate(before.sites) if site.kind == "tumor"]
    densities = []
    for class_id in phantom.SUBTYPE_CLASS:
        after = study_controls.with_classes(before, dict.fromkeys(nests, class_id), (1,))
        image = render(after, 1.0, 256, (1,))
        owner = np.zeros((256, 256), bool)
        y, x = np.mgrid[:256, :256] + 0.5
        for k in nests:
            owner |= before.sites[k].star.distance(x.reshape(-1), y.reshape(-1)).reshape(256, 256) < -3
        densities.append(deconvolve(image[owner], white_point(image))[1].mean())
    assert densities == sorted(densities) and densities[3] > 2 * densities[2] > 2 * densities[1] > 0


def test_a_window_is_a_part_of_the_whole():
    one = scene()
    whole = render(one, 1.0, 256, (0,))
    part = window(one, 1.0, 64, 100, 64, 64, numpy_generator(0, "sensor", 0, 0)).astype(int)
    assert np.abs(part - whole[64:128, 100:164]).max() < 25        # only the sensor's noise differs
    assert np.abs((part - whole[64:128, 100:164]).mean()) < 0.2


def test_oracle_and_restain_have_the_labels_of_a_generator(folder):
    """All methods of one seed paint the same relabelled patches: their images come in pairs."""
    (_, first, oracle), (_, second, restain) = make(folder, "oracle"), make(folder, "restain")
    same = [{key: line[key] for key in ("source_image", "x", "y", "instances")} for line in first]
    assert same == [{key: line[key] for key in same[0]} for line in second]
    assert all((a == b).all() for a, b in zip(oracle["masks"], restain["masks"]))
    dataset = load_dataset(folder / "phantom")
    load_synthetic(folder / "oracle", dataset)
    for line, image, mask in zip(second, restain["images"], restain["masks"]):
        source = np.array(Image.open(folder / "phantom" / line["source_image"]))
        patch = source[line["y"]:line["y"] + 64, line["x"]:line["x"] + 64]
        assert (image[mask == 0] == patch[mask == 0]).all()


def test_restaining_reaches_the_median_of_the_new_subtype(folder):
    painter = study_controls.RestainPainter(load_dataset(folder / "phantom"), folder / "cache")
    assert painter.median[1] < painter.median[2] < painter.median[4]
    flat = compose(np.full((8, 8), 0.2), np.full((8, 8), painter.median[2]), painter.white, STAINS)
    batch = {"image": torch.from_numpy(flat).permute(2, 0, 1)[None].float() / 127.5 - 1,
             "instance": torch.ones(1, 8, 8, dtype=torch.int32), "mappings": [{1: (2, 3)}]}
    painted = ((painter.paint(batch) + 1) * 127.5)[0].permute(1, 2, 0).numpy()
    haematoxylin, dab = deconvolve(painted, painter.white)
    assert np.allclose(dab, painter.median[3], atol=1e-3) and np.allclose(haematoxylin, 0.2, atol=1e-3)


def test_the_oracle_paints_the_source_where_it_lies_in_its_new_subtype(folder):
    """Without a new class the pixels of the slide but for the sensor's noise; with one, new staining there."""
    dataset = load_dataset(folder / "phantom")
    painter, side = study_controls.OraclePainter(dataset), 96
    whole = np.array(Image.open(folder / "phantom/images/slide03_roi0.png")).astype(int)
    label, numbers = (np.array(one) for one in read_roi(next(
        roi for roi in dataset.rois if roi.name == "images/slide03_roi0.png"), dataset.classes)[1:])
    y, x = 40, 150
    source = {"name": "images/slide03_roi0.png", "y": y, "x": x}
    part = whole[y:y + side, x:x + side]
    same = painter.render(source, np.zeros((side, side), int), {}, 0).astype(int)
    assert np.abs(same - part).max() < 25
    label, numbers = label[y:y + side, x:x + side], numbers[y:y + side, x:x + side]
    size = np.bincount(numbers[(label > 0) & (label < 5)])
    i = int(size.argmax())
    where, old = numbers == i, int(label[numbers == i][0])
    assert where.sum() > 400
    found = {}
    for new in (1, 4):
        image = painter.render(source, numbers, {i: (old, new)}, 0).astype(int)
        found[new] = deconvolve(image[where].clip(1), white_point(whole.astype(np.uint8)))[1].mean()
        far = np.array(Image.fromarray(where).resize((side, side))) * 0 == 0
        ys, xs = np.nonzero(where)
        for yy, xx in zip(ys[::7], xs[::7]):            # beyond 25 um of the instance nothing has changed
            far[max(0, yy - 26):yy + 27, max(0, xx - 26):xx + 27] = False
        assert np.abs(image - part)[far].max(initial=0) < 25
    assert found[4] > 0.4 > 0.2 > found[1]


def test_fresh_tissue_has_its_label_where_its_tumor_is(folder):
    dataset = load_dataset(folder / "phantom")
    painter = study_controls.OraclePainter(dataset)
    sampler = PatchSampler(dataset, "train", 64, cache=folder / "cache", uniform=0.25)
    inside, outside = [], []
    for i in range(8):
        patch = painter.fresh_patch(sampler, 0, i)
        label = patch["label"].numpy()
        stained = {j: (1, 4) for j in patch["instance"].unique().tolist() if j}
        image = painter.render(patch, patch["instance"].numpy(), stained, i)
        dab = deconvolve(image)[1]
        inside.append(dab[label > 0])
        outside.append(dab[label == 0])
    inside, outside = np.concatenate(inside), np.concatenate(outside)
    assert len(inside) > 2000 and inside.mean() > 3 * outside.mean() and inside.mean() > 0.3


def test_fresh_tissue_is_of_slides_that_no_folder_has(folder):
    out, lines, read = make(folder, "fresh")
    dataset = load_dataset(folder / "phantom")
    load_synthetic(out, dataset)
    assert {line["source_slide"] for line in lines}.isdisjoint(dataset.slides())
    assert any((mask > 0).any() for mask in read["masks"])
    for mask, instance in zip(read["masks"], read["instances"]):
        assert ((mask > 0) == (instance > 0)).all()
    (folder / "phantom" / "phantom.json").rename(folder / "hidden.json")
    try:
        with pytest.raises(UserError, match="new tissue"):
            load_synthetic(out, load_dataset(folder / "phantom"))
        with pytest.raises(UserError, match="is no phantom"):
            make(folder, "oracle", "--seed", "3")
    finally:
        (folder / "hidden.json").rename(folder / "phantom" / "phantom.json")


@pytest.mark.parametrize("method", ["oracle", "fresh"])
def test_the_phantom_paints_no_classes_but_its_own(folder, tmp_path, method):
    shutil.copytree(folder / "phantom", tmp_path / "phantom")
    table = DEFAULT_CLASSES.to_json()
    table[1]["name"], table[2]["name"], table[1]["aliases"], table[2]["aliases"] = "1+", "0", [], []
    (tmp_path / "phantom" / "classes.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(UserError, match="classes.json has others"):
        make(tmp_path, method)
    assert not list(tmp_path.glob(f"{method}*"))


def test_a_control_without_a_network_takes_no_model(folder):
    with pytest.raises(UserError, match="leave --model out"):
        generate.main(["--method", "oracle", "--model", "runs/ldm", "--data", str(folder / "phantom")])


def test_densities_by_old_and_new_subtype(folder, monkeypatch):
    """Every instance of the manifest that is large enough, in the cell of its two subtypes, by a plain loop."""
    out, lines, read = make(folder, "restain", "--seed", "2")
    dataset = load_dataset(folder / "phantom")
    synthetic, _ = load_synthetic(out, dataset)
    entries = {line["image"]: line for line in lines}
    white = report_staining.median_white(dataset.split("train"), dataset.classes, folder / "cache")
    records = report_staining.measure({"restained": synthetic.rois}, dataset.classes, white, folder / "cache")
    found = report_staining.transitions(records["restained"], entries, dataset.classes)
    expected = {}
    for line, image, instance in zip(lines, read["images"], read["instances"]):
        dab = deconvolve(image, white)[1]
        for i, pair in line["instances"].items():
            if (instance == int(i)).sum() >= report_staining.SMALLEST:
                expected.setdefault(tuple(pair), []).append(dab[instance == int(i)].mean())
    names = dataset.classes.names
    assert sum(one["n"] for row in found.values() for one in row.values()) == sum(map(len, expected.values()))
    for (old, new), values in expected.items():
        one = found[names[old]][names[new]]
        assert one["n"] == len(values) and one["mean"] == pytest.approx(np.mean(values))
        if len(values) == 2:
            assert one["half"] == pytest.approx(12.7062 * abs(values[0] - values[1]) / 2, rel=1e-4)
    drawn = []
    monkeypatch.setattr(report_staining, "matrices", lambda panels, *names, **more: drawn.append((panels, names)))
    report_staining.heat_maps({"restained": found}, dataset.classes)
    [([(_, means, _)], (rows, columns, *_))] = drawn
    for (i, old), (j, new) in itertools.product(enumerate(rows), enumerate(columns)):
        assert found[old][new]["mean"] is None or means[i, j] == found[old][new]["mean"]
