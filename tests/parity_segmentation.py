"""Segmentation against segmentation-models-pytorch, MONAI, scikit-learn, torchmetrics, scipy: same inputs,
same numbers.

Ours differs from some of them on purpose (her2/losses.py says why); the forms of the losses that only the
official code has are here, on our sums. tests/test_losses.py shows ours beside them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from golden_reader import gradient_outputs, probe, probes

from her2 import losses
from her2.data_classes import IGNORE
from her2.frechet import feature_statistics, frechet_distance, kernel_distance
from her2.losses import dice_cross_entropy
from her2.segmenter import UNet

MONAI_EPS = 1e-5  # its smooth_nr and smooth_dr


def of_logits(function):
    """The same function of logits, as the official losses are."""
    return lambda logits, *more, **options: function(logits.float().log_softmax(1), *more, **options)


class_sums = of_logits(losses.class_sums)


def image_sums(logits, target, batch=True, squared=False):
    """I, P, V of her2/losses.py: (1, K) each, or (B, K) with batch=False. squared: prob^2 in P."""
    images = [class_sums(x[None], y[None]) for x, y in zip(logits, target)]
    hit, predicted, volume = (torch.stack(one) for one in zip(*images))                        # (B, K) each
    if squared:
        predicted = (logits.float().softmax(1) ** 2 * (target != IGNORE)[:, None]).sum((2, 3))
    return [s.sum(0, keepdim=True) if batch else s for s in (hit, predicted, volume)]


def dice_scores(logits, target, batch=True, eps=0.01, squared=False, jaccard=False):
    """(2 I + eps) / (P + V + eps) per class: (1, K), or (B, K) with batch=False.

    `squared` has p^2 in P (Milletari et al., 2016); `jaccard` divides by the union instead: I / (P + V - I).
    eps = 0 is allowed: nothing by nothing is 0 then.
    """
    hit, predicted, volume = image_sums(logits, target, batch, squared)
    whole = predicted + volume
    if jaccard:
        whole = 2 * (whole - hit)
    return (2 * hit + eps) / (whole + eps).clamp_min(1e-7)


def soft_dice_loss(logits, target, include_background=False, **options):
    """1 - mean over the classes (and images, with batch=False) of `dice_scores`."""
    return 1 - dice_scores(logits, target, **options)[:, 0 if include_background else 1:].mean()


def generalised_dice_loss(logits, target, include_background=True, batch=True, eps=1e-5, weighting="square",
                          absent="zero", relative=True):
    """All the forms of the generalised Dice loss; MONAI's has absent="largest" and relative=False.

    weighting: "square" 1/V^2, "simple" 1/V or "uniform" 1. absent: the weight of a class without a pixel.
    relative: weights divided by the largest.
    """
    first = 0 if include_background else 1
    hit, predicted, volume = (s[:, first:] for s in image_sums(logits, target, batch))
    power = {"square": 2, "simple": 1, "uniform": 0}[weighting]
    present = volume > 0                                                # (1 or B, K)
    weight = volume.clamp_min(1) ** -power
    if power > 0:
        stand_in = {"zero": 0.0, "largest": (weight * present).amax(dim=1, keepdim=True)}[absent]
        weight = torch.where(present, weight, stand_in)
    if relative:
        weight = weight / weight.amax(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    numerator = 2 * (weight * hit).sum(1) + eps
    return (1 - numerator / ((weight * (predicted + volume)).sum(1) + eps)).mean()


def smp_unet(meta, sd, inp, out):
    """segmentation-models-pytorch's Unet("resnet34"): x is normalised already, the loss is cross-entropy."""
    width = sd["encoder.conv1.weight"].shape[0]
    decoder = [sd[f"decoder.blocks.{i}.conv1.0.weight"].shape[0] for i in range(5)]
    model = UNet(len(sd["segmentation_head.0.bias"]), width, decoder)
    model.load_official_state_dict(sd)

    model.eval()
    with torch.no_grad():
        features = model.encoder(inp["x"])
        decoded = model.decoder(features)
        ours = {"eval/y": model.segmentation_head(model.decoder(model.encoder(inp["x"]))),
                "eval/feature_probes": np.stack([probe(f, i) for i, f in enumerate(features)]),
                "eval/decoder_probes": probe(decoded, 0)[None]}
    for i, feature in enumerate(features):  # of large maps only the first channels are recorded
        recorded = out.get(f"eval/f{i}")
        ours[f"eval/f{i}"] = feature if recorded is None else feature[:, :recorded.shape[1]]

    model.train()
    logits = model.segmentation_head(model.decoder(model.encoder(inp["x"])))
    loss = dice_cross_entropy(logits, inp["target"], dice_weight=0.0, ce_weight=1.0)[0]
    loss.backward()
    buffers = [(name, b) for name, b in model.named_buffers() if name in sd]  # without factor and shift
    names, rows = probes(dict(buffers))
    return {**ours, "train/y": logits.detach(), "train/ce": loss.detach(),
            "train/buf_names": np.array(names), "train/buf_probes": rows,
            **gradient_outputs("train/", {name: p.grad for name, p in model.named_parameters()})}


def one_loss(name, logits, target):
    """The recorded loss `name`, such as "monai_gdl/bg1/batch0/square", by our functions."""
    kind, *options = name.split("/")
    flags = {option[:-1]: option[-1] == "1" for option in options if option[-1] in "01"}
    classes = logits.shape[1]
    if kind == "monai_gdl":
        return generalised_dice_loss(logits, target, flags["bg"], flags["batch"], MONAI_EPS,
                                     weighting=options[-1], absent="largest", relative=False)
    if kind == "monai_dice" and flags["batch"] and not flags["sq"]:
        if not flags["bg"]:
            return of_logits(losses.soft_dice_loss)(logits, target, MONAI_EPS)
        return soft_dice_loss(logits, target, True, eps=MONAI_EPS)
    if kind == "monai_dice":
        return soft_dice_loss(logits, target, flags["bg"], batch=flags["batch"], eps=MONAI_EPS,
                              squared=flags["sq"])
    if kind == "monai_dice_jaccard":
        return soft_dice_loss(logits, target, True, batch=False, eps=MONAI_EPS, jaccard=True)
    if kind == "monai_dicece":
        ce = dice_cross_entropy(logits, target, dice_weight=0.0, ce_weight=1.0)[0]
        return ce + soft_dice_loss(logits, target, True, batch=False, eps=MONAI_EPS)
    if kind.endswith("_ignore255"):  # rows 0 and 1 of every image: an ignored pixel is a pixel left out
        return one_loss({"ce_ignore255": "ce", "smp_dice_ignore255": "smp_dice/smooth0"}[kind],
                        logits[:, :, 2:], target[:, 2:])
    if kind == "smp_dice":
        # smp sums over the batch; classes absent from the truth lose their loss but still count in the mean.
        # Its Dice is a Tversky score with 1/2, 1/2, so that `smooth` is added to I and to (P + V) / 2: eps =
        # 2 smooth.
        score = dice_scores(logits, target, eps=2.0 * (options[0] == "smooth1"))[0]          # (K,)
        loss = -score.clamp_min(1e-7).log() if options[0] == "log" else 1 - score
        loss = loss * (class_sums(logits, target)[2] > 0)
        return loss[1] if options[0] == "class1" else loss.mean()
    if kind in ("ce_weighted", "ce_ls0.1"):              # forms that nothing here uses
        weighted = {"weight": torch.arange(1.0, classes + 1)}
        options = weighted if kind == "ce_weighted" else {"label_smoothing": 0.1}
        return F.cross_entropy(logits, target.long(), **options)
    assert kind == "ce", kind
    return dice_cross_entropy(logits, target, dice_weight=0.0, ce_weight=1.0)[0]


def seg_losses(meta, sd, inp, out):
    ours = {}
    for case in meta["config"]["cases"]:
        logits, target = inp[f"{case}/logits"].requires_grad_(), inp[f"{case}/target"]
        names = [key.split("/", 1)[1] for key in out if key.startswith(f"{case}/")]
        for name in [name for name in names if not name.endswith("/grad")]:
            loss = one_loss(name, logits, target)
            ours[f"{case}/{name}"] = loss.detach()
            ours[f"{case}/{name}/grad"] = torch.autograd.grad(loss, logits)[0]
    return ours


# Confusion matrices of many classes: the project's own figures come from ProbabilityHistogram.

def confusion_matrix(pred, target, num_classes: int) -> np.ndarray:
    """(K, K) int64 counts of two arrays of class ids of one shape: rows = truth, columns = prediction.

    Pixels whose truth is IGNORE are left out.
    """
    pred, target = np.asarray(pred).reshape(-1), np.asarray(target).reshape(-1)
    assert pred.shape == target.shape, f"{pred.size} predictions, {target.size} targets"
    pred, target = pred[target != IGNORE], target[target != IGNORE]     # (pixels,) each
    both = np.concatenate([pred, target])
    assert both.min(initial=0) >= 0 and both.max(initial=0) < num_classes, f"ids {both.min()} to {both.max()}"
    pairs = target.astype(np.int64) * num_classes + pred                # one number per (truth, prediction)
    return np.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def normalise(confusion, by: str = "truth") -> np.ndarray:
    """Divide by the sums of the rows ("truth"), the columns ("prediction") or of "all"; empty ones stay 0."""
    confusion = np.asarray(confusion, dtype=np.float64)
    axis = {"truth": 1, "prediction": 0, "all": None}[by]
    return confusion / np.maximum(confusion.sum(axis=axis, keepdims=True), 1)


def class_scores(confusion, empty: float = np.nan) -> dict:
    """Each class against the rest, from (K, K) counts: dice, iou, recall, precision; 0 / 0 is `empty`."""
    confusion = np.asarray(confusion, dtype=np.float64)
    hit, truth, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)

    def divide(part, whole):
        return np.where(whole > 0, part / np.where(whole > 0, whole, 1), empty)

    return {"dice": divide(2 * hit, truth + predicted), "iou": divide(hit, truth + predicted - hit),
            "recall": divide(hit, truth), "precision": divide(hit, predicted)}


def metrics(meta, sd, inp, out):
    ours, classes = {}, meta["config"]["C"]
    for case in meta["config"]["cases"]:
        pred, target = inp[f"{case}/pred"], inp[f"{case}/target"]
        counts = confusion_matrix(pred, target, classes)
        table = {"cm": counts, "cm_true": normalise(counts, "truth"),
                 "cm_pred": normalise(counts, "prediction"), "cm_all": normalise(counts, "all")}
        for library in ("sk", "tm"):
            ours.update({f"{case}/{library}/{key}": value for key, value in table.items()})
        for empty in (0, 1, np.nan):
            scores = class_scores(counts, empty)
            ours.update({f"{case}/sk/{key}_zd{empty}": value for key, value in scores.items()})
        ours[f"{case}/sk/iou_zdnan"] = np.zeros(0)  # scikit-learn refuses NaN there, and nothing was recorded

        images = [confusion_matrix(p, t, classes) for p, t in zip(pred, target)]
        assert (sum(images) == counts).all()
        for first in (0, 1):  # with and without class 0
            each = {key: np.stack([class_scores(c)[key][first:] for c in images]) for key in ("dice", "iou")}
            pooled = class_scores(counts)["dice"][None, first:]
            both = {"dice_samplewise": each["dice"], "dice_macro_samplewise": mean_of_present(each["dice"]),
                    "dice_global": pooled, "dice_macro_global": mean_of_present(pooled),
                    "gdice": torchmetrics_gdice(images, first), "miou": np.nan_to_num(each["iou"], nan=-1.0)}
            ours.update({f"{case}/tm/{key}_bg{1 - first}": value for key, value in both.items()})
    return ours


def mean_of_present(scores):
    """Mean over the classes that are not NaN; NaN where there is none."""
    present = ~np.isnan(scores)
    total = np.where(present, scores, 0).sum(1)
    return np.where(present.any(1), total / present.sum(1).clip(min=1), np.nan)


def torchmetrics_gdice(images, first):
    """torchmetrics' generalised Dice score per image, with its quirk: it gives an absent class the largest
    weight of a class over all images, and takes the classes in the wrong order where there are several
    images."""
    hit = np.stack([c.diagonal() for c in images])[:, first:].astype(float)                    # (B, K)
    truth, predicted = (np.stack([c.sum(axis) for c in images])[:, first:] for axis in (1, 0))
    weight = np.where(truth > 0, 1.0 / np.maximum(truth, 1) ** 2, 0.0)
    stand_in = np.repeat(weight.max(0), len(images)).reshape(weight.shape)  # np.tile would be the right order
    weight = np.where(truth > 0, weight, stand_in)
    numerator, denominator = (2 * weight * hit).sum(1), (weight * (truth + predicted)).sum(1)
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), 0.0)


def frechet(meta, sd, inp, out):
    ours = {}
    for case in meta["config"]["cases"]:
        a, b = inp[f"{case}/a"], inp[f"{case}/b"]
        distance = frechet_distance(*feature_statistics(a), *feature_statistics(b))
        ours.update({f"{case}/fid_{way}": np.float64(distance) for way in ("sqrtm", "eigvals", "eigh")})
        ours[f"{case}/kid_unbiased"] = np.float64(kernel_distance(a, b))
    return ours


RUNNERS = {"smp_unet": smp_unet, "seg_losses": seg_losses, "metrics": metrics, "frechet": frechet}
NETWORKS = {"smp_unet"}
