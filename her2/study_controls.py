"""Synthetic images without a generative network: the yardsticks between which the paper's methods are read.

    oracle        the phantom renders the source patch again, each nest in its new class; outlines, stroma,
                  stain and scanner of the slide stay. What the oracle does not gain, relabelling cannot give
    fresh         the same on new slides of the same law: what any further data would give
    restain       the DAB of every instance scaled to the median of its new class, pixel by pixel: what a
                  generator must beat to have been worth its training
    reconstruct   the real patch through the autoencoder, its label kept: what decoding alone costs

The first two need a phantom (its folder says which seed made it). PAPER: none of these is in the paper, whose
real data have no oracle. A painter has `multiple`, which must divide the side of a patch, and

    paint(batch) -> (B, 3, P, P) float in [-1, 1]           B batch, P side of the patch, K classes

    batch: image (B, 3, P, P) in [-1, 1], label (B, P, P) the new one, instance (B, P, P),
    onehot (B, K, P, P), repaint (B, P, P) bool, seeds [B], sources [B] as of `draw_patch`,
    mappings [B] {instance: (old, new)}
"""

import re
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch

from her2 import phantom, report_staining, run, run_training
from her2.autoencoder import VQAutoencoder
from her2.data_classes import DEFAULT_CLASSES
from her2.data_folder import NEW_TISSUE
from her2.phantom_cells import hollow, site_cells
from her2.phantom_microscope import cell_of, window
from her2.polygons import paint
from her2.relabel import renumber
from her2.run_errors import UserError
from her2.run_seeds import numpy_generator
from her2.stains import STAINS, deconvolve

FRESH = 100_000         # number of the first fresh slide: no phantom folder has as many
NOWHERE = -1e6          # where the cells of a nest go that is filled anew: no window sees them
FAINTEST = 0.02         # DAB below which a factor would only blow up noise


def with_classes(scene, wanted: dict, key: tuple):
    """The scene with the nests `wanted` {index of the site: class id} filled anew in their new class. Their
    outlines stay, and so does all else, to the bit."""
    # The table of cells only grows at its end: `phantom_microscope` throws its coins by the number of a cell.
    sites, cells, nuclei = list(scene.sites), [scene.cells.copy()], [scene.nuclei.copy()]
    for k, class_id in sorted(wanted.items()):
        rng = numpy_generator(*key, "site", k)
        in_situ = class_id == phantom.IN_SITU_CLASS
        # In situ tumor is stained like the tumor of its slide: it keeps the subtype of the nest it replaces.
        subtype = sites[k].subtype if in_situ else phantom.SUBTYPE_CLASS.index(class_id)
        sites[k] = replace(sites[k], kind="dcis" if in_situ else "tumor", subtype=subtype, holes=[],
                           fill=(0.0, 0.0), debris=False)
        hollow(sites[k], scene.style, rng)
        new = site_cells(sites[k], scene.style, rng)
        new["site"] = k
        for table, part in ((cells, new[new["reach"] > 0]), (nuclei, new[new["reach"] == 0])):
            for column in ("x", "nx"):
                table[0][column][table[0]["site"] == k] = NOWHERE
            table.append(part)
    return replace(scene, sites=sites, cells=np.concatenate(cells), nuclei=np.concatenate(nuclei))


class OraclePainter:
    """paint(batch) by the phantom that made the folder of `dataset`; UserError where none did."""
    multiple = 1

    def __init__(self, dataset):
        path = dataset.root / "phantom.json"
        found = run.read_json(path) if path.exists() else {}
        if not isinstance(found, dict) or found.get("recipe") != phantom.RECIPE:
            raise UserError(f"{dataset.root}: is no phantom of this version (phantom.json), so nothing can "
                            "render it again; use a folder made by her2.phantom, or another --method")
        if dataset.classes.classes != DEFAULT_CLASSES.classes:          # ids mean what the phantom meant
            raise UserError(f"{dataset.root}: the phantom paints the classes of the paper, classes.json has "
                            "others; use the folder as her2.phantom made it, or another --method")
        self.preset = phantom.Preset(*(found[name] for name in ("um_per_px", "size", "rois", "slides")))
        self.scene = lru_cache(maxsize=64)(partial(phantom.scene_of, self.preset, found["seed"]))

    def paint(self, batch):
        images = [self.render(source, instance.numpy(), mapping, seed) for source, instance, mapping, seed
                  in zip(batch["sources"], batch["instance"], batch["mappings"], batch["seeds"])]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1

    def render(self, source, instance, mapping, seed) -> np.ndarray:
        """(P, P, 3) uint8 of the patch at the slide, ROI and position of `source`."""
        slide, roi = map(int, re.findall(r"\d+", source["name"])[:2])           # images/slide03_roi0.png
        scene, _ = self.scene(slide, roi)                                       # and its polygons
        um, wanted = self.preset.um_per_px, {}
        for i, (_, new) in mapping.items():
            # An annotated outline is drawn by a shaky hand: its nest is the one that owns most of its pixels.
            y, x = np.nonzero(instance == i)
            owners = scene.owner[cell_of((y + source["y"] + 0.5) * um), cell_of((x + source["x"] + 0.5) * um)]
            owners = [k for k in owners if k >= 0 and scene.sites[k].kind in ("tumor", "dcis")]
            if owners:
                wanted[int(np.bincount(owners).argmax())] = new
        scene = with_classes(scene, wanted, (seed,))
        return window(scene, um, source["y"], source["x"], *instance.shape, numpy_generator(seed, "sensor"))

    def fresh_patch(self, sampler, seed: int, i: int) -> dict:
        """Source patch i, of a slide that the phantom would make next, in place of `draw_patch`. It is
        centred on tumor exactly, PatchSampler moves by up to a quarter: as in the published seeds."""
        rng, side, patch = numpy_generator(seed, "fresh", i), self.preset.size, sampler.patch
        _, polygons = self.scene(FRESH + i, 0)
        label, instance = paint([[ring] for _, ring in polygons], [k for k, _ in polygons], side, side)
        present = [k for k in np.unique(label) if k]
        y, x = rng.integers(side - patch + 1, size=2)                           # anywhere
        if present and rng.random() >= sampler.uniform:                         # or around a tumor class
            inside = np.argwhere(label == rng.choice(present))
            y, x = (inside[rng.integers(len(inside))] - patch // 2).clip(0, side - patch)
        label, instance = (torch.from_numpy(one[y:y + patch, x:x + patch]) for one in (label, instance))
        return {"image": torch.zeros(3, patch, patch), "label": label.long(), "instance": renumber(instance),
                "name": f"{NEW_TISSUE}slide{FRESH + i}_roi0", "slide": f"new{FRESH + i}",
                "x": int(x), "y": int(y)}


class RestainPainter:
    """paint(batch) by colour deconvolution: rgb * 10 ** -((f - 1) dab STAINS[1]), f = wanted / measured."""
    multiple = 1

    def __init__(self, dataset, cache):
        train, classes = dataset.split("train"), dataset.classes
        self.white = report_staining.median_white(train, classes, cache)
        found = report_staining.measure({"real": train}, classes, self.white, cache)["real"]
        self.median = {k: float(np.median(values))
                       for k, values in report_staining.by_class(found, classes).items() if values}

    def paint(self, batch):
        rgb = ((batch["image"].permute(0, 2, 3, 1) + 1) * 127.5).numpy().astype(np.float64)     # (B, P, P, 3)
        dab = deconvolve(rgb, self.white)[1].clip(min=0)                                        # (B, P, P)
        for one, amount, instance, mapping in zip(rgb, dab, batch["instance"].numpy(), batch["mappings"]):
            for i, (old, new) in mapping.items():
                inside = instance == i
                factor = self.median.get(new, 0.0) / max(amount[inside].mean(), FAINTEST)
                if old != new:
                    one[inside] *= 10 ** -((factor - 1) * amount[inside][:, None] * STAINS[1])
        return torch.from_numpy(rgb.clip(0, 255)).permute(0, 3, 1, 2).float() / 127.5 - 1


class ReconstructPainter:
    """paint(batch) by the autoencoder alone; the labels of the batch are the real ones."""

    def __init__(self, content, config, device):
        self.autoencoder = run.build_model(VQAutoencoder, content, config.model, device)
        self.device, self.multiple = device, self.autoencoder.factor

    def paint(self, batch):
        image = run_training.to_device(batch["image"], self.device)
        return self.autoencoder.decode(self.autoencoder.encode(image)).float().clamp(-1, 1)
