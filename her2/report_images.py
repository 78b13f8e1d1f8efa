"""Generated images before any segmenter learns from them: do they obey their masks, are they sharp?

    obedience    Dice and recalls of a segmenter that was trained on real patches of other tissue, applied to
                 the images, against the masks asked for; what it says of real patches is the ceiling
    sharpness    mean |image - its 3 x 3 mean| in tumor, each class counting alike, as a share of real
    distances    Frechet and kernel distance (`frechet`) to real training patches drawn in the same way, of
                 the means of the maps f_2 and f_3 of that segmenter, divided by their sd over the real ones

A distance is small for images that look like *training* tissue, not for images that help: the oracle sets the
scale, and `val` patches do for unseen slides. PAPER: not reported. Key: N images, P side, F features.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F

from her2 import draw, run_training
from her2.data_patches import PatchSampler, to_tensors
from her2.data_regions import open_roi
from her2.frechet import feature_statistics, frechet_distance, kernel_distance
from her2.metrics import ProbabilityHistogram
from her2.run_errors import UserError
from her2.run_seeds import hashed_seed

MOST = 512              # images per source


@torch.no_grad()
def judge(network, image, device, batch: int = 64):
    """(tumor probability (N, P, P), features (N, F)) of images (N, 3, P, P) in [-1, 1]."""
    prob, features = [], []
    for part in image.split(batch):
        maps = network.encoder(network.normalised(run_training.to_device(part, device)))
        prob.append(network.segmentation_head(network.decoder(maps)).float().softmax(1)[:, 1].cpu())
        features.append(torch.cat([maps[k].float().mean((2, 3)) for k in (2, 3)], dim=1).cpu())  # f_2, f_3
    return torch.cat(prob), torch.cat(features)


def sharpness(image, label, classes):
    """Mean |image - 3 x 3 mean| in grey levels 0..255, averaged over the tumor classes that are present."""
    grey = image.mean(1, keepdim=True) * 127.5  # (N, 1, P, P)
    fine = (grey - F.avg_pool2d(grey, 3, 1, 1, count_include_pad=False)).abs()[:, 0]  # (N, P, P)
    found = [float(fine[label == k].mean()) for k in classes.tumor_ids if (label == k).any()]
    return float(np.mean(found)) if found else None


def measure(sets: dict, dataset, network, device, seed: int = 0, cache="cache") -> dict:
    """{source: {"dice", "recall", "fpr", "sharpness", "frechet", "kernel"}} of {source: [ROI, ...]} and of
    "real, val" and "real, train", to which all distances are measured."""
    patch, pairs = min(roi.height for rois in sets.values() for roi in rois), {}
    for split in ("train", "val"):          # drawn as the study draws the sources of synthetic images
        sampler = PatchSampler(dataset, split, patch, "subtype", seed, flips=False, cache=cache, uniform=0.25)
        batch = sampler.batch(0, min(MOST, 4 * sampler.num_patches))
        pairs[f"real, {split}"] = batch["image"], batch["label"]        # (N, 3, P, P), (N, P, P)
    for name, rois in sets.items():
        parts = [to_tensors(*open_roi(roi, dataset.classes, cache).whole())[:2] for roi in rois[:MOST]]
        pairs[name] = map(torch.stack, zip(*parts))
    result = {}
    for name, (image, label) in pairs.items():
        prob, features = judge(network, image, device)
        sharp = sharpness(image, label, dataset.classes)
        if name == "real, train":       # the first: half of it stands for all, so that it has a distance too
            scale, blur = features.std(0, keepdim=True) + 1e-6, sharp
            reference, features = (features[1::2] / scale).numpy(), features[::2]
        figures = ProbabilityHistogram(dataset.classes).add(prob, label).report()
        own = (features / scale).numpy()
        result[name] = {
            **{key: figures[key] for key in ("dice", "recall", "fpr")},
            "sharpness": sharp / blur if sharp is not None and blur else None,
            "frechet": frechet_distance(*feature_statistics(own), *feature_statistics(reference)),
            "kernel": kernel_distance(own, reference)}
    return result


def table(result: dict) -> list:
    """Rows of texts, header first."""
    tumor = list(next(iter(result.values()))["recall"])                     # the names of its classes
    rows = [["images", "obedience, Dice", *(f"recall {name}" for name in tumor), "FPR", "sharpness",
             "Frechet", "kernel"]]
    for name, found in result.items():
        cells = [(found["dice"], 3), *((found["recall"][one], 2) for one in tumor), (found["fpr"], 3),
                 (found["sharpness"], 2), (found["frechet"], 3), (found["kernel"], 3)]
        rows.append([name, *("n/a" if value is None else f"{value:.{digits}f}" for value, digits in cells)])
    return rows


def examples(synthetic, dataset, titles: dict, seed: int, cache) -> np.ndarray:
    """Fig. 4: per tumor class a patch in which it was asked for, as each method painted it. Of 100 patches
    the one nearest to half of this class and a third background: where all is tumor, nobody sees whether the
    outlines of the label are obeyed."""
    def content(roi):
        return open_roi(roi, dataset.classes, cache).whole()[:2]                        # (H, W, 3), (H, W)

    def source_of(entry):           # what images share that were painted on the same relabelled patch
        return *map(entry.get, ("source_image", "x", "y")), json.dumps(entry.get("instances"), sort_keys=True)

    root = next(iter(synthetic.values()))[0].root
    by_source = {method: {source_of(entries[roi.name]): roi for roi in images.rois}
                 for method, (images, entries) in synthetic.items()}
    originals = {roi.name: roi for roi in dataset.rois}
    # New tissue has no original, so it is the last to say which patches are shown.
    first = max(by_source.values(), key=lambda rois: any(name in originals for name, *_ in rois))
    # A control that kept the labels, or has tissue of its own, shares no patch: it has no column.
    by_source = {method: rois for method, rois in by_source.items() if not first.keys().isdisjoint(rois)}
    common = [source for source in first if all(source in rois for rois in by_source.values())]
    sources = sorted(common or first, key=lambda source: hashed_seed(seed, "fig4", repr(source)))[:100]
    labels = {source: content(first[source])[1] for source in sources}
    rows = []
    for k in dataset.classes.tumor_ids:
        shares = {source: (min((label == k).mean(), 1 / 2) + min((label == 0).mean(), 1 / 3))
                  for source, label in labels.items() if (label == k).any()}
        if not shares:
            continue
        source = max(shares, key=shares.get)
        label, (name, x, y, _) = labels.pop(source), source
        painted = {method: content(rois[source])[0] for method, rois in by_source.items() if source in rois}
        if name in originals:
            region, (height, width) = open_roi(originals[name], dataset.classes, cache), label.shape
            if not (type(x) is type(y) is int and 0 <= x <= region.width - width
                    and 0 <= y <= region.height - height):
                raise UserError(f"{root / 'manifest.jsonl'}: the patch at x {x}, y {y} is not inside {name}; "
                                "make the images again with generate.py")
            painted["original"] = region.window(y, x, height, width)[0]
        rows.append({"caption": dataset.classes.names[k], "label": label, **painted})
    if not rows:
        raise UserError(f"{root}: no tumor in its label maps; make images of tumor with generate.py")
    return draw.side_by_side(rows, dataset.classes, titles, 192 if len(rows[0]["label"]) <= 64 else 256)
