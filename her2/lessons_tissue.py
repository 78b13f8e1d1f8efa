"""Lessons of Saturday morning: tissue, stains, labels and what a network gets to see of them (see `lessons`)."""

import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from her2.data_classes import DEFAULT_CLASSES as CLASSES
from her2.data_folder import Dataset
from her2.data_patches import PatchSampler
from her2.data_slides import ROI
from her2.draw import (BLUE, GREY, INK, ORANGE, PALE, VERMILION, Canvas, colorize, fit, outline, save_png, tint,
                       to_uint8)
from her2.draw_axes import Axes, nice_ticks
from her2.draw_charts import draw_box, plot, sheet
from her2.phantom import IN_SITU_CLASS, PRESETS, SUBTYPE_CLASS, scene_of
from her2.phantom_microscope import render
from her2.phantom_tissue import draw_style, lay_out
from her2.polygons import connected_components, paint, rasterize
from her2.relabel import relabel
from her2.run_seeds import generator, numpy_generator
from her2.stains import STAINS, compose, deconvolve, optical_density, stain_jitter, white_point


@lru_cache(maxsize=None)
def region(score: int, roi: int = 0):
    """A phantom region of 256 x 256 um at 1 um: image (256, 256, 3), label, instance, all numpy."""
    scene, found = scene_of(PRESETS["tiny"], 0, score, roi)
    label, instance = paint([[ring] for _, ring in found], [c for c, _ in found], 256, 256)
    return render(scene, 1.0, 256, (0, score, roi)), label, instance


def specimens(kind: str, subtype: int, count: int):
    """Yields `count` (image (192, 192, 3) at 0.5 um, inside (192, 192) bool), each around a site of `kind`."""
    # One slide for all, with little unspecific brown: the differences are those between the classes.
    style = replace(draw_style(numpy_generator("lesson", "style")), noise=0.004, breath=0.05)
    size, share = (256, 0.02) if kind == "acinus" else (96, 0.3)        # um; lobules want room
    attempt, axis = 0, np.arange(2 * size) / 2
    while count:
        rng, attempt = numpy_generator("lesson", kind, subtype, attempt), attempt + 1
        scene = lay_out(style, np.eye(4)[subtype], share, size, rng, first=subtype, duct=kind == "dcis")
        middle = np.abs([(s.x - size / 2, s.y - size / 2) for s in scene.sites]).max(axis=1)
        sites = [s for s, away in zip(scene.sites, middle) if s.kind == kind and away < size / 2 - 18]
        if sites and (kind == "dcis" or not any(s.kind == "dcis" for s in scene.sites)):
            left, top = (int(2 * np.clip(c - 48, 0, size - 96)) for c in (sites[0].x, sites[0].y))
            window = slice(top, top + 192), slice(left, left + 192)
            inside = np.min([s.star.distance(axis[None], axis[:, None]) for s in sites], axis=0) < 0
            count -= 1
            yield render(scene, 0.5, 2 * size, (kind, attempt))[window], inside[window]


NAMES = ["HER2 0", "HER2 1+", "HER2 2+", "HER2 3+", "LCIS/DCIS (in situ)", "lobule (background)"]


def phantom(answer: bool):
    """The score says how brown the membranes of invasive tumor cells are: not at all (0), faint and broken (1+),
    whole but moderate (2+), strong (3+); the dye DAB is brown, haematoxylin colours every nucleus blue. Tumor
    that still lies inside its duct (in situ, LCIS/DCIS) is tumor without a score, and a lobule, a group of
    normal glands, is background. One annotated nest is an instance: the unit that gets a new score later.

    Exercise: why is 0 the hard one? Look for what tells it from the lobule, then from 3+.

    Answer: brown tells 3+ from a lobule at a glance, and 0 not at all: mean DAB density is {lobule:.2f} in lobules,
    {zero:.2f} in nests of score 0 and {three:.2f} in 3+. Amount of dye alone, cut at the best threshold, is right
    for {right_three:.0%} of 3+ against lobules and {right_zero:.0%} of 0 (50 % is a guess): what is left are
    shape and size of the nests and their nuclei, and few examples, since 0 is also the rarest.
    """
    kinds = [("tumor", 0), ("tumor", 1), ("tumor", 2), ("tumor", 3), ("dcis", 2), ("acinus", 0)]
    found = [list(specimens(*kind, 6)) for kind in kinds]
    density = [[deconvolve(image, white_point(image))[1][inside].mean() for image, inside in one] for one in found]
    pictures = [(name, one[0][0]) for name, one in zip(NAMES, found)]
    canvas = Canvas(405, 200)
    ticks = nice_ticks(0, max(map(max, density)))
    axes = Axes(canvas, 60, 8, 400, 172, (0, 6), (ticks[0], ticks[-1]))
    axes.frame(ticks, "mean DAB density")
    for k, (values, name) in enumerate(zip(density, ("0", "1+", "2+", "3+", "in situ", "lobule"))):
        draw_box(axes, axes.x(k + 0.5), values, [*map(tuple, CLASSES.colors[1:].tolist()), GREY][k], False)
        canvas.text(axes.x(k + 0.5), 178, name, 13, anchor="ma")

    def accuracy(k):        # of the best threshold on the density between class k and the lobules
        a, b = np.array(density[k]), np.array(density[5])
        return max(((a >= t).mean() + (b < t).mean()) / 2 for t in [*a, *b])

    figure = sheet([pictures[:4], pictures[4:] + [("six of each", canvas.array())]])
    return figure, {"zero": np.mean(density[0]), "lobule": np.mean(density[5]), "three": np.mean(density[3]),
                    "right_zero": accuracy(0), "right_three": accuracy(3), "density": density}
