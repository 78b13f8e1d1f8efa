"""Dice losses against slow loops, closed forms and the official numbers' own rules."""

import math

import numpy as np
import parity_segmentation as forms
import pytest
import torch
import torch.nn.functional as F

from her2 import losses
from her2.losses import constant_prediction_loss, dice_cross_entropy

class_sums, soft_dice_loss, generalised_dice_loss = map(forms.of_logits, (
    losses.class_sums, losses.soft_dice_loss, losses.generalised_dice_loss))
MONAI = dict(eps=1e-5, absent="largest", relative=False)  # what brings back MONAI's GeneralizedDiceLoss


def example(classes=2, seed=0, shape=(3, 6, 5)):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], classes, *shape[1:], generator=generator) * 2
    return logits, torch.randint(0, classes, shape, generator=generator)


def sure(target, classes=2):
    """Logits of a network that is certain of `target`."""
    return (F.one_hot(target, classes).movedim(-1, 1).float() - 0.5) * 200


def slow_sums(logits, target, k, images):
    """I, P, V of class k over `images`, in float64, pixel by pixel."""
    prob = logits.double().softmax(1)
    intersection = predicted = volume = 0.0
    for b in images:
        for y in range(target.shape[1]):
            for x in range(target.shape[2]):
                here = float(target[b, y, x] == k)
                intersection += float(prob[b, k, y, x]) * here
                predicted += float(prob[b, k, y, x])
                volume += here
    return intersection, predicted, volume


# ---- soft Dice
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [2, 4])
def test_soft_dice_is_the_sum_over_the_whole_batch(classes):
    logits, target = example(classes)
    scores = []
    for k in range(1, classes):
        i, p, v = slow_sums(logits, target, k, range(3))
        scores.append((2 * i + 0.01) / (p + v + 0.01))
    expected = 1 - sum(scores) / len(scores)
    assert float(soft_dice_loss(logits, target)) == pytest.approx(expected, abs=1e-6)


def test_a_batch_is_one_long_image():
    logits, target = example()
    long = soft_dice_loss(logits.movedim(0, 1).flatten(1, 2)[None], target.flatten(0, 1)[None])
    assert float(soft_dice_loss(logits, target)) == pytest.approx(float(long), abs=1e-6)


def test_per_image_dice_is_the_mean_over_images():
    logits, target = example(3)
    parts = [float(soft_dice_loss(logits[b:b + 1], target[b:b + 1])) for b in range(3)]
    assert float(forms.soft_dice_loss(logits, target, batch=False)) == pytest.approx(sum(parts) / 3, abs=1e-6)


def test_empty_by_empty_is_perfect_and_empty_by_full_is_worst():
    nothing, everything = torch.zeros(2, 8, 8, dtype=torch.long), torch.ones(2, 8, 8, dtype=torch.long)
    for loss in (soft_dice_loss, generalised_dice_loss):
        assert float(loss(sure(nothing), nothing)) == pytest.approx(0, abs=1e-6)
        assert float(loss(sure(everything), everything)) == pytest.approx(0, abs=1e-6)
        assert float(loss(sure(everything), nothing)) > 0.999
        assert float(loss(sure(nothing), everything)) > 0.999


def test_patches_without_tumor_do_not_drown_the_others():
    # One patch predicted perfectly, three empty ones with a breath of probability: per image they cost 1
    # each.
    target = torch.zeros(4, 16, 16, dtype=torch.long)
    target[0, 4:12, 4:12] = 1
    logits = sure(target) / 40
    assert float(soft_dice_loss(logits, target)) < 0.1
    assert float(forms.soft_dice_loss(logits, target, batch=False)) > 0.7


def test_squared_and_jaccard():
    logits, target = example()
    prob = logits.double().softmax(1)[:, 1]
    truth = (target == 1).double()
    both, p, v = float((prob * truth).sum()), float(prob.sum()), float(truth.sum())
    iou = forms.dice_scores(logits, target, eps=0, jaccard=True)[0, 1]
    assert float(iou) == pytest.approx(both / (p + v - both), abs=1e-6)
    dice = forms.dice_scores(logits, target, eps=0, squared=True)[0, 1]
    assert float(dice) == pytest.approx(2 * both / (float((prob ** 2).sum()) + v), abs=1e-6)


# ---- generalised Dice
# -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("weighting, power", [("square", 2), ("simple", 1), ("uniform", 0)])
def test_generalised_dice_is_sudres_formula(classes, weighting, power):
    logits, target = example(classes, seed=3)
    sums = [slow_sums(logits, target, k, range(3)) for k in range(classes)]
    numerator = sum(i / v ** power for i, p, v in sums)
    denominator = sum((p + v) / v ** power for i, p, v in sums)
    ours = forms.generalised_dice_loss(logits, target, weighting=weighting)
    assert float(ours) == pytest.approx(1 - 2 * numerator / denominator, abs=1e-5)
    if weighting == "square":
        assert float(generalised_dice_loss(logits, target)) == pytest.approx(float(ours), abs=1e-7)


def test_an_absent_class_has_no_weight_unless_asked():
    logits, target = example(4, seed=1)
    target = target.clamp(max=2)                                        # class 3 has no pixel
    i, p, v = zip(*(slow_sums(logits, target, k, range(3)) for k in range(4)))

    def loss(weight):
        return 1 - 2 * np.dot(weight, i) / np.dot(weight, np.add(p, v))

    present = [1 / volume ** 2 for volume in v[:3]]
    assert float(generalised_dice_loss(logits, target)) == pytest.approx(loss([*present, 0]), abs=1e-5)
    official = forms.generalised_dice_loss(logits, target, absent="largest")
    assert float(official) == pytest.approx(loss([*present, max(present)]), abs=1e-5)
    assert float(official) - float(generalised_dice_loss(logits, target)) > 0.01


def test_a_batch_of_background_still_teaches():
    logits, target = example()
    target = torch.zeros_like(target)
    assert float(forms.generalised_dice_loss(logits, target, include_background=False)) == 0
    logits.requires_grad_()
    generalised_dice_loss(logits, target).backward()
    assert (logits.grad[:, 1] > 0).all()                                # less tumor, please


def test_the_loss_does_not_depend_on_the_number_of_pixels():
    # The same content on 1, 16 and 256 times the area. MONAI's eps takes over: at paper size its loss is near
    # 0.
    ours, official = [], []
    for times in (4, 16, 64):
        logits, target = (x.repeat(*[1] * (x.ndim - 2), times, times) for x in example(shape=(4, 16, 16)))
        ours.append(float(generalised_dice_loss(logits, target)))
        official.append(float(forms.generalised_dice_loss(logits, target, **MONAI)))
    assert ours == pytest.approx([ours[0]] * 3, abs=1e-5) and ours[0] > 0.3
    assert official[0] < 0.99 * ours[0] and official[1] < 0.9 * ours[1] and official[2] < 0.4 * ours[2]


def test_generalised_dice_agrees_with_monai_where_they_mean_the_same():
    logits, target = example(3)
    assert float(forms.generalised_dice_loss(logits, target, **MONAI)) == pytest.approx(
        float(generalised_dice_loss(logits, target)), abs=1e-3)


# ---- the training loss
# ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dice, function", [("soft", soft_dice_loss), ("generalised", generalised_dice_loss)])
def test_training_loss_is_the_weighted_sum(dice, function):
    logits, target = example()
    loss, parts = dice_cross_entropy(logits, target, dice, dice_weight=0.9, ce_weight=0.1)
    ce = -sum(float(logits.double().log_softmax(1)[b, target[b, y, x], y, x])
              for b in range(3) for y in range(6) for x in range(5)) / target.numel()
    assert float(parts["ce"]) == pytest.approx(ce, abs=1e-6)
    assert float(parts["dice"]) == float(function(logits, target))
    assert float(loss) == pytest.approx(0.9 * float(parts["dice"]) + 0.1 * ce, abs=1e-6)
    assert float(dice_cross_entropy(logits, target, dice)[0]) == pytest.approx(
        0.5 * float(parts["dice"]) + 0.5 * ce, abs=1e-6)


@pytest.mark.parametrize("dice", ["soft", "generalised"])
def test_gradient_is_the_slope(dice):
    logits, target = example(3, seed=5, shape=(2, 3, 3))
    logits.requires_grad_()
    dice_cross_entropy(logits, target, dice)[0].backward()
    for index in [(0, 1, 2, 0), (1, 0, 0, 2), (1, 2, 1, 1)]:
        step = torch.zeros_like(logits)
        step[index] = 1e-2
        with torch.no_grad():
            slope = (dice_cross_entropy(logits + step, target, dice)[0]
                     - dice_cross_entropy(logits - step, target, dice)[0]) / 2e-2
        assert float(logits.grad[index]) == pytest.approx(float(slope), abs=2e-5)


@pytest.mark.parametrize("dice", ["soft", "generalised"])
def test_saturated_logits_give_finite_gradients(dice):
    for target in (torch.zeros(2, 8, 8, dtype=torch.long), torch.ones(2, 8, 8, dtype=torch.long)):
        for logits in (sure(target), -sure(target), torch.zeros(2, 2, 8, 8)):
            logits.requires_grad_()
            loss, _ = dice_cross_entropy(logits, target, dice)
            loss.backward()
            assert loss.isfinite() and logits.grad.isfinite().all()


def test_sums_are_float32_under_autocast():
    # 65,536 pixels of tumor: bfloat16 stops counting at 256, float16 overflows.
    target = torch.ones(1, 256, 256, dtype=torch.long)
    logits = torch.zeros(1, 2, 256, 256)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sums = class_sums(logits.to(dtype), target)
            loss, _ = dice_cross_entropy(logits.to(dtype), target)
        assert [float(s[1]) for s in sums] == [32768, 32768, 65536]
        assert float(loss) == pytest.approx(0.5 * (1 - 2 / 3) + 0.5 * math.log(2), abs=1e-5)


def test_shapes_are_checked():
    logits, target = example()
    for wrong in (target[:2], target[:, :5], target[:, None]):
        with pytest.raises(AssertionError, match="found"):
            dice_cross_entropy(logits, wrong)
    with pytest.raises(AssertionError, match="sof"):
        dice_cross_entropy(logits, target, dice="sof")


# ---- the network that predicts nothing
# ------------------------------------------------------------------------

def test_constant_prediction_has_the_closed_form():
    target = torch.zeros(4, 10, 10, dtype=torch.long)
    target[:, :3] = 1
    entropy = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    assert constant_prediction_loss(target) == pytest.approx(0.5 * 0.7 + 0.5 * entropy, abs=1e-4)
    assert constant_prediction_loss(target, dice_weight=0.2, ce_weight=0.8) == pytest.approx(
        0.2 * 0.7 + 0.8 * entropy, abs=1e-4)
    generalised = constant_prediction_loss(target, dice="generalised", dice_weight=1.0, ce_weight=0.0)
    assert generalised == pytest.approx(1 - 2 * 0.3 * 0.7, abs=1e-5)
    assert math.isfinite(constant_prediction_loss(torch.zeros_like(target)))
