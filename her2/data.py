"""Check a dataset folder, or write the table of one that has none yet.

    python -m her2.data DIR    every problem with its file and remedy, or, if there is none, the dataset as a
                               table, a picture (the paper's Fig. 2), and sheets of all regions with their
                               outlines: look at these
    python -m her2.data DIR --index            write slides.csv for images/ with masks/ or annotations/
    python -m her2.data DIR --draft-classes    write classes.json with all class names and a guess at each
    python -m her2.data DIR --prune-cache      remove all of the cache but the regions of DIR as they are now:
                                               what other datasets need of it is decoded again

The check decodes every image and label as training does, so what passes here is usable there. It writes
nothing into the dataset. Exit status 0 = usable, 2 = not, with one line per problem on stderr. What hardly
occurs in data that somebody meant, but is possible, is a doubt: one note says how many, where, and what to
look at. The thresholds are far from what tissue shows.
"""

import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from her2.draw_charts import distribution
from her2.run_config import Parser
from her2.data_classes import IGNORE
from her2.data_folder import Dataset, content_key, double_slides, inspect_dataset, load_dataset
from her2.run_errors import UserError, command, one_line
from her2.draw import COLUMNS, ROWS, overlay, save_png, sheet
from her2.data_index import SLIDE_PATTERN, draft_classes, index
from her2.data_mapped import classes_of
from her2.data_regions import OUTSIDE, in_threads, read_polygons, read_roi, region_path
from her2.data_slides import ROI, SPLITS
from her2.stains import deconvolve, optical_density, white_point

SPECK = 20          # pixels: smaller instances come from smoothed masks, not from a hand
SAMPLE = 256        # points per side at which colours are measured


class Survey:
    """One region, decoded: what it holds, how it looks, and its picture. UserError as `read_roi`."""

    def __init__(self, roi: ROI, classes):
        polygons, class_ids, left_out = annotations = read_polygons(roi, classes)
        image, label, instance = read_roi(roi, classes, annotations)
        count, sizes = len(classes), np.bincount(instance.reshape(-1))
        ids = np.flatnonzero(sizes[1:]) + 1
        self.roi, self.content = roi, content_key(image)
        self.pixels = np.bincount(label.reshape(-1), minlength=256)[:count]                     # (K,)
        self.instances = np.bincount(classes_of(instance, label)[ids], minlength=256)[:count]   # (K,)
        self.ignored, self.specks = int((label == IGNORE).sum()), int((sizes[ids] < SPECK).sum())

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
        self.picture = overlay(image, label, instance, classes, [rings for _, rings, _ in left_out if rings])


def doubts(found: list[Survey], classes) -> list[str]:
    """One note for each thing that is improbable in these regions."""
    notes = []

    def note(regions, what, remedy):
        names = list(dict.fromkeys(one.roi.name for one in regions))
        what = what.replace("{n}", str(len(names)))     # not format: a class's name may hold a brace
        if names:
            notes.append(f"{what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)}); {remedy}")

    by_file, by_shape = defaultdict(list), defaultdict(list)
    slides = defaultdict(lambda: np.zeros(len(classes), np.int64))
    for one in found:
        by_file[one.roi.annotations].append(one)
        slides[one.roi.slide] += one.pixels
        if len(one.shapes) > 1:             # a single one may be the frame of each image
            by_shape[frozenset(one.shapes)].append(one)
    drawn = [one for one in found if one.reach]
    if len(drawn) > 2 and sum(len(one.kept) for one in drawn) > 4 and all(one.reach <= 0.5 for one in drawn):
        note(drawn, "all polygons lie in the upper left quarter of each of {n} images",
             "are they in micrometres, or drawn at another magnification? Give downsample in slides.csv")
    lost = []
    for several in by_file.values():        # crops of one slide share its file: each leaves the others' out
        kept = set().union(*(one.kept for one in several))
        missed = set().union(*(one.outside for one in several)) - kept
        lost += several if len(missed) >= len(kept) > 0 else []
    note(lost, "half of the polygons or more meet no image, in the files of {n}",
         "are x, y and downsample those of the image? Look at the overlay sheets")
    for alike in by_shape.values():
        if len(alike) > 1:
            note(alike, "the same polygons lie on {n} images", "does each image have its own annotations?")
    both = {one: count for one in drawn if (count := sum(len(ids) > 1 for ids in one.shapes.values()))}
    note(both, f"{sum(both.values())} polygons stand twice with different classes, in {{n}} images",
         "delete one of each pair in the annotation program; until then the later one counts")

    scored = {one.roi.slide: one for one in found if one.roi.score and classes.knows(one.roi.score)
              and slides[one.roi.slide][classes.variance_ids].any()}
    against = [one for slide, one in scored.items() if classes.id_of(one.roi.score)
               != max(classes.variance_ids, key=lambda k: slides[slide][k])]
    if len(against) > 2 and 2 * len(against) > len(scored):
        note(against, f"the score is not the subtype of most tumor pixels in {len(against)} of {len(scored)} "
             "slides", "are rows shifted, or names given to the wrong class?")
    seen = [k for k in classes.tumor_ids if any(pixels[k] for pixels in slides.values())]
    scores = {one.roi.score for one in scored.values()}
    if len(scored) > 2 and len(scores) > len(seen) == 1 and not classes.masks:
        note([one for one in found if one.roi.mask and one.roi.instances is None],
             f"all tumor of the masks of {{n}} images is {classes.names[seen[0]]}, whatever the score",
             'if 1 is tumor of the slide\'s score, write {"masks": "score"} into classes.json')
    specks = sum(one.specks for one in found)
    if specks >= 100 and 2 * specks > sum(one.instances.sum() for one in found):
        note([one for one in found if one.specks],
             f"{specks} instances of fewer than {SPECK} pixels in {{n}} images",
             "a mask that was smoothed or scaled? Save it without interpolation (nearest neighbour)")

    blank = [one for one in found if one.dye < 0.1]
    note(blank, "no dye in {n} images (white, black or of one colour)",
         "export them again, or remove their lines")
    note([one for one in found if one.brightness < 100 and one not in blank],
         "{n} images are dark like a negative", "invert them if they are: PIL.ImageOps.invert")
    total, sampled = sum((one.dab for one in found), np.zeros((2, len(classes))))
    stained = [(k, total[k] / sampled[k]) for k in classes.variance_ids if sampled[k] >= 1000]
    (low, less), *_, (high, more) = stained if len(stained) > 1 else [(0, 0), (0, 0)]
    if high > low + 1 and more < 0.8 * less:
        note([one for one in found if one.pixels[high]], f"{classes.names[high]}, in {{n}} images, is "
             f"less brown than {classes.names[low]} (optical density {more:.2f} and {less:.2f})",
             "are red and blue swapped (BGR), or the annotations those of other images?")
    return notes


def survey_all(dataset: Dataset, problems: list) -> list[Survey]:
    """All regions that can be read; appends to `problems` and to the dataset's notes."""
    def one_or_error(roi):
        try:
            return Survey(roi, dataset.classes)
        except UserError as error:
            return error

    found = in_threads(one_or_error, dataset.rois, desc="checking", leave=False)
    problems += [str(one) for one in found if isinstance(one, UserError)]
    found = [one for one in found if not isinstance(one, UserError)]
    share = sum(one.ignored for one in found) / max(1, sum(one.roi.height * one.roi.width for one in found))
    if share:
        frame = '; if that is the frame around a region, call it "Background" in classes.json' * (share > 0.5)
        dataset.notes.append(f"{share:.1%} of all pixels are ignored: they neither train nor count{frame}")
    if skipped := sum((one.left_out for one in found), Counter()):
        dataset.notes.append(f"annotations left out: {listed(skipped)}")
    return found


def listed(counts: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def sheets(dataset: Dataset, found: list[Survey], out: Path) -> list[Path]:
    """Write the overlay sheets beside the picture `out`; returns their paths."""
    cells, paths, page = [], [], COLUMNS * ROWS
    for one in found:
        tumor, most, color = one.pixels[dataset.classes.tumor_ids], "no tumor", None
        if tumor.any():
            c = dataset.classes.tumor_ids[tumor.argmax()]
            most = f"{tumor.max() / tumor.sum():.0%} of the tumor is {dataset.classes.names[c]}"
            color = dataset.classes.colors[c]
        texts = [f"slide {one.roi.slide}, score {one.roi.score or 'none'}; {most}", one.roi.name]
        if one.left_out:
            texts.append(f"left out: {listed(one.left_out)}")
        cells.append((one.picture, texts, color))
    for first in range(0, len(cells), page):
        last = min(first + page, len(cells))
        title = f"{dataset.root.resolve().name}: regions {first + 1} to {last} of {len(cells)}"
        paths.append(out.with_name(f"{out.stem}_overlay{len(paths) + 1:03d}.png"))
        save_png(paths[-1], sheet(cells[first:last], dataset.classes, title))
    return paths


def table(dataset: Dataset, pixels: dict, instances: dict) -> str:
    """The dataset in numbers: slides and regions per split, and in each instances and area per class."""
    lines = [f"{dataset.root}: {len(dataset.slides())} slides, {len(dataset.rois)} regions"]
    for split in filter(dataset.split, SPLITS):
        rois, tumor = dataset.split(split), pixels[split][dataset.classes.tumor_ids].sum()
        scores = Counter({roi.slide: roi.score or "none" for roi in rois}.values())
        by_score = ", ".join(f"{count} x {score}" for score, count in sorted(scores.items()))
        lines += [f"{split}: {len(rois)} regions of {sum(scores.values())} slides, by score: {by_score}",
                  f"  {'class':12}{'instances':>12}{'area [Mpx]':>12}{'of tumor':>10}"]
        for c in dataset.classes.classes:
            area = pixels[split][c.id]
            share = f"{area / tumor:.1%}" if c.tumor and tumor else "-"
            lines.append(f"  {c.name[:12]:12}{instances[split][c.id]:12}{area / 1e6:12.3f}{share:>10}")
    return "\n".join(lines)


def check(root, seed: int, out) -> int:
    """Print what is to be said about the dataset in `root`; returns the exit status."""
    synthetic = (Path(root) / "manifest.jsonl").exists()
    dataset, problems = inspect_dataset(root, seed, ("train",) if synthetic else SPLITS)
    found = survey_all(dataset, problems)
    leaks, doubles = double_slides(dataset.root, [one.roi for one in found], [one.content for one in found])
    problems += [line for line in leaks if line not in problems]
    dataset.notes += [line for line in doubles if line not in dataset.notes]
    zero = np.zeros(len(dataset.classes), np.int64)
    pixels, instances = ({split: sum((getattr(one, what) for one in found if one.roi.split == split), zero)
                          for split in SPLITS} for what in ("pixels", "instances"))             # (K,) each
    if not problems and not pixels["train"][dataset.classes.tumor_ids].any():
        why = f" ({'; '.join(dataset.notes)})" if any(one.left_out or one.ignored for one in found) else ""
        problems.append(f"{dataset.root}: no tumor pixel in the split 'train'{why}; annotate its images")
    for problem in problems:
        print(f"error: {one_line(problem)}", file=sys.stderr)
    if problems:
        return 2
    print(table(dataset, pixels, instances))
    for note in dataset.notes + doubts(found, dataset.classes):
        print(f"note: {note}")
    out = Path(out) if out else Path("runs") / f"data_{dataset.root.resolve().name}.png"
    save_png(out, distribution(pixels, dataset.classes, instances))
    pages = sheets(dataset, found, out)
    more = f" to {pages[-1].name}" if len(pages) > 1 else ""
    print(f"usable. Pictures: {out}, and to check the outlines {pages[0]}{more}")
    return 0


def prune_cache(root, cache) -> None:
    """Remove the regions in `cache` that are not of the dataset `root` as it is now, and crashes' remains."""
    dataset, yesterday = load_dataset(root, require=()), time.time() - 86400
    current = {region_path(roi, dataset.classes, cache) for roi in dataset.rois}
    # A young temporary file may be one that a program writes at this moment.
    old = {path: path.stat().st_size for path in set(Path(cache).glob("*.tile*")) - current
           if path.suffix == ".tile" or path.stat().st_mtime < yesterday}
    for path in old:
        path.unlink()
    print(f"{cache}: {len(old)} files removed ({sum(old.values()) / 1e6:.1f} MB)")


def main(argv=None) -> int:
    parser = Parser(prog="python -m her2.data", description=__doc__)
    add = parser.add_argument
    add("folder", metavar="DIR", help="the dataset folder")
    add("--seed", type=int, default=0, help="of the split, where slides.csv has none [%(default)s]")
    add("--out", help="the picture [runs/data_NAME.png]")
    add("--index", action="store_true", help="write slides.csv instead of checking")
    add("--slide-pattern", metavar="REGEX", default=SLIDE_PATTERN, help="with --index: its first match (or "
        "first group) in the file name without ending is the slide [%(default)s]")
    add("--draft-classes", action="store_true", help="write a draft of classes.json instead")
    add("--prune-cache", action="store_true", help="remove what DIR as it is now does not use, see above")
    add("--cache", default="cache", help="with --prune-cache: its folder [%(default)s]")
    args = parser.parse_args(argv)
    if args.index:
        return index(args.folder, args.slide_pattern)
    if args.prune_cache:
        return prune_cache(args.folder, args.cache)
    if args.draft_classes:
        return draft_classes(args.folder)
    return check(args.folder, args.seed, args.out)


if __name__ == "__main__":
    command(main)
