"""Overlay sheets: every region of a dataset with its outlines, as a person would check them, 24 to a sheet.

Outlines have the colour of their class. Thin and grey: annotations that were left out, the reason stands
below the picture. Hatched: pixels to be ignored. No number replaces looking at these.
"""

from itertools import chain

import numpy as np
from PIL import Image, ImageDraw

from her2.data_classes import IGNORE
from her2.draw import BLUE, GREY, INK, VERMILION, Canvas, class_legend, fit, image_grid, outline, text_width

CELL = 384                          # pixels of the longer side of a region on the sheet
COLUMNS, ROWS = 4, 6
LEFT_OUT = (205, 205, 205)


def overlay(image, label, instance, classes, left_out) -> np.ndarray:
    """(h, w, 3) uint8: image (H, W, 3) with its outlines, the longer side near CELL pixels. `left_out`:
    outlines that are drawn in grey, lists of (n, 2) rings in pixels of the image."""
    small = fit(image, CELL)
    near = np.ix_(*(((np.arange(side) + 0.5) * whole // side).astype(int)
                    for side, whole in zip(small.shape, label.shape)))
    few, scale = label[near], small.shape[1] / label.shape[1]
    drawn = outline(small, few, classes, instance[near], width=2)
    drawn[(few == IGNORE) & (np.add(*np.indices(few.shape)) % 8 < 2)] = classes.colors[IGNORE]
    picture = Image.fromarray(drawn)
    pen = ImageDraw.Draw(picture)
    for ring in chain(*left_out):
        points = [tuple(point) for point in (np.vstack([ring, ring[:1]]) * scale).tolist()]
        pen.line(points, (60, 60, 60), 3)
        pen.line(points, LEFT_OUT, 1)
    return np.array(picture)


def sheet(cells, classes, title) -> np.ndarray:
    """One sheet of `cells`: (picture, [line of text, ...], color of the swatch before the first line)."""
    side, pictures = max(300, *(picture.shape[1] for picture, *_ in cells)), []
    for picture, texts, color in cells:
        top = picture.shape[0] + 5
        canvas = Canvas(side, top + 18 * len(texts))
        canvas.paste(picture, 0, 0)
        if color is not None:
            canvas.rectangle(0, top + 2, 11, top + 13, tuple(color), INK, 0.5)
        for i, text in enumerate(texts):
            indent = 0 if i or color is None else 17
            while text_width(text, 13) > side - indent:
                text = text[:-4].rstrip(" .") + "..."
            canvas.text(indent, top + 18 * i, text, 13, GREY if i > 1 else INK)
        pictures.append(canvas.array())
    others = [("left out", LEFT_OUT), ("ignored", tuple(classes.colors[IGNORE].tolist()))]
    return image_grid([pictures[k:k + COLUMNS] for k in range(0, len(cells), COLUMNS)], title=title,
                      cell=max(max(picture.shape) for picture in pictures),
                      legend=[*class_legend(classes), *others])


def errors(image, label, prob, classes, side: int):
    """(share of wrong pixels, [image, annotated outlines, errors]) of an ROI, thinned to `side` pixels."""
    tumor, found, counts = np.isin(label, classes.tumor_ids), prob >= 0.5, label != IGNORE
    share = ((tumor != found) & counts).sum() / max(1, counts.sum())
    step = max(1, max(label.shape) // side)
    image, label, tumor, found, counts = (a[::step, ::step] for a in (image, label, tumor, found, counts))
    wrong = np.repeat(image.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    wrong[tumor & ~found], wrong[found & ~tumor & counts] = BLUE, VERMILION
    return share, [image, outline(image, label, classes), wrong]
