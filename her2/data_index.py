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


def stem(name: str) -> str:
    """A file name without its endings, double ones too (.geojson.gz, .ome.tif, .png.json); Unicode form C."""
    known = "|".join(ending[1:] for ending in [*ENDINGS, *ANNOTATIONS, ".gz", ".ome"])
    return re.sub(rf"(\.({known}))+$", "", unicodedata.normalize("NFC", name), flags=re.I)


def files_by_stem(folder, endings, images=None) -> dict:
    """{stem: [files]} of one folder, {} if there is none, without hidden files and other endings. A stem that
    is none of `images` loses what programs add to it ("a_mask" belongs to "a")."""
    found = defaultdict(list)
    for path in sorted(folder.glob("[!.]*")):
        if path.is_file() and path.name.lower().removesuffix(".gz").endswith(tuple(endings)):
            name = stem(path.name)
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
    partners = {"annotations": files_by_stem(root / "annotations", ANNOTATIONS, images),
                "mask": files_by_stem(root / "masks", LOSSLESS, images),
                "instances": files_by_stem(root / "instances", LOSSLESS, images)}
    shared = share_one_file(partners["annotations"], images)
    problems, rows = [], []
    for name, paths in images.items():
        row = {"image": paths, **{column: found[name] for column, found in partners.items() if name in found}}
        twice = [path.name for paths in row.values() if len(paths) > 1 for path in paths]
        if twice:
            problems.append(f"{root}: {' and '.join(twice)} have the same stem; keep one of them")
        elif "annotations" in row and "mask" in row:
            problems.append(f"{root}: {name} has a mask and annotations; keep one of them")
        elif "annotations" in row or "mask" in row:
            match = pattern.search(name)
            slide = match and match.group(1 if pattern.groups else 0)
            if not slide:
                problems.append(f"{root}: --slide-pattern {slide_pattern!r} finds no slide in {name!r}; give "
                                "one that does, or rename the file")
            row = {column: found[0].relative_to(root).as_posix() for column, found in row.items()}
            rows.append({**row, "slide": slide})
    if not rows and not problems:
        problems = [f"{root}: no image has a partner of the same stem in masks/ or annotations/; rename them"]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    labelled = {*partners["mask"], *partners["annotations"]}
    pairs = [(images, labelled), *((found, images) for found in partners.values())]
    lonely = [path for found, others in pairs for name, paths in found.items() if name not in others
              for path in paths]
    columns = [column for column in ("image", *partners, "slide") if any(column in row for row in rows)]
    atomic_write(table_path, csv_text(rows, columns))
    slides = sorted({row["slide"] for row in rows})
    for path in lonely:
        print(f"no partner: {path}")
    print(f"{table_path}: {len(rows)} images of {len(slides)} slides ({', '.join(slides[:6])}"
          f"{', ...' * (len(slides) > 6)}), {len(lonely)} files without a partner left out"
          f"{f'; all annotations from {shared}' if shared else ''}")
    print("Are these the slides? The split rests on them; if not, remove the file and give --slide-pattern. "
          f"Columns that can be added: score, split, x, y, downsample. Next: {check_line(root)}")
    return 0


def refuse_existing(path) -> None:
    if path.exists():
        raise UserError(f"{path}: exists already and is never overwritten; rename it, and copy into the new "
                        "one what was right")


def share_one_file(annotations: dict, images: dict):
    """If the only annotation file names the images (COCO, EXACT text), make it the partner of those it names
    in `annotations`; returns it, or None."""
    if sum(map(len, annotations.values())) != 1 or annotations.keys() & images:
        return None
    [(own, [path])] = annotations.items()
    for name, [image, *_] in images.items():
        with suppress(UserError):   # it holds nothing of this image, or is of a kind that names none
            if read_file(path, image).about[0] is not None:
                annotations[name] = [path]
    return path if len(annotations) > 1 and annotations.pop(own) else None


def draft_classes(root) -> None:
    """Write classes.json with every name that the annotations (and every colour that the masks) hold."""
    path = Path(root) / "classes.json"
    refuse_existing(path)
    rois, problems, _ = read_slides(root)
    if problems:
        raise UserError(problems[0])
    names, two_valued, scores = Counter(), 0, {roi.score for roi in rois}
    for roi in tqdm(rois, desc="names", unit="ROI", disable=None, leave=False):
        if roi.annotations:
            names.update(p.name or NO_CLASS for p in read_file(roi.annotations, roi.image).polygons)
        elif roi.mask:
            mask = read_mask(roi.mask)
            if mask.ndim == 3:
                colors = np.unique(mask.reshape(-1, 3), axis=0)
                names.update("#%02x%02x%02x" % tuple(color) for color in colors[:64])
            elif roi.instances is None:
                values = set(np.unique(mask).tolist())
                two_valued += values <= {0, 255} or values <= {0, 1} and len(scores) > 1
    labels = color_names(path.with_name("labelmap.txt"))
    own = [] if labels else ["#%02x%02x%02x" % c.color for c in DEFAULT_CLASSES.classes]
    aliases = {name: likely_class(labels.get(name, name), DEFAULT_CLASSES) for name in names
               if name not in {*DEFAULT_CLASSES.names, *own}}
    masks = sum(roi.mask is not None for roi in rois)
    content = {"aliases": aliases} if aliases else {}
    if masks and two_valued == masks:
        content["masks"] = "score"
    if not content:
        print(f"{root}: every name is a class of the default table; no classes.json is needed")
        return
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for name, class_name in aliases.items():
        print(f"{names[name]:7} x {name!r}{f' ({labels[name]})' if name in labels else ''} -> {class_name}")
    if "masks" in content:
        print(f"{masks} black-and-white masks -> tumor of the slide's score (column score of slides.csv)")
    print(f"{path}: a draft. Correct each line in it: \"ignore\" neither trains nor counts, \"Background\" "
          f"is learned as no tumor. Next: {check_line(root)}")


def color_names(path) -> dict:
    """{"#rrggbb": label} of CVAT's labelmap.txt (label:red,green,blue:parts:actions), {} without the file."""
    remedy, names = "export it again from CVAT, or remove it", {}
    for line in read_text(path, remedy).splitlines() if path.is_file() else ():
        if line.strip() and not line.startswith("#"):
            found = re.match(r"(.*?):(\d+),(\d+),(\d+)(:|$)", line)
            if not found:
                raise UserError(f"{path}: {line[:60]!r} is not label:red,green,blue:parts:actions; {remedy}")
            names["#%02x%02x%02x" % tuple(map(int, found.groups()[1:4]))] = found[1]
    return names
