"""The picture of a scene: how much of each dye every point holds, then light through it, then the camera.

    amounts   haematoxylin(y, x), dab(y, x)    from the scene, on a grid finer than the pixels
    light     rgb = glass * 10 ** -(haematoxylin * hv + dab * dv)       Beer-Lambert, `stains.compose`
    camera    average over the pixel, blur of the optics, noise of the sensor, 8 bits

Light is averaged, not dye: a pixel half on a membrane is not the same as a pixel with half the dye.
Bodies of cells are a Voronoi partition by bounded distance: a point belongs to the nearest cell i1 (distance
d1), and lies (d2 - d1) / 2 from the border to the second nearest i2. The membrane is a bell across that
border; whether it is stained at all is a coin thrown once per pair of cells, by hash. Distances are taken in
slightly warped coordinates, which makes borders and nuclei irregular. Everything is a function of position
(the noise of the sensor of the tile), so memory does not grow with the ROI, and tiles fit without seams.
Letters: (h, w) samples of a tile with its halo.
"""

from itertools import product

import numpy as np

from her2.run_seeds import numpy_generator
from her2.stains import DAB, HAEMATOXYLIN, compose, stain_matrix
from her2.phantom_textures import bilinear, ramp, smooth, turned
from her2.phantom_tissue import FAR, MAP_STEP, MARGIN, Scene, fibres

TILE = 512
FINEST = 0.5               # um per sample at most: membranes are about 1.5 um wide
MEMBRANE_WIDTH = 0.80      # um from the border at which the bell of its stain has fallen to 1 / e
WARP = ((7.0, 0.8), (2.6, 0.22))     # (wavelength, amplitude) in um of what bends borders and nuclei
EDGE, EDGE_NUCLEUS = 0.5, 0.45       # um over which a cell ends, and a nucleus
CAP, CAP_WAVES = 1.0, 0.9  # um that cells bulge out of the outline of their site, and how much that varies
SLIT = 0.55                # half-width in um of the slit between neighbours that came apart
SLIT_SHARE, SLIT_DEPTH = 0.35, 0.9   # of borders, times the slide's retraction; of the cell gone there
BROKEN = 0.16              # how far texture moves the line between stained and bare membrane (incomplete: 1+)
UNDER_NUCLEUS = 0.35       # share of the cytoplasm's brown that shows above and below a nucleus
OVER_NUCLEUS = 0.6         # share of a membrane's brown that a nucleus hides


def render(scene: Scene, um_per_px: float, size: int, key: tuple) -> np.ndarray:
    """(size, size, 3) uint8 picture of the scene. `key` makes the sensor noise (see `seeds`)."""
    image = np.empty((size, size, 3), np.uint8)
    for top, left in product(range(0, size, TILE), repeat=2):
        tile = image[top:top + TILE, left:left + TILE]
        rng = numpy_generator(*key, "sensor", top, left)     # by tile: the order of tiles does not matter
        tile[:] = window(scene, um_per_px, top, left, *tile.shape[:2], rng)
    return image


def window(scene, um_per_px, top, left, height, width, rng) -> np.ndarray:
    """The pixels from row `top`, column `left` on, in colour: (height, width, 3) uint8."""
    style = scene.style
    sigma = style.blur / um_per_px                                      # of the optics, in pixels
    halo = int(np.ceil(3 * sigma))                    # pixels around, which the blur eats up again
    fold = max(1, int(np.ceil(um_per_px / FINEST - 1e-9)))              # samples per pixel and side
    ys, xs = (((np.arange((n + 2 * halo) * fold) + 0.5) / fold - halo + start) * um_per_px
              for n, start in ((height, top), (width, left)))
    vectors = stain_matrix(HAEMATOXYLIN + style.hue[0], DAB + style.hue[1])
    rgb = compose(*amounts(scene, ys, xs), style.glass.astype(np.float32), vectors)     # (h, w, 3) in 0..1
    rgb = rgb.reshape(height + 2 * halo, fold, width + 2 * halo, fold, 3).mean(axis=(1, 3))
    kernel = np.exp(-0.5 * (np.arange(-halo, halo + 1) / sigma) ** 2).astype(np.float32)
    kernel /= kernel.sum()                                              # light is neither lost nor made
    rgb = sum(k * rgb[i:i + height] for i, k in enumerate(kernel))      # blur down and across
    rgb = sum(k * rgb[:, i:i + width] for i, k in enumerate(kernel))                    # (height, width, 3)
    rgb += style.noise * 0.6 * rng.standard_normal(rgb.shape, dtype=np.float32)
    return np.clip(np.rint(rgb * 255), 0, 255).astype(np.uint8)


def amounts(scene: Scene, ys, xs) -> tuple[np.ndarray, np.ndarray]:
    """Haematoxylin and DAB on the grid ys x xs (micrometres): two (h, w) float32 arrays."""
    noise, style, ((long, far), (short, near)) = scene.noise, scene.style, WARP
    warp_x, warp_y = (smooth(noise[name], ys, xs, long) * far + smooth(noise[name], ys, xs, short) * near
                      for name in ("warp_x", "warp_y"))
    x = (xs[None] + warp_x).astype(np.float32)                                          # (h, w)
    y = (ys[:, None] + warp_y).astype(np.float32)
    fine, grain = smooth(noise["fine"], ys, xs, 1.0), smooth(noise["grain"], ys, xs, 2.3)
    patchy = smooth(noise["patchy"], ys, xs, 14.0)           # about a cell and a half: what varies in patches

    first, second, d1, d2 = _bodies(scene.cells, x, y, ys, xs)          # (h, w) each
    cell = scene.cells[first] if len(scene.cells) else np.zeros(1, scene.cells.dtype)[first]
    distance = bilinear(scene.distance, (y + MARGIN) / MAP_STEP, (x + MARGIN) / MAP_STEP).astype(np.float32)
    # A body ends where its cap or the outline of its site does, whichever comes first.
    free = np.minimum(cell["reach"] - d1, CAP + CAP_WAVES * patchy - distance)
    body = ramp(free, EDGE)                                                             # (h, w) in 0..1
    border = np.minimum((d2 - d1) / 2, np.maximum(free, 0))             # um to the next border of any kind
    nucleus, nucleus_dye = _nuclei(scene, x, y, ys, xs, fine, grain)

    tissue, stroma, stroma_dab = _stroma(scene, ys, xs, x, y, distance, patchy, grain)
    coin = _coin(first, second)                                         # (h, w) in [0, 1)
    bell = np.exp(-(border / MEMBRANE_WIDTH) ** 2)                      # (h, w) 1 on a border
    # Some neighbours have come apart: a slit of glass between them. Of the coin's digits other ones decide.
    slit = np.exp(-(border / SLIT) ** 2) * (coin * 7 % 1 < SLIT_SHARE * style.retraction) * ramp(patchy, 0.8)
    body = body * (1 - SLIT_DEPTH * slit)
    inside = body * (1 - nucleus)                                       # cytoplasm
    # `complete` is the share of coins below it: so much of the membrane of a cell is stained at all.
    present = ramp(cell["complete"] + BROKEN * patchy + BROKEN * grain - coin, 0.12)
    # Stain varies by factors, hence the exponentials; the last term keeps their mean near 1.
    membrane = cell["membrane"] * bell * present * np.exp(0.38 * fine + 0.30 * grain - 0.1)
    brown = cell["brown"] * np.exp(0.30 * fine + 0.32 * grain + 0.2 * patchy - 0.12)
    # Chromogen also settles along free edges of tissue, where it says nothing about HER2.
    settled = style.rim * (cell["membrane"] > 0) * ramp(0.35 - tissue, 0.3) * ramp(1.5 - free, 1.0)
    dab = body * membrane * (1 - OVER_NUCLEUS * nucleus)
    dab = dab + (inside + UNDER_NUCLEUS * nucleus * body) * brown + body * settled
    dab = dab + (1 - body) * stroma_dab + _smears(scene, x, y, ys, xs, fine)
    plasma = cell["cytoplasm"] * (1 + 0.28 * grain + 0.2 * fine) + cell["wall"] * bell
    haematoxylin = (1 - body) * (1 - nucleus) * stroma + inside * plasma + nucleus_dye
    return np.maximum(haematoxylin, 0) * style.haematoxylin, np.maximum(dab, 0) * style.dab


def _windows(ys, xs, y, x, reach):
    """(k, the part of a tile within `reach` of point k) for each of the points that has one."""
    rows, columns = (np.searchsorted(axis, (at - reach, at + reach)) for axis, at in ((ys, y), (xs, x)))
    for k in np.flatnonzero((rows[0] < rows[1]) & (columns[0] < columns[1])):
        yield k, (slice(*rows[:, k]), slice(*columns[:, k]))


def _bodies(cells, x, y, ys, xs):
    """Nearest and second nearest cell of every sample, and the distances: int32 and float32 (h, w)."""
    first, second = np.zeros((2, *x.shape), np.int32)
    d1, d2 = np.full((2, *x.shape), FAR, np.float32)
    for k, w in _windows(ys, xs, cells["y"], cells["x"], 2.1 * cells["reach"]):
        c = cells[k]
        u, v = turned(x[w] - c["x"], y[w] - c["y"], c["angle"])         # along and across its body
        d = np.hypot(u / c["stretch"], v * c["stretch"])
        nearest, nearer = d < d1[w], d < d2[w]                          # takes the first place, or the second
        d2[w] = np.where(nearest, d1[w], np.where(nearer, d, d2[w]))
        second[w] = np.where(nearest, first[w], np.where(nearer, k, second[w]))
        d1[w] = np.where(nearest, d, d1[w])
        first[w] = np.where(nearest, k, first[w])
    return first, second, d1, d2


# By the numbers of cells: a table of cells may grow at its end only, or cells elsewhere change (oracle).
def _coin(first, second) -> np.ndarray:
    """A number in [0, 1) per pair of cells, the same from both sides: bits mixed as in a hash table."""
    low, high = np.minimum(first, second).astype(np.uint32), np.maximum(first, second).astype(np.uint32)
    mixed = low * np.uint32(0x9E3779B1) ^ high * np.uint32(0x85EBCA77)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0xC2B2AE3D)
    mixed ^= mixed >> np.uint32(13)
    return (mixed & np.uint32(0xFFFF)).astype(np.float32) / np.float32(65536)


def _nuclei(scene, x, y, ys, xs, fine, grain):
    """How much of a nucleus covers each sample, and its haematoxylin: two (h, w) arrays."""
    cover, dye = np.zeros((2, *x.shape), np.float32)
    for group in (scene.cells, scene.nuclei):
        longest = group["radius"] * np.sqrt(group["ratio"])             # 0 in fat, of which none is seen
        for k, w in _windows(ys, xs, group["ny"], group["nx"], (longest * 1.3 + 1.5) * (longest > 0)):
            c = group[k]
            long, short = longest[k], c["radius"] / np.sqrt(c["ratio"])
            u, v = turned(x[w] - c["nx"], y[w] - c["ny"], c["tilt"])
            rho = np.hypot(u / long, v / short)                         # 1 on the border of the ellipse
            alpha = ramp((1 - rho) * short, EDGE_NUCLEUS)
            # An open nucleus has a dark rim, a pale middle with clumps and one or two nucleoli.
            profile = 1 + c["open"] * (0.42 * ramp(rho - 0.78, 0.2) - 0.22)
            profile = profile + (0.12 + 0.22 * c["open"]) * grain[w]
            for turn in (0.3, 0.62)[:1 + k % 2]:
                spot = np.array([np.cos(k * 2.4 + turn * 9), np.sin(k * 2.4 + turn * 9)]) * turn * short
                nucleolus = np.exp(-((u - spot[0]) ** 2 + (v - spot[1]) ** 2) / 0.7)
                profile = profile + 0.75 * c["open"] * nucleolus
            stain = alpha * c["nucleus"] * np.maximum(profile + 0.10 * fine[w], 0.25)
            dye[w] = np.maximum(dye[w], stain)     # overlapping nuclei do not add up: one lies in the section
            cover[w] = np.maximum(cover[w], alpha)
    return cover, dye


def _stroma(scene, ys, xs, x, y, distance, patchy, grain):
    """What lies outside the cells: (how much tissue there is, its haematoxylin, its DAB), (h, w) each."""
    noise, style = scene.noise, scene.style
    owner = scene.owner[cell_of(y), cell_of(x)]                                       # (h, w), -1 = none
    table = [(s.cleft, *s.fill, s.kind not in ("histiocytes", "lymphocytes"), s.debris) for s in scene.sites]
    table = np.array([*table, (0,) * 5], np.float32)    # the last row, -1, for where no site is near
    cleft, fill_h, fill_d, hollow, debris = np.moveaxis(table[owner], -1, 0)            # (h, w) each

    streaks, tissue, _ = fibres(noise, style, scene.edge, ys, xs, distance, owner)
    tissue = tissue * ramp(distance - cleft * ramp(patchy + 0.4, 0.7), 0.6) ** (cleft > 0)
    dye = style.stroma * (1 + 0.33 * style.fibre * streaks + 0.18 * grain + 0.20 * patchy)
    within = ramp(-distance, 0.7) * hollow                              # (h, w) lumens
    texture = np.maximum(1 + (0.25 + 0.6 * debris) * grain + 0.3 * patchy * debris, 0)
    haematoxylin = tissue * np.maximum(dye, 0.02) * (1 - within) + within * fill_h * texture
    dab = tissue * (1 - within) * 0.25 * style.breath + within * fill_d * texture
    return tissue * (1 - within), haematoxylin, dab


def cell_of(position) -> np.ndarray:
    """Index into the coarse maps: the nearest node."""
    return np.rint((position + MARGIN) / MAP_STEP).astype(np.int32)


def _smears(scene, x, y, ys, xs, fine) -> np.ndarray:
    """Brown that has nothing to do with HER2: smears of chromogen and granules of pigment."""
    dab = np.zeros(x.shape, np.float32)                                 # (h, w)
    for k, w in _windows(ys, xs, scene.smears[:, 2], scene.smears[:, 1], 2.2 * scene.smears[:, 3]):
        granular, sx, sy, radius, amount = scene.smears[k]
        spread = np.exp(-((x[w] - sx) ** 2 + (y[w] - sy) ** 2) / (0.6 * radius) ** 2)
        texture = 2.2 * ramp(fine[w] - 1.1, 0.3) if granular else 0.35 * np.exp(0.4 * fine[w])
        dab[w] += amount * spread * texture
    return dab
