"""slides.csv: the table of a dataset folder, and the split of its slides.

One row per image; the columns are those of `COLUMNS`, in any order. Every problem is collected as one line
that names file, line and remedy, so that a user sees all of them at once and not one per attempt. Paths stay
inside the folder: a table that comes from somewhere else must not make a program read other files.

The split. Patches of one slide resemble each other far more than patches of two, so slides are split, never
images. Without a `split` column 60/20/20 per cent of the slides go to train, val and test, stratified by
HER2 score: slides are put in order of their scores, shuffled among equals, and the held-out ones are taken
at even distances n/m from a random start. A score that s of the n slides have then gives floor or ceil of
s m/n of the m held-out ones (systematic sampling), and they go to val and test in turn.
"""

import csv
import io
import json
import math
import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath

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
    """(regions, problems, notes) of the dataset folder `root`; regions with a problem are left out.

    A problem makes the dataset unusable; a note is something that the user should know.
    """
    path = Path(root) / "slides.csv"
    if not Path(root).is_dir():
        return [], [f"{root}: no such folder; give the folder that holds slides.csv"], []
    again = generating_command(root)
    if not path.is_file() and (again or (Path(root) / "manifest.jsonl").exists()):
        return [], [f"{root}: a synthetic set that is not finished; give the command of generate.py again: "
                    f"{again or 'it had this --out'}"], []
    if not path.is_file():
        return [], [f"{path}: no such file; write one row per image, {INDEX_REMEDY}"], []
    try:
        header, rows = _read_table(path)
    except UserError as error:
        return [], [str(error)], []

    problems, notes = [], []
    unknown = [name for name in header if name not in COLUMNS]
    if unknown:
        notes.append(f"{path}: columns {', '.join(map(repr, unknown))} are not used; known are "
                     f"{', '.join(COLUMNS)}")
    base = Path(os.path.realpath(root))
    rois, seen = [], {}
    for line, row in rows:
        found = []
        roi = _read_row(base, Path(root), row, found)
        problems += [f"{path}: line {line}: {problem}" for problem in found]
        real = None if roi is None else os.path.realpath(roi.image)
        if real in seen:
            problems.append(f"{path}: line {line}: image {roi.name} stands in line {seen[real]} already; "
                            "remove one of the two rows")
        elif roi is not None:
            seen[real] = line
            try:
                height, width = read_size(roi.image)
                rois.append(replace(roi, height=height, width=width))
            except UserError as error:
                problems.append(str(error))
    if not rows:
        problems.append(f"{path}: no rows; write one row per image, {INDEX_REMEDY}")
    problems += [f"{path}: {problem}" for problem in _slide_problems(rois)]
    bare = [roi.name for roi in rois if roi.annotations is None and roi.mask is None]
    if bare:
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


def _read_table(path) -> tuple[list[str], list]:
    """(header, [(line number, {column: text})]). UserError when the table itself cannot be read."""
    text = read_text(path, "save the table as CSV with the encoding UTF-8")
    if "\0" in text:
        raise UserError(f"{path}: not a CSV table (it holds NUL bytes); save it again as CSV")
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
        lines = [(number, cells) for number, cells in lines if any(cells)]
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV table ({one_line(error)}); save it again as CSV") from error
    if not lines:
        raise UserError(f"{path}: an empty file; write one row per image, {INDEX_REMEDY}")
    (_, header), *rows = lines
    while header and not header[-1]:
        header.pop()  # spreadsheets write empty columns behind the last one
    header = [name.lower() for name in header]
    rows = [(line, cells if any(cells[len(header):]) else cells[:len(header)]) for line, cells in rows]
    missing = [name for name in ("image", "slide") if name not in header]
    if missing:
        separator = next((s for s in (";", "\t") if s in "".join(header)), None)
        hint = f"its cells are separated by {separator!r}: save it with commas" if separator else INDEX_REMEDY
        raise UserError(f"{path}: no column {' and no column '.join(map(repr, missing))} in the first line, "
                        f"which has {one_line(header)[:120]}; {hint}")
    if "annotations" not in header and "mask" not in header:
        raise UserError(f"{path}: neither a column 'annotations' nor a column 'mask'; add one of them")
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise UserError(f"{path}: column {twice[0]!r} stands twice in the first line; remove one")
    for name in header:
        meant = get_close_matches(name, set(COLUMNS) - set(header), n=1, cutoff=0.8)
        if name not in COLUMNS and meant:  # ignored, a mistyped x or split would change the data in silence
            raise UserError(f"{path}: column {name!r} is not known; write {meant[0]!r} if that is meant, "
                            "else give it another name")
    for line, cells in rows:
        if len(cells) != len(header):
            raise UserError(f"{path}: line {line} has {len(cells)} cells, the first line has {len(header)}; "
                            "put a text that holds a comma in quotation marks")
    return header, [(line, dict(zip(header, cells))) for line, cells in rows]


def _read_row(base, root, row, problems):
    """The ROI of one row (size still 0), or None; problems are appended to `problems`."""
    files = {}
    for column in FILES:
        if row.get(column):
            files[column] = _path_inside(base, root, column, row[column], problems)
    if not row["image"]:
        problems.append("the image cell is empty; name an image or remove the line")
    if row.get("annotations") and row.get("mask"):
        problems.append("annotations and mask are both given; leave one of the two empty")
    if row.get("instances") and not row.get("mask"):
        problems.append("instances without a mask; give the mask as well, or leave instances empty")
    numbers = {}
    for column, default in (("x", 0.0), ("y", 0.0), ("downsample", 1.0)):
        try:
            numbers[column] = float(row.get(column) or default)
        except ValueError:
            numbers[column] = math.nan
        if not math.isfinite(numbers[column]) or abs(numbers[column]) > 1e9:
            problems.append(f"{column} is {row[column]!r}; write a number, with a decimal point")
    if numbers["downsample"] <= 0:
        problems.append(f"downsample is {row['downsample']!r}; it is the annotation's pixels per image "
                        "pixel, above 0")
    if not row["slide"]:
        problems.append("the slide cell is empty; write the id of the slide or patient")
    split = row.get("split", "").lower()
    if split not in ("", *SPLITS):
        problems.append(f"split is {row['split']!r}; write {', '.join(SPLITS)}, or leave the column empty")
    if problems:
        return None
    files = {column: files.get(column) for column in FILES}
    return ROI(name=files["image"].relative_to(root).as_posix(), **files, **numbers, slide=row["slide"],
               score=row.get("score", ""), split=split, height=0, width=0)


def _path_inside(base, root, column, text, problems):
    """root/text if it is a file inside the real folder `base`, else None and a problem."""
    text = text.replace("\\", "/")
    shown = repr(text if len(text) <= 200 else text[:200] + "...")
    parts = PurePosixPath(text)
    if parts.is_absolute() or PureWindowsPath(text).drive or ".." in parts.parts:
        problems.append(f"{column} {shown} is not a path inside the dataset folder; write it relative to "
                        "slides.csv")
        return None
    path = _spelled_as_on_disk(root, parts)
    if not os.path.isfile(path):
        problems.append(f"{column} {shown}: no such file in {root}; correct the path or remove the line")
        return None
    # Users link to their own images; a table from elsewhere must not reach what is not in their own tree.
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(Path.home()))
    if not any(real.is_relative_to(tree) for tree in (base, base.parent, home)):
        problems.append(f"{column} {shown} is a link that leads out of your own files, to {real}; put the "
                        "file itself there")
        return None
    return path


def _spelled_as_on_disk(root, parts) -> Path:
    """root/parts, or if there is none, names that differ in their Unicode form alone (macOS writes NFD)."""
    path = root / parts
    if not os.path.exists(path):
        path = root
        for name in parts.parts:
            same = [child for child in os.listdir(path) if unicodedata.normalize("NFC", child)
                    == unicodedata.normalize("NFC", name)] if os.path.isdir(path) else []
            path /= same[0] if len(same) == 1 else name
    return path


def _slide_problems(rois) -> list[str]:
    """Contradictions between rows of the same slide."""
    problems = []
    for slide in dict.fromkeys(roi.slide for roi in rois):
        splits = sorted({roi.split for roi in rois if roi.slide == slide and roi.split})
        scores = sorted({roi.score for roi in rois if roi.slide == slide})
        if len(splits) > 1:
            problems.append(f"slide {slide!r} is in {' and '.join(splits)}; all images of a slide belong to "
                            "one split")
        if len(scores) > 1:
            problems.append(f"slide {slide!r} has the scores {', '.join(map(repr, scores))}; write the same "
                            "in each row")
    without = [roi.name for roi in rois if not roi.split]
    if 0 < len(without) < len(rois):
        problems.append(f"{len(without)} rows have no split ({without[0]} is the first), others have one; "
                        "fill in all or none")
    return problems


def assign_splits(scores: dict, seed: int) -> dict:
    """{slide: split} for {slide: score}: 60/20/20 by slide, stratified by score, no split empty.

    A function of the slides, their scores and `seed` alone; the order of the rows does not matter.
    Raises ValueError for fewer than three slides.
    """
    n = len(scores)
    if n < 3:
        raise ValueError(f"{n} slides cannot be split into train, val and test")
    # PAPER: 24-8-8 slides with the same number of sections of each score per set; this is its 60/20/20.
    rng = numpy_generator(seed, "split")
    slides = [sorted(scores)[i] for i in rng.permutation(n)]
    slides.sort(key=scores.get)  # stable: by score, shuffled among equals
    each = max(1, math.floor(0.2 * n + 0.5))
    start, first = rng.random(), int(rng.integers(2))
    held_out = [slides[math.floor((start + k) * n / (2 * each))] for k in range(2 * each)]
    turn = {slide: ("val", "test")[(first + k) % 2] for k, slide in enumerate(held_out)}
    return {slide: turn.get(slide, "train") for slide in slides}
