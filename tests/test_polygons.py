"""Rasterisation against rational arithmetic, pixel by pixel; components and outlines against slow oracles."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from her2.polygons import connected_components, outlines, paint, polygon_area
from parity_polygons import rasterize


def slow_rasterize(rings, height, width):
    """The rule of the contract as it stands, in exact arithmetic, for every pixel and every edge."""
    mask = np.zeros((height, width), bool)
    for ring in rings:
        points = [(Fraction(x), Fraction(y)) for x, y in np.asarray(ring, dtype=float).tolist()]
        for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1]):
            for j in range(height):
                yc = j + Fraction(1, 2)
                if (y1 > yc) != (y2 > yc):
                    x = x1 + (yc - y1) / (y2 - y1) * (x2 - x1)
                    for i in range(width):
                        mask[j, i] ^= i + Fraction(1, 2) < x
    return mask


def off_centre(p):
    """Centres, and every coordinate one bit above or below."""
    return np.nextafter(np.rint(p) + 0.5, np.where(p > np.rint(p), np.inf, -np.inf))


GRIDS = {
    "float": lambda p: p, "integer": np.rint, "half": lambda p: np.rint(p) + 0.5,
    "third": lambda p: np.rint(p * 3) / 3, "decimal": lambda p: np.rint(p * 10) / 10,
    "256th": lambda p: np.rint(p * 256) / 256, "one bit off a centre": off_centre,
    "repeated": lambda p: np.repeat(np.rint(p), 2, axis=0),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_exact_on_random_polygons(grid):
    rng = np.random.default_rng(7)
    for _ in range(25):
        height, width = rng.integers(1, 14, 2)
        rings = [GRIDS[grid](rng.uniform(-4, 17, (rng.integers(1, 9), 2))) for _ in range(rng.integers(1, 4))]
        assert np.array_equal(rasterize(rings, height, width), slow_rasterize(rings, height, width)), rings


def test_exact_far_from_the_origin():
    """Coordinates of a slide: rounding grows with them, and one wrong crossing fills half a row."""
    rng = np.random.default_rng(8)
    for size in (1e3, 1e6, 1e12, 1e17, 1e300):
        rings = [np.concatenate([rng.uniform(-size, size, (3, 2)), rng.uniform(0, 9, (3, 2))])]
        assert np.array_equal(rasterize(rings, 9, 11), slow_rasterize(rings, 9, 11)), size
    for far in (2.0 ** 20, 2.0 ** 30):     # every centre of the main diagonal lies on a left edge: in
        diagonal = [np.array([[-far, -far], [far, far], [far, -far]])]
        assert np.array_equal(rasterize(diagonal, 6, 6), np.triu(np.ones((6, 6), bool)))


def test_half_open_rule_by_hand():
    square = [np.array([[0.5, 0.5], [2.5, 0.5], [2.5, 2.5], [0.5, 2.5]])]      # corners on centres
    expected = np.zeros((4, 4), bool)
    expected[0:2, 0:2] = True                                          # left, upper in; right, lower out
    assert np.array_equal(rasterize(square, 4, 4), expected)
    assert np.array_equal(rasterize([square[0][::-1]], 4, 4), expected)
    assert np.array_equal(rasterize([np.concatenate([square[0], square[0][:1]])], 4, 4), expected)


def test_even_odd_holes_and_crossings():
    outer = np.array([[0, 0], [9, 0], [9, 9], [0, 9]], float)
    hole = np.array([[3, 3], [6, 3], [6, 6], [3, 6]], float)
    ring = rasterize([outer, hole], 9, 9)
    assert ring.sum() == 81 - 9 and not ring[3:6, 3:6].any()
    assert np.array_equal(ring, rasterize([outer, hole[::-1]], 9, 9)), "a hole in the other direction"
    assert rasterize([outer, hole, hole], 9, 9).all(), "twice a hole is none"
    assert not rasterize([np.concatenate([outer, outer])], 9, 9).any(), "wound twice is outside"
    bowtie = np.array([[0, 0], [8, 8], [8, 0], [0, 8]], float)
    assert np.array_equal(rasterize([bowtie], 8, 8), slow_rasterize([bowtie], 8, 8))


def test_abutting_polygons_share_no_pixel_and_leave_none_out():
    rng = np.random.default_rng(3)
    x, y = np.meshgrid(np.linspace(-1, 41, 8), np.linspace(-1, 31, 7))
    c = np.stack([x, y], axis=2) + np.where(rng.random((7, 8, 1)) < 0.5, 0.5, rng.uniform(-1, 1, (7, 8, 2)))
    places = [(j, i) for j in range(6) for i in range(7)]
    quads = [np.stack([c[j, i], c[j, i + 1], c[j + 1, i + 1], c[j + 1, i]]) for j, i in places]
    count = sum(rasterize([quad], 28, 38).astype(int) for quad in quads)
    assert (count[2:-2, 2:-2] == 1).all(), f"pixels are covered {np.unique(count)} times"


def test_nothing_where_there_is_nothing():
    for ring in (np.zeros((0, 2)), [[3, 3]], [[1, 1], [6, 6]], [[1, 4.5], [7, 4.5], [3, 4.5]],
                 [[20, 20], [30, 20], [30, 30]], [[-20, 2], [-10, 2], [-10, 9]], [[2, -9], [9, -9], [5, -1]]):
        assert not rasterize([np.array(ring, float)], 8, 8).any()
    assert not rasterize([], 8, 8).any()
    assert rasterize([np.array([[0, 0], [5, 0], [5, 5]])], 0, 5).shape == (0, 5)
    with pytest.raises(AssertionError, match="not finite"):
        rasterize([np.array([[0, 0], [np.nan, 1], [1, 1]])], 4, 4)
    with pytest.raises(AssertionError, match="found"):
        rasterize([np.zeros((3, 3))], 4, 4)


def blob(rng, x, y, radius, n):
    angle = np.sort(rng.uniform(0, 2 * np.pi, n))
    r = radius * (1 + 0.3 * np.sin(3 * angle) + 0.02 * rng.standard_normal(n))
    return np.stack([x + r * np.cos(angle), y + r * np.sin(angle)], axis=1)


def test_a_hundred_thousand_vertices():
    rng = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 100_000, endpoint=False)
    circle = 300 + 250.0 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    mask = rasterize([circle], 600, 600)
    y, x = np.mgrid[:600, :600] + 0.5
    gap = np.abs(np.hypot(x - 300, y - 300) - 250)
    assert (mask == (np.hypot(x - 300, y - 300) < 250))[gap > 1e-6].all()
    tangle = rng.uniform(0, 64, (100_000, 2))             # crosses itself everywhere, fills several chunks
    upright, turned = rasterize([tangle], 64, 64), rasterize([64 - tangle], 64, 64)[::-1, ::-1]
    assert np.array_equal(upright, turned) and 0.3 < upright.mean() < 0.7


def test_a_whole_roi_in_the_memory_of_its_maps():
    rng = np.random.default_rng(1)
    polygons = [[blob(rng, *rng.uniform(0, 6200, 2), rng.uniform(50, 600), 200)] for _ in range(60)]
    tracemalloc.start()
    label, instance = paint(polygons, [1 + k % 5 for k in range(60)], 6200, 6200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * label.size * 1.5, f"{peak / 2 ** 20:.0f} MiB; label and instance are 5 bytes a pixel"
    assert set(np.unique(instance)) <= set(range(61)) and (label[instance > 0] > 0).all()


def test_area():
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]], float)
    assert polygon_area([square]) == polygon_area([square[::-1] + 1e7]) == 16
    assert polygon_area([square, square[::-1] / 2 + 1]) == polygon_area([square, square / 2 + 1]) == 12
    assert polygon_area([]) == polygon_area([square[:2]]) == polygon_area([square, square * 2]) == 0


def box(x1, y1, x2, y2):
    return [np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], float)]


def test_painters_order():
    small, big, equal = box(4, 4, 6, 6), box(0, 0, 10, 10), box(5, 0, 15, 10)
    for order in ([0, 1], [1, 0]):
        label, instance = paint([[small, big][k] for k in order], [[2, 3][k] for k in order], 10, 12)
        assert (label[4:6, 4:6] == 2).all() and (label == 3).sum() == 96
        assert (instance[4:6, 4:6] == order.index(0) + 1).all() and instance[0, 0] == order.index(1) + 1
    label, instance = paint([big, equal], [1, 2], 10, 12)
    assert (label[:, :5] == 1).all() and (label[:, 5:] == 2).all(), "a tie: the later one on top"
    assert paint([equal, big], [2, 1], 10, 12)[0][0, 5] == 1
    assert label.dtype == np.uint8 and instance.dtype == np.int32


def test_size_is_the_polygons_own_and_not_what_the_image_shows_of_it():
    wide, inner = box(9, -500, 500, 500), box(2, 2, 10, 8)
    for polygons, ids in (([wide, inner], [1, 2]), ([inner, wide], [2, 1])):
        assert (paint(polygons, ids, 10, 12)[0][2:8, 2:10] == 2).all()


def test_a_background_island_cuts_a_hole():
    label, instance = paint([box(3, 3, 5, 5), box(0, 0, 8, 8)], [0, 4], 8, 8)     # stroma inside tumor
    assert (label[3:5, 3:5] == 0).all() and (instance[3:5, 3:5] == 0).all()
    assert (label == 4).sum() == (instance == 2).sum() == 60


def test_a_large_figure_of_eight_does_not_hide_what_lies_on_it():
    eight = [np.array([[0, 0], [40, 40], [40, 0], [0, 40]], float)]               # shoelace sum 0
    label, _ = paint([box(2, 15, 5, 20), eight], [2, 1], 40, 40)
    assert (label[15:20, 2:5] == 2).all() and (label == 1).sum() > 700


def test_touching_polygons_of_different_subtypes_stay_apart():
    label, instance = paint([box(0, 0, 4, 8), box(4, 0, 8, 8)], [1, 1], 8, 8)
    assert (instance[:, :4] == 1).all() and (instance[:, 4:] == 2).all()
    assert connected_components(label).max() == 1, "a label map cannot tell them apart: this is why"


def test_paint_guards():
    with pytest.raises(AssertionError, match="2 polygons but 1"):
        paint([box(0, 0, 1, 1)] * 2, [1], 4, 4)
    with pytest.raises(AssertionError, match="8 bits"):
        paint([box(0, 0, 1, 1)], [256], 4, 4)
    label, instance = paint([], [], 3, 4)
    assert label.shape == instance.shape == (3, 4) and not label.any() and not instance.any()


def flood_fill(label):
    """Components by filling from every pixel not yet seen, in reading order."""
    height, width = label.shape
    instance = np.zeros(label.shape, np.int32)
    number = 0
    for start in zip(*np.nonzero(label)):
        if instance[start]:
            continue
        number += 1
        instance[start] = number
        todo = [start]
        while todo:
            y, x = todo.pop()
            for v in range(max(y - 1, 0), min(y + 2, height)):
                for u in range(max(x - 1, 0), min(x + 2, width)):
                    if label[v, u] == label[start] and not instance[v, u]:
                        instance[v, u] = number
                        todo.append((v, u))
    return instance


def test_components_equal_a_flood_fill():
    rng = np.random.default_rng(5)
    for k in range(150):
        height, width = rng.integers(1, 24, 2)
        label = rng.choice([0, 1, 2, 255], (height, width), p=rng.dirichlet([1, 1, 1, 1])).astype(np.uint8)
        if k % 2:
            label = np.repeat(np.repeat(label, 2, axis=0), 3, axis=1)
        found = connected_components(label)
        assert found.dtype == np.int32 and np.array_equal(found, flood_fill(label))


@pytest.mark.parametrize("turn", range(4))
def test_components_of_a_spiral_and_a_comb(turn):
    """Shapes whose runs are joined late: everything is one component only after the last row."""
    spiral = np.zeros((41, 41), np.uint8)
    y, x, dy, dx, length = 0, 0, 0, 1, 40
    while length > 1:
        for _ in range(2):
            for _ in range(length):
                spiral[y, x] = 3
                y, x = y + dy, x + dx
            dy, dx = dx, -dy
        length -= 2
    comb = np.zeros((30, 41), np.uint8)
    comb[:, ::2] = 1
    comb[-1] = 1
    for label in (spiral, comb):
        label = np.rot90(label, turn)
        assert np.array_equal(connected_components(label), flood_fill(label))


def test_components_edge_cases_and_speed():
    assert connected_components(np.zeros((0, 5), np.uint8)).shape == (0, 5)
    assert not connected_components(np.zeros((4, 5), np.int64)).any()
    assert (connected_components(np.full((4, 5), 2)) == 1).all()
    assert connected_components(np.array([[1, 0], [0, 1]])).max() == 1, "corners connect"
    assert connected_components(np.array([[1, 2], [2, 1]])).max() == 2
    assert connected_components(np.array([[0, 0, 1], [1, 0, 0]])).max() == 2, "the end of a row"
    with pytest.raises(AssertionError, match="found"):
        connected_components(np.zeros((1, 4, 4)))
    x = np.arange(6200)
    label = np.add.outer(np.sin(x / 70), np.sin(x / 90)) > 0.2
    assert connected_components(label).max() > 100


def test_outlines_are_the_inverse_of_rasterisation():
    rng = np.random.default_rng(2)
    for _ in range(120):
        height, width = rng.integers(1, 20, 2)
        mask = rng.random((height, width)) < rng.uniform()
        polygons = outlines(mask)
        assert len(polygons) == connected_components(mask).max()
        assert np.array_equal(sum([rasterize(rings, height, width).astype(int) for rings in polygons],
                                  np.zeros((height, width), int)), mask.astype(int))
        assert sum(polygon_area(rings) for rings in polygons) == mask.sum()
    [[outer, hole]] = outlines(rasterize(box(1, 1, 8, 7), 9, 9) & ~rasterize(box(3, 3, 5, 5), 9, 9))
    assert len(outer) == len(hole) == 4 and set(map(tuple, outer)) == {(1, 1), (8, 1), (8, 7), (1, 7)}


def four_neighbours(mask):
    """Components of 4 neighbours: every pixel takes the smallest number around it until nothing changes."""
    number = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(np.where(mask, number, mask.size + 1), 1, constant_values=mask.size + 1)
        around = np.min([padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2],
                         padded[1:-1, 2:]], axis=0)
        if np.array_equal(np.where(mask, around, 0), number):
            return number
        number = np.where(mask, around, 0)


def test_outlines_without_corners_are_valid_polygons_of_four_neighbours():
    """No ring passes a point twice, holes lie in their own component, every component is one polygon."""
    rng = np.random.default_rng(3)
    for _ in range(150):
        mask = rng.random(rng.integers(1, 20, 2)) < rng.uniform()
        number = four_neighbours(mask)
        components = connected_components(mask, corners=False)
        assert len(set(zip(number[mask], components[mask]))) == len(set(number[mask])) == components.max()
        polygons = outlines(mask, corners=False)
        found = []
        for rings in polygons:
            assert all(len(set(map(tuple, ring))) == len(ring) for ring in rings)
            inside = rasterize(rings, *mask.shape)
            assert len(set(number[inside])) == 1 and polygon_area(rings) == inside.sum()
            # Outline and holes one by one: holes are disjoint parts of what the outline alone encloses.
            assert inside.sum() == (rasterize(rings[:1], *mask.shape).sum()
                                    - sum(rasterize([hole], *mask.shape).sum() for hole in rings[1:]))
            found.append(inside)
        assert np.array_equal(np.sum(found, axis=0) if found else mask * 0, mask)
    # A ring of pixels that closes over a corner only, and two pixels that share one.
    [[outer, hole]] = outlines(np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], bool), corners=False)
    assert polygon_area([outer]) == 8 and polygon_area([hole]) == 1
    assert len(outlines(np.eye(2, dtype=bool), corners=False)) == 2 and len(outlines(np.eye(2) > 0)) == 1
