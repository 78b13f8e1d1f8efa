"""Tumor in images that nobody annotated: a trained segmentation network, and polygons back into QuPath.

    python -m her2.predict IMAGES... --model runs/seg --out runs/predictions

IMAGES are image files of any size, folders of them, or dataset folders (slides.csv says where an image lies
in its slide: x, y, downsample). Per image NAME, in the output folder:

    probability/NAME.png   tumor probability p, 8-bit grey: 255 p, rounded
    masks/NAME.png         0 background, 1 tumor: p >= threshold, without specks and holes below --min-area
    overlays/NAME.png      the image, at most 2048 pixels a side, with the mask's outline
    polygons/NAME.geojson  the mask as annotations that QuPath opens: p_slide = p_image * downsample + (x, y)
    predictions.csv        a row per image: tumor share, DAB density in the predicted tumor, polygons, area

A polygon is a component of 4 neighbours: pixels that share only a corner are two polygons, because a ring
that passes a point twice is no valid one. Rasterised by the rule of `polygons`, they give the mask exactly
while --simplify is below 0.5; above, only pixels whose centre is that near to an outline can differ.

The same command again goes on where it stopped; an image that changed is predicted again.
"""

import csv
import io
import json
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from her2 import draw, run, run_config as configuration, run_training
from her2.data_classes import ClassTable, TissueClass, csv_text
from her2.data_images import ENDINGS, read_image, read_size
from her2.data_slides import read_slides
from her2.polygons import outlines, paint, polygon_area
from her2.run_errors import UserError, atomic_write, command
from her2.run_provenance import file_hash
from her2.segmenter import UNet, choose_tiles, predict_roi
from her2.stains import deconvolve, white_point

OVERLAY = 2048      # longest side of an overlay picture
GRID = 1024         # the white point is measured on a grid of at least this many points per side
STRIP = 256         # rows measured at a time: bounds the memory of float64 copies
TUMOR = TissueClass(1, "Tumor", True, False, (200, 0, 0))       # as in QuPath
TISSUE = ClassTable([TissueClass(0, "Background", False, False, (255, 255, 255)), TUMOR])
KINDS = {"probability": ".png", "masks": ".png", "overlays": ".png", "polygons": ".geojson"}
COLUMNS = ["image", "x", "y", "downsample", "tumor_share", "dab_density", "polygons", "area", "sha256"]


@dataclass
class Config(configuration.Tiles):  # device, preset, size and number of the tiles, as in evaluate.py
    model: str = "runs/seg"         # run folder of train_seg.py, or its model.pt
    out: str = "runs/predictions"   # output folder
    threshold: float = 0.5          # probability from which a pixel is tumor
    min_area: int = 64              # pixels; smaller specks are left out, smaller holes are filled
    simplify: float = 0.0           # pixels by which an outline may move to save points


PRESETS = {"tiny": {}, "small": {}, "paper": dict(batch=4)}
# name: where it lies in the folder that was given.
Input = namedtuple("Input", "name path x y downsample", defaults=(0.0, 0.0, 1.0))


def main(argv):
    config, names = configuration.parse(Config, PRESETS, argv, __doc__, "python -m her2.predict", {
        "images": dict(nargs="+", metavar="IMAGES", help="images, or folders that hold them")})
    images = find_images(names, config.out)

    device, precision = run_training.pick_device(config.device, config.amp)
    content, model = run.load_model(config.model, "segmenter"), run.model_file(config.model)
    if not config.tile and not content.get("patch"):
        raise UserError(f"{model}: of an older version, the size of its patches is not in it; give --tile, "
                        "the field patch in the config.json of its run")
    tiles = choose_tiles(config.tile, config.overlap, content.get("patch"))
    network = run.build_model(UNet, content, config.model, device)
    out = run.open_run("her2.predict", config, device, ["-m", "her2.predict", *argv],
                       {"model": {model.name: file_hash(model)}})

    path = out / "predictions.csv"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    rows = {row["image"]: row for row in csv.DictReader(io.StringIO(text))
            if list(row) == COLUMNS and None not in row.values()}       # whole ones
    for image in tqdm(images, desc="predict", unit="image", disable=None):
        files = {kind: out / kind / Path(image.name).with_suffix(end) for kind, end in KINDS.items()}
        row = {"image": image.name, "sha256": file_hash(image.path),
               **{key: f"{getattr(image, key):.12g}" for key in ("x", "y", "downsample")}}
        # Done: the same content at the same place has its row, and the row is written after all files.
        done = row.items() <= rows.get(image.name, {}).items()
        if not done or not all(map(Path.is_file, files.values())):
            rows[image.name] = {**row, **predict(image, files, network, config, tiles, precision, device)}
            atomic_write(path, csv_text([rows[name] for name in sorted(rows)], COLUMNS))
    print(f"done: {path}, {len(images)} images; polygons for QuPath: {out / 'polygons'}")


def find_images(names, out) -> list:
    """The Inputs that the command line names, headers checked. UserError when two would share their files."""
    images, seen = [], {}
    for path in configuration.named_paths(names):
        if (path / "slides.csv").is_file():
            rois, problems, _ = read_slides(path)
            if problems:
                raise UserError(problems[0])
            images += [Input(roi.name, roi.image, roi.x, roi.y, roi.downsample) for roi in rois]
            continue
        # An output folder among the images would be predicted again by the next start.
        files = [path] if path.is_file() else [
            file for file in sorted(path.rglob("*")) if file.suffix.lower() in ENDINGS
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and not file.resolve().is_relative_to(Path(out).resolve())]
        if not files:
            raise UserError(f"{path}: no image there ({', '.join(ENDINGS)}); give images or their folders")
        root = path if path.is_dir() else path.parent
        images += [Input(file.relative_to(root).as_posix(), file) for file in files]
    for image in images:
        read_size(image.path)                   # now, and not after hours of predicting the ones before it
        other = seen.setdefault(str(Path(image.name).with_suffix("")).casefold(), image)
        if other is not image:
            raise UserError(f"{other.path} and {image.path}: their files in {out} would have one name; give "
                            "each a command and an --out of its own")
    return images


def predict(image, paths, network, config, tiles, precision, device) -> dict:
    """Predict one image and write its four files; returns its figures for predictions.csv. dab_density is the
    mean amount of DAB (optical density) of the predicted tumor's pixels against the image's own white point:
    where an image shows no glass, it is too low. area is in pixels of the slide."""
    # ---- 1 the probability of every pixel
    pixels = read_image(image.path)                                                     # (H, W, 3) uint8
    height, width, _ = pixels.shape
    with precision.autocast():
        prob = predict_roi(network, torch.from_numpy(pixels).permute(2, 0, 1), *tiles, config.batch,
                           device).numpy()                                              # (H, W)
    if not np.isfinite(prob).all():
        raise UserError(f"{config.model}: predicts NaN for {image.path}; its training failed, train it again")
    draw.save_png(paths["probability"], np.rint(prob * 255).astype(np.uint8))

    # ---- 2 polygons, and the mask painted from them: what QuPath shows and what is measured are one thing.
    # Holes are filled first: what lies in a hole that is too small is itself too small.
    polygons = [[outer, *(hole for hole in holes if polygon_area([hole]) >= config.min_area)]
                for outer, *holes in outlines(prob >= config.threshold, corners=False)]
    polygons = [rings for rings in polygons if polygon_area(rings) >= config.min_area]
    label, instance = paint(polygons, [1] * len(polygons), height, width)               # (H, W) each
    draw.save_png(paths["masks"], label, TISSUE.colors)
    side = min(OVERLAY, max(height, width))
    draw.save_png(paths["overlays"], draw.overlay(pixels, label, label, TISSUE, side=side))

    # ---- 3 what is in each polygon
    step = max(1, min(height, width) // GRID)
    white = white_point(pixels[::step, ::step])
    count, total, dab = np.zeros(len(polygons) + 1), np.zeros(len(polygons) + 1), 0.0   # by polygon, 0: none
    for top in range(0, height, STRIP):
        ids = instance[top:top + STRIP].reshape(-1)
        count += np.bincount(ids, minlength=len(count))
        total += np.bincount(ids, prob[top:top + STRIP].reshape(-1), minlength=len(count))
        dab += deconvolve(pixels[top:top + STRIP].reshape(-1, 3)[ids > 0], white)[1].sum()
    area, tumor = count[1:] * image.downsample ** 2, count[1:].sum()

    # ---- 4 QuPath's GeoJSON: rings closed, in the slide's coordinates
    features = []
    for rings, size, mean in zip(polygons, area, total[1:] / count[1:]):
        rings = [simplify(ring, config.simplify) if config.simplify else ring for ring in rings]
        rings = [np.vstack([ring, ring[:1]]) * image.downsample + (image.x, image.y) for ring in rings]
        features.append({
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring.tolist() for ring in rings]},
            "properties": {"objectType": "annotation",
                           "measurements": {"Area px^2": size, "Mean tumor probability": round(mean, 6)},
                           "classification": {"name": TUMOR.name, "color": list(TUMOR.color)}}})
    atomic_write(paths["polygons"], json.dumps({"type": "FeatureCollection", "features": features}) + "\n")
    return {"tumor_share": f"{tumor / count.sum():.6f}", "dab_density": f"{dab / tumor:.6f}" if tumor else "",
            "polygons": len(polygons), "area": f"{area.sum():.12g}"}


def simplify(ring, tolerance: float) -> np.ndarray:
    """A ring (n, 2) with fewer points, all left out within `tolerance` pixels of the segments that stay; one
    that would lose its area stays as it is. Source: Douglas and Peucker, Cartographica 10 (1973)."""
    points = np.vstack([ring, ring[:1]]).astype(np.float64)                   # closed: (n + 1, 2)
    # The method is for open lines: a ring is two, between its first point and the one farthest from that.
    far = int(np.hypot(*(points - points[0]).T).argmax())
    keep, todo = np.isin(np.arange(len(points)), [0, far]), [(0, far), (far, len(ring))]
    while todo:
        a, b = todo.pop()
        arm, between = points[b] - points[a], points[a + 1:b] - points[a]
        along = np.clip(between @ arm / max(arm @ arm, 1e-300), 0, 1)
        away = np.hypot(*(between - along[:, None] * arm).T)                  # (b - a - 1,) from the segment
        if away.max(initial=0) > tolerance:
            middle = a + 1 + int(away.argmax())             # it stays, and both its sides are looked at
            keep[middle] = True
            todo += [(a, middle), (middle, b)]
    return points[keep] if keep.sum() > 2 else points[:-1]


if __name__ == "__main__":
    command(main)
