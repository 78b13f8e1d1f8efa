"""Metrics from counts against slow loops over pixels; distances of feature sets against closed forms."""

import json

import numpy as np
import pytest
import torch
from parity_segmentation import class_scores, confusion_matrix, normalise

from her2.data_classes import DEFAULT_CLASSES
from her2.frechet import feature_statistics, frechet_distance, kernel_distance
from her2.metrics import BINS, THRESHOLDS, ProbabilityHistogram, matched

FIELDS = {"dice", "recall", "subtype_variance", "precision", "fpr", "confusion"}  # of results.json


def example(seed=0, pixels=3000):
    """Tumor probabilities that know something, and true class ids 0..5."""
    random = np.random.default_rng(seed)
    label = random.choice(6, pixels, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    logit = random.normal(size=pixels) * 3 + np.array([-2, 0, 1, 2, 3, 1])[label]
    return (1 / (1 + np.exp(-logit))).astype(np.float32), label


def histogram(prob, label):
    return ProbabilityHistogram(DEFAULT_CLASSES).add(np.asarray(prob, np.float32), np.asarray(label))


def slow(prob, label, threshold):
    """The whole report by looking at every pixel, in exact arithmetic of float64."""
    predicted = [float(p) >= threshold for p in prob]
    table = [[0, 0] for _ in range(6)]
    for p, k in zip(predicted, label):
        table[k][p] += 1
    tp = sum(table[k][1] for k in range(1, 6))
    fn = sum(table[k][0] for k in range(1, 6))
    tn, fp = table[0]
    recall = {DEFAULT_CLASSES.names[k]: table[k][1] / sum(table[k]) for k in range(1, 6)}
    four = [recall[name] for name in ("0", "1+", "2+", "3+")]
    mean = sum(four) / 4
    return {"dice": 2 * tp / (2 * tp + fp + fn), "precision": tp / (tp + fp), "fpr": fp / (fp + tn),
            "recall": recall, "subtype_variance": sum((r - mean) ** 2 for r in four) / 4, "confusion": table}


# ---- the histogram
# --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.001, 0.999, 1e-7, 1 - 3e-4, 5e-5])
def test_report_is_that_of_a_loop_over_pixels(threshold):
    prob, label = example()
    ours, theirs = histogram(prob, label).report(threshold), slow(prob, label, threshold)
    assert ours.keys() == theirs.keys() == FIELDS
    assert ours["confusion"] == theirs["confusion"]
    assert ours["recall"] == pytest.approx(theirs["recall"])
    for key in ("dice", "precision", "fpr", "subtype_variance"):
        assert ours[key] == pytest.approx(theirs[key]), key


def test_counts_are_exact_at_every_threshold_of_the_grid():
    prob, label = example(1)
    prob[:BINS - 1] = THRESHOLDS                              # float32 roundings of the thresholds themselves
    table = histogram(prob, label)
    for threshold in THRESHOLDS:
        tumor = prob.astype(np.float64) >= threshold
        expected = [[int((~tumor[label == k]).sum()), int(tumor[label == k].sum())] for k in range(6)]
        assert table.confusion(threshold).tolist() == expected, threshold


def test_the_grid():
    assert (np.diff(THRESHOLDS) > 0).all() and 0 < THRESHOLDS[0] <= 1e-7 and 1 > THRESHOLDS[-1] >= 1 - 1e-7
    assert all(i / 1000 in THRESHOLDS for i in range(1, 1000))
    assert histogram([0.5, 0.49999997, 0.0, 1.0], [1, 1, 0, 0]).confusion().tolist()[:2] == [[1, 1], [1, 1]]
    with pytest.raises(ValueError, match="0.1234"):
        histogram([0.5], [1]).confusion(0.1234)


def test_the_metric_of_a_union_is_that_of_the_summed_counts():
    prob, label = example(2)
    slides = {"a": slice(0, 100), "b": slice(100, 2500), "c": slice(2500, None)}
    tables = {name: histogram(prob[part], label[part]) for name, part in slides.items()}
    before = tables["a"].counts.copy()
    pooled = sum(tables.values())
    assert pooled.report() == histogram(prob, label).report()
    assert pooled.report(0.2) == histogram(prob, label).report(0.2)
    assert (tables["a"].counts == before).all()
    mean = np.mean([table.report()["dice"] for table in tables.values()])
    assert abs(mean - pooled.report()["dice"]) > 1e-3         # a mean over slides is something else


def test_images_tensors_and_pieces():
    prob, label = example(3)
    whole = histogram(prob, label)
    image = ProbabilityHistogram(DEFAULT_CLASSES)
    image.add(torch.from_numpy(prob).reshape(30, 100), torch.from_numpy(label).reshape(30, 100))
    assert (image.counts == whole.counts).all()
    times = 400                                               # more pixels than are counted in one piece
    many = histogram(np.tile(prob, times), np.tile(label, times).astype(np.uint8))
    assert (many.counts == times * whole.counts).all()


def test_json_round_trip():
    table = histogram(*example(4))
    text = json.dumps(table.to_json(), allow_nan=False)
    assert (ProbabilityHistogram.from_json(json.loads(text), DEFAULT_CLASSES).counts == table.counts).all()
    for wrong in ([[1, 2]], table.counts[:5].tolist(), (-table.counts).tolist()):
        with pytest.raises(ValueError):
            ProbabilityHistogram.from_json({"counts": wrong}, DEFAULT_CLASSES)


@pytest.mark.parametrize("prob, label", [([0.5, np.nan], [0, 1]), ([1.5], [0]), ([-0.1], [0]), ([0.5], [6]),
                                         ([0.5], [-1]), ([0.5, 0.5], [0])])
def test_impossible_pixels_are_refused(prob, label):
    with pytest.raises(ValueError):
        histogram(prob, label)


# ---- what does not exist
# --------------------------------------------------------------------------------------

def test_what_does_not_exist_is_none():
    report = histogram([0.1, 0.9, 0.9, 0.2], [0, 0, 2, 2]).report()
    assert report["recall"] == {"0": None, "1+": 0.5, "2+": None, "3+": None, "LCIS/DCIS": None}
    assert report["subtype_variance"] is None                 # one recall has no variance
    assert histogram([0.1, 0.2], [0, 1]).report()["precision"] is None
    no_background = histogram([0.9, 0.2], [1, 1])
    assert no_background.report()["fpr"] is None and no_background.threshold_at_fpr(0.1) is None
    for table in (histogram([], []), no_background, histogram([0.9], [0])):
        json.dumps(table.report(), allow_nan=False)


def test_dice_of_nothing():
    assert histogram([0.1, 0.2], [0, 0]).report()["dice"] == 1.0      # nothing there, nothing predicted
    assert histogram([0.1, 0.9], [0, 0]).report()["dice"] == 0.0
    assert histogram([0.1, 0.2], [0, 1]).report()["dice"] == 0.0


def test_variance_is_over_the_her2_rows_that_are_there():
    # Recalls 1, 0.5, -, 0 of the HER2 rows; LCIS/DCIS (0) stays out.
    report = histogram([0.9, 0.9, 0.1, 0.1, 0.1], [1, 2, 2, 4, 5]).report()
    assert report["recall"]["LCIS/DCIS"] == 0.0
    assert report["subtype_variance"] == pytest.approx(np.mean([0.25, 0.0, 0.25]))


# ---- one operating point for two networks
# ---------------------------------------------------------------------

def test_threshold_at_fpr_is_the_nearest():
    prob, label = example(5)
    table = histogram(prob, label)
    background = prob[label == 0].astype(np.float64)
    rates = np.array([(background >= t).mean() for t in THRESHOLDS])
    for target in (0.0, 0.01, 0.05, 0.2, 0.7, 1.0):
        found = table.threshold_at_fpr(target)
        distance = np.abs(rates - target)
        nearest = THRESHOLDS[distance == distance.min()]
        assert found in nearest
        assert abs(found - 0.5) == np.abs(nearest - 0.5).min()


def test_matching_the_baseline_to_itself_changes_nothing():
    val, test = histogram(*example(6)), histogram(*example(7))
    own = test.report()
    assert matched(val, test, val.report()["fpr"]) == {"threshold": 0.5, **{
        key: own[key] for key in ("fpr", "dice", "recall", "subtype_variance", "precision")}}


def test_matching_undoes_a_shift_of_the_operating_point():
    # The same network, but surer of tumor everywhere: more found, more false alarms, a lower variance of
    # recalls.
    (val_prob, val_label), (prob, label) = example(8, 20000), example(9, 20000)
    baseline = histogram(prob, label).report()
    val, test = histogram(val_prob ** 0.3, val_label), histogram(prob ** 0.3, label)
    assert test.report()["fpr"] > 1.5 * baseline["fpr"]
    assert test.report()["subtype_variance"] < 0.7 * baseline["subtype_variance"]
    undone = matched(val, test, histogram(val_prob, val_label).report()["fpr"])
    assert undone["fpr"] == pytest.approx(baseline["fpr"], abs=0.002)
    assert undone["dice"] == pytest.approx(baseline["dice"], abs=0.002)
    assert undone["subtype_variance"] == pytest.approx(baseline["subtype_variance"], rel=0.02)


def test_a_network_that_is_sure_of_itself_can_still_be_matched():
    # Background probabilities between 0.999 and 1: on a grid of thousandths the rate would jump from 1 to 0.
    prob = np.concatenate([1 - np.logspace(-3.5, -6.5, 500), np.ones(100)])
    table = histogram(prob, [0] * 500 + [3] * 100)
    threshold = table.threshold_at_fpr(0.3)
    assert table.report(threshold)["fpr"] == pytest.approx(0.3, abs=0.03)


def test_without_background_there_is_nothing_to_match():
    table = histogram([0.9, 0.2], [1, 1])
    assert matched(table, table, 0.1) is None and matched(histogram(*example()), table, None) is None


# ---- confusion matrices of many classes
# -----------------------------------------------------------------------

def test_confusion_matrix_counts_truth_in_rows():
    random = np.random.default_rng(0)
    pred, target = random.integers(0, 4, (2, 5, 40))
    table = np.zeros((4, 4), int)
    for p, t in zip(pred.ravel(), target.ravel()):
        table[t, p] += 1
    assert (confusion_matrix(pred, torch.from_numpy(target), 4) == table).all()
    with pytest.raises(AssertionError):
        confusion_matrix(pred, target, 3)


def test_normalised_rows_columns_and_all():
    table = np.array([[3, 1, 0], [2, 2, 0], [0, 0, 0]])
    assert normalise(table).tolist() == [[0.75, 0.25, 0], [0.5, 0.5, 0], [0, 0, 0]]
    assert normalise(table, "prediction").tolist() == [[0.6, 1 / 3, 0], [0.4, 2 / 3, 0], [0, 0, 0]]
    assert normalise(table, "all").sum() == 1


def test_scores_of_each_class_against_the_rest():
    random = np.random.default_rng(1)
    pred, target = random.integers(0, 3, (2, 200))
    scores = class_scores(confusion_matrix(pred, target, 4), empty=-1)
    for k in range(3):
        found, true = pred == k, target == k
        tp, fp, fn = int((found & true).sum()), int((found & ~true).sum()), int((~found & true).sum())
        assert scores["dice"][k] == pytest.approx(2 * tp / (2 * tp + fp + fn))
        assert scores["iou"][k] == pytest.approx(tp / (tp + fp + fn))
        assert scores["recall"][k] == pytest.approx(tp / (tp + fn))
        assert scores["precision"][k] == pytest.approx(tp / (tp + fp))
    assert all(values[3] == -1 for values in scores.values())
    assert np.isnan(class_scores(np.zeros((2, 2)))["dice"]).all()


# ---- distances of feature sets
# --------------------------------------------------------------------------------

def test_frechet_distance_in_one_dimension():
    # |m1 - m2|^2 + (s1 - s2)^2
    assert frechet_distance([1.0], [[4.0]], [3.5], [[0.25]]) == pytest.approx(2.5 ** 2 + 1.5 ** 2)


def test_frechet_distance_of_covariances_that_commute():
    random = np.random.default_rng(2)
    rotation = np.linalg.qr(random.normal(size=(5, 5)))[0]
    a, b, mu1, mu2 = random.random((4, 5))
    a[0] = 0                                                  # rank deficient
    distance = frechet_distance(mu1, rotation * a @ rotation.T, mu2, rotation * b @ rotation.T)
    assert distance == pytest.approx(((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())


def test_frechet_distance_is_symmetric_and_zero_for_equals():
    random = np.random.default_rng(3)
    one = feature_statistics(random.normal(size=(50, 6)))
    two = feature_statistics(random.normal(size=(9, 6)) * 2 + 1)
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one))
    assert 0 <= frechet_distance(*one, *one) < 1e-10


def test_feature_statistics():
    x = np.random.default_rng(4).normal(size=(7, 3)).astype(np.float32)
    mu, cov = feature_statistics(torch.from_numpy(x))
    centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
    assert mu == pytest.approx(x.mean(0), abs=1e-6)
    assert cov == pytest.approx(sum(np.outer(row, row) for row in centred) / 6)
    assert feature_statistics(x[:, :1])[1].shape == (1, 1)


def test_kernel_distance_is_the_mean_over_pairs():
    random = np.random.default_rng(5)
    a, b = random.normal(size=(6, 4)), random.normal(size=(5, 4)) + 0.5

    def mean(x, y, same):
        pairs = [(p @ q / 4 + 1) ** 3 for i, p in enumerate(x) for j, q in enumerate(y) if not same or i != j]
        return sum(pairs) / len(pairs)
    assert kernel_distance(a, b) == pytest.approx(mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False))


def test_kernel_distance_is_unbiased():
    random = np.random.default_rng(6)
    draws = [kernel_distance(random.normal(size=(10, 3)), random.normal(size=(8, 3))) for _ in range(1500)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 1500 ** 0.5 and min(draws) < 0


def test_the_best_threshold_is_that_of_the_highest_dice_and_nearest_to_a_half():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 6, 4000)
    prob = np.clip(0.2 * (label > 0) + rng.normal(0.3, 0.15, 4000), 0, 1).astype(np.float32)
    histogram = ProbabilityHistogram(DEFAULT_CLASSES).add(prob, label)
    dice = [histogram.report(t)["dice"] for t in THRESHOLDS]
    best = histogram.best_threshold()
    assert dice[list(THRESHOLDS).index(best)] == max(dice) and best < 0.5
    assert all(abs(t - 0.5) >= abs(best - 0.5) for t, d in zip(THRESHOLDS, dice) if d == max(dice))
    assert ProbabilityHistogram(DEFAULT_CLASSES).add(prob, label * 0).best_threshold() is None
