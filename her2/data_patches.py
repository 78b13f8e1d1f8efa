"""Random patches for training, and whole regions for evaluation.

How a patch is chosen decides what a network learns (section 3 of the paper compares the first two):

    tumor     a pixel uniform over all tumor pixels of the split, whatever their subtype
    subtype   a tumor class uniform over those present, then a pixel uniform over its pixels
    uniform   a region in proportion to its pixels that count, then a position uniform over all that fit into
              it and are not centred on a pixel to be ignored

The patch is centred on the pixel, moved by up to a quarter of its side (else the network would learn that
the centre is always tumor) and pushed back inside the region. A share of the patches may be uniform whatever
the sampling is (`uniform`): around tumor alone, most of the tissue that resembles tumor is never shown.

Sample `index` of the batch of `step` is a function of (seed, step, index) alone, so a run that is interrupted
or split over processes sees the same patches as one that is not.

Synthetic images join as the paper adds them (+ 50 % ... + 400 %). Real patches are drawn anew at every step,
so there is no fixed set of them to count; the number that + 100 % doubles is `num_patches`, as many as tile
the training regions once. The synthetic images are a fixed set, the first ratio * num_patches of the folder.
A sample is one of these (uniformly) with probability ratio / (1 + ratio), else a real patch. A key of its own
decides it, so that two runs of one seed differ in what the synthetic images replace, and in nothing else.

Dimension letters: B batch, P side of the patch, H, W region.
"""

import atexit
import math
import multiprocessing
import signal
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from her2 import run_distributed
from her2.data_classes import IGNORE
from her2.data_folder import Dataset, empty_splits
from her2.data_slides import generating_command
from her2.run_errors import UserError, check_line
from her2.data_regions import open_roi, region_files
from her2.run_seeds import generator, numpy_generator
from her2.stains import stain_jitter
from her2.data_mapped import open_region

SAMPLINGS = ("tumor", "subtype", "uniform")
TRIES = 100     # positions drawn until one is not centred on a pixel to be ignored; else the last one stays


def to_tensors(image, label, instance):
    """One window -> image (3, H, W) float32 in [-1, 1], label (H, W) int64, instance (H, W) int32."""
    image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)             # (3, H, W) uint8
    return (image.float().div(127.5).sub(1).contiguous(), torch.from_numpy(label).long(),
            torch.from_numpy(instance).int())


def dihedral(tensor: torch.Tensor, k: int) -> torch.Tensor:
    """One of the 8 flips and rotations, on the last two axes: k % 4 quarter turns, then k // 4 flips."""
    assert k in range(8), f"k is {k}, expected 0..7"
    # Tissue on a glass slide has neither up nor left: eight equally true images for the price of one.
    tensor = torch.rot90(tensor, k % 4, (-2, -1))
    return tensor.flip(-1) if k >= 4 else tensor


class Sampler:
    """What gives random samples: `draw`, `seed`, `flips`, `stain`. A map-style dataset for a DataLoader."""

    def use(self, dataset: Dataset, rois: list, patch: int, cache) -> None:
        """Map the regions that patches are cut from. UserError for one that is smaller than a patch."""
        for roi in rois:
            if min(roi.height, roi.width) < patch:
                raise UserError(f"{dataset.root}: {roi.name} has {roi.width} x {roi.height} pixels, less "
                                f"than a patch of {patch}; use a smaller --patch or larger images")
        self.rois, self.patch, self.files = rois, patch, region_files(rois, dataset.classes, cache)

    def batch(self, step: int, batch_size: int) -> dict:
        """The whole batch of `step`."""
        return self[step, range(batch_size)]

    def __getitem__(self, key) -> dict:
        """The samples `indices` of the batch of `step`, drawn and augmented; key = (step, indices). Returns a
        dict of image (B, 3, P, P) float32 in [-1, 1], label (B, P, P) int64, instance (B, P, P) int32 and
        names, a list of B texts that say where each sample comes from."""
        (step, indices), samples, names = key, [], []
        for index in indices:
            rng = numpy_generator(self.seed, "patch", step, index)
            # The coin has a key of its own: taken from `rng`, it would move the place of every real patch.
            coin = numpy_generator(self.seed, "coin", step, index).random()
            image, label, instance, name = self.draw(rng, coin)
            arrays, k = (image.transpose(2, 0, 1), label, instance), int(rng.integers(8)) if self.flips else 0
            samples.append([dihedral(torch.from_numpy(array), k) for array in arrays])
            names.append(name)
        image, label, instance = map(torch.stack, zip(*samples))
        image = image.float().div_(127.5).sub_(1)                                      # (B, 3, P, P)
        if self.stain > 0:
            for one, index in zip(image, indices):          # one by one: each has a key of its own
                one[:] = stain_jitter(one[None], generator(self.seed, "stain", step, index),
                                      scale=0.1 * self.stain, shift=0.01 * self.stain)[0]
        return {"image": image, "label": label.long(), "instance": instance, "names": names}


class PatchSampler(Sampler):
    """Random patches of one split of a real dataset. UserError where no patch can be drawn.

    uniform share of the patches that come from anywhere in the regions, whatever `sampling` says
    flips   augment with the 8 flips and rotations, the same for image, label and instance
    stain   strength of the stain jitter: 1 = mild, 0 = off (generative models learn the stain as it is)"""

    def __init__(self, dataset: Dataset, split: str, patch: int, sampling: str = "subtype", seed: int = 0,
                 flips: bool = True, stain: float = 0.0, cache="cache", uniform: float = 0.0):
        assert sampling in SAMPLINGS, f"sampling {sampling!r}, known are {SAMPLINGS}"
        self.seed, self.flips, self.stain, self.classes = seed, flips, stain, dataset.classes
        for problem in empty_splits(dataset, [split]):
            raise UserError(problem)
        self.use(dataset, dataset.split(split), patch, cache)
        # PAPER: the size that + 50 % ... + 400 % refer to is not defined; ours: as many as cover all once.
        self.num_patches = sum(math.ceil(r.height / patch) * math.ceil(r.width / patch) for r in self.rois)
        # (regions, K): how many pixels of each class; those to be ignored are of none
        counts = np.stack([open_region(file).row_counts.sum(axis=1, dtype=np.int64) for file in self.files])
        tumor = dataset.classes.tumor_ids
        self.present = [c for c in tumor if counts[:, c].any()]
        if sampling != "uniform" and not self.present:
            raise UserError(f"{dataset.root}: no tumor in the split {split!r}; annotate its images (what is "
                            f"left out and why: {check_line(dataset.root)})")
        if sampling == "subtype" and (absent := [dataset.classes.names[c] for c in tumor
                                                 if c not in self.present]):
            print(f"note: {dataset.root}: no {', '.join(absent)} in the split {split!r}; the other tumor "
                  "classes are sampled uniformly", file=sys.stderr)
        # Groups of classes whose pixels are drawn from alike, and the running sum of these over regions.
        # PAPER: "uniformly across all tumor subtypes": ours are all five tumor classes, LCIS/DCIS among them.
        self.groups = [(c,) for c in self.present] if sampling == "subtype" else [tuple(self.present)]
        self.ends = [counts[:, list(group)].sum(axis=1).cumsum() for group in self.groups]
        self.uniform, self.area = 1.0 if sampling == "uniform" else uniform, counts.sum(axis=1).cumsum()
        if not self.area[-1]:
            raise UserError(f"{dataset.root}: every pixel of the split {split!r} is to be ignored; annotate "
                            "its images or use another split")

    def place(self, rng: np.random.Generator) -> tuple[int, int, int]:
        """(index of the region, y, x) of a random patch."""
        p = self.patch
        if rng.random() < self.uniform:
            which = int(np.searchsorted(self.area, rng.integers(self.area[-1]), side="right"))
            region = open_region(self.files[which])
            for _ in range(TRIES):
                y, x = int(rng.integers(region.height - p + 1)), int(rng.integers(region.width - p + 1))
                if region.class_of[region.instance[y + p // 2, x + p // 2]] != IGNORE:
                    break
            return which, y, x
        k = int(rng.integers(len(self.groups)))
        # A rank among the group's pixels of all regions, found in the running sums: exactly uniform. A region
        # first and then a pixel in it would favour the pixels of regions that hold few.
        rank = int(rng.integers(self.ends[k][-1]))
        which = int(np.searchsorted(self.ends[k], rank, side="right"))
        region = open_region(self.files[which])
        centre = region.pixel(self.groups[k], rank - (int(self.ends[k][which - 1]) if which else 0))
        y, x = np.array(centre) - p // 2 + rng.integers(-(p // 4), p // 4 + 1, size=2)
        # Pushed back, not padded: a frame that no real patch has would be learned, and painted.
        return which, int(np.clip(y, 0, region.height - p)), int(np.clip(x, 0, region.width - p))

    def draw(self, rng: np.random.Generator, coin: float = 0.0):
        """(image (P, P, 3) uint8, label (P, P), instance (P, P), name) of a patch, whatever the coin."""
        which, y, x = self.place(rng)
        pixels = open_region(self.files[which]).window(y, x, self.patch, self.patch)
        return *pixels, f"{self.rois[which].name} x={x} y={y}"

    def window(self, which: int, y: int, x: int):
        """The tensors of the patch of region `which` at row y, column x, not augmented."""
        return to_tensors(*open_region(self.files[which]).window(y, x, self.patch, self.patch))


class MixedSampler(Sampler):
    """Patches of `real` and images of `synthetic` (`load_synthetic`), the latter `ratio` times as many.
    `ratio` inf: all images of `synthetic`, and no real patch (section 5 of the paper asks what that gives).
    Augmentation, patch size and seed are those of `real`. Where `synthetic` has other classes (`cluster`),
    only tumor or not is kept: its tumor gets the id of the first tumor class."""

    def __init__(self, real: PatchSampler, synthetic: Dataset, ratio: float, cache="cache"):
        assert ratio > 0, f"ratio is {ratio}, it must be positive; without synthetic images use PatchSampler"
        self.real, self.ratio, self.num_patches = real, ratio, real.num_patches
        self.seed, self.flips, self.stain = real.seed, real.flips, real.stain
        wanted = len(synthetic.rois) if ratio == math.inf else max(1, round(ratio * real.num_patches))
        if len(synthetic.rois) < wanted:
            more = generating_command(synthetic.root, "--count", wanted) or f"generate.py --count {wanted}"
            raise UserError(f"{synthetic.root}: {len(synthetic.rois)} images, ratio {ratio:g} needs {wanted};"
                            f" give a lower --ratio, or delete the folder and make more: {more}")
        self.use(synthetic, synthetic.rois[:wanted], real.patch, cache)
        self.meaning = np.arange(256, dtype=np.uint8)           # label of `synthetic` -> label of `real`
        if synthetic.classes != real.classes:
            print(f"note: {synthetic.root}: has other classes; only tumor or not is used", file=sys.stderr)
            self.meaning[:len(synthetic.classes)] = 0
            self.meaning[synthetic.classes.tumor_ids] = real.classes.tumor_ids[0]

    def draw(self, rng: np.random.Generator, coin: float):
        """As `PatchSampler.draw`; `coin` is uniform in [0, 1), below 1 / (1 + ratio) the patch is real."""
        if coin < 1 / (1 + self.ratio):
            return self.real.draw(rng)
        which = int(rng.integers(len(self.rois)))
        region = open_region(self.files[which])
        y, x = (int(rng.integers(side - self.patch + 1)) for side in (region.height, region.width))
        image, label, instance = region.window(y, x, self.patch, self.patch)
        return image, self.meaning[label], instance, self.rois[which].name


def deaf(worker: int) -> None:
    """Ctrl-C and SIGTERM reach the workers of a loader too; the main process saves first, then ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """At its end Python sends them SIGTERM, which they do not hear, and would wait for them for ever."""
    for child in multiprocessing.active_children():
        child.kill()


def loader(sampler: Sampler, first_step: int, last_step: int, indices, workers=0, pin_memory=False):
    """A DataLoader of the samples `indices` of steps first_step..last_step-1; `workers` make them ahead."""
    if workers:
        atexit.register(end_workers)
    # A DataLoader draws a seed on every start, from the global generator unless it is given one: that would
    # make other random numbers depend on how often a run was resumed. No batch uses it.
    return DataLoader(sampler, batch_size=None, sampler=[(k, indices) for k in range(first_step, last_step)],
                      num_workers=workers, pin_memory=pin_memory, generator=torch.Generator(),
                      worker_init_fn=deaf, multiprocessing_context="spawn" if workers else None)


def iterate_rois(dataset: Dataset, split: str, cache="cache"):
    """The regions of a split, whole, one at a time: (roi, image, label, instance) with a batch axis of 1."""
    for roi in dataset.split(split):
        image, label, instance = to_tensors(*open_roi(roi, dataset.classes, cache).whole())
        yield roi, image[None], label[None], instance[None]


def latent_std(sampler: Sampler, encode, batch: int) -> float:
    """Standard deviation of all latents, over 256 patches. The official code takes the first batch's and
    loses it on resuming; here it is saved with the weights."""
    return float(torch.cat([encode(sampler.batch(k, batch)["image"])
                            for k in range(max(1, 256 // batch))]).std())


def pooled_latents(config, dataset: Dataset, encode, first_step: int):
    """Cached latents: a fixed pool of N patches is encoded once, in eight orientations. Yields batches for
    steps first_step..config.steps-1, each a function of (config.seed, step) alone; under torchrun this
    process's samples of it. {"z": (B, C, h, w) on the CPU, "label": (B, H, W), "names": [B]}.
    encode(image (B, 3, H, W)) -> z (B, C, h, w).

    At full size the frozen encoder is most of the cost of a diffusion step (897 against 417 GMAC at 512 px).
    The price: no ever new patches; 8 N latents and N label maps in memory (512 px, factor 4: 1.8 MB each)."""
    upright = PatchSampler(dataset, "train", config.patch, config.sampling, config.seed, flips=False,
                           cache=config.cache, uniform=config.uniform)
    z, label, names = [[] for _ in range(8)], [], []
    for part in tqdm(range(math.ceil(config.latent_pool / config.batch)), "latents", leave=False,
                     disable=None):
        batch = upright.batch(part, config.batch)       # its pixels are not kept
        label.append(batch["label"].to(torch.uint8))
        names += batch["names"]
        for k in range(8):      # an encoder is not exactly equivariant: a turned image, not a turned latent
            z[k].append(encode(dihedral(batch["image"], k)).cpu())
    z, label = [torch.cat(parts) for parts in z], torch.cat(label)
    for step in range(first_step, config.steps):
        random = generator(config.seed, "pool", step)
        picked = torch.randint(config.latent_pool, (config.batch,), generator=random).tolist()
        turned = torch.randint(8, (config.batch,), generator=random).tolist()
        samples = [(picked[n], turned[n]) for n in run_distributed.indices(config)]
        yield {"z": torch.stack([z[k][i] for i, k in samples]),
               "label": torch.stack([dihedral(label[i], k) for i, k in samples]).long(),
               "names": [names[i] for i, _ in samples]}
