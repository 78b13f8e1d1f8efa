"""From counted pixels of many segmentation runs to one table: what synthetic images change, and by how much.

A configuration, or arm, is a way to train (`subtype`, `ldm-100`, ...), a run is one of them with one seed. A
run brings a histogram of probabilities per slide (`metrics.ProbabilityHistogram`), for val and for test:

    figures   = sum(test).report(0.5)                                          Dice, recalls, variance, ...
    matched   = sum(test).report(t),   t: fpr of sum(val) at t = fpr of the baseline's sum(val) at 0.5

These go to results.json (None: null there, "n/a" in tables); the tables come from `report_statistics`. Why
`matched`: synthetic images make a network call more pixels tumor, which alone lowers variance (`metrics`).
"""

import math
from dataclasses import dataclass, field

import numpy as np

from her2 import draw_charts, report_images, report_staining
from her2.draw import BLUE, GREEN, GREY, ORANGE, PURPLE, save_png
from her2.metrics import ProbabilityHistogram, matched
from her2.report_statistics import ORACLE, Study, outcome, ratio_text, spread

BASELINE = "subtype"
METHODS = {"gan": "GAN", "ldm": "diffusion", "inpaint": "inpainting"}     # in the paper's order
CONTROLS = {"oracle": "oracle", "fresh": "fresh tissue", "restain": "restained",
            "reconstruct": "reconstructed"}
REAL = "real"
TITLES = {**METHODS, **CONTROLS}        # how the methods of generate.py are called
COLORS = dict(zip((REAL, *TITLES.values()), (GREY, ORANGE, BLUE, GREEN, *[PURPLE] * len(CONTROLS))))
# Fields in which runs of one comparison differ on purpose, or that do not change the result.
FREE = {"out", "seed", "sampling", "synthetic", "ratio", "name", "workers", "cache", "device", "amp", "cwd",
        "log_every", "save_every", "data"}

# Pairs that are compared beside every arm against the baseline.
SECONDARY = (("ldm-100", "gan-100"), ("ldm-100", "inpaint-100"), ("gan-100", "inpaint-100"),
             ("ldm-100", "restain-100"), ("ldm-100", "ldm-100-same"), ("ldm-100-clusters", "ldm-100"),
             ("ldm-100-stained", "ldm-100"))
FIGURES = {"dice val-best threshold": ("dice", "best", 3), "dice at 0.5": ("dice", "half", 3),
           "dice at equal FPR": ("dice", "matched", 3),
           "average precision at 0.5": ("average_precision", "half", 3),
           "variance at 0.5": ("variance", "half", 4), "variance at equal FPR": ("variance", "matched", 4),
           "fpr at 0.5": ("fpr", "half", 3), "precision at 0.5": ("precision", "half", 3)}
COMPARED = {"Dice, val-best": ("dice", "best"), "Dice at 0.5": ("dice", "half"),
            "Dice at equal FPR": ("dice", "matched"), "variance ratio at 0.5": ("log_variance", "half"),
            "variance ratio at equal FPR": ("log_variance", "matched")}


def configuration_name(fields: dict, method: str = "") -> str:
    """The configuration of a run: `tumor`, `subtype`, `gan-100`, `ldm-100-same`, ..., or the `--name` it was
    given. `method` as in `Run`. Synthetic images go with subtype sampling; another's name is appended."""
    if fields.get("name") or not fields.get("synthetic"):
        return fields.get("name") or fields["sampling"]
    method, *same = method.split("-")
    share = "only" if fields["ratio"] == math.inf else str(round(100 * fields["ratio"]))
    name = "-".join([method, share, *same])
    return name if fields["sampling"] == BASELINE else f"{name}-{fields['sampling']}"


@dataclass
class Run:
    """One evaluated segmentation run."""
    folder: str
    fields: dict            # of its config.json
    method: str             # 'gan', 'ldm', 'ldm-same' (labels kept), 'oracle', ...; '' without any
    slides: dict            # {"val": {slide: ProbabilityHistogram}, "test": {...}}
    rois: list = field(default_factory=list)    # dicts: split, slide, roi, figures of that ROI

    def __post_init__(self):
        self.seed, self.name = self.fields["seed"], configuration_name(self.fields, self.method)

    def whole(self, split) -> ProbabilityHistogram:
        return sum(self.slides[split].values())


def order(name: str) -> tuple:
    """Sort key of configurations: the baselines, the methods by ratio, anything else."""
    first = ["tumor", BASELINE, "uniform"]
    method, ratio, *rest = name.split("-") + [""]
    if name in first:
        return 0, first.index(name), 0, name
    if method in TITLES and ratio.isdigit():
        return 1 + (method in CONTROLS or any(rest)), int(ratio), list(TITLES).index(method), name
    return 3, 0, 0, name


def check_comparable(runs) -> list:
    """One warning per training field in which the runs differ, and per run of the name and seed of another,
    which is no repetition of it: the later one gets a name of its own."""
    seen, notes = {}, []
    for run in runs:
        same = seen.setdefault((run.name, run.seed), [])
        same.append(run.folder)
        if len(same) > 1:
            name, run.name = run.name, f"{run.name} ({len(same)})"
            notes.append(f"{same[0]} and {run.folder} are both configuration {name!r} with seed {run.seed}; "
                         f"the second one is called {run.name!r} here, --name of train_seg.py renames it")
    for key in sorted({key for run in runs for key in run.fields} - FREE):
        found = sorted({repr(run.fields.get(key)) for run in runs})
        if len(found) > 1:
            notes.append(f"the runs differ in {key} ({', '.join(found)}): their figures are not comparable")
    return notes


def collect(runs) -> dict:
    """results.json: {"configs": [{"name", "method", "ratio", "sampling", "runs"}]}, in a fixed order."""
    baselines = {run.seed: run.whole("val").report()["fpr"] for run in runs if run.name == BASELINE}
    configs = {}
    for run in sorted(runs, key=lambda run: (order(run.name), run.seed)):
        ratio = run.fields["ratio"] if run.fields.get("synthetic") else 0.0
        config = configs.setdefault(run.name, {
            "name": run.name, "method": run.method.split("-")[0] or REAL,
            "ratio": None if math.isinf(ratio) else float(ratio),   # None: synthetic images alone
            "sampling": run.fields["sampling"], "runs": []})
        val, test = run.whole("val"), run.whole("test")
        config["runs"].append({
            "seed": run.seed, **test.report(), "matched": matched(val, test, baselines.get(run.seed)),
            "folder": run.folder, "val": val.report(),
            "slides": {slide: part.report() for slide, part in run.slides["test"].items()}})
    return {"baseline": BASELINE, "threshold": 0.5, "configs": list(configs.values())}


def study_of(runs, dataset) -> Study:
    """The outcomes of `runs`, matched to the baseline of the same seed; NaN is what would need one."""
    arms, scores = {}, {roi.slide: roi.score or "" for roi in dataset.rois}     # the strata of the bootstrap
    fpr = {run.seed: run.whole("test").report()["fpr"] for run in runs if run.name == BASELINE}
    for run in sorted(runs, key=lambda run: order(run.name)):
        val, test = ([part.counts for part in run.slides[split].values()] for split in ("val", "test"))
        arms.setdefault(run.name, {})[run.seed] = outcome(
            val, test, [scores[slide] for slide in run.slides["test"]], dataset.classes,
            fpr.get(run.seed, math.nan))
    return Study(arms, dataset.classes)


def interval_text(found, ratio=False) -> str:
    """"+0.010 [+0.002, +0.018]" or "x 0.31 [0.12, 0.80]" of a `t_interval`; of a single seed without ends."""
    if found is None:
        return "n/a"
    # The sign of what rounds to 0 stays: it says whether the interval holds 0.
    mean, low, high = (x if x is None else ratio_text(x) if ratio else f"{x + 0.0:+.3f}"
                       for x in (found["mean"], found["low"], found["high"]))
    return ("x " if ratio else "") + mean + ("" if low is None else f" [{low}, {high}]")


def compare(study) -> dict:
    """{(arm, other): {"figure point": `Study.difference`}}: every arm against the baseline, and SECONDARY."""
    pairs = [*((arm, BASELINE) for arm in study.arms if arm != BASELINE),
             *(pair for pair in SECONDARY if set(pair) <= set(study.arms))]
    return {(new, old): {f"{figure} {point}": study.difference(new, old, point, figure)
                         for figure, point in COMPARED.values()} for new, old in pairs}


def arm_table(study) -> list:
    """Rows {column: text}: mean and spread over seeds of every figure."""
    recalls = [f"recall {study.classes.names[k]}" for k in study.classes.tumor_ids]
    columns = FIGURES | {recall: (recall, "half", 3) for recall in recalls}
    return [{"arm": arm, "seeds": str(len(study.arms[arm])),
             **{title: spread(study.values([arm], point, figure)[1][0], digits)
                for title, (figure, point, digits) in columns.items()}} for arm in study.arms]


def difference_table(found: dict, study) -> list:
    """Rows {column: text}: paired differences with their intervals; `found` of `compare`."""
    rows = []
    for (new, old), one in found.items():
        drawn = one["log_variance matched"] and one["log_variance matched"]["bootstrap"]
        share = study.efficiency(new, old, ORACLE, "best", "dice") if old == BASELINE else None
        rows.append({
            "comparison": f"{new} against {old}",
            **{title: interval_text(one[f"{figure} {point}"], figure == "log_variance")
               for title, (figure, point) in COMPARED.items()},
            "bootstrap of the last": f"[{ratio_text(drawn[0])}, {ratio_text(drawn[1])}]" if drawn else "n/a",
            "share of the oracle's gain (Dice)":
                f"{share[0]:.2f} [{share[1]:.2f}, {share[2]:.2f}]" if share else "n/a"})
    return rows


def plain(rows) -> str:
    """Rows {column: text} as a table for the terminal, columns aligned."""
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown(rows) -> str:
    """The same in Markdown."""
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |"
             for line in (*rows[:1], *(row.values() for row in rows))]      # keys of a row: the columns
    return "\n".join([*lines[:1], "|" + " --- |" * len(rows[0]), *lines[1:]]) if rows else "n/a"


def sections(study, found, results: dict, pictures, over: str = "") -> list:
    """Paragraphs of report.md: the tables, what was measured of the images (`over`: over what the numbers are
    means), and pictures [(file name, caption), ...]; `found` of `compare`."""
    parts = ["## Arms", markdown(arm_table(study)),
             "## Comparisons", markdown(difference_table(found, study))]
    if results.get("staining"):
        parts += ["## Is the staining what was asked for?", f"{over}Median DAB optical density of the "
                  "instances by the subtype asked for (real: annotated), and in brackets their number.",
                  markdown(report_staining.table(results["staining"]))]
    if results.get("images"):
        parts += ["## Do generated images obey their masks?", f"{over}A segmenter trained on real patches, "
                  "of other tissue where there is a phantom to make it, looks at them: Dice and recalls "
                  "against the masks asked for. Sharpness is a share of real patches; distances are to real "
                  "training patches.", markdown(report_images.table(results["images"]))]
    return [*parts, "## Figures", *(f"![{name}]({name})\n\n*{caption}*" for name, caption in pictures)]


def figures(out, configs, classes) -> list:
    """fig5.png and fig6.png into `out`; returns [(file name, caption), ...]."""
    panels, colors = [], {}
    # Beside Dice the variance, since a method may raise one and not lower the other.
    for key, label, digits in (("dice", "tumor Dice", 3), ("subtype_variance", "subtype variance", 4)):
        groups, known = {}, {}                          # groups: the baselines, one per ratio, the controls
        for config in configs:
            name, method = config["name"], config["method"]
            known[name] = [run[key] for run in config["runs"] if run[key] is not None]
            share = f"{100 * (config['ratio'] or 0):.0f}"
            group = f"+{share} %" if method in METHODS and name == f"{method}-{share}" else name
            series = TITLES.get(method, method)
            colors[series] = COLORS[series]
            groups.setdefault(group, []).append((series, known[name]))
        base, oracle = known.get(BASELINE), known.get(ORACLE)
        band = (min(oracle), max(oracle), PURPLE) if oracle else ()
        reference = (np.mean(base), f"{BASELINE} {np.mean(base):.{digits}f}", *band) if base else None
        panels.append((label, list(groups.items()), reference))
    save_png(out / "fig5.png", draw_charts.box_plots(panels, colors))
    rows = sorted(range(len(classes)), key=lambda k: k not in classes.tumor_ids)    # background comes last
    save_png(out / "fig6.png", draw_charts.matrices(
        before_and_after(configs, rows), [classes.names[k] for k in rows], ("background", "tumor"),
        ("annotation", "prediction")))
    return [("fig5.png", "Fig. 5 of the paper: tumor Dice and subtype variance on the test split, at 0.5. "
             f"{draw_charts.NOTE}; dots: the runs; a single run is a diamond with its value. Dashed: mean of "
             "the baseline; a band: from the lowest to the highest oracle."),
            ("fig6.png", "Fig. 6 of the paper: confusion matrices on the test split at threshold 0.5, rows "
             "divided by their sum, mean over the runs.")]


def before_and_after(configs: list, rows: list) -> list:
    """Fig. 6: [(title, mean, sd or None for one run), ...] of the confusion matrices, (len(rows), 2) each,
    rows divided by their sum (NaN: no such class): the baseline, and +100 % diffusion or the first method."""
    # PAPER: it shows "the best-performing experiment", chosen on the test set. That was +100 % diffusion, so
    # we take this one whatever the results are: nothing is chosen by a test result.
    after = sorted((c for c in configs if c["method"] in METHODS), key=lambda c: c["name"] != "ldm-100")
    pair, panels = [c for c in configs if c["name"] == BASELINE] + after[:1], []
    for config in pair or configs[:1]:
        runs = len(config["runs"])
        counts = np.array([run["confusion"] for run in config["runs"]], float)[:, rows]
        with np.errstate(invalid="ignore"):
            shares = counts / counts.sum(axis=2, keepdims=True)                     # (runs, len(rows), 2)
        panels.append((f"{config['name']} ({runs} run{'s' * (runs > 1)})", shares.mean(axis=0),
                       shares.std(axis=0, ddof=1) if runs > 1 else None))
    return panels
