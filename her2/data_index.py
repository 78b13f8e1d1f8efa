"""The two files of a dataset that can be drafted: slides.csv from the folders, classes.json from the names.

A draft is a proposal for a person to check; neither file is ever written over an existing one.
"""

import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from her2.data_annotations import likely_class
from her2.data_classes import DEFAULT_CLASSES, NO_CLASS, csv_text, read_text
from her2.data_formats import read_file
from her2.data_images import ENDINGS, LOSSLESS, read_mask
from her2.data_slides import read_slides
from her2.run_errors import UserError, atomic_write, check_line

# The first match in the file name is the slide. Rather too coarse than fine: two slides taken for one cost
# a little data, one slide taken for two leaks from training into the test.
SLIDE_PATTERN = "[^_]+"
ANNOTATIONS = [".geojson", ".json", ".xml", ".txt", ".csv"]
# What programs hang on the image's name: QuPath "-labels", CVAT and others "_mask".
ADDED = re.compile(r"[ ._-]+(masks?|labels?|labelmap|seg(mentation)?|gt|annotations?|instances?)$", re.I)


def files_by_stem(folder, endings, images=None) -> dict:
    """{stem: [files]} of one folder, {} if there is none, without hidden files and other endings. A stem is a
    name without its endings, double ones too (.geojson.gz, .ome.tif, .png.json), in Unicode form C; one that
    is none of `images` loses what programs add to it ("a_mask" belongs to "a")."""
    known = "|".join(ending[1:] for ending in [*ENDINGS, *ANNOTATIONS, ".gz", ".ome"])
    found = defaultdict(list)
    for path in sorted(folder.glob("[!.]*")):
        if path.is_file() and path.name.lower().removesuffix(".gz").endswith(tuple(endings)):
            name = re.sub(rf"(\.({known}))+$", "", unicodedata.normalize("NFC", path.name), flags=re.I)
            found[name if images is None or name in images else ADDED.sub("", name)].append(path)
    return dict(found)


def index(root, slide_pattern: str) -> int:
    """Write slides.csv for the folder `root`: images paired with masks or annotations of the same stem."""
    root, table_path = Path(root), Path(root) / "slides.csv"
    try:
        pattern = re.compile(slide_pattern)
    except re.error as error:
        raise UserError(f"--slide-pattern {slide_pattern!r}: not a regular expression ({error}); quote it, "
                        "and escape special characters with a backslash") from error
    refuse_existing(table_path)
    images = files_by_stem(root / "images", ENDINGS)
    if not images:
        raise UserError(f"{root / 'images'}: no {', '.join(ENDINGS)}; put the images into this folder")
    files = {"image": images, "annotations": files_by_stem(root / "annotations", ANNOTATIONS, images),
             "mask": files_by_stem(root / "masks", LOSSLESS, images),
             "instances": files_by_stem(root / "instances", LOSSLESS, images)}
    if len(files["annotations"]) == 1 and not files["annotations"].keys() & images:     # one file for all?
        [[path, *_]] = files["annotations"].values()
        shared = {}
        for name in images:     # those that the file says it is of, alone or among others (COCO, text)
            with suppress(UserError):
                if read_file(path, images[name][0]).about[0] is not None:
                    shared[name] = [path]
        files["annotations"] = shared or files["annotations"]
    problems, rows = [], {}
    for name in images:
        row = {column: found[name] for column, found in files.items() if name in found}
        match = pattern.search(name)
        slide = match and match.group(1 if pattern.groups else 0)
        twice = [path.name for paths in row.values() if len(paths) > 1 for path in paths]
        if not row.keys() & {"annotations", "mask"}:
            continue
        problems += [f"{root}: {problem}" for wrong, problem in (
            (twice, f"{' and '.join(twice)} have the same stem; keep one of them"),
            ("annotations" in row and "mask" in row, f"{name} has a mask and annotations; keep one of them"),
            (not slide, f"--slide-pattern {slide_pattern!r} finds no slide in {name!r}; give one that does, "
             "or rename the file")) if wrong]
        rows[name] = {column: paths[0].relative_to(root).as_posix() for column, paths in row.items()}
        rows[name]["slide"] = slide
    if not rows:
        problems = [f"{root}: no image has a partner of the same stem in masks/ or annotations/; rename them"]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    atomic_write(table_path, csv_text(rows.values(), [*files, "slide"]))
    lonely = [path for found in files.values() for name, paths in found.items() if name not in rows
              for path in paths]
    for path in lonely:
        print(f"no partner: {path}")
    slides = sorted({row["slide"] for row in rows.values()})
    print(f"{table_path}: {len(rows)} images of {len(slides)} slides ({', '.join(slides[:6])}"
          f"{', ...' * (len(slides) > 6)}), {len(lonely)} files without a partner left out")
    print("Are these the slides? The split rests on them; if not, remove the file and give --slide-pattern. "
          f"Columns that can be added: score, split, x, y, downsample. Next: {check_line(root)}")
    return 0


def refuse_existing(path) -> None:
    if path.exists():
        raise UserError(f"{path}: exists already and is never overwritten; rename it, and copy into the new "
                        "one what was right")


def draft_classes(root) -> None:
    """Write classes.json with every name that the annotations (and every colour that the masks) hold."""
    path = Path(root) / "classes.json"
    refuse_existing(path)
    rois, problems, _ = read_slides(root)
    if problems:
        raise UserError(problems[0])
    names = Counter()
    for roi in tqdm(rois, desc="names", unit="ROI", disable=None, leave=False):
        if roi.annotations:
            names.update(p.name or NO_CLASS for p in read_file(roi.annotations, roi.image).polygons)
        elif roi.mask and (mask := read_mask(roi.mask)).ndim == 3:
            colors = np.unique(mask.reshape(-1, 3), axis=0)
            names.update("#%02x%02x%02x" % tuple(color) for color in colors[:64])
    labelmap = path.with_name("labelmap.txt")       # of CVAT: label:red,green,blue:parts:actions
    text = read_text(labelmap, "export it again from CVAT, or remove it") if labelmap.is_file() else ""
    labels = {"#%02x%02x%02x" % tuple(map(int, color)): label
              for label, *color in re.findall(r"^([^#\n].*?):(\d+),(\d+),(\d+)", text, re.M)}
    # The program that painted the masks knows better than the default table what its colours mean.
    colors = {"#%02x%02x%02x" % c.color for c in DEFAULT_CLASSES.classes} - labels.keys()
    aliases = {name: likely_class(labels.get(name, name), DEFAULT_CLASSES) for name in names
               if name not in {*DEFAULT_CLASSES.names, *colors}}
    if not aliases:
        print(f"{root}: every name is a class of the default table; no classes.json is needed for names")
        return
    atomic_write(path, json.dumps({"aliases": aliases}, indent=1, ensure_ascii=False) + "\n")
    for name, class_name in aliases.items():
        print(f"{names[name]:7} x {name!r}{f' ({labels[name]})' if name in labels else ''} -> {class_name}")
    print(f"{path}: a draft. Correct each line in it: \"ignore\" neither trains nor counts, \"Background\" "
          f"is learned as no tumor. Next: {check_line(root)}")
