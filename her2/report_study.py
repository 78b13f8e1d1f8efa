"""The report of the study, from one small file per seed: tables, verdicts, figures.

    python -m her2.report_study runs/study/seeds/*.json --out runs/report

The file of a seed is small enough to be kept beside the code, and seeds from several machines and days become
one report. Per arm it holds the outcome that `report_statistics` works on and the figures of evaluate.py;
then what was measured on its images, the machine, the commit and the seconds of every stage. The report:

    results.json    all figures of every seed and arm, all intervals, the verdicts
    report.md       the verdicts in words, one table of arms, comparisons, images, costs
    fig5.png        Dice and variance of all arms, the oracle's spread as a band
    fig6.png        confusion matrices of subtype and ldm-100
    ladder.png      difference to `subtype` from the oracle down: where the quality is lost
"""

import os
import platform
from pathlib import Path

import numpy as np
import torch

from her2 import draw, draw_charts, report, report_staining, run
from her2.data_classes import ClassTable
from her2.data_folder import load_dataset, read_split
from her2.metrics import ProbabilityHistogram
from her2.report_statistics import Outcome, Study, averaged, together
from her2.run_config import Parser, named_paths
from her2.run_errors import UserError, atomic_write, command

FORMAT = 1              # of the file of a seed
BEFORE = {"data": "", "trial": 0, "tile": 256}      # settings of seeds whose file does not name them
# From the most that can be had to the paper's methods, and what stands beside them.
LADDER = ("fresh-100", "oracle-100", "restain-100", "reconstruct-100", "ldm-100-same", "ldm-100",
          "inpaint-100", "gan-100", "subtype-2x", "tumor")


def to_json(one: Outcome) -> dict:
    """JSON has no NaN (which differs from itself): a figure that does not exist is None there."""
    return {"scores": list(one.scores), "thresholds": one.thresholds,
            "tables": {point: table.tolist() for point, table in one.tables.items()},
            "figures": {point: {name: None if value != value else value for name, value in found.items()}
                        for point, found in one.figures.items()}}


def from_json(content: dict) -> Outcome:
    # ndmin: the first files have no M
    tables = {point: np.array(table, ndmin=4) for point, table in content["tables"].items()}
    return Outcome(tuple(content["scores"]), content["thresholds"], tables, content["figures"])


def write_seed(config, seed: int, seconds: dict) -> None:
    """OUT/seeds/seedN.json from the evaluated runs in OUT/seedN; `config` of `study`, {stage: seconds}."""
    root = Path(config.out) / f"seed{seed}"
    results = run.read_json(root / "report" / "results.json")
    baseline = next(arm for arm in results["configs"] if arm["name"] == report.BASELINE)["runs"][0]
    made = run.read_json(Path(baseline["folder"]) / "config.json")      # by which code: this one may be newer
    dataset = load_dataset(made["fields"]["data"], split=read_split(Path(baseline["folder"]) / "split.json"))
    runs = []
    for arm in results["configs"]:
        for one in arm["runs"]:
            metrics = run.read_json(Path(one.pop("folder")) / "metrics.json")
            parts = {split: {slide: ProbabilityHistogram.from_json(part, dataset.classes)
                             for slide, part in metrics[split].items()} for split in ("val", "test")}
            runs.append(report.Run("", {"name": arm["name"], "seed": one["seed"]}, "", parts))
            slides = list(one.pop("slides"))
    study = report.study_of(runs, dataset)
    processor = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    run.write_json(root.parent / "seeds" / f"seed{seed}.json", {
        "format": FORMAT, "seed": seed, "preset": config.preset,
        # What decides the figures.
        "settings": {"tile": metrics["key"]["tile"], **{
            key: getattr(config, key) for key in ("data", "split_seed", "device", "amp", "trial")}},
        "classes": dataset.classes.to_json(), "slides": slides,
        "arms": {name: to_json(together(list(one.values()))) for name, one in study.arms.items()},
        "configs": results["configs"],
        **{key: results.get(key, {}) for key in ("images", "staining", "old and new")},
        "seconds": seconds, "commit": made["git"], "versions": made["versions"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {processor}"}, indent=None)


def read_seeds(files) -> list:
    """The contents of seeds' files, by seed. UserError for another kind of file, or a seed twice."""
    found, kinds = {}, []
    for file in files:
        content = run.read_json(file)
        if not isinstance(content, dict) or content.get("format") != FORMAT or "arms" not in content:
            raise UserError(f"{file}: not the file of a seed of the study; give files seeds/seedN.json")
        if content["seed"] in found:
            raise UserError(f"{file}: seed {content['seed']} was given before; leave one of them out")
        # The first files came before these settings. Where the data lie differs between machines.
        settings = content["settings"] = {**BEFORE, **content.get("settings", {})}
        found[content["seed"]] = content
        kinds.append((content["preset"], content["classes"], bool(settings["data"]), settings["trial"],
                      settings["tile"]))
        if kinds[-1] != kinds[0]:
            raise UserError(f"{files[0]} and {file}: of other presets, class tables, kinds of data, sizes of "
                            "tiles or --trial; report them apart")
    return [found[seed] for seed in sorted(found)]


def ladder(out, found) -> list:
    """ladder.png into `out`; [(file, caption)]."""
    rows = sorted((new for new, old in found if old == report.BASELINE),
                  key=lambda arm: LADDER.index(arm) if arm in LADDER else len(LADDER))
    panels = []
    if not rows:
        return []
    for title, figure in (("Dice, difference", "dice"), ("subtype variance, ratio", "log_variance")):
        parts = [found[arm, report.BASELINE][f"{figure} matched"] for arm in rows]
        ends = [one and (one["mean"], one["low"], one["high"]) for one in parts]
        panels.append((f"{title} at equal FPR", ends, figure != "dice"))
    draw.save_png(out / "ladder.png", draw_charts.intervals(panels, rows))
    return [("ladder.png", "Difference to the subtype-sampled baseline at its own false-positive rate, mean "
             "and 95 % interval over seeds, from what no generator can pass down to the paper's methods: "
             "where a step loses, there the quality is lost.")]


def write_report(files, out) -> dict:
    """results.json, report.md and the figures into `out`, from the files of seeds. Returns the results."""
    out, seeds = Path(out), read_seeds(files)
    names = sorted({name for seed in seeds for name in seed["arms"]}, key=report.order)
    arms = {name: {seed["seed"]: from_json(seed["arms"][name]) for seed in seeds if name in seed["arms"]}
            for name in names}
    study = Study(arms, ClassTable.from_json(seeds[0]["classes"]))
    claims, found, configs = study.primaries(), report.compare(study), {}
    for config in sum([seed["configs"] for seed in seeds], []):     # every arm once, with a run per seed
        configs.setdefault(config["name"], {**config, "runs": []})["runs"] += config["runs"]
    configs = sorted(configs.values(), key=lambda config: report.order(config["name"]))
    numbers, preset = [seed["seed"] for seed in seeds], seeds[0]["preset"]
    machines = sorted({seed["machine"] for seed in seeds})
    repeats = sorted({len(one.tables["half"]) for arm in arms.values() for one in arm.values()})
    pictures = ladder(out, found) + report.figures(out, configs, study.classes)
    moved = report_staining.over_seeds([seed["old and new"] for seed in seeds])
    if moved:
        draw.save_png(out / "old_and_new.png", report_staining.heat_maps(moved, study.classes))
        pictures.append(("old_and_new.png", "Mean DAB density of generated instances by the subtype before "
                         "and the one asked for, 95 % interval over seeds: does the old one shine through?"))
    images, staining = (averaged([seed[key] for seed in seeds if seed[key]]) or {}
                        for key in ("images", "staining"))
    results = {"baseline": report.BASELINE, "threshold": 0.5, "seeds": numbers, "preset": preset,
               "configs": configs, "verdicts": claims,
               "comparisons": {" against ".join(pair): one for pair, one in found.items()},
               "images": images, "staining": staining, "old and new": moved, "machines": machines,
               "seconds": {str(seed["seed"]): seed["seconds"] for seed in seeds}}
    run.write_json(out / "results.json", results)
    minutes = {}
    for stage, seconds in (one for seed in seeds for one in seed["seconds"].items()):
        minutes.setdefault(stage.split(": ")[-1], []).append(seconds / 60)
    settings = seeds[0]["settings"]
    own, same = ("", "All share one split of the same slides: intervals hold for these, not for other "
                 "patients. ") if settings["data"] else ("tissue, ", "")
    parts = ["# What the paper's method does on this tissue",
             f"Seeds {', '.join(map(str, numbers))}, preset `{preset}`; each is its own {own}generators "
             f"and segmenters ({' or '.join(map(str, repeats))} per arm), judged on tiles of "
             f"{settings['tile']} px. {same}The plan that was fixed before stands in her2/study.py. "
             "\u00b1 is the standard deviation over seeds, brackets are 95 % intervals of the paired "
             "difference.",
             "## Verdicts", *(f"- {claim['sentence']}" for claim in claims),
             *report.sections(study, found, results, pictures, "Means over seeds. "),
             "## Cost", f"Minutes per stage, mean over seeds ({'; '.join(machines)}).",
             report.markdown([{"stage": stage, "minutes": f"{np.mean(some):.1f}"}
                              for stage, some in minutes.items()])]
    atomic_write(out / "report.md", "\n\n".join(parts) + "\n")
    print("\n".join(claim["sentence"] for claim in claims))
    return results


def main(argv):
    parser = Parser(prog="python -m her2.report_study", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="seeds/seedN.json of one or more studies")
    parser.add_argument("--out", default="runs/study-report", help="folder of the report [%(default)s]")
    args = parser.parse_args(argv)
    write_report(named_paths(args.files), args.out)
    print(f"done: {Path(args.out) / 'report.md'}")


if __name__ == "__main__":
    command(main)
