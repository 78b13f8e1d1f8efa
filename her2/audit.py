"""Memorisation: are synthetic images nearer to the training tissue than tissue that was never seen?

    python -m her2.audit data/synth-ldm [--data D] [--out runs/audit]

The paper (section 5) hopes that synthetic images cannot be traced to a patient. A copy has a near neighbour:
for a synthetic image S, over all training regions R, positions p and the 8 flips and turns g,

    similarity(S) = sqrt(f) arctanh(max over R, p, g, scale k, stain c of NCC(g F_kc(S), F_kc(R) at p))

f is the share of the image that is compared (Fisher's transform: small parts are alike by chance). NCC is the
normalised cross-correlation (both parts with mean 0 and norm 1), for all p at once by FFT:

    num = sum_u T(u) R(p + u)      NCC = num / sqrt(sum w R^2 - (sum w R)^2 / n)      T = w (F - mean) / norm

F, the features: amounts of haematoxylin and of DAB by colour deconvolution, standardised within each instance
and within the background, then averaged over boxes of P/16 and P/8 pixels, P the side of an image, on a grid
of P/32: gain and offset of a stain do not matter, nor do the outlines of the label, shared by design. Real
patches of val and test slides, drawn as the sources are, say what is normal (p: permutation test of the sum
over the synthetic images of max(0, (similarity - median) / MAD)^3, pooled median and MAD). Patches of one
slide resemble each other, so p is too small where held-out slides are few: a verdict only from p < 0.01.

Inpainted images are compared on the tumor that was regenerated, held-out patches on the same places.
Absence of evidence holds for these features only: a copy that is bent or scaled by much is not found.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from her2 import draw, report, run, run_config as configuration
from her2.data_folder import load_dataset, load_synthetic, read_split
from her2.data_patches import PatchSampler, dihedral
from her2.data_regions import open_roi
from her2.run_errors import UserError, command
from her2.run_provenance import read_record, trained_with
from her2.run_seeds import numpy_generator
from her2.run_training import pick_device
from her2.stains import STAINS, optical_density

GRID = 32               # steps per side of an image at which places are compared
FLAT = 0.05             # optical density: deviation below which an instance has no structure of its own
FLOOR = 1e-3            # variance of a feature below which a place is flat: its NCC would be that of noise
SMALLEST = 100          # places that a regenerated region must hold, else chance alone is similar
SURE = 0.9999           # an NCC above is not told from 1: float32
HELD_OUT = 1200         # real patches of val and test slides, which say what is normal
FALSE_ALARM = 0.01      # share of them above the threshold
PERMUTATIONS = 9999
BATCH = 32


@dataclass
class Config:
    data: str = ""                  # dataset folder; empty: the one that the images were made from
    out: str = "runs/audit"         # folder of audit.json and audit.png
    count: int = 400                # synthetic images compared, evenly spread over the set; 0: all
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: the GPU when there is one
    cache: str = "cache"            # folder for the decoded images


def features(image, instance, patch: int) -> list:
    """image (H, W, 3) uint8, instance (H, W) -> F for both scales, (2 stains, h, w) float32 each."""
    density = optical_density(np.arange(256)).astype(np.float32)[image]                 # (H, W, 3), by table
    ids, maps = instance.reshape(-1), []
    count = np.maximum(np.bincount(ids), 1)
    for amount in np.moveaxis(density @ np.linalg.inv(STAINS)[:, :2].astype(np.float32), -1, 0):
        mean = np.bincount(ids, amount.reshape(-1)) / count     # per instance: a new subtype is a new mean
        centred = amount.reshape(-1) - mean.astype(np.float32)[ids]
        deviation = np.sqrt(np.bincount(ids, centred ** 2) / count).clip(min=FLAT)
        maps.append((centred / deviation.astype(np.float32)[ids]).reshape(amount.shape))
    return pooled(torch.from_numpy(np.stack(maps)), patch)


def pooled(maps, patch: int) -> list:
    """maps (C, H, W) -> means over boxes of patch/16 and patch/8 on a grid of patch/32."""
    # Boxes, not pixels: a generator's copy is never exact in its finest detail.
    return [F.avg_pool2d(maps[None], patch // side, patch // GRID)[0] for side in (16, 8)]


def search(templates, weights, rois, classes, patch: int, device, cache="cache"):
    """Per image: highest NCC (N,) and where it is (N, 4): index in `rois`, row and column in grid steps, turn
    k of `dihedral`. templates, weights: per scale (N, 2, t, t) and (N or 1, 1, t, t), the weights 0 or 1."""
    step, count, regions = patch // GRID, len(templates[0]), []
    # One size for all, so that a template is transformed once; multiples of 16 transform fast.
    size = [-(-max(sides) // step // 16) * 16 for sides in zip(*((r.height, r.width) for r in rois))]
    for roi in tqdm(rois, desc="training tissue", unit="ROI", leave=False, disable=None):
        image, _, instance = open_roi(roi, classes, cache).whole()
        places = [(side - patch) // step + 1 for side in instance.shape]
        maps = [scale.to(device) for scale in features(image, instance, patch)]
        regions.append(([[torch.fft.rfft2(x, s=size) for x in (m, m.square())] for m in maps], places))
    best, where = torch.full((count,), -2.0), torch.zeros(count, 4, dtype=torch.long)
    # Batches outside, regions inside: the spectra of a turned template serve all regions.
    jobs = [(slice(first, first + BATCH), k) for first in range(0, count, BATCH) for k in range(8)]
    for part, k in tqdm(jobs, desc="nearest patches", leave=False, disable=None):
        turned = [prepare(*(dihedral(one[part if len(one) > 1 else slice(1)].to(device), k) for one in pair),
                          size) for pair in zip(templates, weights)]
        for i, (scales, places) in enumerate(regions):
            # The larger counts: a blurred copy is still alike in coarse boxes.
            ncc = [correlation(*one, *scale, places, size) for one, scale in zip(turned, scales)]
            top, at = torch.maximum(*ncc).flatten(1).cpu().max(dim=1)                   # (B,) each
            better = top > best[part]
            here = [torch.full_like(at, i), at // places[1], at % places[1], torch.full_like(at, k)]
            where[part] = torch.where(better[:, None], torch.stack(here, dim=1), where[part])
            best[part] = torch.where(better, top, best[part])
    return best.numpy(), where.numpy()


def prepare(feature, weight, size):
    """(B, 2, t, t), (B or 1, 1, t, t) -> conjugate spectra of T and w, and n (B or 1, 1, 1, 1)."""
    n = weight.sum((2, 3), keepdim=True).clamp(min=1)
    centred = (feature - (weight * feature).sum((2, 3), keepdim=True) / n) * weight
    # The floor: a template without structure, once divided by its norm, would correlate by its rounding.
    norm = centred.square().sum((2, 3), keepdim=True).clamp(min=FLOOR * n).sqrt()
    return torch.fft.rfft2(centred / norm, s=size).conj(), torch.fft.rfft2(weight, s=size).conj(), n


def correlation(template, weight, n, tissue, square, places, size):
    """The larger NCC of the two stains at every place, (B, *places); all but `n` are spectra."""
    # A product of spectra with one conjugate is a correlation; what wraps around lies behind `places`.
    def over(x, of):                # sum_u x(u) R(p + u) for all places p
        return torch.fft.irfft2(x * of, s=size)[..., :places[0], :places[1]]

    spread = over(weight, square) - over(weight, tissue).square() / n
    # The larger: a copy whose DAB was painted anew is still found by its nuclei.
    return (over(template, tissue) / spread.clamp(min=FLOOR * n).sqrt()).amax(dim=1)


def permutation_p(synthetic, held_out) -> float:
    """Probability that the synthetic set is this much nearer by chance."""
    both = np.concatenate([synthetic, held_out])
    away = both - np.median(both)
    # The third power: few copies weigh as much as a small shift of all.
    excess = np.maximum(0, away / max(1.4826 * np.median(np.abs(away)), 1e-9)) ** 3
    rng, n = numpy_generator(0, "audit", "permutations"), len(synthetic)
    chance = np.array([excess[rng.permutation(len(both))[:n]].sum() for _ in range(PERMUTATIONS)])
    # + 1: the division as it was found is one of the divisions that chance could have made, so p is never 0.
    return (1 + int((chance >= excess[:n].sum() * (1 - 1e-12)).sum())) / (1 + PERMUTATIONS)


def audit(pictures, held_out, rois, classes, patch: int, device, inpainted, cache):
    """(similarity (N,), where (N, 4), similarity of the held-out ones (M,), kept (N,): which `pictures`).
    pictures, held_out: [(image (P, P, 3) uint8, label (P, P), instance (P, P))]. `inpainted`: only the tumor
    of the synthetic images counts; those with too little are left out."""
    weights = []
    for _, label, _ in pictures:
        region = np.isin(label, classes.tumor_ids) if inpainted else label >= 0         # (P, P)
        # Only boxes that lie whole within it: the rest holds pixels that were copied by design.
        weights.append([(m > 0.999).float() for m in pooled(torch.from_numpy(region)[None].float(), patch)])
    kept = [i for i, scales in enumerate(weights) if scales[0].sum() >= SMALLEST]
    if not kept:
        raise UserError("--count: no image has enough regenerated tumor to be compared; audit more images, "
                        "or make them of a larger --patch")
    chosen = [*kept, *(kept[j % len(kept)] for j in range(len(held_out)))]      # held-out: the same places
    maps = [features(image, instance, patch)
            for image, _, instance in [*(pictures[i] for i in kept), *held_out]]
    grid = [weights[i] for i in (chosen if inpainted else chosen[:1])]          # all alike if whole
    maps, grid = ([torch.stack(scale) for scale in zip(*part)] for part in (maps, grid))
    best, where = search(maps, grid, rois, classes, patch, device, cache)
    shares, n = grid[0].mean((1, 2, 3)).double().numpy(), len(kept)
    similarity = np.arctanh(best.astype(np.float64).clip(-SURE, SURE)) * np.sqrt(shares)
    return similarity[:n], where[:n], similarity[n:], np.array(kept)


def main(argv):
    config, name = configuration.parse(Config, {}, argv, __doc__, "python -m her2.audit", {
        "synthetic": dict(metavar="SYNTH", help="folder made by generate.py")})
    folder = Path(name)
    fields, split = read_record(folder)["fields"], read_split(folder / "split.json")
    dataset = load_dataset(config.data or trained_with(folder, config)["data"], split=split)
    synthetic, _ = load_synthetic(folder, dataset)
    train, inpainted = dataset.split("train"), fields.get("method") == "inpaint"
    sides = {side for roi in synthetic.rois for side in (roi.height, roi.width)}
    patch, most = max(sides), min(min(roi.height, roi.width) for roi in train)
    if len(sides) > 1 or patch % GRID or patch > most:
        raise UserError(f"{folder}: images with sides of {', '.join(map(str, sorted(sides)))} pixels; make "
                        f"squares of one size, a multiple of {GRID}, that fit into all training regions "
                        f"(generate.py --patch, at most {most})")
    count = min(config.count or len(synthetic.rois), len(synthetic.rois))
    rois = [synthetic.rois[i] for i in np.linspace(0, len(synthetic.rois) - 1, count).astype(int)]
    pictures = [open_roi(roi, synthetic.classes, config.cache).whole() for roi in rois]
    # Both splits held out, for more slides: neither the networks nor their training saw one of them.
    unseen = replace(dataset, rois=[replace(r, split="val") for r in dataset.rois if r.split != "train"])
    sampler = PatchSampler(unseen, "val", patch, fields.get("sampling", "tumor"), cache=config.cache,
                           uniform=fields.get("uniform", 0.0))
    held_out = [sampler.draw(numpy_generator(0, "audit", j))[:3] for j in range(HELD_OUT)]
    found, where, normal, kept = audit(pictures, held_out, train, dataset.classes, patch,
                                       pick_device(config.device)[0], inpainted, config.cache)

    # "higher": a value that was measured, so that no more than the share asked for lies above it.
    threshold = float(np.quantile(normal, 1 - FALSE_ALARM, method="higher"))
    p, share = permutation_p(found, normal), float((found > threshold).mean())
    nearest = [{"image": rois[i].name, "source_slide": rois[i].slide, "similarity": float(s), "turn": int(k),
                "nearest": train[r].name, "slide": train[r].slide, "x": int(x) * (patch // GRID),
                "y": int(y) * (patch // GRID)} for i, s, (r, y, x, k) in zip(kept, found, where)]
    rows = [["slide", "images made from it", "nearest patch in it", "above the threshold", "most similar"]]
    for slide in sorted({roi.slide for roi in train}):
        here = [one["similarity"] for one in nearest if one["slide"] == slide]
        rows.append([slide, str(sum(one["source_slide"] == slide for one in nearest)), str(len(here)),
                     str(sum(s > threshold for s in here)), f"{max(here):.3f}" if here else "n/a"])
    out = Path(config.out)
    run.write_json(out / "audit.json", {
        "images": len(found), "left_out": len(rois) - len(found), "held_out": len(normal), "p": p,
        "region": "regenerated tumor" if inpainted else "whole image", "false_alarm": FALSE_ALARM,
        "threshold": threshold, "share_above": share, "slides": [dict(zip(rows[0], row)) for row in rows[1:]],
        "nearest": nearest})
    pairs, shown = [[], []], np.argsort(-found)[:8]
    for i in shown:                         # the image as it would have to be turned, above what it is like
        image = torch.from_numpy(pictures[kept[i]][0]).movedim(-1, 0)
        pairs[0].append(dihedral(image, nearest[i]["turn"]).movedim(0, -1).numpy())
        region = open_roi(train[where[i, 0]], dataset.classes, config.cache)
        pairs[1].append(region.window(nearest[i]["y"], nearest[i]["x"], patch, patch)[0])
    draw.save_png(out / "audit.png", draw.image_grid(
        pairs, ["synthetic", "nearest\ntraining\npatch"], [f"{found[i]:.3f}" for i in shown],
        title=f"Threshold {threshold:.3f} (held-out patches)"))
    print(report.plain([dict(zip(rows[0], row)) for row in rows[1:]]))
    print(f"{len(found)} images: median similarity {np.median(found):.3f}, held-out {np.median(normal):.3f}; "
          f"{share:.1%} above {threshold:.3f} (expected {FALSE_ALARM:.1%}); p = {p:.4f}")
    print("The set is" if p < 0.01 else "Nothing says that the set is",
          "nearer to the training tissue than unseen tissue is.")
    print(f"done: {out / 'audit.json'}, {out / 'audit.png'}")


if __name__ == "__main__":
    command(main)
