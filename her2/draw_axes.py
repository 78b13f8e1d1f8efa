"""Axes with round ticks, diagrams of curves and points, and the curves of a training run.

A log holds thousands of noisy losses. `curves_png` shows the moving median of each: noise is smoothed, and a
single spike does not flatten everything else. Numbers alone say little, so a panel takes a reference, drawn
as a dashed line named in the margin ("predicts nothing 0.69"): a curve that stays on it has learned nothing.
"""

import math

import numpy as np

from her2.draw import CYCLE, GREY, INK, PALE, Canvas, save_png, text_width


def widened(low, high, share=0.04) -> tuple:
    """A range of at least `share` of its values: differences in the fourth digit must not fill the frame."""
    room = max(share * max(abs(low), abs(high)) - (high - low), 0) / 2
    return (low - room, high + room) if (low, high) != (0, 0) else (0, share)


def nice_ticks(low, high, count=5) -> list:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that enclose the `widened` range."""
    assert math.isfinite(low) and math.isfinite(high) and low <= high, f"range {low} to {high}"
    low, high = widened(low, high)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low, high) -> list:
    """Logarithmic ticks that enclose [low, high]: powers of ten, over few decades 2 and 5 times them too."""
    assert 0 < low <= high, f"a logarithmic axis from {low} to {high}"
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [float(f"{m}e{e}") for e in range(first - 1, last + 2) for m in steps]
    below = max(i for i, tick in enumerate(ticks) if tick <= low * 1.0001)
    above = min(i for i, tick in enumerate(ticks) if tick >= high * 0.9999)
    return ticks[below:max(above, below + 1) + 1]


def tick_texts(ticks) -> list:
    """One text per tick, all with the same number of decimals."""
    steps = [b - a for a, b in zip(ticks, ticks[1:])]
    if max(steps) > 1.5 * min(steps):                                        # logarithmic
        return [f"{t:g}" for t in ticks]
    return [f"{t:.{max(0, -math.floor(math.log10(steps[0]) + 1e-9))}f}" for t in ticks]


class Axes:
    """A frame on a canvas. `x_range`, `y_range`: (low, high) of the data; `log`: "", "x", "y" or "xy"."""

    def __init__(self, canvas, left, top, right, bottom, x_range, y_range, log=""):
        assert left < right and top < bottom, f"no room: {left}..{right}, {top}..{bottom}"
        self.canvas, self.log = canvas, log
        self.left, self.top, self.right, self.bottom = left, top, right, bottom
        (self.x0, self.x1), (self.y0, self.y1) = x_range, y_range

    def share(self, value, axis, low, high) -> float:
        """Where between the ends of an axis a value lies, 0 to 1 when it is inside."""
        if axis in self.log:
            low, high, value = (math.log(max(v, 1e-300)) for v in (low, high, value))
        return (value - low) / (high - low)

    def x(self, value):
        return self.left + self.share(value, "x", self.x0, self.x1) * (self.right - self.left)

    def y(self, value):
        """Vertical place of a value; what lies beyond the range is put on the frame."""
        share = min(max(self.share(value, "y", self.y0, self.y1), 0.0), 1.0)
        return self.bottom - share * (self.bottom - self.top)

    def frame(self, y_ticks, y_label="", x_ticks=(), x_label=""):
        """Light lines at the vertical ticks, tick texts and labels."""
        canvas, texts = self.canvas, tick_texts(y_ticks)
        for tick, text in zip(y_ticks, texts):
            if self.y0 <= tick <= self.y1:
                canvas.line([(self.left, self.y(tick)), (self.right, self.y(tick))], PALE, 1)
                canvas.text(self.left - 7, self.y(tick), text, 13, anchor="rm")
        if y_label:
            place = self.left - 20 - max(text_width(text, 13) for text in texts)
            canvas.text(place, (self.top + self.bottom) / 2, y_label, turned=True)
        for tick, text in zip(x_ticks, tick_texts(x_ticks) if len(x_ticks) > 1 else ()):
            canvas.line([(self.x(tick), self.bottom), (self.x(tick), self.bottom + 5)], INK, 1)
            canvas.text(self.x(tick), self.bottom + 8, text, 13, anchor="ma")
        if x_label:
            canvas.text((self.left + self.right) / 2, self.bottom + 25, x_label, anchor="ma")

    def spines(self):               # last, above what is drawn
        corners = [(self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)]
        self.canvas.line(corners, INK, 1.2)

    def curve(self, xs, ys, color, width=1.5):
        """A polyline through the values that can be drawn (`drawable`); a lonely point becomes a dot."""
        points = [(self.x(x), self.y(y)) for x, y, shown in zip(xs, ys, drawable(ys, self.log)) if shown]
        if len(points) == 1:
            self.canvas.dot(*points[0], width + 0.5, color)
        else:
            self.canvas.line(points, color, width)

    def note(self, value, text):
        """A dashed line at a value, named in the right margin."""
        y = self.y(value)
        self.canvas.line([(self.left, y), (self.right, y)], GREY, 1.2, dash=(6, 4))
        self.canvas.line([(self.right, y), (self.right + 8, y)], GREY, 0.7)
        self.canvas.text(self.right + 11, y, text, 12, GREY, anchor="lm")


def plot(series, title="", x_label="", size=(268, 230), log="", x_range=None, y_range=None, note=None,
         colors=CYCLE) -> np.ndarray:
    """Curves or points over numbers, (H, W, 3) uint8.
    series   {name: (x, y) or (x, y, "dots")}; thin and not in the legend where a name begins with "_"
    log      the logarithmic axes, "", "x", "y" or "xy"
    y_range  the part to show: a curve beyond it runs along the frame
    note     (value, text): a dashed horizontal line, named in the right margin"""
    xs, ys = (np.concatenate([np.asarray(s[k], float).ravel() for s in series.values()]) for k in (0, 1))
    ys = np.append(ys[drawable(ys, log)], note[:1] if note else [])
    x_range = x_range or (xs.min(), xs.max())
    x_ticks = (log_ticks if "x" in log else nice_ticks)(*x_range)
    y_ticks = (log_ticks if "y" in log else nice_ticks)(*(y_range or (ys.min(), ys.max())))
    y_range = y_range or (y_ticks[0], y_ticks[-1])
    canvas = Canvas(*size)
    canvas.text(6, 2, title, 14)
    named = [(name, colors[i % len(colors)]) for i, name in enumerate(series)]
    entries = [entry for entry in named if entry[0][0] != "_"]
    top = canvas.legend(entries, 8, 24, size[0] - 6, 12) if len(entries) > 1 else 24
    left = max(text_width(text, 13) for text in tick_texts(y_ticks)) + 16
    margin = 20 + (text_width(note[1], 12) if note else 0)
    bottom = size[1] - (44 if x_label else 28)
    axes = Axes(canvas, left, top + 8, size[0] - margin, bottom, x_range, y_range, log)
    x_ticks = [tick for tick in x_ticks if x_range[0] <= tick <= x_range[1]]
    room = sum(text_width(text, 13) + 8 for text in tick_texts(x_ticks))
    axes.frame(y_ticks, "", x_ticks[::math.ceil(room / (axes.right - axes.left))], x_label)
    if note:
        axes.note(*note)
    for i, ((x, y, *kind), (name, color)) in enumerate(zip(series.values(), named)):
        if kind:
            for a, b in zip(x, y):
                if x_range[0] <= a <= x_range[1] and y_range[0] <= b <= y_range[1]:
                    canvas.dot(axes.x(a), axes.y(b), 2, color)
        else:       # earlier curves are wider, so that one below another still shows
            axes.curve(x, y, color, 1 if name[0] == "_" else 1.8 + 0.6 * min(len(series) - 1 - i, 3))
    axes.spines()
    return canvas.array()


def drawable(values, log) -> np.ndarray:
    """Which of them are finite, and on a logarithmic axis of y above 0 (bool)."""
    values = np.asarray(values, float)
    return np.isfinite(values) & ((values > 0) | ("y" not in log))


def moving_median(values, window) -> np.ndarray:
    """Median of `window` neighbours (fewer at the ends)."""
    half = window // 2
    padded = np.pad(np.asarray(values, float), half, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def column(records, key, log="") -> tuple:
    """(steps, values) of the records that hold a number under `key` that can be drawn."""
    pairs = np.array([(r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float))], float)
    return tuple(pairs[drawable(pairs[:, 1], log)].T) if len(pairs) else ((), ())


def curves_png(path, records, panels, size=(620, 330)) -> None:
    """The series of a log, a list of {"step": int, key: number, ...}, as panels (see TRAINING) in one or two
    columns. What has no record is left out: a series, a panel, the picture."""
    drawn = []
    for title, keys, reference, log in panels:
        found, note = {key: column(records, key, log) for key in keys.split()}, None
        curves = {key.replace("_", " "): (x, moving_median(y, min(len(y) // 30, 301)))
                  for key, (x, y) in found.items() if len(y)}
        if not curves:
            continue
        if reference:
            value = float(np.median(column(records, reference)[1]))
            note = value, f"{reference.replace('_', ' ')} {value:.3g}"
        last = max(float(x.max()) for x, _ in curves.values()) or 1.0
        drawn.append(plot(curves, title, "optimiser steps", size, log, (0, last), note=note))
    if not drawn:
        return
    columns, (width, height) = min(len(drawn), 2), size
    canvas = Canvas(columns * width, math.ceil(len(drawn) / columns) * height)
    for i, picture in enumerate(drawn):
        canvas.paste(picture, i % columns * width, i // columns * height)
    save_png(path, canvas.array())


# curves.png of each kind of training run: title, keys in the records of its log.jsonl, the key of what has
# learned nothing, and "y" where the scale is logarithmic.
TRAINING = {
    "segmenter": [("loss", "loss", "predicts_nothing", ""), ("its parts", "dice_loss cross_entropy", "", ""),
                  ("gradient norm before clipping", "grad_norm", "", "y")],
    "gan": [("adversarial: discriminator, generator", "d_loss gan", "", ""),
            ("feature matching", "features", "", ""), ("KL (weighted)", "kld", "", ""),
            ("share of saturated pixels", "saturated", "saturated_real", "")],
    "autoencoder": [("reconstruction L1", "l1", "flat_colour_l1", "y"),
                    ("PSNR of the batch (dB)", "psnr", "", ""),
                    ("adversarial: discriminator, generator", "d_loss g_loss", "", ""),
                    ("codes used over 1000 patches", "codes_used", "", "")],
    "diffusion": [("loss", "loss", "zero_output", ""),
                  ("loss by quarter of t", "loss_q1 loss_q2 loss_q3 loss_q4", "", "")]}
