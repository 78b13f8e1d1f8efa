"""The cells of every kind of tissue: where they lie, how large their nuclei are, how they are stained.

A cell is a record of CELL. Its body is the region nearer to it than to any other cell, at most `reach` away
(a Voronoi cell with a cap: free borders come out scalloped, as of real nests), within its site's outline.

HER2 staining of a tumor cell has three parts, all by subtype: the strength of the membrane, the share of it
that is stained at all (incomplete = 1+), and the cytoplasm. PAPER: no numbers exist for these; they were
tuned by eye and by the mean density of DAB inside the polygons (`report_staining`): about .07, .18, .25, .65
for 0, 1+, 2+, 3+. Eight photographs of stained tissue gave .19, .21, .29, 1.1. In both, nests of neighbouring
subtypes overlap, and the pattern tells more than the amount. All lengths are micrometres; dyes are amounts as
in `stains`.
"""

from collections import namedtuple

import numpy as np

from her2.phantom_textures import ramp

# By subtype 0, 1+, 2+, 3+: DAB of the membrane, share of the membrane that has any, DAB of the cytoplasm.
MEMBRANE = np.array([0.0, 0.40, 0.74, 1.9])
COMPLETE = np.array([0.0, 0.38, 0.85, 1.0])
CYTOPLASM = np.array([0.02, 0.095, 0.11, 0.48])

CELL = np.dtype([(name, np.float32) for name in (
    "x", "y", "reach", "stretch", "angle",            # body: its centre, cap, elongation and direction
    "nx", "ny", "radius", "ratio", "tilt", "nucleus",  # nucleus: place, size, shape, haematoxylin
    "open",                                           # 1: vesicular nucleus with visible nucleoli; 0: dense
    "cytoplasm", "brown", "membrane", "complete",      # haematoxylin; DAB of cytoplasm and membrane
    "wall",                                           # haematoxylin of the cell border
    "site")])                                         # number of the site that it belongs to

NEST_SPREAD = 0.20                            # of the strength between nests, as a logarithm
UNEVEN = (0.0, 0.34, 0.27, 0.13)              # the same between neighbours: 1+ and 2+ are patchy, 3+ is not
PATCH_WAVES = 2 / 28                          # per um: patches of 3 or 4 cells


# pitch: from cell to cell; jitter of the lattice, as a share of half the pitch; radius of a nucleus; spread:
# of that radius, as a logarithm; aspect: spread of the logarithm of length / width; stain, cytoplasm: factors
# to the slide's haematoxylin of nuclei and of cytoplasm; wall: haematoxylin of the cell border; lining: depth
# and spacing of thin dark nuclei around (myoepithelium of ducts, fibroblasts of septa); gaps: share missing.
# Tumor nuclei are larger, farther apart and less alike than those of normal glands; acini come near them.
Epithelium = namedtuple("Epithelium", "pitch jitter radius spread aspect stain cytoplasm wall lining gaps",
                        defaults=[None, 0.025])     # of the last two
EPITHELIUM = {"tumor":       Epithelium(12.6, 0.44, 3.95, 0.14, 0.17, 1.00, 1.0, 0.05, (-4.0, 30)),
              "dcis":        Epithelium(12.0, 0.38, 3.85, 0.13, 0.15, 1.00, 1.0, 0.05, (-2.2, 15)),
              "duct":        Epithelium(9.6, 0.26, 3.35, 0.09, 0.24, 1.12, 1.0, 0.06, (-2.2, 13)),
              "acinus":      Epithelium(10.0, 0.28, 3.60, 0.10, 0.15, 1.06, 1.0, 0.06, (-2.2, 15)),
              "histiocytes": Epithelium(14.5, 0.36, 3.10, 0.12, 0.18, 0.95, 0.6, 0.04, gaps=0.18),
              "fat":         Epithelium(44.0, 0.26, 0.00, 0.00, 0.00, 0.00, 0.0, 0.20)}


def hollow(site, style, rng) -> None:
    """Lumens, what fills them, and the cleft of a site that has its outline."""
    inner = site.star.radii.min()                                   # um from the middle to the nearest border

    def lumen(smallest, largest):                                   # a round one somewhere in the middle
        radius, away = rng.uniform(smallest, largest), inner * 0.55 * np.sqrt(rng.random())
        angle = rng.uniform(0, 2 * np.pi)
        return site.x + away * np.cos(angle), site.y + away * np.sin(angle), radius

    if site.kind == "tumor":
        site.cleft = rng.uniform(1.5, 6) if rng.random() < style.retraction else 0.0
        if rng.random() < 0.3:  # gland-like spaces in the nest
            site.holes = [lumen(7, 12) for _ in range(rng.integers(1, 4))]
    elif site.kind == "dcis":
        kind = rng.random()
        if kind < 0.35:    # comedo: dead cells in the middle
            site.holes, site.debris, site.fill = [(site.x, site.y, inner * 0.5)], True, (0.10, 0.10)
        elif kind < 0.75:  # cribriform: several punched-out lumens
            site.holes = [lumen(8, 13) for _ in range(rng.integers(2, 6))]
            site.fill = (0.02, 0.01)
    elif site.kind == "duct":
        site.fill = rng.uniform(0, 0.06), rng.uniform(0, 0.03)
    elif site.kind == "vessel":
        site.fill = 0.02, rng.choice([0.0, 0.06])


def hexagons(x, y, radius, pitch, jitter, rng) -> np.ndarray:
    """(n, 2) jittered hexagonal lattice over a square around (x, y), at a random angle."""
    k = np.arange(-int(1.5 * radius / pitch) - 2, int(1.5 * radius / pitch) + 3)
    i, j = np.meshgrid(k, k)
    points = np.stack([i + 0.5 * (j % 2), j * 0.866], axis=-1).reshape(-1, 2) * pitch
    points += rng.normal(0, jitter * 0.5 * pitch, points.shape).clip(-0.45 * pitch, 0.45 * pitch)
    angle = rng.uniform(0, np.pi)                                       # no direction of the image shows
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return points @ turn + (x, y)                                       # (n, 2)


def _apart(points, least: float) -> np.ndarray:
    """Points (n, 2) pushed off those nearer than `least`, twice, half of the way each: nuclei do not fuse."""
    for _ in range(2):
        away = points[:, None] - points[None]                                           # (n, n, 2)
        gap = np.maximum(np.hypot(away[..., 0], away[..., 1]), 1e-3)
        push = np.where((gap < least) & (gap > 1e-3), (least - gap) / gap * 0.25, 0)
        points = points + (push[..., None] * away).sum(axis=1)
    return points


def site_cells(site, style, rng) -> np.ndarray:
    """CELL records of any kind of site: cells with a body, then nuclei without one (reach 0)."""
    if site.kind == "vessel":
        return spindles(site.star.ring(-1.0, 11, rng), style, rng, 2.1)
    if site.kind == "lymphocytes":                                    # they have hardly a body to draw
        points = hexagons(site.x, site.y, site.star.radii.max(), 7.4, 0.5, rng)
        # Dense in the middle, ragged at the rim.
        inside = -site.star.distance(*points.T) / (0.6 * site.radius)
        return round_nuclei(points[inside > rng.random(len(points)) ** 2], 2.75, style, rng)
    kind, star, layers = EPITHELIUM[site.kind], site.star, []           # each layer: (n, 3) x, y, direction
    pitch = kind.pitch * style.nucleus_size * np.exp(0.05 * rng.standard_normal())
    if site.kind in ("duct", "acinus", "dcis"):
        for k in range({"duct": 1 + int(rng.random() < 0.4), "acinus": site.layers, "dcis": 1}[site.kind]):
            layers.append(star.ring((k + 0.55) * pitch * 0.95, pitch * 0.82, rng))
    if site.kind in ("tumor", "dcis", "histiocytes", "fat"):
        points = hexagons(site.x, site.y, star.radii.max(), pitch, kind.jitter, rng)
        core = 1.5 * pitch if site.kind == "dcis" else 0.3 * pitch
        points = _apart(points[star.distance(*points.T) < -core], 0.86 * pitch)
        layers.append(np.column_stack([points, rng.uniform(0, np.pi, len(points))]))
    points = np.concatenate(layers)                                     # (n, 3)
    keep = rng.random(len(points)) > kind.gaps
    for hole_x, hole_y, hole_radius in site.holes:
        keep &= np.hypot(points[:, 0] - hole_x, points[:, 1] - hole_y) > hole_radius
    points, n = points[keep], keep.sum()                                # (n, 3)

    def normal(sd, size=n):                            # size None: one for the whole site
        return np.exp(sd * rng.standard_normal(size))

    cells = np.zeros(n, CELL)
    cells["x"], cells["y"], cells["angle"] = points.T
    cells["reach"] = pitch * (1.5 if site.kind == "fat" else 0.86) * normal(0.07)
    cells["stretch"] = np.clip(normal(0.15), 0.7, 1.4)               # a wider range looks like another tissue
    cells["nx"], cells["ny"] = (points[:, :2] + rng.normal(0, 0.09 * pitch, (n, 2))).T
    # Twice a spread: between sites and, more, between the cells of one.
    cells["radius"] = kind.radius * style.nucleus_size * normal(0.07, None) * normal(kind.spread)
    cells["ratio"] = np.exp(np.abs(rng.standard_normal(n)) * kind.aspect)
    cells["tilt"] = points[:, 2] + np.pi / 2 + rng.normal(0, 0.5, n)       # across the outline, about
    cells["nucleus"] = style.nucleus_stain * kind.stain * normal(0.20)
    cells["cytoplasm"] = style.cytoplasm * kind.cytoplasm * normal(0.15, None) * normal(0.15)
    cells["wall"] = kind.wall
    if site.kind == "fat":
        return cells
    cells["brown"] = style.breath * normal(0.35) * normal(0.3, None)                 # unspecific
    if site.subtype >= 0:
        _stain(cells, site.subtype, rng)
        cells["open"] = np.clip(rng.normal(rng.uniform(0.3, 0.8), 0.2, n), 0, 1)  # by site
    elif site.kind in ("duct", "acinus"):
        cells["open"] = np.clip(rng.normal(0.35, 0.2, n), 0, 1)         # nucleoli of normal glands are small
        if rng.random() < 0.2:  # normal epithelium may carry a faint membrane of its own
            cells["membrane"], cells["complete"] = 0.14, 0.6
    parts = [cells]
    if kind.lining:
        flat = star.ring(*kind.lining, rng)                       # gaps: the plane of the section misses some
        parts.append(spindles(flat[rng.random(len(flat)) < 0.75], style, rng))
    if site.debris:
        x, y, radius = site.holes[0]
        points = (x, y) + rng.normal(0, radius * 0.4, (int(radius ** 2 / 22), 2))
        parts.append(round_nuclei(points, 1.1, style, rng, 1.2))
    return np.concatenate(parts)


def _stain(cells, subtype: int, rng) -> None:
    """HER2 staining of one tumor site: it differs between nests and, in patches, between neighbours."""
    n, nest = len(cells), np.exp(NEST_SPREAD * rng.standard_normal())
    waves = rng.normal(0, PATCH_WAVES, (2, 3)).T                                        # three of (x, y)
    patch = sum(np.cos(cells["x"] * wx + cells["y"] * wy + rng.uniform(0, 6.3)) for wx, wy in waves)
    strength = nest * np.exp(UNEVEN[subtype] * patch + 0.2 * rng.standard_normal(n))    # (n,) of each cell
    cells["membrane"] = MEMBRANE[subtype] * strength
    cells["complete"] = COMPLETE[subtype] + 0.10 * patch * (subtype in (1, 2))
    cells["brown"] += CYTOPLASM[subtype] * strength
    if subtype == 0 and rng.random() < 0.35:
        # A score of 0 allows faint, incomplete membranes in up to a tenth of the cells.
        some = rng.random(n) < 0.07
        cells["membrane"][some], cells["complete"][some] = 0.25, 0.5


def spindles(points, style, rng, radius: float = 2.5) -> np.ndarray:
    """Elongated nuclei at points (n, 3): x, y, direction."""
    nuclei, n = np.zeros(len(points), CELL), len(points)
    nuclei["nx"], nuclei["ny"], nuclei["tilt"] = points.T
    nuclei["tilt"] += rng.normal(0, 0.18, n)
    nuclei["radius"] = radius * np.exp(0.16 * rng.standard_normal(n))
    nuclei["ratio"] = np.exp(rng.uniform(0.45, 1.35, n))                # 1.6 to 3.9 times as long as wide
    nuclei["nucleus"] = style.nucleus_stain * 1.2 * np.exp(0.25 * rng.standard_normal(n))
    nuclei["open"] = rng.uniform(0, 0.4, n)
    return nuclei


def round_nuclei(points, radius: float, style, rng, stain: float = 1.45) -> np.ndarray:
    """Small dense round nuclei (lymphocytes, debris) at points (n, 2)."""
    nuclei, n = np.zeros(len(points), CELL), len(points)
    nuclei["nx"], nuclei["ny"] = points.T
    nuclei["radius"] = radius * np.exp(0.12 * rng.standard_normal(n))
    nuclei["ratio"] = np.exp(np.abs(0.12 * rng.standard_normal(n)))
    nuclei["tilt"] = rng.uniform(0, np.pi, n)
    nuclei["nucleus"] = style.nucleus_stain * stain * np.exp(0.18 * rng.standard_normal(n))
    return nuclei


def stroma_nuclei(distance, angle, tissue, axis, patchy, style, rng) -> np.ndarray:
    """Fibroblasts and single lymphocytes wherever no site lies. distance, angle, tissue: coarse maps (n, n)
    of the distance to the next site, the direction of the fibres and how much of them there is; axis: (n,)
    their coordinates; patchy: (n, n) field that makes the stroma cellular in places."""
    middle, half = (axis[0] + axis[-1]) / 2, (axis[-1] - axis[0]) / 2
    points = hexagons(middle, middle, 1.45 * half, 13.0, 0.62, rng)
    points = points[(np.abs(points - middle) < half).all(axis=1)]       # within the maps
    column, row = np.rint((points - axis[0]) / (axis[1] - axis[0])).astype(int).T
    # More in patches, none in glass.
    density = (0.34 + 0.20 * patchy[row, column]) * ramp(tissue[row, column] - 0.6, 0.3)
    keep = (distance[row, column] > 3.5) & (rng.random(len(points)) < density)  # not in the wall of a site
    points, row, column = points[keep], row[keep], column[keep]
    lymph = rng.random(len(points)) < 0.06 + 0.16 * style.lymph * ramp(patchy[row, column] - 0.8, 0.5)
    fibres = spindles(np.column_stack([points, angle[row, column]])[~lymph], style, rng)
    return np.concatenate([fibres, round_nuclei(points[lymph], 2.7, style, rng)])
