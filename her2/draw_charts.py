"""The diagrams of the report: box plots (the paper's Fig. 5) and shaded tables: the shares of the subtypes
(Fig. 2), confusion matrices (Fig. 6). Intervals of many arms side by side are not in the paper.

A box plot must say what it shows with five runs, with one, and with hundreds of values:
    box, line      quartiles and median                 whiskers   minimum and maximum
    diamond, bar   mean, and mean +- standard deviation (n - 1), beside the box
    dots           the values themselves, up to a dozen

PAPER: Fig. 5 has "mean and standard deviation visualized with the boxplot" and whiskers at minimum and
maximum; whether its boxes are quartiles or the deviation is not said. Here both are drawn, side by side.
A single value is a diamond with its number; a missing one is written "n/a", it is never drawn as 0.
"""

import math

import numpy as np

from her2.draw import BLUE, GREY, INK, Canvas, text_width, tint
from her2.draw_axes import Axes, log_ticks, nice_ticks, tick_texts, widened

SLOT, GAP, HEIGHT = 46, 30, 270     # pixels for one box, between two groups of boxes, of a panel
NOTE = "box: quartiles and median, whiskers: min and max, diamond and bar: mean \u00b1 standard deviation"


def draw_box(axes, x, values, color):
    """One box at pixel `x`. See the module's docstring for what is drawn."""
    canvas, values = axes.canvas, np.sort(values)
    mean = float(values.mean())
    if len(values) == 1:
        canvas.diamond(x, axes.y(mean), fill=color)
        text = f"{mean:.3f}" if mean >= 0.1 else f"{mean:.4f}"
        half, y = text_width(text, 11) / 2 + 1, axes.y(mean) + (-20 if axes.y(mean) - 20 > axes.top else 8)
        canvas.rectangle(x - half, y, x + half, y + 12, "white")    # no line may strike the number through
        canvas.text(x, y + 6, text, 11, anchor="mm")
        return
    middle, half, deviation = x - 6, 9, float(values.std(ddof=1))
    low, first, median, third, high = map(axes.y, np.percentile(values, [0, 25, 50, 75, 100]))
    canvas.rectangle(middle - half, third, middle + half, first, tint(color, 0.25))
    for end, side in ((low, first), (high, third)):
        canvas.line([(middle, side), (middle, end)], INK, 1)
        canvas.line([(middle - half / 2, end), (middle + half / 2, end)], INK, 1)
    canvas.rectangle(middle - half, third, middle + half, first, None, color, 1.6)
    canvas.line([(middle - half, median), (middle + half, median)], INK, 2)
    for value in values if len(values) <= 12 else ():
        canvas.dot(middle, axes.y(value), 2.2, color, INK)
    canvas.line([(x + 13, axes.y(mean - deviation)), (x + 13, axes.y(mean + deviation))], INK, 1.4)
    canvas.diamond(x + 13, axes.y(mean), fill=color)


def box_plots(panels, colors) -> np.ndarray:
    """Groups of boxes along x with a name below each, one panel below the other, the legend above.
    panels   [(label of the y axis, groups, reference), ...], all with the same groups
             groups = [(name, [(series, values), ...]), ...]
             reference = (value, name) of a dashed line, (value, name, low, high, color) with a band, or None
    colors   {series: color}, the legend"""
    all_ticks = []
    for _, groups, reference in panels:
        values = [some for _, boxes in groups for _, some in boxes]
        numbers = sum(values, [value for k, value in enumerate(reference or ()) if k in (0, 2, 3)])
        # The range includes mean - sd and mean + sd: no bar is cut off.
        numbers += [np.mean(some) + sign * np.std(some, ddof=1)
                    for some in values if len(some) > 1 for sign in (-1, 1)]
        all_ticks.append(nice_ticks(min(numbers), max(numbers), 6) if numbers else [0, 1])
    wide = [max(len(boxes) * SLOT, text_width(name, 13)) for name, boxes in panels[0][1]]
    left = max(text_width(text, 13) for ticks in all_ticks for text in tick_texts(ticks)) + 48
    margin = max((text_width(ref[1], 12) for *_, ref in panels if ref), default=0) + 24
    plot = max(sum(wide) + GAP * (len(wide) + 1), text_width(NOTE, 11))
    entries, width = list(colors.items()), left + plot + margin
    top = 26 + Canvas(width, 1).legend(entries, left, 0, width - 10)
    canvas = Canvas(width, top + len(panels) * HEIGHT + 12)
    canvas.legend(entries, left, 10, width - 10)
    gap = (plot - sum(wide)) / (len(wide) + 1)
    for (label, groups, reference), ticks in zip(panels, all_ticks):
        bottom = top + HEIGHT - 50
        axes = Axes(canvas, left, top, left + plot, bottom, (0, plot), (ticks[0], ticks[-1]))
        axes.frame(ticks, label)
        if reference and len(reference) > 2:
            low, high, color = reference[2:]
            canvas.rectangle(left, axes.y(high), left + plot, axes.y(low), tint(color, 0.25))
        if reference:
            axes.note(*reference[:2])
        x = left + gap
        for (name, boxes), room in zip(groups, wide):
            canvas.text(x + room / 2, bottom + 8, name, 13, anchor="ma")
            for j, (series, values) in enumerate(boxes):
                center = x + room / 2 + (j - (len(boxes) - 1) / 2) * SLOT
                if values:
                    draw_box(axes, center, values, colors[series])
                else:
                    canvas.text(center, bottom - 6, "n/a", 12, GREY, anchor="md")
            x += room + gap
        axes.spines()
        top += HEIGHT
    canvas.text(left, canvas.height - 10, NOTE, 11, GREY, anchor="ld")
    return canvas.array()


def intervals(panels, names, width=830, row=22) -> np.ndarray:
    """One row per name, one column per panel: a mean with its interval, beside a line at "no difference".
    panels   [(title, [(mean, low or None, high or None) or None per name], are these logs of ratios?)]"""
    left, gap, top = max(text_width(name, 13) for name in names) + 22, 40, 34
    room, bottom = (width - left - gap * len(panels)) / len(panels), top + row * len(names)
    canvas = Canvas(width, bottom + 34)
    for i, name in enumerate(names):
        canvas.text(left - 12, top + row * (i + 0.5), name, 13, anchor="rm")
    for k, (title, values, ratio) in enumerate(panels):
        start = left + k * (room + gap)
        ends = [0.0, *(x for one in values if one for x in one if x is not None)]
        low, high = widened(min(ends), max(ends))
        x = Axes(canvas, start, top, start + room, bottom, (low, high), (0, 1)).x
        canvas.text(start + room / 2, 8, title, 14, anchor="ma")
        ticks = map(math.log, log_ticks(math.exp(low), math.exp(high))) if ratio else nice_ticks(low, high)
        last = -math.inf
        for tick in sorted(tick for tick in {*ticks, 0.0} if low <= tick <= high):
            color, thickness = (tint(GREY, 0.35), 1) if tick else (INK, 1.4)
            canvas.line([(x(tick), top), (x(tick), bottom)], color, thickness)
            text = f"x {math.exp(tick):.3g}" if ratio else f"{tick:+.2g}" if tick else "0"
            if x(tick) - last > 44:                     # texts must not touch
                canvas.text(x(tick), bottom + 7, text, 12, anchor="ma")
                last = x(tick)
        for i, one in enumerate(values):
            y = top + row * (i + 0.5)
            if one is None:
                canvas.text(x(0), y, "n/a", 12, GREY, anchor="mm")
            else:
                if None not in one:
                    canvas.line([(x(end), y) for end in one[1:]], BLUE, 2.2)
                canvas.dot(x(one[0]), y, 3.6, BLUE, INK)
    return canvas.array()


def distribution(areas, classes, instances=None) -> np.ndarray:
    """Fig. 2: how the annotated tumor area of each split is made up of the tumor classes.
    areas      {split: (K,) pixels per class id}; shares are of the split's tumor area
    instances  {split: (K,) counts}, optional: written under the shares"""
    splits = [split for split, area in areas.items() if sum(area[k] for k in classes.tumor_ids)]
    assert splits, f"no tumor area in {list(areas)}"
    area, count = (np.array([[one[split][k] for k in classes.tumor_ids] for split in splits], float)
                   for one in (areas, instances or areas))                                  # (splits, tumor)
    shares = area / area.sum(axis=1, keepdims=True)
    title = "shares of the tumor area" + (", number of instances" if instances else "")
    names = [classes.names[k] for k in classes.tumor_ids]
    wide = max(80, *(text_width(name, 14) + 12 for name in names))
    return matrices([(title, shares, count if instances else None)], splits, names, ("split", "subtype"),
                    cell=(wide, 52), below="{:.0f}")


def matrices(panels, row_names, column_names, axes, color=BLUE, most=1.0, cell=(108, 52),
             below="\u00b1 {:.2f}") -> np.ndarray:
    """Tables of numbers side by side, the darker the larger, in cells of (width, height) pixels.
    panels  [(title, numbers (R, C), others (R, C) or None), ...]; the others are small, below the numbers, as
            `below` says; NaN is written "n/a"
    axes    (what the rows are, what the columns are); `most` the number of full colour"""
    (wide, high), left = cell, max(text_width(name, 14) for name in row_names) + 44
    step = left + max(len(column_names) * wide + 34, *(text_width(title, 15) + 10 for title, *_ in panels))
    canvas = Canvas(step * len(panels), 88 + high * len(row_names) + 14)
    for m, (title, numbers, others) in enumerate(panels):
        x0 = m * step + left
        canvas.text(x0, 10, title, 15)
        canvas.text(x0 + wide * len(column_names) / 2, 38, axes[1], 12, GREY, anchor="ma")
        canvas.text(m * step + 14, 80 + high * len(row_names) / 2, axes[0], 12, GREY, turned=True)
        for j, name in enumerate(column_names):
            canvas.text(x0 + (j + 0.5) * wide, 76, name, min(14, wide / 6), anchor="md")
        for i, name in enumerate(row_names):
            canvas.text(x0 - 10, 80 + (i + 0.5) * high, name, 14, anchor="rm")
        for i, j in np.ndindex(len(row_names), len(column_names)):
            value, other = numbers[i][j], np.nan if others is None else others[i][j]
            amount, text, ink = 0.03 + 0.9 * value / most, f"{value:.2f}", INK
            if not np.isfinite(value):
                amount, text, ink = 0, "n/a", GREY
            elif amount >= 0.66:
                ink = (255, 255, 255)
            x, y, both = x0 + j * wide, 80 + i * high, np.isfinite(value + other)
            canvas.rectangle(x, y, x + wide, y + high, tint(color, amount), GREY, 0.8)
            canvas.text(x + wide / 2, y + high / 2 - 7 * both, text, 17, ink, "mm")
            if both:
                canvas.text(x + wide / 2, y + high / 2 + 12, below.format(other), 12, ink, "mm")
    return canvas.array()
