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
from her2.polygons import paint
from her2.samplers import ddim_timesteps, trajectory
from her2.segmenter import predict_roi
from her2.stains import STAINS


def heun(predict, schedule, xt, timesteps):
    """Second-order sampling from xt (B, C, h, w) over the levels `timesteps`, ascending.

    With cos(phi) = sqrt(alpha_bar), eq. 1 is xt = cos(phi) x0 + sin(phi) eps, so that dxt / dphi = v. DDIM
    with eta 0 turns xt by the v at the start of a step, Heun by the mean of the v at both ends: two answers
    of the network per step. The last step ends at phi = 0, where no network answers: it stays DDIM's."""
    angle = schedule.alpha_bar.sqrt().acos()

    def slope(xt, t):
        t = torch.full((len(xt),), t, device=xt.device)
        x0, eps = schedule.x0_and_eps(predict(xt, t), xt, t)
        signal, noise = schedule.roots(t, xt)
        return signal * eps - noise * x0                        # v, whatever the network puts out

    for t, prev in zip(timesteps[:0:-1], timesteps[-2::-1]):
        v, turn = slope(xt, t), angle[prev] - angle[t]
        guess = turn.cos() * xt + turn.sin() * v                             # DDIM's step
        xt = xt + turn * (v + slope(guess, prev)) / 2
    return angle[timesteps[0]].cos() * xt - angle[timesteps[0]].sin() * slope(xt, timesteps[0])


class BrownSegmenter(nn.Module):
    """image (B, 3, H, W) in [-1, 1] -> logits (B, 2, H, W): tumor is what holds more DAB than `threshold`."""

    def __init__(self, num_classes: int = 2, threshold: float = 0.15, slope: float = 20.0):
        super().__init__()
        self.config = dict(num_classes=num_classes, threshold=threshold, slope=slope)    # what model.pt keeps
        self.register_buffer("dab", torch.tensor(np.linalg.inv(STAINS)[:, 1], dtype=torch.float32))
        self.scale = nn.Parameter(torch.tensor([slope, threshold]))         # so that it can be trained

    def forward(self, image):
        density = -torch.log10(((image + 1) / 2).clamp(min=1 / 510))         # (B, 3, H, W)
        amount = torch.einsum("bchw,c->bhw", density, self.dab)             # (B, H, W)
        tumor = self.scale[0] * (amount - self.scale[1])
        return torch.stack([torch.zeros_like(tumor), tumor], dim=1)


NAMES = {"Other": "#ffffff", "Invasive tumor": "#d62728", "In situ tumor": "#f0c814",
         "Normal gland": "#17becf", "Lymphocytes": "#6a51a3", "Necrosis": "#7f7f7f", "Fat": "#c7e9c0"}
SEVEN = [{"id": k, "name": name, "tumor": k in (1, 2), "variance": k in (1, 2), "color": color}
         for k, (name, color) in enumerate(NAMES.items())]      # what classes.json holds


def forks():
    """A sampler needs predict(xt, t), the schedule and a list of levels: Heun's method in 12 lines is
    {gain:.0f} times as exact as DDIM with 40 answers of the network each, on levels that are dense near the
    image ({loss:.1f} times worse on even ones). A segmenter needs forward(image) -> logits and `.config`:
    "brown is tumor" finds {three:.0%} of 3+, but {zero:.0%} of 0. A class table is a file: seven tissue
    classes are one classes.json and no line of Python.
    Exercise: with the seven classes, the recalls of the two tumor classes are 0.9 and 0.5. What is the
    subtype variance?
    Answer: {variance:.2f}, the square of half their difference, whatever the other five classes do."""
    noise, answers = flat_noise(300, 2, 1, 1), [10, 20, 40, 80]

    def ddim(predict, schedule, xt, timesteps):
        *_, (xt, _) = trajectory(predict, schedule, noise, timesteps, 0.0)
        return xt

    def end(method, timesteps):
        return method(FLOWER.predict, SCHEDULE, noise("start", 0), timesteps)

    def dense(T, S):                # levels that lie the closer the less noise they have
        return sorted({round((T - 1) * (k / S) ** 2) for k in range(1, S + 1)})

    exact, curves = end(heun, [0, *range(3, 1000, 4)]), {}
    for name, levels in (("even levels", ddim_timesteps), ("dense near 0", dense)):
        for method, per_step in ((ddim, 1), (heun, 2)):
            off = [end(method, levels(1000, count // per_step)) - exact for count in answers]
            curves[f"{method.__name__}, {name}"] = [one.square().sum(1).mean().sqrt().item() for one in off]
    chart = plot({name: (answers, curve) for name, curve in curves.items()},
                 "error by answers of the network", "answers", (405, 250), "xy")
    network, histogram, pictures = BrownSegmenter().eval(), ProbabilityHistogram(DEFAULT_CLASSES), []
    for name, score in (("score 0", 0), ("3+", 3)):
        image, label, _ = region(score)
        prob = predict_roi(network, torch.from_numpy(image).permute(2, 0, 1))           # (256, 256)
        histogram.add(prob, label)
        pictures += [(f"a region of {name}", image), ("brown is tumor", ink(prob))]
    recall, table = histogram.report()["recall"], ClassTable.from_json(SEVEN)
    rings = [[np.array([[x, 20], [x + 100, 50], [x + 70, 150], [x + 10, 140]])] for x in range(10, 400, 65)]
    seven, _ = paint(rings, range(1, 7), 170, 390)
    seven = image_grid([[colorize(seven, table)]], cell=390, legend=class_legend(table))
    counts = ProbabilityHistogram(table)
    for k, found in ((1, 900), (2, 500)):
        counts.add(np.repeat([0.9, 0.1], [found, 1000 - found]), np.full(1000, k))
    return [[chart, seven], pictures], [], {
        "gain": curves["ddim, dense near 0"][2] / curves["heun, dense near 0"][2], "zero": recall["0"],
        "loss": curves["heun, even levels"][2] / curves["ddim, even levels"][2], "three": recall["3+"],
        "variance": counts.report()["subtype_variance"], "curves": curves}
