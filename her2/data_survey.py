"""What the check of a dataset looks at in each region, and what in all of them together is improbable.

A contradiction is refused where it is read. A doubt is possible, but hardly occurs in data that somebody
meant: one note says how many, where, and what to look at. The thresholds are far from what tissue shows.
"""

from collections import Counter, defaultdict

import numpy as np

from her2.data_classes import IGNORE
from her2.data_leaks import content_key
from her2.data_regions import OUTSIDE, read_polygons, read_roi
from her2.data_slides import ROI
from her2.data_mapped import classes_of
from her2.draw import overlay
from her2.stains import deconvolve, optical_density, white_point

SPECK = 20          # pixels: smaller instances come from smoothed masks, not from a hand
SAMPLE = 256        # points per side at which colours are measured


class Survey:
    """One region, decoded: what it holds, how it looks, and its picture. UserError as `read_roi`."""

    def __init__(self, roi: ROI, classes):
        image, label, instance = read_roi(roi, classes)
        polygons, class_ids, left_out = read_polygons(roi, classes)
        count, sizes = len(classes), np.bincount(instance.reshape(-1))
        ids = np.flatnonzero(sizes[1:]) + 1
        self.roi, self.majority = roi, None
        self.pixels = np.bincount(label.reshape(-1), minlength=256)[:count]                     # (K,)
        self.instances = np.bincount(classes_of(instance, label)[ids], minlength=256)[:count]   # (K,)
        self.ignored, self.specks = int((label == IGNORE).sum()), int((sizes[ids] < SPECK).sum())
        tumor = self.pixels[classes.tumor_ids]
        if tumor.any():         # the subtype with most tumor pixels, and its share of these
            self.majority = classes.tumor_ids[tumor.argmax()], tumor.max() / tumor.sum()

        self.shapes = defaultdict(set)          # {hashable outline: set of class ids}
        for polygon, class_id in zip(polygons, class_ids):
            self.shapes[polygon.rings[0].tobytes()].add(class_id)
        # How far right and down the polygons reach, in sides of the image; 0: there is none.
        self.reach = max((float((p.rings[0].max(axis=0) / (roi.width, roi.height)).max()) for p in polygons),
                         default=0.0)
        self.kept = {p.source_id for p in polygons}         # of the polygons that meet the image
        self.outside = {name for reason, _, name in left_out if reason == OUTSIDE}
        self.left_out = Counter(reason for reason, *_ in left_out)

        step = max(1, min(label.shape) // SAMPLE)
        few, few_labels = image[::step, ::step], label[::step, ::step].reshape(-1)
        white = white_point(few)
        pale, dark = np.percentile(optical_density(few, white).sum(-1), [1, 99])
        self.brightness, self.dye = float(np.median(few)), float(dark - pale)
        dab = deconvolve(few, white)[1].reshape(-1)
        self.dab = np.stack([np.bincount(few_labels, dab, 256),     # (2, K) summed density, sampled pixels
                             np.bincount(few_labels, minlength=256)])[:, :count]
        self.content = content_key(image)
        self.picture = overlay(image, label, instance, classes, [rings for _, rings, _ in left_out if rings])


def doubts(found: list[Survey], classes) -> list[str]:
    """One note for each thing that is improbable in these regions."""
    notes = []

    def note(rois, what, remedy):
        names = list(dict.fromkeys(roi.name for roi in rois))
        what = what.replace("{n}", str(len(names)))     # not format: a class's name may hold a brace
        if names:
            notes.append(f"{what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)}); {remedy}")

    drawn = [one for one in found if one.reach]
    polygons = sum(len(one.kept) for one in drawn)
    if len(drawn) > 2 and polygons > 4 and all(one.reach <= 0.5 for one in drawn):
        note([one.roi for one in drawn], "all polygons lie in the upper left quarter of each of {n} images",
             "are they in micrometres, or drawn at another magnification? Give downsample in slides.csv")
    by_file, by_shape = defaultdict(list), defaultdict(list)
    slides = defaultdict(lambda: np.zeros(len(classes), np.int64))
    for one in found:
        by_file[one.roi.annotations].append(one)
        slides[one.roi.slide] += one.pixels
        if len(one.shapes) > 1:             # a single one may be the frame of each image
            by_shape[frozenset(one.shapes)].append(one.roi)
    lost = []
    for several in by_file.values():        # crops of one slide share its file: each leaves the others' out
        kept = set().union(*(one.kept for one in several))
        missed = set().union(*(one.outside for one in several)) - kept
        lost += [one.roi for one in several if len(missed) >= len(kept) > 0]
    note(lost, "half of the polygons or more meet no image, in the files of {n}",
         "are x, y and downsample those of the image? Look at the overlay sheets")
    for rois in by_shape.values():
        if len(rois) > 1:
            note(rois, "the same polygons lie on {n} images", "does each image have its own annotations?")
    both = {one.roi: count for one in drawn if (count := sum(len(ids) > 1 for ids in one.shapes.values()))}
    note(both, f"{sum(both.values())} polygons stand twice with different classes, in {{n}} images",
         "delete one of each pair in the annotation program; until then the later one counts")

    scored = {one.roi.slide: one.roi for one in found if one.roi.score and classes.knows(one.roi.score)
              and slides[one.roi.slide][classes.variance_ids].any()}
    against = [roi for slide, roi in scored.items()
               if classes.id_of(roi.score) != max(classes.variance_ids, key=lambda k: slides[slide][k])]
    if len(against) > 2 and 2 * len(against) > len(scored):
        note(against, f"the score is not the subtype of most tumor pixels in {len(against)} of {len(scored)} "
             "slides", "are rows shifted, or names given to the wrong class?")
    if len(scored) > 2 and len({roi.score for roi in scored.values()}) > 1 and not classes.masks:
        seen = [k for k in classes.tumor_ids if any(pixels[k] for pixels in slides.values())]
        if len(seen) == 1:
            note([one.roi for one in found if one.roi.mask and one.roi.instances is None],
                 f"all tumor of the masks of {{n}} images is {classes.names[seen[0]]}, whatever the score",
                 'if 1 is tumor of the slide\'s score, write {"masks": "score"} into classes.json')
    specks = sum(one.specks for one in found)
    if specks >= 100 and 2 * specks > sum(one.instances.sum() for one in found):
        note([one.roi for one in found if one.specks],
             f"{specks} instances of fewer than {SPECK} pixels in {{n}} images",
             "a mask that was smoothed or scaled? Save it without interpolation (nearest neighbour)")

    blank = [one.roi for one in found if one.dye < 0.1]
    note(blank, "no dye in {n} images (white, black or of one colour)",
         "export them again, or remove their lines")
    note([one.roi for one in found if one.brightness < 100 and one.roi not in blank],
         "{n} images are dark like a negative", "invert them if they are: PIL.ImageOps.invert")
    total, sampled = sum((one.dab for one in found), np.zeros((2, len(classes))))
    stained = [(k, total[k] / sampled[k]) for k in classes.variance_ids if sampled[k] >= 1000]
    if len(stained) > 1 and stained[-1][0] - stained[0][0] > 1 and stained[-1][1] < 0.8 * stained[0][1]:
        (low, less), (high, more) = stained[0], stained[-1]
        note([one.roi for one in found if one.pixels[high]], f"{classes.names[high]}, in {{n}} images, is "
             f"less brown than {classes.names[low]} (optical density {more:.2f} and {less:.2f})",
             "are red and blue swapped (BGR), or the annotations those of other images?")
    return notes
