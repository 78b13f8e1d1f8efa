"""What lies where in one region of interest (ROI): nests, ducts, fat, stroma.

Order of events. (1) Sites (tumor nests, ducts, lobules, fat, ...) are placed with a size each, nests close
to each other, so that they squeeze one another into sheets with septa between them. (2) Each site gets an
outline: a wobbly ellipse, cut where its neighbours begin. (3) `phantom_cells` fills them. (4) Two coarse maps
(signed distance to the next site, direction of the fibres) carry the stroma.

Only a tumor site has a HER2 subtype, 0 to 3 (for 0, 1+, 2+, 3+). LCIS/DCIS, a tumor class of its own, has a
hidden one: it is stained like tumor of its slide, but its label does not tell. Everything else is background,
however much it looks like tumor: lobules (groups of small acini with nuclei like those of tumor) make subtype
0 hard. All lengths are micrometres, after photographs at 40x.
"""

from collections import namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from her2.phantom_cells import hollow, site_cells, stroma_nuclei
from her2.phantom_textures import PERIOD, Star, ramp, smooth, squeeze, stretched, turned, wobbly_radii

MARGIN = 45.0      # tissue is laid out this far beyond the ROI, so that its border cuts through nests
MAP_STEP = 2.0     # grid of the coarse maps
FAR = 60.0         # the distance map ends here
SMALLEST_NEST = 15.0   # mean radius; what neighbours squeeze below it disappears
# Added to the vectors of haematoxylin and DAB (rows): towards blue, towards yellow.
TOWARDS = np.array([[1.0, -1.0, 0.0], [-0.5, -1.0, 0.4]])
FIELDS = ("warp_x", "warp_y", "fine", "grain", "slow", "patchy", "fibre", "loose")


# rate: number per mm^2 (of tumor and in situ the wanted area decides); smallest, largest: radius; wobble: of
# the outline, as a share of the radius; aspect: spread of the logarithm of length / width; gap to neighbours.
# Nests are of any size and shape; an in-situ lesion is a duct blown up from inside: round and smooth.
Kind = namedtuple("Kind", "rate smallest largest wobble aspect gap")
KINDS = {"tumor":       Kind(0, 24, 95, 0.22, 0.50, 7),   "dcis": Kind(0, 38, 62, 0.04, 0.08, 14),
         "duct":        Kind(11, 15, 32, 0.07, 0.20, 12), "lobule": Kind(8, 30, 52, 0.10, 0.20, 10),
         "histiocytes": Kind(4, 20, 42, 0.18, 0.30, 6),   "lymphocytes": Kind(7, 14, 36, 0.22, 0.40, 6),
         "fat":         Kind(6, 40, 75, 0.12, 0.30, 4),   "vessel": Kind(12, 7, 14, 0.08, 0.30, 8)}


def draw_style(rng: np.random.Generator) -> SimpleNamespace:
    """What all ROIs of one slide share. The spreads are such that subtype effects still stand out of the
    differences between slides: twice as wide, false positives on unseen slides drowned them."""
    normal, uniform = rng.standard_normal, rng.uniform
    thickness = np.exp(0.06 * normal())                     # a thicker section holds more of both dyes
    return SimpleNamespace(
        haematoxylin=thickness * np.exp(0.13 * normal()),   # strength of the two stains
        dab=thickness * np.exp(0.13 * normal()),
        # (2, 3) added to their vectors: another batch of dye, another scanner. Photographed dyes are bluer
        # and yellower than the published vectors, by an amount of its own each.
        hue=0.015 * normal((2, 3)) + [[uniform(0.02, 0.10)], [uniform(0.02, 0.13)]] * TOWARDS,
        glass=np.clip([0.95, 0.955, 0.955] + 0.013 * normal(3), 0.88, 0.995),   # (3,) its colour, 0..1
        blur=uniform(0.25, 0.60),                           # standard deviation of the optics
        noise=uniform(0.006, 0.018),                        # of the sensor, 0..1
        breath=float(np.clip(0.065 + 0.035 * normal(), 0.005, 0.16)),   # unspecific DAB of all epithelium
        stroma=0.115 * np.exp(0.22 * normal()),             # haematoxylin of the fibres
        cytoplasm=0.075 * np.exp(0.22 * normal()),
        nucleus_size=np.exp(0.05 * normal()), nucleus_stain=0.41 * np.exp(0.11 * normal()),
        fibre=np.exp(0.25 * normal()),                      # contrast of the fibres
        loose=uniform(-0.4, 0.7),                           # how much glass shows between them
        fat=uniform(0, 1), lymph=uniform(0, 1),
        retraction=uniform(0.15, 0.7),                      # how often nests have shrunk from the stroma
        rim=max(0.0, 0.3 * normal()),                       # DAB that settled along free edges
        flow=uniform(0, np.pi))                             # direction of the fibres


@dataclass
class Site:
    kind: str                                     # a key of KINDS, or "acinus"
    x: float
    y: float
    radius: float
    subtype: int = -1                             # 0..3 for tumor and dcis
    star: Star | None = None
    layers: int = 0                               # of cells, in an acinus
    holes: list = field(default_factory=list)     # (x, y, radius) without cells: lumens
    fill: tuple[float, float] = (0.0, 0.0)        # haematoxylin and DAB of what lies in them
    debris: bool = False                          # necrosis
    cleft: float = 0.0                            # width of the glass around it


@dataclass
class Scene:
    style: SimpleNamespace    # of `draw_style`
    sites: list[Site]
    cells: np.ndarray         # CELL records with a body; their `site` is an index into `sites`
    nuclei: np.ndarray        # CELL records without one; in the stroma `site` is len(sites)
    smears: np.ndarray        # (n, 5) 1 if granular, x, y, radius, DAB: brown that is no staining
    distance: np.ndarray      # coarse map (rows y, columns x from -MARGIN on): distance to the next site
    owner: np.ndarray         # coarse map: that site, -1 = none within FAR
    edge: tuple | None        # edge of the section: x, y, direction beyond which there is glass
    noise: dict               # name of FIELDS -> (PERIOD, PERIOD) normal numbers: one law for the whole ROI


def lay_out(style, mix, tumor_share: float, size: float, rng, first: int = 0, duct: bool = False) -> Scene:
    """One ROI of `size` x `size` um. mix: (4,) shares of the subtypes; tumor_share: of the area; first:
    subtype of the first nest, so that a slide shows its own score; duct: whether an LCIS/DCIS is certain."""
    noise = {name: rng.standard_normal((PERIOD, PERIOD), dtype=np.float32) for name in FIELDS}
    edge = None
    if rng.random() < 0.22:
        angle, offset = rng.uniform(0, 2 * np.pi), size * rng.uniform(0.25, 0.42)
        edge = (size / 2 + np.cos(angle) * offset, size / 2 + np.sin(angle) * offset, angle)
    sites = _place(style, np.asarray(mix, float), tumor_share, size, rng, first, duct, edge)
    x, y, weight = (np.array([getattr(s, name) for s in sites]) for name in ("x", "y", "radius"))
    for k, site in enumerate(sites):                                    # outlines, lumens and clefts
        kind = KINDS[site.kind]
        aspect, angle = np.exp(abs(rng.normal(0, kind.aspect))), style.flow + rng.normal(0, 0.5)
        radii = wobbly_radii(site.radius, kind.wobble, aspect, angle, rng)
        site.star = Star(site.x, site.y, squeeze(radii, k, x, y, weight, kind.gap * rng.uniform(0.8, 1.6)))
        hollow(site, style, rng)
    sites = [s for s in sites if s.kind != "tumor" or s.star.radii.mean() > SMALLEST_NEST]
    sites = [part for site in sites for part in (_acini(site, rng) if site.kind == "lobule" else [site])]
    axis = np.arange(-MARGIN, size + MARGIN + MAP_STEP, MAP_STEP)
    distance, owner = _distance_map(sites, axis)                        # (n, n) each
    _, tissue, across = fibres(noise, style, edge, axis, axis, distance, owner)
    # Fibres run around the next site near it, with the flow elsewhere.
    gradient_y, gradient_x = np.gradient(np.where(distance < 14, distance, across))
    angle = np.arctan2(gradient_y, gradient_x) + np.pi / 2              # (n, n)
    patchy = smooth(noise["patchy"], axis, axis, 45.0)
    parts = [*(site_cells(site, style, rng) for site in sites),
             stroma_nuclei(distance, angle, tissue, axis, patchy, style, rng)]
    records = np.concatenate(parts)
    records["site"] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    body = records["reach"] > 0
    smears = np.zeros((rng.poisson(10 * (size / 1000) ** 2 + 0.4), 5))
    for row in smears:
        row[:] = rng.random() < 0.5, *rng.uniform(0, size, 2), rng.uniform(5, 20), rng.uniform(0.2, 0.9)
    return Scene(style, sites, records[body], records[~body], smears, distance, owner, edge, noise)


def _place(style, mix, tumor_share, size, rng, first, duct, edge) -> list[Site]:
    """Sites with centres and radii. Wanted area is dealt out subtype by subtype, so that small sets have
    all of them; a site that finds no room shrinks, then gives up."""
    sites, extent = [], size + 2 * MARGIN
    wanted, covered = tumor_share * extent ** 2, np.zeros(4)

    def put(kind, radius, subtype=-1, inside=False):
        low, high = (0.22 * size, 0.78 * size) if inside else (-MARGIN, size + MARGIN)
        others = np.array([(s.x, s.y, s.radius, s.kind in ("tumor", "dcis")) for s in sites]).reshape(-1, 4)
        nests = others[others[:, 3] == 1]
        close = {"tumor": 0.80, "dcis": 0.92}.get(kind, 1.0)         # nests may press into each other
        for attempt in range(90):
            if attempt in (30, 60):                # no room: smaller, and again
                radius *= 0.78
            x, y = rng.uniform(low, high, 2)
            if kind == "tumor" and len(nests) and not inside and rng.random() < 0.65:
                # Two of three settle beside another: sheets.
                near, angle = nests[rng.integers(len(nests))], rng.uniform(0, 2 * np.pi)
                away = (near[2] + radius) * rng.uniform(0.85, 1.05)
                x, y = near[0] + away * np.cos(angle), near[1] + away * np.sin(angle)
            if edge and turned(x - edge[0], y - edge[1], edge[2])[0] > -0.8 * radius:
                continue
            room = np.hypot(others[:, 0] - x, others[:, 1] - y) - close * (others[:, 2] + radius)
            if low <= min(x, y) and max(x, y) <= high and room.min(initial=1) > 0:
                sites.append(Site(kind, x, y, radius, subtype))
                return radius
        return 0.0

    def radius_of(kind):
        low, high = KINDS[kind].smallest, min(KINDS[kind].largest, 0.32 * size)
        return float(np.exp(rng.uniform(np.log(min(low, high)), np.log(high))))

    def subtype_of():
        # What lags behind its share comes first; the rest leaves some chance, so that the order is not fixed.
        lack = np.maximum(mix * covered.sum() - covered, 0) + 0.35 * mix * (covered.sum() / 4 + 1)
        return int(rng.choice(4, p=lack / lack.sum()))

    # In situ tumor is stained by its slide's mix (paper, Fig. 1: DCIS of several subtypes), not by its label.
    # Most of it lies on slides of 3+, which hold the most tumor: a median density of .42. Where a new label
    # asks for it, nests of all subtypes alike give way, and the label names no stain: .20, between 1+ and 2+.
    if duct:
        put("dcis", radius_of("dcis"), subtype_of(), inside=True)
    radius = min(radius_of("tumor") * 1.3, np.sqrt(wanted / np.pi) * 0.85, 0.3 * size)
    covered[first] += np.pi * put("tumor", radius, first, inside=True) ** 2
    failures = 0                                                        # full: then less tumor than wanted
    while covered.sum() < wanted and failures < 10:
        kind = "dcis" if rng.random() < 0.13 else "tumor"
        subtype = subtype_of()
        radius = put(kind, radius_of(kind), subtype)
        failures += radius == 0
        covered[subtype] += np.pi * radius ** 2 if kind == "tumor" else 0
    for kind, of in KINDS.items():
        habit = {"fat": 2 * style.fat, "lymphocytes": 2 * style.lymph}.get(kind, 1.0)
        for _ in range(rng.poisson(of.rate * habit * (extent / 1000) ** 2)):
            put(kind, radius_of(kind))
    return sites


def _acini(lobule: Site, rng) -> list[Site]:
    """A lobule becomes a group of small, mostly solid glands."""
    acini = []
    for _ in range(60):
        radius = rng.uniform(11, 18)
        away, angle = (lobule.radius - 0.6 * radius) * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
        x, y = lobule.x + away * np.cos(angle), lobule.y + away * np.sin(angle)
        if all(np.hypot(x - a.x, y - a.y) > 0.92 * (radius + a.radius) for a in acini):
            layers, aspect = int(rng.choice([1, 2, 2])), np.exp(abs(rng.normal(0, 0.2)))
            star = Star(x, y, wobbly_radii(radius, 0.08, aspect, rng.uniform(0, np.pi), rng))
            acini.append(Site("acinus", x, y, radius, star=star, layers=layers))
    return acini


def _distance_map(sites, axis) -> tuple[np.ndarray, np.ndarray]:
    """(n, n) signed distance to the nearest site, clipped at FAR, and the index of that site."""
    distance, owner = np.full((len(axis),) * 2, FAR), np.full((len(axis),) * 2, -1, np.int32)
    for k, site in enumerate(sites):
        reach = site.star.radii.max() + FAR
        rows, columns = (slice(*np.searchsorted(axis, (c - reach, c + reach))) for c in (site.y, site.x))
        d = site.star.distance(axis[None, columns], axis[rows, None])
        closer = d < distance[rows, columns]
        distance[rows, columns][closer] = d[closer]
        owner[rows, columns][closer] = k
    return distance, owner


def fibres(noise, style, edge, ys, xs, distance, owner) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(streaks, tissue, across) on the grid ys x xs: texture of the fibres (mean 0), where there are any
    (0..1), and the coordinate across their flow, a straight direction bent by slow noise. Streaks are noise
    stretched along the flow, and around a site along its outline; where they and slower noise are low, or
    beyond the edge of the section, glass shows."""
    bend = (30 * smooth(noise["slow"], ys, xs, 100.0) + 10 * smooth(noise["patchy"], ys, xs, 37.0)
            + 3.0 * smooth(noise["loose"], ys, xs, 14.0))
    along, across = turned(xs[None], ys[:, None], style.flow)
    across = across + bend
    free = (0.75 * stretched(noise["fibre"], across, along, 1.9, 16.0)
            + 0.45 * stretched(noise["loose"], across, along, 5.0, 55.0)
            + 0.35 * stretched(noise["grain"], across, along, 0.9, 14.0))
    x_plus_y = xs[None] + ys[:, None]
    around = (0.6 * stretched(noise["fibre"], distance, x_plus_y + 40 * owner, 2.0, 30.0)
              + 0.4 * stretched(noise["loose"], distance, x_plus_y + 40 * owner, 4.5, 60.0))
    ring = ramp(10 - distance, 6)                             # collagen lies around a site within about 10 um
    streaks = free * (1 - ring) + around * ring                                         # (h, w)
    slow = smooth(noise["slow"], ys, xs, 34.0) + 0.45 * smooth(noise["patchy"], ys, xs, 14.0)
    tissue = ramp(0.42 * streaks + 0.85 * slow + 1.25 + 0.5 * ring - style.loose, 0.4)
    if edge:
        beyond, _ = turned(xs[None] - edge[0], ys[:, None] - edge[1], edge[2])
        tissue = tissue * ramp(-beyond - 9 * smooth(noise["patchy"], ys, xs, 14.0), 1.5)
    return streaks, tissue, across
