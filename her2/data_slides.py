"""slides.csv: the table of a dataset folder, one row per image, and the split of its slides.

Every problem is collected as one line with file, line and remedy, so that a user sees all at once. Paths stay
inside the folder: a table that comes from somewhere else must not make a program read other files.

The split. Patches of one slide resemble each other far more than patches of two, so slides are split, never
images. Without a `split` column 60/20/20 per cent of the slides go to train, val and test, stratified by HER2
score: slides are put in order of their scores, shuffled among equals, and the m held-out ones are taken at
even distances n/m from a random start (systematic sampling: a score that s of the n slides have gives floor
or ceil of s m/n of them). They go to val and test in turn.
"""

import csv
import io
import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath
from unicodedata import normalize

from her2.data_classes import read_text
from her2.run_errors import UserError, one_line, script_line
from her2.data_images import read_size
from her2.run_seeds import numpy_generator

SPLITS = ("train", "val", "test")
FILES = ("image", "annotations", "mask", "instances")
COLUMNS = (*FILES, "x", "y", "downsample", "slide", "score", "split")
INDEX_REMEDY = "see the README for its columns, or have it written: python -m her2.data DIR --index"


@dataclass(frozen=True)
class ROI:
    """One row of slides.csv: an image (a region of interest or a patch) and where its labels come from."""
    name: str                  # the `image` column: unique in the dataset
    image: Path
    annotations: Path | None   # polygons, or
    mask: Path | None          # class ids per pixel; neither of the two = no tumor in this image
    instances: Path | None     # with `mask`: instance ids per pixel
    x: float                   # p_image = (p_annotation - (x, y)) / downsample
    y: float
    downsample: float
    slide: str                 # the unit of the split
    score: str                 # HER2 score of the slide, "" = not given
    split: str                 # one of SPLITS, "" before it is decided
    height: int
    width: int


def read_slides(root) -> tuple[list[ROI], list[str], list[str]]:
    """(regions, problems, notes) of the dataset folder `root`; regions with a problem are left out. UserError
    when the table itself cannot be read."""
    path = Path(root) / "slides.csv"
    rows, rois, problems, notes, seen = _read_table(path), [], [], [], {}
    if unknown := [repr(name) for name in rows[0][1] if name not in COLUMNS]:
        notes.append(f"{path}: columns {', '.join(unknown)} are not used; known are {', '.join(COLUMNS)}")
    for line, row in rows:
        roi, found = _read_row(Path(root), row)
        first = seen.setdefault(os.path.realpath(roi.image), line) if roi else line
        if first != line:
            found.append(f"image {roi.name} stands in line {first} already; remove one of the two rows")
        problems += [f"{path}: line {line}: {problem}" for problem in found]
        rois += [roi] if not found else []
    values = defaultdict(set)                               # {(slide, column): what its rows have there}
    for roi in rois:
        values[roi.slide, "split"].add(roi.split)
        values[roi.slide, "score"].add(roi.score)
    problems += [f"{path}: slide {slide!r} has the {column}s {', '.join(map(repr, sorted(found)))}; write "
                 "the same in each row" for (slide, column), found in values.items() if len(found) > 1]
    without = [roi.name for roi in rois if not roi.split]
    if 0 < len(without) < len(rois):
        problems.append(f"{path}: {len(without)} rows have no split ({without[0]}, ...); fill in all or none")
    if bare := [roi.name for roi in rois if roi.annotations is None and roi.mask is None]:
        notes.append(f"{path}: {len(bare)} images have neither annotations nor mask and count as tissue "
                     f"without tumor: {', '.join(bare[:3])}{' ...' if len(bare) > 3 else ''}")
    return rois, problems, notes


def generating_command(root, *flags) -> str:
    """The command line that made the synthetic set in `root`, with more `flags`; "" for any other folder."""
    try:
        content = json.loads((Path(root) / "config.json").read_text(encoding="utf-8"))
        return script_line(*content["command"], *flags) if content["script"] == "generate.py" else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _read_table(path) -> list:
    """[(line number, {column: text})], at least one. UserError when the table itself cannot be read."""
    root, how = path.parent, f"write one row per image, {INDEX_REMEDY}"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds slides.csv")
    if not path.is_file():
        again = generating_command(root)
        if again or (root / "manifest.jsonl").exists():
            raise UserError(f"{root}: a synthetic set that is not finished; give the command of generate.py "
                            f"again: {again or 'it had this --out'}")
        raise UserError(f"{path}: no such file; {how}")
    text = read_text(path, "save the table as CSV with the encoding UTF-8")
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV table ({one_line(error)}); save it again as CSV") from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if len(lines) < 2:
        raise UserError(f"{path}: {'no rows' if lines else 'an empty file'}; {how}")
    (_, header), *rows = lines
    while not header[-1]:
        header.pop()  # spreadsheets write empty columns behind the last one
    header = [name.lower() for name in header]
    missing = [" or ".join(map(repr, names)) for names in (["image"], ["slide"], ["annotations", "mask"])
               if not set(names) & set(header)]
    if missing:
        raise UserError(f"{path}: no column {' and no column '.join(missing)} in the first line, which has "
                        f"{one_line(header)[:120]}; save it with commas, {INDEX_REMEDY}")
    for name in header:
        meant = get_close_matches(name, set(COLUMNS) - set(header), n=1, cutoff=0.8)
        if header.count(name) > 1:
            raise UserError(f"{path}: column {name!r} stands twice in the first line; remove one")
        if name not in COLUMNS and meant:  # ignored, a mistyped x or split would change the data in silence
            raise UserError(f"{path}: column {name!r} is not known; write {meant[0]!r} if that is meant, "
                            "else give it another name")
    for line, cells in rows:
        if len(cells) < len(header) or any(cells[len(header):]):
            raise UserError(f"{path}: line {line} has {len(cells)} cells, the first line has {len(header)}; "
                            "put a text that holds a comma in quotation marks")
    return [(line, dict(zip(header, cells))) for line, cells in rows]


def _read_row(root, row):
    """(the ROI of one row, or None; problems)"""
    row = {**dict.fromkeys(COLUMNS, ""), **row}
    files, numbers, problems = dict.fromkeys(FILES), {}, []
    for column in filter(row.get, FILES):
        try:
            files[column] = _path_inside(root, row[column].replace("\\", "/"), column)
            if column == "image":
                height, width = read_size(files[column])
        except UserError as error:
            problems.append(str(error))
    for column, default in (("x", 0.0), ("y", 0.0), ("downsample", 1.0)):
        try:
            numbers[column] = float(row[column] or default)
        except ValueError:
            numbers[column] = math.nan
    split = row["split"].lower()
    problems += [problem for wrong, problem in (
        (not row["image"], "the image cell is empty; name an image or remove the line"),
        (row["annotations"] and row["mask"], "annotations and mask are both given; leave one of them empty"),
        (row["instances"] and not row["mask"], "instances without a mask; give it, or leave instances empty"),
        *((not abs(number) <= 1e9, f"{column} is {row[column]!r}; write a number, with a decimal point")
          for column, number in numbers.items()),      # not >, which is false for NaN
        (numbers["downsample"] <= 0,
         f"downsample is {row['downsample']!r}; it is the annotation's pixels per image pixel, above 0"),
        (not row["slide"], "the slide cell is empty; write the id of the slide or patient"),
        (split not in ("", *SPLITS),
         f"split is {row['split']!r}; write {', '.join(SPLITS)}, or leave the column empty")) if wrong]
    if problems:
        return None, problems
    return ROI(name=files["image"].relative_to(root).as_posix(), **files, **numbers, slide=row["slide"],
               score=row["score"], split=split, height=height, width=width), []


def _path_inside(root, text, column) -> Path:
    """root/text if it is a file of the user's own. UserError otherwise, without the table's name and line."""
    parts, cell = PurePosixPath(text), f"{column} {text[:200]!r}"
    if parts.is_absolute() or PureWindowsPath(text).drive or ".." in parts.parts:
        raise UserError(f"{cell} is not a path inside the dataset folder; write it relative to slides.csv")
    path = root
    for name in parts.parts:    # names that differ in their Unicode form alone are the same: macOS writes NFD
        there = os.listdir(path) if os.path.isdir(path) and not os.path.exists(path / name) else []
        same = [child for child in there if normalize("NFC", child) == normalize("NFC", name)]
        path /= same[0] if len(same) == 1 else name
    if not os.path.isfile(path):
        raise UserError(f"{cell}: no such file in {root}; correct the path or remove the line")
    # Users link to their own images; a table from elsewhere must not reach what is not in their own tree.
    real, base, home = (Path(os.path.realpath(one)) for one in (path, root, Path.home()))
    if not (real.is_relative_to(base.parent) or real.is_relative_to(home)):
        raise UserError(f"{cell} is a link that leads out of your own files, to {real}; put the file there")
    return path


def assign_splits(scores: dict, seed: int) -> dict:
    """{slide: split} for {slide: score}: 60/20/20 by slide, stratified by score, no split empty. A function
    of the slides, their scores and `seed` alone; the order of the rows does not matter."""
    n = len(scores)
    assert n >= 3, f"{n} slides cannot be split into train, val and test"
    # PAPER: 24-8-8 slides with the same number of sections of each score per set; this is its 60/20/20.
    rng = numpy_generator(seed, "split")
    slides = [sorted(scores)[i] for i in rng.permutation(n)]
    slides.sort(key=scores.get)  # stable: by score, shuffled among equals
    each = max(1, math.floor(0.2 * n + 0.5))
    start, first = rng.random(), int(rng.integers(2))
    held_out = [slides[math.floor((start + k) * n / (2 * each))] for k in range(2 * each)]
    turn = {slide: ("val", "test")[(first + k) % 2] for k, slide in enumerate(held_out)}
    return {slide: turn.get(slide, "train") for slide in slides}
