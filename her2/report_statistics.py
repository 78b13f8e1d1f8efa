"""The statistics of the study: what a handful of seeds can say about a claim, every formula by hand.

The unit is a seed: its own tissue, generators and segmenters. Its arms share its slides, so all is said about
paired differences d_i = figure of one arm - figure of another, i = 1..n seeds:

    t interval    mean(d) +- q s / sqrt(n), s with n - 1, P(|T| <= q) = level for n - 1 degrees of freedom
    bootstrap     n seeds drawn with replacement, in each its slides, as many per HER2 score as it has;
                  percentiles of mean(d). Both arms get the same slides; the thresholds stay
    Holm          the i-th smallest of m p-values against .05 / (m + 1 - i), until the first that is larger
    efficiency    mean(arm - baseline) / mean(oracle - baseline), interval by bootstrap

Variances are compared by their ratio, as log(max(variance, 1e-4)). Decisions rest on the t interval; the
bootstrap has only n seeds to draw from, and is shown beside. Points of operation: "best" (the threshold with
the best Dice on val), "half" (0.5), "matched" (found on test: its false-positive rate is that of the baseline
of the seed at 0.5, while `metrics.matched` finds the threshold on val). Figures: the keys of `rates`, and
"average_precision" (no point, no bootstrap). A seed in which a figure does not exist (NaN) is left out.

Sources: Student's law, Abramowitz & Stegun 26.7.3-4; Holm, Scand J Stat 6 (1979); Efron & Tibshirani, An
Introduction to the Bootstrap (1993); expanded percentiles, Hesterberg, Am Stat 69 (2015). PAPER: five
repetitions and no test are reported; margins, floor and the family of four are decisions of this study.
Key: S slides, K classes, n seeds, M segmenters of an arm and seed, R replicates.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from her2.metrics import ProbabilityHistogram, rates

MARGIN = {"dice": 0.005, "log_variance": math.log(0.8)}     # the least that counts; its sign is the paper's
ALPHA = 0.05
ORACLE = "oracle-100"
CLAIMS = {"P1": ("subtype", "tumor", "best", "dice"),               # better arm, other arm, point, figure
          "P2": ("subtype", "tumor", "matched", "log_variance"),
          "P3": ("ldm-100", "subtype", "best", "dice"),
          "P4": ("ldm-100", "subtype", "matched", "log_variance")}


@dataclass(frozen=True)
class Outcome:
    """One arm in one seed, at its three points of operation: the mean of its M segmenters (`together`)."""
    scores: tuple           # of the S test slides: the strata of the bootstrap
    thresholds: dict        # {point: threshold}
    tables: dict            # {point: (M, S, K, 2) int64}, pixels called no | tumor
    figures: dict           # {point: {figure: float}}, over all slides


def outcome(val, test, scores, classes, baseline_fpr=None) -> Outcome:
    """Counts (S, K, BINS) of val, test -> Outcome. baseline_fpr: None for the baseline, NaN without one."""
    assert len(test) == len(scores), f"{len(test)} test slides, {len(scores)} scores"
    whole = ProbabilityHistogram(classes, np.sum(test, axis=0))
    target = whole.report()["fpr"] if baseline_fpr is None else baseline_fpr
    # At its own threshold an arm can buy recall with false alarms, and with it a lower variance: one rate for
    # all takes that away. Found on test, so it describes and chooses nothing (`metrics.matched`: on val).
    equal = None if target is None else whole.threshold_at_fpr(target)      # None: no background to match on
    best = ProbabilityHistogram(classes, np.sum(val, axis=0)).best_threshold()
    thresholds = {"best": best or 0.5, "half": 0.5, "matched": equal}
    slides, tables, figures = [ProbabilityHistogram(classes, counts) for counts in test], {}, {}
    for point, t in thresholds.items():
        tables[point] = np.stack([slide.confusion(t or 0.5) for slide in slides])[None]     # (1, S, K, 2)
        found = rates(whole.confusion(t or 0.5), classes)
        figures[point] = {name: float(value) if t else math.nan for name, value in found.items()}
        figures[point]["average_precision"] = average_precision(whole.counts, classes)
    return Outcome(tuple(scores), thresholds, tables, figures)


def together(runs: list) -> Outcome:
    """M segmenters of one arm and seed -> one Outcome. The unit stays the seed: their luck averages out."""
    tables = {point: np.concatenate([one.tables[point] for one in runs]) for point in runs[0].tables}
    return Outcome(runs[0].scores, averaged([one.thresholds for one in runs]), tables,
                   averaged([one.figures for one in runs]))


def averaged(dicts):
    """Nested dicts of numbers -> the same with the mean over those not None (NaN stays); "n" is their sum. A
    key may stand in some of them only: seeds have other arms."""
    dicts = [one for one in dicts if one is not None]
    if dicts and isinstance(dicts[0], dict):
        keys = dict.fromkeys(key for one in dicts for key in one)
        return {key: sum(one.get(key, 0) for one in dicts) if key == "n"
                else averaged([one.get(key) for one in dicts]) for key in keys}
    numbers = [one for one in dicts if isinstance(one, (int, float)) and not isinstance(one, bool)]
    return float(np.mean(numbers)) if numbers else None


def average_precision(counts, classes) -> float:
    """Sum of precision * gain of recall, from the surest bin of counts (K, BINS) down, the pixels of a bin at
    the precision after the last of them; NaN without tumor."""
    tumor = counts[classes.tumor_ids].sum(axis=0)[::-1].cumsum()                        # (BINS,)
    called = np.maximum(counts.sum(axis=0)[::-1].cumsum(), 1)
    return float((np.diff(tumor, prepend=0) * tumor / called).sum() / tumor[-1]) if tumor[-1] else math.nan


def t_within(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's law, a sum of powers of cos(theta), tan(theta) = t / sqrt(freedom)."""
    theta, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    term = total = float(freedom > 1)
    for k in range(1 + odd, freedom - 2, 2):
        term *= k / (k + 1) * math.cos(theta) ** 2
        total += term
    total *= math.sin(theta)
    return 2 / math.pi * (theta + math.cos(theta) * total) if odd else total


@lru_cache(maxsize=None)
def t_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| <= t) = level, by bisection: t_quantile(0.95, 4) = 2.776."""
    assert 0 < level < 1, level
    low, high = 0.0, math.pi / 2    # of the angle with tangent t / sqrt(freedom): it has bounds, t has none
    for _ in range(60):
        middle = (low + high) / 2
        enough = t_within(math.sqrt(freedom) * math.tan(middle), freedom) >= level
        low, high = (low, middle) if enough else (middle, high)
    return math.sqrt(freedom) * math.tan(high)


def t_interval(differences, level: float = 1 - ALPHA) -> dict:
    """{"mean", "low", "high", "level", "n", "p"} of n >= 1 paired differences; p two-sided, of mean 0."""
    d = np.asarray(differences, dtype=np.float64)
    n, mean, low, high, p = len(d), float(d.mean()), None, None, 1.0
    if n > 1:                                            # a single seed leaves everything open
        error = float(d.std(ddof=1)) / math.sqrt(n)      # n - 1: the mean was taken from the same n
        width = t_quantile(level, n - 1) * error
        low, high = mean - width, mean + width
        p = 1 - t_within(abs(mean) / error, n - 1) if error else float(mean == 0)
    return {"mean": mean, "low": low, "high": high, "level": level, "n": n, "p": p}


def holm(p_values) -> tuple[list, list]:
    """m p-values -> adjusted ones, and the levels at which an interval without 0 means adjusted p <= .05."""
    m, largest, stood = len(p_values), 0.0, None
    adjusted, levels = [0.0] * m, [0.0] * m
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (m - rank) * p_values[i]))
        stood = rank if stood is None and largest > ALPHA else stood    # nothing is tested after it
        adjusted[i], levels[i] = largest, 1 - ALPHA / (m - (rank if stood is None else stood))
    return adjusted, levels


@lru_cache(maxsize=8)
def resample(scores: tuple, replicates: int, key: int) -> tuple[np.ndarray, list]:
    """Draws of the bootstrap: the seed at each place (R, n); per seed the weights of its slides (places, S),
    in the order of which == seed. `scores`: per seed the strata of its slides."""
    rng, weights = np.random.default_rng(key), []
    which = rng.integers(len(scores), size=(replicates, len(scores)))
    for seed, strata in enumerate(map(np.array, scores)):
        weights.append(np.zeros(((which == seed).sum(), len(strata))))
        for score in np.unique(strata):     # a draw without slides of a score would have no recall of it
            here = np.flatnonzero(strata == score)
            weights[-1][:, here] = rng.multinomial(len(here), [1 / len(here)] * len(here), len(weights[-1]))
    return which, weights


def percentiles(replicates, n: int) -> list:
    """[low, high] of resamples of n seeds, wider than the 2.5 and 97.5 % points."""
    # Resamples scatter by the sd with n, not n - 1, and know no t law: z = 1.96 becomes sqrt(n / (n - 1)) q.
    tails = math.erfc(math.sqrt(n / (n - 1) / 2) * t_quantile(1 - ALPHA, n - 1)) if n > 1 else ALPHA
    return [float(x) for x in np.nanquantile(replicates, [tails / 2, 1 - tails / 2])]


class Study:
    """arms: {name: {seed: Outcome}}. `replicates` and `key` decide the bootstrap, the same for all arms."""

    def __init__(self, arms, classes, replicates: int = 2000, key: int = 0):
        self.arms, self.classes, self.replicates, self.key = arms, classes, replicates, key

    def values(self, names, point, figure) -> tuple[list, np.ndarray]:
        """The n seeds in which all these arms have the figure, and (arms, n) figures."""
        seeds = sorted(set.intersection(*(set(self.arms.get(name, {})) for name in names)))
        table = [[self.arms[name][s].figures[point][figure] for s in seeds] for name in names]
        table = np.array(table, float)                      # None becomes NaN
        there = ~np.isnan(table).any(axis=0)
        return [s for s, good in zip(seeds, there) if good], table[:, there]

    def replicated(self, arm, seeds, point, figure) -> np.ndarray:
        """(R,) bootstrap replicates of the arm's mean over `seeds`."""
        runs = [self.arms[arm][seed] for seed in seeds]
        which, weights = resample(tuple(one.scores for one in runs), self.replicates, self.key)
        drawn = np.empty(which.shape)                                                   # (R, n)
        for i, (one, rows) in enumerate(zip(runs, weights)):
            sums = np.tensordot(rows, one.tables[point], axes=(1, 1))                   # (places, M, K, 2)
            drawn[which == i] = rates(sums, self.classes)[figure].mean(axis=1)
        return drawn.mean(axis=1)

    def difference(self, new, old, point, figure):
        """t_interval of `new` - `old`, "seeds", "values", "bootstrap"; None without a pair."""
        seeds, (a, b) = self.values((new, old), point, figure)
        if not seeds:
            return None
        assert all(self.arms[new][s].scores == self.arms[old][s].scores for s in seeds), "not the same slides"
        drawn = None
        if self.replicates and figure != "average_precision":
            drawn = percentiles(self.replicated(new, seeds, point, figure)
                                - self.replicated(old, seeds, point, figure), len(seeds))
        return {**t_interval(a - b), "seeds": seeds, "values": (a - b).tolist(), "bootstrap": drawn}

    def efficiency(self, arm, baseline, oracle, point, figure):
        """[share of the oracle's gain that the arm reaches, low, high]; None of one seed, or a gain of 0."""
        names = (arm, baseline, oracle)
        seeds, table = self.values(names, point, figure)
        if len(seeds) < 2:
            return None
        a, b, c = (self.replicated(name, seeds, point, figure) for name in names)
        low, high = percentiles(c - b, len(seeds))
        new, old, bound = table.mean(axis=1)
        return (None if low <= 0 <= high else
                [float((new - old) / (bound - old)), *percentiles((a - b) / (c - b), len(seeds))])

    def primaries(self) -> list:
        """Per claim its `difference` at Holm's level, "p_holm", "matched", "oracle" (against its other arm),
        "verdict", "sentence". A claim without data stays in the family."""
        found, rows = [self.difference(*what) for what in CLAIMS.values()], []
        for claim, d, p, level in zip(CLAIMS, found, *holm([d["p"] if d else 1.0 for d in found])):
            new, old, point, figure = CLAIMS[claim]
            equal = self.difference(new, old, "matched", figure)
            equal, oracle = equal and equal["mean"], self.difference(ORACLE, old, point, figure)
            d = d and {**d, **t_interval(d["values"], level)}
            name, sentence = verdict(claim, d, equal, oracle)
            rows.append({"claim": claim, **(d or {}), "p_holm": p, "matched": equal, "oracle": oracle,
                         "verdict": name, "sentence": sentence})
        return rows


def spread(numbers, digits=3) -> str:
    """"0.833 \u00b1 0.004", mean and standard deviation of those not None; "0.833" of one, "n/a" of none."""
    found = [number for number in numbers if number is not None]
    deviation = f" \u00b1 {np.std(found, ddof=1):.{digits}f}" if len(found) > 1 else ""
    return f"{np.mean(found):.{digits}f}{deviation}" if found else "n/a"


def ratio_text(log: float) -> str:
    """The ratio whose logarithm this is. What two seeds leave open spans more digits than anyone reads."""
    return f"{math.exp(log):.2f}" if log < math.log(1000) else "over 1000"


def verdict(claim: str, found, matched, oracle) -> tuple[str, str]:
    """(verdict, sentence); `found` and `oracle` as of `t_interval`, or None. The first that holds:

    reproduced       the interval is without 0, its mean reaches the margin on the paper's side, and the mean
                     at the matched false-positive rate has the same sign
    not answerable   the oracle's interval includes 0
    contradicted     the interval excludes even the margin, and the oracle shows it, by interval and mean
    undecided        anything else"""
    new, old, point, figure = CLAIMS[claim]
    margin, sign = abs(MARGIN[figure]), np.sign(MARGIN[figure])
    if not found:
        return "undecided", f"{claim}: undecided; no seed has both {new} and {old}."

    def ends(one):              # of the interval, seen from the paper's side; that of a single seed is open
        return sorted([sign * one["low"], sign * one["high"]]) if one["n"] > 1 else [-math.inf, math.inf]

    def shows(one):
        return ends(one)[0] > 0 and sign * one["mean"] >= margin

    def amount(value):
        return f"{round(value, 4) + 0.0:+.4f}" if figure == "dice" else f"x {ratio_text(value)}"

    def spoken(one):
        between = f"{amount(one['low'])} to {amount(one['high'])}" if one["n"] > 1 else "no interval"
        return f"{amount(one['mean'])} ({100 * one['level']:.4g} %: {between}, n = {one['n']})"

    name = "undecided"
    if shows(found) and sign * (matched or 0) > 0:
        name = "reproduced"
    elif oracle and oracle["n"] > 1 and ends(oracle)[0] <= 0 <= ends(oracle)[1]:
        name = "not answerable"
    elif oracle and shows(oracle) and ends(found)[1] < margin:
        name = "contradicted"
    what = "Dice" if figure == "dice" else "subtype variance"
    equal = "" if point == "matched" or matched is None else f", {amount(matched)} at equal FPR"
    return name, (f"{claim}, {what} of {new} against {old}: {name}; {spoken(found)}{equal}; "
                  f"oracle {spoken(oracle) if oracle else 'n/a'}.")
