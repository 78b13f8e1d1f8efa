"""The report of the study, from one small file per seed: tables, verdicts, figures.

    python -m her2.report_study runs/study/seeds/*.json --out runs/report

Seeds (`study_seed`) from several machines and days become one report.

    results.json    all figures of every seed and arm, all intervals, the verdicts
    report.md       the verdicts in words, one table of arms, comparisons, images, costs
    fig5.png        Dice and variance of all arms, the oracle's spread as a band
    fig6.png        confusion matrices of subtype and ldm-100
    ladder.png      difference to `subtype` from the oracle down: where the quality is lost
"""

from pathlib import Path

import numpy as np

from her2 import draw, draw_charts, report, report_staining, run
from her2.data_classes import ClassTable
from her2.report_statistics import ORACLE, Study, ratio_text
from her2.run_config import Parser
from her2.run_errors import atomic_write, command
from her2.study_seed import from_json, read_seeds

# From the most that can be had to the paper's methods, and what stands beside them.
LADDER = ("fresh-100", "oracle-100", "restain-100", "reconstruct-100", "ldm-100-same", "ldm-100",
          "inpaint-100", "gan-100", "subtype-2x", "tumor")
# Pairs that are compared beside every arm against the baseline.
SECONDARY = (("ldm-100", "gan-100"), ("ldm-100", "inpaint-100"), ("gan-100", "inpaint-100"),
             ("ldm-100", "restain-100"), ("ldm-100", "ldm-100-same"))
FIGURES = (("dice", "best", 3), ("dice", "half", 3), ("dice", "matched", 3), ("average_precision", "half", 3),
           ("variance", "half", 4), ("variance", "matched", 4), ("fpr", "half", 3), ("precision", "half", 3))
COMPARED = (("dice", "best", "Dice, val-best"), ("dice", "half", "Dice at 0.5"),
            ("dice", "matched", "Dice at equal FPR"), ("log_variance", "half", "variance ratio at 0.5"),
            ("log_variance", "matched", "variance ratio at equal FPR"))
POINT = {"best": "val-best threshold", "half": "at 0.5", "matched": "at equal FPR"}


def averaged(dicts):
    """Nested dicts of numbers -> the same with the mean over those that have the number; "n" is their sum."""
    dicts = [one for one in dicts if one is not None]
    if dicts and isinstance(dicts[0], dict):
        return {key: sum(one[key] for one in dicts) if key == "n"
                else averaged([one.get(key) for one in dicts]) for key in dicts[0]}
    numbers = [one for one in dicts if isinstance(one, (int, float)) and not isinstance(one, bool)]
    return float(np.mean(numbers)) if numbers else None


def comparisons(study, arms) -> dict:
    """{"ARM against OTHER": {"dice best": ..., "log_variance matched": ...}} with intervals."""
    pairs = [(arm, report.BASELINE) for arm in arms if arm != report.BASELINE]
    pairs += [pair for pair in SECONDARY if set(pair) <= set(arms)]
    return {f"{new} against {old}": {f"{figure} {point}": study.difference(new, old, point, figure)
                                     for figure, point, _ in COMPARED} for new, old in pairs}


def interval_text(found, ratio: bool) -> str:
    """"+0.010 [+0.002, +0.018]" or "x 0.31 [0.12, 0.80]"."""
    if found is None:
        return "n/a"
    show = ratio_text if ratio else (lambda x: f"{x + 0.0:+.3f}")
    inside = "" if found["low"] is None else f" [{show(found['low'])}, {show(found['high'])}]"
    return ("x " if ratio else "") + show(found["mean"]) + inside


def arm_table(study, arms) -> list:
    """Rows of texts, header first: mean and spread over seeds of every figure."""
    recalls = [(f"recall {study.classes.names[k]}", "half", 3) for k in study.classes.tumor_ids]
    rows = [["arm", "seeds", *(f"{figure.replace('_', ' ')} {POINT[point]}" for figure, point, _ in FIGURES),
             *(figure for figure, _, _ in recalls)]]
    for arm in arms:
        rows.append([arm, str(len(study.arms[arm])),
                     *(report.spread(study.values([arm], point, figure)[1][0], digits)
                       for figure, point, digits in (*FIGURES, *recalls))])
    return rows


def difference_table(found: dict, study) -> list:
    """Rows of texts, header first: paired differences with their intervals."""
    rows = [["comparison", *(title for _, _, title in COMPARED), "bootstrap of the last",
             "share of the oracle's gain (Dice)"]]
    for name, one in found.items():
        new, old = name.split(" against ")
        drawn, share = one["log_variance matched"] and one["log_variance matched"]["bootstrap"], None
        if old == report.BASELINE and ORACLE in study.arms and len(study.arms[new]) > 1:
            share = study.efficiency(new, old, ORACLE, "best", "dice")
        rows.append([name, *(interval_text(part, key.startswith("log")) for key, part in one.items()),
                     f"[{ratio_text(drawn[0])}, {ratio_text(drawn[1])}]" if drawn else "n/a",
                     f"{share[0]:.2f} [{share[1]:.2f}, {share[2]:.2f}]" if share else "n/a"])
    return rows


def ladder(out, found) -> list:
    """ladder.png into `out`; [(file, caption)]."""
    rows = [arm for arm in LADDER if f"{arm} against {report.BASELINE}" in found]

    def ends(key):
        parts = [found[f"{arm} against {report.BASELINE}"][key] for arm in rows]
        return [one and (one["mean"], one["low"], one["high"]) for one in parts]

    draw.save_png(out / "ladder.png", draw_charts.intervals(
        [("Dice, difference at equal FPR", ends("dice matched"), False),
         ("subtype variance, ratio at equal FPR", ends("log_variance matched"), True)], rows))
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
    found, claims, configs = comparisons(study, names), study.primaries(), {}
    for config in sum([seed["configs"] for seed in seeds], []):     # every arm once, with a run per seed
        configs.setdefault(config["name"], {**config, "runs": []})["runs"] += config["runs"]
    configs = sorted(configs.values(), key=lambda config: report.order(config["name"]))
    numbers, preset = [seed["seed"] for seed in seeds], seeds[0]["preset"]
    machines = sorted({seed["machine"] for seed in seeds})
    repeats = sorted({len(one.tables["half"]) for arm in arms.values() for one in arm.values()})
    pictures = ladder(out, found) + report.figures(out, configs, study.classes)
    moved = report_staining.over_seeds([seed["old and new"] for seed in seeds], study.classes)
    if moved:
        draw.save_png(out / "old_and_new.png", report_staining.heat_maps(moved, study.classes))
        pictures.append(("old_and_new.png", "Mean DAB density of generated instances by the subtype before "
                         "and the one asked for, 95 % interval over seeds: does the old one shine through?"))
    results = {"baseline": report.BASELINE, "threshold": 0.5, "seeds": numbers, "preset": preset,
               "configs": configs, "verdicts": claims, "comparisons": found,
               **{key: averaged([seed[key] for seed in seeds if seed[key]]) or {}
                  for key in ("images", "staining")}, "old and new": moved, "machines": machines,
               "seconds": {str(seed["seed"]): seed["seconds"] for seed in seeds}}
    run.write_json(out / "results.json", results)
    minutes = {}
    for seed in seeds:
        for stage, seconds in seed["seconds"].items():
            minutes.setdefault(stage.split(": ")[-1], []).append(seconds / 60)
    parts = ["# What the paper's method does on this tissue",
             f"Seeds {', '.join(map(str, numbers))}, preset `{preset}`; each is its own tissue, generators "
             f"and segmenters ({' or '.join(map(str, repeats))} per arm). The plan that was fixed before "
             "stands in her2/study.py. \u00b1 is the standard deviation over seeds, brackets are 95 % "
             "intervals of the paired difference.",
             "## Verdicts", *(f"- {claim['sentence']}" for claim in claims),
             "## Arms", report.markdown(arm_table(study, names)),
             "## Comparisons", report.markdown(difference_table(found, study)),
             *report.gallery(results, pictures, "Means over seeds. "),
             "## Cost", f"Minutes per stage, mean over seeds ({'; '.join(machines)}).",
             report.markdown([["stage", "minutes"],
                              *([stage, f"{np.mean(some):.1f}"] for stage, some in minutes.items())])]
    atomic_write(out / "report.md", "\n\n".join(parts) + "\n")
    print("\n".join(claim["sentence"] for claim in claims))
    return results


def main(argv):
    parser = Parser(prog="python -m her2.report_study", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="seeds/seedN.json of one or more studies")
    parser.add_argument("--out", default="runs/study-report", help="folder of the report [%(default)s]")
    args = parser.parse_args(argv)
    write_report(args.files, args.out)
    print(f"done: {Path(args.out) / 'report.md'}")
    return 0


if __name__ == "__main__":
    command(main)
