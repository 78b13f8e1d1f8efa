"""A dataset folder: its class table, its regions, and which split each of them belongs to.

`load_dataset` reads slides.csv, classes.json and the images' headers, and decides the split; pixels are the
business of `data_regions` and `data_patches`. Runs that are compared must share their split, so it depends
on a seed of its own and is written into every run folder (`write_split`).

A synthetic dataset is the same kind of folder with `manifest.jsonl`, one JSON object per image, in which
`load_synthetic` reads that no synthetic image was made from a validation or test slide:

    {"image": "images/00001.png", "source_image": "images/a.png", "source_slide": "A", "x": .., "y": .., ...}

One slide under two names is what a split by slide cannot keep apart. `double_slides` finds names that differ
in spelling alone (case, leading zeros, blanks, Unicode form) and equal images under two slides: copies of a
file, and where all is decoded anyway (`her2.data`) equal pixels in whatever files.
"""

import hashlib
import json
import os
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from her2.data_classes import ClassTable, load_classes, parse_json, read_text
from her2.data_images import read_image
from her2.run_errors import UserError, atomic_write, check_line
from her2.data_slides import ROI, SPLITS, assign_splits, generating_command, read_slides

NEW_TISSUE = "new tissue: "       # a source that a phantom made up beyond its folder: nobody's, so no leak


@dataclass
class Dataset:
    root: Path
    classes: ClassTable
    rois: list[ROI]
    notes: list[str] = field(default_factory=list)   # what the user should know, one line each

    def split(self, name: str) -> list[ROI]:
        """The regions of "train", "val" or "test", in the order of slides.csv."""
        assert name in SPLITS, f"split {name!r}, known are {SPLITS}"
        return [roi for roi in self.rois if roi.split == name]

    def slides(self) -> dict:
        """{slide: split}"""
        return {roi.slide: roi.split for roi in self.rois}

    def origin(self) -> dict:
        """What a model says of the data that it was trained on: class table and split."""
        return {"classes": self.classes.to_json(), "split": self.slides()}


def inspect_dataset(root, seed: int = 0, require=(), split=None) -> tuple[Dataset, list[str]]:
    """(dataset, problems): everything that can be said without decoding an image. Problems: one line each,
    their rows left out of the dataset. UserError for a file without which nothing can be said. Arguments as
    in `load_dataset`."""
    root = Path(root)
    rois, problems, notes = read_slides(root)
    classes = load_classes(root)
    if not problems and not any(roi.split for roi in rois):
        scores, path = {roi.slide: roi.score for roi in rois}, root / "slides.csv"
        if split is not None:
            if unknown := sorted(scores.keys() - split):
                raise UserError(f"{path}: slide {unknown[0]!r} is not in the split of the other run, so the "
                                "data have changed; train again, or add a split column")
        elif (root / "manifest.jsonl").exists():
            split = dict.fromkeys(scores, "train")      # synthetic images are made for training
        elif len(scores) < 3:
            raise UserError(f"{path}: a split needs 3 slides, found {len(scores)}; add slides of other "
                            "patients")
        else:
            notes.append(f"{path}: no split column: {len(scores)} slides are split 60/20/20 from seed {seed}")
            split = assign_splits(scores, seed)
        rois = [replace(roi, split=split[roi.slide]) for roi in rois]
    leaks, doubles = double_slides(root, rois) if not problems else ([], [])
    dataset = Dataset(root, classes, rois, notes + doubles)
    return dataset, (problems + leaks) or empty_splits(dataset, require)


def plain_name(slide: str) -> str:
    """What two spellings of a name have in common: "Case 007" and "CASE7" -> "case7"."""
    text = unicodedata.normalize("NFKC", slide).casefold()
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)   # between two numbers a blank tells them apart
    return re.sub(r"(?<!\d)0+(?=\d)", "", text)


def double_slides(root, rois, contents=None) -> tuple[list[str], list[str]]:
    """A line for each two slides that are probably one: (problems, notes), for those in two splits leak from
    training into the test. `contents`: `content_key` of each region, "" = not compared; without it the files
    of different splits are compared."""
    problems, notes, seen = [], [], set()
    for keys, what, remedy in (
            ([plain_name(roi.slide) for roi in rois], "differ in spelling alone",
             "write the same slide (and split) in the rows of one slide, and clearly different ones for two"),
            (contents or equal_files(rois), "have the same image", "remove the line of one of the images")):
        first = {}
        for key, b in zip(keys, rois):
            a = first.setdefault(key, b)
            if not key or a.slide == b.slide or (a.slide, b.slide) in seen:
                continue
            seen.add((a.slide, b.slide))
            leak = f" and are in {a.split} and {b.split}" if a.split != b.split else ""
            (problems if leak else notes).append(
                f"{root / 'slides.csv'}: the slides {a.slide!r} ({a.name}) and {b.slide!r} ({b.name}) {what}"
                f"{leak}; {remedy}")
    return problems, notes


def content_key(image) -> str:
    """Equal where all pixels (H, W, 3) are; "" for an image of one colour, which is like any other."""
    return hashlib.sha256(np.ascontiguousarray(image)).hexdigest() if (image != image[0, 0]).any() else ""


def equal_files(rois) -> list[str]:
    """The `content_key` of each region whose file may be that of another split, "" for the others: to decode
    all files would take minutes, so size and middle say which."""
    glances, splits = [], defaultdict(set)          # (size, middle) of each file; {glance: splits}
    for roi in rois:
        with open(roi.image, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size // 2)
            glances.append((size, file.read(4096)))
        splits[glances[-1]].add(roi.split)
    return [content_key(read_image(roi.image)) if len(splits[glance]) > 1 else ""
            for glance, roi in zip(glances, rois)]


def load_dataset(root, seed: int = 0, require=SPLITS, split=None) -> Dataset:
    """The dataset in the folder `root`, headers checked, nothing decoded. UserError names the first problem.
    `seed` draws the split where slides.csv has none (it is not the seed of a training run); `split` is
    another run's `read_split` and takes its place. The splits in `require` must hold an image each."""
    dataset, problems = inspect_dataset(root, seed, require, split)
    if problems:
        more = f" (and {len(problems) - 1} more problems: {check_line(root)} lists them all)"
        raise UserError(problems[0] + more * (len(problems) > 1))
    return dataset


def empty_splits(dataset: Dataset, require=SPLITS) -> list[str]:
    """One problem per split of `require` that holds no image."""
    return [f"{dataset.root / 'slides.csv'}: no image in the split {name!r}; give it a slide in the column "
            "split, or empty that column" for name in require if not dataset.split(name)]


def write_split(path, dataset: Dataset) -> None:
    """Write {slide: split} as JSON, so that later programs use the same split."""
    atomic_write(path, json.dumps({"slides": dataset.slides()}, indent=1, ensure_ascii=False))


def read_split(path) -> dict:
    """{slide: split} as `write_split` wrote it."""
    remedy = "give the folder of a finished run or synthetic set, or make it again"
    content = parse_json(read_text(path, remedy), path, remedy)
    table = content.get("slides") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not all(split in SPLITS for split in table.values()):
        raise UserError(f"{path}: not a table of slides and their splits; {remedy}")
    return table


def load_synthetic(folder, real: Dataset, same_classes: bool = True) -> tuple[Dataset, dict]:
    """A folder made by generate.py: (dataset whose images are all for training, its manifest {image: line}).
    UserError when an image, or (split.json in the folder) the network that made it, has seen a slide that is
    not a training slide of `real`.

    same_classes  whether another class table is refused too"""
    synthetic = load_dataset(folder, require=("train",))
    path, entries, keys = synthetic.root / "manifest.jsonl", {}, ("image", "source_image", "source_slide")
    if not path.is_file():
        raise UserError(f"{path}: no such file, so nothing tells which slides the images come from; use a "
                        "folder that generate.py has completed")
    if set(synthetic.slides().values()) != {"train"}:
        raise UserError(f"{synthetic.root / 'slides.csv'}: images in the split val or test; synthetic images "
                        "are for training only, remove the split column")
    again = generating_command(synthetic.root, "--data", real.root) or "with generate.py"
    remedy = f"delete {synthetic.root} and make the images again: {again}"
    if same_classes and synthetic.classes != real.classes:
        raise UserError(f"{synthetic.root}: has another class table than {real.root}, so its masks mean "
                        f"something else; restore that table, or train the network again, then {remedy}")
    for number, line in enumerate(read_text(path, remedy).split("\n"), 1):
        if line.strip():
            entry = parse_json(line, f"{path}: line {number}", remedy)
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
                raise UserError(f"{path}: line {number} has no {', '.join(keys)}; {remedy}")
            entries[entry["image"]] = entry
    known, slides = {roi.name: roi.slide for roi in real.rois}, real.slides()
    for roi in synthetic.rois:
        if roi.name not in entries:
            raise UserError(f"{path}: nothing about {roi.name}, so its source is unknown; {remedy}")
        image, slide = entries[roi.name]["source_image"], entries[roi.name]["source_slide"]
        if image.startswith(NEW_TISSUE) and (real.root / "phantom.json").exists():
            continue
        split = slides[slide] if known.get(image) == slide else "not in it"
        if split != "train":
            raise UserError(f"{path}: {roi.name} was made from {image} of slide {slide}, no training slide "
                            f"of {real.root} ({split}); {remedy}")
    path = synthetic.root / "split.json"
    for slide, split in read_split(path).items() if path.exists() else ():
        if split == "train" and slides.get(slide, "train") != "train":
            raise UserError(f"{path}: the generating network was trained on slide {slide}, a "
                            f"{slides[slide]} slide of {real.root}; train it again with the same split")
    return synthetic, entries
