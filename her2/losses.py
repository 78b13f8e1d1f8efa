"""Losses of the segmentation network: soft Dice, generalised Dice, and their sum with cross-entropy.

With prob = softmax(logits), g = one-hot target, and sums over the pixels of the whole batch, per class k

    I_k = sum prob_k g_k        P_k = sum prob_k        V_k = sum g_k  (the class's volume)

    soft Dice            1 - mean_k (2 I_k + eps) / (P_k + V_k + eps)                     k = tumor only
    generalised Dice     1 - (2 sum_k w_k I_k + eps) / (sum_k w_k (P_k + V_k) + eps)      k = every class,
                         w_k = 1 / V_k^2                    (Sudre et al., DLMIA 2017, [20] of the paper)
    total                dice_weight * Dice + ce_weight * cross-entropy                   (paper, section 2.3)

PAPER: [20] is the generalised Dice, while the authors' public code of 2024 sums soft Dice over the batch,
without background, eps 0.01: our default, generalised is the alternative. No weights are given: 0.5 each.

Differs from the official code (MONAI's GeneralizedDiceLoss; its form is in tests/parity_segmentation.py): an
absent class has weight 0 (there that of the rarest class): its 1 / V^2 is infinite, and whatever stands in
for that is arbitrary. All w are divided by the largest, which does not change Sudre's ratio: as they are, the
sums shrink with the number of pixels (sum w V = sum 1 / V) while eps stays. For 16 patches of 512 px they are
about 3e-6, so eps = 1e-5 decides, and the loss is near 0 whatever is predicted.

A pixel whose target is IGNORE is in none of the sums. Everything is float32, under autocast too: a float16
sum of ones stops at 2048, a bfloat16 one at 256, and a batch has 4 million pixels.

Key: B batch, K classes, H W image size.
"""

import torch
import torch.nn.functional as F

from her2.data_classes import IGNORE


def class_sums(log_prob: torch.Tensor, target: torch.Tensor, pool=None, first: int = 0) -> tuple:
    """I, P, V as above, (K - first,) each, without the classes before `first`; of log_prob (B, K, H, W), the
    log_softmax of the logits, and target (B, H, W). pool: sums over a part of the batch -> over all of it."""
    assert log_prob.ndim == 4 and target.shape == (log_prob.shape[0], *log_prob.shape[2:]), \
        f"logits (B, K, H, W) and target (B, H, W), found {tuple(log_prob.shape)} and {tuple(target.shape)}"
    # Probabilities instead of a decision per pixel: a threshold has no gradient.
    prob = log_prob[:, first:].exp().flatten(2)                                   # (B, k, H*W) k = K - first
    target = target.flatten(1).unsqueeze(1)                                       # (B, 1, H*W)
    classes = torch.arange(first, log_prob.shape[1], dtype=target.dtype, device=target.device)  # (k,)
    onehot = (target == classes[:, None]).float()                                 # (B, k, H*W) IGNORE: none
    # Over the whole batch: a patch without tumor has no Dice of its own. Its term would be 1 whatever the
    # network does short of exact zeros, and a few such patches would drown the rest.
    kept = prob * onehot, prob * (target != IGNORE).float(), onehot               # (B, k, H*W) each
    sums = [values.sum(2).sum(0) for values in kept]                              # (k,) each
    return pool(torch.stack(sums)).unbind() if pool else tuple(sums)


def soft_dice_loss(log_prob, target, eps: float = 0.01, pool=None) -> torch.Tensor:
    """1 - mean over the classes of (2 I + eps) / (P + V + eps): ()."""
    # Without background: it is most of all pixels, always found, and would only lift the mean.
    intersection, predicted, volume = class_sums(log_prob, target, pool, 1)       # (K - 1,) each
    # Where nothing is there and nothing is predicted, eps / eps = 1: the loss is 0, and not 0 / 0.
    scores = (2 * intersection + eps) / (predicted + volume + eps).clamp_min(1e-7)
    return 1 - scores.mean()


def generalised_dice_loss(log_prob, target, eps: float = 1e-5, pool=None) -> torch.Tensor:
    """Sudre's generalised Dice loss over all classes: (). A batch of background alone has a gradient too."""
    intersection, predicted, volume = class_sums(log_prob, target, pool)          # (K,) each
    # I and V of a class grow with its pixels: one 1/V makes shares of them, so that each class counts alike
    # whatever its size; the second 1/V is Sudre's, and lets the smaller class count even more.
    weight = volume.clamp_min(1) ** -2 * (volume > 0)                             # (K,) absent class: 0
    weight = weight / weight.amax().clamp_min(torch.finfo(weight.dtype).tiny)     # 0 / 0 where all is ignored
    # One ratio of sums, not a mean of ratios: Sudre's form.
    return 1 - (2 * (weight * intersection).sum() + eps) / ((weight * (predicted + volume)).sum() + eps)


# pool is called twice, for Dice first: `run_distributed.WholeSums` hands out what it knows in this order.
def dice_cross_entropy(logits, target, dice: str = "soft", dice_weight=0.5, ce_weight=0.5, pool=None):
    """The training loss: (loss, {"dice": tensor, "ce": tensor}), the parts detached, unweighted, for the log.
    logits (B, K, H, W); target (B, H, W) ids 0..K-1 (the paper's: 0 background, 1 tumor) or IGNORE."""
    assert dice in ("soft", "generalised"), f"dice is 'soft' or 'generalised', found {dice!r}"
    log_prob = logits.float().log_softmax(dim=1)                                 # (B, K, H, W) once, for both
    dice_loss = (soft_dice_loss if dice == "soft" else generalised_dice_loss)(log_prob, target, pool=pool)
    # Dice alone is flat where the network is sure and wrong: softmax passes nothing there, and small tumor
    # gets lost in the first steps. Cross-entropy gives every pixel a gradient of its own, prob - target.
    target = target.long()
    whole = (target != IGNORE).sum(dtype=torch.float32)                           # ()
    ce = F.nll_loss(log_prob, target, ignore_index=IGNORE, reduction="sum")       # ()
    # A mean over the pixels that count, of all parts together: a mean per part would weigh them unevenly.
    ce, whole = pool(torch.stack([ce, whole])) if pool else (ce, whole)
    ce = ce / whole.clamp_min(1e-7)                                               # ()
    return dice_weight * dice_loss + ce_weight * ce, {"dice": dice_loss.detach(), "ce": ce.detach()}


@torch.no_grad()
def constant_prediction_loss(target: torch.Tensor, num_classes: int = 2, **options) -> float:
    """The loss of a network that predicts the class frequencies of `target` at every pixel, the best constant
    for cross-entropy. A training loss that stays here has learned nothing from the pixels. For two classes,
    tumor share s: cross-entropy = -s ln s - (1-s) ln(1-s), soft Dice loss = 1 - s. `options` as above."""
    seen = target[target != IGNORE].long()                                        # (pixels that count,)
    prior = torch.bincount(seen, minlength=num_classes) / max(len(seen), 1)       # (K,)
    logits = prior.clamp_min(1e-7).log().view(1, -1, 1, 1).expand(target.shape[0], -1, *target.shape[1:])
    return float(dice_cross_entropy(logits, target, **options)[0])
