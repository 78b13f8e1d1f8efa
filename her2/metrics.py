"""Segmentation metrics from counts: how much tumor is found, per subtype, at any threshold.

Everything follows from one table per slide, accumulated over all its pixels:

    counts[k, bin]      pixels of true class k (the subtype, not just tumor), tumor probability in `bin`

The bins are bounded by THRESHOLDS, so for each threshold t of that grid the confusion matrix is exact:

    confusion[k] = (pixels of k with prob < t, pixels of k with prob >= t)      (K, 2), predicted no | tumor

and TP, FN (tumor rows), FP, TN (other rows) are its sums. Ratios are formed at the end, of pooled counts:

    dice = 2 TP / (2 TP + FP + FN)      precision = TP / (TP + FP)      fpr = FP / (FP + TN)
    recall[k] = confusion[k, 1] / confusion[k].sum()       subtype_variance = var(recall[k], k in HER2 rows)

Tables of disjoint sets of pixels add up, so the metric of a union is the metric of the sum, and a mean over
images of different content never appears. Source: paper, section 2.4; Fig. 6 is `confusion`, as shares.

PAPER: which recalls enter the variance, and whether it is divided by n or n - 1, is not said. Here: the
classes with `variance` set (the four HER2 scores, LCIS/DCIS left out), divided by n, from one matrix over the
whole split, as in the authors' public code of 2024. PAPER: variance falls when the operating point shifts
towards more tumor; hence two networks are compared at one false-positive rate. There are two such points:
`matched` (results.json) finds the threshold on val, as one would in use, and the rate on test is then only
near; the "matched" of report_statistics.py (tables and verdicts) finds it on the test split itself.

What does not exist is None ("n/a"), neither 0 nor NaN: the recall of an absent class, the precision of an
empty prediction, the variance of fewer than two recalls. Only the Dice of nothing by nothing is 1.

Key: K classes.
"""

import numpy as np

from her2.data_classes import IGNORE

# 0.001 ... 0.999, and finer towards 0 and 1 down to 1e-7, because a network trained with Dice is sure of
# itself: to lower its false-positive rate a little, the threshold may have to go from 0.999 to 0.99998.
_TAIL = [float(f"{digit}e-{decade}") for decade in (7, 6, 5, 4) for digit in range(1, 10)]
THRESHOLDS = np.array(_TAIL + [i / 1000 for i in range(1, 1000)] + [1 - t for t in reversed(_TAIL)])
BINS = len(THRESHOLDS) + 1                                              # one below the first
FLOOR = 1e-4        # of a variance: recalls that scatter by one percentage point are as good as equal


class ProbabilityHistogram:
    """counts (K, BINS) int64. `classes`: a ClassTable (anything with names, tumor_ids, variance_ids, len)."""

    def __init__(self, classes, counts=None):
        shape = len(classes), BINS
        self.classes, self.counts = classes, np.array(np.zeros(shape, np.int64) if counts is None else counts)
        if self.counts.shape != shape or self.counts.dtype != np.int64 or (self.counts < 0).any():
            raise ValueError(f"counts should be {shape} int64, none below 0; "
                             f"found {self.counts.shape} of {self.counts.dtype}")

    def add(self, prob, label) -> "ProbabilityHistogram":
        """Count pixels: tumor probability and class id (0..K-1, IGNORE: left out), arrays or CPU tensors."""
        if prob.shape != label.shape:
            raise ValueError(f"prob has shape {tuple(prob.shape)}, label {tuple(label.shape)}")
        prob, label = np.asarray(prob).reshape(-1), np.asarray(label).reshape(-1)           # (pixels,) each
        for start in range(0, prob.size, 1 << 20):  # in pieces: the float64 copies stay small
            p, k = prob[start:start + (1 << 20)], label[start:start + (1 << 20)].astype(np.int64)
            p, k = p[k != IGNORE], k[k != IGNORE]                       # nobody knows what they are
            if not ((p >= 0) & (p <= 1)).all():  # NaN fails too
                raise ValueError(f"probabilities outside [0, 1]: {p.min()} to {p.max()}")
            if k.min(initial=0) < 0 or k.max(initial=0) >= len(self.classes):
                raise ValueError(f"class ids {k.min()} to {k.max()}, known are 0 to {len(self.classes) - 1}")
            cell = k * BINS + np.searchsorted(THRESHOLDS, p.astype(np.float64), side="right")
            self.counts += np.bincount(cell, minlength=self.counts.size).reshape(self.counts.shape)
        return self

    def __add__(self, other) -> "ProbabilityHistogram":
        counts = other.counts if isinstance(other, ProbabilityHistogram) else other     # sum() starts with 0
        return ProbabilityHistogram(self.classes, self.counts + counts)

    __radd__ = __add__

    def to_json(self) -> dict:                        # kept by evaluate.py, so that no network need run twice
        return {"bins": BINS, "counts": self.counts.tolist()}

    @classmethod
    def from_json(cls, obj: dict, classes) -> "ProbabilityHistogram":
        return cls(classes, np.array(obj["counts"], dtype=np.int64))

    def confusion(self, threshold: float = 0.5) -> np.ndarray:
        """(K, 2) int64: pixels of each class with prob < threshold, and with prob >= threshold."""
        index = int(np.abs(THRESHOLDS - threshold).argmin())            # last bin below it
        if abs(THRESHOLDS[index] - threshold) > 1e-12:
            raise ValueError(f"threshold {threshold} is not on the grid; the nearest is {THRESHOLDS[index]}")
        return np.stack([self.counts[:, :index + 1].sum(1), self.counts[:, index + 1:].sum(1)], axis=1)

    def report(self, threshold: float = 0.5) -> dict:
        """The fields of results.json: dice, recall, subtype_variance, precision, fpr, confusion."""
        # Variance alone misleads. Say one network finds .2 .4 .6 .9 of 0, 1+, 2+, 3+ at threshold .9
        # (variance .067), .5 .7 .9 1 at .5 (.037) and .9 1 1 1 at .1 (.002): the last calls half the stroma
        # tumor, and looks best. So it is read beside fpr, or at one fpr (`matched`).
        confusion = self.confusion(threshold)
        found = {key: None if np.isnan(value) else float(value)
                 for key, value in rates(confusion, self.classes).items()}
        names = [self.classes.names[k] for k in self.classes.tumor_ids]
        return {"dice": found["dice"], "recall": {name: found[f"recall {name}"] for name in names},
                "subtype_variance": found["variance"], "precision": found["precision"], "fpr": found["fpr"],
                "confusion": confusion.tolist()}

    def curve(self) -> dict:
        """`rates` at every threshold, {figure: (BINS - 1,)}."""
        # From the surest bin down, each threshold adds the bin below the last to what is called tumor.
        tumor = self.counts[:, ::-1].cumsum(1)[:, -2::-1].T                             # (BINS - 1, K)
        return rates(np.stack([self.counts.sum(1) - tumor, tumor], axis=-1), self.classes)

    def best_threshold(self) -> float | None:
        """The threshold of the highest Dice; None without tumor pixels, where every one is as good."""
        return least(-self.curve()["dice"]) if self.counts[self.classes.tumor_ids].any() else None

    def threshold_at_fpr(self, target_fpr: float) -> float | None:
        """The threshold whose false-positive rate is nearest to `target_fpr`; None without background."""
        cost = np.abs(self.curve()["fpr"] - target_fpr)
        return None if np.isnan(cost).any() else least(cost)


def least(cost) -> float:
    """The threshold of least cost (BINS - 1,), of equals the nearest to 0.5: matched to itself is 0.5."""
    return float(THRESHOLDS[np.lexsort([np.abs(THRESHOLDS - 0.5), cost])[0]])


def rates(confusion, classes) -> dict:
    """Counts (..., K, 2) -> {figure: (...)} for many tables at once; NaN: nothing to form it from."""
    # The network answers tumor or not. Of which subtype the found pixels were, only the rows know.
    confusion, tumor = np.asarray(confusion, dtype=np.float64), classes.tumor_ids
    tp, fn = confusion[..., tumor, 1].sum(axis=-1), confusion[..., tumor, 0].sum(axis=-1)
    fp, tn = confusion[..., 1].sum(axis=-1) - tp, confusion[..., 0].sum(axis=-1) - fn
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = confusion[..., 1] / confusion.sum(axis=-1)                             # (..., K)
        # HER2 scores are steps of one scale, and the question is whether its faint end is missed.
        found = np.ma.masked_invalid(recall[..., classes.variance_ids])                 # absent: no recall
        variance = np.where(found.count(axis=-1) > 1, np.ma.filled(found.var(axis=-1), np.nan), np.nan)
        return {"dice": np.where(tp + fp + fn > 0, 2 * tp / (2 * tp + fp + fn), 1.0),   # nothing in nothing
                "precision": tp / (tp + fp),                    # share of what was called tumor that is
                "fpr": fp / (fp + tn),                          # share of the background called tumor
                "variance": variance, "log_variance": np.log(np.maximum(variance, FLOOR)),
                **{f"recall {classes.names[k]}": recall[..., k] for k in tumor}}


def matched(val: ProbabilityHistogram, test: ProbabilityHistogram, baseline_val_fpr: float | None):
    """The figures of `test` at the threshold that gives `val` the false-positive rate `baseline_val_fpr`,
    that of the subtype-sampled baseline of the same seed on val at 0.5. None where val has no background."""
    # Threshold from val, figures from test: chosen on the pixels it is judged by, it would flatter.
    threshold = None if baseline_val_fpr is None else val.threshold_at_fpr(baseline_val_fpr)
    if threshold is None:
        return None
    figures = test.report(threshold)                            # the same network, moved along its own curve
    return {key: figures[key] for key in figures if key != "confusion"} | {"threshold": threshold}
