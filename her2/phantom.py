"""Procedural HER2 immunohistochemistry with polygon annotations: everything runs without private data.

    python -m her2.phantom --out data/phantom --preset tiny

writes a dataset folder: images/*.png, annotations/* (EXACT JSON for half of the slides, QuPath GeoJSON for
the other half, in the coordinates of the whole slide at LEVEL0), slides.csv and, last, phantom.json with the
settings. The physical model is the same at every preset, in micrometres; presets differ in resolution and
amount. A ROI is a function of (seed, slide, roi) alone, so an interrupted run goes on where it stopped and
ends in the same bytes.

`slides.csv` comes with a split in which the four scores are equally frequent (paper, section 2.1). Subtypes
are not: slides of a higher score hold more tumor, and a slide mixes subtypes around its score. PAPER: Fig. 2
has no numbers that could be read off; the shares of the tumor aimed at are those at which a prototype saw
subtype sampling help (0 .07, 1+ .16, 2+ .24, 3+ .43, and LCIS/DCIS, which has no subtype, .11).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from her2.data_classes import DEFAULT_CLASSES, csv_text
from her2.run_config import Parser
from her2.run_errors import UserError, atomic_write, check_line, command
from her2.phantom_microscope import render
from her2.run_seeds import numpy_generator
from her2.phantom_tissue import draw_style, lay_out

RECIPE = 1         # counts changes of what a seed looks like: older folders are then not "the same"
LEVEL0 = 0.242     # um per pixel of the scanner, in which QuPath keeps its coordinates
SUBTYPE_CLASS, IN_SITU_CLASS = (1, 2, 3, 4), 5    # class ids of the subtypes 0..3, and of LCIS/DCIS

# Shares of the subtypes on a slide of score 0, 1+, 2+, 3+, and how much of the area is tumor there.
MIX = ((0.62, 0.28, 0.10, 0.00), (0.06, 0.70, 0.20, 0.04), (0.02, 0.12, 0.68, 0.18), (0.01, 0.03, 0.10, 0.86))
TUMOR_SHARE = (0.07, 0.13, 0.23, 0.72)


@dataclass(frozen=True)
class Preset:
    um_per_px: float
    size: int                     # pixels per side of a ROI
    rois: int                     # per slide
    slides: tuple[int, int, int]  # train, val, test: multiples of four, one per score


PRESETS = {"tiny": Preset(1.0, 256, 1, (8, 4, 4)), "small": Preset(1.0, 256, 1, (8, 8, 32)),
           "paper": Preset(0.242, 6200, 10, (24, 8, 8))}


def scene_of(preset: Preset, seed: int, slide: int, roi: int):
    """(scene, polygons) of one ROI; polygons: [(class id, (n, 2) vertices in pixels of the image)]."""
    score = slide % 4
    style = draw_style(numpy_generator(seed, "style", slide))
    rng = numpy_generator(seed, "layout", slide, roi)
    scene = lay_out(style, MIX[score], TUMOR_SHARE[score], preset.size * preset.um_per_px, rng, first=score,
                    duct=(slide // 4 + slide + roi) % 4 == 0)
    polygons = []
    for site in [site for site in scene.sites if site.kind in ("tumor", "dcis")]:
        # PAPER: how exactly the annotators drew is not said. A vertex every 12 um, off by about 1 um.
        ring = clip(site.star.polygon(12.0, 1.1, rng) / preset.um_per_px, preset.size)
        if len(ring) >= 3 and np.ptp(ring, axis=0).min() >= 2:
            polygons.append((IN_SITU_CLASS if site.kind == "dcis" else SUBTYPE_CLASS[site.subtype], ring))
    return scene, polygons


def clip(ring: np.ndarray, size: float) -> np.ndarray:
    """The part of a ring (n, 2) within [0, size] squared, side by side (Sutherland and Hodgman 1974)."""
    for axis in (0, 1):
        for limit, sign in ((0.0, 1), (float(size), -1)):
            before, inside = np.roll(ring, 1, axis=0), sign * (ring[:, axis] - limit) >= 0
            crosses = inside != np.roll(inside, 1)                      # the side that ends in this vertex
            with np.errstate(divide="ignore", invalid="ignore"):        # sides along the limit cross nowhere
                at = before + (ring - before) * (limit - before[:, [axis]]) / (ring - before)[:, [axis]]
            ring = np.stack([at, ring], axis=1)[np.stack([crosses, inside], axis=1)]
    return ring


def exact_json(polygons) -> str:
    """Polygons as a dump of EXACT's REST interface: whole pixels of the image, numbered coordinates."""
    results = []
    for k, (class_id, ring) in enumerate(polygons):
        vector = {f"{axis}{n}": round(value) for n, point in enumerate(ring.tolist(), start=1)
                  for axis, value in zip("xy", point)}
        results.append({"id": 1000 + k, "deleted": False, "vector": vector, "annotation_type": {
            "id": class_id, "name": DEFAULT_CLASSES.names[class_id], "vector_type": 5, "closed": True}})
    return json.dumps({"count": len(results), "next": None, "previous": None, "results": results}, indent=1)


def qupath_geojson(polygons, x: float, y: float, downsample: float) -> str:
    """Polygons as QuPath exports them: closed rings in pixels of the whole slide."""
    features = []
    for class_id, ring in polygons:
        points, named = np.round(ring * downsample + (x, y), 2).tolist(), DEFAULT_CLASSES.classes[class_id]
        features.append({
            "type": "Feature", "geometry": {"type": "Polygon", "coordinates": [points + points[:1]]},
            "properties": {"objectType": "annotation",
                           "classification": {"name": named.name, "color": list(named.color)}}})
    return json.dumps({"type": "FeatureCollection", "features": features}, indent=1)


def _row(preset: Preset, slide: int, roi: int) -> dict:
    """One line of slides.csv."""
    name, ending, x, y, downsample = f"slide{slide:02d}", "json", 0, 0, 1
    if (slide + slide // 4) % 2:                        # half of the slides are in QuPath: in the whole slide
        ending, downsample = "geojson", round(preset.um_per_px / LEVEL0, 6)
        x, y = 2000 + roi * int(1.25 * preset.size * downsample), 3000
    return {"image": f"images/{name}_roi{roi}.png", "annotations": f"annotations/{name}_roi{roi}.{ending}",
            "x": x, "y": y, "downsample": downsample, "slide": name,
            "score": DEFAULT_CLASSES.names[SUBTYPE_CLASS[slide % 4]],
            "split": np.repeat(("train", "val", "test"), preset.slides)[slide]}


def make_phantom(out, preset: str = "tiny", seed: int = 0, progress: bool = True) -> Path:
    """Write, finish or find the phantom in the folder `out`, and return it; UserError if it holds another."""
    out, size, path = Path(out), PRESETS[preset], Path(out, "phantom.json")
    settings = {"preset": preset, "seed": seed, "recipe": RECIPE, **asdict(size)}
    begun, done = (json.dumps({"complete": complete, **settings}, indent=1) for complete in (False, True))
    found = path.read_bytes().decode("utf-8", "replace") if path.exists() else None
    if found is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: holds files that are no phantom (no phantom.json); choose a new --out")
    if found not in (None, begun, done):
        raise UserError(f"{out}: holds another phantom than {preset} with seed {seed} ({found[:300]}); "
                        "choose another --out or remove the folder")
    rows = [(slide, roi, _row(size, slide, roi)) for slide, roi in np.ndindex(sum(size.slides), size.rois)]
    lacking = [(slide, roi, row) for slide, roi, row in rows
               if not ((out / row["image"]).exists() and (out / row["annotations"]).exists())]
    if found == done and not lacking and (out / "slides.csv").exists():
        print(f"{out}: complete (phantom {preset}, seed {seed})")
        return out
    atomic_write(path, begun)
    for slide, roi, row in tqdm(lacking, desc="phantom", unit="ROI", disable=not progress):
        scene, polygons = scene_of(size, seed, slide, roi)
        picture = Image.fromarray(render(scene, size.um_per_px, size.size, (seed, slide, roi)))
        annotations = out / row["annotations"]
        atomic_write(annotations, exact_json(polygons) if annotations.suffix == ".json" else
                     qupath_geojson(polygons, row["x"], row["y"], row["downsample"]))
        atomic_write(out / row["image"], lambda file: picture.save(file, format="PNG", compress_level=4))
    atomic_write(out / "slides.csv", csv_text([row for _, _, row in rows]))
    atomic_write(path, done)
    print(f"{out}: done (phantom {preset}, seed {seed}); to look at it: {check_line(out)}")
    return out


def main(argv=None):
    parser = Parser(prog="python -m her2.phantom", description=(__doc__ or "").split("\n\n")[0])
    sizes = ", ".join(f"{name}: {'-'.join(map(str, one.slides))} slides x {one.rois} ROIs of {one.size} px "
                      f"at {one.um_per_px} um" for name, one in PRESETS.items())
    parser.add_argument("--out", default=str(Path("data", "phantom")), help="dataset folder [%(default)s]")
    parser.add_argument("--preset", default="tiny", choices=PRESETS, help=f"{sizes} [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other slides [%(default)s]")
    make_phantom(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    command(main)
