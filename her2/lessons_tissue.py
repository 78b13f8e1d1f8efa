"""Lessons of Saturday morning: tissue, dyes, labels, and what of them a network sees (see `lessons`)."""

import tempfile
from functools import lru_cache
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from her2 import relabel as relabelling
from her2.data_classes import DEFAULT_CLASSES as CLASSES
from her2.data_folder import load_dataset
from her2.data_patches import PatchSampler
from her2.draw import BLUE, GREY, INK, ORANGE, PALE, VERMILION, Canvas, colorize, save_png, tint, to_uint8
from her2.draw_axes import plot
from her2.phantom import PRESETS, scene_of
from her2.phantom_microscope import render
from her2.phantom_tissue import draw_style, lay_out
from her2.polygons import connected_components, paint
from her2.run_seeds import generator, numpy_generator
from her2.stains import STAINS, compose, deconvolve, optical_density, stain_jitter, white_point


@lru_cache(maxsize=None)
def region(score: int):
    """A phantom region of 256 x 256 um at 1 um: image (256, 256, 3) uint8, label and instance (256, 256)."""
    scene, found = scene_of(PRESETS["tiny"], 0, score, 0)
    scene.style.noise = 0.003           # of the camera: a calm picture is a small file
    rings, ids = [[ring] for _, ring in found], [class_id for class_id, _ in found]
    return render(scene, 1.0, 256, (score,)), *paint(rings, ids, 256, 256)


def ink(values) -> np.ndarray:
    """(H, W) from 0, white, to 1, black -> uint8."""
    return (255 - 255 * np.asarray(values).clip(0, 1)).round().astype(np.uint8)


def specimens(kind: str, subtype: int):
    """Yields image (192, 192, 3) at 0.5 um and inside (192, 192) bool, with a site of this kind."""
    # One slide for all, with little unspecific brown: the differences are those between the classes.
    style, share = draw_style(numpy_generator("lesson", "style")), 0.02 if kind == "acinus" else 0.3
    style.noise, style.breath, axis = 0.004, 0.05, np.arange(192) / 2
    for attempt in count(1):
        rng = numpy_generator(kind, subtype, attempt)
        scene = lay_out(style, np.eye(4)[subtype], share, 96, rng, subtype, kind == "dcis")
        sites = [s for s in scene.sites if s.kind == kind and max(abs(s.x - 48), abs(s.y - 48)) < 30]
        if sites:
            inside = np.min([s.star.distance(axis[None], axis[:, None]) for s in sites], axis=0) < 0
            yield render(scene, 0.5, 192, (kind, attempt)), inside


def phantom():
    """The HER2 score says how brown (the dye DAB) the membranes of tumor cells are: not at all (0), faint
    (1+), whole but moderate (2+), strong (3+). Tumor still inside its duct (in situ, LCIS/DCIS) is tumor
    without a score, and a lobule, a group of normal glands, is background. One annotated nest is an instance:
    the unit that gets a new score later.
    Exercise: why is 0 the hard one? Look for what tells it from a lobule, then from 3+.
    Answer: brown tells 3+ from a lobule, but not 0: the mean DAB density is {dab[5]:.2f} in lobules,
    {dab[0]:.2f} in nests of 0, {dab[3]:.2f} in 3+. What is left are the size and order of the cells."""
    kinds = {f"HER2 {score}": ("tumor", k) for k, score in enumerate(CLASSES.names[1:5])}
    kinds |= {"in situ": ("dcis", 2), "lobule": ("acinus", 0)}
    found = {name: [*islice(specimens(*kind), 6)] for name, kind in kinds.items()}
    dab = [[deconvolve(image, white_point(image))[1][inside].mean() for image, inside in one]
           for one in found.values()]
    pictures = [(name, one[0][0]) for name, one in found.items()]
    return [pictures[:3], pictures[3:]], {"dab": [np.mean(one) for one in dab]}


def relabel():
    """Every tumor instance of a real label map draws a new score, and the model then paints that map. A draw
    does not look at the size of its instance, so each of the five classes gets a fifth of the tumor area on
    average. Drawn per pixel the map is noise that no tissue looks like; per connected component the
    {instances} nests here are only {components}.
    Exercise: narrow the draw to "0" and "3+": predict the shares, and whether they settle sooner.
    Answer: {two[0]:.2f} and {two[1]:.2f} after 600 patches. A share p wanders by sqrt(p (1 - p) sum a^2) /
    sum a over the areas a of the instances: {spread_two:.3f} for a half, {spread:.3f} for a fifth, which is
    later in absolute terms."""
    _, found = scene_of(PRESETS["tiny"], 0, 3, 0)       # its polygons a little larger, so that nests touch
    rings = [[ring.mean(axis=0) + 1.15 * (ring - ring.mean(axis=0))] for _, ring in found]
    label, instance = (torch.tensor(one).long() for one in paint(rings, [c for c, _ in found], 256, 256))
    merged = torch.from_numpy(connected_components((label > 0).numpy()))

    def draw(label, instance, key, allowed=None):
        return relabelling.relabel(label, instance, CLASSES, generator("lesson", key), allowed)[0]

    maps = {"real scores": label, "draw 1": draw(label, instance, 1), "draw 2": draw(label, instance, 2),
            "per pixel": torch.randint(1, 6, label.shape, generator=generator("pixel")) * (label > 0),
            "per component": draw((merged > 0).long(), merged, 0)}
    rng, counts, sizes, pools = numpy_generator("windows"), [], [], (CLASSES.tumor_ids, (1, 4))
    for n in range(600):
        k, y, x = int(rng.integers(4)), *rng.integers(192, size=2)
        window = [torch.tensor(array[y:y + 64, x:x + 64]).long() for array in region(k)[1:]]
        sizes.extend(np.bincount(window[1].ravel())[1:].astype(float))
        counts.append([np.bincount(draw(*window, n, pool).ravel(), minlength=6)[1:] for pool in pools])
    total = np.cumsum(counts, axis=0).swapaxes(0, 1)                                    # (2, 600, 5)
    shares = total / total.sum(axis=-1, keepdims=True).clip(1)
    chart = plot({name: (range(1, 601), one) for name, one in zip(CLASSES.names[1:], shares[0].T)},
                 "share of the tumor area", "patches", (405, 230), "x", y_range=(0, 1),
                 note=(0.2, "1 / 5"), colors=[entry.color for entry in CLASSES.classes[1:]])
    root = np.linalg.norm(sizes) / sum(sizes)
    return [[(name, colorize(one, CLASSES)) for name, one in maps.items()], [chart]], {
        "instances": int(instance.max()), "components": int(merged.max()), "shares": shares[0, -1],
        "two": shares[1, -1, [0, 3]], "spread": 0.4 * root, "spread_two": 0.5 * root}


def stains():
    """Each dye takes away a fixed part of the light, so densities (-log10 of the light that is left) add up:
    three channels are three equations for two dyes and a residual. Laboratories differ in how much dye they
    use, not in its colour, so the jitter of training images changes amounts in density. The same jitter in
    RGB makes colours that no mixture of the dyes has: the mean residual grows from {residual:.3f} to
    {rgb:.3f}, in density to {density:.3f}.
    Exercise: jitter an image whose glass is 220, taking 255 for white: glass comes out at {low:.0f} to
    {high:.0f}. Repair it.
    Answer: divide by the image's own white, jitter, multiply by it again: glass then has density 0, which no
    factor changes, and stays at {mended:.0f}."""
    image = region(2)[0][50:185, 70:205]                                                # (135, 135, 3)
    white = white_point(image)
    haematoxylin, dab = deconvolve(image, white)

    def residual(picture):          # what neither dye explains, (h, w)
        return abs((optical_density(picture, white) @ np.linalg.inv(STAINS))[..., 2])

    def jitter(picture, seed, white=255.0):     # three times the usual strength, no shift
        batch = torch.tensor((picture / white).clip(0, 1) * 2 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
        changed = to_uint8(stain_jitter(batch, generator("jitter", seed), 0.3, 0.0))[0]
        return np.rint(changed * (white / 255)).astype(np.uint8)

    def to_bytes(values):
        return values.clip(0, 255).astype(np.uint8)

    dyes = [("image", image), ("haematoxylin", to_bytes(compose(haematoxylin, 0 * dab))),
            ("DAB", to_bytes(compose(0 * dab, dab))), ("residual, 10 times", ink(10 * residual(image)))]
    density = [jitter(image, k) for k in range(4)]
    rgb = [to_bytes(image * numpy_generator("rgb", k).uniform(0.7, 1.3, 3)) for k in range(4)]
    glass = np.full((8, 8, 3), 220.0)
    seen, mended = ([jitter(glass, k, one).mean() for k in range(20)] for one in (255.0, 220.0))
    return [dyes, [("jitter in density", one) for one in density], [("in RGB", one) for one in rgb]], {
        "residual": residual(image).mean(), "density": np.mean([*map(residual, density)]),
        "rgb": np.mean([*map(residual, rgb)]), "low": min(seen), "high": max(seen), "mended": np.mean(mended)}


def polygons():
    """A pixel belongs to a polygon when its centre does: a ray to the left crosses the outline an odd number
    of times (the row in red). The test is half open, so of two polygons that share an edge every centre goes
    to exactly one. Drawing libraries colour the outline too: Pillow makes the left one of the neighbours
    {extra:.0%} larger.
    Exercise: colour the star by the nonzero rule instead of even-odd: which pixels are added, and why?
    Answer: the {added} in the middle: the outline runs around them twice, which is even, but a winding number
    of 2. Under even-odd a second ring is a hole in whatever direction it was drawn, and annotation tools do
    not agree on directions."""
    angle, side = np.pi / 2 + np.arange(5) * 4 * np.pi / 5, 22
    star = np.stack([6 + 5.7 * np.cos(angle), 6.4 - 5.7 * np.sin(angle)], axis=1)      # crosses itself
    left = np.array([[1, 1], [7.5, 0.5], [4.5, 11.5], [1, 10]])
    right = np.array([[7.5, 0.5], [11.5, 2], [11, 11], [4.5, 11.5]])      # shares an edge with it
    inside, first, second = (paint([[ring]], [1], 12, 12)[0] == 1 for ring in (star, left, right))
    pillow = Image.new("1", (12, 12))
    ImageDraw.Draw(pillow).polygon(list(map(tuple, left.tolist())), fill=1)
    extra = np.array(pillow) & ~first
    (x1, y1), (x2, y2) = star.T, np.roll(star, -1, axis=0).T                            # (5,) each: the edges
    centre = np.arange(12)[:, None] + 0.5                                               # (12, 1) both ways
    crosses = (y1 > centre) != (y2 > centre)                                            # (12, 5): row, edge
    fall = np.where(y1 == y2, np.inf, y2 - y1)                      # (5,); a level edge crosses no row
    x = np.where(crosses, x1 + (centre - y1) / fall * (x2 - x1), np.inf)                # (12, 5): and where
    winding = (np.sign(fall) * (x[:, None] < centre)).sum(axis=-1)  # (12, 12): of edges to the left
    added = (winding != 0) & ~inside

    def panel(fills, *rings):
        canvas = Canvas(12 * side + 2, 12 * side + 2)
        for j, i in np.ndindex(12, 12):
            color = next((tint(color, 0.45) for mask, color in fills if mask[j, i]), "white")
            canvas.rectangle(i * side, j * side, (i + 1) * side, (j + 1) * side, color, PALE)
            canvas.dot((i + 0.5) * side, (j + 0.5) * side, 2, GREY if color == "white" else INK)
        for ring in rings:
            canvas.line(np.concatenate([ring, ring[:1]]) * side, INK, 1.5)
        if rings[0] is star:
            canvas.line([(0, 8.5 * side), (12 * side, 8.5 * side)], VERMILION, 1, dash=(4, 3))
            for cut in x[8, crosses[8]]:
                canvas.diamond(cut * side, 8.5 * side, 5, VERMILION)
        return canvas.array()

    return [[panel([(inside, BLUE)], star), panel([(first, BLUE), (second, ORANGE)], left, right),
             panel([(first, BLUE), (extra, VERMILION)], left)]], {
        "extra": extra.sum() / first.sum(), "added": int(added.sum()), "winding": winding, "inside": inside,
        "both": (left, right), "pixels": (first, second)}


def patches():
    """Where patches are centred decides what a network sees: "tumor" draws any tumor pixel, so large classes
    fill the batch; "subtype" draws a class first, so a rare 0 comes as often as 3+. "uniform" draws any
    place, mostly background. Around tumor, {never:.0%} of this region are in none of 2,000 patches (grey):
    the network may call it anything.
    Exercise: draw a class in proportion to the square root of its area: predict the shares of 0 and 3+.
    Answer: {root[1]:.2f} and {root[4]:.2f}, between {area[1]:.2f} and {area[4]:.2f} by area and 0.20 by
    class: a rare class drawn as often as the others shows the same few nests again and again."""
    y, x = np.mgrid[:256, :256]
    discs = ((1, 60, 50, 14), (2, 110, 90, 18), (3, 50, 110, 24), (4, 120, 170, 44), (5, 200, 60, 20))
    label = sum(c * (np.hypot(y - cy, x - cx) < r) for c, cy, cx, r in discs).astype(np.uint8)
    pictures, never = [], {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:     # mapped files are open
        save_png(Path(folder, "image.png"), colorize(label, CLASSES))
        save_png(Path(folder, "mask.png"), label)
        Path(folder, "slides.csv").write_text("image,mask,slide,split\nimage.png,mask.png,a,train\n")
        dataset = load_dataset(folder, require=("train",))
        for mode in ("tumor", "subtype", "uniform"):
            sampler = PatchSampler(dataset, "train", 48, mode, cache=folder)
            corners = [sampler.place(numpy_generator("place", k))[1:] for k in range(2000)]
            seen, picture = np.zeros((256, 256), bool), colorize(label, CLASSES) // 2 + 127
            for top, left in corners:
                seen[top:top + 48, left:left + 48] = True
            picture[~seen] = GREY
            for top, left in corners[:500]:
                picture[top + 23:top + 25, left + 23:left + 25] = INK
            never[mode] = 1 - seen.mean()
            pictures.append((f"{mode}: {never[mode]:.0%} never seen", picture))
    area = np.bincount(label.ravel(), minlength=6) * (np.arange(6) > 0)
    return [pictures], {"never": never["tumor"], "never_uniform": never["uniform"], "label": label,
                        "area": area / area.sum(), "root": np.sqrt(area) / np.sqrt(area).sum()}
