"""Lessons of Saturday noon: noise, the way back, inpainting, latents, the denoiser (see `lessons`)."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from her2 import inpainting as inpaint
from her2.data_classes import DEFAULT_CLASSES as CLASSES
from her2.denoiser import LabelCode, LatentDenoiser, ResBlock, guided, time_embedding
from her2.diffusion import Schedule
from her2.draw import CYCLE, GREY, INK, colorize, to_uint8
from her2.draw_axes import plot
from her2.lessons_tissue import ink, region
from her2.quantizer import Codebook, count_codes, restart_dead_codes, vq_loss
from her2.run_seeds import generator
from her2.samplers import ddim_timesteps, sample, trajectory

SCHEDULE = Schedule(zero_terminal_snr=True, parametrisation="v")        # as train_ldm has it


class Mixture:
    """Equal parts of N(mean_k, std^2 I), means (K, D), as data; `predict(xt, t)` is the perfect network, in
    closed form. Latents are (B, D, 1, 1): samplers do not know that these are no pictures.

        xt given k   N(sqrt(ab) mean_k, var I),  var = ab std^2 + 1 - ab          ab = alpha_bar at t
        x0 given xt  sum over k of p(k | xt) (mean_k + sqrt(ab) std^2 / var (xt - sqrt(ab) mean_k))"""

    def __init__(self, means, std: float, schedule=SCHEDULE):
        self.means, self.std, self.schedule = torch.as_tensor(means, dtype=torch.float64), std, schedule

    def predict(self, xt, t):
        """xt (B, D, 1, 1), t (B,) -> v or eps (B, D, 1, 1), as the schedule says."""
        ab = self.schedule.alpha_bar[t][:, None, None]                                  # (B, 1, 1)
        off = xt.flatten(1)[:, None] - ab.sqrt() * self.means                           # (B, K, D)
        var = ab * self.std ** 2 + 1 - ab
        share = (-(off ** 2).sum(-1, keepdim=True) / (2 * var)).softmax(dim=1)          # (B, K, 1): p(k | xt)
        x0 = (share * (self.means + ab.sqrt() * self.std ** 2 / var * off)).sum(1)[..., None, None]
        return self.schedule.target(x0, self.schedule.eps_from_x0(x0, xt, t), t)


def flat_noise(*shape):
    """noise(purpose, i) -> `shape`, what the samplers take: see `image_noise`."""
    return lambda purpose, i: torch.randn(*shape, generator=generator("lesson", purpose, i), dtype=float)


FLOWER = Mixture([(1.5 * math.cos(a), 1.5 * math.sin(a)) for a in np.arange(5) * 2 * math.pi / 5], 0.3)


def diffusion():
    """Noise is mixed in until nothing of the patch is left: alpha_bar is the share of its variance that
    remains. An error in eps counts sqrt(1 / alpha_bar - 1) times in x0, {factor:.0f} times at the last level
    of the official schedule, infinitely often where alpha_bar is 0: there the network predicts v. On the way
    back equation 3 mixes the guess x0 with xt: nearly all xt, until the last levels.
    Exercise: the cosine schedule is alpha_bar = cos^2(pi / 2 (t / T + 0.008) / 1.008). At which level is half
    of the variance gone, here and there?
    Answer: at {half[0]} in the linear schedule, {half[1]} with zero terminal SNR, {half[2]} of 1000 with the
    cosine: it spends more levels where a picture can still be seen."""
    official, t = Schedule(), np.arange(1000)
    image = torch.from_numpy(region(3)[0][60:160, 100:200] / 127.5 - 1).permute(2, 0, 1)[None].float()
    eps = torch.randn(image.shape, generator=generator("lesson", "eps"))
    noisy = [(f"t = {level}", to_uint8(SCHEDULE.q_sample(image, torch.tensor([level]), eps))[0])
             for level in (0, 150, 300, 450, 600, 999)]
    given = {"linear": (t, official.alpha_bar.numpy()), "zero terminal SNR": (t, SCHEDULE.alpha_bar.numpy())}
    cosine = np.cos(np.pi / 2 * ((t + 1) / 1000 + 0.008) / 1.008) ** 2
    error = {name: (t, np.sqrt(1 / np.maximum(curve, 1e-9) - 1)) for name, (_, curve) in given.items()}
    weights = {"of x0": (t, official.posterior_x0.numpy()), "of xt": (t, official.posterior_xt.numpy())}
    charts = [plot(given, "alpha_bar", "t"),
              plot(error, "error in x0 per error in eps", "t", log="y", y_range=(0.01, 1000)),
              plot(weights, "weights in equation 3", "t", log="y", y_range=(1e-4, 1))]
    return [noisy, charts], {
        "factor": error["linear"][1][-1],
        "half": [int((one < 0.5).argmax()) for one in (*(curve for _, curve in given.values()), cosine)]}


def samplers():
    """The same noise on its way to five clusters: with eta 0 it follows a smooth curve, and more steps only
    follow that curve more closely. With eta 1 each step adds noise that later steps take away, and twice the
    steps lead to another image (the ends of 40 and 80 steps are {apart:.1f} apart, against {close:.2f}).
    Either way too few steps average over clusters: with 5, samples lie between them, where no data are.
    Exercise: the end of eta 0 is off by {errors[4]:.3f} at 80 steps. Predict the error at 160, and at 20.
    Answer: {errors[5]:.3f}, a half, as of first order (measured {order:.2f}): a step is off by the square of
    its length. At 20 it is {errors[2]:.3f}, less than four times as much: steps of equal length in t are
    unequal in log-SNR."""
    noise, steps = flat_noise(300, 2, 1, 1), [5, 10, 20, 40, 80, 160]

    def path(S, eta):               # (S + 1, 300, 2)
        states = trajectory(FLOWER.predict, SCHEDULE, noise, ddim_timesteps(1000, S), eta)
        return torch.stack([noise("start", 0), *(xt for xt, _ in states)]).flatten(2).numpy()

    def distance(a, b):             # root of the mean square between the ends of two paths
        return float(np.sqrt(((a[-1] - b[-1]) ** 2).sum(-1).mean()))

    paths, exact = {(eta, S): path(S, eta) for eta in (0, 1) for S in steps}, path(1000, 0)
    errors = [distance(paths[0, S], exact) for S in steps]
    clouds = [plot({"_ends": (*one[-1].T, "dots"), **{f"_{k}": one[:, k].T for k in range(6)}},
                   f"eta {eta}, {S} steps", size=(200, 200), x_range=(-2.6, 2.6), y_range=(-2.4, 2.4),
                   colors=[GREY, *CYCLE[:6]]) for (eta, S), one in paths.items() if S in (5, 80)]
    close, apart = (distance(paths[eta, 40], paths[eta, 80]) for eta in (0, 1))
    chart = plot({"eta 0": (steps[:5], errors[:5])}, "eta 0: distance to the end of 1000 steps", "S",
                 (405, 230), "xy")
    return [clouds, [chart]], {"errors": errors, "order": math.log2(errors[4] / errors[5]), "apart": apart,
                               "close": close, "ends": paths[1, 160][-1]}


def inpainting():
    """The pixels of relabelled tumor become the latent cells that touch one, and a rim of one cell more,
    since cells beside the border still encode old tumor. Before every step the known cells are put back,
    noised to the level of xt, so that the new ones fit them (the network here knows this picture's colours,
    not their order). At the end the old pixels are pasted back: the largest difference outside the region is
    {outside:.0f}.
    Exercise: put the known cells back after the step (`blend="after"`), and not at the end. Predict their
    error.
    Answer: {after:.3f}: xt still holds the noise of the last level visited, t = {last}, sqrt(1 - alpha_bar) =
    {predicted:.3f}. Put back before the step, they are what the network makes of them: off by
    {before:.3f}."""
    image, _, instance = region(3)
    image = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)[None]                  # (1, 3, 256, 256)
    repaint = torch.from_numpy(instance == np.bincount(instance.ravel())[1:].argmax() + 1)[None]
    touched, cells = (inpaint.repaint_to_latent(repaint, 4, rim) for rim in (0, 1))     # (1, 1, 64, 64)
    z = F.avg_pool2d(image, 4)                      # "encoder": mean colours, (1, 3, 64, 64)
    colors, levels = Mixture(z.flatten(2)[0].T[::41], 0.1), ddim_timesteps(SCHEDULE.T, 50)

    def predict(xt, t):             # every cell on its own
        pixels = xt.movedim(1, -1).reshape(-1, 3, 1, 1)                                 # (4096, 3, 1, 1)
        return colors.predict(pixels, t.expand(len(pixels))).view(1, 64, 64, 3).movedim(-1, 1)

    ends = {blend: list(trajectory(predict, SCHEDULE, flat_noise(*z.shape), levels, 1.0, z, cells,
                                   blend=blend))[-1][0] for blend in ("before", "after")}
    off = {blend: float((xt - z)[~cells.expand_as(z)].square().mean().sqrt()) for blend, xt in ends.items()}
    decoded = F.interpolate(torch.where(cells, ends["before"], z), scale_factor=4, mode="bilinear")
    result = inpaint.paste(image, decoded, repaint)
    difference = abs(result - image)                                                    # (1, 3, 256, 256)
    shade = 0.2 * (~cells).double() + 0.4 * (~touched)                                  # (1, 1, 64, 64)
    return [[("region", to_uint8(image)[0]), ("cells, and their rim", ink(shade[0, 0])),
             ("pasted", to_uint8(result)[0]), ("difference", to_uint8(difference - 1)[0])]], {
        "outside": float(difference[:, :, ~repaint[0]].max()), "last": levels[0], "touched": touched, **off,
        "predicted": float((1 - SCHEDULE.alpha_bar[levels[0]]).sqrt()), "cells": cells, "repaint": repaint}


def quantizer():
    """A latent is replaced by the nearest of K codes: the plane falls into cells, one colour per code. A code
    that wins nothing never moves: of 16 that start near zero {used[0]} are in use after 200 steps, {used[1]}
    when dead ones restart at latents of the data. A weight of 0.25 on the codes' term (the official default)
    makes the first step of SGD {slow[SGD]:.1f} times shorter, that of Adam {slow[Adam]:.1f} times: Adam
    cancels the scale of a loss.
    Exercise: with beta on the commitment, a latent that wants to be at x (loss |z - x|^2) settles between x
    and its code. Where, for beta 0.05, 0.25 and 4?
    Answer: at {rest[0]:.2f}, {rest[1]:.2f} and {rest[2]:.2f} of the way from x to the code, beta / (1 +
    beta): a large beta makes the encoder obey codes that are still bad."""
    data = torch.randn(300, 2, generator=generator("latents")) * 0.3 + FLOWER.means[:2].repeat(150, 1).float()
    latents = data.T[None, :, None]                                                     # (1, 2, 1, 300)

    def train(steps, restart=False, kind=torch.optim.Adam, legacy=False):
        torch.manual_seed(0)
        book, usage = Codebook(16, 2), torch.zeros(16)
        optimizer = kind([book.weight], lr=0.02)
        for step in range(steps):
            indices = book.nearest(latents)
            optimizer.zero_grad()
            vq_loss(latents, book.lookup(indices), legacy=legacy).backward()
            optimizer.step()
            usage += count_codes(indices, 16)
            if restart and step % 50 == 49:
                restart_dead_codes(book, usage, latents, generator("restart", step), optimizer)
                usage.zero_()
        return book

    pictures, used, slow, rest = [], [], {}, []
    for name, book in (("start", train(0)), ("200 steps", train(200)), ("with restarts", train(200, True))):
        nearest, codes = book.nearest(latents).flatten(), book.weight.detach()
        cells = {f"_{k}": (*data[nearest == k].T, "dots") for k in range(16)}
        pictures.append(plot({**cells, "_codes": (*codes.T, "dots")}, name, x_range=(-1.5, 2.5),
                             y_range=(-1, 2.5), colors=[CYCLE[k % 6] for k in range(16)] + [INK]))
        used.append(len(nearest.unique()))
    for kind in (torch.optim.SGD, torch.optim.Adam):    # the length of the first step
        ours, official = ((train(1, False, kind, legacy).weight - train(0).weight).norm().item()
                          for legacy in (False, True))
        slow[kind.__name__] = ours / official
    z = torch.tensor([0.0, 1.0], requires_grad=True)    # at x = 0, and at its code 1
    for beta in (0.05, 0.25, 4):        # between them the slope is linear in z: where is it 0?
        at_x, at_code = torch.autograd.grad((z ** 2).mean() + vq_loss(z, torch.ones(2), beta), z)[0]
        rest.append(float(at_x / (at_x - at_code)))
    return [pictures], {"used": used[1:], "slow": slow, "rest": rest}


def denoiser():
    """Time enters as waves of many frequencies (left): the angle between two codes depends on their
    difference alone. The label map enters as the share of every class in each latent cell: the network is
    told where, not only what. Guidance takes what the label changes 3 or 8 times: samples of the labelled
    cluster move away from the others, from {radius[0]:.2f} to {radius[2]:.2f}, and lose their variety, from
    {spread[0]:.2f} to {spread[2]:.2f}.
    Exercise: feed the label by FiLM (a scale and a shift per channel, from the label's mean over the image):
    what can the network no longer do, and what does that cost?
    Answer: a map and its mirror image have the same mean, so it cannot place anything. And it is dearer:
    {film:,} parameters, 2 x 6 per channel of every residual block, against {concat:,} for the 1x1 conv and
    three channels."""
    noise, labelled = flat_noise(300, 2, 1, 1), Mixture(FLOWER.means[:1], FLOWER.std)   # told "cluster 0"
    # Guidance 0 is the network without the label.
    everything, *ends = (
        sample(lambda xt, t: guided(labelled.predict(xt, t), FLOWER.predict(xt, t), scale), SCHEDULE, noise,
               steps=50, eta=0.0).flatten(1).numpy() for scale in (0, 1, 3, 8))
    clouds = [plot({"_all": (*everything.T, "dots"), "_labelled": (*end.T, "dots")}, f"guidance {scale}",
                   x_range=(-2.6, 3.4), y_range=(-2.4, 2.4), colors=[GREY, CYCLE[1]])
              for scale, end in zip((1, 3, 8), ends)]
    label = torch.from_numpy(region(1)[1][60:188, 60:188]).long()
    onehot = torch.stack([label == 0, label > 0, label == 5], dim=0)[None].float()      # (1, 3, 128, 128)
    encode = LabelCode(3, 3, halvings=3)
    encode.channel_mapper.weight.data = torch.eye(3)[..., None, None]   # show the shares
    shares = encode(onehot).detach()                                                    # (1, 3, 16, 16)
    time = time_embedding(torch.arange(0, 1000, 4), 64).T                               # (64, 250)
    with torch.device("meta"):
        network = LatentDenoiser()
    widths = [block.emb_layers[1].out_features for block in network.modules() if isinstance(block, ResBlock)]
    channels = network.config["code_channels"]
    return [[("64 waves over t", ink(0.5 - time / 2).repeat(3, axis=0)), ("label", colorize(label, CLASSES)),
             ("share of tumor per cell", ink(shares[0, 1]))], clouds], {
        "radius": [float(np.linalg.norm(end.mean(0))) for end in ends], "time": time, "onehot": onehot,
        "spread": [float(end.std(0).mean()) for end in ends], "film": 2 * 6 * sum(widths),
        "concat": 6 * channels + 9 * channels * network.config["model_channels"], "shares": shares}
