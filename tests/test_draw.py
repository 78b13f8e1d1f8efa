"""Pictures: pixels stay what they are, axes are round, and no two texts of a diagram overlap."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from her2 import draw, draw_axes, draw_charts
from her2.data_classes import DEFAULT_CLASSES

WHITE = np.array([255, 255, 255])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---- files and pixels ----------------------------------------------------------------------------

def test_to_uint8_covers_the_range_and_has_no_undefined_values():
    image = torch.tensor([-1.0, 1.0, 0.0, -2.0, 3.0, math.nan]).view(1, 1, 6).expand(3, 1, 6)
    assert draw.to_uint8(image)[0, :, 1].tolist() == [0, 255, 128, 0, 255, 0]
    levels = torch.arange(256).float() / 127.5 - 1
    levels = draw.to_uint8(levels.view(1, 1, 1, 256).expand(2, 3, 1, 256))
    assert levels[1, 0, :, 2].tolist() == list(range(256))


@pytest.mark.parametrize("array, mode", [
    (np.arange(60, dtype=np.uint8).reshape(4, 5, 3), "RGB"),
    (np.arange(20, dtype=np.uint8).reshape(4, 5), "L"),
    (np.array([[0, 1], [300, 65535]], np.uint16), "I;16"),
    (np.array([[0, 1], [300, 65535]], np.int32), "I;16"),
])
def test_png_gives_back_what_was_saved(tmp_path, array, mode):
    draw.save_png(tmp_path / "deep" / "a.png", array)
    with Image.open(tmp_path / "deep" / "a.png") as image:
        assert image.mode == mode
        assert np.array_equal(np.array(image), array)


def test_a_label_map_keeps_its_ids_under_the_palette(tmp_path):
    label = np.array([[0, 1, 2], [3, 4, 5]], np.uint8)
    draw.save_png(tmp_path / "mask.png", label, palette=DEFAULT_CLASSES.colors)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P" and np.array_equal(np.array(image), label)
        assert np.array_equal(np.array(image.convert("RGB")), DEFAULT_CLASSES.colors[label])


def test_a_picture_that_cannot_be_saved_leaves_the_old_one(tmp_path):
    draw.save_png(tmp_path / "a.png", np.zeros((2, 2), np.uint8))
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(AssertionError, match="70000"):
        draw.save_png(tmp_path / "a.png", np.array([[0, 70000]]))
    with pytest.raises(AssertionError, match="float64"):
        draw.save_png(tmp_path / "a.png", np.zeros((2, 2)))
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_colorize_against_a_loop_and_refuses_unknown_ids(rng):
    label = rng.integers(0, 6, (2, 5, 7))
    colors = draw.colorize(torch.from_numpy(label), DEFAULT_CLASSES)
    for index in np.ndindex(label.shape):
        assert tuple(colors[index]) == DEFAULT_CLASSES.classes[label[index]].color
    with pytest.raises(AssertionError, match="0..6"):
        draw.colorize(np.array([[0, 6]]), DEFAULT_CLASSES)


def test_outline_against_a_loop_over_pixels(rng):
    instance = np.zeros((14, 17), np.int32)
    instance[2:9, 1:8], instance[2:9, 8:15], instance[11:, 3:9] = 1, 2, 3
    label = np.array([0, 4, 4, 2])[instance]            # instances 1 and 2 touch and have the same class
    image = rng.integers(0, 256, (14, 17, 3), dtype=np.uint8)
    drawn = draw.outline(image, label, DEFAULT_CLASSES, instance, width=1)
    for y, x in np.ndindex(label.shape):
        nearest = min(math.hypot(y - v, x - u) for v, u in np.ndindex(label.shape)
                      if instance[v, u] != instance[y, x])
        if label[y, x] and nearest <= 1:
            expected = DEFAULT_CLASSES.colors[label[y, x]]
        elif label[y, x] and nearest <= 2:
            expected = (40, 40, 40)
        else:
            expected = image[y, x]
        assert tuple(drawn[y, x]) == tuple(expected), (y, x)
    merged = draw.outline(image, label, DEFAULT_CLASSES, width=1)    # by label: one region, no rim between
    assert np.array_equal(merged[5, 7], image[5, 7]) and not np.array_equal(drawn[5, 7], image[5, 7])


def find(picture, part):
    """Top left corners at which `part` stands in `picture`, pixel for pixel."""
    height, width = part.shape[:2]
    rows, columns = np.nonzero((picture == part[0, 0]).all(axis=2))
    return [(y, x) for y, x in zip(rows, columns)
            if np.array_equal(picture[y:y + height, x:x + width], part)]


def test_grid_shows_every_image_unchanged_and_in_order(rng):
    small, wide = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((16, 16, 3), (24, 32, 3)))
    grid = draw.image_grid([[small, None, wide], [wide]], ["one", "two"], ["a", "b", "c"], "title",
                              cell=32, legend=draw.class_legend(DEFAULT_CLASSES))
    doubled = small.repeat(2, axis=0).repeat(2, axis=1)
    (first,), places = find(grid, doubled), find(grid, wide)
    assert len(places) == 2
    (upper, lower) = sorted(places)
    assert upper[1] > lower[1] and lower[0] >= first[0] + 32 and first[1] == lower[1]


def test_fit_shrinks_to_the_cell_and_keeps_the_proportions(rng):
    assert draw.fit(rng.integers(0, 256, (300, 200, 3), dtype=np.uint8), 60).shape == (60, 40, 3)
    assert draw.fit(np.full((2, 400), 7, np.uint8), 50).shape == (1, 50, 3)


# ---- axes ----------------------------------------------------------------------------------------

def test_nice_ticks_are_round_and_enclose_the_range(rng):
    for _ in range(300):
        low = rng.normal() * 10.0 ** rng.integers(-6, 7)
        high = low + abs(rng.normal()) * 10.0 ** rng.integers(-3, 7) * max(abs(low), 1e-9)
        ticks = draw_axes.nice_ticks(low, high)
        step = ticks[1] - ticks[0]
        mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-3, (low, high, ticks)
        assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= high - 1e-6 * step
        assert 2 <= len(ticks) <= 12
        low, high = draw_axes.widened(low, high)
        assert ticks[1] > low - 1e-6 * step and ticks[-2] < high + 1e-6 * step, "an empty step at an end"


def test_a_range_is_at_least_a_twenty_fifth_of_its_values():
    assert draw_axes.widened(1.0, 2.0) == (1, 2) and draw_axes.widened(0, 0) == (0, 0.04)
    assert draw_axes.widened(5.0, 5.0) == pytest.approx((4.9, 5.1))


@pytest.mark.parametrize("low, high", [(0.5, 0.5), (0, 0), (-3, -3)])
def test_nice_ticks_of_a_single_value(low, high):
    ticks = draw_axes.nice_ticks(low, high)
    assert ticks[0] <= low <= ticks[-1] and len(ticks) >= 3
    assert low < 0 or ticks[0] >= 0, "a quantity that is never negative gets no negative axis"


def test_log_ticks_enclose_and_are_round(rng):
    for _ in range(300):
        low = 10.0 ** rng.uniform(-8, 6)
        high = low * 10.0 ** rng.uniform(0, 10)
        ticks = draw_axes.log_ticks(low, high)
        assert ticks[0] <= low * 1.001 and ticks[-1] >= high * 0.999, (low, high, ticks)
        assert 2 <= len(ticks) <= 12, (low, high, ticks)
        for tick in ticks:
            mantissa = tick / 10.0 ** math.floor(math.log10(tick * 1.0001))
            assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6, (low, high, ticks)


def test_tick_texts_read_back_as_their_ticks(rng):
    for _ in range(200):
        low = rng.normal() * 10.0 ** rng.integers(-5, 6)
        ticks = draw_axes.nice_ticks(low, low + abs(low) * rng.uniform(0.01, 3))
        read = [float(t) for t in draw_axes.tick_texts(ticks)]
        assert np.allclose(read, ticks, rtol=1e-3, atol=1e-3 * (ticks[1] - ticks[0])), (ticks, read)


def test_moving_median_against_a_loop(rng):
    values = rng.normal(size=40)
    smooth = draw_axes.moving_median(values, 5)
    for i in range(40):
        assert smooth[i] == pytest.approx(np.median(values[max(0, i - 2):i + 3]))
    assert np.array_equal(draw_axes.moving_median(values, 1), values)


def test_what_cannot_be_drawn_is_left_out_of_a_curve():
    records = [{"step": i, "loss": value} for i, value in enumerate([1.0, None, math.nan, math.inf, 0.0, 2])]
    assert [one.tolist() for one in draw_axes.column(records, "loss")] == [[0, 4, 5], [1, 0, 2]]
    assert [one.tolist() for one in draw_axes.column(records, "loss", "y")] == [[0, 5], [1, 2]]
    assert [len(one) for one in draw_axes.column(records, "other")] == [0, 0]


def test_a_curve_goes_through_its_points():
    canvas = draw.Canvas(200, 100)
    axes = draw_axes.Axes(canvas, 20, 10, 190, 90, (0, 10), (0.01, 100), log="y")
    axes.curve([0, 5, 10], [0.01, 1.0, 100], draw.BLUE, 3)
    picture = canvas.array()
    for x, y in ((62, 70), (105, 50), (147, 30)):       # on the straight line in log y, between the corners
        assert np.abs(picture[y, x].astype(int) - draw.BLUE).max() < 60, (x, y)
    assert (picture[:, 1:19] == 255).all() and axes.y(1e9) == 10 and axes.y(0.0) == 90


# ---- texts of diagrams ---------------------------------------------------------------------------

class Recorder:
    """Collects where every canvas writes which text; texts of one drawing must not touch each other."""

    def __init__(self, monkeypatch):
        self.boxes, write = [], draw.Canvas.text

        def text(canvas, x, y, text, size=14, color=draw.INK, anchor="la", turned=False):
            width, height = draw.text_width(text, size), size * 1.0 * (str(text).count("\n") + 1)
            if turned:
                left, top, width, height = x - height / 2, y - width / 2, height, width
            else:
                left = x - {"l": 0, "m": width / 2, "r": width}[anchor[0]]
                top = y - {"a": 0, "m": height / 2, "d": height}[anchor[1]]
            self.boxes.append((canvas, str(text), left, top, left + width, top + height))
            write(canvas, x, y, text, size, color, anchor, turned)

        monkeypatch.setattr(draw.Canvas, "text", text)

    def texts(self):
        return [text for _, text, *_ in self.boxes]

    def check(self):
        boxes = [box for box in self.boxes if box[0].height > 1]    # height 1: a measurement, no picture
        assert boxes
        for i, (canvas, text, left, top, right, bottom) in enumerate(boxes):
            assert -1 <= left and right <= canvas.width + 1 and -1 <= top and bottom <= canvas.height + 2, \
                f"{text!r} leaves the picture"
            for other, text2, left2, top2, right2, bottom2 in boxes[:i]:
                assert canvas is not other or right <= left2 or right2 <= left or bottom <= top2 + 1 \
                    or bottom2 <= top + 1, f"{text!r} and {text2!r} overlap"


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


def records(rng, count):
    return [{"step": 10 * i, "loss": 0.2 + math.exp(-i / 50) + 0.05 * rng.normal(), "nothing": 0.69,
             "val": None, "norm": math.exp(rng.normal()), "bad": math.nan if i % 7 else 1e-9}
            for i in range(1, count)]


@pytest.mark.parametrize("count", [2, 5, 300])
def test_curves_of_short_and_long_logs(rng, recorder, tmp_path, count):
    panels = [("Loss", "loss val bad", "nothing", ""), ("Gradient", "norm", "nothing", "y"),
              ("bad", "bad", "", ""), ("", "loss norm", "", ""), ("val", "val", "", ""),
              ("never", "not_logged", "", "")]
    draw_axes.curves_png(tmp_path / "curves.png", records(rng, count), panels)
    recorder.check()
    texts = recorder.texts()
    assert texts.count("nothing 0.69") == 2 and texts.count("norm") == 1
    assert "never" not in texts and "val" not in texts
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1240, 660)


def test_an_empty_log_has_no_curves(tmp_path):
    draw_axes.curves_png(tmp_path / "curves.png", [], draw_axes.TRAINING["segmenter"])
    assert not (tmp_path / "curves.png").exists()


def study(rng, runs, missing=False):
    """Groups as the full protocol has them: two baselines, four ratios of three methods, a control."""
    def some():
        return [] if missing else list(rng.uniform(0.8, 0.85, runs))
    groups = [("tumor", [("real", some())]), ("subtype", [("real", list(rng.uniform(0.8, 0.85, runs)))])]
    groups += [(f"+{ratio} %", [(method, some()) for method in ("GAN", "diffusion", "inpainting")])
               for ratio in (50, 100, 200, 400)]
    return groups + [("reconstructed", [("reconstructed", some())])]


COLORS = dict(zip(("real", "GAN", "diffusion", "inpainting", "reconstructed"), draw.CYCLE))


@pytest.mark.parametrize("runs, missing", [(5, False), (2, False), (1, False), (5, True), (1, True)])
def test_box_plots_of_whole_studies(rng, recorder, runs, missing):
    groups = study(rng, runs, missing)
    panels = [("tumor Dice", groups, (0.83, "subtype 0.830")), ("subtype variance", groups, None)]
    draw_charts.box_plots(panels, COLORS)
    recorder.check()
    assert recorder.texts().count("n/a") == (28 if missing else 0)
    numbers = [f"{values[0]:.3f}" for _, boxes in groups for _, values in boxes if values]
    assert all(recorder.texts().count(number) >= 2 for number in numbers) == (runs == 1)


def test_tiny_differences_do_not_fill_the_frame(recorder):
    groups = [("tumor", [("real", [0.716674])]), ("subtype", [("real", [0.716679])])]
    draw_charts.box_plots([("tumor Dice", groups, None)], COLORS)
    recorder.check()
    ticks = {float(text) for text in recorder.texts() if text.startswith("0.")} - {0.717}
    assert len(ticks) > 3 and max(ticks) - min(ticks) >= 0.02


def box_picture(values):
    """The pixels of one blue box on an axis from 0 to 10, 20 pixels per unit, 0 at y = 210."""
    canvas = draw.Canvas(100, 220)
    axes = draw_axes.Axes(canvas, 0, 10, 100, 210, (0, 1), (0, 10))
    draw_charts.draw_box(axes, 50, values, draw.BLUE)
    return canvas.array()


def test_intervals_without_any_difference_stand_on_the_middle_line(recorder):
    """Two arms of one seed that agree in everything: no range to draw to, and no division by it."""
    draw_charts.intervals([("Dice", [(0.0, None, None), (0.0, 0.0, 0.0)], False),
                           ("variance", [(0.0, 0.0, 0.0), None], True)], ["arm a", "arm b"])
    recorder.check()
    assert {"0", "x 1", "n/a"} <= set(recorder.texts())


@pytest.mark.parametrize("values", [[1, 2, 4, 5, 9], [3.0, 7.0], list(np.linspace(0.5, 9.5, 40))])
def test_box_ends_at_minimum_maximum_and_quartiles(values):
    picture = box_picture(values)
    inked = np.nonzero((picture[:, :55] != 255).any(axis=(1, 2)))[0]            # right of it stands the deviation
    assert abs(inked[0] - (210 - 20 * max(values))) <= 3 and abs(inked[-1] - (210 - 20 * min(values))) <= 3
    side = (np.abs(picture[:, 35].astype(int) - draw.BLUE) < 40).all(axis=1)     # the left side of the box
    first, third = np.percentile(values, [25, 75])
    rows = np.nonzero(side)[0]
    assert abs(rows[0] - (210 - 20 * third)) <= 2 and abs(rows[-1] - (210 - 20 * first)) <= 2


def test_the_bar_beside_the_box_is_the_standard_deviation():
    values = [2.0, 4.0, 4.0, 4.0, 6.0]
    column = (box_picture(values)[:, 63] < 100).all(axis=1)
    rows = np.nonzero(column)[0]
    deviation = math.sqrt((2 ** 2 + 2 ** 2) / 4)
    assert abs(rows[0] - (210 - 20 * (4 + deviation))) <= 1.5
    assert abs(rows[-1] - (210 - 20 * (4 - deviation))) <= 1.5


def test_distribution_says_the_share_of_every_class_in_its_split(recorder):
    areas = {"train": np.array([500, 10, 20, 40, 25, 5]), "val": {0: 3, 1: 1, 2: 0, 3: 2, 4: 1, 5: 0},
             "empty": np.array([9, 0, 0, 0, 0, 0])}
    draw_charts.distribution(areas, DEFAULT_CLASSES, {"train": range(6), "val": range(6, 12), "empty": range(6)})
    recorder.check()
    texts = recorder.texts()
    shares = [text for text in texts if text[:2] == "0."]                               # row by row
    assert shares == ["0.10", "0.20", "0.40", "0.25", "0.05", "0.25", "0.00", "0.50", "0.25", "0.00"]
    assert "empty" not in texts and {"train", "val", "LCIS/DCIS"} <= set(texts)
    assert [text for text in texts if text in map(str, range(4, 12))] == list("45") + [str(n) for n in range(7, 12)]


@pytest.mark.parametrize("deviation", [None, np.full((6, 2), 0.02)])
def test_matrices_say_their_numbers(recorder, deviation):
    mean = np.array([[0.95, 0.05], [0.27, 0.73], [0.1, 0.9], [0.1, 0.9], [0.01, 0.99], [np.nan, np.nan]])
    order = [1, 2, 3, 4, 5, 0]
    found = [(title, mean[order], None if sd is None else sd[order])
             for title, sd in (("subtype (5 runs)", deviation), ("ldm-100", None))]
    picture = draw_charts.matrices(found, [DEFAULT_CLASSES.names[k] for k in order], ("background", "tumor"),
                                   ("annotation", "prediction"))
    recorder.check()
    texts = recorder.texts()
    assert texts.count("n/a") == 4 and texts.count("0.73") == 2 and texts.count("0.95") == 2
    assert texts.count("\u00b1 0.02") == (0 if deviation is None else 10)
    names = [text for text in texts if text in DEFAULT_CLASSES.names]
    assert names == [*DEFAULT_CLASSES.names[1:], "Background"] * 2
    middle = {}                         # of each text on the canvas, by what it says
    for _, text, _, top, _, bottom in recorder.boxes:
        middle.setdefault(text, []).append((top + bottom) / 2)
    for name, values in (("Background", ("0.95", "0.05")), ("0", ("0.27", "0.73")), ("3+", ("0.01", "0.99"))):
        for value in values:            # within half a row (the deviation moves it by 7 pixels)
            assert min(abs(a - b) for a in middle[name] for b in middle[value]) < 12, (name, value)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3


def test_text_outside_the_typeface_is_replaced_not_lost():
    assert draw.printable("na\u00efve \u2212 1 \u00b1 2 \u65e5") == "naive - 1 \u00b1 2 ?"
    empty = SimpleNamespace(name="x", color=(1, 2, 3), tumor=False)
    assert draw.class_legend(SimpleNamespace(classes=[empty]), tumor_only=True) == []
