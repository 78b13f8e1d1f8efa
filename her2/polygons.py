"""From polygons to labels and back: exact rasterisation, painter's order, connected components.

Rule. Pixel (row j, column i) covers [i, i+1) x [j, j+1). It belongs to a polygon when its centre (xc, yc) is
inside by the even-odd rule: a ray from there to the right crosses an odd number of the edges (x1, y1) to
(x2, y2) of all rings. In exact arithmetic, and as a slow loop in the tests, it crosses those with

    (y1 > yc) != (y2 > yc)   and   xc < x1 + (yc - y1) / (y2 - y1) * (x2 - x1)

The ray test is half-open: a centre on a left or upper edge is in, on a right or lower edge out. So polygons
that share an edge share no pixel and leave none out. Drawing libraries colour the outline as well.

How. In a row, a crossing at x toggles the pixels 0 .. n-1, n = ceil(x - 1/2) being the number of centres to
its left. A ring is closed and crosses a row an even number of times, so toggling the pixels from n on is the
same: the sorted n of a row bound the runs of pixels inside. All crossings of all edges are one array.

Rounding decides wrongly where x falls on a centre, and it often does: every edge at 45 degrees between whole
pixels runs through centres. Crossings nearer to a centre than the rounding error are therefore computed
again in exact arithmetic: whole numbers where the vertices are multiples of 1/256, else fractions.

Source: paper, section 2.1 (polygon annotations); it leaves rule and order open, see PAPER below.
Letters: H, W the image; h, w the part of it under the polygon; E edges; C crossings; F flips; R runs.
"""

import math
from fractions import Fraction

import numpy as np

CHUNK = 1 << 20   # crossings handled at once: bounds the memory of a polygon of very many edges
LATTICE = 256     # vertices on multiples of 1/256 pixel are exact in int64 up to
LATTICE_MAX = 2.0 ** 21  # this coordinate: products of two differences stay below 2^62


def _as_arrays(rings):                     # list of (n, 2) float64
    rings = [np.asarray(ring, dtype=np.float64) for ring in rings]
    for ring in rings:
        assert ring.ndim == 2 and ring.shape[1] == 2, f"a ring is an (n, 2) array of x, y; found {ring.shape}"
        assert np.isfinite(ring).all(), f"a ring of {len(ring)} points holds a coordinate that is not finite"
    return rings


def _centres_left(edges, rows):
    """(C,) float: ceil(x - 1/2), exactly; x is where edges[k] (C, 4) meets the centres of rows[k] (C,)."""
    x1, y1, x2, y2 = edges.T
    with np.errstate(over="ignore", invalid="ignore"):
        x = x1 + (rows + 0.5 - y1) / (y2 - y1) * (x2 - x1) - 0.5
        n = np.ceil(x)                                                # (C,) right, but where near a centre
        # The roundings above are worth at most 13 x 1.1e-16 of the larger coordinate; this is 700 times that.
        tolerance = 1e-12 * np.maximum(1.0, np.maximum(np.abs(x1), np.abs(x2)))
        near = np.flatnonzero(~(np.abs(x - np.rint(x)) > tolerance))  # an overflow to NaN counts as near
    if near.size == 0:
        return n

    scaled = edges[near] * LATTICE
    whole = (scaled == np.rint(scaled)).all(axis=1) & (np.abs(edges[near]) < LATTICE_MAX).all(axis=1)
    at = near[whole]
    x1, y1, x2, y2 = scaled[whole].astype(np.int64).T
    centre = np.rint(x[at])                                           # the column whose centre is in doubt
    xc = centre.astype(np.int64) * LATTICE + LATTICE // 2
    yc = rows[at] * LATTICE + LATTICE // 2
    # xc < x, without the division: both sides times y2 - y1, which is positive.
    n[at] = centre + ((xc - x1) * (y2 - y1) < (yc - y1) * (x2 - x1))  # + 1: it lies left of the edge
    for k in near[~whole]:
        x1, y1, x2, y2 = map(Fraction, edges[k].tolist())
        n[k] = math.ceil(x1 + (int(rows[k]) + Fraction(1, 2) - y1) / (y2 - y1) * (x2 - x1) - Fraction(1, 2))
    return n


def _flips(rings, height, width):
    """Where the mask changes: slices (rows, columns) of the image around the polygon, (F,) sorted positions.
    Positions count along rows of w + 1, column w standing for all that lies right of the box; every row has
    an even number of them. They are all that is kept of a polygon until it is painted: not its area."""
    pairs = [np.hstack([ring, np.roll(ring, -1, axis=0)]) for ring in rings]
    edges = np.concatenate([np.zeros((0, 4)), *pairs])                  # (E, 4) x1, y1, x2, y2
    down = edges[:, 1] > edges[:, 3]
    edges[down] = edges[down][:, [2, 3, 0, 1]]                     # y1 <= y2: both directions round alike
    # (E,) each: rows first <= j < last cross the edge, none a level one.
    first, last = np.clip(np.ceil(edges[:, [1, 3]] - 0.5), 0, height).astype(np.int64).T
    edges, first, count = edges[last > first], first[last > first], (last - first)[last > first]
    if len(edges) == 0:
        return slice(0, 0), slice(0, 0), np.zeros(0, np.int64)
    x = edges[:, [0, 2]]                                  # (E, 2): no further left or right than its vertices
    left, right = np.clip([np.floor(x.min()), np.ceil(x.max())], 0, width).astype(np.int64).tolist()
    top, bottom, w = int(first.min()), int((first + count).max()), right - left

    flips = np.zeros(0, np.int64)
    # The first edge of each chunk:
    cuts = np.unique(np.searchsorted(np.cumsum(count), np.arange(0, count.sum(), CHUNK), side="right"))
    for a, b in zip(cuts, [*cuts[1:], len(edges)]):
        which = np.repeat(np.arange(a, b), count[a:b])                        # (C,) the edge of each crossing
        before = np.repeat(np.cumsum(count[a:b]) - count[a:b], count[a:b])
        rows = first[which] + np.arange(len(which)) - before                  # (C,) and its row
        n = np.clip(_centres_left(edges[which], rows), left, right).astype(np.int64)
        positions = np.concatenate([flips, (rows - top) * (w + 1) + n - left])
        positions, times = np.unique(positions, return_counts=True)
        flips = positions[times % 2 == 1]                                     # two at one place cancel
    return slice(top, bottom), slice(left, right), flips


def polygon_area(rings) -> float:
    """Square pixels of a polygon, uncut: the first ring less its holes, the others. Either direction."""
    outer, *holes = [abs(_signed_area(ring)) for ring in _as_arrays(rings)] or [0.0]
    return max(0.0, outer - sum(holes))


def _signed_area(ring) -> float:
    x, y = (ring - ring[:1]).T   # relative to a vertex: slide coordinates would cost digits
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def paint(polygons, class_ids, height: int, width: int):
    """Polygons to pixels: (label uint8, instance int32), both (height, width). `polygons` is a list of lists
    of rings, `class_ids` their classes. A ring is an (n, 2) array of x, y in pixels, closed or not (its first
    point again at the end); one of fewer than three points is empty. What lies outside the image is cut off.
    A pixel of several polygons belongs to the one painted last: larger ones are painted first, equal ones in
    input order, so that an island drawn inside a nest stays visible. The instance of polygon k is k + 1, and
    0 where the label is 0: a background polygon cuts a hole."""
    # PAPER: EXACT has no holes, and the paper does not say how nested polygons were read; this order is ours.
    assert len(polygons) == len(class_ids), f"{len(polygons)} polygons but {len(class_ids)} class ids"
    assert all(0 <= c <= 255 for c in class_ids), f"class ids must fit 8 bits, found {sorted(set(class_ids))}"
    polygons = [_as_arrays(rings) for rings in polygons]
    outlines = [_flips(rings, height, width) for rings in polygons]
    sizes = [_size(rings, flips) for rings, (_, _, flips) in zip(polygons, outlines)]
    label, instance = np.zeros((height, width), np.uint8), np.zeros((height, width), np.int32)
    for k in sorted(range(len(polygons)), key=lambda k: -sizes[k]):     # keeps ties in input order
        rows, columns, flips = outlines[k]
        h, w = label[rows, columns].shape
        lengths = np.diff(flips, prepend=0, append=h * (w + 1))
        # Runs in turn outside and inside; column w ends each row outside.
        inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(h, w + 1)[:, :w]
        np.copyto(label[rows, columns], class_ids[k], where=inside)
        np.copyto(instance[rows, columns], k + 1 if class_ids[k] else 0, where=inside)
    return label, instance


def _size(rings, flips) -> float:
    """The area that ranks a polygon in the painter's order: polygon_area, unless its outline crosses itself.
    The shoelace sum of a figure of eight is the difference of its lobes: a large one would be painted last,
    over everything. A simple outline holds fewer centres than its area + its length (Jarnik 1925); one that
    holds more crosses itself, and its centres are counted instead."""
    length = sum(float(np.hypot(*(np.roll(ring, -1, axis=0) - ring).T).sum()) for ring in rings)
    area, centres = polygon_area(rings), int((flips[1::2] - flips[::2]).sum())
    return centres if centres > area + length + 1 else area


def connected_components(label: np.ndarray, corners: bool = True) -> np.ndarray:
    """Instances of a label map that has none: int32 (H, W), 0 where label is 0, else 1, 2, ... as read. Two
    pixels of one class are connected when they touch, `corners` included (8 neighbours) or not (4). Joins
    runs, the maximal stretches of one class in a row: there are hundreds of times fewer than pixels."""
    assert label.ndim == 2, f"label is (H, W), found {label.shape}"
    width = label.shape[1]
    flat = np.pad(label, ((0, 0), (0, 1))).reshape(-1)                  # every row ends in a background pixel
    begins = np.ones(flat.size, bool)                                   # the first pixel of each run
    begins[1:] = flat[1:] != flat[:-1]
    starts, touching = np.flatnonzero(begins), []                       # (R,) where the runs begin
    # To the pixel below, or also to those left and right of it. One pixel of a contact is enough: the first,
    # in which one of the two runs begins.
    for step in (width, width + 1, width + 2) if corners else (width + 1,):
        same = (flat[:-step] == flat[step:]) & (flat[step:] != 0)
        at = np.flatnonzero(same & (begins[:-step] | begins[step:]))
        touching.append([at, at + step])
    a, b = np.searchsorted(starts, np.concatenate(touching, axis=1), side="right") - 1  # the runs to join
    tissue = flat[starts] != 0                                          # (R,) runs that are not background
    root = np.arange(len(tissue))                                       # (R,) each a set of its own
    # Every round hangs the larger root of each pair below the smaller one, then all point to their roots.
    while len(a):
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root[root] != root).any():                               # paths halve every time
            root = root[root]
        a, b = root[a], root[b]
        a, b = a[a != b], b[a != b]
    ids = np.zeros(len(tissue), np.int32)                               # (R,) 0: background
    ids[tissue] = np.unique(root[tissue], return_inverse=True)[1].reshape(-1) + 1   # its root: its first run
    return np.repeat(ids, np.diff(starts, append=flat.size)).reshape(-1, width + 1)[:, :-1].copy()


def outlines(mask: np.ndarray, corners: bool = True) -> list:
    """The way back: polygons (lists of rings, the outer one first) that hold exactly the pixels of a mask.
    `mask` is bool (H, W); there is one polygon per connected component, of 8 neighbours, or of 4 without
    `corners`: no ring passes a point twice then, as other programs demand of a valid polygon. Rings run along
    pixel borders with the inside on the right hand; only corners are kept. Directions d are clockwise: right,
    down, left, up."""
    height, width = mask.shape
    step, keys = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)]), []       # (4, 2) y, x along d
    number = np.pad(connected_components(mask, corners), 1)             # (H + 2, W + 2), 0 outside the image
    for d, (dy, dx) in enumerate(np.roll(step, 1, axis=0).tolist()):    # the neighbour on the left is outside
        j, i = np.nonzero(mask & (number[1 + dy:height + 1 + dy, 1 + dx:width + 1 + dx] == 0))
        # An edge's key is 4 times the corner where it begins, plus its direction.
        keys.append(((j + (d in (2, 3))) * (width + 1) + i + (d in (1, 2))) * 4 + d)
    keys = np.sort(np.concatenate(keys))                                # (E,)
    corner, d = np.divmod(keys, 4)
    y, x = np.divmod(corner, width + 1)
    here = np.stack([y + (d < 2), x + (d % 3 == 0)], axis=1)          # (E, 2) pixel on the right, in `number`
    ahead = here + step[d]
    own, on_right, on_left = (number[tuple(one.T)] for one in (here, ahead, ahead + step[d - 1]))
    # Where two pixels meet in a corner only, a left turn joins them: both must be of one component.
    turn = np.where(on_left == own, 3, np.where(on_right == own, 0, 1))
    following = np.searchsorted(keys, (corner + step[d] @ (width + 1, 1)) * 4 + (d + turn) % 4).tolist()

    rings, seen = {}, [False] * len(keys)
    for first, component in enumerate(own.tolist()):
        ring, k = [], first
        while not seen[k]:
            seen[k] = True
            ring.append(k)
            k = following[k]
        if ring:
            bend = np.array(ring)[d[ring] != d[np.roll(ring, 1)]]
            rings.setdefault(component, []).append(np.stack([x[bend], y[bend]], axis=1).astype(float))
    return [sorted(part, key=_signed_area, reverse=True) for part in rings.values()]  # holes are negative
