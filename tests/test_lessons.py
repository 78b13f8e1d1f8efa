"""Lessons: each is drawn once, and the numbers behind its sentences are checked against what must hold."""

import inspect
import math
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_factory import memory_dataset
from her2 import lessons, lessons_forks, run, samplers
from her2.data_classes import DEFAULT_CLASSES, load_classes
from her2.data_patches import PatchSampler
from her2.diffusion import Schedule
from her2.lessons_diffusion import FLOWER, SCHEDULE, Mixture, flat_noise
from her2.losses import soft_dice_loss
from her2.metrics import ProbabilityHistogram
from her2.run_errors import UserError
from her2.run_seeds import numpy_generator
from her2.samplers import sample
from her2.segmenter import predict_roi

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@lru_cache(maxsize=None)
def drawn(name):
    return lessons.LESSONS[name]()


def numbers(name):
    return drawn(name)[1]


@pytest.mark.parametrize("name", lessons.LESSONS)
def test_figure_and_texts(name):
    rows, found = drawn(name)
    figure = lessons.sheet(rows)
    assert figure.dtype == np.uint8 and figure.shape[1:] == (830, 3) and len(figure) > 100
    text, exercise, answer = lessons.texts(name, found)
    assert exercise.startswith("Exercise: ") and answer.startswith("Answer: ")
    assert not set("{}") & set(text + exercise + answer) and "nan" not in text + answer
    assert len(re.findall(r"[.?!](?: |$)", text)) == 3, text


def test_list_and_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lessons.main([])
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name} +{file}$", listed, re.M) and (ROOT / file).exists()
               for name, file in lessons.FILES.items()) and set(lessons.FILES) == set(lessons.LESSONS)
    lessons.main(["seeds", "--answer"])
    printed = capsys.readouterr().out
    assert "Exercise:" in printed and "Answer:" in printed and Path("runs/lesson_seeds.png").exists()
    lessons.main(["seeds"])
    assert "Answer:" not in capsys.readouterr().out
    for bad in (["sedes"], ["seeds", "--anser"]):
        with pytest.raises(UserError):
            lessons.main(bad)


def test_readme_has_the_lessons_in_their_order_at_different_times():
    rows = re.findall(r"^\| (S\w+day) (\d+):(\d+) \| ([^|]+) \|", README, re.MULTILINE)
    told = [re.findall(r"`([^`]+)`(?: \(`(\S+)`\))? (\d+)", words) for *_, words in rows]
    named = [(name, f"her2/{stem or name}.py") for session in told for name, stem, _ in session
             if not name.endswith(".py")]
    assert named == list(lessons.FILES.items())
    clock = [(day, int(hour) * 60 + int(minute), sum(int(number) for *_, number in session))
             for (day, hour, minute, _), session in zip(rows, told)]
    for (day, start, minutes), (later, then, _) in zip(clock, clock[1:]):
        assert day != later or start + minutes <= then, "two sessions at once"


# ---- tissue --------------------------------------------------------------------------------------

def test_phantom_brown_rises_with_the_score_and_lobules_lie_beside_0():
    means = numbers("phantom")["dab"]
    assert means[0] < means[1] < means[2] < means[3]
    assert abs(means[5] - means[0]) < 0.1 * (means[3] - means[0])


def test_relabel_shares_are_those_of_the_draw_within_their_spread():
    found = numbers("relabel")
    assert abs(found["shares"] - 1 / 5).max() < 4 * found["spread"]
    assert abs(found["two"] - 1 / 2).max() < 4 * found["spread_two"]
    assert found["two"].sum() == pytest.approx(1) and 0.001 < found["spread"] < 0.1
    assert 1 < found["components"] < found["instances"]


def test_stains_jitter_in_density_keeps_the_two_dyes():
    found = numbers("stains")
    assert found["density"] < 1.3 * found["residual"] + 0.003       # 0.003: rounding to 8 bits, clipping
    assert found["rgb"] > 3 * found["residual"]
    # Scaling amounts by 0.7 .. 1.3 turns the density of glass, log10(255 / 220), by at most that.
    assert 255 * (220 / 255) ** 1.6 < found["low"] < 219 and 221 < found["high"] < 255 * (220 / 255) ** 0.4
    assert found["mended"] == 220


def test_polygons_against_winding_numbers_and_half_planes():
    found = numbers("polygons")
    assert np.array_equal(found["winding"] % 2 == 1, found["inside"])
    assert found["added"] == (abs(found["winding"]) == 2).sum() > 0
    first, second = found["pixels"]
    assert not (first & second).any()
    y, x = np.mgrid[:12, :12] + 0.5
    turns = [np.min([(b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])
                     for a, b in zip(ring, np.roll(ring, -1, axis=0))], axis=0) for ring in found["both"]]
    least = np.max(turns, axis=0)       # convex: positive inside, 0 on an edge, where sides take turns
    assert (first | second)[least > 0].all() and not (first | second)[least < 0].any()


def test_patches_are_drawn_as_named(tmp_path):
    found, spread, shares = numbers("patches"), 4 * math.sqrt(0.25 / 2000), {}
    dataset = memory_dataset(tmp_path, [(np.zeros((256, 256, 3), np.uint8), found["label"])], DEFAULT_CLASSES)
    for mode in ("tumor", "subtype", "uniform"):    # a patch of one pixel is the pixel that was drawn
        sampler = PatchSampler(dataset, "train", 1, mode, cache=tmp_path / "cache")
        drawn = np.array([sampler.place(numpy_generator("place", k))[1:] for k in range(2000)])
        shares[mode] = np.bincount(found["label"][tuple(drawn.T)], minlength=6) / 2000
    assert abs(shares["tumor"] - found["area"]).max() < spread
    assert abs(shares["subtype"][1:] - 1 / 5).max() < spread
    assert shares["subtype"][0] == shares["tumor"][0] == 0
    assert abs(shares["uniform"][1:] / shares["uniform"][1:].sum() - found["area"][1:]).max() < 0.1
    assert found["never"] > 0.1 and found["never_uniform"] < 0.03
    assert found["root"] @ found["root"] < found["area"] @ found["area"]    # nearer to equal shares


# ---- diffusion -----------------------------------------------------------------------------------

def test_diffusion_halves_where_the_tables_say():
    found = numbers("diffusion")
    alpha_bar = np.cumprod(1 - np.linspace(0.0015 ** 0.5, 0.0205 ** 0.5, 1000) ** 2)
    assert found["factor"] == pytest.approx(math.sqrt(1 / alpha_bar[-1] - 1), rel=1e-6)
    assert found["half"][0] == (alpha_bar < 0.5).argmax()
    assert abs(found["half"][2] - (1000 * (1.008 / 2 - 0.008) - 1)) <= 1      # cos^2 = 1 / 2 at pi / 4


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule()])
def test_the_exact_denoiser_against_an_average_over_the_law(schedule):
    """E[x0 | xt] by brute force: many x0 of the mixture, weighted by how well they explain xt."""
    law = Mixture([(1.0, 0.0), (-0.5, 0.8)], 0.3, schedule)
    rng = np.random.default_rng(0)
    x0 = law.means.numpy()[rng.integers(2, size=400_000)] + 0.3 * rng.normal(size=(400_000, 2))
    t, xt = 400, torch.tensor([0.4, -0.2], dtype=torch.float64).view(1, 2, 1, 1)
    ab = schedule.alpha_bar[t].item()
    weight = np.exp(-((xt.flatten().numpy() - math.sqrt(ab) * x0) ** 2).sum(1) / (2 * (1 - ab)))
    expected = (weight[:, None] * x0).sum(0) / weight.sum()
    found, _ = schedule.x0_and_eps(law.predict(xt, torch.tensor([t])), xt, torch.tensor([t]))
    assert found.flatten().numpy() == pytest.approx(expected, abs=0.01)


def test_samplers_first_order_and_the_law_in_the_end():
    found = numbers("samplers")
    assert 0.8 < found["order"] < 1.2 and found["apart"] > 10 * found["close"]
    away = np.linalg.norm(found["ends"][:, None] - FLOWER.means.numpy(), axis=-1)
    share = np.bincount(away.argmin(1), minlength=5) / len(away)
    assert abs(share - 1 / 5).max() < 4 * math.sqrt(0.16 / len(away))
    assert math.sqrt((away.min(1) ** 2).mean() / 2) == pytest.approx(FLOWER.std, rel=0.2)


def test_inpainting_keeps_what_is_outside():
    found = numbers("inpainting")
    assert found["outside"] == 0
    loops = found["repaint"][0].unflatten(0, (64, 4)).unflatten(2, (64, 4)).any(3).any(1)
    assert torch.equal(found["touched"][0, 0], loops) and (found["cells"] & ~found["touched"]).any()
    assert found["after"] == pytest.approx(found["predicted"], rel=0.03) and found["before"] < found["after"]


def test_denoiser_guidance_moves_away_and_narrows():
    found = numbers("denoiser")
    assert found["radius"][0] == pytest.approx(1.5, abs=0.05)
    assert sorted(found["radius"]) == found["radius"] and sorted(found["spread"])[::-1] == found["spread"]
    inner = found["time"].T @ found["time"]                         # cos(a - b), summed over the waves
    assert torch.allclose(inner[:-9, :-9], inner[9:, 9:], atol=2e-3)
    means = found["onehot"].unflatten(2, (16, 8)).unflatten(4, (16, 8)).mean((3, 5))
    assert torch.allclose(found["shares"], means, atol=1e-6)


# ---- networks ------------------------------------------------------------------------------------

def test_quantizer_beta_adam_and_dead_codes():
    found = numbers("quantizer")
    assert found["rest"] == pytest.approx([beta / (1 + beta) for beta in (0.05, 0.25, 4)], abs=1e-3)
    assert found["slow"]["SGD"] == pytest.approx(4, rel=1e-3)
    assert found["slow"]["Adam"] == pytest.approx(1, rel=1e-3)
    assert found["used"][0] < found["used"][1] <= 16


def test_autoencoder_receptive_field_by_the_rule():
    field, jump = 3, 1                                              # conv_in
    for level in range(3):
        field += 4 * 2 * jump                                       # two blocks of two 3x3
        if level < 2:
            field, jump = field + 2 * jump, 2 * jump                # halving
    field += 4 * 2 * jump + 2 * jump                                # middle blocks, conv_out
    found = numbers("autoencoder")
    assert found["sees"] == field and 0.01 < found["far"] < 0.5
    assert found["maps"][1].min() > 0 and found["maps"][0].min() == 0


def test_spade_keeps_the_class_that_normalisation_washes_out():
    found = numbers("spade")
    assert found["washed"] < 1e-4 and found["kept"] > 1e-5
    assert found["spread"][0] == pytest.approx(1, abs=1e-3) and found["spread"][1] < 1e-3
    assert abs(found["told"] - found["plain"]).max() < 0.01         # at the start: plain normalisation


def test_discriminator_windows_by_the_rule():
    def window(strides, field=1):                                   # from the logit back to the image
        for stride in reversed(strides):
            field = (field - 1) * stride + 4
        return field
    found = numbers("discriminator")
    assert found["one"] == window([2, 2, 2, 1, 1]) == 70 and found["deeper"] == window([2, 2, 2, 2, 1, 1])
    assert found["two"] == (70 - 1) * 2 + 3                         # average of 3 at stride 2


def test_gan_losses_slopes_minimum_and_weight():
    found = numbers("gan_losses")
    x, slope = found["slopes"]["real"]
    assert (slope[x < 0.99] == -1).all() and (slope[x > 1.01] == 0).all()
    assert (found["slopes"]["generator"][1] == -1).all()
    assert found["change"] < 0.01 and found["equal"] == pytest.approx(0.8)


def test_seeds_resume():
    found = numbers("seeds")
    assert (found["same"], found["restored"], found["again"], found["shifted"]) == (6, 6, 0, 0)


# ---- scores --------------------------------------------------------------------------------------

def test_segmenter_seams_vanish_at_twice_the_reach():
    found = numbers("segmenter")
    assert found["seam_0"] > 0.05 and found["seam_64"] < 1e-5
    assert sorted(found["best"], reverse=True) == found["best"]


def test_losses_against_closed_forms():
    found = numbers("losses")
    # V = 40, I = 20, P = 20, and V = 40, I = 40, P = 60, in hundreds of pixels.
    assert found["missed"] == pytest.approx([1 - 20 / (20 + 0.7 * 20), 1 / 3], abs=1e-4)
    assert found["excess"] == pytest.approx([1 - 40 / (40 + 0.3 * 20), 1 / 5], abs=1e-4)
    assert found["small"] > 2
    logits, target = torch.randn(2, 2, 8, 8), torch.randint(2, (2, 8, 8))
    half = found["tversky"](logits.log_softmax(1), target, 0.5, 0.5)
    assert float(half) == pytest.approx(float(soft_dice_loss(logits.log_softmax(1), target)), abs=1e-4)


def test_metrics_the_same_network_shifted_is_matched():
    found = numbers("metrics")
    assert found["low"] < found["middle"] < found["high"] and found["second"] > 2 * found["middle"]
    assert found["found"] == pytest.approx(found["sigmoid"], abs=0.002)
    assert found["matched"]["subtype_variance"] == pytest.approx(found["middle"], rel=0.02)
    assert found["matched"]["fpr"] == pytest.approx(found["fpr"], abs=1e-4)


def test_frechet_bias_falls_as_one_over_n_and_kernel_has_none():
    same = numbers("frechet")["same"]                               # (N, trial, distance)
    mean, error = same.mean(1), same.std(1, ddof=1) / math.sqrt(same.shape[1])
    assert math.log2(mean[2, 0] / mean[5, 0]) / 3 == pytest.approx(1, abs=0.15)
    assert (abs(mean[:, 1]) < 4 * error[:, 1]).all() and (same[..., 0] > 0).all()


# ---- forks: a toy of each kind through the contracts ------------------------------------------------

def with_heun():
    """her2/samplers.py as the docstring of `heun` says to change it, run from its source."""
    source = inspect.getsource(samplers)
    branch = re.search(r"^    if sampler == .*?\n\n", inspect.getdoc(lessons_forks.heun), re.M | re.S)[0]
    for old, new in (("\nSAMPLERS = (", '\nSAMPLERS = ("heun", '),
                     ("    eta = {", branch.rstrip() + "\n    eta = {"),
                     ("@torch.no_grad()\ndef sample", inspect.getsource(lessons_forks.heun) + "\n\n"
                      "@torch.no_grad()\ndef sample")):
        assert source.count(old) == 1, f"samplers.py should have {old!r} once"
        source = source.replace(old, new)
    module = {}
    exec(source, module)
    return module["sample"]


def test_fork_heun_through_sample_is_of_second_order_for_v_and_eps():
    found = numbers("forks")["curves"]
    heun = found["heun, log-snr"]
    assert math.log2(heun[0] / heun[1]) > 1.5 and heun[2] < found["ddim, log-snr"][2] / 3
    sample, noise, ends = with_heun(), flat_noise(50, 2, 1, 1), []
    for schedule in (Schedule(), Schedule(parametrisation="v")):
        law = Mixture(FLOWER.means.tolist(), FLOWER.std, schedule)
        ends.append(sample(law.predict, schedule, noise, steps=40, sampler="heun", spacing="log-snr"))
    assert torch.allclose(*ends, atol=1e-6)
    exact = sample(law.predict, schedule, noise, steps=1000, sampler="ddim", eta=0.0)
    assert (ends[1] - exact).abs().mean() < 0.01


def test_fork_heun_inpaints_through_sample():
    sample, noise, repaint = with_heun(), flat_noise(50, 2, 1, 1), torch.arange(50).view(50, 1, 1, 1) < 20
    options = dict(steps=20, sampler="heun", spacing="log-snr")
    known = FLOWER.means[:1, :, None, None].repeat(50, 1, 1, 1)
    free = sample(FLOWER.predict, SCHEDULE, noise, **options)
    found = sample(FLOWER.predict, SCHEDULE, noise, known=known, repaint=repaint, **options)
    assert torch.equal(found[20:], known[20:]) and torch.equal(found[:20], free[:20])
    seen = []

    def watch(xt, t):               # what the network sees of the known ones is known at the level t
        seen.append((xt[20:] - SCHEDULE.q_sample(known, t, noise("start", 0))[20:]).abs().max())
        return FLOWER.predict(xt, t)

    sample(watch, SCHEDULE, noise, known=known, repaint=repaint, **options)
    assert len(seen) == 39 and max(seen) == 0


def test_fork_another_sampler_through_predict():
    """A sampler of three lines: one jump from noise to the guess x0, by predict and the schedule alone."""
    noise = flat_noise(20, 2, 1, 1)
    xt, t = noise("start", 0), torch.full((20,), 999)
    x0, _ = SCHEDULE.x0_and_eps(FLOWER.predict(xt, t), xt, t)
    assert torch.allclose(x0, sample(FLOWER.predict, SCHEDULE, noise, steps=1, eta=0.0))
    assert abs(x0).max() < 1e-6     # pure noise says nothing: the mean of the law


def test_fork_segmenter_is_saved_built_and_predicts(tmp_path):
    network = lessons_forks.BrownSegmenter(threshold=0.3)
    F.cross_entropy(network(torch.rand(2, 3, 32, 32)), torch.zeros(2, 32, 32).long()).backward()
    assert network.scale.grad.abs().min() > 0
    run.save_model(tmp_path, "segmenter", network.config, network.state_dict(), step=1, classes=[], split={})
    content = run.load_model(tmp_path, "segmenter")
    again = run.build_model(lessons_forks.BrownSegmenter, content, tmp_path).eval()
    assert again.config == network.config and torch.equal(again.scale, network.scale)
    image = torch.full((3, 40, 70), 1.0)
    image[:, :, 30:] = torch.tensor([120, 70, 30]).view(3, 1, 1) / 127.5 - 1
    prob = predict_roi(again, image, tile=32, overlap=0)
    assert prob.shape == (40, 70) and (prob[:, 30:] > 0.9).all() and (prob[:, :30] < 0.1).all()


def test_fork_segmenter_recipe_names_what_stands_in_the_code():
    for file, function, call in (
            ("her2/run_setup.py", "segmenter", "UNet(num_classes=2, width=config.width)"),
            ("evaluate.py", "predict", "build_model(UNet, content, "),
            ("her2/predict.py", "main", "build_model(UNet, content, ")):
        text = (ROOT / file).read_text(encoding="utf-8")
        body = re.search(rf"^def {function}\(.*?(?=^def )", text, re.M | re.S)[0]
        assert body.count(call) == 1 and file.removeprefix("her2/") in README and f"`{function}`" in README


def test_fork_seven_classes_are_one_file(tmp_path):
    run.write_json(tmp_path / "classes.json", lessons_forks.SEVEN)
    table = load_classes(tmp_path)
    assert len(table) == 7 and table.tumor_ids == table.variance_ids == [1, 2]
    label = np.kron(np.arange(8).clip(max=6).reshape(2, 4), np.ones((20, 20), int)).astype(np.uint8)
    dataset = memory_dataset(tmp_path, [(np.zeros((40, 80, 3), np.uint8), label)], table)
    batch = PatchSampler(dataset, "train", 16, "subtype", cache=tmp_path / "cache").batch(0, 4)
    assert set(batch) == {"image", "label", "instance", "names"} and batch["label"].shape == (4, 16, 16)
    histogram = ProbabilityHistogram(table).add(np.where(label == 1, 0.9, 0.1), label)
    assert histogram.report()["subtype_variance"] == ((1 - 0) / 2) ** 2
    assert numbers("forks")["variance"] == pytest.approx(((0.9 - 0.5) / 2) ** 2)
