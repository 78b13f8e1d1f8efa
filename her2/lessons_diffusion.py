"""Lessons of Saturday noon: noise, the way back, inpainting, and the network in between (see `lessons`).

Where a trained denoiser would stand, here is an exact one: for a mixture of Gaussians in the plane the mean
of x0 given xt has a closed form. Latents are (B, 2, 1, 1): samplers do not know that these are no pictures.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from her2 import inpainting as inpaint
from her2.data_classes import DEFAULT_CLASSES as CLASSES
from her2.denoiser import LabelCode, LatentDenoiser, ResBlock, guided, time_embedding
from her2.diffusion import Schedule
from her2.draw import CYCLE, GREY, colorize, fit, to_uint8
from her2.draw_charts import plot, sheet
from her2.lessons_tissue import region
from her2.run_seeds import generator
from her2.samplers import ddim_timesteps, sample, trajectory

SCHEDULE = Schedule(zero_terminal_snr=True, parametrisation="v")        # as train_ldm has it


class Mixture:
    """Equal parts of N(mean_k, std^2 I), means (K, 2), as data; `predict(xt, t)` is the perfect network.

        xt given k   N(sqrt(ab) mean_k, var I),  var = ab std^2 + 1 - ab          ab = alpha_bar at t
        x0 given xt  sum over k of p(k | xt) (mean_k + sqrt(ab) std^2 / var (xt - sqrt(ab) mean_k))
    """

    def __init__(self, means, std: float, schedule=SCHEDULE):
        self.means, self.std, self.schedule = torch.tensor(means, dtype=torch.float64), std, schedule

    def predict(self, xt, t):
        """xt (B, 2, 1, 1), t (B,) -> v or eps (B, 2, 1, 1), as the schedule says."""
        ab = self.schedule.alpha_bar[t][:, None, None]                                  # (B, 1, 1)
        off = xt.flatten(1)[:, None] - ab.sqrt() * self.means                           # (B, K, 2)
        var = ab * self.std ** 2 + 1 - ab
        share = (-(off ** 2).sum(-1, keepdim=True) / (2 * var)).softmax(dim=1)          # (B, K, 1): p(k | xt)
        x0 = (share * (self.means + ab.sqrt() * self.std ** 2 / var * off)).sum(1)[..., None, None]
        return self.schedule.target(x0, self.schedule.eps_from_x0(x0, xt, t), t)


def flat_noise(count: int):
    """noise(purpose, i) -> (count, 2, 1, 1), what the samplers take: see `image_noise`."""
    return lambda purpose, i: torch.randn(count, 2, 1, 1, generator=generator("lesson", purpose, i),
                                          dtype=torch.float64)


FLOWER = Mixture([(1.5 * math.cos(a), 1.5 * math.sin(a)) for a in np.arange(5) * 2 * math.pi / 5], 0.3)


def diffusion(answer):
    """Noise is mixed in until nothing of the patch is left: alpha_bar is the share of its variance that
    remains. The network's error in eps counts sqrt(1 / alpha_bar - 1) times in x0, {factor:.0f} times at the
    last level of the official schedule and infinitely often where alpha_bar is 0, which is why that schedule
    predicts v. On the way back eq. 3 mixes the guess x0 with xt: nearly all xt, until the last few levels.

    Exercise: Nichol and Dhariwal's schedule is alpha_bar = cos^2(pi / 2 (t / T + s) / (1 + s)), s = 0.008. At
    which level is half of the variance gone, here and there?

    Answer: at level {half} in the linear schedule, {half_zero} with zero terminal SNR, {half_cosine} of 1000
    with the cosine: it spends more levels where a picture can still be seen, and its last alpha_bar is
    {last_cosine:.0e}.
    """
    official, t = Schedule(), np.arange(1000)
    image = torch.from_numpy(region(3)[0][60:160, 100:200] / 127.5 - 1).permute(2, 0, 1)[None].float()
    levels = [0, 50, 150, 300, 450, 600, 800, 999]
    eps = torch.randn(image.shape, generator=generator("lesson", "eps"))
    noisy = [SCHEDULE.q_sample(image, torch.tensor([level]), eps) for level in levels]
    cosine = np.cos(np.pi / 2 * ((t + 1) / 1000 + 0.008) / 1.008) ** 2
    curves = {"linear": official.alpha_bar.numpy(), "zero terminal SNR": SCHEDULE.alpha_bar.numpy(),
              "cosine": cosine}
    half = [int((curve < 0.5).argmax()) for curve in curves.values()]
    curves = {name: (t, curve) for name, curve in list(curves.items())[:3 if answer else 2]}
    error = {name: (t, np.sqrt(1 / np.maximum(curve, 1e-9) - 1)) for name, (_, curve) in curves.items()}
    weights = {"of x0": (t, official.posterior_x0.numpy()), "of xt": (t, official.posterior_xt.numpy())}
    options = dict(x_label="t", size=(270, 240))
    return sheet([[(f"t = {level}", to_uint8(one)[0]) for level, one in zip(levels, noisy)],
                  [plot(curves, "alpha_bar", **options),
                   plot(error, "error in x0 per error in eps", log_y=True, y_range=(0.01, 1000), **options),
                   plot(weights, "weights in eq. 3", log_y=True, y_range=(1e-4, 1), **options)]]), {
        "factor": error["linear"][1][-1], "half": half[0], "half_zero": half[1], "half_cosine": half[2],
        "last_cosine": float(cosine[-1]), "noisy": noisy}


def samplers(answer):
    """The same noise on its way to five clusters. With eta 0 it follows a smooth curve to the end that
    belongs to it, and more steps only follow that curve more closely; with eta 1 each step adds noise that
    later steps take away, and twice the steps lead to another image (a mean distance of {apart:.1f} between
    the ends of 40 and 80 steps, against {close:.2f}). Either way too few steps average over clusters: with 5,
    samples lie between them, where no data are.

    Exercise: the end of eta 0 is off by {errors[4]:.3f} at 80 steps. Predict the error at 160, and at 20.

    Answer: {errors[5]:.3f} at 160, a half: a step takes x0 and eps for constant, and is off by the square of
    its length (first order, measured {order:.2f}). At 20 it is {errors[2]:.3f}, less than four times as much:
    steps of equal length in t are very unequal in log-SNR, and the last of them, not the mean, decide.
    """
    noise, steps = flat_noise(300), [5, 10, 20, 40, 80, 160]

    def path(S, eta):               # (S + 1, 300, 2)
        states = trajectory(FLOWER.predict, SCHEDULE, noise, ddim_timesteps(1000, S), eta)
        return torch.stack([noise("start", 0), *(xt for xt, _ in states)]).flatten(2).numpy()

    def distance(a, b):             # root of the mean square between the ends of two paths
        return float(np.sqrt(((a[-1] - b[-1]) ** 2).sum(-1).mean()))

    paths = {(eta, S): path(S, eta) for eta in (0, 1) for S in steps}
    exact = path(1000, 0)
    errors = [distance(paths[0, S], exact) for S in steps]
    rows = [[(f"eta {eta}, {S} steps", plot(
        {"_ends": (*paths[eta, S][-1].T, "dots"), **{f"_{k}": paths[eta, S][:, k].T for k in range(6)}},
        size=(270, 200), x_range=(-2.6, 2.6), y_range=(-2.4, 2.4), colors=[GREY, *CYCLE[:6]]))
        for S in (5, 20, 80)] for eta in (0, 1)]
    curves = {"eta 0": (steps, errors)}
    if answer:
        curves["first order"] = (steps, [errors[-1] * 160 / S for S in steps])
    twice = {f"eta {eta}": (steps[:-1], [distance(paths[eta, S], paths[eta, 2 * S]) for S in steps[:-1]])
             for eta in (0, 1)}
    options = dict(x_label="steps", size=(405, 220), log_x=True)
    return sheet([*rows, [plot(curves, "distance to the end of 1000 steps", log_y=True, **options),
                          plot(twice, "distance between the ends of S and 2 S steps", **options)]]), {
        "errors": errors, "order": math.log2(errors[4] / errors[5]), "apart": twice["eta 1"][1][3],
        "close": twice["eta 0"][1][3], "ends": paths[1, 160][-1]}


def texture(z):
    """`predict` for a stationary Gaussian with the mean, colours and power spectrum P of one z (1, C, h, w).

    Per principal colour and frequency x0 given xt is Wiener's filter: sqrt(ab) P / (ab P + 1 - ab) xt."""
    mean = z.mean((0, 2, 3), keepdim=True)
    flat = (z - mean).flatten(2)[0]                                                     # (C, hw)
    colors = torch.linalg.eigh(flat @ flat.T)[1]                                        # (C, C)

    def waves(z):
        return torch.fft.fft2(torch.einsum("ij,bihw->bjhw", colors, z), norm="ortho")

    power = F.avg_pool2d(F.pad(waves(z - mean).abs() ** 2, (2, 2, 2, 2), mode="circular"), 5, stride=1)

    def predict(xt, t):
        ab = SCHEDULE.alpha_bar[t][:, None, None, None]
        found = ab.sqrt() * power / (ab * power + 1 - ab) * waves(xt - ab.sqrt() * mean)
        x0 = torch.einsum("ij,bjhw->bihw", colors, torch.fft.ifft2(found, norm="ortho").real) + mean
        return SCHEDULE.target(x0, SCHEDULE.eps_from_x0(x0, xt, t), t)

    return predict


def inpainting(answer):
    """The pixels of relabelled tumor become the latent cells that touch one, and a rim of one cell more,
    since cells beside the border still encode old tumor. Before every step the known cells are put back,
    noised to the level of xt, so that the new ones grow to fit them. At the end the old pixels are pasted
    back: the largest difference outside the region is {outside:.0f}. (The network here is a Gaussian with
    this picture's own power spectrum.)

    Exercise: put the known cells back after the step instead (`blend="after"`), and leave out the last
    replacement. Predict how far they are then from the truth.

    Answer: off by {after:.3f}: xt still holds the noise of the last level visited, t = {last}, sqrt(1 -
    alpha_bar) = {predicted:.3f}. Put back before the step, they are what the network makes of them: off by
    {before:.3f}.
    """
    image, _, instance = region(3)
    image = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)[None]                  # (1, 3, 256, 256)
    repaint = torch.from_numpy(instance == np.bincount(instance.ravel())[1:].argmax() + 1)[None]
    touched, cells = (inpaint.repaint_to_latent(repaint, 4, rim) for rim in (0, 1))     # (1, 1, 64, 64)
    z = 2 * F.avg_pool2d(image, 4)                  # "encoder": mean colours, scaled to unit variance or so
    levels = ddim_timesteps(SCHEDULE.T, 50)

    def noise(purpose, i):
        return torch.randn(z.shape, generator=generator("inpaint", purpose, i), dtype=torch.float64)

    ends, off = {}, {}
    for blend in ("before", "after"):
        states = trajectory(texture(z), SCHEDULE, noise, levels, 1.0, z, cells, blend=blend)
        *_, (ends[blend], _) = states
        off[blend] = float((ends[blend] - z)[~cells.expand_as(z)].square().mean().sqrt())
    decoded = F.interpolate(torch.where(cells, ends["before"], z) / 2, scale_factor=4, mode="bilinear")
    result = inpaint.paste(image, decoded, repaint)
    difference = abs(result - image)

    def on_image(*masks):           # the picture with parts of it tinted
        shade = to_uint8(image)[0].astype(float)
        for mask, color in masks:
            mask = F.interpolate(mask.float(), size=256)[0, 0].numpy() > 0
            shade[mask] = 0.35 * shade[mask] + 0.65 * np.array(color)
        return shade.astype(np.uint8)

    pictures = [("region", on_image((repaint[:, None], CYCLE[1]))),
                ("cells, and their rim", on_image((cells & ~touched, CYCLE[4]), (touched, CYCLE[0]))),
                ("pasted", to_uint8(result)[0]), ("difference", to_uint8(difference - 1)[0])]
    rest = [(f"known cells, {blend}", fit(to_uint8(torch.where(cells, 0, 4 * abs(xt - z)) - 1)[0], 200))
            for blend, xt in ends.items()]
    return sheet([[(name, fit(one, 200)) for name, one in pictures]] + ([rest] if answer else [])), {
        "outside": float(difference[:, :, ~repaint[0]].max()), "last": levels[0], "touched": touched, **off,
        "predicted": float((1 - SCHEDULE.alpha_bar[levels[0]]).sqrt()), "cells": cells, "repaint": repaint}


def denoiser(answer):
    """Time enters as waves of many frequencies (left): close levels get close codes, and the angle between
    two codes depends on their difference alone. The label map enters as a code of the latent's size, the
    share of every class in each cell, so the network is told where, not only what. Guidance takes what the
    label changes {scales[1]} or {scales[2]} times: samples of the labelled cluster move away from the others,
    from {radius[0]:.2f} to {radius[2]:.2f}, and lose their variety, from {spread[0]:.2f} to {spread[2]:.2f}.

    Exercise: feed the label by FiLM (a scale and a shift per channel, from the label's mean over the image)
    instead of by concatenation. What can the network no longer do, and how many parameters does that take?

    Answer: it cannot place anything: a map and its mirror image have the same mean (difference {film:.0e}; of
    the codes {code:.2f}). And it is dearer: {film_parameters:,} parameters, 2 x 6 per channel of every
    residual block, against {concat_parameters:,} for the 1x1 conv and the three more input channels.
    """
    scales, noise = (1, 3, 8), flat_noise(300)
    labelled = Mixture(FLOWER.means[:1].tolist(), FLOWER.std)       # the network, told "cluster 0"

    def draw(predict):              # (300, 2)
        return sample(predict, SCHEDULE, noise, steps=50, eta=0.0).flatten(1).numpy()

    everything, ends = draw(FLOWER.predict), {scale: draw(lambda xt, t: guided(
        labelled.predict(xt, t), FLOWER.predict(xt, t), scale)) for scale in scales}
    clouds = [plot({"_all": (*everything.T, "dots"), "_labelled": (*end.T, "dots")}, f"guidance {scale}",
                   size=(270, 240), x_range=(-2.6, 3.4), y_range=(-2.4, 2.4), colors=[GREY, CYCLE[1]])
              for scale, end in ends.items()]
    label = torch.from_numpy(region(1, False)[1][60:188, 60:188]).long()
    onehot = torch.stack([label == 0, label > 0, label == 5], dim=0)[None].float()      # (1, 3, 128, 128)
    encode = LabelCode(3, 3, stages=3)
    encode.channel_mapper.weight.data = torch.eye(3)[..., None, None]   # show the shares
    with torch.no_grad():
        code, mirrored = encode(onehot), encode(onehot.flip(-1))                        # (1, 3, 16, 16)
    time = time_embedding(torch.arange(0, 1000, 4), 64).T                               # (64, 250)
    waves, shares = fit((128 + 127 * time).byte(), 250), fit((255 - 255 * code[0, 1]).byte(), 192)
    with torch.device("meta"):
        network = LatentDenoiser()
    widths = [block.emb_layers[1].out_features for block in network.modules() if isinstance(block, ResBlock)]
    channels = network.config["code_channels"]
    row = [("64 waves over t = 0 .. 999", waves.repeat(3, axis=0)), ("share of tumor per cell", shares)]
    row.insert(1, ("label", fit(colorize(label, CLASSES), 192)))
    return sheet([row, clouds]), {
        "scales": scales, "radius": [float(np.linalg.norm(end.mean(0))) for end in ends.values()],
        "spread": [float(end.std(0).mean()) for end in ends.values()], "time": time,
        "film": float(abs(onehot.mean((2, 3)) - onehot.flip(-1).mean((2, 3))).max()),
        "code": float(abs(code - mirrored).max()), "film_parameters": 2 * 6 * sum(widths),
        "concat_parameters": 6 * channels + 9 * channels * network.config["model_channels"], "shares": code,
        "onehot": onehot}
