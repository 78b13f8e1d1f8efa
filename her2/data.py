"""Check a dataset folder, or write the table of one that has none yet.

    python -m her2.data DIR            every problem with its file and remedy, or, if there is none, the
                                       dataset as a table and a picture (the paper's Fig. 2)
    python -m her2.data DIR --index    write slides.csv for images/ with masks/ or annotations/

The check decodes every image and label as training does, so what passes here is usable there. It writes
nothing into the dataset. Exit status 0 = usable, 2 = not, with one line per problem on stderr.
"""

import csv
import io
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from her2.draw_charts import distribution
from her2.run_config import Parser
from her2.data_classes import IGNORE
from her2.data_folder import Dataset, empty_splits, inspect_dataset
from her2.run_errors import UserError, atomic_write, command, one_line
from her2.draw import save_png
from her2.data_images import ENDINGS
from her2.data_regions import read_polygons, read_roi
from her2.data_slides import SPLITS

# The first match in the file name is the slide. Too coarse by default rather than too fine: two slides taken
# for one cost a little data, one slide taken for two leaks from training into the test.
SLIDE_PATTERN = "[^_]+"


def measure(dataset: Dataset, problems: list, notes: list):
    """(pixels, instances), each {split: (K,) counts per class}; appends to `problems` and `notes`."""
    count = len(dataset.classes)
    pixels = {split: np.zeros(count, np.int64) for split in (*SPLITS, "")}  # "": not decided, after a problem
    instances = {split: np.zeros(count, np.int64) for split in pixels}
    skipped = Counter()
    ignored = 0
    for roi in tqdm(dataset.rois, desc="checking", unit="ROI", disable=None, leave=False):
        try:
            _, label, instance = read_roi(roi, dataset.classes)
            skipped += read_polygons(roi, dataset.classes)[2]
        except UserError as error:
            problems.append(str(error))
            continue
        pixels[roi.split] += np.bincount(label.reshape(-1), minlength=count)[:count]
        ignored += (label == IGNORE).sum()
        class_of = np.zeros(instance.max() + 1, np.uint8)                              # (largest id + 1,)
        class_of[instance] = label
        ids = np.flatnonzero(np.bincount(instance.reshape(-1)))
        instances[roi.split] += np.bincount(class_of[ids[ids > 0]], minlength=count)[:count]
    if ignored:
        whole = sum(roi.height * roi.width for roi in dataset.rois)
        notes.append(f"{ignored / whole:.1%} of all pixels are to be ignored: they neither train nor count")
    if skipped:
        notes.append("annotations left out: "
                     + ", ".join(f"{count} {kind}" for kind, count in skipped.most_common()))
    return pixels, instances


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
    lines.append("".join([f"{'':12}", *(f"{split:^34}" for split in splits)]).rstrip())
    lines.append(f"{'class':12}" + f"{'instances':>12}{f'area [{unit}]':>12}{'of tumor':>10}" * len(splits))
    tumor = dataset.classes.tumor_ids
    for c in dataset.classes.classes:
        line = f"{c.name[:12]:12}"
        for split in splits:
            whole = pixels[split][tumor].sum()
            share = f"{pixels[split][c.id] / whole:.1%}" if c.tumor and whole else "-"
            number = instances[split][c.id] if c.id else "-"
            line += f"{number:>12}{pixels[split][c.id] * scale:12.3f}{share:>10}"
        lines.append(line)
    return "\n".join(lines)


def check(root, seed: int, out, um_per_px=None) -> int:
    """Print what is to be said about the dataset in `root`; returns the exit status."""
    dataset, problems = inspect_dataset(root, seed)
    synthetic = (dataset.root / "manifest.jsonl").exists()
    if not problems:
        problems += empty_splits(dataset, ("train",) if synthetic else SPLITS)
    notes = list(dataset.notes)
    pixels, instances = measure(dataset, problems, notes)
    tumor = dataset.classes.tumor_ids
    bare = [split for split in SPLITS if dataset.split(split) and not pixels[split][tumor].any()]
    if "train" in bare and not problems:
        problems.append(f"{dataset.root}: no tumor pixel in the split 'train'; annotate its images, or "
                        "change the split")
    for problem in problems:
        print(f"error: {one_line(problem)}", file=sys.stderr)
    if problems:
        return 2
    absent = {split: [dataset.classes.names[c] for c in tumor if not pixels[split][c]]
              for split in SPLITS if dataset.split(split)}
    notes += [f"no {', '.join(names)} in the split {split!r}: nothing is "
              f"{'learned' if split == 'train' else 'measured'} about it there"
              for split, names in absent.items() if names]
    print(table(dataset, pixels, instances, um_per_px))
    for note in notes:
        print(f"note: {note}")
    out = Path(out) if out else Path("runs") / f"data_{dataset.root.resolve().name}.png"
    shown = [split for split in SPLITS if dataset.split(split) and split not in bare]
    save_png(out, distribution({split: pixels[split] for split in shown}, dataset.classes,
                               {split: instances[split] for split in shown}))
    print(f"usable. Picture: {out}")
    return 0


def files_by_stem(folder, endings=None) -> dict:
    """{stem: [files]} of one folder, {} if there is none; hidden files and other endings are left out."""
    found = defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        kept = endings is None or path.suffix.lower() in endings
        if kept and path.is_file() and not path.name.startswith("."):
            found[path.stem].append(path)
    return dict(found)


def index(root, slide_pattern: str = SLIDE_PATTERN) -> int:
    """Write slides.csv for the folder `root`: images paired with masks or annotations of the same stem."""
    root = Path(root)
    table_path = root / "slides.csv"
    try:
        pattern = re.compile(slide_pattern)
    except re.error as error:
        raise UserError(f"--slide-pattern {slide_pattern!r}: not a regular expression ({error}); quote it, "
                        "and escape special characters with a backslash") from error
    if table_path.exists():
        raise UserError(f"{table_path}: exists already and is never overwritten; remove or rename it first")
    images = files_by_stem(root / "images", ENDINGS)
    if not images:
        raise UserError(f"{root / 'images'}: no {', '.join(ENDINGS)} file there; put the images into this "
                        "folder")
    partners = {"annotations": files_by_stem(root / "annotations"),
                "mask": files_by_stem(root / "masks", {".png"}),
                "instances": files_by_stem(root / "instances", ENDINGS)}
    problems, rows = [], []
    for stem, paths in images.items():
        row = {"image": paths, **{column: found[stem] for column, found in partners.items() if stem in found}}
        twice = [path.name for paths in row.values() if len(paths) > 1 for path in paths]
        if twice:
            problems.append(f"{root}: {' and '.join(twice)} have the same stem; keep one of them")
        elif "annotations" in row and "mask" in row:
            problems.append(f"{root}: {stem} has a mask and annotations; keep one of them")
        elif "annotations" in row or "mask" in row:
            match = pattern.search(stem)
            slide = (match.group(1) if pattern.groups else match.group()) if match else None
            if not slide:
                problems.append(f"{root}: --slide-pattern {slide_pattern!r} finds no slide in {stem!r}; "
                                "change it")
            row = {column: found[0].relative_to(root).as_posix() for column, found in row.items()}
            rows.append({**row, "slide": slide})
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    if not rows:
        raise UserError(f"{root}: no image has a partner of the same stem in masks/ or annotations/; rename "
                        "the files")
    lonely = [path for stem, paths in images.items() for path in paths
              if stem not in partners["mask"] and stem not in partners["annotations"]]
    lonely += [path for found in partners.values() for stem, paths in found.items() if stem not in images
               for path in paths]
    columns = [column for column in ("image", *partners, "slide") if any(column in row for row in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(table_path, text.getvalue())
    slides = sorted({row["slide"] for row in rows})
    for path in lonely:
        print(f"no partner: {path}")
    print(f"{table_path}: {len(rows)} images of {len(slides)} slides ({', '.join(slides[:6])}"
          f"{', ...' if len(slides) > 6 else ''}), {len(lonely)} files without a partner left out")
    print("Are these the slides? The split rests on them; if not, remove the file and give --slide-pattern. "
          f"Columns that can be added: score, split, x, y, downsample. Next: python -m her2.data {root}")
    return 0


def main(argv=None) -> int:
    parser = Parser(prog="python -m her2.data", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="the dataset folder")
    parser.add_argument("--seed", type=int, default=0, help="of the split, where slides.csv has none "
                        "[%(default)s]")
    parser.add_argument("--out", help="the picture [runs/data_NAME.png]")
    parser.add_argument("--um-per-px", type=float, help="micrometres per pixel: areas in mm2 instead of "
                        "megapixels")
    parser.add_argument("--index", action="store_true", help="write slides.csv instead of checking")
    parser.add_argument("--slide-pattern", metavar="REGEX", default=SLIDE_PATTERN, help="with --index: its "
                        "first match (or its first group) in the file name without ending is the slide "
                        "[%(default)s]")
    args = parser.parse_args(argv)
    if args.um_per_px is not None and not 0 < args.um_per_px < 1000:
        raise UserError(f"--um-per-px: found {args.um_per_px}; give micrometres per pixel, such as 0.242")
    if args.index:
        return index(args.folder, args.slide_pattern)
    return check(args.folder, args.seed, args.out, args.um_per_px)


if __name__ == "__main__":
    command(main)
