"""What the check of a dataset looks at in each region, and what in all of them together is improbable.

A contradiction is a problem where it is read. What is here is possible, but in data that somebody meant it
hardly occurs: each doubt is one note with how many, where, and what to look at. The thresholds are far from
what real and procedural tissue show; the overlay sheets are for what no number finds.
"""

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from her2.data_classes import IGNORE
from her2.data_regions import read_polygons, read_roi
from her2.data_slides import ROI
from her2.draw_overlay import CELL, overlay
from her2.stains import deconvolve, optical_density, white_point

SPECK = 20          # pixels: smaller instances come from smoothed masks, not from a hand
SAMPLE = 256        # points per side at which colours are measured


@dataclass(eq=False)
class Survey:
    """One region: what it holds, how it looks, and its picture for the overlay sheets."""
    roi: ROI
    pixels: np.ndarray                  # (K,) per class
    instances: np.ndarray               # (K,) per class
    ignored: int                        # pixels
    specks: int                         # instances of fewer than SPECK pixels
    shapes: dict                        # {hashable outline: set of class ids}
    reach: tuple                        # how far right and down the polygons reach, in sides of the image
    kept: set                           # source ids of the polygons that meet the image
    left_out: Counter                   # annotations by the reason why they are left out
    outside: set                        # source ids of those outside of the image
    content: str                        # equal where all pixels are, "" for an image of one colour
    brightness: float                   # median of all channels, 0..255
    dye: float                          # optical density between the palest and the darkest 1 % of the pixels
    dab: np.ndarray = field(repr=False)     # (2, K) summed DAB density and number of sampled pixels per class
    picture: np.ndarray = field(repr=False)     # (h, w, 3) uint8

    def majority(self, classes):
        """(class id, share) of the subtype with most tumor pixels, or None without tumor."""
        tumor = self.pixels[classes.tumor_ids]
        return (classes.tumor_ids[tumor.argmax()], tumor.max() / tumor.sum()) if tumor.any() else None


def survey(roi: ROI, classes) -> Survey:
    """Decode and measure one region. UserError as `read_roi`."""
    count = len(classes)
    image, label, instance = read_roi(roi, classes)
    polygons, class_ids, left_out = read_polygons(roi, classes)
    sizes = np.bincount(instance.reshape(-1))
    class_of = np.zeros(len(sizes), np.uint8)                                          # (largest id + 1,)
    class_of[instance] = label
    ids = np.flatnonzero(sizes)
    ids = ids[ids > 0]

    step = max(1, min(label.shape) // SAMPLE)
    few, few_labels = image[::step, ::step], label[::step, ::step].reshape(-1)
    white = white_point(few)
    pale, dark = np.percentile(optical_density(few, white).sum(-1), [1, 99])
    dab = deconvolve(few, white)[1].reshape(-1)
    shapes = defaultdict(set)
    for polygon, class_id in zip(polygons, class_ids):
        shapes[polygon.rings[0].tobytes()].add(class_id)
    far = [polygon.rings[0].max(axis=0) / (roi.width, roi.height) for polygon in polygons]
    return Survey(
        roi, np.bincount(label.reshape(-1), minlength=256)[:count],
        np.bincount(class_of[ids], minlength=256)[:count], int((label == IGNORE).sum()),
        int((sizes[ids] < SPECK).sum()), dict(shapes), tuple(np.max(far, axis=0)) if far else (),
        {p.source_id for p in polygons}, Counter(reason for reason, *_ in left_out),
        {name for reason, _, name in left_out if reason == "outside the image"},
        hashlib.sha256(np.ascontiguousarray(image)).hexdigest() if (image != image[0, 0]).any() else "",
        float(np.median(few)),
        float(dark - pale),
        np.stack([np.bincount(few_labels, dab, 256), np.bincount(few_labels, minlength=256)])[:, :count],
        overlay(image, label, instance, classes, [rings for _, rings, _ in left_out if rings], CELL))


def doubts(found: list[Survey], classes) -> list[str]:
    """One note for each thing that is improbable in these regions."""
    notes = []

    def note(rois, what, remedy):
        names = list(dict.fromkeys(roi.name for roi in rois))
        what = what.replace("{n}", str(len(names)))     # not format: a class's name may hold a brace
        notes.append(f"{what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)}); {remedy}")

    drawn = [one for one in found if one.reach]
    polygons = sum(len(one.kept) for one in drawn)
    if len(drawn) > 2 and polygons > 4 and all(max(one.reach) <= 0.5 for one in drawn):
        note([one.roi for one in drawn], "all polygons lie in the upper left quarter of each of {n} images",
             "are they in micrometres, or drawn at another magnification? Give downsample in slides.csv")
    by_file = defaultdict(list)
    for one in found:
        by_file[one.roi.annotations].append(one)
    lost = []
    for several in by_file.values():        # crops of one slide share its file: each leaves the others' out
        kept = set().union(*(one.kept for one in several))
        missed = set().union(*(one.outside for one in several)) - kept
        lost += several if len(missed) >= len(kept) > 0 else []
    if lost:
        note([one.roi for one in lost], "half of the polygons or more meet no image, in the files of {n}",
             "are x, y and downsample those of the image? Look at the overlay sheets")

    by_shape = defaultdict(list)
    for one in drawn:
        if len(one.shapes) > 1:     # a single one may be the frame of each image
            by_shape[frozenset(one.shapes)].append(one.roi)
    for rois in by_shape.values():
        if len(rois) > 1:
            note(rois, "the same polygons lie on {n} images", "does each image have its own annotations?")
    both = {one.roi: sum(len(ids) > 1 for ids in one.shapes.values()) for one in drawn}
    if any(both.values()):
        note([roi for roi, count in both.items() if count],
             f"{sum(both.values())} polygons stand twice with different classes, in {{n}} images",
             "delete one of each pair in the annotation program; until then the later one counts")

    slides = defaultdict(lambda: np.zeros(len(classes), np.int64))
    for one in found:
        slides[one.roi.slide] += one.pixels
    scored = {one.roi.slide: one.roi for one in found if one.roi.score and classes.knows(one.roi.score)
              and slides[one.roi.slide][classes.variance_ids].any()}
    against = [roi for slide, roi in scored.items()
               if classes.id_of(roi.score) != max(classes.variance_ids, key=lambda k: slides[slide][k])]
    if len(against) > 2 and 2 * len(against) > len(scored):
        note(against, f"the score is not the subtype of most tumor pixels in {len(against)} of {len(scored)} "
             "slides", "are rows shifted, or names given to the wrong class?")
    if len(scored) > 2 and len({roi.score for roi in scored.values()}) > 1 and not classes.masks:
        seen = [k for k in classes.tumor_ids if any(pixels[k] for pixels in slides.values())]
        masked = [one.roi for one in found if one.roi.mask and one.roi.instances is None]
        if len(seen) == 1 and masked:
            note(masked, f"all tumor of the masks of {{n}} images is {classes.names[seen[0]]}, whatever the "
                 "score", 'if 1 is tumor of the slide\'s score, write {"masks": "score"} into classes.json')
    specks = {one.roi: one.specks for one in found if one.specks}
    if sum(specks.values()) >= 100 and 2 * sum(specks.values()) > sum(one.instances.sum() for one in found):
        note(list(specks), f"{sum(specks.values())} instances of fewer than {SPECK} pixels in {{n}} images",
             "a mask that was smoothed or scaled? Save it without interpolation (nearest neighbour)")

    blank = [one for one in found if one.dye < 0.1]
    if blank:
        note([one.roi for one in blank], "no dye in {n} images (white, black or of one colour)",
             "export them again, or remove their lines")
    dark = [one.roi for one in found if one.brightness < 100 and one not in blank]
    if dark:
        note(dark, "{n} images are dark like a negative", "invert them if they are: PIL.ImageOps.invert")
    total, sampled = sum(one.dab for one in found) if found else np.zeros((2, len(classes)))
    stained = [(k, total[k] / sampled[k]) for k in classes.variance_ids if sampled[k] >= 1000]
    if len(stained) > 1 and stained[-1][0] - stained[0][0] > 1 and stained[-1][1] < 0.8 * stained[0][1]:
        (low, less), (high, more) = stained[0], stained[-1]
        note([one.roi for one in found if one.pixels[high]],
             f"{classes.names[high]}, in {{n}} images, is less brown than {classes.names[low]} (optical "
             f"density {more:.2f} and {less:.2f})",
             "are red and blue swapped (BGR), or the annotations those of other images?")
    return notes
