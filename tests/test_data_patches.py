"""Patches: uniform as promised, a function of (seed, step, index), augmented in pairs, mixed at the ratio."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_factory import memory_dataset, rectangles, save, write_dataset
from her2.data_classes import DEFAULT_CLASSES
from her2.data_folder import load_dataset
from her2.run_errors import UserError
from her2.data_regions import read_roi
from her2.data_patches import (SAMPLINGS, MixedSampler, PatchSampler, dihedral, iterate_rois,
                           latent_std, loader, pooled_latents, to_tensors)
from her2.run_seeds import numpy_generator


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def two_regions(tmp_path):
    """Two regions of different size; subtypes of very different area; class 2 absent."""
    first, second = np.zeros((30, 44), np.uint8), np.zeros((26, 38), np.uint8)
    first[8:20, 10:30], first[21:24, 30:33] = 4, 1
    second[6:10, 5:12], second[12:18, 20:24], second[20, 20] = 3, 5, 1
    pairs = [(noise(30, 44, 1), first), (noise(26, 38, 2), second)]
    return memory_dataset(tmp_path, pairs, DEFAULT_CLASSES), (first, second)


def chi_square(counts, expected):
    """Standard normal score of a chi-square statistic (Wilson and Hilferty), large = not the expected law."""
    counts, expected = np.asarray(counts, float).ravel(), np.asarray(expected, float).ravel()
    assert (counts[expected == 0] == 0).all(), "something impossible was drawn"
    counts, expected = counts[expected > 0], expected[expected > 0] * counts.sum() / expected.sum()
    k = len(counts) - 1
    return ((((((counts - expected) ** 2 / expected).sum()) / k) ** (1 / 3) - (1 - 2 / (9 * k)))
            / math.sqrt(2 / (9 * k)))


def draw_centres(sampler, labels, count):
    """How often each pixel was the centre, per region. Patches of 2 x 2: no jitter, centre = corner + 1."""
    hits = [np.zeros(label.shape) for label in labels]
    for k in range(count):
        which, y, x = sampler.place(numpy_generator("centres", k))
        hits[which][y + 1, x + 1] += 1
    return hits


def test_tumor_sampling_is_uniform_over_tumor_pixels(tmp_path):
    dataset, labels = two_regions(tmp_path)
    hits = draw_centres(PatchSampler(dataset, "train", 2, "tumor", cache=tmp_path), labels, 8000)
    assert abs(chi_square(np.concatenate([h.ravel() for h in hits]),
                          np.concatenate([(label > 0).ravel() for label in labels]))) < 4


def test_subtype_sampling_is_uniform_over_subtypes_and_then_over_their_pixels(tmp_path):
    dataset, labels = two_regions(tmp_path)
    hits = draw_centres(PatchSampler(dataset, "train", 2, "subtype", cache=tmp_path), labels, 8000)
    label, hits = np.concatenate([x.ravel() for x in labels]), np.concatenate([h.ravel() for h in hits])
    per_class = [hits[label == c].sum() for c in range(6)]
    assert chi_square(per_class, [0, 1, 0, 1, 1, 1]) < 4, per_class
    for c in (1, 3, 4, 5):
        assert abs(chi_square(hits[label == c], np.ones((label == c).sum()))) < 4, f"class {c}"


def test_uniform_sampling_is_uniform_over_positions(tmp_path):
    dataset, labels = two_regions(tmp_path)
    sampler = PatchSampler(dataset, "train", 20, "uniform", cache=tmp_path)
    hits = [np.zeros((label.shape[0] - 19, label.shape[1] - 19)) for label in labels]
    for k in range(8000):
        which, y, x = sampler.place(numpy_generator("uniform", k))
        hits[which][y, x] += 1
    assert chi_square([h.sum() for h in hits], [label.size for label in labels]) < 4
    assert all(abs(chi_square(h, np.ones(h.shape))) < 4 for h in hits)


def test_jitter_is_a_quarter_patch_and_patches_stay_inside(tmp_path):
    label = np.zeros((64, 64), np.uint8)
    label[30, 33] = 3
    dataset = memory_dataset(tmp_path / "a", [(noise(64, 64), label)], DEFAULT_CLASSES)
    sampler = PatchSampler(dataset, "train", 16, "tumor", cache=tmp_path)
    offsets = np.zeros((9, 9))
    for k in range(3000):
        _, y, x = sampler.place(numpy_generator("jitter", k))
        offsets[y + 8 - 30 + 4, x + 8 - 33 + 4] += 1
    assert chi_square(offsets, np.ones((9, 9))) < 4

    label = np.zeros((64, 80), np.uint8)
    label[[0, 0, 63, 63], [0, 79, 0, 79]] = 1
    dataset = memory_dataset(tmp_path / "b", [(noise(64, 80), label)], DEFAULT_CLASSES)
    sampler = PatchSampler(dataset, "train", 16, "tumor", cache=tmp_path)
    corners = {sampler.place(numpy_generator("corner", k)) for k in range(500)}
    assert {(y, x) for _, y, x in corners} == {(0, 0), (0, 64), (48, 0), (48, 64)}, (
        "pushed inside, the pixel kept")


def test_a_batch_is_a_function_of_seed_step_and_index(tmp_path):
    dataset, _ = two_regions(tmp_path)
    options = dict(patch=12, sampling="subtype", flips=True, stain=1.0, cache=tmp_path)
    sampler = PatchSampler(dataset, "train", seed=3, **options)
    batch = sampler.batch(7, 10)
    assert {key: (tuple(v.shape), v.dtype) for key, v in batch.items() if key != "names"} == {
        "image": ((10, 3, 12, 12), torch.float32), "label": ((10, 12, 12), torch.int64),
        "instance": ((10, 12, 12), torch.int32)}
    fresh = PatchSampler(dataset, "train", seed=3, **options)
    for start, stop in ((0, 10), (0, 4), (4, 10), (9, None)):       # slices as ranks take them, history apart
        part = fresh[7, range(10)[start:stop]]
        for key in ("image", "label", "instance"):
            assert torch.equal(part[key], batch[key][start:stop])
        assert part["names"] == batch["names"][start:stop]
    assert torch.equal(fresh.batch(7, 4)["image"], batch["image"][:4]), "the batch size does not matter"
    for other in (fresh.batch(8, 10), PatchSampler(dataset, "train", seed=4, **options).batch(7, 10)):
        assert not torch.equal(other["image"], batch["image"]) and other["names"] != batch["names"]
    assert len(set(batch["names"])) > 5


def test_loader_keeps_order_and_leaves_the_global_generator_alone(tmp_path):
    dataset, _ = two_regions(tmp_path)
    sampler = PatchSampler(dataset, "train", 12, cache=tmp_path)
    state = torch.get_rng_state()
    inline = list(loader(sampler, 5, 9, range(4)))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(inline) == 4 and list(loader(sampler, 9, 9, range(4))) == []
    for k, batch in enumerate(inline):
        assert torch.equal(batch["image"], sampler.batch(5 + k, 4)["image"])
        assert batch["names"] == sampler.batch(5 + k, 4)["names"]
    spawned = list(loader(sampler, 5, 9, [1, 2], workers=1))
    for a, b in zip(spawned, inline):
        assert torch.equal(a["image"], b["image"][1:3]) and a["names"] == b["names"][1:3]
    assert len(spawned) == 4


# ---------------------------------------------------------------- augmentation

def test_the_eight_transforms_are_the_dihedral_group():
    x = torch.arange(12).reshape(3, 4)
    images = [dihedral(x, k) for k in range(8)]
    assert len({(image.shape, *image.flatten().tolist()) for image in images}) == 8
    for k, image in enumerate(images):
        expected = np.rot90(x.numpy(), k % 4)
        assert np.array_equal(image.numpy(), expected[:, ::-1] if k >= 4 else expected)
        undone = k if k >= 4 else -k % 4    # a turn and a flip together are a reflection, which undoes itself
        assert torch.equal(dihedral(image, undone), x)
    with pytest.raises(AssertionError):
        dihedral(x, 8)


def test_image_label_and_instance_are_augmented_together(tmp_path):
    """The image says what label and instance each pixel has; after augmentation it must still be true."""
    rng = np.random.default_rng(0)
    label = rectangles(40, 48, (1, 2, 3, 4, 5))
    dataset = memory_dataset(tmp_path, [(noise(40, 48), label)], DEFAULT_CLASSES)
    instance = read_roi(dataset.rois[0], DEFAULT_CLASSES)[2]
    pixels = np.stack([label * 20, instance * 20, rng.integers(0, 256, label.shape)], axis=2)
    save(dataset.rois[0].image, pixels.astype(np.uint8))
    upright = PatchSampler(dataset, "train", 16, flips=False, cache=tmp_path)
    flipped = PatchSampler(dataset, "train", 16, flips=True, cache=tmp_path)
    used = Counter()
    for step in range(40):
        plain, batch = upright.batch(step, 8), flipped.batch(step, 8)
        for b in (plain, batch):
            assert torch.equal(((b["image"][:, 0] + 1) * 127.5 / 20).round().long(), b["label"])
            assert torch.equal(((b["image"][:, 1] + 1) * 127.5 / 20).round().int(), b["instance"])
        assert plain["names"] == batch["names"]
        for k in range(8):
            used[next(j for j in range(8)
                      if torch.equal(dihedral(plain["image"][k], j), batch["image"][k]))] += 1
    assert chi_square([used[j] for j in range(8)], np.ones(8)) < 4, used


def test_stain_jitter_changes_the_image_only_and_mildly(tmp_path):
    dataset, _ = two_regions(tmp_path)
    plain = PatchSampler(dataset, "train", 12, stain=0.0, cache=tmp_path).batch(0, 16)
    jittered = PatchSampler(dataset, "train", 12, stain=1.0, cache=tmp_path).batch(0, 16)
    assert (torch.equal(plain["label"], jittered["label"])
            and torch.equal(plain["instance"], jittered["instance"]))
    change = (plain["image"] - jittered["image"]).abs().mean(dim=(1, 2, 3))
    assert (change > 0).all() and change.max() < 0.3 and jittered["image"].abs().max() <= 1
    assert len(change.unique()) == 16, "each image has its own jitter"


def test_to_tensors_maps_0_and_255_to_the_ends():
    image = np.array([[[0, 128, 255]]], np.uint8)
    tensor, label, instance = to_tensors(image, np.array([[5]], np.uint8), np.array([[9]], np.int32))
    assert (tensor.shape == (3, 1, 1) and tensor[0] == -1 and tensor[2] == 1
            and abs(tensor[1] - 1 / 255) < 1e-6)
    assert (label.dtype, instance.dtype) == (torch.int64, torch.int32)


# ---------------------------------------------------------------- synthetic images

def mixed(tmp_path, ratio, count=40, size=(40, 60), patch=24):
    real = PatchSampler(load_dataset(tmp_path / "real"), "train", patch, cache=tmp_path)
    write_dataset(tmp_path / "synth", slides=count, height=size[0], width=size[1], split=False, seed=5)
    (tmp_path / "synth" / "manifest.jsonl").touch()
    return real, load_dataset(tmp_path / "synth", require=())


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_synthetic_images_come_at_the_ratio_and_only_the_first_ones(tmp_path, ratio):
    write_dataset(tmp_path / "real", slides=4)          # two training regions of 40 x 60: 2 x 2 x 3 patches
    real, synthetic = mixed(tmp_path, ratio)
    sampler = MixedSampler(real, synthetic, ratio, cache=tmp_path)
    assert real.num_patches == sampler.num_patches == 12 and len(sampler.rois) == round(12 * ratio)
    names = [name for step in range(60) for name in sampler.batch(step, 50)["names"]]
    drawn = Counter(name for name in names if " x=" not in name)
    share, expected = 1 - sum(drawn.values()) / len(names), 1 / (1 + ratio)
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / len(names))
    assert set(drawn) == {f"images/roi{k}.png" for k in range(round(12 * ratio))}
    assert chi_square([drawn[roi.name] for roi in sampler.rois], np.ones(len(sampler.rois))) < 4
    part = sampler[3, range(2, 5)]
    assert torch.equal(part["image"], sampler.batch(3, 10)["image"][2:5])


def test_synthetic_images_of_patch_size_come_whole(tmp_path):
    write_dataset(tmp_path / "real", slides=4)
    real, synthetic = mixed(tmp_path, 1.0, size=(24, 24))
    real.flips = False
    sampler = MixedSampler(real, synthetic, 1.0, cache=tmp_path)
    batch = sampler.batch(0, 30)
    for k, name in enumerate(batch["names"]):
        roi = next((roi for roi in synthetic.rois if roi.name == name), None)
        if roi is not None:
            image, label, instance = to_tensors(*read_roi(roi, DEFAULT_CLASSES))
            assert torch.equal(batch["image"][k], image) and torch.equal(batch["label"][k], label)
            assert torch.equal(batch["instance"][k], instance)


def test_too_few_or_too_small_synthetic_images_are_refused(tmp_path):
    write_dataset(tmp_path / "real", slides=4)
    real, synthetic = mixed(tmp_path, 4.0)
    with pytest.raises(UserError,
                       match=r"40 images, ratio 4 needs 48; give a lower --ratio, or .*generate.py --count 48"):
        MixedSampler(real, synthetic, 4.0, cache=tmp_path)
    real, synthetic = mixed(tmp_path, 1.0, size=(24, 20))
    with pytest.raises(UserError, match="20 x 24 pixels, less than a patch of 24"):
        MixedSampler(real, synthetic, 1.0, cache=tmp_path)


# ---------------------------------------------------------------- limits

def test_absent_subtypes_are_said_once_and_no_tumor_is_an_error(tmp_path, capsys):
    dataset, _ = two_regions(tmp_path)
    sampler = PatchSampler(dataset, "train", 12, "subtype", cache=tmp_path)
    sampler.batch(0, 4)
    sampler.batch(1, 4)
    err = capsys.readouterr().err
    assert err.count("no 1+ in the split 'train'") == 1 and sampler.present == [1, 3, 4, 5]
    empty = memory_dataset(tmp_path / "empty", [(noise(20, 20), np.zeros((20, 20), np.uint8))],
                           DEFAULT_CLASSES)
    for sampling in ("tumor", "subtype"):
        with pytest.raises(UserError, match="no tumor in the split 'train'"):
            PatchSampler(empty, "train", 8, sampling, cache=tmp_path)
    assert PatchSampler(empty, "train", 8, "uniform", cache=tmp_path).batch(0, 2)["label"].sum() == 0


def test_a_patch_larger_than_a_region_or_an_empty_split_is_refused(tmp_path):
    dataset, _ = two_regions(tmp_path)
    with pytest.raises(UserError,
                       match=r"1.png has 38 x 26 pixels, less than a patch of 27; use a smaller --patch"):
        PatchSampler(dataset, "train", 27, cache=tmp_path)
    assert PatchSampler(dataset, "train", 26, cache=tmp_path).batch(0, 3)["image"].shape == (3, 3, 26, 26)
    with pytest.raises(UserError, match="no image in the split 'val'"):
        PatchSampler(dataset, "val", 8, cache=tmp_path)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_patch_as_large_as_the_region(tmp_path, sampling):
    label = rectangles(32, 32, (1, 2, 3, 4, 5))
    dataset = memory_dataset(tmp_path, [(noise(32, 32), label)], DEFAULT_CLASSES)
    batch = PatchSampler(dataset, "train", 32, sampling, flips=False, cache=tmp_path).batch(0, 2)
    assert torch.equal(batch["label"][1], torch.from_numpy(label).long())


def test_the_size_of_the_training_set_is_that_of_the_fewest_patches_that_cover_it(tmp_path):
    for height, width, patch in ((30, 30, 30), (31, 60, 30), (62, 62, 5), (7, 9, 2), (100, 33, 33)):
        covered, count = np.zeros((height, width), bool), 0
        while not covered.all():                # the first pixel that is left begins a patch
            y, x = np.argwhere(~covered)[0]
            covered[y:y + patch, x:x + patch] = True
            count += 1
        dataset = memory_dataset(tmp_path, [(noise(height, width), np.ones(covered.shape, np.uint8))],
                                 DEFAULT_CLASSES)
        assert PatchSampler(dataset, "train", patch, cache=tmp_path).num_patches == count
    dataset, _ = two_regions(tmp_path)
    assert PatchSampler(dataset, "train", 10, cache=tmp_path).num_patches == 3 * 5 + 3 * 4


def test_regions_come_whole_for_evaluation(tmp_path):
    dataset, labels = two_regions(tmp_path)
    regions = list(iterate_rois(dataset, "train", cache=tmp_path))
    for (roi, image, label, instance), expected in zip(regions, labels, strict=True):
        decoded = read_roi(roi, DEFAULT_CLASSES)
        assert (image.shape == (1, 3, *expected.shape) and image.dtype == torch.float32
                and label.dtype == torch.int64)
        assert np.allclose((image[0].permute(1, 2, 0).numpy() + 1) * 127.5, decoded[0], atol=1e-3)
        assert np.array_equal(label[0], expected) and np.array_equal(instance[0], decoded[2])


def test_the_real_half_of_a_mixed_batch_is_the_batch_without_synthetic_images(tmp_path):
    write_dataset(tmp_path / "real", slides=4)
    real, synthetic = mixed(tmp_path, 1.0)
    real = PatchSampler(load_dataset(tmp_path / "real"), "train", 24, cache=tmp_path, stain=1.0, uniform=0.25)
    sampler = MixedSampler(real, synthetic, 1.0, cache=tmp_path)
    same = 0
    for step in range(5):
        plain, both = real.batch(step, 20), sampler.batch(step, 20)
        for k, name in enumerate(both["names"]):
            if " x=" in name:
                same += 1
                assert name == plain["names"][k]
                assert all(torch.equal(plain[key][k], both[key][k]) for key in ("image", "label", "instance"))
    assert 30 < same < 70


def test_a_pool_of_latents_keeps_each_with_its_label_in_one_orientation(tmp_path):
    """The encoder is the identity: what a sample shows is the patch at its place, turned like its label."""
    write_dataset(tmp_path, slides=4, height=64, width=96)
    dataset = load_dataset(tmp_path)
    config = SimpleNamespace(patch=32, sampling="subtype", seed=5, cache=tmp_path / "cache", uniform=0.25, latent_pool=12,
                             batch=8, steps=6, accumulate=1)
    upright, turns = PatchSampler(dataset, "train", 32, cache=tmp_path / "cache"), set()
    assert latent_std(upright, lambda image: 3 * image, 64) == pytest.approx(
        3 * float(torch.cat([upright.batch(k, 64)["image"] for k in range(4)]).std()), rel=1e-5)
    for batch in pooled_latents(config, dataset, lambda image: image, 2):
        for z, label, name in zip(batch["z"], batch["label"], batch["names"], strict=True):
            roi, x, y = name.split()
            which = [one.name for one in upright.rois].index(roi)
            image, truth, _ = upright.window(which, int(y[2:]), int(x[2:]))
            [k] = [k for k in range(8) if torch.equal(dihedral(image, k), z)]
            assert torch.equal(dihedral(truth, k), label)
            turns.add(k)
    assert len(turns) == 8


def test_the_share_of_uniform_patches_is_what_was_asked_for(tmp_path):
    """A region without tumor is only ever reached by the uniform share."""
    write_dataset(tmp_path, slides=4)
    sampler = PatchSampler(load_dataset(tmp_path), "train", 24, "subtype", cache=tmp_path, uniform=0.25)
    sampler.ends = [np.array([end[0]] * len(end)) for end in sampler.ends]
    elsewhere = sum(sampler.place(numpy_generator("share", k))[0] != 0 for k in range(4000))
    expected = 0.25 * (1 - sampler.area[0] / sampler.area[-1])
    assert abs(elsewhere / 4000 - expected) < 5 * math.sqrt(expected / 4000)


def test_ratio_inf_is_synthetic_images_alone(tmp_path):
    write_dataset(tmp_path / "real", slides=4)
    real, synthetic = mixed(tmp_path, 1.0)
    sampler = MixedSampler(real, synthetic, math.inf, cache=tmp_path)
    names = {name for step in range(10) for name in sampler.batch(step, 50)["names"]}
    assert names == {roi.name for roi in synthetic.rois}
