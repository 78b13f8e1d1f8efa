"""From counted pixels of many segmentation runs to one table: what synthetic images change, and by how much.

A configuration is a way to train (`subtype`, `ldm-100`, ...), a run is one configuration with one seed. Each
run brings a histogram of probabilities per slide (`metrics.ProbabilityHistogram`), for val and for test:

    figures   = sum(test).report(0.5)                                          Dice, recalls, variance, ...
    matched   = sum(test).report(t),   t: fpr of sum(val) at t = fpr of the baseline's sum(val) at 0.5
    mean, sd  = over the seeds of a configuration (sd with n - 1)
    change    = mean over the common seeds of (run - baseline run of the same seed)

`matched` answers whether a gain is more than a shift of the operating point: synthetic images make a network
call more pixels tumor, which alone raises recalls and lowers their variance. What does not exist (the recall
of an absent class, a match without a baseline) is None: null in results.json, "n/a" in the tables.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from her2 import draw_charts, report_images, report_staining
from her2.draw import BLUE, GREEN, GREY, ORANGE, PURPLE, save_png
from her2.metrics import matched
from her2.report_statistics import ORACLE, ratio_text, spread, t_interval

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
    """One evaluated segmentation run; `val` and `test` are {slide: ProbabilityHistogram}."""
    folder: str
    fields: dict            # of its config.json
    method: str             # 'gan', 'ldm', 'ldm-same' (labels kept), 'oracle', ...; '' without any
    val: dict
    test: dict
    rois: list = field(default_factory=list)    # dicts: split, slide, roi, figures of that ROI

    def __post_init__(self):
        self.seed, self.name = self.fields["seed"], configuration_name(self.fields, self.method)


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
                         f"the second one is called {run.name!r} here, --name of train_seg.py gives it a "
                         "better name")
    for key in sorted({key for run in runs for key in run.fields} - FREE):
        found = sorted({repr(run.fields.get(key)) for run in runs})
        if len(found) > 1:
            notes.append(f"the runs differ in {key} ({', '.join(found)}): their figures are not comparable")
    return notes


def collect(runs) -> dict:
    """results.json: {"configs": [{"name", "method", "ratio", "sampling", "runs"}]}, in a fixed order."""
    baselines = {run.seed: sum(run.val.values()).report()["fpr"] for run in runs if run.name == BASELINE}
    configs = {}
    for run in sorted(runs, key=lambda run: (order(run.name), run.seed)):
        ratio = run.fields["ratio"] if run.fields.get("synthetic") else 0.0
        config = configs.setdefault(run.name, {
            "name": run.name, "method": run.method.split("-")[0] or REAL,
            "ratio": None if math.isinf(ratio) else float(ratio),   # None: synthetic images alone
            "sampling": run.fields["sampling"], "runs": []})
        val, test = sum(run.val.values()), sum(run.test.values())
        config["runs"].append({
            "seed": run.seed, **test.report(), "matched": matched(val, test, baselines.get(run.seed)),
            "folder": run.folder, "val": val.report(),
            "slides": {slide: part.report() for slide, part in run.test.items()}})
    return {"baseline": BASELINE, "threshold": 0.5, "configs": list(configs.values())}


def figures_of(config: dict, *path) -> list:
    """A figure of every run: ("dice",), ("recall", "3+"), ("matched", "fpr"); None where there is none."""
    found = config["runs"]
    for key in path:
        found = [one and one[key] for one in found]
    return found


def change(config: dict, baseline: dict, path):
    """`t_interval` of the change of a figure against the baseline over the common seeds, None without any.
    The baseline's figure is that at 0.5, where it is matched to itself."""
    base = dict(zip(figures_of(baseline, "seed"), figures_of(baseline, path[-1])))
    pairs = zip(figures_of(config, *path), map(base.get, figures_of(config, "seed")))
    pairs = [pair for pair in pairs if None not in pair]
    return t_interval([new - old for new, old in pairs]) if pairs else None


def interval_text(found, ratio=False, digits=3) -> str:
    """"+0.010 [+0.002, +0.018]" or "x 0.31 [0.12, 0.80]" of a `t_interval`; of a single seed without ends."""
    if found is None:
        return "n/a"
    # The sign of what rounds to 0 stays: it says whether the interval holds 0.
    mean, low, high = (x if x is None else ratio_text(x) if ratio else f"{x + 0.0:+.{digits}f}"
                       for x in (found["mean"], found["low"], found["high"]))
    return ("x " if ratio else "") + mean + ("" if low is None else f" [{low}, {high}]")


MEASURES = {"dice": ("Dice", 3), "subtype_variance": ("subtype variance", 4), "precision": ("precision", 3),
            "fpr": ("FPR", 3)}                                              # figure: column, digits shown


def result_table(results: dict, *prefix) -> list:
    """Rows {column: text}: mean and sd per configuration; prefix "matched" for the matched figures."""
    return [{"configuration": config["name"], "runs": str(len(config["runs"])),
             **{title: spread(figures_of(config, *prefix, key), digits)
                for key, (title, digits) in MEASURES.items()},
             **{f"recall {name}": spread(figures_of(config, *prefix, "recall", name))
                for name in config["runs"][0]["recall"]}} for config in results["configs"]]


def change_table(results: dict) -> list:
    """Rows {column: text}: change of Dice and variance against the baseline, at 0.5 and matched."""
    baseline = next((config for config in results["configs"] if config["name"] == BASELINE), None)
    columns = [(title + where, digits, (*prefix, key)) for where, *prefix in (("",), (", matched", "matched"))
               for key, (title, digits) in [*MEASURES.items()][:2]]
    return [{"configuration": config["name"],
             **{title: interval_text(baseline and change(config, baseline, path), False, digits)
                for title, digits, path in columns}}
            for config in results["configs"] if config is not baseline]


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


def page(results: dict, data: str, notes, pictures) -> str:
    """report.md. `notes` are warnings, one line each; `pictures` are for `gallery`."""
    configs = results["configs"]
    return "\n\n".join([
        "# Segmentation with and without synthetic images",
        f"{sum(len(config['runs']) for config in configs)} runs of {len(configs)} configurations, test split "
        f"of `{data}`. Figures are mean \u00b1 standard deviation (n - 1) over the seeds; pixels are pooled "
        "over the split, then ratios are formed once. n/a: there is nothing to compute it from. The subtype "
        "variance is the variance of the recalls of the HER2 subtypes; lower is better.",
        *(f"- **Note:** {note}" for note in notes),
        "## Results at threshold 0.5", markdown(result_table(results)),
        f"## Change against the subtype-sampled baseline (`{BASELINE}`)",
        "Mean over the seeds that both have, in brackets its 95 % t interval.",
        markdown(change_table(results)),
        "## Results at the baseline's false-positive rate",
        "The threshold of each run is the one at which its false-positive rate on val equals that of the "
        "baseline with the same seed. A gain that is not here was a shift of the operating point.",
        markdown(result_table(results, "matched")), *gallery(results, pictures)]) + "\n"


def gallery(results: dict, pictures, over: str = "") -> list:
    """Paragraphs of report.md: what was measured of the images (`over`: over what the numbers are means), and
    pictures [(file name, caption), ...]."""
    parts = []
    if results.get("staining"):
        parts += ["## Is the staining what was asked for?", f"{over}Median DAB optical density of the "
                  "instances by the subtype asked for (real: annotated), and in brackets their number.",
                  markdown(report_staining.table(results["staining"]))]
    if results.get("images"):
        parts += ["## Do generated images obey their masks?", f"{over}A segmenter trained on other tissue "
                  "looks at them: Dice and recalls against the masks asked for. Sharpness is a share of real "
                  "patches; distances are to real training patches.",
                  markdown(report_images.table(results["images"]))]
    return [*parts, "## Figures", *(f"![{name}]({name})\n\n*{caption}*" for name, caption in pictures)]


def figures(out, configs, classes) -> list:
    """fig5.png and fig6.png into `out`; returns [(file name, caption), ...]."""
    panels = []
    # Beside Dice the variance, since a method may raise one and not lower the other.
    for key, label, digits in (("dice", "tumor Dice", 3), ("subtype_variance", "subtype variance", 4)):
        groups = {}             # the baselines, one group per ratio, the controls
        for config in configs:
            name, method = config["name"], config["method"]
            if method in METHODS and name == f"{method}-{100 * (config['ratio'] or 0):.0f}":
                name = f"+{name.split('-')[1]} %"
            groups.setdefault(name, []).append((TITLES.get(method, method), figures_of(config, key)))
        known = {c["name"]: [v for v in figures_of(c, key) if v is not None] for c in configs}
        base, oracle = known.get(BASELINE), known.get(ORACLE)
        reference = (np.mean(base), f"{BASELINE} {np.mean(base):.{digits}f}") if base else None
        if base and oracle:
            reference += (min(oracle), max(oracle), PURPLE)
        panels.append((label, list(groups.items()), reference))
    shown = {TITLES.get(config["method"], config["method"]) for config in configs}
    colors = {name: color for name, color in COLORS.items() if name in shown}
    save_png(out / "fig5.png", draw_charts.box_plots(panels, colors))
    rows = sorted(range(len(classes)), key=lambda k: k not in classes.tumor_ids)    # background comes last
    pair = [(f"{c['name']} ({len(c['runs'])} run{'s' * (len(c['runs']) > 1)})", *row_normalised(c, rows))
            for c in figure_pair(configs)]
    save_png(out / "fig6.png", draw_charts.matrices(pair, [classes.names[k] for k in rows],
                                                    ("background", "tumor"), ("annotation", "prediction")))
    return [("fig5.png", "Fig. 5 of the paper: tumor Dice and subtype variance on the test split, at 0.5. "
             f"{draw_charts.NOTE}; dots: the runs; a single run is a diamond with its value. Dashed: mean of "
             "the baseline; a band: from the lowest to the highest oracle."),
            ("fig6.png", "Fig. 6 of the paper: confusion matrices on the test split at threshold 0.5, rows "
             "divided by their sum, mean over the runs.")]


def row_normalised(config: dict, rows: list):
    """Fig. 6: mean and sd (None for one run), (len(rows), 2) each, of the runs' matrices, rows divided by
    their sum; NaN for a class that is absent from the split."""
    counts = np.array(figures_of(config, "confusion"), float)[:, rows]                        # (runs, K, 2)
    with np.errstate(invalid="ignore"):
        shares = counts / counts.sum(axis=2, keepdims=True)                                   # (runs, K, 2)
    return shares.mean(axis=0), shares.std(axis=0, ddof=1) if len(shares) > 1 else None


def figure_pair(configs: list) -> list:
    """The configurations of Fig. 6: the baseline, and +100 % diffusion or the first with generated images."""
    # PAPER: it shows "the best-performing experiment", chosen on the test set. That was +100 % diffusion, so
    # we take this one whatever the results are: nothing is chosen by a test result.
    before = [c for c in configs if c["name"] == BASELINE]
    after = sorted((c for c in configs if c["method"] in METHODS), key=lambda c: c["name"] != "ldm-100")
    return (before + after[:1]) or configs[:1]
