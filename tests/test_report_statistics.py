"""The statistics of the study against closed forms, printed tables, enumeration, and simulated studies."""

import itertools
import json
import math

import numpy as np
import pytest

from her2 import report_statistics as st
from her2.data_classes import DEFAULT_CLASSES
from her2.metrics import BINS, THRESHOLDS, ProbabilityHistogram
from her2.report_statistics import Outcome, Study, outcome, rates, t_interval, verdict

K = len(DEFAULT_CLASSES)
EDGES = np.concatenate([[0.0], THRESHOLDS, [1.0]])
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2


def some_counts(seed, slides=3, scale=4.0):
    """(S, K, BINS) counts of pixels that know something of their class."""
    rng = np.random.default_rng(seed)
    tables = []
    for _ in range(slides):
        label = rng.integers(K, size=400)
        prob = 1 / (1 + np.exp(-rng.normal(scale * (label > 0) - 2 + rng.normal() / 2, 2)))
        tables.append(ProbabilityHistogram(DEFAULT_CLASSES).add(prob, label).counts)
    return np.stack(tables)


def made(tables, scores=None):
    """An Outcome with the same (S, K, 2) counts at all points."""
    tables = np.asarray(tables)
    figures = {**{k: float(v) for k, v in rates(tables.sum(axis=0), DEFAULT_CLASSES).items()},
               "average_precision": 0.5}
    points = ("best", "half", "matched")
    return Outcome(tuple(scores or ["0"] * len(tables)), dict.fromkeys(points, 0.5),
                   dict.fromkeys(points, tables[None]), dict.fromkeys(points, figures))


# ---- figures -----------------------------------------------------------------------------------------------

def test_rates_are_those_of_the_report():
    counts = some_counts(0)
    counts[1, 3] = 0                                            # a subtype that a slide does not have
    counts[2, 1:5] = 0                                          # no subtype at all: no variance
    confusions = [ProbabilityHistogram(DEFAULT_CLASSES, c).confusion() for c in counts]
    many = rates(np.stack(confusions), DEFAULT_CLASSES)
    for i, c in enumerate(counts):
        report = ProbabilityHistogram(DEFAULT_CLASSES, c).report()
        expected = {key: report[key] for key in ("dice", "precision", "fpr")}
        expected["variance"] = report["subtype_variance"]
        expected |= {f"recall {name}": value for name, value in report["recall"].items()}
        for key, value in expected.items():
            assert many[key][i] == pytest.approx(math.nan if value is None else value, nan_ok=True), key
        variance = expected["variance"]
        assert many["log_variance"][i] == pytest.approx(
            math.nan if variance is None else math.log(max(variance, 1e-4)), nan_ok=True)
    empty = rates(np.zeros((K, 2)), DEFAULT_CLASSES)
    assert empty["dice"] == 1 and math.isnan(empty["precision"]) and math.isnan(empty["variance"])


def test_zero_variance_has_a_floor():
    table = np.tile([10, 90], (K, 1))
    assert rates(table, DEFAULT_CLASSES)["variance"] == pytest.approx(0)
    assert rates(table, DEFAULT_CLASSES)["log_variance"] == pytest.approx(math.log(1e-4))


def test_average_precision_is_that_of_sorted_pixels():
    """All probabilities are bin centres; ties enter together, so a loop over distinct values is exact."""
    rng = np.random.default_rng(1)
    label = rng.integers(K, size=3000)
    bins = np.clip(rng.normal(np.where(label > 0, 600, 450), 120).astype(int) // 5 * 5, 0, BINS - 1)
    counts = np.zeros((K, BINS), np.int64)
    np.add.at(counts, (label, bins), 1)
    prob, tumor, total, before = CENTRES[bins], label > 0, 0.0, 0.0
    for value in sorted(set(prob), reverse=True):
        called = prob >= value
        recall = (called & tumor).sum() / tumor.sum()
        total += (recall - before) * (called & tumor).sum() / called.sum()
        before = recall
    assert st.average_precision(counts, DEFAULT_CLASSES) == pytest.approx(total)
    assert 0.5 < total < 0.99
    counts[1:] = 0
    assert math.isnan(st.average_precision(counts, DEFAULT_CLASSES))


def test_outcome_takes_its_thresholds_as_it_says():
    val, test, classes = some_counts(2), some_counts(3, slides=4), DEFAULT_CLASSES
    base = outcome(val, test, "abca", classes)
    whole = ProbabilityHistogram(classes, val.sum(axis=0))
    dice = [whole.report(t)["dice"] for t in THRESHOLDS]
    assert whole.report(base.thresholds["best"])["dice"] == max(dice)
    assert base.thresholds["half"] == base.thresholds["matched"] == 0.5
    other = outcome(val, some_counts(4, slides=4, scale=3), "abca", classes, base.figures["half"]["fpr"])
    assert other.figures["matched"]["fpr"] == pytest.approx(base.figures["half"]["fpr"], abs=0.01)
    assert other.figures["half"]["fpr"] != pytest.approx(base.figures["half"]["fpr"], abs=0.01)
    report = ProbabilityHistogram(classes, test.sum(axis=0)).report(base.thresholds["best"])
    assert base.figures["best"]["dice"] == report["dice"]
    assert base.tables["best"].sum(axis=(0, 1)).tolist() == report["confusion"]
    alone = outcome(val, test, "abca", classes, math.nan)                   # no baseline, nothing to match
    assert alone.thresholds["matched"] is None and np.isnan(alone.figures["matched"]["dice"])
    assert alone.figures["half"] == base.figures["half"]
    with pytest.raises(AssertionError, match="4 test slides, 2 scores"):
        outcome(val, test, "ab", classes)


def test_segmenters_of_one_seed_count_as_their_mean():
    """In every figure and every replicate of the bootstrap; what one lacks, their mean lacks."""
    rng = np.random.default_rng(11)
    one, two = ({seed: made(rng.integers(1, 90, size=(4, K, 2)), "aabb") for seed in (1, 2, 3)} for _ in "ab")
    both = {seed: st.together([one[seed], two[seed]]) for seed in one}
    study = Study({"one": one, "two": two, "both": both}, DEFAULT_CLASSES, replicates=200)
    for figure in ("dice", "log_variance", "recall 0"):
        _, (a, b, mean) = study.values(("one", "two", "both"), "half", figure)
        assert mean == pytest.approx((a + b) / 2, rel=1e-12)
        a, b, mean = (study.replicated(name, [1, 2, 3], "half", figure) for name in ("one", "two", "both"))
        assert mean == pytest.approx((a + b) / 2, rel=1e-12) and mean.std() > 0
    lacking = made(one[1].tables["half"][0] * np.array([1, 0, 1, 1, 1, 1])[:, None], "aabb")
    assert math.isnan(st.together([one[1], lacking]).figures["half"]["recall 0"])
    assert st.together([one[1]]).figures == one[1].figures


# ---- intervals and tests -----------------------------------------------------------------------------------

def test_t_quantiles_are_those_of_a_printed_table():
    table = {(0.95, 1): 12.706, (0.95, 2): 4.303, (0.95, 3): 3.182, (0.95, 4): 2.776, (0.95, 5): 2.571,
             (0.95, 10): 2.228, (0.95, 30): 2.042, (0.95, 120): 1.980, (0.99, 1): 63.657, (0.99, 4): 4.604,
             (0.99, 5): 4.032, (0.99, 9): 3.250, (0.9, 4): 2.132, (0.9, 7): 1.895, (0.999, 5): 6.869}
    for (level, freedom), value in table.items():
        assert st.t_quantile(level, freedom) == pytest.approx(value, abs=5.1e-4), (level, freedom)


@pytest.mark.parametrize("freedom", range(1, 10))
def test_t_law_is_the_integral_of_its_density(freedom):
    x = np.linspace(0, 2.3, 20001)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(math.pi * freedom)
    density = scale * (1 + x ** 2 / freedom) ** (-(freedom + 1) / 2)
    area = np.sum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])
    assert st.t_within(2.3, freedom) == pytest.approx(2 * area, abs=1e-8)


def test_t_interval_by_hand():
    found = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])               # s = sqrt(2.5), s / sqrt(5) = 0.70711
    assert found["mean"] == 3 and found["n"] == 5
    assert found["high"] - 3 == pytest.approx(2.776445 * 0.707107, abs=1e-5)
    assert found["low"] + found["high"] == pytest.approx(6)
    assert found["p"] == pytest.approx(0.013236, abs=1e-5)      # P(|T| > 4.24264), 4 degrees of freedom
    at = t_interval([1.0, 2.0, 3.0, 4.0, 5.0], 1 - found["p"])
    assert at["low"] == pytest.approx(0, abs=1e-8)              # p is where the interval touches 0
    one = t_interval([0.3])
    assert one["low"] is None and one["p"] == 1
    same = t_interval([0.25, 0.25])
    assert same["low"] == same["high"] == 0.25 and same["p"] == 0 and t_interval([0, 0])["p"] == 1


def test_seeds_with_other_sets_are_averaged_over_those_that_have_them():
    found = st.averaged([{"real": {"n": 2, "a": 1.0}}, {"real": {"n": 3, "a": 2.0}, "GAN": {"n": 4, "a": 5.0}}, None])
    assert found == {"real": {"n": 5, "a": 1.5}, "GAN": {"n": 4, "a": 5.0}}


def test_holm_is_the_closed_test_of_bonferroni():
    """Brute force: a hypothesis falls when every set of hypotheses that holds it has m * min(p) <= alpha."""
    rng = np.random.default_rng(5)
    for _ in range(40):
        p = (rng.random(4) ** 3).tolist()
        adjusted, levels = st.holm(p)
        for i in range(4):
            sets = [c for m in range(1, 5) for c in itertools.combinations(range(4), m) if i in c]
            assert adjusted[i] == pytest.approx(max(min(1, len(c) * min(p[j] for j in c)) for c in sets))
            assert (adjusted[i] <= 0.05) == (p[i] <= 1 - levels[i] + 1e-15)
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == ([0.03, 0.06, 0.06, 0.02],
                                                  pytest.approx([1 - 0.05 / 3, 0.975, 0.975, 0.9875]))


# ---- bootstrap ---------------------------------------------------------------------------------------------

def test_bootstrap_has_the_law_of_all_resamples():
    """n = 3 seeds with strata of 2 + 1 slides: 27 draws of seeds, 2^2 of slides at each place, all alike."""
    rng = np.random.default_rng(6)
    arms = {name: {seed: made(rng.integers(1, 90, size=(3, K, 2)), ["0", "3+", "0"]) for seed in range(3)}
            for name in ("new", "old")}

    def dice(name, seed, slides):
        table = sum(arms[name][seed].tables["half"][0, s] for s in slides)
        tp, fn, fp = table[1:, 1].sum(), table[1:, 0].sum(), table[0, 1]
        return 2 * tp / (2 * tp + fp + fn)

    places = [dice("new", seed, (a, b, 1)) - dice("old", seed, (a, b, 1))
              for seed in range(3) for a in (0, 2) for b in (0, 2)]
    exact = np.sort([sum(three) / 3 for three in itertools.product(places, repeat=3)])
    study = Study(arms, DEFAULT_CLASSES, replicates=40000, key=1)
    drawn = np.sort(study.replicated("new", [0, 1, 2], "half", "dice")
                    - study.replicated("old", [0, 1, 2], "half", "dice"))
    assert set(np.round(drawn, 12)) <= set(np.round(exact, 12))
    grid = exact[::20]
    distance = np.abs(np.searchsorted(drawn, grid + 1e-12) / drawn.size
                      - np.searchsorted(exact, grid + 1e-12) / exact.size).max()
    assert distance < 1.63 / math.sqrt(drawn.size)              # Kolmogorov-Smirnov at 1 %
    found = study.difference("new", "old", "half", "dice")
    tails = math.erfc(math.sqrt(3 / 2) * st.t_quantile(0.95, 2) / math.sqrt(2))     # n / (n - 1) = 3 / 2
    assert found["bootstrap"] == pytest.approx(np.quantile(exact, [tails / 2, 1 - tails / 2]), abs=1e-4)
    assert st.percentiles(exact, 1) == pytest.approx(np.quantile(exact, [0.025, 0.975]))
    assert found["values"] == pytest.approx([dice("new", s, (0, 1, 2)) - dice("old", s, (0, 1, 2))
                                             for s in range(3)])


def test_equal_arms_differ_by_nothing_in_every_replicate():
    arms = {seed: made(np.random.default_rng(seed).integers(1, 90, size=(8, K, 2)), "aabbccdd")
            for seed in (3, 4)}
    study = Study({"a": arms, "b": arms}, DEFAULT_CLASSES, replicates=50)
    found = study.difference("a", "b", "best", "log_variance")
    assert found["bootstrap"] == [0, 0] and found["mean"] == 0 and found["p"] == 1
    again = Study({"a": arms}, DEFAULT_CLASSES, replicates=50)
    assert (again.replicated("a", [3, 4], "best", "dice")
            == study.replicated("b", [3, 4], "best", "dice")).all()


def test_efficiency():
    """Dice .5, .6, .7 without false positives: half of the oracle's gain; slides are alike, seeds are not."""
    def arm(missed, seeds=(0, 1)):
        table = np.zeros((2, K, 2), int)
        table[:, 0, 0], table[:, 1] = 500, [missed, 100 - missed]
        return {seed: made(table) for seed in seeds}

    arms = {"subtype": arm(50), "ldm-100": arm(40), "oracle-100": arm(25), "none": {}}
    study = Study(arms, DEFAULT_CLASSES, 50)
    value = [2 * r / (1 + r) for r in (0.5, 0.6, 0.75)]
    expected = (value[1] - value[0]) / (value[2] - value[0])
    found = study.efficiency("ldm-100", "subtype", "oracle-100", "half", "dice")
    assert found == pytest.approx([expected] * 3)
    assert study.efficiency("ldm-100", "subtype", "none", "half", "dice") is None
    assert study.efficiency("ldm-100", "subtype", "subtype", "half", "dice") is None


# ---- verdicts ----------------------------------------------------------------------------------------------

def interval(mean, half, n=6):
    return {"mean": mean, "low": mean - half, "high": mean + half, "level": 0.95, "n": n, "p": 0.01}


@pytest.mark.parametrize("mean, half, matched, oracle, expected", [
    (0.010, 0.004, 0.002, (0.02, 0.01), "reproduced"),
    (0.010, 0.004, 0.002, None, "reproduced"),                  # what is there needs no bound
    (0.010, 0.011, 0.002, (0.02, 0.01), "undecided"),           # interval with 0
    (0.010, 0.004, -0.001, (0.02, 0.01), "undecided"),          # gone at equal false-positive rate
    (0.004, 0.002, 0.002, (0.02, 0.01), "undecided"),           # less than the margin, which is not excluded
    (0.003, 0.001, 0.002, (0.02, 0.01), "contradicted"),        # less than the margin, the oracle reaches it
    (-0.020, 0.010, -0.01, (0.02, 0.01), "contradicted"),
    (-0.020, 0.010, -0.01, (0.02, 0.03), "not answerable"),
    (0.0055, 0.001, 0.002, (0.02, 0.01), "reproduced"), (0.0045, 0.001, 0.002, (0.02, 0.01), "undecided"),
    (0.010, 0.011, 0.002, (0.02, 0.03), "not answerable"),
    (-0.020, 0.010, -0.01, (0.004, 0.001), "undecided"),        # the oracle does not reach the margin either
    (-0.020, 0.010, -0.01, (-0.02, 0.01), "undecided"),         # the oracle harms
    (-0.020, 0.010, -0.01, None, "undecided"),
])
def test_verdicts_of_dice_and_mirrored_of_variance(mean, half, matched, oracle, expected):
    bound = interval(*oracle) if oracle else None
    name, sentence = verdict("P3", interval(mean, half), matched, bound)
    assert name == expected
    assert sentence.startswith(f"P3, Dice of ldm-100 against subtype: {expected}; {mean:+.4f} (95 %: ")
    scale = math.log(0.8) / 0.005                               # margin upon margin
    bound = interval(scale * oracle[0], abs(scale) * oracle[1]) if oracle else None
    assert verdict("P4", interval(scale * mean, abs(scale) * half), scale * matched, bound)[0] == expected


def test_a_single_seed_decides_nothing():
    assert verdict("P3", t_interval([0.1]), 0.1, t_interval([0.2]))[0] == "undecided"
    nothing = "P1: undecided; no seed has both subtype and tumor."
    assert verdict("P1", None, None, None) == ("undecided", nothing)


def test_seeds_without_the_figure_are_left_out():
    table = np.random.default_rng(7).integers(1, 90, size=(2, K, 2))
    without = table.copy()
    without[:, 1] = 0
    study = Study({"subtype": {1: made(table), 2: made(without), 3: made(table)},
                   "tumor": {1: made(table), 2: made(table), 9: made(table)}}, DEFAULT_CLASSES, 20)
    assert study.difference("subtype", "tumor", "best", "recall 0")["seeds"] == [1]
    assert study.difference("subtype", "tumor", "best", "dice")["seeds"] == [1, 2]
    assert study.difference("subtype", "tumor", "best", "average_precision")["bootstrap"] is None
    assert study.difference("subtype", "gan-100", "best", "dice") is None
    rows = study.primaries()
    assert [row["verdict"] for row in rows] == ["undecided"] * 4
    json.dumps(rows, allow_nan=False)


# ---- simulated studies -------------------------------------------------------------------------------------

ARMS = ("tumor", "subtype", "ldm-100", "oracle-100")
SCORES = [score for score in ("0", "1+", "2+", "3+") for _ in range(4)]


def simulate(studies, seed, gain=0.0, seeds=5):
    """(studies, seeds, S, arms, K, 2) counts: logits of recall with seed, slide and run effects.

    `gain` raises the recall of HER2 0 in the arms ldm-100 and oracle-100.
    """
    rng = np.random.default_rng(seed)
    shape = (studies, seeds, len(SCORES), len(ARMS), K)

    def noise(sd, *axes):
        return rng.normal(0, sd, [size if i in axes else 1 for i, size in enumerate(shape)])

    logit = np.broadcast_to([-3.3, 0.7, 2.7, 3.2, 3.4, 2.4], shape)
    logit = logit + noise(0.4, 0, 1, 4) + noise(0.3, 0, 1, 3, 4)            # seed; training run of an arm
    logit = logit + noise(0.5, 0, 1, 2, 4) + noise(0.2, 0, 1, 2, 3, 4)      # slide; slide in a run
    logit[..., 2:, 1] += gain
    pixels = np.full((len(SCORES), 1, K), 300)
    pixels[:, :, 0] = 45000
    for s, score in enumerate(SCORES):
        pixels[s, :, DEFAULT_CLASSES.id_of(score)] = 15000
    called = np.round(pixels / (1 + np.exp(-logit)))
    return np.stack([pixels - called, called], axis=-1)


def as_arms(tables):
    """(seeds, S, arms, K, 2) -> the arms of a Study."""
    return {arm: {s: made(one[:, a], SCORES) for s, one in enumerate(tables)} for a, arm in enumerate(ARMS)}


def test_without_an_effect_at_most_one_study_in_twenty_declares_one():
    declared = reproduced = 0
    for tables in simulate(1000, seed=8):
        rows = Study(as_arms(tables), DEFAULT_CLASSES, replicates=0).primaries()
        declared += any(row["p_holm"] <= 0.05 for row in rows)
        reproduced += any(row["verdict"] == "reproduced" for row in rows)
    print("declared", declared, "reproduced", reproduced)
    assert declared <= 50 + 3 * math.sqrt(1000 * 0.05 * 0.95) and reproduced <= declared


@pytest.mark.parametrize("gain", [0.0, 0.8])
def test_t_intervals_cover(gain):
    many = simulate(1000, seed=9, gain=gain).sum(axis=2)                    # (studies, seeds, arms, K, 2)
    for figure in ("dice", "log_variance", "recall 0"):
        value = rates(many, DEFAULT_CLASSES)[figure]
        d = value[..., 2] - value[..., 1]                                   # (studies, seeds)
        truth = d.mean()                    # of 5,000 seeds: its error is small beside an interval of five
        found = [t_interval(row) for row in d]
        share = np.mean([one["low"] <= truth <= one["high"] for one in found])
        print(figure, gain, share)
        assert abs(share - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 1000)


@pytest.mark.parametrize("figure", ["dice", "log_variance"])
def test_bootstrap_intervals_cover_too(figure):
    many, hits = simulate(200, seed=10, gain=0.8), 0
    value = rates(many.sum(axis=2), DEFAULT_CLASSES)[figure]
    truth = (value[..., 2] - value[..., 1]).mean()
    for tables in many:
        study = Study(as_arms(tables), DEFAULT_CLASSES, 500)
        low, high = study.difference("ldm-100", "subtype", "best", figure)["bootstrap"]
        hits += low <= truth <= high
    print("bootstrap", figure, hits / len(many))
    assert abs(hits / len(many) - 0.95) < 0.03 + 3 * math.sqrt(0.95 * 0.05 / 200)   # of five values: no more
