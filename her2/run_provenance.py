"""What a result was made from: the content of files, the commit of this code, the packages' versions.

A run records the SHA-256 of every file that it learned from in its config.json, by the field that named it:
"inputs": {"data": {"images/a.png": "..", ..}, "autoencoder": {"model.pt": ".."}}. So it can be said which
file changed since, and the same files count as the same wherever they lie now.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL
import torch
from tqdm import tqdm

from her2.data_classes import parse_json, read_text
from her2.data_folder import Dataset
from her2.run_distributed import rank
from her2.run_errors import ROOT, UserError, atomic_write

REMEDY = "restore or remove the file"
FILES = ("autoencoder", "model", "init", "vgg", "lpips")      # fields that name a file or a run
# What must be of which kind in config.json where it is read; "fields" comes before what stands in it.
KINDS = {"cwd": str, "fields": dict, "inputs": dict, "steps": int, "split_seed": int, "patch": int,
         **dict.fromkeys(("out", "data", "autoencoder", "model", "synthetic"), str)}


def model_file(path) -> Path:
    """The model.pt of a run folder, or the file itself."""
    return Path(path, "model.pt") if Path(path).is_dir() else Path(path)


def file_hash(path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:          # in blocks: a network or a region may be larger than the memory
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_hashes(paths, cache="cache") -> list[str]:
    """`file_hash` of many files; `cache`/hashes.json spares the reading of those that are as they were."""
    store, known, fresh, hashes = Path(cache) / "hashes.json", {}, {}, []
    with suppress(OSError, ValueError, TypeError):          # whatever is wrong with a cache, it is made again
        known = dict(json.loads(store.read_text(encoding="utf-8")))
    for path in tqdm(paths, desc="comparing files", unit="file", delay=3, leave=False, disable=None):
        status = os.stat(path)
        key = f"{os.path.realpath(path)}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"
        hashes.append(known.get(key) or file_hash(path))
        # Clocks of file systems are coarse: what was written a moment ago may change and keep its time.
        if key not in known and time.time() - max(status.st_mtime, status.st_ctime) > 2:
            fresh[key] = hashes[-1]
    if fresh:
        atomic_write(store, json.dumps({**known, **fresh}))
    return hashes


def data_hashes(dataset: Dataset, cache="cache", splits=("train",)) -> dict:
    """{path relative to the dataset: SHA-256} of all that the regions of `splits` consist of. "slides.csv"
    and "classes.json" stand for what they say about these regions, however a spreadsheet saved them again."""
    root, files = dataset.root, {}                      # files: {path relative to the dataset: path}
    rows = [asdict(roi) for roi in dataset.rois if roi.split in splits]
    if (root / "manifest.jsonl").exists():
        files["manifest.jsonl"] = root / "manifest.jsonl"
    for row in rows:
        for column, path in row.items():
            if isinstance(path, Path):
                row[column] = path.relative_to(root).as_posix()
                files[row[column]] = path
    said = {"slides.csv": rows, "classes.json": dataset.classes.to_json()}
    if dataset.classes.masks:                           # how masks are read; most tables do not say it
        said["classes.json"] = [said["classes.json"], dataset.classes.masks]
    return {**{name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in said.items()},
            **dict(zip(files, file_hashes(files.values(), cache)))}


def input_hashes(config, data: Dataset, synthetic: Dataset = None) -> dict:
    """{field: {name: hash}} of the datasets, and of the files and runs that FILES of `config` name. A warning
    for what was made from the same data before they changed."""
    sets = {"data": data, "synthetic": synthetic} if synthetic else {"data": data}
    files = {name: model_file(getattr(config, name)) for name in FILES if getattr(config, name, "")}
    for source in [*(getattr(config, name) for name in files), *([synthetic.root] if synthetic else [])]:
        for line in changed_since(source, data, config.cache):
            if not rank():      # not by say(), which says one line a run: that would silence a later error
                print(f"warning: {line}", file=sys.stderr)
    return {**{name: data_hashes(one, config.cache) for name, one in sets.items()},
            **{name: {file.name: file_hash(file)} for name, file in files.items()}}


def differences(old: dict, new: dict) -> list[str]:
    """What became of `old` {name: hash}: ["masks/a.png changed", "images/b.png is new", "c.png is gone"]."""
    return [f"{name} " + ("is new" if name not in old else "is gone" if name not in new else "changed")
            for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]


def in_short(changes) -> str:
    return ", ".join(changes[:9]) + (f" and {len(changes) - 9} more" if len(changes) > 9 else "")


def read_record(folder) -> dict:
    """config.json of the run in `folder`: {"script", "cwd" (where it was started), "fields", "inputs", ...},
    these empty without the file. UserError where a value that is read anywhere is of the wrong kind."""
    path = Path(folder) / "config.json"
    content = parse_json(read_text(path, REMEDY), path, REMEDY) if path.exists() else {}
    record = {"script": "no known script", "cwd": "", "fields": {}, "inputs": {}}
    record |= content if isinstance(content, dict) else {"fields": content}
    for name, kind in KINDS.items():
        value = (record if name in record else record["fields"]).get(name, kind())
        if type(value) is not kind or name == "inputs" and {*map(type, value.values())} - {dict}:
            raise UserError(f"{path}: no good field {name} ({value!r:.80}); {REMEDY}")
    return record


def locate(folder, field: str = "data") -> str:
    """Where the folder or file that `field` of a run named is by now, "" for nowhere: at the same place
    relative to the run (both may have moved), else where it was; as it was named if that means the same."""
    record = read_record(folder)
    named = record["fields"].get(field, "")
    run = os.path.join(record["cwd"], record["fields"].get("out", ""))
    found = [os.path.join(record["cwd"], named)] if named else []
    with suppress(ValueError):              # on two drives of Windows
        found = [*(os.path.join(folder, os.path.relpath(path, run)) for path in found), *found]
    for path in filter(os.path.exists, found):
        return named if os.path.realpath(path) == os.path.realpath(named) else os.path.normpath(path)
    return ""


def trained_with(path, config) -> dict:
    """{"data", "split_seed", "patch"} of the run that made the network or the synthetic set in `path`. What
    nothing tells is left out; a UserError for the data, unless `config` names them."""
    folder = model_file(path).parent
    fields = read_record(folder)["fields"]
    found = {name: fields[name] for name in ("split_seed", "patch") if name in fields}
    if not config.data and Path(path).exists():
        found["data"] = locate(folder)
        if not found["data"]:
            named = fields.get("data") or "no config.json beside it"
            raise UserError(f"{path}: the data it was made with are not found ({named}); give --data")
    return found


def changed_since(path, dataset: Dataset, cache="cache") -> list[str]:
    """One line if the run `path` learned from `dataset` and that has another content now, else none."""
    folder = model_file(path).parent
    known, place = read_record(folder)["inputs"].get("data"), locate(folder)
    if not known or not place or not os.path.samefile(place, dataset.root):
        return []
    changes = in_short(differences(known, data_hashes(dataset, cache)))
    return [f"{path} is stale: {dataset.root} changed since it was trained ({changes}); "
            "train it again"] if changes else []


def versions() -> dict:
    """Of this code (its commit, '+' when the working tree differs from it) and of what it runs on."""
    line, git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"], "unknown"
    with suppress(OSError, subprocess.CalledProcessError):              # outside a repository
        git = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return {"git": git, "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                     "numpy": np.__version__, "pillow": PIL.__version__}}
