"""The report of the study, from one small file per seed: tables, verdicts, figures.

    python -m her2.report_study runs/study/seeds/*.json --out runs/report

Seeds (`study_seed`) from several machines and days become one report, and an added seed costs nothing but its
own run.

    results.json    all figures of every seed and arm, all intervals, the verdicts
    report.md       the verdicts in words, one table of arms, comparisons, images, costs
    fig5.png        Dice and variance of all arms, the oracle's spread as a band
    fig6.png        confusion matrices of subtype and ldm-100
    ladder.png      difference to `subtype` from the oracle down: where the quality is lost
"""

import math
from pathlib import Path

import numpy as np

from her2 import draw, draw_charts, report, report_images, report_staining, report_statistics, run
from her2.data_classes import ClassTable
from her2.report_statistics import Study
from her2.run_config import Parser
from her2.run_errors import atomic_write, command
from her2.study_seed import from_json, read_seeds

# From the most that can be had to the paper's methods, and what stands beside them.
LADDER = ("fresh-100", "oracle-100", "restain-100", "reconstruct-100", "ldm-100-same", "ldm-100",
          "inpaint-100", "gan-100", "subtype-2x", "tumor")
SECONDARY = (("inpaint-100", "subtype"), ("gan-100", "subtype"), ("ldm-100", "gan-100"),
             ("ldm-100", "inpaint-100"), ("gan-100", "inpaint-100"), ("ldm-100", "restain-100"),
             ("ldm-100", "ldm-100-same"), ("subtype-2x", "subtype"), ("oracle-100", "subtype"))
FIGURES = (("dice", "best", 3), ("dice", "half", 3), ("dice", "matched", 3), ("average_precision", "half", 3),
           ("variance", "half", 4), ("variance", "matched", 4), ("fpr", "half", 3), ("precision", "half", 3))
POINT = {"best": "val-best threshold", "half": "at 0.5", "matched": "at equal FPR"}


def merged_configs(seeds) -> list:
    """The "configs" of results.json: every arm once, with a run per seed."""
    configs = {}
    for content in seeds:
        for config in content["configs"]:
            known = configs.setdefault(config["name"], {**config, "runs": []})
            known["runs"] += config["runs"]
    return [configs[name] for name in sorted(configs, key=report.order)]


def averaged(dicts):
    """Nested dicts of numbers -> the same with the mean over those that have the number."""
    dicts = [one for one in dicts if one is not None]
    if dicts and isinstance(dicts[0], dict):
        return {key: averaged([one.get(key) for one in dicts]) for key in dicts[0]}
    numbers = [one for one in dicts if isinstance(one, (int, float)) and not isinstance(one, bool)]
    return float(np.mean(numbers)) if numbers else None


def comparisons(study, arms) -> dict:
    """{"ARM against OTHER": {"dice best": ..., "log_variance matched": ...}} with intervals."""
    pairs = [(arm, report.BASELINE) for arm in arms if arm != report.BASELINE]
    pairs += [pair for pair in SECONDARY if pair not in pairs and set(pair) <= set(arms)]
    found = {}
    for new, old in pairs:
        found[f"{new} against {old}"] = {
            f"{figure} {point}": study.difference(new, old, point, figure)
            for figure, point in (("dice", "best"), ("dice", "half"), ("dice", "matched"),
                                  ("log_variance", "half"), ("log_variance", "matched"), ("recall 0", "half"))
            if figure in study.arms[new][min(study.arms[new])].figures[point]
        }
    return found


def interval_text(found, ratio: bool) -> str:
    """ "+0.010 [+0.002, +0.018]" or "x 0.31 [0.12, 0.80]"."""
    if found is None:
        return "n/a"
    show = (lambda x: f"{math.exp(x):.2f}") if ratio else (lambda x: f"{x + 0.0:+.3f}")
    inside = "" if found["low"] is None else f" [{show(found['low'])}, {show(found['high'])}]"
    return ("x " if ratio else "") + show(found["mean"]) + inside


def arm_table(study, arms) -> list:
    rows = [[
        "arm", "seeds", *(f"{figure.replace('_', ' ')} {POINT[point]}"
                          for figure, point, _ in FIGURES), *(f"recall {study.classes.names[k]}"
                                                              for k in study.classes.tumor_ids)
    ]]
    wanted = [*FIGURES, *((f"recall {study.classes.names[k]}", "half", 3) for k in study.classes.tumor_ids)]
    for arm in arms:
        cells = []
        for figure, point, digits in wanted:
            values = [one.figures[point][figure] for one in study.arms[arm].values()]
            cells.append(report.spread([value for value in values if not math.isnan(value)], digits))
        rows.append([arm, str(len(study.arms[arm])), *cells])
    return rows


def difference_table(found: dict, study) -> list:
    rows = [[
        "comparison", "Dice, val-best", "Dice at 0.5", "Dice at equal FPR", "variance ratio at 0.5",
        "variance ratio at equal FPR", "bootstrap of it", "share of the oracle's gain (Dice)"
    ]]
    for name, one in found.items():
        new, old = name.split(" against ")
        drawn = one["log_variance matched"] and one["log_variance matched"]["bootstrap"]
        share = (study.efficiency(new, old, report_statistics.ORACLE, "best", "dice")
                 if old == report.BASELINE and report_statistics.ORACLE in study.arms
                 and len(study.arms[new]) > 1 else None)
        rows.append([
            name, *(interval_text(one[key], key.startswith("log"))
                    for key in ("dice best", "dice half", "dice matched", "log_variance half",
                                "log_variance matched")),
            f"[{math.exp(drawn[0]):.2f}, {math.exp(drawn[1]):.2f}]" if drawn else "n/a",
            f"{share[0]:.2f} [{share[1]:.2f}, {share[2]:.2f}]" if share else "n/a"
        ])
    return rows


def figures(out, study, configs, found) -> list:
    """fig5, fig6 and ladder into `out`; [(file, caption)]."""
    results = {"configs": configs}
    oracle = next((c for c in configs if c["name"] == report_statistics.ORACLE), None)
    panels = []
    for key, label in (("dice", "tumor Dice"), ("subtype_variance", "subtype variance")):
        mean = report.mean_sd(report.figures_of(next(c for c in configs
                                                     if c["name"] == report.BASELINE), key))
        reference = (mean[0], f"{report.BASELINE} {mean[0]:.4g}")
        if oracle:
            values = report.figures_of(oracle, key)
            reference += (min(values), max(values), draw.PURPLE)
        panels.append((label, report.box_groups(results, key), reference))
    series = {name for _, boxes in panels[0][1] for name, _ in boxes}
    colors = {name: color for name, color in report.COLORS.items() if name in series}
    draw.save_png(out / "fig5.png", draw_charts.box_plots(panels, colors))
    matrices = [(f"{c['name']} ({len(c['runs'])} seeds)", *report.row_normalised(c))
                for c in report.figure_pair(results)]
    draw.save_png(out / "fig6.png", draw_charts.confusion_matrices(matrices, study.classes))
    rows = [arm for arm in LADDER if f"{arm} against {report.BASELINE}" in found]

    def ends(arm, key):
        one = found[f"{arm} against {report.BASELINE}"][key]
        return one and (one["mean"], one["low"], one["high"])

    draw.save_png(
        out / "ladder.png",
        draw_charts.intervals([("Dice, difference at equal FPR", [ends(
            arm, "dice matched") for arm in rows], [-0.01, 0, 0.01], lambda x: f"{x:+.2f}" if x else "0"),
                               ("subtype variance, ratio at equal FPR", [
                                   ends(arm, "log_variance matched") for arm in rows
                               ], [math.log(x)
                                   for x in (0.1, 0.3, 1, 3)], lambda x: f"x {math.exp(x):.1f}")], rows))
    return [("ladder.png",
             "Difference to the subtype-sampled baseline at its own false-positive rate, mean and 95 % "
             "interval over seeds, from what no generator can pass down to the paper's methods: where a step "
             "loses, there the quality is lost."),
            ("fig5.png",
             f"Fig. 5 of the paper, at 0.5. {draw_charts.NOTE}. Dashed: mean of the baseline; band: "
             "from the lowest to the highest oracle."),
            ("fig6.png",
             "Fig. 6 of the paper: confusion matrices at 0.5, rows divided by their sum, mean over seeds.")]


def write_report(files, out) -> dict:
    """results.json, report.md and the figures into `out`, from the files of seeds. Returns the results."""
    out, seeds = Path(out), read_seeds(files)
    classes = ClassTable.from_json(seeds[0]["classes"])
    names = sorted({name for content in seeds for name in content["arms"]}, key=report.order)
    study = Study(
        {
            name: {
                content["seed"]: from_json(content["arms"][name])
                for content in seeds if name in content["arms"]
            } for name in names
        }, classes)
    configs, found, claims = merged_configs(seeds), comparisons(study, names), study.primaries()
    images = averaged([content["images"] for content in seeds if content["images"]]) or {}
    results = {
        "baseline": report.BASELINE, "threshold": 0.5, "seeds": [content["seed"] for content in seeds
                                                                 ], "preset": seeds[0]["preset"],
        "configs": configs, "verdicts": claims, "comparisons": found, "images": images, "machines": sorted({
            content["machine"] for content in seeds
        }), "seconds": {str(content["seed"]): content["seconds"] for content in seeds}
    }
    pictures = figures(out, study, configs, found)
    run.write_json(out / "results.json", results)
    cost = {}
    for content in seeds:
        for stage, seconds in content["seconds"].items():
            cost.setdefault(stage.split(": ")[-1], []).append(seconds / 60)
    parts = [
        "# What the paper's method does on this tissue",
        f"{len(seeds)} seeds ({', '.join(str(content['seed']) for content in seeds)}), preset "
        f"`{seeds[0]['preset']}`; each is its own tissue, generators and segmenters. The plan that was fixed "
        "before stands in her2/study.py. \u00b1 is the standard deviation over seeds, brackets are 95 % "
        "intervals of the paired difference.", "## Verdicts", *(f"- {claim['sentence']}"
                                                      for claim in claims), "## Arms",
        report.markdown(arm_table(study, names)), "## Comparisons",
        report.markdown(difference_table(found, study))
    ]
    if images:
        parts += [
            "## Do generated images obey their masks?", "Means over seeds; see her2/report_images.py.",
            report.markdown(report_images.table(images))
        ]
    staining = averaged([content["staining"] for content in seeds if content["staining"]])
    if staining:
        for one in staining.values():
            one["ordered"] = None
        parts += [
            "## Is the staining what was asked for?",
            "Median DAB density of instances, mean over seeds (and their "
            "number).",
            report.markdown([row[:-1] for row in report_staining.table(staining)])
        ]
    parts += [
        "## Figures", *(f"![{name}]({name})\n\n*{caption}*" for name, caption in pictures), "## Cost",
        f"Minutes per stage, mean over seeds ({'; '.join(results['machines'])}).",
        report.markdown([["stage", "minutes"], *([stage, f"{np.mean(times):.1f}"]
                                                 for stage, times in cost.items())])
    ]
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
