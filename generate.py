"""Make a synthetic dataset: real label maps, relabelled to balanced subtypes, painted by a model (Fig. 3).

    python generate.py                                              latent diffusion, runs/ldm: data/synth-ldm
    python generate.py --method gan --model runs/gan --data D --out data/synth-gan --ratio 1.0
    python generate.py --method inpaint --model runs/ldm --data D --out data/synth-inpaint

Image i of the set: a training patch is drawn, every tumor instance in it gets a subtype drawn uniformly, and

    gan       G(onehot, z), z ~ N(0, I)
    ldm       noise -> DDIM, conditioned on the new label -> decoder
    inpaint   the same, but only tumor is regenerated: the background keeps its pixels, bit for bit
    oracle, fresh, restain, reconstruct     no generative network: see her2/study_controls.py

The result is a dataset folder (images/, masks/, instances/, slides.csv) with manifest.jsonl, which says where
every image came from. Each has random numbers of its own, so an interruption changes nothing in the set.
"""

from her2 import run_config as configuration         # first: it makes Ctrl-C one line, also during imports
import json
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from her2 import (autoencoder, data_folder, data_regions, denoiser, diffusion, draw, inpainting, run,
                  run_distributed, run_setup, run_training, spade, study_controls)
from her2.data_classes import csv_text
from her2.data_patches import to_tensors
from her2.relabel import relabel, renumber, repaint_mask
from her2.run_errors import UserError, atomic_write, command
from her2.run_provenance import file_hash, input_hashes
from her2.run_seeds import generator, hashed_seed, numpy_generator
from her2.samplers import image_noise, sample, spaced_timesteps


@dataclass
class Config(configuration.Patches):    # data, patch, uniform, device and what else scripts share
    out: str = ""                   # folder of the synthetic dataset; empty: data/synth-METHOD
    method: Literal["gan", "ldm", "inpaint", "oracle", "fresh", "restain", "reconstruct"] = "ldm"  # what
                                    # paints: a generative model, or a control of her2/study_controls.py
    model: str = ""                 # its run folder; empty: runs/gan, runs/vq for reconstruct, else runs/ldm
    ratio: float = 1.0              # synthetic images per patch that tiles the training ROIs; 1.0 = +100 %
    count: int = 0                  # number of images; 0: from --ratio
    batch: int = 16                 # images at a time; changes nothing but speed and memory
    sampling: Literal["tumor", "subtype", "uniform"] = "tumor"  # where the source patches are centred
    relabel: bool = True            # draw a new subtype for every instance; --no-relabel keeps the real ones
    relabel_classes: str = ""       # tumor classes to draw from: A,B; empty: all that training slides show
    steps: int = 50                 # denoising steps S, 1 to T
    sampler: Literal["ddim", "ddpm", "dpm"] = "ddim"    # dpm: DPM-Solver++(2M), as good in far fewer steps;
                                    # ddpm: ancestral, all T of them; --eta has an effect on ddim only
    spacing: Literal["auto", "trailing", "leading", "log-snr"] = "auto"  # which timesteps to use: auto is
                                    # log-snr for dpm, else trailing; leading is the official one
    eta: float = 1.0                # noise that DDIM adds back, 0 = deterministic
    guidance: float = 1.0           # classifier-free guidance; 1 = plain conditional sampling
    dilate: int = 1                 # inpaint: latent cells added around the region to regenerate
    blend: int = 0                  # inpaint: pixels around the tumor that may change too, to hide seams
    erase: bool = False             # inpaint: fill tumor from around it before encoding: no old staining
    grain: bool = False             # give what a network painted the sensor noise of the source image

    def __post_init__(self):
        self.out = self.out or f"data/synth-{self.method}"
        self.model = self.model or RUN_OF.get(KIND.get(self.method), "")


FILES = ("images", "masks", "instances")     # folders in which each image of a set has a file
KIND = {"gan": "gan", "ldm": "diffusion", "inpaint": "diffusion", "reconstruct": "autoencoder"}  # of model.pt
RUN_OF = {"gan": "runs/gan", "diffusion": "runs/ldm", "autoencoder": "runs/vq"}
# PAPER: where source patches lie is not given: around tumor pixels; the balance comes from relabelling.
PRESETS = {"tiny": dict(steps=25, grain=True), "small": dict(sampler="dpm", steps=15, grain=True),
           "paper": dict(patch=512, batch=8)}


def main(argv):
    config = configuration.parse(Config, PRESETS, argv, __doc__, "generate.py")
    if config.model and config.method not in KIND:
        raise UserError(f"--model: --method {config.method} paints without a network; leave --model out")
    config.relabel &= config.method != "reconstruct"        # what it shows, the autoencoder does not change
    device, precision = run_training.pick_device(config.device, config.amp)

    # ---- 1 who paints, and from which tissue ---------------------------------------------------------------
    content = run.load_model(config.model, KIND[config.method], config.data) if config.method in KIND else {}
    # Flips are left to the segmenter's training: a source is shown as it lies in its slide.
    dataset, sampler = run_setup.training_data(config, flips=False)
    classes = dataset.classes
    for part in filter(None, (content, content.get("autoencoder"))):
        run_training.refuse_leak(part, dataset, config.model)       # it would paint what it is tested on
    if content:
        run_training.refuse_other_classes(content, dataset, config.model)
    painter = make_painter(config, content, dataset, device)
    source = partial(painter.fresh_patch if config.method == "fresh" else draw_patch, sampler)
    allowed = relabel_ids(config.relabel_classes, classes, sampler.present)
    count = config.count or config.ratio * sampler.num_patches      # patches that tile the training ROIs once
    if not 0.5 < count < 1e6:
        raise UserError(f"--ratio {config.ratio}, --count {config.count}: makes {count:g} images of "
                        f"{sampler.num_patches} patches; give another, for 1 to 999999 images")
    count = round(count)

    # ---- 2 what an earlier start of this command left: a file is there whole or not at all -----------------
    checkpoint = file_hash(run.model_file(config.model))[:16] if content else config.method
    with run_distributed.in_turn():
        folder = run.open_run("generate.py", config, device, ["generate.py", *argv],
                              input_hashes(config, dataset))
        done = {i for i in range(count) if all((folder / kind / f"{i:06d}.png").exists() for kind in FILES)}
        complete = len(done) == count and all((folder / name).exists() for name in (
            "manifest.jsonl", "slides.csv"))
    if run_distributed.gather_objects(complete)[0]:         # as process 0 found it: all paint, or none
        print(f"{folder}: complete ({count} images); nothing to do")
        return
    run_distributed.rank() or data_folder.write_split(folder / "split.json", dataset)

    # ---- 3 what image i shows: a function of (seed, i) alone -----------------------------------------------
    records = {}

    def drawn(i):
        """(patch, its new label, {instance: (old, new class)}) of image i; keeps its line of the manifest."""
        # A real patch: its tissue is where the new image will have tissue, and of the same shape. And a new
        # subtype for every instance: the step that balances (paper, section 2.2).
        patch, random = source(config.seed, i), generator(config.seed, "relabel", i)
        label, mapping = relabel(patch["label"], patch["instance"], classes, random, allowed)
        if not config.relabel:                                  # the real label: all keep their classes
            label, mapping = patch["label"], {j: (old, old) for j, (old, _) in mapping.items()}
        records[i] = {
            "image": f"images/{i:06d}.png", "source_image": patch["name"], "source_slide": patch["slide"],
            "x": patch["x"], "y": patch["y"],
            "instances": {str(j): list(pair) for j, pair in mapping.items()},             # [old, new]
            "seed": hashed_seed(config.seed, "image", i), "checkpoint": checkpoint}
        return patch, label, mapping

    # A decoder gives smooth pixels: without the sensor's noise a segmenter learns who painted, not what.
    regions = {roi.name: roi for roi in sampler.rois}
    level = lru_cache(maxsize=None)(lambda name: noise_in(regions[name], classes, config.cache))
    batches = range(0, count, config.batch)[run_distributed.rank()::run_distributed.world()]
    for first in tqdm(batches, desc=config.method, leave=False, disable=None):
        # A batch is computed whole even when part of it is there: rounding in a convolution may depend on the
        # batch, and the same command shall give the same files.
        ids = range(first, min(first + config.batch, count))
        missing = [i for i in ids if i not in done]
        if not missing:
            continue

        # ---- 4 paint. Image i has noise of its own, so it is the same whatever batch or process it is in.
        patches, labels, mappings = zip(*map(drawn, ids))
        image = torch.stack([patch["image"] for patch in patches])                      # (B, 3, H, W)
        instance = torch.stack([patch["instance"] for patch in patches])                # (B, H, W)
        label, seeds = torch.stack(labels), [records[i]["seed"] for i in ids]           # (B, H, W)
        repaint = inpainting.grow(torch.stack([*map(repaint_mask, instance, mappings)]), config.blend)
        with torch.no_grad(), precision.autocast():
            painted = painter.paint({
                "image": image, "label": label, "instance": instance, "seeds": seeds, "sources": patches,
                "onehot": run_training.one_hot(label, len(classes), device), "mappings": mappings,
                "repaint": repaint}).float().cpu()
        if config.grain and content:
            levels = torch.stack([level(patch["name"]) for patch in patches])           # (B,)
            painted = inpainting.add_grain(painted, levels, seeds)
        if config.method == "inpaint":
            # Decoding moved every pixel a little; those of the background are the photograph's again.
            painted = inpainting.paste(image, painted, repaint)

        # ---- 5 write
        for i in missing:
            k, name = i - first, f"{i:06d}.png"
            draw.save_png(folder / "images" / name, draw.to_uint8(painted[k]))
            draw.save_png(folder / "masks" / name, label[k].numpy().astype(np.uint8), classes.colors)
            draw.save_png(folder / "instances" / name, instance[k].numpy().astype(np.uint16))

    # ---- 6 what makes a dataset of these files -------------------------------------------------------------
    run_distributed.barrier()
    if not run_distributed.rank():
        for i in range(count):
            i in records or drawn(i)                # painted by another process, or by an earlier start
        write_dataset(folder, [records[i] for i in range(count)], dataset)
        ratio = f"{count / sampler.num_patches:.6g}" if config.count else config.ratio
        configuration.say_done(config, "train_seg.py", "--synthetic", folder, "--ratio", ratio)


# ---- what is painted from ----------------------------------------------------------------------------------
def draw_patch(sampler, seed, i) -> dict:
    """Source patch i: tensors image, label, instance (renumbered from 1), and where it came from."""
    which, y, x = sampler.place(numpy_generator(seed, "source", i))
    image, label, instance = sampler.window(which, y, x)
    roi = sampler.rois[which]
    return {"image": image, "label": label, "instance": renumber(instance), "name": roi.name,
            "slide": roi.slide, "x": x, "y": y}


def relabel_ids(names: str, classes, present):
    """Class ids of `--relabel-classes A,B`; without names the tumor classes that are `present` in training:
    what no training slide shows, no model has learned to paint. None where there is no tumor at all."""
    absent = [classes.names[k] for k in classes.tumor_ids if k not in present]
    if not names and absent:
        print(f"note: no {', '.join(absent)} in the training slides; no instance is relabelled to it",
              file=sys.stderr)
    ids = [classes.id_of(name) if classes.knows(name) else None for name in names.split(",") if names]
    for name, k in zip(names.split(","), ids):
        if k not in present:
            raise UserError(f"--relabel-classes: {name.strip()!r} is no tumor class, or not in the training "
                            f"slides; those are {', '.join(classes.names[k] for k in present)}")
    return ids or list(present) or None


def noise_in(roi, classes, cache) -> torch.Tensor:
    """Level () of the sensor's noise in a region, measured in its middle."""
    region = data_regions.open_roi(roi, classes, cache)
    height, width = min(region.height, 1024), min(region.width, 1024)
    window = region.window((region.height - height) // 2, (region.width - width) // 2, height, width)
    return inpainting.noise_level(to_tensors(*window)[0][None])[0]


# ---- painters ----------------------------------------------------------------------------------------------
def make_painter(config, content, dataset, device):
    """What turns a batch of source patches with new labels into images, by --method."""
    if not content:
        return (study_controls.RestainPainter(dataset, config.cache) if config.method == "restain"
                else study_controls.OraclePainter(dataset))
    painter = {"gan": SpadePainter, "reconstruct": study_controls.ReconstructPainter}.get(
        config.method, DiffusionPainter)(content, config, device)
    if config.patch % painter.multiple:
        raise UserError(f"--patch: found {config.patch}; the model needs multiples of {painter.multiple}")
    return painter


class SpadePainter:
    """paint(batch) -> (B, 3, H, W) in [-1, 1] by the GAN, from the label; `batch`: see study_controls."""

    def __init__(self, content, config, device):
        self.network = run.build_model(spade.SPADEGenerator, content, config.model, device)
        self.device, self.z_dim, self.multiple = device, content["kwargs"]["z_dim"], self.network.stride

    def paint(self, batch):
        # z from the prior: nothing of the source but its label is painted again, unlike in training.
        z = torch.stack([torch.randn(self.z_dim, generator=generator("z", seed)) for seed in batch["seeds"]])
        return self.network(batch["onehot"], z.to(self.device))                         # (B, 3, H, W)


class DiffusionPainter:
    """The same by latent diffusion: whole images, or only the tumor of `image` (method "inpaint")."""

    def __init__(self, content, config, device):
        inner = content["autoencoder"]
        self.autoencoder = run.build_model(autoencoder.VQAutoencoder, inner, config.model, device)
        network = run.build_model(denoiser.LatentDenoiser, content, config.model, device)
        self.denoiser = network.laid_out(config.patch // self.autoencoder.factor)
        self.schedule = run.build(diffusion.Schedule, content["schedule"], config.model).to(device)
        if config.guidance != 1 and content.get("drop_label") == 0:
            raise UserError(f"--guidance: found {config.guidance}; this model was trained with "
                            "--drop-label 0 and never saw an image without a label, give 1")
        try:
            spaced_timesteps(self.schedule, config.steps, config.sampler, config.spacing)
        except ValueError as error:                             # now, and not after an hour of painting
            flags = f"--steps {config.steps} --spacing {config.spacing}"
            raise UserError(f"{flags}: {error}; give another --steps") from None
        self.config, self.device = config, device
        self.multiple = self.autoencoder.factor * 2 ** (len(content["kwargs"]["channel_mult"]) - 1)

    def paint(self, batch):
        config, factor, known, cells = self.config, self.autoencoder.factor, None, None
        if config.method == "inpaint":
            image, region = batch["image"], batch["repaint"]
            # The encoder sees the whole patch: what it shall not carry on is taken out before.
            source = inpainting.erase(image, region) if config.erase else image
            z = self.autoencoder.encode(run_training.to_device(source, self.device))    # (B, C, h, w)
            known = z.float() * self.denoiser.latent_scale
            cells = inpainting.repaint_to_latent(region, factor, config.dilate).to(self.device)
        side = config.patch // factor
        noise = image_noise(batch["seeds"], (self.denoiser.config["z_channels"], side, side), self.device)
        predict = self.denoiser.predictor(self.denoiser.label_code(batch["onehot"]), config.guidance)
        x0 = sample(predict, self.schedule, noise, steps=config.steps, eta=config.eta, sampler=config.sampler,
                    spacing=config.spacing, known=known, repaint=cells)                 # (B, C, h, w)
        return self.autoencoder.decode(x0 / self.denoiser.latent_scale).float().clamp(-1, 1)


# ---- the dataset folder ------------------------------------------------------------------------------------
def write_dataset(folder, records, dataset) -> None:
    """manifest.jsonl; classes.json as in the source dataset, where it has one; preview.png, the first new
    labels above the images generated from them; slides.csv last: a folder that has it is complete."""
    atomic_write(folder / "manifest.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n"
                                                    for record in records))
    if (dataset.root / "classes.json").exists():
        atomic_write(folder / "classes.json", (dataset.root / "classes.json").read_bytes())
    names = [f"{i:06d}.png" for i in range(len(records))]
    masks, images = ([np.array(draw.Image.open(folder / kind / name)) for name in names[:8]]
                     for kind in ("masks", "images"))
    draw.save_png(folder / "preview.png", draw.image_grid(
        [[draw.colorize(mask, dataset.classes) for mask in masks], images],
        row_captions=["new label", "generated"], legend=draw.class_legend(dataset.classes, tumor_only=True)))
    # The slide of an image is that of its source: no image may be tested on what it was made from.
    atomic_write(folder / "slides.csv", csv_text([
        {"image": f"images/{name}", "mask": f"masks/{name}", "instances": f"instances/{name}",
         "slide": record["source_slide"], "split": "train"} for name, record in zip(names, records)]))


if __name__ == "__main__":
    command(main)
