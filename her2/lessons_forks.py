"""Lesson of Sunday afternoon: three forks, each through a contract that all code keeps (see `lessons`)."""

import numpy as np
import torch
from torch import nn

from her2.data_classes import DEFAULT_CLASSES, ClassTable
from her2.draw import class_legend, colorize, image_grid
from her2.draw_axes import plot
from her2.lessons_diffusion import FLOWER, SCHEDULE, flat_noise
from her2.lessons_tissue import ink, region
from her2.metrics import ProbabilityHistogram
from her2.samplers import sample, spaced_timesteps
from her2.segmenter import predict_roi
from her2.stains import STAINS


def heun(predict, schedule, noise, timesteps, known=None, repaint=None):
    """Second-order sampling over the levels `timesteps`, ascending: x0 (B, C, h, w); the rest as in `sample`.
    The fork in her2/samplers.py: this function, "heun" in SAMPLERS, and in `sample`, above `eta = `,

        if sampler == "heun":
            levels = spaced_timesteps(schedule, steps, sampler, spacing)
            return heun(predict, schedule, noise, levels, known, repaint)

    With cos(phi) = sqrt(alpha_bar), eq. 1 is xt = cos(phi) x0 + sin(phi) eps, so that dxt / dphi = v. DDIM
    with eta 0 turns xt by the v at the start of a step, Heun by the mean of the v at both ends: two answers
    of the network per step. The last step ends at phi = 0, where no network answers: it stays DDIM's."""
    angle, xt = schedule.alpha_bar.sqrt().acos(), noise("start", 0)         # (T,), (B, C, h, w)

    def slope(xt, t):
        t = torch.full((len(xt),), t, device=xt.device)
        if known is not None:           # with the same noise at every level, as for DPM-Solver++
            xt = torch.where(repaint, xt, schedule.q_sample(known, t, noise("start", 0)))
        x0, eps = schedule.x0_and_eps(predict(xt, t), xt, t)
        signal, share = schedule.roots(t, xt)
        return signal * eps - share * x0                            # v, whatever the network puts out

    for t, after in zip(timesteps[:0:-1], timesteps[-2::-1]):
        v, turn = slope(xt, t), angle[after] - angle[t]
        guess = turn.cos() * xt + turn.sin() * v                                # DDIM's step
        xt = xt + turn * (v + slope(guess, after)) / 2
    last = timesteps[0]
    x0 = angle[last].cos() * xt - angle[last].sin() * slope(xt, last)
    return x0 if known is None else torch.where(repaint, x0, known)


class BrownSegmenter(nn.Module):
    """image (B, 3, H, W) in [-1, 1] -> logits (B, 2, H, W): tumor is what holds more DAB than `threshold`."""

    def __init__(self, threshold: float = 0.15):
        super().__init__()
        self.config = {"threshold": threshold}                              # what model.pt keeps
        self.register_buffer("dab", torch.tensor(np.linalg.inv(STAINS)[:, 1], dtype=torch.float32))
        self.scale = nn.Parameter(torch.tensor([20.0, threshold]))          # so that it can be trained

    def forward(self, image):
        density = -torch.log10(((image + 1) / 2).clamp(min=1 / 510))        # (B, 3, H, W)
        amount = torch.einsum("bchw,c->bhw", density, self.dab)             # (B, H, W)
        tumor = self.scale[0] * (amount - self.scale[1])
        return torch.stack([torch.zeros_like(tumor), tumor], dim=1)


NAMES = {"Other": "#ffffff", "Invasive tumor": "#d62728", "In situ tumor": "#f0c814",
         "Normal gland": "#17becf", "Lymphocytes": "#6a51a3", "Necrosis": "#7f7f7f", "Fat": "#c7e9c0"}
SEVEN = [{"id": k, "name": name, "tumor": k in (1, 2), "variance": k in (1, 2), "color": color}
         for k, (name, color) in enumerate(NAMES.items())]      # what classes.json holds


def forks():
    """A sampler needs predict(xt, t), the schedule and a list of levels: Heun's method in 16 lines is
    {gain:.0f} times as exact as DDIM with 40 answers of the network each, on levels even in log-SNR
    ({loss:.1f} times worse on levels even in t). A segmenter needs forward(image) -> logits and `.config`:
    "brown is tumor" finds {three:.0%} of 3+, but {zero:.0%} of 0. A class table is a file: seven tissue
    classes are one classes.json and no line of Python.
    Exercise: with the seven classes, the recalls of the two tumor classes are 0.9 and 0.5. What is the
    subtype variance?
    Answer: {variance:.2f}, the square of half their difference, whatever the other five classes do."""
    given, answers = (FLOWER.predict, SCHEDULE, flat_noise(300, 2, 1, 1)), [10, 20, 40, 80]
    exact, curves = heun(*given, [0, *range(3, 1000, 4)]), {}
    for spacing in ("trailing", "log-snr"):
        once = [sample(*given, count, 0.0, spacing=spacing) for count in answers]
        twice = [heun(*given, spaced_timesteps(SCHEDULE, count // 2, "heun", spacing)) for count in answers]
        for name, ends in (("ddim", once), ("heun", twice)):
            curves[f"{name}, {spacing}"] = [(x - exact).square().sum(1).mean().sqrt().item() for x in ends]
    chart = plot({name: (answers, curve) for name, curve in curves.items()},
                 "error by answers of the network", "answers", (405, 250), "xy")
    network, histogram, pictures = BrownSegmenter().eval(), ProbabilityHistogram(DEFAULT_CLASSES), []
    for name, score in (("score 0", 0), ("3+", 3)):
        image, label, _ = region(score)
        prob = predict_roi(network, torch.from_numpy(image).permute(2, 0, 1))           # (256, 256)
        histogram.add(prob, label)
        pictures += [(f"a region of {name}", image), ("brown is tumor", ink(prob))]
    recall, table = histogram.report()["recall"], ClassTable.from_json(SEVEN)
    stripes = np.kron(np.arange(7), np.ones((170, 55), int))                            # (170, 385)
    seven = image_grid([[colorize(stripes, table)]], cell=390, legend=class_legend(table))
    counts = ProbabilityHistogram(table)
    for k, found in ((1, 900), (2, 500)):
        counts.add(np.repeat([0.9, 0.1], [found, 1000 - found]), np.full(1000, k))
    return [[chart, seven], pictures], {
        "gain": curves["ddim, log-snr"][2] / curves["heun, log-snr"][2], "zero": recall["0"],
        "loss": curves["heun, trailing"][2] / curves["ddim, trailing"][2], "three": recall["3+"],
        "variance": counts.report()["subtype_variance"], "curves": curves}
