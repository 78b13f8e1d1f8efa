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
from her2.report_statistics import spread
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
    """Rows {column: text} of `measure`."""
    return [{"images": source, "obedience, Dice": spread([one["dice"]]),
             **{f"recall {name}": spread([value], 2) for name, value in one["recall"].items()},
             "FPR": spread([one["fpr"]]), "sharpness": spread([one["sharpness"]], 2),
             "Frechet": spread([one["frechet"]]), "kernel": spread([one["kernel"]])}
            for source, one in result.items()]


def examples(synthetic, dataset, titles: dict, seed: int, cache) -> np.ndarray:
    """Fig. 4: per tumor class a patch in which it was asked for: label, original, what each method painted
    (`titles`: {method: title of its column}). Of 100 patches the one nearest to half of this class and a
    third background: where all is tumor, nobody sees whether the outlines of the label are obeyed."""
    def content(roi):
        return open_roi(roi, dataset.classes, cache).whole()[:2]                        # (H, W, 3), (H, W)

    def source_of(entry):           # what images share that were painted on the same relabelled patch
        return *map(entry.get, ("source_image", "x", "y")), json.dumps(entry.get("instances"), sort_keys=True)

    root = next(iter(synthetic.values()))[0].root
    by_source = {}                                                              # {patch: {method: its image}}
    for method, (images, entries) in synthetic.items():
        for roi in images.rois:
            by_source.setdefault(source_of(entries[roi.name]), {})[method] = roi
    originals = {roi.name: roi for roi in dataset.rois}
    most = max(map(len, by_source.values()))        # a control with labels or tissue of its own shares none
    sources = sorted((source for source in by_source if len(by_source[source]) == most),
                     key=lambda source: hashed_seed(seed, "fig4", repr(source)))[:100]
    labels = {source: content(next(iter(by_source[source].values())))[1] for source in sources}
    rows = {}
    for k in dataset.classes.tumor_ids:
        shares = {source: (min((label == k).mean(), 1 / 2) + min((label == 0).mean(), 1 / 3))
                  for source, label in labels.items() if (label == k).any()}
        if not shares:
            continue
        source = max(shares, key=shares.get)
        label, (name, x, y, _) = labels.pop(source), source
        row = {titles[method]: content(roi)[0] for method, roi in by_source[source].items()}
        row["label asked for"] = draw.colorize(label, dataset.classes)
        if name in originals:
            region, (height, width) = open_roi(originals[name], dataset.classes, cache), label.shape
            if not (type(x) is type(y) is int and 0 <= x <= region.width - width
                    and 0 <= y <= region.height - height):
                raise UserError(f"{root / 'manifest.jsonl'}: the patch at x {x}, y {y} is not inside {name}; "
                                "make the images again with generate.py")
            row["original"] = region.window(y, x, height, width)[0]
        rows[dataset.classes.names[k]] = row
    if not rows:
        raise UserError(f"{root}: no tumor in its label maps; make images of tumor with generate.py")
    columns = [title for title in ("label asked for", "original", *titles.values())
               if any(title in row for row in rows.values())]
    return draw.image_grid([[row.get(title) for title in columns] for row in rows.values()], [*rows], columns,
                           cell=192 if len(label) <= 64 else 256, legend=draw.class_legend(dataset.classes))
