"""Small dataset folders for tests: noise images, masks of rectangles, one slide per image by default."""

import csv
import json
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from her2.data_folder import Dataset
from her2.data_formats import read_file
from her2.data_slides import SPLITS, ROI


def save(path, array, **options):
    """Write an array as an image; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def read_annotations(path, image=None):
    """(polygons of the file, {reason: annotations left out})"""
    found = read_file(path, image)
    return found.polygons, Counter(reason for reason, _ in found.left_out)


def transform_polygons(polygons, x=0.0, y=0.0, downsample=1.0):
    """p_image = (p - (x, y)) / downsample, for all polygons."""
    return [replace(p, rings=[(ring - (x, y)) / downsample for ring in p.rings]) for p in polygons]


def rectangles(height, width, class_ids):
    """Label map: one rectangle per class id, side by side, not touching; row 0, column 0 stay background."""
    label = np.zeros((height, width), np.uint8)
    step = width // len(class_ids)
    for k, class_id in enumerate(class_ids):
        label[height // 4:3 * height // 4, k * step + 1:(k + 1) * step - 1] = class_id
    return label


def write_csv(root, rows):
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(Path(root) / "slides.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def write_dataset(root, slides=6, height=40, width=60, split=True, class_ids=(1, 2, 3, 4, 5), seed=0):
    """A dataset of `slides` images with masks; splits go round train, train, val, test. Returns the rows."""
    root, rng, rows = Path(root), np.random.default_rng(seed), []
    for k in range(slides):
        image, mask = f"images/roi{k}.png", f"masks/roi{k}.png"
        save(root / image, rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        save(root / mask, rectangles(height, width, class_ids))
        row = {"image": image, "mask": mask, "slide": f"s{k}", "score": str(k % 4)}
        rows.append({**row, "split": ("train", "train", "val", "test")[k % 4]} if split else row)
    write_csv(root, rows)
    return rows


def write_manifest(root, entries):
    """manifest.jsonl from [(image, source image, source slide), ...]"""
    lines = [json.dumps({"image": image, "source_image": source, "source_slide": slide, "x": 0, "y": 0})
             for image, source, slide in entries]
    (Path(root) / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def memory_dataset(root, images_and_labels, classes, split="train"):
    """A Dataset straight from pairs of arrays, without slides.csv: one image per slide, all in one split."""
    assert split in SPLITS
    rois = []
    for k, (image, label) in enumerate(images_and_labels):
        save(Path(root) / f"{k}.png", image)
        save(Path(root) / f"{k}-mask.png", label)
        rois.append(ROI(f"{k}.png", Path(root) / f"{k}.png", None, Path(root) / f"{k}-mask.png", None,
                        0.0, 0.0, 1.0, f"s{k}", "", split, *label.shape))
    return Dataset(Path(root), classes, rois)


def png(width, height, bits, colour_type, rows, after=b""):
    """A PNG written by hand: kinds that Pillow does not write. `rows`: bytes per row, `after`: raw chunks."""
    header = b"".join([width.to_bytes(4, "big"), height.to_bytes(4, "big"),
                       bytes([bits, colour_type, 0, 0, 0])])
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", pixels), after, chunk(b"IEND", b"")])


def chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
