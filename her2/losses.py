"""Losses of the segmentation network: soft Dice, generalised Dice, and their sum with cross-entropy.

With prob = softmax(logits), g = one-hot target, and sums over the pixels of the whole batch, per class k

    I_k = sum prob_k g_k        P_k = sum prob_k        V_k = sum g_k  (the class's volume)

    soft Dice            1 - mean_k (2 I_k + eps) / (P_k + V_k + eps)                     k = tumor only
    generalised Dice     1 - (2 sum_k w_k I_k + eps) / (sum_k w_k (P_k + V_k) + eps)      k = every class,
                         w_k = 1 / V_k^2                    (Sudre et al., DLMIA 2017, [20] of the paper)
    total                dice_weight * Dice + ce_weight * cross-entropy                   (paper, section 2.3)

PAPER: [20] is the generalised Dice, while the authors' public code of 2024 sums soft Dice over the batch,
without background, eps 0.01. Soft Dice is our default, generalised the alternative. The weights are not
given: 0.5 each.

Why sums over the batch: a patch without tumor has no Dice of its own. Its term would be 1 whatever the
network does short of exact zeros, and a few such patches would drown the rest. Where nothing is there and
nothing is predicted, eps / eps = 1: the loss is 0.

Differs from the official code (MONAI's GeneralizedDiceLoss), on purpose; each argument named here brings its
numbers back (tests/parity_segmentation.py):
  absent="largest"   a class without a pixel gets the largest weight of the others. Ours: weight 0, because
                     its w is infinite, and whatever stands in for that is arbitrary.
  relative=False     the weighted sums shrink with the number of pixels (sum w V = sum 1 / V) while eps = 1e-5
                     stays: for a batch of 16 patches of 512 px they are about 3e-6, so eps decides and the
                     loss is near 0 whatever is predicted. Ours divides all w by the largest (Sudre's ratio
                     does not change), which makes the loss independent of the number of pixels.

A pixel whose target is IGNORE is in none of the sums. Everything is float32, under autocast too: a
half-precision sum over 4 million pixels stops counting at 2048.

Key: B batch, K classes, H W image size.
"""

import torch
import torch.nn.functional as F

from her2.data_classes import IGNORE


def class_sums(logits: torch.Tensor, target: torch.Tensor, batch: bool = True, squared: bool = False,
               pool=None):
    """I, P, V of the module's docstring: (1, K) each, or (B, K) with batch=False. `squared`: prob^2 in P.

    pool: turns sums over a part of the batch into those over all of it, where the rest is elsewhere.
    """
    assert logits.ndim == 4 and target.shape == (logits.shape[0], *logits.shape[2:]), \
        f"logits (B, K, H, W) and target (B, H, W), found {tuple(logits.shape)} and {tuple(target.shape)}"
    # Probabilities instead of a decision per pixel: a threshold has no gradient.
    prob = logits.float().softmax(dim=1).flatten(2)                               # (B, K, H*W)
    index = target.long().flatten(1).unsqueeze(1)                                 # (B, 1, H*W)
    counts = (index != IGNORE).to(prob.dtype)                                     # (B, 1, H*W) 0 or 1
    onehot = torch.zeros_like(prob).scatter_(1, index.where(index != IGNORE, 0), counts)    # (B, K, H*W)
    prob = prob * counts                                                          # (B, K, H*W)
    sums = [(prob * onehot).sum(2), (prob * prob if squared else prob).sum(2), onehot.sum(2)]
    sums = [s.sum(0, keepdim=True) if batch else s for s in sums]
    return pool(torch.stack(sums)).unbind() if pool else sums


def dice_scores(logits, target, batch: bool = True, eps: float = 0.01, squared: bool = False,
                jaccard: bool = False, pool=None) -> torch.Tensor:
    """(2 I + eps) / (P + V + eps) per class: (1, K), or (B, K) with batch=False.

    `squared` has p^2 in P (Milletari et al., 2016); `jaccard` divides by the union instead: I / (P + V - I).
    eps = 0 is allowed: nothing by nothing is 0 then.
    """
    intersection, predicted, volume = class_sums(logits, target, batch, squared, pool)   # (1 or B, K) each
    whole = predicted + volume
    if jaccard:
        whole = 2 * (whole - intersection)       # for comparison with the reference only, as `squared`
    return (2 * intersection + eps) / (whole + eps).clamp_min(1e-7)     # (1 or B, K)


def soft_dice_loss(logits, target, include_background: bool = False, **options) -> torch.Tensor:
    """1 - mean over the classes (and images, with batch=False) of `dice_scores`, whose options it takes."""
    # Without background: it is most of all pixels, always found, and would only lift the mean.
    return 1 - dice_scores(logits, target, **options)[:, 0 if include_background else 1:].mean()


def generalised_dice_loss(logits, target, include_background: bool = True, batch: bool = True,
                          eps: float = 1e-5, weighting: str = "square", absent: str = "zero",
                          relative: bool = True, pool=None) -> torch.Tensor:
    """Sudre's generalised Dice loss. weighting: "square" 1/V^2; "simple" 1/V and "uniform" 1 are for
    comparison with the reference only, as are absent="largest" and relative=False.

    Keep the background: a batch without tumor has no other class, and without it would give no gradient at
    all.
    """
    assert weighting in ("square", "simple", "uniform"), f"weighting {weighting!r}"
    assert absent in ("zero", "largest"), f"absent {absent!r}"
    first = 0 if include_background else 1                              # class 0
    intersection, predicted, volume = (s[:, first:] for s in class_sums(logits, target, batch, pool=pool))
    power = {"square": 2, "simple": 1, "uniform": 0}[weighting]         # of 1 / V
    present = volume > 0                                                # (1 or B, K)
    # I and V of a class grow with its pixels: one 1/V makes shares of them, so that each class counts alike
    # whatever its size; the second 1/V is Sudre's, and lets the smaller class count even more.
    weight = volume.clamp_min(1) ** -power                                        # (1 or B, K)
    if power > 0:         # 1 / 0: the weight of an absent class has to come from somewhere else
        stand_in = (weight * present).amax(dim=1, keepdim=True) if absent == "largest" else 0.0
        weight = torch.where(present, weight, stand_in)
    if relative:
        weight = weight / weight.amax(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    # One ratio of sums, not a mean of ratios: Sudre's form.
    numerator = 2 * (weight * intersection).sum(1) + eps
    denominator = (weight * (predicted + volume)).sum(1) + eps          # (1 or B,)
    return (1 - numerator / denominator).mean()                         # () over images where batch=False


def dice_cross_entropy(logits, target, dice: str = "soft", dice_weight: float = 0.5, ce_weight: float = 0.5,
                       class_weight=None, label_smoothing: float = 0.0, pool=None):
    """The training loss. Returns (loss, {"dice": tensor, "ce": tensor}): the parts detached, unweighted, for
    the log.

    logits (B, K, H, W); target (B, H, W) ids 0..K-1 or IGNORE: for the paper's network 0 background, 1 tumor.
    `class_weight` (K,) and `label_smoothing` are those of torch's cross_entropy. Where all is ignored: 0.
    pool: see class_sums.
    """
    assert dice in ("soft", "generalised"), f"dice is 'soft' or 'generalised', found {dice!r}"
    dice_loss = (soft_dice_loss if dice == "soft" else generalised_dice_loss)(logits, target, pool=pool)
    # Dice alone is flat where the network is sure and wrong: softmax passes nothing there, and small tumor
    # gets lost in the first steps. Cross-entropy gives every pixel a gradient of its own, prob - target.
    target = target.long()
    counts = target != IGNORE                                                     # (B, H, W)
    whole = counts if class_weight is None else class_weight[target.where(counts, 0)] * counts
    ce = F.cross_entropy(logits.float(), target, weight=class_weight, label_smoothing=label_smoothing,
                         ignore_index=IGNORE, reduction="sum")
    ce, whole = pool(torch.stack([ce, whole.sum().float()])) if pool else (ce, whole.sum())
    ce = ce / whole.clamp_min(1e-7)
    return dice_weight * dice_loss + ce_weight * ce, {"dice": dice_loss.detach(), "ce": ce.detach()}


@torch.no_grad()
def constant_prediction_loss(target: torch.Tensor, prior=None, num_classes: int = 2, **options) -> float:
    """The loss of a network that predicts nothing: at every pixel the same probabilities `prior`.

    prior: (K,) class frequencies, by default those of `target`. A training loss that stays here has learned
    nothing from the pixels. For two classes, tumor share s: cross-entropy = -s ln s - (1-s) ln(1-s), soft
    Dice loss = 1 - s. `options` are those of `dice_cross_entropy`.
    """
    if prior is None:      # the best constant for cross-entropy is the classes' frequencies
        seen = target[target != IGNORE].long()                          # (pixels that count,)
        prior = torch.bincount(seen, minlength=num_classes) / max(len(seen), 1)
    prior = torch.as_tensor(prior, dtype=torch.float32, device=target.device)
    logits = prior.clamp_min(1e-7).log().view(1, -1, 1, 1).expand(target.shape[0], -1, *target.shape[1:])
    return float(dice_cross_entropy(logits, target, **options)[0])
