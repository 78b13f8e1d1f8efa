"""The file of a seed: all that the report needs of it, small enough to be kept beside the code.

Per arm the outcome that `report_statistics` works on (counts per test slide at three points of operation,
thresholds, figures), the figures of `evaluate.py`, what was measured on its images, the machine, the
commit and the seconds of every stage. So seeds from several machines and days become one report.
"""

import math
import os
import platform
from pathlib import Path

import numpy as np
import torch

from her2 import report, report_statistics, run
from her2.data_folder import load_dataset, read_split
from her2.metrics import ProbabilityHistogram
from her2.report_statistics import Outcome
from her2.run_errors import UserError
from her2.run_provenance import git_commit, versions

FORMAT = 1


def to_json(one: Outcome) -> dict:
    """JSON has no NaN: a figure that does not exist is None there."""
    return {"scores": list(one.scores), "thresholds": one.thresholds,
            "tables": {point: table.tolist() for point, table in one.tables.items()},
            "figures": {point: {name: None if math.isnan(value) else value for name, value in found.items()}
                        for point, found in one.figures.items()}}


def from_json(content: dict) -> Outcome:
    tables = {point: np.array(table) for point, table in content["tables"].items()}     # ([M,] S, K, 2)
    tables = {point: table.reshape(-1, *table.shape[-3:]) for point, table in tables.items()}
    figures = {point: {name: math.nan if value is None else value for name, value in found.items()}
               for point, found in content["figures"].items()}
    return Outcome(tuple(content["scores"]), content["thresholds"], tables, figures)


def write_seed(config, seed: int, seconds: dict) -> None:
    """OUT/seeds/seedN.json from the evaluated runs in OUT/seedN; `seconds` {stage: seconds}. config: of
    `study`; what decides the figures is written with them."""
    root = Path(config.out) / f"seed{seed}"
    results = run.read_json(root / "report" / "results.json")
    folders = {arm["name"]: [Path(one.pop("folder")) for one in arm["runs"]] for arm in results["configs"]}
    baseline = folders[report.BASELINE][0]
    dataset = load_dataset(run.read_json(baseline / "config.json")["fields"]["data"],
                           split=read_split(baseline / "split.json"))
    scores, arms, fpr = {roi.slide: roi.score or "" for roi in dataset.rois}, {}, {}
    for name in sorted(folders, key=lambda name: name != report.BASELINE):  # the baseline first
        runs = []
        for again, folder in enumerate(folders[name]):      # matched to the baseline of the same repetition
            metrics = run.read_json(folder / "metrics.json")
            val, test = ({slide: ProbabilityHistogram.from_json(part, dataset.classes).counts
                          for slide, part in metrics[split].items()} for split in ("val", "test"))
            runs.append(report_statistics.outcome(
                np.stack(list(val.values())), np.stack(list(test.values())),
                [scores[slide] for slide in test], dataset.classes, fpr.get(again)))
            fpr.setdefault(again, runs[-1].figures["half"]["fpr"])
        arms[name] = to_json(report_statistics.together(runs))
    for one in sum([arm["runs"] for arm in results["configs"]], []):
        one.pop("slides")
    processor = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    measured = {key: results.get(key, {}) for key in ("images", "staining", "old and new")}
    run.write_json(root.parent / "seeds" / f"seed{seed}.json", {
        "format": FORMAT, "seed": seed, "preset": config.preset,
        "settings": {key: getattr(config, key) for key in ("data", "split_seed", "device", "amp", "trial")},
        "classes": dataset.classes.to_json(),
        "slides": list(test), "arms": arms, "configs": results["configs"], **measured, "seconds": seconds,
        "commit": git_commit(), "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {processor}"})


def read_seeds(files) -> list:
    """The contents of seeds' files, by seed. UserError for another kind of file, or a seed twice."""
    found = {}
    for file in files:
        content = run.read_json(file)
        if not isinstance(content, dict) or content.get("format") != FORMAT or "arms" not in content:
            raise UserError(f"{file}: not the file of a seed of the study; give files seeds/seedN.json")
        if content["seed"] in found:
            raise UserError(f"{file}: seed {content['seed']} was given before; leave one of them out")
        found[content["seed"]] = content
    first = next(iter(found.values()))
    for content in found.values():
        if (content["classes"], content["preset"]) != (first["classes"], first["preset"]):
            raise UserError(f"seeds {first['seed']} and {content['seed']}: of other presets or class tables; "
                            "report them apart")
    return [found[seed] for seed in sorted(found)]
