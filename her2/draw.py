"""Pictures with Pillow and numpy alone: a canvas for lines, boxes and text, and grids of images (Fig. 4).

Antialiasing is supersampling: everything is drawn `SCALE` times too large and averaged down once, so a
line of width 1.5 looks like one. The pixels of images on a canvas stay what they are.
Colours of lines are those of Okabe and Ito (2008), made to be told apart by colour-blind readers. Tissue
classes keep the colour of their class table, everywhere.

Dimension letters: B batch, H height, W width, K classes. A picture is a uint8 array (H, W, 3).
"""

import math
import unicodedata
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from her2.data_classes import IGNORE
from her2.run_errors import atomic_write

SCALE = 2                                                           # supersampling per side
INK, GREY, PALE = (38, 38, 38), (120, 120, 120), (225, 225, 225)    # text, axes / notes / grid lines
BLUE, VERMILION, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)
PURPLE, ORANGE, SKY = (204, 121, 167), (230, 159, 0), (86, 180, 233)
CYCLE = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY]
CELL, COLUMNS, ROWS = 384, 4, 6     # an overlay sheet: longer side of a region in pixels; regions in it
LEFT_OUT = (205, 205, 205)          # outlines of annotations that are not used


@lru_cache(maxsize=None)
def font(size: float):
    return ImageFont.load_default(size * SCALE)


def printable(text) -> str:
    """What Pillow's built-in typeface can draw of `text`: Latin without accents, and the sign +-."""
    letters = unicodedata.normalize("NFKD", str(text).replace("\u2212", "-").replace("\u2013", "-"))
    letters = "".join(c for c in letters if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" or c in "\u00b1\u00b0\u00b7\n" else "?" for c in letters)


def text_width(text, size) -> float:
    """Width of the longest line of `text`, in pixels of the finished picture."""
    return max(font(size).getlength(line) for line in printable(text).split("\n")) / SCALE


def tint(color, amount) -> tuple:
    """`color` mixed with white: 1 keeps it, 0 is white. A light fill that needs no transparency."""
    return tuple(round(255 - amount * (255 - c)) for c in color)


class Canvas:
    """A white sheet of `width` x `height` pixels. All coordinates are in pixels of the finished picture."""

    def __init__(self, width, height):
        self.width, self.height = round(width), round(height)
        assert 0 < self.width <= 20000 and 0 < self.height <= 20000, f"canvas of {width} x {height} pixels"
        self.sheet = Image.new("RGB", (self.width * SCALE, self.height * SCALE), "white")
        self.draw = ImageDraw.Draw(self.sheet)

    def line(self, points, color=INK, width=1.0, dash=None):
        """A polyline through `points` [(x, y), ...]; `dash` = (on, off) in pixels."""
        points, width = [(x * SCALE, y * SCALE) for x, y in points], max(1, round(width * SCALE))
        if dash is None:
            return self.draw.line(points, color, width, joint="curve")
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            length = np.hypot(x1 - x0, y1 - y0)
            for start in np.arange(0, length, sum(dash) * SCALE):
                ends = start / length, min(start + dash[0] * SCALE, length) / length
                self.draw.line([(x0 + a * (x1 - x0), y0 + a * (y1 - y0)) for a in ends], color, width)

    def rectangle(self, x0, y0, x1, y1, fill=None, outline=None, width=1.0):
        corners = [v * SCALE for v in (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))]
        self.draw.rectangle(corners, fill, outline, max(1, round(width * SCALE)))

    def dot(self, x, y, radius=3.0, fill=INK, outline=None):
        box = [v * SCALE for v in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(box, fill, outline, SCALE)

    def diamond(self, x, y, radius=4.5, fill=INK, outline=INK):
        corners = [v * SCALE for v in (x - radius, y, x, y - radius, x + radius, y, x, y + radius)]
        self.draw.polygon(corners, fill=fill, outline=outline, width=SCALE)

    def text(self, x, y, text, size=14, color=INK, anchor="la", turned=False):
        """`text` at (x, y); `anchor` as in Pillow (left/middle/right + ascender/middle/descender). `turned`
        writes from bottom to top, centred on (x, y): the label of a vertical axis."""
        text = printable(text)
        if not turned:
            return self.draw.text((x * SCALE, y * SCALE), text, color, font(size), anchor, align="center")
        width, height = int(text_width(text, size) * SCALE) + 4, int(size * SCALE * 1.5)
        strip = Image.new("L", (width, height), 0)
        ImageDraw.Draw(strip).text((width // 2, height // 2), text, 255, font(size), "mm")
        strip = strip.transpose(Image.Transpose.ROTATE_90)
        left, top = int(x * SCALE) - height // 2, int(y * SCALE) - width // 2
        self.sheet.paste(color, (left, top, left + height, top + width), strip)

    def paste(self, image, x: int, y: int):
        """An image (H, W, 3) uint8 with its upper left corner at (x, y), pixel for pixel."""
        large = image.repeat(SCALE, axis=0).repeat(SCALE, axis=1)       # averaged down it is itself again
        self.sheet.paste(Image.fromarray(large), (x * SCALE, y * SCALE))

    def legend(self, entries, x, y, right, size=13) -> float:
        """(name, color) pairs in rows from (x, y) that end before `right`; returns the y below them."""
        row, left = size * 1.6, x
        for name, color in entries:
            width = text_width(name, size) + 44
            if x > left and x + width > right:
                x, y = left, y + row
            middle = y + row / 2
            self.rectangle(x + 3, middle - 6, x + 15, middle + 6, color, INK, 0.5)
            self.text(x + 23, middle, name, size, anchor="lm")
            x += width
        return y + row

    def array(self) -> np.ndarray:
        """The finished picture, (H, W, 3) uint8."""
        return np.array(self.sheet.resize((self.width, self.height), Image.Resampling.BOX))


def save_png(path, image: np.ndarray, palette=None) -> None:
    """Write a picture (H, W, 3) or (H, W) of uint8, or instance ids (H, W) in 16 bit: a whole PNG or none.
    `palette`, (256, 3) uint8 as ClassTable.colors, shows a label map in colour; its values stay class ids."""
    if image.dtype in (np.int32, np.int64):
        assert 0 <= image.min() and image.max() <= 65535, f"ids {image.min()}..{image.max()}: not 16 bit"
        image = image.astype(np.uint16)
    assert image.dtype in (np.uint8, np.uint16), f"a PNG holds uint8 or uint16, found {image.dtype}"
    picture = Image.fromarray(image)
    if palette is not None:
        picture.putpalette(palette.tobytes())
    atomic_write(path, lambda file: picture.save(file, format="PNG"))


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) or (3, H, W) in [-1, 1] -> (B, H, W, 3) or (H, W, 3) uint8; NaN becomes black."""
    assert image.dim() in (3, 4) and image.shape[-3] == 3, f"image of shape {tuple(image.shape)}"
    image = torch.nan_to_num(image.detach().float().cpu(), nan=-1.0)
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous().numpy()


def colorize(label, classes) -> np.ndarray:
    """Class ids (..., H, W), array or CPU tensor -> colours of the class table, (..., H, W, 3) uint8."""
    label = np.asarray(label)
    known = (label >= 0) & (label < len(classes)) | (label == IGNORE)
    assert known.all(), f"class ids {label.min()}..{label.max()} of {len(classes)} classes"
    return classes.colors[label]


def outline(image, label, classes, instance=None, width=3) -> np.ndarray:
    """`image` (H, W, 3) uint8 with a rim in every tissue instance, in the colour of its class: touching ones
    both keep theirs. A thin dark line within it separates light class colours from light tissue."""
    label, instance = np.asarray(label), np.asarray(label if instance is None else instance)
    assert image.shape == (*label.shape, 3) and instance.shape == label.shape, \
        f"image {image.shape}, label {label.shape}, instance {instance.shape}"

    def rim(thickness):
        around = np.pad(instance, thickness, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(around, instance.shape)  # [dy, dx]: shifted
        edge = np.zeros(instance.shape, bool)
        for dy, dx in np.ndindex(*windows.shape[:2]):
            if math.hypot(dy - thickness, dx - thickness) <= thickness:
                edge |= windows[dy, dx] != instance
        return edge & (label > 0)

    drawn, inner = image.copy(), rim(width)
    drawn[rim(width + 1)] = (40, 40, 40)
    drawn[inner] = classes.colors[label[inner]]
    return drawn


def fit(image, cell) -> np.ndarray:
    """`image` (H, W, 3) or (H, W) with its longer side at `cell` pixels: whole steps up, smooth down."""
    image = Image.fromarray(np.asarray(image)).convert("RGB")
    longer, kind = max(image.size), Image.Resampling
    size = [side * (cell // longer) or max(1, round(side * cell / longer)) for side in image.size]
    return np.array(image.resize(size, kind.NEAREST if cell >= longer else kind.LANCZOS))


def samples_png(folder, step: int, classes=None, **rows) -> None:
    """samples/stepNNNNNN.png of a run folder: one row per keyword, its name is the caption. A row is image
    (B, 3, H, W) in [-1, 1], label (B, H, W) of `classes`, or prob (B, H, W) in 0..1."""
    pictures = [to_uint8(batch) if batch.dim() == 4 else
                (batch * 255).round().byte().cpu().numpy() if batch.is_floating_point() else
                colorize(batch.cpu(), classes) for batch in rows.values()]
    grid = image_grid(pictures, [name.replace("_", " ") for name in rows])
    save_png(Path(folder) / "samples" / f"step{step:06d}.png", grid)


def image_grid(rows, row_captions=(), column_captions=(), title="", cell=192, legend=()) -> np.ndarray:
    """Images in rows and columns: lists of (H, W, 3) or (H, W) uint8 arrays of any size, None for an empty
    place, each scaled to `cell` pixels, the width of a column. One short text per row stands left of it, one
    per column above it; `legend`: (name, color) pairs below all, see `class_legend`."""
    columns, gap, small = max(len(row) for row in rows), 6, 13
    fitted = [{j: fit(image, cell) for j, image in enumerate(row) if image is not None} for row in rows]
    heights = [max((image.shape[0] for image in row.values()), default=20) for row in fitted]
    wide = max([*(image.shape[1] for row in fitted for image in row.values()),
                *(int(text_width(text, small)) + 1 for text in column_captions)])
    left = gap + max((int(text_width(text, small)) + 10 for text in row_captions), default=0)
    lines = max((str(text).count("\n") + 1 for text in column_captions), default=0)
    top = int(gap + (26 if title else 0) + (small * 1.4 * lines + 4 if lines else 0))
    width = max(left + columns * (wide + gap), gap * 2 + int(text_width(title, 16)))
    below = Canvas(width, 1).legend(legend, left, 4, width - gap, small) + 4 if legend else 0
    canvas = Canvas(width, top + sum(heights) + gap * len(rows) + below)
    canvas.text(gap, gap, title, 16)
    for j, text in enumerate(column_captions):
        canvas.text(left + j * (wide + gap) + wide / 2, top - 5, text, small, anchor="md")
    for i, row in enumerate(fitted):
        if row_captions:
            canvas.text(left - 9, top + heights[i] / 2, row_captions[i], small, anchor="rm")
        for j, image in row.items():
            x = left + j * (wide + gap) + (wide - image.shape[1]) // 2
            canvas.rectangle(x - 0.5, top - 0.5, x + image.shape[1], top + image.shape[0], outline=GREY)
            canvas.paste(image, x, top)
        top += heights[i] + gap
    canvas.legend(legend, left, top + 2, width - gap, small)
    return canvas.array()


def class_legend(classes, tumor_only=False) -> list:
    """(name, color) of the class table, for `legend`."""
    return [(entry.name, tuple(entry.color)) for entry in classes.classes if entry.tumor or not tumor_only]


# ---- overlay sheets: regions as a person would check them, 24 to a sheet; no number replaces looking ---
def overlay(image, label, instance, classes, left_out=(), side=CELL) -> np.ndarray:
    """(h, w, 3) uint8: image (H, W, 3) with its outlines, the longer side near `side` pixels; ignored pixels
    are hatched. `left_out`: outlines drawn thin and grey, lists of (n, 2) rings in pixels of the image."""
    small = fit(image, side)
    near = np.ix_(*(((np.arange(few) + 0.5) * whole // few).astype(int)
                    for few, whole in zip(small.shape, label.shape)))
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
