"""Lessons of Sunday: losses, the segmentation network, and how it is measured (see `lessons`)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from her2 import gan_losses as adversarial
from her2.data_classes import DEFAULT_CLASSES as CLASSES
from her2.draw import CYCLE, GREY, INK, Canvas, fit, tint
from her2.draw_charts import plot, sheet
from her2.frechet import feature_statistics, frechet_distance, kernel_distance
from her2.lessons_tissue import region
from her2.losses import class_sums, generalised_dice_loss, soft_dice_loss
from her2.metrics import ProbabilityHistogram, matched
from her2.run_seeds import generator, numpy_generator
from her2.segmenter import UNet, predict_roi

SIZE = (270, 230)       # of one of three diagrams in a row


def segmenter(answer):
    """The encoder halves five times, which tells what something is and forgets where; each step of the
    decoder gets the encoder's map of its own size (skips), which knows where. Regions are predicted in tiles,
    whose borders see zeros instead of tissue. A network that looks 32 pixels far is off by up to {seam_0:.2f}
    at the seams of tiles that do not overlap, and by {seam_64:.0e} where tiles share 64 pixels and only their
    centres are kept.

    Exercise: swap the decoder for one without skips: the last map, enlarged 32 times. How good can it be at
    best?

    Answer: a map that is constant in cells of 32 pixels reaches a Dice of {best[4]:.2f} on these labels even
    when every cell is right, one of 2 pixels {best[0]:.3f}: details live in the skips. The decoder with skips
    is {decoder:,} of the {parameters:,} parameters.
    """
    # A network that looks 32 pixels far on all sides: the mean of its window, sharpened.
    network, image = nn.Conv2d(3, 2, 65, padding=32).eval(), torch.from_numpy(region(2)[0]).permute(2, 0, 1)
    network.weight.data = torch.tensor([0, -0.001]).view(2, 1, 1, 1).expand(2, 3, 65, 65)
    whole, *tiled = (predict_roi(network, image, *tiles) for tiles in ((256, 0), (128, 0), (128, 64)))
    seams = [abs(one - whole) for one in tiled]
    with torch.device("meta"):
        full = UNet()
        maps = [(feature.shape[1], feature.shape[2]) for feature in full.encoder(torch.empty(1, 3, 512, 512))]
    canvas, up = Canvas(810, 165), [*full.config["decoder_channels"][::-1], None]
    for k, (channels, side) in enumerate(maps):
        y, away = 16 + 27 * k, 60 + 40 * (5 - k)
        if 0 < k < 5:
            canvas.line([(400 - away, y), (400 + away, y)], GREY, 1.2, dash=(5, 3))     # the skip
        for x, width, color in ((400 - away, channels, CYCLE[0]), (400 + away, up[k], CYCLE[1])):
            if width:
                canvas.rectangle(x - 55, y - 10, x + 55, y + 10, tint(color, 0.3), INK)
                canvas.text(x, y, f"{side} px, {width}", 12, anchor="mm")
    canvas.legend([("encoder", CYCLE[0]), ("decoder", CYCLE[1])], 10, 140, 300, marker="box")
    tumor = torch.tensor(np.stack([region(score, False)[1] > 0 for score in range(4)]))[:, None].float()
    cells = [2, 4, 8, 16, 32]
    rough = [F.interpolate(F.avg_pool2d(tumor, cell).round(), scale_factor=cell) for cell in cells]
    best = [float(2 * (tumor * one).sum() / (tumor.sum() + one.sum())) for one in rough]
    pictures = [(f"overlap {overlap}: 5 x the error", fit((255 - 255 * (5 * seam).clamp(0, 1)).byte(), 256))
                for overlap, seam in zip((0, 64), seams)]
    if answer:
        curve = {"best Dice": (cells, best)}
        pictures.append(plot(curve, "constant in cells", "side of a cell", "", SIZE, True))
    count = [sum(p.numel() for p in part.parameters()) for part in (full.decoder, full)]
    return sheet([[canvas.array()], pictures]), {
        "seam_0": float(seams[0].max()), "seam_64": float(seams[1].max()), "best": best, "decoder": count[0],
        "parameters": count[1], "maps": maps}


def losses(answer):
    """Every pixel gets probability q of its true class, from always wrong (0) to right (1). Cross-entropy
    does not know how large the tumor is; Dice does: at q = 0.5 a pixel of small tumor (1 % of the patch) is
    pulled {small:.0f} times as hard as one of large tumor (50 %). Where there is no tumor at all, soft Dice
    is flat at 1 until the last false positive is gone, so cross-entropy, or a batch with tumor, has to do the
    work.

    Exercise: write Tversky's loss, 1 - I / (I + a FP + b FN), with class_sums, a = 0.3, b = 0.7. Which
    mistake is dearer: tumor half found, or half as much again?

    Answer: {missed:.3f} for half found, {excess:.3f} for half too much; soft Dice has {missed_dice:.3f} and
    {excess_dice:.3f}. With FP = P - I and FN = V - I, a = b = 0.5 is soft Dice.
    """
    def tversky(logits, target, a=0.3, b=0.7):
        hit, predicted, volume = (sums[0, 1] for sums in class_sums(logits, target))
        return 1 - hit / (hit + a * (predicted - hit) + b * (volume - hit) + 1e-6)

    kinds = {"soft Dice": soft_dice_loss, "generalised": generalised_dice_loss,
             "cross-entropy": F.cross_entropy, **({"Tversky": tversky} if answer else {})}
    q, pictures, pull = torch.linspace(0.02, 0.98, 49), [], {}

    def logits_of(target, prob):    # probability `prob` of the true class, everywhere
        return torch.stack([1 - 2 * target, 2 * target - 1], dim=1).float() / 2 * torch.logit(prob)

    for name, columns in (("small, 1 %", 1), ("large, 50 %", 50), ("absent", 0)):
        target = torch.zeros(1, 40, 100, dtype=torch.long)
        target[:, :, :columns] = 1
        curves = {kind: (q.numpy(), [float(loss(logits_of(target, one), target)) for one in q])
                  for kind, loss in kinds.items()}
        pictures.append(plot(curves, name, "probability q of the truth", "", SIZE, y_range=(0, 2)))
        logits = logits_of(target, torch.tensor(0.5)).requires_grad_(True)
        soft_dice_loss(logits, target).backward()
        pull[name] = float(logits.grad[0, 1, 0, 0].abs())
    half, excess, target = (torch.zeros(1, 10, 100, dtype=torch.long) for _ in range(3))
    target[..., :40], half[..., :20], excess[..., :60] = 1, 1, 1
    half, excess = (60 * (F.one_hot(one, 2).movedim(-1, 1) - 0.5) for one in (half, excess))    # sure logits
    return sheet([pictures]), {
        "small": pull["small, 1 %"] / pull["large, 50 %"], "missed": tversky(half, target).item(),
        "excess": tversky(excess, target).item(), "missed_dice": soft_dice_loss(half, target).item(),
        "excess_dice": soft_dice_loss(excess, target).item(), "tversky": tversky}


def made_up(shift: float = 0.0):
    """Pixel counts of a network whose logits are Gaussian per class, 20,000 pixels each, moved by `shift`."""
    histogram = ProbabilityHistogram(CLASSES)
    for k, mean in enumerate((-2.5, 0.5, 1.2, 1.8, 3.0, 1.5)):
        logit = numpy_generator("lesson", "logits", k).normal(mean, 1.2, 20000) + shift
        histogram.add(1 / (1 + np.exp(-logit)), np.full(20000, k))
    return histogram


def metrics(answer):
    """One network, its threshold sliding. A low threshold calls more tissue tumor: every recall rises towards
    1, so their variance falls ({low:.4f} at 0.2, {middle:.4f} at 0.5, {high:.4f} at 0.8), and nothing was
    learned in between: false positives rise too. A smaller variance alone says little; it counts at an equal
    false-positive rate.

    Exercise: a second network has all its logits lower by 1. Its variance at 0.5 is {second:.4f}. Match it by
    hand.

    Answer: it is the same network, seen at a threshold of sigmoid(-1) = {sigmoid:.3f}: there its
    false-positive rate is that of the first, {fpr:.4f}, and its variance {matched:.4f}.
    """
    first, second, thresholds = made_up(), made_up(-1.0), np.arange(20, 981, 20) / 1000
    reports = [first.report(threshold) for threshold in thresholds]
    recalls = {name: (thresholds, [one["recall"][name] for one in reports]) for name in CLASSES.names[1:]}
    rates = {key: (thresholds, [one[key] for one in reports]) for key in ("dice", "precision", "fpr")}
    variance = {"first": (thresholds, [one["subtype_variance"] for one in reports])}
    if answer:
        variance["lower by 1"] = thresholds, [second.report(t)["subtype_variance"] for t in thresholds]
    at_half = matched(second, second, first.report()["fpr"])
    low, middle, high = (first.report(threshold)["subtype_variance"] for threshold in (0.2, 0.5, 0.8))
    colors = [entry.color for entry in CLASSES.classes[1:]]
    return sheet([[plot(recalls, "recall", "threshold", "", SIZE, y_range=(0, 1), colors=colors),
                   plot(rates, "Dice and its like", "threshold", "", SIZE, y_range=(0, 1)),
                   plot(variance, "subtype variance", "threshold", "", SIZE)]]), {
        "low": low, "middle": middle, "high": high, "second": second.report()["subtype_variance"],
        "sigmoid": 1 / (1 + np.e), "fpr": first.report()["fpr"], "matched": at_half["subtype_variance"],
        "matched_fpr": at_half["fpr"],
        "found": second.threshold_at_fpr(first.report()["fpr"])}


def frechet(answer):
    """Two samples of one and the same law in 8 dimensions, so both distances should be 0. The Frechet
    distance is not: {small:.2f} at 20 samples, {large:.2f} at 640, about as 1 / N, because noise in the
    covariances always looks like a difference. The kernel distance scatters around 0 at any N: no bias, but
    for one pair of samples it may be negative.

    Exercise: which of the two do you trust to say that a method with 40 images is worse than one with 400?

    Answer: the kernel distance. A perfect method scores {perfect:.2f} with 40 images by Frechet, a method
    that is off by 0.2 in every dimension {flawed:.2f} with 400: the order is wrong in {wrong:.0%} of 40
    trials, by kernel in {wrong_kernel:.0%}. At equal and large N both are right.
    """
    def distances(n, trial, shift=0.0):
        a, b = (numpy_generator("lesson", n, trial, k).normal(k * shift, size=(n, 8)) for k in (0, 1))
        return frechet_distance(*feature_statistics(a), *feature_statistics(b)), kernel_distance(a, b)

    counts = [20, 40, 80, 160, 320, 640]
    same = np.array([[distances(n, trial) for trial in range(20)] for n in counts])     # (N, trial, 2)
    perfect, flawed = (np.array([distances(n, trial, shift) for trial in range(40)])
                       for n, shift in ((40, 0.0), (400, 0.2)))
    wrong = (perfect >= flawed).mean(axis=0)
    charts = [plot({"mean": (counts, one.mean(1)), "single": (np.repeat(counts, 20), one.ravel(), "dots")},
                   f"{name} distance, one law", "samples", "", (405, 240), log_x=True, notes=[(0, "0")])
              for name, one in (("Frechet", same[..., 0]), ("kernel", same[..., 1]))]
    return sheet([charts]), {
        "small": same[0, :, 0].mean(), "large": same[-1, :, 0].mean(), "perfect": perfect[:, 0].mean(),
        "flawed": flawed[:, 0].mean(), "wrong": wrong[0], "wrong_kernel": wrong[1], "same": same}


def gan_losses(answer):
    """The hinge loss stops pushing the discriminator where it is right by a margin of 1; the generator's has
    no margin, so its gradient never vanishes. KL pulls mu to 0 and the variance to 1, so that z ~ N(0, I) is
    a fair draw when no image is there to encode. The adaptive weight makes both losses of the autoencoder
    pull equally hard on the last layer: multiply one by {factor:.0f}, and its weighted pull changes by
    {change:.0%}.

    Exercise: the official code sums KL over the batch, here it is the mean. What weight here equals the
    official 0.05 at the paper's batch of 16?

    Answer: {equal:.2f}: the sum is {ratio:.0f} times the mean, so that officially the prior weighs more the
    larger the batch is.
    """
    x = torch.linspace(-3, 3, 121)
    curves, slopes, kl = {}, {}, {}
    for role in ("real", "fake", "generator"):
        logits = x.clone().requires_grad_(True)
        value = torch.stack([adversarial.adversarial_loss(one.view(1, 1, 1, 1), role) for one in logits])
        value.sum().backward()
        curves[role], slopes[role] = (x.numpy(), value.detach().numpy()), (x.numpy(), logits.grad.numpy())
    for logvar in (-3.0, 0.0, 2.0):
        kl[f"logvar {logvar:.0f}"] = x.numpy(), [
            adversarial.kl_divergence(mu, torch.full((1, 1), logvar)).item() for mu in x.view(-1, 1, 1)]
    layer, target = torch.ones(4, requires_grad=True), torch.tensor([1.0, 2.0, 3.0, 4.0])
    nll, scales = ((layer - target) ** 2).mean(), np.geomspace(0.01, 100, 9)
    pull = [k * adversarial.adaptive_weight(nll, k * layer.sum(), layer).item() for k in scales.tolist()]
    batch = torch.randn(16, 8, generator=generator("lesson", "kl"))
    ratio = float(adversarial.kl_divergence(batch, batch, "sum") / adversarial.kl_divergence(batch, batch))
    weighted = {"g alone": (scales, 2 * scales), "weighted": (scales, 2 * np.array(pull))}
    size = (405, 220)
    hinge = [plot(curves, "hinge loss", "logit", "", size), plot(slopes, "its gradient", "logit", "", size)]
    below = [plot(kl, "KL of one z", "mu", "", size, y_range=(0, 10)),
             plot(weighted, "pull of g on the last layer", "scale of g", "", size, True, True)]
    return sheet([hinge, below]), {
        "factor": 100, "change": abs(pull[-1] / pull[4] - 1), "ratio": ratio, "equal": 0.05 * ratio, "kl": kl,
        "slopes": slopes}
