"""Prediction without labels: every file against slow computations, the way into QuPath and back, resuming."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_factory import read_annotations, save, transform_polygons, write_csv, write_dataset
from PIL import Image
from test_evaluate import by_tiles, make_run
from test_polygons import four_neighbours

from her2 import predict, run
from her2.polygons import outlines
from parity_polygons import rasterize
from her2.run_errors import command
from her2.segmenter import UNet
from her2.stains import STAINS, compose

SIZES = [(64, 96), (50, 71), (1, 40), (130, 33)]    # none but the first divisible by 32
ARGUMENTS = ["--model", "runs/seg", "--out", "new", "--device", "cpu"]


def distance_to_ring(points, ring):
    """(n,) smallest distance of each point to the edges of a ring, edge by edge."""
    best = np.full(len(points), np.inf)
    for a, b in zip(ring, np.roll(ring, -1, axis=0)):
        along = np.clip(((points - a) @ (b - a)) / ((b - a) @ (b - a)), 0, 1)
        best = np.minimum(best, np.hypot(*(points - a - along[:, None] * (b - a)).T))
    return best


@pytest.mark.parametrize("tolerance", [0.0, 0.49, 1.0, 3.0])
def test_simplified_rings_move_only_pixels_near_them(tolerance):
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:40, :50]
    centres = np.stack([x, y], axis=-1).reshape(-1, 2) + 0.5
    points = [0, 0]
    for _ in range(12):
        waves = sum(np.sin(x / rng.uniform(2, 9) + rng.uniform(0, 6)) * np.sin(y / rng.uniform(2, 9))
                    for _ in range(3))
        for ring in (ring for rings in outlines(waves > 0.3, corners=False) for ring in rings):
            short = predict.simplify(ring, tolerance)
            assert {tuple(p) for p in short} <= {tuple(p) for p in ring} and len(short) > 2
            points = [points[0] + len(ring), points[1] + len(short)]
            assert distance_to_ring(ring, short).max() <= tolerance
            changed = (rasterize([ring], 40, 50) != rasterize([short], 40, 50)).reshape(-1)
            assert not changed.any() or distance_to_ring(centres[changed], ring).max() <= tolerance
            assert tolerance >= 0.5 or not changed.any()
    assert points[1] == points[0] if tolerance == 0 else points[1] <= points[0]
    assert tolerance < 1 or points[1] < 0.6 * points[0]


def blobs(height, width, seed):
    """An image in H&DAB with smooth patches of both, so that an untrained network draws patches too."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:height, :width]
    haematoxylin, dab = (0.5 + 0.5 * np.sin(y / rng.uniform(3, 9) + rng.uniform(0, 6))
                         * np.sin(x / rng.uniform(3, 9)) for _ in range(2))
    image = compose(haematoxylin, dab) + rng.normal(0, 6, (height, width, 3))
    return image.round().clip(0, 255).astype(np.uint8)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A run with random weights, and a folder with four images of awkward sizes, one in a subfolder."""
    monkeypatch.chdir(tmp_path)
    write_dataset("data", slides=4, height=64, width=64)
    make_run("runs/seg", "data")
    for k, (height, width) in enumerate(SIZES):
        save(f"in/{'deeper/' * (k == 2)}{k}.png", blobs(height, width, k))
    # Random weights are sure of themselves everywhere: a head that calls about half of an image tumor.
    content = run.load_model("runs/seg", "segmenter")
    network = run.build_model(UNet, content, "runs/seg")
    with torch.no_grad():
        logits = network(torch.from_numpy(blobs(64, 96, 0)).permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
    difference = (logits[1] - logits[0]).reshape(-1).sort().values
    gaps = difference[2800:3300].diff()             # no pixel close to 0.5, or rounding would decide on it
    middle = difference[2800:3300][gaps.argmax()] + gaps.max() / 2
    content["state_dict"]["segmentation_head.0.weight"] /= difference.std()
    content["state_dict"]["segmentation_head.0.bias"][:] = torch.tensor([middle, 0])
    content["state_dict"]["segmentation_head.0.bias"] /= difference.std()
    torch.save(content, "runs/seg/model.pt")
    return tmp_path


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        command(predict.main, [*map(str, arguments), *ARGUMENTS])
    return end.value.code


def table():
    with open("new/predictions.csv", newline="", encoding="utf-8") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("[!.]*"))
            if p.is_file() and p.name != "config.json"}


@torch.no_grad()
def slow_probability(image):
    """The tumor probability in one forward pass over the image continued by reflection."""
    content = run.load_model("runs/seg", "segmenter")
    network = run.build_model(UNet, content, "runs/seg")
    padded = image
    for axis in (0, 1):
        length = image.shape[axis]
        index = [i % (2 * length) for i in range(-(-length // 32) * 32)]
        padded = np.take(padded, [min(i, 2 * length - 1 - i) for i in index], axis)
    prob = network(torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 127.5 - 1).softmax(1)[0, 1]
    return prob.numpy()[:image.shape[0], :image.shape[1]]


def without_specks(mask, smallest):
    """A mask whose holes below `smallest` are filled, then without components below it; 4 neighbours."""
    mask, number = mask.copy(), four_neighbours(mask)
    for k in set(number.ravel()) - {0}:
        rest = four_neighbours(np.pad(number != k, 1, constant_values=True))    # what component k is not
        for hole in set(rest.ravel()) - {0, rest[0, 0]}:
            if (rest == hole).sum() < smallest:
                mask |= (rest == hole)[1:-1, 1:-1]
    number = four_neighbours(mask)
    for k in set(number.ravel()) - {0}:
        if (number == k).sum() < smallest:
            mask[number == k] = False
    return mask


def back(name, place=(0, 0, 1)):
    """The exported polygons of an image, read as QuPath's, in pixels of the image."""
    return transform_polygons(read_annotations(f"new/polygons/{name}.geojson")[0], *place)


def test_tiles_are_of_the_patches_size(place):
    """A network of patches of 32 px: every tile of the first image is a forward pass of its own."""
    torch.save({**run.load_model("runs/seg", "segmenter"), "patch": 32}, "runs/seg/model.pt")
    assert call("in") == 0
    image, grey = np.array(Image.open("in/0.png")), np.array(Image.open("new/probability/0.png"))
    assert image.shape[:2] == (64, 96), "six tiles"
    assert np.abs(grey - by_tiles("runs/seg", image, 32) * 255.0).max() < 0.51


@pytest.mark.parametrize("smallest", [0, 12])
def test_every_file_against_slow_computations(place, smallest, monkeypatch):
    monkeypatch.setattr(predict, "STRIP", 16)               # figures are sums over several strips
    assert call("in", "--min-area", smallest, "--threshold", 0.5, "--tile", 512) == 0
    rows = table()
    assert list(rows) == ["0.png", "1.png", "3.png", "deeper/2.png"] and len(contents("new")) == 17
    for name, row in rows.items():
        stem, image = name[:-4], np.array(Image.open(f"in/{name}"))
        prob = slow_probability(image)
        grey = np.array(Image.open(f"new/probability/{stem}.png"))
        assert grey.dtype == np.uint8 and np.abs(grey - prob * 255.0).max() < 0.51
        clear = np.abs(prob - 0.5) > 1e-5
        mask = np.array(Image.open(f"new/masks/{stem}.png")) == 1
        wanted = without_specks(prob >= 0.5, smallest)
        assert clear.all() and np.array_equal(mask, wanted), (mask != wanted).sum()

        polygons = back(stem)
        parts = [rasterize(p.rings, *mask.shape) for p in polygons]
        assert np.array_equal(np.sum(parts, axis=0) if parts else mask * 0, mask.astype(int))
        number = four_neighbours(mask)
        assert len(polygons) == len(set(number.ravel()) - {0}) == int(row["polygons"])
        obj = json.loads(Path(f"new/polygons/{stem}.geojson").read_text(encoding="utf-8"))
        assert obj["type"] == "FeatureCollection"
        for feature, part in zip(obj["features"], parts):
            found = feature["properties"]
            assert found["objectType"] == "annotation"
            assert found["classification"] == {"name": "Tumor", "color": [200, 0, 0]}
            assert found["measurements"]["Area px^2"] == part.sum() >= smallest
            assert abs(found["measurements"]["Mean tumor probability"] - prob[part].mean()) < 2e-5
            assert all(ring[0] == ring[-1] for ring in feature["geometry"]["coordinates"])

        assert float(row["area"]) == mask.sum() and abs(float(row["tumor_share"]) - mask.mean()) < 1e-6
        white = [sorted(image[..., c].ravel()) for c in range(3)]
        white = np.array([np.interp(0.99 * (len(w) - 1), range(len(w)), w) for w in white])
        density = np.linalg.solve(STAINS.T, -np.log10(np.maximum(image[mask], 0.5) / white).T)[1]
        assert abs(float(row["dab_density"] or "inf") - density.mean()) < 1e-6 or not mask.any()
        overlay = np.array(Image.open(f"new/overlays/{stem}.png"))
        changed = (overlay != image).any(axis=-1)
        assert overlay.shape == image.shape and not (changed & ~mask).any() and changed.any() == (
            len(set(mask.ravel())) == 2)
    assert max(int(row["polygons"]) for row in rows.values()) > 3, "nothing that could go wrong"


def test_the_threshold_that_is_given_is_the_one_that_is_used(place):
    assert call("in/0.png", "--threshold", 0.4, "--min-area", 0) == 0
    prob = slow_probability(np.array(Image.open("in/0.png")))
    mask = np.array(Image.open("new/masks/0.png")) == 1
    clear = np.abs(prob - 0.4) > 1e-4
    assert np.array_equal(mask[clear], prob[clear] >= 0.4) and ((prob > 0.4) & (prob < 0.5)).any()


def test_polygons_lie_in_the_slide_and_measure_its_pixels(place):
    write_dataset("placed", slides=2, height=48, width=80, split=False)
    places = [(1000.5, -3.25, 2.0), (123456.7, 98765.4, 3.3)]
    for k in (0, 1):
        save(f"placed/images/roi{k}.png", blobs(48, 80, k))
    write_csv("placed", [{"image": f"images/roi{k}.png", "annotations": "", "slide": f"s{k}", "x": x, "y": y,
                          "downsample": d} for k, (x, y, d) in enumerate(places)])
    assert call("placed", "--min-area", 0, "--threshold", 0.5) == 0
    for k, (x, y, downsample) in enumerate(places):
        mask = np.array(Image.open(f"new/masks/images/roi{k}.png")) == 1
        polygons = back(f"images/roi{k}", (x, y, downsample))
        assert np.array_equal(sum(rasterize(p.rings, 48, 80) for p in polygons), mask) and mask.any()
        raw = read_annotations(f"new/polygons/images/roi{k}.geojson")[0]
        j, i = np.nonzero(mask)
        low = np.min([p.rings[0].min(axis=0) for p in raw], axis=0)
        assert np.allclose(low, [i.min() * downsample + x, j.min() * downsample + y])
        row = table()[f"images/roi{k}.png"]
        assert np.isclose(float(row["area"]), mask.sum() * downsample ** 2)
        assert [float(row[key]) for key in ("x", "y", "downsample")] == [x, y, downsample]
    before = read_annotations("new/polygons/images/roi0.geojson")[0]
    write_csv("placed", [{"image": f"images/roi{k}.png", "annotations": "", "slide": f"s{k}", "x": x + 100, "y": y,
                          "downsample": d} for k, (x, y, d) in enumerate(places)])
    assert call("placed", "--min-area", 0, "--threshold", 0.5) == 0, "a place that was corrected"
    after = read_annotations("new/polygons/images/roi0.geojson")[0]
    for one, other in zip(before, after, strict=True):
        assert np.allclose(one.rings[0] + (100, 0), other.rings[0])


def test_simplified_polygons_stay_within_their_bound(place):
    assert call("in", "--threshold", 0.5, "--simplify", 2, "--min-area", 20) == 0
    short = sum(len(ring) for name in ("0", "1", "3") for p in back(name) for ring in p.rings)
    rings = {name: [ring for p in back(name) for ring in p.rings] for name in ("0", "1", "3")}
    masks = {name: np.array(Image.open(f"new/masks/{name}.png")) == 1 for name in rings}
    assert call("in", "--threshold", 0.5, "--min-area", 20) == 2, "another outline, another folder"
    Path("new").rename("simple")
    assert call("in", "--threshold", 0.5, "--min-area", 20) == 0
    assert short < 0.7 * sum(len(ring) for name in rings for p in back(name) for ring in p.rings)
    for name, mask in masks.items():
        exact = [ring for p in back(name) for ring in p.rings]
        assert np.array_equal(mask, np.array(Image.open(f"new/masks/{name}.png")) == 1)
        odd = np.zeros(mask.shape, bool)
        for ring in rings[name]:
            odd ^= rasterize([ring], *mask.shape)
        j, i = np.nonzero(odd != mask)
        centres = np.stack([i, j], axis=1) + 0.5
        away = np.min([distance_to_ring(centres, ring) for ring in exact], axis=0)
        assert (away <= 2).all()


def test_an_interrupted_call_goes_on_and_a_changed_image_is_predicted_again(place, monkeypatch):
    assert call("in", "--threshold", 0.5) == 0
    whole = contents("new")
    Path("new").rename("whole")

    honest, calls = predict.predict, []

    def interrupted(image, *arguments):
        calls.append(image.name)
        if len(calls) == 3:
            predict.draw.save_png(arguments[0]["masks"], np.zeros((2, 2), np.uint8))    # half of an image
            raise KeyboardInterrupt
        return honest(image, *arguments)

    monkeypatch.setattr(predict, "predict", interrupted)
    assert call("in", "--threshold", 0.5) == 130 and len(table()) == 2
    assert call("in", "--threshold", 0.5) == 0
    assert calls == ["0.png", "1.png", "3.png", "3.png", "deeper/2.png"]
    assert contents("new") == whole
    assert call("in", "--threshold", 0.5) == 0 and len(calls) == 5, "all is there"
    Path("new/overlays/1.png").unlink()
    save("in/0.png", blobs(40, 40, 9))
    save("more/5.png", blobs(40, 40, 5))
    assert call("in", "more/*.png", "--threshold", 0.5) == 0 and calls[5:] == ["0.png", "1.png", "5.png"]
    assert list(table()) == ["0.png", "1.png", "3.png", "5.png", "deeper/2.png"]
    assert call("in", "--threshold", 0.6) == 2, "another threshold belongs into another folder"


def test_hidden_files_and_folders_are_no_images_of_a_user(place):
    for name in ("in/.ipynb_checkpoints/0-checkpoint.png", "in/deeper/._2.png"):
        save(name, blobs(32, 32, 9))
    assert call("in") == 0 and sorted(table()) == ["0.png", "1.png", "3.png", "deeper/2.png"]


def test_a_name_with_brackets_is_that_file_and_no_pattern(place):
    save("odd/scan[1].png", np.zeros((32, 32, 3), np.uint8))
    save("odd/scan1.png", np.zeros((32, 32, 3), np.uint8))
    assert [one.path.name for one in predict.find_images(["odd/scan[1].png"], "new")] == ["scan[1].png"]
    assert [one.path.name for one in predict.find_images(["odd/sc*1.png"], "new")] == ["scan1.png"]


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def nan_weights():
    content = run.load_model("runs/seg", "segmenter")
    content["state_dict"]["segmentation_head.0.bias"] *= np.nan
    torch.save(content, "runs/seg/model.pt")


def old_weights():
    content = run.load_model("runs/seg", "segmenter")
    del content["patch"]
    torch.save(content, "runs/seg/model.pt")


BAD = {
    "no such file": (["nothing.png"], ["nothing.png", "no image there"], None),
    "a folder without images": (["runs"], ["runs", "no image there"], None),
    "not an image": (["in/a.png"], ["a.png", "cannot identify"], lambda: write("in/a.png", b"hello")),
    "an empty image": (["in"], ["a.png", "cannot identify"], lambda: write("in/a.png", b"")),
    "a damaged one among good ones": (["in"], ["0.png", "copy the file again"], lambda: write(
        "in/0.png", Path("in/0.png").read_bytes()[:2000])),
    "another kind of file": (["data/slides.csv"], ["slides.csv", "ending"], None),
    "two of one name": (["in", "in/deeper/../0.png"], ["0.png", "one name"], None),
    "two that differ by their ending": (["in"], ["0.png", "0.jpg", "one name"],
                                        lambda: save("in/0.jpg", blobs(9, 9, 0))),
    "a broken dataset": (["data"], ["slides.csv", "no such file"],
                         lambda: Path("data/images/roi0.png").unlink()),
    "no run": (["in", "--model", "runs/none"], ["runs/none", "train_seg.py"], None),
    "a folder that is no run": (["in", "--model", "in"], ["in", "model.pt"], None),
    "a network that predicts NaN": (["in"], ["runs/seg", "not finite"], nan_weights),
    "a network that does not say its patches": (["in"], ["model.pt", "older version", "--tile"], old_weights),
    "tiles": (["in", "--tile", "48"], ["--tile 48", "multiple of 32"], None),
    "overlap": (["in", "--tile", "64", "--overlap", "64"], ["--overlap 64"], None),
    "threshold": (["in", "--threshold", "1.5"], ["--threshold", "1.5"], None),
    "smallest area": (["in", "--min-area", "-1"], ["--min-area", "-1"], None),
    "simplification": (["in", "--simplify", "nan"], ["--simplify", "nan"], None),
    "a foreign folder": (["in"], ["new", "not empty"], lambda: write("new/thesis.txt", b"precious")),
    "no images at all": ([], ["IMAGES"], None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line(place, capsys, name):
    line, words, spoil = BAD[name]
    if spoil:
        spoil()
    with pytest.raises(SystemExit) as end:
        command(predict.main, [*ARGUMENTS, *line] if "--model" in line else [*line, *ARGUMENTS])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert not list(Path(".").rglob("*.tmp")) and not Path("new/predictions.csv").exists()
