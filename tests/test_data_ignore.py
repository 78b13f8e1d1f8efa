"""What is to be ignored neither trains nor counts: each consumer against one that never saw the pixels.

The oracle is the same everywhere: whatever stands in the ignored pixels (any image, any prediction) changes
no number, and the numbers are those of a computation on the remaining pixels alone.
"""

import json
from dataclasses import replace

import numpy as np
import parity_segmentation as forms
import pytest
import torch
import torch.nn.functional as F
from data_factory import memory_dataset, save, write_csv, write_dataset
from parity_segmentation import confusion_matrix
from PIL import Image

from her2 import draw, losses
from her2.data_classes import DEFAULT_CLASSES, IGNORE, ClassTable
from her2.data_folder import load_dataset
from her2.data_patches import SAMPLINGS, PatchSampler
from her2.data_regions import open_roi, read_roi
from her2.losses import constant_prediction_loss, dice_cross_entropy
from her2.metrics import ProbabilityHistogram
from her2.relabel import relabel, repaint_mask
from her2.run_errors import UserError
from her2.run_seeds import generator, numpy_generator
from her2.run_training import one_hot

class_sums, soft_dice_loss, generalised_dice_loss = map(forms.of_logits, (
    losses.class_sums, losses.soft_dice_loss, losses.generalised_dice_loss))

def example(classes=2, seed=0):
    """Logits (3, K, 8, 10), target with a third ignored; both without the ignored pixels: (1, K, 1, n)."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, classes, 8, 10, generator=random) * 2
    target = torch.randint(0, classes, (3, 8, 10), generator=random)
    ignored = torch.rand(3, 8, 10, generator=random) < 1 / 3
    rest = logits.movedim(1, -1)[~ignored].T[None, :, None], target[~ignored][None, None]
    return logits.requires_grad_(), target.masked_fill(ignored, IGNORE), ignored, rest


LOSSES = {
    "soft Dice": soft_dice_loss,
    "soft Dice with background": lambda x, y: forms.soft_dice_loss(x, y, include_background=True),
    "squared": lambda x, y: forms.soft_dice_loss(x, y, squared=True),
    "Jaccard": lambda x, y: forms.soft_dice_loss(x, y, jaccard=True),
    "generalised Dice": generalised_dice_loss,
    "MONAI's": lambda x, y: forms.generalised_dice_loss(x, y, absent="largest", relative=False),
    "cross-entropy": lambda x, y: dice_cross_entropy(x, y, dice_weight=0, ce_weight=1)[0],
    "with generalised": lambda x, y: dice_cross_entropy(x, y, "generalised")[0],
}


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_that_of_the_other_pixels_and_has_no_gradient_where_all_is_ignored(name, classes):
    logits, target, ignored, rest = example(classes)
    loss = LOSSES[name](logits, target)
    assert loss.item() == pytest.approx(LOSSES[name](*rest).item(), rel=1e-5)
    [gradient] = torch.autograd.grad(loss, logits)
    assert (gradient.movedim(1, -1)[ignored] == 0).all() and (gradient.movedim(1, -1)[~ignored] != 0).any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_in_which_all_is_ignored_has_the_loss_0_and_no_gradient(name):
    logits, target = example()[0], torch.full((3, 8, 10), IGNORE)
    loss = LOSSES[name](logits, target)
    [gradient] = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and (gradient == 0).all()


def test_sums_scores_and_the_constant_prediction_leave_the_pixels_out():
    logits, target, _, rest = example(4)
    for ours, theirs in zip(class_sums(logits, target), class_sums(*rest)):
        assert torch.allclose(ours, theirs, rtol=1e-5)
    assert torch.allclose(forms.dice_scores(logits, target), forms.dice_scores(*rest), rtol=1e-5)
    assert constant_prediction_loss(target, num_classes=4) == pytest.approx(
        constant_prediction_loss(rest[1], num_classes=4), rel=1e-5)
    assert constant_prediction_loss(torch.full((1, 4, 4), IGNORE)) == 0


def test_no_figure_of_the_evaluation_depends_on_what_is_predicted_there():
    """Dice, recall, variance, precision, FPR and both confusions; NaN there must not disturb either."""
    random = np.random.default_rng(1)
    label, prob = random.integers(0, 6, 4000), random.random(4000).astype(np.float32)
    ignored = random.random(4000) < 0.4
    alone = ProbabilityHistogram(DEFAULT_CLASSES).add(prob[~ignored], label[~ignored])
    for wrong in (0.0, 1.0, np.nan):
        seen = ProbabilityHistogram(DEFAULT_CLASSES).add(np.where(ignored, np.float32(wrong), prob),
                                                         np.where(ignored, IGNORE, label))
        assert (seen.counts == alone.counts).all() and seen.report() == alone.report()
    assert not ProbabilityHistogram(DEFAULT_CLASSES).add(prob, np.full(4000, IGNORE)).counts.any()
    guess = random.integers(0, 6, 4000)
    assert np.array_equal(confusion_matrix(guess, np.where(ignored, IGNORE, label), 6),
                          confusion_matrix(guess[~ignored], label[~ignored], 6))


def test_an_ignored_pixel_has_no_class_in_the_one_hot_code():
    label = torch.randint(0, 6, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    expected = F.one_hot(label, 6).permute(0, 3, 1, 2).float()
    assert torch.equal(one_hot(label, 6, "cpu"), expected)
    label[0, :4], expected[0, :, :4] = IGNORE, 0
    found = one_hot(label, 6, "cpu")
    assert torch.equal(found, expected) and found.sum(1).unique().tolist() == [0, 1]


# ---- from the file to the patch ---------------------------------------------------------------------------

def half_ignored(height=40, width=40):
    """Tumor of class 3 and 4 in the left half, the right half to be ignored; the first row is background."""
    label = np.zeros((height, width), np.uint8)
    label[4:12, 2:16], label[20:30, 2:16], label[1:, width // 2:] = 3, 4, IGNORE
    return label


def half_dataset(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    everything = np.full((40, 40), IGNORE, np.uint8)
    everything[:, 0] = 1
    return memory_dataset(tmp_path, [(image, half_ignored()), (image[::-1], everything)], DEFAULT_CLASSES)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_patch_is_drawn_around_an_ignored_pixel(tmp_path, sampling):
    """Patches of 2 x 2 have no jitter: their pixel (1, 1) is the one that was drawn."""
    sampler = PatchSampler(half_dataset(tmp_path), "train", 2, sampling, cache=tmp_path)
    labels = [half_ignored(), read_roi(sampler.rois[1], DEFAULT_CLASSES)[1]]
    seen = set()
    for k in range(600):
        which, y, x = sampler.place(numpy_generator("ignore", k))
        seen.add((which, int(labels[which][y + 1, x + 1])))
    # Region 1 has a single column that counts, at the border, where no 2 x 2 patch has its centre.
    assert {value for which, value in seen if which == 0} == ({3, 4} if sampling != "uniform" else {0, 3, 4})


def test_a_split_in_which_all_is_ignored_is_refused(tmp_path):
    image = np.zeros((20, 20, 3), np.uint8)
    dataset = memory_dataset(tmp_path, [(image, np.full((20, 20), IGNORE, np.uint8))], DEFAULT_CLASSES)
    save(tmp_path / "instances.png", np.ones((20, 20), np.uint16))
    dataset.rois = [replace(roi, instances=tmp_path / "instances.png") for roi in dataset.rois]
    for sampling in SAMPLINGS:
        with pytest.raises(UserError, match="ignored|no tumor"):
            PatchSampler(dataset, "train", 8, sampling, cache=tmp_path)


def test_the_label_survives_the_cache_and_is_counted_in_no_class(tmp_path):
    roi = half_dataset(tmp_path).rois[0]
    tile = open_roi(roi, DEFAULT_CLASSES, tmp_path / "cache")
    _, label, instance = tile.window(0, 0, 40, 40)
    assert np.array_equal(label, half_ignored()) and ((instance > 0) == (label > 0)).all()
    assert tile.row_counts.sum() == (label != IGNORE).sum() and tile.row_counts.shape == (6, 40)


def square(name, x0, y0, x1, y1):
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    classification = {"classification": {"name": name}} if name else {}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "annotation", **classification}}


@pytest.mark.parametrize("names, table", [
    (("Ignore*", "ignore"), None),
    (("Fold", "out of focus"), {"aliases": {"fold": "ignore", "Out of Focus": 255}}),
    (("Fold", ""), {"aliases": {"Fold": "ignore", "(none)": "ignore"}}),
    (("Fold", "Blur"), {"classes": DEFAULT_CLASSES.to_json(),
                        "aliases": {"fold": "Ignore", "blur": "ignore"}}),
])
def test_polygons_of_ignored_classes(tmp_path, names, table):
    """By QuPath's own name, by an alias, and without a class when the table asks for it."""
    rows = write_dataset(tmp_path, slides=4)
    shapes = [square(names[0], 30, 0, 60, 40), square(names[1], 5, 5, 10, 10), square("2+", 2, 2, 20, 30)]
    (tmp_path / "a.geojson").write_text(json.dumps(shapes), encoding="utf-8")
    rows[0].update(mask="", annotations="a.geojson")
    write_csv(tmp_path, rows)
    if table:
        (tmp_path / "classes.json").write_text(json.dumps(table), encoding="utf-8")
    dataset = load_dataset(tmp_path)
    _, label, instance = read_roi(dataset.rois[0], dataset.classes)
    expected = np.zeros((40, 60), np.uint8)
    expected[:, 30:], expected[2:30, 2:20], expected[5:10, 5:10] = IGNORE, 3, IGNORE
    assert np.array_equal(label, expected) and ((instance > 0) == (expected > 0)).all()
    assert dataset.classes == DEFAULT_CLASSES, "what is ignored is no part of what ids mean to a network"


def test_a_class_may_still_be_called_ignore():
    rows = DEFAULT_CLASSES.to_json()
    rows[5].update(name="Ignore", aliases=["in situ"])
    assert ClassTable.from_json(rows).id_of("ignore") == 5


# ---- generation -------------------------------------------------------------------------------------------

def test_relabelling_and_inpainting_leave_it_alone():
    label = torch.from_numpy(half_ignored()).long()
    instance = (label == 3) * 1 + (label == 4) * 2 + (label == IGNORE) * 3
    new, mapping = relabel(label, instance, DEFAULT_CLASSES, generator("ignore"))
    assert set(mapping) == {1, 2} and torch.equal(new == IGNORE, label == IGNORE)
    assert [old for old, _ in mapping.values()] == [3, 4]
    assert torch.equal(repaint_mask(instance, mapping), (label == 3) | (label == 4))
    classes = ClassTable.from_json([dict(row, tumor=row["tumor"] and row["id"] != 4, variance=False)
                                    for row in DEFAULT_CLASSES.to_json()])
    _, mapping = relabel(label, instance, classes, generator("ignore"))
    assert set(mapping) == {1}, "other tissue than tumor is not painted again"


def test_masks_with_it_are_written_shown_and_read_again(tmp_path):
    label = half_ignored()
    draw.save_png(tmp_path / "mask.png", label, palette=DEFAULT_CLASSES.colors)
    with Image.open(tmp_path / "mask.png") as picture:
        assert np.array_equal(np.array(picture), label)
        shown = np.array(picture.convert("RGB"))
    assert np.array_equal(shown, draw.colorize(label, DEFAULT_CLASSES))
    assert (shown[label == IGNORE] == 150).all() and (shown[label == 3] == DEFAULT_CLASSES.colors[3]).all()
