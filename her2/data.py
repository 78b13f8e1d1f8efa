"""Check a dataset folder, or write the table of one that has none yet.

    python -m her2.data DIR    every problem with its file and remedy, or, if there is none, the dataset as a
                               table, a picture (the paper's Fig. 2), and sheets of all regions with their
                               outlines: look at these
    python -m her2.data DIR --index            write slides.csv for images/ with masks/ or annotations/
    python -m her2.data DIR --draft-classes    write classes.json with all class names and a guess at each
    python -m her2.data DIR --prune-cache      remove what the cache holds of images that are gone or changed

The check decodes every image and label as training does, so what passes here is usable there. It writes
nothing into the dataset. Exit status 0 = usable, 2 = not, with one line per problem on stderr.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np

from her2.draw_charts import distribution
from her2.run_config import Parser
from her2.data_folder import Dataset, empty_splits, inspect_dataset, load_dataset
from her2.data_leaks import double_slides
from her2.run_errors import UserError, command, one_line
from her2.draw import COLUMNS, ROWS, save_png, sheet
from her2.data_index import SLIDE_PATTERN, draft_classes, index
from her2.data_regions import in_threads, region_path
from her2.data_slides import SPLITS
from her2.data_mapped import prune_regions
from her2.data_survey import Survey, doubts


def survey_all(dataset: Dataset, problems: list, notes: list) -> list[Survey]:
    """All regions that can be read; appends to `problems` and `notes`."""
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
        notes.append(f"{share:.1%} of all pixels are to be ignored: they neither train nor count{frame}")
    skipped = sum((one.left_out for one in found), Counter())
    if skipped:
        notes.append(f"annotations left out: {listed(skipped)}")
    return found


def listed(counts: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def sheets(dataset: Dataset, found: list[Survey], out: Path) -> list[Path]:
    """Write the overlay sheets beside the picture `out`; returns their paths."""
    cells, paths, page = [], [], COLUMNS * ROWS
    for one in found:
        most, color = "no tumor", None
        if one.majority:
            c, share = one.majority
            most, color = f"{share:.0%} of the tumor is {dataset.classes.names[c]}", dataset.classes.colors[c]
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


def table(dataset: Dataset, pixels: dict, instances: dict, um_per_px=None) -> str:
    """The dataset in numbers: slides and regions per split, then instances and area per class and split."""
    unit, scale = ("Mpx", 1e-6) if um_per_px is None else ("mm2", 1e-6 * um_per_px**2)
    splits = [split for split in SPLITS if dataset.split(split)]
    lines = [f"{dataset.root}: {len(dataset.slides())} slides, {len(dataset.rois)} regions"]
    for split in splits:
        scores = Counter({roi.slide: roi.score or "none" for roi in dataset.split(split)}.values())
        by_score = ", ".join(f"{count} x {score}" for score, count in sorted(scores.items()))
        lines.append(f"  {split:6} slides {sum(scores.values()):3}   regions {len(dataset.split(split)):4}   "
                     f"slides by score: {by_score}")
    lines.append((f"{'':12}" + "".join(f"{split:^34}" for split in splits)).rstrip())
    lines.append(f"{'class':12}" + f"{'instances':>12}{f'area [{unit}]':>12}{'of tumor':>10}" * len(splits))
    tumor = dataset.classes.tumor_ids
    for c in dataset.classes.classes:
        line = f"{c.name[:12]:12}"
        for split in splits:
            area, whole = pixels[split][c.id], pixels[split][tumor].sum()
            share = f"{area / whole:.1%}" if c.tumor and whole else "-"
            line += f"{instances[split][c.id] if c.id else '-':>12}{area * scale:12.3f}{share:>10}"
        lines.append(line)
    return "\n".join(lines)


def check(root, seed: int, out, um_per_px=None) -> int:
    """Print what is to be said about the dataset in `root`; returns the exit status."""
    dataset, problems = inspect_dataset(root, seed)
    if not problems:
        synthetic = (dataset.root / "manifest.jsonl").exists()
        problems += empty_splits(dataset, ("train",) if synthetic else SPLITS)
    notes = dataset.notes
    found = survey_all(dataset, problems, notes)
    leaks, doubles = double_slides([one.roi for one in found], [one.content for one in found])
    for lines, more in ((problems, leaks), (notes, doubles)):
        more = [f"{dataset.root / 'slides.csv'}: {line}" for line in more]
        lines += [line for line in more if line not in lines]
    zero = np.zeros(len(dataset.classes), np.int64)
    pixels, instances = ({split: sum((getattr(one, what) for one in found if one.roi.split == split), zero)
                          for split in SPLITS} for what in ("pixels", "instances"))             # (K,) each
    tumor = dataset.classes.tumor_ids
    bare = [split for split in SPLITS if dataset.split(split) and not pixels[split][tumor].any()]
    if "train" in bare and not problems:
        why = f" ({'; '.join(notes)})" if any(one.left_out or one.ignored for one in found) else ""
        problems.append(f"{dataset.root}: no tumor pixel in the split 'train'{why}; annotate its images")
    for problem in problems:
        print(f"error: {one_line(problem)}", file=sys.stderr)
    if problems:
        return 2
    for split in filter(dataset.split, SPLITS):
        absent = [dataset.classes.names[c] for c in tumor if not pixels[split][c]]
        if absent:
            notes.append(f"no {', '.join(absent)} in the split {split!r}: nothing is "
                         f"{'learned' if split == 'train' else 'measured'} about it there")
    notes += doubts(found, dataset.classes)
    print(table(dataset, pixels, instances, um_per_px))
    for note in notes:
        print(f"note: {note}")
    out = Path(out) if out else Path("runs") / f"data_{dataset.root.resolve().name}.png"
    shown = [split for split in SPLITS if dataset.split(split) and split not in bare]
    save_png(out, distribution({split: pixels[split] for split in shown}, dataset.classes,
                               {split: instances[split] for split in shown}))
    pages = sheets(dataset, found, out)
    more = f" to {pages[-1].name}" if len(pages) > 1 else ""
    print(f"usable. Pictures: {out}, and to check the outlines {pages[0]}{more}")
    return 0


def prune_cache(root, cache) -> None:
    dataset = load_dataset(root, require=())
    current = {region_path(roi, dataset.classes, cache) for roi in dataset.rois}
    images = {roi.image.resolve() for roi in dataset.rois}
    removed, size, kept = prune_regions(cache, current, images, dataset.root.resolve())
    print(f"{cache}: {removed} files removed ({size / 1e6:.1f} MB), {kept} kept")


def main(argv=None) -> int:
    parser = Parser(prog="python -m her2.data", description=__doc__)
    add = parser.add_argument
    add("folder", metavar="DIR", help="the dataset folder")
    add("--seed", type=int, default=0, help="of the split, where slides.csv has none [%(default)s]")
    add("--out", help="the picture [runs/data_NAME.png]")
    add("--um-per-px", type=float, help="micrometres per pixel: areas in mm2 instead of megapixels")
    add("--index", action="store_true", help="write slides.csv instead of checking")
    add("--slide-pattern", metavar="REGEX", default=SLIDE_PATTERN, help="with --index: its first match (or "
        "first group) in the file name without ending is the slide [%(default)s]")
    add("--draft-classes", action="store_true", help="write a draft of classes.json instead")
    add("--prune-cache", action="store_true", help="remove decoded regions whose image is gone or changed")
    add("--cache", default="cache", help="with --prune-cache: its folder [%(default)s]")
    args = parser.parse_args(argv)
    if args.um_per_px is not None and not 0 < args.um_per_px < 1000:
        raise UserError(f"--um-per-px: found {args.um_per_px}; give micrometres per pixel, such as 0.242")
    if args.index:
        return index(args.folder, args.slide_pattern)
    if args.prune_cache:
        return prune_cache(args.folder, args.cache)
    if args.draft_classes:
        return draft_classes(args.folder)
    return check(args.folder, args.seed, args.out, args.um_per_px)


if __name__ == "__main__":
    command(main)
