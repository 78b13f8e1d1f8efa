"""The diagrams of the report: box plots (the paper's Fig. 5), shares (Fig. 2), confusion matrices (Fig. 6).
Intervals of many arms side by side are not in the paper.

A box plot must say what it shows with five runs, with one, and with hundreds of values:

    box, line      quartiles and median                 whiskers   minimum and maximum
    diamond, bar   mean, and mean +- standard deviation (n - 1), beside the box
    dots           the values themselves: each one up to a dozen, a sample of them beyond

PAPER: Fig. 5 has "mean and standard deviation visualized with the boxplot" and whiskers at minimum and
maximum; whether its boxes are quartiles or the deviation is not said. Here both are drawn, side by side.
A single value is a diamond with its number; a missing one is written "n/a", it is never drawn as 0.
"""

import math

import numpy as np

from her2.draw import BLUE, CYCLE, GREY, INK, Canvas, text_width, tint
from her2.draw_axes import Axes, log_ticks, nice_ticks, tick_texts

SLOT, GAP = 46, 30          # pixels for one box, and between two groups of boxes
NOTE = "box: quartiles and median, whiskers: min and max, diamond and bar: mean \u00b1 standard deviation"


def draw_box(axes, x, values, color, with_mean=True):
    """One box at pixel `x`; `values` without None. See the module's docstring for what is drawn."""
    canvas, values = axes.canvas, np.sort(np.asarray(values, float))
    mean = float(values.mean())
    if len(values) == 1:
        canvas.diamond(x, axes.y(mean), fill=color)
        text = f"{mean:.3f}" if mean >= 0.1 else f"{mean:.4f}"
        half, y = text_width(text, 11) / 2 + 1, axes.y(mean) + (-20 if axes.y(mean) - 20 > axes.top else 8)
        canvas.rectangle(x - half, y, x + half, y + 12, "white")    # no line may strike the number through
        canvas.text(x, y + 6, text, 11, anchor="mm")
        return
    middle, half = (x - 6, 9) if with_mean else (x, 12)
    low, first, median, third, high = np.percentile(values, [0, 25, 50, 75, 100])
    canvas.rectangle(middle - half, axes.y(third), middle + half, axes.y(first), tint(color, 0.25))
    if len(values) > 12:
        shown = values[np.linspace(0, len(values) - 1, min(len(values), 150)).round().astype(int)]
        for i, value in enumerate(shown):       # golden-ratio spread: even, and the same in every run
            offset = ((i * 0.618034) % 1 - 0.5) * 1.7 * half
            canvas.dot(middle + offset, axes.y(value), 1.2, tint(color, 0.6))
    for end, side in ((low, first), (high, third)):
        canvas.line([(middle, axes.y(side)), (middle, axes.y(end))], INK, 1)
        canvas.line([(middle - half / 2, axes.y(end)), (middle + half / 2, axes.y(end))], INK, 1)
    canvas.rectangle(middle - half, axes.y(third), middle + half, axes.y(first), None, color, 1.6)
    canvas.line([(middle - half, axes.y(median)), (middle + half, axes.y(median))], INK, 2)
    if len(values) <= 12:
        for value in values:
            canvas.dot(middle, axes.y(value), 2.2, color, INK)
    if with_mean:
        deviation = float(values.std(ddof=1))
        canvas.line([(x + 13, axes.y(mean - deviation)), (x + 13, axes.y(mean + deviation))], INK, 1.4)
        canvas.diamond(x + 13, axes.y(mean), fill=color)


def deviation_ends(values) -> list:
    """[mean - sd, mean + sd], empty below two values: a range that includes them cuts no bar off."""
    if len(values) < 2:
        return []
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    return [mean - deviation, mean + deviation]


def widened(low, high, share=0.04) -> tuple:
    """A range of at least `share` of its values: differences in the fourth digit must not fill the frame."""
    room = max(share * max(abs(low), abs(high)) - (high - low), 0) / 2
    return low - room, high + room


def box_plots(panels, colors, note=NOTE, with_mean=True, height=270) -> np.ndarray:
    """Box plots in groups, one panel below the other, all with the same groups.

    panels   [(label of the y axis, groups, reference), ...]
             groups = [(name, [(series, values), ...]), ...]; values a list of numbers, None = not available
             reference = (value, name) of a dashed line, or (value, name, low, high, color) with a band, or
             None
    colors   {series: color}, the legend
    """
    names = [name for name, _ in panels[0][1]]
    sizes = [len(boxes) * SLOT for _, boxes in panels[0][1]]
    wide = [max(size, text_width(name, 13)) for size, name in zip(sizes, names)]
    prepared = []
    for label, groups, reference in panels:
        groups = [(name, [(series, [v for v in values if v is not None]) for series, values in boxes])
                  for name, boxes in groups]
        numbers = [v for _, boxes in groups for _, values in boxes for v in values + deviation_ends(values)]
        numbers += [value for k, value in enumerate(reference or ()) if k in (0, 2, 3)]
        ticks = nice_ticks(*widened(min(numbers), max(numbers)), 6) if numbers else [0, 1]
        prepared.append((label, groups, reference, ticks))
    left = max(text_width(text, 13) for *_, ticks in prepared for text in tick_texts(ticks)) + 48
    margin = max((text_width(ref[1], 12) for _, _, ref, _ in prepared if ref), default=0) + 24
    plot = max(sum(wide) + GAP * (len(wide) + 1), 300, text_width(note, 11))
    width = left + plot + margin
    legend_height = Canvas(width, 1).legend(list(colors.items()), left, 0, width - 10, marker="box")
    canvas = Canvas(width, 10 + legend_height + len(panels) * height + 28)
    canvas.legend(list(colors.items()), left, 10, width - 10, marker="box")
    gap = (plot - sum(wide)) / (len(wide) + 1)
    for i, (label, groups, reference, ticks) in enumerate(prepared):
        top = 10 + legend_height + i * height + 16
        axes = Axes(canvas, left, top, left + plot, top + height - 50, (0, plot), (ticks[0], ticks[-1]))
        axes.frame(ticks, label)
        if reference:
            if len(reference) > 2:
                low, high, color = reference[2:]
                canvas.rectangle(left, axes.y(high), left + plot, axes.y(low), tint(color, 0.25))
            axes.margin_notes([reference[:2]])
        x = left + gap
        for (name, boxes), room in zip(groups, wide):
            canvas.text(x + room / 2, axes.bottom + 8, name, 13, anchor="ma")
            for j, (series, values) in enumerate(boxes):
                center = x + room / 2 + (j - (len(boxes) - 1) / 2) * SLOT
                if values:
                    draw_box(axes, center, values, colors[series], with_mean)
                else:
                    canvas.text(center, axes.bottom - 6, "n/a", 12, GREY, anchor="md")
            x += room + gap
        axes.spines()
    canvas.text(left, canvas.height - 10, note, 11, GREY, anchor="ld")
    return canvas.array()


def intervals(panels, names, width=830, row=22) -> np.ndarray:
    """One row per name, one column per panel: a mean with its interval, beside a line at "no difference".

    panels   [(title, [(mean, low, high) or None per name], ratio)]; low and high may be None; ratio: whether
             these are logarithms of ratios
    """
    left = max(text_width(name, 13) for name in names) + 22
    gap, top = 40, 34
    room = (width - left - gap * len(panels)) / len(panels)
    canvas = Canvas(width, top + row * len(names) + 34)
    bottom = top + row * len(names)
    for i, name in enumerate(names):
        canvas.text(left - 12, top + row * (i + 0.5), name, 13, anchor="rm")
    for k, (title, values, ratio) in enumerate(panels):
        start = left + k * (room + gap)
        low, high = widened(*(f([0.0, *(x for one in values if one for x in one if x is not None)])
                              for f in (min, max)))

        def x(value):
            return start + (value - low) / (high - low) * room

        canvas.text(start + room / 2, 8, title, 14, anchor="ma")
        ticks, last = nice_ticks(low, high), -math.inf
        if ratio:
            ticks = [math.log(tick) for tick in log_ticks(math.exp(low), math.exp(high))]
        for tick in sorted(tick for tick in {*ticks, 0.0} if low <= tick <= high):
            canvas.line([(x(tick), top), (x(tick), bottom)], INK if tick == 0 else tint(GREY, 0.35),
                        1.4 if tick == 0 else 1)
            text = f"x {math.exp(tick):.3g}" if ratio else f"{tick:+.2g}" if tick else "0"
            if x(tick) - last > 44:                     # texts must not touch
                canvas.text(x(tick), bottom + 7, text, 12, anchor="ma")
                last = x(tick)
        for i, one in enumerate(values):
            y = top + row * (i + 0.5)
            if one is None:
                canvas.text(x(0), y, "n/a", 12, GREY, anchor="mm")
                continue
            mean, *ends = one
            if None not in ends:
                canvas.line([(x(ends[0]), y), (x(ends[1]), y)], BLUE, 2.2)
            canvas.dot(x(mean), y, 3.6, BLUE, INK)
    return canvas.array()


def distribution(areas, classes, instances=None) -> np.ndarray:
    """Fig. 2: how the annotated tumor area of each split is made up of the subtypes.

    areas      {split: (K,) pixels per class id}; shares are of the split's tumor area
    instances  {split: (K,) counts}, optional: written under the shares
    """
    tumor = classes.tumor_ids
    splits = [split for split in areas if sum(areas[split][i] for i in tumor) > 0]
    assert splits, f"no tumor area in {list(areas)}"
    shares = {split: np.array([areas[split][i] for i in tumor], float) for split in splits}
    shares = {split: 100 * area / area.sum() for split, area in shares.items()}
    ticks = nice_ticks(0, min(max(share.max() for share in shares.values()) * 1.08, 100))
    bar = 40
    group = max(len(splits) * bar, *(text_width(classes.names[i], 14) for i in tumor)) + 34
    left, width = 74, 74 + group * len(tumor) + 20
    colors = dict(zip(splits, [BLUE, CYCLE[4], CYCLE[2], CYCLE[3], CYCLE[1]]))
    entries = [(split, colors[split]) for split in splits]
    upper = Canvas(width, 1).legend(entries, left, 10, width - 10, marker="box")
    canvas = Canvas(width, upper + 300 + (16 * len(splits) + 10 if instances else 0))
    canvas.legend(entries, left, 10, width - 10, marker="box")
    axes = Axes(canvas, left, upper + 14, width - 14, upper + 264, (0, 1), (0, ticks[-1]))
    axes.frame(ticks, "share of the tumor area [%]")
    for i, class_id in enumerate(tumor):
        middle = left + group * (i + 0.5)
        for j, split in enumerate(splits):
            share, x = shares[split][i], middle + (j - len(splits) / 2) * bar
            if share > 0:
                canvas.rectangle(x + 3, axes.y(share), x + bar - 3, axes.bottom, tint(colors[split], 0.75))
            text = f"{share:.0f}" if share >= 9.5 or share == 0 else f"{share:.1f}"
            canvas.text(x + bar / 2, axes.y(share) - 3, text, 12, anchor="md")
        canvas.text(middle, axes.bottom + 8, classes.names[class_id], 14, anchor="ma")
        for j, split in enumerate(splits if instances else ()):
            text = f"{split}: {int(instances[split][class_id])}"
            canvas.text(middle, axes.bottom + 34 + 16 * j, text, 11, GREY, anchor="ma")
    if instances:
        canvas.text(left - 12, axes.bottom + 34, "instances", 11, GREY, anchor="ra")
    axes.spines()
    return canvas.array()


def confusion_matrices(matrices, classes) -> np.ndarray:
    """Fig. 6: matrices side by side, rows = annotated subtypes and background, columns = prediction.

    matrices  [(title, mean (K, 2), deviation (K, 2) or None), ...]; rows by class id, each normalised to 1;
              columns background, tumor; a row of NaN (class absent from the split) is written "n/a"
    """
    order = [*classes.tumor_ids, *(i for i in range(len(classes)) if i not in classes.tumor_ids)]
    cell, row, size = 108, 52, 14
    left = max(text_width(classes.names[i], size) for i in order) + 44
    wide = max(left + 2 * cell + 34, *(text_width(title, 15) + left + 10 for title, *_ in matrices))
    canvas = Canvas(wide * len(matrices), 88 + row * len(order) + 14)
    for m, (title, mean, deviation) in enumerate(matrices):
        x0, mean = m * wide + left, np.asarray(mean, float)
        assert mean.shape == (len(classes), 2), f"confusion of shape {mean.shape} for {len(classes)} classes"
        canvas.text(x0, 10, title, 15)
        canvas.text(x0 + cell, 38, "prediction", 12, GREY, anchor="ma")
        canvas.text(m * wide + 14, 80 + row * len(order) / 2, "annotation", 12, GREY, turned=True)
        for j, name in enumerate(("background", "tumor")):
            canvas.text(x0 + (j + 0.5) * cell, 76, name, size, anchor="md")
        for i, class_id in enumerate(order):
            y = 80 + i * row
            canvas.text(x0 - 10, y + row / 2, classes.names[class_id], size, anchor="rm")
            for j in range(2):
                value, x = mean[class_id, j], x0 + j * cell
                if not np.isfinite(value):
                    canvas.rectangle(x, y, x + cell, y + row, "white", GREY, 0.8)
                    canvas.text(x + cell / 2, y + row / 2, "n/a", 15, GREY, anchor="mm")
                    continue
                canvas.rectangle(x, y, x + cell, y + row, tint(BLUE, 0.03 + 0.9 * value), GREY, 0.8)
                ink = (255, 255, 255) if value > 0.7 else INK
                middle, spread = y + row / 2, np.nan if deviation is None else deviation[class_id][j]
                if np.isfinite(spread):
                    canvas.text(x + cell / 2, middle + 12, f"\u00b1 {spread:.2f}", 12, ink, "mm")
                    middle -= 7
                canvas.text(x + cell / 2, middle, f"{value:.2f}", 17, ink, "mm")
    return canvas.array()
