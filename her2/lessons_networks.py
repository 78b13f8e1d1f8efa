"""Lessons about networks (with random weights), their seeds, losses and measures (see `lessons`)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from her2.autoencoder import VQ_F4, VQ_F8, Attention, VQAutoencoder
from her2.data_classes import DEFAULT_CLASSES as CLASSES
from her2.discriminator import MultiscaleDiscriminator
from her2.draw_axes import plot
from her2.frechet import feature_statistics, frechet_distance, kernel_distance
from her2.gan_losses import adaptive_weight, adversarial_loss, kl_divergence, pulls
from her2.lessons_tissue import ink, region
from her2.losses import class_sums, generalised_dice_loss, soft_dice_loss
from her2.metrics import ProbabilityHistogram, matched
from her2.net_blocks import init_weights
from her2.run_seeds import generator, numpy_generator
from her2.segmenter import predict_roi
from her2.spade import SPADENorm


def parameters(build, *args, **options) -> int:
    """How many parameters the network has that `build` makes."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(*args, **options).parameters())


def seen_pixels(outputs, side: int) -> np.ndarray:
    """(side, side): how much each pixel moves the middle of `outputs(image)`, (1, C, h, w)."""
    image = torch.rand(1, 3, side, side, generator=generator("image"), requires_grad=True)
    result = outputs(image)
    result[:, :, result.shape[2] // 2, result.shape[3] // 2].sum().backward()
    return image.grad.abs().sum(1)[0].numpy()


def without(network, *kinds):
    """`network` with every layer of `kinds` replaced by the identity, in place."""
    for name, module in list(network.named_modules()):
        if isinstance(module, kinds):
            network.set_submodule(name, nn.Identity())
    return network


def autoencoder():
    """Halving the image twice makes one latent cell of 4 x 4 pixels, and by its convolutions a cell sees
    {sees} x {sees} pixels. GroupNorm and attention mix all cells, so that in truth every pixel has a say:
    {far:.0%} of the influence in a network with random weights lies outside that square. That is how old
    tumor leaks into the cells beside it.
    Exercise: how many parameters and, for a 512 px image, latent numbers do vq-f4 and vq-f8 have?
    Answer: {count[0]:,} and {count[1]:,} parameters (one level more, and attention at the lowest resolution);
    128 x 128 x 3 = 49,152 numbers and 64 x 64 x 4 = 16,384, a third."""
    maps = {}
    for name, removed in {"convolutions alone": (nn.GroupNorm, Attention), "+ GroupNorm": (Attention,),
                          "+ attention (all logarithmic)": ()}.items():
        torch.manual_seed(0)
        maps[name] = seen_pixels(without(VQAutoencoder(4, ch=8, num_codes=4), *removed).encode, 128)
    alone, _, whole = maps.values()
    inside = np.outer(alone.any(axis=1), alone.any(axis=0))
    pictures = [(name, ink(1 + np.log10(one / one.max() + 1e-6) / 6)) for name, one in maps.items()]
    return [pictures], {
        "sees": int(inside.any(axis=0).sum()), "far": float(whole[~inside].sum() / whole.sum()),
        "count": [parameters(VQAutoencoder, **options) for options in (VQ_F4, VQ_F8)], "maps": [alone, whole]}


def spade():
    """Told the label only at its input, a network forgets it: maps of one class each are the same after
    convolution and normalisation (difference {washed:.0e}). SPADE normalises without parameters and lets the
    label map set scale and shift at every pixel, so the class survives (difference {kept:.0e} with the
    initial weights). At the start gamma is of size {gamma:.0e}: SPADE begins as plain normalisation.
    Exercise: write norm(x) * gamma + beta, without the 1. What does the first image look like, and its
    gradient?
    Answer: one layer lets a signal of standard deviation {spread[0]:.2f} become {spread[1]:.0e}, three of
    them {spread[3]:.0e}: nothing reaches the image, and gradients shrink by the same factors on their way
    back."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 8, 3, padding=1, padding_mode="replicate")
    layer = SPADENorm(8, 6, "instance", hidden=16)
    init_weights(layer, generator("lesson", "spade"))
    x = torch.randn(1, 8, 64, 64, generator=generator("lesson", "x"))
    label = torch.zeros(3, 64, 64, dtype=torch.long)    # all of class 0, all of 3+, and one half of each
    label[1], label[2, :, 32:] = 4, 4
    onehot = F.one_hot(label, 6).movedim(-1, 1).float()                                 # (3, 6, 64, 64)
    with torch.no_grad():
        plain, usual = F.instance_norm(x), F.instance_norm(convolution(onehot))         # usual (3, 8, 64, 64)
        told, gamma = layer(x.expand(3, -1, -1, -1), onehot), layer.mlp_gamma(layer.mlp_shared(onehot))
        spread = [float(plain.std())]
        for _ in range(3):
            x = F.instance_norm(x) * gamma[1:2]
            spread.append(float(x.std()))
    return [[(f"{caption}\n{name}", ink(0.5 - one[0] / 4))
             for caption, maps in (("conv + norm", usual), ("SPADE - norm", 1e4 * (told - plain)))
             for name, one in zip(("class 0", "class 3+", "halves"), maps)]], {
        "washed": float(abs(usual[0] - usual[1]).max()), "kept": float(abs(told[0] - told[1]).mean()),
        "spread": spread, "gamma": float(gamma.std()), "told": told, "plain": plain}


def discriminator():
    """A discriminator of patches has one logit per window, {one} pixels wide on the image: texture, a few
    cells. On the half-size copy the same layers see {two} pixels of the image: a nest and its border. Two
    scales ask two questions: is this stained as cells are, and do these cells form a nest?
    Exercise: keep one scale, but make its window as large as that of the other. What does it cost?
    Answer: one more layer of stride 2 sees {deeper} pixels. With the official 64 channels it has {deep:,}
    parameters, the two scales {count:,}; and no loss is left that looks at fine texture on its own."""
    def width(layers, scale):
        network = without(MultiscaleDiscriminator(3, 2, layers), nn.InstanceNorm2d)     # norms see everything
        for weight in network.parameters():
            weight.data.fill_(0.1)      # positive weights cannot cancel, and no ReLU is dead
        return int(seen_pixels(lambda image: network.eval()(image)[scale][-1], 352).any(axis=0).sum())

    one, two, deeper = width(4, 0), width(4, 1), width(5, 0)
    image, pictures = region(2)[0], []
    for side in (one, two):
        window = slice(95 - side // 2, 95 + side // 2), slice(183 - side // 2, 183 + side // 2)
        pictures.append((f"a window of {side} px", image // 3 + 170))
        pictures[-1][1][window] = image[window]
    return [pictures], {
        "one": one, "two": two, "deeper": deeper, "count": parameters(MultiscaleDiscriminator, 9, 64, 4, 2),
        "deep": parameters(MultiscaleDiscriminator, 9, 64, 5, 1)}                       # layers, scales


def seeds():
    """No generator is carried along: the batch of step s comes from a key (seed, "batch", s), hashed. So a
    run that is resumed at step 6 draws the batches that the uninterrupted one drew ({same} of 6 equal). One
    global generator that starts again draws those of the first steps a second time, never the rest.
    Exercise: resume by hand with a global generator. What must a checkpoint hold?
    Answer: its state, {state} bytes: put back, {restored} of 6 are equal. But one more draw anywhere before
    and all later batches differ ({shifted} equal): the order of draws is part of the state, a key is not."""
    def batches(*randoms):          # one row of the figure: what each step draws, a tile of 6 x 6 grey values
        return torch.cat([torch.randint(256, (6, 6), generator=random) for random in randoms], 1).byte()

    def equal(a, b):                # how many of the batches
        return sum(bool((x == y).all()) for x, y in zip(a.split(6, 1), b.split(6, 1)))

    def resumed(state, more=0):     # six batches of the global generator, after `more` draws
        random.set_state(state)
        torch.rand(more, generator=random)
        return batches(*[random] * 6)

    random = torch.Generator().manual_seed(0)
    start, before, state = random.get_state(), batches(*[random] * 6), random.get_state()
    rest, again, restored, shifted = resumed(state), resumed(start), resumed(state), resumed(state, 1)
    first, last, keyed = (batches(*(generator(0, "batch", step) for step in steps))
                          for steps in (range(6), range(6, 12), range(6, 12)))
    rows = [[("keys: steps 0 to 11", first, last), ("keys, resumed at 6", first, keyed)],
            [("global: steps 0 to 11", before, rest), ("global, started again at 6", before, again)]]
    return [[(name, torch.cat(parts, 1)) for name, *parts in row] for row in rows], {
        "same": equal(last, keyed), "again": equal(again, rest), "state": len(state),
        "restored": equal(restored, rest), "shifted": equal(shifted, rest)}


def segmenter():
    """The encoder halves five times, which tells what something is and forgets where; each step of the
    decoder gets the encoder's map of its own size (skips), which knows where. Regions are predicted in tiles,
    whose borders see zeros instead of tissue. A network that looks 32 pixels far is off by up to {seam_0:.2f}
    at the seams of tiles that do not overlap, and by {seam_64:.0e} where tiles share 64 pixels and only their
    centres are kept.
    Exercise: leave out the skips: the last map, enlarged 32 times. How good can it be at best?
    Answer: constant in cells of 32 pixels, a map reaches a Dice of {best[1]:.2f} on these labels even when
    every cell is right, in cells of 2 pixels {best[0]:.3f}: details live in the skips."""
    # A network that looks 32 pixels far on all sides: the mean of its window, sharpened.
    network, image = nn.Conv2d(3, 2, 65, padding=32).eval(), torch.from_numpy(region(2)[0]).permute(2, 0, 1)
    network.weight.data = torch.tensor([0, -0.001]).view(2, 1, 1, 1).expand(2, 3, 65, 65)
    whole, *tiled = (predict_roi(network, image, *tiles) for tiles in ((256, 0), (128, 0), (128, 64)))
    seams = [abs(one - whole) for one in tiled]
    tumor = torch.tensor(np.stack([region(score)[1] > 0 for score in range(4)]))[:, None].float()
    rough = [F.interpolate(F.avg_pool2d(tumor, cell).round(), scale_factor=cell) for cell in (2, 32)]
    best = [float(2 * (tumor * one).sum() / (tumor.sum() + one.sum())) for one in rough]
    return [[("labels", ink(tumor[2, 0])), ("without skips", ink(rough[1][2, 0])),
             ("overlap 0: 5 x error", ink(5 * seams[0])), ("overlap 64: 5 x error", ink(5 * seams[1]))]], {
        "seam_0": float(seams[0].max()), "seam_64": float(seams[1].max()), "best": best}


def losses():
    """Cross-entropy does not know how large the tumor is. Dice does: where every pixel has probability q =
    0.5, one of small tumor (1 % of the patch) is pulled {small:.0f} times as hard as one of large tumor (50
    %). Without any tumor soft Dice is flat at 1 until the last false positive is gone: cross-entropy, or a
    batch with tumor, does the work.
    Exercise: write Tversky's loss, 1 - I / (I + a FP + b FN), with class_sums, a = 0.3, b = 0.7. Which
    mistake is dearer: tumor half found, or half as much again?
    Answer: {missed[0]:.3f} for half found, {excess[0]:.3f} for half too much; soft Dice, which is a = b =
    0.5, has {missed[1]:.3f} and {excess[1]:.3f}."""
    def tversky(log_prob, target, a=0.3, b=0.7):
        hit, predicted, volume = (sums[1] for sums in class_sums(log_prob, target))
        return 1 - hit / (hit + a * (predicted - hit) + b * (volume - hit) + 1e-6)

    def logits_of(target, prob):    # probability `prob` of the true class, everywhere
        return torch.stack([1 - 2 * target, 2 * target - 1], dim=1).float() / 2 * torch.logit(prob)

    def area(columns, width=100):   # (1, 40, 100), the left columns are tumor
        return (torch.arange(width) < columns).long().expand(1, 40, width)

    kinds = {"soft Dice": soft_dice_loss, "generalised": generalised_dice_loss, "cross-entropy": F.nll_loss}
    q, charts, pull = torch.linspace(0.02, 0.98, 49), [], []
    for name, target in (("small, 1 %", area(1)), ("large, 50 %", area(50)), ("absent", area(0))):
        answers = [logits_of(target, one).log_softmax(1) for one in q]
        curves = {kind: (q.numpy(), [float(loss(one, target)) for one in answers])
                  for kind, loss in kinds.items()}
        charts.append(plot(curves, name, "probability q of the truth", y_range=(0, 2)))
        logits = logits_of(target, torch.tensor(0.5)).requires_grad_(True)
        [gradient] = torch.autograd.grad(soft_dice_loss(logits.log_softmax(1), target), logits)
        pull.append(gradient[0, 1, 0, 0].abs().item())
    wrong = (logits_of(area(columns), torch.tensor(1 - 1e-6)).log_softmax(1) for columns in (20, 60))
    missed, excess = ([loss(one, area(40)).item() for loss in (tversky, soft_dice_loss)] for one in wrong)
    return [charts], {"small": pull[0] / pull[1], "missed": missed, "excess": excess, "tversky": tversky}


def metrics():
    """A low threshold calls more tissue tumor, and every recall rises towards 1. So their variance falls
    ({low:.4f} at 0.2, {middle:.4f} at 0.5, {high:.4f} at 0.8), and nothing was learned: false positives rise
    too. A smaller variance alone says little; it counts at an equal false-positive rate.
    Exercise: a second network has all its logits lower by 1. Its variance at 0.5 is {second:.4f}. Match it by
    hand.
    Answer: at a threshold of sigmoid(-1) = {sigmoid:.3f} it is the same network: there its false-positive
    rate is that of the first, {fpr:.4f}, and its variance {matched[subtype_variance]:.4f}."""
    first, second = ProbabilityHistogram(CLASSES), ProbabilityHistogram(CLASSES)
    for k, mean in enumerate((-2.5, 0.5, 1.2, 1.8, 3.0, 1.5)):          # Gaussian logits in every class
        for histogram, shift in ((first, 0), (second, -1)):
            logit = numpy_generator("lesson", "logits", k).normal(mean, 1.2, 20000) + shift
            histogram.add(1 / (1 + np.exp(-logit)), np.full(20000, k))
    thresholds = np.arange(20, 981, 20) / 1000
    reports = [first.report(threshold) for threshold in thresholds]
    recalls = {name: (thresholds, [one["recall"][name] for one in reports]) for name in CLASSES.names[1:]}
    rates = {key: (thresholds, [one[key] for one in reports]) for key in ("dice", "precision", "fpr")}
    variance = {"first": (thresholds, [one["subtype_variance"] for one in reports]),
                "lower by 1": (thresholds, [second.report(t)["subtype_variance"] for t in thresholds])}
    low, middle, high = (first.report(threshold)["subtype_variance"] for threshold in (0.2, 0.5, 0.8))
    fpr, colors = first.report()["fpr"], [entry.color for entry in CLASSES.classes[1:]]
    return [[plot(recalls, "recall", "threshold", y_range=(0, 1), colors=colors),
             plot(rates, "Dice and its like", "threshold", y_range=(0, 1)),
             plot(variance, "subtype variance", "threshold")]], {
        "low": low, "middle": middle, "high": high, "second": second.report()["subtype_variance"], "fpr": fpr,
        "sigmoid": 1 / (1 + np.e), "matched": matched(second, second, fpr),
        "found": second.threshold_at_fpr(fpr)}


def frechet():
    """Two samples of one law in 8 dimensions, so both distances should be 0. The Frechet distance is not:
    {mean[0]:.2f} at 20 samples, {mean[5]:.2f} at 640, about as 1 / N, because noise in the covariances looks
    like a difference. The kernel distance has no bias, but for one pair of samples it may be negative.
    Exercise: which of the two do you trust to say that a method with 40 images is worse than one with 400?
    Answer: by Frechet a perfect method scores {perfect:.2f} with 40 images, one that is off by 0.2 in every
    dimension {flawed:.2f} with 400: the order is wrong in {wrong[0]:.0%} of 40 trials, by the kernel distance
    in {wrong[1]:.0%}."""
    def distances(n, trial, shift=0.0):
        a, b = (numpy_generator("lesson", n, trial, k).normal(k * shift, size=(n, 8)) for k in (0, 1))
        return frechet_distance(*feature_statistics(a), *feature_statistics(b)), kernel_distance(a, b)

    counts = [20, 40, 80, 160, 320, 640]
    same = np.array([[distances(n, trial) for trial in range(20)] for n in counts])     # (N, trial, 2)
    perfect, flawed = (np.array([distances(n, trial, shift) for trial in range(40)])
                       for n, shift in ((40, 0.0), (400, 0.2)))
    charts = [plot({"mean": (counts, one.mean(1)), "single": (np.repeat(counts, 20), one.ravel(), "dots")},
                   f"{name} distance, one law", "samples", (405, 240), "x", note=(0, "0"))
              for name, one in (("Frechet", same[..., 0]), ("kernel", same[..., 1]))]
    return [charts], {"mean": same[..., 0].mean(axis=1), "perfect": perfect[:, 0].mean(), "same": same,
                      "flawed": flawed[:, 0].mean(), "wrong": (perfect >= flawed).mean(axis=0)}


def gan_losses():
    """The hinge loss stops pushing the discriminator where it is right by a margin of 1; the generator's has
    no margin, so its gradient never vanishes. KL pulls mu to 0 and the variance to 1, so that z ~ N(0, I) is
    a fair draw when no image is there to encode. The adaptive weight makes both losses of the autoencoder
    pull equally hard on the last layer: multiply one by 100, and its pull changes by {change:.0%}.
    Exercise: the official code sums KL over the batch, here it is the mean. What equals its 0.05 at a batch
    of 16?
    Answer: {equal:.2f}: the sum is {ratio:.0f} times the mean, so officially the prior weighs more the larger
    the batch is."""
    x = torch.linspace(-3, 3, 121)
    curves, slopes = {}, {}
    for role in ("real", "fake", "generator"):
        logits = x.clone().requires_grad_(True)
        value = torch.stack([adversarial_loss(one.view(1, 1, 1, 1), role) for one in logits])
        slopes[role] = x.numpy(), torch.autograd.grad(value.sum(), logits)[0].numpy()
        curves[role] = x.numpy(), value.detach().numpy()
    layer, scales = torch.ones(4, requires_grad=True), np.geomspace(0.01, 100, 9)
    nll = ((layer - torch.arange(1.0, 5)) ** 2).mean()
    pull = [k * adaptive_weight(pulls(nll, k * layer.sum(), layer)).item() for k in scales.tolist()]
    batch = torch.randn(16, 8, generator=generator("lesson", "kl"))
    ratio = float(kl_divergence(batch, batch, "sum") / kl_divergence(batch, batch))
    charts = [plot(curves, "hinge loss", "logit"), plot(slopes, "its gradient", "logit"),
              plot({"of g": (scales, pull)}, "weighted pull of g", "scale of g", log="x", y_range=(0, 6))]
    return [charts], {"change": abs(pull[-1] / pull[4] - 1), "ratio": ratio, "equal": 0.05 * ratio,
                      "slopes": slopes}
