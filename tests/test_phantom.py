"""The phantom: its building blocks against slow direct computations, its folder against the contract."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from data_factory import read_annotations, transform_polygons
from PIL import Image

from her2 import phantom, phantom_microscope
from her2.data_classes import DEFAULT_CLASSES
from her2.run_errors import UserError
from her2.polygons import paint, polygon_area
from her2.stains import deconvolve, white_point
from her2.phantom_textures import ANGLES, Star, smooth, squeeze, stretched, wobbly_radii

TINY = phantom.PRESETS["tiny"]
SMALLER = replace(TINY, size=96, slides=(4, 4, 4))   # seconds matter in tests; the model is the same


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The preset `tiny`, written once."""
    return phantom.make_phantom(tmp_path_factory.mktemp("phantom") / "tiny", "tiny", 0, progress=False)


def rows_of(folder):
    with open(folder / "slides.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def polygons_of(folder, row):
    polygons, skipped = read_annotations(folder / row["annotations"])
    assert not skipped
    return transform_polygons(polygons, float(row["x"]), float(row["y"]), float(row["downsample"]))


# --- building blocks ---------------------------------------------------------------------------------------

def test_noise_on_a_tile_is_the_cubic_spline_of_its_grid_computed_point_by_point():
    grid, scale = np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32), 3.0

    def kernel(t):  # the cubic B-spline, from its textbook definition
        t = abs(t)
        return 2 / 3 - t ** 2 + t ** 3 / 2 if t < 1 else (2 - t) ** 3 / 6 if t < 2 else 0.0

    ys, xs = np.array([-4.1, 0.0, 7.3]), np.array([1.2, 766.9])
    def around(position):
        return range(int(position // scale) - 2, int(position // scale) + 4)

    slow = [[sum(kernel(y / scale - i) * kernel(x / scale - j) * grid[i % 256, j % 256]
                 for i in around(y) for j in around(x)) / (151 / 315) for x in xs] for y in ys]
    assert np.abs(smooth(grid, ys, xs, scale) - slow).max() < 1e-5


def test_noise_has_mean_zero_and_variance_one_both_ways():
    grid = np.random.default_rng(1).standard_normal((256, 256), dtype=np.float32)
    axis = np.arange(0, 256, 0.37)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    for values in (smooth(grid, axis, axis, 1.0), stretched(grid, y, x, 1.0, 1.0)):
        assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.03


def test_distance_from_a_round_outline_is_exact_and_from_an_ellipse_nearly_so():
    circle = Star(10.0, -5.0, np.full(ANGLES, 30.0))
    x, y = np.array([10.0, 50.0, 10.0]), np.array([-5.0, -5.0, 20.0])
    assert np.allclose(circle.distance(x, y), [-30, 10, -5])
    theta = np.linspace(0, 2 * np.pi, 50)
    ellipse = Star(0.0, 0.0, wobbly_radii(30.0, 0.0, 1.6, 0.4, np.random.default_rng(0)))
    a, b = 30 * 1.6 ** 0.5, 30 / 1.6 ** 0.5
    u, v = a * np.cos(theta), b * np.sin(theta)
    normal_u, normal_v = np.cos(theta) / a, np.sin(theta) / b
    length = np.hypot(normal_u, normal_v)
    for away in (-4.0, 0.0, 4.0):
        p, q = u + away * normal_u / length, v + away * normal_v / length
        x, y = p * np.cos(0.4) - q * np.sin(0.4), p * np.sin(0.4) + q * np.cos(0.4)
        assert np.abs(ellipse.distance(x, y) - away).max() < 0.6


def test_squeezed_neighbours_leave_the_septum_between_them():
    x, y, weight = np.array([0.0, 50.0]), np.zeros(2), np.array([30.0, 40.0])
    left = squeeze(np.full(ANGLES, 30.0), 0, x, y, weight, gap=6.0)
    right = squeeze(np.full(ANGLES, 40.0), 1, x, y, weight, gap=6.0)
    # The power line of these two circles lies at (50^2 + 30^2 - 40^2) / 100 = 18 from the left centre.
    assert left[0] == pytest.approx(15, abs=0.5) and right[ANGLES // 2] == pytest.approx(29, abs=0.5)
    assert left[ANGLES // 2] == pytest.approx(30)


def test_clip_of_a_square_that_sticks_out_at_a_corner():
    ring = phantom.clip(np.array([[-4.0, -6.0], [6.0, -6.0], [6.0, 4.0], [-4.0, 4.0]]), 100)
    assert polygon_area([ring]) == pytest.approx(6 * 4) and ring.min() == 0
    assert len(phantom.clip(np.array([[-9.0, -9.0], [-5.0, -9.0], [-5.0, -2.0]]), 100)) == 0


# --- the picture -------------------------------------------------------------------------------------------

def test_tiles_fit_without_a_seam(monkeypatch):
    scene, _ = phantom.scene_of(SMALLER, 3, 2, 0)
    scene.style.noise = 0.0
    whole = phantom_microscope.render(scene, 1.0, 96, (3, 2, 0))
    monkeypatch.setattr(phantom_microscope, "TILE", 40)
    assert np.abs(phantom_microscope.render(scene, 1.0, 96, (3, 2, 0)).astype(int) - whole).max() <= 1


def test_a_section_twice_as_thick_has_twice_the_dye():
    scene, _ = phantom.scene_of(SMALLER, 0, 3, 0)
    axis = np.arange(20.0, 60.0)
    once = phantom_microscope.amounts(scene, axis, axis)
    scene.style.haematoxylin *= 2
    scene.style.dab *= 2
    for a, b in zip(once, phantom_microscope.amounts(scene, axis, axis)):
        assert a.max() > 0.2 and np.allclose(b, 2 * a)


def test_the_border_between_two_cells_is_the_same_from_both_sides():
    first, second = np.array([3, 7, 9], np.int32), np.array([7, 3, 2], np.int32)
    coin = phantom_microscope._coin(first, second)
    assert coin[0] == coin[1] != coin[2]
    i, j = np.meshgrid(np.arange(200, dtype=np.int32), np.arange(200, 400, dtype=np.int32))
    share = (phantom_microscope._coin(i, j) < 0.4).mean()
    assert abs(share - 0.4) < 0.01


def test_resolution_changes_the_sampling_and_not_the_tissue():
    fine = replace(SMALLER, um_per_px=0.5, size=192)
    pictures = []
    for preset in (SMALLER, fine):
        scene, polygons = phantom.scene_of(preset, 5, 1, 0)
        scene.style.noise = 0.0
        picture = phantom_microscope.render(scene, preset.um_per_px, preset.size, (5, 1, 0))
        pictures.append(picture.astype(float))
    averaged = pictures[1].reshape(96, 2, 96, 2, 3).mean(axis=(1, 3))
    assert np.abs(averaged - pictures[0]).mean() < 2.5 < np.abs(averaged - averaged.mean(axis=(0, 1))).mean()


# --- the folder --------------------------------------------------------------------------------------------

def test_scores_are_equally_frequent_in_every_split_and_every_class_occurs(folder):
    rows = rows_of(folder)
    assert [sum(r["split"] == s for r in rows) for s in ("train", "val", "test")] == [8, 4, 4]
    for split in ("train", "val", "test"):
        part = [r for r in rows if r["split"] == split]
        counts = [len({r["slide"] for r in part if r["score"] == s}) for s in ("0", "1+", "2+", "3+")]
        assert len(set(counts)) == 1 and counts[0] > 0
        names = {p.name for r in part for p in polygons_of(folder, r)}
        assert names == set(DEFAULT_CLASSES.names[1:])


def test_both_annotation_formats_hold_the_polygons_that_were_laid_out(folder):
    formats = set()
    for slide, row in enumerate(rows_of(folder)):
        formats.add(row["annotations"].rsplit(".")[-1])
        _, expected = phantom.scene_of(TINY, 0, slide, 0)
        found = polygons_of(folder, row)
        assert [DEFAULT_CLASSES.id_of(p.name) for p in found] == [class_id for class_id, _ in expected]
        for polygon, (_, ring) in zip(found, expected):
            vertices = np.asarray(polygon.rings[0])[:len(ring)]
            assert np.abs(vertices - ring).max() <= 0.51   # EXACT keeps whole pixels
    assert formats == {"json", "geojson"}


def test_staining_rises_with_the_subtype_and_neighbours_overlap(folder):
    values = {name: [] for name in DEFAULT_CLASSES.names}
    for row in rows_of(folder):
        image = np.asarray(Image.open(folder / row["image"]))
        polygons = polygons_of(folder, row)
        ids = [DEFAULT_CLASSES.id_of(p.name) for p in polygons]
        label, instance = paint([p.rings for p in polygons], ids, *image.shape[:2])
        dab = deconvolve(image, white_point(image))[1]
        for k in np.unique(instance[instance > 0]):
            values[DEFAULT_CLASSES.names[label[instance == k][0]]].append(dab[instance == k].mean())
    means = [np.mean(values[name]) for name in ("0", "1+", "2+", "3+")]
    assert all(b > 1.25 * a for a, b in zip(means, means[1:])), means
    assert 0.02 < means[0] < 0.15 and 0.4 < means[3] < 0.9, means
    for lower, upper in (("0", "1+"), ("1+", "2+"), ("2+", "3+")):
        assert max(values[lower]) > min(values[upper]), f"{lower} and {upper} do not overlap"


def test_look_alikes_stand_outside_the_annotations():
    kinds, areas = [], np.zeros((4, 4))
    for slide in range(8):
        scene, polygons = phantom.scene_of(TINY, 0, slide, 0)
        label, _ = paint([[ring] for _, ring in polygons], [k for k, _ in polygons], TINY.size, TINY.size)
        for site in scene.sites:
            y, x = (int(place / TINY.um_per_px) for place in (site.y, site.x))
            if site.kind in ("duct", "acinus", "vessel") and 0 <= min(y, x) and max(y, x) < TINY.size:
                kinds.append(site.kind)
                assert label[y, x] == 0, "tissue that looks like tumor and is none"
        areas[slide % 4] += [(label == k).sum() for k in phantom.SUBTYPE_CLASS]
    assert {"duct", "acinus", "vessel"} <= set(kinds)
    assert areas.argmax(axis=1).tolist() == [0, 1, 2, 3], "slides of a score have most tumor of that subtype"
    first, second = (phantom.scene_of(TINY, 0, 1, roi)[0] for roi in (0, 1))
    assert repr(first.style) == repr(second.style) and len(first.sites) != len(second.sites)


def test_an_interrupted_phantom_is_finished_in_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setitem(phantom.PRESETS, "tiny", SMALLER)
    first, second = (phantom.make_phantom(tmp_path / name, "tiny", 4, progress=False) for name in "ab")
    names = sorted(str(p.relative_to(first)) for p in first.rglob("*") if p.is_file())
    assert len(names) == 2 * 12 + 2
    (second / "images" / "slide03_roi0.png").unlink()
    settings = json.loads((first / "phantom.json").read_text(encoding="utf-8"))
    assert settings["complete"] and settings["seed"] == 4
    phantom.make_phantom(second, "tiny", 4, progress=False)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    images = [(first / f"images/slide{slide:02d}_roi0.png").read_bytes() for slide in range(12)]
    assert len(set(images)) == 12


def test_a_complete_folder_is_recognised_and_any_other_refused(folder, tmp_path, capsys):
    assert phantom.make_phantom(folder, "tiny", 0, progress=False) == folder
    assert "complete" in capsys.readouterr().out
    with pytest.raises(UserError, match='(?s)than tiny with seed 1 .*"seed": 0,.*remove the folder'):
        phantom.make_phantom(folder, "tiny", 1)
    (tmp_path / "slides.csv").write_text("image\n", encoding="utf-8")
    with pytest.raises(UserError, match="no phantom.json"):
        phantom.make_phantom(tmp_path, "tiny", 0)
    (tmp_path / "phantom.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="another phantom than tiny with seed 0 .\\[\\]."):
        phantom.make_phantom(tmp_path, "tiny", 0)


@pytest.mark.parametrize("flags, told", [(["--preset", "huge"], "tiny"),
                                         (["--seed", "x"], "--seed")])
def test_a_wrong_flag_is_one_line_and_status_two(tmp_path, flags, told):
    done = subprocess.run([sys.executable, "-m", "her2.phantom", "--out", str(tmp_path / "x"), *flags],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and told in done.stderr
    assert not (tmp_path / "x").exists()
