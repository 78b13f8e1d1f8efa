"""The memorisation audit: its search against loops, its test against enumeration, copies and fresh tissue."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_factory import save, write_csv, write_manifest
from PIL import Image

from her2 import audit, phantom, run
from her2.data_folder import load_dataset, write_split
from her2.data_patches import PatchSampler, dihedral
from her2.data_regions import open_roi
from her2.run_errors import command
from her2.stains import compose, deconvolve

P, CPU = 32, torch.device("cpu")


def turned(array, k):
    """dihedral of an array (H, W, ...)."""
    tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, (0, 1), (-2, -1))))
    return np.ascontiguousarray(np.moveaxis(dihedral(tensor, k).numpy(), (-2, -1), (0, 1)))


def disturbed(window, rng):
    """A copy that hides: turned, with another amount of both stains, and noise. (image, label, instance)"""
    haematoxylin, dab = deconvolve(window[0])
    image = compose(haematoxylin * rng.uniform(0.6, 1.6) + 0.03, dab * rng.uniform(0.4, 2.0))
    image = (image + rng.normal(0, 6, image.shape)).round().clip(0, 255).astype(np.uint8)
    k = int(rng.integers(8))
    return tuple(turned(part, k) for part in (image, *window[1:]))


def draws(dataset, splits, count, seed):
    rois = [replace(roi, split="val") for roi in dataset.rois if roi.split in splits]
    sampler = PatchSampler(replace(dataset, rois=rois), "val", P, "tumor", cache=dataset.root / "cache")
    return [sampler.draw(np.random.default_rng((seed, j)))[:3] for j in range(count)]


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    """(the dataset, other slides of the same kind): phantoms of 12 slides with 96 x 96 pixels each."""
    folder = tmp_path_factory.mktemp("audit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(phantom.PRESETS, "micro", phantom.Preset(1.0, 96, 1, (4, 4, 4)))
        return [load_dataset(phantom.make_phantom(folder / name, "micro", seed, progress=False))
                for name, seed in (("real", 0), ("fresh", 7))]


@pytest.fixture(scope="module")
def measured(tissue):
    """{inpainted: (fresh, disturbed copies, held-out)} similarities."""
    real, fresh = tissue
    rng, train = np.random.default_rng(0), real.split("train")
    held_out = draws(real, ("val", "test"), 160, 0)
    unseen = draws(fresh, ("train", "val", "test"), 60, 1)
    copies = [disturbed(window, rng) for window in draws(real, ("train",), 20, 2)]
    found = {}
    for inpainted in (False, True):
        similar, _, normal, kept = audit.audit(unseen + copies, held_out, train, real.classes, P, CPU,
                                               inpainted, real.root / "cache")
        found[inpainted] = similar[kept < 60], similar[kept >= 60], normal
    return found


@pytest.mark.parametrize("inpainted", [False, True])
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_copies_are_caught_from_one_per_cent_on_and_fresh_tissue_is_not(measured, inpainted, rate):
    """400 images against 1200 held-out patches, drawn from the similarities that were measured."""
    fresh, copies, held_out = measured[inpainted]
    rng = np.random.default_rng(3)
    normal, clean = rng.choice(held_out, 1200), rng.choice(fresh, 400)
    assert audit.permutation_p(clean, normal) > 0.01
    number = round(rate * 400)
    dirty = np.concatenate([clean[number:], rng.choice(copies, number)])
    assert audit.permutation_p(dirty, normal) < 0.01
    assert np.median(copies) > held_out.max() and np.median(fresh) < np.quantile(held_out, 0.7)


def test_search_equals_loops_over_places_and_turns(tissue):
    real, _ = tissue
    rng = np.random.default_rng(5)
    windows = draws(real, ("train", "val"), 3, 4)
    maps = [audit.features(image, instance, P) for image, _, instance in windows]
    masks = [audit.pooled(torch.from_numpy(rng.random((1, P, P)) < 0.999).float(), P) for _ in windows]
    weights = [torch.stack([(m > 0.999).float() for m in scale]) for scale in zip(*masks)]
    rois = real.split("train")[:2]
    similar, where = audit.search([torch.stack(scale) for scale in zip(*maps)], weights, rois, real.classes, P,
                                  CPU, real.root / "cache")

    regions = []
    for roi in rois:
        tile = open_roi(roi, real.classes, real.root / "cache")
        image, _, instance = tile.window(0, 0, tile.height, tile.width)
        regions.append([part.double().numpy() for part in audit.features(image, instance, P)])

    def similarity(i, r, y, x, k):
        found = []
        for scale in range(2):
            template, weight = (turned(np.moveaxis(part.double().numpy(), 0, -1), k)
                                for part in (maps[i][scale], weights[scale][i]))
            t, inside = len(template), weight[..., 0] == 1
            for stain in range(2):
                a = template[..., stain][inside]
                b = regions[r][scale][stain, y:y + t, x:x + t][inside]
                a, b = a - a.mean(), b - b.mean()
                found.append((a * b).sum() / np.sqrt(np.maximum([(a * a).sum(), (b * b).sum()],
                                                                audit.FLOOR * inside.sum()).prod()))
        return max(found)

    for i in range(3):
        assert similarity(i, *where[i]) == pytest.approx(similar[i], abs=1e-4)
        places = rng.integers(0, [2, 65, 65, 8], (150, 4))
        assert max(similarity(i, *place) for place in places) <= similar[i] + 1e-4


def test_a_copy_is_found_where_it_was_taken(tissue):
    real, _ = tissue
    rng, train = np.random.default_rng(6), real.split("train")
    pictures, truth = [], []
    for k in range(8):
        which, y, x = int(rng.integers(len(train))), *(int(v) for v in rng.integers(0, 96 - P, 2))
        window = open_roi(train[which], real.classes, real.root / "cache").window(y, x, P, P)
        pictures.append(tuple(turned(part, k) for part in window))
        truth.append((which, y, x))
    similar, where, _, _ = audit.audit(pictures, pictures[:1], train, real.classes, P, CPU, False,
                                       real.root / "cache")
    assert (similar > 1.5).all()                        # arctanh(0.9)
    assert [tuple(place[:3].tolist()) for place in where] == truth
    for picture, place in zip(pictures, where):
        region = open_roi(train[place[0]], real.classes, real.root / "cache")
        assert np.array_equal(turned(picture[0], int(place[3])), region.window(place[1], place[2], P, P)[0])


def test_features_do_not_depend_on_the_amount_of_stain(tissue):
    image, _, instance = draws(tissue[0], ("train",), 1, 9)[0]
    haematoxylin, dab = deconvolve(image)
    gain = 0.9 - 0.3 * (instance > 0)                   # another one inside the instances
    other = compose(haematoxylin * gain + 0.05, dab * gain + 0.02).round().clip(1, 255).astype(np.uint8)
    for one, two in zip(audit.features(image, instance, P), audit.features(other, instance, P)):
        for stain in range(2):
            assert np.corrcoef(one[stain].reshape(-1), two[stain].reshape(-1))[0, 1] > 0.97


def test_p_is_the_share_of_all_divisions_that_are_as_extreme(monkeypatch):
    rng = np.random.default_rng(1)
    for _ in range(4):
        synthetic, held_out = rng.normal(1, 1, 3), rng.normal(0, 1, 5)
        both = np.concatenate([synthetic, held_out])
        scale = 1.4826 * np.median(abs(both - np.median(both)))
        excess = np.maximum(0, (both - np.median(both)) / scale) ** 3
        sums = [excess[list(chosen)].sum() for chosen in itertools.combinations(range(8), 3)]
        exact = np.mean([s >= excess[:3].sum() - 1e-9 for s in sums])
        assert audit.permutation_p(synthetic, held_out) == pytest.approx(exact, abs=0.02)
    monkeypatch.setattr(audit, "PERMUTATIONS", 199)
    p = [audit.permutation_p(rng.gumbel(size=50), rng.gumbel(size=100)) for _ in range(100)]
    assert 0.35 < np.mean(p) < 0.65 and np.mean(np.array(p) <= 0.05) < 0.13


# ---- the command ---------------------------------------------------------------------------------

def make_set(folder, real, pictures, method):
    rows, entries = [], []
    source = real.split("train")[0]
    for i, (image, label, instance) in enumerate(pictures):
        save(folder / f"images/{i}.png", image)
        save(folder / f"masks/{i}.png", label)
        save(folder / f"instances/{i}.png", instance.astype(np.uint16))
        rows.append({"image": f"images/{i}.png", "mask": f"masks/{i}.png", "instances": f"instances/{i}.png",
                     "slide": source.slide, "split": "train"})
        entries.append((f"images/{i}.png", source.name, source.slide))
    write_csv(folder, rows)
    write_manifest(folder, entries)
    write_split(folder / "split.json", real)
    run.write_json(folder / "config.json", {"fields": {"method": method, "data": str(real.root)}})
    return folder


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        command(audit.main, [*map(str, arguments), "--device", "cpu"])
    return end.value.code


@pytest.fixture
def folder(tissue, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(audit, "HELD_OUT", 40)
    monkeypatch.setattr(audit, "FALSE_ALARM", 0.1)
    return tmp_path


def test_inpainting_is_audited_where_it_painted(tissue, folder, capsys):
    """The background of every image is a real one, to the bit; only the tumor of the first was copied."""
    real, fresh = tissue
    pictures = [w for w in draws(real, ("train",), 30, 11) if 300 < (w[1] > 0).sum() < 700][:6]
    others = draws(fresh, ("train", "test"), 6, 12)
    pictures = [(np.where((label > 0)[..., None] & (i > 0), other[0], image), label, instance)
                for i, ((image, label, instance), other) in enumerate(zip(pictures, others))]
    pictures.append((others[0][0], np.zeros((P, P), np.uint8), np.zeros((P, P), np.int32)))   # without tumor
    found = {}
    for method in ("inpaint", "ldm"):
        make_set(folder / method, real, pictures, method)
        assert call(method, "--out", "out") == 0
        found[method] = json.loads(Path("out/audit.json").read_text(encoding="utf-8"))
        assert "images" in capsys.readouterr().out
        with Image.open("out/audit.png") as picture:
            assert min(picture.size) > 100
    inpainted, whole = ([one["similarity"] for one in found[m]["nearest"]] for m in ("inpaint", "ldm"))
    assert found["inpaint"]["left_out"] == 1 and found["ldm"]["left_out"] == 0
    assert inpainted[0] > 1.2 * max(inpainted[1:]), inpainted
    assert found["inpaint"]["region"] == "regenerated tumor" and found["ldm"]["region"] == "whole image"
    slides = found["ldm"]["slides"]
    assert sum(int(row["nearest patch in it"]) for row in slides) == 7
    assert sum(int(row["images made from it"]) for row in slides) == 7
    above = sum(s > found["ldm"]["threshold"] for s in whole)
    assert found["ldm"]["share_above"] == above / 7 == sum(int(r["above the threshold"]) for r in slides) / 7
    first = Path("out/audit.json").read_bytes()
    assert call("ldm", "--out", "out") == 0
    assert Path("out/audit.json").read_bytes() == first


def test_what_is_compared_is_spread_over_the_set_and_drawn_as_its_sources(tissue, folder, monkeypatch):
    real, drawn = tissue[0], []
    make_set(folder / "ldm", real, draws(real, ("train",), 9, 3), "ldm")
    config = run.read_json(folder / "ldm" / "config.json")
    config["fields"].update(sampling="subtype", uniform=0.25)
    run.write_json(folder / "ldm" / "config.json", config)
    monkeypatch.setattr(audit, "PatchSampler", lambda *a, **b: drawn.append((a, b)) or PatchSampler(*a, **b))
    assert call("ldm", "--count", 5, "--out", "out") == 0
    found = json.loads(Path("out/audit.json").read_text(encoding="utf-8"))
    assert [one["image"] for one in found["nearest"]] == [f"images/{i}.png" for i in (0, 2, 4, 6, 8)]
    [((unseen, split, _, sampling), more)] = drawn
    assert sampling == "subtype" and more["uniform"] == 0.25
    assert {roi.slide for roi in unseen.split(split)} == {roi.slide for roi in real.rois if roi.split != "train"}


def test_copies_are_called_near_and_fresh_tissue_is_not(tissue, folder, capsys, monkeypatch):
    real, fresh = tissue
    rng, seen, honest = np.random.default_rng(5), [], audit.audit
    monkeypatch.setattr(audit, "HELD_OUT", 60)
    monkeypatch.setattr(audit, "audit", lambda *a: seen.append(honest(*a)) or seen[-1])
    make_set(folder / "copies", real, [disturbed(w, rng) for w in draws(real, ("train",), 20, 8)], "ldm")
    make_set(folder / "fresh", real, draws(fresh, ("train", "val", "test"), 20, 9), "ldm")
    for name, words in (("copies", "The set is nearer"), ("fresh", "Nothing says that the set is nearer")):
        assert call(name, "--out", "out") == 0
        assert words in capsys.readouterr().out
        threshold = json.loads(Path("out/audit.json").read_text(encoding="utf-8"))["threshold"]
        normal = seen[-1][2]
        assert threshold in normal and 0.05 < (normal > threshold).mean() <= 0.1


@pytest.mark.parametrize("line, spoil, words", [
    (["none"], None, ["none", "No such file"]),
    (["set", "--count", "-1"], None, ["--count"]),
    (["set"], lambda: Path("set/manifest.jsonl").unlink(), ["manifest.jsonl", "no such file"]),
    (["set"], lambda: Path("set/split.json").unlink(), ["split.json"]),
    (["set"], lambda: Path("set/config.json").write_text('{"fields": {}}'), ["set", "--data"]),
    (["set"], lambda: [save(f"set/{kind}/0.png", np.zeros(shape, dtype)) for kind, shape, dtype in (
        ("images", (40, 40, 3), np.uint8), ("masks", (40, 40), np.uint8),
        ("instances", (40, 40), np.uint16))], ["set", "32, 40"]),
    (["set"], lambda: run.write_json("set/config.json", {"fields": {"method": "inpaint", "data": "REAL"}}),
     ["enough regenerated tumor"]),
])
def test_bad_input_ends_in_one_line(tissue, folder, capsys, line, spoil, words):
    real, _ = tissue
    empty = np.zeros((P, P), np.uint8)
    make_set(folder / "set", real, [(empty[..., None].repeat(3, 2) + 200, empty, empty)] * 2, "ldm")
    if spoil:
        spoil()
    config = Path("set/config.json")
    if "REAL" in config.read_text():
        config.write_text(config.read_text().replace("REAL", str(real.root)))
    assert call(*line, "--out", "new") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and all(word in err for word in words), err
    assert not Path("new").exists()
