"""Runner "polygons": rasterisation and painting against masks recorded from exact rational arithmetic.

The recorded numbers: verts (n, 2); ring_start and poly_start, which cut them into rings and polygons; mask
and edge, packed bits (polygon, row, column). `edge` marks the centres on an edge, found here by a slow oracle
of its own. The half-open rule is also tested from both sides: turning everything by 180 degrees and back may
change the mask on `edge` only.
"""

from fractions import Fraction

import numpy as np
from her2.polygons import paint


def rasterize(rings, height, width):
    """The pixels of one polygon: bool (height, width)."""
    return paint([rings], [1], height, width)[0] == 1


def centres_on_edges(rings, height, width):
    """bool (height, width): centres exactly on an edge of any ring. Fractions decide the close ones."""
    on = np.zeros((height, width), bool)
    xc, yc = np.arange(width) + 0.5, np.arange(height) + 0.5
    for ring in rings:
        for (x1, y1), (x2, y2) in zip(ring.tolist(), np.roll(ring, -1, axis=0).tolist()):
            rows = np.flatnonzero((yc >= min(y1, y2)) & (yc <= max(y1, y2)))
            if y1 == y2:
                on[np.ix_(rows, (xc >= min(x1, x2)) & (xc <= max(x1, x2)))] = True
                continue
            x = x1 + (yc[rows] - y1) / (y2 - y1) * (x2 - x1)
            columns = np.rint(x - 0.5)
            close = np.abs(x - 0.5 - columns) < 1e-9 * max(1, abs(x1), abs(x2))
            close &= (columns >= 0) & (columns < width)
            slope = (Fraction(x2) - Fraction(x1)) / (Fraction(y2) - Fraction(y1))
            for j, i in zip(rows[close].tolist(), columns[close].astype(int).tolist()):
                crossing = Fraction(x1) + (Fraction(2 * j + 1, 2) - Fraction(y1)) * slope
                on[j, i] |= crossing == Fraction(2 * i + 1, 2)
    return on


def polygons(meta, sd, inp, out):
    config = meta["config"]
    height, width = config["H"], config["W"]
    verts = inp["verts"].numpy()
    ring_start, poly_start = inp["ring_start"].tolist(), inp["poly_start"].tolist()
    shapes = [[verts[ring_start[r]:ring_start[r + 1]] for r in range(first, last)]
              for first, last in zip(poly_start, poly_start[1:])]
    mask = np.stack([rasterize(rings, height, width) for rings in shapes])
    edge = np.stack([centres_on_edges(rings, height, width) for rings in shapes])

    size = np.array([width, height], dtype=np.float64)
    for rings, upright, on in zip(shapes, mask, edge):
        opposite = [size - ring for ring in rings]
        if all((size - after == ring).all() for after, ring in zip(opposite, rings)):   # not rounded
            turned = rasterize(opposite, height, width)[::-1, ::-1]
            assert not (upright ^ turned)[~on].any(), "a centre off all edges depends on the direction"

    area = mask.sum(axis=(1, 2))
    ours = {"mask": np.packbits(mask), "edge": np.packbits(edge), "shape": np.array(mask.shape),
            "area": area, "on_edge": edge.sum(axis=(1, 2))}
    if "paint" in config:
        ours["label"] = np.zeros((height, width), np.uint8)
        for k, class_id in zip(config["paint"], config["labels"]):      # in this order, not larger ones first
            ours["label"][mask[k]] = class_id
    if "tool_counts" in out:   # how other libraries draw: drawn, extra, missing; -1 where they cannot
        drawn, extra, missing = np.moveaxis(out["tool_counts"].numpy(), 2, 0)
        drawn = np.where(drawn >= 0, area[:, None] + extra - missing, drawn)   # follows from our area
        ours["tool_counts"] = np.stack([drawn, extra, missing], axis=2)
    # The names of those libraries, and on how many polygons they agree: nothing that we compute.
    ours.update({name: out[name] for name in ("tool_names", "agree", "disagree") if name in out})
    return ours


RUNNERS = {"polygons": polygons, "polygons_big": polygons}    # a few of all kinds; tens of large ones
NETWORKS = []
