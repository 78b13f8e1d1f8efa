"""Clusters of tumor instances and joined classes: mathematics against slow loops, the command end to end."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

import generate
from data_factory import save, write_csv, write_dataset, write_manifest
from her2 import cluster
from her2.data_classes import DEFAULT_CLASSES, IGNORE, ClassTable, load_classes
from her2.data_folder import load_dataset, load_synthetic
from her2.data_patches import MixedSampler, PatchSampler
from her2.data_regions import open_roi, read_roi
from her2.run_errors import UserError
from her2.stains import compose, deconvolve

MERGE = "non-stained=0; stained=1+,2+,3+"
AMOUNTS = {1: 0.05, 2: 0.12, 3: 0.25, 4: 1.0, 5: 0.5}             # DAB of the flat instances below


# ---- mathematics -------------------------------------------------------------------------------------------

def test_adjusted_rand_counts_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(4, size=25), rng.integers(3, size=25)
        pairs = list(itertools.combinations(range(25), 2))
        together = [(a[i] == a[j], b[i] == b[j]) for i, j in pairs]
        n11, n10, n01, n00 = (together.count(kind) for kind in
                              ((True, True), (True, False), (False, True), (False, False)))
        expected = 2 * (n11 * n00 - n10 * n01) / ((n11 + n10) * (n10 + n00) + (n11 + n01) * (n01 + n00))
        assert cluster.adjusted_rand(a, b) == pytest.approx(expected)
    assert cluster.adjusted_rand(a, 3 - a) == pytest.approx(1)
    assert cluster.adjusted_rand([0, 0, 0], [1, 1, 1]) == 1


def test_adjusted_rand_is_0_on_average_by_chance():
    rng = np.random.default_rng(1)
    a = rng.integers(3, size=40)
    assert abs(np.mean([cluster.adjusted_rand(a, rng.permutation(a)) for _ in range(400)])) < 0.01


def test_log_joint_is_the_density_of_gaussians():
    rng = np.random.default_rng(2)
    x, w, m = rng.normal(size=(6, 3)), np.array([0.3, 0.7]), rng.normal(size=(2, 3))
    roots_of = rng.normal(size=(2, 3, 3)) + 2 * np.eye(3)
    C = roots_of @ roots_of.transpose(0, 2, 1)
    found = cluster.log_joint(x, w, m, C)
    for k in range(2):
        for n, one in enumerate(x):
            away = np.linalg.solve(roots_of[k], one - m[k])     # in coordinates where it is round
            density = np.prod(np.exp(-away ** 2 / 2) / np.sqrt(2 * np.pi)) / abs(np.linalg.det(roots_of[k]))
            assert found[n, k] == pytest.approx(np.log(w[k] * density))


def test_fit_finds_the_mixture_that_made_the_points():
    rng = np.random.default_rng(3)
    w, m = np.array([0.2, 0.5, 0.3]), np.array([[0, 0], [6, 0], [0, 6.0]])
    roots = np.array([np.eye(2), [[1, 0], [0.8, 0.5]], [[0.5, 0], [0, 1.5]]])
    which = rng.choice(3, size=1500, p=w)
    x = m[which] + np.einsum("nij,nj->ni", roots[which], rng.normal(size=(1500, 2)))
    total, (found_w, found_m, found_C) = cluster.fit(x, 3, np.random.default_rng(0))
    order = [int(np.argmin(((found_m - one) ** 2).sum(axis=1))) for one in m]
    assert found_w[order] == pytest.approx(w, abs=0.03)
    assert found_m[order] == pytest.approx(m, abs=0.15)
    assert found_C[order] == pytest.approx(roots @ roots.transpose(0, 2, 1), abs=0.25)
    truth = np.logaddexp.reduce(cluster.log_joint(x, w, m, roots @ roots.transpose(0, 2, 1)), axis=1).sum()
    assert truth - 1 < total < truth + 30               # likelihood: at least that of the truth, hardly more
    single = cluster.fit(x, 1, np.random.default_rng(0))[1]
    assert single[1][0] == pytest.approx(x.mean(axis=0))
    assert single[2][0] == pytest.approx(np.cov(x.T, bias=True) + 1e-3 * np.eye(2))


def test_an_outlier_is_no_cluster():
    """Two groups and a point far away, which is likeliest as a cluster by itself: log p -513 against -537."""
    rng = np.random.default_rng(5)
    x = np.concatenate([rng.normal(size=(60, 2)), rng.normal(size=(60, 2)) + [8, 0], [[4.0, 60.0]]])
    total, (w, m, C) = cluster.fit(x, 2, np.random.default_rng(0))
    alone = (np.array([120, 1]) / 121, np.array([x[:-1].mean(axis=0), x[-1]]),
             np.array([np.cov(x[:-1].T), 1e-3 * np.eye(2)]))
    assert np.logaddexp.reduce(cluster.log_joint(x, *alone), axis=1).sum() > total + 10
    assert w.min() > 0.4 and sorted(m[:, 0].round()) == [0, 8]


def test_sums_are_those_of_a_loop_over_instances(tmp_path):
    write_dataset(tmp_path, slides=4, height=50)
    dataset = load_dataset(tmp_path)
    tile = open_roi(dataset.rois[0], dataset.classes, tmp_path / "cache")
    image, _, instance = read_roi(dataset.rois[0], dataset.classes)
    dab = deconvolve(image, cluster.white_point(image[::8, ::8]))[1]
    found = cluster.instance_sums(tile, strip=512)
    for i in range(1, 6):
        pixels = np.argwhere(instance == i)
        values = [dab[y, x] for y, x in pixels]
        steps = [np.hypot(dab[y + 1, x] - dab[y, x], dab[y, x + 1] - dab[y, x]) for y, x in pixels]
        squares = sum(value ** 2 for value in values)
        assert found[:, i] == pytest.approx([len(pixels), sum(values), squares, sum(steps)])
    assert cluster.instance_sums(tile, strip=7) == pytest.approx(found)


# ---- the command -------------------------------------------------------------------------------------------

def stained_dataset(root, slides=6):
    """Flat instances on glass, their DAB by the subtype and a little noise: each slide has all five."""
    rng, rows = np.random.default_rng(4), write_dataset(root, slides=slides, height=64, width=100)
    for row in rows:
        label = np.array(Image.open(root / row["mask"]))
        dab = np.zeros(label.shape)
        for k, amount in AMOUNTS.items():
            dab[label == k] = amount * rng.normal(1, 0.03)
        dab += rng.normal(0, 0.01, label.shape) * (1 + 10 * dab)
        image = compose(np.full(label.shape, 0.02), dab)
        save(root / row["image"], image.clip(0, 255).round().astype(np.uint8))
    return rows


def run(*argv):
    return cluster.main([str(a) for a in argv]) or 0


def test_clusters_of_flat_instances_are_the_subtypes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = stained_dataset(tmp_path / "data", slides=12)
    assert run("data", "--classes", 5, "--out", "new") == 0
    assert "adjusted Rand index against the annotated subtypes: 1.00 (train), 1.00 (val and test)" \
        in capsys.readouterr().out
    new, old = load_dataset("new"), load_dataset("data")
    assert new.classes.names == ["Background", *(f"cluster {k}" for k in range(1, 6))]
    assert [(r.name, r.slide, r.score, r.split) for r in new.rois] == [
        (r.name, r.slide, r.score, r.split) for r in old.rois] and len(rows) == 12
    order = [0, 1, 2, 3, 5, 4]                          # by DAB; LCIS/DCIS lies between 2+ and 3+
    for a, b in zip(old.rois, new.rois):
        image, label, instance = read_roi(a, old.classes)
        image2, label2, instance2 = read_roi(b, new.classes)
        assert (image == image2).all() and (instance == instance2).all()
        assert (label2 == np.array(order)[label]).all()
    record = json.loads((tmp_path / "new/clusters.json").read_text(encoding="utf-8"))
    assert record["adjusted_rand"] == {"train": 1, "val and test": 1} and len(record["table"]) == 6
    before = (tmp_path / "new/masks/images/roi3.png").read_bytes()
    assert run("data", "--classes", 5, "--out", "new") == 0
    assert (tmp_path / "new/masks/images/roi3.png").read_bytes() == before


def test_bic_chooses_and_held_out_slides_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = stained_dataset(tmp_path / "data", slides=16)
    assert run("data", "--out", "first") == 0
    for row in rows:
        if row["split"] == "test":
            save(tmp_path / "data" / row["image"], np.zeros((64, 100, 3), np.uint8))
    assert run("data", "--out", "second") == 0
    records = [json.loads((tmp_path / name / "clusters.json").read_text(encoding="utf-8"))
               for name in ("first", "second")]
    assert records[0]["bic"] == records[1]["bic"] and set(records[0]["bic"]) == set("2345678")
    assert min(records[0]["bic"], key=records[0]["bic"].get) == "5"
    assert len(load_dataset("first").classes) == 6
    masks = [(tmp_path / name / "masks/images/roi1.png").read_bytes() for name in ("first", "second")]
    assert masks[0] == masks[1]


def test_merge_joins_the_classes_and_keeps_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", class_ids=(1, 2, 3, 4, 5, IGNORE))
    assert run("data", "--merge", MERGE) == 0
    new, old = load_dataset("data-merged"), load_dataset("data")
    assert new.classes.names == ["Background", "non-stained", "stained", "LCIS/DCIS"]
    assert new.classes.variance_ids == [1, 2] and new.classes.tumor_ids == [1, 2, 3]
    for a, b in zip(old.rois, new.rois):
        label, label2 = read_roi(a, old.classes)[1], read_roi(b, new.classes)[1]
        expected = np.array([0, 1, 2, 2, 2, 3, *range(6, 256)])[label]
        assert (label2 == expected).all() and label2.max() == IGNORE


def test_where_labels_are_polygons_the_merged_classes_json_does_the_same_alone(tmp_path, monkeypatch):
    """The example for a user with QuPath: names as drawn there, and four classes instead of six."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for k in range(3):
        names = ["0", "HER2 1+", "2+", "3", "DCIS", "Stroma"]
        features = [{"type": "Feature", "properties": {"classification": {"name": name}}, "geometry": {
            "type": "Polygon", "coordinates": [[[9 * i, 5], [9 * i + 7, 5], [9 * i + 7, 30], [9 * i, 5]]]}}
            for i, name in enumerate(names)]
        (tmp_path / "data").mkdir(exist_ok=True)
        text = json.dumps({"type": "FeatureCollection", "features": features})
        (tmp_path / f"data/{k}.geojson").write_text(text, encoding="utf-8")
        save(tmp_path / f"data/{k}.png", np.full((40, 60, 3), 200, np.uint8))
        rows.append({"image": f"{k}.png", "annotations": f"{k}.geojson", "slide": f"s{k}",
                     "split": ("train", "val", "test")[k]})
    write_csv(tmp_path / "data", rows)
    assert run("data", "--merge", MERGE, "--out", "new") == 0
    by_mask = [read_roi(roi, load_classes("new"))[1] for roi in load_dataset("new").rois]
    shutil.copy("new/classes.json", "data/classes.json")
    by_name = [read_roi(roi, load_classes("data"))[1] for roi in load_dataset("data").rois]
    assert all((a == b).all() for a, b in zip(by_mask, by_name))
    assert np.unique(by_mask[0]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["stained", "stained=4+", "=1+", "stained=1+;x=1+", "Background=1+", "3+=1+",
                                  "dcis=0", "x=Background", "a=1+;A=2+", "x="])
def test_a_bad_merge_is_one_line(text):
    with pytest.raises(UserError, match="--merge"):
        cluster.merged(DEFAULT_CLASSES, text)


def test_a_name_may_be_that_of_one_of_the_joined():
    table, meaning = cluster.merged(DEFAULT_CLASSES, "3+ = 2+, 3+")
    assert table.names == ["Background", "0", "1+", "3+", "LCIS/DCIS"]
    assert meaning[:6].tolist() == [0, 1, 2, 3, 3, 4] and table.id_of("HER2 2+") == table.id_of("2+") == 3
    assert ClassTable.from_json(table.to_json()) == table


def test_too_few_instances_and_foreign_folders_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", slides=3, split=False)
    with pytest.raises(UserError, match="5 tumor instances .* too few for 2 clusters"):
        run("data")
    with pytest.raises(UserError, match="two folders"):
        run("data", "--data", "other")
    with pytest.raises(UserError, match="not a run folder"):
        run("data", "--merge", MERGE, "--out", "data")
    assert not (tmp_path / "data-clusters").exists()


# ---- a synthetic set with other classes --------------------------------------------------------------------

def test_a_set_with_other_classes_trains_the_segmentation_as_tumor_or_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stained_dataset(tmp_path / "data", slides=12)
    assert run("data", "--merge", MERGE, "--out", "new") == 0
    assert not generate.main(["--method", "restain", "--data", "new", "--out", "synth", "--count", "12",
                          "--patch", "32", "--relabel-classes", "non-stained,stained"])
    lines = [json.loads(line) for line in (tmp_path / "synth/manifest.jsonl").read_text().splitlines()]
    asked = [new for line in lines for _, new in line["instances"].values()]
    assert set(asked) == {1, 2}
    real = load_dataset("data")
    synthetic, _ = load_synthetic("synth", real, same_classes=False)
    with pytest.raises(UserError, match="another class table"):
        load_synthetic("synth", real)
    sampler = MixedSampler(PatchSampler(real, "train", 32), synthetic, math.inf)
    assert "only tumor or not is used" in capsys.readouterr().err
    for k in range(12):
        _, label, instance, name = sampler.draw(np.random.default_rng(k), coin=0.99)
        mask = read_roi({roi.name: roi for roi in synthetic.rois}[name], synthetic.classes)[1]
        assert (label == (mask > 0)).all() and label.shape == (32, 32)
    write_manifest("synth", [(line["image"], line["source_image"], "s3") for line in lines])
    with pytest.raises(UserError, match="s3"):
        load_synthetic("synth", real, same_classes=False)
